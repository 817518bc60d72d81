"""Which flag wins, what --resume keeps of them, and what is refused before anything is planned."""

import argparse

import pytest
import torch
from helpers import SMALL, assert_refused, script_here

import train
from medseg.files import file_lock
from medseg.layers import Architecture, architecture_of
from medseg.training.checkpoint import KEYS, Progress
from medseg.training.flags import make_parser, parse_arguments
from net import UNet

PLANNED = ("--recipe", "auto")
PARSER = make_parser("", train.LOSSES, train.WEIGHTS)


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    """The weights for --init, whatever their path: a tutorial's of 3 filters."""
    network = UNet(n_filters=3, image_size=64)
    monkeypatch.setattr("medseg.training.flags.load_model", lambda path: network)
    return network


def parse(*flags):
    """The command line of a fresh start."""
    return parse_arguments(PARSER, [*map(str, flags), "--out", "/nowhere"])[0]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", {"depth": 5, "n_filters": 32, "norm": "none", "augment": {}, "image_size": 256}),
        # An architecture brings its own levels, filters and normalisation.
        ("--arch drive", {"depth": 4, "n_filters": 64, "norm": "batch", "dropout": "none"}),
        ("--arch study --depth 2", {"depth": 2, "norm": "batch", "dropout": "channels"}),
        # A recipe wins over it, the network of --init over both, and the command line over all.
        ("--recipe vessels --arch study", {"arch": "study", "depth": 3, "n_filters": 16}),
        ("--recipe vessels --arch study --n-filters 4", {"n_filters": 4, "lr": 2e-3}),
        ("--recipe strong", {"augment": {"rotate": 5, "scale": 0.1, "shift": 0.05}}),
        ("--init w --recipe strong", {"norm": "none", "n_filters": 3, "ema": 0.995}),
        ("--init w --arch tutorial", {"depth": 5, "n_filters": 3, "image_size": 64}),
        ("--init w --image-size 32", {"n_filters": 3, "image_size": 32}),
        ("--init w --recipe vessels", {"depth": 5, "crop": 128, "image_size": 256}),
        ("--init w --crop 0 --recipe vessels", {"crop": 0, "image_size": 64}),
        ("--init w --test-only", {"n_filters": 32, "image_size": 256}),
        # Phantoms have defaults of their own, unless a recipe is given.
        ("--synthetic", {"image_size": 64, "n_filters": 8}),
        ("--synthetic --image-size 32 --crop 0", {"image_size": 32, "n_filters": 8}),
        ("--synthetic --crop 64", {"crop": 64, "n_filters": 8}),
        ("--synthetic --arch drive", {"image_size": 64, "n_filters": 64, "depth": 4}),
        ("--synthetic --recipe tutorial", {"image_size": 256, "n_filters": 32, "lr": 1e-4}),
        ("--synthetic --init w", {"image_size": 64, "n_filters": 3, "norm": "none"}),
    ],
)
def test_the_defaults_of_a_fresh_start(flags, expected):
    args = vars(parse(*flags.split()))
    if "augment" in expected and expected["augment"]:
        assert expected["augment"].items() <= args["augment"].items()
    else:
        assert expected.items() <= args.items()


@pytest.mark.parametrize("flags", [("--recipe", "vessels"), ("--resume",), ("--init", "missing")])
def test_help_shows_the_parsers_own_defaults_whatever_is_given_besides(flags, capsys):
    shown = []
    for given in ((), flags):
        with pytest.raises(SystemExit) as leaving:
            parse(*given, "--help")
        assert leaving.value.code == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "(default: dice=0.6,bce=0.4)" in shown[0]


def test_the_architecture_of_the_flags():
    study = architecture_of(parse("--arch", "study"))
    assert (study.up, study.down, study.padding) == ("nearest", "stride", "reflect")
    # Without a normalisation, which would have one, the convolutions need a bias.
    assert not study.bias and architecture_of(parse("--arch", "study", "--norm", "none")).bias
    assert architecture_of(parse()) == Architecture()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--recipe strung", ["--recipe"]),
        ("--augment flip,rotat=30", ["--augment", "did you mean rotate?"]),
        ("--augment rotate=181", ["--augment", "from 0 to 180"]),
        ("--depth 9", ["--depth", "at most 8"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--epochs many", ["--epochs"]),
        ("--lr nan", ["--lr"]),
        ("--crop 64 --image-size 128", ["--crop", "--image-size"]),
        ("--minutes 5", ["--minutes", "--recipe auto"]),
        ("--resume --test-only", ["--resume", "--test-only"]),
        ("--epoch=3", ["--epoch=3", "did you mean --epochs?"]),
        ("--batch_size=4", ["did you mean --batch-size?"]),
        ("--frobnicate", ["--frobnicate"]),
        ("--init w --n-filters 8", ["--n-filters 3, not 8"]),
        ("--init w --arch study", ["--arch tutorial, not study"]),
        ("--device warp", ["warp"]),
    ],
)
def test_values_that_are_refused(flags, words, refused):
    refused("train", *flags.split(), words=words)


# ---- on --resume -----------------------------------------------------------------------------

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


@pytest.mark.parametrize("action", FLAGS, ids=[action.dest for action in FLAGS])
def test_a_resumed_run_keeps_every_flag_that_decides_its_result(action, tmp_path, refused):
    """A flag that is new is refused too, unless it is added to ABOUT_THE_RUN."""
    flags = vars(parse_arguments(PARSER, ["--out", str(tmp_path)])[0])
    state = {**dict.fromkeys(KEYS, {}), "flags": flags, "progress": Progress().state_dict()}
    torch.save(state, tmp_path / "last.pth")
    resume, given = ["--resume", "--out", str(tmp_path)], another_value(action)
    if action.dest in ABOUT_THE_RUN:
        args, checkpoint, _ = parse_arguments(PARSER, [*resume, *given])
        assert getattr(args, action.dest) != flags[action.dest] and checkpoint["flags"] == flags
    else:
        refused("train", *resume, *given, words=[tmp_path / "last.pth", given[0]])


def test_what_is_given_again_as_it_was_is_taken(tmp_path):
    given = "--lr 0.5 --norm batch --skip-bad --loss dice --augment flip --epochs 3".split()
    flags = vars(parse_arguments(PARSER, [*given, "--out", "elsewhere"])[0])
    state = {**dict.fromkeys(KEYS, {}), "flags": {**flags, "later": 5}}
    torch.save({**state, "progress": Progress().state_dict()}, tmp_path / "last.pth")
    for again in ([], given):
        resume = [*again, "--resume", "--epochs", "5", "--out", str(tmp_path)]
        args = vars(parse_arguments(PARSER, resume)[0])
        assert args == {**flags, "epochs": 5, "out": str(tmp_path), "resume": True}


# ---- a plan ----------------------------------------------------------------------------------


class Planned(Exception):
    pass


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(*flags): train.py --recipe auto, up to its plan or, with words, refused before it."""

    def plan(given):
        raise Planned

    def run(*flags, words=()):
        argv = [*SMALL[4:], *PLANNED, *map(str, flags)]
        if not words:
            with pytest.raises(Planned):
                train.main([*map(str, argv), "--out", str(tmp_path / "run")])
        else:
            result = script_here("train.py", *argv, "--out", "run", cwd=tmp_path)
            assert_refused(result, *words)

    monkeypatch.setattr(train, "planned_flags", plan)
    return run


def test_nothing_is_planned_for_a_command_that_is_refused(start, tmp_path):
    """Planning takes its time: a folder with another run, and flags that do not go together."""
    start("--minutes", 5)
    for flags in ("--crop 64 --image-size 64", "--loss dice=0", "--folds 1", "--bath-size 4"):
        start(*flags.split(), words=[flags.split()[0]])
    start("--init", "w", "--n-filters", 5, words=["--n-filters"])
    for name in ("last.pth", "folds.json", "best_model.pth"):
        (tmp_path / "run" / name).touch()
        start(words=[name, "--resume", "--overwrite"])
        start("--overwrite")
        (tmp_path / "run" / name).unlink()
    with file_lock(tmp_path / "run" / ".lock", busy=""):
        start("--overwrite", words=["run"])
    (tmp_path / "run" / "metrics.csv").write_text("mine")
    start("--overwrite", words=["metrics.csv"])


def test_nothing_is_planned_over_folds_of_another_run(start, tmp_path):
    run = tmp_path / "run" / "fold1"
    run.mkdir(parents=True)
    (run / "best_model.pth").touch()
    start()
    start("--folds", 2, words=["fold1/best_model.pth"])
    start("--folds", 2, "--overwrite")
    (run / "metrics.csv").write_text("mine")
    start("--folds", 2, "--overwrite", words=["metrics.csv"])


@pytest.mark.parametrize(
    "n_classes, flags, expected",
    [(3, (), "each"), (1, (), None), (3, ("--classes", "union"), "union")],
)
def test_a_plan_keeps_what_is_given_and_the_network_and_classes_of_the_weights(
    n_classes, flags, expected, monkeypatch
):
    network = UNet(3, n_classes, 3, image_size=64)
    monkeypatch.setattr("medseg.training.flags.load_model", lambda path: network)
    argv = [*PLANNED, "--init", "w", "--lr", "0.5", *flags, "--out", "/nowhere"]
    kept = parse_arguments(PARSER, argv)[2]
    assert (kept.get("classes"), kept["n_filters"], kept["lr"]) == (expected, 3, 0.5)
    assert "image_size" not in kept
