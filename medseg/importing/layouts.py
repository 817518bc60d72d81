"""`python download.py FOLDER`: which known layout a folder has, by a table of patterns.

A row is taken only where it uses every picture of the folder, no other such row gives other pairs,
the values say which side is masks, and no image is there twice. Else all that may be meant is
listed: to ask is better than to be wrong.
"""

import contextlib
import io
import os
import random
import re
import shlex
from collections import Counter
from itertools import chain, product
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from medseg.coco import ANNOTATIONS, SPLITS
from medseg.files import base_name, file_format, read_json
from medseg.images import read_image
from medseg.importing.pairs import find_drawn, pair
from medseg.masks import ARRAY, read_mask
from medseg.own_files import OWN_JSON
from medseg.patterns import KNOWN, compile_parts, same_form, walk
from medseg.samples import Page
from medseg.volumes import open_volume

# What folders of images and of masks are called, or end with, and what ends the names of masks.
IMAGES = "images? imgs? imagesTr input (original.)?images originals? scans? cxr(_png)?".split()
MASKS = "masks? manualmask labels?1? labelsTr annotations? gt (1st_)?manual1? segmentations? lesion"
MASKS = [*MASKS.split(), "(segmentation.)?(ground.?)?truths?"]
ENDS = "masks? seg segmentation label gt anno annotation manual1 1stHO lesion".split()
TABLE = """
**/imagesTr/{id}_{channel}.*           **/labelsTr/{id}.*
**/{id}/ct.nii.gz                      **/{id}/segmentations/{class}.nii.gz
**/{id}/{id}_{channel}.*               **/{id}/*_{seg,Segm}.*
**/{id}/{id}-{channel}.*               **/{id}/{id}-seg.*
sub-*/**/{id}_T1w.nii.gz               derivatives/**/{id}_T1w_*mask.nii.gz
**/{group}/{group}_frame{id}.nii.gz    **/{group}/{group}_frame{id}_gt.nii.gz
leftImg8bit/**/{id}_leftImg8bit.png    gtFine/**/{id}_gtFine_labelIds.png
**/volume-{id}.*                       **/segmentation-{id}.*
**/{id}_Dermoscopic_Image/*.*          **/{id}_lesion/*.*
**/{id}/<I>/*.*                        **/{id}/<M>/{part}.*
**/<I>/{id:**}.*                       **/<M>/{id:**}.*
**/{n}/<I>/{id}.*                      **/{n}/<M>/{id}.*
**/<I>/{id:**}.*                       **/<M>/{id:**}<E>.*
**/<I>/{id:**}.*                       **/<M>/{id:**}<E>{part}.*
**/{n}/<I>/{id}.*                      **/{n}/<M>/{id}<E>.*
**/<I>/{id}_*.*                        **/<M>/{id}_*.*
**/<I>/{id}.*                          **/<M>/{id}.{ah,vk}.*
**/train/{id}.*                        **/train_masks/{id}<E>.*
**/<I>/{image,img}_{id}.*              **/<M>/{mask,label,seg}_{id}.*
**/<I>/{image,img}{id}.*               **/<M>/{mask,label,seg}{id}.*
**/<I>/**/{id}.*                       **/<M>/**/{class}/{id}.*
**/<I>/**/{id}.*                       **/<M>/**/{class}/{id}_*.*
{id:**}.*                              {id:**}<E>.*
{id:**}.*                              {id:**}<E>{part}.*
{id:**}.{jpg,jpeg,bmp,tif}             {id:**}.png
"""  # of images, of masks; <I>, <M>, <E>: each such word of the folder
OUTLINES = {  # keys of a JSON file, and the flag that reads it
    "--labelme": {"shapes", "imagePath"},
    "--coco": {"images", "annotations", "categories"},
    "--via": {"_via_img_metadata"},
}
FEW_VALUES, MASK = 16, 0.95  # the commonest values of a mask hold such a part of its pixels
LOOKED_AT = 8  # files of each side
SAMPLED = 1000  # names by which a row is ruled out at once
LEAST = 0.25  # part of the pictures that a reading uses
SHOWN = 6  # readings, and words of a kind that are tried


class Reading(NamedTuple):
    """What a folder may mean.

    flags: that say so. files: {first file of an image: (all of its files, its masks)}. what: in
    words. n_left: pictures of the folder that it does not use. doubts: why it may not be meant.
    """

    flags: tuple
    files: dict = {}  # noqa: RUF012, nobody changes it
    what: str = "outlines"
    n_left: int = 0
    doubts: tuple = ()


def find_layout(folder, typed=()):
    """The flags that import a folder by the only layout that it can have, which are printed.

    typed: other arguments of the command, which are repeated in what is printed. Raises
    FileNotFoundError without the folder; ValueError where the layout is not sure, after all that it
    may be is printed.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    if any(os.path.isfile(os.path.join(folder, split, ANNOTATIONS)) for split in SPLITS):
        use = shlex.join(["python", "train.py", "--data", folder])
        raise ValueError(f"{folder}: is a data set already: {use}")
    names = set(walk(folder, ("**", "*")))
    names -= find_drawn(names)
    readings = _find_masks(folder, names)
    if outlines := _find_outlines(folder, names):
        readings = [*outlines, *(reading for reading in readings if not reading.doubts)]
    is_sure = len(readings) == 1 and not readings[0].doubts
    for flags, _, what, _, doubts in readings[:SHOWN]:
        command = shlex.join(["python", "download.py", *typed, *flags])
        line = f"  {command}   # {'; '.join([what, *doubts])}"
        print(f"found {what}; the same as: {command}" if is_sure else line)
    if is_sure:
        return readings[0].flags
    problem = "what it holds is not sure: run the command that is meant"
    if not readings:
        example = "--masks 'D/{id}.jpg' 'D/{id}_mask.png' (docs/own-data.md)"
        problem = f"no known layout: say which files are images, as {example}"
    raise ValueError(f"{folder}: {problem}")


def _find_outlines(folder, names):
    """[Reading] of the files of outlines, or of arrays, in a folder."""
    if "data.yaml" in names:
        return [Reading(("--yolo", folder))]
    if names and all(name.lower().endswith((".npz", ".mat")) for name in names):
        return [Reading(("--arrays", folder), what="arrays")]
    found = []
    for name in sorted(name for name in names if name.lower().endswith(".json")):
        path, flag = os.path.join(folder, name), None
        with contextlib.suppress(ValueError):
            flag = None if os.path.basename(name) in OWN_JSON else _kind_of(read_json(Path(path)))
        if flag == "--labelme":  # the import reads the others
            return [*found, Reading((flag, folder))]
        found += [Reading((flag, path, folder))] if flag else []
    return found


def _kind_of(content):
    """The flag that reads the content of a JSON file, or None."""
    if not isinstance(content, dict) or not content:
        return None
    if all(isinstance(entry, dict) and "regions" in entry for entry in content.values()):
        return "--via"
    return next((flag for flag, keys in OUTLINES.items() if keys <= content.keys()), None)


# ---------------------------------------------------------------- the table


def _find_masks(folder, names):
    """[Reading] of the rows of the table: the only sure one, or all, those that use most first."""
    known = re.compile(f".+({KNOWN})", re.IGNORECASE | re.DOTALL)
    names = sorted(name for name in names if known.fullmatch(name))
    prefix = str(Path(folder, "x"))[:-1]
    pictures = {prefix + name for name in names}
    samples = random.Random(0).sample(names, min(SAMPLED, len(names)))
    rows = _find_rows(folder, names, list(map(same_form, samples)))
    readings = _read([texts for texts, part in rows.items() if part == 1], pictures)
    sure = [reading for reading in readings if not reading.doubts]
    if len(sure) == 1:
        place, doubts = readings.index(sure[0]), _find_doubts(sure[0].files)
        readings[place] = sure[0]._replace(doubts=doubts)
        if not doubts:
            return sure
    readings += _read([texts for texts, part in rows.items() if LEAST <= part < 1], pictures)
    return sorted(readings, key=lambda reading: reading.n_left)


def _find_rows(folder, names, samples):
    """{two patterns: part of the samples that they match} of the rows that match some."""
    places = {PurePath(place) for place in set(map(os.path.dirname, names))}
    places = {str(own) for place in places for own in (place, *place.parents)}
    ending = re.compile(rf"[\W_]({'|'.join(ENDS)})(?=[^a-z]*$)", re.IGNORECASE)
    ends = Counter(end[0] for name in samples if (end := ending.search(base_name(name))))
    words = {"<I>": _named(places, IMAGES), "<M>": _named(places, MASKS)}
    words["<E>"] = [end for end, _ in ends.most_common(SHOWN)]
    rows = {}
    for row in TABLE.split("\n")[1:-1]:
        for chosen in product(*(words[mark] if mark in row else [""] for mark in words)):
            texts = re.split(" {2,}", row)
            for mark, word in zip(words, chosen, strict=True):
                texts = [text.replace(mark, word) for text in texts]
            sides = [compile_parts((*text.split("/"),)) for text in texts]
            matched = [[bool(side.fullmatch(name)) for name in samples] for side in sides]
            if len({*texts}) == 2 and all(map(any, matched)):
                texts = tuple(os.path.join(folder, text) for text in texts)
                rows[texts] = np.any(matched, axis=0).mean()
    return rows


def _named(places, words):
    """The names of folders that are one of the words, or end with it."""
    wanted = re.compile(rf"([^{{}}*]*[\W_\d])?({'|'.join(words)})", re.IGNORECASE)
    found = sorted(filter(wanted.fullmatch, set(map(os.path.basename, places))))
    return found if len(found) <= SHOWN else []


def _read(rows, pictures):
    """[Reading] of pairs of patterns, without those that pair less than is worth telling."""
    readings = []
    for texts in rows:
        plain = texts[1].replace("{part}", "")  # where it uses all, {part} adds nothing
        if any(plain == own.flags[2] and not own.doubts for own in readings):
            continue
        for skip in ((), ("--skip-unpaired",)):
            cases = []
            with contextlib.suppress(ValueError, FileNotFoundError):
                with contextlib.redirect_stdout(io.StringIO()):
                    cases = pair(*texts, skip_unpaired=bool(skip))
                break
        files = {}
        for case in cases:
            images = [*map(str, case.images.values())]
            files[images[0]] = images, sorted(map(str, chain(*case.masks.values())))
        masks = set(chain(*(masks for _, masks in files.values())))
        left = sorted(pictures.difference(masks, *(images for images, _ in files.values())))
        one_class = "{class}" in texts[1] and all(len(case.masks) == 1 for case in cases)
        one_channel = "{id}/{id}" in texts[0] and all(len(case.images) == 1 for case in cases)
        is_known = any(files == other.files for other in readings)
        if one_class or one_channel or is_known or len(left) > (1 - LEAST) * len(pictures):
            continue
        what = f"{len(files)} images, {len(masks)} masks"
        if classes := sorted({name for case in cases for name in case.masks if name}):
            what += f" of {len(classes)} classes ({', '.join(classes[:5])})"
        doubts = [f"leaves {len(left)} pictures such as {left[0]}"] if left else []
        doubts += ["leaves out what has no partner"] if skip else []
        readings.append(Reading(("--masks", *texts, *skip), files, what, len(left), doubts))
    return readings


# ---------------------------------------------------------------- a look at the files


def _find_doubts(files):
    """What the files of a Reading say against it."""
    images, masks = (list(chain(*own)) for own in zip(*files.values(), strict=True))
    (few, _), (few_of_masks, foreground) = (
        np.median([_count(Path(path)) for path in own[:: -(-len(own) // LOOKED_AT)]], axis=0)
        for own in (images, masks)
    )
    if few_of_masks < MASK or few >= few_of_masks:
        return ["the values do not tell which are masks"]
    if foreground > 0.5:
        return [f"{foreground:.0%} of the masks is foreground"]
    twins = _find_twins(map(Path, files))
    return [f"the same image is there twice: {twins[0]} and {twins[1]}"] if twins else []


def _count(path):
    """(part of the pixels that have the commonest values, part that is not 0) of a mask."""
    try:
        if file_format(path) == "volume":
            volume = open_volume(path)
            values = volume[len(volume) // 2]
        else:
            _, values = read_mask(path if path.suffix.lower() == ARRAY else Page(path, 0))
    except ValueError:  # of a photograph, or DICOM
        return 0.0, 1.0
    counts = np.sort(np.unique(values, return_counts=True)[1])[-FEW_VALUES:]
    return counts.sum() / values.size, np.count_nonzero(values) / values.size


def _find_twins(paths):
    """Two images of the same bytes, or of the same name and pixels; None where there are none.

    Pixels are read of LOOKED_AT names, and of as many pictures of each.
    """
    by_size, by_name = {}, {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
        if not file_format(path):
            by_name.setdefault(base_name(path).casefold(), []).append(path)
    by_name = [own[:LOOKED_AT] for own in by_name.values() if len(own) > 1][:LOOKED_AT]
    for groups, read in ((by_size.values(), Path.read_bytes), (by_name, _read_pixels)):
        for own in groups:
            seen = {}
            for path in own if len(own) > 1 else ():
                other = seen.setdefault(hash(read(path)), path)
                if other != path:
                    return other, path
    return None


def _read_pixels(path):
    return read_image(Page(path, 0)).pixels.tobytes()
