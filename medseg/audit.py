"""What a data set holds, what is wrong with it, and a split that keeps neighbours together."""

import json
import math
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from tqdm import tqdm

from medseg.coco import (
    ANNOTATIONS,
    LAYOUT,
    MAX_CLASSES,
    SPLITS,
    image_path,
    listed,
    load_coco,
    recorded_settings,
    used_categories,
)
from medseg.drawing import class_colors, outline, with_legend
from medseg.files import atomic_write, parallel_map
from medseg.images import SUFFIXES, pixel_format, read_image
from medseg.run_lengths import unite

TILE = 160  # pixels a side of an image in the contact sheet
TILES = 8  # of each split, and in a row
THUMBNAIL = 16  # pixels a side
NEAR_DUPLICATE = 0.9  # correlation of two thumbnails from which on images count as duplicates


@dataclass
class SplitSummary:
    """What was counted in the images of one split."""

    sizes: Counter = field(default_factory=Counter)  # (width, height) -> images
    kinds: Counter = field(default_factory=Counter)  # how pixels are stored -> images
    pixels: int = 0
    foreground: int = 0  # pixels of any class
    class_pixels: Counter = field(default_factory=Counter)  # name -> pixels
    class_images: Counter = field(default_factory=Counter)  # name -> images that have it
    empty: int = 0  # images without foreground
    unreadable: int = 0  # images
    thumbnails: list = field(default_factory=list)  # (file name, array)
    tiles: list = field(default_factory=list)  # for the contact sheet


def require_data_set(root):
    """FileNotFoundError where the folder holds no split at all."""
    if not any((root / split / ANNOTATIONS).is_file() for split in SPLITS):
        what = "no data set in this folder" if root.is_dir() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; {LAYOUT} (`python download.py` makes dataset/)")


def audit(root, out, open_split):
    """Print what a data set holds and what is wrong with it; write out/contact_sheet.jpg.

    open_split(root, split, classes=names, coco=coco): the COCOSegmentationDataset of a split.
    Returns the list of problems, a line each, in the order of the splits.
    """
    problems, damaged, summaries, cocos, categories = [], {}, {}, {}, {}
    for split in SPLITS:
        try:
            cocos[split] = load_coco(root / split, damaged.setdefault(split, []))
            categories[split] = used_categories(cocos[split])
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    names = list(dict.fromkeys(name for used in categories.values() for name in used))
    for split in categories:
        problems += damaged[split]
        try:
            dataset = open_split(root, split, classes=names, coco=cocos.pop(split))
        except ValueError as error:
            problems.append(str(error))
            continue
        summaries[split] = _examine_split(dataset, split, problems)
        _print_split(split, dataset, summaries[split])
        lacking = [name for name in names if name not in categories[split]]
        if lacking:
            shown = listed(lacking, MAX_CLASSES)
            print(f"  lacks        {shown}: no annotation of it in this split")
    for split in SPLITS[1:]:
        if split in summaries and "train" in summaries:
            found = near_duplicates(summaries[split].thumbnails, summaries["train"].thumbnails)
            if found:
                print(f"{split} beside train: {found}")
    tiles = [tile for summary in summaries.values() for tile in summary.tiles]
    if tiles:
        shown = names[:MAX_CLASSES]  # a line each below the tiles: a JPEG ends at 65,500 pixels
        print(f"contact sheet: {_save_contact_sheet(tiles, shown, out / 'contact_sheet.jpg')}")
    return problems


def _examine_split(dataset, split, problems):
    """Read every image of a split; returns its SplitSummary and adds to `problems`."""
    summary, total = SplitSummary(), len(dataset)
    shown = set(np.linspace(0, total - 1, TILES).astype(int).tolist())

    def examine(index):
        path = dataset.path(index)
        image = read_image(path)
        masks = dataset.run_lengths(index, image.size)
        tile = _tile(image, masks, dataset.n_classes) if index in shown else None
        areas = {dataset.classes[channel]: mask.area for channel, mask in masks.items()}
        area = unite(list(masks.values())).area if masks else 0
        return image.size, pixel_format(path), area, areas, (path.name, _thumbnail(image)), tile

    results = parallel_map(examine, range(total))
    for result in tqdm(results, f"reading {split}", total, unit=" images", disable=None):
        if isinstance(result, Exception):
            summary.unreadable += 1
            problems.append(str(result))
            continue
        size, kind, area, areas, thumbnail, tile = result
        summary.sizes[size] += 1
        summary.kinds[kind] += 1
        summary.pixels += size[0] * size[1]
        summary.foreground += area
        summary.empty += area == 0
        for name, pixels in areas.items():
            summary.class_pixels[name] += pixels
            summary.class_images[name] += pixels > 0
        summary.thumbnails.append(thumbnail)
        if tile is not None:
            summary.tiles.append(tile)
    return summary


def _print_split(split, dataset, summary):
    listed = {PurePosixPath(record["file_name"]).name for record in dataset.coco.imgs.values()}
    unlisted = sum(
        path.suffix.lower() in SUFFIXES and path.name not in listed
        for path in dataset.image_dir.iterdir()
    )
    pixels = max(summary.pixels, 1)
    percent = 100 * summary.foreground / pixels
    sizes = [f"{w}x{h}: {count}" for (w, h), count in summary.sizes.most_common(5)]
    kinds = [f"{kind}: {count}" for kind, count in summary.kinds.most_common(5)]
    more = " ..." if len(summary.sizes) > 5 else ""
    print(f"{split}: {len(dataset)} images, {len(dataset.coco.anns)} annotations")
    print(f"  sizes        {', '.join(sizes)}{more}")
    print(f"  pixels       {', '.join(kinds)}")
    print(
        f"  foreground   {percent:.2f} % of the pixels "
        f"(answering background everywhere is {100 - percent:.2f} % accurate)"
    )
    ids = used_categories(dataset.coco)
    annotations = Counter(entry["category_id"] for entry in dataset.coco.anns.values())
    for name in dataset.classes[:MAX_CLASSES]:
        count = sum(annotations[key] for key in ids.get(name, ()))
        share, images = 100 * summary.class_pixels[name] / pixels, summary.class_images[name]
        print(
            f"  category     {name}: {count} annotations, {share:.2f} % of the pixels, "
            f"in {images} images"
        )
    if len(dataset.classes) > MAX_CLASSES:
        print(f"  and {len(dataset.classes) - MAX_CLASSES} more categories")
    print(
        f"  no lesion    {summary.empty} images; unreadable {summary.unreadable}; "
        f"not listed in {ANNOTATIONS} {unlisted}"
    )


def _thumbnail(image):
    """An image as 16x16 grey values, each less the mean of the nine around it.

    So the brightness of large areas, which images of one kind have in common, counts for little.
    """
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, np.float32)
    padded = np.pad(values, 1, mode="edge")
    nine = sliding_window_view(padded, (3, 3)).mean((2, 3))
    return (values - nine).ravel()


def near_duplicates(some, train):
    """A line on what a split's images have in common with those of train, '' without images.

    some, train: lists of (file name, thumbnail). The mean thumbnail of train is subtracted from
    all: what every image of the data set shows makes no duplicate.
    """
    if not some or not train:
        return ""
    own, others = (np.stack([values for _, values in images]) for images in (some, train))
    mean = others.mean(0) if len(others) > 1 else 0
    correlation = (_unit_length(own - mean) @ _unit_length(others - mean).T).max(1)
    share = (correlation >= NEAR_DUPLICATE).mean()
    text = (
        f"{share:.1%} of the images have a near-duplicate there "
        f"(correlation of 16x16 grey details from {NEAR_DUPLICATE} on)"
    )
    numbers = {slice_number(name) for name, _ in train}
    own_numbers = [slice_number(name) for name, _ in some]
    neighbours = [bool({n - 1, n + 1} & numbers) for n in own_numbers if n is not None]
    if neighbours:
        text += f", {np.mean(neighbours):.1%} a neighbour by the number in the file name"
    return text


def _unit_length(vectors):
    """Rows with mean 0 and length 1: the product of two is their correlation."""
    vectors = vectors - vectors.mean(1, keepdims=True)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)


def slice_number(name):
    """The number that a file name begins with, or None."""
    digits = re.match(r"\d+", name)
    return int(digits[0]) if digits else None


def _tile(image, masks, n_classes):
    """A TILE x TILE picture of the image with the outlines of its masks in the class colours.

    masks: {channel: RunLengths}.
    """
    pixels = np.array(image.resize((TILE, TILE), Image.Resampling.BILINEAR))
    colors = class_colors(n_classes)
    for channel, mask in list(masks.items())[:MAX_CLASSES]:
        pixels[outline(mask.draw(TILE, TILE))] = colors[channel]
    return Image.fromarray(pixels)


def _save_contact_sheet(tiles, class_names, path):
    sheet = Image.new("RGB", (TILES * TILE, math.ceil(len(tiles) / TILES) * TILE))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % TILES * TILE, number // TILES * TILE))
    with atomic_write(path, sync=False) as file:
        with_legend(sheet, class_names).save(file, "JPEG", quality=90)
    return path


# ---- a split by blocks of neighbouring slices ------------------------------------------------


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
        settings = recorded_settings(root / split)
        info = info or {key: value for key, value in settings.items() if value}
        counts.append(len(coco.imgs))
        entries += _numbered_images(coco, root / split)
    if len({path.name for _, path, *_ in entries}) < len(entries):
        raise ValueError(f"{root}: two splits hold images of one name, which cannot share a folder")
    entries.sort(key=lambda entry: (entry[0], entry[1].name))
    blocks = [entries[start : start + block] for start in range(0, len(entries), block)]
    order = np.random.default_rng(seed).permutation(len(blocks))
    ends = np.cumsum(counts) / len(entries) * len(blocks)
    split_of = np.searchsorted(ends, np.arange(len(blocks)) + 0.5)  # of the n-th block drawn
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for number, split in enumerate(SPLITS):
            drawn = sorted(order[split_of == number])
            if not drawn:
                raise ValueError(f"{root}: too few images for blocks of {block} in three splits")
            chosen = [entry for index in drawn for entry in blocks[index]]
            _write_split(building / split, chosen, categories, info)
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _numbered_images(coco, folder):
    """[(file number, path, image record, its annotations)] of a split."""
    entries = []
    for image_id in coco.getImgIds():
        record = coco.imgs[image_id]
        path = image_path(folder, record["file_name"])
        if slice_number(path.name) is None:
            raise ValueError(
                f"{path}: the file name does not begin with a number, "
                "so its neighbours are not known"
            )
        entries.append((slice_number(path.name), path, record, coco.imgToAnns.get(image_id, [])))
    return entries


def _write_split(folder, entries, categories, info):
    folder.mkdir(parents=True)
    images, annotations = [], []
    for index, (_, path, record, own) in enumerate(entries):
        try:
            os.link(path, folder / path.name)
        except OSError:
            shutil.copy2(path, folder / path.name)
        images.append({**record, "id": index, "file_name": path.name})
        for annotation in own:
            annotations.append({**annotation, "id": len(annotations), "image_id": index})
    lists = {"images": images, "annotations": annotations, "categories": categories}
    content = {"info": info, **lists} if info else lists
    (folder / ANNOTATIONS).write_text(json.dumps(content))
