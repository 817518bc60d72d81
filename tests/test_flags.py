"""Which flag wins: the command line, then --init, --recipe, --arch, and the tutorial's default."""

import argparse

import pytest
import torch

from medseg.layers import Architecture
from medseg.training.checkpoint import KEYS
from medseg.training.flags import make_parser, parse_arguments, recorded_flags
from medseg.training.recipes import RECIPES, network_words


def parse(*flags):
    args, _ = parse_arguments([*map(str, flags), "--out", "/nowhere"], "", None)
    return args


def test_an_architecture_brings_its_own_levels_filters_and_normalisation():
    args = parse("--arch", "drive")
    assert (args.depth, args.n_filters, args.norm, args.dropout) == (4, 64, "batch", "none")
    args = parse("--arch", "study")
    assert (args.depth, args.n_filters, args.norm, args.dropout) == (4, 64, "batch", "channels")
    args = parse("--arch", "study", "--n-filters", 8, "--depth", 2, "--dropout", "none")
    assert (args.depth, args.n_filters, args.norm, args.dropout) == (2, 8, "batch", "none")
    args = parse()
    assert (args.depth, args.n_filters, args.norm, args.dropout) == (5, 32, "none", "bottleneck")


def test_a_recipe_wins_over_an_architecture_and_the_command_line_over_both():
    args = parse("--recipe", "vessels", "--arch", "study")
    assert (args.arch, args.depth, args.n_filters) == ("study", 3, 16)
    args = parse("--recipe", "vessels", "--arch", "study", "--n-filters", 4, "--epochs", 2)
    assert (args.n_filters, args.epochs, args.lr) == (4, 2, RECIPES["vessels"]["lr"])


def test_the_words_of_the_network():
    study = parse("--arch", "study")
    assert Architecture(**network_words(study)) == Architecture(
        depth=4,
        norm="batch",
        bias=False,
        up="nearest",
        down="stride",
        activation="leaky_relu",
        padding="reflect",
        dropout="channels",
    )
    # Without a normalisation, which would have one, the convolutions need a bias.
    assert Architecture(**network_words(parse("--arch", "study", "--norm", "none"))).bias
    assert Architecture(**network_words(parse())) == Architecture()


def test_crops_are_of_images_at_their_own_size():
    with pytest.raises(ValueError, match="leave --image-size away"):
        parse("--crop", 64, "--image-size", 128)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--augment", "flip,rotat=30"), ["--augment", "did you mean rotate?"]),
        (("--augment", "rotate=181"), ["--augment", "from 0 to 180"]),
        (("--arch", "vgg"), ["--arch", "tutorial"]),
        (("--depth", 9), ["--depth", "at most 8"]),
    ],
)
def test_words_that_are_refused(flags, words, refused):
    refused("train", *flags, words=words)


# ---- on --resume -----------------------------------------------------------------------------

NOT_OF_A_RUN = {"help", "out", "resume", "test_only", "overwrite"}
ABOUT_THE_RUN = {  # what it is called, where it runs and how long, which may be another thing later
    *("data", "device", "compile", "save_every", "swanlab", "project", "experiment_name"),
    *("epochs", "patience"),
}
FLAGS = [action for action in make_parser("")._actions if action.dest not in NOT_OF_A_RUN]


def another_value(action):
    """What to write on the command line for a flag to have another value than its default."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    for text in action.choices or ("other", "bce", "flip", "0.5", "7"):
        try:
            value = action.type(text) if action.type else text
        except (ValueError, argparse.ArgumentTypeError):
            continue
        if value != action.default:
            return [action.option_strings[0], str(text)]
    pytest.fail(f"no other value for {action.dest}")


@pytest.mark.parametrize("action", FLAGS, ids=[action.dest for action in FLAGS])
def test_a_resumed_run_keeps_every_flag_that_decides_its_result(action, tmp_path, refused):
    """A flag that is new is refused too, unless it is added to ABOUT_THE_RUN."""
    state = dict.fromkeys(KEYS, {})
    flags = recorded_flags(parse_arguments(["--out", str(tmp_path)], "", None)[0])
    state |= {"flags": flags, "progress": {"history": [{"val_loss": 1.0}]}}
    torch.save(state, tmp_path / "last.pth")
    resume = ["--resume", "--out", str(tmp_path)]
    given = another_value(action)
    if action.dest in ABOUT_THE_RUN:
        args, checkpoint = parse_arguments([*resume, *given], "", None)
        assert getattr(args, action.dest) != flags[action.dest] and checkpoint["flags"] == flags
    else:
        refused("train", *resume, *given, words=[tmp_path / "last.pth", given[0]])
    # What is given again as it was, is taken.
    if action.nargs != 0 and action.default is not None:
        parse_arguments([*resume, given[0], str(action.default)], "", None)
