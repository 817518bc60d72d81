"""The splits of a data set: complete, present, drawn, linked."""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.coco import (
    ANNOTATIONS,
    MAX_CLASSES,
    SPLITS,
    image_path,
    load_coco,
    read_annotations,
    recorded_group,
    recorded_settings,
    used_categories,
)

ROBOFLOW = re.compile(r"(.+)\.rf\.\w+")  # the name of a picture, and a number of its variant
FEW = 20  # images of train and valid: of fewer, all are to be scored
PERCENTAGES = (70, 15, 15)  # of the imported images in train, valid and test


def read_split(folder, damaged):
    """The annotations of one complete split: the file parses and every image it lists exists.

    damaged: a list; each record that cannot be used is left out and adds a line to it.
    Raises ValueError naming the file that is missing or wrong.
    """
    folder = Path(folder)
    try:
        coco = read_annotations(folder, damaged)
    except FileNotFoundError:  # its message suggests to get the data, which is going on here
        raise ValueError(f"{folder / ANNOTATIONS} is missing") from None
    for image in coco["images"]:
        path = image_path(folder, image["file_name"])
        if not path.is_file():
            raise ValueError(f"{path} is listed in {ANNOTATIONS} but missing")
    return coco


def read_splits(root, damaged):
    """{'train': annotations, 'valid': ..., 'test': ...} of a data set; see `read_split`."""
    return {split: read_split(Path(root) / split, damaged) for split in SPLITS}


def present_splits(root):
    """The names of the splits that `root` holds anything under, in their order."""
    return tuple(split for split in SPLITS if os.path.lexists(Path(root) / split))


def check_disk_space(folder, needed):
    """Raise OSError unless the file system of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {needed / 2**20:.0f} MiB are needed and its disk has "
            f"{free / 2**20:.0f} MiB free"
        )


# ---- splits drawn of imported images ---------------------------------------------------------


def wanted_splits(percentages, into):
    """The names of the splits that are to be written, in their order; into: the only one."""
    drawn = (name for name, part in zip(SPLITS, percentages, strict=True) if part)
    return (into,) if into else tuple(drawn)


def draw_splits(examples, percentages, seed):
    """{split: examples} of every split with a percentage, drawn by `seed`; groups stay whole.

    examples: objects with a name and a group; "" is a group of its own. Groups come in random
    order, each to the split that lacks most images. Every split gets one, else a ValueError.
    """
    groups = {}
    for example in examples:
        key = example.group, "" if example.group else example.name
        groups.setdefault(key, []).append(example)
    drawn = {name: [] for name in wanted_splits(percentages, None)}
    if len(groups) < len(drawn):
        what = "images" if len(groups) == len(examples) else "groups of images"
        raise ValueError(
            f"{len(groups)} {what} are too few for {len(drawn)} splits: an import of your own "
            "images writes fewer with --split (as 100 0 0), or one with --into"
        )
    sizes = {n: len(examples) * part / 100 for n, part in zip(SPLITS, percentages, strict=True)}
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    for number, index in enumerate(order):
        empty = [name for name in drawn if not drawn[name]]
        candidates = empty if len(empty) == len(order) - number else drawn
        name = max(candidates, key=lambda name: sizes[name] - len(drawn[name]))
        drawn[name] += members[index]
    return {name: sorted(chosen, key=attrgetter("name")) for name, chosen in drawn.items()}


def keep_splits(examples, seed):
    """{split: examples} by the split that each names, or train; see `deal_missing`."""
    drawn = {name: [] for name in SPLITS}
    for example in examples:
        drawn[example.split or SPLITS[0]].append(example)
    if not drawn[SPLITS[0]]:
        raise ValueError("there is no train split: say with --split how to deal the images")
    return drawn | deal_missing(drawn[SPLITS[0]], [name for name in SPLITS if drawn[name]], seed)


def deal_missing(examples, present, seed):
    """{split: examples} of train and of the splits that are not present, dealt from those of train.

    Each gets its part of PERCENTAGES; a line says so.
    """
    missing = [name for name in SPLITS if name not in present]
    if not missing:
        return {SPLITS[0]: examples}
    parts = [part * (name in missing) for name, part in zip(SPLITS, PERCENTAGES, strict=True)]
    drawn = draw_splits(examples, (100 - sum(parts), *parts[1:]), seed)
    print(f"note: there is no {' and no '.join(missing)} split: dealt from train")
    return drawn


def augmented_groups(names):
    """The group of each file name: the picture that Roboflow has several variants of, else ""."""
    sources = [match[1] if (match := ROBOFLOW.match(name)) else "" for name in names]
    counts = Counter(sources)
    return [source if counts[source] > 1 else "" for source in sources]


# ---- a split by blocks of neighbouring slices ------------------------------------------------


def slice_number(name):
    """The number that a file name begins with, or None."""
    digits = re.match(r"\d+", name)
    return int(digits[0]) if digits else None


def grouped_split(root, target, seed=0, block=50):
    """Write the images of all splits of `root` to `target`, split anew by blocks of file numbers.

    Neighbouring slices then stay together, but for the edges of the blocks, so that a score owes
    less to them. The new splits have about the shares of the old ones; `block` images each go to
    one, drawn by `seed`. Files are linked where the file system can, else copied. Returns target.
    Raises ValueError where target exists or a name has no number.
    """
    root, target = Path(root), Path(target)
    if target.exists():
        raise ValueError(f"{target}: exists; remove it, or name another folder")
    entries, counts, categories, info = [], [], None, {}
    for split in SPLITS:
        coco = load_coco(root / split)
        categories = categories or coco.dataset["categories"]
        info = info or given_settings(root / split)
        counts.append(len(coco.imgs))
        entries += list_images(coco, root / split)
    for entry in entries:
        if slice_number(entry.name) is None:
            raise ValueError(
                f"{entry.path}: the file name does not begin with a number, "
                "so its neighbours are not known"
            )
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError(f"{root}: two splits hold images of one name, which cannot share a folder")
    entries.sort(key=lambda entry: (slice_number(entry.name), entry.name))
    blocks = [entries[start : start + block] for start in range(0, len(entries), block)]
    order = np.random.default_rng(seed).permutation(len(blocks))
    ends = np.cumsum(counts) / len(entries) * len(blocks)
    split_of = np.searchsorted(ends, np.arange(len(blocks)) + 0.5)  # of the n-th block drawn
    with whole_folder(target) as building:
        for number, split in enumerate(SPLITS):
            drawn = sorted(order[split_of == number])
            if not drawn:
                raise ValueError(f"{root}: too few images for blocks of {block} in three splits")
            chosen = [entry for index in drawn for entry in blocks[index]]
            link_split(building / split, chosen, categories, info)
    return target


# ---- images linked into other splits ---------------------------------------------------------


class LinkedImage(NamedTuple):
    """An image of a split, to be linked into another one."""

    path: Path
    name: str  # of the link
    record: dict
    annotations: list


def list_images(coco, folder):
    """[LinkedImage] of a split, called as their files are."""
    images = []
    for image_id in coco.getImgIds():
        record = coco.imgs[image_id]
        path = image_path(folder, record["file_name"])
        images.append(LinkedImage(path, path.name, record, coco.imgToAnns.get(image_id, [])))
    return images


def given_settings(folder):
    """What of `recorded_settings` has a value."""
    return {key: value for key, value in recorded_settings(folder).items() if value}


@contextlib.contextmanager
def whole_folder(target):
    """A new folder to fill, which becomes `target` at the end, or is gone where that fails."""
    building = target.with_name(f".{target.name}.new.tmp")
    shutil.rmtree(building, ignore_errors=True)  # what a killed process left
    try:
        yield building
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def link_split(folder, entries, categories, info, ways=(os.link, shutil.copy2)):
    """Link or copy the images to the new `folder`, see `link_or_copy`, with their annotations."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index, entry in enumerate(entries):
        link_or_copy(entry.path.resolve(), folder / entry.name, ways)
        images.append({**entry.record, "id": index, "file_name": entry.name})
        for annotation in entry.annotations:
            annotations.append({**annotation, "id": len(annotations), "image_id": index})
    lists = {"images": images, "annotations": annotations, "categories": categories}
    (folder / ANNOTATIONS).write_text(json.dumps({"info": info, **lists}))


def link_or_copy(path, target, ways=(os.link, shutil.copy2)):
    """Call the first of `ways` that raises no OSError: not all disks and accounts have links."""
    for way in ways[:-1]:
        with contextlib.suppress(OSError):
            return way(path, target)
    return ways[-1](path, target)


def next_training(root):
    """The command that trains on a data set, with the flags for its classes and its size."""
    command = ["python", "train.py"]
    if root != Path("dataset"):
        command += ["--data", str(root)]
    command += ["--recipe", "auto"]  # which would take classes that share no image for kinds of one
    splits = [split for split in present_splits(root) if split != "test"]
    cocos = {split: load_coco(root / split, skipped=[]) for split in splits}
    if 1 < len(used_categories(cocos["train"])) <= MAX_CLASSES:
        command += ["--classes", "each"]
    records = [record for coco in cocos.values() for record in coco.imgs.values()]
    groups = {recorded_group(record) or index for index, record in enumerate(records)}
    if len(records) < FEW and len(groups) > 1:  # the few of valid alone would tell little
        command += ["--folds", str(min(len(groups), 4))]
    return shlex.join(command)
