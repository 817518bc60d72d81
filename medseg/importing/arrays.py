"""Files that each hold an image and its mask as arrays: .npz, and .mat of MATLAB v7.3."""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.coco import listed
from medseg.files import import_reader, name_file, parallel_map
from medseg.images import MEASURED_PIXELS, as_picture
from medseg.importing.collect import find_groups, list_files, unique_names
from medseg.importing.values import VOLUME, Counted, classes_of_counts, count_values
from medseg.importing.writing import Example, agreed_window
from medseg.masks import whole_numbers
from medseg.samples import to_uint8

KEYS = (("image", "img"), ("label", "mask"))  # of a .npz file
TUMOURS = {1: "meningioma", 2: "glioma", 3: "pituitary"}  # labels of Figshare's brain tumours
CASE = re.compile(r"(case\d+)_slice\d+")  # of Synapse, as TransUNet has it


class Arrays(NamedTuple):
    """image: (H, W) or (H, W, C). labels: whole numbers (H, W). group: or ""."""

    image: np.ndarray
    labels: np.ndarray
    group: str = ""


def array_examples(folder, *, classes=None, group=None, prefix="", present=()):
    """(examples, class names, info) of the .npz and .mat files below a folder.

    classes: names of the values that are not 0, ascending. group: a table, see `find_groups`;
    by default the patient of a .mat file, and the case of case0005_slice000.npz.
    info: the window of images of more than 8 bits. Raises ValueError that names the file.
    """
    folder = Path(folder)
    paths = list_files(folder, (".npz", ".mat"))
    if not paths:
        raise ValueError(f"{folder}: holds no .npz and no .mat files")
    counted, groups, greys = zip(*parallel_map(_look_into, paths, catch=()), strict=True)
    meaning = classes_of_counts(counted, classes)
    meaning.report()
    relative = [path.relative_to(folder) for path in paths]
    groups = find_groups(relative, group) if group or not any(groups) else groups
    measured = None
    if all(grey.size for grey in greys):
        low, high = np.percentile(np.concatenate(greys), (0.5, 99.5)).tolist()
        measured = ((low + high) / 2, high - low) if low < high else None
    window = agreed_window(measured, None, present)
    examples = []
    for stem, own_group, path in zip(unique_names(relative, prefix), groups, paths, strict=True):
        read = partial(_read_example, path, meaning, window)
        examples.append(Example(stem, own_group, read))
    return examples, meaning.names, {"window": window} if window else {}


def _look_into(path):
    """(Counted of its mask, group, some grey values; none of 8 bits) of a file."""
    arrays, is_mat = read_arrays(path), path.suffix.lower() == ".mat"
    grey = arrays.image.ravel()[:: -(-arrays.image.size // MEASURED_PIXELS)].astype(np.float64)
    grey = grey[np.isfinite(grey)] if arrays.image.dtype.itemsize > 1 else grey[:0]
    counts = count_values(arrays.labels)
    return Counted(path, VOLUME, counts, stated=TUMOURS if is_mat else {}), arrays.group, grey


def _read_example(path, meaning, window):
    """What `Example.read` returns."""
    arrays = read_arrays(path)
    with name_file(path):
        picture = as_picture(to_uint8(arrays.image, window=window))
    return picture, meaning.to_masks(VOLUME, arrays.labels)


def read_arrays(path):
    """The Arrays in a file. Raises ValueError that names it."""
    with name_file(path):
        arrays = _read_mat(path) if path.suffix.lower() == ".mat" else _read_npz(path)
        image, labels = arrays.image, arrays.labels
        if labels.ndim != 2 or labels.shape != image.shape[:2] or image.ndim not in (2, 3):
            raise ValueError(f"an image {image.shape} with a mask {labels.shape}: not (H, W) both")
        return arrays._replace(labels=whole_numbers(labels, path))


def _read_npz(path):
    with np.load(path) as file:
        keys = [next((key for key in own if key in file), "") for own in KEYS]
        if "" in keys:
            raise ValueError(f"has {listed(file.files)}, but no image and label, or img and mask")
        case = CASE.match(path.name)
        return Arrays(file[keys[0]], file[keys[1]], case[1] if case else "")


def _read_mat(path):
    h5py = import_reader("h5py", "MATLAB v7.3")
    with h5py.File(path) as file:
        if "cjdata" not in file:
            raise ValueError("has no cjdata, as Figshare's brain tumours have")
        image, mask, label, patient = (
            file["cjdata"][key][()] for key in ("image", "tumorMask", "label", "PID")
        )
    # MATLAB stores columns first, and text as numbers.
    return Arrays(image.T, mask.T * int(label.item()), "".join(map(chr, patient.ravel())))
