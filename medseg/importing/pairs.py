"""Which masks belong to which image, as two patterns or two folders tell it."""

import os
import re
import shlex
from collections import Counter
from pathlib import Path

from medseg.coco import listed
from medseg.files import DICOM_SUFFIXES, VOLUME_SUFFIXES, base_name, file_format
from medseg.own_files import OWN_PICTURES, PICTURE_ENDINGS, drawn_beside_masks
from medseg.patterns import KNOWN, Pair, Side, describe_folder, make_cases, same_form, walk

DRAWN = re.compile("|".join(map(re.escape, (*PICTURE_ENDINGS, *OWN_PICTURES))))
WORD = re.compile(r"[^\W\d_]+[\W_]?|\d+[\W_]?|[\W_]")  # of a name, with the sign after it
ENDING = re.compile(r"[\W_]+[^\W_]+$")
SERIES = 5  # folders or beginnings of names, from which on they may be patients
NUMBERED = re.compile(r"(.*\d.*?)[ _-]+\d+")  # the name of a patient, and the number of a slice


def find_pairs(images, masks, **options):
    """((pattern of images, of masks), [Pair]) of two patterns, two folders or two files.

    What two folders stand for is printed. options: of `pair`.
    """
    texts = images, masks
    for text in texts:
        if not os.path.lexists(text) and not set("*{") & set(text):
            raise FileNotFoundError(f"{text}: no such folder or file")
    if all(map(os.path.isdir, texts)):
        texts = patterns_of_folders(images, masks)
        print(f"the same as: --masks {shlex.join(texts)}")
    elif os.path.lexists(images) and os.path.isfile(masks):
        file = Pair((base_name(images),), "", {None: Path(images)}, {None: [Path(masks)]})
        return texts, [file]
    return texts, pair(*texts, **options)


def pair(images, masks, channels=None, classes=None, skip_unpaired=False, *, empty_unmasked=False):
    """[Pair] of the images and masks that two patterns name, sorted by what identifies them.

    channels: names of {channel} to use, in this order; by default all, sorted. classes: names of
    {class} to use. skip_unpaired: leave out images without a mask or with other channels than most,
    and masks without an image, and print how many; else they are an error. empty_unmasked: images
    without a mask are taken, with none.
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
    for path in find_drawn([*image_files, *mask_files]):
        image_files.pop(path, None)
        mask_files.pop(path, None)
    mask_files, orphans = _assign_masks(image_files, mask_files, names)
    cases, problem = make_cases(image_files.values(), names, image_side, channels)
    problems = [problem] if problem else []
    masks_of = _group_masks(mask_files, names, mask_side, classes)
    pairs = [case._replace(masks=masks_of.get(key, {})) for key, case in sorted(cases.items())]
    alone = [next(iter(case.images.values())) for case in pairs if not case.masks]
    if alone:
        problem = f"{len(alone)} of {len(pairs)} images have no mask ({alone[0]})"
        if empty_unmasked:
            print(f"empty: {problem}")
        else:
            problems.append(problem)
    if orphans:
        total = len(mask_files) + len(orphans)
        problems.append(f"{len(orphans)} of {total} masks have no image ({min(orphans).path})")
    pairs = [case for case in pairs if case.masks or empty_unmasked]
    if not any(case.masks for case in pairs):
        raise ValueError(f"{images}: no image has a mask: {' and '.join(problems)}")
    if problems and not skip_unpaired:
        raise ValueError(f"{' and '.join(problems)}; --skip-unpaired goes on without them")
    if problems:
        print(f"left out: {' and '.join(problems)}")
    return pairs


def find_drawn(paths):
    """Which of the paths, texts, are pictures that predict.py draws beside its masks: a set."""
    if not any(map(DRAWN.search, paths)):
        return set()
    by_path = {Path(path): path for path in paths}
    return {by_path[path] for path in drawn_beside_masks(by_path)}


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
    (mask_stems, mask_suffix) = _stems(masks, images)
    (stems, suffix) = _stems(images, masks, mask_suffix in VOLUME_SUFFIXES)
    mask_sets = {cut: {_cut(stem, cut) for stem in mask_stems} for cut in _cuts(mask_stems)}
    best = (0,)
    for cut in _cuts(stems):
        names = {_cut(stem, cut) for stem in stems}
        for mask_cut, mask_names in mask_sets.items():
            n_pairs = len(names & mask_names)
            best = max(best, (n_pairs, -sum(map(len, cut + mask_cut)), cut, mask_cut))
    if not best[0]:
        end, mask_end = map(_usual_end, (stems, mask_stems))
        raise ValueError(
            f"no mask has the name of an image: {images} has {min(stems)}, {masks} "
            f"{min(mask_stems)}: say with {{id}} what they share, "
            f"'{images}/{{id}}{end}.*' '{masks}/{{id}}{mask_end}.*'"
        )
    name = "{id:**}" if any("/" in stem for stem in (*stems, *mask_stems)) else "{id}"
    _, _, (start, end), (mask_start, mask_end) = best
    return (
        f"{images}/{start}{name}{end}{suffix}",
        f"{masks}/{mask_start}{name}{mask_end}{mask_suffix}",
    )


def _usual_end(stems):
    """What ends more than half of the names, or ""."""
    counts = Counter(end for stem in stems for end in ENDING.findall(stem))
    return next((end for end, count in counts.items() if 2 * count > len(stems)), "")


def _stems(folder, other, of_volumes=False):
    """({relative path without suffix, as compared}, the suffix of all, else ".*") in a folder.

    Without the files of the other folder, where that is below, and what predict.py draws beside its
    masks. DICOM files may have no suffix; those of_volumes are series, a folder each: "/".
    """
    known = re.compile(f"(.+)({KNOWN})", re.IGNORECASE | re.DOTALL)
    below = os.path.join(os.path.relpath(other, folder), "")
    paths = [path for path in walk(folder, ("**", "*")) if not path.startswith(below)]
    drawn = find_drawn(paths)
    paths = [same_form(path) for path in paths if path not in drawn]
    matches = filter(None, map(known.fullmatch, paths))
    found = {(matched[1].casefold(), matched[2].lower()) for matched in matches}
    if not found:
        dicom = [path for path in paths if file_format(Path(folder, path)) == "dicom"]
        found = {(path.casefold(), "") for path in dicom}
    if not found:
        raise ValueError(f"{folder}: holds no images; {describe_folder(folder)}")
    stems, suffixes = {stem for stem, _ in found}, {suffix for _, suffix in found}
    if of_volumes and suffixes <= {"", *DICOM_SUFFIXES}:
        return {os.path.dirname(stem) for stem in stems}, "/"
    return stems, suffixes.pop() if len(suffixes) == 1 else ".*"


def _cuts(stems):
    """[(beginning, end)] that all names share and that can be cut off."""
    starts, ends = (
        os.path.commonprefix([WORD.findall(stem[::step]) for stem in stems]) for step in (1, -1)
    )
    shortest, lone = min(map(len, stems)), len(stems) == 1
    cuts = (
        ("".join(starts[:first]), "".join(ends[:last])[::-1])
        for first in range(len(starts) + 1)
        for last in range(len(ends) + 1)
    )
    return [
        (start, end)
        for start, end in cuts
        if len(start + end) < shortest
        and not set(start + end) & set("{}*")
        and not (lone and re.search(r"\d", start + end))  # the number may be all that tells
    ]


def _cut(stem, cut):
    return stem[len(cut[0]) : len(stem) - len(cut[1])]


# ---------------------------------------------------------------- patients


def advise_groups(cases):
    """Print a line where images without groups may be several of each patient.

    They may where many folders hold several each, or many numbered names begin alike.
    """
    paths = [next(iter(case.images.values())) for case in cases]
    numbered = filter(None, map(NUMBERED.fullmatch, map(base_name, paths)))
    folders = Counter(str(path.parent) for path in paths)
    series = Counter(found[1] for found in numbered)
    for counts, what, name in (
        (folders, "folders", "{group}/{id}"),
        (series, "numbered series", "{group}_{id}"),
    ):
        count = counts.total()
        if len(counts) >= SERIES and count >= 2 * len(counts) and 2 * count >= len(paths):
            print(
                f"note: {count} images are of {len(counts)} {what}, such as {min(counts)}, and "
                "dealt to the splits one by one; where each is a patient, a pattern with "
                f"{name} or --groups table.csv keeps it in one"
            )
            return
