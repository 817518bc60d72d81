"""Mask files, pictures or arrays that NumPy saved, to arrays of the values that they store."""

import os
import re

import numpy as np

from medseg.files import check_regular
from medseg.images import (
    SUFFIXES,
    check_file_size,
    exif_orientation,
    image_errors,
    open_image,
    pixel_limit,
    too_many_pixels,
    turn,
)
from medseg.samples import lossy_format, stored_samples

ARRAY = ".npy"
MASK_SUFFIXES = (*SUFFIXES, ARRAY)
HALF = 127  # the highest grey value that is background where masks are cut at half
OPAQUE = 32767  # the same of 16 bits, for alpha
MAX_WHOLE = 2**24  # up to which 32-bit floating point has all whole numbers


def read_mask(path, palette_colours=False):
    """A mask file as (encoding, integer array (H, W) of its stored values), turned by its EXIF.

    encoding: "1-bit", "grey", "palette" (the values are indices), "colour" (0xRRGGBB), or one of
    `medseg.samples.LOSSY` (grey values). palette_colours: read a palette picture as the colours
    that it shows.
    Raises FileNotFoundError; ValueError for what is not one whole picture or array, and for
    colours in a lossy format, which cannot be told apart any more.
    """
    if str(path).lower().endswith(ARRAY):
        with image_errors(path, "mask"):
            return _read_array(path)
    with image_errors(path, "mask"), open_image(path) as image:
        lossy = lossy_format(image, path)
        samples = stored_samples(image, path)
        _, left = exif_orientation(image)
        if samples:
            encoding, values = _values_of_samples(samples[0])
        else:
            image.load()  # turns a TIFF
            if palette_colours and image.mode == "P":
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            encoding, values = _stored_values(image)
        values = turn(values, left)
        if not lossy:
            return encoding, values
        if encoding == "colour":
            rounding = 1 if lossy == "lossy WebP" else 0  # its greys may be 9, 10, 9
            if not is_grey_code(values, rounding).all():
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
        return "grey", _whole_numbers(pixels)
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


def is_grey_code(codes, tolerance=0):
    """Whether 0xRRGGBB, or each of an array of them, is grey, up to a difference of its samples."""
    red, green, blue = (codes >> shift & 255 for shift in (16, 8, 0))
    highest, lowest = (np.maximum(red, green), blue), (np.minimum(red, green), blue)
    return np.maximum(*highest) - np.minimum(*lowest) <= tolerance


def _read_array(path):
    """`read_mask` of a file that numpy.save wrote; nothing of it is read before its header is."""
    check_regular(path)
    check_file_size(os.stat(path).st_size)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # which takes no pickled objects
    except (ValueError, SyntaxError, TypeError, OverflowError) as error:
        raise ValueError(f"not a whole array of numbers in NumPy's format ({error})") from None
    shape = array.shape
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"an array {shape} of {array.dtype}: a mask has whole numbers (H, W)")
    if array.size > pixel_limit():
        raise too_many_pixels(array.size, f"{array.size} pixels")
    values = array.astype(array.dtype.newbyteorder("="))
    if values.dtype == bool:
        return "1-bit", values.astype(np.uint8)
    if values.dtype.kind == "f":
        values = _whole_numbers(values)
    if 0 <= values.min() and values.max() <= 65535:
        values = values.astype(np.uint16)  # whose values are counted in a fraction of the time
    return "grey", values


def _whole_numbers(values):
    """Floating point (H, W) -> int32; ValueError for fractions and numbers too large."""
    if not (values == np.round(values)).all() or np.abs(values).max() > MAX_WHOLE:
        raise ValueError("holds fractions: a mask needs whole numbers")
    return values.astype(np.int32)


# ---------------------------------------------------------------- names within the file


def read_names(path):
    """{value: class name} that a mask's own text states, as `medseg.images.save_mask` writes it.

    {} where there is none. Raises as `read_mask`.
    """
    with image_errors(path, "mask"), open_image(path) as image:
        text = image.info.get("classes")
    parts = re.split(r", (?=\d+=)", text) if isinstance(text, str) else []
    stated = [part.partition("=") for part in parts]
    numbers = [number for number, _, _ in stated]
    names = [name for _, _, name in stated]
    in_order = numbers == [str(number) for number in range(1, len(parts) + 1)]
    if not in_order or len(set(names)) < len(names) or not all(map(_is_name, names)):
        return {}
    return dict(enumerate(names, start=1))


def _is_name(text):
    return bool(text) and text.isprintable()
