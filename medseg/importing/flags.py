"""The flags of download.py for data of one's own."""

from medseg.cli import flag_name, number
from medseg.coco import SPLITS
from medseg.settings import window_limits
from medseg.splits import PERCENTAGES


def parse_names(text):
    return [name.strip() for name in text.split(",") if name.strip()]


SOURCES = {
    "masks": {
        "nargs": "+",
        "metavar": ("IMAGES", "MASKS"),
        "help": "a folder of images or volumes and one of their masks; two files; or patterns "
        "in quotes, in which {id} identifies an image: 'scans/{id}.jpg' 'scans/{id}_mask.png', and "
        "{group} {n} {channel} {class} {part} say what else a path names",
    },
    "labelme": {"metavar": "FOLDER", "help": "LabelMe files with their images"},
    "coco": {"nargs": 2, "metavar": ("JSON", "IMAGES"), "help": "a COCO file, its images"},
    "via": {
        "nargs": "+",
        "metavar": ("JSON", "IMAGES"),
        "help": "a VIA file, a folder of images and, where regions have several attributes, the "
        "one that is the class",
    },
    "yolo": {"metavar": "FOLDER", "help": "images/, labels/ and data.yaml; its splits are kept"},
    "arrays": {"metavar": "FOLDER", "help": ".npz or .mat files (v7.3), each an image and mask"},
}
OPTIONS = {
    "groups": {
        "metavar": "CSV",
        "help": "a table with the columns image and group: images of a group (a patient) stay in "
        "one split; default: {group} of the pattern of --masks, or the subjects of BIDS names",
    },
    "classes": {
        "metavar": "A,B",
        "help": "names for the values of masks, ascending; VALUE=NAME,... with values such as 128, "
        "1-59, '#ff0000' or '*'; a .txt or .json file of names; or the labels or categories to use",
    },
    "channels": {
        "type": parse_names,
        "metavar": "A,B",
        "help": "which {channel} of the pattern of images to use, in this order (default: all, "
        "sorted); without {channel} there, names for the channels that each file has",
    },
    "context": {
        "type": number(0, 7),
        "default": 0,
        "metavar": "N",
        "help": "add the N slices before and after each slice of a volume to its channels",
    },
    "window": {
        "type": float,
        "nargs": 2,
        "metavar": ("CENTER", "WIDTH"),
        "help": "in DICOM files and volumes, the values that become black to white: CENTER - "
        "WIDTH/2 to CENTER + WIDTH/2; default: the file's own, or 0.5 to 99.5 %% of a volume",
    },
    "duplicates": {
        "choices": ("skip", "keep"),
        "help": "with --add, of images that are in any split already, or nearly in another one: "
        "leave them out, or add them all the same; default: an error that names them",
    },
    "unreviewed": {
        "choices": ("skip", "keep"),
        "help": "with --labelme: leave out files of predict.py that nobody has saved since, or "
        "take them; default: --add asks, any other import takes them",
    },
    "prefix": {"metavar": "TEXT", "help": "begin the names of the stored images with it"},
}
SWITCHES = {
    "invert": "the class is what the masks show as background, as where cells are drawn and the "
    "membranes between them are wanted",
    "skip_unpaired": "leave out images without a mask or file, and masks without an image",
    "empty_unmasked": "with --masks: images without a mask are healthy, with nothing of any class",
    "time": "volumes of four axes are volumes in time, and so are their masks; with --channels "
    "they are channels",
    "add": "with --into: put the images beside those of that split, which stay as they are",
    "boxes": "draw a rectangle for an object of COCO or YOLO that has a box and no outline",
}
IMPORTERS = tuple(SOURCES)
GOES_WITH = {  # flag: those that it needs one of
    **dict.fromkeys(("into", "split", "prefix", "groups", "classes", "skip_unpaired"), IMPORTERS),
    **dict.fromkeys(("window", "invert", "channels", "time", "context"), ("masks",)),
    "empty_unmasked": ("masks",),
    "boxes": ("coco", "yolo"),
    "unreviewed": ("labelme",),
    "two_classes": ("synthetic",),
    "add": ("into",),
    "duplicates": ("add",),
}


def add_arguments(parser):
    own = parser.add_argument_group("your own data, instead of a download")
    for name, options in (SOURCES | OPTIONS).items():
        own.add_argument(flag_name(name), **options)
    for name, text in SWITCHES.items():
        own.add_argument(flag_name(name), action="store_true", help=text)
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


def chosen_importer(args):
    """Which of IMPORTERS the flags ask for, or None."""
    return next((name for name in IMPORTERS if getattr(args, name)), None)


def check_arguments(parser, args):
    """End with one line where flags do not go together."""
    chosen = [name for name in ("zip", "synthetic", *IMPORTERS) if getattr(args, name)]
    if len(chosen) > 1:
        parser.error(f"{flag_name(chosen[1])}: not allowed with {flag_name(chosen[0])}")
    for name, needed in GOES_WITH.items():
        is_given = getattr(args, name) != parser.get_default(name)
        if is_given and not any(getattr(args, other) for other in needed):
            parser.error(f"{flag_name(name)}: goes with {' or '.join(map(flag_name, needed))}")
    if args.add and args.force:
        parser.error("--add: keeps what a split holds and --force deletes it: give one of them")
    if args.masks and len(args.masks) != 2:
        count = f"{len(args.masks)} names ({args.masks[0]})"
        parser.error(f"--masks: {count}, but two folders, two files or two patterns, in quotes")
    if args.via and not 2 <= len(args.via) <= 3:
        parser.error("--via: takes a file, a folder of images and at most one attribute")
    if args.window:
        try:
            window_limits(args.window)
        except ValueError as error:
            parser.error(f"--window: {error}")
    if sum(args.split) != 100:
        parser.error(f"--split: {' + '.join(map(str, args.split))} is not 100 percent")
