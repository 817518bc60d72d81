"""How many pixels of all masks have which value, and which values call for a question."""

import shlex
from collections import Counter
from string import ascii_uppercase

import numpy as np

from medseg.coco import MAX_CLASSES, listed
from medseg.formats.mask_files import HALF, is_grey_code

VOLUME = "volume"  # the encoding of the values of volumes, beside those of `read_mask`
ONE_CLASS = "foreground"
EACH = "*"  # --classes of masks: a class for each value, unasked
SMOOTHED = 32  # distinct values, see `is_smoothed`
EXTREMES, EDGES = 0.8, 2 / 3  # parts of all pixels, and of those between: see `is_averaged`
FULL = (1, 255, 65535)  # what different programs write for foreground
# Values of one mask that may be numbers of objects: MANY, of so many pixels each.
MANY, OBJECT = 10, 5
# Values with less than STRAY of the pixels each, and STRAYS of them together, may be strays where
# at most FEW others have more.
STRAY, STRAYS, FEW = 0.001, 0.01, 8


class Tally:
    """The pixels of each value over all masks of a folder.

    folder: for messages. counts_of: {encoding: Counter of pixels}. total: pixels. grey_colours:
    whether all colours are greys, which then are counted as "grey".
    """

    def __init__(self, folder, most=MAX_CLASSES + 1):
        """most: so many distinct values an encoding may have."""
        self.folder, self.most = folder, most
        self.counts_of, self.total, self.grey_colours = {}, 0, False
        self.edges = Counter()  # {encoding: what `count_edges` returned}
        # {(encoding, value): pixels, and number, of the masks that hold it beside 0 alone}
        self._alone, self._masks = Counter(), Counter()
        self._numbered = {}  # {hash of the values of masks that look like numbers: [path, masks]}
        self._stated = {}  # {names that masks state, as a tuple of pairs: the first such mask}

    def add(self, path, encoding, counts, numbers_objects=False, stated=None, edges=0):
        """Add the {value: pixels} of one mask; ValueError where there are too many values.

        numbers_objects: whether there are MANY or more, each one piece. stated: {value: name}, of
        the file's own text. edges: of `count_edges`.
        """
        self.edges[encoding] += edges
        if len(values := counts.keys() - {0}) == 1:
            (value,) = values
            is_grey = encoding == "colour" and is_grey_code(value)
            key = ("grey", value & 255) if is_grey else (encoding, value)
            self._alone[key] += counts[value]
            self._masks[key] += 1
        if numbers_objects:
            self._numbered.setdefault(hash(frozenset(counts)), [path, 0])[1] += 1
        if stated:
            self._stated.setdefault(tuple(stated.items()), path)
        if len(counts) > self.most:
            unknown = encoding == VOLUME
            advice = self._advise_on_many(numbers_objects, unknown)
            raise ValueError(f"{path}: holds {len(counts)} different values{advice}")
        own = self.counts_of.setdefault(encoding, Counter())
        own.update(counts)
        self.total += sum(counts.values())
        if len(own) > self.most:
            advice = self._advise_on_many(bool(self._numbered), True)
            raise ValueError(
                f"{path}: with this one the masks hold more than {self.most - 1} different "
                f"values{advice}"
            )

    def _advise_on_many(self, numbered, unknown):
        if self.most <= MAX_CLASSES + 1 and (numbered or unknown):
            one = f"--classes '*={ONE_CLASS}' takes them as one class"
            if numbered:
                return f" that look like numbers of objects, each one piece: {one}"
            return f": is this the folder of masks? If they are numbers of objects, {one}"
        return ": is this the folder of masks?"

    def merge_greys(self):
        """Count colours as greys where all are."""
        if "colour" in self.counts_of and all(map(is_grey_code, self.counts_of["colour"])):
            self.grey_colours = True
            grey = self.counts_of.setdefault("grey", Counter())
            for code, pixels in self.counts_of.pop("colour").items():
                grey[code & 255] += pixels
            self.edges["grey"] += self.edges.pop("colour")

    def use_alpha(self):
        """Count masks that are black everywhere by their alpha, or as empty beside others.

        Returns the lines of warning.
        """
        shown = self.counts_of.get("alpha")
        if not shown:
            return []
        if any(encoding != "alpha" for encoding, _ in self.foreground()):
            self.counts_of["alpha"] = Counter({0: shown.total()})
            return []
        return [f"{self.folder}: the masks are black everywhere: what is opaque is foreground"]

    def merge_full(self):
        """Count as 255 the values of masks that hold 0 and one of FULL each, not all the same.

        Other masks may hold 0 to 255 with edges of values between, but none two values of FULL.
        Returns {encoding of such masks: a line on them}.
        """
        mixed = {}
        for encoding, counts in self.counts_of.items():
            keys = [(encoding, value) for value in FULL if (encoding, value) in self._alone]
            alone = Counter({value: self._alone[encoding, value] for _, value in keys})
            others = counts - alone
            is_edged = is_smoothed(others) or is_averaged(others, self.edges[encoding])
            values = alone.keys() | {255} if is_edged else alone.keys()
            if len(values) > 1 and (is_edged or not others.keys() - {0}):
                kinds = [f"{self._masks[key]} hold 0 and {key[1]}" for key in keys]
                mixed[encoding] = (
                    f"of the {encoding} masks {', '.join(kinds)}: all are of one class"
                )
                self.counts_of[encoding] = others + Counter({255: alone.total()})
        return mixed

    def cut_at_half(self, encoding):
        """Count values up to HALF as 0, others as 255; returns the lines of warning."""
        counts = self.counts_of[encoding]
        between = sum(pixels for value, pixels in counts.items() if value not in (0, 255))
        bright = sum(pixels for value, pixels in counts.items() if value > HALF)
        self._numbered.clear()
        self.counts_of[encoding] = +Counter({0: counts.total() - bright, 255: bright})
        if not between:
            return []
        return [
            f"{encoding} masks hold values between 0 and 255 ({self.percent(between)}): cut at "
            f"half, above {HALF} is foreground"
        ]

    def foreground(self):
        """{(encoding, value): pixels} of what is foreground, in ascending order of the values."""
        pixels_of = {}
        for encoding, counts in self.counts_of.items():
            ignored = (0, 255) if ignores_255(encoding, counts) else (0,)
            values = [value for value in sorted(counts) if value not in ignored]
            pixels_of |= {(encoding, value): counts[value] for value in values}
        return pixels_of

    def is_one_class(self):
        """Whether each encoding has one foreground value; ValueError where that is unclear."""
        if not self.foreground():
            raise ValueError(f"{self.folder}: the masks are empty: every pixel is 0")
        numbers = Counter(encoding for encoding, _ in self.foreground())
        one_class = max(numbers.values()) == 1
        if len(numbers) > 1 and not one_class:
            kinds = ", ".join(f"{encoding} ({number})" for encoding, number in numbers.items())
            raise ValueError(
                f"{self.folder}: masks of several kinds with several values beside 0: {kinds}; "
                "save all in one kind, or give each value its class, as in --classes 1=A,2=B"
            )
        return one_class

    def percent(self, pixels):
        return f"{100 * pixels / self.total:.2f} % of the pixels"

    def numbered_mask(self):
        """The path of a mask whose values look like numbers of objects, or None.

        Where most such masks have the same values, these are classes that all images show.
        """
        masks = [masks for _, masks in self._numbered.values()]
        if not masks or (sum(masks) > 1 and 2 * max(masks) > sum(masks)):
            return None
        return next(iter(self._numbered.values()))[0]

    def stated_names(self):
        """{value: name} as the masks' own text has it; ValueError where masks disagree."""
        if len(self._stated) > 1:
            first, second, *_ = self._stated.values()
            raise ValueError(
                f"{first} and {second}: their text gives the values different names: name them "
                "with --classes 1=NAME,2=NAME"
            )
        return dict(next(iter(self._stated), ()))


def is_smoothed(counts):
    """Whether grey masks have edges of in-between values rather than classes."""
    ranges = {value // 32 for value in counts}
    return (
        len(counts) > SMOOTHED
        and ranges == set(range(8))
        and counts[0] > 0
        and counts[255] > 0
        and 2 * (counts[0] + counts[255]) >= counts.total()
    )


def is_averaged(counts, edges):
    """Whether grey masks of few values are masks of 0 and 255 that were made smaller, or larger.

    Averaging leaves values between these where both are near: along edges, below and above half.
    So nearly all of their pixels lie between a smaller and a larger neighbour, while classes, such
    as 0, 85, 170, 255, have areas. On 28 masks of vessels that were averaged by 2 to 4 it was 0.84
    of the pixels at least; of rings of classes, two pixels wide, 0.25.
    edges: how many there are, of `count_edges`.
    """
    between = [value for value in counts if 0 < value < 255]
    return (
        bool(between)
        and min(between) <= HALF < max(between)
        and 0 <= min(counts) <= max(counts) == 255
        and counts[0] + counts[255] >= EXTREMES * counts.total()
        and edges >= EDGES * sum(counts[value] for value in between)
    )


def count_edges(encoding, values, counts):
    """How many pixels between 0 and white have a smaller and a larger one among their neighbours.

    values: of a grey mask, or colours, (H, W); counts: {value: pixels}. 0 unless half of the pixels
    are 0 or white, and some are between.
    """
    white = {"grey": 255, "colour": 0xFFFFFF}.get(encoding)
    extremes = counts.get(0, 0) + counts.get(white, 0)
    if white not in counts or not values.size > extremes >= values.size / 2:
        return 0
    rows, columns = np.nonzero((values > 0) & (values < white))
    padded, own = np.pad(values, 1, mode="edge"), values[rows, columns]
    around = [padded[rows + y, columns + x] for y in range(3) for x in range(3)]
    between = (np.min(around, axis=0) < own) & (np.max(around, axis=0) > own)
    return int(between.sum())


def ignores_255(encoding, counts):
    """Whether index 255 of palette masks is background, for there are other classes."""
    return encoding == "palette" and 255 in counts and len(counts.keys() - {0}) > 1


# ---------------------------------------------------------------- questions


def spell(encoding, value):
    return f"#{value:06x}" if encoding == "colour" else str(value)


def spell_all(keys, most=8):
    """'1, 2, 4' of [(encoding, value)]."""
    return listed([spell(*key) for key in keys], most)


def spell_choice(keys, names=None):
    """The flag that takes these [(encoding, value)] as classes: '--classes 128=A,255=B'."""
    names = names or ([ONE_CLASS] if len(keys) == 1 else ascii_uppercase)
    pairs = [f"{spell(*key)}={name}" for key, name in zip(keys, names, strict=False)]
    return f"--classes {shlex.quote(','.join(pairs))}"


def find_strays(tally, foreground):
    """(classes, strays): [(encoding, value)] of {(encoding, value): pixels}, by their pixels.

    No strays where there are several encodings, in volumes, and among class numbers 1 to N.
    """
    keys = list(foreground)
    numbers = [value for _, value in keys]
    if (
        len(tally.counts_of) > 1
        or VOLUME in tally.counts_of
        or numbers == [*range(1, len(keys) + 1)]
    ):
        return keys, []
    strays = [key for key in keys if foreground[key] < STRAY * tally.total]
    classes = [key for key in keys if key not in strays]
    together = sum(foreground[key] for key in strays)
    if not 1 <= len(classes) <= FEW or together >= STRAYS * tally.total:
        return keys, []
    return classes, strays


def ask(tally, foreground):
    """ValueError where it is not clear what several values mean; returns the lines of warning.

    foreground: {(encoding, value): pixels}. What is asked: whether values are numbers of objects,
    and whether there are strays: more than two, and more than classes.
    """
    folder, each = tally.folder, f"--classes '{EACH}' keeps a class for each value"
    if path := tally.numbered_mask():
        raise ValueError(
            f"{path}: its values look like numbers of objects, each one piece: --classes "
            f"'*={ONE_CLASS}' takes all as one class, {each}"
        )
    classes, strays = find_strays(tally, foreground)
    if not strays:
        return []
    together = tally.percent(sum(foreground[key] for key in strays))
    command = spell_choice(classes)
    if len(strays) > max(2, len(classes)):
        shown = [f"{spell(*key)} ({tally.percent(foreground[key])})" for key in classes]
        raise ValueError(
            f"{folder}: {listed(shown)} look like classes, and {len(strays)} values like strays "
            f"({together}): {spell_all(strays, 12)}; {command} takes strays as background, {each}"
        )
    return [f"{spell_all(strays)}: {together}; if that is no class, {command} leaves it out"]
