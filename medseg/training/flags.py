"""The flags of a training: what they are, and how those of a run come together."""

import argparse
from pathlib import Path

from medseg.augment import AUGMENTATIONS
from medseg.cli import (
    ArgumentParser,
    add_device_flags,
    add_pixel_limit,
    flag_name,
    named_values,
    number,
    spell_flags,
    spell_value,
)
from medseg.images import IMAGE_SIZE
from medseg.layers import ARCHITECTURES, CHOICES, arch_flags, network_flags
from medseg.samples import set_pixel_limit
from medseg.settings import MAX_CHANNELS
from medseg.training.checkpoint import find_checkpoint
from medseg.training.cross_validation import check_folds, read_folds
from medseg.training.recipes import PHANTOMS, RECIPES
from medseg.training.tracking import TRACKERS, check_tracker
from net import load_model

POSITIVE, AT_LEAST_0, REAL = number(1), number(0), number(0.0, type=float)  # types of flags
# What --resume makes of a flag, see `_group`.
KEPT = "kept"  # it decides the result, and has to be as it was
FREE = "free"  # it may change
ANEW = "anew"  # it is not restored: each command says it


def make_parser(doc, losses=(), weights=None):
    """The parser of train.py, whose docstring is `doc`.

    losses: names that --loss takes; weights: {name: weight}, its default. `on_resume` of the
    parser has what --resume makes of each flag, which is said here beside it: KEPT, FREE, ...
    """
    parser = ArgumentParser("train.py", doc)
    parser.on_resume = {}
    _add_data_flags(_group(parser, "data"))
    _add_training_flags(_group(parser, "training"))
    _add_recipe_flags(_group(parser, "beyond the tutorial"), losses, weights or {})
    _add_other_flags(parser)
    return parser


def _group(parser, title):
    """add(flag, default, help, ..., resume=KEPT) of a new group; with False it is a switch."""
    group = parser.add_argument_group(title)

    def add(flag, default=None, help=None, *, resume=KEPT, **options):
        if default is False:
            options = {"action": "store_true", **options}
        action = group.add_argument(flag, default=default, help=help, **options)
        parser.on_resume[action.dest] = resume

    return add


def _add_data_flags(add):
    folders = "the data set, a folder with train/, valid/ and test/"
    add("--data", "dataset", folders, metavar="FOLDER", resume=FREE)
    small = f"in about a minute by {spell_flags(PHANTOMS)}"
    add("--synthetic", False, f"draw phantoms in DATA/synthetic and train on them, {small}")
    side = "pixels a side to which images are resized"
    add("--image-size", IMAGE_SIZE, side, type=number(1, 8192))
    crop = "train on random crops of so many pixels a side; 0: on whole images, resized"
    add("--crop", 0, crop, type=number(0, 8192))
    classes = "union: all categories are one foreground; each: a class for each category"
    add("--classes", "union", classes, choices=("union", "each"))
    channels = "3 for colour or 1 for grey; images that have more keep them"
    add("--n-channels", 3, channels, type=number(1, MAX_CHANNELS))
    add("--skip-bad", False, "leave damaged images out and list them in skipped.txt")
    add_pixel_limit(add, resume=ANEW)


def _add_training_flags(add):
    auto = "auto: flags that suit the data set and this machine, as `python data.py --plan` shows"
    recipes = [f"{name}: {spell_flags(flags)}" for name, flags in RECIPES.items() if flags]
    add("--recipe", "tutorial", "; ".join([auto, *recipes]), choices=RECIPES)
    minutes = "how long a training with --recipe auto may take; 0: as long as it needs"
    add("--minutes", 0.0, minutes, type=REAL)
    add("--epochs", 40, "passes over the images, at most", type=POSITIVE, resume=FREE)
    add("--batch-size", 32, "images in a step, over all processes together", type=POSITIVE)
    repeat = "how often an epoch draws each image; 0.1: a tenth of them, others in each epoch"
    add("--repeat", 1.0, repeat, type=number(0.0001, 1e6, float))
    foreground = (
        "share of the draws that hold foreground, crops around it or whole images that have some: "
        "nnU-Net's is 0.33; 0: as they come"
    )
    add("--foreground", 0.0, foreground, type=number(0.0, 1.0, float))
    add("--lr", 1e-4, "learning rate of Adam", type=REAL)
    patience = "stop after so many epochs without a lower validation loss"
    add("--patience", 8, patience, type=POSITIVE, resume=FREE)
    min_steps = "do not count epochs for --patience that end within so many first steps"
    add("--min-steps", 300, min_steps, type=AT_LEAST_0)
    add("--n-filters", 32, "channels of the network's first level", type=number(1, 1024))
    seed = "seed of the first weights, of the order and augmentation of images, and of the folds"
    add("--seed", 0, seed, type=AT_LEAST_0)
    folds = (
        "cross-validation: deal train and valid into N folds, train each in OUT/fold1, ..., score "
        "all images in OUT/folds.json; 0: one run"
    )
    add("--folds", 0, folds, type=AT_LEAST_0, metavar="N")


def _add_recipe_flags(add, losses, weights):
    arch = "the network: the tutorial's, or one of docs/networks.md with its levels and filters"
    add("--arch", "tutorial", arch, choices=ARCHITECTURES)
    add("--depth", 5, "levels of the network", type=number(1, 8))
    init = "start from the weights of another run, whose network it takes"
    add("--init", None, init, metavar="WEIGHTS")
    loss = f"the losses that are added, by their weights; known are {', '.join(losses)}"
    known = dict.fromkeys(losses, (1.0, 100.0))
    add("--loss", weights, loss, type=named_values(known, _not_all_zero), metavar="NAME=WEIGHT,...")
    norm = "normalisation after each 3x3 convolution"
    add("--norm", "none", norm, choices=("none", "batch", "group"))
    dropout = "drop values at the bottleneck, channels after each 3x3 convolution, or none"
    add("--dropout", "bottleneck", dropout, choices=CHOICES["dropout"])
    prior = "probability of foreground that the untrained network gives; 0: about one half"
    add("--prior", 0.0, prior, type=number(0.0, 0.99, float))
    add("--weight-decay", 0.0, "decoupled weight decay, as in AdamW; 0: plain Adam", type=REAL)
    add("--warmup", 0, "steps at the start in which the learning rate rises", type=AT_LEAST_0)
    schedule = "cosine: the learning rate falls to 0 at the end of --epochs"
    add("--schedule", "constant", schedule, choices=("constant", "cosine"))
    ema = "evaluate and keep a running mean of the weights, with this decay; 0: the weights"
    add("--ema", 0.0, ema, type=number(0.0, 0.9999, float))
    strengths = ", ".join(f"{name}={value:g}" for name, (value, _) in AUGMENTATIONS.items())
    augment = f"random changes of the training images, as in flip,rotate=30; known: {strengths}"
    add("--augment", {}, augment, type=named_values(AUGMENTATIONS), metavar="NAME=STRENGTH,...")
    tune = (
        "after the training, choose on valid how predict.py makes masks: threshold, averaging "
        "over the flips of --augment, largest piece"
    )
    switch = argparse.BooleanOptionalAction
    add("--tune-prediction", False, tune, action=switch, resume=FREE)


def _not_all_zero(weights):
    if not any(weights.values()):
        raise ValueError("every weight is 0")
    return weights


def _add_other_flags(parser):
    add = _group(parser, "machine")
    add_device_flags(add, resume=FREE)
    compiled = "compile the network: slow to start, for long runs"
    switch = argparse.BooleanOptionalAction
    add("--compile", False, compiled, action=switch, resume=FREE)

    add = _group(parser, "files")
    add("--out", ".", "folder for weights, metrics and pictures", metavar="FOLDER", resume=ANEW)
    add("--resume", False, "go on from OUT/last.pth, with its flags", resume=ANEW)
    add("--overwrite", False, "replace the weights of another run in OUT", resume=ANEW)
    add("--test-only", False, "test OUT/best_model.pth and train nothing", resume=ANEW)
    add("--save-every", 60.0, "seconds between two checkpoints", type=REAL, resume=FREE)

    add = _group(parser, "tracking")
    tracker = "where the curves go besides metrics.csv; auto: to SwanLab, as --swanlab says"
    add("--tracker", "auto", tracker, choices=("auto", *TRACKERS), resume=FREE)
    modes = ("auto", "online", "offline", "disabled")
    when = "auto: online where there is an API key, else offline"
    add("--swanlab", "auto", when, choices=modes, resume=FREE)
    add("--project", "Unet-Medical-Segmentation", "name of the project there", resume=FREE)
    named = "name of the run there; without it, one made of the flags, as in bs32-epoch40"
    add("--experiment-name", None, named, metavar="NAME", resume=FREE)


def parse_arguments(parser, argv):
    """(the command line as a Namespace, the checkpoint to go on from or None, what a plan keeps).

    What is not given is as in layers of defaults, of which the later win: the parser's, those of
    --synthetic, --arch, --recipe and the network of --init; or a checkpoint's flags. What a plan
    keeps is a dict of flags, those that are given among them. Raises ValueError where flags
    contradict each other, or a checkpoint is damaged or of other flags; FileNotFoundError where
    there is nothing to resume.
    """
    given, defaults = parser.parse_given(argv), vars(parser.parse_args([]))
    recipe = RECIPES[given.get("recipe", defaults["recipe"])]
    first = argparse.Namespace(**{**defaults, **recipe, **given})
    set_pixel_limit(first.max_megapixels)
    if first.crop and given.get("image_size", IMAGE_SIZE) != IMAGE_SIZE:
        raise ValueError("--crop takes images at their own size: leave --image-size away")
    checkpoint = read_folds(first) or find_checkpoint(
        Path(first.out), wanted=first.resume, test_only=first.test_only
    )
    if checkpoint:
        restored = {name for name, what in parser.on_resume.items() if what != ANEW}
        layer = {name: checkpoint["flags"][name] for name in restored & checkpoint["flags"].keys()}
        kept = {}
    else:
        layer, kept = _fresh_flags(first, given)
    args = argparse.Namespace(**{**defaults, **layer, **given})
    if args.minutes and args.recipe != "auto" and not checkpoint:
        raise ValueError("--minutes is what --recipe auto plans for: give that too")
    check_folds(args)
    check_tracker(args.tracker)
    if args.test_only:
        return args, checkpoint, {}
    if checkpoint:
        _check_same_run(vars(args), checkpoint, parser.on_resume)
    return args, checkpoint, {**kept, **given}


def _check_same_run(flags, checkpoint, on_resume):
    """ValueError where a flag that decides the result differs from the checkpoint's."""
    kept = [name for name, what in on_resume.items() if what == KEPT]
    if flags["folds"]:
        kept += ["data", "epochs", "patience"]  # the folds that are done had these
    elif flags["schedule"] != "constant":
        kept.append("epochs")  # with which it ends
    for name in kept:
        now, before = flags[name], checkpoint["flags"].get(name, flags[name])
        if now != before:
            flag, now, before = flag_name(name), spell_value(now), spell_value(before)
            raise ValueError(
                f"{checkpoint['path']}: was trained with {flag} {before}, not {now}: leave {flag} "
                "away, or start afresh without --resume"
            )


def _fresh_flags(first, given):
    """(the flags of a run that begins, beneath those that are given; what of them a plan keeps)."""
    small = PHANTOMS if first.synthetic and "recipe" not in given else {}
    arch = arch_flags(first.arch) if "arch" in given else {}
    layer, network, kept = {**small, **arch, **RECIPES[first.recipe]}, {}, {}
    if first.init and not first.test_only:
        model = load_model(first.init)
        network = network_flags(model, first.init)
        for name, value in network.items():
            if given.get(name, value) != value:
                raise ValueError(
                    f"{first.init}: was trained with {flag_name(name)} {value}, not {given[name]}: "
                    f"leave {flag_name(name)} away, it is read from the weights"
                )
        if model.n_classes > 1:  # which a plan would take together
            kept = {"classes": "each"}
        if not (first.crop or first.recipe == "auto"):  # else images keep their size, or a plan has
            layer["image_size"] = model.info.image_size or IMAGE_SIZE
    return {**layer, **network}, {**arch, **network, **kept}


def add_plan(args, planned):
    """The command line with the flags of a plan, which has kept those that were given."""
    return argparse.Namespace(**{**vars(args), **planned})
