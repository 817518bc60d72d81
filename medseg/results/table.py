"""The table of measurements, predictions.csv, and what was predicted with, predictions.json."""

import csv
import hashlib
import io
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.pieces import Pieces, measure_pieces

COLUMNS = (
    *("image", "class", "pixels", "share", "area_mm2", "volume_ml", "pieces", "largest_pixels"),
    *("largest_x", "largest_y", "largest_diameter", "highest_probability", "mean_probability"),
    *("largest_diameter_mm", "largest_z", "series", "agreement", "unlike"),
)
# How these files begin: one that begins in another way is somebody else's.
BEGINNINGS = {".csv": "\ufeffimage,class,pixels,", ".json": '{\n "program": "predict.py",'}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is computed by spreadsheets
ROOT = Path(__file__).parents[2]


def measure(labels, class_names, highest, sums, *, spacing=None, depth=None):
    """A dict of measurements for each class of a picture or volume; None is what is not known.

    labels: class numbers, uint8 (H, W) of a picture, or of a volume (I, J, K) in its stored order.
    highest: the highest probability of each class, (C,); sums: that of `sum_probabilities`, (C,).
    spacing: mm of a pixel along each axis, or None. depth: mm that a picture stands for as a slice,
    or None. The keys are those of COLUMNS but for image and series; share is of 1.
    """
    from scipy import ndimage

    rows, boxes = [], ndimage.find_objects(labels)
    mm = None if spacing is None else float(np.prod(spacing))  # mm2 of a pixel, mm3 of a voxel
    for index, name in enumerate(class_names):
        box, pieces, pixels, center = None, Pieces(), 0, {}
        if index < len(boxes):
            box = boxes[index]
        if box is not None:
            mask = labels[box] == index + 1
            pixels, pieces = int(mask.sum()), measure_pieces(mask, spacing)
            place = [start.start + at for start, at in zip(box, pieces.center, strict=True)]
            # x is along the columns of a picture, and along the first axis of a volume.
            center = dict(zip("xyz", place if labels.ndim == 3 else place[::-1], strict=False))
        area = pixels * mm if mm and labels.ndim == 2 else None
        volume = pixels * mm / 1000 if mm and labels.ndim == 3 else None
        if depth and area is not None:
            volume = area * depth / 1000
        rows.append(
            {
                "class": name,
                "pixels": pixels,
                "share": pixels / labels.size,
                "area_mm2": area,
                "volume_ml": volume,
                "pieces": pieces.count,
                "largest_pixels": pieces.largest,
                **{f"largest_{axis}": center.get(axis) for axis in "xyz"},
                "largest_diameter": pieces.diameter,
                "largest_diameter_mm": pieces.diameter_mm,
                "highest_probability": float(highest[index]),
                "mean_probability": float(sums[index]) / pixels if pixels else None,
            }
        )
    return rows


def table_text(rows):
    """Rows, dicts with keys of COLUMNS and maybe others, as the text of a CSV file.

    Other keys become columns after COLUMNS. It begins with a byte order mark, by which Excel knows
    UTF-8, and a text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    others = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    columns = [*COLUMNS, *others]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return "\ufeff" + out.getvalue()


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def check_free(path):
    """ValueError where `path` (.csv or .json) cannot be written, or holds what is not ours."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder: remove it, or choose another --output")
    if not path.exists():
        return
    expected = BEGINNINGS[path.suffix].encode()
    try:
        with open(path, "rb") as file:
            beginning = file.read(len(expected))
        with open(path, "ab"):  # which a program that has it open may forbid
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}): {CLOSE}") from None
    if beginning and beginning != expected:
        raise ValueError(
            f"{path}: was not written by predict.py, or was changed: move it, or choose another "
            "--output"
        )


CLOSE = "close it in other programs, or choose another --output"


def write_text(path, text):
    """Write a table whole or not at all. Where that fails, it is kept beside, and a ValueError."""
    content = text.encode("utf-8", "backslashreplace")
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:  # someone has opened it since `check_free`
        other = path.with_stem(f"{path.stem}.{os.getpid()}")
        with atomic_write(other) as file:
            file.write(content)
        reason = f"{path}: cannot be written ({error.strerror})"
        raise ValueError(f"{reason}: what belongs there is in {other}") from None


def settings_text(settings):
    """A dict of plain values -> the text of predictions.json, which names its program first."""
    return json.dumps({"program": "predict.py", **settings}, indent=1) + "\n"


def file_sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def program_version():
    """The commit of this repository, or None where it was not cloned with git."""
    if not (ROOT / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return result.stdout.strip() or None
    return None


# ---- several processes -----------------------------------------------------------------------


class Parts:
    """What each process of torchrun found, left in files for the last of them to put together.

    folder: which all processes see. rank, world: the number of this process and of all.
    """

    def __init__(self, folder, rank, world):
        run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
        run = hashlib.sha256(" ".join(run).encode()).hexdigest()[:8]
        self._paths = [folder / f".predictions-{run}-{n}-of-{world}.part" for n in range(world)]
        self._own = self._paths[rank]
        for path in folder.glob(".predictions-*.part"):  # of runs that were stopped
            if path == self._own or (rank == 0 and path not in self._paths):
                path.unlink(missing_ok=True)

    def put(self, content):
        """Add the plain values of this process. Returns those of all in the last one, else []."""
        if len(self._paths) == 1:
            return [content]
        with atomic_write(self._own, sync=False) as file:
            file.write(json.dumps(content).encode())
        if not all(path.exists() for path in self._paths):
            return []
        taken = self._own.with_suffix(".taken")
        try:
            os.rename(self._paths[0], taken)  # of two that see all, one succeeds
        except FileNotFoundError:
            return []
        found = [taken, *self._paths[1:]]
        contents = [json.loads(path.read_bytes()) for path in found]
        for path in found:
            path.unlink()
        return contents
