"""The flags of a training: their parser, named sets of them, and those of a run gone on with."""

import argparse
import shlex
import sys
from pathlib import Path

from medseg.augment import AUGMENTATIONS
from medseg.cli import (
    ArgumentParser,
    add_device_flags,
    flag_name,
    number,
    parse_words,
    spell_flags,
    word_list,
)
from medseg.device import pick_device
from medseg.dist import restart_count
from medseg.images import IMAGE_SIZE
from medseg.layers import ARCHITECTURES, CHOICES
from medseg.training.checkpoint import BEST, LAST, PREVIOUS, has_ended, load_checkpoint, waits
from medseg.training.recipes import LOSSES, RECIPES, arch_flags, network_flags

NOT_RECORDED = ("out", "resume", "test_only", "overwrite")  # in last.pth
# The flags that a resumed run need not have in common with its beginning. Any other decides the
# result; how far --epochs and --patience may change, `check_can_go_on` says.
MAY_CHANGE = (
    *(*NOT_RECORDED, "data", "epochs", "patience", "device", "compile", "save_every"),
    *("swanlab", "project", "experiment_name"),
)
POSITIVE, AT_LEAST_0, REAL = number(1), number(0), number(0.0, kind=float)  # types of flags


def make_parser(doc):
    """The parser of train.py, whose docstring is `doc`."""
    parser = ArgumentParser("train.py", doc)
    _add_data_flags(parser)
    _add_training_flags(parser)
    _add_recipe_flags(parser)
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
    add("--n-channels", type=int, choices=(1, 3), default=3, help="3, or 1 for grey images")
    add("--skip-bad", action="store_true", help="omit damaged images, list them in skipped.txt")


def _add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    recipes = [f"{name}: {spell_flags(flags)}" for name, flags in RECIPES.items() if flags]
    add("--recipe", choices=RECIPES, default="tutorial", help="; ".join(recipes))
    add("--epochs", type=POSITIVE, default=40, help="most epochs")
    add("--batch-size", type=POSITIVE, default=32, help="over all processes together")
    add("--lr", type=REAL, default=1e-4, help="learning rate of Adam")
    add("--patience", type=POSITIVE, default=8, help="epochs without a lower validation loss")
    add("--n-filters", type=number(1, 1024), default=32, help="channels of the first level")
    add("--seed", type=AT_LEAST_0, default=0, help="of weights, order and augmentation")


def _add_recipe_flags(parser):
    add = parser.add_argument_group("beyond the tutorial").add_argument
    norms, schedules = ("none", "batch", "group"), ("constant", "cosine")
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
        type=word_list(LOSSES),
        default="dice=0.6,bce=0.4",
        metavar="WORDS",
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
        type=word_list(AUGMENTATIONS),
        default="none",
        metavar="WORDS",
        help=f"random changes of the training images, as in flip,rotate=30: {_spell_words()}",
    )


def _spell_words():
    return ", ".join(f"{word}={value:g}" for word, (value, _) in AUGMENTATIONS.items())


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
    add = parser.add_argument_group("SwanLab").add_argument
    modes = ("auto", "online", "offline", "disabled")
    add(
        "--swanlab",
        choices=modes,
        default="auto",
        help="auto: online with an API key, else offline",
    )
    add("--project", default="Unet-Medical-Segmentation", help="its name on SwanLab")
    add("--experiment-name", metavar="NAME", help="default: by the flags, as in bs32-epoch40")


def parse_arguments(argv, doc, read_network):
    """(the command line, the checkpoint to go on from or None).

    read_network(path): the UNet in a file of weights, for --init. Raises ValueError where flags
    contradict each other, or a checkpoint is damaged or of other flags; FileNotFoundError where
    there is nothing to resume.
    """
    parser = make_parser(doc)
    args = parser.parse_args(argv)
    if args.resume and args.test_only:
        raise ValueError("--resume trains and --test-only does not: give one of them")
    out, checkpoint = Path(args.out), None
    has_checkpoint = any((out / name).exists() for name in (LAST, PREVIOUS))
    restarted = restart_count() > 0 and has_checkpoint  # by torchrun, after a process died
    if args.resume or restarted:
        checkpoint = load_checkpoint(out)
    elif args.test_only and has_checkpoint:
        try:
            checkpoint = load_checkpoint(out)
        except ValueError as error:  # best_model.pth may be good all the same
            print(f"WARNING: {error}: testing with the flags given", file=sys.stderr)
    if checkpoint:
        flags = checkpoint["flags"].items()
        try:  # what is not given again stays as it was
            parser.restore({name: value for name, value in flags if name not in NOT_RECORDED})
        except ValueError as error:
            raise ValueError(f"{checkpoint['path']}: damaged: {error}") from None
        args = _keep_precision(parser, argv, checkpoint["flags"])
    else:
        args = _parse_named_sets(parser, argv, read_network)
    if args.crop and args.image_size != IMAGE_SIZE:
        raise ValueError("--crop takes images at their own size: leave --image-size away")
    if not any(parse_words(args.loss, LOSSES).values()):
        raise ValueError(f"--loss {args.loss}: every weight is 0")
    if args.test_only:
        return args, None
    if checkpoint:
        check_same_run(args, checkpoint, parser)
        check_can_go_on(args, checkpoint)
    return args, checkpoint


def _parse_named_sets(parser, argv, read_network):
    """The command line over what --init, --recipe and --arch stand for, in this order."""
    recipe = RECIPES[parser.parse_args(argv).recipe]
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    parser.set_defaults(**arch_flags(args.arch))
    parser.set_defaults(**recipe)
    if not args.init or args.test_only:
        return parser.parse_args(argv)
    network = network_flags(read_network(args.init), args.init)
    if args.crop:  # then images keep their own size
        network.pop("image_size")
    parser.set_defaults(**network)
    args = parser.parse_args(argv)
    for name in ("arch", "depth", "norm", "dropout", "n_filters", "n_channels"):
        if getattr(args, name) != network[name]:
            flag = flag_name(name)
            raise ValueError(
                f"{args.init}: was trained with {flag} {network[name]}, not {getattr(args, name)}: "
                f"leave {flag} away, it is read from the weights"
            )
    return args


def _keep_precision(parser, argv, flags):
    """The command line of a run that goes on, with the precision that 'auto' chose for it.

    flags: of its checkpoint. Where the run moves to another kind of device, from a GPU to a CPU,
    say, that choice is forgotten, in `flags` too.
    """
    args, kind = parser.parse_args(argv), flags.get("precision_chosen_for")
    if kind is None:  # it was given
        return args
    if pick_device(args.device).type == kind:
        args.precision_chosen_for = kind
        if args.precision == "auto":
            args.precision = parser.get_default("precision")
        return args
    parser.set_defaults(precision="auto")
    args = parser.parse_args(argv)
    flags["precision"] = args.precision
    return args


def check_same_run(args, checkpoint, parser):
    """ValueError where a flag that decides the result differs from the checkpoint's."""
    for name, now in vars(args).items():
        before = checkpoint["flags"].get(name, parser.get_default(name))
        if name not in MAY_CHANGE and before != now:
            flag = flag_name(name)
            raise ValueError(
                f"{checkpoint['path']}: was trained with {flag} {before}, not {now}: leave {flag} "
                "away, or start afresh without --resume"
            )


def check_can_go_on(args, checkpoint):
    """ValueError unless the epochs done are the beginning of a run with these flags that goes on.

    The message says which flag to give. A run that was stopped in its test goes on with that, and
    torchrun may restart one that has ended.
    """
    path, before = checkpoint["path"], {**vars(args), **checkpoint["flags"]}
    epochs, patience = before["epochs"], before["patience"]
    done, wait = waits(checkpoint)
    same = (args.epochs, args.patience) == (epochs, patience)
    if same and (restart_count() or not has_ended(path.parent)):
        return
    to_test = "to test its weights again, give --test-only in place of --resume"
    if args.schedule != "constant" and done >= epochs:
        raise ValueError(
            f"{path}: {done} of {epochs} epochs done, and --epochs cannot change, for --schedule "
            f"{args.schedule} ends with them: start a new run from its weights with --init "
            f"{path.parent / BEST} and another --out; {to_test}"
        )
    if args.schedule != "constant" and args.epochs != epochs:
        raise ValueError(
            f"{path}: --schedule {args.schedule} ends with --epochs {epochs}, not {args.epochs}: "
            "leave --epochs away, or start afresh without --resume"
        )
    needed = []
    if args.epochs <= done:
        needed.append(f"--epochs N, more than {done}")
    if args.patience <= wait:
        needed.append(f"--patience N, more than {wait}")
    if needed:
        state = f"{done} of {epochs} epochs done"
        if args.patience <= wait:
            state += f", {wait} in a row without a lower validation loss"
        raise ValueError(f"{path}: {state}: give {' and '.join(needed)}; {to_test}")


def recorded_flags(args):
    """The flags that last.pth keeps, as a dict."""
    return {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}


def experiment_name(args):
    recipe = "" if args.recipe == "tutorial" else f"-{args.recipe}"
    return f"bs{args.batch_size}-epoch{args.epochs}{recipe}"


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
