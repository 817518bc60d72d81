"""One picture: reading it, resizing it, writing masks and overlays."""

import contextlib
import ctypes
import math
import mmap
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medseg.cli import MAX_MEGAPIXELS
from medseg.drawing import class_colors, draw_labels, draw_panels, overlay, rgb_image, with_legend
from medseg.files import check_regular, write_picture
from medseg.samples import has_16_bits, stored_samples
from medseg.settings import MAX_CHANNELS

IMAGE_SIZE = 256  # pixels a side, the tutorial's; what a model is trained at unless told otherwise
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green, blue, in 0..1: the tutorial's
STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # of any other channel: the means of those
# Pillow's names, listed so that no rare decoder meets a stranger's file; PPM is all of PNM.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF")
FORMAT_NAMES = "JPEG, PNG, TIFF, BMP, PPM, PGM, WebP or GIF"
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".gif"),
)
PILLOWS_LIMIT = Image.MAX_IMAGE_PIXELS  # 89 million, against small files that fill the memory
BYTES_PER_PIXEL = 12  # of a file, at most: 1 GiB with that limit
MAX_PAGES, MAX_PAGES_PIXELS = 1000, 1 << 32  # of a TIFF file whose pages become images
MAX_COUNTED_BYTES = 4 << 20  # of a file whose pages are counted: a million take seconds

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 exchange width and height
TURNS = {
    **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180},
    **{4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE},
    **{6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90},
}
MAX_JPEG_SIDE = 65_500  # pixels that the format has room for
SHOWN_SIDE = 384  # pixels at least, of the longer side of what is shown
STRIPE = 64  # rows of an image or columns of a mask that are made at a time: few megabytes
RANGES = [255, 1023, 4095, 65535]  # of 8, 10, 12 and 16 bits

# Pillow warns above its limit and refuses at twice that: refuse at once.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Odd metadata: the pixels are what counts, and an error where they are damaged.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def set_pixel_limit(megapixels):
    """Read images of up to so many million pixels in this process: the flag --max-megapixels."""
    own = megapixels == MAX_MEGAPIXELS
    Image.MAX_IMAGE_PIXELS = PILLOWS_LIMIT if own else megapixels * 10**6


def pixel_limit():
    """How many pixels an image may have."""
    return Image.MAX_IMAGE_PIXELS


def too_many_pixels(pixels, what):
    """The ValueError for an image of so many pixels, more than the limit; what: these in words."""
    return ValueError(
        f"{what} are more than {pixel_limit() // 10**6} million; if you trust the file: "
        f"--max-megapixels {-(-pixels // 10**6)}"
    )


def check_file_size(size):
    """ValueError where a file of so many bytes is larger than any image within the limit."""
    if size > (most := BYTES_PER_PIXEL * pixel_limit()):
        raise ValueError(f"larger than {most >> 20} MiB: --max-megapixels allows more")


class Page(NamedTuple):
    """One of the pages of a TIFF file, which can be read wherever the path of an image can."""

    path: Path
    number: int  # from 0 on

    def __fspath__(self):
        return str(self.path)

    def __str__(self):
        return f"{self.path}, page {self.number + 1}"


def count_pages(path):
    """How many pages a TIFF file has, from its headers; 1 of what is none, by its name.

    Raises ValueError that names the file where they are damaged, more than MAX_PAGES, or together
    of more than MAX_PAGES_PIXELS.
    """
    if not str(path).lower().endswith((".tif", ".tiff")):
        return 1
    pages = pixels = 0
    with image_errors(path, "image"):
        check_regular(path)
        with _open_picture(path, ["TIFF"]) as image, contextlib.suppress(EOFError):
            while True:
                image.seek(pages)
                pages, pixels = pages + 1, pixels + image.width * image.height
                if pages > MAX_PAGES or pixels > MAX_PAGES_PIXELS:
                    raise ValueError(
                        f"has more than {MAX_PAGES} pages, or {MAX_PAGES_PIXELS >> 20} million "
                        "pixels in them: split it into several files"
                    )
    return pages


@contextlib.contextmanager
def _open_picture(file, formats):
    """Pillow's image of a file; ValueError where its first picture is larger than the limit."""
    try:
        image = Image.open(file, formats=formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = int(re.search(r"\d+", str(error))[0])  # the first of its numbers
        raise too_many_pixels(pixels, f"{pixels} pixels") from None
    with image:
        yield image


@contextlib.contextmanager
def open_image(file):
    """The one picture in a path or binary file, a PIL image that is not loaded yet.

    Raises ValueError for several pictures (pages, of which a Page is one, or the frames of an
    animation) and for what is no regular file or too large; and what Pillow raises.
    """
    if hasattr(file, "read"):
        size = file.seek(0, os.SEEK_END)
    else:
        check_regular(file)
        size = os.stat(file).st_size
    check_file_size(size)
    with _open_picture(file, FORMATS) as image:
        if isinstance(file, Page):
            image.seek(file.number)
            width, height = image.size
            if width * height > pixel_limit():  # Pillow looked at the first page only
                raise too_many_pixels(width * height, f"{width}x{height} pixels")
        elif getattr(image, "is_animated", False):
            count = image.n_frames if size <= MAX_COUNTED_BYTES else "several"
            raise ValueError(f"holds {count} pictures: save each in a file of its own")
        if image.format == "TIFF" and image.tag_v2.get(ORIENTATION, 1) in range(5, 9):
            image.filename = ""  # Pillow would map a grey file with width and height exchanged
        yield image


@contextlib.contextmanager
def image_errors(path, what):
    """Within, whatever decoders raise on a damaged file becomes a ValueError that names it.

    what: 'image' or 'mask'. Also turns a missing file into a FileNotFoundError of one line.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such {what}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not an {what}") from None
    except PermissionError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a {FORMAT_NAMES} {what}") from None
    except Exception as error:  # many kinds: SyntaxError, struct.error, ...
        line = str(error)
        raise ValueError(line if line.startswith(f"{path}: ") else f"{path}: {line}") from None


@dataclass(frozen=True)
class Picture:
    """One image as it is shown, whatever its file: a slice, a frame, several modalities.

    pixels: uint8 (H, W, C), C being 1 of grey, 3 of colour, else 2 or 4 to MAX_CHANNELS.
    orientation: EXIF's, 1 to 8, by which what is stored was turned. spacing: mm from row to row
    and from column to column, where known. channels: their names, where known.
    """

    pixels: np.ndarray
    orientation: int = 1
    spacing: tuple | None = None
    channels: tuple = ()

    @property
    def height(self):
        return self.pixels.shape[0]

    @property
    def width(self):
        return self.pixels.shape[1]

    @property
    def size(self):
        """(width, height)."""
        return self.width, self.height

    def rgb(self):
        """A PIL RGB image for eyes: of two channels the first, else the first three."""
        return rgb_image(self.pixels)


def as_picture(image):
    """The Picture of a Picture, of a PIL image, or of an array of uint8, (H, W) or (H, W, C)."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return Picture(_pixels(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            f"an image is an array of uint8, (H, W) or (H, W, C), not {image.dtype} {image.shape}"
        )
    pixels = image if image.ndim == 3 else image[..., None]
    if not 1 <= pixels.shape[2] <= MAX_CHANNELS:
        raise ValueError(f"{pixels.shape[2]} channels: an image has 1 to {MAX_CHANNELS}")
    return Picture(pixels)


def _pixels(image):
    """PIL image of mode L or RGB -> uint8 (H, W, C), by stripes: few megabytes more."""
    pixels = large_array((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, STRIPE):
        stripe = image.crop((0, top, image.width, min(top + STRIPE, image.height)))
        pixels[top : top + STRIPE] = np.asarray(stripe).reshape(pixels[top : top + STRIPE].shape)
    return pixels


def read_image(path, window=None):
    """The `Picture` in a file of one of FORMATS.

    path: or a binary file. A picture that is stored turned or mirrored (EXIF) is turned upright;
    its size is kept otherwise. More than 8 bits a sample are scaled linearly to 0..255: by window,
    (center, width), or else from the range that holds the largest value: 8, 10, 12 or 16 bits
    (0..1 for floating point). The values of PGM and PPM files are scaled from the range that the
    file names. Alpha is dropped.
    Raises FileNotFoundError; ValueError for what is not one whole picture of at most
    `pixel_limit` pixels.
    """
    with image_errors(path, "image"), open_image(path) as image:
        samples = stored_samples(image, path)
        orientation, left = exif_orientation(image)
        if samples:
            picture = _table_to_8_bits(*samples)
        else:
            image.load()
            picture = image
            if image.mode[0] in "IF":
                picture = _to_8_bits(image)
            elif image.mode not in ("L", "RGB"):
                picture = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        if left > 1:
            picture = picture.transpose(TURNS[left])
        return Picture(_pixels(picture), orientation)


def exif_orientation(image):
    """(EXIF orientation of an opened PIL image, what is left of it once Pillow has loaded it).

    Both are 1 to 8. Pillow itself turns a TIFF, which must not be loaded yet.
    """
    if image.format == "PNG":  # its EXIF may lie behind the pixels
        image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata raises many kinds; the pixels are what counts
        orientation = 1
    if orientation not in range(1, 9):
        orientation = 1
    return orientation, 1 if image.format == "TIFF" else orientation


def stored_orientation(path):
    """What `exif_orientation` returns of an image file. Raises as `read_image` does."""
    with image_errors(path, "image"), open_image(path) as image:
        return exif_orientation(image)


def turn(pixels, orientation):
    """Array (H, W, ...) as stored -> as shown, by its EXIF orientation (1 to 8)."""
    if orientation in (5, 7):
        pixels = np.swapaxes(pixels, 0, 1)
    quarters = {3: 2, 6: 3, 7: 2, 8: 1}.get(orientation, 0)
    pixels = np.rot90(pixels, quarters)
    if orientation == 2:
        pixels = pixels[:, ::-1]
    if orientation == 4:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


PIXEL_FORMATS = {
    **{"1": "1-bit", "L": "8-bit grey", "LA": "8-bit grey with alpha", "P": "8-bit palette"},
    **{"RGB": "8-bit RGB", "RGBA": "8-bit RGB with alpha", "CMYK": "8-bit CMYK"},
    **{"I": "32-bit grey", "F": "floating-point grey"},
}


def pixel_format(path):
    """How the pixels of an image file are stored: '8-bit RGB', '16-bit grey', ..."""
    with open_image(path) as image:
        if image.mode[0] == "I" and has_16_bits(image):
            return "16-bit grey"
        name = PIXEL_FORMATS.get(image.mode, image.mode)
        return name.replace("8-bit", "16-bit") if has_16_bits(image) else name


def _to_8_bits(image):
    with np.errstate(invalid="ignore"):  # what is not a number is refused below
        values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("has negative or non-finite pixels: rescale it to 0..65535 first")
    white = _white([1, *RANGES] if image.mode == "F" else RANGES, values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _table_to_8_bits(samples, white):
    """What `stored_samples` returns -> PIL image, L or RGB. A table: it takes less memory."""
    if samples.ndim == 3:
        samples = samples[..., 0] if samples.shape[2] == 2 else samples[..., :3]
    table = np.arange(65536) * (255 / (white or _white(RANGES, samples.max())))
    return Image.fromarray(table.clip(max=255).round().astype(np.uint8)[samples])


def _white(ranges, highest):
    """The value that is shown white: the end of the first of the ranges that holds the highest."""
    return next((top for top in ranges if highest <= top), highest)


def preprocess(picture, image_size=IMAGE_SIZE, n_channels=3):
    """Picture -> uint8 array (image_size, image_size, n_channels), bilinear and antialiased.

    image_size: None keeps the image's own height and width. n_channels: grey becomes colour and
    colour grey; ValueError for other than the picture's own channels besides.
    The one resizing of the project: training, evaluation and prediction all come through here.
    """
    pixels = picture.pixels
    own = pixels.shape[2]
    if own != n_channels and {own, n_channels} != {1, 3}:
        raise ValueError(f"has {own} channels, and the network takes {n_channels}")
    if own == 3 and n_channels == 1:
        pixels = _to_grey(pixels)
    if image_size is not None:
        pixels = _resize(pixels, image_size)
    return pixels.repeat(3, 2) if pixels.shape[2] < n_channels else pixels


def _to_grey(pixels):
    """uint8 (H, W, 3) -> (H, W, 1), as Pillow has it; by stripes."""
    grey = large_array((*pixels.shape[:2], 1), np.uint8)
    for top in range(0, len(pixels), STRIPE):
        stripe = Image.fromarray(np.ascontiguousarray(pixels[top : top + STRIPE]))
        grey[top : top + STRIPE, :, 0] = np.asarray(stripe.convert("L"))
    return grey


def _resize(pixels, side):
    """uint8 (H, W, C) -> (side, side, C), channel by channel where it is no colour."""
    if pixels.shape[2] == 3:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.array(image.resize((side, side), Image.Resampling.BILINEAR))
    planes = (Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0))
    return np.stack([plane.resize((side, side), Image.Resampling.BILINEAR) for plane in planes], 2)


def is_grey(picture):
    """Whether red, green and blue are equal in 64x64 evenly spaced pixels, or it has no colour."""
    rows, columns = (((np.arange(64) + 0.5) * side / 64).astype(int) for side in picture.size[::-1])
    samples = picture.pixels[rows[:, None], columns]
    return (
        samples.shape[2] == 1 or samples.shape[2] == 3 and bool((samples == samples[..., :1]).all())
    )


def large_array(shape, dtype):
    """An array of zeros, whose memory goes back to the system when it is freed.

    Of the C library the process may have asked to keep it (`medseg.device.keep_freed_memory`),
    in pieces that the next large array does not fit.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    return np.frombuffer(memory, dtype, count).reshape(shape)


def give_memory_back():
    """Hand freed memory, which `medseg.device.keep_freed_memory` has glibc keep, to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def mean_and_std(n_channels):
    """What images of so many channels are normalised by, of values in 0..1."""
    return (MEAN, STD) if n_channels == 3 else (GREY_MEAN * n_channels, GREY_STD * n_channels)


def resize_nearest(mask, height, width):
    """(H, W) array -> (height, width): for each new pixel, the old one under its centre.

    torch calls this nearest-exact. The tutorial's plain nearest takes the corner, which shifts
    the mask against its image by half a new pixel.
    """
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new)
        for old, new in zip(mask.shape, (height, width), strict=True)
    )
    return mask[rows[:, None], columns]


def save_png(image, path, **options):
    """Write a PIL image as a PNG file of ours that is whole or absent; see `write_picture`."""
    write_picture(path, lambda file: image.save(file, "PNG", **options))


def save_picture(picture, path):
    """Write a `Picture` as PATH.png, of other than 1 or 3 channels as PATH.tif; returns the Path.

    Not as `save_png`: it belongs to the user.
    """
    pixels = picture.pixels
    if pixels.shape[2] in (1, 3):
        path = Path(f"{path}.png")
        Image.fromarray(
            np.ascontiguousarray(pixels).squeeze(2) if pixels.shape[2] == 1 else pixels
        ).save(path)
        return path
    import tifffile  # which takes as long to import as NumPy

    path = Path(f"{path}.tif")
    tifffile.imwrite(
        path,
        pixels,
        photometric="minisblack",
        planarconfig="contig",
        compression="zlib",
        metadata=None,
    )
    return path


def save_jpeg(image, path):
    """Write a PIL RGB image for eyes: a PNG file would take longer than all but the network."""
    options = {"quality": 90, "subsampling": 0}  # colours at full resolution
    write_picture(path, lambda file: image.save(file, "JPEG", **options))


def save_overlay(image, labels, path, class_names):
    """Write a PIL RGB image with its class numbers (H, W) tinted and, of several, a legend.

    A small one is enlarged: see `enlarge_small`.
    """
    drawn = with_legend(enlarge_small(overlay(image, labels, len(class_names))), class_names)
    drawn.thumbnail((MAX_JPEG_SIDE, MAX_JPEG_SIDE))  # which leaves a smaller one as it is
    save_jpeg(drawn, path)


def enlarge_small(image):
    """A PIL image; a small one by a whole factor larger, its longer side SHOWN_SIDE or more."""
    factor = math.ceil(SHOWN_SIDE / max(image.size))
    if factor <= 1:
        return image
    return image.resize([side * factor for side in image.size], Image.Resampling.BICUBIC)


def save_figure(image, labels, path, class_names, name=None, side=400):
    """Draw a PIL image, its mask and their overlay side by side, each of `side` pixels at most.

    labels: class numbers, uint8 (H, W). name: of the image's file, which then stands above, with a
    legend of a single class too.
    """
    width, height = (max(round(length * side / max(image.size)), 1) for length in image.size)
    image = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    labels = resize_nearest(labels, height, width)
    panels = {
        "Original Image": image,
        "Predicted Mask": draw_labels(labels, len(class_names)),
        "Overlay": overlay(image, labels, len(class_names)),
    }
    figure = draw_panels(panels, name)
    save_png(with_legend(figure, class_names, single=name is not None), path)


def save_mask(labels, path, class_names=("foreground",)):
    """Write class numbers (H, W) as a PNG.

    Of a single class it holds 0 and 255; of several, a palette image of the class numbers, with
    their names in the file's text "classes" (1=NAME, 2=NAME, ...).
    """
    if len(class_names) == 1:
        save_png(Image.fromarray(labels > 0).convert("L"), path)
        return
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette(
        [0, 0, 0, *(value for color in class_colors(len(class_names)) for value in color)]
    )
    text = PngInfo()
    names = ", ".join(f"{number}={name}" for number, name in enumerate(class_names, 1))
    text.add_itxt("classes", names)
    save_png(image, path, pnginfo=text)
