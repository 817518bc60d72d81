"""Which flag wins, what --resume keeps of them, and what is refused before anything is planned."""

import argparse
from unittest.mock import Mock

import pytest
import torch
from helpers import SMALL, script_here

import train
from medseg.files import file_lock
from medseg.training.checkpoint import KEYS
from medseg.training.flags import make_parser, parse_arguments
from net import UNet

PARSER = make_parser("", train.LOSSES, train.WEIGHTS)


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """The weights for --init, whatever their path: a tutorial's of 3 filters and 3 classes."""
    network = UNet(3, 3, 3, image_size=64)
    monkeypatch.setattr("medseg.training.flags.load_model", lambda path: network)


def parse(*flags):
    """(flags, checkpoint, what a plan keeps) of a command line, the first as a dict."""
    args, *more = parse_arguments(PARSER, ["--out", "/nowhere", *map(str, flags)])
    return vars(args), *more


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "depth=5 n_filters=32 norm=none image_size=256 lr=0.0001"),
        # An architecture brings its own levels, filters and normalisation.
        ("--arch study --depth 2", "depth=2 n_filters=64 norm=batch dropout=channels"),
        # A recipe wins over it, the network of --init over both, and the command line over all.
        ("--recipe vessels --arch study --n-filters 4", "arch=study depth=3 n_filters=4 lr=0.002"),
        ("--init w --recipe strong --image-size 32", "norm=none n_filters=3 image_size=32"),
        ("--init w --recipe vessels", "depth=5 crop=128 image_size=256"),
        ("--init w --crop 0 --recipe vessels", "crop=0 image_size=64"),
        ("--init w --test-only", "n_filters=32 image_size=256"),
        # Phantoms have defaults of their own, unless a recipe is given.
        ("--synthetic --arch drive", "image_size=64 n_filters=64 depth=4"),
        ("--synthetic --recipe tutorial", "image_size=256 n_filters=32 lr=0.0001"),
        ("--synthetic --init w --lr 1", "image_size=64 n_filters=3 norm=none lr=1.0"),
    ],
)
def test_the_defaults_of_a_fresh_start(flags, expected):
    values = parse(*flags.split())[0]
    assert {f"{name}={value}" for name, value in values.items()} >= set(expected.split())


def test_a_plan_keeps_what_is_given_and_the_network_and_classes_of_the_weights():
    for flags, expected in (
        ("", {}),
        ("--init w", {"classes": "each", "n_filters": 3}),
        ("--init w --classes union", {"classes": "union", "n_filters": 3}),
    ):
        kept = parse("--recipe", "auto", "--lr", 0.5, *flags.split())[2]
        names = {"classes", "n_filters", "image_size", "lr"} & kept.keys()
        assert {name: kept[name] for name in names} == {"lr": 0.5, **expected}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--augment flip,rotat=30", "--augment rotate?"),
        ("--augment rotate=181", "--augment 180"),
        ("--loss mse", "--loss dice"),
        ("--depth 9", "--depth 8"),
        ("--lr nan", "--lr"),
        ("--minutes 5", "--minutes auto"),
        ("--recipe auto --folds 1", "--folds 2"),
        ("--batch_size=4", "--batch-size?"),
        ("--init w --arch study", "--arch tutorial study"),
    ],
)
def test_values_that_are_refused(flags, words, refused):
    refused("train", *flags.split(), words=words.split())


NOT_OF_A_RUN = {"help", "out", "resume", "test_only", "overwrite", "max_megapixels"}
ABOUT_THE_RUN = {  # what it is called, where it runs and how long, which may be another thing later
    *("data", "device", "compile", "save_every", "tracker", "swanlab", "project"),
    *("experiment_name", "epochs", "patience"),
    "tune_prediction",  # done at the end, with the weights that there are then
}
FLAGS = [action for action in PARSER._actions if action.dest not in NOT_OF_A_RUN]


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


def write_last(folder, *flags, **more):
    """A last.pth of a run with these flags, before its first step; returns them as a dict."""
    flags = parse(*flags)[0]
    state = {**dict.fromkeys(KEYS, {}), "flags": {**flags, **more}}
    torch.save(state, folder / "last.pth")
    return flags


@pytest.mark.parametrize("action", FLAGS, ids=[action.dest for action in FLAGS])
def test_a_resumed_run_keeps_every_flag_that_decides_its_result(action, tmp_path, refused):
    """A flag that is new is refused too, unless it is added to ABOUT_THE_RUN."""
    flags = write_last(tmp_path)
    resume = ("--resume", "--out", tmp_path, *another_value(action))
    if action.dest in ABOUT_THE_RUN:
        now, checkpoint, _ = parse(*resume)
        assert now[action.dest] != flags[action.dest] and checkpoint["flags"] == flags
    else:
        refused("train", *resume, words=[tmp_path / "last.pth", resume[3]])


def test_what_is_given_again_as_it_was_is_taken(tmp_path):
    given = "--lr 0.5 --norm batch --skip-bad --loss dice --augment flip --epochs 3".split()
    flags = write_last(tmp_path, *given, later=5)
    assert flags["loss"] == {"dice": 1} and flags["augment"] == {"flip": 1}
    for again in ([], given):
        now = parse(*again, "--resume", "--epochs", 5, "--out", tmp_path)[0]
        assert now == {**flags, "epochs": 5, "out": str(tmp_path), "resume": True}


def test_nothing_is_planned_for_a_command_that_is_refused(tmp_path, monkeypatch, refused):
    """Planning takes its time: a folder with another run, and flags that do not go together."""
    monkeypatch.setattr(train, "planned_flags", Mock(side_effect=KeyboardInterrupt))
    auto = (*SMALL[4:], "--recipe", "auto", "--out", "run")

    def plans(*flags):
        return script_here("train.py", *auto, *flags, cwd=tmp_path).returncode == 130

    assert plans("--minutes", 5)
    for flags in ("--crop 64 --image-size 64", "--loss dice=0", "--n-filters 5 --init w"):
        refused("train", *auto, *flags.split(), words=[flags.split()[0]])
    run, fold = tmp_path / "run", tmp_path / "run" / "fold1"
    fold.mkdir()
    for path, folds in (
        *((run / name, ()) for name in ("last.pth", "folds.json", "best_model.pth")),
        (fold / "best_model.pth", ("--folds", 2)),
    ):
        path.touch()
        words = [path.relative_to(tmp_path), "--resume", "--overwrite"]
        refused("train", *auto, *folds, words=words)
        assert plans(*folds, "--overwrite")
        path.unlink()
        (path.parent / "metrics.csv").write_text("mine")
        refused("train", *auto, *folds, "--overwrite", words=["metrics.csv"])
        (path.parent / "metrics.csv").unlink()
    with file_lock(run / ".lock", busy=""):
        refused("train", *auto, "--overwrite", words=["run"])
