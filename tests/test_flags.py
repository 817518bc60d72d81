"""Which flag wins: the command line, then --init, --recipe, --arch, and the tutorial's default."""

import pytest

from medseg.flags import parse_arguments
from medseg.layers import Architecture
from medseg.recipes import RECIPES, network_words


def parse(*flags):
    args, _ = parse_arguments([*map(str, flags), "--out", "/nowhere"], "", None)
    return args


def test_an_architecture_brings_its_own_levels_filters_and_normalisation():
    args = parse("--arch", "drive")
    assert (args.depth, args.n_filters, args.norm, args.dropout) == (4, 64, "batch", "none")
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
