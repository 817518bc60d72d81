"""Connected pieces of masks, and masks cleaned of them. No torch."""

import numpy as np

from medseg.cli import parse_named_values

# What --clean does to a mask: {name: (value where none is given, highest)}, for
# `medseg.cli.parse_named_values`.
CLEANINGS = {"largest": (1.0, 1.0)}  # keep the largest piece alone; 0: do not


def largest_piece(mask):
    """bool (H, W) -> bool (H, W) with its largest piece alone; a mask without one stays empty.

    Pixels that touch at a side or a corner are of one piece (8-connectivity). Of pieces of one
    size the first is kept, row by row from the top left.
    """
    from scipy import ndimage  # most predictions do without it

    numbers, count = ndimage.label(mask, np.ones((3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(numbers[mask])  # numbered row by row, from 1
    return numbers == sizes.argmax()


def clean_mask(mask, clean):
    """bool (H, W) -> the same as --clean has it. clean: text such as 'largest', or 'none'."""
    steps = parse_named_values(clean, CLEANINGS)
    return largest_piece(mask) if steps.get("largest") else mask


def clean_masks(masks, clean):
    """`clean_mask` of each class by itself; masks: bool (C, H, W)."""
    if clean == "none":
        return masks
    return np.stack([clean_mask(mask, clean) for mask in masks])


def clean_labels(labels, clean):
    """`clean_mask` of each class of a map of class numbers, uint8 (H, W); 0 is background."""
    if clean == "none":
        return labels
    cleaned = np.zeros_like(labels)
    counts = sum(np.bincount(row, minlength=256) for row in labels)  # eight bytes a pixel of it
    for number in np.flatnonzero(counts[1:]) + 1:
        cleaned[clean_mask(labels == number, clean)] = number
    return cleaned


def are_single_pieces(labels, tolerance=0.1):
    """Whether each value of an integer array (H, W), beside 0, is one connected piece.

    tolerance: the fraction of the values that may be in several. Pieces touch as in
    `largest_piece`.
    """
    from scipy import ndimage

    if labels.dtype not in (np.uint8, np.uint16):  # values up to any number
        _, numbers = np.unique(labels, return_inverse=True)
        labels = np.where(labels == 0, 0, numbers.reshape(labels.shape) + 1)
    boxes = ndimage.find_objects(labels)
    numbers = [number for number, box in enumerate(boxes, start=1) if box]
    left = tolerance * len(numbers)
    for number in numbers:
        _, count = ndimage.label(labels[boxes[number - 1]] == number, np.ones((3, 3)))
        left -= count > 1
        if left < 0:
            return False
    return bool(numbers)
