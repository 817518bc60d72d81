"""Losses, metrics, early stopping, checkpoints and the training command."""

import csv
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    HOME,
    ROOT,
    SMALL,
    assert_done,
    assert_refused,
    make_dataset,
    output_of,
    script,
    script_here,
    skip_pictures,
)
from PIL import Image
from torch.utils.data import DataLoader

import data
import train
from data import Batches, COCOSegmentationDataset, Order, load_split
from medseg.coco import load_coco
from medseg.images import MEAN, STD
from medseg.metrics import RunningScores, metrics
from medseg.phantoms import make_phantoms
from medseg.signals import Signals, Stopped
from medseg.training import history
from medseg.training.checkpoint import Checkpointer, Progress
from medseg.training.flags import make_parser
from medseg.training.history import log_values, print_epoch, progress_bar
from medseg.training.optim import GuardedStep, RunningMean, fit_to_run, make_schedule
from medseg.training.resume import waits
from medseg.weights import load_weights
from net import UNet, load_model
from train import combined_loss, dice_loss, evaluate, train_model, train_one_epoch

# ---- loss ------------------------------------------------------------------------------------


def test_losses_by_hand():
    pred = torch.tensor([[0.9, 0.2], [0.6, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # intersection 0.9 + 0.6 = 1.5; sums 1.8 and 2
    assert dice_loss(pred, target).item() == pytest.approx(1 - 3.0 / 3.8, abs=1e-6)
    bce = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.9)) / 4
    expected = 0.6 * (1 - 3.0 / 3.8) + 0.4 * bce
    assert combined_loss(pred, target).item() == pytest.approx(expected, abs=1e-6)


def test_losses_at_the_ends():
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert combined_loss(ones, ones).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(zeros, zeros).item() == pytest.approx(0, abs=1e-6)  # smooth / smooth
    assert dice_loss(zeros, ones).item() == pytest.approx(1, abs=1e-6)
    assert math.isfinite(combined_loss(zeros, ones).item())  # torch bounds the logarithm at -100


def test_dice_is_of_the_whole_batch_in_any_memory_order():
    pred, target = torch.rand(3, 2, 5, 7), (torch.rand(3, 2, 5, 7) > 0.5).float()
    expected = 1 - 2 * (pred * target).sum() / (pred.sum() + target.sum())
    assert dice_loss(pred, target).item() == pytest.approx(expected.item(), abs=1e-6)
    other = pred.contiguous(memory_format=torch.channels_last)
    assert dice_loss(other, target).item() == pytest.approx(expected.item(), abs=1e-6)


# ---- metrics ---------------------------------------------------------------------------------


def test_metrics_by_hand():
    expected = {
        "acc": 0.94,
        "dice": 12 / 18,
        "iou": 6 / 12,
        "precision": 6 / 8,
        "recall": 6 / 10,
        "miou": (6 / 12 + 88 / 94) / 2,
        "background_acc": 0.90,
    }
    assert metrics(tp=6, fp=2, fn=4, tn=88) == pytest.approx(expected)


PERFECT = dict.fromkeys(("dice", "iou", "precision", "recall", "miou", "acc"), 1)
NO_OVERLAP = {**dict.fromkeys(("dice", "iou", "precision", "recall"), 0), "acc": 6 / 9}


@pytest.mark.parametrize(
    "counts, expected",
    [
        ((0, 0, 0, 9), {**PERFECT, "background_acc": 1}),  # target and prediction empty
        ((0, 3, 0, 6), {**NO_OVERLAP, "background_acc": 1}),  # only the target empty
        ((0, 0, 3, 6), {**NO_OVERLAP, "background_acc": 6 / 9}),  # only the prediction empty
        ((9, 0, 0, 0), {**PERFECT, "background_acc": 0}),  # both all foreground
    ],
)
def test_metrics_of_empty_masks(counts, expected):
    scores, of_arrays = metrics(*counts), metrics(*np.array([counts]).T)
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert {key: value[0] for key, value in of_arrays.items()} == scores


def test_scores_are_sums_over_images():
    pred, target = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 4)
    pred[0, 0, :2], target[0, 0, :1] = 0.9, 1  # 8 predicted, 4 true, 4 in both: Dice 8/12
    target[1, 0, 0, 0] = 1  # missed: Dice 0
    pred[2, 0, 0, 0] = 0.51  # false alarm: Dice 0
    pred[3] = 0.5  # at the threshold is background; both empty: Dice 1
    at_once, in_parts = RunningScores("cpu"), RunningScores("cpu")
    at_once.add(torch.tensor(2.0), pred, target)
    in_parts.add(torch.tensor(1.0), pred[:1], target[:1])  # unequal batches, losses 1 and 3
    in_parts.add(torch.tensor(3.0), pred[1:], target[1:])
    assert in_parts.counts.tolist() == at_once.counts.tolist() == [[4, 5, 1, 54]]
    for scores in (at_once, in_parts):
        assert scores.result()["image_dice"] == pytest.approx((8 / 12 + 0 + 0 + 1) / 4)
    assert in_parts.result()["loss"] == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert at_once.result()["dice"] == pytest.approx(8 / 14)


def test_evaluate_gives_the_same_scores_for_any_batch_size():
    torch.manual_seed(0)
    model, images = UNet(n_filters=2), torch.randn(5, 3, 32, 32)
    masks = (torch.rand(5, 1, 32, 32) > 0.7).float()
    torch.nn.init.zeros_(model.outc.bias)
    bce = torch.nn.functional.binary_cross_entropy

    def scores(size):
        loader = zip(images.split(size), masks.split(size), strict=True)
        return evaluate(model, loader, bce, "cpu")

    one_by_one = scores(1)
    assert one_by_one == pytest.approx(scores(2), abs=1e-6)
    assert one_by_one == pytest.approx(scores(5), abs=1e-6)
    assert not model.training


# ---- the loop --------------------------------------------------------------------------------


class Scripted:
    """A criterion whose value in evaluation is read from a script."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, pred, target):
        return pred.mean() if torch.is_grad_enabled() else torch.tensor(self.values.pop(0))


def train_tiny(val_losses, out, **options):
    """The history of a training on one batch with these validation losses."""
    model = options.pop("model", None) or UNet(n_filters=2)
    batches = [(torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))]
    optimizer, epochs = torch.optim.SGD(model.parameters(), lr=0.1), len(val_losses)
    return train_model(
        model, batches, batches, Scripted(val_losses), optimizer, epochs, "cpu", out=out, **options
    )


LOGGED = (
    *("train/loss", "train/acc", "train/epoch", "train/dice", "train/lr"),
    *("val/loss", "val/acc", "val/dice", "val/iou", "perf/images_per_second"),
)


@pytest.mark.parametrize(
    "losses, patience, epochs, best",
    [
        ([5, 4, 3, 2, 1], 2, 5, 5),  # falling to the end
        ([5, 3, 4, 4, 4, 4], 3, 5, 2),  # stops three epochs after the second
        ([5, 3, 3, 3, 9], 2, 4, 2),  # equal is not lower
        ([5, 6, 4, 6, 6, 1], 2, 5, 3),  # a new best starts the count again
        ([5, math.nan, 4, 9, 9, 9], 2, 5, 3),  # NaN is never the best
    ],
)
def test_early_stopping(losses, patience, epochs, best, tmp_path):
    model, logged = UNet(n_filters=2), []

    def log(values, step):
        logged.append((step, values, model.outc.bias.item()))

    history = train_tiny(losses, tmp_path, model=model, patience=patience, log=log)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    assert [step for step, *_ in logged] == list(range(1, epochs + 1))
    val_losses = [row["val_loss"] for row in history]
    assert val_losses == pytest.approx(losses[:epochs], nan_ok=True)
    # The best weights are in the model, and in the file.
    bias_of_best = logged[best - 1][2]
    assert model.outc.bias.item() == bias_of_best
    assert load_model(tmp_path / "best_model.pth").outc.bias.item() == bias_of_best
    for _, values, _ in logged:
        assert values.keys() >= set(LOGGED)
    # What --resume reads from it: it stopped for want of patience, or there was enough.
    done, wait = waits({"progress": {"history": history}})
    assert done == epochs and (wait == patience if epochs < len(losses) else wait < patience)


@pytest.mark.parametrize("grace, epochs", [(0, 4), (1, 4), (2, 5), (3, 6), (4, 7), (9, 8)])
def test_patience_does_not_count_within_the_first_steps(grace, epochs, tmp_path):
    losses = [
        5,
        6,
        6,
        6,
        6,
        6,
        6,
        6,
    ]  # an epoch has one step, and patience would end with the fourth
    history = train_tiny(losses, tmp_path, patience=3, grace=grace)
    assert len(history) == epochs
    # A resumed run counts them alike.
    checkpoint = {"progress": {"history": history, "step": 0}, "guarded_step": {"steps": epochs}}
    done, wait = waits(checkpoint, grace)
    assert done == epochs and wait == max(min(3, epochs - max(grace, 1)), 0)


def test_a_short_run_is_not_all_beginning():
    assert fit_to_run(100, 0.995, 1880) == (100, 0.995)  # strong on the tutorial's data
    assert fit_to_run(100, 0.995, 50) == (10, 0.9)  # a fifth of the steps, 10
    assert fit_to_run(100, 0.995, 4) == (0, 0.0)


@pytest.mark.usefixtures("no_pictures", "here")
def test_a_run_of_few_steps_says_so_and_what_to_give(dataset, tmp_path):
    flags = ("--data", dataset, "--out", "run", "--overwrite", "--lr", 0)
    text = output_of("train.py", *SMALL, *flags, "--epochs", 1, cwd=tmp_path)
    assert "3 steps" in text and "too few" in text and "--recipe auto" in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "FEW_STEPS", 2)
        text = output_of("train.py", *SMALL, *flags, "--epochs", 2, "--batch-size", 6, cwd=tmp_path)
    assert "2 in all" in text and "holds all 6 images" in text
    text = output_of(
        "train.py", *SMALL, *flags, "--epochs", 2, "--repeat", 50, "--batch-size", 2, cwd=tmp_path
    )
    assert "300 in all" in text and "WARNING" not in text.split("epoch 1/")[0]


@pytest.mark.usefixtures("no_pictures", "here")
def test_masks_that_stayed_empty_are_told_after_the_test(dataset, tmp_path):
    flags = ("--data", dataset, "--out", "run", "--overwrite", "--epochs", 1, "--lr", 0)
    for prior, told in ((0.001, True), (0.9, False)):
        result = script_here("train.py", *SMALL, *flags, "--prior", prior, cwd=tmp_path)
        assert ("nothing was learned: --recipe auto" in result.stderr) == told


@pytest.mark.usefixtures("no_pictures", "here")
def test_a_plan_whose_masks_stayed_empty_advises_no_plan(dataset, tmp_path):
    flags = ("--recipe", "auto", "--repeat", 1, "--epochs", 1, "--lr", 0, "--prior", 0.001)
    result = script_here("train.py", *SMALL, *flags, "--out", "run", cwd=tmp_path)
    (line,) = (line for line in result.stderr.splitlines() if "nothing was learned" in line)
    assert "--recipe" not in line and "--minutes" in line


@pytest.mark.parametrize(
    "flags, fits",
    [
        (("--batch-size", 1), False),
        (("--batch-size", 5), False),  # the last of six images
        (("--batch-size", 1, "--crop", 32, "--image-size", 256), False),
        (("--batch-size", 2), True),
        (("--batch-size", 1, "--depth", 4), True),  # two pixels a side
        (("--batch-size", 1, "--norm", "group"), True),
    ],
)
@pytest.mark.usefixtures("no_pictures", "here")
def test_batch_normalisation_of_one_value_is_refused_before_it_trains(
    flags, fits, dataset, tmp_path
):
    own = ("--norm", "batch", "--epochs", 1, "--repeat", 1, *flags, "--out", "run")
    result = script_here("train.py", *SMALL, *own, cwd=tmp_path)
    if fits:
        assert_done(result)
    else:
        assert_refused(result, "--norm batch", "--batch-size")
        assert "epoch 1" not in result.stdout


def test_a_loss_that_is_never_a_number_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--lr"):
        train_tiny([math.nan] * 3, tmp_path)
    assert not (tmp_path / "best_model.pth").exists()


def test_an_epochs_line_tells_the_time(tmp_path, capsys):
    (row, _) = train_tiny([2, 1], tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and "0:00:00 left" in lines[-1]
    for line in lines:
        assert re.search(r"\| \d+:\d\d:\d\d elapsed, \d+:\d\d:\d\d left \|", line)
    print_epoch([{**row, "seconds": 9.0}], 10**14, False)  # a run without an end
    assert "left" in capsys.readouterr().out


def test_train_model_takes_a_dataloader(dataset, tmp_path):
    def loader(split, batch_size=2):
        folder = dataset / split
        images = COCOSegmentationDataset(load_coco(folder), folder, image_size=32)
        return DataLoader(images, batch_size=batch_size)

    model = UNet(n_filters=2)
    optimizer, loaders = torch.optim.Adam(model.parameters()), (loader("train"), loader("valid"))
    history = train_model(model, *loaders, combined_loss, optimizer, 2, "cpu", out=tmp_path)
    assert len(history) == 2
    picture = train.visualize_predictions(
        model, loader("test", 3), "cpu", num_samples=3, path=tmp_path / "picture.png"
    )
    assert Image.open(picture).size[0] > 800


def test_the_loss_falls_and_the_square_is_segmented(dataset, tmp_path):
    torch.manual_seed(0)
    model = UNet(n_filters=4)
    rows, optimizer = load_split(dataset, "train", 32), torch.optim.Adam(model.parameters(), 2e-3)
    loaders, options = (Batches(rows, Order(2, True)), Batches(rows, Order(2))), {"patience": 40}
    history = train_model(
        model, *loaders, combined_loss, optimizer, 40, "cpu", out=tmp_path, **options
    )
    assert max(row["val_dice"] for row in history) > 0.9


# ---- the command -----------------------------------------------------------------------------

TIMES = ("seconds", "images_per_second")  # these differ between any two runs


def without_times(row):
    return {key: value for key, value in row.items() if key not in TIMES}


def read_metrics(folder):
    with open(folder / "metrics.csv") as file:
        return [without_times(row) for row in csv.DictReader(file)]


def last_scores(said):
    """The scores that a training prints at its end."""
    return next(line for line in said.splitlines() if line.startswith("test with the best"))


def same_weights(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def main_small(*flags):
    """train.main with the flags of SMALL."""
    train.main(list(map(str, (*SMALL, *flags))))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(a folder with a data set, and in run/ an uninterrupted training of three epochs; stdout)."""
    place = tmp_path_factory.mktemp("straight")
    make_dataset(place / "dataset")
    return place, output_of("train.py", *SMALL, "--epochs", 3, "--out", "run", cwd=place)


def test_a_training_writes_its_files_and_scores(straight):
    place, said = straight
    run = place / "run"
    written = {"best_model.pth", "last.pth", "metrics.csv", "curves.png", "predictions.png"}
    assert {path.name for path in run.iterdir()} == written
    assert len(read_metrics(run)) == 3 and said.count("epoch ") == 3
    for name in ("curves.png", "predictions.png"):
        assert np.asarray(Image.open(run / name).convert("L")).std() > 10
    weights = torch.load(run / "best_model.pth", weights_only=True)
    assert set(weights) == set(UNet(n_filters=2).state_dict())
    assert load_model(run / "best_model.pth").info.image_size == 32
    # A square of 16 pixels in an image of 48; resizing to 32 about keeps its share.
    background = 1 - 16 * 16 / 48**2
    printed = float(re.search(r"background everywhere scores ([\d.]+)", said)[1])
    assert printed == pytest.approx(background, abs=0.02)


def test_the_test_uses_the_best_weights(straight):
    place, said = straight
    flags = ("--test-only", "--out", "run", "--device", "cpu", "--batch-size", 2)
    assert last_scores(said) in output_of("train.py", *flags, cwd=place)


@pytest.mark.usefixtures("no_pictures")
def test_resuming_is_exact(straight):
    place, _ = straight
    output_of("train.py", *SMALL, "--epochs", 1, "--out", "resumed", cwd=place)
    # In another process, and with the flags of the first one.
    second = script("train.py", "--resume", "--epochs", 3, "--out", "resumed", cwd=place)
    assert second.returncode == 0, second.stderr
    assert read_metrics(place / "resumed") == read_metrics(place / "run")
    resumed = place / "resumed" / "best_model.pth"
    assert same_weights(resumed, place / "run" / "best_model.pth")
    assert load_model(resumed).info.image_size == 32


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "signum, status, out, to_go_on",
    [
        (signal.SIGTERM, 143, "stopped143", "python train.py --resume --out stopped143"),
        (signal.SIGINT, 130, ".", "python train.py --resume"),
    ],
)
def test_stopping_saves_and_resuming_goes_on_from_that_step(
    straight, signum, status, out, to_go_on
):
    place, _ = straight
    flags = [*map(str, SMALL), "--epochs", "3000", "--patience", "3000", "--out", out]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": HOME},
    )
    try:
        assert "images at 32x32" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while not (place / out / "metrics.csv").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert error.strip() == f"stopped by {signum.name}; to go on: {to_go_on}"
    done = torch.load(place / out / "last.pth", weights_only=True)["progress"]["epoch"]
    _, name, *printed = shlex.split(to_go_on)
    output_of(name, *printed, "--epochs", done + 1, cwd=place)
    keep = min(len(read_metrics(place / "run")), done + 1)
    assert read_metrics(place / out)[:keep] == read_metrics(place / "run")[:keep]
    assert len(read_metrics(place / out)) == done + 1


def test_stopped_before_a_checkpoint_it_names_no_way_to_go_on(tmp_path, monkeypatch):
    def stop(*_):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(train, "train_and_test", stop)
    result = script_here("train.py", *SMALL, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (143, "stopped by SIGTERM\n")


def random_batches(count):
    generator = torch.Generator().manual_seed(count)
    batches = []
    for _ in range(count):
        images = torch.rand(2, 3, 32, 32, generator=generator)
        masks = torch.rand(2, 1, 32, 32, generator=generator) > 0.5
        batches.append((images, masks.float()))
    return batches


def train_with_stops(folder, stop_every, norm, more):
    """Train two epochs, stopped after every stop_every-th batch, and resumed each time.

    Returns (number of stops, history, weights).
    """
    torch.manual_seed(0)
    folder.mkdir()
    last, stops = folder / "last.pth", 0
    while True:
        # After a stop these are other weights in another random state, as in another process.
        model = UNet(n_filters=2, norm=norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        signals, batches_seen = Signals(), 0

        def criterion(pred, target, signals=signals):
            nonlocal batches_seen
            batches_seen += 1
            if batches_seen == stop_every:
                signals.received = signal.SIGTERM
            return combined_loss(pred, target)

        try:
            arguments = random_batches(3), random_batches(2), criterion, optimizer, 2, "cpu"
            resume = torch.load(last, weights_only=True) if last.exists() else None
            options = {"out": folder, "signals": signals, "resume": resume, **more}
            history = train_model(model, *arguments, **options)
            return stops, history, model.state_dict()
        except Stopped:
            stops += 1
            assert stops < 50


@pytest.mark.parametrize(
    "norm, more", [(None, {}), ("batch", {"ema": 0.9, "schedule": make_schedule("cosine", 2, 6)})]
)
def test_stopped_at_every_step_and_resumed_it_ends_with_the_same_bits(tmp_path, norm, more):
    _, expected, weights = train_with_stops(tmp_path / "straight", None, norm, more)
    # With 3 and 2 batches an epoch, these fall into training, into validation and between them.
    for every in (3, 4, 5):
        stops, history, resumed = train_with_stops(tmp_path / str(every), every, norm, more)
        assert stops >= 2
        assert list(map(without_times, history)) == list(map(without_times, expected))
        assert all(torch.equal(resumed[key], weights[key]) for key in weights)


# ---- going on with a run that has come to an end ---------------------------------------------

BUMPY = ("--norm", "batch", "--depth", 2, "--ema", 0.5, "--augment", "flip=0.5", "--min-steps", 0)
LOSSES = (0.9, 0.5, 0.6, 0.7, 0.8, 0.6, 0.4, 0.4, 0.4)  # on valid, after epochs 1, 2, ...


def give_losses(monkeypatch):
    """Validation has LOSSES, whatever the processor and the version of PyTorch make of it."""
    made, evaluate = [], train.evaluate

    def make_progress():
        made.append(Progress())
        return made[-1]

    def evaluate_as_given(*arguments, **options):
        scores = evaluate(*arguments, **options)
        on_valid = "poll" in options  # the test at the end has none
        return {**scores, "loss": LOSSES[made[-1].epoch]} if on_valid else scores

    monkeypatch.setattr(train.checkpoints, "Progress", make_progress)
    monkeypatch.setattr(train, "evaluate", evaluate_as_given)


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory):
    """A folder with a data set, `early`, stopped after 4 of 7 epochs, and `patient`, which was not.

    Both are tested: curves.png, the last file of a training, is there.
    """
    place = tmp_path_factory.mktemp("early")
    make_dataset(place / "dataset")
    with pytest.MonkeyPatch.context() as monkeypatch:
        skip_pictures(monkeypatch)
        give_losses(monkeypatch)
        for out, patience in (("early", 2), ("patient", 5)):
            flags = (*SMALL, *BUMPY, "--epochs", 7, "--patience", patience, "--out", out)
            output_of("train.py", *flags, cwd=place)
            (place / out / "curves.png").touch()
    progress = {
        out: load_weights(place / out / "last.pth")["progress"] for out in ("early", "patient")
    }
    assert (progress["early"]["epoch"], progress["early"]["best_epoch"]) == (4, 2)
    assert (progress["patient"]["epoch"], progress["patient"]["best_epoch"]) == (7, 7)
    return place


@pytest.fixture
def ended(stopped_early, tmp_path, monkeypatch):
    """A copy of it; files keep their times. Trainings have its losses too."""
    give_losses(monkeypatch)
    shutil.copytree(stopped_early, tmp_path, dirs_exist_ok=True)
    return tmp_path


def end_of(folder):
    """What has to be the same where one run ends as another: metrics.csv but for times, weights."""
    last = load_weights(folder / "last.pth")
    weights = [last["model"], last["running_mean"], load_weights(folder / "best_model.pth")]
    tensors = [(name, value.tolist()) for part in weights for name, value in part.items()]
    return read_metrics(folder), tensors, last["progress"]["best_epoch"]


@pytest.mark.usefixtures("no_pictures")
def test_gone_on_with_more_patience_it_ends_as_if_it_had_had_it_from_the_start(ended):
    best = (ended / "early" / "best_model.pth").read_bytes()
    # A little more of it is used up at once, and the best weights stay.
    go_on = ("--resume", "--out", "early", "--patience")
    result = output_of("train.py", *go_on, 3, cwd=ended)
    assert len(read_metrics(ended / "early")) == 5
    assert "epoch 2" in result and "--patience" in result  # says why, and what to give
    assert same_weights(ended / "early" / "best_model.pth", io.BytesIO(best))
    output_of("train.py", *go_on, 5, cwd=ended)
    assert end_of(ended / "early") == end_of(ended / "patient")
    # The new patience is recorded, as every flag is.
    assert load_weights(ended / "early" / "last.pth")["flags"]["patience"] == 5


def untouched(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize(
    "out, flags, words, other",
    [
        ("early", (), ["4 of 7 epochs", "--patience N, more than 2"], "--epochs N"),
        ("early", ("--epochs", 60), ["--patience N, more than 2"], "--epochs N"),
        ("early", ("--epochs", 60, "--patience", 1), ["--patience N, more than 2"], "--epochs N"),
        ("early", ("--epochs", 3), ["--epochs N, more than 4", "--patience N, more"], "none"),
        ("patient", (), ["7 of 7 epochs done", "--epochs N, more than 7"], "--patience N"),
        ("patient", ("--epochs", 5), ["7 of 7", "--epochs N, more than 7"], "--patience N"),
        ("patient", ("--patience", 30), ["--epochs N, more than 7"], "--patience N"),
        # With so little patience, the epochs that were done would not have been.
        ("patient", ("--epochs", 9, "--patience", 4), ["--patience N, more than 4"], "--epochs N"),
    ],
)
def test_a_run_that_has_ended_says_which_flag_goes_on(
    out, flags, words, other, stopped_early, refused
):
    before = untouched(stopped_early / out)
    flags = ("--resume", "--out", stopped_early / out, *flags)
    line = refused("train", *flags, words=[stopped_early / out / "last.pth", *words, "--test-only"])
    assert other not in line
    assert untouched(stopped_early / out) == before


@pytest.mark.usefixtures("no_pictures")
def test_less_patience_than_before_is_taken_where_it_changes_no_epoch_that_is_done(ended):
    flags = ("--epochs", 5, "--patience", 30, "--out", "less")
    assert script_here("train.py", *SMALL, *BUMPY, *flags, cwd=ended).returncode == 0
    flags = ("--resume", "--out", "less", "--epochs", 7, "--patience", 5)
    output_of("train.py", *flags, cwd=ended)
    assert end_of(ended / "less") == end_of(ended / "patient")


@pytest.mark.usefixtures("no_pictures")
def test_with_a_schedule_that_ends_with_the_epochs_more_of_them_are_not_offered(ended, refused):
    cosine = (*SMALL, *BUMPY, "--schedule", "cosine", "--epochs", 3, "--out", "cosine")
    assert script_here("train.py", *cosine, cwd=ended).returncode == 0
    (ended / "cosine" / "curves.png").touch()
    resume = ("--resume", "--out", ended / "cosine")
    words = ["3 of 3 epochs done", "cosine", "--init", "best_model.pth", "--test-only"]
    for more in ((), ("--epochs", 9), ("--epochs", 2), ("--patience", 30)):
        line = refused("train", *resume, *more, words=words)
        assert "--epochs N" not in line and "--patience" not in line
    # What it says instead works.
    weights = ("--init", ended / "cosine" / "best_model.pth", "--out", "next", "--epochs", 1)
    small = ("--batch-size", 2, "--swanlab", "disabled", "--device", "cpu")
    output_of("train.py", *weights, *small, cwd=ended)
    # Before its end, neither fewer nor more epochs are taken, and more patience is.
    state = load_weights(ended / "early" / "last.pth")
    state["flags"]["schedule"] = "cosine"
    torch.save(state, ended / "early" / "last.pth")
    resume = ("--resume", "--out", ended / "early")
    for epochs in (6, 8):
        refused("train", *resume, "--epochs", epochs, words=["cosine", "leave --epochs away"])
    result = script_here("train.py", *resume, "--patience", 5, cwd=ended)
    assert result.returncode == 0 and len(read_metrics(ended / "early")) == 7, result.stderr


def test_a_finished_run_is_tested_again_only_where_its_test_was_cut_short(
    straight, tmp_path, monkeypatch
):
    """A signal may come during the test; and torchrun restarts processes that have done it all."""
    place, said = straight
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    test = last_scores(said)
    resume = ("train.py", "--resume", "--out", "run")
    assert_refused(script_here(*resume, cwd=tmp_path), "3 of 3 epochs done", "--epochs N")
    with monkeypatch.context() as restarted:
        restarted.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        afresh = ("train.py", *SMALL, "--epochs", 3, "--out", "run")
        assert test in output_of(*afresh, cwd=tmp_path)
        assert test in output_of(*resume, cwd=tmp_path)
    os.utime(tmp_path / "run" / "curves.png", (0, 0))  # of an earlier end
    metrics = (tmp_path / "run" / "metrics.csv").read_bytes()
    assert test in output_of(*resume, cwd=tmp_path)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == metrics
    assert_refused(script_here(*resume, cwd=tmp_path), "3 of 3 epochs done", "--epochs N")


@pytest.mark.parametrize(
    "progress", [5, {}, {"history": {}}, {"history": [5]}, {"history": [{"val_loss": "low"}]}]
)
def test_a_last_without_a_history_is_refused(progress, straight, refused, tmp_path):
    state = torch.load(straight[0] / "run" / "last.pth", weights_only=True)
    torch.save({**state, "progress": progress}, tmp_path / "last.pth")
    refused("train", "--resume", "--epochs", 9, "--out", tmp_path, words=[tmp_path / "last.pth"])


# ---- what is refused -------------------------------------------------------------------------


def test_refusals(straight, refused):
    place, _ = straight
    refused("train", "--resume", "--out", place / "nothing", words=["last.pth", "no such file"])
    refused("train", "--resume", "--out", place / "run", "--lr", 1, words=["--lr"])
    refused("train", "--resume", "--test-only", "--out", place / "run", words=["--test-only"])
    refused("train", "--test-only", "--out", place / "nothing", words=["best_model.pth"])
    refused("train", "--batch-size", 0, words=["--batch-size", "at least 1"])
    refused("train", "--epochs", "many", words=["--epochs"])
    refused("train", "--lr", "nan", words=["--lr"])
    refused("train", "--frobnicate", words=["--frobnicate"])
    refused("train", "--device", "warp", words=["warp"])
    data = ("--data", place / "dataset")
    small = ("--image-size", 32, "--n-filters", 2, "--out", place / "other")
    swanlab = ("--project", "no spaces", "--swanlab", "offline")
    refused("train", *swanlab, *data, *small, words=["--project"])
    (place / "file").write_text("in the way")
    refused("train", "--out", place / "file", *data, words=["file", "--out"])
    refused("train", "--out", place / "file" / "below", *data, words=["--out"])
    assert (place / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "given, right",
    zip(
        ("--epoch=3", "--synth", "--test", "--batch_size=4"),
        ("--epochs", "--synthetic", "--test-only", "--batch-size"),
        strict=True,
    ),
)
def test_abbreviated_and_misspelled_flags_are_answered_with_the_right_one(given, right, refused):
    refused("train", given, words=[given, f"did you mean {right}?"])


@pytest.mark.parametrize(
    "harm, named",
    [
        (lambda root: root.rename(root.parent / "elsewhere"), ""),
        (lambda root: [root.rename(root.parent / "elsewhere"), root.mkdir()], ""),
        (lambda root: (root / "valid").rename(root / "elsewhere"), "valid"),
        (lambda root: (root / "valid" / "_annotations.coco.json").unlink(), "valid"),
    ],
)
def test_missing_data_is_answered_with_the_layout(harm, named, dataset, refused):
    harm(dataset)
    layout = ["train/, valid/ and test/", "_annotations.coco.json"]
    line = refused("train", *SMALL, "--data", dataset, words=[dataset / named, *layout])
    assert "--force" not in line


@pytest.mark.parametrize("name", ["best_model.pth", "last.pth", "last.previous.pth"])
def test_another_run_is_not_overwritten_unasked(name, straight, refused, tmp_path):
    old = tmp_path / name
    old.write_bytes(b"another run")
    data = ("--data", straight[0] / "dataset")
    words = [old, "--resume", "--overwrite", "--out"]
    refused("train", *SMALL, *data, "--out", tmp_path, words=words)
    # Nor is it lost where what was asked for fails.
    refused("train", *SMALL, "--data", "nowhere", "--overwrite", words=["nowhere"])
    assert old.read_bytes() == b"another run"


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_trains_afresh(straight, tmp_path):
    place, _ = straight
    for name in ("best_model.pth", "last.pth", "last.previous.pth"):
        (tmp_path / name).write_bytes(b"another run")
    data = ("--data", place / "dataset")
    output_of("train.py", *SMALL, *data, "--epochs", 3, "--overwrite", cwd=tmp_path)
    assert not (tmp_path / "last.previous.pth").exists()  # a run this short saves once
    assert same_weights(tmp_path / "best_model.pth", place / "run" / "best_model.pth")
    assert read_metrics(tmp_path) == read_metrics(place / "run")
    flags = torch.load(tmp_path / "last.pth", weights_only=True)["flags"]
    assert "overwrite" not in flags  # else resuming would begin afresh too


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\3\4 damaged"])
def test_a_damaged_last_is_refused_and_kept(content, refused, tmp_path):
    (tmp_path / "last.pth").write_bytes(content)
    refused("train", "--resume", "--out", tmp_path, words=["last.pth"])
    torch.save({"progress": 5}, tmp_path / "last.pth")
    before = (tmp_path / "last.pth").read_bytes()
    refused("train", "--resume", "--out", tmp_path, words=["not written by train.py"])
    assert (tmp_path / "last.pth").read_bytes() == before


# ---- flags of an earlier run -----------------------------------------------------------------


def test_restored_flags_are_defaults():
    parser = make_parser("")
    saved = {"epochs": 3, "lr": 0.5, "norm": "batch", "skip_bad": True, "experiment_name": None}
    parser.restore({**saved, "later": []})
    args = parser.parse_args(["--epochs", "5"])
    assert {**vars(args), **saved, "epochs": 5} == vars(args) and not hasattr(args, "later")
    parser.restore({"experiment_name": "mine"})
    assert parser.parse_args([]).experiment_name == "mine"


@pytest.mark.parametrize(
    "name, value",
    [
        *(("epochs", value) for value in ("3", 3.0, True, 0, None, [3])),
        *(("lr", value) for value in ("0.1", 1, -0.1, math.nan, math.inf)),
        *(("norm", value) for value in ("layer", None, ["none"])),
        *(("skip_bad", value) for value in (1, "yes", None)),
        *(("experiment_name", value) for value in (5, ["mine"])),
    ],
)
def test_flags_that_could_not_have_been_are_not_restored(name, value):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} cannot have been"):
        make_parser("").restore({name: value})


def test_a_last_with_impossible_flags_is_refused_by_name(straight, refused, tmp_path):
    state = torch.load(straight[0] / "run" / "last.pth", weights_only=True)
    state["flags"]["norm"] = "layer"
    torch.save(state, tmp_path / "last.pth")
    refused("train", "--resume", "--out", tmp_path, words=[tmp_path / "last.pth", "--norm"])


# ---- runs of other kinds ---------------------------------------------------------------------


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(precision, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ("--epochs", 2, "--lr", 1e-3, "--n-filters", 4)  # of 2 filters, both may be dead
    for name in ("fp32", precision):
        main_small(*flags, "--precision", name, "--out", name)
    rows = zip(read_metrics(tmp_path / "fp32"), read_metrics(tmp_path / precision), strict=True)
    for row, other in rows:
        assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), abs=0.01)
        assert other["val_loss"] != row["val_loss"]  # it is another precision
    weights = torch.load(tmp_path / precision / "best_model.pth", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in weights.values())


@pytest.fixture
def few_phantoms(monkeypatch):
    """--synthetic draws 6 + 2 + 2 phantoms of 64x64."""
    draw_few = partial(make_phantoms, counts=(6, 2, 2), size=64)
    monkeypatch.setattr(train.phantoms, "make_phantoms", draw_few)


@pytest.mark.usefixtures("no_pictures")
def test_a_later_test_is_on_the_data_of_the_training(few_phantoms, tmp_path):
    flags = ("--synthetic", "--data", "Y", "--out", "run", "--epochs", 1)
    result = output_of("train.py", *SMALL, *flags, cwd=tmp_path)
    scores = [line for line in result.splitlines() if line.startswith("test ")]
    again = output_of("train.py", "--test-only", "--out", "run", cwd=tmp_path)
    assert f"{Path('Y/synthetic')}: 2 test images at 32x32" in again
    assert [line for line in again.splitlines() if line.startswith("test ")] == scores


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "python predict.py"),
        (["--out", "runs/x"], "python predict.py --model runs/x/best_model.pth"),
        (["--data", "my data"], "python predict.py 'my data/test'"),
        (["--synthetic"], "python predict.py"),
        (
            ["--synthetic", "--data", "Y", "--out", "runs/x"],
            "python predict.py Y/synthetic/test --model runs/x/best_model.pth",
        ),
    ],
)
def test_the_next_command_works(flags, expected, few_phantoms, tmp_path):
    if "--synthetic" not in flags:
        make_dataset(tmp_path / (flags[1] if "--data" in flags else "dataset"))
    result = output_of("train.py", *SMALL, *flags, "--epochs", 1, cwd=tmp_path)
    command = result.splitlines()[-1].split("next: ")[1]
    assert command == expected
    _, name, *arguments = shlex.split(command)
    output_of(name, *arguments, cwd=tmp_path)
    assert list(tmp_path.rglob("*_mask.png"))


# ---- from the flags to what they are for -----------------------------------------------------


@pytest.fixture
def given(dataset, tmp_path, monkeypatch):
    """given(*flags): what `main` hands on: {"train": options of its Batches, ..., "model": ...}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "visualize_predictions", lambda *_, path, **__: path)
    seen = {}

    class Recorder(Batches):
        def __init__(self, rows, *arguments, **options):
            super().__init__(rows, *arguments, **options)
            seen[("train", "valid", "test")[len(seen)]] = {**options, "images": len(rows)}

    def record(model, train_loader, val_loader, criterion, optimizer, epochs, device, **options):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen["model"] = {**options, **optimizer.param_groups[0], "epochs": epochs, "state": weights}
        return []

    def run(*flags):
        seen.clear()
        main_small(*flags, "--overwrite")
        return dict(seen)

    monkeypatch.setattr(data, "Batches", Recorder)
    monkeypatch.setattr(train, "train_model", record)
    return run


def test_only_training_images_are_shuffled_changed_and_cropped(given):
    whole = given("--augment", "flip=0.5,rotate=5", "--seed", 7)
    assert [whole[split]["images"] for split in ("train", "valid", "test")] == [6, 4, 4]
    assert whole["train"]["shuffle"] and whole["train"]["seed"] == 7
    assert whole["train"]["strengths"] == {"flip": 0.5, "rotate": 5}
    crops = given("--crop", 16, "--image-size", 256, "--depth", 2)
    assert crops["train"]["crop"] == 16
    for seen in (whole, crops):
        for split in ("valid", "test"):
            assert not seen[split]["shuffle"] and not {"strengths", "crop"} & seen[split].keys()


def test_what_the_optimizer_and_the_loop_are_given(given):
    flags = ("--lr", 0.02, "--weight-decay", 0.3, "--ema", 0.7, "--patience", 3, "--epochs", 7)
    options = given(*flags, "--warmup", 4, "--schedule", "cosine", "--save-every", 9)["model"]
    assert (options["lr"], options["weight_decay"], options["ema"]) == (0.02, 0.3, 0.7)
    assert (options["patience"], options["epochs"], options["save_every"]) == (3, 7, 9)
    # Three steps an epoch: it rises over four of 21 and falls over seventeen.
    factors = [options["schedule"](step) for step in range(22)]
    falling = [(1 + math.cos(math.pi * step / 17)) / 2 for step in range(18)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, *falling])
    assert options["grace"] == 300 and given("--min-steps", 7)["model"]["grace"] == 7
    assert given("--min-steps", 7, "--warmup", 9)["model"]["grace"] == 9
    assert given("--seed", 1)["model"]["schedule"] is None


def test_the_seed_decides_the_weights(given):
    for seed in (0, 7):
        torch.manual_seed(seed)
        expected = UNet(n_filters=2).state_dict()
        state = given("--seed", seed)["model"]["state"]
        assert all(torch.equal(state[name], expected[name]) for name in expected)


# ---- what an epoch shows ---------------------------------------------------------------------


def test_an_epoch_is_told_its_number_and_goes_on_at_its_step(tmp_path):
    class Loader(list):
        def set_epoch(self, *numbers):
            told.append(numbers)

    told, model = [], torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    optimizer, device = torch.optim.SGD(model.parameters(), lr=0.1), torch.device("cpu")
    steps, scores = GuardedStep(model, optimizer, device), RunningScores(device)
    state = SimpleNamespace(guarded_step=steps, scores=scores, progress=Progress())
    state.running_mean = RunningMean(model, 0)
    state.progress.epoch, state.progress.step = 3, 2
    batches, arguments = random_batches(3), (combined_loss, state, device, "epoch 4")
    options = {"autocast": nullcontext(), "poll": lambda: None}
    # A loader that knows no epochs is gone through again, but for the batches done.
    train_one_epoch(model, batches, *arguments, **options)
    assert state.progress.step == 3 and scores.images() == 2
    train_one_epoch(model, Loader(batches), *arguments, **options)
    assert told == [(3, 3)] and state.progress.step == 6


def test_the_bar_counts_the_batches_done():
    bar = progress_bar(["c"], ["a", "b", "c"], 2, "epoch 4")
    assert (bar.n, bar.total, list(bar)) == (2, 3, ["c"])
    assert progress_bar(iter("c"), iter("abc"), 2, "epoch 4").total is None


def test_what_is_logged_of_an_epoch():
    row = {"epoch": 4, "train_loss": 0.1, "train_background_acc": 0.2, "val_dice/core": 0.3}
    row |= {"val_background_acc": 0.4, "lr": 0.5, "skipped": 6, "images_per_second": 7.0}
    assert log_values({**row, "seconds": 8.0}) == {
        **{"train/epoch": 4, "train/lr": 0.5, "perf/images_per_second": 7.0, "train/loss": 0.1},
        **{"val/dice/core": 0.3, "val/background_acc": 0.4},
    }


def test_the_running_loss_of_nothing_is_no_error():
    scores = RunningScores("cpu")
    assert scores.running_loss() == (0, 0)  # where the first step was skipped
    scores.add(torch.tensor(3.0), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    assert scores.running_loss() == (3, 2)


def test_predictions_are_drawn_over_their_own_image(monkeypatch):
    """A bright left half is predicted; the masks are rows, one more for each image."""
    drawn, captions = [], []

    def record(cases, path, **options):
        drawn.extend(cases)
        captions.append(options["captions"])

    monkeypatch.setattr(train.plots, "plot_predictions", record)
    images, masks = torch.full((4, 3, 8, 8), -1.0), torch.zeros(4, 1, 8, 8)
    for index in range(4):
        images[index, :, :, :4], masks[index, :, : index + 1] = 0.5 * index, 1
    images[0, :, :, :4] = 0.1
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid()).requires_grad_(False)
    model[0].weight.fill_(1)  # the probability is over 0.5 where the sum of the channels is over 0
    model[0].bias.zero_()
    train.visualize_predictions(model, [(images, masks)], "cpu", num_samples=2, names="abcd")
    pictures, targets, preds, titles = zip(*drawn, strict=True)
    assert captions == [["a", "d"]]
    for panel, index in enumerate((0, 3)):  # spread over the four
        grey = images[index, :, 0, 0].numpy() * STD + MEAN
        np.testing.assert_allclose(pictures[panel][0, 0], grey.clip(0, 1), atol=1e-6)
        np.testing.assert_array_equal(targets[panel], masks[index] > 0)
        assert preds[panel][0, :, :4].all() and not preds[panel][0, :, 4:].any()
        rows = index + 1
        assert titles[panel] == f"Dice {2 * 4 * rows / (32 + 8 * rows):.2f}"


# ---- beyond the tutorial ---------------------------------------------------------------------


def test_a_constant_schedule_by_hand():
    factor = make_schedule("constant", 2, 12)
    assert [factor(step) for step in (0, 1, 2, 11)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert make_schedule("constant", 0, 12) is None  # the factor is always 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_is_taken_with_the_learning_rate_of_its_own_number(optimizer, tmp_path):
    """Against PyTorch's schedulers; what the history tells is that of the epoch's last step."""
    schedule, own = make_schedule("cosine", 2, 6), []

    class Watched(optimizer):
        def step(self, *arguments, **options):
            own.append(self.param_groups[0]["lr"])
            return super().step(*arguments, **options)

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    batches = [(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)) for _ in range(3)]
    arguments = combined_loss, Watched(model.parameters(), lr=0.1), 2, "cpu"
    history = train_model(model, batches, batches, *arguments, out=tmp_path, schedule=schedule)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    rise = torch.optim.lr_scheduler.LambdaLR(reference, lambda step: (step + 1) / 3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 4)
    both = torch.optim.lr_scheduler.SequentialLR(reference, [rise, fall], [2])
    expected = []
    for _ in range(6):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        both.step()
    assert own == pytest.approx(expected) and own[2] == pytest.approx(0.1)
    assert [row["lr"] for row in history] == [own[2], own[5]]


def test_the_running_mean_of_the_weights_by_hand(tmp_path):
    """After step t of plain gradient descent the mean keeps min(ema, (1 + t) / (10 + t))."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    mean = model[0].bias.item()
    batches = [(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)) for _ in range(2)]
    copy = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    copy.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(copy.parameters(), lr=0.5)
    for step, (images, masks) in enumerate(batches):
        plain.zero_grad()
        combined_loss(copy(images), masks).backward()
        plain.step()
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * copy[0].bias.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train_model(model, batches, batches, combined_loss, optimizer, 1, "cpu", out=tmp_path, ema=0.15)
    best = torch.load(tmp_path / "best_model.pth", weights_only=True)
    assert best["0.bias"].item() == pytest.approx(mean, abs=1e-6)
    # What was evaluated is what is left in the model.
    assert model[0].bias.item() == pytest.approx(mean, abs=1e-6)


def test_the_scale_of_half_precision_is_gone_on_with():
    def make():
        model = torch.nn.Conv2d(3, 1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        return GuardedStep(model, optimizer, torch.device("cpu"), scaler=scaler), model

    first, model = make()
    for _ in range(2):  # each doubles the scale
        first.begin()
        first.finish(model(torch.ones(1, 3, 2, 2)).mean())
    second, _ = make()
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 32 and second.steps == 2


@pytest.mark.parametrize("took, pause", [(1, 60), (10, 200)])
def test_on_a_slow_disk_checkpoints_are_rarer(took, pause, tmp_path, monkeypatch):
    """Writing takes less than a twentieth of the time, as train.py promises."""
    now = [1000.0]
    monkeypatch.setattr("medseg.training.checkpoint.time.monotonic", lambda: now[0])

    def write(*_, **__):
        now[0] += took

    monkeypatch.setattr("medseg.training.checkpoint.save_weights", write)
    checkpointer = Checkpointer(tmp_path, {"progress": Progress()}, flags={}, save_every=60)
    checkpointer.save()
    for seconds, due in ((pause - 1, False), (pause, True)):
        now[0] = 1000.0 + took + seconds
        assert checkpointer.due() == due


@pytest.mark.usefixtures("no_pictures")
def test_a_recipe_is_a_set_of_flags_that_the_command_line_overrules(dataset, tmp_path):
    own = ("--epochs", 1, "--lr", "0.01", "--schedule", "cosine")
    said = output_of("train.py", *SMALL, "--recipe", "strong", *own, cwd=tmp_path)
    # The recipe is printed as it was used.
    assert "recipe strong: --norm batch" in said and " --lr 0.01 " in said
    expected = {"recipe": "strong", "norm": "batch", "lr": 0.01, "ema": 0.995, "schedule": "cosine"}
    flags = torch.load(tmp_path / "last.pth", weights_only=True)["flags"]
    assert expected.items() <= flags.items() and flags["augment"].startswith("rotate=5,")
    assert load_model(tmp_path / "best_model.pth").down1.norm1.running_mean.shape == (2,)


def test_a_skipped_step_leaves_batch_normalisation_alone(tmp_path):
    """A step that is not finite must leave no trace in the running mean and variance."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Sigmoid()
    model = torch.nn.Sequential(*layers)
    good = (torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
    bad = (torch.full((2, 3, 4, 4), math.nan), torch.ones(2, 1, 4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = train_model(
        model, [good, bad, good], [good], combined_loss, optimizer, 1, "cpu", out=tmp_path
    )
    assert history[0]["skipped"] == 1 and math.isfinite(history[0]["val_loss"])
    assert torch.isfinite(model[1].running_mean).all()
    assert torch.isfinite(model[1].running_var).all()


def test_test_only_needs_no_last_and_says_when_it_is_damaged(straight, tmp_path, capsys):
    place, said = straight
    shutil.copy(place / "run" / "best_model.pth", tmp_path)
    (tmp_path / "last.pth").write_bytes(b"damaged")
    data = ["--data", str(place / "dataset"), "--device", "cpu", "--batch-size", "2"]
    train.main(["--test-only", "--out", str(tmp_path), *data])
    again = capsys.readouterr()
    assert "WARNING" in again.err and "last.pth" in again.err
    assert last_scores(said) in again.out


def test_what_last_does_not_keep_is_not_restored(straight, tmp_path, monkeypatch):
    """Where to write is the command line's to say, whatever a file holds."""
    place, _ = straight
    monkeypatch.chdir(tmp_path)
    state = torch.load(place / "run" / "last.pth", weights_only=True)
    state["flags"] |= {"out": "elsewhere", "test_only": True, "data": str(place / "dataset")}
    (tmp_path / "run").mkdir()
    torch.save(state, "run/last.pth")
    train.main(["--resume", "--out", "run", "--epochs", "4"])
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("wrong", [{"step": -1}, {"best_epoch": 2**62}, {"epoch": 3}])
def test_a_checkpoint_whose_counts_cannot_be_true_is_refused(wrong):
    with pytest.raises(ValueError):
        Progress().load_state_dict({**Progress().state_dict(), **wrong})


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_batch_of_one_pixel_has_no_deviation(dataset, tmp_path, refused, batch_size):
    """Six images of 32 x 32 and five levels: the last batch has one image, its lowest level one."""
    flags = ("--data", dataset, "--out", tmp_path / "o", *SMALL, "--norm", "batch")
    words = ["--norm batch", "--batch-size", "--norm group"]
    refused("train", *flags, "--batch-size", batch_size, words=words)
