"""What --classes says of masks: names of classes, or which values belong to which class."""

import os
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from medseg.coco import IGNORE
from medseg.files import name_file, read_json
from medseg.patterns import same_form

FILES = (".txt", ".json", ".csv")
BACKGROUND = ("background", "_background_")
COLOUR = 1 << 31  # 0xRRGGBB + COLOUR is the value of a colour
EACH = "*"  # alone: a class for each value, unasked
REST = -1 << 40  # the value of "*" otherwise: all that are not 0 and not named
ZEROS = (range(1), range(COLOUR, COLOUR + 1))
VALUE = re.compile(r"(-?\d{1,9})(?:-(-?\d{1,9}))?|#([\da-fA-F]{6})|\*")
LABELMAP = re.compile(r"(.+?):(\d{1,3}),(\d{1,3}),(\d{1,3})(?::.*)?")  # CVAT's labelmap.txt
FORMS = (
    "write NAME,NAME in ascending order of the values, or VALUE=NAME,VALUE=NAME with a number, "
    "a range (1-59), a colour ('#ff0000') or '*', or a .txt, .json or .csv file of names"
)


class Entry(NamedTuple):
    """Values of one class.

    text: as the user wrote them. values: empty where the text is a name that a mask gives to one.
    name: of the class, None for the background.
    """

    text: str
    values: range
    name: str | None


@dataclass(frozen=True)
class ClassValues:
    """Which values of masks belong to which class; source: --classes or the path of the file."""

    entries: tuple
    source: str

    @property
    def names(self):
        """The names of the classes, in the order in which they are named first."""
        return list(dict.fromkeys(entry.name for entry in self.entries if entry.name))

    def entries_of(self, value, stated):
        """The entries that name a value. stated: {value: name}, the text of the masks."""
        colour = value if value >= COLOUR else value * 0x10101 + COLOUR  # of a grey
        name = same_form(stated.get(value, ""))
        return (
            [entry for entry in self.entries if value in entry.values]
            or [entry for entry in self.entries if entry.text == name]
            or [entry for entry in self.entries if colour in entry.values]
            or [entry for entry in self.entries if value and REST in entry.values]
        )


def one_class(name):
    """The ClassValues of masks in which whatever is foreground is of one class."""
    return ClassValues((Entry("*", range(REST, REST + 1), name),), source=name)


def spell(value):
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def parse_classes(text):
    """--classes as --masks takes it: ClassValues, or names in ascending order of the values.

    text: 'A,B', 'VALUE=NAME,...' or the path of a file. A text file has a name or VALUE=NAME in
    each line; names after one of BACKGROUND are those of 0, 1, 2, ..., as in PaddleSeg's
    class_names.txt; CVAT's labelmap.txt has names and colours. CSV: values and names under a head,
    as in Roboflow's _classes.csv. JSON: label numbers, or as "labels" of an object, as in nnU-Net's
    dataset.json. Raises ValueError or OSError.
    """
    if not (text.lower().endswith(FILES) or ("." in text and os.path.isfile(text))):
        return _from_lines(text.split(","), "--classes")
    path = Path(text)
    if path.suffix.lower() == ".json":
        return _from_json(read_json(path), path)
    with name_file(path):
        lines = path.read_text("utf-8-sig").rstrip().splitlines()
    if path.suffix.lower() == ".csv":
        pairs = [line.split(",", 1) for line in lines[1:] if "," in line]
        return _class_values(pairs, path, all_classes=True)
    return _from_lines(lines, path)


def parse_labels(text):
    """--classes as LabelMe and COCO files take it: the labels to use, without the background."""
    if text.lower().endswith(FILES):
        labels = parse_classes(text)
        return labels.names if isinstance(labels, ClassValues) else labels
    return [same_form(name.strip()) for name in text.split(",")]


def _from_lines(lines, source):
    lines = [same_form(line.strip()) for line in lines]
    del lines[: lines[:1] == ["__ignore__"]]  # LabelMe's labels.txt begins so
    rows = [LABELMAP.fullmatch(line) for line in lines if not line.startswith("# label:")]
    if rows and all(rows):
        colour = "#{:02x}{:02x}{:02x}".format
        pairs = [(colour(*map(int, row.groups()[1:])), row[1]) for row in rows]
        return _class_values(pairs, source, all_classes=True)
    if any("=" in line for line in lines):
        return _class_values([line.partition("=")[::2] for line in lines], source)
    if not lines or not all(line and line.isprintable() for line in lines):
        raise ValueError(f"{source}: has an empty or unprintable name: {FORMS}")
    if lines[0].casefold() in BACKGROUND:
        return _class_values(enumerate(lines), source, all_classes=True)
    return lines


def _from_json(labels, path):
    labels = labels.get("labels", labels) if isinstance(labels, dict) else labels
    if not isinstance(labels, dict) or not labels:
        raise ValueError(f'{path}: holds no label numbers, such as {{"1": "spleen"}}')
    pairs, regions = [], any(isinstance(entry, list) for entry in labels.values())
    for key, entry in labels.items():
        if isinstance(entry, str) and VALUE.fullmatch(key):
            key, entry = entry, key
        pairs += [(number, key) for number in (entry if isinstance(entry, list) else [entry])]
    return _class_values(pairs, path, all_classes=True, regions=regions)


def _class_values(pairs, source, *, all_classes=False, regions=False):
    """The ClassValues of pairs of values, as they are written, and the name of their class.

    all_classes: of a list of them, where 0 is the background. regions: classes may share values,
    and their order counts.
    """
    entries = []
    for values, name in pairs:
        text, name = same_form(str(values).strip()), same_form(name.strip())
        own, match = range(0), VALUE.fullmatch(text)
        if match:
            low, high, colour = match.groups()
            first = int(colour, 16) + COLOUR if colour else int(low or REST)
            own = range(first, int(high or first) + 1)
        is_right = own or not (match or all_classes)
        if not (is_right and text and name and name.isprintable()):
            raise ValueError(f"{source}: {f'{values}={name}'!r:.60}: {FORMS}")
        is_zero, is_background = own in ZEROS, name.casefold() in BACKGROUND
        if all_classes and is_zero != is_background:
            print(f"warning: {source}: {values} ({name}) counts as background")
            is_background = True
        name = IGNORE if name == "__ignore__" else name  # as LabelMe and nnU-Net call it
        entries.append(Entry(text, own, None if is_background else name))
    for one, other in combinations(entries, 2):
        start = max(one.values.start, other.values.start)
        meet = start < min(one.values.stop, other.values.stop)
        if meet and one.name != other.name and not regions:
            raise ValueError(f"{source}: {one.text} and {other.text} give one value to two classes")
    if all_classes and not regions:
        entries.sort(key=lambda entry: entry.values.start)
    return ClassValues(tuple(entries), str(source))
