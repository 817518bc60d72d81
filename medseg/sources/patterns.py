"""Which files `--masks` names: folders, files, and patterns such as 'scans/*_mask.png'."""

import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from medseg.coco import MAX_CLASSES, listed
from medseg.files import (
    DICOM_SUFFIXES,
    VOLUME_SUFFIXES,
    base_name,
    check_regular,
    file_format,
)
from medseg.formats.mask_files import MASK_SUFFIXES as PICTURE_SUFFIXES
from medseg.formats.own_files import drawn_beside_masks
from medseg.images import SUFFIXES
from medseg.sources.collect import (
    is_wanted,
    list_files,
    named_alike,
    printable,
    same_form,
    walk,
)

IMAGE_SUFFIXES = SUFFIXES
MASK_SUFFIXES = (*PICTURE_SUFFIXES, *VOLUME_SUFFIXES)
EACH = "*"  # in place of a class name: a class for each text that the last wildcard matches
COMMA = re.compile(r",(?![^{}]*\})")  # none of those in {png,jpg}
WILDCARD = re.compile(r"(\*+)|(\?)|\[([^]]+)\]|\{([^{}]*,[^{}]*)\}|(.)", re.DOTALL)


@dataclass(frozen=True)
class FileSet:
    """The files that one side of `--masks` names.

    text: as it was given. root: a folder that all files are below. keys: {Path: key}, sorted. A
    key is what the wildcards matched, then for a file below a folder the folders between and its
    stem; () for a single file. places: the folders and files that were named or matched.
    """

    text: str
    root: Path
    keys: dict
    places: tuple

    def relative(self, path):
        """The Path of one of the files below `root`."""
        return Path(os.path.relpath(path, self.root))

    def without(self, places):
        """The FileSet without the files at some of `real_places`."""
        kept = {path for place, path in self.real_places().items() if place not in places}
        return replace(self, keys={path: key for path, key in self.keys.items() if path in kept})

    def real_places(self):
        """{(folder without links, name): Path} of each file: two links to one are two files."""
        real = {folder: os.path.realpath(folder) for folder in {p.parent for p in self.keys}}
        return {(real[path.parent], path.name): path for path in self.keys}


def find_sides(images_text, texts):
    """(images, masks) of what `--masks` names: a FileSet, and {class name: FileSet}.

    texts: {class name: text of its masks}; the name is None for masks without a class. EACH is a
    class for each text that the last wildcard matches, in the order of their names, without the
    files of other classes. Where images and masks share files, they belong to the side that names
    fewer; where both sides are the same files, they stay in both. Raises ValueError or
    FileNotFoundError where nothing is found, or where it cannot be told what is meant.
    """
    images = find_files(images_text, IMAGE_SUFFIXES, medical=True)
    if None in texts:
        for file, folder in ((images_text, texts[None]), (texts[None], images_text)):
            series = folder == images_text and file_format(folder) == file_format(file) == "volume"
            if os.path.isfile(file) and os.path.isdir(folder) and not series:
                raise ValueError(f"{file} is a file and {folder} a folder: name two of a kind")
    masks = {name: find_files(text, MASK_SUFFIXES) for name, text in texts.items() if name != EACH}
    if EACH in texts:
        masks |= _find_each(texts[EACH], masks)
    images, masks = _leave_drawn_aside(images, masks)
    images = _fold_series(images, masks)
    _check_one_class(masks)
    _check_formats([*images.keys, *(path for files in masks.values() for path in files.keys)])
    return _separate(images, masks)


# ---------------------------------------------------------------- the files of one side


class _Match(NamedTuple):
    """A file that a folder, file or pattern names."""

    path: Path
    stars: tuple  # what the wildcards matched
    below: tuple  # of a file below a folder that was named or matched: folders between, and stem


def find_files(text, suffixes, *, medical=False):
    """The FileSet of folders, files and patterns that commas join.

    suffixes, medical: as in `list_files`. Raises FileNotFoundError or ValueError where there are
    none.
    """
    return _make_set(text, *_find_matches(text, suffixes, medical))


def _make_set(text, matches, bases, places):
    keys = {}
    for match in sorted(matches):
        keys.setdefault(match.path, (*match.stars, *match.below))
    if len(keys) == 1 and not matches[0].stars and places == [matches[0].path]:
        keys[matches[0].path] = ()
    root = os.path.commonpath([os.path.abspath(base) for base in bases])
    return FileSet(text, Path(root), keys, tuple(places))


def _find_matches(text, suffixes, medical=False):
    """([_Match], folders from which they were looked for, folders and files that were matched)."""
    matches, bases, places = [], [], []
    pieces = [text] if os.path.lexists(text) else [piece.strip() for piece in COMMA.split(text)]
    for piece in pieces:
        for base, path, stars in _expand(piece):
            bases.append(base)
            places.append(path)
            if path.is_dir():
                for file in list_files(path, suffixes, medical=medical):
                    below = (*file.relative_to(path).parent.parts, base_name(file))
                    matches.append(_Match(file, stars, below))
            elif text == piece and not stars or is_wanted(path, suffixes, medical=medical):
                matches.append(_Match(path, stars, () if stars else (base_name(path),)))
    if not matches:
        known = ", ".join((*suffixes, *((*DICOM_SUFFIXES, *VOLUME_SUFFIXES) if medical else ())))
        raise ValueError(f"{text}: holds no {known} files")
    return matches, bases, places


def _expand(piece):
    """[(folder before the first wildcard, path, what the wildcards matched)] of one pattern.

    A folder or a file is a pattern without wildcards. Raises FileNotFoundError without a match.
    """
    path = Path(os.path.expanduser(piece))
    check_regular(path)
    base, parts = (path, []) if path.exists() else (Path(), list(path.parts))
    if parts[1:] and parts[-1] == "**":
        parts.pop()
    while parts and not _has_wildcard(parts[0]):
        found = _children(base, parts.pop(0))
        if not found:
            raise FileNotFoundError(f"{piece}: no such folder or file")
        base = found[0][0]
    if not parts:
        return [(base if base.is_dir() else base.parent, base, ())]
    matched = [(place, _without_suffix(place, stars)) for place, stars in _match(base, parts)]
    if not matched:
        raise FileNotFoundError(f"{piece}: matches nothing{_describe_folder(base)}")
    return [(base, *match) for match in sorted(matched)]


def _without_suffix(path, stars):
    """What the wildcards matched, the last without the suffix of the file where it holds that."""
    suffix = path.name[len(base_name(path)) :]
    if suffix and stars and path.is_file() and stars[-1].endswith(suffix):
        return (*stars[:-1], stars[-1].removesuffix(suffix))
    return stars


def _match(place, parts, stars=()):
    """Yield (path, what the wildcards matched) below `place` of the parts of a pattern."""
    if not parts:
        yield place, stars
    elif parts[0] == "**":
        for folder, _ in walk(place):
            between = folder.relative_to(place).parts
            yield from _match(folder, parts[1:], (*stars, "/".join(between)))
    else:
        for child, matched in _children(place, parts[0]):
            yield from _match(child, parts[1:], (*stars, *matched))


def _children(place, part):
    """[(path, what the wildcards matched)] of what one part of a pattern names in a folder."""
    if not _has_wildcard(part):
        return [(place / name, ()) for name in named_alike(place, part)]
    pattern, found = re.compile(_translate(part), re.DOTALL), []
    for name in os.listdir(place) if place.is_dir() else ():
        match = pattern.fullmatch(same_form(name))
        if match and (part.startswith(".") or not name.startswith(".")):
            found.append((place / name, match.groups()))
    return found


def _has_wildcard(part):
    return any(match[0] != match[5] for match in WILDCARD.finditer(part))


def _translate(part, group="({})"):
    """The regular expression of one part of a pattern, in which each wildcard is a group."""
    expression = ""
    for stars, _, characters, choices, other in WILDCARD.findall(same_form(part)):
        if other:
            expression += re.escape(other)
            continue
        inner = ".*" if stars else "."
        if characters:
            negated = characters[0] in "!^" and len(characters) > 1
            escaped = re.sub(r"([\\\[^&~|])", r"\\\1", characters[negated:])
            inner = f"[{'^' * negated}{escaped}]"
        elif choices:
            inner = "|".join(_translate(choice, "(?:{})") for choice in choices.split(","))
        expression += group.format(inner)
    return expression


def _describe_folder(folder):
    """'; D holds 3 .png, 2 folders' of a folder in which a pattern matched nothing."""
    names = os.listdir(folder) if folder.is_dir() else []
    kinds = Counter("folders" if (folder / n).is_dir() else Path(n).suffix for n in names)
    shown = [f"{count} {kind or 'without a suffix'}" for kind, count in kinds.most_common(4)]
    return f"; {folder} holds {', '.join(shown)}" if shown else ""


# ---------------------------------------------------------------- classes, and both sides


def _find_each(text, named):
    """{class name: FileSet} of '*=TEXT', without the files of the `named` classes."""
    for piece in COMMA.split(text):
        last = Path(piece.strip()).name
        if last == "**" or not _has_wildcard(last):
            raise ValueError(
                f"--masks: {EACH}={text}: a class is named by what the last * matches: give it a * "
                f"in its last part, as '{EACH}={os.path.join(piece.strip(), '*')}'"
            )
    matches, bases, places = _find_matches(text, MASK_SUFFIXES)
    by_class = {}
    for match in matches:
        own = match._replace(stars=match.stars[:-1])
        by_class.setdefault(match.stars[-1], []).append(own)
    taken = {place for files in named.values() for place in files.real_places()}
    sets = {name: _make_set(text, by_class[name], bases, places) for name in sorted(by_class)}
    sets = {name: files.without(taken) for name, files in sets.items()}
    by_class = {name: files for name, files in sets.items() if files.keys}
    if len(by_class) > MAX_CLASSES:
        raise ValueError(
            f"--masks: the last * of {EACH}={text} matches {len(by_class)} texts, more than the "
            f"{MAX_CLASSES} classes that are told apart, such as {listed(sorted(by_class), 3)}"
        )
    if both := sorted(by_class.keys() & named.keys()):
        raise ValueError(
            f"--masks: the class {both[0]!r:.60} is there twice, also by {EACH}={text}"
        )
    return by_class


def _check_one_class(masks):
    """ValueError where a file is a mask of two classes."""
    class_of = {}
    for name, files in masks.items():
        for place, path in files.real_places().items():
            other = class_of.setdefault(place, name)
            if other != name:
                raise ValueError(f"{path}: is a mask of {other} and of {name}: give it one class")


def _check_formats(files):
    """ValueError where some files are volumes and others are not."""
    volumes = [path for path in files if file_format(path) == "volume"]
    if volumes and len(volumes) < len(files):
        other = next(path for path in files if file_format(path) != "volume")
        raise ValueError(
            f"{volumes[0]} is a volume and {other} is not: volumes need masks that are volumes, "
            "and folders or patterns of their own"
        )


def _fold_series(images, masks):
    """images, each folder of them as one where they are DICOM and the masks are volumes."""
    of_masks = {file_format(path) for files in masks.values() for path in files.keys}
    if of_masks != {"volume"} or {*map(file_format, images.keys)} != {"dicom"}:
        return images
    return replace(images, keys={path.parent: key[:-1] for path, key in images.keys.items()})


def _leave_drawn_aside(images, masks):
    """(images, masks) without the pictures that predict.py draws beside its masks."""
    sides = [images, *masks.values()]
    drawn = drawn_beside_masks({path for files in sides for path in files.keys})
    if not drawn:
        return images, masks
    print(
        f"left aside: {len(drawn)} pictures that these scripts draw, such as "
        f"{printable(min(drawn).name)}"
    )

    def without_drawn(files):
        keys = {path: key for path, key in files.keys.items() if path not in drawn}
        if not keys:
            raise ValueError(f"{files.text}: holds only pictures that these scripts draw")
        return replace(files, keys=keys)

    return without_drawn(images), {name: without_drawn(files) for name, files in masks.items()}


def _separate(images, masks):
    """(images, masks), each without the files of the other; the same FileSet where all are both."""
    of_images = images.real_places()
    of_masks = {place for files in masks.values() for place in files.real_places()}
    both = of_images.keys() & of_masks
    if not both:
        return images, masks
    if of_images.keys() == of_masks:
        if None in masks:
            return images, {None: replace(masks[None], keys=images.keys, root=images.root)}
        raise ValueError(f"{images.text}: names the same files as the masks: leave some for images")
    if of_masks <= of_images.keys():
        return images.without(both), masks
    if of_images.keys() <= of_masks:
        return images, {name: files.without(both) for name, files in masks.items()}
    raise ValueError(
        f"{of_images[min(both)]}: is among the images, {images.text}, and among the masks, and so "
        f"are {len(both) - 1} more: give patterns that do not overlap"
    )
