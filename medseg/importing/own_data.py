"""An import of own data, from the flags of download.py to the splits of a data set."""

import os
import shlex
from itertools import chain
from pathlib import Path

from medseg.coco import SPLITS
from medseg.images import SUFFIXES
from medseg.importing import writing
from medseg.importing.adding import add_images
from medseg.importing.arrays import array_examples
from medseg.importing.class_names import ClassValues, parse_classes, parse_labels
from medseg.importing.coco_files import coco_examples
from medseg.importing.collect import list_files
from medseg.importing.flags import chosen_importer
from medseg.importing.labelme import labelme_examples
from medseg.importing.mask_folders import mask_examples
from medseg.importing.pairs import find_pairs
from medseg.importing.via import via_examples
from medseg.importing.yolo import yolo_examples
from medseg.own_files import is_own
from medseg.patterns import literal_folder
from medseg.settings import check_window
from medseg.splits import next_training, present_splits, wanted_splits

READERS = {"coco": coco_examples, "via": via_examples, "yolo": yolo_examples}


def import_data(root, args):
    """Write the images and masks that the flags name as splits of `root`.

    Raises ValueError, or OSError where a file cannot be read or written; `root` is unchanged then.
    """
    splits = wanted_splits(args.split, args.into)
    stay = [split for split in present_splits(root) if args.add or split not in splits]
    if not args.add:
        writing.check_free(root, splits, args.force)
    elif args.into not in stay:
        raise ValueError(f"{root / args.into}: no such split to add to: write it without --add")
    parse = parse_classes if args.masks else parse_labels
    classes = None if args.classes is None else parse(args.classes)
    options = {"classes": classes, "group": args.groups, "prefix": args.prefix or ""}
    values = getattr(args, chosen_importer(args))
    values = [values] if isinstance(values, str) else values
    sources, late = [Path(value) for value in values[:2]], {}
    if args.masks:
        texts, cases = _find_masks(args, classes)
        sources = _places(texts, cases)
    _check_sources(root, splits, sources, args.add)
    present = writing.present_settings(root, stay)
    if args.masks:
        examples, classes, info = mask_examples(cases, texts, args, classes, present)
    elif args.arrays:
        examples, classes, info = array_examples(*values, **options, present=present)
        check_window(present, info.get("window"))
    else:
        examples, classes, info, late = _read_outlines(args, values, options, present)
    place = values[1] if args.masks else sources[0]
    if not classes and not args.add:
        raise ValueError(
            f"{place}: all masks are empty: --add takes such images, into a split that has classes"
        )
    # The names of labels and categories do not depend on their order, those of values do.
    any_order = not args.classes and (not args.masks or "{class}" in values[1])
    if args.add:
        choice = {"into": args.into, "duplicates": args.duplicates}
        add_images(root, examples, classes, any_order=any_order, **choice)
    else:
        dealt = writing.deal_examples(examples, args.split, args.into, args.seed)
        choice = {"info": info, "source": place}
        writing.write_dataset(root, dealt, classes, any_order=any_order, **choice)
    for what, paths in late.items():
        if paths:
            print(f"note: {len(paths)} {what} ({min(paths).name})")


def _read_outlines(args, values, options, present):
    """(examples, class names, what to record, what to print late) of an import of outlines.

    values: of its flag, the folder of images among them.
    """
    pictures = list_files(values[:2][-1], SUFFIXES)
    # What predict.py writes beside them is of 8 bits.
    pictures = [path for path in pictures if not is_own(path)]
    window = writing.picture_window(pictures, None, present)
    check_window(present, window)
    if args.labelme:
        unreviewed = args.unreviewed or (None if args.add else "keep")
        found = labelme_examples(*values, unreviewed=unreviewed, **options)
    else:
        options |= {"skip_unpaired": args.skip_unpaired, "boxes": args.boxes}
        found = READERS[chosen_importer(args)](*values, **options)
    examples, classes, late = found
    return examples, classes, {"window": window} if window else {}, late


def _find_masks(args, classes):
    """(the two patterns, [Pair]) of --masks."""
    images, masks = args.masks
    options = {"channels": args.channels if "{channel}" in images else None}
    options |= {"skip_unpaired": args.skip_unpaired, "empty_unmasked": args.empty_unmasked}
    if "{class}" in masks:
        if isinstance(classes, ClassValues):
            raise ValueError("--classes: {class} names the classes, and these are of values")
        options["classes"] = classes
    return find_pairs(images, masks, **options)


def _places(texts, cases):
    """The folder of the pattern of images, and those of all images and masks."""
    top = texts[0] if os.path.lexists(texts[0]) else literal_folder(texts[0])[0]
    files = [case.images.values() for case in cases]
    files += [own for case in cases for own in case.masks.values()]
    return [Path(top), *{path.parent: path for path in chain(*files)}.values()]


def _check_sources(root, splits, sources, add):
    """Raise ValueError where a source lies in a split that is to be written, or around `root`."""
    real = Path(os.path.realpath(root))  # not resolve(), which fails on links in a circle
    for name in sources:
        place = Path(os.path.realpath(name))
        for split in splits:
            if Path(os.path.realpath(root / split)) in (place, *place.parents):
                why = "added to itself" if add else "replaced"
                raise ValueError(f"{name}: lies in {root / split}, which would be {why}")
        if present_splits(root) and place in (real, *real.parents):
            raise ValueError(
                f"{name}: the data set {root} lies in it, whose images would be read too: name a "
                "folder elsewhere with --data"
            )


def print_next(root):
    """Print which splits are missing, or the commands to run next."""
    missing = [split for split in SPLITS if split not in present_splits(root)]
    for split in missing:
        print(f"missing: {split}, which train.py needs: write it with --into {split}")
    if not missing:
        name = "" if root == Path("dataset") else f" {shlex.quote(str(root))}"
        print(f"next: python data.py{name}")
        print(f"next: {next_training(root)}")
