"""Images and their masks, as `--masks` names them -> examples for `write_dataset`."""

import fnmatch
import os
from dataclasses import replace
from functools import partial
from itertools import chain

from medseg.coco import listed
from medseg.dicom import read_dicom
from medseg.files import base_name, file_format
from medseg.formats.mask_files import read_mask
from medseg.images import as_picture, read_image
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
from medseg.sources.class_names import ClassValues
from medseg.sources.collect import (
    Upright,
    check_known,
    find_groups,
    fit_mask,
    printable,
    read_upright,
    split_pages,
    tell_apart,
    unique_names,
)
from medseg.sources.mask_values import count_values, find_classes, find_one_class
from medseg.sources.pairing import pair_files, stem

SAMPLED_NAMES = 8  # of which the files of each suffix are looked at
FEW_VALUES = 64  # that files hold which look like masks


def mask_examples(
    images,
    masks,
    *,
    classes=None,
    invert=False,
    group=None,
    prefix="",
    window=None,
    context=0,
    skip_unpaired=False,
    present=(),
    channels=(),
    time=None,
):
    """(examples, class names, info) of images and their masks, as `find_sides` finds them.

    Images are pictures, DICOM files of one frame among them, with masks that are pictures; or NIfTI
    volumes with masks that are volumes, an example for each slice. Several masks of one picture
    (x_mask, x_mask_1) are united, class by class. The pages of a TIFF file are an example each.
    masks: {None: FileSet}, whose classes are the values; or {class name: FileSet}, in which
    whatever is foreground is of that class. An image may lack some of the classes, and they may
    overlap. Prints which mask was found for which image and what the values mean.
    classes and invert: as `find_classes` has them; where classes are named by their files, those to
    use, in their order. group: a regular expression, see `find_groups`. prefix: of the names that
    the images get. window: (center, width) of DICOM and NIfTI values.
    context: as of `Volume.pictures`. skip_unpaired: leave out
    images with no mask or with several that may be meant, and masks of no image, else a ValueError.
    present: of `present_settings`, the splits that stay: the window has to be theirs, and volumes
    are turned to their orientation. channels: the names of those of each file, where they have
    any. time: True takes volumes of four axes as volumes in time. info: what to record of window,
    orientation and channels, as `read_settings` reads it.
    Raises ValueError or FileNotFoundError that names the file.
    """
    if None not in masks and classes:
        masks, classes = _choose_classes(masks, classes), None
    pairs = _find_pairs(images, masks, skip_unpaired)
    relative = [images.relative(image) for image, _ in pairs]
    names, groups = unique_names(relative, prefix), find_groups(relative, group)
    places = {name: files.text for name, files in masks.items()}
    if channels:
        pairs = [(Modalities(tuple(channels), (image,)), own) for image, own in pairs]
    options = {"classes": classes, "invert": invert, "window": window, "present": present}
    options |= {"time": time, "context": context}
    return _examples_of_pairs(images.text, pairs, names, groups, places, **options)


def pattern_examples(
    cases,
    texts,
    *,
    classes=None,
    group=None,
    prefix="",
    skip_unpaired=False,
    channels=(),
    **options,
):
    """As `mask_examples`, of the [Pair] and the two patterns of `medseg.importing.pairs.pair`.

    An image is named by what identifies it. Without {group} in the pattern, group is as there.
    channels: names of those of each file, where {channel} does not name them.
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
    groups = [case.group for case in cases]
    if not any(groups):
        groups = find_groups([str(image) for image, _ in pairs], group)
    elif group:
        raise ValueError(f"--group {group!r}: {texts[0]} has {{group}} already: leave out one")
    _report_cases(cases, pairs, class_names)
    places = dict.fromkeys(class_names or [None], texts[1])
    names = unique_names(relative, prefix)
    examples, class_names, info = _examples_of_pairs(
        *(texts[0], pairs, names, groups, places), classes=classes, **options
    )
    if "{channel}" in texts[0]:
        info["pattern"] = name_pattern(texts[0])
    return examples, class_names, info


def _report_cases(cases, pairs, class_names):
    """Print how many images, masks, classes and groups the patterns have found."""
    n_masks = sum(len(own) for _, own in pairs)
    image, own = pairs[0]
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

    text: the folder or pattern of the images, places: {class name or None: that of its masks}.
    """
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
        if class_name is None or len(meaning.fractions) > 1 or meaning.cut or meaning.warnings:
            meaning.report()  # else a mask of the class has one value, and its name says it all
    class_names = chain.from_iterable(meaning.names for meaning in meanings.values())
    return examples, list(class_names), {key: value for key, value in info.items() if value}


def _number_channels(pairs):
    """The pairs, with the numbers as names where the first picture has other channels than RGB."""
    image = pairs[0][0]
    if isinstance(image, Modalities) or count_pages(image) > 1:
        return pairs
    count = read_image(image).pixels.shape[2]
    if count in (1, 3):
        return pairs
    names = tuple(str(number) for number in range(1, count + 1))
    return [(Modalities(names, (image,)), masks) for image, masks in pairs]


def _choose_classes(masks, names):
    """The {class name: FileSet} of the names that --classes has, in its order."""
    if isinstance(names, ClassValues):
        raise ValueError("--classes: the masks have their classes by NAME=MASKS: leave it out")
    check_known(names, list(masks), "there are no masks of")
    return {name: masks[name] for name in names}


def _find_meanings(pairs, places, names, invert):
    """{class name or None: MaskClasses} of the masks in pairs; places: of them, for messages."""
    meanings = {}
    for class_name, place in places.items():
        paths = [path for _, own in pairs for name, path in own if name == class_name]
        if class_name is None:
            meanings[None] = find_classes(paths, place, names, invert=invert)
        else:
            meanings[class_name] = find_one_class(paths, place, class_name, invert=invert)
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


# ---------------------------------------------------------------- pairs


def _find_pairs(images, masks, skip_unpaired):
    """[(image, [(class name or None, mask), ...])], with what was found printed."""
    if [*images.keys.values()] == [()] and all(
        [*files.keys.values()] == [()] for files in masks.values()
    ):
        return _pair_single_files(images, masks)
    if None in masks and masks[None].keys == images.keys:
        images, masks = _split_by_suffix(images, masks)
    pairings = {
        name: pair_files(images.keys, files.keys, files.text, one_class=name is not None)
        for name, files in masks.items()
    }
    if None in masks and file_format(next(iter(images.keys))) == "volume":
        pairing = pairings[None]  # volumes are united only where their class is named
        pairing.several += [pair for pair in pairing.pairs if len(pair[1]) > 1]
        pairing.pairs = [pair for pair in pairing.pairs if len(pair[1]) == 1]
    pairs, doubtful = {}, set()
    for name, pairing in pairings.items():
        doubtful.update(image for image, _ in pairing.several)
        for image, own in pairing.pairs:
            pairs.setdefault(image, []).extend((name, mask) for mask in own)
    sure = pairs.keys() - doubtful
    pairs = {image: pairs[image] for image in images.keys if image in sure}
    problem = _describe_unpaired(pairings, images, masks, pairs)
    if problem and not (skip_unpaired and pairs):
        advice = "; --skip-unpaired goes on without these files" if pairs else ""
        raise ValueError(f"{problem}{advice}")
    _report(pairings, images, masks, pairs)
    if problem:
        print(f"left out: {problem}")
    return list(pairs.items())


def _pair_single_files(images, masks):
    """As `_find_pairs`, of one image and one mask, or one of each class."""
    (image,) = images.keys
    own = [(name, path) for name, files in masks.items() for path in files.keys]
    print(f"pairs: 1, {printable(image.name)} and {_first([path.name for _, path in own])}")
    return [(image, own)]


def _split_by_suffix(images, masks):
    """(images, masks) of one folder that holds both under the same names: 001.bmp and 001.png.

    The masks are those of the suffix whose files hold few values. As they came where at least half
    of the names are there once. Raises ValueError where the values do not tell.
    """
    named_alike = {}
    for path in images.keys:
        named_alike.setdefault((path.parent, stem(path)), []).append(path)
    twins = [paths for paths in named_alike.values() if len(paths) > 1]
    if 2 * len(twins) <= len(named_alike):
        return images, masks
    few = {path.suffix.lower(): set() for paths in twins for path in paths}
    for path in chain.from_iterable(twins[:: -(-len(twins) // SAMPLED_NAMES)]):
        few[path.suffix.lower()].add(_holds_few_values(path))
    suffixes = sorted(few, key=lambda suffix: few[suffix] == {True})
    if [few[suffix] for suffix in suffixes] != [{False}, {True}]:
        folder = images.text if os.path.isdir(images.text) else os.path.dirname(images.text)
        nested = any(len(images.relative(path).parts) > 1 for path in images.keys)
        place = os.path.join(folder, "**" if nested else "")
        patterns = [f"'{os.path.join(place, '*' + suffix)}'" for suffix in sorted(few)[:2]]
        raise ValueError(
            f"{images.text}: {len(twins)} names are there as {' and '.join(sorted(few))}, and the "
            "values do not tell which are masks: name images, then masks, as --masks "
            f"{' '.join(patterns)}"
        )
    of_masks = {path for path in images.keys if path.suffix.lower() == suffixes[1]}
    print(f"masks: the {len(of_masks)} {suffixes[1]} files, for they hold few values")
    of_images = {path: key for path, key in images.keys.items() if path not in of_masks}
    mask_keys = {path: images.keys[path] for path in images.keys if path in of_masks}
    return replace(images, keys=of_images), {None: replace(masks[None], keys=mask_keys)}


def _holds_few_values(path):
    """Whether a file looks like a mask; a damaged one does not, and is told of when it is read."""
    try:
        return len(count_values(read_mask(path)[1])) <= FEW_VALUES
    except ValueError:
        return False


def _report(pairings, images, masks, pairs):
    """Print how many pairs were found, by which rule, and how many masks are united."""
    n_masks = sum(map(len, pairs.values()))
    image, own = next(iter(pairs.items()))
    if None not in masks:
        names = _first([str(masks[name].relative(mask)) for name, mask in own])
        n_classes = "1 class" if len(masks) == 1 else f"{len(masks)} classes"
        print(
            f"pairs: {len(pairs)} images with {n_masks} masks of {n_classes}, such as "
            f"{printable(images.relative(image))} with {names}"
        )
        return
    rule, mask = pairings[None].rule, own[0][1]
    names = printable(image.name), printable(mask.name)
    if "name" not in rule:
        names = printable(images.relative(image)), printable(masks[None].relative(mask))
    line = f"pairs: {len(pairs)} by {rule}, such as {names[0]} and {names[1]}"
    united = sum(len(own) > 1 for own in pairs.values())
    if united:
        have = "image has" if united == 1 else "images have"
        line += f"; {united} {have} several masks, united ({n_masks} masks)"
    print(line)


def _describe_unpaired(pairings, images, masks, pairs):
    """One line on the files that are in no pair, "" where all are."""
    several = {image: own for pairing in pairings.values() for image, own in pairing.several}
    missing = set.intersection(*(set(pairing.missing) for pairing in pairings.values()))
    missing = [image for image in images.keys if image in missing and image not in several]
    total = len(pairs) + len(missing) + len(several)
    parts = []
    if missing:
        where = f"in {masks[None].text}" if None in masks else "of any class"
        names = _first([str(images.relative(image)) for image in missing])
        parts.append(f"{len(missing)} of {total} images have no mask {where} ({names})")
    if several:
        files = next(files for name, files in masks.items() if pairings[name].several)
        names = []
        for image, candidates in several.items():
            shared = ", as another image" if len(candidates) == 1 else ""
            listed = _first([str(files.relative(mask)) for mask in candidates])
            names.append(f"{images.relative(image)}: {listed}{shared}")
        total_several = f"{len(several)} of {total} images have several candidates"
        advice = _advise_images(several, images) or _advise(several, files)
        parts.append(f"{total_several} ({_first(names, '; ')}){advice}")
    for name, pairing in pairings.items():
        if pairing.surplus:
            files = masks[name]
            total_masks = len(files.keys.keys() - (images.keys.keys() if name is None else ()))
            names = _first([str(files.relative(mask)) for mask in pairing.surplus])
            n_surplus = f"{len(pairing.surplus)} of {total_masks} masks"
            parts.append(f"{n_surplus} in {files.text} belong to no image ({names})")
    return f"{images.text}: {' and '.join(parts)}" if parts else ""


def _advise_images(several, images):
    """': name the images by a pattern, ...' where a mask may be that of two (x and x_superpixels).

    The images are those with the shorter name; "" where no pattern tells them.
    """
    owners = {}
    for image, masks in several.items():
        owners.setdefault(tuple(masks), []).append(image)
    if max(map(len, owners.values())) == 1:
        return ""
    wanted = {min(own, key=lambda path: len(path.stem)) for own in owners.values()}
    first, others = min(wanted), {path.name for path in images.keys} - {p.name for p in wanted}
    same = os.path.commonprefix([path.stem for path in wanted])
    single = f"{same}{'?' * (len(first.stem) - len(same))}{first.suffix}"
    for pattern in (f"*{first.suffix}", single):
        hits = fnmatch.filter([path.name for path in images.keys], pattern)
        if others and others.isdisjoint(hits) and len(hits) == len(wanted):
            return f": name the images by a pattern, as '{first.parent / pattern}'"
    return ""


def _advise(several, files):
    """': take ...', what to write where each image has several masks."""
    names = [mask.name for mask in max(several.values(), key=len)]
    same = len(os.path.commonprefix(names))
    if len(names) < 2 or any(name[same:].startswith(".") for name in names):
        return ""
    folder = files.text if files.places[0].is_dir() else os.path.dirname(files.text)
    first, second, *others = (os.path.join(folder, "*" * bool(same) + n[same:]) for n in names)
    classes = f"A='{first}' B='{second}'{' ...' * bool(others)}"
    return (
        f": take one, as '{first}', or each as a class, {classes}, or all as one, A='{files.text}'"
    )


def _first(names, separator=", "):
    shown = tell_apart(names[:3])
    return separator.join(shown + ["..."] * (len(names) > 3))
