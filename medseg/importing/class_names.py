"""What --classes says of masks: names of classes, or which values belong to which class."""

import os
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from medseg.coco import listed
from medseg.files import check_regular, read_json
from medseg.patterns import same_form

ONE_CLASS = "foreground"
FILES = (".txt", ".json", ".csv")
IGNORED = ("ignore", "__ignore__")  # nnU-Net's and LabelMe's: nothing is left out of training here
BACKGROUND = ("background", "_background_", *IGNORED)
COLOUR = 1 << 31  # 0xRRGGBB + COLOUR is the value of a colour
REST = "*"  # every value that is not 0 and not named otherwise
VALUE = re.compile(r"(-?\d{1,10})(?:-(-?\d{1,10}))?|#([\da-fA-F]{6})|\*")
LABELMAP = re.compile(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?")  # CVAT's labelmap.txt
FORMS = (
    "write NAME,NAME in ascending order of the values, or VALUE=NAME,VALUE=NAME with a number, "
    "a range (1-59), a colour ('#ff0000') or '*', or a .txt, .json or .csv file of names"
)


class Entry(NamedTuple):
    """Values of one class.

    text: as the user wrote them. space: "number", "colour", REST, or "name", which the text of a
    mask gives to a value. first, last: the values. name: of the class, None for the background.
    """

    text: str
    space: str
    first: int
    last: int
    name: str | None


@dataclass(frozen=True)
class ClassValues:
    """Which values of masks belong to which class.

    source: --classes or the path of the file, for messages. typed: whether each value was written
    by hand rather than taken from a list of all classes. notes: lines to print.
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
    def spaces(self):
        return {entry.space for entry in self.entries}

    @property
    def only_halves(self):
        """Whether no other numbers than 0 and 255 are named: masks may be cut at half."""
        numbers = {entry[2:4] for entry in self.entries if entry.space == "number"}
        return numbers <= {(0, 0), (255, 255)}

    @property
    def only_ranges(self):
        """Whether each class has a range of values: what a lossy format changes stays in it."""
        return all(entry.first < entry.last for entry in self.entries if entry.name is not None)

    def entries_of(self, value, rest=True):
        """The entries that name a value. rest: REST too, where no other does."""
        colour = value if value >= COLOUR else value * 0x10101 + COLOUR  # of a grey
        named = self._named("number", value) or self._named("colour", colour)
        return named or (self._named(REST, 0) if value and rest else [])

    def _named(self, space, value):
        return [e for e in self.entries if e.space == space and e.first <= value <= e.last]

    def resolved(self, stated):
        """With numbers for the names of values. stated: {value: name}, the text of the masks."""
        numbers, pairs = {same_form(name): str(value) for value, name in stated.items()}, []
        for entry in self.entries:
            text = numbers.get(entry.text) if entry.space == "name" else entry.text
            if text is None:
                known = f"the masks name {listed(list(numbers))}" if numbers else FORMS
                raise ValueError(
                    f"{self.source}: {entry.text!r:.60} is no value of a mask: {known}"
                )
            pairs.append((text, entry.name or BACKGROUND[0]))
        return _class_values(pairs, self.source)


def one_class(name, invert):
    """What `find_classes` takes for masks in which whatever is foreground is of one class."""
    return [name] if invert else ClassValues((Entry(REST, REST, 0, 0, name),), source=name)


def spell(value):
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def parse_classes(text):
    """--classes as --masks takes it: ClassValues, or names in ascending order of the values.

    text: 'A,B', 'VALUE=NAME,...' or the path of a file of names. Raises ValueError or OSError.
    """
    if text.lower().endswith(FILES) or ("." in text and os.path.isfile(text)):
        return _read_file(Path(text))
    parts = text.split(",")
    if "=" in text:
        return _class_values([part.partition("=")[::2] for part in parts], "--classes")
    return [same_form(part.strip()) for part in parts]


def parse_labels(text):
    """--classes as LabelMe and COCO files take it: the labels to use, without the background."""
    if not text.lower().endswith(FILES):
        return [same_form(name.strip()) for name in text.split(",")]
    labels = parse_classes(text)
    return labels.names if isinstance(labels, ClassValues) else labels


def _class_values(pairs, source, *, all_classes=False, regions=False):
    """The ClassValues of pairs of values, as they are written, and the name of their class.

    all_classes: of a list of them, where 0 is the background. regions: classes may share values,
    and their order counts.
    """
    entries, notes = [], []
    for values, name in pairs:
        entry = _entry(same_form(str(values).strip()), same_form(name.strip()))
        if entry is None or (all_classes and entry.space == "name"):
            raise ValueError(f"{source}: {f'{values}={name}'!r:.60}: {FORMS}")
        is_zero = entry[1:4] in (("number", 0, 0), ("colour", COLOUR, COLOUR))
        if all_classes and is_zero != (entry.name is None):
            notes.append(f"{values} ({name}) counts as background")
            entry = entry._replace(name=None)
        entries.append(entry)
    for one, other in combinations([e for e in entries if e.space != "name" and not regions], 2):
        meet = one.space == other.space and one.first <= other.last and other.first <= one.last
        if meet and one.name != other.name:
            pair = [f"{entry.text}={entry.name or BACKGROUND[0]}" for entry in (one, other)]
            raise ValueError(f"{source}: {' and '.join(pair)} give one value to two classes")
    if all_classes and not regions:
        entries.sort(key=lambda entry: entry.first)
    return ClassValues(tuple(entries), str(source), typed=not all_classes, notes=tuple(notes))


def _entry(text, name):
    """The Entry of values and the name of their class; None if it is wrong."""
    match = VALUE.fullmatch(text)
    first, last, colour = match.groups() if match else (None, None, None)
    space = "colour" if colour else "number" if first else REST if match else "name"
    first = int(colour, 16) + COLOUR if colour else int(first or 0)
    last = int(last) if last else first
    if not (text and name and name.isprintable()) or first > last:
        return None
    return Entry(text, space, first, last, None if name.casefold() in BACKGROUND else name)


# ---------------------------------------------------------------- files of names


def _read_file(path):
    """What `parse_classes` returns, of a file.

    Text: a name a line, as PaddleSeg's class_names.txt, where the first is the background those of
    0, 1, 2, ...; or VALUE=NAME; or names and colours, CVAT's labelmap.txt. CSV: value and name,
    under a head, Roboflow's _classes.csv. JSON: label numbers, or as "labels" of an object,
    nnU-Net's dataset.json.
    """
    check_regular(path)
    if path.suffix.lower() != ".json":
        try:
            return _from_lines(path.read_text("utf-8-sig").rstrip().splitlines(), path)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: is no text in UTF-8: {FORMS}") from None
    labels = read_json(path)
    labels = labels.get("labels", labels) if isinstance(labels, dict) else labels
    if isinstance(labels, list) and all(isinstance(name, str) for name in labels):
        return _from_lines(labels, path)
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f'{path}: holds no label numbers, such as {{"1": "spleen"}}')
    pairs, regions = [], any(isinstance(entry, list) for entry in labels.values())
    for key, entry in labels.items():
        if isinstance(entry, str) and VALUE.fullmatch(key):
            pairs.append((key, entry))
        else:
            pairs += [(number, key) for number in (entry if isinstance(entry, list) else [entry])]
    return _class_values(pairs, path, all_classes=True, regions=regions)


def _from_lines(lines, path):
    lines = [same_form(line.strip()) for line in lines]
    if path.suffix.lower() == ".csv":
        pairs = [line.split(",", 1) for line in lines[1:] if "," in line]
        return _class_values(pairs, path, all_classes=True)
    if lines and all("=" in line for line in lines):
        return _class_values([line.partition("=")[::2] for line in lines], path)
    rows = [LABELMAP.fullmatch(line) for line in lines if not line.startswith("# label:")]
    if rows and all(rows):
        colour = "#{:02x}{:02x}{:02x}".format
        pairs = [(colour(*map(int, row.groups()[1:])), row[1]) for row in rows]
        return _class_values(pairs, path, all_classes=True)
    if lines and lines[0] in IGNORED:  # the first line of LabelMe's labels.txt
        del lines[0]
    if not lines or not all(line and line.isprintable() for line in lines):
        raise ValueError(f"{path}: is no list of names, one a line: {FORMS}")
    if lines[0].casefold() not in BACKGROUND:
        return lines
    return _class_values(enumerate(lines), path, all_classes=True)
