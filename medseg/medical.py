"""Medical files: what kind a file is, its name, its window, and the optional libraries."""

import contextlib
import importlib
import itertools
import math
import warnings
from pathlib import Path

import numpy as np

from medseg.cli import one_line
from medseg.files import check_regular, shorten

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
NIFTI_SUFFIXES = (".nii.gz", ".nii")
# What grey values are scaled from where no --window was given: a volume's percentiles, or the
# window in the file.
OF_VOLUME, OF_FILE = "percentiles", "file"
# Where the three axes of an array lead, as `nibabel.aff2axcodes` has it: "RAS", "LPS", ... (48).
ORIENTATIONS = frozenset(
    "".join(letters)
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for letters in itertools.product(*axes)
)


def kind(path):
    """'dicom', 'nifti' or None: by the suffix; without one, or with a number, by the content."""
    path = Path(path)
    name = path.name.lower()
    if name.endswith(DICOM_SUFFIXES):
        return "dicom"
    if name.endswith(NIFTI_SUFFIXES):
        return "nifti"
    if path.suffix and not path.suffix[1:].isdecimal():
        return None
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(348)
    except OSError:
        return None
    if head[128:132] == b"DICM":
        return "dicom"
    return "nifti" if nifti_version(head) else None


def base_name(path):
    """The name of an image file without its suffix: 'a.nii.gz' -> 'a', '1.2.840' -> '1.2.840'."""
    path = Path(path)
    for suffix in NIFTI_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name if path.suffix[1:].isdecimal() else path.stem


def result_name(path):
    """What the results of an image file are called: its `base_name`, shortened where it is long."""
    return shorten(base_name(path))


def mask_name(path):
    """The file name of the mask of a volume: 'a.nii.gz' -> 'a_mask.nii.gz'."""
    return f"{result_name(path)}_mask.nii.gz"


def nifti_version(head):
    """1 or 2 by the first 348 bytes of a file that holds header and voxels, else None."""
    if head[344:348] == b"n+1\0":
        return 1
    return 2 if head[4:8] == b"n+2\0" else None


def window_limits(window):
    """(center, width) -> (low, high). ValueError for a width that is not above 0."""
    center, width = map(float, window)
    if not (math.isfinite(center) and 0 < width < math.inf):
        raise ValueError(f"a window of center {center:g} and width {width:g} shows nothing")
    return center - width / 2, center + width / 2


def read_settings(mapping):
    """What prediction has to do as the import did: {"window": ..., "orientation": ...}.

    mapping: anything's metadata, which may lack both and hold more. window: (center, width),
    OF_VOLUME (the percentiles of each), OF_FILE (DICOM's own window), or None of pictures.
    orientation: that all volumes were turned to, one of ORIENTATIONS, or None.
    Raises ValueError for other values.
    """
    window, orientation = mapping.get("window"), mapping.get("orientation")
    if isinstance(window, (list, tuple)):
        numbers = [value for value in window if type(value) in (int, float) and abs(value) < 1e300]
        if len(numbers) != 2 or len(window) != 2:
            raise ValueError(f"window {window!r:.60}")
        window_limits(window)
        window = (float(window[0]), float(window[1]))
    elif not (window is None or isinstance(window, str) and window in (OF_VOLUME, OF_FILE)):
        raise ValueError(f"window {window!r:.60}")
    if orientation is not None:
        if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
            raise ValueError(f"orientation {orientation!r:.60}")
    return {"window": window, "orientation": orientation}


def spell_window(window):
    """The window of `read_settings` in words."""
    words = {
        None: "none recorded",
        OF_VOLUME: "the 0.5 to 99.5 percentiles of each volume",
        OF_FILE: "that of each file",
    }
    return words[window] if window in words else " ".join(map(spell_number, window))


def spell_number(value):
    """40.0 -> '40', 0.1 -> '0.1': no digit is lost."""
    return repr(float(value)).removesuffix(".0")


def choose_window(given, trained):
    """(center, width) to predict with, or None for each file's own limits.

    given: --window, (center, width) or None; it wins, and is told where it differs. trained: the
    window of the weights.
    """
    if given and trained not in (None, tuple(given)):
        print(
            f"--window {spell_window(given)}: the weights were trained with another window, "
            f"{spell_window(trained)}"
        )
    return given or (trained if isinstance(trained, tuple) else None)


def window_to_uint8(values, low, high):
    """Array of numbers -> uint8 array: low and below 0, high and above 255, linear between.

    NaN becomes 0. Where high is not above low, everything above low becomes 255.
    """
    scaled = np.array(values, np.float64)  # a copy, and no other: a slice may have 89 megapixels
    if not high > low:
        return np.where(scaled > low, np.uint8(255), np.uint8(0))
    with np.errstate(all="ignore"):
        np.clip(scaled, low, high, out=scaled)
        scaled -= low
        scaled *= 255
        scaled /= high - low
        return np.nan_to_num(scaled, copy=False).round(out=scaled).astype(np.uint8)


@contextlib.contextmanager
def name_file(path):
    """Turn whatever a reader raises into one line that begins with the file's name.

    Only regular files are read: see `check_regular`.
    """
    try:
        check_regular(path)
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not a file") from None
    except PermissionError:
        raise
    except Exception as error:  # pydicom, nibabel, zlib and decoders raise many kinds
        line = one_line(error)
        raise ValueError(line if line.startswith(f"{path}: ") else f"{path}: {line}") from None


def import_reader(name, format_name):
    """Import pydicom or nibabel, with their warnings off. ValueError where it is missing."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"reading {format_name} needs {name}: run `pip install {name}`") from None
    # They warn of odd metadata and mend it; pixels they cannot read are errors.
    warnings.filterwarnings("ignore", module=rf"{name}\.")
    return module
