"""Images and their masks, two folders or two files -> examples for `write_dataset`."""

from functools import partial
from pathlib import Path

from medseg.files import check_regular
from medseg.formats.dicom import read_any_image
from medseg.formats.mask_files import MASK_SUFFIXES
from medseg.formats.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, file_format
from medseg.images import SUFFIXES
from medseg.importing.collect import (
    Upright,
    find_groups,
    fit_mask,
    list_files,
    printable,
    read_upright,
    tell_apart,
    unique_names,
)
from medseg.importing.mask_values import find_classes
from medseg.importing.pairing import pair_files
from medseg.importing.volumes import volume_examples
from medseg.importing.writing import Example, check_window
from medseg.settings import OF_FILE, OF_VOLUME


def mask_examples(
    images,
    masks,
    *,
    classes=None,
    invert=False,
    group=None,
    window=None,
    skip_unpaired=False,
    present=(),
):
    """(examples, class names, info) of the images below one folder and the masks below another.

    Two files are taken too. Images are pictures, DICOM files of one frame among them, with masks
    that are pictures; or NIfTI volumes with masks that are volumes, an example for each slice.
    Several masks of one picture (x_mask, x_mask_1) are united, class by class.
    Prints which mask was found for which image and what the values mean. classes and invert: as
    `find_classes` has them. group: a regular expression, see `find_groups`.
    window: (center, width) of DICOM and NIfTI values. skip_unpaired: leave out images with no
    mask or with several that may be meant, and masks of no image, else a ValueError. present: of
    `present_settings`, the splits that stay: the window has to be theirs, and volumes are turned to
    their orientation. info: what to record of window and orientation, as `read_settings` reads it.
    Raises ValueError or FileNotFoundError that names the file.
    """
    images, masks = Path(images), Path(masks)
    pairs = _find_pairs(images, masks, skip_unpaired)
    formats = {file_format(image) for image, _ in pairs}
    if window and formats == {None}:
        raise ValueError(f"{images}: holds no DICOM or NIfTI files, which --window is for")
    root = images if images.is_dir() else images.parent
    relative = [image.relative_to(root) for image, _ in pairs]
    names, groups = unique_names(relative), find_groups(relative, group)
    info = {"window": _window_of(formats, window)}
    check_window(present, info["window"])
    if "nifti" in formats:
        pairs = [(image, mask) for image, (mask,) in pairs]
        turned_to = [(own["orientation"], folder) for folder, own in present if own["orientation"]]
        examples, mask_classes, info["orientation"] = volume_examples(
            pairs,
            names,
            groups,
            masks,
            classes,
            window,
            invert=invert,
            present=next(iter(turned_to), None),
        )
    else:
        mask_files = [mask for _, own in pairs for mask in own]
        mask_classes = find_classes(mask_files, masks, classes, invert=invert)
        examples = []
        for (image, own_masks), name, own_group in zip(pairs, names, groups, strict=True):
            read = partial(_read_example, image, own_masks, mask_classes, window)
            examples.append(Example(name, own_group, read))
    mask_classes.report()
    return examples, mask_classes.names, {key: value for key, value in info.items() if value}


def _window_of(formats, window):
    """The window to record of images of these formats, where --window is `window`."""
    if window:
        return tuple(window)
    return OF_VOLUME if "nifti" in formats else OF_FILE if "dicom" in formats else None


def _read_example(image, masks, mask_classes, window):
    """What `Example.read` returns, of the paths of a picture and of its masks."""
    if file_format(image) == "dicom":
        picture = read_any_image(image, window)
        upright = Upright(picture, picture.size, 1)
    else:
        upright = read_upright(image)
    united = {}
    for path in masks:
        encoding, values = mask_classes.read(path)
        fitted = fit_mask(values, upright)
        if fitted is None:
            width, height = upright.size
            raise ValueError(
                f"{path}: is {values.shape[1]}x{values.shape[0]}, but its image "
                f"{image} is {width}x{height}"
            )
        for name, runs in mask_classes.to_masks(encoding, fitted).items():
            united[name] = united[name] | runs if name in united else runs
    return upright.image, united


# ---------------------------------------------------------------- pairs


def _find_pairs(images, masks, skip_unpaired):
    """[(image, its masks)], with what was found printed."""
    for path, other in ((images, masks), (masks, images)):
        check_regular(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such folder or file")
        if path.is_file() and other.is_dir():
            raise ValueError(f"{path} is a file and {other} a folder: name two of a kind")
    if images.is_file() and masks.is_file():
        _check_formats([images, masks])
        print(f"pairs: 1, {images.name} and {masks.name}")
        return [(images, (masks,))]
    if images.samefile(masks):
        masks = images  # spelled in one way, though one may be a link to the other
    image_files, mask_files = _list_both(images, masks)
    pairing = pair_files(image_files, mask_files, images, masks)
    if file_format(image_files[0]) == "nifti":  # mask volumes are not united
        pairing.several += [pair for pair in pairing.pairs if len(pair[1]) > 1]
        pairing.pairs = [pair for pair in pairing.pairs if len(pair[1]) == 1]
    # In one folder, every file is listed as an image and as a mask.
    n_images = len(pairing.pairs) + len(pairing.missing) + len(pairing.several)
    totals = n_images, len(set(mask_files).difference(image_files))
    problem = _describe_unpaired(pairing, images, masks, *totals)
    if problem and not (skip_unpaired and pairing.pairs):
        raise ValueError(f"{problem}; --skip-unpaired goes on without these files")
    _report(pairing)
    if problem:
        print(f"left out: {problem}")
    return pairing.pairs


def _report(pairing):
    """Print how many pairs were found, by which rule, and how many masks are united."""
    image, (mask, *_) = pairing.pairs[0]
    names = f"{printable(image.name)} and {printable(mask.name)}"
    line = f"pairs: {len(pairing.pairs)} by {pairing.rule}, such as {names}"
    united = sum(len(masks) > 1 for _, masks in pairing.pairs)
    if united:
        have = "image has" if united == 1 else "images have"
        line += f"; {united} {have} several masks, united"
    print(line)


def _list_both(images, masks):
    """The files below the folder of images and those below the folder of masks."""
    image_files = list_files(images, SUFFIXES, medical=True)
    mask_files = list_files(masks, (*MASK_SUFFIXES, *NIFTI_SUFFIXES))
    if images == masks:
        image_files = [path for path in image_files if file_format(path) == "dicom"] or image_files
    elif images.resolve() in masks.resolve().parents:
        image_files = _outside(image_files, masks)
    elif masks.resolve() in images.resolve().parents:
        mask_files = _outside(mask_files, images)
    image_suffixes = (*SUFFIXES, *DICOM_SUFFIXES)
    for folder, files, own in (
        (images, image_files, image_suffixes),
        (masks, mask_files, MASK_SUFFIXES),
    ):
        if not files:
            suffixes = ", ".join((*own, *NIFTI_SUFFIXES))
            raise ValueError(f"{folder}: holds no {suffixes} files")
    _check_formats(image_files + mask_files)
    return image_files, mask_files


def _check_formats(files):
    """ValueError where some files are volumes and others are not."""
    volumes = [path for path in files if file_format(path) == "nifti"]
    if volumes and len(volumes) < len(files):
        other = next(path for path in files if file_format(path) != "nifti")
        raise ValueError(
            f"{volumes[0]} is a volume and {other} is not: volumes need masks that are volumes, "
            "and folders of their own"
        )


def _outside(files, folder):
    folder = folder.resolve()
    return [path for path in files if folder not in path.resolve().parents]


def _describe_unpaired(pairing, images, masks, total, total_masks):
    """One line on the files that are in no pair, "" where all are."""
    parts = []
    if pairing.missing:
        names = _first([str(image.relative_to(images)) for image in pairing.missing])
        parts.append(f"{len(pairing.missing)} of {total} images have no mask in {masks} ({names})")
    if pairing.several:
        names = []
        for image, candidates in pairing.several:
            shared = ", as another image" if len(candidates) == 1 else ""
            listed = _first([str(mask.relative_to(masks)) for mask in candidates])
            names.append(f"{image.relative_to(images)}: {listed}{shared}")
        total_several = f"{len(pairing.several)} of {total} images have several candidates"
        parts.append(f"{total_several} ({_first(names, '; ')})")
    if pairing.surplus:
        names = _first([str(mask.relative_to(masks)) for mask in pairing.surplus])
        n_surplus = f"{len(pairing.surplus)} of {total_masks} masks"
        parts.append(f"{n_surplus} in {masks} belong to no image ({names})")
    return f"{images}: {' and '.join(parts)}" if parts else ""


def _first(names, separator=", "):
    shown = tell_apart(names[:3])
    return separator.join(shown + ["..."] * (len(names) > 3))
