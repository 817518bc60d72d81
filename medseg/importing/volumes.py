"""Pairs of volumes -> an example for each slice."""

import functools
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from medseg.images import as_picture
from medseg.importing.class_names import one_class
from medseg.importing.values import VOLUME, Counted, classes_of_counts, count_values
from medseg.importing.writing import Example
from medseg.modalities import open_channels
from medseg.volumes import open_volume, read_orientation

OPEN_PAIRS = 2  # volumes, with their masks, that are kept open
ROUNDING = 0.02  # of class numbers that were stored with a slope: 1.0000153 is 1
SAME_PLACE = 0.01  # of a voxel: corners of image and mask this near differ by rounding only


def volume_examples(sources, class_names, classes, args, present):
    """(examples of all slices, {class name or None: MaskClasses}, orientation) of volumes.

    sources: [(image, [(class name or None, mask), ...], name, group)], images and masks are paths,
    images also `Modalities`. One without a group is a group of its own, so that its slices stay in
    one split. class_names: of the masks, or [None]; classes: of masks without a class, as in
    `find_classes`. args: the flags of the import. present: as in `mask_examples`. orientation: that
    all are turned to, None where the affines tell none.
    Every volume is read once here, and what is wrong with it raises ValueError or
    FileNotFoundError; the slices are read again later.
    """
    orientation = _common_orientation([image for image, *_ in sources], present)
    looks = {"orientation": orientation, "time": args.time or None}
    counted, lengths, axes, checks = {name: [] for name in class_names}, [], [], []
    for image, own, *_ in tqdm(sources, "volumes", unit="volume", disable=None):
        volume = open_channels(image, **looks)
        lengths.append(len(volume))
        axes.append(volume.axis)
        for name, path in own:
            mask, counts = MaskVolume(path, volume, looks), Counter()
            for numbers in mask:
                counts.update(count_values(numbers))
            counted[name].append(Counted(path, VOLUME, counts))
            checks.append((mask.distance, mask.rounded, path.name))
    _report(lengths, axes, checks)
    meanings = {}
    for name in class_names:
        own = classes if name is None else one_class(name)
        meanings[name] = classes_of_counts(counted[name], own, invert=args.invert)
    lock = threading.Lock()

    @functools.lru_cache(OPEN_PAIRS)  # slices are read in the order of their names
    def open_pair(number):
        image, own, *_ = sources[number]
        volume = open_channels(image, **looks)
        united = [{} for _ in range(len(volume))]
        for name, path in own:
            for index, numbers in enumerate(MaskVolume(path, volume, looks)):
                united[index] = meanings[name].to_masks(VOLUME, numbers, united[index])
        return volume.pictures(args.window, args.context), united, volume.slice_spacing

    def read(number, index):
        with lock:  # else two threads would open the same pair
            pictures, united, spacing = open_pair(number)
        return replace(as_picture(pictures[index]), spacing=spacing), united[index]

    examples = []
    for number, (_, _, name, group) in enumerate(sources):
        for index in range(lengths[number]):
            own = functools.partial(read, number, index)
            examples.append(Example(f"{name}_z{index:03d}", group or name, own))
    return examples, meanings, orientation


def _common_orientation(images, present):
    """The orientation to turn all volumes to, with how many are stored in another printed.

    That of the splits that stay, else of the first volume that tells one; None where none does.
    """
    stored = [read_orientation(image) for image in images]
    told = [(own["orientation"], folder) for folder, own in present]
    told += [(own, image.name) for own, image in zip(stored, images, strict=True)]
    wanted, source = next((one for one in told if one[0]), (None, None))
    if turned := sum(orientation != wanted for orientation in stored):
        print(
            f"orientation: {turned} of {len(images)} volumes turned to {wanted}, that of {source}"
        )
    return wanted


def _report(lengths, axes, checks):
    """Print how many slices there are, across which axis they are cut, and what is doubtful.

    checks: (distance, rounded, name) of each `MaskVolume`.
    """
    (axis, count), total = Counter(axes).most_common(1)[0], len(axes)
    print(f"slices: {sum(lengths)} of {total} volumes, across axis {axis} (of 0, 1, 2)")
    if count < total:
        print(
            f"warning: {total - count} of {total} volumes have their largest spacing along "
            "another axis: their slices are cut in another direction"
        )
    if apart := [check for check in checks if check[0]]:
        distance, _, name = max(apart)
        print(
            f"warning: {len(apart)} of {len(checks)} masks lie less than a voxel beside their "
            f"image, at most {distance:.3g} mm ({name}): their affines differ"
        )
    if rounded := [check for check in checks if check[1]]:
        print(
            f"warning: {len(rounded)} of {len(checks)} masks hold numbers that are not whole, but "
            f"nearly, such as {rounded[0][1]:.8g} ({rounded[0][2]}): they are rounded"
        )


class MaskVolume:
    """The class numbers of a mask volume: uint16 arrays (H, W), cut across the axis of its image.

    distance: mm that their corners lie apart, 0 where it is rounding. rounded: a number of it that
    had to be rounded, or 0.
    Raises FileNotFoundError; ValueError where it lies a voxel or more beside the image, and, when
    the slices are read, for other than whole numbers.
    """

    def __init__(self, path, image, looks):
        self._volume = open_volume(path, is_mask=True, **looks)
        if self._volume.n_channels > 1:  # layers of segments that overlap
            raise ValueError(f"{path}: has {self._volume.n_channels} channels, a mask has one")
        distance, voxel = image.distance_to(self._volume), min(image.spacing) * image.header.unit
        self._volume.axis = image.axis  # equal but for rounding
        self.distance = distance if distance > SAME_PLACE * voxel else 0.0
        self.rounded = 0.0

    def __iter__(self):
        return map(self._class_numbers, range(len(self._volume)))

    def _class_numbers(self, index):
        numbers = values = self._volume.whole_numbers(index)
        if values is None:
            values = self._volume[index]
            numbers = np.nan_to_num(values, nan=-1).clip(-1, 65536).round().astype(np.int32)
            if (apart := numbers != values).any():
                self.rounded = float(values[apart][0])
        whole = np.abs(values - numbers).max() <= ROUNDING
        if not whole or numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError(
                f"{self._volume.path}: slice {index} holds something else than class numbers "
                "0, 1, 2, ..."
            )
        return numbers[..., 0].astype(np.uint16)
