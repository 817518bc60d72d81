"""What the values in a folder of masks mean.

No mask says so, and all are looked at first. Where --classes gives no values:

- 0 and one other value anywhere: one class, foreground. With --invert it is value 0.
- Several values or colours: a class each, named by the value ("85") or colour ("#ff0000"), or as
  the text of the mask names it. 0 and black are background. Values that look like strays, or like
  numbers of objects, are asked about: see `ask`.
- JPEG and lossy WebP change values, so such masks are cut at half: above 127 is foreground. The
  same for grey masks whose edges were smoothed: more than SMOOTHED distinct values that reach from
  0 to 255 with none of eight equal ranges empty, while at least half of the pixels are exactly 0
  or 255; and for few values, such as 0, 64, 128, 191, 255, that lie along edges: `is_averaged`.
- Masks of 0 and 1 beside masks of 0 and 255 are of one class.
- Palette masks count by index, not by colour, and index 255 beside other classes is background:
  PASCAL VOC's "ignore". Where the order of the palette is that of the writer, they count by colour:
  in GIF files, where black has an index but 0 is another colour, and where masks differ in the
  colour of an index.
- A pixel whose alpha is below half is background. Where the colours of all masks are black, what is
  opaque is foreground.
- The values of volumes are class numbers: no volume is cut at half.

Masks of several encodings may be mixed where each has one foreground value. Where --classes gives
values, these count, and all others are background.
"""

import contextlib
import shlex
from dataclasses import dataclass, field

import numpy as np

from medseg.coco import MAX_CLASSES, listed
from medseg.files import parallel_map
from medseg.formats.mask_files import HALF, palette_in_use, read_mask, read_names
from medseg.pieces import are_single_pieces
from medseg.run_lengths import encode_labels, unite
from medseg.samples import LOSSY
from medseg.sources.class_names import REST, ClassValues, Entry
from medseg.sources.value_counts import (
    EACH,
    FULL,
    MANY,
    OBJECT,
    ONE_CLASS,
    STRAY,
    Tally,
    ask,
    count_edges,
    find_strays,
    ignores_255,
    is_averaged,
    is_smoothed,
    spell,
    spell_all,
    spell_choice,
)

COMPARED = 64  # palette masks, evenly spaced, whose palettes are compared
MAX_VALUES = 2**18  # distinct values where --classes gives values: numbers of objects


@dataclass(frozen=True)
class MaskClasses:
    """The classes that the values of a folder of masks stand for.

    names: in their order. names_of: {(encoding, value): names of its classes}. fractions:
    {(encoding, value): fraction of all pixels}. cut: encodings that are cut at HALF. full:
    encodings in whose masks the one value beside 0 of FULL counts as 255.
    grey_colours: whether all colours are greys, and count as these. palette_colours: whether
    palette masks are read as the colours that they show. warnings: lines to print.
    """

    names: list
    names_of: dict
    fractions: dict
    cut: set
    grey_colours: bool
    palette_colours: bool
    warnings: list
    full: dict = field(default_factory=dict)

    def read(self, path):
        """(encoding, values) of a mask file, as `to_masks` takes them; see `read_mask`."""
        return read_mask(path, self.palette_colours)

    def to_masks(self, encoding, values):
        """The values of one mask, an integer array (H, W) -> {class name: RunLengths}."""
        if encoding == "colour" and self.grey_colours:
            encoding, values = "grey", values & 255
        if encoding in self.full:
            top = values.max()
            if top in FULL and not ((values > 0) & (values < top)).any():
                values = np.where(values, 255, 0).astype(np.uint8)
        if encoding in self.cut:
            values = np.where(values > HALF, 255, 0).astype(np.uint8)
        parts = {}
        for value, runs in encode_labels(values).items():
            for name in self.names_of.get((encoding, value), ()):
                parts.setdefault(name, []).append(runs)
        return {name: unite(own) for name, own in parts.items()}

    def report(self):
        """Print the values of each class and their part of the pixels, and the warnings."""
        several_encodings = len({encoding for encoding, _ in self.names_of}) > 1
        values_of = {}
        for (encoding, value), names in self.names_of.items():
            for name in names:
                values_of.setdefault((name, encoding), []).append(value)
        for (name, encoding), values in values_of.items():
            of_encoding = f" ({encoding})" if several_encodings else ""
            shown = f"value {spell(encoding, values[0])}"
            if len(values) > 1:
                shown = f"values {listed([spell(encoding, value) for value in values])}"
            elif encoding in self.cut:
                shown = f"value above {HALF}" if values[0] else f"value up to {HALF}"
            percent = 100 * sum(self.fractions[encoding, value] for value in values)
            print(f"class {name}: {shown}{of_encoding}, {percent:.2f} % of the pixels of the masks")
        for line in self.warnings:
            print(f"warning: {line}")


def find_classes(paths, folder, names=None, *, invert=False):
    """The MaskClasses of these mask files, of a folder that messages name.

    names: for the classes, in ascending order of their values; or ClassValues; default: the
    values. invert: the one class of the masks is what they show as background.
    Raises ValueError, or FileNotFoundError, that names the file.
    """
    palette_colours = isinstance(names, ClassValues) and names.has_colours
    palette_colours = palette_colours or _palettes_differ(paths[:: -(-len(paths) // COMPARED) or 1])
    options = {"invert": invert, "palette_colours": palette_colours}
    with contextlib.closing(_count_files(paths, palette_colours)) as counted:
        return classes_of_counts(counted, folder, names, **options)


def find_one_class(paths, folder, name, *, invert=False):
    """The MaskClasses of files in which whatever is foreground is of one class; it may be empty."""
    with contextlib.closing(_count_files(paths)) as counted:
        return one_class_of_counts(counted, folder, name, invert=invert)


def _palettes_differ(paths):
    """Whether palette masks show an index in different colours: it is no number of a class."""
    colour_of = {}
    with contextlib.closing(parallel_map(palette_in_use, paths, catch=())) as palettes:
        for palette in palettes:
            if any(colour_of.setdefault(index, own) != own for index, own in palette.items()):
                return True
    return False


def _count_files(paths, palette_colours=False):
    """Yield what `Tally.add` takes, of each mask file."""

    def count(path):
        encoding, values = read_mask(path, palette_colours)
        counts = count_values(values)
        objects = [value for value in counts if value and counts[value] >= OBJECT]
        numbers_objects = len(objects) >= MANY and are_single_pieces(values)
        stated = read_names(path) if encoding == "palette" else {}
        edges = count_edges(encoding, values, counts)
        return path, encoding, counts, numbers_objects, stated, edges

    return parallel_map(count, paths, catch=())


def count_values(values):
    """{value: pixels} of an integer array."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def classes_of_counts(counted, folder, names=None, *, invert=False, palette_colours=False):
    """The MaskClasses of values that were counted, none where all are 0; see `find_classes`.

    counted: iterable of what `Tally.add` takes, of each mask: (path, encoding, {value: pixels}).
    """
    chosen = names if isinstance(names, ClassValues) else None
    if invert and chosen:
        raise ValueError(
            f"--invert: not together with the values in {chosen.source}, where 0=NAME makes "
            "value 0 a class"
        )
    tally = Tally(folder, MAX_VALUES if chosen else MAX_CLASSES + 1)
    for mask in counted:
        tally.add(*mask)
    tally.merge_greys()
    one_name = chosen.only_rest if chosen else not names or (len(names) == 1 and names != [EACH])
    full = tally.merge_full() if one_name else {}
    cut = {encoding for encoding in tally.counts_of if _is_cut(encoding, tally, chosen)}
    warnings = tally.use_alpha()
    warnings += [line for encoding in sorted(cut) for line in tally.cut_at_half(encoding)]
    warnings += full.values()
    named_zero = chosen and chosen.classes_of(chosen.entries_of("grey", 0))
    if not tally.foreground() and not invert and not named_zero:  # of healthy images
        return MaskClasses([], {}, {}, cut, tally.grey_colours, palette_colours, warnings, full)
    if chosen:
        chosen = chosen.resolved(tally.stated_names() if chosen.has_names else {})
        classes, names_of = chosen.names, _chosen_values(tally, chosen, warnings)
    elif invert:
        classes, names_of = _invert(tally, names)
    else:
        classes, names_of = _default_classes(tally, names, warnings)
    fractions = {(e, value): tally.counts_of[e][value] / tally.total for e, value in names_of}
    return MaskClasses(
        *(classes, names_of, fractions, cut),
        *(tally.grey_colours, palette_colours, warnings, full),
    )


def one_class_of_counts(counted, folder, name, *, invert=False):
    """As `find_one_class`, of values that were counted; see `classes_of_counts`."""
    counted = list(counted)
    if not invert and not any(value for mask in counted for value in mask[2]):
        return MaskClasses([name], {}, {}, set(), False, False, [])
    names = [name] if invert else ClassValues((Entry(REST, REST, 0, 0, name),), source="NAME=MASKS")
    return classes_of_counts(counted, folder, names, invert=invert)


def _is_cut(encoding, tally, chosen):
    """Whether the masks of an encoding are cut at half; ValueError where lossy ones cannot be."""
    counts = tally.counts_of[encoding]
    averaged = is_averaged(counts, tally.edges[encoding])
    if encoding == "grey" and (averaged or is_smoothed(counts)):
        # Of 255 objects the last is small, but what a smoothed mask shows is mostly 255.
        numbers = tally.numbered_mask() and 4 * counts[255] < counts.total() - counts[0]
        return not numbers and (not chosen or chosen.only_halves)
    if encoding not in LOSSY or (chosen and chosen.only_ranges):
        return False
    if 0 < max(counts) <= HALF:
        raise ValueError(
            f"{tally.folder}: the {encoding} masks have no value above {max(counts)}, and "
            f"{encoding} does not keep small ones: save masks as PNG"
        )
    if chosen and not chosen.only_halves:
        raise ValueError(
            f"{tally.folder}: {encoding} has changed the values of the masks: in {chosen.source}, "
            "name ranges around them, such as 118-138=NAME"
        )
    return True


# ---------------------------------------------------------------- without values in --classes


def _default_classes(tally, names, warnings):
    """(class names, {(encoding, value): its classes}); may add to the warnings.

    names: in ascending order of the values, or None. ValueError where it is not clear what the
    values mean.
    """
    foreground = tally.foreground()
    one_class = tally.is_one_class()
    if ignores_255("palette", counts := tally.counts_of.get("palette", {})):
        warnings.append(f"palette index 255 ({tally.percent(counts[255])}) counts as background")
    default = {key: ONE_CLASS if one_class else spell(*key) for key in foreground}
    if names and names != [EACH]:
        given = _pair_names(tally, foreground, list(dict.fromkeys(default.values())), names)
        return names, {key: (given[name],) for key, name in default.items()}
    if not names:
        warnings += ask(tally, foreground)
    if one_class and 2 * sum(foreground.values()) > tally.total:
        warnings.append("most pixels are foreground: --invert takes the others instead")
    stated = tally.stated_names() if len(tally.counts_of) == 1 else {}
    default |= {key: stated[key[1]] for key in foreground if key[1] in stated}
    classes = list(dict.fromkeys([*stated.values(), *default.values()]))
    return classes, {key: (name,) for key, name in default.items()}


def _pair_names(tally, foreground, default_names, names):
    """{default name: name that --classes gives it}; ValueError where their numbers differ."""
    if len(names) == len(default_names):
        return dict(zip(default_names, names, strict=True))
    classes, strays = find_strays(tally, foreground)
    advice = ""
    if strays and len(classes) == len(names):
        advice = f"; {spell_choice(classes, names)} takes the others as background"
    elif len(names) == 1:
        everything = shlex.quote(f"*={names[0]}")
        advice = f"; --classes {everything} takes all as one class"
    raise ValueError(
        f"--classes names {len(names)} classes, but the masks hold "
        f"{len(default_names)} beside background: {listed(default_names, 20)}{advice}"
    )


def _invert(tally, names):
    """(class names, {(encoding, 0): its class}) of masks whose foreground is 0."""
    foreground = tally.foreground()
    if not tally.is_one_class():
        raise ValueError(
            f"{tally.folder}: --invert takes the one class of masks as background, but these hold "
            f"{spell_all(list(foreground))}: give the value that is to be foreground a name, as in "
            "--classes 0=NAME"
        )
    if not any(counts[0] for counts in tally.counts_of.values()):
        raise ValueError(f"{tally.folder}: with --invert the masks are empty: no pixel is 0")
    given = _pair_names(tally, foreground, [ONE_CLASS], names or [ONE_CLASS])
    classes = list(given.values())
    return classes, {(encoding, 0): tuple(classes) for encoding in tally.counts_of}


# ---------------------------------------------------------------- values in --classes


def _chosen_values(tally, chosen, warnings):
    """{(encoding, value): its classes} of ClassValues; adds to the warnings.

    ValueError where no mask has a value that is named, or where one that is written by hand is
    missing while another is not named: then one of them is probably mistyped.
    """
    names_of, unnamed, used = {}, {}, set()
    for encoding, counts in tally.counts_of.items():
        ignored = ignores_255(encoding, counts)
        for value in sorted(counts):
            entries = chosen.entries_of(encoding, value, rest=not (ignored and value == 255))
            used.update(entries)
            if names := chosen.classes_of(entries):
                names_of[encoding, value] = names
            elif value and not entries:
                unnamed[encoding, value] = counts[value]
    shown = spell_all(sorted(unnamed, key=unnamed.get, reverse=True))
    if not names_of:
        raise ValueError(
            f"{tally.folder}: no mask has a value that {chosen.source} gives to a class; not "
            f"named there are {shown}"
        )
    absent = [entry for entry in chosen.entries if entry.name is not None and entry not in used]
    large = [key for key, pixels in unnamed.items() if pixels >= STRAY * tally.total]
    if absent and large and chosen.typed:
        raise ValueError(
            f"{chosen.source}: no mask has {absent[0].text} ({absent[0].name}), while "
            f"{spell_all(large)} is not named: correct the value, or add '*=background'"
        )
    warnings += chosen.notes
    if absent:
        values = listed([f"{entry.text} ({entry.name})" for entry in absent])
        warnings.append(f"{chosen.source}: no mask has {values}")
    if unnamed:
        count = "1 value" if len(unnamed) == 1 else f"{len(unnamed)} values"
        share = tally.percent(sum(unnamed.values()))
        warnings.append(f"not named in {chosen.source}, so background: {shown}; {count}, {share}")
    return names_of
