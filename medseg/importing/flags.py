"""The flags of download.py for data of one's own."""

import os
import re

from medseg.cli import flag_name, number
from medseg.coco import SPLITS
from medseg.settings import window_limits
from medseg.splits import PERCENTAGES

CLASS = re.compile(r"[^/\\={}]+=.+", re.DOTALL)  # as it was written once
IMPORTERS = ("masks", "labelme", "coco", "via", "yolo", "arrays")
NEED_AN_IMPORTER = (
    *("split", "into", "add", "duplicates", "prefix", "groups", "classes", "invert"),
    *("skip_unpaired", "boxes", "channels", "time", "context", "empty_unmasked"),
)


def add_arguments(parser):
    own = parser.add_argument_group("your own data, instead of a download")
    _add_sources(own)
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
        "--groups",
        metavar="CSV",
        help="a table with the columns image and group: images of a group (a patient) stay in one "
        "split; default: {group} of the pattern of --masks, or the subjects of BIDS names",
    )
    own.add_argument(
        "--classes",
        metavar="A,B",
        help="names for the values of masks, ascending; VALUE=NAME,... with values such as 128, "
        "1-59, '#ff0000' or '*'; a .txt or .json file of names; or the labels or categories to use",
    )
    own.add_argument(
        "--invert", action="store_true", help="what the masks show as background is the class"
    )
    own.add_argument(
        "--skip-unpaired",
        action="store_true",
        help="leave out images without a mask or file, and masks without an image",
    )
    own.add_argument(
        "--empty-unmasked",
        action="store_true",
        help="images without a mask show nothing of any class: of --masks, healthy cases",
    )
    own.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help="of DICOM or volumes; default: the file's own, or 0.5 to 99.5 %% of a volume",
    )
    own.add_argument("--boxes", action="store_true", help="COCO, YOLO: boxes alone are rectangles")


def _add_sources(own):
    own.add_argument(
        "--masks",
        nargs="+",
        metavar=("IMAGES", "MASKS"),
        help="a folder of images or volumes and one of their masks; two files; or patterns "
        "in quotes, in which {id} identifies an image: 'scans/{id}.jpg' 'scans/{id}_mask.png', and "
        "{group} {n} {channel} {class} {part} say what else a path names",
    )
    own.add_argument(
        "--channels",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="A,B",
        help="which {channel} of the pattern of images to use, in this order (default: all, "
        "sorted); without {channel} there, names for the channels that each file has",
    )
    own.add_argument(
        "--time",
        action="store_true",
        help="volumes of four axes are volumes in time, and so are their masks; with --channels "
        "they are channels",
    )
    own.add_argument(
        "--context",
        type=number(0, 7),
        default=0,
        metavar="N",
        help="of volumes: the N slices before and after each slice are channels of it",
    )
    own.add_argument("--labelme", metavar="FOLDER", help="LabelMe files with their images")
    own.add_argument(
        "--coco", nargs=2, metavar=("JSON", "IMAGES"), help="a COCO file and a folder of images"
    )
    own.add_argument(
        "--via",
        nargs="+",
        metavar=("JSON", "IMAGES"),
        help="a VIA file, a folder of images and, where regions have several attributes, the one "
        "that is the class",
    )
    own.add_argument(
        "--yolo", metavar="FOLDER", help="images/, labels/ and data.yaml; its splits are kept"
    )
    own.add_argument(
        "--arrays", metavar="FOLDER", help="files .npz or .mat (v7.3), each an image and its mask"
    )


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
        "--unreviewed",
        choices=("skip", "keep"),
        help="with --labelme: leave out files of predict.py that nobody has saved since, or take "
        "them; default: --add asks, any other import takes them",
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
            parser.error(f"{flag_name(name)}: goes with --masks or another import of your own data")
    if args.add and args.force:
        parser.error("--add: keeps what a split holds and --force deletes it: give one of them")
    if args.add and not args.into:
        parser.error("--add: say with --into which split is to grow, such as --into train")
    if args.duplicates and not args.add:
        parser.error("--duplicates: goes with --add")
    if args.boxes and not (args.coco or args.yolo):
        parser.error("--boxes: goes with --coco or --yolo")
    if args.unreviewed and not args.labelme:
        parser.error("--unreviewed: goes with --labelme")
    if args.via and not 2 <= len(args.via) <= 3:
        parser.error("--via: takes a file, a folder of images and at most one attribute")
    for name in ("window", "invert", "channels", "time", "context", "empty_unmasked"):
        if getattr(args, name) and not args.masks:
            parser.error(f"{flag_name(name)}: goes with --masks")
    if args.window:
        try:
            window_limits(args.window)
        except ValueError as error:
            parser.error(f"--window: {error}")
    if args.masks:
        try:
            args.masks = _check_sides(args.masks)
        except ValueError as error:
            parser.error(f"--masks: {error}")
    if sum(args.split) != 100:
        parser.error(f"--split: {' + '.join(map(str, args.split))} is not 100 percent")


def _check_sides(values):
    """(images, masks) of the arguments of --masks, as they are."""
    named = [text for text in values if CLASS.fullmatch(text) and not os.path.lexists(text)]
    if named:
        raise ValueError(
            f"{named[0]}: the class is named by {{class}} in the pattern of masks now: "
            "'images/{id}.png' 'masks/{id}_{class}.png', and --classes chooses some"
        )
    if len(values) < 2:
        raise ValueError(
            f"{values[0]} alone: give images and masks, as two folders or two patterns"
        )
    if len(values) > 2:
        quoted = "quote patterns, which the shell writes out else, as 'scans/{id}_mask.png'"
        raise ValueError(f"{len(values)} names, but images and masks are two: {quoted}")
    return tuple(values)
