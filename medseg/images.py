"""One picture: reading it, resizing it, writing masks and overlays."""

import contextlib
import ctypes
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medseg import drawing, samples
from medseg.files import name_file, write_picture
from medseg.settings import MAX_CHANNELS

MEASURED, MEASURED_PIXELS = 64, 1 << 16  # files, and values of each, that tell a window
FILLED = 0.25  # of a range
IMAGE_SIZE = 256  # pixels a side, the tutorial's; what a model is trained at unless told otherwise
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green, blue, in 0..1: the tutorial's
STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)  # of any other channel: the means of those
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".gif"),
)

MAX_JPEG_SIDE = 65_500  # pixels that the format has room for
SHOWN_SIDE = 384  # pixels at least, of the longer side of what is shown


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

    @property
    def n_channels(self):
        return self.pixels.shape[2]

    def rgb(self):
        """A PIL RGB image for eyes: of two channels the first, else the first three."""
        return drawing.rgb_image(self.pixels)


def as_picture(image):
    """The Picture of a path, a Picture, a PIL image, or an array of uint8, (H, W) or (H, W, C)."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        return Picture(samples.pixels_of(image))
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or not 1 <= pixels.shape[2] <= MAX_CHANNELS:
        form = f"an array of uint8, (H, W) or (H, W, C), of 1 to {MAX_CHANNELS} channels"
        raise ValueError(f"an image is {form}, not {image.dtype} {image.shape}")
    return Picture(pixels)


def read_image(path, window=None):
    """The `Picture` in a file of one of `medseg.samples.FORMATS`.

    path: or a binary file. A picture that is stored turned or mirrored (EXIF) is turned upright;
    its size is kept otherwise. More than 8 bits a sample are scaled linearly to 0..255: by window,
    (center, width), or else from the range that holds the largest value: 8, 10, 12 or 16 bits
    (0..1 for floating point). The values of PGM and PPM files are scaled from the range that the
    file names. Alpha is dropped.
    Raises FileNotFoundError; ValueError for what is not one whole picture, or of more pixels than
    `medseg.samples.set_pixel_limit` allows.
    """
    with name_file(path):
        values, white, orientation = samples.read_samples(path)
        return Picture(samples.to_uint8(values, white, window), orientation)


def measure_window(paths):
    """(center, width) that shows the grey values of a set of pictures alike, or None.

    Of up to MEASURED files, evenly spaced, all have to have more than 8 bits. As one image is read
    alone, from 0 to the end of the first range that holds the values (0..1, 8, 10, 12 or 16 bits),
    but for the highest 0.5 % of all, so that single pixels do not count; or where the values fill
    less than FILLED of that, from the 0.5 to the 99.5 percentile.
    """
    values = []
    for path in paths[:: -(-len(paths) // MEASURED)]:
        with name_file(path):
            one, white, _ = samples.read_samples(samples.Page(path, 0))
        if one.dtype.itemsize == 1:
            return None
        some = one.ravel()[:: -(-one.size // MEASURED_PIXELS)].astype(np.float64)
        values.append(some[np.isfinite(some)])
    low, high = np.percentile(np.concatenate(values), (0.5, 99.5)).tolist()
    end = white or samples.range_end(high, one.dtype)
    if low >= 0 and high - low >= FILLED * end:
        low, high = 0, end
    return ((low + high) / 2, high - low) if low < high else None


def preprocess(picture, image_size=IMAGE_SIZE, n_channels=3):
    """Picture -> uint8 array (image_size, image_size, n_channels), bilinear and antialiased.

    image_size: None keeps the image's own height and width. n_channels: grey becomes colour and
    colour grey; ValueError for other than the picture's own channels besides.
    The one resizing of the project: training, evaluation and prediction all come through here.
    """
    pixels, own = picture.pixels, picture.n_channels
    if own != n_channels and {own, n_channels} != {1, 3}:
        raise ValueError(f"has {own} channels, and the network takes {n_channels}")
    if own == 3 and n_channels == 1:
        pixels = samples.pixels_of(Image.fromarray(pixels).convert("L"))
    if image_size is not None:
        pixels = _resize(pixels, image_size)
    pixels = pixels.repeat(3, 2) if pixels.shape[2] < n_channels else pixels
    return np.require(pixels, requirements="W")  # PyTorch warns of what cannot be written to


def _resize(pixels, side):
    """uint8 (H, W, C) -> (side, side, C), by channels where these are no colours."""
    planes = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    resized = [
        Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR) for plane in planes
    ]
    return np.concatenate([np.atleast_3d(plane) for plane in resized], 2)


def is_grey(picture):
    """Whether red, green and blue are equal in 64x64 evenly spaced pixels, or it has no colour."""
    rows, columns = (((np.arange(64) + 0.5) * side / 64).astype(int) for side in picture.size[::-1])
    chosen = picture.pixels[rows[:, None], columns]
    return picture.n_channels in (1, 3) and bool((chosen == chosen[..., :1]).all())


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
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path)
        return path
    import tifffile  # which takes as long to import as NumPy

    path = Path(f"{path}.tif")
    layout = {"photometric": "minisblack", "planarconfig": "contig", "metadata": None}
    tifffile.imwrite(path, pixels, compression="zlib", **layout)
    return path


def save_jpeg(image, path):
    """Write a PIL RGB image for eyes: a PNG file would take longer than all but the network."""
    options = {"quality": 90, "subsampling": 0}  # colours at full resolution
    write_picture(path, lambda file: image.save(file, "JPEG", **options))


def save_overlay(image, labels, path, class_names, note=""):
    """Write a PIL RGB image with its class numbers (H, W) tinted and, of several, a legend.

    note: a text below. A small image is enlarged: see `enlarge_small`.
    """
    drawn = enlarge_small(drawing.overlay(image, labels, len(class_names)))
    drawn = drawing.with_note(drawing.with_legend(drawn, class_names), note)
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
        "Predicted Mask": drawing.draw_labels(labels, len(class_names)),
        "Overlay": drawing.overlay(image, labels, len(class_names)),
    }
    figure = drawing.draw_panels(panels, name)
    save_png(drawing.with_legend(figure, class_names, single=name is not None), path)


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
        [0, 0, 0, *(value for color in drawing.class_colors(len(class_names)) for value in color)]
    )
    text = PngInfo()
    names = ", ".join(f"{number}={name}" for number, name in enumerate(class_names, 1))
    text.add_itxt("classes", names)
    save_png(image, path, pnginfo=text)
