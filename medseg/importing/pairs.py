"""Which masks belong to which image, as two patterns or two folders tell it."""

import os
import re
from collections import Counter
from pathlib import Path

from medseg.coco import listed
from medseg.patterns import KNOWN, Side, describe_folder, first, make_cases, same_form, walk


def pair(images, masks, channels=None, classes=None, skip_unpaired=False):
    """[Pair] of the images and masks that two patterns name, sorted by what identifies them.

    channels: names of {channel} to use, in this order; by default all, sorted. classes: names of
    {class} to use. skip_unpaired: leave out images without a mask or with other channels than most,
    and masks without an image, and print how many; else they are an error.
    Raises ValueError or FileNotFoundError with what to write instead.
    """
    if images == masks:
        raise ValueError(f"{images}: the images and the masks are the same files")
    image_side, mask_side = Side(images, "images"), Side(masks, "masks")
    names = mask_side.identity()
    if extra := [name for name in names if name not in image_side.names]:
        raise ValueError(
            f"{masks}: the masks have {{{extra[0]}}}, which the images have not: write * for it"
        )
    image_files, mask_files = image_side.find(channels), mask_side.find()
    mask_files, orphans = _assign_masks(image_files, mask_files, names)
    if not mask_files:
        of_images, of_masks = (
            first(sorted({file.spell(names) for file in files}))
            for files in (image_files.values(), orphans)
        )
        raise ValueError(
            f"no mask has the {{{names[-1]}}} of an image: images have {of_images}, masks have "
            f"{of_masks or 'none of their own'}"
        )
    cases, problem = make_cases(image_files.values(), names, image_side, channels)
    problems = [problem] if problem else []
    masks_of = _group_masks(mask_files, names, mask_side, classes)
    pairs = [case._replace(masks=masks_of.get(key, {})) for key, case in sorted(cases.items())]
    if alone := [path for case in pairs if not case.masks for path in [*case.images.values()][:1]]:
        problems.append(f"{len(alone)} of {len(pairs)} images have no mask ({first(alone)})")
    if paths := sorted(file.path for file in orphans):
        total = len(mask_files) + len(paths)
        problems.append(f"{len(paths)} of {total} masks have no image ({first(paths)})")
    pairs = [case for case in pairs if case.masks]
    if problems and not (skip_unpaired and pairs):
        advice = "; --skip-unpaired goes on without them" if pairs else ""
        raise ValueError(f"{' and '.join(problems)}{advice}")
    if problems:
        print(f"left out: {' and '.join(problems)}")
    return pairs


def _assign_masks(image_files, mask_files, names):
    """([File] of masks, [File] of masks without an image), the masks taken from `image_files`.

    A file that both patterns match is a mask where the image that it names is another file.
    """
    count = Counter(file.key(names) for file in image_files.values())
    lengths = {tuple((n, len(f.values[n])) for n in names) for f in image_files.values()}
    lengths = sorted(lengths, key=lambda own: -sum(length for _, length in own))
    masks, orphans = [], []
    for path, file in sorted(mask_files.items(), key=lambda item: len(item[0])):
        own = image_files[path].key(names) if path in image_files else None
        for reading in file.readings(lengths):
            key = reading.key(names)
            if count[key] > (key == own):
                masks.append(reading)
                if own is not None:
                    count[own] -= 1
                    del image_files[path]
                break
        else:
            if own is None:
                orphans.append(file)
    return masks, orphans


def _group_masks(files, names, side, classes):
    """{key: {class or None: [Path]}}. ValueError where two files are the same mask of an image."""
    by_key, spelled = {}, {name.casefold(): name for name in classes or ()}
    there = {file.values["class"].casefold() for file in files if "class" in side.names}
    if unknown := [name for name in classes or () if name.casefold() not in there]:
        raise ValueError(
            f"--classes: there are no masks of {unknown[0]}, but {listed(sorted(there))}"
        )
    for file in sorted(files):
        name = file.values.get("class")
        if name and classes and name.casefold() not in spelled:
            continue
        name = name and spelled.setdefault(name.casefold(), name)
        own = by_key.setdefault(file.key(names), {}).setdefault(name, [])
        if own and "part" not in side.names:
            raise ValueError(
                f"{own[0]} and {file.path} are both the mask of {file.spell(names)}: write "
                "{class} or {part} where they differ (parts are united), {n} where images differ, "
                "or name the one that counts"
            )
        own.append(Path(file.path))
    return by_key


# ---------------------------------------------------------------- two folders


def patterns_of_folders(images, masks):
    """The two patterns that two folders stand for: equal paths, but for what a whole side shares.

    What is cut off at the beginning and the end ends where a letter meets a digit, or at another
    sign. Of all cuts those with most pairs count, of equal ones the shortest. Raises ValueError or
    FileNotFoundError for a folder without images, and where no names agree.
    """
    (stems, suffix), (mask_stems, mask_suffix) = _stems(images), _stems(masks)
    mask_sets = {cut: {_cut(stem, cut) for stem in mask_stems} for cut in _cuts(mask_stems)}
    best = (0,)
    for cut in _cuts(stems):
        names = {_cut(stem, cut) for stem in stems}
        for mask_cut, mask_names in mask_sets.items():
            n_pairs = len(names & mask_names)
            best = max(best, (n_pairs, -sum(map(len, cut + mask_cut)), cut, mask_cut))
    if not best[0]:
        raise ValueError(
            f"no mask has the name of an image: {images} has {first(sorted(stems))}, {masks} "
            f"{first(sorted(mask_stems))}: say with {{id}} what they share, '{images}/{{id}}_*.*'"
        )
    name = "{id:**}" if any("/" in stem for stem in (*stems, *mask_stems)) else "{id}"
    _, _, (start, end), (mask_start, mask_end) = best
    return (
        f"{images}/{start}{name}{end}{suffix}",
        f"{masks}/{mask_start}{name}{mask_end}{mask_suffix}",
    )


def _stems(folder):
    """({relative path without suffix, as compared}, the suffix of all, else ".*") in a folder."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    known = re.compile(f"(.+)({KNOWN})", re.IGNORECASE | re.DOTALL)
    found = map(known.fullmatch, map(same_form, walk(folder, ("**", "*"))))
    found = {matched[1].casefold(): matched[2].lower() for matched in found if matched}
    if not found:
        raise ValueError(f"{folder}: holds no images; {describe_folder(folder)}")
    suffixes = set(found.values())
    return found.keys(), suffixes.pop() if len(suffixes) == 1 else ".*"


def _cuts(stems):
    """[(beginning, end)] that all names share and that can be cut off."""
    first = os.path.commonprefix([*stems])
    last = os.path.commonprefix([stem[::-1] for stem in stems])[::-1]
    starts = [first[:n] for n in range(len(first) + 1) if _is_border(stems, n, n - 1)]
    ends = [last[len(last) - n :] for n in range(len(last) + 1) if _is_border(stems, -n, -n)]
    shortest, lone = min(map(len, stems)), len(stems) == 1
    return [
        (start, end)
        for start in starts
        for end in ends
        if len(start + end) < shortest
        and not set(start + end) & set("{}*")
        and not (lone and re.search(r"\d", start + end))  # the number may be all that tells
    ]


def _is_border(stems, place, edge):
    """Whether names can be cut at a place: beside a separator, or between letter and digit.

    edge: where the last character is that would be cut off.
    """
    if place == 0:
        return True
    for stem in stems:
        both = stem[:place][-1:] + stem[place:][:1]
        mixed = both.isalnum() and not both.isalpha() and not both.isdigit()
        if len(both) < 2 or stem[edge].isalnum() and not mixed:
            return False
    return True


def _cut(stem, cut):
    return stem[len(cut[0]) : len(stem) - len(cut[1])]
