"""Samples of an image file as they are stored, where Pillow would change them.

Pillow has no mode for colours of 16 bits: it keeps the high byte of each sample, and the low one
where it is told that the bytes are in the other order. It scales the values of PNM files.
"""

import io
import math
import os
import re
import struct
import sys
import warnings

import numpy as np
from PIL import Image

SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
COLOUR = ("RGB", "RGBA", "RGBX")  # Pillow's modes of images with samples of 16 bits
# Tags of TIFF.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIPS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 273, 274, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 284, 317, 322, 323, 324, 325
EXTRA_SAMPLES, ALPHA_MULTIPLIED, BLACK_IS_ZERO = 338, 1, 1
OF_A_PLANE = (
    *(WIDTH, HEIGHT, COMPRESSION, FILL_ORDER, ORIENTATION, ROWS_PER_STRIP, PREDICTOR),
    *(TILE_WIDTH, TILE_HEIGHT),
)
LOSSY = ("JPEG", "lossy WebP")
MAX_TEXT = 64 << 20  # bytes of a plain PGM or PPM file


def stored_samples(image, file):
    """(samples, white) of an image that Pillow would change, else None.

    image: a PIL image that was opened and not loaded; file: its path or binary file. samples:
    unsigned integers (H, W) of grey, (H, W, 2) of grey and alpha, (H, W, 3) of RGB or (H, W, 4) of
    RGB and alpha; a TIFF is turned by its orientation. white: the value that the file says is
    white, or None. Raises ValueError, and what Pillow raises for a damaged file.
    """
    if image.format == "PPM":
        scaled = image.tile[0][0] != "raw" and image.mode != "1"
        return _pnm_samples(image) if scaled else None
    if image.mode not in COLOUR or not has_16_bits(image):
        return None
    mode, _, order = _raw_mode(image).partition(";16")
    multiplied = image.format == "TIFF" and image.tag_v2.get(EXTRA_SAMPLES) == (ALPHA_MULTIPLIED,)
    if image.format == "TIFF" and image.tag_v2.get(PLANAR) == 2:
        samples = _read_planes(image)
    elif mode == "LA":  # four bytes a pixel, as RGBA has
        samples = _decode(image, file, "RGBA").view(">u2").astype(np.uint16)
    else:
        mode = mode.upper()  # RGBa would be divided by alpha, each byte by its own
        samples = _decode(image, file, f"{mode};16{order}").astype(np.uint16) << 8
        samples |= _decode(image, file, f"{mode};16{SWAPPED[order]}")
    return (_divide_by_alpha(samples) if multiplied else samples), None


def has_16_bits(image):
    """Whether a PIL image that was opened and not loaded has samples of 16 bits."""
    if image.format == "TIFF":
        return 16 in image.tag_v2.get(BITS, ())
    if image.format == "PPM":
        decoder, _, _, args = image.tile[0]
        return image.mode == "I" or (decoder != "raw" and image.mode != "1" and args[1] > 255)
    return image.format == "PNG" and ";16" in _raw_mode(image)


def lossy_format(image, path):
    """Which of LOSSY changed the values of an opened image, else None."""
    if image.format != "WEBP":
        return "JPEG" if image.format == "JPEG" else None
    with open(path, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:  # the chunks of the file: RFC 9649
            name, size = head[:4], int.from_bytes(head[4:], "little")
            if name in (b"VP8 ", b"VP8L"):  # the picture, lossy or lossless
                return "lossy WebP" if name == b"VP8 " else None
            file.seek(size + size % 2, os.SEEK_CUR)
    return None


def _raw_mode(image):
    args = image.tile[0][3]
    return args if isinstance(args, str) else args[0]


def _decode(image, file, raw_mode):
    """The pixels of `file`, unpacked as `raw_mode` has it: uint8 (H, W, C)."""
    with Image.open(file, formats=[image.format]) as again:
        if page := image.tell():
            again.seek(page)
        tiles = []
        for tile in again.tile:
            args = raw_mode if isinstance(tile[3], str) else (raw_mode, *tile[3][1:])
            tiles.append(getattr(tile, "_make", tuple)((*tile[:3], args)))  # by Pillow's version
        again.tile = tiles
        return np.asarray(again)


def _divide_by_alpha(samples):
    """uint16 (H, W, 4) whose colours were multiplied by alpha -> as they were before."""
    alpha = np.maximum(samples[..., 3:], 1).astype(np.uint32)
    colours = np.minimum(samples[..., :3].astype(np.uint32) * 65535 // alpha, 65535)
    return np.concatenate([colours.astype(np.uint16), samples[..., 3:]], 2)


# ---- TIFF with each colour in a plane of its own ---------------------------------------------


def _read_planes(image):
    """uint16 (H, W, C) of a TIFF whose planes Pillow would read 8 bits of, or mistake.

    Each plane is read as the grey image that it is, through a directory written behind the file.
    """
    image.fp.seek(0)
    content, planes = image.fp.read(), []
    for number in range(len(image.getbands())):
        patched = _grey_tiff(content, image.tag_v2, number)
        with Image.open(io.BytesIO(patched), formats=["TIFF"]) as plane:
            planes.append(np.asarray(plane).astype(np.uint16))
    return np.stack(planes, 2)


def _grey_tiff(content, tags, number):
    """The bytes of a TIFF with a directory that describes plane `number` alone."""
    order = "<" if tags.prefix == b"II" else ">"
    entries = {tag: (tags[tag],) for tag in OF_A_PLANE if tag in tags}
    entries |= {BITS: (16,), PHOTOMETRIC: (BLACK_IS_ZERO,), SAMPLES: (1,)}
    for tag in (STRIPS, STRIP_BYTES, TILES, TILE_BYTES):
        if tag in tags:
            count = len(tags[tag]) // tags[SAMPLES]
            entries[tag] = tags[tag][number * count : (number + 1) * count]
    start = len(content) + len(content) % 2
    directory, values = struct.pack(order + "H", len(entries)), b""
    behind = start + 2 + 12 * len(entries) + 4  # where values lie that are more than one
    for tag, own in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(own)}L", *own)
        place = packed if len(own) == 1 else struct.pack(order + "L", behind + len(values))
        values += b"" if len(own) == 1 else packed
        directory += struct.pack(order + "HHL", tag, 4, len(own)) + place  # 4: unsigned, 32 bits
    header = tags.prefix + struct.pack(order + "HL", 42, start)
    padding = bytes(start - len(content))
    return header + content[8:] + padding + directory + bytes(4) + values


# ---- PNM -------------------------------------------------------------------------------------


def _pnm_samples(image):
    """(samples, white) of a PGM or PPM file; white is None where it is all of 16 bits."""
    decoder, _, offset, (_, white) = image.tile[0]
    shape = (image.height, image.width, 3)[: 3 if image.mode == "RGB" else 2]
    count, dtype = math.prod(shape), np.dtype(">u2" if white > 255 else "u1")
    image.fp.seek(offset)
    if decoder == "ppm_plain":
        samples = _read_text(image.fp)[:count]
    else:
        samples = np.frombuffer(image.fp.read(count * dtype.itemsize), dtype)
    if len(samples) < count:
        raise ValueError(f"is cut short: it has {len(samples)} of {count} samples")
    if samples.max() > white:
        raise ValueError(f"holds {samples.max()}, and its header allows {white} at most")
    return samples.astype(dtype.newbyteorder("=")).reshape(shape), None if white == 65535 else white


def _read_text(file):
    """The numbers in the rest of a plain PGM or PPM file, uint16."""
    text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"is text of more than {MAX_TEXT >> 20} MiB: save it as binary PGM or PPM")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # of older NumPy, for what is no number
        numbers = np.fromstring(re.sub(rb"#[^\r\n]*", b" ", text), np.float32, sep=" ")
    with np.errstate(invalid="ignore"):
        samples = numbers.astype(np.uint16)
    if (samples != numbers).any():
        raise ValueError("holds something else than whole numbers from 0 to 65535")
    return samples
