"""Connected pieces of masks: measured, and masks cleaned of them. No torch."""

import math
from typing import NamedTuple

import numpy as np

from medseg.cli import parse_named_values

# The steps of --clean, in the order in which they are taken: {name: (value where none is given,
# highest)}, for `medseg.cli.parse_named_values`.
CLEANINGS = {
    "min-area": (None, 1e9),  # remove pieces of fewer pixels of the image
    "min-mm2": (None, 1e9),  # remove pieces of less area
    "largest": (1.0, 1.0),  # of the pieces that are left, keep the largest; 0: do not
    "fill": (1.0, 1.0),  # fill the holes of those; 0: do not
}

COUNTED_PIXELS = 1 << 16  # that are counted at a time: the 8 bytes of each stay in the cache


def pixel_area(spacing):
    """mm2 of a pixel of an image; spacing: mm of it along each axis, or None."""
    return None if spacing is None else math.prod(spacing)


def check_clean(clean, spacing, path):
    """ValueError that names the image at `path` where --clean counts mm2 and has no `spacing`."""
    if "min-mm2" in parse_named_values(clean, CLEANINGS) and spacing is None:
        raise ValueError(
            f"{path}: does not tell the size of its pixels, which --clean {clean} needs: give it "
            "with --pixel-size, or use min-area, which counts pixels"
        )


def describe_clean(clean):
    """What --clean does, in words: ['no piece below 50 pixels', 'largest piece', ...] or []."""
    steps, words = parse_named_values(clean, CLEANINGS), []
    for name, unit in (("min-area", "pixels"), ("min-mm2", "mm2")):
        if steps.get(name):
            words.append(f"no piece below {steps[name]:g} {unit}")
    if steps.get("largest"):
        words.append("largest piece")
    return [*words, "holes filled"] if steps.get("fill") else words


def _keep_pieces(mask, steps, area):
    """bool (H, W) -> bool (H, W) with the pieces that min-area, min-mm2 and largest leave.

    Pixels that touch at a side or a corner are of one piece (8-connectivity). Of pieces of one
    size the first is kept, row by row from the top left.
    """
    from scipy import ndimage  # most predictions do without it

    fewest = steps.get("min-area", 0)
    if steps.get("min-mm2"):
        if area is None:
            raise ValueError("min-mm2 needs the size of the pixels in mm")
        fewest = max(fewest, steps["min-mm2"] / area)
    numbers, count = ndimage.label(mask, np.ones((3, 3)))  # row by row, from 1
    sizes = count_numbers(numbers, count)
    kept = (sizes > 0) & (sizes >= fewest * (1 - 1e-9))  # 0.3 mm2 of 0.1 are 3 pixels
    if steps.get("largest") and kept.any():
        kept &= np.arange(len(sizes)) == sizes.argmax()
    return kept[numbers] if kept.any() else np.zeros_like(mask)


def count_numbers(numbers, count=255):
    """How often each of 1 to `count` is in an array: int64 (count + 1), with 0 for 0."""
    counts, flat = np.zeros(count + 1, np.int64), numbers.ravel(order="K")
    for start in range(0, flat.size, COUNTED_PIXELS):  # a pixel takes eight bytes
        counts += np.bincount(flat[start : start + COUNTED_PIXELS], minlength=count + 1)
    counts[0] = 0
    return counts


def _find_holes(masks, free):
    """The class number in whose hole a pixel lies, uint8 (H, W); 0 where it lies in none.

    masks: iterable of (number, box, bool array of that box), of each class. free: bool (H, W),
    pixels of no class, which alone may be filled. A hole is surrounded by pixels of one class, and
    nothing leads out of it over their sides (4-connectivity, as scipy's binary_fill_holes has it).
    A hole in an island in a hole belongs to the island.
    """
    from scipy import ndimage

    holes = []
    for number, box, mask in masks:
        numbers, _ = ndimage.label(~mask)
        for index, part in enumerate(ndimage.find_objects(numbers), 1):
            inside = all(
                side.start > 0 and side.stop < length
                for side, length in zip(part, mask.shape, strict=True)
            )
            if inside:
                hole = numbers[part] == index
                place = (
                    slice(of.start + at.start, of.start + at.stop)
                    for of, at in zip(box, part, strict=True)
                )
                holes.append((hole.sum(), number, tuple(place), hole))
    owners = np.zeros(free.shape, np.uint8)
    for _, number, place, hole in sorted(holes, key=lambda hole: -hole[0]):  # the outer ones first
        owners[place][hole & free[place]] = number
    return owners


def largest_piece(mask):
    """bool (H, W) -> bool (H, W) with its largest piece alone; a mask without one stays empty."""
    return _keep_pieces(mask, {"largest": 1.0}, None)


def clean_masks(masks, clean, area=None):
    """The masks of each class, bool (C, H, W), as --clean has them.

    clean: text such as 'min-area=50,largest,fill', or 'none'; its steps are taken in the order of
    CLEANINGS, for each class by itself. Where holes are filled, no other class is overwritten.
    area: mm2 of a pixel. Raises ValueError for min-mm2 where that is unknown.
    """
    steps = parse_named_values(clean, CLEANINGS)
    if any(steps.get(name) for name in ("min-area", "min-mm2", "largest")):
        masks = np.stack([_keep_pieces(mask, steps, area) for mask in masks])
    if steps.get("fill"):
        everywhere = tuple(slice(0, side) for side in masks.shape[1:])
        parts = ((number, everywhere, mask) for number, mask in enumerate(masks, 1))
        owners = _find_holes(parts, ~masks.any(0))
        masks = masks | (owners == np.arange(1, len(masks) + 1)[:, None, None])
    return masks


def clean_labels(labels, clean, area=None):
    """`clean_masks` of a map of class numbers, uint8 (H, W); 0 is background."""
    steps = parse_named_values(clean, CLEANINGS)
    if not any(steps.values()):
        return labels
    from scipy import ndimage

    def parts():
        for number, box in enumerate(ndimage.find_objects(labels), 1):
            if box is not None:
                yield number, box, labels[box] == number

    labels = labels.copy()
    if any(steps.get(name) for name in ("min-area", "min-mm2", "largest")):
        for _, box, mask in parts():
            labels[box][mask & ~_keep_pieces(mask, steps, area)] = 0
    if steps.get("fill"):
        owners = _find_holes(parts(), labels == 0)
        np.copyto(labels, owners, where=owners > 0)
    return labels


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
    sizes = count_numbers(numbers, count)
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
