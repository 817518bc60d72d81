"""Images that look alike: of neighbouring numbers, in two splits, there already."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from medseg.coco import image_path, read_annotations
from medseg.files import base_name, file_format, parallel_map
from medseg.images import read_image
from medseg.samples import Page
from medseg.splits import present_splits, slice_number

THUMBNAIL = 16  # pixels a side
NEAR_DUPLICATE = 0.9  # correlation of two thumbnails from which on images count as duplicates
# Mean correlation of images with successive numbers from which on these count as a series: brain
# slices have 0.68 and sections of tissue 0.47, blood cells 0.07 and photographs of retinas -0.04.
SERIES = 0.25
FLAT = 1.0  # grey levels; a thumbnail that deviates less shows nothing


def thumbnail(picture):
    """A `Picture` as 16x16 grey values, each less the mean of the nine around it.

    So the brightness of large areas, which images of one kind have in common, counts for little.
    """
    small = picture.rgb().convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32)
    padded = np.pad(values, 1, mode="edge")
    nine = sliding_window_view(padded, (3, 3)).mean((2, 3))
    return (values - nine).ravel()


def is_flat(thumbnail):
    """Whether an image shows nothing, as the first slices of a volume do."""
    return thumbnail.std() < FLAT


def correlate(some, train):
    """Correlation of each thumbnail of one list with each of another: float32 (N, M).

    The mean of the second is subtracted from all: what every image of the data set shows makes no
    duplicate.
    """
    own, others = np.stack(some), np.stack(train)
    mean = others.mean(0) if len(others) > 1 else 0
    return _unit_length(own - mean) @ _unit_length(others - mean).T


def near_duplicates(some, train):
    """A line on what a split's images have in common with those of train, '' without images.

    some, train: lists of (file name, thumbnail). Neighbours by file number are told of where such
    images are more alike than others are: SERIES.
    """
    if not some or not train:
        return ""
    correlation = correlate(*([values for _, values in images] for images in (some, train)))
    fraction = (correlation.max(1) >= NEAR_DUPLICATE).mean()
    text = (
        f"{fraction:.1%} of the images have a near-duplicate there "
        f"(correlation of 16x16 grey details from {NEAR_DUPLICATE} on)"
    )
    places, alike, neighbours = {}, [], []  # number -> its places in train
    for place, (name, _) in enumerate(train):
        places.setdefault(slice_number(name), []).append(place)
    for row, (name, _) in zip(correlation, some, strict=True):
        number = slice_number(name)
        if number is not None:
            beside = [*places.get(number - 1, ()), *places.get(number + 1, ())]
            neighbours.append(bool(beside))
            alike += row[beside].tolist()
    if alike and np.mean(alike) >= SERIES:
        text += f", {np.mean(neighbours):.1%} a neighbour by the number in the file name"
    return text


def _unit_length(vectors):
    """Rows with mean 0 and length 1: the product of two is their correlation."""
    vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def find_twins(paths, most=8):
    """Two images of the same bytes, or of the same name and pixels; None where there are none.

    Pixels are read of `most` names, and of as many pictures of each.
    """
    by_size, by_name = {}, {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
        if not file_format(path):
            by_name.setdefault(base_name(path).casefold(), []).append(path)
    by_name = [own[:most] for own in by_name.values() if len(own) > 1][:most]
    for groups, read in ((by_size.values(), Path.read_bytes), (by_name, _read_pixels)):
        for own in groups:
            seen = {}
            for path in own if len(own) > 1 else ():
                other = seen.setdefault(hash(read(path)), path)
                if other != path:
                    return other, path
    return None


def _read_pixels(path):
    return read_image(Page(path, 0)).pixels.tobytes()


# ---- new images beside those of a data set --------------------------------------------------


class Known(NamedTuple):
    """A new image that the data set has already, or one like it."""

    name: str  # of the file
    split: str
    like: str  # the file name of the image there
    same: bool  # every pixel, or nearly


def find_known(root, split, folder, names):
    """[Known] of the new images in `folder`, which are to go into a split.

    The same pixels in any split count, and near-duplicates. Of several images, one with the same
    pixels is named, in `split` before others; else one of another split. Images that show nothing
    and damaged ones do not count.
    """
    paths = []
    for other in present_splits(root):
        images = read_annotations(root / other, skipped=[])["images"]
        paths += [(other, image_path(root / other, record["file_name"])) for record in images]
    looks = parallel_map(_look, [path for _, path in paths])
    bar = tqdm(looks, "comparing", len(paths), unit=" images", disable=None)
    old = [(*place, look) for place, look in zip(paths, bar, strict=True) if _shows(look)]
    new_looks = parallel_map(_look, [folder / name for name in names], catch=())
    new = [(name, look) for name, look in zip(names, new_looks, strict=True) if _shows(look)]
    if not old or not new:
        return []
    of_digest, known = {}, []
    for index, (_, _, look) in enumerate(old):
        of_digest.setdefault(look.digest, []).append(index)
    alike = correlate([look.thumbnail for _, look in new], [look.thumbnail for *_, look in old])
    for (name, look), row in zip(new, alike, strict=True):
        same = of_digest.get(look.digest, [])
        near = same or np.flatnonzero(row >= NEAR_DUPLICATE)
        if len(near):
            index = max(near, key=lambda i: ((old[i][0] == split) == bool(same), row[i]))
            known.append(Known(name, old[index][0], old[index][1].name, bool(same)))
    return known


class _Look(NamedTuple):
    digest: bytes  # of size and pixels
    thumbnail: np.ndarray


def _look(path):
    image = read_image(path)
    pixels = image.pixels.repeat(3, 2) if image.pixels.shape[2] == 1 else image.pixels
    content = repr(image.size).encode() + pixels.tobytes()  # grey stored as colours is the same
    return _Look(hashlib.sha256(content).digest(), thumbnail(image))


def _shows(look):
    return not isinstance(look, Exception) and not is_flat(look.thumbnail)
