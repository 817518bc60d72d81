"""What a data set looks like: all that the rules of a plan ask of it, read in one pass."""

import contextlib
import json
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import COCOSegmentationDataset
from medseg.cache import fingerprint
from medseg.coco import SPLITS, load_coco, used_categories
from medseg.duplicates import near_duplicates
from medseg.files import atomic_write, parallel_map
from medseg.planning.reading import examine

VERSION = 5  # raise it when the meaning of a field, or the pixels of an image, change
MAX_READ = 2000  # images of all splits; of more, evenly spaced ones are read
MAX_MEASURED = 64  # training images whose masks are resized to all SIDES and back
MAX_SIDE = 2048  # of a mask that is measured; a larger one is reduced to it first
SIDES = (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
ORIENTATIONS = {  # what may be done to an image whose orientation means nothing
    "mirror": lambda picture: picture[:, ::-1],
    "flip": lambda picture: picture[::-1],
    "turn": np.rot90,
}


class Fingerprint(NamedTuple):
    """Numbers on a data set. Of images and masks they are of the training split, as stored."""

    images: dict  # split -> number of images
    read: int  # images that were read
    width: int  # pixels, median
    height: int
    largest: int  # pixels of the longest side of any image, in any split
    channels: int  # of the images; 1 where the colours of every one of them are equal
    n_classes: int  # categories that have annotations
    together: float  # share of the images that have two classes or more
    foreground: list  # share of the pixels, of each class
    boxes: float  # share of the images with foreground in which it is one upright rectangle
    empty: dict  # split -> share of the images without foreground
    thickness: float  # pixels, median over the images: 2 x area / perimeter of their foreground
    kept: dict  # side -> Dice of the masks, resized to side x side and back, with themselves
    oriented: dict  # change of ORIENTATIONS -> whether images look different after it
    duplicates: str  # a line on near-duplicates of training images in valid and test, or ''


def take_fingerprint(root, *, skip_bad=False):
    """The Fingerprint of the data set in `root`, from root/.cache where it has not changed.

    skip_bad: leave out damaged images. Raises FileNotFoundError or ValueError where a split is
    missing or, without it, an image damaged.
    """
    cocos = {split: load_coco(root / split, [] if skip_bad else None) for split in SPLITS}
    names = list(used_categories(cocos["train"]))
    datasets = {
        split: COCOSegmentationDataset(coco, root / split, classes=names)
        for split, coco in cocos.items()
    }
    key = "".join(fingerprint(dataset, "st_size", "st_mtime_ns") for dataset in datasets.values())
    path = root / ".cache" / f"fingerprint-{VERSION}.json"
    if path.exists() and (known := json.loads(path.read_text())).pop("key") == key:
        return Fingerprint(**{**known, "kept": {int(n): dice for n, dice in known["kept"].items()}})
    look = _measure(datasets, skip_bad)
    with contextlib.suppress(OSError):  # a folder that cannot be written to is read again
        with atomic_write(path, sync=False) as file:
            file.write(json.dumps({"key": key, **look._asdict()}).encode())
    return look


def _measure(datasets, skip_bad):
    counts = {split: len(dataset) for split, dataset in datasets.items()}
    part = min(1.0, MAX_READ / sum(counts.values()))
    seen = {split: _read(dataset, part, skip_bad) for split, dataset in datasets.items()}
    train, others = seen["train"], [image for split in SPLITS[1:] for image in seen[split]]
    records = [record for own in datasets.values() for record in own.coco.imgs.values()]
    sizes, areas = np.array([image.size for image in train]), [image.areas for image in train]
    width, height = np.median(sizes, 0).astype(int).tolist()
    kept, thickness = _measure_masks(train)
    return Fingerprint(
        images=counts,
        read=sum(map(len, seen.values())),
        width=width,
        height=height,
        largest=max(max(record["width"], record["height"]) for record in records),
        channels=max(image.channels for image in [*train, *others]),
        n_classes=datasets["train"].n_classes,
        together=float(np.mean([sum(map(bool, own)) > 1 for own in areas])),
        foreground=(np.sum(areas, 0) / sizes.prod(1).sum()).tolist(),
        boxes=float(np.mean([image.box for image in train if image.area] or [False])),
        empty={
            split: float(np.mean([image.area == 0 for image in images]))
            for split, images in seen.items()
        },
        thickness=thickness,
        kept=kept,
        oriented=_find_orientation([image.picture for image in train]),
        duplicates=near_duplicates(*([own.thumbnail for own in both] for both in (others, train))),
    )


def _read(dataset, part, skip_bad):
    """[Examined] of evenly spaced images of a split, a `part` of 0..1 of them."""
    total = len(dataset)
    wanted = np.unique(np.linspace(0, total - 1, max(round(part * total), 1)).astype(int))
    examined, errors = examine(dataset, wanted.tolist())
    if errors and not (skip_bad and examined):
        raise errors[0]
    return examined


def _measure_masks(train):
    """({side: Dice kept}, thickness in pixels) of some training images that have foreground."""
    filled = [image for image in train if image.area]
    if not filled:
        return dict.fromkeys(SIDES, 1.0), 0.0

    def measure(image):
        """[(a mask's Dice kept of each side, its thickness)] of an image."""
        shrink = max(*image.size, MAX_SIDE) / MAX_SIDE
        width, height = (max(round(side / shrink), 1) for side in image.size)
        drawn = [(mask, mask.draw(height, width)) for mask in image.masks.values()]
        return [
            ([_kept(mask, own, side) for side in SIDES], shrink * _thickness(own))
            for mask, own in drawn
            if own.any()
        ]

    wanted = np.unique(np.linspace(0, len(filled) - 1, MAX_MEASURED).astype(int))
    measured = parallel_map(measure, [filled[place] for place in wanted])
    kept, thickness = zip(*(own for of_image in measured for own in of_image), strict=True)
    return dict(zip(SIDES, np.mean(kept, 0).tolist(), strict=True)), float(np.median(thickness))


def _kept(mask, own, side):
    """Dice of a mask with itself, resized to side x side as for training, and back."""
    small = Image.fromarray(mask.draw(side, side) * np.float32(1))
    back = np.asarray(small.resize(own.shape[::-1], Image.Resampling.BILINEAR)) > 0.5
    return 2 * (back & (own > 0)).sum() / (back.sum() + own.sum())


def _thickness(mask):
    """2 x area / perimeter: the width of a long stripe, the radius of a disc. uint8 (H, W)."""
    padded = np.pad(mask, 1).astype(bool)
    edges = sum((padded[1:] != padded[:-1]).sum() for padded in (padded, padded.T))
    return 2 * mask.sum() / (edges * math.pi / 4)  # a slanting edge has 4 / pi as many steps


def _find_orientation(pictures):
    """{change: whether the images look different after it}. pictures: float32 (16, 16) each.

    They do where images have a layout in common, an image's correlation with the mean of the
    others being 0.5 or more, and more than half of that is lost by the change. So measured,
    photographs of the retina lose 1 to 4 % of theirs and brain slices at most 12 %, while
    ultrasound images, bright above and dark below, lose 2 % mirrored and all of it upside down.
    """
    pictures = np.stack([_standardize(picture) for picture in pictures])
    total = pictures.sum(0)
    others = np.stack([_standardize(total - picture) for picture in pictures])
    own, oriented = (pictures * others).mean(), {}
    for name, change in ORIENTATIONS.items():
        changed = np.stack([change(picture) for picture in pictures])
        oriented[name] = bool(own >= 0.5 and (changed * others).mean() < own / 2)
    return oriented


def _standardize(picture):
    return (picture - picture.mean()) / max(picture.std(), 1e-6)
