"""One picture: reading it, resizing it, outlining and tinting what was found in it. No torch."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from medseg.files import atomic_write

IMAGE_SIZE = 256  # pixels a side, the tutorial's; what a model is trained at unless told otherwise
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green, blue, in 0..1: the tutorial's
STD = (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")  # named, so that no rare decoder meets a stranger's file
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")

# Pillow warns above 89 megapixels and refuses at twice that: refuse at once.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Odd metadata: the pixels are what counts, and an error where they are damaged.
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")


def read_image(path):
    """The picture in a JPEG, PNG, TIFF or BMP file as a PIL image of mode RGB, its size kept.

    More than 8 bits a sample are scaled linearly to 0..255 from the range that holds the largest
    value: 8, 10, 12 or 16 bits (0..1 for floating point). Alpha is dropped.
    Raises FileNotFoundError; ValueError for what is not one whole picture of at most 89
    megapixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"holds {frames} pictures: save each slice in a file of its own")
            image.load()
            return _to_8_bits(image) if image.mode[0] in "IF" else image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not an image") from None
    except PermissionError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a JPEG, PNG, TIFF or BMP image") from None
    except Exception as error:  # decoders raise many kinds on damaged files: SyntaxError, ...
        raise ValueError(f"{path}: {error}") from None


def _to_8_bits(image):
    with np.errstate(invalid="ignore"):  # what is not a number is refused below
        values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("has negative or non-finite pixels: rescale it to 0..65535 first")
    ranges = [1, 255, 1023, 4095, 65535] if image.mode == "F" else [255, 1023, 4095, 65535]
    white = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def preprocess(image, image_size=IMAGE_SIZE):
    """PIL image -> uint8 array (image_size, image_size, 3), bilinear and antialiased.

    The one resizing of the project: training, evaluation and prediction all come through here.
    """
    resized = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(resized)


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


def full_size_mask(probabilities, size, threshold):
    """float32 array (S, S) of 0..1 -> bool array (height, width), for size = (width, height)."""
    resized = Image.fromarray(probabilities).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized) > threshold


def overlay(image, mask):
    """PIL RGB image and bool array of its size -> PIL image with the foreground tinted red."""
    pixels = np.array(image)
    pixels[mask] = pixels[mask] * 0.6 + np.array([102, 0, 0])
    return Image.fromarray(pixels)


def outline(mask):
    """(H, W) array of 0 and 1 -> bool array of its foreground pixels at background or border."""
    inside = np.pad(np.asarray(mask, bool), 1)
    core = inside[1:-1, 1:-1]
    return core & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])


def save_png(image, path, **options):
    """Write a PIL image as a PNG file that is whole or absent."""
    with atomic_write(Path(path), sync=False) as file:
        image.save(file, "PNG", **options)


def save_mask(mask, path):
    """Write a bool array (H, W) as a PNG of 0 and 255."""
    save_png(Image.fromarray(mask).convert("L"), path)
