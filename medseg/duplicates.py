"""Images that look alike: of neighbouring numbers, in two splits."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from medseg.splits import slice_number

THUMBNAIL = 16  # pixels a side
NEAR_DUPLICATE = 0.9  # correlation of two thumbnails from which on images count as duplicates
# Mean correlation of images with successive numbers from which on these count as a series: brain
# slices have 0.68 and sections of tissue 0.47, blood cells 0.07 and photographs of retinas -0.04.
SERIES = 0.25
NAMED = 3  # near-duplicates that are named
FLAT = 1.0  # grey levels; a thumbnail that deviates less shows nothing


def shrink(picture):
    """A `Picture` as grey values, float32 (16, 16)."""
    small = picture.rgb().convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float32)


def thumbnail(values):
    """What `shrink` gives, each value less the mean of the nine around it, float32 (256,).

    So the brightness of large areas, which images of one kind have in common, counts for little.
    """
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
    alike, nearest = correlation.max(1), correlation.argmax(1)
    text = (
        f"{(alike >= NEAR_DUPLICATE).mean():.1%} of the images have a near-duplicate there "
        f"(correlation of 16x16 grey details from {NEAR_DUPLICATE} on)"
    )
    first = [index for index in np.argsort(-alike)[:NAMED] if alike[index] >= NEAR_DUPLICATE]
    if first:
        pairs = (f"{some[index][0]} of {train[nearest[index]][0]}" for index in first)
        text += f", such as {', '.join(pairs)}"
    places, beside_each, neighbours = {}, [], []  # number -> its places in train
    for place, (name, _) in enumerate(train):
        places.setdefault(slice_number(name), []).append(place)
    for row, (name, _) in zip(correlation, some, strict=True):
        number = slice_number(name)
        if number is not None:
            beside = [*places.get(number - 1, ()), *places.get(number + 1, ())]
            neighbours.append(bool(beside))
            beside_each += row[beside].tolist()
    if beside_each and np.mean(beside_each) >= SERIES:
        text += f", {np.mean(neighbours):.1%} a neighbour by the number in the file name"
    return text


def _unit_length(vectors):
    """Rows with mean 0 and length 1: the product of two is their correlation."""
    vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
