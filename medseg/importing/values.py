"""What the values in a folder of masks mean: the table in docs/own-data.md.

No mask says so, and all are counted first. Rules then make some values equal: see `find_rules`.
--classes names the values that are left; without it each is a class, but for those that look like
numbers of objects or like strays: an error has the command to write.
"""

import shlex
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from medseg.coco import IGNORE, MAX_CLASSES, listed
from medseg.files import parallel_map
from medseg.importing.class_names import COLOUR, EACH, REST, ClassValues, spell
from medseg.masks import HALF, is_grey_code, palette_in_use, read_mask, read_names
from medseg.pieces import number_pieces
from medseg.run_lengths import encode_labels, unite
from medseg.samples import LOSSY

VOLUME = "volume"  # the encoding of volumes and arrays, beside those of `read_mask`
ONE_CLASS = "foreground"
VOID = np.int64(2 << 40)  # of what index 255 of a palette says is to be ignored
COMPARED = 64  # palette masks, evenly spaced, whose palettes are compared
MAX_COLOURS = 4096  # of one mask: numbers of objects, but no photographs
GREYS, FULL = ("grey", "colour"), {1, 255, 65535}  # FULL: what programs write for foreground
EDGES = 2 / 3  # part of the pixels between 0 and 255: see `are_edges`
MANY, OBJECT = 10, 5  # values of one mask that may be numbers of objects, of so many pixels each
STRAY, FEW = 0.001, 8  # values with less of the pixels may be strays where so many have more


@dataclass(frozen=True)
class MaskClasses:
    """The classes that the values of a folder of masks stand for.

    names: in their order. names_of: {value, after the rules: names of its classes}. counts: pixels
    of each value. rules: of `find_rules`; "as shown": palettes are read as the colours they show.
    """

    names: list
    names_of: dict
    counts: Counter
    rules: set

    def read(self, path):
        """(encoding, values) of a mask file, as `to_masks` takes them; see `read_mask`."""
        return read_mask(path, "as shown" in self.rules)

    def to_masks(self, encoding, values, others=None):
        """The values of one mask, an integer array (H, W) -> {class name: RunLengths}.

        others: such a dict of other masks of the same image, which are united with it.
        """
        parts = {name: [runs] for name, runs in (others or {}).items()}
        labels, names_of = apply_rules(self.rules, encoding, values), self.names_of
        if encoding == "palette" and "palette" in self.rules:
            labels, names_of = np.where(values == 255, VOID, labels), {**names_of, VOID: (IGNORE,)}
        for value, runs in encode_labels(labels).items():
            for name in names_of.get(value, ()):
                parts.setdefault(name, []).append(runs)
        return {name: unite(own) for name, own in parts.items()}

    def report(self):
        """Print the values of each class and their part of the pixels."""
        for name in self.names:
            if values := [value for value, names in self.names_of.items() if name in names]:
                shown, share = spell_all(values), share_of(values, self.counts)
                kind = "value" if len(values) == 1 else "values"
                print(f"class {name}: {kind} {shown}, {share} of the masks")
        named = [name for name in self.names if name != IGNORE]
        if len(named) > 1 and named == [*map(spell, self.names_of)]:
            print(f"classes named by their values: {spell_choice([*self.names_of])} names them")


# ---------------------------------------------------------------- counting


class Counted(NamedTuple):
    """One mask. counts: {value: pixels}. edges: see `count_edges`. stated: {value: name}, its text.

    numbered: whether MANY or more values are one piece each, as numbers of objects are.
    """

    path: object
    encoding: str
    counts: dict
    edges: int = 0
    stated: dict = {}  # noqa: RUF012, nobody changes it
    numbered: bool = False


def count_mask(as_shown, path):
    encoding, values = read_mask(path, as_shown)
    counts = count_values(values)
    if encoding == "colour" and len(counts) > MAX_COLOURS:
        raise ValueError(f"{path}: {len(counts)} colours: is this the folder of masks?")
    objects = [value for value in counts if value and counts[value] >= OBJECT]
    numbered = len(objects) >= MANY and _are_single_pieces(values)
    edges = count_edges(values) if encoding in GREYS and len(counts) > 2 else 0
    stated = read_names(path) if encoding == "palette" else {}
    return Counted(path, encoding, counts, edges, stated, numbered)


def _are_single_pieces(labels):
    """Whether nine of ten values of an integer array (H, W), beside 0, are one connected piece."""
    from scipy import ndimage  # which finds the boxes of thousands of values at once

    _, numbers = np.unique(labels, return_inverse=True)
    numbers = np.where(labels == 0, 0, numbers.reshape(labels.shape) + 1)
    boxes = [(number, box) for number, box in enumerate(ndimage.find_objects(numbers), 1) if box]
    several = [len(number_pieces(numbers[box] == number)[1]) > 1 for number, box in boxes]
    return sum(several) <= 0.1 * len(several)


def count_values(values):
    """{value: pixels} of an integer array."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def count_edges(values):
    """How many pixels of greys have a smaller and a larger one among their neighbours."""
    import cv2  # few imports need it

    greys, around = (values & 255).astype(np.uint8), np.ones((3, 3), np.uint8)
    smaller, larger = cv2.erode(greys, around) < greys, greys < cv2.dilate(greys, around)
    return int((smaller & larger).sum())


def add_counts(masks):
    total = Counter()
    for mask in masks:
        total.update(mask.counts)
    return total


def find_classes(paths, names=None, *, invert=False):
    """The MaskClasses of mask files; warnings are printed.

    names: for the classes, in ascending order of their values; or ClassValues; default: the
    values. invert: the one class is what the masks show as background.
    Raises ValueError, or FileNotFoundError, that names the file.
    """
    entries = names.entries if isinstance(names, ClassValues) else ()
    palettes = parallel_map(palette_in_use, paths[:: -(-len(paths) // COMPARED) or 1], catch=())
    colour_of, colours = {}, [entry for palette in palettes for entry in palette.items()]
    # An index of several colours is no number of a class.
    as_shown = any(colour_of.setdefault(index, colour) != colour for index, colour in colours)
    as_shown |= any(entry.values.start >= COLOUR for entry in entries)
    masks = parallel_map(partial(count_mask, as_shown), paths, catch=())
    classes = classes_of_counts(masks, names, invert=invert)
    classes.rules.update(["as shown"] * as_shown)
    return classes


def classes_of_counts(counted, names=None, *, invert=False):
    """The MaskClasses of an iterable of Counted; see `find_classes`."""
    masks, rules = find_rules([*counted], names)
    counts, chosen = add_counts(masks), isinstance(names, ClassValues)
    by_value = chosen and any(REST not in entry.values for entry in names.entries)
    if invert and (by_value or not counts[0] or not are_alike(masks, counts)):
        problem = "--invert takes the one class of masks as background, 0=NAME is a class"
        raise unclear(masks, problem, counts)
    if invert:
        masks = recount(masks, {"invert"})
        counts, rules = add_counts(masks), {*rules, "invert"}
    name = name_chosen if chosen else name_values
    classes, names_of = name(masks, counts, names)
    if "palette" in rules and IGNORE not in classes:
        classes = [*classes, IGNORE]
    return MaskClasses(classes, names_of, counts, rules)


# ---------------------------------------------------------------- rules


def apply_rules(rules, encoding, values):
    """The values of one mask, an integer array, after the rules of its folder."""
    if encoding == "colour":
        values = values & 255 if "greys" in rules else np.where(values, values | COLOUR, 0)
    if encoding in rules:
        values = np.where(values == 255, 0, values)
    if f"cut {encoding}" in rules and (encoding in LOSSY or values.max() != 1):
        values = np.where(values > HALF, 255, 0).astype(np.uint8)
    return np.where(values, 0, 255).astype(np.uint8) if "invert" in rules else values


def find_rules(masks, names):
    """(masks with the counts after the rules, rules) of a list of Counted; prints warnings.

    "greys": colours are greys, as all are. "alpha": what is opaque in black masks is background, as
    others are not black. "palette": index 255 beside others is ignored, PASCAL VOC's border.
    "cut JPEG" and the like: masks of this encoding are cut at half, but for greys of 0 and 1.
    "invert", "as shown": see `find_classes`, as names.
    """
    entries = names.entries if isinstance(names, ClassValues) else ()
    numbers = [entry.values for entry in entries if REST < entry.values.start < COLOUR]
    encodings, rules = dict.fromkeys(mask.encoding for mask in masks), set()
    counts_of = {own: add_counts(m for m in masks if m.encoding == own) for own in encodings}
    if all(map(is_grey_code, counts_of.get("colour", ()))):
        rules.add("greys")
    shown = [encoding for encoding, counts in counts_of.items() if any(counts)]
    if shown == ["alpha"]:
        print("warning: the masks are black everywhere: what is opaque is foreground")
    elif "alpha" in shown:
        rules.add("alpha")
    palette = counts_of.get("palette", Counter())
    border = 255 in palette and len(palette.keys() - {0}) > 1
    if border and not any(255 in own for own in numbers):
        rules.add("palette")
        print(f"palette index 255 ({share_of([255], palette)}) counts in no loss and no score")
    masks = recount(masks, rules)
    if all(own in (range(1), range(255, 256)) for own in numbers):  # else they name what is between
        greys = [mask for mask in masks if mask.encoding in GREYS and max(mask.counts) != 1]
        soft = (*LOSSY, *GREYS) if are_edges(greys) else LOSSY
        rules.update(f"cut {encoding}" for encoding in soft if encoding in counts_of)
    cut = add_counts(mask for mask in masks if f"cut {mask.encoding}" in rules)
    if between := cut.keys() - {0, 1, 255}:
        share = share_of(between, add_counts(masks))
        print(f"warning: masks hold values between 0 and 255 ({share}): above {HALF} is foreground")
    return recount(masks, rules), rules


def recount(masks, rules):
    """The masks with their counts after the rules."""
    counted = []
    for mask in masks:
        values = apply_rules(rules, mask.encoding, np.array([*mask.counts]))
        counts = Counter()
        for value, pixels in zip(values.tolist(), mask.counts.values(), strict=True):
            counts[value] += pixels
        counted.append(mask._replace(counts=counts))
    return counted


def are_edges(masks):
    """Whether values of grey masks are edges between 0 and 255 rather than classes.

    Half of the pixels are 0 or 255, four fifths where there are few values. Of those between nearly
    all have a smaller and a larger neighbour, while classes have areas: in masks of vessels,
    lesions and cells that were averaged, enlarged or blurred it was 0.72 at least, in rings of
    classes two pixels wide 0.25.
    """
    counts = add_counts(masks)
    between = counts.keys() - {0, 255}
    if not counts[255] or not between or not 0 < min(between) <= HALF < max(between) < 256:
        return False
    pixels, most = sum(counts[value] for value in between), 0.2 if len(counts) <= 32 else 0.5
    edges = sum(mask.edges for mask in masks)
    return pixels <= most * counts.total() and edges >= EDGES * pixels


def are_alike(masks, counts):
    """Whether each mask holds at most one value, beside 0, that is the same or one of FULL."""
    values = counts.keys() - {0}
    one_each = all(len(mask.counts.keys() - {0}) <= 1 for mask in masks)
    return len(values) == 1 or (bool(values) and values <= FULL and one_each)


# ---------------------------------------------------------------- classes of the values


def name_values(masks, counts, names):
    """(class names, {value: its classes}) without values in --classes.

    ValueError where it is not clear what the values mean.
    """
    values, named = sorted(counts.keys() - {0}), {}
    one_name = len(names or [ONE_CLASS]) == 1 and names != [EACH]
    if len(values) > 1 and one_name and are_alike(masks, counts):
        held = [f"{sum(value in mask.counts for mask in masks)} hold {value}" for value in values]
        print(f"warning: of the masks {', '.join(held)}: all are of one class")
        names = (names or [ONE_CLASS]) * len(values)
    problem = None if names else doubt(masks, counts, values)
    if names in (None, [EACH]):
        named = stated_names(masks)
    elif len(names) == len(values):
        named = dict(zip(values, names, strict=True))
    elif values:
        problem = f"--classes names {len(names)} classes, but there are {len(values)} values"
    if problem or len(values) > MAX_CLASSES:
        raise unclear(masks, problem or f"more than {MAX_CLASSES} values", counts)
    default = {value: spell(value) if len(values) > 1 else ONE_CLASS for value in values}
    names_of = {value: (named.get(value, default[value]),) for value in values}
    classes = list(dict.fromkeys([*named.values(), *chain.from_iterable(names_of.values())]))
    return classes, names_of


def doubt(masks, counts, values):
    """Why values may be no classes: numbers of objects, or more than two strays; or None."""
    numbered = [mask for mask in masks if mask.numbered and len(mask.counts) >= MANY]
    same = Counter(frozenset(mask.counts) for mask in numbered).most_common(1)
    # Where most such masks have the same values, these are classes that all images show.
    if numbered and not 2 * same[0][1] > len(numbered) > 1:
        return "values look like numbers of objects, each one piece"
    strays = [value for value in values if counts[value] < STRAY * counts.total()]
    n_classes = len(values) - len(strays)
    numbers = values == [*range(1, len(values) + 1)] or masks[0].encoding == VOLUME
    if 1 <= n_classes <= FEW and len(strays) > max(2, n_classes) and not numbers:
        return f"{len(strays)} values look like strays, with {share_of(strays, counts)} together"
    return None


def unclear(masks, problem, counts):
    """A ValueError with the values of masks and the ways to say what they are."""
    values = sorted(counts.keys() - {0})
    large = [value for value in values if counts[value] >= STRAY * counts.total()] or values
    path = max(masks, key=lambda mask: len(mask.counts)).path
    return ValueError(
        f"{path}: {problem}: {spell_all(values, 20)}; --classes '*={ONE_CLASS}' takes all as one "
        f"class, {spell_choice(large[:FEW])} takes these, --classes '{EACH}' each as a class"
    )


def stated_names(masks):
    """{value: name} in the text of the masks; ValueError where they disagree."""
    named = {}
    for mask in masks:
        if named | mask.stated != mask.stated | named:
            raise ValueError(f"{mask.path}: its text names the values otherwise: --classes 1=A,2=B")
        named |= mask.stated
    return named


def name_chosen(masks, counts, chosen):
    """(class names, {value: its classes}) of ClassValues; prints what is left out.

    ValueError where no mask has a value that is named.
    """
    stated = {} if all(entry.values for entry in chosen.entries) else stated_names(masks)
    entries_of = {value: chosen.entries_of(value, stated) for value in sorted(counts)}
    names_of = {value: [e.name for e in own if e.name] for value, own in entries_of.items()}
    names_of = {value: tuple(dict.fromkeys(names)) for value, names in names_of.items() if names}
    used = {entry for entries in entries_of.values() for entry in entries}
    absent = [f"{e.text} ({e.name})" for e in chosen.entries if e.name and e not in used]
    if any(counts) and not names_of:
        raise unclear(masks, f"no mask has {listed(absent)} of {chosen.source}", counts)
    if absent:
        print(f"warning: {chosen.source}: no mask has {listed(absent)}")
    if unnamed := [value for value, entries in entries_of.items() if value and not entries]:
        none = [m for m in masks if any(m.counts) and not m.counts.keys() & names_of.keys()]
        shown = spell_all(sorted(unnamed, key=counts.get, reverse=True))
        print(
            f"warning: {chosen.source}: not named, so background: {shown} ({len(unnamed)} in all, "
            f"{share_of(unnamed, counts)}); {len(none)} of {len(masks)} masks hold none that is"
        )
    return chosen.names, names_of


def share_of(values, counts):
    pixels = sum(counts[value] for value in values)
    return f"{100 * pixels / counts.total():.2f} % of the pixels"


def spell_all(values, most=8):
    """'1, 2, 4' of values."""
    return listed([*map(spell, values)], most)


def spell_choice(values):
    """The flag that takes these values as classes: '--classes 128=A,255=B'."""
    names = [ONE_CLASS] if len(values) == 1 else ascii_uppercase
    pairs = [f"{spell(value)}={name}" for value, name in zip(values, names, strict=False)]
    return f"--classes {shlex.quote(','.join(pairs))}"
