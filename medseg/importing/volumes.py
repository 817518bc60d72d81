"""Pairs of volumes -> an example for each slice."""

import functools
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from medseg.images import as_picture
from medseg.importing.class_names import one_class
from medseg.importing.values import VOLUME, classes_of_counts, count_values
from medseg.importing.writing import Example
from medseg.modalities import open_channels, orientation_of
from medseg.volumes import Volume, open_volume

OPEN_PAIRS = 2  # volumes, with their masks, that are kept open
ROUNDING = 0.02  # of class numbers that were stored with a slope: 1.0000153 is 1
SAME_PLACE = 0.01  # of a voxel: corners of image and mask this near differ by rounding only


def volume_examples(
    pairs,
    names,
    groups,
    places,
    classes=None,
    looks=None,
    *,
    invert=False,
    present=None,
    time=None,
):
    """(examples of all slices, {class name or None: MaskClasses}, orientation) of volumes.

    pairs: [(image, [(class name or None, mask), ...])], paths, of images also `Modalities`. names
    and groups: of each volume; one without a group is a group of its own, so that its slices stay
    in one split. places: {class name or None: folder or pattern of its masks}, for messages.
    classes, of masks without a class, and invert as in `find_classes`. looks as in `open_pair`.
    orientation: that all are turned to, as "RAS": that of the first volume, or `present`,
    (orientation, where it comes from), of the splits that stay; None where the affines tell none.
    time: True takes volumes of four axes as volumes in time.
    Every volume is read once here, and what is wrong with it raises ValueError or
    FileNotFoundError; the slices are read again later.
    """
    orientation = _common_orientation([image for image, _ in pairs], *(present or ()))
    counted, lengths, axes, checks, rounded = {name: [] for name in places}, [], [], [], []
    for image, own in tqdm(pairs, "volumes", unit="volume", disable=None):
        pair = open_pair(image, own, looks, orientation, time)
        lengths.append(len(pair))
        axes.append(pair.image.axis)
        for name, mask in pair.open_masks():
            counts = Counter()
            for index in range(len(pair)):
                counts.update(count_values(mask.class_numbers(index)))
            counted[name].append((mask.volume.path, VOLUME, counts))
            said = f"{mask.distance:.3g} mm ({mask.volume.path.name})"
            checks.append((mask.distance, said, mask.turned))
            rounded += [(mask.volume.path, mask.rounded)] * (mask.rounded is not None)
    meanings = {}
    for name, place in places.items():
        names_of_values = classes if name is None else one_class(name, invert)
        meanings[name] = classes_of_counts(counted[name], place, names_of_values, invert=invert)
    _report(lengths, axes, checks)
    if rounded:
        print(
            f"warning: {len(rounded)} of {len(checks)} masks hold numbers that are not whole, but "
            f"nearly, such as {rounded[0][1]:.8g} ({rounded[0][0].name}): they are rounded"
        )
    open_once = _pair_opener(looks, orientation, time, meanings)
    examples = []
    for (image, own), name, group, length in zip(pairs, names, groups, lengths, strict=True):
        for index in range(length):
            read = functools.partial(_read_slice, open_once, image, tuple(own), index)
            examples.append(Example(f"{name}_z{index:03d}", group or name, read))
    return examples, meanings, orientation


def _common_orientation(images, wanted=None, source=None):
    """The orientation to turn all volumes to, with how many are stored in another printed.

    wanted: one that is given, by `source`; else it is that of the first volume. None where no
    affine tells one; ValueError where some do.
    """
    stored = [orientation_of(image) for image in images]
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


def _pair_opener(looks, orientation, time, meanings):
    """(image, masks) -> (their VolumePair, the masks of each slice), the last OPEN_PAIRS kept.

    Slices are read in the order of their names, on several threads: each pair is opened once.
    """
    lock = threading.Lock()

    @functools.lru_cache(OPEN_PAIRS)
    def open_cached(image, masks):
        pair = open_pair(image, masks, looks, orientation, time)
        return pair, _united_masks(pair, meanings)

    def open_locked(image, masks):
        with lock:  # else two threads would open the same pair
            return open_cached(image, masks)

    return open_locked


def _read_slice(open_once, image, masks, index):
    """What `Example.read` returns, of a slice of a volume."""
    pair, united = open_once(image, masks)
    picture = as_picture(pair.pictures[index])
    return replace(picture, spacing=pair.image.slice_spacing), united[index]


def _united_masks(pair, meanings):
    """A sequence of {class name: RunLengths}, for each slice of a VolumePair.

    One mask is read slice by slice. Of several, each is open for a moment: a hundred would take
    gigabytes, and their runs take little.
    """
    if len(pair.masks) == 1:
        ((name, mask),) = pair.open_masks()
        return _MaskSlices(mask, meanings[name])
    united = [{} for _ in range(len(pair))]
    for name, mask in pair.open_masks():
        for own, masks in zip(united, _MaskSlices(mask, meanings[name]), strict=True):
            for class_name, runs in masks.items():
                own[class_name] = own[class_name] | runs if class_name in own else runs
    return united


class _MaskSlices(Sequence):
    """{class name: RunLengths} of each slice of a MaskVolume, read when it is asked for."""

    def __init__(self, mask, mask_classes):
        self._mask, self._mask_classes = mask, mask_classes

    def __len__(self):
        return len(self._mask.volume)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._mask_classes.to_masks(VOLUME, self._mask.class_numbers(index))


def _report(lengths, axes, checks):
    """Print how many slices there are, across which axis they are cut, and what is doubtful.

    checks: of each mask the distance to its image, the same in words, whether it was turned.
    """
    axis, count = Counter(axes).most_common(1)[0]
    total = len(axes)
    print(f"slices: {sum(lengths)} of {total} volumes, across axis {axis} (of 0, 1, 2)")
    if count < total:
        print(
            f"warning: {total - count} of {total} volumes have their largest spacing along "
            "another axis: their slices are cut in another direction"
        )
    if turned := sum(turned for _, _, turned in checks):
        print(f"orientation: {turned} of {len(checks)} masks turned to that of their image")
    if apart := [(distance, said) for distance, said, _ in checks if distance]:
        print(
            f"warning: {len(apart)} of {len(checks)} masks lie less than a voxel beside their "
            f"image, at most {max(apart)[1]}: their affines differ"
        )


# ---------------------------------------------------------------- one pair


@dataclass
class MaskVolume:
    """A mask volume, cut across the same axis as its image.

    distance: mm that their corners lie apart, 0 where it is rounding. turned: whether it was stored
    in another orientation than the image. rounded: a number of it that had to be rounded, or None.
    """

    volume: Volume
    distance: float
    turned: bool
    rounded: float | None = None

    def class_numbers(self, index):
        """The mask of one slice, uint16 array (H, W); ValueError for other than whole numbers."""
        values = self.volume.whole_numbers(index)
        numbers = values
        if values is None:
            values = self.volume[index]
            numbers = np.nan_to_num(values, nan=-1).clip(-1, 65536).round().astype(np.int32)
            if (apart := numbers != values).any():
                self.rounded = float(values[apart][0])
        whole = np.abs(values - numbers).max() <= ROUNDING
        if not whole or numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(
                f"{self.volume.path}: slice {index} holds something else than class numbers "
                "0, 1, 2, ..."
            )
        return numbers[..., 0].astype(np.uint16)


@dataclass(frozen=True)
class VolumePair:
    """A volume of `len(pair)` slices with its masks.

    pictures: the slices of the image, uint8 arrays (H, W). masks: [(class name or None, path)].
    orientation: that all are turned to, or None. time: whether all are volumes in time.
    """

    image: Volume
    pictures: Sequence
    masks: Sequence
    orientation: str | None
    time: bool | None

    def __len__(self):
        return len(self.pictures)

    def open_masks(self):
        """Yield (class name or None, MaskVolume) of each mask, opened one after the other.

        Raises FileNotFoundError; ValueError where a mask lies a voxel or more beside the image.
        """
        for name, path in self.masks:
            yield name, open_mask(path, self.image, self.orientation, self.time)


def open_pair(image, masks, looks=None, orientation=None, time=None):
    """The VolumePair of a Path or `Modalities` and [(class name or None, volume of a mask)].

    looks: keywords of `Volume.pictures`; orientation and time as in `open_volume`: each is turned
    by its own affine. Raises FileNotFoundError or ValueError.
    """
    image = open_channels(image, orientation, time)
    return VolumePair(image, image.pictures(**looks or {}), masks, orientation, time)


def open_mask(path, image, orientation=None, time=None):
    """The MaskVolume in a file, of a Volume that was turned to the orientation.

    Raises FileNotFoundError; ValueError where the two lie a voxel apart or more.
    """
    mask = open_volume(path, orientation, is_mask=True, time=time)
    if mask.n_channels > 1:  # layers of segments that overlap
        raise ValueError(f"{path}: has {mask.n_channels} channels: a mask is one, of class numbers")
    distance = image.distance_to(mask)
    mask.axis = image.axis  # equal but for rounding
    turned = image.stored_orientation != mask.stored_orientation
    voxel = min(image.spacing) * image.header.unit
    return MaskVolume(mask, distance if distance > SAME_PLACE * voxel else 0.0, turned)
