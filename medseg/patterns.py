"""A pattern says which files are images, which are masks, and what identifies an image.

`*` is any text within one part of a path, `**/` any folders, `{a,b}` one of several texts, `.*` at
the end any known suffix. Of the placeholders, `{id}` identifies an image (`{id:**}` over several
parts of the path), `{n}` is a further part of that, and `{group}` too, which is kept in one split.
`{channel}` is in the pattern of images, a file for each; `{class}` and `{part}` in that of masks,
where files that differ in `{part}` alone are united. Every other character is itself.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from medseg.coco import listed
from medseg.files import DICOM_SUFFIXES, VOLUME_SUFFIXES
from medseg.images import SUFFIXES

IDENTITY = ("group", "id", "n")
SIDES = {"images": (*IDENTITY, "channel"), "masks": (*IDENTITY, "class", "part")}
PLACEHOLDERS = ("id", "n", "group", "channel", "class", "part")
KNOWN = "|".join(map(re.escape, (*SUFFIXES, ".npy", *VOLUME_SUFFIXES, *DICOM_SUFFIXES)))
TOKEN = re.compile(r"(\*+)|\{([^{}]*,[^{}]*)\}|\{([^{},]*)\}|(.)", re.DOTALL)


class Pair(NamedTuple):
    """One image with its masks.

    parts: the texts of {group}, {id} and {n} in the order of the pattern. group: that of {group},
    "" without. images: {channel or None: Path}. masks: {class or None: [Path, ...]}.
    """

    parts: tuple
    group: str
    images: dict
    masks: dict


def has_placeholder(text):
    """Whether a text is a pattern with placeholders, and not the name of a file or a folder."""
    return not os.path.lexists(text) and bool(re.search(r"\{[^{},]*\}", text))


def name_pattern(text):
    """The last parts of a pattern, from its {channel} on: what the files of a case are called."""
    parts = text.replace(os.sep, "/").split("/")
    return "/".join(parts[min(n for n, part in enumerate(parts) if "{channel}" in part) :])


def match(pattern, channels=None, *, need_id=True, only=None):
    """[Pair] of the images that a pattern names, without masks, sorted by what identifies them.

    channels: names of {channel} to use, in this order; by default all, sorted. need_id: whether
    {id} has to be there; without one all files are one image. only: a Path, of whose image alone
    files are taken. Raises FileNotFoundError where there are none, ValueError where an image lacks
    a channel.
    """
    side = Side(pattern, "images", need_id)
    files, names = side.find(channels), side.identity()
    if only is not None:
        own = [file.key(names) for file in files.values() if Path(file.path) == only]
        files = {path: file for path, file in files.items() if [file.key(names)] == own}
        if not files:
            raise FileNotFoundError(f"{pattern}: does not match {only}")
    cases, problem = make_cases(files.values(), names, side, channels)
    if problem:
        raise ValueError(f"{pattern}: {problem}")
    return [case for _, case in sorted(cases.items())]


# ---------------------------------------------------------------- the files of one side


class File(NamedTuple):
    path: str
    relative: str  # to the folder before the first wildcard, in one Unicode form
    parts: tuple  # of the pattern that matches it
    values: dict  # {placeholder: text}

    def key(self, names):
        """The texts of placeholders as they are compared."""
        return tuple(self.values[name].casefold() for name in names)

    def spell(self, names):
        return "/".join(self.values[name] for name in names) or os.path.dirname(self.path)

    def readings(self, lengths):
        """Yield the file in each way that its name can be read, the longest identity first.

        lengths: [((placeholder, length of its text), ...)], those of the images.
        """
        yield self
        for own in lengths:
            if matched := compile_parts(self.parts, own).fullmatch(self.relative):
                yield self._replace(values=matched.groupdict())


class Side:
    """The pattern of the images or of the masks.

    names: its placeholders. folder: below which paths of these parts are looked for.
    """

    def __init__(self, text, side, need_id=True):
        self.text, names = text, []
        self.folder, self.parts = literal_folder(text)
        for part in self.parts:
            names += _check_part(text, part, side)
        self.names = tuple(dict.fromkeys(names))
        if need_id and "id" not in self.names:
            raise ValueError(f"{text}: say with {{id}} which part of the path identifies an image")

    def identity(self):
        return tuple(name for name in self.names if name in IDENTITY)

    def find(self, channels=None):
        """{path: File}; channels: those of {channel} alone. FileNotFoundError for none."""
        if channels and "channel" not in self.names:
            raise ValueError(f"{self.text}: --channels goes with {{channel}} in this pattern")
        found, expression = {}, compile_parts(self.parts, channels=tuple(channels or ()))
        for name in walk(self.folder, self.parts):
            if matched := expression.fullmatch(same_form(name)):
                path = os.path.join(self.folder, name)
                found[path] = File(path, same_form(name), self.parts, matched.groupdict())
        if not found and channels:
            there = sorted({file.values["channel"] for file in self.find().values()})
            raise FileNotFoundError(
                f"{self.text}: none has the channels {listed(channels)}, but {listed(there)}"
            )
        if not found:
            nearest = _describe_nearest(self.folder, self.parts)
            raise FileNotFoundError(f"{self.text}: matches nothing; {nearest}")
        return found


def same_form(text):
    """Text in the one Unicode form in which names are compared: macOS stores another."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def literal_folder(text):
    """(the folder before the first wildcard, the parts that follow); the last is "" after a /."""
    path = os.path.expanduser(text).replace(os.sep, "/")
    folder = Path(path).anchor
    *parts, last = path[len(folder) :].split("/")
    parts = [part for part in parts if part]
    while parts:
        place = os.path.join(folder, parts[0])
        if not os.path.isdir(place):
            if "*" in parts[0] or "{" in parts[0]:
                break
            place = os.path.join(folder, _alike_folder(text, folder, parts[0]))
        folder = place
        parts.pop(0)
    return folder, (*parts, last)


def _alike_folder(text, folder, name):
    """The name of a folder but for its case and Unicode form; FileNotFoundError without one."""
    with os.scandir(folder or ".") as entries:
        there = sorted(entry.name for entry in entries if entry.is_dir())
    for other in there:
        if same_form(other).casefold() == same_form(name).casefold():
            return other
    what = f"there is no folder {os.path.join(folder, name)}; {folder or 'this folder'} "
    raise FileNotFoundError(f"{text}: {what}{describe_folder(folder)}")


def _check_part(text, part, side):
    """The placeholders in a part of a pattern; ValueError for one that cannot be there."""
    names, previous = [], False
    for token in TOKEN.finditer(part):
        inner = token[3]
        if inner is not None:
            name, colon, stars = inner.partition(":")
            if name not in PLACEHOLDERS or colon and (stars != "**" or name not in IDENTITY):
                known = ", ".join(f"{{{known}}}" for known in PLACEHOLDERS)
                raise ValueError(f"{text}: {{{inner}}} is none of {known}")
            if name not in SIDES[side]:
                other = "images" if name == "channel" else "masks"
                raise ValueError(f"{text}: {{{name}}} belongs to the {other}")
            if previous:
                raise ValueError(f"{text}: two placeholders need a text between them")
            names.append(name)
        previous = inner is not None
    return names


@functools.lru_cache(4096)
def compile_parts(parts, lengths=(), channels=()):
    """The regular expression of the parts of a pattern.

    A placeholder takes as much as it can, from the left; a `*` as little. lengths: ((placeholder,
    length of its text), ...) where they are known. channels: the texts of {channel} to match.
    """
    expression, seen = "", set()
    for part in parts[:-1]:
        between = _translate(part, seen, dict(lengths), channels) + "/"
        expression += "(?:[^/]+/)*?" if part == "**" else between
    last = parts[-1].removesuffix(".*")
    expression += _translate(last, seen, dict(lengths), channels)
    expression += "" if last == parts[-1] else f"(?:{KNOWN})"
    return re.compile(expression, re.IGNORECASE | re.DOTALL)


def _translate(part, seen, lengths, channels):
    """The regular expression of one part; seen: the placeholders that were there before."""
    expression = ""
    for stars, choices, inner, other in TOKEN.findall(same_form(part)):
        name, _, several = inner.partition(":")
        if other:
            expression += re.escape(other)
        elif stars:
            expression += "[^/]*?"
        elif choices:
            each = (re.escape(choice).replace(r"\*", "[^/]*?") for choice in choices.split(","))
            expression += f"(?:{'|'.join(each)})"
        elif name in seen:
            expression += f"(?P={name})"
        elif name == "channel" and channels:
            expression += f"(?P<channel>{'|'.join(map(re.escape, map(same_form, channels)))})"
        else:
            count = f"{{{lengths[name]}}}" if name in lengths else "*" if name == "part" else "+"
            expression += f"(?P<{name}>{'.' if several else '[^/]'}{count})"
        seen.add(name)
    return expression


def walk(top, parts):
    """Yield the files below a folder that the parts of a pattern may match, relative and with /.

    After a pattern that ends in / these are folders. Folders that cannot lead to a match are left
    out, and so are hidden ones; links are followed, but not in a circle.
    """
    several = [number for number, part in enumerate(parts) if part == "**" or ":**}" in part]
    depths = range(1, several[0] + 1 if several else len(parts))  # at which names are known
    expressions = [compile_parts((*parts[:depth], "")) for depth in depths]
    pending = [("", ())]
    while pending:
        place, links = pending.pop()
        here, depth = os.path.join(top, place), place.count("/")
        with os.scandir(here or ".") as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in found:
            name, above = place + entry.name, links
            is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
            if not is_folder:
                if parts[-1]:
                    yield name
                continue
            name += "/"
            if not parts[-1]:
                yield name
            if depth < len(expressions):
                leads_on = expressions[depth].fullmatch(same_form(name))
            else:
                leads_on = several
            if not leads_on:
                continue
            if entry.is_symlink():
                above = (*links, os.path.join(os.path.realpath(here), ""))
                target = os.path.join(os.path.realpath(entry.path), "")
                if any(folder.startswith(target) for folder in above):
                    continue
            pending.append((name, above))


# ---------------------------------------------------------------- images and their channels


def make_cases(files, names, side, channels):
    """({key: Pair without masks}, what is wrong with the channels of others, or None).

    Raises ValueError where two files are the same channel of one image.
    """
    by_key, spelled = {}, {}
    for file in sorted(files):
        own = by_key.setdefault(file.key(names), {})
        name = file.values.get("channel")
        name = name and spelled.setdefault(name.casefold(), name)
        if name in own:
            raise ValueError(
                f"{own[name].path} and {file.path} are both the image {file.spell(names)}: name "
                "one suffix, or put {n} or {channel} where their paths differ"
            )
        own[name] = file
    sets = Counter(frozenset(own) for own in by_key.values()).most_common(1)
    order = sorted(sets[0][0], key=str) if sets else []
    if channels:
        order = [spelled.get(name.casefold(), name) for name in channels]
    wrong = [own for own in by_key.values() if own.keys() != set(order)]
    problem = _describe_channels(wrong, order, len(by_key), names) if wrong else None
    cases, groups = {}, {}
    for key, own in by_key.items():
        if own.keys() == set(order):
            values = own[order[0]].values
            group = values.get("group", "")
            parts = tuple(values[name] for name in side.identity())
            paths = {name: Path(own[name].path) for name in order}
            cases[key] = Pair(parts, groups.setdefault(group.casefold(), group), paths, {})
    return cases, problem


# ---------------------------------------------------------------- messages


def _describe_channels(wrong, order, total, names):
    """What is wrong with the first image that has other channels than `order`."""
    own, file = wrong[0], next(iter(wrong[0].values()))
    line = f"{len(wrong)} of {total} images have other channels: {file.spell(names)} has "
    if missing := [name for name in order if name not in own]:
        start, end = compile_parts(file.parts).fullmatch(file.relative).span("channel")
        folder = file.path[: len(file.path) - len(file.relative)]
        looked_for = file.relative[:start] + missing[0] + file.relative[end:]
        return f"{line}no {missing[0]}: there is no {folder}{looked_for}"
    extra = next(name for name in own if name not in order)
    return f"{line}{extra} too ({own[extra].path}): choose with --channels {','.join(order)}"


def _describe_nearest(folder, parts):
    """How far a pattern that matches nothing leads, and what is there."""
    for number in range(len(parts) - 1, 0, -1):
        head, rest = (*parts[:number], ""), "/".join(parts[number:])
        found = [n for n in walk(folder, head) if compile_parts(head).fullmatch(same_form(n))]
        if found:
            place = os.path.join(folder, min(found))
            return f"{place} is there and {describe_folder(place)}, but nothing called {rest}"
    return f"{folder or 'this folder'} {describe_folder(folder)}"


def describe_folder(folder):
    """'holds 2 .png, such as a.png, and 1 folder, such as old'."""
    kinds = {}
    for name in sorted(name for name in os.listdir(folder or ".") if name[0] != "."):
        is_folder = os.path.isdir(os.path.join(folder, name))
        kind = "folders" if is_folder else os.path.splitext(name)[1] or "files without a suffix"
        kinds.setdefault(kind, []).append(name)
    kinds = sorted(kinds.items(), key=lambda item: -len(item[1]))[:3]
    shown = [f"{len(own)} {kind}, such as {own[0]}" for kind, own in kinds]
    return f"holds {' and '.join(shown) or 'nothing'}"
