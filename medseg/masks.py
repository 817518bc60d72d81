"""Images and their masks, two folders or two files -> items for `write_dataset`."""

from dataclasses import dataclass
from pathlib import Path

from medseg.dataset import Item
from medseg.dicom import read_any_image
from medseg.files import check_regular
from medseg.images import SUFFIXES
from medseg.mask_values import Meaning, find_meaning, read_mask
from medseg.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, kind
from medseg.pairing import pair_files
from medseg.sources import (
    Upright,
    fit_mask,
    list_files,
    make_grouping,
    read_upright,
    unique_names,
)
from medseg.volume_masks import volume_items


def mask_items(images, masks, *, classes=None, group=None, window=None, skip_unpaired=False):
    """(items, class names) of the images below one folder and the masks below another.

    Two files are taken too. Images are pictures, DICOM files of one frame among them, with masks
    that are pictures; or NIfTI volumes with masks that are volumes, an item for each slice.
    Prints which mask was found for which image and what the values mean. classes: names for the
    foreground values in ascending order. group: a regular expression, see `make_grouping`.
    window: (center, width) of DICOM and NIfTI values. skip_unpaired: leave out images with no
    mask or several, else a ValueError.
    Raises ValueError or FileNotFoundError that names the file.
    """
    images, masks = Path(images), Path(masks)
    pairs = _find_pairs(images, masks, skip_unpaired)
    kinds = {kind(image) for image, _ in pairs}
    if window and kinds == {None}:
        raise ValueError(f"{images}: holds no DICOM or NIfTI files, which --window is for")
    root = images if images.is_dir() else images.parent
    relative = [image.relative_to(root) for image, _ in pairs]
    names, groups = unique_names(relative), list(map(make_grouping(group), relative))
    make_items = volume_items if "nifti" in kinds else _picture_items
    items, meaning = make_items(pairs, names, groups, masks, window)
    if classes:
        meaning.rename(classes)
    meaning.report()
    return items, meaning.classes


def _picture_items(pairs, names, groups, folder, window):
    """As `volume_items`, of pictures with masks that are pictures."""
    meaning = find_meaning([mask for _, mask in pairs], folder)
    items = []
    for pair, name, group in zip(pairs, names, groups, strict=True):
        items.append(Item(name, group, _Loader(*pair, meaning, window)))
    return items, meaning


@dataclass(frozen=True)
class _Loader:
    """What `Item.load` is for an image and its mask."""

    image: Path
    mask: Path
    meaning: Meaning
    window: tuple | None

    def __call__(self):
        if kind(self.image) == "dicom":
            picture = read_any_image(self.image, self.window)
            upright = Upright(picture, picture.size, 1)
        else:
            upright = read_upright(self.image)
        kind_of_mask, values = read_mask(self.mask)
        fitted = fit_mask(values, upright)
        if fitted is None:
            width, height = upright.size
            raise ValueError(
                f"{self.mask}: is {values.shape[1]}x{values.shape[0]}, but its image "
                f"{self.image} is {width}x{height}"
            )
        return upright.picture, self.meaning.split(kind_of_mask, fitted)


# ---------------------------------------------------------------- pairs


def _find_pairs(images, masks, skip_unpaired):
    """[(image, mask)], with what was found printed."""
    for path, other in ((images, masks), (masks, images)):
        check_regular(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder or file")
        if path.is_file() and other.is_dir():
            raise ValueError(f"{path} is a file and {other} a folder: name two of a kind")
    if images.is_file() and masks.is_file():
        _check_kinds([images, masks])
        print(f"pairs: 1, {images.name} and {masks.name}")
        return [(images, masks)]
    image_files, mask_files = _list_both(images, masks)
    pairing = pair_files(image_files, mask_files, images, masks)
    problem = _describe_unpaired(pairing, images, masks, len(image_files))
    if problem and not (skip_unpaired and pairing.pairs):
        raise ValueError(f"{problem}; --skip-unpaired goes on without these images")
    image, mask = pairing.pairs[0]
    print(f"pairs: {len(pairing.pairs)} by {pairing.rule}, such as {image.name} and {mask.name}")
    if problem:
        print(f"left out: {problem}")
    return pairing.pairs


def _list_both(images, masks):
    """The files below the folder of images and those below the folder of masks."""
    image_files = list_files(images, SUFFIXES, medical=True)
    mask_files = list_files(masks, (*SUFFIXES, *NIFTI_SUFFIXES))
    if images.samefile(masks):
        mask_files = [images / path.relative_to(masks) for path in mask_files]
        image_files = [path for path in image_files if kind(path) == "dicom"] or image_files
    elif images.resolve() in masks.resolve().parents:
        image_files = _outside(image_files, masks)
    elif masks.resolve() in images.resolve().parents:
        mask_files = _outside(mask_files, images)
    for folder, files, more in ((images, image_files, DICOM_SUFFIXES), (masks, mask_files, ())):
        if not files:
            suffixes = ", ".join((*SUFFIXES, *more, *NIFTI_SUFFIXES))
            raise ValueError(f"{folder}: holds no {suffixes} files")
    _check_kinds(image_files + mask_files)
    return image_files, mask_files


def _check_kinds(files):
    """ValueError where some files are volumes and others are not."""
    volumes = [path for path in files if kind(path) == "nifti"]
    if volumes and len(volumes) < len(files):
        other = next(path for path in files if kind(path) != "nifti")
        raise ValueError(
            f"{volumes[0]} is a volume and {other} is not: volumes need masks that are volumes, "
            "and folders of their own"
        )


def _outside(files, folder):
    folder = folder.resolve()
    return [path for path in files if folder not in path.resolve().parents]


def _describe_unpaired(pairing, images, masks, total):
    """One line on the images that have no mask or several, "" where all have one."""
    parts = []
    if pairing.missing:
        names = _first([str(image.relative_to(images)) for image in pairing.missing])
        parts.append(f"{len(pairing.missing)} of {total} images have no mask in {masks} ({names})")
    if pairing.several:
        names = []
        for image, found in pairing.several:
            shared = len(found) == 1
            candidates = _first([mask.name for mask in found])
            names.append(f"{image.name}: {candidates}{', as another image' if shared else ''}")
        total_several = f"{len(pairing.several)} of {total} images have several candidates"
        parts.append(f"{total_several} ({_first(names, '; ')})")
    return f"{images}: {' and '.join(parts)}" if parts else ""


def _first(names, separator=", "):
    return separator.join(names[:3]) + (f"{separator}..." if len(names) > 3 else "")
