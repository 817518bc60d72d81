"""Prediction: the functions, the files it writes, and what it refuses."""
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, edit_annotations, script
from PIL import Image

import data
import predict
import train
from net import UNet


def brightness_model(image_size=32):
    """A UNet set by hand: probability over 0.5 where a pixel is bright. Its answers can be told without running it."""
    model = UNet(n_filters=2, image_size=image_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.down1.conv1.weight[0, :, 1, 1] = 1 / 3  # channel 0: mean of red, green, blue
        model.down1.conv2.weight[0, 0, 1, 1] = 1
        model.up5.conv1.weight[0, 2, 1, 1] = 1        # the skip connection comes after the two upsampled channels
        model.up5.conv2.weight[0, 0, 1, 1] = 1
        model.outc.weight[0, 0] = 8
        model.outc.bias[0] = -4                       # sigmoid(8 x - 4) > 0.5 where x > 0.5, some way above mid-grey
    return model


@pytest.fixture
def place(tmp_path):
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    return tmp_path


def scan(width, height, x, y, side):
    """A dark picture with a bright square."""
    pixels = np.full((height, width), 20, np.uint8)
    pixels[y:y + side, x:x + side] = 235
    return Image.fromarray(pixels)


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


# ---- functions -------------------------------------------------------------------------------

def test_the_tutorials_functions(place):
    scan(640, 640, 200, 300, 160).save(place / "scan.png")
    model = predict.load_model(place / "best_model.pth", "cpu")
    assert not model.training and model.image_size == 32
    tensor, picture = predict.preprocess_image(place / "scan.png")
    assert tensor.shape == (1, 3, 256, 256) and tensor.dtype == torch.float32 and picture.size == (256, 256)
    mask = predict.predict_mask(model, tensor, "cpu")
    assert mask.shape == (1, 1, 256, 256) and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0, 1}
    assert mask[0, 0, 120:184, 80:144].mean() > 0.98 and mask.sum() < 66 ** 2
    assert predict.predict_mask(model, tensor, "cpu", threshold=1.0).sum() == 0
    predict.visualize_result(picture, mask.cpu().numpy(), path=place / "figure.png")
    red = np.asarray(Image.open(place / "figure.png").convert("RGB")).astype(int)
    assert ((red[..., 0] - red[..., 1]) > 60).sum() > 500  # something is tinted


def test_cuda_by_default_falls_back(place):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    model = predict.load_model(place / "best_model.pth")
    assert predict.predict_mask(model, predict.preprocess_image(place / "scan.png")[0]).shape == (1, 1, 256, 256)


def test_masks_return_to_the_place_they_came_from():
    probabilities = torch.zeros(32, 32)
    probabilities[8:16, 16:24] = 1
    mask = predict.full_size_mask(probabilities, (320, 160), 0.5)
    wanted = np.zeros((160, 320), bool)
    wanted[40:80, 160:240] = True
    assert mask.shape == (160, 320) and overlap(mask, wanted) > 0.97


def test_overlay_tints_the_foreground_alone():
    image = Image.new("RGB", (4, 3), (100, 50, 200))
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    pixels = np.asarray(predict.overlay(image, mask))
    assert pixels[1, 2].tolist() == [162, 30, 120]
    assert (pixels[~mask] == (100, 50, 200)).all()


# ---- the command -----------------------------------------------------------------------------

def test_one_image(place):
    scan(200, 120, 60, 40, 40).save(place / "scan.png")
    result = script("predict.py", "scan.png", cwd=place)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in place.iterdir()} == {"best_model.pth", "scan.png", "scan_mask.png", "predictions.png"}
    mask = Image.open(place / "scan_mask.png")
    assert mask.size == (200, 120) and mask.mode == "L" and set(np.unique(mask)) == {0, 255}
    wanted = np.zeros((120, 200), bool)
    wanted[40:80, 60:100] = True
    assert overlap(np.asarray(mask) > 0, wanted) > 0.75
    share = 100 * (np.asarray(mask) > 0).mean()
    assert f"foreground {share:.2f} %" in result.stdout and "highest probability" in result.stdout
    assert np.asarray(Image.open(place / "predictions.png")).std() > 10


def test_a_folder_of_every_format(place):
    folder = place / "scans"
    folder.mkdir()
    picture = scan(90, 70, 30, 20, 25)
    picture.save(folder / "a.jpg", quality=95)
    picture.save(folder / "b.png")
    picture.convert("RGBA").save(folder / "c.PNG")
    picture.convert("P").save(folder / "d.png")
    picture.save(folder / "e.tif")
    picture.save(folder / "f.bmp")
    Image.fromarray(np.asarray(picture).astype(np.uint16) * 257).save(folder / "g.png")
    (folder / "notes.txt").write_text("no picture, and none claimed")
    result = script("predict.py", "scans", cwd=place)
    assert result.returncode == 0, result.stderr
    masks = {path.name[0]: np.asarray(Image.open(path)) for path in (place / "predictions").glob("*_mask.png")}
    assert set(masks) == set("abcdefg")
    for name in "cdefg":
        np.testing.assert_array_equal(masks[name], masks["b"], err_msg=name)
    assert overlap(masks["a"] > 0, masks["b"] > 0) > 0.9
    assert len(list((place / "predictions").glob("*_overlay.png"))) == 7
    again = script("predict.py", "predictions", "--output", "twice", cwd=place)  # ours are no inputs
    assert_refused(again, "no images")


def test_many_are_as_one(place):
    folder = place / "scans"
    folder.mkdir()
    for number in range(3 * 16 + 5):
        scan(40 + number, 50, number % 20, number % 15, 20).save(folder / f"{number:03}.png")
    result = script("predict.py", "scans", "--output", "all", cwd=place)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "foreground" in line]
    assert [line.split(":")[0] for line in said] == [f"scans/{number:03}.png" for number in range(len(said))] and len(said) == 53
    model = predict.load_model(place / "best_model.pth", "cpu")
    for number in (0, 17, 52):
        predict.predict_one(model, folder / f"{number:03}.png", place, 0.5, "cpu")
        np.testing.assert_array_equal(Image.open(place / f"{number:03}_mask.png"), Image.open(place / "all" / f"{number:03}_mask.png"))


def test_processes_share_a_folder(place):
    folder = place / "scans"
    folder.mkdir()
    for name in "abcde":
        scan(40, 40, 5, 5, 20).save(folder / f"{name}.png")
    said = [script("predict.py", "scans", cwd=place, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)).stdout for rank in (0, 1)]
    assert [sorted(line[6] for line in text.splitlines() if "foreground" in line) for text in said] == [["a", "c", "e"], ["b", "d"]]
    assert len(list((place / "predictions").glob("*_mask.png"))) == 5


def test_a_damaged_image_among_many_is_named_and_the_rest_done(place):
    folder = place / "scans"
    folder.mkdir()
    for name in "abc":
        scan(40, 40, 5, 5, 20).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    result = script("predict.py", "scans", cwd=place)
    assert_refused(result, "1 of 3", "b.png")
    assert {path.name for path in (place / "predictions").iterdir()} == {"a_mask.png", "a_overlay.png", "c_mask.png", "c_overlay.png"}


def test_nothing_named_takes_the_example(place):
    assert_refused(script("predict.py", cwd=place), "download.py")
    phantoms = place / "dataset" / "synthetic" / "test"
    phantoms.mkdir(parents=True)
    scan(64, 64, 10, 10, 20).save(phantoms / "9.png")
    result = script("predict.py", cwd=place)
    assert result.returncode == 0 and "taking dataset/synthetic/test/9.png" in result.stdout
    real = place / predict.EXAMPLE
    real.parent.mkdir()
    scan(64, 64, 10, 10, 20).save(real.parent / "1.jpg")
    assert "taking dataset/test/1.jpg" in script("predict.py", cwd=place).stdout
    scan(64, 64, 10, 10, 20).save(real)
    assert f"taking {predict.EXAMPLE}" in script("predict.py", cwd=place).stdout


# ---- refusals --------------------------------------------------------------------------------

class Evil:
    """Unpickled without care, it leaves a file behind."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def bad_models(folder):
    good = (folder / "best_model.pth").read_bytes()
    torch.save({"weights": Evil()}, folder / "code.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    (folder / "cut.pth").write_bytes(good[:len(good) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not weights")
    torch.save(torch.nn.Linear(3, 4).state_dict(), folder / "linear.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    return ("code", "pickle", "cut", "empty", "text", "linear", "list", "missing")


def test_bad_models(place, refused):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    for name in bad_models(place):
        refused("predict", "scan.png", "--model", f"{name}.pth", words=[f"{name}.pth"])
    assert not (place / "EXECUTED").exists() and not (place / "predictions.png").exists() and not (place / "scan_mask.png").exists()


def test_bad_input(place, refused):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    (place / "text.png").write_text("no picture")
    (place / "cut.png").write_bytes((place / "scan.png").read_bytes()[:70])
    (place / "empty").mkdir()
    (place / "other").mkdir()
    scan(64, 64, 10, 10, 20).save(place / "other" / "scan.jpg")
    before = sorted(place.rglob("*"))
    for arguments, word in {
        ("text.png",): "text.png", ("cut.png",): "cut.png", ("nothing.png",): "nothing.png", ("empty",): "empty",
        ("scan.png", "--threshold", 1.5): "--threshold", ("scan.png", "--threshold", -0.1): "--threshold",
        ("scan.png", "--threshold", "nan"): "--threshold", ("scan.png", "--output", "text.png"): "--output",
        ("scan.png", "other/scan.jpg"): "both", ("scan.png", "--device", "warp"): "warp", ("--frobnicate",): "--frobnicate",
    }.items():
        refused("predict", *arguments, words=[word])
    assert sorted(place.rglob("*")) == before


def test_the_command_itself_refuses_in_one_line(place):
    assert_refused(script("predict.py", "nothing.png", cwd=place), "predict.py: nothing.png")


def test_a_single_prediction_loads_no_more_than_it_needs(place):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    code = ("import sys, predict; predict.main(['scan.png', '--device', 'cpu'])\n"
            "print([name for name in ('torchvision', 'swanlab', 'kaggle', 'matplotlib.pyplot', 'pycocotools') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


# ---- scores of a folder with annotations -----------------------------------------------------

def random_masks(count, seed):
    """Blobs of many sizes, some empty: bool (count, 40, 40)."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 40, 40), bool)
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 3)):
            x, y, width, height = rng.integers(0, 25, 2).tolist() + rng.integers(1, 15, 2).tolist()
            mask[y:y + height, x:x + width] = True
    return masks


def test_hausdorff_by_hand_and_against_monai():
    from monai.metrics import compute_hausdorff_distance
    one, other = np.zeros((2, 9, 9), bool)
    one[4, 1], other[4, 5] = True, True
    assert predict.hausdorff95(one, other) == 4
    assert math.isnan(predict.hausdorff95(one, np.zeros((9, 9), bool)))
    for found, truth in zip(random_masks(20, 0)[1:], random_masks(20, 1)[1:]):
        wanted = compute_hausdorff_distance(*(torch.from_numpy(mask)[None, None] for mask in (found, truth)), include_background=True, percentile=95)
        assert predict.hausdorff95(found, truth) == pytest.approx(wanted.item(), abs=1e-5)


def test_scores_against_monai():
    from monai.metrics import compute_dice, compute_iou, get_confusion_matrix
    found, truth = random_masks(30, 2), random_masks(30, 3)
    counts = np.stack([(found & truth).sum((1, 2)), (found & ~truth).sum((1, 2)), (~found & truth).sum((1, 2)), (~found & ~truth).sum((1, 2))], 1)
    tensors = [torch.from_numpy(masks)[:, None].float() for masks in (found, truth)]
    np.testing.assert_allclose(predict.image_dice(counts)[1:], compute_dice(*tensors)[1:, 0], atol=1e-6)
    assert predict.image_dice(counts)[0] == 1  # both empty; MONAI leaves it undefined
    np.testing.assert_array_equal(get_confusion_matrix(*tensors)[:, 0].numpy(), counts[:, [0, 1, 3, 2]])
    pooled = [masks.reshape(1, 1, -1, 40) for masks in tensors]
    own = predict.scores(counts)
    assert own["dice"] == pytest.approx(compute_dice(*pooled).item(), abs=1e-6)
    assert own["iou"] == pytest.approx(compute_iou(*pooled).item(), abs=1e-6)
    low, high = predict.confidence(counts)["dice"]
    assert low < own["dice"] < high
    assert predict.confidence(np.repeat(counts[5:6], 9, 0))["dice"] == pytest.approx([predict.scores(counts[5:6])["dice"]] * 2)  # nothing to choose from


def test_a_folder_with_annotations_is_scored(place, dataset):
    """Against train.py's own test of the same weights, and by what report.json says of its own parts."""
    result = script("predict.py", dataset / "test", "--output", "scored", "--threshold", 0.3, cwd=place)
    assert result.returncode == 0, result.stderr
    found = json.loads((place / "scored" / "report.json").read_text())
    model = predict.load_model(place / "best_model.pth", "cpu")
    loader = data.Batches(data.load_split(dataset, "test", model.image_size), 2)
    scores = train.Scores("cpu")
    for images, masks in loader:
        scores.add(torch.zeros(()), predict.predict_probabilities(model, images, "cpu"), masks, threshold=0.3)
    wanted = scores.result()
    assert found["scores"] == pytest.approx({key: wanted[key] for key in found["scores"]}, abs=1e-9)
    assert set(found["per_image"]) == {f"{number}_test.png" for number in range(4)}
    assert np.mean(list(found["per_image"].values())) == pytest.approx(found["scores"]["image_dice"], abs=1e-4)
    assert sum(group["images"] for group in found["by_lesion_size"]) + found["no_lesion"]["images"] == 4
    assert found["hd95"]["left_out"] in range(5)
    assert Image.open(place / "scored" / "report.png").size[0] > 1000
    assert len(list((place / "scored").glob("*_mask.png"))) == 4  # and all is predicted as in any folder


def test_the_threshold_is_chosen_on_valid_alone(place, dataset):
    """Test images are replaced by others: what is chosen stays; valid is: it follows. Without valid, none is chosen."""
    model = predict.load_model(place / "best_model.pth", "cpu")

    def choose():
        return predict.report(model, dataset / "test", place, 0.5, "cpu")["valid"]

    first = choose()
    rows = data.load_split(dataset, "valid", model.image_size)
    counts, _ = predict.count_pixels(model, rows, first["thresholds"], "cpu")
    dice = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn, _ in counts.sum(0).tolist()]
    assert first["dice"] == pytest.approx(dice) and first["chosen_threshold"] == first["thresholds"][int(np.argmax(dice))]
    edit_annotations(dataset / "test", lambda content: content["annotations"].clear())
    second = choose()
    assert (second["dice"], second["chosen_threshold"]) == (first["dice"], first["chosen_threshold"])
    edit_annotations(dataset / "valid", lambda content: content["annotations"].clear())
    assert choose()["dice"] != first["dice"]
    shutil.rmtree(dataset / "valid")
    assert choose() is None
