"""What a data set holds, and what is wrong with it."""

from collections import Counter
from pathlib import PurePosixPath

from data import TURNED, COCOSegmentationDataset, open_split
from medseg.coco import ANNOTATIONS, MAX_CLASSES, SPLITS, listed, used_categories
from medseg.coco_dialects import print_forgiven
from medseg.drawing import describe_shown
from medseg.duplicates import near_duplicates
from medseg.files import parallel_map
from medseg.images import SUFFIXES
from medseg.planning.contact_sheet import draw_tile, save_contact_sheet, spread_by_foreground
from medseg.planning.reading import examine

SHOWN = 8  # images of each split in the contact sheet


def audit(root, out, n_shown=SHOWN):
    """Print what a data set holds and what is wrong with it; write out/contact_sheet.jpg.

    n_shown: how many images of each split are in the contact sheet, see `spread_by_foreground`.
    Returns the list of problems, a line each.
    """
    problems, opened, examined, tiles, shown = [], {}, {}, [], ""
    for split in SPLITS:
        try:
            opened[split] = open_split(root, split, skipped=problems)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
    names = {name: None for own in opened.values() for name in used_categories(own.coco)}
    names = list(names)  # in the order of the splits
    for split, own in opened.items():
        dataset = COCOSegmentationDataset(own.coco, root / split, classes=names)
        examined[split], errors = examine(dataset, range(len(dataset)))
        problems += map(str, errors)
        shown = describe_shown(dataset.channel_names)
        print(f"{split}: {len(dataset)} images, {len(own.coco.anns)} annotations")
        for title, text in _describe(dataset, examined[split]):
            print(f"  {title:<12} {text}")
        print_forgiven(own.forgiven, "  note         ")
        tiles.append(_tiles(dataset, examined[split], n_shown))
    thumbnails = {split: [image.thumbnail for image in own] for split, own in examined.items()}
    for split in SPLITS[1:]:
        overlap = near_duplicates(thumbnails.get(split), thumbnails.get("train"))
        if overlap:
            print(f"{split} beside train: {overlap}")
    if any(tiles):
        legend = names[:MAX_CLASSES]  # below the images: a JPEG ends at 65,500 pixels
        sheet = save_contact_sheet(tiles, legend, out / "contact_sheet.jpg", shown)
        count = sum(map(len, tiles))
        print(f"contact sheet: {sheet}, {count} images; in each split by their share of foreground")
    return problems


def _tiles(dataset, examined, n_shown):
    """Of a split, what `save_contact_sheet` draws: (tile, file name, share of foreground)."""

    def tile(own):
        name = dataset.path(own.index).relative_to(dataset.image_dir.parent).as_posix()
        picture = draw_tile(dataset.read(own.index).rgb(), own.masks, dataset.n_classes)
        return picture, name, f"{100 * own.share:.3g} % foreground"

    places = spread_by_foreground([image.share for image in examined], n_shown)
    return list(parallel_map(tile, [examined[place] for place in places], catch=()))


def _describe(dataset, examined):
    """Yield (title, text) of the lines about a split."""

    def most_common(values):
        counts = Counter(values)
        listed_first = [f"{value}: {count}" for value, count in counts.most_common(5)]
        return ", ".join(listed_first) + (" ..." if len(counts) > 5 else "")

    yield "sizes", most_common(f"{image.size[0]}x{image.size[1]}" for image in examined)
    yield "pixels", most_common(image.stored_as for image in examined)
    if dataset.channel_names:
        yield "channels", ", ".join(dataset.channel_names)
    if turned := sum(image.turned for image in examined):
        yield "turned", f"{turned} {TURNED.format(len(dataset))}"
    pixels = max(sum(image.size[0] * image.size[1] for image in examined), 1)
    percent = 100 * sum(image.area for image in examined) / pixels
    accurate = f"answering background everywhere is {100 - percent:.2f} % accurate"
    yield "foreground", f"{percent:.2f} % of the pixels ({accurate})"
    if ignored := sum(image.ignored for image in examined):
        yield "ignored", f"{100 * ignored / pixels:.2f} % of the pixels: they count nowhere"
    used = used_categories(dataset.coco)
    annotations = Counter(entry["category_id"] for entry in dataset.coco.anns.values())
    for channel, name in enumerate(dataset.classes[:MAX_CLASSES]):
        areas = [image.areas[channel] for image in examined if image.areas[channel]]
        count = sum(annotations[key] for key in used.get(name, ()))
        percent = 100 * sum(areas) / pixels
        what = f"{count} annotations, {percent:.2f} % of the pixels, in {len(areas)} images"
        yield "category", f"{name}: {what}"
    if len(dataset.classes) > MAX_CLASSES:
        yield "", f"and {len(dataset.classes) - MAX_CLASSES} more categories"
    if lacking := [name for name in dataset.classes if name not in used]:
        yield "lacks", f"{listed(lacking, MAX_CLASSES)}: no annotation of it in this split"
    names = {PurePosixPath(record["file_name"]).name for record in dataset.coco.imgs.values()}
    files = [path.name for path in dataset.image_dir.iterdir() if path.suffix.lower() in SUFFIXES]
    unlisted = sum(name not in names and name[0] != "." for name in files)
    empty, unreadable = sum(not own.area for own in examined), len(dataset) - len(examined)
    text = f"{empty} images; unreadable {unreadable}; not listed in {ANNOTATIONS} {unlisted}"
    yield "no lesion", text
