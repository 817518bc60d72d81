"""The flags of a training: their parser, named sets of them, and those of a run gone on with."""

import argparse
import shlex
from pathlib import Path

from medseg.augment import AUGMENTATIONS
from medseg.cli import (
    ArgumentParser,
    add_device_flags,
    add_pixel_limit,
    flag_name,
    named_values,
    number,
    output_folder,
    parse_named_values,
    spell_flags,
)
from medseg.images import IMAGE_SIZE
from medseg.layers import ARCHITECTURES, CHOICES, arch_flags, network_flags
from medseg.samples import set_pixel_limit
from medseg.settings import MAX_CHANNELS
from medseg.training.checkpoint import (
    BEST,
    NOT_RECORDED,
    check_run_folder,
    refuse_other_run,
    run_lock,
)
from medseg.training.cross_validation import check_folds, read_folds
from medseg.training.precision import keep_precision
from medseg.training.recipes import LOSSES, RECIPES
from medseg.training.resume import check_can_go_on, check_same_run, find_checkpoint
from medseg.training.tracking import TRACKERS, check_tracker
from net import load_model

# The flags on which the defaults of others depend, and what --recipe auto may read.
FIRST = (
    *("recipe", "arch", "init", "crop", "resume", "test_only", "out", "overwrite"),
    "max_megapixels",
)
POSITIVE, AT_LEAST_0, REAL = number(1), number(0), number(0.0, type=float)  # types of flags


def make_parser(doc):
    """The parser of train.py, whose docstring is `doc`."""
    parser = ArgumentParser("train.py", doc)
    _add_data_flags(parser)
    _add_training_flags(parser)
    _add_recipe_flags(parser)
    _add_tuning_flags(parser)
    _add_machine_flags(parser)
    _add_file_flags(parser)
    _add_tracking_flags(parser)
    return parser


def _add_data_flags(parser):
    add = parser.add_argument_group("data").add_argument
    add("--data", default="dataset", metavar="FOLDER", help="holds train/, valid/ and test/")
    add("--synthetic", action="store_true", help="draw phantoms in DATA/synthetic, train on them")
    add("--image-size", type=number(1, 8192), default=IMAGE_SIZE, help="pixels a side to resize to")
    add(
        "--crop",
        type=number(0, 8192),
        default=0,
        help="train on random crops of so many pixels a side; images then keep their own size; 0: "
        "whole images, resized",
    )
    add(
        "--classes",
        choices=("union", "each"),
        default="union",
        help="union: all categories are one foreground; each: a class for each category",
    )
    add(
        "--n-channels",
        type=number(1, MAX_CHANNELS),
        default=3,
        help="3, or 1 for grey images; a data set whose images have others has its own",
    )
    add("--skip-bad", action="store_true", help="omit damaged images, list them in skipped.txt")
    add_pixel_limit(add)


def _add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    recipes = [f"{name}: {spell_flags(flags)}" for name, flags in RECIPES.items() if flags]
    add(
        "--recipe",
        choices=RECIPES,
        default="tutorial",
        help="; ".join(
            ["auto: flags that suit the data set and the machine, see --plan", *recipes]
        ),
    )
    add(
        "--minutes",
        type=REAL,
        default=0.0,
        help="with --recipe auto: how long the training may take; 0: as long as it needs",
    )
    add("--epochs", type=POSITIVE, default=40, help="most epochs")
    add("--batch-size", type=POSITIVE, default=32, help="over all processes together")
    add(
        "--repeat",
        type=number(0.0001, 1e6, float),
        default=1.0,
        help="times that an epoch draws every image; 0.1: a tenth of them",
    )
    add(
        "--foreground",
        type=number(0.0, 1.0, float),
        default=0.0,
        help="share of the draws that hold foreground: crops around it, and whole images that have "
        "some; nnU-Net's is 0.33; 0: as they come",
    )
    add("--lr", type=REAL, default=1e-4, help="learning rate of Adam")
    add("--patience", type=POSITIVE, default=8, help="epochs without a lower validation loss")
    add("--min-steps", type=AT_LEAST_0, default=300, help="steps before which patience is endless")
    add("--n-filters", type=number(1, 1024), default=32, help="channels of the first level")
    add("--seed", type=AT_LEAST_0, default=0, help="of weights, order, augmentation and folds")
    add(
        "--folds",
        type=AT_LEAST_0,
        default=0,
        metavar="N",
        help="cross-validation: deal train and valid into N folds, train each in OUT/fold1, ..., "
        "score all images in OUT/folds.json; 0: one run",
    )


def _add_recipe_flags(parser):
    add = parser.add_argument_group("beyond the tutorial").add_argument
    norms, schedules = ("none", "batch", "group"), ("constant", "cosine")
    strengths = {name: strength for name, (strength, _) in AUGMENTATIONS.items()}
    augmentations = ", ".join(f"{name}={strength:g}" for name, strength in strengths.items())
    add(
        "--arch",
        choices=ARCHITECTURES,
        default="tutorial",
        help="the network: the tutorial's, or one of docs/networks.md, with its levels, "
        "normalisation and filters",
    )
    add("--depth", type=number(1, 8), default=5, help="levels of the network")
    add(
        "--init",
        metavar="WEIGHTS",
        help="start from the weights of another run, whose network it takes",
    )
    add(
        "--loss",
        type=named_values(LOSSES),
        default="dice=0.6,bce=0.4",
        metavar="NAME=WEIGHT,...",
        help="weights of dice, bce and focal in the loss",
    )
    add("--norm", choices=norms, default="none", help="normalisation after each 3x3 convolution")
    add(
        "--dropout",
        choices=CHOICES["dropout"],
        default="bottleneck",
        help="of values of the bottleneck, of whole channels after each 3x3 convolution, or none",
    )
    add(
        "--prior",
        type=number(0.0, 0.99, float),
        default=0.0,
        help="probability that the untrained network gives; 0: as PyTorch initialises it, near 0.5",
    )
    add("--weight-decay", type=REAL, default=0.0, help="decoupled, as in AdamW; 0 is Adam")
    add("--warmup", type=AT_LEAST_0, default=0, help="steps in which the learning rate rises")
    add(
        "--schedule",
        choices=schedules,
        default="constant",
        help="cosine: the learning rate falls to 0 at the end of --epochs",
    )
    add(
        "--ema",
        type=number(0.0, 0.9999, float),
        default=0.0,
        help="decay of a running mean of the weights, which is then evaluated and kept; 0: none",
    )
    add(
        "--augment",
        type=named_values(AUGMENTATIONS),
        default="none",
        metavar="NAME=STRENGTH,...",
        help=f"random changes of the training images, as in flip,rotate=30: {augmentations}",
    )


def _add_tuning_flags(parser):
    add = parser.add_argument_group("after training").add_argument
    add(
        "--tune-prediction",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="choose on valid how predict.py makes masks: threshold, averaging over the flips of "
        "--augment, largest piece",
    )


def _add_machine_flags(parser):
    add = parser.add_argument_group("machine").add_argument
    add_device_flags(add)
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile the network: slow to start, for long runs",
    )


def _add_file_flags(parser):
    add = parser.add_argument_group("files").add_argument
    add("--out", default=".", metavar="FOLDER", help="for weights, metrics and pictures")
    add("--resume", action="store_true", help="go on from OUT/last.pth, with its flags")
    add("--overwrite", action="store_true", help="replace the weights of another run in OUT")
    add("--test-only", action="store_true", help="test OUT/best_model.pth, train nothing")
    add("--save-every", type=REAL, default=60.0, help="seconds between two checkpoints")


def _add_tracking_flags(parser):
    add = parser.add_argument_group("tracking").add_argument
    add(
        "--tracker",
        choices=("auto", *TRACKERS),
        default="auto",
        help="where the curves go besides metrics.csv; auto: to SwanLab, as --swanlab says",
    )
    modes = ("auto", "online", "offline", "disabled")
    add(
        "--swanlab",
        choices=modes,
        default="auto",
        help="auto: online with an API key, else offline",
    )
    add("--project", default="Unet-Medical-Segmentation", help="its name there")
    add("--experiment-name", metavar="NAME", help="default: by the flags, as in bs32-epoch40")


def parse_arguments(argv, doc, make_plan=None):
    """(the command line, the checkpoint to go on from or None).

    make_plan(given): the flags that --recipe auto chooses beside those that are given, a dict.
    Raises ValueError where flags contradict each other, or a checkpoint is damaged or of other
    flags; FileNotFoundError where there is nothing to resume.
    """
    parser = make_parser(doc)
    first = _parse_first(parser, argv)
    set_pixel_limit(first.max_megapixels)
    if first.resume and first.test_only:
        raise ValueError("--resume trains and --test-only does not: give one of them")
    checkpoint, network = read_folds(first) or find_checkpoint(first), {}
    # One set of defaults: an earlier run's flags, or the parser's own, over which --arch wins, then
    # --recipe, then the network of --init. The command line, parsed once, wins over all of them.
    if checkpoint:
        _restore(parser, checkpoint)
    else:
        defaults, kept = {**arch_flags(first.arch), **RECIPES[first.recipe]}, {}
        planned = first.recipe == "auto" and not first.test_only
        if first.init and not first.test_only:
            model = load_model(first.init)
            network = network_flags(model, first.init)
            if model.n_classes > 1:  # which a plan would take together
                kept = {"classes": "each"}
            if not (first.crop or planned):  # else images keep their own size, or the plan has one
                defaults["image_size"] = model.info.image_size or IMAGE_SIZE
        parser.set_defaults(**defaults | network)
        if planned:  # what is refused is refused before, for a plan takes its time
            args, out = parser.parse_args(argv), output_folder(first.out)
            _check_flags(args, network)
            with run_lock(out):
                if not first.overwrite:
                    refuse_other_run(out, folds=args.folds)
                check_run_folder(out, args)
            given = parser.parse_given(argv)
            known = {**(defaults if "arch" in given else {}), **network, **kept}
            parser.set_defaults(**make_plan(known | given))
    args = parser.parse_args(argv)
    if checkpoint:
        keep_precision(args, parser, checkpoint["flags"])
    _check_flags(args, network, resumed=bool(checkpoint))
    if args.test_only:
        return args, None
    if checkpoint:
        check_same_run(args, checkpoint, parser)
        if not args.folds:
            check_can_go_on(args, checkpoint)
    return args, checkpoint


def _check_flags(args, network, *, resumed=False):
    """ValueError where flags contradict each other; network: as `check_same_network` takes it."""
    check_same_network(args, network)
    if args.crop and args.image_size != IMAGE_SIZE:
        raise ValueError("--crop takes images at their own size: leave --image-size away")
    if args.minutes and args.recipe != "auto" and not resumed:
        raise ValueError("--minutes is what --recipe auto plans for: give that too")
    if not any(loss_weights(args).values()):
        raise ValueError(f"--loss {args.loss}: every weight is 0")
    check_folds(args)
    check_tracker(args.tracker)


def _parse_first(parser, argv):
    """The flags on which the defaults of others depend; a recipe may set some of them."""
    given = parser.parse_given(argv, FIRST)
    defaults = {name: parser.get_default(name) for name in FIRST}
    recipe = RECIPES[given.get("recipe", defaults["recipe"])]
    return argparse.Namespace(**{**defaults, **recipe, **given})


def _restore(parser, checkpoint):
    """Make the flags of a checkpoint the defaults: what is not given again stays as it was."""
    flags = checkpoint["flags"].items()
    try:
        parser.restore({name: value for name, value in flags if name not in NOT_RECORDED})
    except ValueError as error:
        raise ValueError(f"{checkpoint['path']}: damaged: {error}") from None


def augmentations(args):
    """{name: strength} of what --augment names."""
    return parse_named_values(args.augment, AUGMENTATIONS)


def loss_weights(args):
    """{name: weight} of every term of the loss, as --loss gives them; 0 for the others."""
    named = parse_named_values(args.loss, LOSSES)
    return {name: named.get(name, 0.0) for name in LOSSES}


def check_same_network(args, network):
    """ValueError where a flag differs from the network of --init. network: its flags, or none."""
    for name, value in network.items():
        if getattr(args, name) != value:
            flag = flag_name(name)
            raise ValueError(
                f"{args.init}: was trained with {flag} {value}, not {getattr(args, name)}: "
                f"leave {flag} away, it is read from the weights"
            )


def check_batch_norm(args, images):
    """ValueError where batch normalisation meets a batch of one image at a level of one pixel.

    images: of an epoch, of which the last batch has what is left.
    """
    side, smallest = args.crop or args.image_size, images % args.batch_size or args.batch_size
    if args.norm == "batch" and smallest == 1 and side <= 2**args.depth:
        raise ValueError(
            f"--norm batch: the last of {images} images is a batch of its own with --batch-size "
            f"{args.batch_size}, and --depth {args.depth} makes one pixel of {side}x{side}, too "
            "little for a mean and a deviation: give another --batch-size, or --norm group"
        )


def command(script, *words, out=None):
    """A command to paste, with --out where that is not this folder."""
    if out is not None and out != Path("."):
        words = (*words, "--out", out)
    return shlex.join(["python", script, *map(str, words)])


def predict_command(args, root):
    """A command that shows a prediction of the weights in --out."""
    words = []
    if args.data != "dataset":  # predict.py finds an example of its own only there
        words.append(root / "test")
    if args.out != ".":
        words += ["--model", Path(args.out) / BEST]
    return command("predict.py", *words)
