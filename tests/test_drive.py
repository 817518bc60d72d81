"""tools/drive.py: its scores against pairs counted one by one, and against predict.py's masks."""

import numpy as np
import pytest
import torch
from drive import measure, roc_auc, scores_at
from PIL import Image

import predict
from medseg.inference import full_size_masks
from medseg.predictor import Predictor
from net import UNet


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    values, targets = rng.integers(0, 20, 300) / 20, rng.random(300) > 0.7
    above = values[targets][:, None] > values[~targets]
    equal = values[targets][:, None] == values[~targets]
    assert roc_auc(values, targets) == pytest.approx((above + equal / 2).mean())
    assert roc_auc(np.array([0.1, 0.2, 0.9]), np.array([False, False, True])) == 1


def test_scores_by_hand():
    probabilities = np.array([0.9, 0.8, 0.2, 0.7, 0.1, 0.3])
    targets = np.array([True, True, True, False, False, False])
    scores = scores_at(probabilities, targets, 0.5)  # two hits, a miss, a false alarm
    assert scores == {
        "dice": pytest.approx(4 / 6),
        "sensitivity": pytest.approx(2 / 3),
        "specificity": pytest.approx(2 / 3),
        "accuracy": pytest.approx(4 / 6),
    }


@pytest.mark.parametrize("image_size", [None, 32])
def test_a_folder_as_published(image_size, tmp_path):
    rng, inside = np.random.default_rng(1), np.zeros((30, 40), bool)
    pixels = rng.integers(0, 255, (2, 30, 40, 3), dtype=np.uint8)
    targets, inside[5:25, 5:35] = rng.random((2, 30, 40)) > 0.8, True
    for name in ("images", "1st_manual", "mask"):
        (tmp_path / name).mkdir()
    for number in range(2):
        Image.fromarray(pixels[number]).save(tmp_path / "images" / f"0{number}_test.tif")
        Image.fromarray(targets[number]).save(tmp_path / "1st_manual" / f"0{number}_manual1.gif")
        Image.fromarray(inside).save(tmp_path / "mask" / f"0{number}_test_mask.gif")
    torch.manual_seed(0)
    model = UNet(n_filters=2, depth=2, image_size=image_size).eval()
    torch.nn.init.normal_(model.outc.weight, std=3.0)
    result, preds = measure(tmp_path, model, 0.5), []

    for path in sorted((tmp_path / "images").iterdir()):
        tensor, _ = predict.preprocess_image(path, image_size=image_size)
        probabilities = Predictor([model], "cpu")(tensor)[0].numpy()
        preds.append(full_size_masks(probabilities, (40, 30), 0.5) > 0)
    preds = np.stack(preds)
    parts = {
        "whole image": (preds, targets),
        "field of view": (preds[:, inside], targets[:, inside]),
    }
    for name, (pred, target) in parts.items():
        dice = 2 * (pred & target).sum() / (pred.sum() + target.sum())
        assert 0 < dice < 1 and result[name]["dice"] == pytest.approx(dice)
        assert result[name]["specificity"] == pytest.approx((~pred)[~target].mean())
