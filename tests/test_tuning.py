"""--tune-prediction: what is chosen on valid, recorded in the weights, and done by predict.py."""

import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    brightness_model,
    make_dataset,
    output_of,
    probabilities_of,
    skip_pictures,
    write_nifti,
)
from PIL import Image
from scipy import ndimage

import predict
import train
from data import open_split
from medseg.inference import PLAIN, VIEWS, Inference, learned_flips, read_inference
from medseg.metrics import SWEEP, count_image
from medseg.predictor import Predictor
from medseg.training.tuning import choose, gains
from medseg.weights import load_weights
from net import UNet, load_model

ALL_FLIPS = ("horizontal", "vertical", "both")
CPU = ("--device", "cpu", "--precision", "fp32")


BY_NUMPY = {  # of (B, H, W, C), there and back
    "horizontal": (lambda x: x[:, :, ::-1],) * 2,
    "vertical": (lambda x: x[:, ::-1],) * 2,
    "both": (lambda x: x[:, ::-1, ::-1],) * 2,
    "transpose": (lambda x: np.swapaxes(x, 1, 2),) * 2,
    "turn90": (lambda x: np.rot90(x, 1, (1, 2)), lambda x: np.rot90(x, -1, (1, 2))),
    "turn270": (lambda x: np.rot90(x, -1, (1, 2)), lambda x: np.rot90(x, 1, (1, 2))),
    "antitranspose": (lambda x: np.swapaxes(x[:, ::-1, ::-1], 1, 2),) * 2,
}


def average_by_numpy(model, pixels, flips):
    """The mean of the probabilities (B, C, H, W) of images as they are and flipped."""
    total = probabilities_of(model, pixels).astype(float)
    for name in flips:
        there, back = BY_NUMPY[name]
        flipped = probabilities_of(model, there(pixels))
        total += np.moveaxis(back(np.moveaxis(flipped, 1, -1)), -1, 1)
    return total / (1 + len(flips))


def test_the_average_over_flips_by_numpy():
    """Of images that are not square, too."""
    pixels = np.random.default_rng(2).integers(0, 256, (3, 33, 50, 3), np.uint8)
    network = UNet(3, 2, 4, image_size=32, depth=2).eval()
    torch.manual_seed(1)
    for weight in network.parameters():  # else what it gives is the same everywhere
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    model, plain = Predictor([network], "cpu"), probabilities_of(network, pixels)
    for flips in (ALL_FLIPS, *((one,) for one in VIEWS)):
        model.inference = PLAIN._replace(flips=flips)
        mean = probabilities_of(model, pixels)
        np.testing.assert_allclose(mean, average_by_numpy(network, pixels, flips), atol=1e-6)
        assert np.abs(mean - plain).max() > 0.01


def test_only_flips_that_were_trained_are_tried():
    assert learned_flips({"flip": 0.5, "mirror": 1.0}) == ALL_FLIPS
    assert learned_flips({"mirror": 1.0}) == ("horizontal",)
    assert learned_flips({"flip": 0.0, "turn": 1.0}) == ("both", "turn90", "turn270")
    assert learned_flips({"mirror": 1.0, "turn": 1.0}) == VIEWS and learned_flips({}) == ()


def counts_of(*dice, size=100):
    """Counts (N, 1, 4) of images with as many true pixels and these Dice."""
    rows = [[size * one, size * (1 - one), size * (1 - one), 9] for one in dice]
    return np.array(rows).round().astype(int)[:, None]


def test_a_gain_is_seen_in_many_images_and_in_the_split():
    # Of one image alone the mean is as large as its standard error, and here a bit smaller.
    for after, gained in (((0.6, 0.58, 0.5, 0.55), True), ((0.9, 0.5, 0.5, 0.49), False)):
        assert gains(counts_of(*[0.5] * 4), counts_of(*after)) == gained
    assert not gains(counts_of(0.5, 0.5), counts_of(0.8, 0.49))  # mean 0.145, error 0.155
    before, large = counts_of(*[0.5] * 4), np.array([100, 1, 1, 1])[:, None, None]
    for after, expected, gained in (
        ((0.48, 0.6, 0.6, 0.6), False, False),  # the large image lost pixels
        ((0.51, 0.6, 0.6, 0.6), False, True),
        ((0.6, 0.4, 0.4, 0.4), True, False),  # it alone gained
    ):
        assert gains(before * large, counts_of(*after) * large, expected=expected) == gained
    before, less, enough = (counts_of(*[dice] * 4, size=10**6) for dice in (0.5, 0.5019, 0.5021))
    assert not gains(before, less) and gains(before, enough)


def choice(targets, plain, flipped=None, flips=()):
    """What `choose` takes where a network gives these probabilities, and with flips those."""

    def count(inference, thresholds):
        pairs = zip(targets, flipped if inference.flips else plain, strict=True)
        return np.stack([count_image(*pair, thresholds, inference.clean) for pair in pairs])

    return choose(count, flips)


def lesions(count=5, *, inside=0.9, halo=0.0, speck=0.0, side=20):
    """(targets, probabilities): squares of 8 pixels a side with a halo of one, and a speck."""
    targets = np.zeros((count, 1, side, side), bool)
    probabilities = np.full((count, 1, side, side), 0.05, np.float32)
    for number in range(count):
        top = 2 + number
        probabilities[number, 0, top - 1 : top + 9, 4:14] = halo
        probabilities[number, 0, top : top + 8, 5:13] = inside
        probabilities[number, 0, top : top + 3, 16:19] = speck
        targets[number, 0, top : top + 8, 5:13] = True
    return targets, probabilities


def test_threshold_and_pieces_by_hand():
    """Above the halo the square alone is left, and its Dice is 1."""
    all_three = {"inside": 0.32, "halo": 0.12, "speck": 0.4}
    assert choice(*lesions(4))[0] == PLAIN
    assert choice(*lesions(4, halo=0.62))[0] == Inference(0.65)
    assert choice(*lesions(4, speck=0.95))[0] == Inference(clean={"largest": 1.0})
    assert choice(*lesions(4, **all_three))[0] == Inference(0.15, (), {"largest": 1.0})
    chosen, (line,) = choice(*lesions(3, **all_three))  # too few images for either
    assert chosen == PLAIN and "(3)" in line


def test_thresholds_that_are_not_chosen():
    targets, probabilities = lesions(side=60)
    for background, inside, expected in (
        (0.01, 0.08, 0.5),  # perfect at 0.05 alone: a lower one may be better
        (0.93, 0.97, 0.5),  # perfect at 0.95 alone
        (0.12, 0.17, 0.15),  # 0.1 marks everything, 0.15 the lesions
    ):
        drawn = np.where(targets, inside, background).astype(np.float32)
        assert choice(targets, drawn)[0].threshold == expected
    probabilities[:] = 0.62  # up to 0.6 all is marked, then 4 of the 64 pixels of each lesion
    for number, one in enumerate(probabilities):
        one[0, 2 + number : 4 + number, 5:7] = 0.72
    assert choice(targets, probabilities)[0] == PLAIN
    assert choice(targets * False, probabilities)[0] == PLAIN  # without any lesion
    # Of two classes one is marked at 0.15 to 0.3, the other never.
    targets, probabilities = lesions(inside=0.32, halo=0.12)
    both = np.concatenate([targets, targets[:, :, ::-1]], 1)
    missed = np.concatenate([probabilities, np.zeros_like(probabilities)], 1)
    assert choice(both, missed)[0].threshold == 0.15


def test_flips_are_taken_where_they_gain_also_by_another_threshold():
    targets, good = lesions()
    (_, bad), (_, faint) = lesions(halo=0.9), lesions(inside=0.4)  # faint, as an average may be

    def taken(before, after, count=5):
        return choice(targets[:count], before[:count], after[:count], ALL_FLIPS)[0]

    assert taken(bad, good) == Inference(flips=ALL_FLIPS)
    assert taken(good, bad) == taken(good, good) == PLAIN
    assert taken(bad, faint).threshold < 0.4
    # Few images suffice, for the network has learned them; but not for a threshold.
    assert taken(bad, good, 2) == taken(bad, good, 1) == Inference(flips=ALL_FLIPS)
    assert taken(bad, faint, 2) == PLAIN
    # Of five images one gains, which is no more than noise, and enough for what is expected.
    assert taken(bad, np.concatenate([good[:1], bad[1:]])).flips == ALL_FLIPS


def blobs(seed):
    """A picture with several bright squares, each of one brightness; uint8 (48, 48)."""
    rng = np.random.default_rng(seed)
    pixels = np.full((48, 48), 20, np.uint8)
    for _ in range(6):
        row, column = rng.integers(0, 40, 2)
        pixels[row : row + rng.integers(2, 8), column : column + 5] = rng.integers(120, 250)
    return pixels


def test_what_was_chosen_counts_and_flags_win(here):
    model, chosen = brightness_model(48), Inference(0.35, ("horizontal",), {"largest": 1.0})
    # It marks what lies a pixel right of and below bright ones: each flip has other masks.
    weight = model.down1.conv1.weight.data
    weight.copy_(weight.roll((-1, -1), (2, 3)))

    def by_hand(pixels, inference):
        colours = np.repeat(pixels[None, ..., None], 3, 3)
        mask = average_by_numpy(model, colours, inference.flips)[0, 0] > inference.threshold
        if not inference.clean:
            return mask
        numbers, count = ndimage.label(mask, np.ones((3, 3)))
        assert count > 1  # else there is nothing to see
        return numbers == np.bincount(numbers[mask]).argmax()

    torch.save(model.state_dict(), "plain.pth")
    model.info.inference = chosen
    torch.save(model.state_dict(), "tuned.pth")
    model.info.inference = None
    Image.fromarray(blobs(0)).save("a.png")
    for weights, flags, expected in (
        ("tuned", (), chosen),
        ("tuned", ("--no-tta",), chosen._replace(flips=())),
        ("tuned", ("--clean=none", "--no-tta", "--threshold=0.5"), PLAIN),
        ("plain", ("--tta",), Inference(flips=ALL_FLIPS)),
    ):
        model_flags = ("--model", f"{weights}.pth", *CPU)
        said = output_of("predict.py", "a.png", *flags, *model_flags, cwd=here)
        lines = [line for line in said.splitlines() if "chosen on valid" in line]
        assert len(lines) == (weights == "tuned")
        for line in lines:
            assert line.startswith(f"{expected}: ") and "tuned.pth" in line
            assert all(flag.partition("=")[0] in line for flag in flags)
        assert ("WARNING: --tta" in said) == (weights == "plain")  # neither chosen nor trained
        mask = np.asarray(Image.open("a_mask.png")) > 0
        np.testing.assert_array_equal(mask, by_hand(blobs(0), expected))
    # Slices of a volume have the masks of pictures.
    pictures = [blobs(seed) for seed in range(4)]
    write_nifti("v.nii.gz", np.stack(pictures, 2), zooms=(1, 1, 5))
    names = ("v.nii.gz", "--output=m.nii.gz", "--model=tuned.pth")
    output_of("predict.py", *names, "--window", 127.5, 255, *CPU, cwd=here)
    volume = np.asarray(nibabel.load("m.nii.gz").dataobj) > 0
    expected = [by_hand(pixels, chosen) for pixels in pictures]
    np.testing.assert_array_equal(volume.transpose(2, 0, 1), expected)


# ---- train.py --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data set and a run in plain/, which in tuned/ has chosen later; {run: said}.

    The masks of the latter are not those at 0.5.
    """
    place, said = tmp_path_factory.mktemp("trained"), {}
    make_dataset(place / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        skip_pictures(patch)
        flags = "--precision fp32 --epochs 3 --norm batch --lr 1e-2 --augment flip --out plain"
        said["plain"] = output_of("train.py", *SMALL, *flags.split(), cwd=place)
        shutil.copytree(place / "plain", place / "tuned")
        flags = ("--resume", "--tune-prediction", "--out", "tuned")
        said["tuned"] = output_of("train.py", *flags, cwd=place)
    return place, said


def test_a_training_records_its_choice_and_is_else_the_same(trained, no_pictures, monkeypatch):
    place, said = trained
    tuned, plain = (load_weights(place / run / "best_model.pth") for run in ("tuned", "plain"))
    assert all(torch.equal(tuned[name], plain[name]) for name in tuned.keys() | plain.keys())
    metadata, drawn = dict(tuned._metadata[""]), []
    chosen = read_inference(metadata["inference"])
    assert {**metadata, "inference": None} == plain._metadata[""] and chosen != PLAIN
    assert f"chosen on valid: {chosen}" in said["tuned"].splitlines()
    # --test-only prints the same, and draws the masks that were chosen; --resume chooses anew.
    monkeypatch.setattr(train, "visualize_predictions", lambda *given, path: drawn.append(given[4]))
    printed = output_of("train.py", "--test-only", "--out", "tuned", "--device", "cpu", cwd=place)
    scores = [line for line in printed.splitlines() if line.startswith("test")]
    assert len(scores) > 1 and {*scores} < {*said["tuned"].splitlines()}
    assert drawn == [chosen]
    shutil.copytree(place / "tuned", place / "more")
    more = ("--resume", "--epochs", 4, "--out", "more")
    assert "chosen on valid: " in output_of("train.py", *more, cwd=place)
    # --init takes no choice over.
    init = ("--init", "tuned/best_model.pth", "--epochs", 1, "--out", "next")
    output_of("train.py", *SMALL[4:], *init, cwd=place)
    assert load_model(place / "next" / "best_model.pth").info.inference is None


def test_the_choice_is_that_of_valid_counted_by_hand_and_tested_as_by_predict_py(trained):
    place, said = trained
    model = load_model(place / "tuned" / "best_model.pth").eval()
    dataset = open_split(place / "dataset", "valid", 32)

    def dice_of(inference):
        predictor, overlap, total = Predictor([model], "cpu"), 0, 0
        predictor.inference = inference
        for index in range(len(dataset)):
            image, target = dataset.load(index)
            pred = predict.predict(predictor, image, threshold=inference.threshold)
            assert pred.shape == (48, 48)  # that of the image, not of the network
            overlap, total = overlap + (pred & target).sum(), total + pred.sum() + target.sum()
        return 2 * overlap / total

    dice, chosen = [dice_of(Inference(threshold)) for threshold in SWEEP], model.info.inference
    best, half = max(dice), dice[SWEEP.index(0.5)]
    assert chosen.flips == ALL_FLIPS and chosen.threshold == SWEEP[dice.index(best)] != 0.5
    assert f"Dice {best:.4f} instead of {half:.4f}, chosen" in said["tuned"]
    flipped = f"flips: Dice {dice_of(chosen):.4f} instead of {best:.4f}, chosen"
    assert flipped in said["tuned"] and "largest piece" in said["tuned"]  # was tried

    names = ("dataset/test", "--model=tuned/best_model.pth", "--output=scored")
    output_of("predict.py", *names, *CPU, cwd=place)
    scores = json.loads((place / "scored" / "report.json").read_text())["scores"]
    (line,) = (line for line in said["tuned"].splitlines() if ", as chosen on valid: " in line)
    printed = re.findall(r"(?:Dice|IoU|precision|recall) ([\d.]+)", line)
    names = ("dice", "iou", "miou", "precision", "recall", "image_dice")
    assert [float(number) for number in printed] == [round(scores[name], 4) for name in names]
