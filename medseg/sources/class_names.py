"""What --classes says of masks: names, or which values stand for which class."""

import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from medseg.coco import listed
from medseg.files import check_regular, read_json
from medseg.samples import LOSSY
from medseg.sources.collect import same_form

FILES = (".txt", ".json", ".csv")
MAX_BYTES = 2**20  # of a file of names
BACKGROUND = ("background", "_background_")
IGNORED = ("ignore", "__ignore__")  # nnU-Net's and LabelMe's: there is no such thing here
REST = "*"  # every value that is not 0 and not named otherwise
NUMBER = re.compile(r"(-?\d{1,10})(?:-(-?\d{1,10}))?")
COLOUR = re.compile(r"#([0-9a-fA-F]{6})")
LABELMAP = re.compile(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?")  # CVAT's labelmap.txt
HALVES = (0, 255)  # the values that are left of masks that are cut at half


class Entry(NamedTuple):
    """Values of one class.

    text: as the user wrote them. space: "number", "colour" (0xRRGGBB), REST, or "name" of a value
    that is resolved later. first, last: the values. name: of the class; None for background.
    """

    text: str
    space: str
    first: int
    last: int
    name: str | None


@dataclass(frozen=True)
class ClassValues:
    """Which values of masks stand for which class.

    entries: of Entry. source: "--classes" or the path of the file, for messages. typed: whether
    each value was written by hand rather than taken from a list of all there are. notes: lines to
    print.
    """

    entries: tuple
    source: str = "--classes"
    typed: bool = True
    notes: tuple = ()

    @property
    def names(self):
        """The names of the classes, in the order in which they are named first."""
        return list(dict.fromkeys(entry.name for entry in self.entries if entry.name is not None))

    @property
    def has_colours(self):
        return any(entry.space == "colour" for entry in self.entries)

    @property
    def has_names(self):
        """Whether values are named as the text of masks has them, and `resolved` is needed."""
        return any(entry.space == "name" for entry in self.entries)

    @property
    def only_halves(self):
        """Whether no other numbers than 0 and 255 are named: masks may be cut at half."""
        numbers = (entry for entry in self.entries if entry.space == "number")
        return all(entry.first == entry.last and entry.first in HALVES for entry in numbers)

    @property
    def only_rest(self):
        """Whether all that is no background is one class, whatever its value."""
        return all(entry.space == REST for entry in self.entries)

    @property
    def only_ranges(self):
        """Whether all values are named by ranges, which hold what a lossy format changes."""
        return all(entry.first < entry.last for entry in self.entries if entry.name is not None)

    @cached_property
    def _single(self):
        """{(space, value): entries} of the entries of one value each."""
        single = {}
        for entry in self.entries:
            if entry.first == entry.last:
                single.setdefault((entry.space, entry.first), []).append(entry)
        return single

    @cached_property
    def _ranges(self):
        return [entry for entry in self.entries if entry.first != entry.last]

    def entries_of(self, encoding, value, rest=True):
        """The entries that name a value of `read_mask`. rest: REST too, where no other does."""
        named = self._named(encoding, value)
        return named or (self._single.get((REST, 0), []) if value and rest else [])

    def _named(self, encoding, value):
        if encoding == "colour":
            return self._single.get(("colour", value), [])
        named = list(self._single.get(("number", value), ()))
        named += [entry for entry in self._ranges if entry.first <= value <= entry.last]
        # A grey may be named as the colour that it is.
        white = {"1-bit": 1, "grey": 255, **dict.fromkeys(LOSSY, 255)}.get(encoding)
        if not named and white and 0 <= value <= white:
            named = self._single.get(("colour", value * (0xFFFFFF // white)), [])
        return named

    @staticmethod
    def classes_of(entries):
        """The names of the classes of entries, () for background."""
        return tuple(dict.fromkeys(entry.name for entry in entries if entry.name is not None))

    def resolved(self, stated):
        """With the names of values replaced by these. stated: {value: name}, of the masks' text.

        Raises ValueError for a name that is not there.
        """
        numbers = {same_form(name): value for value, name in stated.items()}
        unknown = [e.text for e in self.entries if e.space == "name" and e.text not in numbers]
        if unknown:
            known = "write a number, a range (1-59), a colour ('#ff0000') or '*'"
            if numbers:
                known = f"the text of the masks names {listed(list(numbers))}"
            raise ValueError(f"{self.source}: {unknown[0]!r:.60} is no value of a mask: {known}")
        entries = []
        for entry in self.entries:
            if entry.space == "name":
                value = numbers[entry.text]
                entry = entry._replace(space="number", first=value, last=value)
            entries.append(entry)
        if self.has_names:
            _check_overlaps(entries, self.source)
        return replace(self, entries=tuple(entries))


# ---------------------------------------------------------------- the command line


def parse_classes(text):
    """--classes as --masks takes it: ClassValues, or names in ascending order of the values.

    text: 'A,B'; 'VALUES=NAME,...' with a number, a range (1-59), a colour (#ff0000), the name of a
    value or '*'; or the path of a file of FILES. Raises ValueError or FileNotFoundError.
    """
    if _is_file_name(text):
        return _read_file(Path(text))
    parts = _split(text)
    if not any("=" in part for part in parts):
        return parts
    return _parse_pairs(parts, "--classes")


def parse_labels(text):
    """--classes as LabelMe and COCO files take it: the list of the labels to use.

    text: 'A,B', or the path of a file of FILES, whose background is left out. Raises as
    `parse_classes`.
    """
    if not _is_file_name(text):
        return _split(text)
    labels = _read_file(Path(text))
    return labels.names if isinstance(labels, ClassValues) else labels


def _split(text):
    return [same_form(name.strip()) for name in text.split(",")]


def _is_file_name(text):
    if text.lower().endswith(FILES):
        return True
    if "," not in text and "=" not in text and os.path.splitext(text)[1] and os.path.isfile(text):
        raise ValueError(f"--classes: {text} is a file, and one of names is {', '.join(FILES)}")
    return False


def _parse_pairs(parts, source):
    """The ClassValues of ['1-59=nucleus', ...]."""
    entries, notes = [], []
    for part in parts:
        values, given, name = (piece.strip() for piece in part.partition("="))
        if not given:
            raise ValueError(
                f"{source}: {part!r:.60} has no value: write VALUE=NAME for each class"
            )
        if not values:
            raise ValueError(f"{source}: {part!r:.60} has no value: write VALUE=NAME")
        entry = _entry(values, name, notes, source)
        if entry.space == "name" and _value_space(name):
            raise ValueError(
                f"{source}: {part!r:.60}: the value comes first, as in {name}={values}"
            )
        entries.append(entry)
    _check_overlaps(entries, source)
    return ClassValues(tuple(entries), source, notes=tuple(notes))


def _value_space(text):
    """(space, first, last) of '1', '1-59', '#ff0000' or '*', else None."""
    if text == REST:
        return REST, 0, 0
    if match := COLOUR.fullmatch(text):
        return "colour", int(match[1], 16), int(match[1], 16)
    if match := NUMBER.fullmatch(text):
        return "number", int(match[1]), int(match[2] or match[1])
    return None


def _entry(text, name, notes, source):
    """The Entry of values, as they are written, and the name of their class; may add a note."""
    if not name or not name.isprintable():
        raise ValueError(f"{source}: {text!r:.60} has the name {name!r:.60}: empty or unprintable")
    space, first, last = _value_space(text) or ("name", 0, 0)
    if first > last:
        raise ValueError(f"{source}: {text} ends before it begins: write {last}-{first}")
    is_background = name.casefold() in BACKGROUND or name.casefold() in IGNORED
    if name.casefold() in IGNORED:
        notes.append(f"{text} ({name}) counts as background, as nothing is left out of training")
    return Entry(text, space, first, last, None if is_background else name)


def _check_overlaps(entries, source):
    """ValueError where two entries give one value to different classes."""
    widest = {}
    for entry in sorted(entries, key=lambda e: (e.first, e.last)):
        space = (entry.space, entry.text) if entry.space == "name" else entry.space
        before = widest.get(space)
        if before and entry.first <= before.last:
            if before.name != entry.name:
                pair = [f"{e.text}={e.name or BACKGROUND[0]}" for e in (before, entry)]
                raise ValueError(f"{source}: {' and '.join(pair)} give one value to two classes")
            if entry.last <= before.last:
                continue
        widest[space] = entry


# ---------------------------------------------------------------- files of names


def _read_file(path):
    """What `parse_classes` returns, of a file.

    Text has a name a line: with the background first, line by line those of 0, 1, 2, ..., as
    PaddleSeg's class_names.txt; else in ascending order of the values; or VALUE=NAME; or a colour
    each, as CVAT's labelmap.txt. CSV has a value and a name a line, under a head, as Roboflow's
    _classes.csv. JSON is an
    object of label numbers, or has one as "labels", as nnU-Net's dataset.json.
    """
    check_regular(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file of names")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB, which no file of names is")
    if path.suffix.lower() == ".json":
        return _from_json(read_json(path), path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no text in UTF-8: save it as such") from None
    return _from_lines([same_form(line.strip()) for line in lines], path)


def _from_lines(lines, path):
    if not lines:
        raise ValueError(f"{path}: holds no names")
    if path.suffix.lower() == ".csv":
        pairs = [map(str.strip, line.split(",", 1)) for line in lines[1:] if "," in line]
        return _numbered(list(map(tuple, pairs)), path)
    if all("=" in line for line in lines):
        return _parse_pairs(lines, str(path))
    if all(LABELMAP.fullmatch(line) for line in lines if not line.startswith("# label:")):
        rows = [match for match in map(LABELMAP.fullmatch, lines) if match]
        colours = ["#" + "".join(f"{int(part):02x}" for part in row.groups()[1:]) for row in rows]
        return _numbered([(c, row[1]) for c, row in zip(colours, rows, strict=True)], path)
    if lines[0] in IGNORED:  # the first line of LabelMe's labels.txt
        lines = lines[1:]
    for number, line in enumerate(lines, start=1):
        if not line or not line.isprintable():
            raise ValueError(f"{path}: line {number} is {line!r:.60}, not a name")
    if not lines or lines[0].casefold() not in BACKGROUND:
        return lines
    return _numbered([(str(number), line) for number, line in enumerate(lines)], path)


def _from_json(content, path):
    labels = content.get("labels", content) if isinstance(content, dict) else content
    if isinstance(labels, list) and all(isinstance(name, str) for name in labels):
        return _from_lines([same_form(name.strip()) for name in labels], path)
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f'{path}: holds no label numbers, such as {{"1": "spleen"}}')
    by_value = all(_value_space(key) and isinstance(name, str) for key, name in labels.items())
    pairs, regions = [], False
    for key, entry in labels.items():
        if by_value:
            pairs.append((key, same_form(entry.strip())))
            continue
        numbers = entry if isinstance(entry, list) else [entry]
        regions |= isinstance(entry, list)
        for number in numbers:
            if not NUMBER.fullmatch(str(number)):
                raise ValueError(f"{path}: {key!r:.60} is {entry!r:.60}, not a label number")
            pairs.append((str(number), same_form(key.strip())))
    return _numbered(pairs, path, regions)


def _numbered(pairs, path, regions=False):
    """The ClassValues of [(value, name)] of a file, where 0 is the background.

    regions: classes may share values, and their order is the file's.
    """
    entries, notes = [], []
    for value, name in pairs:
        entry = _entry(value, name, notes, path)
        if entry[1:4] == ("number", 0, 0):
            if entry.name is not None:
                notes.append(f"0 ({name}) counts as background: --classes 0=NAME makes it a class")
            entry = entry._replace(name=None)
        entries.append(entry)
    if not regions:
        _check_overlaps(entries, path)
        entries.sort(key=lambda entry: entry.first)
    return ClassValues(tuple(entries), str(path), typed=False, notes=tuple(notes))
