"""The examples of the page: images of the data set, or phantoms. No torch."""

import numpy as np
from PIL import Image

from medseg.images import read_image, save_png
from medseg.phantoms import draw_phantom
from medseg.predicting.inputs import data_set_images

EXAMPLES, THUMBNAIL = 4, 160  # how many, and pixels a side


def example_images(folder):
    """Paths of a few images of the data set; without one, of phantoms drawn into `folder`."""
    images = data_set_images()
    if images:
        return images[:: -(-len(images) // EXAMPLES)]
    paths = [folder / f"phantom_{number}.png" for number in range(1, EXAMPLES + 1)]
    for seed, path in enumerate(paths):
        pixels, _ = draw_phantom(np.random.default_rng(seed), 256)
        Image.fromarray(pixels).save(path)
    return paths


def write_thumbnails(paths, folder):
    """Write the `thumbnail` of each image to a folder; return their paths."""
    folder.mkdir(parents=True)
    written = [folder / f"{number}.png" for number in range(len(paths))]
    for path, target in zip(paths, written, strict=True):
        save_png(thumbnail(path), target)
    return written


def thumbnail(path):
    """A small PIL image; grey where the file is damaged, as the page says once it is clicked."""
    try:
        image = read_image(path)
    except ValueError:
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), "grey")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image
