"""Probabilities of a network at the size of the image: labels, 16-bit levels, sums.

A few rows or columns at a time, so that a large image needs few megabytes besides its labels.
"""

import numpy as np
from PIL import Image

from medseg.images import STRIPE
from medseg.pieces import class_masks

MAX_LEVEL = 65535  # of a probability as 16 bits: 1.0


def full_size_labels(probabilities, size, threshold):
    """float32 array (C, S, S) of 0..1 -> class numbers, uint8 (height, width), 0 for background.

    size: (width, height). Where classes overlap, the most probable one is taken.
    """
    if len(probabilities) == 1:
        return full_size_mask(probabilities[0], size, threshold).view(np.uint8)
    labels, highest = np.zeros(size[::-1], np.uint8), np.full(size[::-1], threshold, np.float32)
    for number, channel in enumerate(probabilities, 1):
        for columns, stripe in full_size_stripes(channel, size, above=threshold):
            top = highest[:, columns]
            labels[:, columns][stripe > top] = number
            np.maximum(stripe, top, out=top)
    return labels


def full_size_stripes(channel, size, columns=None, above=-1):
    """Yield (slice of columns, float32 (height, columns)) of probabilities at the size of an image.

    channel: float32 (S, S); size: (width, height). Few columns are resized at a time: along the
    rows, then the columns, as Pillow does it. columns: the slice of those that are needed, or None
    for all. above: stripes without a probability above it are left out.
    """
    (width, height), bilinear = size, Image.Resampling.BILINEAR
    if above >= channel.max():  # and so is every value between those of its pixels
        return
    resized = channel.shape != (height, width)
    if resized:
        channel = np.asarray(Image.fromarray(channel).resize((width, len(channel)), bilinear))
    first, last, _ = (columns or slice(None)).indices(width)
    for start in range(first, last, STRIPE):
        part = slice(start, min(start + STRIPE, last))
        stripe = channel[:, part]
        if stripe.max() <= above:
            continue
        if resized:
            stripe = Image.fromarray(np.ascontiguousarray(stripe))
            stripe = np.asarray(stripe.resize((stripe.width, height), bilinear))
        yield part, stripe


def full_size_mask(channel, size, threshold):
    """bool (height, width): where a class is above the threshold, whatever the others are."""
    mask = np.zeros(size[::-1], bool)
    for columns, stripe in full_size_stripes(channel, size, above=threshold):
        mask[:, columns] = stripe > np.float32(threshold)
    return mask


def full_size_levels(channel, size):
    """float32 (S, S) of 0..1 -> uint16 (height, width) of 0..MAX_LEVEL, at the size of an image."""
    levels = np.zeros(size[::-1], np.uint16)
    for columns, stripe in full_size_stripes(channel, size):
        levels[:, columns] = np.rint(stripe * MAX_LEVEL)
    return levels


def sum_probabilities(masks, probabilities):
    """float64 (C,): the sum of a class's probabilities over the pixels of its mask, of each class.

    masks: as of `medseg.pieces.class_masks`, of a picture; probabilities: float32 (C, S, S).
    """
    sums, size = np.zeros(len(probabilities)), masks.shape[:-3:-1]
    for number, (rows, sides), mask in class_masks(masks):
        for columns, stripe in full_size_stripes(probabilities[number - 1], size, sides):
            inside = mask[:, columns.start - sides.start : columns.stop - sides.start]
            sums[number - 1] += stripe[rows][inside].sum(dtype=np.float64)
    return sums
