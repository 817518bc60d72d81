"""Connected pieces of masks: measured, and masks cleaned of them. No torch."""

from typing import NamedTuple

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


# ---- measured --------------------------------------------------------------------------------


class Pieces(NamedTuple):
    """The pieces of a mask, and where the largest one lies.

    count: how many there are. largest: the pixels of the largest. center: its centroid, in the
    order of the array's axes; pixel (0, 0) has its centre at 0, 0. diameter: the longest distance
    between the centres of two of its pixels, in pixels; diameter_mm: the same in mm, or None.
    Of an empty mask, center and the diameters are None.
    """

    count: int = 0
    largest: int = 0
    center: tuple | None = None
    diameter: float | None = None
    diameter_mm: float | None = None


def measure_pieces(mask, spacing=None):
    """The `Pieces` of a bool array (H, W), or (D, H, W) of a volume.

    Pixels that touch at a side, an edge or a corner are of one piece. spacing: mm of a pixel along
    each axis, or None where it is unknown.
    """
    from scipy import ndimage

    numbers, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if not count:
        return Pieces()
    sizes = np.bincount(numbers[mask], minlength=count + 1)
    largest = int(sizes.argmax())
    box = ndimage.find_objects(numbers, largest)[-1]
    piece = numbers[box] == largest
    center = []
    for axis, side in enumerate(box):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        counts = piece.sum(others)
        center.append(float(side.start + counts @ np.arange(len(counts)) / sizes[largest]))
    ends = _row_ends(piece)
    in_mm = None if spacing is None else longest_distance(ends * np.asarray(spacing, float))
    return Pieces(count, int(sizes[largest]), tuple(center), longest_distance(ends), in_mm)


def _row_ends(piece):
    """Where the rows of a bool array (..., W) begin and end, (N, D).

    Any other pixel lies between two of these, so the longest distance is between two of them.
    """
    inner = np.zeros_like(piece)
    inner[..., 1:-1] = piece[..., :-2] & piece[..., 2:]
    return np.argwhere(piece & ~inner)


def longest_distance(points):
    """The longest distance between two of the points, an array (N, D) of one or more.

    It is that of two corners of their convex hull (Shamos, "Computational Geometry", 1978).
    """
    from scipy.spatial import ConvexHull
    from scipy.spatial.distance import cdist

    points = np.asarray(points, float)
    points = points - points[0]
    # In the space that they span: a straight row of pixels has no area, and so no hull in 2-D.
    _, lengths, axes = np.linalg.svd(points, full_matrices=False)
    rank = int((lengths > lengths[0] * 1e-9).sum())
    if not rank:
        return 0.0
    points = points @ axes[:rank].T
    if rank == 1:
        return float(np.ptp(points))
    corners = points[ConvexHull(points).vertices]
    parts = (corners[start : start + 256] for start in range(0, len(corners), 256))
    return float(max(cdist(part, corners).max() for part in parts))
