"""Losses, metrics, early stopping, checkpoints, schedules and the training command."""

import contextlib
import math
import re
import shlex
import signal
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ROOT,
    SMALL,
    assert_refused,
    make_dataset,
    outcome,
    output_of,
    read_metrics,
    script_here,
    set_classes,
    skip_pictures,
    start_python,
    wait_until,
    without_times,
)
from PIL import Image
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchvision.ops import sigmoid_focal_loss

import data
import train
from data import Batches, COCOSegmentationDataset, Order, Transform, load_split
from medseg.coco import load_coco
from medseg.files import file_lock
from medseg.images import MEAN, STD
from medseg.metrics import RunningScores, metrics
from medseg.phantoms import make_phantoms
from medseg.signals import Stopped
from medseg.training.checkpoint import Progress
from medseg.training.optim import AdamW, GuardedStep, TrainingOptions, make_schedule
from medseg.weights import load_weights
from net import UNet, load_model
from train import combined_loss, dice_loss, focal_loss, train_model

# ---- losses and metrics ----------------------------------------------------------------------


def test_the_tutorials_loss_by_hand():
    pred = torch.tensor([[0.9, 0.2], [0.6, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # intersection 0.9 + 0.6 = 1.5; sums 1.8 and 2
    assert dice_loss(pred, target).item() == pytest.approx(1 - 3.0 / 3.8, abs=1e-6)
    bce = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.9)) / 4
    expected = 0.6 * (1 - 3.0 / 3.8) + 0.4 * bce
    assert combined_loss(pred, target).item() == pytest.approx(expected, abs=1e-6)
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert dice_loss(zeros, zeros).item() == pytest.approx(0, abs=1e-6)  # smooth / smooth
    assert math.isfinite(combined_loss(zeros, ones).item())  # torch bounds the logarithm at -100


def test_focal_loss_is_torchvisions():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    target = (torch.rand(2, 3, 16, 16) > 0.8).float()
    expected = sigmoid_focal_loss(logits, target, reduction="mean")
    loss = focal_loss(logits.sigmoid(), target).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_weights_of_the_losses():
    torch.manual_seed(1)
    pred, target = torch.rand(3, 1, 5, 7), (torch.rand(3, 1, 5, 7) > 0.7).float()
    values = {"dice": dice_loss(pred, target), "focal": focal_loss(pred, target).mean()}
    values["bce"] = F.binary_cross_entropy(pred, target)
    for weights in ({"dice": 1, "bce": 0.5}, {"dice": 0.5, "bce": 0, "focal": 2}):
        total = sum(weight * values[name].item() for name, weight in weights.items())
        assert combined_loss(pred, target, weights).item() == pytest.approx(total, abs=1e-6)
    pred[0, 0, 0, 0] = math.nan  # which has to be seen
    for name in values:
        assert math.isnan(combined_loss(pred, target, {name: 1}).item())


@pytest.mark.parametrize(
    "counts, expected",
    [
        ((6, 2, 4, 88), (0.94, 12 / 18, 6 / 12, 6 / 8, 6 / 10, (6 / 12 + 88 / 94) / 2, 0.9)),
        ((0, 0, 0, 9), (1, 1, 1, 1, 1, 1, 1)),  # target and prediction empty
        ((0, 3, 0, 6), (6 / 9, 0, 0, 0, 0, 6 / 9 / 2, 1)),  # only the target empty
        ((0, 0, 3, 6), (6 / 9, 0, 0, 0, 0, 6 / 9 / 2, 6 / 9)),  # only the prediction empty
    ],
)
def test_metrics_by_hand(counts, expected):
    scores, of_arrays = metrics(*counts), metrics(*np.array([counts]).T)
    names = ("acc", "dice", "iou", "precision", "recall", "miou", "background_acc")
    assert scores == pytest.approx(dict(zip(names, expected, strict=True)))
    assert {key: value[0] for key, value in of_arrays.items()} == scores


def test_scores_are_sums_over_images():
    pred, target = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 4)
    pred[0, 0, :2], target[0, 0, :1] = 0.9, 1  # 8 predicted, 4 true, 4 in both: Dice 8/12
    target[1, 0, 0, 0] = 1  # missed: Dice 0
    pred[2, 0, 0, 0] = 0.51  # false alarm: Dice 0
    pred[3] = 0.5  # at the threshold is background; both empty: Dice 1
    at_once, in_parts = RunningScores("cpu"), RunningScores("cpu")
    assert in_parts.running_loss() == (0, 0)  # where the first step was skipped
    at_once.add(torch.tensor(2.0), pred, target)
    in_parts.add(torch.tensor(1.0), pred[:1], target[:1])  # unequal batches, losses 1 and 3
    in_parts.add(torch.tensor(3.0), pred[1:], target[1:])
    for scores in (at_once, in_parts):
        assert scores.counts.tolist() == [[4, 5, 1, 54]]
        result = scores.result()
        assert (result["image_dice"], result["dice"]) == pytest.approx((5 / 12, 8 / 14))
    assert in_parts.result()["loss"] == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert in_parts.running_loss() == pytest.approx((2.5, 4))


LOGGED = "train/loss train/acc train/epoch train/dice train/lr val/loss val/acc val/dice val/iou"
RISES = [5, 6, 6, 6, 6, 6, 6, 6]  # an epoch has one step


@pytest.mark.parametrize(
    "losses, patience, grace, epochs, best",
    [
        ([5, 3, 3, 3, 9], 2, 0, 4, 2),  # equal is not lower
        ([5, 6, 4, 6, 6, 1], 2, 0, 5, 3),  # a new best starts the count again
        ([5, math.nan, 4, 9, 9, 9], 2, 0, 5, 3),  # NaN is never the best
        (RISES, 3, 2, 5, 1),  # patience does not count within the first steps
        (RISES, 3, 9, 8, 1),
    ],
)
def test_early_stopping(losses, patience, grace, epochs, best, tmp_path):
    model, logged, given = UNet(n_filters=2), [], iter(losses)

    def criterion(pred, target):
        return pred.mean() if torch.is_grad_enabled() else torch.tensor(next(given))

    def log(values, step):
        logged.append((step, values.keys(), model.outc.bias.item()))

    batches = [(torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))]
    optimizer = SGD(model.parameters(), lr=0.1)
    options = TrainingOptions(patience=patience, grace=grace)
    arguments = batches, batches, criterion, optimizer, len(losses), "cpu"
    history = train_model(model, *arguments, options=options, out=tmp_path, log=log)
    steps, keys, biases = zip(*logged, strict=True)
    assert [row["epoch"] for row in history] == list(steps) == list(range(1, epochs + 1))
    val_losses = [row["val_loss"] for row in history]
    assert val_losses == pytest.approx(losses[:epochs], nan_ok=True)
    # The best weights are in the model, and in the file.
    assert model.outc.bias.item() == biases[best - 1]
    assert load_model(tmp_path / "best_model.pth").outc.bias.item() == biases[best - 1]
    assert keys[0] >= {*LOGGED.split(), "perf/images_per_second"}
    waited = load_weights(tmp_path / "last.pth")["progress"]["waited"]
    assert waited == max(epochs - max(best, grace), 0)
    # What has no value, the Dice of masks without foreground, is empty in the table.
    assert {row["val_dice"] for row in read_metrics(tmp_path)} == {""}


def test_the_tutorials_loop_with_a_dataloader_learns(dataset, tmp_path):
    loaders = []
    for folder in (dataset / split for split in ("train", "valid", "test")):
        images = COCOSegmentationDataset(load_coco(folder), folder, image_size=32)
        loaders.append(DataLoader(images, batch_size=2))
    torch.manual_seed(0)
    model = UNet(n_filters=4, depth=3)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    history = train_model(model, *loaders[:2], combined_loss, optimizer, 12, "cpu", out=tmp_path)
    assert max(row["val_dice"] for row in history) > 0.9
    path = tmp_path / "picture.png"
    train.visualize_predictions(model, loaders[2], "cpu", num_samples=3, path=path)
    assert Image.open(path).size[0] > 800


def random_batches(count, side=32):
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, 2, 3, side, side, generator=generator)
    masks = torch.rand(count, 2, 1, side, side, generator=generator) > 0.5
    return list(zip(images, masks.float(), strict=True))


def pixel_model():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())


def test_the_learning_rate_and_the_running_mean_of_the_weights_by_hand(tmp_path):
    """An epoch is a step; after step t the mean keeps min(ema, t / (9 + t)) of itself."""
    model, by_hand, batches = pixel_model(), pixel_model(), random_batches(1, 4)
    by_hand.load_state_dict(model.state_dict())
    mean, ((images, masks),) = model[0].bias.item(), batches
    half = math.sqrt(0.5) / 2  # cos(pi / 4) / 2
    rates = [0.5 * factor for factor in (1 / 3, 2 / 3, 1, 0.5 + half, 0.5, 0.5 - half)]
    for step, rate in enumerate(rates, 1):
        by_hand.zero_grad()
        combined_loss(by_hand(images), masks).backward()
        with torch.no_grad():
            for weight in by_hand.parameters():
                weight -= rate * weight.grad
        decay = min(0.3, step / (9 + step))
        mean = decay * mean + (1 - decay) * by_hand[0].bias.item()
    optimizer = SGD(model.parameters(), lr=0.5)
    options = TrainingOptions(ema=0.3, schedule=make_schedule(optimizer, "cosine", 2, 6))
    arguments = batches, batches, combined_loss, optimizer, 6, "cpu"
    history = train_model(model, *arguments, out=tmp_path, options=options)
    assert [row["lr"] for row in history] == pytest.approx(rates)
    # What was evaluated is what is left in the model, and in the file.
    best = load_weights(tmp_path / "best_model.pth")["0.bias"].item()
    assert best == model[0].bias.item() == pytest.approx(mean, abs=1e-6)


def test_the_scale_of_half_precision_is_gone_on_with():
    model, steps = pixel_model(), []
    for _ in range(2):
        options = TrainingOptions(scaler=torch.amp.GradScaler("cpu", 8.0, growth_interval=1))
        optimizer = SGD(model.parameters(), lr=0.1)
        steps.append(GuardedStep(model, optimizer, torch.device("cpu"), options))
    for _ in range(2):  # each doubles the scale
        steps[0].begin()
        steps[0].finish(model(torch.ones(1, 3, 2, 2)).mean())
    steps[1].load_state_dict(steps[0].state_dict())
    assert steps[1].scaler.get_scale() == 32 and steps[1].steps == 2


def spoil(batch, where, value):
    """A batch whose first pixel of the images (where=0) or masks (1) is not finite."""
    parts = [part.clone() for part in batch]
    parts[where][0, 0, 0, 0] = value
    return parts


def train_with_bad_steps(batches, out, epochs=2, valid=None, optimizer=AdamW, **options):
    """The history of a network without dropout, which a skipped step would draw numbers for."""

    def criterion(pred, target):
        """Not a number where the target is none, though its gradient is."""
        return combined_loss(pred, target.nan_to_num(0)) + 0 * target.sum()

    torch.manual_seed(0)
    model = UNet(n_filters=2, depth=1, norm="batch", dropout="none")
    valid = valid or random_batches(1, 8)
    made = optimizer(model.parameters(), lr=0.1, **options)
    return train_model(model, batches, valid, criterion, made, epochs, "cpu", out=out)


@pytest.mark.parametrize("optimizer", [{"fused": True}, {"optimizer": SGD, "momentum": 0.9}])
@pytest.mark.parametrize("where, value", [(0, math.nan), (0, math.inf), (1, math.nan)])
def test_a_step_that_is_not_finite_changes_nothing(where, value, optimizer, tmp_path):
    """Three good steps with a bad one between them end with the bits of three good ones."""
    ends, (first, *others) = [], random_batches(3, 8)
    for batches in ([first, *others], [first, spoil(first, where, value), *others]):
        history = train_with_bad_steps(batches, tmp_path, **optimizer)
        assert [row["skipped"] for row in history] == [len(batches) - 3] * 2
        weights = load_weights(tmp_path / "last.pth")["model"]
        weights = {name: own.tolist() for name, own in weights.items() if "num_batc" not in name}
        scores = [(row["train_loss"], row["train_dice"], row["val_loss"]) for row in history]
        ends.append([scores, weights])
    assert ends[0] == ends[1]


def test_it_stops_after_too_many_in_a_row_and_names_the_step(tmp_path):
    (good,) = random_batches(1, 8)
    bad = spoil(good, 0, math.nan)
    train_with_bad_steps([good] * 3, tmp_path, epochs=1)
    before = load_weights(tmp_path / "last.pth")["model"]
    best = (tmp_path / "best_model.pth").read_bytes()
    with pytest.raises(ValueError, match=r"epoch 1, step 23: .* 20 steps in a row.*--lr"):
        train_with_bad_steps([good] * 3 + [bad] * 30, tmp_path)
    after = load_weights(tmp_path / "last.pth")["model"]
    assert all(torch.equal(after[name], before[name]) for name in after if "num_" not in name)
    assert (tmp_path / "best_model.pth").read_bytes() == best
    # What cannot be written then is not passed over.
    full = patch("medseg.training.checkpoint.save_weights", side_effect=OSError(28, "No space"))
    with full, pytest.raises(ValueError, match="No space"):
        train_with_bad_steps([good] * 3 + [bad] * 30, tmp_path)
    (row,) = train_with_bad_steps(([bad] * 15 + [good]) * 3, tmp_path, epochs=1)
    assert row["skipped"] == 45  # not in a row
    with pytest.raises(ValueError, match="--lr"):  # no loss on valid was a number
        train_with_bad_steps([good], tmp_path / "never", valid=[bad])
    assert not (tmp_path / "never" / "best_model.pth").exists()


# ---- the command -----------------------------------------------------------------------------


def run_small(place, *flags):
    """What train.py prints with the flags of SMALL, in this folder."""
    return output_of("train.py", *SMALL, *flags, cwd=place)


def test_a_run_is_written_tested_again_and_replaced(dataset, tmp_path, monkeypatch, refused):
    run, flags = tmp_path / "run", ("--epochs", 3, "--out", "run")
    said = run_small(tmp_path, *flags)
    written = {"best_model.pth", "last.pth", "metrics.csv", "curves.png", "predictions.png"}
    assert {path.name for path in run.iterdir()} == written
    assert len(read_metrics(run)) == 3 and said.count("epoch ") == 3
    for name in ("curves.png", "predictions.png"):
        assert np.asarray(Image.open(run / name).convert("L")).std() > 10
    assert set(load_weights(run / "best_model.pth")) == set(UNet(n_filters=2).state_dict())
    assert load_model(run / "best_model.pth").info.image_size == 32
    # A square of 16 pixels in an image of 48; resizing to 32 about keeps its share.
    printed = float(re.search(r"background everywhere scores ([\d.]+)", said)[1])
    assert printed == pytest.approx(1 - 16 * 16 / 48**2, abs=0.02)
    # 9 steps are few, which is said, with what to give.
    assert "9 in all" in said and "WARNING: 9 steps" in said and "--recipe auto" in said
    # A signal may come during the test; and torchrun restarts processes that have done it all.
    skip_pictures(monkeypatch)
    scores = next(line for line in said.splitlines() if line.startswith("test with the best"))
    before = outcome(run)
    again = output_of("train.py", "--resume", "--out", "run", cwd=tmp_path)
    assert scores in again and "after 3 epochs" in again
    with monkeypatch.context() as restarted:
        restarted.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert scores in run_small(tmp_path, *flags)
    assert outcome(run) == before
    # --test-only: where last.pth is damaged, too, and while another training writes there.
    (run / "last.pth").write_bytes(b"damaged")
    test = ("--test-only", "--device", "cpu", "--batch-size", 2, "--out", "run")
    with file_lock(run / ".lock", busy=""):
        tested = script_here("train.py", *test, cwd=tmp_path)
    assert scores in tested.stdout
    assert "WARNING" in tested.stderr and "last.pth" in tested.stderr
    # It is replaced where that is asked for, but not where what was asked for fails.
    best = (run / "best_model.pth").read_bytes()
    again = ("train", *SMALL, "--out", "run")
    refused(*again, words=["best_model.pth", "--resume", "--overwrite", "--out"])
    refused(*again, "--data", "nowhere", "--overwrite", words=["nowhere"])
    assert (run / "best_model.pth").read_bytes() == best
    run_small(tmp_path, *flags, "--overwrite")
    assert outcome(run) == before  # the same seed, the same digits


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_stopping_saves_and_resuming_ends_as_if_it_had_not_stopped(dataset, tmp_path):
    flags = (*SMALL, "--epochs", 3000, "--patience", 3000, "--out", "stopped")
    process = start_python(ROOT / "train.py", *flags, cwd=tmp_path)
    try:
        assert "images at 32x32" in process.stdout.readline()
        wait_until((tmp_path / "stopped" / "metrics.csv").exists)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    to_go_on = "python train.py --resume --out stopped"
    assert (process.returncode, error) == (143, f"stopped by SIGTERM; to go on: {to_go_on}\n")
    epochs = load_weights(tmp_path / "stopped" / "last.pth")["progress"]["epoch"] + 2
    output_of(*shlex.split(to_go_on)[1:], "--epochs", epochs, cwd=tmp_path)
    run_small(tmp_path, "--epochs", epochs, "--patience", 3000, "--out", "straight")
    assert len(read_metrics(tmp_path / "straight")) == epochs
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "straight")


def test_stopped_before_a_checkpoint_it_names_no_way_to_go_on(tmp_path, monkeypatch):
    def stop(*_):
        with pytest.raises(ValueError, match="busy"), file_lock(tmp_path / ".lock", busy="busy"):
            pass  # no other training writes to the folder meanwhile
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(train, "train_and_test", stop)
    result = script_here("train.py", *SMALL, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (143, "stopped by SIGTERM\n")


def train_with_stops(folder, stop_every, loaders, norm):
    """Train two epochs, stopped after every stop_every-th batch, and resumed each time.

    Returns (number of stops, history, weights).
    """
    torch.manual_seed(0)
    folder.mkdir()
    for stops in range(50):
        # After a stop these are other weights in another random state, as in another process.
        model = UNet(n_filters=2, norm=norm)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        options, batches_seen = TrainingOptions(), 0
        if norm:
            options.ema, options.schedule = 0.9, make_schedule(optimizer, "cosine", 2, 6)

        def criterion(pred, target, signals=options.signals):
            nonlocal batches_seen
            batches_seen += 1
            if batches_seen == stop_every:
                signals.received = signal.SIGTERM
            return combined_loss(pred, target)

        checkpoint = load_weights(folder / "last.pth") if stops else None
        own = {"out": folder, "options": options, "checkpoint": checkpoint}
        with contextlib.suppress(Stopped):
            history = train_model(model, *loaders(), criterion, optimizer, 2, "cpu", **own)
            return stops, list(map(without_times, history)), model.state_dict()


@pytest.mark.parametrize("norm", [None, "batch"])
def test_stopped_at_every_step_and_resumed_it_ends_with_the_same_bits(norm, dataset, tmp_path):
    train_rows, valid_rows = (load_split(dataset, name, 32) for name in ("train", "valid"))

    def loaders():
        if norm is None:  # loaders that know no epochs are gone through again
            return random_batches(3), random_batches(2)
        order = Order(2, shuffle=True, seed=3)
        changed = Transform(strengths={"flip": 0.5, "brightness": 0.5})
        return Batches(train_rows, order, transform=changed), Batches(valid_rows, Order(2))

    _, expected, weights = train_with_stops(tmp_path / "straight", None, loaders, norm)
    # With 3 and 2 batches an epoch, these fall into training, into validation and between them.
    for every in (3, 4):
        stops, history, resumed = train_with_stops(tmp_path / str(every), every, loaders, norm)
        assert stops >= 2 and history == expected
        assert all(torch.equal(resumed[key], weights[key]) for key in weights)


@pytest.mark.usefixtures("no_pictures")
def test_more_patience_ends_as_if_it_had_been_there_from_the_start(dataset, tmp_path, monkeypatch):
    end_epoch, losses = Progress.end_epoch, (0.9, 0.5, 0.6, 0.7, 0.8, 0.6, 0.4)  # on valid

    def end_epoch_as_given(progress, loss, model, *, free):
        return end_epoch(progress, losses[progress.epoch], model, free=free)

    monkeypatch.setattr(Progress, "end_epoch", end_epoch_as_given)
    flags = "--norm batch --depth 2 --ema 0.5 --min-steps 0 --epochs 7 --schedule cosine".split()
    run_small(tmp_path, *flags, "--patience", 5, "--out", "patient")
    run_small(tmp_path, *flags, "--patience", 2, "--out", "early")
    go_on = ("train.py", "--resume", "--out", "early", "--patience")
    said = output_of(*go_on, 3, cwd=tmp_path)  # is used up at once
    assert len(read_metrics(tmp_path / "early")) == 5
    assert "epoch 2" in said and "--patience" in said  # says why, and what to give
    output_of(*go_on, 5, cwd=tmp_path)
    assert outcome(tmp_path / "early") == outcome(tmp_path / "patient")
    # The new patience is recorded, as every flag is. With the epochs the schedule ends.
    assert load_weights(tmp_path / "early" / "last.pth")["flags"]["patience"] == 5
    longer = script_here(*go_on, 5, "--epochs", 9, cwd=tmp_path)
    assert_refused(longer, "early/last.pth", "--epochs 7, not 9")


def test_folders_and_weights_that_do_not_do(dataset, tmp_path, refused):
    refused("train", "--resume", "--out", "nothing", words=["nothing/last.pth", "no such file"])
    refused("train", "--test-only", "--out", "nothing", words=["nothing/best_model.pth"])
    (tmp_path / "file").write_text("in the way")
    for out in ("file", "file/below"):
        refused("train", "--out", out, words=["file", "--out"])
    assert (tmp_path / "file").read_text() == "in the way"
    torch.save(UNet(n_filters=2, up="nearest").state_dict(), tmp_path / "odd.pth")
    for name in ("missing.pth", "odd.pth"):
        refused("train", "--init", name, words=[name])


@pytest.mark.usefixtures("no_pictures")
def test_half_precision_learns_nearly_the_same(dataset, tmp_path):
    flags = ("--epochs", 2, "--lr", 1e-3, "--n-filters", 4)  # of 2 filters, both may be dead
    losses = {}
    for name in ("fp32", "bf16", "fp16"):
        run_small(tmp_path, *flags, "--precision", name, "--out", name)
        losses[name] = [float(row["val_loss"]) for row in read_metrics(tmp_path / name)]
        weights = load_weights(tmp_path / name / "best_model.pth")
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert losses[name] == pytest.approx(losses["fp32"], abs=0.01)
    assert len({own[-1] for own in losses.values()}) == 3  # these are other precisions


@pytest.mark.usefixtures("no_pictures")
def test_the_next_command_works(monkeypatch, tmp_path):
    draw_few = partial(make_phantoms, counts=(6, 2, 2), size=64)
    monkeypatch.setattr("medseg.training.run.make_phantoms", draw_few)
    make_dataset(tmp_path / "my data")
    of_mine = "python predict.py 'my data/test' --model x/best_model.pth"
    for flags, expected in (
        (["--synthetic"], "python predict.py"),
        (["--data", "my data", "--out", "x"], of_mine),
    ):
        command = run_small(tmp_path, *flags, "--epochs", 1).splitlines()[-1].split("next: ")[1]
        assert command == expected
        output_of(*shlex.split(command)[1:], cwd=tmp_path)
    assert len(list(tmp_path.rglob("*_mask.png"))) == 1 + 4


def test_what_the_training_is_given(dataset, tmp_path):
    flags = "--lr 0.02 --weight-decay 0.3 --ema 0.7 --patience 3 --epochs 7 --save-every 9 --seed 5"
    more = "--warmup 4 --min-steps 3 --schedule cosine --loss bce=3 --augment flip --foreground 0.5"
    more += " --classes each"
    command = ("train.py", *SMALL[2:], *flags.split(), *more.split(), "--crop", 16, "--depth", 2)
    with patch.object(train, "train_model", side_effect=KeyboardInterrupt) as training:
        script_here(*command, cwd=tmp_path)
    model, changed, plain, criterion, optimizer, epochs, _ = training.call_args.args
    options = training.call_args.kwargs["options"]
    assert criterion(torch.tensor([0.5]), torch.ones(1)).item() == pytest.approx(3 * math.log(2))
    assert model.info.class_names == ("tumour",)
    (group,) = optimizer.param_groups
    assert (group["initial_lr"], group["weight_decay"], epochs) == (0.02, 0.3, 7)
    assert (options.ema, options.patience, options.save_every, options.grace) == (0.7, 3, 9, 4)
    # Nine crops an image, 27 steps an epoch: it rises over four of 189 and falls over the others.
    (factor,) = options.schedule.lr_lambdas
    last = (1 + math.cos(math.pi * 184 / 185)) / 2
    assert [factor(step) for step in (0, 3, 4, 188)] == pytest.approx([0.2, 0.8, 1, last])
    # Only training images are shuffled, changed and cropped.
    order, transform = changed.order, changed.transform
    assert (order.shuffle, order.seed, order.foreground) == (True, 5, 0.5)
    assert (transform.strengths, transform.crop) == ({"flip": 1}, 16)
    order, transform = plain.order, plain.transform
    assert not (order.shuffle or order.foreground or transform.strengths or transform.crop)


@pytest.mark.usefixtures("no_pictures")
def test_masks_that_stayed_empty_are_told_after_the_test(dataset, tmp_path):
    flags = (*SMALL, "--recipe", "strong", "--epochs", 1, "--lr", 0, "--overwrite", "--prior")
    for prior, told in ((0.001, True), (0.9, False)):
        result = script_here("train.py", *flags, prior, cwd=tmp_path)
        assert ("nothing was learned" in result.stderr) == told
        # The recipe is printed as it was used.
        assert f"recipe strong: --norm batch --prior {prior} --lr 0" in result.stdout


@pytest.fixture
def begun(dataset, tmp_path, no_pictures):
    """begun(weights, *flags): what last.pth has after an epoch at a rate of 0: where it began.

    weights: arguments of the UNet in first.pth, with 3 filters. The data set has two classes.
    """
    for split in ("train", "valid", "test"):
        set_classes(dataset / split, ["core", "edge"], lambda number: 1 + number % 2)

    def run(weights, *flags):
        first = UNet(n_filters=3, image_size=64, **weights).state_dict()
        torch.save(first, tmp_path / "first.pth")
        command = (*SMALL[4:], "--epochs", 1, "--lr", 0, "--init", "first.pth", "--overwrite")
        output_of("train.py", *command, *flags, cwd=tmp_path)
        return first, load_weights(tmp_path / "last.pth")

    return run


def test_it_takes_network_size_and_weights(begun, tmp_path):
    vessels = {"depth": 4, "norm": "batch", "up": "bilinear", "dropout": "none"}
    first, saved = begun(vessels, "--prior", 0.3)
    for name, weight in first.items():
        if "running" not in name and "num_batches" not in name:  # these follow the images
            assert torch.equal(saved["model"][name], weight), name
    expected = {"arch": "drive", "norm": "batch", "n_filters": 3, "image_size": 64}
    assert expected.items() <= saved["flags"].items()
    # A resumed run needs the first weights no more.
    (tmp_path / "first.pth").unlink()
    output_of("train.py", "--resume", "--epochs", 2, cwd=tmp_path)
    assert len(load_weights(tmp_path / "last.pth")["progress"]["history"]) == 2
    # With crops images keep their own size, whatever the weights had.
    begun({"depth": 2}, "--crop", 32)
    assert load_model(tmp_path / "best_model.pth").info.image_size is None


@pytest.mark.parametrize(
    "names, classes, kept",
    [
        (["edge", "core"], "each", False),  # in another order
        (["core", "edge"], "each", True),
        (["tumour"], "union", True),  # the only class is the same thing under two names
    ],
)
def test_a_head_of_other_classes_starts_anew(names, classes, kept, begun):
    weights = {"n_classes": len(names), "class_names": names}
    first, saved = begun(weights, "--image-size", 32, "--prior", 0.3, "--classes", classes)
    saved = saved["model"]
    assert torch.equal(saved["up5.conv2.weight"], first["up5.conv2.weight"])
    assert torch.equal(saved["outc.weight"], first["outc.weight"]) == kept
    if not kept:
        assert saved["outc.bias"].sigmoid().tolist() == pytest.approx([0.3, 0.3])


def test_predictions_are_drawn_over_their_own_image_and_named_after_it(dataset):
    """A bright left half is predicted; the masks are rows, one more for each image."""
    images, masks = torch.full((4, 3, 8, 8), -1.0), torch.zeros(4, 1, 8, 8)
    for index in range(4):
        images[index, :, :, :4], masks[index, :, : index + 1] = 0.5 * index + 0.1, 1
    model = pixel_model().requires_grad_(False)
    model[0].weight.fill_(1)  # the probability is over 0.5 where the sum of the channels is over 0
    model[0].bias.zero_()
    of_files = load_split(dataset, "test", 32), Order(4)
    named, shown = Batches(*of_files, dataset=data.open_split(dataset, "test", 32)), []
    for loader in ([(images, masks)], named):
        with patch.object(train.plots, "plot_predictions") as plot:
            train.visualize_predictions(model, loader, "cpu", num_samples=2)
        shown.append(plot.call_args)
    (cases, _), _ = shown[0]
    assert shown[1].kwargs["captions"] == ["0_test.png", "3_test.png"]
    for index, (picture, target, pred, title) in zip((0, 3), cases, strict=True):  # spread over 4
        grey = images[index, :, 0, 0].numpy() * STD + MEAN
        np.testing.assert_allclose(picture[0, 0], grey.clip(0, 1), atol=1e-6)
        np.testing.assert_array_equal(target, masks[index] > 0)
        assert pred[0, :, :4].all() and not pred[0, :, 4:].any()
        assert title == f"Dice {2 * 4 * (index + 1) / (32 + 8 * (index + 1)):.2f}"
