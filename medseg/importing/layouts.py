"""`python download.py FOLDER`: which known layout a folder has, by a table of patterns.

A row is taken only where it uses every picture of the folder, no other such row gives other pairs,
the values say which side is masks, and no image is there twice. Else all that may be meant is
listed: to ask is better than to be wrong.
"""

import contextlib
import io
import os
import re
import shlex
from collections import Counter
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.coco import ANNOTATIONS, SPLITS
from medseg.duplicates import find_twins
from medseg.files import base_name, file_format, read_json
from medseg.importing.pairs import find_drawn, pair, patterns_of_folders
from medseg.masks import read_mask
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
<I>                                    <M>
**/<I>/**/{id}.*                       **/<M>/**/{class}/{id}.*
**/<I>/**/{id}.*                       **/<M>/**/{class}/{id}_*.*
{id:**}.*                              {id:**}<E>.*
{id:**}.*                              {id:**}<E>{part}.*
{id:**}.{jpg,jpeg,bmp,tif}             {id:**}.png
"""  # of images, of masks; <I>, <M>, <E>: each such word of the folder; alone: two plain folders
OUTLINES = {  # keys of a JSON file, and the flag that reads it
    "--labelme": {"shapes", "imagePath"},
    "--coco": {"images", "annotations", "categories"},
    "--via": {"_via_img_metadata"},
}
FEW_VALUES, MASK = 16, 0.95  # the commonest values of a mask hold such a part of its pixels
LOOKED_AT = 8  # files of each side
SAMPLED = 2000  # names by which a row is ruled out at once
SHOWN = 6  # readings, and words of a kind that are tried


class Reading(NamedTuple):
    """What a row of the table makes of a folder.

    flags: that say the same. cases: [Pair]. left: pictures of the folder that it does not use.
    doubt: why it may not be meant, "" where nothing speaks against it.
    """

    flags: tuple
    cases: list
    left: list
    doubt: str = ""

    def files(self):
        """{first file of an image: all of its files, masks at last}."""
        masks = [sorted(chain(*case.masks.values())) for case in self.cases]
        images = [[*case.images.values()] for case in self.cases]
        return {own[0]: (own, more) for own, more in zip(images, masks, strict=True)}

    def describe(self):
        n_masks = sum(len(masks) for _, masks in self.files().values())
        line = f"{len(self.cases)} images, {n_masks} masks"
        if classes := sorted({name for case in self.cases for name in case.masks if name}):
            line += f" of {len(classes)} classes ({', '.join(classes[:5])})"
        left = f"leaves {len(self.left)} pictures such as {self.left[0]}" if self.left else ""
        return "; ".join(filter(None, (line, left, self.doubt)))


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
    names = list(walk(folder, ("**", "*")))
    paths = [Path(folder, name) for name in set(names) - find_drawn(names)]
    choices = [(flags, "outlines") for flags in _find_outlines(folder, paths)]
    readings = _find_masks(folder, paths)
    sure = [reading for reading in readings if not reading.left and not reading.doubt]
    if choices:
        readings, sure = sure, []
    elif sure and all(other.files() == sure[0].files() for other in sure):
        readings[readings.index(sure[0])] = sure[0] = _look_closer(sure[0])
        readings = readings if sure[0].doubt else sure[:1]
    else:
        sure = []
    readings.sort(key=lambda reading: len(reading.left))
    choices += [(reading.flags, reading.describe()) for reading in readings[:SHOWN]]
    is_sure = len(choices) == 1 and not (readings and (not sure or sure[0].doubt))
    for flags, what in choices:
        command = shlex.join(["python", "download.py", *typed, *flags])
        print(f"found {what}; the same as: {command}" if is_sure else f"  {command}   # {what}")
    if is_sure:
        return choices[0][0]
    if not choices:
        example = "--masks 'D/{id}.jpg' 'D/{id}_mask.png' (docs/own-data.md)"
        raise ValueError(f"{folder}: no known layout: say which files are images, as {example}")
    if len(choices) == 1:
        raise ValueError(f"{folder}: one reading, which is not sure: run it if it is meant")
    raise ValueError(
        f"{folder}: {len(choices)} readings, none of them sure: run the one that is meant"
    )


def _find_outlines(folder, paths):
    """[flags] that read the files of outlines below a folder."""
    if Path(folder, "data.yaml").is_file():
        return [("--yolo", folder)]
    if paths and {path.suffix.lower() for path in paths} <= {".npz", ".mat"}:
        return [("--arrays", folder)]
    found = {}
    for path in sorted(path for path in paths if path.suffix.lower() == ".json"):
        with contextlib.suppress(ValueError):
            content = {} if path.name in OWN_JSON else read_json(path)
            for flag, keys in OUTLINES.items():
                if isinstance(content, dict) and keys <= content.keys():
                    own = [] if flag == "--labelme" else [str(path)]
                    found[(flag, *own, folder)] = None
        if ("--labelme", folder) in found:
            break  # the import reads the others
    return list(found)


# ---------------------------------------------------------------- the table


def _find_masks(folder, paths):
    """[Reading] of the rows of the table that pair pictures of the folder, each only once."""
    known = re.compile(f".+({KNOWN})", re.IGNORECASE)
    pictures = {path for path in paths if known.fullmatch(path.name)}
    samples = sorted(same_form(str(path.relative_to(folder))) for path in pictures)
    samples = samples[:: -(-len(samples) // SAMPLED) or 1]
    places = {place for path in pictures for place in path.relative_to(folder).parents}
    ending = re.compile(rf"[\W_]({'|'.join(ENDS)})(?=[^a-z]*$)", re.IGNORECASE)
    ends = Counter(end[0] for path in pictures if (end := ending.search(base_name(path))))
    words = {"<I>": _named(places, IMAGES), "<M>": _named(places, MASKS)}
    words["<E>"] = [end for end, _ in ends.most_common(SHOWN)]
    readings = {}
    for row in TABLE.split("\n")[1:-1]:
        for chosen in product(*(words[mark] if mark in row else [""] for mark in words)):
            texts = re.split(" {2,}", row)
            for mark, word in zip(words, chosen, strict=True):
                texts = [text.replace(mark, word) for text in texts]
            if texts == [*chosen[:2]]:
                texts = _patterns_of_words(folder, texts, places)
            elif all(
                any(map(compile_parts((*text.split("/"),)).fullmatch, samples)) for text in texts
            ):
                texts = [os.path.join(folder, text) for text in texts]
            else:
                continue
            if texts and texts[0] != texts[1] and (reading := _read(texts, pictures)):
                readings.setdefault(str(reading.files()), reading)
    return list(readings.values())


def _named(places, words):
    """The names of folders that are one of the words, or end with it."""
    wanted = re.compile(rf"(.*[\W_\d])?({'|'.join(words)})", re.IGNORECASE)
    found = Counter(place.name for place in places if wanted.fullmatch(place.name))
    return list(found) if len(found) <= SHOWN else []


def _patterns_of_words(folder, names, places):
    """What `patterns_of_folders` makes of the only two folders of these names, or None."""
    found = [[str(Path(folder, own)) for own in places if own.name == name] for name in names]
    with contextlib.suppress(ValueError):
        return patterns_of_folders(*chain(*found)) if [*map(len, found)] == [1, 1] else None


def _read(texts, pictures):
    """The Reading of two patterns, or None where they pair less than is worth telling."""
    for skip in ((), ("--skip-unpaired",)):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cases = pair(*texts, skip_unpaired=bool(skip))
            break
        except (ValueError, FileNotFoundError) as error:
            if "--skip-unpaired" not in str(error):
                return None
    reading = Reading((), cases, [], "leaves out what has no partner" if skip else "")
    images, masks = (list(chain(*own)) for own in zip(*reading.files().values(), strict=True))
    left = sorted(map(str, pictures.difference(images, masks)))
    one_class = "{class}" in texts[1] and all(len(case.masks) == 1 for case in cases)
    one_channel = "{id}/{id}" in texts[0] and len(cases[0].images) == 1
    if one_class or one_channel or 4 * len(left) > 3 * len(pictures):
        return None
    return reading._replace(flags=("--masks", *texts, *skip), left=left)


# ---------------------------------------------------------------- a look at the files


def _look_closer(reading):
    """The Reading with what its files say against it as doubt."""
    images, masks = (list(chain(*own)) for own in zip(*reading.files().values(), strict=True))
    (few, _), (few_of_masks, foreground) = (
        np.median([_count(path) for path in own[:: -(-len(own) // LOOKED_AT)]], axis=0)
        for own in (images, masks)
    )
    doubt = ""
    if few_of_masks < MASK or few >= few_of_masks:
        doubt = "the values do not tell which are masks"
    elif foreground > 0.5:
        doubt = f"{foreground:.0%} of the masks is foreground"
    elif twins := find_twins(list(reading.files())):
        doubt = f"the same image is there twice: {twins[0]} and {twins[1]}"
    return reading._replace(doubt=doubt)


def _count(path):
    """(part of the pixels that have the commonest values, part that is not 0) of a mask."""
    try:
        if file_format(path) == "volume":
            volume = open_volume(path)
            values = volume[len(volume) // 2]
        else:
            values = read_mask(Page(path, 0))[1]
    except ValueError:  # of a photograph, or DICOM
        return 0.0, 1.0
    counts = np.sort(np.unique(values, return_counts=True)[1])[-FEW_VALUES:]
    return counts.sum() / values.size, np.count_nonzero(values) / values.size
