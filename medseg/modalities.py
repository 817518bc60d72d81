"""The channels of an image by name, in one file or a file each: T1, T2 and FLAIR of one brain."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from medseg.images import read_image
from medseg.volumes import StackedVolume, open_volume


class Modalities(NamedTuple):
    """An image of named channels.

    names: of the channels. paths: the Path of the file of each, or of the one that has them all.
    The first stands for it wherever a path is taken.
    """

    names: tuple
    paths: tuple

    def __fspath__(self):
        return str(self.paths[0])

    def __str__(self):
        return str(self.paths[0])

    @property
    def name(self):
        """The name of the first file."""
        return self.paths[0].name

    def check(self, n_channels):
        """ValueError where the one file has more or fewer channels than are named."""
        if n_channels != len(self.names):
            raise ValueError(
                f"{self.paths[0]}: has {n_channels} channels, and {len(self.names)} are named: "
                f"{', '.join(self.names)}"
            )


def channels_of(image):
    """The names of the channels of a Path, () without, or of Modalities."""
    return image.names if isinstance(image, Modalities) else ()


def open_channels(image, orientation=None, time=None):
    """The Volume in a Path, or of Modalities together; as `open_volume` has it.

    Raises ValueError where the files of Modalities lie apart, or are not so many channels.
    """
    if not isinstance(image, Modalities):
        return open_volume(image, orientation, time=time)
    time = False if len(image.paths) < len(image.names) else None
    volumes = [open_volume(path, orientation, time=time) for path in image.paths]
    volume = StackedVolume(volumes)
    image.check(volume.n_channels)
    return volume


def read_channels(image, window=None, read=read_image):
    """The Picture of Modalities; window as in `read_image`, and `read` is it or one like it.

    Raises ValueError where a file is not one picture of so many channels, all of one size.
    """
    pictures = [read(path, window) for path in image.paths]
    first, planes = pictures[0], [picture.pixels for picture in pictures]
    if len(planes) == 1 < len(image.names):
        image.check(planes[0].shape[2])
        return replace(first, channels=image.names)
    for path, pixels in zip(image.paths, planes, strict=True):
        if (pixels != pixels[..., :1]).any():
            raise ValueError(f"{path}: shows colours, but a file of a {{channel}} is grey")
        if pixels.shape[:2] != planes[0].shape[:2]:
            sizes = [f"{one.shape[1]}x{one.shape[0]}" for one in (pixels, planes[0])]
            raise ValueError(f"{path}: is {sizes[0]}, but {image.paths[0]} is {sizes[1]}")
    pixels = np.concatenate([pixels[..., :1] for pixels in planes], axis=2)
    return replace(first, pixels=pixels, channels=image.names)
