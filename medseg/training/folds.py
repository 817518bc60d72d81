"""Folds for a cross-validation: train and valid of a data set, dealt into several data sets."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.coco import ANNOTATIONS, load_coco, recorded_group
from medseg.splits import given_settings, link_split, list_images, present_splits, whole_folder


class Deal(NamedTuple):
    """Which image goes to which fold; nothing is written yet."""

    folds: list  # of {"train": [LinkedImage], "valid": [...], "test": [...]}
    categories: list
    info: dict  # what the import recorded
    groups: int  # that are kept together; 0 where none are recorded


def deal_images(root, count, seed=0, *, each_class=False, damaged=None):
    """Deal the images of train and valid of `root` into `count` folds: a `Deal`.

    valid of the k-th fold holds the k-th part, its train all others. test is that of `root`, or
    where there is none, the fold's own valid. Images with one "group" in their records stay
    together, all others are dealt one by one, by `seed`.
    each_class: whether every class has to be in each train. damaged: a list, to which damaged
    records and missing files add a line each and are left out; without it they are an error.
    Raises FileNotFoundError; ValueError for fewer images, or groups, than folds.
    """
    root = Path(root)
    info = given_settings(root / "train")
    images, categories = _read_images(root, present_splits(root), damaged)
    test = images.pop("test", None)
    pool = _rename([image for own in images.values() for image in own])
    groups = [recorded_group(image.record) for image in pool]
    try:
        fold_of = deal_groups(groups, count, seed)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from None
    if each_class:
        _check_classes(root, pool, fold_of, categories)
    folds = []
    for fold in range(count):
        parts = {"train": [], "valid": []}
        for image, own in zip(pool, fold_of, strict=True):
            parts["valid" if own == fold else "train"].append(image)
        parts["test"] = _rename(test) if test else parts["valid"]
        folds.append(parts)
    return Deal(folds, categories, info, len({*groups} - {""}))


def write_folds(deal, target):
    """Write the folds of a `Deal` as data sets: target/fold1, target/fold2, ..., all or none.

    Files are linked where the file system can, else copied.
    """
    with whole_folder(Path(target)) as building:
        for number, parts in enumerate(deal.folds, 1):
            for split, images in parts.items():
                folder, ways = building / f"fold{number}" / split, (os.link, os.symlink)
                link_split(folder, images, deal.categories, deal.info, (*ways, shutil.copy2))


def deal_groups(groups, count, seed=0):
    """The fold of each image, from 0 to count - 1; groups: a name each, "" is a group of its own.

    Groups are dealt whole, the largest first, those of one size in random order, each to the fold
    that has fewest images. Every fold gets one, else a ValueError.
    """
    members = {}
    for index, group in enumerate(groups):
        members.setdefault((group, None if group else index), []).append(index)
    if len(members) < count:
        what = "images" if len(members) == len(groups) else "groups of images"
        raise ValueError(f"{len(members)} {what} in train and valid are too few for {count} folds")
    members = list(members.values())
    order = np.random.default_rng(seed).permutation(len(members))
    folds = [[] for _ in range(count)]
    for index in sorted(order, key=lambda index: -len(members[index])):
        min(folds, key=len).extend(members[index])
    fold_of = np.empty(len(groups), int)
    for number, fold in enumerate(folds):
        fold_of[fold] = number
    return fold_of.tolist()


def _read_images(root, splits, damaged):
    """({split: [LinkedImage]}, the categories of all splits).

    Splits may number their categories in different ways: those of one name become one.
    """
    images, categories = {}, {}
    for split in splits:
        coco, renumbered = load_coco(root / split, damaged), {}
        for category in coco.dataset["categories"]:
            name = str(category.get("name"))
            own = categories.setdefault(name, {**category, "id": len(categories) + 1})
            renumbered[category["id"]] = own["id"]
        images[split] = _existing(list_images(coco, root / split), damaged)
        if not images[split]:
            raise ValueError(f"{root / split}: {ANNOTATIONS} lists no images that are there")
        for image in images[split]:
            for annotation in image.annotations:
                annotation["category_id"] = renumbered.get(annotation["category_id"])
    return images, list(categories.values())


def _existing(images, damaged):
    """The images whose files are there; the others as `deal_images` has it."""
    there = [image for image in images if image.path.is_file()]
    if len(there) < len(images):
        missing = [f"{image.path}: no such file" for image in images if not image.path.is_file()]
        if damaged is None:
            more = f" ({len(missing)} such)" if len(missing) > 1 else ""
            raise FileNotFoundError(missing[0] + more)
        damaged.extend(missing)
    return there


def _rename(images):
    """The same images with names that differ, whatever the case: with their split's, or a number.

    Where they differ already, they stay.
    """
    names = [image.name for image in images]
    in_split = [f"{image.path.parent.name}_{image.name}" for image in images]
    numbered = [f"{number:05}_{name}" for number, name in enumerate(names)]
    for choice in (names, in_split, numbered):
        if len({name.casefold() for name in choice}) == len(choice):
            break
    return [image._replace(name=name) for image, name in zip(images, choice, strict=True)]


def _check_classes(root, images, fold_of, categories):
    """ValueError where a class is in one fold only, whose training would then lack it."""
    for category in categories:
        folds = {
            fold
            for image, fold in zip(images, fold_of, strict=True)
            if any(own["category_id"] == category["id"] for own in image.annotations)
        }
        if len(folds) == 1:
            raise ValueError(
                f"{root}: all images with the class {category.get('name')} are in one fold, whose "
                "network could not learn it: try another --seed, or --classes union"
            )
