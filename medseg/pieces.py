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
