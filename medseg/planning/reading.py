"""What the audit and the plan ask of an image: each is read once, on all cores."""

from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from medseg.duplicates import shrink, thumbnail
from medseg.files import parallel_map
from medseg.images import is_grey
from medseg.run_lengths import unite
from medseg.samples import pixel_format


class Examined(NamedTuple):
    """What was read of an image of a split."""

    index: int
    size: tuple  # (width, height)
    stored_as: str  # '8-bit RGB', ...
    turned: bool  # or mirrored (EXIF)
    channels: int  # 1 of a colour image whose colours are equal
    masks: dict  # {class: RunLengths} of those that it has
    areas: list  # pixels of each class
    area: int  # pixels of any class
    box: bool  # whether these are an upright rectangle
    ignored: int  # pixels that nobody annotated
    thumbnail: tuple  # (file name, array), as `near_duplicates` takes them
    picture: np.ndarray  # grey values, float32 (16, 16)

    @property
    def share(self):
        """Of its pixels that are foreground."""
        return self.area / (self.size[0] * self.size[1])


def examine(dataset, numbers):
    """([Examined] of some images of a split, [the error of each that cannot be read]).

    dataset: COCOSegmentationDataset; numbers: of the images.
    """

    def read(index):
        path, image = dataset.path(index), dataset.read(index)
        masks = dataset.outlines(index, image.size)
        ignored = masks.pop(dataset.n_classes, None)
        areas = [masks[channel].area if channel in masks else 0 for channel in range(n_classes)]
        union = unite(list(masks.values())) if masks else None
        area, (_, _, width, height) = (union.area, union.box) if masks else (0, (0, 0, 0, 0))
        grey = shrink(image)
        return Examined(
            index,
            image.size,
            stored_as=pixel_format(path),
            turned=image.orientation > 1,
            channels=1 if is_grey(image) else image.n_channels,
            masks=masks,
            areas=areas,
            area=area,
            box=area == width * height > 0,
            ignored=ignored.area if ignored else 0,
            thumbnail=(path.name, thumbnail(grey)),
            picture=grey,
        )

    n_classes, examined, errors = dataset.n_classes, [], []
    title, results = f"reading {dataset.image_dir.name}", parallel_map(read, numbers)
    for result in tqdm(results, title, len(numbers), unit=" images", disable=None):
        (errors if isinstance(result, Exception) else examined).append(result)
    return examined, errors
