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

Masks of several encodings may be mixed where each has one foreground value.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, replace

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
    """A mask file as (encoding, integer array (H, W) of its stored values).

    encoding: "1-bit", "grey", "palette" (the values are indices), "colour" (0xRRGGBB), or one of
    LOSSY (grey values). Raises FileNotFoundError; ValueError for what is not one whole picture,
    and for colours in a lossy format, which cannot be told apart any more.
    """
    with image_errors(path, "mask"), open_image(path) as image:
        lossy = lossy_format(image, path)
        samples = stored_samples(image, path)
        if samples:
            encoding, values = _values_of_samples(samples[0])
        else:
            image.load()  # turns a TIFF
            encoding, values = _stored_values(ImageOps.exif_transpose(image))
        if not lossy:
            return encoding, values
        if encoding == "colour":
            rounding = 1 if lossy == "lossy WebP" else 0  # its greys may be 9, 10, 9
            if not _is_grey(values, rounding).all():
                raise ValueError(
                    f"{lossy} has changed the colours of this mask: save masks as PNG before "
                    f"they are ever {lossy}"
                )
            values = (values & 255).astype(np.uint8)
        return lossy, values


def _values_of_samples(samples):
    """(encoding, integers (H, W)) of what `stored_samples` returns."""
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
    """(encoding, integers (H, W)) of a decoded picture."""
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


@dataclass(frozen=True)
class MaskClasses:
    """The classes that the values of a folder of masks stand for.

    names: in ascending order of the values. class_of: {(encoding, value): name of its class}.
    fractions: {(encoding, value): fraction of all pixels}. cut: encodings that are cut at HALF.
    warnings: lines to print.
    """

    names: list
    class_of: dict
    fractions: dict
    cut: set
    warnings: list

    def to_masks(self, encoding, values):
        """The values of one mask, an integer array (H, W) -> {class name: RunLengths}."""
        if encoding == "colour" and not any(name == "colour" for name, _ in self.class_of):
            encoding, values = "grey", values & 255  # all colours are greys, and count as these
        if encoding in self.cut:
            values = np.where(values > HALF, 255, 0).astype(np.uint8)
        masks = {}
        for value, runs in encode_labels(values).items():
            name = self.class_of.get((encoding, value))
            if name is not None:
                masks[name] = masks[name] | runs if name in masks else runs
        return masks

    def report(self):
        """Print the value of each class and its part of the pixels, and the warnings."""
        several_encodings = len({encoding for encoding, _ in self.class_of}) > 1
        for (encoding, value), name in self.class_of.items():
            of_encoding = f" ({encoding})" if several_encodings else ""
            shown = f"above {HALF}" if encoding in self.cut else _spell(encoding, value)
            percent = 100 * self.fractions[encoding, value]
            value_is = f"class {name}: value {shown}{of_encoding}"
            print(f"{value_is}, {percent:.2f} % of the pixels of the masks")
        for line in self.warnings:
            print(f"warning: {line}")


def find_classes(paths, folder, names=None):
    """The MaskClasses of these mask files, of a folder that messages name.

    names: for the classes, in ascending order of their values; default: the values.
    Raises ValueError, or FileNotFoundError, that names the file.
    """

    with contextlib.closing(_count_files(paths)) as counted:
        return classes_of_counts(counted, folder, names)


def _count_files(paths):
    """Yield (path, encoding, {value: pixels}) of each mask file."""

    def count(path):
        encoding, values = read_mask(path)
        return path, encoding, count_values(values)

    return parallel_map(count, paths, catch=())


def find_one_class(paths, folder, name):
    """The MaskClasses of files in which whatever is foreground is of one class; it may be empty."""
    with contextlib.closing(_count_files(paths)) as counted:
        return one_class_of_counts(counted, folder, name)


def one_class_of_counts(counted, folder, name):
    """As `find_one_class`, of values that were counted; see `classes_of_counts`."""
    counted = list(counted)
    if not any(value for _, _, counts in counted for value in counts):
        return MaskClasses([name], {}, {}, set(), [])
    found = classes_of_counts(counted, folder)
    return replace(found, names=[name], class_of=dict.fromkeys(found.class_of, name))


def count_values(values):
    """{value: pixels} of an integer array."""
    if values.dtype in (np.uint8, np.uint16):
        counts = np.bincount(values.ravel())
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    distinct, counts = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def classes_of_counts(counted, folder, names=None):
    """The MaskClasses of values that were counted; see `find_classes`.

    counted: iterable of (path, encoding, {value: pixels}) for each mask.
    """
    counts_of = _count_by_encoding(counted)
    total = sum(counts.total() for counts in counts_of.values())
    cut, foreground, warnings = set(), {}, []
    for encoding, counts in counts_of.items():
        if encoding in LOSSY or (encoding == "grey" and _is_smoothed(counts)):
            cut.add(encoding)
        if encoding in LOSSY and 0 < max(counts) <= HALF:
            raise ValueError(
                f"{folder}: the {encoding} masks have no value above {max(counts)}, and "
                f"{encoding} does not keep small ones: save masks as PNG"
            )
        foreground |= _foreground(encoding, counts, encoding in cut)
        warnings += _warnings(encoding, counts, encoding in cut, total)
    one_class = _is_one_class(foreground, folder)
    class_of = {key: "foreground" if one_class else _spell(*key) for key in foreground}
    default_names = list(dict.fromkeys(class_of.values()))
    if names:
        renamed = _pair_names(default_names, names)
        class_of = {key: renamed[name] for key, name in class_of.items()}
    fractions = {key: pixels / total for key, pixels in foreground.items()}
    return MaskClasses(names or default_names, class_of, fractions, cut, warnings)


def _count_by_encoding(counted):
    """{encoding: Counter of the pixels of each value} over all masks."""
    counts_of = {}
    for path, encoding, counts in counted:
        if len(counts) > MAX_CLASSES + 1:
            raise ValueError(
                f"{path}: holds {len(counts)} different values: is this the folder of masks?"
            )
        own = counts_of.setdefault(encoding, Counter())
        own.update(counts)
        if len(own) > MAX_CLASSES + 1:
            raise ValueError(
                f"{path}: with this one the masks hold more than {MAX_CLASSES} different "
                "values: is this the folder of masks?"
            )
    if "colour" in counts_of and all(map(_is_grey, counts_of["colour"])):
        grey = counts_of.setdefault("grey", Counter())
        for code, pixels in counts_of.pop("colour").items():
            grey[code & 255] += pixels
    return counts_of


def _is_smoothed(counts):
    """Whether grey masks have edges of in-between values rather than classes."""
    ranges = {value // 32 for value in counts}
    return (
        len(counts) > SMOOTHED
        and ranges == set(range(8))
        and counts[0] > 0
        and counts[255] > 0
        and 2 * (counts[0] + counts[255]) >= counts.total()
    )


def _foreground(encoding, counts, cut):
    """{(encoding, value): pixels} of what is foreground, in ascending order of the values."""
    if cut:
        bright = sum(pixels for value, pixels in counts.items() if value > HALF)
        return {(encoding, 255): bright} if bright else {}
    ignored = (0, 255) if _ignores_255(encoding, counts) else (0,)
    return {(encoding, value): counts[value] for value in sorted(counts) if value not in ignored}


def _ignores_255(encoding, counts):
    """Whether index 255 of palette masks is background, for there are other classes."""
    return encoding == "palette" and 255 in counts and len(counts.keys() - {0}) > 1


def _warnings(encoding, counts, cut, total):
    """Yield a line where pixels count for something else than their value."""
    if cut and counts.keys() - {0, 255}:
        percent = 100 * sum(counts[value] for value in counts if value not in (0, 255)) / total
        yield (
            f"{encoding} masks hold values between 0 and 255 ({percent:.2f} % of the pixels): "
            f"cut at half, above {HALF} is foreground"
        )
    if _ignores_255(encoding, counts):
        percent = 100 * counts[255] / total
        yield f"palette index 255 ({percent:.2f} % of the pixels) counts as background"


def _is_one_class(foreground, folder):
    """Whether each encoding has one foreground value; ValueError where the classes are unclear."""
    if not foreground:
        raise ValueError(f"{folder}: the masks are empty: every pixel is 0")
    numbers = Counter(encoding for encoding, _ in foreground)
    one_class = max(numbers.values()) == 1
    if len(numbers) > 1 and not one_class:
        kinds = ", ".join(f"{encoding} ({number})" for encoding, number in numbers.items())
        raise ValueError(
            f"{folder}: masks of several kinds with several values beside 0: {kinds}; "
            "save all in one kind"
        )
    return one_class


def _pair_names(default_names, names):
    """{default name: name that --classes gives it}; ValueError where their numbers differ."""
    if len(names) != len(default_names):
        raise ValueError(
            f"--classes names {len(names)} classes, but the masks hold "
            f"{len(default_names)} beside background: {', '.join(default_names[:20])}"
        )
    return dict(zip(default_names, names, strict=True))


def _spell(encoding, value):
    return f"#{value:06x}" if encoding == "colour" else str(value)
