"""Mask files, pictures or arrays that NumPy saved, to arrays of the values that they store."""

import functools
import os
import re

import numpy as np

from medseg.files import name_file
from medseg.samples import open_picture

ARRAY = ".npy"
HALF = 127  # the highest grey value that is background where masks are cut at half
MAX_WHOLE = 2**24  # up to which 32-bit floating point has all whole numbers
ROUNDING = 1e-4  # part by which whole numbers may be off that went through a scale: 1.0000153


def read_mask(path, palette_colours=False):
    """A mask file as (encoding, integer array (H, W) of its stored values), turned by its EXIF.

    encoding: "1-bit", "grey", "palette" (the values are indices), "colour" (0xRRGGBB), "alpha"
    (255 where a picture that is black everywhere is opaque), or one of `medseg.samples.LOSSY`
    (grey values). palette_colours: read palettes as the colours that they show, as is done anyway
    where `_is_order_of_writer`. Raises FileNotFoundError; ValueError for what is not one whole
    picture or array, and for colours in a lossy format, which cannot be told apart any more.
    """
    with name_file(path):
        if str(path).lower().endswith(ARRAY):
            return _stored_values(_read_array(path)[..., None], False, path)
        with open_picture(path) as picture:
            lossy, (values, has_alpha, palette) = picture.lossy(), picture.decode()
        if palette is not None:
            of_writer = picture.format == "GIF" or _is_order_of_writer(palette, values)
            if not (palette_colours or of_writer):
                return "palette", values[..., 0]
            values, has_alpha = palette[values[..., 0]], False
        encoding, values = _stored_values(values, has_alpha, path)
        if not lossy:
            return encoding, values
        rounding = 1 if lossy == "lossy WebP" else 0  # its greys may be 9, 10, 9
        if encoding == "colour" and not is_grey_code(values, rounding).all():
            raise ValueError(
                f"{lossy} has changed the colours of this mask: save masks as PNG before they are "
                f"ever {lossy}"
            )
        return lossy, (values & 255).astype(np.uint8) if encoding == "colour" else values


def _is_order_of_writer(palette, indices):
    """Whether the indices of a palette mask are in the order of whatever program wrote it.

    Class numbers begin with the background, 0. Where black, the background of every mask that is
    drawn in colours, has another index (but 255, which stands for "ignore"), the writer has put the
    colours into the palette as it met them. GIF files are always written so.
    """
    if not palette[0].any():
        return False
    used = np.flatnonzero(np.bincount(indices.ravel()))
    return not palette[used[used != 255]].any(1).all()


def palette_in_use(path):
    """{index: 0xRRGGBB} of the indices that a palette mask holds, {} of other masks."""
    if str(path).lower().endswith(ARRAY):
        return {}
    with name_file(path), open_picture(path) as picture:
        if not picture.pixel_format.endswith("palette"):
            return {}
        values, _, palette = picture.decode()
    used = np.flatnonzero(np.bincount(values.ravel()))
    return dict(zip(used.tolist(), _color_codes(palette[None, used])[0].tolist(), strict=True))


def _stored_values(values, has_alpha, path):
    """(encoding, integers (H, W)) of samples (H, W, C)."""
    alpha = values[..., -1] if has_alpha else None
    values = values[..., :-1] if has_alpha else values
    if values.shape[2] not in (1, 3):
        raise ValueError(f"has {values.shape[2]} channels: a mask has 1, or the 3 of colours")
    if values.dtype == bool:
        return "1-bit", values[..., 0].astype(np.uint8)
    encoding = "grey" if values.shape[2] == 1 else "colour"
    whole = whole_numbers(values, path)
    codes = whole[..., 0] if encoding == "grey" else _color_codes(whole)
    if alpha is None:
        return encoding, codes
    shown = alpha > (0.5 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max // 2)
    if not codes.any() and shown.any() and not shown.all():
        return "alpha", np.where(shown, np.uint8(255), np.uint8(0))
    return encoding, np.where(shown, codes, 0)


def _color_codes(colours):
    """Whole numbers (H, W, 3) -> uint32 (H, W) of 0xRRGGBB."""
    if colours.max() > 255:
        high, low = colours >> 8, colours & 255
        if colours.max() > 65535 or (low.any() and (high != low).any()):
            raise ValueError("holds colours of 16 bits: save it with 8 bits a colour")
        colours = high  # 8 bits in the upper byte, or in both
    red, green, blue = (colours[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


def is_grey_code(codes, tolerance=0):
    """Whether 0xRRGGBB, or each of an array of them, is grey, up to a difference of its samples."""
    return np.ptp([codes >> shift & 255 for shift in (16, 8, 0)], 0) <= tolerance


def _read_array(path):
    """The array (H, W) that numpy.save wrote; nothing of it is read before its header is."""
    array = np.load(path, mmap_mode="r")  # which takes no pickled objects
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"an array {array.shape} of {array.dtype}: a mask has whole numbers (H, W)"
        )
    return array.astype(array.dtype.newbyteorder("="))


def whole_numbers(values, path):
    """Numbers -> whole ones, of the smallest type that is counted fast.

    What is whole but for ROUNDING is rounded, with a warning for the folder of the path.
    ValueError for fractions and numbers too large.
    """
    if values.dtype.kind == "f":
        whole = np.round(values)
        with np.errstate(invalid="ignore"):
            close = np.abs(values - whole) <= ROUNDING * np.maximum(np.abs(whole), 1)
        if not close.all() or float(np.abs(whole).max()) > MAX_WHOLE:
            raise ValueError("holds fractions: a mask needs whole numbers")
        if (whole != values).any():
            _warn_of_rounding(os.path.dirname(path))
        values = whole.astype(np.int32)
    if values.itemsize > 2 and 0 <= values.min() and values.max() <= 65535:
        values = values.astype(np.uint16)  # whose values are counted in a fraction of the time
    return values


@functools.cache
def _warn_of_rounding(folder):
    print(f"warning: {folder}: labels such as 1.0000153 are rounded to whole numbers")


# ---------------------------------------------------------------- names within the file


def read_names(path):
    """{value: class name} that a mask's own text states, as `medseg.images.save_mask` writes it.

    {} where there is none. Raises as `read_mask`.
    """
    with name_file(path), open_picture(path) as picture:
        text = picture.text
    stated = re.findall(r"(\d+)=(.+?)(?=, \d+=|$)", text or "")
    return {int(number): name for number, name in stated}
