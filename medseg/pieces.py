"""Connected pieces of masks: numbered, measured, removed, filled, taken apart."""

import math

import numpy as np

from medseg.cli import parse_named_values

# The steps of --clean, in the order in which they are taken: {name: (value where none is given,
# highest)}, for `medseg.cli.parse_named_values`.
CLEANINGS = {
    "min-area": (None, 1e9),  # remove pieces of fewer pixels of the image
    "min-mm2": (None, 1e9),  # remove pieces of less area
    "largest": (1.0, 1.0),  # of the pieces that are left, keep the largest; 0: do not
    "fill": (1.0, 1.0),  # fill the holes of those; 0: do not
    "split": (1.0, 1.0),  # take objects that touch apart; 0: do not
}

COUNTED_PIXELS = 1 << 16  # that are counted at a time: the 8 bytes of each stay in the cache
# A neck between two objects is lower than the lower of their peaks by this part of it, and by so
# many pixels: heights are distances to the background.
NECK, NECK_PIXELS = 0.25, 1.0


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
    told = {"largest": "largest piece", "fill": "holes filled", "split": "touching objects split"}
    return words + [text for name, text in told.items() if steps.get(name)]


def number_pieces(mask, connectivity=8):
    """The connected pieces of a bool array (H, W), or (D, H, W) of a volume.

    Returns their numbers, an int32 array of this shape, row by row from 1; their sizes, (N,); their
    boxes, (N, axes, 2), start and stop along each axis. Pixels that touch at a side, an edge or a
    corner are of one piece; with a connectivity of 4, those of a picture that share a side.
    """
    if mask.ndim == 2:
        import cv2  # most predictions do without it

        _, numbers, stats, _ = cv2.connectedComponentsWithStatsWithAlgorithm(
            mask.view(np.uint8), connectivity, cv2.CV_32S, cv2.CCL_WU
        )
        left, top, width, height, sizes = stats[1:].T
        boxes = np.array([(top, top + height), (left, left + width)])
        return numbers, sizes, np.moveaxis(boxes, 2, 0)
    from scipy import ndimage  # which numbers volumes too

    numbers, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    boxes = [[(side.start, side.stop) for side in box] for box in ndimage.find_objects(numbers)]
    return numbers, count_numbers(numbers, count)[1:], np.reshape(boxes, (count, mask.ndim, 2))


def inside(box):
    """The index of a box of `number_pieces`."""
    return tuple(slice(*side) for side in box)


def class_masks(masks):
    """Yield (number, index of its box, bool array of that box) of each class that has pixels.

    masks: class numbers, uint8 of any shape, or the mask of each class by itself, bool (C, ...).
    """
    count = len(masks) if masks.dtype == bool else masks.max()
    for number in range(1, count + 1):
        mask, box = masks[number - 1] if masks.dtype == bool else masks == number, ()
        for axis in range(mask.ndim):
            places = np.flatnonzero(mask.any(tuple({*range(mask.ndim)} - {axis})))
            box += tuple(slice(int(first), int(places[-1]) + 1) for first in places[:1])
        if box:
            yield number, box, mask[box]


def count_numbers(numbers, count=255):
    """How often each of 1 to `count` is in an array: int64 (count + 1), with 0 for 0."""
    counts, flat = np.zeros(count + 1, np.int64), numbers.ravel(order="K")
    for start in range(0, flat.size, COUNTED_PIXELS):  # a pixel takes eight bytes
        counts += np.bincount(flat[start : start + COUNTED_PIXELS], minlength=count + 1)
    counts[0] = 0
    return counts


def are_single_pieces(labels, tolerance=0.1):
    """Whether each value of an integer array (H, W), beside 0, is one connected piece.

    tolerance: the fraction of the values that may be in several.
    """
    from scipy import ndimage  # which finds the boxes of thousands of values at once

    if labels.dtype not in (np.uint8, np.uint16):  # values up to any number
        _, numbers = np.unique(labels, return_inverse=True)
        labels = np.where(labels == 0, 0, numbers.reshape(labels.shape) + 1)
    boxes = [(number, box) for number, box in enumerate(ndimage.find_objects(labels), 1) if box]
    several = [len(number_pieces(labels[box] == number)[1]) > 1 for number, box in boxes]
    return bool(several) and sum(several) <= tolerance * len(several)


# ---- --clean ---------------------------------------------------------------------------------


def clean_labels(labels, clean, area=None):
    """Class numbers, uint8 (H, W), as --clean has them; 0 is background.

    clean: text such as 'min-area=50,largest,fill', or 'none'; its steps are taken in the order of
    CLEANINGS, for each class by itself. Where holes are filled, no other class is overwritten.
    area: mm2 of a pixel. Raises ValueError for min-mm2 where that is unknown.
    """
    steps = parse_named_values(clean, CLEANINGS)
    if not any(steps.values()):
        return labels
    labels = labels.copy()
    if any(steps.get(name) for name in ("min-area", "min-mm2", "largest")):
        for _, box, mask in class_masks(labels):
            labels[box][mask & ~_keep_pieces(mask, steps, area)] = 0
    if steps.get("fill"):
        _fill_holes(labels)
    if steps.get("split"):
        for _, box, mask in class_masks(labels):
            labels[box][find_cuts(mask)] = 0
    return labels


def _keep_pieces(mask, steps, area):
    """bool (H, W) -> bool (H, W) with the pieces that min-area, min-mm2 and largest leave.

    Of pieces of one size the first is kept, row by row from the top left.
    """
    fewest = steps.get("min-area", 0)
    if steps.get("min-mm2"):
        if area is None:
            raise ValueError("min-mm2 needs the size of the pixels in mm")
        fewest = max(fewest, steps["min-mm2"] / area)
    numbers, sizes, _ = number_pieces(mask)
    kept = sizes >= fewest * (1 - 1e-9)  # 0.3 mm2 of 0.1 are 3 pixels
    if steps.get("largest"):
        kept &= np.arange(len(sizes)) == sizes.argmax()
    return np.append(False, kept)[numbers]


def _fill_holes(labels):
    """Give the holes of each class its number, in place, where they are of no class.

    A hole is surrounded by pixels of one class, and nothing leads out of it over their sides
    (4-connectivity, as scipy's binary_fill_holes has it). A hole in an island in a hole belongs to
    the island.
    """
    holes, free = [], labels == 0
    for number, box, mask in class_masks(labels):
        numbers, sizes, boxes = number_pieces(~mask, connectivity=4)
        closed = (boxes[..., 0] > 0).all(1) & (boxes[..., 1] < mask.shape).all(1)
        for index in np.flatnonzero(closed):
            part = inside(boxes[index])
            hole = (numbers[part] == index + 1) & free[box][part]
            holes.append((sizes[index], number, labels[box][part], hole))
    for _, number, place, hole in sorted(holes, key=lambda hole: -hole[0]):  # the outer ones first
        place[hole] = number


def find_cuts(mask):
    """Lines of a bool array (H, W) that take objects that touch apart at their necks, (H, W).

    The lines of a watershed of the distance to the background: a pixel is of the peak to which the
    distance rises from it. Peaks between which there is no neck are of one object.
    """
    import cv2

    padded = np.pad(mask, 1).view(np.uint8)
    heights = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    flat, pixels, width = heights.ravel(), np.flatnonzero(padded), heights.shape[1]
    place, count = np.zeros(flat.size, np.int64), len(pixels)
    place[pixels] = uphill = np.arange(count)
    highest, steps = flat[pixels], [row * width + x for row in (-1, 0, 1) for x in (-1, 0, 1)]
    for step in steps:
        higher = flat[pixels + step] > highest
        uphill = np.where(higher, place[pixels + step], uphill)
        highest = np.maximum(highest, flat[pixels + step])
    peaks, saddles = _follow(uphill), []  # (height, peak, peak) where two basins touch
    for step in steps[5:]:  # of two neighbours, one way
        near = place[pixels + step]
        here = np.flatnonzero((peaks != peaks[near]) & (flat[pixels + step] > 0))
        lower = np.minimum(flat[pixels[here]], flat[pixels[near[here]]])
        saddles.append(np.stack([lower, *np.sort([peaks[here], peaks[near[here]]], 0)]))
    saddles = np.concatenate(saddles, 1)
    saddles = saddles[:, np.argsort(-saddles[0], kind="stable")]
    _, first = np.unique(saddles[1] * count + saddles[2], return_index=True)  # of two peaks
    objects, highest = np.arange(count), flat[pixels]
    for saddle, *ends in saddles[:, np.sort(first)].T.tolist():
        ends = [int(end) for end in ends]
        while ends != (further := objects[ends].tolist()):
            ends = further
        low, high = sorted(ends, key=highest.__getitem__)
        if highest[low] - saddle < max(NECK * highest[low], NECK_PIXELS):
            objects[low] = high
    numbers = np.zeros(heights.shape, np.float32)  # OpenCV dilates it, and it counts to 2^24
    objects = np.unique(_follow(objects)[peaks], return_inverse=True)[1]
    numbers.ravel()[pixels] = objects.ravel() + 1
    cuts = (cv2.dilate(numbers, np.ones((3, 3))) > numbers) & (numbers > 0)
    return cuts[1:-1, 1:-1]


def _follow(following):
    """Where each place leads, from place to place: an integer array (N,)."""
    while ((further := following[following]) != following).any():
        following = further
    return following


def measure_pieces(mask, start, spacing=None):
    """A dict of how many pieces a bool array (H, W), or (I, J, K) of a volume, has and how large.

    Their keys are columns of predictions.csv. start: where the array begins in its picture;
    spacing: mm of a pixel along each axis, or None. A piece lies at its centroid; pixel (0, 0) has
    its centre at 0, 0; x is along the columns of a picture, and along the first axis of a volume.
    Its diameter is the longest distance between the centres of two of its pixels.
    """
    numbers, sizes, boxes = number_pieces(mask)
    largest = int(sizes.argmax())
    piece, center = numbers[inside(boxes[largest])] == largest + 1, []
    for axis, first in enumerate((boxes[largest, :, 0] + start).tolist()):
        counts = piece.sum(tuple({*range(mask.ndim)} - {axis}))
        center.append(float(first + counts @ np.arange(len(counts)) / sizes[largest]))
    corners = hull_corners(piece)
    axes = [f"largest_{axis}" for axis in ("yx" if mask.ndim == 2 else "xyz")]
    return {
        "pieces": len(sizes),
        "mean_pixels": float(sizes.mean()),
        "median_pixels": float(np.median(sizes)),
        "largest_pixels": int(sizes[largest]),
        **dict(zip(axes, center, strict=True)),
        "largest_diameter": longest_distance(corners),
        "largest_diameter_mm": spacing and longest_distance(corners * np.array(spacing)),
    }


def hull_corners(piece):
    """Pixels of a bool array that are the corners of its convex hull, float64 (N, axes).

    The longest distance within it is between two of them (Shamos, "Computational Geometry", 1978).
    """
    inner = np.zeros_like(piece)  # any other pixel lies between the two ends of its row
    inner[..., 1:-1] = piece[..., :-2] & piece[..., 2:]
    points = np.argwhere(piece & ~inner).astype(np.int32)
    if piece.ndim == 2:
        import cv2

        return cv2.convexHull(points)[:, 0].astype(float)
    from scipy.spatial import ConvexHull

    # Around each, so that a straight row has a volume too: the corners stay those of the same ones.
    around = np.concatenate([np.eye(3), -np.eye(3)]) / 4
    around = (points[:, None] + around).reshape(-1, 3)
    return np.unique(np.rint(around[ConvexHull(around).vertices]), axis=0)


def longest_distance(points):
    """The longest distance between two of the points, an array (N, axes) of one or more."""
    parts = (points[start : start + 256, None] - points for start in range(0, len(points), 256))
    return float(max((part**2).sum(-1).max() for part in parts) ** 0.5)
