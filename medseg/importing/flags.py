"""The flags of download.py for data of one's own, and the importer behind each."""

import shlex
from pathlib import Path

from medseg.audit import next_training
from medseg.cli import flag_name, number, one_line
from medseg.coco import SPLITS
from medseg.importing.adding import add_images
from medseg.importing.coco_files import coco_examples
from medseg.importing.collect import same_form
from medseg.importing.labelme import labelme_examples
from medseg.importing.mask_folders import mask_examples
from medseg.importing.writing import check_free, present_settings, write_dataset
from medseg.settings import check_window, window_limits
from medseg.splits import PERCENTAGES, present_splits, wanted_splits

IMPORTERS = ("masks", "labelme", "coco")
NEED_AN_IMPORTER = (
    *("split", "into", "add", "duplicates", "prefix", "group", "classes", "skip_unpaired"),
    "boxes",
)


def _names(text):
    return [same_form(name.strip()) for name in text.split(",")]


def add_arguments(parser):
    own = parser.add_argument_group("your own data, instead of a download")
    own.add_argument(
        "--masks",
        nargs=2,
        metavar=("IMAGES", "MASKS"),
        help="a folder of images or NIfTI volumes and one of their masks, or two files",
    )
    own.add_argument("--labelme", metavar="FOLDER", help="LabelMe files with their images")
    own.add_argument(
        "--coco", nargs=2, metavar=("JSON", "IMAGES"), help="a COCO file and a folder of images"
    )
    splits = own.add_mutually_exclusive_group()
    splits.add_argument(
        "--split",
        type=number(0, 100),
        nargs=3,
        default=PERCENTAGES,
        metavar=("TRAIN", "VALID", "TEST"),
        help="percent of the images, drawn by --seed; 0 writes no such split",
    )
    splits.add_argument("--into", choices=SPLITS, help="write this split; the others stay")
    _add_growing(own)
    own.add_argument(
        "--group",
        metavar="REGEX",
        help="images in whose path it finds the same (a patient, a volume) stay in one split; "
        "default: the subjects of BIDS names (sub-01_T1w)",
    )
    own.add_argument(
        "--classes",
        type=_names,
        metavar="A,B",
        help="names for the values of masks, ascending; or the labels or categories to use",
    )
    own.add_argument(
        "--skip-unpaired",
        action="store_true",
        help="leave out images without a mask or file, and masks without an image",
    )
    own.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help="of DICOM or NIfTI values; default: the file's own, or 0.5 to 99.5 %% of a volume",
    )
    own.add_argument("--boxes", action="store_true", help="COCO: boxes alone become rectangles")


def _add_growing(own):
    own.add_argument(
        "--add",
        action="store_true",
        help="with --into: put the images beside those of that split, which stay as they are",
    )
    own.add_argument(
        "--duplicates",
        choices=("skip", "keep"),
        help="with --add: leave out images that are in any split already, or nearly in another "
        "one, or add them all the same; default: an error that names them",
    )
    own.add_argument(
        "--prefix", metavar="TEXT", help="begin the names of the stored images with it"
    )


def chosen_importer(args):
    """Which of IMPORTERS the flags ask for, or None."""
    return next((name for name in IMPORTERS if getattr(args, name)), None)


def check_arguments(parser, args):
    """End with one line where flags do not go together."""
    chosen = [name for name in ("zip", "synthetic", *IMPORTERS) if getattr(args, name)]
    if len(chosen) > 1:
        parser.error(f"{flag_name(chosen[1])}: not allowed with {flag_name(chosen[0])}")
    for name in NEED_AN_IMPORTER:
        if not chosen_importer(args) and getattr(args, name) != parser.get_default(name):
            parser.error(f"{flag_name(name)}: goes with --masks, --labelme or --coco")
    if args.add and args.force:
        parser.error("--add: keeps what a split holds and --force deletes it: give one of them")
    if args.add and not args.into:
        parser.error("--add: say with --into which split is to grow, such as --into train")
    if args.duplicates and not args.add:
        parser.error("--duplicates: goes with --add")
    if args.boxes and not args.coco:
        parser.error("--boxes: goes with --coco")
    if args.window and not args.masks:
        parser.error("--window: goes with --masks")
    if args.window:
        try:
            window_limits(args.window)
        except ValueError as error:
            parser.error(f"--window: {error}")
    if sum(args.split) != 100:
        parser.error(f"--split: {' + '.join(map(str, args.split))} is not 100 percent")


def import_data(root, args):
    """Write the images and masks that the flags name as splits of `root`.

    Raises ValueError, or OSError where a file cannot be read or written; `root` is unchanged then.
    """
    splits = wanted_splits(args.split, args.into)
    stay = [split for split in present_splits(root) if args.add or split not in splits]
    if not args.add:
        check_free(root, splits, args.force, args.into)
    elif args.into not in stay:
        raise ValueError(f"{root / args.into}: no such split to add to: write it without --add")
    sources = [
        Path(name) for name in (*(args.masks or ()), *(args.coco or ()), args.labelme) if name
    ]
    _check_sources(root, splits, sources, args.add)
    options = {"classes": args.classes, "group": args.group, "prefix": args.prefix or ""}
    try:
        present, info, wrong = present_settings(root, stay), {}, []
        if not args.masks:
            check_window(present, None)
        if args.masks:
            options |= {"skip_unpaired": args.skip_unpaired, "window": args.window}
            examples, classes, info = mask_examples(*args.masks, **options, present=present)
        elif args.labelme:
            examples, classes, wrong = labelme_examples(args.labelme, **options)
        else:
            options |= {"skip_unpaired": args.skip_unpaired, "boxes": args.boxes}
            examples, classes = coco_examples(*args.coco, **options)
        if not classes and not args.add:
            name = args.masks[1] if args.masks else sources[0]
            raise ValueError(
                f"{name}: all masks are empty: --add takes such images, into a split that has "
                "classes"
            )
        # The names of labels and categories do not depend on their order, those of values do.
        choice = {"into": args.into, "any_order": not (args.masks or args.classes)}
        if args.add:
            prefix = f"{args.prefix or sources[0].resolve().stem}_"
            choice |= {"prefix": prefix, "duplicates": args.duplicates}
            add_images(root, examples, classes, **choice)
        else:
            choice |= {"split": args.split, "seed": args.seed, "force": args.force, "info": info}
            write_dataset(root, examples, classes, **choice)
        if wrong:
            print(
                f"note: {len(wrong)} of {len(examples)} LabelMe files have an imagePath that leads "
                f"to nothing or to another picture ({min(wrong).name}): their imageData was taken"
            )
    except FileNotFoundError as error:
        raise ValueError(one_line(error)) from None


def _check_sources(root, splits, sources, add):
    """Raise ValueError where a source lies in a split that is to be written, or around `root`."""
    for name in sources:
        place = name.resolve()
        for split in splits:
            if (root / split).resolve() in (place, *place.parents):
                why = "which would be added to itself" if add else "which would be replaced"
                raise ValueError(f"{name}: lies in {root / split}, {why}")
        if present_splits(root) and place in (root.resolve(), *root.resolve().parents):
            raise ValueError(
                f"{name}: its images would be read together with those of the data set {root}, "
                "which lies in it: name a folder elsewhere with --data"
            )


def print_next(root):
    """Print which splits are missing, or the commands to run next."""
    missing = [split for split in SPLITS if split not in present_splits(root)]
    for split in missing:
        print(f"missing: {split}, which train.py needs: write it with --into {split}")
    if not missing:
        name = "" if root == Path("dataset") else f" {shlex.quote(str(root))}"
        print(f"next: python data.py{name}, {next_training(root)}")
