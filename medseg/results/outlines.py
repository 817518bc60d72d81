"""Masks as outlines: polygons that give back every pixel where LabelMe draws them.

LabelMe, and our import, draw with Pillow's polygon: the pixels of vertices and edges belong to it,
and of a vertex only the whole numbers count. So the vertices are the centres of the pixels at the
border of a piece.
"""

import numpy as np
from PIL import Image, ImageDraw

from medseg.pieces import class_masks, inside, number_pieces

SINGLE = np.array([(0.2, 0.2), (0.8, 0.2), (0.5, 0.8)])  # a polygon within a pixel


def trace_labels(labels, simplify=0):
    """[(number, points)]: polygons that, one drawn over the other, give back labels to the pixel.

    labels: class numbers, uint8 (H, W). number: of the class, 0 for background. points: [(x, y)], 3
    or more, in pixels whose first one reaches from 0 to 1. A piece, whose pixels are connected over
    their sides, is one polygon, and what it surrounds is drawn after it: holes as background,
    pieces in them.
    simplify: pixels by which an outline may pass its pixels' centres, for fewer points; 0: exact.
    """
    regions = []  # (pixels of its box, number, x and y of its box, bool array of that box)
    whole = np.s_[: labels.shape[0], : labels.shape[1]]
    for number, box, mask in (*class_masks(labels), (0, whole, labels == 0)):
        numbers, _, boxes = number_pieces(mask, connectivity=4)
        for index, ends in enumerate(boxes, 1):
            if number or ((ends[:, 0] > 0) & (ends[:, 1] < labels.shape)).all():  # a hole
                region = numbers[inside(ends)] == index
                corner = box[1].start or 0, box[0].start or 0
                regions.append((region.size, number, corner + ends[::-1, 0], region))
    canvas = Image.new("L", labels.shape[::-1])
    draw, outlines = ImageDraw.Draw(canvas), []
    # What lies within another region has a smaller box, and comes after it.
    for _, number, corner, region in sorted(regions, key=lambda region: -region[0]):
        points = _trace_region(region, corner, simplify)
        if number == 0 and canvas.getpixel(tuple(map(int, points[0]))) == 0:
            continue  # background between classes, which no polygon covers
        draw.polygon(points, outline=number, fill=number)
        outlines.append((number, points))
    return outlines


def _trace_region(region, corner, simplify):
    """The outer border of a connected bool array, as [(x, y)] of its corners, three or more.

    corner: x, y of its first pixel. As fractions: LabelMe takes a second point in the place of the
    first for the end of the polygon.
    """
    import cv2

    mode, method = cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    (line,), _ = cv2.findContours(region.view(np.uint8), mode, method)
    if simplify and len(thinned := cv2.approxPolyDP(line, simplify, True)) > 2:
        line = thinned
    corners = line[:, 0] + corner
    if len(corners) == 1:  # a single pixel
        return [tuple(point) for point in (corners + SINGLE).tolist()]
    if len(corners) == 2:  # a straight line, there and back
        corners = np.append(corners, corners[:1], 0)
    points, first_again = corners + 0.5, (corners == corners[0]).all(1)
    points[1:][first_again[1:]] -= 0.25
    return [tuple(point) for point in points.tolist()]
