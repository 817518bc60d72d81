"""What predict.py is to predict, and where it writes: files, folders, frames, volumes."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from medseg.cli import output_folder
from medseg.coco import ANNOTATIONS
from medseg.files import shorten
from medseg.formats.dicom import read_dicom
from medseg.formats.medical import (
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    base_name,
    file_format,
    result_name,
)
from medseg.images import SUFFIXES, read_image

# Weights that come with the repository, and what they are: docs/pretrained.md.
PRETRAINED = Path(__file__).parents[2] / "dataset" / "tumor.pth"
ABOUT_PRETRAINED = "brain tumours in MRI slices, test Dice 0.77"

OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "contact_sheet.jpg")
OWN_ENDINGS = ("_mask", "_overlay", "_montage")
OTHER_PICTURES = (".jp2", ".tga")  # suffixes that name no folder


class Picture(NamedTuple):
    """One picture to predict; load() -> PIL RGB image, or ValueError naming the file."""

    path: Path
    name: str  # what its mask is called, without the ending
    load: object


def pictures_in(path, window, name=None):
    """[Picture] of an image file: one, or of a DICOM file one for each frame.

    name: what its masks are called; default: its `result_name`.
    """
    name = name or result_name(path)
    if file_format(path) != "dicom":
        return [Picture(path, name, partial(read_image, path))]
    frames = read_dicom(path, window)
    if len(frames) == 1:
        return [Picture(path, name, partial(_frame, frames, 0))]
    return [
        Picture(path, f"{name}_f{number:03d}", partial(_frame, frames, number))
        for number in range(len(frames))
    ]


def sort_inputs(paths, window):
    """{file: name} -> ([Picture], [NIfTI volumes], [(file, why it cannot be read)])."""
    pictures, volumes, problems = [], [], []
    for path, name in paths.items():
        if file_format(path) == "nifti":
            volumes.append(path)
            continue
        try:
            pictures += pictures_in(path, window, name)
        except (FileNotFoundError, ValueError) as error:
            problems.append((path, str(error)))
    _check_names([(picture.name, picture.path) for picture in pictures])
    return pictures, volumes, problems


def _frame(frames, number):
    return Image.fromarray(frames[number]).convert("RGB")


def expand(inputs):
    """Files and folders -> {file with an image or volume: what its masks are called}.

    The name is the file's without its suffix; of images in one folder that differ in nothing else,
    with it: a.png and a.jpg become a_png and a_jpg. A name that is too long is shortened.
    Raises FileNotFoundError, and ValueError where there are none or two would share a name.
    """
    paths = []
    for given in map(Path, inputs):
        if given.is_dir():
            images = [path for path in sorted(given.iterdir()) if is_input(path)]
            if not images:
                suffixes = ", ".join((*SUFFIXES, *DICOM_SUFFIXES, *NIFTI_SUFFIXES))
                aside = left_aside(given)
                but = f", but {aside}" if aside else ""
                raise ValueError(f"{given}: no images ({suffixes}) in this folder{but}")
            paths += images
        elif given.exists():
            paths.append(given)
        else:
            raise FileNotFoundError(f"{given}: no such image or folder")
    names = {path: result_name(path) for path in paths}
    for _ in range(2):  # again, for a_png.png may be there too
        count = Counter((path.parent, name) for path, name in names.items())
        for path, name in names.items():
            if count[path.parent, name] > 1 and file_format(path) != "nifti":
                names[path] = _name_with_suffix(path)
    _check_names([(name, path) for path, name in names.items()])
    return names


def _name_with_suffix(path):
    """'a.png' -> 'a_png'"""
    name = base_name(path)
    return shorten(name + path.name[len(name) :].replace(".", "_"))


def _check_names(named):
    """ValueError where two of [(name, path)] share a name."""
    owners = {}
    for name, path in named:
        other = owners.setdefault(name, path)
        if other != path:
            raise ValueError(
                f"{path} and {other} would both become {name}_mask: "
                "predict them apart, with another --output"
            )


def left_aside(folder):
    """What in a folder is not predicted, counted: '.txt (3), folders (2)', or ''.

    The annotations of a data set are not counted.
    """
    counts = Counter()
    for path in folder.iterdir():
        if path.is_dir():
            counts["folders"] += 1
        elif not path.is_file():
            counts["special files and broken links"] += 1
        elif _is_own(path):
            counts["masks and pictures of these scripts"] += 1
        elif path.name != ANNOTATIONS and not is_input(path):
            counts[path.suffix.lower() or "no suffix"] += 1
    return ", ".join(f"{what} ({count})" for what, count in sorted(counts.items()))


def describe_left_out(problems, files, pictures):
    """A line on what could not be predicted.

    problems: [(file, why)], one for each picture; files, pictures: how many there are of each.
    """
    share = f"{len(problems)} of {pictures}"
    if pictures > files:  # some are frames of one file
        share += f" pictures, from {len({path for path, _ in problems})} of {files} files,"
    return f"{share} left out: {'; '.join(dict.fromkeys(why for _, why in problems))}"


def data_set_images():
    """The test images of the data set, or of the phantoms where there is none; sorted, or []."""
    for folder in (Path("dataset/test"), Path("dataset/synthetic/test")):
        images = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES]
        images = [path for path in images if is_input(path)]
        if images:
            return images
    return []


def default_model():
    """The weights to use where none are named: best_model.pth, else PRETRAINED, and says so."""
    own, here = Path("best_model.pth"), Path.cwd()
    if own.exists() or not PRETRAINED.exists():
        return str(own)
    path = PRETRAINED.relative_to(here) if PRETRAINED.is_relative_to(here) else PRETRAINED
    print(f"no {own} here: taking {path} ({ABOUT_PRETRAINED}; see docs/pretrained.md)")
    return str(path)


def is_input(path):
    """Whether a file in a folder is an image or volume, and not one that these scripts wrote."""
    if _is_own(path) or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or file_format(path) is not None


def _is_own(path):
    return path.name in OWN_PICTURES or base_name(path).endswith(OWN_ENDINGS)


def choose_output(given, single, inputs):
    """The folder to write to, made if need be, or for a single input the file that was named."""
    path = Path(given or ("." if single else "predictions"))
    volume = single and file_format(inputs[0]) == "nifti"
    endings = (*SUFFIXES, *OTHER_PICTURES, *NIFTI_SUFFIXES)
    if not given or path.is_dir() or not path.name.lower().endswith(endings):
        return output_folder(path, "--output")
    if not single:
        raise ValueError(f"--output {given}: several images need a folder, not one file")
    if volume and not path.name.lower().endswith(NIFTI_SUFFIXES):
        raise ValueError(f"--output {given}: the mask of a volume is written as .nii.gz or .nii")
    if not volume and path.suffix.lower() != ".png":
        raise ValueError(f"--output {given}: a mask is written as .png, which loses nothing")
    if path.exists() and any(path.samefile(other) for other in inputs):
        raise ValueError(f"--output {given}: that is the image itself; name another file")
    output_folder(path.parent, "--output")
    return path
