"""Connected pieces of masks: numbered, measured, removed, filled, taken apart."""

import math

import numpy as np

from medseg.cli import parse_named_values

# The steps of --clean, in the order in which they are taken: {name: (value where none is given,
# highest)}, for `medseg.cli.parse_named_values`. 0: leave the step out.
CLEANINGS = {
    "min-area": (None, 1e9),  # remove pieces of fewer pixels of the image
    "min-mm2": (None, 1e9),  # remove pieces of less area
    "largest": (1.0, 1.0),  # of the pieces that are left, keep the largest
    "fill": (1.0, 1.0),  # fill the holes of those
    "split": (1.0, 1.0),  # take objects that touch apart
}
WORDS = {
    "min-area": "no piece below {:g} pixels",
    "min-mm2": "no piece below {:g} mm2",
    "largest": "largest piece",
    "fill": "holes filled",
    "split": "touching objects split",
}
# A neck between two objects is lower than the lower of their peaks by this part of it, and by so
# many pixels: heights are distances to the background.
NECK, NECK_PIXELS = 0.25, 1.0


def read_clean(value):
    """{name of CLEANINGS: value above 0} of the steps to take: a clean-up, as `Inference` has it.

    value: such a dict, as weights hold it, or its text as --clean, reports and older weights have
    it: 'min-area=50,largest' or 'none'. Raises ValueError.
    """
    if isinstance(value, str):
        value = parse_named_values(value, CLEANINGS)
    return {name: float(value[name]) for name in CLEANINGS if value.get(name)}


def spell_clean(clean):
    """A clean-up as --clean has it, 'min-area=50,largest' or 'none'."""
    steps = [
        name if CLEANINGS[name][0] else f"{name}={value:.12g}" for name, value in clean.items()
    ]
    return ",".join(steps) or "none"


def check_clean(clean, spacing, path):
    """ValueError that names the image at `path` where --clean counts mm2 and has no `spacing`."""
    if "min-mm2" in clean and spacing is None:
        raise ValueError(
            f"{path}: does not tell the size of its pixels, which --clean {spell_clean(clean)} "
            "needs: give it with --pixel-size, or use min-area, which counts pixels"
        )


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
    sizes = [np.count_nonzero(numbers[inside(box)] == n) for n, box in enumerate(boxes, 1)]
    return numbers, np.array(sizes), np.reshape(boxes, (count, mask.ndim, 2))


def inside(box):
    """The index of a box of `number_pieces`."""
    return tuple(slice(*side) for side in box)


def class_mask(masks, number):
    """The mask of a class, a bool array, of masks as of `class_masks`."""
    return masks[number - 1] if masks.dtype == bool else masks == number


def class_masks(masks):
    """Yield (number, index of its box, bool array of that box) of each class that has pixels.

    masks: class numbers, uint8 of any shape, or the mask of each class by itself, bool (C, ...).
    """
    for number in range(1, (len(masks) if masks.dtype == bool else masks.max()) + 1):
        mask, box = class_mask(masks, number), ()
        for axis in range(mask.ndim):
            places = np.flatnonzero(mask.any(tuple({*range(mask.ndim)} - {axis})))
            box += tuple(slice(int(first), int(places[-1]) + 1) for first in places[:1])
        if box:
            yield number, box, mask[box]


# ---- --clean ---------------------------------------------------------------------------------


def clean_masks(masks, clean, spacing=None):
    """Masks, uint8 or bool as of `class_masks`, of a picture, after a clean-up; each class alone.

    clean: as of `read_clean`; its steps are taken in the order of CLEANINGS. Where holes are
    filled, no other class number is overwritten. spacing: mm of a pixel along each axis, which
    min-mm2 needs.
    """
    if not clean:
        return masks
    if masks.dtype == bool:  # classes that overlap
        return np.array([clean_masks(mask.view(np.uint8), clean, spacing) for mask in masks], bool)
    labels, fewest = masks.copy(), clean.get("min-area", 0)
    if "min-mm2" in clean:
        fewest = max(fewest, clean["min-mm2"] / math.prod(spacing))
    for _, box, mask in class_masks(labels) if fewest or "largest" in clean else ():
        numbers, sizes, _ = number_pieces(mask)
        kept = sizes >= fewest * (1 - 1e-9)  # 0.3 mm2 of 0.1 are 3 pixels
        if "largest" in clean:  # of pieces of one size the first, row by row from the top left
            kept &= np.arange(len(sizes)) == sizes.argmax()
        labels[box][mask & ~np.append(False, kept)[numbers]] = 0
    if "fill" in clean:
        _fill_holes(labels)
    for _, box, mask in class_masks(labels) if "split" in clean else ():
        labels[box][find_cuts(mask)] = 0
    return labels


def _fill_holes(labels):
    """Give the holes of each class its number, in place, where they are of no class.

    A hole is surrounded by pixels of one class, and nothing leads out of it over their sides
    (4-connectivity, as scipy's binary_fill_holes has it). A hole in an island in a hole belongs to
    the island.
    """
    import cv2

    filled, outlines = np.zeros_like(labels), []
    for number, (rows, columns), mask in class_masks(labels):
        way = {"mode": cv2.RETR_LIST, "method": cv2.CHAIN_APPROX_SIMPLE}
        lines, _ = cv2.findContours(mask.view(np.uint8), **way, offset=(columns.start, rows.start))
        outlines += [(cv2.contourArea(line), number, line) for line in lines]
    for _, number, line in sorted(outlines, key=lambda outline: -outline[0]):  # outer ones first
        cv2.drawContours(filled, [line], -1, number, cv2.FILLED)
    np.copyto(labels, filled, where=labels == 0)


def find_cuts(mask):
    """Lines of a bool array (H, W) that take objects that touch apart at their necks, (H, W).

    The lines of a watershed of the distance to the background: a pixel is of the peak to which the
    distance rises from it. Peaks between which there is no neck are of one object.
    """
    import cv2

    padded, square = np.pad(mask, 1).view(np.uint8), np.ones((3, 3))
    heights = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    flat, size, width = heights.ravel(), heights.size, heights.shape[1]
    # Each pixel leads to the highest of its neighbours and itself, of equal ones to the first.
    ranks = np.rint(heights.astype(float) ** 2) * size - np.arange(size).reshape(heights.shape)
    uphill = (-cv2.dilate(ranks, square) % size).astype(np.int64).ravel()
    peaks, saddles = _follow(uphill), {}
    for step in (1, width - 1, width, width + 1):  # to half of the neighbours
        lower = np.minimum(flat[:-step], flat[step:])
        for here in np.flatnonzero((peaks[:-step] != peaks[step:]) & (lower > 0)).tolist():
            ends = tuple(sorted((peaks[here], peaks[here + step])))
            saddles[ends] = max(saddles.get(ends, 0), lower[here])
    objects = np.arange(size)
    for ends, saddle in sorted(saddles.items(), key=lambda item: -item[1]):
        ends = list(ends)
        while ends != (further := objects[ends].tolist()):
            ends = further
        low, high = sorted(ends, key=flat.__getitem__)
        if flat[low] - saddle < max(NECK * flat[low], NECK_PIXELS):
            objects[low] = high
    numbers = np.unique(_follow(objects)[peaks], return_inverse=True)[1].reshape(heights.shape)
    numbers = (numbers + 1.0) * padded  # OpenCV dilates it
    cuts = (cv2.dilate(numbers, square) > numbers) & (numbers > 0)
    return cuts[1:-1, 1:-1]


def _follow(following):
    """Where each place leads, from place to place: an integer array (N,)."""
    while ((further := following[following]) != following).any():
        following = further
    return following
