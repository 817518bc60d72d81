"""What a data set holds, and what is wrong with it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from tqdm import tqdm

from data import TURNED, COCOSegmentationDataset
from medseg.coco import (
    ANNOTATIONS,
    MAX_CLASSES,
    SPLITS,
    listed,
    load_coco,
    used_categories,
)
from medseg.coco_dialects import print_forgiven
from medseg.drawing import describe_shown
from medseg.duplicates import near_duplicates, thumbnail
from medseg.files import parallel_map
from medseg.images import SUFFIXES
from medseg.planning.contact_sheet import draw_tile, save_contact_sheet, spread_by_foreground
from medseg.run_lengths import unite
from medseg.samples import pixel_format

SHOWN = 8  # images of each split in the contact sheet


@dataclass
class SplitSummary:
    """What was counted in the images of one split."""

    sizes: Counter = field(default_factory=Counter)  # (width, height) -> images
    pixel_formats: Counter = field(default_factory=Counter)  # '8-bit RGB', ... -> images
    pixels: int = 0
    foreground: int = 0  # pixels of any class
    class_pixels: Counter = field(default_factory=Counter)  # name -> pixels
    class_images: Counter = field(default_factory=Counter)  # name -> images that have it
    turned: int = 0  # images that are stored turned or mirrored (EXIF)
    empty: int = 0  # images without foreground
    unreadable: int = 0  # images
    thumbnails: list = field(default_factory=list)  # (file name, array)
    shares: list = field(default_factory=list)  # of foreground, of each image; None: unreadable


def audit(root, out, n_shown=SHOWN):
    """Print what a data set holds and what is wrong with it; write out/contact_sheet.jpg.

    n_shown: how many images of each split are in the contact sheet, see `spread_by_foreground`.
    Returns the list of problems, a line each, in the order of the splits.
    """
    problems, damaged, summaries, cocos, categories, rows = [], {}, {}, {}, {}, []
    forgiven, channels = {}, ()
    for split in SPLITS:
        try:
            forgiven[split] = Counter()
            cocos[split] = load_coco(root / split, damaged.setdefault(split, []), forgiven[split])
            categories[split] = used_categories(cocos[split])
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    names = list(dict.fromkeys(name for used in categories.values() for name in used))
    for split in categories:
        problems += damaged[split]
        try:
            dataset = COCOSegmentationDataset(cocos.pop(split), root / split, classes=names)
        except ValueError as error:
            problems.append(str(error))
            continue
        summaries[split] = _examine_split(dataset, split, problems)
        channels = dataset.channel_names
        _print_split(split, dataset, summaries[split])
        print_forgiven(forgiven[split], "  note         ")
        rows.append(_tiles(dataset, summaries[split].shares, n_shown))
        lacking = [name for name in names if name not in categories[split]]
        if lacking:
            shown = listed(lacking, MAX_CLASSES)
            print(f"  lacks        {shown}: no annotation of it in this split")
    for split in SPLITS[1:]:
        if split in summaries and "train" in summaries:
            overlap = near_duplicates(summaries[split].thumbnails, summaries["train"].thumbnails)
            if overlap:
                print(f"{split} beside train: {overlap}")
    if any(rows):
        legend = names[:MAX_CLASSES]  # below the images: a JPEG ends at 65,500 pixels
        note = describe_shown(channels)
        sheet = save_contact_sheet(rows, legend, out / "contact_sheet.jpg", note)
        print(
            f"contact sheet: {sheet}, "
            f"{sum(map(len, rows))} images; in each split from least to most foreground"
        )
    return problems


def _examine_split(dataset, split, problems):
    """Read every image of a split; returns its SplitSummary and adds to `problems`."""
    summary, total = SplitSummary(), len(dataset)

    def examine(index):
        path = dataset.path(index)
        image = dataset.read(index)
        masks = dataset.run_lengths(index, image.size)
        areas = {dataset.classes[channel]: mask.area for channel, mask in masks.items()}
        area = unite(list(masks.values())).area if masks else 0
        small = path.name, thumbnail(image)
        return image.size, pixel_format(path), image.orientation > 1, area, areas, small

    results = parallel_map(examine, range(total))
    for result in tqdm(results, f"reading {split}", total, unit=" images", disable=None):
        if isinstance(result, Exception):
            summary.unreadable += 1
            summary.shares.append(None)
            problems.append(str(result))
            continue
        size, stored_as, turned, area, areas, small = result
        summary.sizes[size] += 1
        summary.pixel_formats[stored_as] += 1
        summary.turned += turned
        summary.pixels += size[0] * size[1]
        summary.foreground += area
        summary.empty += area == 0
        for name, pixels in areas.items():
            summary.class_pixels[name] += pixels
            summary.class_images[name] += pixels > 0
        summary.thumbnails.append(small)
        summary.shares.append(area / (size[0] * size[1]))
    return summary


def _tiles(dataset, shares, n_shown):
    """Of a split, what `save_contact_sheet` draws: (tile, file name, share of foreground)."""

    def tile(index):
        path = dataset.path(index)
        image = dataset.read(index)
        masks = dataset.run_lengths(index, image.size)
        name = path.relative_to(dataset.image_dir.parent).as_posix()
        percent = 100 * shares[index]
        about = f"{percent:.2f} % foreground" if percent >= 0.01 else "below 0.01 % foreground"
        if not percent:
            about = "no foreground"
        return draw_tile(image.rgb(), masks, dataset.n_classes), name, about

    return list(parallel_map(tile, spread_by_foreground(shares, n_shown), catch=()))


def _print_split(split, dataset, summary):
    names = {PurePosixPath(record["file_name"]).name for record in dataset.coco.imgs.values()}
    unlisted = sum(
        path.suffix.lower() in SUFFIXES and path.name not in names and path.name[0] != "."
        for path in dataset.image_dir.iterdir()
    )
    pixels = max(summary.pixels, 1)
    percent = 100 * summary.foreground / pixels
    sizes = [f"{w}x{h}: {count}" for (w, h), count in summary.sizes.most_common(5)]
    formats = [f"{name}: {count}" for name, count in summary.pixel_formats.most_common(5)]
    more = " ..." if len(summary.sizes) > 5 else ""
    print(f"{split}: {len(dataset)} images, {len(dataset.coco.anns)} annotations")
    print(f"  sizes        {', '.join(sizes)}{more}")
    print(f"  pixels       {', '.join(formats)}")
    if dataset.channel_names:
        print(f"  channels     {', '.join(dataset.channel_names)}")
    if summary.turned:
        print(f"  turned       {summary.turned} {TURNED.format(len(dataset))}")
    print(
        f"  foreground   {percent:.2f} % of the pixels "
        f"(answering background everywhere is {100 - percent:.2f} % accurate)"
    )
    ids = used_categories(dataset.coco)
    annotations = Counter(entry["category_id"] for entry in dataset.coco.anns.values())
    for name in dataset.classes[:MAX_CLASSES]:
        count = sum(annotations[key] for key in ids.get(name, ()))
        own, images = 100 * summary.class_pixels[name] / pixels, summary.class_images[name]
        print(
            f"  category     {name}: {count} annotations, {own:.2f} % of the pixels, "
            f"in {images} images"
        )
    if len(dataset.classes) > MAX_CLASSES:
        print(f"  and {len(dataset.classes) - MAX_CLASSES} more categories")
    print(
        f"  no lesion    {summary.empty} images; unreadable {summary.unreadable}; "
        f"not listed in {ANNOTATIONS} {unlisted}"
    )
