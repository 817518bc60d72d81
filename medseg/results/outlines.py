"""Masks as outlines: polygons that give back every pixel where LabelMe draws them.

LabelMe, and our import, draw with Pillow's polygon: the pixels of vertices and edges belong to it,
and of a vertex only the whole numbers count. So the vertices are the centres of the pixels at the
border of a piece.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDES, CORNERS = 0.6, 0.4  # levels of a contour: pixels that touch at corners are apart, or not


class Outline(NamedTuple):
    """A polygon to be drawn over those before it.

    number: of the class, 0 for background. points: [(x, y)], 3 or more, in pixels whose first one
    reaches from 0 to 1.
    """

    number: int
    points: list


def trace_labels(labels):
    """[Outline] that, drawn one after the other, give class numbers, uint8 (H, W), bit for bit.

    A piece is one polygon, and what it surrounds is drawn after it: holes as background, pieces in
    them. Pixels that touch at a corner are of one piece. Only where two classes cross at corners,
    as on a chessboard, pieces have to be connected over sides.
    """
    for level in (CORNERS, SIDES):
        outlines, drawn = _trace(labels, level)
        if np.array_equal(drawn, labels):
            break
    return outlines


def _trace(labels, level):
    """([Outline], what they give when they are drawn) with classes connected as of `level`."""
    from scipy import ndimage

    regions = []  # (size of its box, number, box, bool array of that box)
    for number in np.unique(labels).tolist():
        corners = number and level == CORNERS
        parts, _ = ndimage.label(labels == number, np.ones((3, 3)) if corners else None)
        for index, box in enumerate(ndimage.find_objects(parts), 1):
            if number == 0 and _at_border(box, labels.shape):
                continue  # no hole
            area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
            regions.append((area, number, box, parts[box] == index))
    canvas = Image.new("L", labels.shape[::-1])
    draw, outlines = ImageDraw.Draw(canvas), []
    # What lies within another region has a smaller box, and comes after it.
    for _, number, box, region in sorted(regions, key=lambda region: -region[0]):
        points = _trace_region(region, level if number else SIDES)
        points = [(x + box[1].start, y + box[0].start) for x, y in points]
        if number == 0 and canvas.getpixel(tuple(map(int, points[0]))) == 0:
            continue  # background between classes, which no polygon covers
        draw.polygon(points, outline=number, fill=number)
        outlines.append(Outline(number, points))
    return outlines, np.asarray(canvas)


def _at_border(box, shape):
    return any(
        side.start == 0 or side.stop == length for side, length in zip(box, shape, strict=True)
    )


def _trace_region(region, level):
    """The outer border of a connected bool array (H, W) as a polygon through centres of pixels."""
    from contourpy import contour_generator

    padded = np.pad(region, 1).astype(np.float32)
    lines = contour_generator(z=padded).lines(level)
    outer = max(lines, key=lambda line: np.ptp(line, 0).sum())  # the others are those of holes
    # A vertex lies between two pixels, one of which is of the region.
    low, high = np.floor(outer).astype(int), np.ceil(outer).astype(int)
    inside = padded[low[:, 1], low[:, 0]] > 0
    pixels = np.where(inside[:, None], low, high) - 1
    return _corners(pixels)


def _corners(pixels):
    """A closed line through pixels, (N, 2) of x, y -> [(x, y)] of its corners, three or more.

    As fractions: LabelMe takes a second point in the place of the first for the end of the polygon.
    """
    steps = np.diff(pixels, axis=0)
    moves = steps.any(1)
    if not moves.any():  # a single pixel
        return [tuple((pixels[0] + part).tolist()) for part in ((0.2, 0.2), (0.8, 0.2), (0.5, 0.8))]
    corners, steps = pixels[:-1][moves], steps[moves]
    corners = corners[(steps != np.roll(steps, 1, 0)).any(1)]
    if len(corners) == 2:  # a straight line, there and back
        corners = np.append(corners, corners[:1], 0)
    points, first_again = corners + 0.5, (corners == corners[0]).all(1)
    points[1:][first_again[1:]] -= 0.25
    return [tuple(point) for point in points.tolist()]
