"""What predict.py is to predict, and where it writes: files, folders, frames, volumes."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from medseg.cli import output_folder
from medseg.dicom import read_dicom
from medseg.images import SUFFIXES, read_image
from medseg.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, base_name, kind

# Weights that come with the repository, and what they are: docs/pretrained.md.
PRETRAINED = Path(__file__).parent.parent / "dataset" / "tumor.pth"
ABOUT_PRETRAINED = "brain tumours in MRI slices, test Dice 0.77"

OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "contact_sheet.jpg")
OWN_ENDINGS = ("_mask", "_overlay", "_montage")
OTHER_PICTURES = (".gif", ".webp", ".jp2", ".tga", ".ppm")  # suffixes that name no folder


class Picture(NamedTuple):
    """One picture to predict; load() -> PIL RGB image, or ValueError naming the file."""

    path: Path
    name: str  # what its mask is called, without the ending
    load: object


def pictures_in(path, window):
    """[Picture] of an image file: one, or of a DICOM file one for each frame."""
    if kind(path) != "dicom":
        return [Picture(path, base_name(path), partial(read_image, path))]
    frames, name = read_dicom(path, window), base_name(path)
    if len(frames) == 1:
        return [Picture(path, name, partial(_frame, frames, 0))]
    return [
        Picture(path, f"{name}_f{number:03d}", partial(_frame, frames, number))
        for number in range(len(frames))
    ]


def sort_inputs(paths, window):
    """Files -> ([Picture], [NIfTI volumes], lines on the files that cannot be read)."""
    pictures, volumes, problems = [], [], []
    for path in paths:
        if kind(path) == "nifti":
            volumes.append(path)
            continue
        try:
            pictures += pictures_in(path, window)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    return pictures, volumes, problems


def _frame(frames, number):
    return Image.fromarray(frames[number]).convert("RGB")


def expand(inputs):
    """Files and folders -> list of files with images or volumes.

    Raises FileNotFoundError, and ValueError where there are none or two would share a name.
    """
    paths = []
    for given in map(Path, inputs):
        if given.is_dir():
            images = [path for path in sorted(given.iterdir()) if is_input(path)]
            if not images:
                suffixes = ", ".join((*SUFFIXES, *DICOM_SUFFIXES, *NIFTI_SUFFIXES))
                raise ValueError(f"{given}: no images ({suffixes}) in this folder")
            paths += images
        elif given.exists():
            paths.append(given)
        else:
            raise FileNotFoundError(f"{given}: no such image or folder")
    names = {}
    for path in paths:
        other = names.setdefault(base_name(path), path)
        if other != path:
            raise ValueError(
                f"{path} and {other} would both become {base_name(path)}_mask: "
                "predict them apart, with another --output"
            )
    return list(names.values())


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
    if path.name in OWN_PICTURES or base_name(path).endswith(OWN_ENDINGS) or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or kind(path) is not None


def choose_output(given, single, inputs):
    """The folder to write to, made if need be, or for a single input the file that was named."""
    path = Path(given or ("." if single else "predictions"))
    volume = single and kind(inputs[0]) == "nifti"
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
