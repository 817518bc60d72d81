"""Medical files: the format of a file, its name, its window, and the optional libraries."""

import contextlib
import importlib
import warnings
from pathlib import Path

import numpy as np

from medseg.cli import one_line
from medseg.files import check_regular, shorten

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
NIFTI_SUFFIXES = (".nii.gz", ".nii")


def file_format(path):
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


def is_spacing(numbers):
    """Whether these can be mm from pixel to pixel: areas of others would overflow, or be 0."""
    return all(1e-9 < number < 1e9 for number in numbers)


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
