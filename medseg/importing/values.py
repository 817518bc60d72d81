"""What the values in a folder of masks mean: the table in docs/own-data.md.

No mask says so, and all are counted first. Rules then make some values equal: see `find_rules`.
--classes names the values that are left; without it each is a class, but for those that look like
numbers of objects or like strays: an error has the command to write.
"""

import contextlib
import shlex
from collections import Counter
from dataclasses import dataclass
from functools import partial
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from medseg.coco import MAX_CLASSES, listed
from medseg.files import parallel_map
from medseg.importing.class_names import COLOUR, ONE_CLASS, REST, ClassValues, spell
from medseg.masks import HALF, is_grey_code, palette_in_use, read_mask, read_names
from medseg.pieces import are_single_pieces
from medseg.run_lengths import encode_labels, unite
from medseg.samples import LOSSY

VOLUME = "volume"  # the encoding of volumes, beside those of `read_mask`
EACH = "*"  # --classes: a class for each value, unasked
COMPARED = 64  # palette masks, evenly spaced, whose palettes are compared
MAX_VALUES = 2**18  # where --classes gives values: numbers of objects
NOTHING = -COLOUR  # the value of pixels that are of no class whatever --classes says
GREYS, FULL = ("grey", "colour"), {1, 255, 65535}  # FULL: what programs write for foreground
SMOOTHED = 32  # distinct values, see `are_edges`
EXTREMES, EDGES = 0.8, 2 / 3  # parts of all pixels, and of those between: see `are_edges`
MANY, OBJECT = 10, 5  # values of one mask that may be numbers of objects, of so many pixels each
# Values with less than STRAY of the pixels each, and STRAYS of them together, may be strays where
# at most FEW others have more.
STRAY, STRAYS, FEW = 0.001, 0.01, 8


@dataclass(frozen=True)
class MaskClasses:
    """The classes that the values of a folder of masks stand for.

    names: in their order. names_of: {value, after the rules: names of its classes}. fractions:
    {value: fraction of all pixels}. rules: of `find_rules`. warnings: lines to print.
    palette_colours: whether palette masks are read as the colours that they show.
    """

    names: list
    names_of: dict
    fractions: dict
    rules: set
    warnings: list
    palette_colours: bool

    def read(self, path):
        """(encoding, values) of a mask file, as `to_masks` takes them; see `read_mask`."""
        return read_mask(path, self.palette_colours)

    def to_masks(self, encoding, values):
        """The values of one mask, an integer array (H, W) -> {class name: RunLengths}."""
        parts = {}
        for value, runs in encode_labels(apply_rules(self.rules, encoding, values)).items():
            for name in self.names_of.get(value, ()):
                parts.setdefault(name, []).append(runs)
        return {name: unite(own) for name, own in parts.items()}

    def report(self):
        """Print the values of each class and their part of the pixels, and the warnings."""
        is_cut = bool(self.rules & {"lossy", "edges"})
        halves = {0: f"up to {HALF}", 255: f"above {HALF}"} if is_cut else {}
        for name in self.names:
            if values := [value for value, names in self.names_of.items() if name in names]:
                shown = listed([halves.get(value, spell(value)) for value in values])
                percent = 100 * sum(self.fractions[value] for value in values)
                kind = "value" if len(values) == 1 else "values"
                print(f"class {name}: {kind} {shown}, {percent:.2f} % of the pixels of the masks")
        if len(self.names) > 1 and self.names == [*map(spell, self.names_of)]:
            print(f"classes named by their values: {spell_choice(self.names)} names them")
        for line in self.warnings:
            print(f"warning: {line}")


# ---------------------------------------------------------------- counting


class Counted(NamedTuple):
    """One mask. counts: {value: pixels}. edges: see `count_edges`. stated: {value: name}, its text.

    numbered: whether MANY or more values are one piece each, as numbers of objects are.
    """

    path: object
    encoding: str
    counts: dict
    edges: int = 0
    stated: dict | None = None
    numbered: bool = False


def palettes_differ(paths):
    """Whether palette masks show an index in different colours: it is no number of a class."""
    colour_of = {}
    with contextlib.closing(parallel_map(palette_in_use, paths, catch=())) as palettes:
        for palette in palettes:
            if any(colour_of.setdefault(index, own) != own for index, own in palette.items()):
                return True
    return False


def count_mask(palette_colours, path):
    encoding, values = read_mask(path, palette_colours)
    counts = count_values(values)
    objects = [value for value in counts if value and counts[value] >= OBJECT]
    numbered = len(objects) >= MANY and are_single_pieces(values)
    stated = read_names(path) if encoding == "palette" else None
    return Counted(path, encoding, counts, count_edges(encoding, values, counts), stated, numbered)


def count_values(values):
    """{value: pixels} of an integer array."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def count_edges(encoding, values, counts):
    """How many pixels between 0 and white have a smaller and a larger one among their neighbours.

    0 unless half of the pixels are 0 or white, and some are between.
    """
    white = {"grey": 255, "colour": 0xFFFFFF}.get(encoding)
    extremes = counts.get(0, 0) + counts.get(white, 0)
    if white not in counts or not values.size > extremes >= values.size / 2:
        return 0
    rows, columns = np.nonzero((values > 0) & (values < white))
    padded, own = np.pad(values, 1, mode="edge"), values[rows, columns]
    around = [padded[rows + y, columns + x] for y in range(3) for x in range(3)]
    return int(((np.min(around, axis=0) < own) & (np.max(around, axis=0) > own)).sum())


def find_classes(paths, folder, names=None, *, invert=False):
    """The MaskClasses of these mask files, of a folder that messages name.

    names: for the classes, in ascending order of their values; or ClassValues; default: the
    values. invert: the one class of the masks is what they show as background.
    Raises ValueError, or FileNotFoundError, that names the file.
    """
    colours = isinstance(names, ClassValues) and "colour" in names.spaces
    colours = colours or palettes_differ(paths[:: -(-len(paths) // COMPARED) or 1])
    with contextlib.closing(parallel_map(partial(count_mask, colours), paths, catch=())) as masks:
        return classes_of_counts(masks, folder, names, invert=invert, palette_colours=colours)


def classes_of_counts(counted, folder, names=None, *, invert=False, palette_colours=False):
    """The MaskClasses of an iterable of what `Counted` takes, of each mask; see `find_classes`."""
    chosen = names if isinstance(names, ClassValues) else None
    if invert and chosen:
        raise ValueError(f"--invert: {chosen.source} gives values; 0=NAME makes value 0 a class")
    masks, values_of = [], {}
    for mask in counted:
        masks.append(mask := Counted(*mask))
        values = values_of.setdefault(mask.encoding, set())
        values.update(mask.counts)
        if len(values) > (MAX_VALUES if chosen else MAX_CLASSES + 1):
            raise ValueError(
                f"{mask.path}: holds {len(mask.counts)} different values, {len(values)} with the "
                "masks before: is this the folder of masks? Numbers of objects are one class by "
                f"--classes '*={ONE_CLASS}'"
            )
    masks, rules, warnings = find_rules(masks, names, folder)
    counts = add_counts(masks)
    if chosen:
        classes, names_of = chosen.names, name_chosen(masks, folder, chosen, warnings)
    elif invert or any(counts):
        classes, names_of = name_all(masks, folder, names, invert, warnings)
    else:  # healthy images
        classes, names_of = [], {}
    fractions = {value: counts[value] / counts.total() for value in names_of}
    return MaskClasses(classes, names_of, fractions, rules, warnings, palette_colours)


def add_counts(masks):
    total = Counter()
    for mask in masks:
        total.update(mask.counts)
    return total


def share_of(pixels, masks):
    return f"{100 * pixels / add_counts(masks).total():.2f} % of the pixels"


# ---------------------------------------------------------------- rules


def apply_rules(rules, encoding, values):
    """The values of one mask, an integer array, after the rules of its folder."""
    if encoding == "colour":
        values = values & 255 if "greys" in rules else np.where(values, values | COLOUR, 0)
    if encoding in rules:
        nothing = 0 if encoding == "alpha" else NOTHING
        values = np.where(values == 255, nothing, values.astype(np.int64))
    top, blurred = values.max(), {"lossy": LOSSY, "edges": GREYS}
    if "full" in rules and top in FULL and not ((values > 0) & (values < top)).any():
        return np.where(values, 255, 0).astype(np.uint8)
    if any(rule in rules and encoding in own for rule, own in blurred.items()):
        return np.where(values > HALF, 255, 0).astype(np.uint8)
    return values


def find_rules(masks, names, folder):
    """(masks with the counts after the rules, rules, lines of warning) of a list of Counted.

    "greys": colours are greys, as all are. "alpha": that of black masks is background, as others
    are not black. "palette": index 255 is of no class beside others, PASCAL VOC's border.
    "lossy": JPEG and lossy WebP masks are cut at half. "full": masks of one value of FULL each,
    not all the same, are of one class. "edges": grey masks are cut at half. names: as of
    `find_classes`.
    """
    chosen = names if isinstance(names, ClassValues) else None
    one_class = chosen.spaces == {REST} if chosen else len(names or [1]) == 1 and names != [EACH]
    rules, warnings, counts_of = set(), [], {}
    for mask in masks:
        counts_of.setdefault(mask.encoding, Counter()).update(mask.counts)
    if "colour" in counts_of and all(map(is_grey_code, counts_of["colour"])):
        rules.add("greys")
    shown = [encoding for encoding, counts in counts_of.items() if any(counts)]
    if "alpha" in shown and len(shown) > 1:
        rules.add("alpha")
    elif "alpha" in shown:
        warnings.append(f"{folder}: the masks are black everywhere: what is opaque is foreground")
    palette = counts_of.get("palette", Counter())
    border_named = chosen and chosen.entries_of(255, rest=False)
    if 255 in palette and len(palette.keys() - {0}) > 1 and not border_named:
        rules.add("palette")
        warnings.append(f"palette index 255 ({share_of(palette[255], masks)}) counts as background")
    lossy = [mask for mask in masks if mask.encoding in LOSSY]
    if lossy and not (chosen and chosen.only_ranges):
        highest = max(add_counts(lossy))
        if 0 < highest <= HALF or (chosen and not chosen.only_halves):
            raise ValueError(
                f"{lossy[0].path}: {lossy[0].encoding} has changed the values (the highest is "
                f"{highest}): save masks as PNG, or name ranges, as in --classes 118-138=NAME"
            )
        rules.add("lossy")
    masks = recount(masks, rules)
    full = [mask for mask in masks if is_full(mask)]
    others = [mask for mask in masks if not is_full(mask)]
    number_of = Counter(max(mask.counts) for mask in full)
    cut = are_edges([*others, *(mask for mask in full if 255 in mask.counts)])
    cut = cut and all(mask.encoding in GREYS for mask in others)
    several = len(number_of.keys() | ({255} if cut else set())) > 1
    if one_class and several and (cut or not any(add_counts(others))):
        rules.add("full")
        held = [f"{number} hold 0 and {value}" for value, number in number_of.items()]
        warnings.append(f"of the masks {', '.join(held)}: all are of one class")
        masks = recount(masks, rules)
    greys = [mask for mask in masks if mask.encoding in GREYS]
    if are_edges(greys) and (not chosen or chosen.only_halves):
        rules.add("edges")
    blurred = ["lossy" in rules and lossy, "edges" in rules and greys]
    counts = add_counts(mask for masks_cut in blurred if masks_cut for mask in masks_cut)
    if between := counts.total() - counts[0] - counts[255]:
        warnings.append(
            f"masks hold values between 0 and 255 ({share_of(between, masks)}): cut at half, above "
            f"{HALF} is foreground"
        )
    return recount(masks, rules), rules, warnings


def is_full(mask):
    values = mask.counts.keys() - {0}
    return len(values) == 1 and values <= FULL


def recount(masks, rules):
    """The masks with their counts after the rules."""
    counted = []
    for mask in masks:
        values = apply_rules(rules, mask.encoding, np.array([*mask.counts]))
        counts = Counter()
        for value, pixels in zip(values.tolist(), mask.counts.values(), strict=True):
            counts[value] += pixels
        del counts[NOTHING]
        counted.append(mask._replace(counts=counts))
    return counted


def are_edges(masks):
    """Whether values of grey masks are edges between 0 and 255 rather than classes.

    Smoothed masks have more than SMOOTHED values, in each of eight equal ranges, and half of the
    pixels are 0 or 255. Averaged masks have few, such as 0, 64, 128, 191, 255, and nearly all
    pixels between have a smaller and a larger neighbour, while classes have areas: in four masks of
    vessels (CHASE) averaged by 2 to 4 it was 0.84 at least, in rings of classes two pixels wide
    0.25.
    """
    counts = add_counts(masks)
    between = [value for value in counts if value not in (0, 255)]
    if not counts[255] or not between or min(between) < 0 or max(between) > 255:
        return False
    extremes = (counts[0] + counts[255]) / counts.total()
    if len(counts) > SMOOTHED and len({value // 32 for value in counts}) == 8:
        # Of 255 objects the last is small, but what a smoothed mask shows is mostly 255.
        objects = numbered_mask(masks) and 4 * counts[255] < counts.total() - counts[0]
        return counts[0] > 0 and extremes >= 0.5 and not objects
    edges = sum(mask.edges for mask in masks) / sum(counts[value] for value in between)
    return min(between) <= HALF < max(between) and extremes >= EXTREMES and edges >= EDGES


# ---------------------------------------------------------------- classes of the values


def name_all(masks, folder, names, invert, warnings):
    """(class names, {value: its classes}) without values in --classes; adds to the warnings.

    ValueError where it is not clear what the values mean.
    """
    counts = add_counts(masks)
    values = [value for value in sorted(counts) if value]
    default = {value: spell(value) if len(values) > 1 else ONE_CLASS for value in values}
    if invert:
        if len(values) != 1 or not counts[0]:
            raise ValueError(
                f"{folder}: --invert takes the one class of masks as background, but these hold "
                f"{spell_all(sorted(counts))}: --classes 0=NAME makes the value 0 a class"
            )
        default = {0: ONE_CLASS}
    if names and names != [EACH]:
        if len(names) == len(default):
            return names, {value: (name,) for value, name in zip(default, names, strict=True)}
        largest = sorted(sorted(values, key=counts.get)[-len(names) :])
        choice = spell_choice([REST] if len(names) == 1 else [*map(spell, largest)], names)
        raise ValueError(
            f"--classes names {len(names)} classes, but the masks hold {len(default)} beside "
            f"background: {spell_all(values, 20)}; choose, as in {choice}"
        )
    if not names and not invert:
        warnings += ask(masks, folder, counts, values)
    if not invert and len(values) == 1 and 2 * counts[values[0]] > counts.total():
        warnings.append("most pixels are foreground: --invert takes the others instead")
    stated = {} if invert else stated_names(masks)
    default |= {value: stated[value] for value in default if value in stated}
    classes = list(dict.fromkeys([*stated.values(), *default.values()]))
    return classes, {value: (name,) for value, name in default.items()}


def stated_names(masks):
    """{value: name} in the text of the masks; ValueError where they disagree."""
    path_of = {tuple(mask.stated.items()): mask.path for mask in masks if mask.stated}
    if len(path_of) > 1:
        first, second, *_ = path_of.values()
        raise ValueError(
            f"{first} and {second}: their text gives the values different names: name them with "
            "--classes 1=NAME,2=NAME"
        )
    return dict(next(iter(path_of), ()))


def numbered_mask(masks):
    """The path of a mask whose values look like numbers of objects, or None.

    Where most such masks have the same values, these are classes that all images show.
    """
    numbered = [mask for mask in masks if mask.numbered and len(mask.counts) >= MANY]
    same = Counter(frozenset(mask.counts) for mask in numbered).most_common(1)
    if not numbered or 2 * same[0][1] > len(numbered) > 1:
        return None
    return numbered[0].path


def ask(masks, folder, counts, values):
    """ValueError where values look like numbers of objects, or more than two like strays.

    Else the lines of warning.
    """
    each = f"--classes '{EACH}' keeps a class for each value"
    if path := numbered_mask(masks):
        raise ValueError(
            f"{path}: its values look like numbers of objects, each one piece: --classes "
            f"'*={ONE_CLASS}' takes all as one class, {each}"
        )
    total = counts.total()
    classes = [value for value in values if counts[value] >= STRAY * total]
    strays = [value for value in values if value not in classes]
    together = sum(counts[value] for value in strays)
    numbers = values == [*range(1, len(values) + 1)] or masks[0].encoding == VOLUME
    if not strays or numbers or not 1 <= len(classes) <= FEW or together >= STRAYS * total:
        return []
    command, share = spell_choice([*map(spell, classes)]), share_of(together, masks)
    if len(strays) <= max(2, len(classes)):
        return [f"{spell_all(strays)}: {share}; if that is no class, {command} leaves it out"]
    raise ValueError(
        f"{folder}: {spell_all(classes)} look like classes, and {len(strays)} values like strays "
        f"({share}): {spell_all(strays, 12)}; {command} takes strays as background, {each}"
    )


def name_chosen(masks, folder, chosen, warnings):
    """{value: its classes} of ClassValues; adds to the warnings.

    ValueError where no mask has a value that is named, or where one that is written by hand is
    missing while another is not named: then one of them is probably mistyped.
    """
    counts = add_counts(masks)
    if "name" in chosen.spaces:
        chosen = chosen.resolved(stated_names(masks))
    entries_of = {value: chosen.entries_of(value) for value in sorted(counts)}
    names_of = {value: [e.name for e in own if e.name] for value, own in entries_of.items()}
    names_of = {value: tuple(dict.fromkeys(names)) for value, names in names_of.items() if names}
    if not names_of and not any(counts):  # healthy images
        return {}
    unnamed = [value for value, entries in entries_of.items() if value and not entries]
    shown = spell_all(sorted(unnamed, key=counts.get, reverse=True))
    used = {entry for entries in entries_of.values() for entry in entries}
    absent = listed([f"{e.text} ({e.name})" for e in chosen.entries if e.name and e not in used])
    large = any(counts[value] >= STRAY * counts.total() for value in unnamed)
    if not names_of or (absent and large and chosen.typed):
        raise ValueError(
            f"{folder}: no mask has {absent} of {chosen.source}, but {shown}: correct the values, "
            "or add '*=background'"
        )
    warnings += chosen.notes
    if absent:
        warnings.append(f"{chosen.source}: no mask has {absent}")
    if unnamed:
        count = "1 value" if len(unnamed) == 1 else f"{len(unnamed)} values"
        share = share_of(sum(counts[value] for value in unnamed), masks)
        line = f"not named in {chosen.source}, so background: {shown}; {count}, {share}"
        none = [m for m in masks if any(m.counts) and not m.counts.keys() & names_of.keys()]
        held = f"; {len(none)} of {len(masks)} masks hold none that is named"
        warnings.append(line + held * bool(none))
    return names_of


def spell_all(values, most=8):
    """'1, 2, 4' of values."""
    return listed([*map(spell, values)], most)


def spell_choice(texts, names=None):
    """The flag that takes these values as classes: '--classes 128=A,255=B'."""
    names = names or ([ONE_CLASS] if len(texts) == 1 else ascii_uppercase)
    pairs = [f"{text}={name}" for text, name in zip(texts, names, strict=False)]
    return f"--classes {shlex.quote(','.join(pairs))}"
