"""Pairs of NIfTI volumes -> an example for each slice."""

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from medseg.formats.nifti import Volume, open_nifti, read_orientation
from medseg.importing.mask_values import classes_of_counts, count_values
from medseg.importing.value_counts import VOLUME
from medseg.importing.writing import Example

OPEN_PAIRS = 2  # volumes, with their masks, that are kept open
SAME_PLACE = 0.01  # of a voxel: corners of image and mask this near differ by rounding only


def volume_examples(
    pairs, names, groups, folder, classes=None, window=None, *, invert=False, present=None
):
    """(examples of all slices, MaskClasses, orientation) of volumes and their masks.

    pairs: [(image, mask)], paths. names and groups: of each volume; one without a group is a group
    of its own, so that its slices stay in one split. folder: of the masks, for messages. classes
    and invert as in `find_classes`. window as in `open_pair`. orientation: that all are
    turned to, as "RAS": that of the first volume, or `present`, (orientation, where it comes
    from), of the splits that stay; None where the affines tell none.
    Every volume is read once here, and what is wrong with it raises ValueError or
    FileNotFoundError; the slices are read again later.
    """
    orientation = _common_orientation([image for image, _ in pairs], *(present or ()))
    open_once = _pair_opener(window, orientation)
    lengths, axes, counted, turned, apart = [], [], [], 0, []
    for image, mask in tqdm(pairs, "volumes", unit="volume", disable=None):
        pair, counts = open_once(image, mask), Counter()
        for index in range(len(pair)):
            counts.update(count_values(pair.class_numbers(index)))
        lengths.append(len(pair))
        axes.append(pair.mask.axis)
        turned += pair.image.stored_orientation != pair.mask.stored_orientation
        if pair.distance:
            apart.append((pair.distance, spell_distance(pair.distance, pair.image), mask))
        counted.append((mask, VOLUME, counts))
    mask_classes = classes_of_counts(counted, folder, classes, invert=invert)
    _report(lengths, axes, turned, apart)
    examples = []
    for pair, name, group, length in zip(pairs, names, groups, lengths, strict=True):
        for index in range(length):
            read = functools.partial(_read_slice, open_once, *pair, index, mask_classes)
            examples.append(Example(f"{name}_z{index:03d}", group or name, read))
    return examples, mask_classes, orientation


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
    """`open_pair` of an image and a mask, of which the last OPEN_PAIRS are kept open.

    Slices are read in the order of their names, on several threads: each pair is opened once.
    """
    lock = threading.Lock()

    @functools.lru_cache(OPEN_PAIRS)
    def open_cached(image, mask):
        return open_pair(image, mask, window, orientation)

    def open_locked(image, mask):
        with lock:  # else two threads would open the same pair
            return open_cached(image, mask)

    return open_locked


def _read_slice(open_once, image, mask, index, mask_classes):
    """What `Example.read` returns, of a slice of the volumes at two paths."""
    pair = open_once(image, mask)
    masks = mask_classes.to_masks(VOLUME, pair.class_numbers(index))
    return Image.fromarray(pair.pictures[index]), masks


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


@dataclass(frozen=True)
class VolumePair:
    """A volume and its mask, cut across the same axis into `len(pair)` slices.

    pictures: the slices of the image, uint8 arrays (H, W). distance: that their corners lie apart,
    in header units, 0 where it is rounding.
    """

    image: Volume
    mask: Volume
    pictures: Sequence
    distance: float

    def __len__(self):
        return len(self.pictures)

    def class_numbers(self, index):
        """The mask of one slice, uint16 array (H, W); ValueError for other than whole numbers."""
        values = self.mask[index]
        numbers = np.nan_to_num(values, nan=-1).clip(-1, 65536).astype(np.int32)
        if (numbers != values).any() or numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(
                f"{self.mask.path}: slice {index} holds something else than class numbers "
                "0, 1, 2, ..."
            )
        return numbers.astype(np.uint16)


def open_pair(image_path, mask_path, window=None, orientation=None):
    """The VolumePair of two NIfTI files.

    window as in `Volume.pictures`; orientation as in `open_nifti`: each is turned by its own
    affine. Raises FileNotFoundError; ValueError where the two lie a voxel apart or more.
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
    distance = distance if distance > SAME_PLACE * voxel else 0.0
    return VolumePair(image, mask, image.pictures(window), distance)


def spell_distance(distance, volume):
    """A length in the units of a volume's header: '0.5 mm'."""
    unit = {1: "m", 2: "mm", 3: "µm"}.get(int(volume.header["xyzt_units"]) & 7, "units of length")
    return f"{distance:.3g} {unit}"
