"""What the values in a folder of masks mean.

No mask says so, and all are looked at first:

- 0 and one other value anywhere: one class, foreground.
- Several values or colours: a class each, named by the value ("85") or colour ("#ff0000"). 0 and
  black are background.
- JPEG and lossy WebP change values, so such masks are cut at half: above 127 is foreground. The
  same for grey masks whose edges were smoothed: more than SMOOTHED distinct values that reach from
  0 to 255 with none of eight equal ranges empty, while at least half of the pixels are exactly 0
  or 255.
- Palette masks count by index, not by colour, and index 255 beside other classes is background:
  PASCAL VOC's "ignore".
- A pixel whose alpha is below half is background.
- The values of volumes are class numbers: no volume is cut at half.

Masks of several kinds may be mixed where each kind has one foreground value.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from PIL import ImageOps

from medseg.coco import MAX_CLASSES
from medseg.files import parallel_map
from medseg.images import image_errors, open_image
from medseg.run_lengths import encode_labels
from medseg.samples import LOSSY, lossy_format, stored_samples

HALF = 127  # the highest grey value that is background where masks are cut at half
OPAQUE = 32767  # the same of 16 bits, for alpha
SMOOTHED = 32  # distinct values; see above


# ---------------------------------------------------------------- one mask


def read_mask(path):
    """A mask file as (kind, integer array (H, W) of its stored values).

    kind: "1-bit", "grey", "palette" (the values are indices), "colour" (0xRRGGBB), or one of
    LOSSY (grey values). Raises FileNotFoundError; ValueError for what is not one whole picture,
    and for colours in a lossy format, which cannot be told apart any more.
    """
    with image_errors(path, "mask"), open_image(path) as image:
        lossy = lossy_format(image, path)
        samples = stored_samples(image, path)
        if samples:
            kind, values = _values_of_samples(samples[0])
        else:
            image.load()  # turns a TIFF
            kind, values = _stored_values(ImageOps.exif_transpose(image))
        if not lossy:
            return kind, values
        if kind == "colour":
            rounding = 1 if lossy == "lossy WebP" else 0  # its greys may be 9, 10, 9
            if not _is_grey(values, rounding).all():
                raise ValueError(
                    f"{lossy} has changed the colours of this mask: save masks as PNG before "
                    f"they are ever {lossy}"
                )
            values = (values & 255).astype(np.uint8)
        return lossy, values


def _values_of_samples(samples):
    """(kind, integers (H, W)) of what `stored_samples` returns."""
    if samples.ndim == 2:
        return "grey", samples
    if samples.shape[2] == 2:
        return "grey", np.where(samples[..., 1] > OPAQUE, samples[..., 0], 0)
    colours, low = samples[..., :3], samples[..., :3] & 255
    high = colours >> 8
    if high.any() and low.any() and (high != low).any():  # not 8 bits in either byte, or in both
        raise ValueError("holds colours of 16 bits: save it with 8 bits a colour")
    codes = _color_codes(high if high.any() else low)
    return "colour", np.where(samples[..., 3] > OPAQUE, codes, 0) if samples.shape[2] > 3 else codes


def _stored_values(image):
    """(kind, integers (H, W)) of a decoded picture."""
    pixels = np.asarray(image)
    if image.mode == "1":
        return "1-bit", pixels.astype(np.uint8)
    if image.mode == "P":
        return "palette", pixels
    if image.mode == "F":
        if not (pixels == np.round(pixels)).all() or np.abs(pixels).max() > 2**24:
            raise ValueError("holds fractions: a mask needs whole numbers")
        return "grey", pixels.astype(np.int32)
    if image.mode == "L" or image.mode[0] == "I":
        return "grey", pixels
    if image.mode == "LA":
        return "grey", np.where(pixels[..., 1] > HALF, pixels[..., 0], 0)
    if image.mode in ("RGB", "RGBA"):
        codes = _color_codes(pixels)
        return "colour", np.where(pixels[..., 3] > HALF, codes, 0) if image.mode[3:] else codes
    raise ValueError(f"a picture of mode {image.mode} is no mask: save it as PNG")


def _color_codes(pixels):
    """(H, W, 3 or more) of 0..255 -> uint32 (H, W) of 0xRRGGBB."""
    red, green, blue = (pixels[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


def _is_grey(codes, tolerance=0):
    red, green, blue = (codes >> shift & 255 for shift in (16, 8, 0))
    highest, lowest = (np.maximum(red, green), blue), (np.minimum(red, green), blue)
    return np.maximum(*highest) - np.minimum(*lowest) <= tolerance


# ---------------------------------------------------------------- what the values mean


def count_values(values):
    """{value: pixels} of an integer array."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def find_meaning(masks, folder):
    """The Meaning of the values in these mask files, of a folder that messages name.

    Raises ValueError, or FileNotFoundError, that names the file.
    """

    def count(path):
        kind, values = read_mask(path)
        return path, kind, count_values(values)

    with contextlib.closing(parallel_map(count, masks)) as counted:
        return meaning_of(counted, folder)


def meaning_of(counted, folder):
    """The Meaning of values that were counted; see `find_meaning`.

    counted: iterable of (path, kind, {value: pixels}), or an exception to raise, for each mask.
    """
    return _decide(_tally(counted), folder)


def _tally(counted):
    """{kind: Counter of the pixels of each value} over all masks."""
    tally = {}
    for result in counted:
        if isinstance(result, Exception):
            raise result
        path, kind, counts = result
        if len(counts) > MAX_CLASSES + 1:
            raise ValueError(
                f"{path}: holds {len(counts)} different values: is this the folder of masks?"
            )
        tally.setdefault(kind, Counter()).update(counts)
        if len(tally[kind]) > MAX_CLASSES + 1:
            raise ValueError(
                f"{path}: with this one the masks hold more than {MAX_CLASSES} different "
                "values: is this the folder of masks?"
            )
    if "colour" in tally and all(_is_grey(code) for code in tally["colour"]):
        greys = {code & 255: pixels for code, pixels in tally.pop("colour").items()}
        tally["grey"] = tally.get("grey", Counter()) + Counter(greys)
    return tally


@dataclass
class Meaning:
    """What the values of a folder of masks mean."""

    classes: list = field(default_factory=list)
    values: dict = field(default_factory=dict)  # (kind, value) -> class name, in ascending order
    pixels: dict = field(default_factory=dict)  # (kind, value) -> share of all pixels
    cut: set = field(default_factory=set)  # kinds that are cut at HALF
    grey_colours: bool = True  # all colours are greys, and count as these
    warnings: list = field(default_factory=list)

    def split(self, kind, values):
        """The values of one mask -> {class name: RunLengths}."""
        if kind == "colour" and self.grey_colours:
            kind, values = "grey", values & 255
        if kind in self.cut:
            values = np.where(values > HALF, 255, 0).astype(np.uint8)
        masks = {}
        for value, runs in encode_labels(values).items():
            name = self.values.get((kind, value))
            if name is not None:
                masks[name] = masks[name] | runs if name in masks else runs
        return masks

    def rename(self, names):
        """Give the classes other names, in ascending order of their values."""
        if len(names) != len(self.classes):
            raise ValueError(
                f"--classes names {len(names)} classes, but the masks hold "
                f"{len(self.classes)} beside background: {', '.join(self.classes[:20])}"
            )
        renamed = dict(zip(self.classes, names, strict=True))
        self.classes = list(names)
        self.values = {key: renamed[name] for key, name in self.values.items()}

    def report(self):
        """Print the value and the share of each class, and the warnings."""
        several_kinds = len({kind for kind, _ in self.values}) > 1
        for (kind, value), name in self.values.items():
            of_kind = f" ({kind})" if several_kinds else ""
            shown = f"above {HALF}" if kind in self.cut else _spell(kind, value)
            share = 100 * self.pixels[kind, value]
            print(f"class {name}: value {shown}{of_kind}, {share:.2f} % of the pixels of the masks")
        for line in self.warnings:
            print(f"warning: {line}")


def _spell(kind, value):
    return f"#{value:06x}" if kind == "colour" else str(value)


def _decide(tally, folder):
    """The Meaning of what `_tally` counted; raises ValueError."""
    meaning = Meaning(grey_colours="colour" not in tally)
    total = sum(sum(counts.values()) for counts in tally.values())
    foreground = {}  # kind -> {value: pixels}
    for kind, counts in tally.items():
        if kind in LOSSY or (kind == "grey" and _is_smoothed(counts)):
            counts = _cut_at_half(kind, counts, total, meaning, folder)
        found = {value: counts[value] for value in sorted(counts) if value != 0}
        if kind == "palette" and len(found) > 1 and (ignored := found.pop(255, 0)):
            share = f"{100 * ignored / total:.2f} % of the pixels"
            meaning.warnings.append(f"palette index 255 ({share}) counts as background")
        if found:
            foreground[kind] = found
    if not foreground:
        raise ValueError(f"{folder}: the masks are empty: every pixel is 0")
    one_class = all(len(found) == 1 for found in foreground.values())
    if len(foreground) > 1 and not one_class:
        kinds = ", ".join(f"{kind} ({len(found)})" for kind, found in foreground.items())
        raise ValueError(
            f"{folder}: masks of several kinds with several values beside 0: {kinds}; "
            "save all in one kind"
        )
    for kind, found in foreground.items():
        for value, pixels in found.items():
            meaning.values[kind, value] = "foreground" if one_class else _spell(kind, value)
            meaning.pixels[kind, value] = pixels / total
    meaning.classes = list(dict.fromkeys(meaning.values.values()))
    return meaning


def _is_smoothed(counts):
    """Whether grey masks have edges of in-between values rather than classes."""
    ranges = {value // 32 for value in counts}
    extremes = counts[0] + counts[255]
    return (
        len(counts) > SMOOTHED
        and ranges == set(range(8))
        and counts[0] > 0
        and counts[255] > 0
        and 2 * extremes >= sum(counts.values())
    )


def _cut_at_half(kind, counts, total, meaning, folder):
    """{value: pixels} after the cut; notes it in `meaning`, with a warning where it matters."""
    between = sum(pixels for value, pixels in counts.items() if value not in (0, 255))
    bright = sum(pixels for value, pixels in counts.items() if value > HALF)
    if kind in LOSSY and not bright and any(counts[value] for value in counts if value):
        raise ValueError(
            f"{folder}: the {kind} masks have no value above {max(counts)}, and {kind} does not "
            "keep small ones: save masks as PNG"
        )
    meaning.cut.add(kind)
    if between:
        share = f"{100 * between / total:.2f} % of the pixels"
        meaning.warnings.append(
            f"{kind} masks hold values between 0 and 255 ({share}): cut at half, "
            f"above {HALF} is foreground"
        )
    return {0: sum(counts.values()) - bright, 255: bright} if bright else {0: 1}
