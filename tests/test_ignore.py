"""Pixels that nobody annotated: they count in no loss and in no score."""

import json

import numpy as np
import pytest
import torch
from helpers import SIZE, brightness_model, edit_annotations, output_of, square
from PIL import Image

from data import load_split, open_split
from medseg.batches import Batches, Order, Transform
from medseg.coco import SPLITS
from medseg.metrics import RunningScores
from medseg.predicting.report import surface_scores
from train import combined_loss

PLACE = np.s_[8:30, 4:28]  # rows and columns that nobody annotated; some hide tumours


@pytest.fixture
def ignoring(dataset):
    for split in SPLITS:
        edit_annotations(dataset / split, add_ignored)
    return dataset


def add_ignored(content):
    """Add the polygon of PLACE as the category `ignore` to every image but the first."""
    content["categories"].append({"id": 7, "name": "ignore"})
    for image in content["images"][1:]:
        outline = {"segmentation": [[4, 8, 28, 8, 28, 30, 4, 30]], "iscrowd": 0}
        one = {"id": 900 + image["id"], "image_id": image["id"], "category_id": 7, **outline}
        content["annotations"].append(one)


def deal_classes(content, count):
    """Give the tumours the classes 100, 101, ... in turn."""
    content["categories"] += [{"id": 100 + n, "name": f"c{n}"} for n in range(count)]
    tumours = [one for one in content["annotations"] if one["category_id"] != 7]
    for index, one in enumerate(tumours):
        one["category_id"] = 100 + index % count
    for index in range(count):  # all classes have an annotation: a pixel
        one = {"id": 5000 + index, "image_id": 0, "category_id": 100 + index, "iscrowd": 0}
        content["annotations"].append({**one, "segmentation": square(40, 40, 1)})


@pytest.mark.parametrize("count", [1, 8])  # after eight classes it has a byte of its own
@pytest.mark.parametrize("crop", [0, SIZE])
def test_masks_are_minus_one_there(ignoring, count, crop):
    names = [f"c{number}" for number in range(count)] if count > 1 else None
    if names:
        edit_annotations(ignoring / "train", lambda content: deal_classes(content, count))
    side = None if crop else SIZE
    dataset = open_split(ignoring, "train", side, classes=names)
    rows = load_split(ignoring, "train", side, classes=names)
    change = Transform(3, count, crop=crop)
    ((_, masks),) = Batches(rows, Order(len(rows)), transform=change)
    assert len(masks) == 6
    for index, mask in enumerate(masks.numpy()):
        _, own = dataset.load(index)
        truth, known = np.stack([*dataset.true_masks(index)]), np.ones((SIZE, SIZE), bool)
        known[PLACE] = index == 0
        assert (mask == own).all() and (own == dataset[index][1].numpy()).all()
        assert ((own == -1) == ~known).all() and (truth == (own == 1)).all()
        x, y, *_ = dataset.coco.imgToAnns[index][0]["segmentation"][0]
        tumour = np.zeros((SIZE, SIZE), bool)
        tumour[y : y + 16, x : x + 16] = True
        assert (own[index % count][known] == tumour[known]).sum() >= known.sum() - 1  # the pixel


def test_crops_do_not_hold_it_as_foreground(ignoring):
    rows = load_split(ignoring, "train", None)
    order = Order(6, foreground=1.0, shuffle=True)
    batches = Batches(rows, order, transform=Transform(crop=8))
    for epoch in range(3):
        batches.set_epoch(epoch)
        for _, masks in batches:
            assert ((masks == 1).sum((1, 2, 3)) > 0).all()


def test_loss_and_scores_are_those_of_the_other_pixels():
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(4, 2, 9, 7, generator=generator).requires_grad_()
    target = (torch.rand(4, 2, 9, 7, generator=generator) > 0.6).float()
    known = torch.rand(4, 1, 9, 7, generator=generator).expand_as(pred) > 0.3
    marked = target.where(known, torch.tensor(-1.0))
    for weights in ({"dice": 0.6, "bce": 0.4}, {"focal": 1.0, "dice": 0.5}):
        pred.grad = None
        loss = combined_loss(pred, marked, weights)
        loss.backward()
        torch.testing.assert_close(loss, combined_loss(pred[known], target[known], weights))
        assert (pred.grad[~known] == 0).all() and (pred.grad[known] != 0).all()
    scores = RunningScores("cpu", ("a", "b"))
    scores.add(loss.detach(), pred.detach(), marked)
    for index, name in enumerate("ab"):
        own = known[:, index]
        right, true = pred[:, index][own] > 0.5, target[:, index][own] > 0.5
        dice = 2 * (right & true).sum() / (right.sum() + true.sum())
        assert scores.result()[f"dice/{name}"] == pytest.approx(dice.item())
        assert scores.result()[f"acc/{name}"] == pytest.approx((right == true).float().mean())


@pytest.mark.parametrize("clean", [(), ("--clean", "min-area=3")])
def test_report_leaves_it_out(ignoring, tmp_path, clean, monkeypatch):
    monkeypatch.setattr("medseg.predicting.report.plot_report", lambda *_: None)
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    # At 0.02 some of what is dark is foreground too.
    how = ("--threshold", 0.02, "--output", "out", *clean)
    output_of("predict.py", ignoring / "test", *how, cwd=tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    dataset, counts, surfaces = open_split(ignoring, "test"), np.zeros(3), []
    for index in range(len(dataset)):
        known = np.ones((SIZE, SIZE), bool)
        known[PLACE] = index == 0
        mask = tmp_path / "out" / f"{dataset.path(index).stem}_mask.png"
        pred, target = np.asarray(Image.open(mask)) > 0, dataset.load(index)[1][0] > 0
        surfaces.append(surface_scores(pred & known, target))
        pred, target = pred[known], target[known]
        counts += (pred & target).sum(), (pred | target).sum(), (pred == target).mean()
    assert report["scores"]["iou"] == pytest.approx(counts[0] / counts[1])
    assert report["surface_dice"]["mean"] == pytest.approx(np.nanmean(surfaces, 0)[1])
    sizes = [SIZE**2, *[SIZE**2 - 22 * 24] * 3]
    pixels = report["calibration"]["classes"]["foreground"]["pixels"]
    assert abs(sum(pixels) / (32 / SIZE) ** 2 - sum(sizes)) < 0.05 * sum(sizes)
