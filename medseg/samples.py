"""One picture file to its samples as they are stored: by Pillow where it is right.

Pillow has no mode for colours of 16 bits, which OpenCV reads of PNG files, scales the values of
PNM files (which is undone here), and knows few kinds of TIFF. tifffile reads the others; some
compressions need imagecodecs, which is optional.
"""

import contextlib
import logging
import math
import mmap
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import COMPRESSION_INFO

from medseg.cli import MAX_MEGAPIXELS
from medseg.files import name_file
from medseg.settings import MAX_CHANNELS, window_limits, window_to_uint8

# Pillow's names, listed so that no rare decoder meets a stranger's file; PPM is all of PNM.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF")
FORMAT_NAMES = "JPEG, PNG, TIFF, BMP, PPM, PGM, WebP or GIF"
KINDS = f"DICOM, NIfTI, NRRD, MetaImage, {FORMAT_NAMES}"  # of files that predict.py takes
LOSSY = ("JPEG", "lossy WebP")
LARGE = 1 << 22  # pixels of an image that is not copied at once
STRIPE = 64  # rows of an image or columns of a mask that are made at a time: few megabytes
RANGES = (255, 1023, 4095, 65535)  # of 8, 10, 12 and 16 bits
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 exchange width and height
MODES = {"L": "grey", "I": "grey", "LA": "grey with alpha", "RGBA": "RGB with alpha"}
MODES |= {"P": "palette"}  # Pillow's, in words
# Numbers of TIFF: photometric interpretations and their channels, sample formats, extra samples.
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
CHANNELS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
UNSIGNED, FLOATING = 1, 3
MULTIPLIED_ALPHA, ALPHA = 1, 2
COPY_OR_MASK = 1 | 4  # kinds of pages: a smaller copy, or the transparency, of another
PILLOWS = COMPRESSION_INFO.keys() - {50001}  # compressions, but WebP, which few builds have

Image.MAX_IMAGE_PIXELS = None  # `check_size` does it, for files of every kind
_limit = {"megapixels": MAX_MEGAPIXELS}  # against small files that fill the memory
# Odd metadata: the pixels are what counts, and an error where they are damaged.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


class Samples(NamedTuple):
    """What an image file stores, as it is shown: see `read_samples`."""

    values: np.ndarray  # (H, W, C), of any real type
    white: float | None  # the value that the file says is white; None where only the type tells
    orientation: int  # EXIF's, 1 to 8, by which the values were turned


class Page(NamedTuple):
    """One of the pages of a TIFF file, which can be read wherever the path of an image can."""

    path: Path
    number: int  # from 0 on

    def __fspath__(self):
        return str(self.path)

    def __str__(self):
        return f"{self.path}, page {self.number + 1}"


def set_pixel_limit(megapixels):
    """Read images of up to so many million pixels in this process: the flag --max-megapixels."""
    _limit["megapixels"] = megapixels


def check_size(width, height):
    """ValueError for an image, or a slice, of more pixels than `set_pixel_limit` allows."""
    megapixels, most = math.ceil(width * height / 10**6), _limit["megapixels"]
    if megapixels > most:
        raise ValueError(
            f"{width}x{height} pixels are more than {most} million; if you trust the file: "
            f"--max-megapixels {megapixels}"
        )


def read_samples(file):
    """The Samples of the one picture in a path, a Page or a binary file.

    They are turned upright (EXIF). Palettes, CMYK and YCbCr are the colours that they show, one
    bit 0 or 255, and what stores white as 0 is inverted; alpha is dropped.
    Raises ValueError for several pictures (pages, of which a Page is one, or the frames of an
    animation), what is no regular file, damaged or too large; and what decoders raise.
    """
    with open_picture(file) as picture:
        values, has_alpha, palette = picture.decode()
    if palette is not None:
        values = palette[values[..., 0]]
    if has_alpha:
        values = np.ascontiguousarray(values[..., :-1])
    if values.dtype == bool:
        values = values * np.uint8(255)
    white = None if picture.white == 65535 else picture.white  # of which few files use all
    return Samples(values, white, picture.orientation())


def to_uint8(values, white=None, window=None):
    """What `read_samples` returns as uint8 of the same shape, 8 bits as they are.

    white: is shown as 255; default: the end of the first range that holds the highest value, of
    0..1 (floating point), 8, 10, 12 or 16 bits. window: (center, width), which counts for more
    than 8 bits only. ValueError without it for negative values, and infinite ones.
    """
    if values.dtype == np.uint8 and white in (None, 255):
        return values
    if window is not None and values.dtype.itemsize > 1:
        limits = window_limits(window)
    else:
        high = float(values.max())
        if not (values.min() >= 0 and high < math.inf):
            raise ValueError("has negative or non-finite pixels: rescale it to 0..65535 first")
        limits = 0, white or range_end(high, values.dtype)
    if values.dtype in (np.uint8, np.uint16):  # by a table, which takes less memory
        return window_to_uint8(np.arange(1 << 16), *limits)[values]
    return window_to_uint8(values, *limits)


def range_end(high, dtype):
    """The end of the first range of a type that holds a value, or the value where none does."""
    ranges = (1, *RANGES) if dtype.kind == "f" else RANGES
    return next((end for end in ranges if high <= end), high)


@contextlib.contextmanager
def open_picture(file):
    """The one picture in what `read_samples` takes, a _Picture that is not decoded yet."""
    with contextlib.nullcontext(file) if hasattr(file, "read") else open(file, "rb") as opened:
        if opened.read(4) in TIFF_HEADS:
            pictures = _list_pictures(opened)
            if not isinstance(file, Page) and len(pictures) > 1:
                raise ValueError(f"holds {len(pictures)} pictures: save each in a file of its own")
            yield _Tiff(opened, pictures[getattr(file, "number", 0)])
        else:
            with _open_by_pillow(opened) as image:
                yield _Picture(image, opened)


def count_pages(path):
    """How many pictures a TIFF file has, from its headers; 1 of what is none, by its name.

    Smaller copies of a page and masks of its transparency do not count, and pages that the file
    itself (OME, ImageJ, tifffile) calls channels are one picture. Raises as `read_image` does.
    """
    if not str(path).lower().endswith((".tif", ".tiff")):
        return 1
    with name_file(path), open(path, "rb") as file:
        return len(_list_pictures(file))


def size_as_shown(picture):
    """(width, height) of what `open_picture` gives, once it is turned."""
    return picture.size[::-1] if picture.orientation() > 4 else picture.size


def stored_orientation(path):
    """The EXIF orientation of an image file, 1 to 8, and whether it is a TIFF file."""
    with name_file(path), open_picture(path) as picture:
        return picture.orientation(), picture.format == "TIFF"


def pixel_format(path):
    """How the pixels of an image file are stored: '8-bit RGB', '16-bit grey', ..."""
    with open_picture(path) as picture:
        return picture.pixel_format


def turn(pixels, orientation):
    """Array (H, W, ...) as stored -> as shown, by its EXIF orientation (1 to 8)."""
    if orientation > 4:
        pixels = np.swapaxes(pixels, 0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def large_array(shape, dtype):
    """An array of zeros, whose memory goes back to the system when it is freed.

    Of the C library the process may have asked to keep it (`medseg.device.keep_freed_memory`),
    in pieces that the next large array does not fit.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    return np.frombuffer(memory, dtype, count).reshape(shape)


def pixels_of(image):
    """PIL image -> array (H, W, C); a large one by stripes, for few megabytes more."""
    shape = image.height, image.width, len(image.getbands())
    if image.width * image.height < LARGE:
        return np.asarray(image).reshape(shape)
    dtype = np.asarray(image.crop((0, 0, 1, 1))).dtype.newbyteorder("=")
    pixels = large_array(shape, dtype)
    for top in range(0, image.height, STRIPE):
        stripe = image.crop((0, top, image.width, min(top + STRIPE, image.height)))
        pixels[top : top + STRIPE] = np.asarray(stripe).reshape(stripe.height, *shape[1:])
    return pixels


# ---------------------------------------------------------------- Pillow


@contextlib.contextmanager
def _open_by_pillow(file):
    """Pillow's image of a binary file; ValueError where its picture is larger than the limit."""
    file.seek(0)
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Image.UnidentifiedImageError(f"not a {FORMAT_NAMES} picture") from None
    with image:
        check_size(*image.size)
        yield image


class _Picture:
    """A picture that Pillow has opened.

    size: (width, height) as stored. format: Pillow's name of it. pixel_format: '8-bit RGB', ...
    white: the highest value of PGM and PPM files where Pillow would scale. text: the names of
    classes that the file states, as `medseg.images.save_mask` writes them, or None.
    """

    def __init__(self, image, file):
        self.image, self.file, self.size = image, file, image.size
        self.format = "JPEG" if image.format == "MPO" else image.format  # its first picture
        if self.format != "JPEG" and getattr(image, "is_animated", False):
            raise ValueError(f"holds {image.n_frames} pictures: save each in a file of its own")
        self.text = image.info.get("classes")
        decoder, *_, args = image.tile[0] if image.tile else ("", None, 0, "")
        self.raw_mode = args if isinstance(args, str) else str(args[0])
        scaled = self.format == "PPM" and image.mode != "1" and decoder != "raw"
        self.white = args[1] if scaled else None
        deep = ";16" in self.raw_mode or (self.white or 0) > 255
        mode = image.mode.partition(";")[0]
        name = f"{16 if deep else 8}-bit {MODES.get(mode, mode)}"
        self.pixel_format = "1-bit" if mode == "1" else name

    def orientation(self):
        """EXIF's, 1 to 8."""
        orientation = 1
        with contextlib.suppress(Exception):  # of damaged metadata: the pixels are what counts
            orientation = self.image.getexif().get(ORIENTATION, 1)
        return orientation if orientation in range(1, 9) else 1

    def lossy(self):
        """Which of LOSSY changed the values, or None."""
        if self.format != "WEBP":
            return "JPEG" if self.format == "JPEG" else None
        self.file.seek(0)
        picture = re.search(b"VP8[ L]", self.file.read())  # its chunk, lossy or lossless: RFC 9649
        return "lossy WebP" if picture and picture[0] == b"VP8 " else None

    def decode(self):
        """(values, whether the last channel is alpha, palette), turned upright.

        values: (H, W, C), bool of one bit; with a palette, uint8 (N, 3), these are indices.
        """
        if self.format == "PNG" and ";16" in self.raw_mode and self.image.mode[0] != "I":
            values, has_alpha, palette = self._read_16_bit_png(), "A" in self.raw_mode, None
        else:
            values, has_alpha, palette = _decode_by_pillow(self.image)
        if self.white:  # Pillow has scaled it
            values = values * (self.white / (255 if values.dtype == np.uint8 else 65535))
            values = values.round().astype(np.uint8 if self.white < 256 else np.uint16)
        return turn(values, self.orientation()), has_alpha, palette

    def _read_16_bit_png(self):
        """uint16 (H, W, C), whose upper bytes are all that Pillow has."""
        import cv2  # as tifffile, for few files

        self.image.load()  # which raises where it is damaged
        self.file.seek(0)
        values = cv2.imdecode(np.frombuffer(self.file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        values[..., :3] = values[..., 2::-1]  # blue, green, red and alpha
        return values[..., ::3] if self.raw_mode.startswith("LA") else values


def _decode_by_pillow(image):
    """What `_Picture.decode` returns, of a PIL image, not turned."""
    image.load()
    palette = None
    if image.mode == "P":
        colours = np.reshape(image.getpalette(), (-1, 3)).astype(np.uint8)
        palette = np.pad(colours, ((0, 256 - len(colours)), (0, 0)))
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and image.mode[0] != "I":
        image = image.convert("RGB")
    return pixels_of(image), image.mode in ("LA", "RGBA"), palette


# ---------------------------------------------------------------- TIFF


def _list_pictures(file):
    """[[tifffile's pages of a picture, ...], ...], several where the file calls them channels."""
    import tifffile  # for TIFF files alone

    logging.getLogger("tifffile").disabled = True  # it logs what it mends; the rest it raises
    file.seek(0)
    tiff = tifffile.TiffFile(file, _multifile=False)
    file.seek(tiff.pages.next_page_offset)
    if file.read(tiff.tiff.offsetsize) != bytes(tiff.tiff.offsetsize):
        raise ValueError("is damaged: not all of its pages are there")
    pages = [page for page in tiff.pages if not page.subfiletype & COPY_OR_MASK]
    pages = pages or [tiff.pages[0]]
    if len(pages) == 1 or not (tiff.is_ome or tiff.is_imagej or tiff.is_shaped):
        return [[page] for page in pages]
    axes, shape = tiff.series[0].axes, tiff.series[0].shape
    outer = shape[: len(shape) - pages[0].ndim]  # along which pages lie
    if "C" not in axes[: len(outer)]:
        return [[page] for page in pages]
    series = [own.pages for own in tiff.series if (own.axes, own.shape) == (axes, shape)]
    channel = axes.index("C")
    numbers = np.moveaxis(np.arange(math.prod(outer)).reshape(outer), channel, -1)
    numbers = numbers.reshape(-1, outer[channel]).tolist()
    return [[own[number] for number in channels] for own in series for channels in numbers]


class _Tiff:
    """A picture in a TIFF file, as _Picture is; pages: those of tifffile that are its channels."""

    format, white, text = "TIFF", None, None

    def __init__(self, file, pages):
        self.file, self.pages, self.page = file, pages, (page := pages[0].aspage())
        self.size = page.imagewidth, page.imagelength
        self.bits = max(np.atleast_1d(page.bitspersample).tolist())
        self.extra = tuple(map(int, page.extrasamples))
        if not self.extra and page.photometric == RGB and page.samplesperpixel == 4:
            self.extra = (ALPHA,)  # as it is not said to be anything
        self.has_alpha = self.extra[-1:] in ((ALPHA,), (MULTIPLIED_ALPHA,)) and len(pages) == 1
        count = len(pages) * page.samplesperpixel - self.has_alpha
        check_size(*self.size)
        if count > MAX_CHANNELS:
            raise ValueError(f"has {count} channels: {MAX_CHANNELS} can be read")
        name = {1: "grey", 3: "RGB"}.get(count, f"{count} channels")
        name = {PALETTE: "palette", CMYK: "CMYK"}.get(page.photometric, name)
        kind = "floating-point" if page.sampleformat == FLOATING else f"{self.bits}-bit"
        self.pixel_format = f"{kind} {name}{' with alpha' * self.has_alpha}"

    def orientation(self):
        tag = self.page.tags.get(ORIENTATION)
        return tag.value if tag and tag.value in range(1, 9) else 1

    def lossy(self):
        return "JPEG" if self.page.compression in (6, 7) else None

    def decode(self):
        if self._is_right_in_pillow():
            with contextlib.suppress(Image.UnidentifiedImageError):
                with _open_by_pillow(self.file) as image:
                    image.seek(self.page.index)
                    return _decode_by_pillow(image)  # which turns it
        try:
            values = np.concatenate([self._read_page(own) for own in self.pages], 2)
        except Exception as error:  # of many kinds, as decoders are
            if "imagecodecs" not in str(error):
                raise
            raise ValueError(f"{error}: run `pip install imagecodecs`") from None
        palette = self._as_shown(values)
        return turn(values, self.orientation()), self.has_alpha, palette

    def _is_right_in_pillow(self):
        """Whether Pillow reads the samples as they are, which needs no imagecodecs."""
        page, kind = self.page, (self.bits, self.page.photometric, self.extra)
        return (
            len(self.pages) == page.imagedepth == 1
            and page.sampleformat == UNSIGNED
            and page.samplesperpixel - len(self.extra) == CHANNELS.get(page.photometric)
            and self.extra in ((), (ALPHA,), (MULTIPLIED_ALPHA,))
            and (self.bits <= 8 or kind == (16, BLACK_IS_ZERO, ()))
            and page.compression in PILLOWS
        )

    def _as_shown(self, values):
        """Invert, in place, values (H, W, C) that store white as 0; returns the palette or None."""
        page, palette = self.page, None
        if page.photometric == PALETTE:
            palette = page.colormap.T >> (8 if page.colormap.max() > 255 else 0)
            palette = palette.astype(np.uint8)
        elif page.photometric == WHITE_IS_ZERO and page.sampleformat == UNSIGNED:
            values[:] = values.dtype.type(2**self.bits - 1) - values
        elif page.photometric not in (BLACK_IS_ZERO, RGB, YCBCR):  # the last: by a JPEG decoder
            name = getattr(page.photometric, "name", page.photometric)
            raise ValueError(f"holds colours as {name}: save it as grey or RGB")
        return palette

    def _read_page(self, page):
        """The samples (H, W, C) of one page, alpha behind the others."""
        values, axes = page.asarray(maxworkers=1), page.keyframe.axes
        if axes not in ("YX", "YXS", "SYX") or values.dtype.kind == "c":
            raise ValueError(f"has axes {axes} of {values.dtype}: save it as real numbers, (H, W)")
        return np.moveaxis(values, 0, 2) if axes == "SYX" else np.atleast_3d(values)
