"""The table of measurements, predictions.csv, and what was predicted with, predictions.json."""

import csv
import io
import json
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.pieces import class_masks, inside, number_pieces

COLUMNS = (
    *("image", "class", "pixels", "share", "area_mm2", "volume_ml", "pieces", "largest_pixels"),
    *("largest_x", "largest_y", "largest_diameter", "highest_probability", "mean_probability"),
    *("largest_diameter_mm", "largest_z", "series", "agreement", "unlike"),
    *("mean_pixels", "median_pixels", "first_object"),
)
ROOT = Path(__file__).parents[2]


def measure(masks, class_names, spacing=None, depth=None):
    """A dict of measurements for each class of a picture or volume; None is what is not known.

    masks: its `medseg.results.masks.Masks`, of a volume with what is measured in its stored order.
    spacing: mm of a pixel along each axis, or None. depth: mm that a picture stands for as a slice,
    or None. The keys are those of COLUMNS; share is of 1; first_object: the number of the first
    piece, see `number_objects`.
    """
    size, ndim = masks.labels.size, masks.labels.ndim
    mm = spacing and math.prod(spacing)  # mm2 of a pixel, mm3 of a voxel
    measured, rows, first = {}, [], 1
    for number, box, mask in class_masks(masks.measured):
        own = {"pixels": int(mask.sum()), "first_object": first}
        own["mean_probability"] = float(masks.sums[number - 1]) / own["pixels"]
        own |= _measure_pieces(mask, [side.start for side in box], spacing)
        measured[number], first = own, first + own["pieces"]
    for number, name in enumerate(class_names, 1):
        row = {"class": name, "pixels": 0, "pieces": 0, "largest_pixels": 0}
        row |= measured.get(number, {})
        row["share"] = row["pixels"] / size
        row["highest_probability"] = float(masks.highest[number - 1])
        if mm and ndim == 3:
            row["volume_ml"] = row["pixels"] * mm / 1000
        elif mm:
            row["area_mm2"] = row["pixels"] * mm
            row["volume_ml"] = depth and row["area_mm2"] * depth / 1000
        rows.append(dict.fromkeys(COLUMNS) | row)
    return rows


def table_text(rows):
    """Rows, dicts with keys of COLUMNS and maybe others, as the text of a CSV file.

    Other keys become columns after COLUMNS. It begins with a byte order mark, by which Excel knows
    UTF-8.
    """
    columns = dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)])
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {key: f"{one:.9g}" if isinstance(one, float) else one for key, one in row.items()}
        writer.writerow(cells)
    return "\ufeff" + out.getvalue()


def write_text(path, text):
    """Write a table whole or not at all. Where that fails, it is kept beside, and a ValueError."""
    content = text.encode("utf-8", "backslashreplace")
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:  # a program that has it open may forbid it
        other = path.with_stem(f"{path.stem}.{os.getpid()}")
        with atomic_write(other) as file:
            file.write(content)
        reason = f"{path}: cannot be written ({error.strerror})"
        raise ValueError(f"{reason}: what belongs there is in {other}") from None


def settings_text(settings):
    """A dict of plain values -> the text of predictions.json, which names its program first."""
    return json.dumps({"program": "predict.py", **settings}, indent=1) + "\n"


def program_version():
    """The commit of this repository, or None where it was not cloned with git."""
    with suppress(OSError, IndexError):  # running git would take longer than all of this file
        return (ROOT / ".git/logs/HEAD").read_bytes().splitlines()[-1].split()[1].decode()
    return None


def _measure_pieces(mask, start, spacing=None):
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
    corners = _hull_corners(piece)
    axes = [f"largest_{axis}" for axis in ("yx" if mask.ndim == 2 else "xyz")]
    return {
        "pieces": len(sizes),
        "mean_pixels": float(sizes.mean()),
        "median_pixels": float(np.median(sizes)),
        "largest_pixels": int(sizes[largest]),
        **dict(zip(axes, center, strict=True)),
        "largest_diameter": _longest_distance(corners),
        "largest_diameter_mm": spacing and _longest_distance(corners * np.array(spacing)),
    }


def _hull_corners(piece):
    """Pixels of a bool array, among them the corners of its convex hull, float64 (N, axes).

    The longest distance within it is between two of them (Shamos, "Computational Geometry", 1978).
    Of a volume, the corners of each of its slices.
    """
    import cv2

    corners = []
    for index, part in enumerate(piece if piece.ndim == 3 else piece[None]):
        way = {"mode": cv2.RETR_EXTERNAL, "method": cv2.CHAIN_APPROX_SIMPLE}
        if lines := cv2.findContours(part.view(np.uint8), **way)[0]:
            hull = cv2.convexHull(np.concatenate(lines))[:, 0, ::-1]
            corners.append(np.insert(hull, 0, index, 1))
    return np.concatenate(corners)[:, -piece.ndim :].astype(float)


def _longest_distance(points):
    """The longest distance between two of the points, an array (N, axes) of one or more."""
    parts = (points[start : start + 256, None] - points for start in range(0, len(points), 256))
    return float(max((part**2).sum(-1).max() for part in parts) ** 0.5)
