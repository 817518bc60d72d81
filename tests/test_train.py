"""Losses, metrics, early stopping, checkpoints and the training command."""
import csv
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HOME, ROOT, SMALL, make_dataset, script
from PIL import Image
from torch.utils.data import DataLoader

import train
from data import COCOSegmentationDataset, load_coco
from net import UNet, load_model
from train import Scores, combined_loss, dice_loss, evaluate, metrics, train_model


# ---- loss ------------------------------------------------------------------------------------

def test_losses_by_hand():
    pred = torch.tensor([[0.9, 0.2], [0.6, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # intersection 0.9 + 0.6 = 1.5; sums 1.8 and 2
    assert dice_loss(pred, target).item() == pytest.approx(1 - 3.0 / 3.8, abs=1e-6)
    bce = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.9)) / 4
    assert combined_loss(pred, target).item() == pytest.approx(0.6 * (1 - 3.0 / 3.8) + 0.4 * bce, abs=1e-6)


def test_losses_at_the_ends():
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert combined_loss(ones, ones).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(zeros, zeros).item() == pytest.approx(0, abs=1e-6)  # smooth / smooth
    assert dice_loss(zeros, ones).item() == pytest.approx(1, abs=1e-6)
    assert math.isfinite(combined_loss(zeros, ones).item())  # torch bounds the logarithm at -100


def test_dice_is_of_the_whole_batch_whatever_its_memory_order():
    pred, target = torch.rand(3, 2, 5, 7), (torch.rand(3, 2, 5, 7) > 0.5).float()
    wanted = 1 - 2 * (pred * target).sum() / (pred.sum() + target.sum())
    assert dice_loss(pred, target).item() == pytest.approx(wanted.item(), abs=1e-6)
    other = pred.contiguous(memory_format=torch.channels_last)
    assert dice_loss(other, target).item() == pytest.approx(wanted.item(), abs=1e-6)


# ---- metrics ---------------------------------------------------------------------------------

def test_metrics_by_hand():
    found = metrics(tp=6, fp=2, fn=4, tn=88)
    assert found == pytest.approx({
        "acc": 0.94, "dice": 12 / 18, "iou": 6 / 12, "precision": 6 / 8, "recall": 6 / 10,
        "miou": (6 / 12 + 88 / 94) / 2, "background_acc": 0.90})


@pytest.mark.parametrize("counts, wanted", [
    ((0, 0, 0, 9), dict(dice=1, iou=1, precision=1, recall=1, miou=1, acc=1, background_acc=1)),  # nothing there, nothing said
    ((0, 3, 0, 6), dict(dice=0, iou=0, precision=0, recall=0, acc=6 / 9, background_acc=1)),  # nothing there, something said
    ((0, 0, 3, 6), dict(dice=0, iou=0, precision=0, recall=0, acc=6 / 9, background_acc=6 / 9)),  # all missed
    ((9, 0, 0, 0), dict(dice=1, iou=1, precision=1, recall=1, miou=1, acc=1, background_acc=0)),  # all foreground
])
def test_metrics_of_empty_masks(counts, wanted):
    found = metrics(*counts)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)


def test_scores_are_sums_over_images():
    pred, target = torch.zeros(4, 1, 4, 4), torch.zeros(4, 1, 4, 4)
    pred[0, 0, :2], target[0, 0, :1] = 0.9, 1     # 8 said, 4 true, 4 right: Dice 8/12
    target[1, 0, 0, 0] = 1                        # missed: 0
    pred[2, 0, 0, 0] = 0.51                       # nothing there: 0
    pred[3] = 0.5                                 # at the threshold is background; both empty: 1
    whole, parts = Scores("cpu"), Scores("cpu")
    whole.add(torch.tensor(2.0), pred, target)
    parts.add(torch.tensor(1.0), pred[:1], target[:1])  # unequal batches, losses 1 and 3
    parts.add(torch.tensor(3.0), pred[1:], target[1:])
    assert parts.counts.tolist() == whole.counts.tolist() == [4, 5, 1, 54]
    for scores in (whole, parts):
        assert scores.result()["image_dice"] == pytest.approx((8 / 12 + 0 + 0 + 1) / 4)
    assert parts.result()["loss"] == pytest.approx((1 * 1 + 3 * 3) / 4)
    assert whole.result()["dice"] == pytest.approx(8 / 14)


def test_evaluate_gives_the_same_scores_for_any_batch_size():
    torch.manual_seed(0)
    model, images, masks = UNet(n_filters=2), torch.randn(5, 3, 32, 32), (torch.rand(5, 1, 32, 32) > 0.7).float()
    torch.nn.init.zeros_(model.outc.bias)

    def bce(pred, target):
        return torch.nn.functional.binary_cross_entropy(pred, target)

    found = [evaluate(model, zip(images.split(size), masks.split(size)), bce, "cpu") for size in (1, 2, 5)]
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0] == pytest.approx(found[2], abs=1e-6)
    assert not model.training


# ---- the loop --------------------------------------------------------------------------------

class Scripted:
    """A criterion whose value in evaluation is read from a script."""

    def __init__(self, values):
        self.values = list(values)

    def __call__(self, pred, target):
        return pred.mean() if torch.is_grad_enabled() else torch.tensor(self.values.pop(0))


def tiny():
    model = UNet(n_filters=2)
    return model, [(torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32))], torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("losses, patience, epochs, best", [
    ([5, 4, 3, 2, 1], 2, 5, 5),                    # falling to the end
    ([5, 3, 4, 4, 4, 4], 3, 5, 2),                 # stops three epochs after the second
    ([5, 3, 3, 3, 9], 2, 4, 2),                    # equal is not lower
    ([5, 6, 4, 6, 6, 1], 2, 5, 3),                 # a new best starts the count again
    ([5, math.nan, 4, 9, 9, 9], 2, 5, 3),          # no number is never the best
])
def test_early_stopping(losses, patience, epochs, best, tmp_path):
    model, batches, optimizer = tiny()
    logged = []
    history = train_model(model, batches, batches, Scripted(losses), optimizer, 6 if len(losses) == 6 else 5, "cpu", patience=patience,
                          out=tmp_path, log=lambda values, step: logged.append((step, values, model.outc.bias.item())))
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    assert [step for step, *_ in logged] == list(range(1, epochs + 1))
    assert [row["val_loss"] for row in history] == pytest.approx(losses[:epochs], nan_ok=True)
    assert model.outc.bias.item() == logged[best - 1][2]  # the best weights are in the model, and in the file
    assert load_model(tmp_path / "best_model.pth").outc.bias.item() == logged[best - 1][2]
    for key in ("train/loss", "train/acc", "train/epoch", "val/loss", "val/acc", "train/dice", "val/dice", "val/iou", "train/lr",
                "perf/images_per_second"):
        assert all(key in values for _, values, _ in logged)


def test_a_loss_that_never_is_a_number_is_said(tmp_path):
    model, batches, optimizer = tiny()
    with pytest.raises(ValueError, match="--lr"):
        train_model(model, batches, batches, Scripted([math.nan] * 9), optimizer, 3, "cpu", out=tmp_path)
    assert not (tmp_path / "best_model.pth").exists()


def test_train_model_takes_a_dataloader(dataset, tmp_path):
    def loader(split):
        return DataLoader(COCOSegmentationDataset(load_coco(dataset / split), dataset / split, image_size=32), batch_size=2)

    model = UNet(n_filters=2)
    history = train_model(model, loader("train"), loader("valid"), combined_loss, torch.optim.Adam(model.parameters()), 2, "cpu", out=tmp_path)
    assert len(history) == 2
    picture = train.visualize_predictions(model, loader("test"), "cpu", num_samples=3, path=tmp_path / "picture.png")
    assert Image.open(picture).size[0] > 800


def test_the_loss_falls_and_the_square_is_found(dataset, tmp_path):
    from data import Batches, load_split
    torch.manual_seed(0)
    model = UNet(n_filters=4)
    rows = load_split(dataset, "train", 32)
    history = train_model(model, Batches(rows, 2, shuffle=True), Batches(rows, 2), combined_loss,
                          torch.optim.Adam(model.parameters(), lr=2e-3), 40, "cpu", out=tmp_path, patience=40)
    assert max(row["val_dice"] for row in history) > 0.9


# ---- the command -----------------------------------------------------------------------------

def rows(folder):
    with open(folder / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]


def same_weights(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with a data set, and in run/ what an uninterrupted training of three epochs left."""
    place = tmp_path_factory.mktemp("straight")
    make_dataset(place / "dataset")
    result = script("train.py", *SMALL, "--epochs", 3, "--out", "run", cwd=place)
    assert result.returncode == 0, result.stderr
    return place, result.stdout


def test_a_training_leaves_what_it_promises(straight):
    place, said = straight
    run = place / "run"
    assert {path.name for path in run.iterdir()} == {"best_model.pth", "last.pth", "metrics.csv", "curves.png", "predictions.png"}
    assert len(rows(run)) == 3 and said.count("epoch ") == 3
    for name in ("curves.png", "predictions.png"):
        assert np.asarray(Image.open(run / name).convert("L")).std() > 10
    assert set(torch.load(run / "best_model.pth", weights_only=True)) == set(UNet(n_filters=2).state_dict())
    assert load_model(run / "best_model.pth").image_size == 32
    background = 1 - 16 * 16 / 48 ** 2  # a 16-pixel square in 48 x 48, of which nearest-resizing to 32 x 32 keeps about the share
    scored = float(re.search(r"background everywhere scores ([\d.]+)", said)[1])
    assert scored == pytest.approx(background, abs=0.02)


def test_the_test_uses_the_best_weights(straight):
    place, said = straight
    again = script("train.py", "--test-only", "--out", "run", "--device", "cpu", "--batch-size", 2, cwd=place)
    assert again.returncode == 0, again.stderr
    line = next(line for line in said.splitlines() if line.startswith("test with the best weights"))
    assert line in again.stdout


def test_resuming_is_exact(straight):
    place, _ = straight
    first = script("train.py", *SMALL, "--epochs", 1, "--out", "resumed", cwd=place)
    assert first.returncode == 0, first.stderr
    second = script("train.py", "--resume", "--epochs", 3, "--out", "resumed", cwd=place)  # with the flags of the first
    assert second.returncode == 0, second.stderr
    assert rows(place / "resumed") == rows(place / "run")
    assert same_weights(place / "resumed" / "best_model.pth", place / "run" / "best_model.pth")
    assert load_model(place / "resumed" / "best_model.pth").image_size == 32


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_saves_and_resuming_goes_on_from_that_step(straight, signum, status):
    place, _ = straight
    out = f"stopped{status}"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, SMALL), "--epochs", "3000", "--patience", "3000", "--out", out],
                               cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": HOME})
    try:
        assert "images at 32x32" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while not (place / out / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert error.strip() == f"stopped by {signum.name}"
    done = torch.load(place / out / "last.pth", weights_only=True)["progress"]["epoch"]
    result = script("train.py", "--resume", "--epochs", done + 1, "--out", out, cwd=place)
    assert result.returncode == 0, result.stderr
    keep = min(len(rows(place / "run")), done + 1)
    assert rows(place / out)[:keep] == rows(place / "run")[:keep]
    assert len(rows(place / out)) == done + 1


@pytest.mark.parametrize("norm, more", [(None, {}), ("batch", {"ema": 0.9, "schedule": train.make_schedule("cosine", 2, 6)})])
def test_the_loop_stops_after_its_step_wherever_it_is(tmp_path, norm, more):
    """Stopped at every step in turn, in training and in validation, and resumed each time: bit-equal to never stopping."""
    def batches(count):
        generator = torch.Generator().manual_seed(count)
        return [(torch.rand(2, 3, 32, 32, generator=generator), (torch.rand(2, 1, 32, 32, generator=generator) > 0.5).float()) for _ in range(count)]

    def go(folder, stop_every):
        torch.manual_seed(0)
        model, stops = UNet(n_filters=2, norm=norm), 0
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        folder.mkdir()
        while True:
            signals, seen = train.Signals(), 0

            def criterion(pred, target):
                nonlocal seen
                seen += 1
                if stop_every and seen == stop_every:
                    signals.came = signal.SIGTERM
                return combined_loss(pred, target)

            last = folder / "last.pth"
            try:
                return stops, train_model(model, batches(3), batches(2), criterion, optimizer, 2, "cpu", out=folder, signals=signals, **more,
                                          resume=torch.load(last, weights_only=True) if last.exists() else None), model.state_dict()
            except train.Stopped:
                stops += 1
                assert stops < 50
                model = UNet(n_filters=2, norm=norm)  # another process would start from other weights, and another random state
                optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    _, wanted, weights = go(tmp_path / "straight", None)
    for every in (3, 4, 5):  # 3 and 2 batches an epoch: stops fall into training, into validation, between the two
        stops, history, found = go(tmp_path / str(every), every)
        assert stops >= 2
        for row, other in zip(history, wanted, strict=True):
            assert {key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} == \
                {key: value for key, value in other.items() if key not in ("seconds", "images_per_second")}
        assert all(torch.equal(found[key], weights[key]) for key in weights)


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
    refused("train", "--project", "no spaces", "--swanlab", "offline", "--data", place / "dataset", "--image-size", 32, "--n-filters", 2,
            "--out", place / "other", words=["--project"])
    (place / "file").write_text("in the way")
    refused("train", "--out", place / "file", "--data", place / "dataset", words=["file", "--out"])
    refused("train", "--out", place / "file" / "below", "--data", place / "dataset", words=["--out"])
    assert (place / "file").read_text() == "in the way"


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\3\4 damaged"])
def test_a_damaged_last_is_refused_and_kept(content, refused, tmp_path):
    (tmp_path / "last.pth").write_bytes(content)
    refused("train", "--resume", "--out", tmp_path, words=["last.pth"])
    torch.save({"progress": 5}, tmp_path / "last.pth")
    before = (tmp_path / "last.pth").read_bytes()
    refused("train", "--resume", "--out", tmp_path, words=["not written by train.py"])
    assert (tmp_path / "last.pth").read_bytes() == before


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(precision, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fp32", precision):
        train.main([*map(str, SMALL), "--epochs", "2", "--lr", "1e-3", "--precision", name, "--out", name])
    for row, other in zip(rows(tmp_path / "fp32"), rows(tmp_path / precision), strict=True):
        assert float(other["val_loss"]) == pytest.approx(float(row["val_loss"]), abs=0.01)
        assert other["val_loss"] != row["val_loss"]  # it is another precision
    assert all(weight.dtype == torch.float32 for weight in torch.load(tmp_path / precision / "best_model.pth", weights_only=True).values())


def test_synthetic_makes_its_own_data(tmp_path, monkeypatch, capsys):
    import download
    few = download.make_phantoms
    monkeypatch.setattr(download, "make_phantoms", lambda root: few(root, counts=(6, 2, 2), size=64))
    monkeypatch.chdir(tmp_path)
    train.main(["--synthetic", "--epochs", "1", *map(str, SMALL)])
    assert "6 train, 2 valid, 2 test" in capsys.readouterr().out
    assert (tmp_path / "dataset" / "synthetic" / "test").is_dir() and (tmp_path / "best_model.pth").exists()


def test_importing_does_nothing(tmp_path):
    code = ("import sys, net, data, train, predict, download\n"
            "loaded = [name for name in ('matplotlib', 'torchvision', 'swanlab', 'kaggle', 'pycocotools') if name in sys.modules]\n"
            "assert not loaded, loaded")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- what the tutorial does without ----------------------------------------------------------

def test_schedule_by_hand_and_against_torch():
    share = train.make_schedule("cosine", 4, 12)
    assert [share(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    wanted = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for step in range(4, 13):
        assert share(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        wanted.step()
    assert [train.make_schedule("constant", 0, 12)(step) for step in (0, 11)] == [1, 1]


def test_the_mean_of_the_weights_by_hand(tmp_path):
    """Two steps of plain gradient descent: the mean moves by 1 - min(ema, (1 + t) / (10 + t)) towards each result."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    start = model[0].bias.item()
    seen = []

    def criterion(pred, target):
        if model[0].bias.item() not in seen[-1:]:
            seen.append(model[0].bias.item())
        return combined_loss(pred, target)

    batches = [(torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)) for _ in range(2)]
    model.train()
    copy = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.Sigmoid())
    copy.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(copy.parameters(), lr=0.5)
    biases = []
    for images, masks in batches:
        plain.zero_grad()
        combined_loss(copy(images), masks).backward()
        plain.step()
        biases.append(copy[0].bias.item())
    train_model(model, batches, batches, criterion, torch.optim.SGD(model.parameters(), lr=0.5), 1, "cpu", out=tmp_path, ema=0.15)
    mean = start
    for step, bias in enumerate(biases):
        decay = min(0.15, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * bias
    assert torch.load(tmp_path / "best_model.pth", weights_only=True)["0.bias"].item() == pytest.approx(mean, abs=1e-6)
    assert model[0].bias.item() == pytest.approx(mean, abs=1e-6)  # what is evaluated is what is left in the model


def test_dice_by_image_by_hand():
    pred = torch.tensor([[[[0.5, 0.5]]], [[[0.0, 0.0]]]])
    target = torch.tensor([[[[1.0, 0.0]]], [[[0.0, 0.0]]]])
    # (2 * 0.5 + 1) / (1 + 1 + 1) and 1 / 1
    assert train.image_dice_loss(pred, target).item() == pytest.approx(1 - (2 / 3 + 1) / 2)
    bce = torch.nn.functional.binary_cross_entropy(pred, target)
    assert train.combined_loss_by_image(pred, target).item() == pytest.approx(0.6 * (1 - (2 / 3 + 1) / 2) + 0.4 * bce.item(), abs=1e-6)


def test_a_recipe_is_a_set_of_flags_that_the_command_line_overrules(dataset, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    train.main([*map(str, SMALL), "--epochs", "2", "--recipe", "strong", "--lr", "0.01", "--schedule", "cosine"])
    said = capsys.readouterr().out
    assert "recipe strong: --norm batch" in said and " --lr 0.01 " in said  # as it is, not as it is written
    state = torch.load("last.pth", weights_only=True)
    assert {key: state["flags"][key] for key in ("recipe", "norm", "lr", "augment", "ema", "schedule")} == \
        {"recipe": "strong", "norm": "batch", "lr": 0.01, "augment": True, "ema": 0.995, "schedule": "cosine"}
    assert load_model("best_model.pth").down1.norm1.running_mean.shape == (2,)
    refused("train", "--resume", "--epochs", 3, "--out", tmp_path, words=["--epochs"])  # the schedule ends with them
    before = open("metrics.csv").read()
    train.main(["--resume"])
    assert open("metrics.csv").read() == before


def test_prior_is_the_probability_that_training_begins_at(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([*map(str, SMALL), "--epochs", "1", "--prior", "0.04", "--lr", "0"])
    assert load_model("best_model.pth").outc.bias.sigmoid().item() == pytest.approx(0.04)


def test_a_skipped_step_leaves_batch_normalisation_alone(tmp_path):
    """Steps that are not finite come with activations that are not, and these must not stay in the running means."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.Sigmoid())
    good = (torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
    bad = (torch.full((2, 3, 4, 4), math.nan), torch.ones(2, 1, 4, 4))
    history = train_model(model, [good, bad, good], [good], combined_loss, torch.optim.SGD(model.parameters(), lr=0.1), 1, "cpu", out=tmp_path)
    assert history[0]["skipped"] == 1 and math.isfinite(history[0]["val_loss"])
    assert torch.isfinite(model[1].running_mean).all() and torch.isfinite(model[1].running_var).all()
