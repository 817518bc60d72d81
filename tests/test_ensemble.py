"""Several models as one: the mean of their probabilities, and which models go together."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SIZE,
    brightness_model,
    make_dataset,
    output_of,
    photo,
    scan,
    tree,
    write_nifti,
)
from PIL import Image

import predict
from medseg.images import preprocess
from medseg.inference import FLIPS, Inference
from medseg.predicting.ensemble import Ensemble
from medseg.predicting.models import Model
from net import UNet, load_model


def constant_model(probability, **options):
    """A UNet of random weights but for the last layer, which answers one probability."""
    model = UNet(n_filters=2, image_size=32, **options)
    with torch.no_grad():
        model.outc.weight.zero_()
        model.outc.bias.fill_(math.log(probability / (1 - probability)))
    return model


def save(model, path):
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture
def place(here):
    """The current folder, with three models and an image.

    bright.pth: near 1 where a pixel is bright, near 0 elsewhere. often.pth: 0.9 everywhere;
    seldom.pth: 0.2.
    """
    save(brightness_model(), "bright.pth")
    save(constant_model(0.9), "often.pth")
    save(constant_model(0.2), "seldom.pth")
    scan(40, 40, 5, 5, 20).save("scan.png")
    return here


def test_the_mean_of_the_probabilities(place):
    paths = ["bright.pth", "often.pth", "seldom.pth"]
    model = predict.open_models(paths, "cpu", "fp32", 0)
    image = Image.open("scan.png").convert("RGB")
    single = [predict.open_model(path, "cpu").predict(image) for path in paths]
    assert single[1] == pytest.approx(0.9) and single[2] == pytest.approx(0.2)
    np.testing.assert_allclose(model.predict(image), np.mean(single, 0), atol=1e-6)
    # What a report asks for: a normalised batch.
    images, _ = predict.preprocess_image(image, image_size=32)
    assert model.run(images).shape == (1, 1, 32, 32)
    np.testing.assert_allclose(model.run(images)[0], np.mean(single, 0), atol=1e-6)


ORDERS = {
    "before": ("--model", "often.pth", "seldom.pth", "scan.png"),
    "after": ("scan.png", "--model", "often.pth", "seldom.pth"),
    "between": ("--model", "often.pth", "seldom.pth", "--device", "cpu", "scan.png"),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_models_and_images_are_told_apart_in_any_order(order, place):
    said = output_of("predict.py", *order, cwd=place)
    assert "2 models" in said and "highest probability 0.550" in said  # (0.9 + 0.2) / 2
    assert np.asarray(Image.open("scan_mask.png")).all()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "often.pth", "scan.png"),
        ("--model=often.pth", "scan.png"),
        ("scan.png", "--model", "often.pth"),
        ("--model", "weights", "scan.png"),  # whatever it is called
        ("--model", "weights", "--output", ".", "scan.png"),
        ("--output", ".", "--model", "weights", "--", "scan.png"),
    ],
)
def test_one_model_is_named_as_before(arguments, place):
    shutil.copy2("often.pth", "weights")
    said = output_of("predict.py", *arguments, cwd=place)
    assert "highest probability 0.900" in said and "no image named" not in said


def test_several_images_after_several_models(place):
    shutil.copy2("scan.png", "other.png")
    models, masks = ("--model", "often.pth", "seldom.pth"), {"scan_mask.png", "other_mask.png"}
    for folder, inputs in {
        "after": (*models, "scan.png", "other.png"),
        "around": ("scan.png", *models, "other.png"),
    }.items():
        output_of("predict.py", *inputs, "--output", folder, cwd=place)
        assert {path.name for path in Path(folder).glob("*.png")} == masks


def test_a_folder_is_scored_as_its_masks_are_written(place):
    """The mean of p, 0.9 and 0.2 is above 0.5 where p is above 0.4."""
    make_dataset(Path("dataset"))
    flags = ("dataset/test", "--device", "cpu", "--output")
    one = (*flags, "one", "--model", "bright.pth", "--threshold", 0.4)
    output_of("predict.py", *one, cwd=place)
    output_of("predict.py", *flags, "all", "--model", *sorted(Path().glob("*.pth")), cwd=place)
    alone, together = (json.loads(Path(name, "report.json").read_text()) for name in ("one", "all"))
    assert together["scores"] == alone["scores"] and alone["scores"]["dice"] > 0.9
    dice = together["valid"]["dice"]  # at 0.05, 0.1, ...: at 0.5 as bright's at 0.4
    assert dice[9] == alone["valid"]["dice"][7] and dice[0] < 0.5
    for name in ("0_test_mask.png", "3_test_mask.png"):
        one, other = (np.asarray(Image.open(Path(name_of, name))) for name_of in ("one", "all"))
        np.testing.assert_array_equal(one, other)


def test_a_volume(place):
    voxels = np.full((40, 40, 3), 20, np.uint8)
    voxels[5:25, 5:25] = 235
    write_nifti("brain.nii.gz", voxels)
    models = ("--model", "often.pth", "seldom.pth")
    said = output_of("predict.py", "brain.nii.gz", *models, cwd=place)
    assert "highest probability 0.550" in said and Path("brain_mask.nii.gz").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_each_member_averages_over_the_flips(place, first):
    torch.manual_seed(0)
    paths, alone = ["a.pth", "b.pth"], []
    image = photo(0, (32, 32))
    for path in paths:
        network = UNet(n_filters=2, image_size=32)
        network.inference = Inference(flips=tuple(FLIPS))
        alone.append(predict.open_model(save(network, path), "cpu", "fp32").predict(image))
    both = predict.open_models(paths[:: 1 - 2 * first], "cpu", "fp32", 0)
    np.testing.assert_allclose(both.predict(image), np.mean(alone, 0), atol=1e-6)
    both.inference = Inference()
    assert abs(both.predict(image) - np.mean(alone, 0)).max() > 1e-3


@pytest.mark.parametrize("thresholds, marked", [((0.2, 0.8), True), ((0.4, 0.8), False)])
@pytest.mark.parametrize("order", [1, -1])
def test_the_threshold_is_the_mean_of_those_of_all(place, thresholds, marked, order):
    """The mean probability is 0.55."""
    for path, threshold in zip(("often.pth", "seldom.pth"), thresholds, strict=True):
        network = load_model(path)
        network.inference = Inference(threshold, clean=("largest" if threshold == 0.8 else "none"))
        save(network, path)
    shutil.copy2("scan.png", "other.png")
    models = ("--model", *["often.pth", "seldom.pth"][::order], "--output", "out")
    output_of("predict.py", "scan.png", "other.png", *models, cwd=place)
    assert np.asarray(Image.open("out/scan_mask.png")).any() == marked
    settings = json.loads(Path("out/predictions.json").read_text())
    assert settings["threshold"] == pytest.approx(sum(thresholds) / 2)
    assert settings["clean"] == "none"  # as not all chose one


def test_flips_that_not_all_were_trained_with_are_no_flips_of_the_training(place):
    models = [predict.open_model(path, "cpu", "fp32") for path in ("often.pth", "seldom.pth")]
    models[0].trained_flips = ("horizontal",)
    for members in (models, models[::-1]):
        assert Ensemble(members, ["a.pth", "b.pth"]).trained_flips == ()
    models[1].trained_flips = ("horizontal",)
    assert Ensemble(models, ["a.pth", "b.pth"]).trained_flips == ("horizontal",)


# ---- which go together -----------------------------------------------------------------------

OTHERS = {
    "size": ({"image_size": 64}, ["image size 64", "32"]),
    "none": ({"image_size": None}, ["image size none", "32"]),
    "grey": ({"n_channels": 1}, ["channels 1", "3"]),
    "classes": ({"n_classes": 2, "class_names": ("a", "b")}, ["classes a, b", "foreground"]),
    "window": ({"window": (40.0, 80.0)}, ["window 40", "none"]),
    "turned": ({"orientation": "LPS"}, ["orientation LPS"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_differ_are_refused_by_name(name, place, refused):
    options, words = OTHERS[name]
    save(UNet(n_filters=2, **{"image_size": 32} | options), f"{name}.pth")
    before = tree(".")
    models = ("--model", "often.pth", f"{name}.pth")
    refused("predict", "scan.png", *models, words=[f"{name}.pth", "often.pth", *words])
    assert tree(".") == before


def test_other_wrong_use(place, refused):
    models = ("--model", "often.pth", "seldom.pth")
    refused("predict", "--export", "m.onnx", *models, words=["--export m.onnx", "--model"])
    refused("predict", "scan.png", "--model", "often.pth", "gone.pth", words=["gone.pth"])
    refused("predict", "--model", "often.pth", "gone.png", words=["gone.png"])
    refused("predict", "--model", words=["--model"])
    assert not Path("m.onnx").exists()


class Half(Model):
    """Stands for an ONNX model, which is on the CPU and knows nothing of PyTorch."""

    device, precision, precision_note = "cpu", "fp32", ""

    def probabilities(self, pixels):
        return self.run(pixels.transpose(0, 3, 1, 2))

    def run(self, images):
        return np.full((len(images), 1, *images.shape[2:]), 0.5, np.float32)


def test_the_precision_of_weights_is_found_once(place, monkeypatch):
    """By a timing, which would not come out the same for each of them."""
    asked, weights = [], predict.open_model("often.pth", "cpu")

    def open_model(path, device, precision, *, images):
        asked.append((path, precision))
        model = Half(weights, device)
        if path.endswith(".pth"):
            found = "bf16" if precision == "auto" else precision
            model.precision, model.precision_note = found, " (timed)" * (precision == "auto")
        return model

    monkeypatch.setattr(predict, "open_model", open_model)
    model = predict.open_models(["a.onnx", "b.pth", "c.ONNX", "d.pth"], "cpu", "auto", 9)
    assert asked == [("a.onnx", "auto"), ("b.pth", "auto"), ("c.ONNX", "auto"), ("d.pth", "bf16")]
    assert (model.precision, model.precision_note) == ("bf16", " (timed)")


def test_weights_and_other_kinds_of_models_are_mixed(place):
    weights = predict.open_model("often.pth", "cpu")
    model = Ensemble([Half(weights, "cpu"), weights], ["half", "often.pth"])
    pixels = preprocess(Image.new("RGB", (SIZE, SIZE)), 32)[None]
    assert model.probabilities(pixels) == pytest.approx(0.7)
    assert model.device == "cpu" and model.batch_size == 4
