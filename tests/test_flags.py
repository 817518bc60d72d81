"""Which flag wins: the command line, then --init, --recipe, --arch, and the tutorial's default."""

import argparse

import pytest
import torch

from medseg.cli import ArgumentParser
from medseg.files import file_lock
from medseg.layers import Architecture, architecture_of
from medseg.training.checkpoint import KEYS, Progress, recorded_flags
from medseg.training.flags import make_parser, parse_arguments
from net import UNet

PLANNED = ("--recipe", "auto")


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """The weights for --init, whatever their path: a tutorial's of 3 filters."""
    network = UNet(n_filters=3, image_size=64)
    monkeypatch.setattr("medseg.training.flags.load_model", lambda path: network)


def parse(*flags):
    """The command line of a fresh start."""
    args, _ = parse_arguments([*map(str, flags), "--out", "/nowhere"], "")
    return args


@pytest.mark.parametrize(
    "flags, expected",
    [
        ((), {"depth": 5, "n_filters": 32, "norm": "none", "dropout": "bottleneck"}),
        # An architecture brings its own levels, filters and normalisation.
        (("--arch", "drive"), {"depth": 4, "n_filters": 64, "norm": "batch", "dropout": "none"}),
        (
            ("--arch", "study"),
            {"depth": 4, "n_filters": 64, "norm": "batch", "dropout": "channels"},
        ),
        (("--arch", "study", "--depth", 2, "--dropout", "none"), {"depth": 2, "dropout": "none"}),
        # A recipe wins over it, the network of --init over both, and the command line over all.
        (
            ("--recipe", "vessels", "--arch", "study"),
            {"arch": "study", "depth": 3, "n_filters": 16},
        ),
        (
            ("--recipe", "vessels", "--arch", "study", "--n-filters", 4),
            {"n_filters": 4, "lr": 2e-3},
        ),
        (("--init", "w", "--recipe", "strong"), {"norm": "none", "n_filters": 3, "ema": 0.995}),
        (("--init", "w", "--arch", "tutorial"), {"depth": 5, "n_filters": 3, "image_size": 64}),
        (("--init", "w", "--image-size", 32), {"n_filters": 3, "image_size": 32}),
        (("--init", "w", "--recipe", "vessels"), {"depth": 5, "crop": 128, "image_size": 256}),
        (("--init", "w", "--crop", 0, "--recipe", "vessels"), {"crop": 0, "image_size": 64}),
        (("--init", "w", "--test-only"), {"n_filters": 32, "image_size": 256}),
    ],
)
def test_the_defaults_of_a_fresh_start(flags, expected):
    args = parse(*flags)
    assert expected.items() <= vars(args).items()


@pytest.mark.parametrize("flags", [("--recipe", "strong", "--arch", "study"), ("--init", "w")])
def test_the_whole_command_line_is_parsed_once(flags, monkeypatch):
    parsed, parse_args = [], ArgumentParser.parse_args

    def count(*arguments):
        parsed.append(arguments)
        return parse_args(*arguments)

    monkeypatch.setattr(ArgumentParser, "parse_args", count)
    parse(*flags)
    assert len(parsed) == 1


@pytest.mark.parametrize("flags", [("--recipe", "vessels"), ("--resume",), ("--init", "missing")])
def test_help_shows_the_parsers_own_defaults_whatever_is_given_besides(flags, capsys):
    shown = []
    for given in ((), flags):
        with pytest.raises(SystemExit) as leaving:
            parse(*given, "--help")
        assert leaving.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "--weight-decay" in shown[0]


def test_the_architecture_of_the_flags():
    study = parse("--arch", "study")
    assert architecture_of(study) == Architecture(
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
    assert architecture_of(parse("--arch", "study", "--norm", "none")).bias
    assert architecture_of(parse()) == Architecture()


def test_crops_are_of_images_at_their_own_size():
    with pytest.raises(ValueError, match="leave --image-size away"):
        parse("--crop", 64, "--image-size", 128)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--recipe", "strung"), ["--recipe"]),
        (("--augment", "flip,rotat=30"), ["--augment", "did you mean rotate?"]),
        (("--augment", "rotate=181"), ["--augment", "from 0 to 180"]),
        (("--arch", "vgg"), ["--arch", "tutorial"]),
        (("--depth", 9), ["--depth", "at most 8"]),
    ],
)
def test_values_that_are_refused(flags, words, refused):
    refused("train", *flags, words=words)


# ---- on --resume -----------------------------------------------------------------------------

NOT_OF_A_RUN = {"help", "out", "resume", "test_only", "overwrite", "max_megapixels"}
ABOUT_THE_RUN = {  # what it is called, where it runs and how long, which may be another thing later
    *("data", "device", "compile", "save_every", "tracker", "swanlab", "project"),
    *("experiment_name", "epochs", "patience"),
    "tune_prediction",  # done at the end, with the weights that there are then
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
    flags = recorded_flags(parse_arguments(["--out", str(tmp_path)], "")[0])
    state |= {"flags": flags, "progress": Progress().state_dict(), "guarded_step": {"steps": 0}}
    torch.save(state, tmp_path / "last.pth")
    resume = ["--resume", "--out", str(tmp_path)]
    given = another_value(action)
    if action.dest in ABOUT_THE_RUN:
        args, checkpoint = parse_arguments([*resume, *given], "")
        assert getattr(args, action.dest) != flags[action.dest] and checkpoint["flags"] == flags
    else:
        refused("train", *resume, *given, words=[tmp_path / "last.pth", given[0]])
    # What is given again as it was, is taken.
    if action.nargs != 0 and action.default is not None:
        parse_arguments([*resume, given[0], str(action.default)], "")


def test_nothing_is_planned_for_a_command_that_is_refused(tmp_path, capsys):
    """Planning takes its time: a folder with another run, and flags that do not go together."""

    class Planned(Exception):
        pass

    def make_plan(given):
        raise Planned

    def start(*flags):
        argv = [*PLANNED, "--out", str(tmp_path / "run"), *map(str, flags)]
        parse_arguments(argv, "", make_plan)

    for flags in ((), ("--minutes", 5)):
        with pytest.raises(Planned):
            start(*flags)
    for flags in (("--crop", 64, "--image-size", 64), ("--loss", "dice=0"), ("--folds", 1)):
        with pytest.raises(ValueError, match=flags[0]):
            start(*flags)
    with pytest.raises(ValueError, match="--n-filters"):
        start("--init", "w", "--n-filters", 5)
    with pytest.raises(SystemExit):
        start("--bath-size", 4)
    for name in ("last.pth", "folds.json"):
        (tmp_path / "run" / name).touch()
        with pytest.raises(ValueError, match=name):
            start()
        with pytest.raises(Planned):
            start("--overwrite")
        (tmp_path / "run" / name).unlink()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out"):
        start("--out", tmp_path / "file")


@pytest.mark.parametrize("folds", [(), ("--folds", "2")])
def test_nothing_is_planned_for_a_folder_in_use(folds, tmp_path):
    """In use: another training writes to it, or it holds what is not to be replaced."""
    argv = [*PLANNED, "--out", str(tmp_path), *folds]

    def make_plan(given):
        raise LookupError

    def start(*flags):
        parse_arguments([*argv, *flags], "", make_plan)

    (tmp_path / "folds").mkdir()
    with pytest.raises(ValueError if folds else LookupError):
        start("--overwrite")
    (tmp_path / "folds").rmdir()
    with file_lock(tmp_path / ".lock", busy=""), pytest.raises(ValueError, match=str(tmp_path)):
        start("--overwrite")
    run = tmp_path / "fold1"
    run.mkdir()
    (run / "best_model.pth").touch()
    if folds:
        with pytest.raises(ValueError, match="fold1/best_model.pth"):
            start()
    for flags in [("--overwrite",)] if folds else [(), ("--overwrite",)]:
        with pytest.raises(LookupError):
            start(*flags)
    table = (run if folds else tmp_path) / "metrics.csv"
    table.write_text("mine")
    with pytest.raises(ValueError, match="metrics.csv"):
        start("--overwrite")


@pytest.mark.parametrize(
    "n_classes, flags, expected",
    [
        (3, (), "each"),
        (1, (), "union"),
        (3, ("--classes", "union"), "union"),
    ],
)
def test_a_plan_keeps_the_classes_of_the_weights(n_classes, flags, expected, tmp_path, monkeypatch):
    """make_plan takes the classes together where nothing is given."""
    network = UNet(3, n_classes, 3, image_size=64)
    monkeypatch.setattr("medseg.training.flags.load_model", lambda path: network)

    def make_plan(given):
        return {"crop": 16, "classes": given.get("classes", "union")}

    argv = [*PLANNED, "--init", "w", "--out", str(tmp_path), *flags]
    args, _ = parse_arguments(argv, "", make_plan)
    assert (args.classes, args.crop, args.n_filters) == (expected, 16, 3)
