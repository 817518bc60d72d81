"""Images and masks of any origin -> the splits of a data set, as COCO run lengths.

An importer hands over a list of `Example`s and the names of their classes; `write_dataset` draws
the split and writes it. Images are read as they are written, a few at a time, on all cores.
"""

import contextlib
import functools
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from tqdm import tqdm

from medseg.coco import (
    ANNOTATIONS,
    IGNORE,
    MAX_CLASSES,
    listed,
    read_annotations,
    recorded_settings,
)
from medseg.dataset_folder import install
from medseg.files import parallel_map
from medseg.images import SUFFIXES, Picture, measure_window, save_picture
from medseg.phantoms import is_phantom
from medseg.samples import open_picture, size_as_shown
from medseg.settings import window_limits
from medseg.splits import (
    PERCENTAGES,
    draw_splits,
    keep_splits,
    present_splits,
)

OWN = "own data imported by download.py"  # info.description of every imported split


@dataclass(frozen=True)
class Example:
    """One image with its masks, not read yet.

    name: the stem of the file to write, unique in the data set whatever the case. group: images
    of one group stay in one split, and their records name it; "" is a group of its own.
    read(): (image, masks). image is a `Picture`, saved as PNG or TIFF, or the Path of a file of
    `medseg.samples.FORMATS` that is upright and was read without an error, copied as it is. masks
    is {class name: RunLengths} of the image's size; a class that is not there need not be named.
    read raises FileNotFoundError, or ValueError naming the file; several threads call it.
    split: to which the image belongs already, or "".
    """

    name: str
    group: str
    read: Callable
    split: str = ""


def deal_examples(examples, percentages, into, seed):
    """{split: Examples} as `draw_splits` deals them, or all into the one split.

    Where percentages are PERCENTAGES and images have their split already, they keep it: see
    `keep_splits`.
    """
    examples = sorted(examples, key=attrgetter("name"))
    if into:
        return {into: examples}
    if tuple(percentages) == PERCENTAGES and any(example.split for example in examples):
        return keep_splits(examples, seed)
    return draw_splits(examples, percentages, seed)


def write_dataset(root, dealt, classes, *, info, any_order, source):
    """Write {split: Examples} to `root`, whole or not at all, and print what each split holds.

    The splits replace those of their names; others are never touched. classes: names, which become
    categories 1, 2, ... in this order. Splits that stay have to have the same; where they have some
    more besides, these are added. any_order: theirs counts. info: {name: JSON value} to record
    with each split. source: what the message names where all masks are empty.
    Raises ValueError where the classes disagree or all masks are empty; and what an example's
    read() raises.
    """
    root, total = Path(root), sum(map(len, dealt.values()))
    stay = [name for name in present_splits(root) if name not in dealt]
    classes = check_classes(root, stay, classes, any_order)
    ids = {name: number for number, name in enumerate(classes, start=1)}
    categories = [{"id": own, "name": name, "supercategory": "none"} for name, own in ids.items()]
    info, written = {"description": OWN, **info}, {}

    def write_splits(folder):
        with tqdm(desc="importing", total=total, unit="image", disable=None) as bar:
            for split, examples in dealt.items():
                written[split] = write_split(folder / split, examples, ids, bar)
                content = {"info": info, "categories": categories, **as_coco(written[split])}
                (folder / split / ANNOTATIONS).write_text(json.dumps(content))
        if not any(own.keys() - {IGNORE} for images in written.values() for _, own in images):
            what = f"the masks or outlines of all {total} images cover no pixel"
            raise ValueError(f"{source}: {what}")

    install(root, write_splits)
    for split, images in written.items():
        print_counts(split, images, classes)
    if len(classes) > MAX_CLASSES:
        print(
            f"note: {len(classes)} classes are more than the {MAX_CLASSES} that train.py can tell "
            "apart: choose some with --classes here, or train all as one with --classes union"
        )


def check_free(root, splits, force):
    """Raise ValueError where `root` has one of `splits`, unless `force` says to replace them."""
    there = [split for split in present_splits(root) if split in splits]
    if there and not force:
        raise ValueError(
            f"{root / there[0]} is there already: --force replaces it, --into writes another "
            "split, with --add beside the images that it holds, --data names another folder"
        )


def check_classes(root, stay, classes, any_order):
    """The names in `classes` with those that the splits `stay` have besides.

    Raises ValueError for a name that cannot be one, where a split that stays lacks one of them,
    and, without any_order, where it has them in another order.
    """
    counts = Counter(classes)
    for name in classes:
        if not name or not name.isprintable() or counts[name] > 1:
            raise ValueError(f"the class name {name!r:.60} is empty, unprintable or there twice")
    for split in stay:
        coco = read_annotations(root / split, skipped=[])
        if is_phantom({split: coco}):
            raise ValueError(f"{root / split} holds phantoms: name another folder with --data")
        present = [str(category.get("name")) for category in coco["categories"]]
        remaining = set(present) if any_order else iter(present)
        if not all(name in remaining for name in classes):  # of an iterator: in the same order
            raise ValueError(
                f"{root / split} has the classes {listed(present)}, the new images "
                f"{listed(classes)}: give the same in the same order with --classes"
            )
        classes = present
    return list(classes)


def picture_window(paths, window, present):
    """(center, width) to record of pictures of more than 8 bits, by which they are read, or None.

    window: --window, or None for that of the splits that stay, or else `measure_window`. present:
    of `present_settings`. Raises ValueError for --window on pictures of 8 bits.
    """
    measured = measure_window(paths) if paths else None
    if measured is None and window:
        raise ValueError(f"{paths[0]}: --window is for more than 8 bits")
    return agreed_window(measured, window, present)


def agreed_window(measured, window, present):
    """What `picture_window` returns, of the window that was measured, None of 8 bits."""
    if measured is None:
        return None
    recorded = (own["window"] for _, own in present if isinstance(own["window"], tuple))
    window = tuple(window or next(recorded, measured))
    low, high = window_limits(window)
    print(f"grey values: {low:g} to {high:g} are shown as 0 to 255, in every image")
    return window


def present_settings(root, stay):
    """[(folder, what `recorded_settings` returns)] of the splits that stay."""
    return [(root / split, recorded_settings(root / split)) for split in stay]


# ---------------------------------------------------------------- one split


def write_split(folder, examples, ids, bar):
    """Write the images of a split to the new `folder`; its annotation file is left to the caller.

    ids: {class name: category id}. Returns [(record, {class name: annotation})], as COCO has them.
    """
    folder.mkdir()
    written, numbers = [], itertools.count(1)
    convert = functools.partial(_convert, folder=folder, ids=ids)
    # Closed at once where something fails: the threads write into a folder that then goes.
    with contextlib.closing(parallel_map(convert, examples, catch=())) as converted:
        for index, (record, annotations) in enumerate(converted):
            for annotation in annotations.values():
                annotation |= {"id": next(numbers), "image_id": index}
            written.append(({"id": index, **record}, annotations))
            bar.update()
    return written


def as_coco(written):
    """The lists of images and annotations of what `write_split` returns, in a dict."""
    annotations = [annotation for _, own in written for annotation in own.values()]
    return {"images": [record for record, _ in written], "annotations": annotations}


def _convert(example, folder, ids):
    """Write the image of an Example; returns its COCO record and {class name: annotation}.

    Neither has its ids. ids: {class name: category id}.
    """
    image, masks = example.read()
    file_name, (width, height) = _save_image(image, folder, example.name)
    annotations = {}
    for name, runs in masks.items():
        if runs.area:
            annotations[name] = {
                "category_id": ids[name],
                "segmentation": {**runs.coco, "counts": runs.counts.decode("ascii")},
                "bbox": runs.box,
                "area": runs.area,
                "iscrowd": 0,
            }
    record = {"file_name": file_name, "width": width, "height": height}
    if example.group:
        record["group"] = example.group  # COCO has no such key, and other readers pass over it
    if isinstance(image, Picture) and image.spacing:
        record["spacing"] = [float(f"{mm:.7g}") for mm in image.spacing]  # likewise
    return record, annotations


def _save_image(image, folder, name):
    """Save a `Picture`, or copy the file of a Path, to folder/name.*.

    Returns (file name, (width, height)).
    """
    if isinstance(image, Picture):
        return save_picture(image, folder / name).name, image.size
    with open_picture(image) as picture:
        size, file_format = size_as_shown(picture), picture.format
    suffix = image.suffix.lower()
    if suffix not in SUFFIXES:
        suffix = SUFFIXES[0] if file_format == "JPEG" else f".{file_format.lower()}"
    shutil.copyfile(image, folder / (name + suffix))
    return name + suffix, size


def print_counts(split, images, classes, total=None):
    """Print the images of a split, and each class's part of the pixels and of the images.

    images: as of `write_split`. total: how many the split holds now, where these were added.
    """
    groups = {record.get("group", "") for record, _ in images}
    of_groups = f" of {len(groups)} groups" if groups != {""} else ""
    added = f" added, {total} in all" if total else ""
    print(f"{split}: {len(images)} images{of_groups}{added}")
    pixels = sum(record["width"] * record["height"] for record, _ in images)
    areas = Counter()
    for _, own in images:
        areas.update({name: annotation["area"] for name, annotation in own.items()})
    shown = classes[:MAX_CLASSES]
    width = max(map(len, shown), default=0)
    for name in shown:
        percent, count = 100 * areas[name] / pixels, sum(name in own for _, own in images)
        doubt = "  <- more than half: the right folder, and not inverted?" if percent > 50 else ""
        if name == IGNORE:
            doubt = ", which count in no loss and no score"
        print(f"  {name:{width}}  {percent:6.2f} % of the pixels, in {count} images{doubt}")
    if len(classes) > len(shown):
        print(f"  and {len(classes) - len(shown)} more classes")
