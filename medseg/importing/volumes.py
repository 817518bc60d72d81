"""Pairs of NIfTI volumes -> an item for each slice."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from medseg.formats.nifti import open_nifti, read_orientation
from medseg.importing.mask_values import Meaning, count_values, meaning_of
from medseg.importing.writing import Item

KIND = "volume"  # of mask values, beside those of `read_mask`
OPEN_PAIRS = 2  # volumes, with their masks, that are kept open
SAME_PLACE = 0.01  # of a voxel: corners of image and mask this near differ by rounding only


def volume_items(pairs, names, groups, folder, window=None, *, present=None):
    """([Item] of all slices, the Meaning of the mask values, orientation) of volumes and masks.

    pairs: [(image, mask)], paths. names and groups: of each volume; one without a group is a group
    of its own, so that its slices stay in one split. folder: of the masks, for messages. window as
    in `volume_pairs`. orientation: that all are turned to, as "RAS": that of the first volume, or
    `present`, (orientation, where it comes from), of the splits that stay; None where the affines
    tell none.
    Every volume is read once here, and what is wrong with it raises ValueError or
    FileNotFoundError; the slices are loaded later.
    """
    orientation = _common_orientation([image for image, _ in pairs], *(present or ()))
    open_pair = _pair_opener(window, orientation)
    lengths, axes, counted, turned, apart = [], [], [], 0, []
    for image, mask in tqdm(pairs, "volumes", unit="volume", disable=None):
        slices, counts = open_pair(image, mask), Counter()
        for index in range(len(slices)):
            counts.update(count_values(slices.classes(index)))
        lengths.append(len(slices))
        axes.append(slices.axis)
        turned += slices.image.stored_orientation != slices.mask.stored_orientation
        if slices.distance:
            apart.append((slices.distance, spell_distance(slices.distance, slices.image), mask))
        counted.append((mask, KIND, counts))
    meaning = meaning_of(counted, folder)
    _report(lengths, axes, turned, apart)
    items = []
    for pair, name, group, length in zip(pairs, names, groups, lengths, strict=True):
        for index in range(length):
            load = _Slice(open_pair, *pair, index, meaning)
            items.append(Item(f"{name}_z{index:03d}", group or name, load))
    return items, meaning, orientation


def _common_orientation(images, wanted=None, source=None):
    """The orientation to turn all volumes to, with how many are stored in another printed.

    wanted: one that is given, by `source`; else it is that of the first volume. None where no
    affine tells one; ValueError where some do.
    """
    stored = [read_orientation(image) for image in images]
    if wanted is None and any(stored):
        wanted = next(filter(None, stored))
        source = images[stored.index(wanted)].name
    if wanted and None in stored:
        raise ValueError(
            f"{images[stored.index(None)]}: its affine tells no orientation, so it cannot be "
            f"turned to {wanted}, that of {source}: mend its header, or leave it out"
        )
    if turned := sum(orientation != wanted for orientation in stored):
        print(
            f"orientation: {turned} of {len(images)} volumes turned to {wanted}, that of {source}"
        )
    return wanted


def _pair_opener(window, orientation):
    """open_pair(image, mask) -> VolumePairs, of which the last OPEN_PAIRS are kept.

    Slices are loaded in the order of their names, on several threads: each pair is opened once.
    """
    lock = threading.Lock()

    @functools.lru_cache(OPEN_PAIRS)
    def open_pair(image, mask):
        return volume_pairs(image, mask, window, orientation)

    def open_locked(image, mask):
        with lock:  # else two threads would open the same pair
            return open_pair(image, mask)

    return open_locked


@dataclass(frozen=True)
class _Slice:
    """What `Item.load` is for a slice of a volume."""

    open_pair: Callable
    image: Path
    mask: Path
    index: int
    meaning: Meaning

    def __call__(self):
        _, picture, classes = self.open_pair(self.image, self.mask)[self.index]
        return picture, self.meaning.split(KIND, classes)


def _report(lengths, axes, turned, apart):
    """Print how many slices there are, across which axis they are cut, and what is doubtful.

    turned: how many masks are stored in another orientation than their image. apart: (distance,
    the same in words, mask) of those that lie beside their image.
    """
    axis, count = Counter(axes).most_common(1)[0]
    total = len(axes)
    print(f"slices: {sum(lengths)} of {total} volumes, across axis {axis} (of 0, 1, 2)")
    if count < total:
        print(
            f"warning: {total - count} of {total} volumes have their largest spacing along "
            "another axis: their slices are cut in another direction"
        )
    if turned:
        print(f"orientation: {turned} of {total} masks turned to that of their image")
    if apart:
        _, distance, mask = max(apart)
        print(
            f"warning: {len(apart)} of {total} masks lie less than a voxel beside their image, "
            f"at most {distance} ({mask.name}): their affines differ"
        )


# ---------------------------------------------------------------- one pair


def volume_pairs(image_path, mask_path, window=None, orientation=None):
    """The slices of a volume with their masks: a sequence of (name suffix, picture, classes).

    name suffix: '_z000' and on; picture: PIL image of mode L; classes: uint16 array (H, W) of
    class numbers. window as in `Volume.pictures`; orientation as in `open_nifti`: each is turned
    by its own affine.
    Raises FileNotFoundError; ValueError where the two lie a voxel apart or more and, when the
    slice is read, where the mask holds something else than whole numbers from 0 on.
    """
    image, mask = (open_nifti(path, orientation) for path in (image_path, mask_path))
    if image.shape != mask.shape:
        sizes = [" x ".join(map(str, volume.shape)) for volume in (image, mask)]
        raise ValueError(f"{mask_path}: {sizes[1]} voxels, but {image_path} has {sizes[0]}")
    corners = np.stack([*np.meshgrid(*([0, side - 1] for side in image.shape)), np.ones((2, 2, 2))])
    offsets = (image.affine - mask.affine)[:3] @ corners.reshape(4, -1)
    distance, voxel = float(np.linalg.norm(offsets, axis=0).max()), min(image.spacing)
    if distance and not distance < voxel:
        raise ValueError(
            f"{mask_path}: lies elsewhere than {image_path}: their affines differ by "
            f"{spell_distance(distance, image)}, and a voxel has {spell_distance(voxel, image)}"
        )
    mask.axis = image.axis  # equal but for rounding
    return VolumePairs(image, mask, window, distance if distance > SAME_PLACE * voxel else 0.0)


def spell_distance(distance, volume):
    """A length in the units of a volume's header: '0.5 mm'."""
    unit = {1: "m", 2: "mm", 3: "µm"}.get(int(volume.header["xyzt_units"]) & 7, "units of length")
    return f"{distance:.3g} {unit}"


class VolumePairs(Sequence):
    """What `volume_pairs` returns.

    image, mask: the two `Volume`s. distance: that their corners lie apart, in header units, 0
    where it is rounding.
    """

    def __init__(self, image, mask, window, distance):
        self.image, self.mask, self.distance = image, mask, distance
        self._pictures = image.pictures(window)

    def __len__(self):
        return len(self._pictures)

    def __getitem__(self, index):
        classes = self.classes(index)
        return f"_z{index:03d}", Image.fromarray(self._pictures[index]), classes

    @property
    def axis(self):
        """The axis across which both are cut, 0 to 2."""
        return self.mask.axis

    def classes(self, index):
        """The class numbers of one slice: uint16 array (H, W)."""
        values = self.mask[index]
        classes = np.nan_to_num(values, nan=-1).clip(-1, 65536).astype(np.int32)
        if (classes != values).any() or classes.min() < 0 or classes.max() > 65535:
            raise ValueError(
                f"{self.mask.path}: slice {index} holds something else than class numbers "
                "0, 1, 2, ..."
            )
        return classes.astype(np.uint16)
