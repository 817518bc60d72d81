"""Images and their masks, as `--masks` names them -> examples for `write_dataset`."""

import os
from dataclasses import replace
from functools import partial
from itertools import chain

from medseg import settings
from medseg.coco import listed
from medseg.dicom import read_dicom
from medseg.files import base_name, escape, file_format
from medseg.images import as_picture, read_image
from medseg.importing import collect
from medseg.importing.class_names import one_class
from medseg.importing.pairs import advise_groups
from medseg.importing.values import find_classes
from medseg.importing.volumes import volume_examples
from medseg.importing.writing import Example, picture_window
from medseg.modalities import Modalities, channels_of, read_channels
from medseg.patterns import name_pattern
from medseg.samples import count_pages


def mask_examples(cases, texts, args, classes, present):
    """(examples, class names, info) of [Pair] and the two patterns that they are of.

    Images are pictures, DICOM files of one frame among them, with masks that are pictures; or
    volumes with masks that are volumes, an example for each slice. Several masks of one image are
    united, class by class. The pages of a TIFF file are an example each. An image is named by what
    identifies it. Prints which mask was found for which image and what the values mean.
    args: the flags of the import. classes: as `find_classes` has them; where {class} names them,
    those to use, in their order. present: of `present_settings`, the splits that stay: the window
    has to be theirs, and volumes are turned to their orientation.
    info: what to record of window, orientation and channels, as `read_settings` reads it.
    Raises ValueError or FileNotFoundError that names the file.
    """
    class_names = sorted({name for case in cases for name in case.masks if name})
    if class_names and classes:
        class_names, classes = [name for name in classes if name in class_names], None
    pairs, relative = [], []
    for case in cases:
        names, paths = zip(*case.images.items(), strict=True)
        names = tuple(args.channels or names) if names == (None,) else names
        image = paths[0] if names == (None,) else Modalities(names, paths)
        pairs.append((image, [(name, path) for name, own in case.masks.items() for path in own]))
        relative.append("/".join(case.parts) + paths[0].name.removeprefix(base_name(paths[0])))
    _report_cases(cases, pairs, class_names)
    formats = {file_format(image) for image, _ in pairs}
    groups = _groups_of(cases, texts, args.groups, "volume" in formats)
    names = collect.unique_names(relative, args.prefix or "")
    if formats == {None}:
        pairs = _number_channels(pairs)
    window, info = _settings_of(pairs, formats, texts[0], args, present)
    if "volume" in formats:
        pairs = [(*pair, *own) for pair, *own in zip(pairs, names, groups, strict=True)]
        examples, meanings, info["orientation"] = volume_examples(
            pairs, class_names or [None], classes, args, present
        )
    else:
        if not info["channels"]:
            pairs, names, groups = collect.split_pages(pairs, names, groups)
        meanings, examples = {}, []
        for name in class_names or [None]:
            paths = [path for _, masks in pairs for own, path in masks if own == name]
            own = classes if name is None else one_class(name)
            meanings[name] = find_classes(paths, own, invert=args.invert)
        for (image, masks), name, group in zip(pairs, names, groups, strict=True):
            read = partial(_read_example, image, masks, meanings, window)
            examples.append(Example(name, group, read))
    for class_name, meaning in meanings.items():
        if class_name is None or len(meaning.names_of) > 1 or meaning.rules - {"greys"}:
            meaning.report()  # else a mask of the class has one value, and its name says it all
    names = chain.from_iterable(meaning.names for meaning in meanings.values())
    return (
        examples,
        list(dict.fromkeys(names)),
        {key: value for key, value in info.items() if value},
    )


def _report_cases(cases, pairs, class_names):
    """Print how many images, masks, classes and groups the patterns have found."""
    n_masks = sum(len(own) for _, own in pairs)
    image, ((_, mask), *_) = next(pair for pair in pairs if pair[1])
    of_classes = f" of {len(class_names)} classes ({listed(class_names)})" if class_names else ""
    united = sum(len(paths) > 1 for case in cases for paths in case.masks.values())
    several = f"; {united} times several masks, united" if united else ""
    print(
        f"pairs: {len(pairs)} images with {n_masks} masks{of_classes}, such as "
        f"{escape(str(image))} with {escape(str(mask))}{several}"
    )
    if groups := {case.group for case in cases} - {""}:
        print(f"groups: {len(groups)}, such as {escape(min(groups))}: each stays in one split")


def _groups_of(cases, texts, table, are_volumes):
    """The group of each case: that of {group}, or of a table or the names, see `find_groups`."""
    groups = [case.group for case in cases]
    if any(groups):
        if table:
            raise ValueError(f"--groups {table}: {texts[0]} has {{group}} already: leave out one")
        return groups
    paths = [os.path.abspath(next(iter(case.images.values()))) for case in cases]
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    groups = collect.find_groups([os.path.relpath(path, top) for path in paths], table)
    if not any(groups) and not are_volumes:
        advise_groups(cases)
    return groups


def _settings_of(pairs, formats, text, args, present):
    """((center, width) of more than 8 bits or None, what to record); ValueError where others stay.

    text: the pattern of the images. formats: of all images.
    """
    window, channels = args.window, list(channels_of(pairs[0][0]))
    if formats == {None}:
        paths = [path for image, _ in pairs for path in getattr(image, "paths", (image,))]
        window = picture_window(paths, window, present)
    if args.context and "volume" not in formats:
        raise ValueError(f"{text}: holds no volumes, whose slices --context is for")
    defaults = {"volume": settings.OF_VOLUME, "dicom": settings.OF_FILE}
    default = next((own for name, own in defaults.items() if name in formats), None)
    info = {"window": tuple(window or ()) or default, "channels": channels}
    info |= {"context": args.context, "pattern": "{channel}" in text and name_pattern(text)}
    if len(settings.channel_names(channels, args.context)) > settings.MAX_CHANNELS:
        what = f"--context {args.context}: makes" if args.context else f"{text}: has"
        raise ValueError(f"{what} more than {settings.MAX_CHANNELS} channels")
    settings.check_window(present, info["window"])
    settings.check_channels(present, info)
    if channels:
        print(f"channels: {', '.join(channels)}")
    return window, info


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


def _read_picture(path, window):
    """The `Picture` of a file; ValueError for DICOM of several frames."""
    if file_format(path) != "dicom":
        return read_image(path, window)
    frames = read_dicom(path, window)
    if len(frames) > 1:
        raise ValueError(f"{path}: holds {len(frames)} frames, not one image")
    return replace(as_picture(frames[0]), spacing=frames.spacing(0))


def _read_example(image, masks, meanings, window):
    """What `Example.read` returns, of the path of a picture and [(class name or None, mask)]."""
    if channels_of(image) or file_format(image) == "dicom":
        read = partial(read_channels, read=_read_picture) if channels_of(image) else _read_picture
        picture = read(image, window)
        upright = collect.Upright(picture, picture.size, picture.orientation)
    else:
        upright = collect.read_upright(image, window)
    united = {}
    for class_name, path in masks:
        encoding, values = meanings[class_name].read(path)
        fitted = collect.fit_mask(values, upright)
        if fitted is None:
            sizes = ["x".join(map(str, size)) for size in (values.shape[::-1], upright.size)]
            raise ValueError(f"{path}: is {sizes[0]}, but its image {image} is {sizes[1]}")
        united = meanings[class_name].to_masks(encoding, fitted, united)
    return upright.image, united
