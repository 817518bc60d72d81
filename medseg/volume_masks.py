"""Pairs of NIfTI volumes -> an item for each slice."""

import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from medseg.dataset import Item
from medseg.mask_values import Meaning, count_values, meaning_of
from medseg.nifti import volume_pairs

KIND = "volume"  # of mask values, beside those of `read_mask`
OPEN_PAIRS = 2  # volumes, with their masks, that are kept open


def volume_items(pairs, names, groups, folder, window=None):
    """([Item] of all slices, the Meaning of the mask values) of [(image, mask)], paths of volumes.

    names and groups: of each volume; one without a group is a group of its own, so that its slices
    stay in one split. folder: of the masks, for messages. window as in `volume_pairs`.
    Every volume is read once here, and what is wrong with it raises ValueError or
    FileNotFoundError; the slices are loaded later.
    """
    open_pair = _pair_opener(window)
    lengths, axes, counted = [], [], []
    for image, mask in tqdm(pairs, "volumes", unit="volume", disable=None):
        slices, counts = open_pair(image, mask), Counter()
        for index in range(len(slices)):
            counts.update(count_values(slices.classes(index)))
        lengths.append(len(slices))
        axes.append(slices.axis)
        counted.append((mask, KIND, counts))
    meaning = meaning_of(counted, folder)
    _report(lengths, axes)
    items = []
    for pair, name, group, length in zip(pairs, names, groups, lengths, strict=True):
        for index in range(length):
            load = _Slice(open_pair, *pair, index, meaning)
            items.append(Item(f"{name}_z{index:03d}", group or name, load))
    return items, meaning


def _pair_opener(window):
    """open_pair(image, mask) -> VolumePairs, of which the last OPEN_PAIRS are kept.

    Slices are loaded in the order of their names, on several threads: each pair is opened once.
    """
    lock = threading.Lock()

    @functools.lru_cache(OPEN_PAIRS)
    def open_pair(image, mask):
        return volume_pairs(image, mask, window)

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


def _report(lengths, axes):
    """Print how many slices there are, and across which axis they are cut."""
    axis, count = Counter(axes).most_common(1)[0]
    print(f"slices: {sum(lengths)} of {len(lengths)} volumes, across axis {axis} (of 0, 1, 2)")
    if count < len(axes):
        print(
            f"warning: {len(axes) - count} of {len(axes)} volumes have their largest spacing along "
            "another axis: their slices are cut in another direction"
        )
