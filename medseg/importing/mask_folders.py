"""Images and their masks, as `--masks` names them -> examples for `write_dataset`."""

import os
from dataclasses import replace
from functools import partial
from itertools import chain

from medseg.coco import listed
from medseg.dicom import read_dicom
from medseg.files import base_name, file_format
from medseg.images import as_picture, read_image
from medseg.importing.class_names import one_class
from medseg.importing.collect import (
    Upright,
    find_groups,
    fit_mask,
    printable,
    read_upright,
    split_pages,
    unique_names,
)
from medseg.importing.pairs import advise_groups
from medseg.importing.values import find_classes
from medseg.importing.volumes import volume_examples
from medseg.importing.writing import Example, picture_window
from medseg.modalities import Modalities, channels_of, format_of, read_channels
from medseg.patterns import name_pattern
from medseg.samples import count_pages
from medseg.settings import (
    MAX_CHANNELS,
    OF_FILE,
    OF_VOLUME,
    check_channels,
    check_window,
    count_recorded,
)


def mask_examples(
    cases, texts, *, classes=None, group=None, prefix="", channels=(), present=(), **options
):
    """(examples, class names, info) of [Pair] and the two patterns that they are of.

    Images are pictures, DICOM files of one frame among them, with masks that are pictures; or
    volumes with masks that are volumes, an example for each slice. Several masks of one image are
    united, class by class. The pages of a TIFF file are an example each. An image is named by what
    identifies it. Prints which mask was found for which image and what the values mean.
    classes: as `find_classes` has them; where {class} names them, those to use, in their order.
    group: a table as `find_groups` reads it, where no {group} is in the pattern. prefix: of the
    names that the images get. channels: names of those of each file, where {channel} does not name
    them. present: of `present_settings`, the splits that stay: the window has to be theirs, and
    volumes are turned to their orientation. options: those of `_examples_of_pairs`.
    info: what to record of window, orientation and channels, as `read_settings` reads it.
    Raises ValueError or FileNotFoundError that names the file.
    """
    class_names = sorted({name for case in cases for name in case.masks if name})
    if class_names and classes:
        class_names, classes = [name for name in classes if name in class_names], None
    pairs, relative = [], []
    for case in cases:
        names, paths = zip(*case.images.items(), strict=True)
        if channels and names == (None,):
            names = tuple(channels)
        image = paths[0] if names == (None,) else Modalities(names, paths)
        pairs.append((image, [(name, path) for name, own in case.masks.items() for path in own]))
        relative.append("/".join(case.parts) + paths[0].name.removeprefix(base_name(paths[0])))
    _report_cases(cases, pairs, class_names)
    groups = [case.group for case in cases]
    if any(groups) and group:
        raise ValueError(f"--groups {group}: {texts[0]} has {{group}} already: leave out one")
    if not any(groups):
        paths = [os.path.abspath(next(iter(case.images.values()))) for case in cases]
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        groups = find_groups([os.path.relpath(path, top) for path in paths], group)
        if not any(groups) and format_of(pairs[0][0]) != "volume":
            advise_groups(cases, texts)
    places = dict.fromkeys(class_names or [None], texts[1])
    names = unique_names(relative, prefix)
    examples, class_names, info = _examples_of_pairs(
        *(texts[0], pairs, names, groups, places), classes=classes, present=present, **options
    )
    if "{channel}" in texts[0]:
        info["pattern"] = name_pattern(texts[0])
    return examples, class_names, info


def _report_cases(cases, pairs, class_names):
    """Print how many images, masks, classes and groups the patterns have found."""
    n_masks = sum(len(own) for _, own in pairs)
    image, own = next(pair for pair in pairs if pair[1])
    of_classes = f" of {len(class_names)} classes ({listed(class_names)})" if class_names else ""
    united = sum(len(paths) > 1 for case in cases for paths in case.masks.values())
    several = f"; {united} times several masks, united" if united else ""
    print(
        f"pairs: {len(pairs)} images with {n_masks} masks{of_classes}, such as {printable(image)} "
        f"with {_first([str(path) for _, path in own])}{several}"
    )
    if groups := {case.group for case in cases} - {""}:
        print(f"groups: {len(groups)}, such as {printable(min(groups))}: each stays in one split")


def _examples_of_pairs(
    text, pairs, names, groups, places, *, classes, invert, window, context, present, time
):
    """What `mask_examples` returns, of pairs with a name and a group each.

    text: the pattern of the images, places: {class name or None: that of its masks}. invert: of
    `find_classes`. window: (center, width) of more than 8 bits. context: as of `Volume.pictures`.
    time: True takes volumes of four axes as volumes in time.
    """
    _check_volumes(pairs)
    formats = {format_of(image) for image, _ in pairs}
    if formats == {None}:
        pairs = _number_channels(pairs)
        paths = [path for image, _ in pairs for path in getattr(image, "paths", (image,))]
        window = picture_window(paths, window, present)
    channels = channels_of(pairs[0][0])
    if context and "volume" not in formats:
        raise ValueError(f"{text}: holds no volumes, whose slices --context is for")
    info = {"window": _window_of(formats, window), "channels": list(channels), "context": context}
    if (count_recorded(info) or 1) > MAX_CHANNELS:
        what = f"--context {context}: makes" if context else f"{text}: has"
        raise ValueError(f"{what} more than {MAX_CHANNELS} channels")
    check_window(present, info["window"])
    check_channels(present, info)
    if channels:
        print(f"channels: {', '.join(channels)}")
    if "volume" in formats:
        turned_to = ((own["orientation"], folder) for folder, own in present if own["orientation"])
        examples, meanings, info["orientation"] = volume_examples(
            *(pairs, names, groups, places, classes, {"window": window, "context": context}),
            invert=invert,
            present=next(turned_to, None),
            time=time,
        )
    else:
        if not channels:
            pairs, names, groups = split_pages(pairs, names, groups)
        meanings = _find_meanings(pairs, places, classes, invert)
        examples = []
        for (image, own_masks), name, own_group in zip(pairs, names, groups, strict=True):
            read = partial(_read_example, image, own_masks, meanings, window)
            examples.append(Example(name, own_group, read))
    for class_name, meaning in meanings.items():
        if class_name is None or len(meaning.fractions) > 1 or meaning.rules or meaning.warnings:
            meaning.report()  # else a mask of the class has one value, and its name says it all
    class_names = chain.from_iterable(meaning.names for meaning in meanings.values())
    return examples, list(class_names), {key: value for key, value in info.items() if value}


def _check_volumes(pairs):
    """ValueError where an image is a volume and its mask is not, or the other way round."""
    for image, own in pairs:
        is_volume = format_of(image) == "volume"
        for _, path in own:
            if is_volume != (file_format(path) == "volume"):
                kinds = "is a volume and {} is not" if is_volume else "is not a volume and {} is"
                raise ValueError(f"{image}: {kinds.format(path)}")


def _number_channels(pairs):
    """The pairs, with the numbers as names where the first picture has other channels than RGB."""
    image = pairs[0][0]
    if isinstance(image, Modalities) or count_pages(image) > 1:
        return pairs
    count = read_image(image).n_channels
    if count in (1, 3):
        return pairs
    names = tuple(str(number) for number in range(1, count + 1))
    return [(Modalities(names, (image,)), masks) for image, masks in pairs]


def _find_meanings(pairs, places, names, invert):
    """{class name or None: MaskClasses} of the masks in pairs; places: of them, for messages."""
    meanings = {}
    for class_name, place in places.items():
        paths = [path for _, own in pairs for name, path in own if name == class_name]
        own_names = names if class_name is None else one_class(class_name, invert)
        meanings[class_name] = find_classes(paths, place, own_names, invert=invert)
    return meanings


def _window_of(formats, window):
    """The window to record of images of these formats, where --window is `window`."""
    if window:
        return tuple(window)
    return OF_VOLUME if "volume" in formats else OF_FILE if "dicom" in formats else None


def _read_frame(path, window):
    """The `Picture` of a DICOM file; ValueError where it has several frames."""
    frames = read_dicom(path, window)
    if len(frames) > 1:
        raise ValueError(
            f"{path}: holds {len(frames)} frames, not one image: `python predict.py` takes it"
        )
    return replace(as_picture(frames[0]), spacing=frames.spacing(0))


def _read_picture(path, window):
    return _read_frame(path, window) if file_format(path) == "dicom" else read_image(path, window)


def _read_example(image, masks, meanings, window):
    """What `Example.read` returns, of the path of a picture and [(class name or None, mask)]."""
    if isinstance(image, Modalities):
        picture = read_channels(image, window, _read_picture)
        upright = Upright(picture, picture.size, picture.orientation)
    elif file_format(image) == "dicom":
        picture = _read_frame(image, window)
        upright = Upright(picture, picture.size, 1)
    else:
        upright = read_upright(image, window)
    united = {}
    for class_name, path in masks:
        encoding, values = meanings[class_name].read(path)
        fitted = fit_mask(values, upright)
        if fitted is None:
            width, height = upright.size
            raise ValueError(
                f"{path}: is {values.shape[1]}x{values.shape[0]}, but its image "
                f"{image} is {width}x{height}"
            )
        for name, runs in meanings[class_name].to_masks(encoding, fitted).items():
            united[name] = united[name] | runs if name in united else runs
    return upright.image, united


def _first(names):
    return ", ".join([*map(printable, names[:3])] + ["..."] * (len(names) > 3))
