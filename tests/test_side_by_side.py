"""tools/side_by_side.py: the tutorial's text at another size, its masks, the curves of both."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import side_by_side
import torch
import torch.nn.functional as F
from PIL import Image

from data import open_split
from net import UNet

PROGRAM = {
    "net.py": "",
    "data.py": "mask = F.interpolate(mask, size=(256, 256))\n",
    "train.py": "transforms.Resize((256, 256))\nUNet(n_filters=32)\n    # Test set evaluation\n",
}


@pytest.fixture
def args(tmp_path, dataset):
    (tmp_path / "tutorial").mkdir()
    for name, text in PROGRAM.items():
        (tmp_path / "tutorial" / name).write_text(text)
    return SimpleNamespace(data=dataset, image_size=24, n_filters=4, out=tmp_path / "out")


def test_of_the_tutorials_text_only_the_sizes_change(tmp_path, args):
    target = tmp_path / "laid"
    changed = side_by_side.lay_out_tutorial(tmp_path / "tutorial", target, args)
    assert (target / "data.py").read_text() == PROGRAM["data.py"].replace("256", "24")
    text = (target / "train.py").read_text().splitlines()
    assert text[:2] == ["transforms.Resize((24, 24))", "UNet(n_filters=4)"]
    assert "last_model.pth" in text[2] and text[3:] == ["    # Test set evaluation"]
    assert len(changed) == 2 + 2 * 2 + 1 and (target / "dataset" / "train").exists()
    (tmp_path / "tutorial" / "train.py").write_text(2 * PROGRAM["train.py"])
    with pytest.raises(ValueError, match=r"train\.py"):
        side_by_side.lay_out_tutorial(tmp_path / "tutorial", tmp_path / "again", args)


def test_the_tutorials_masks_are_those_of_its_resizing(args):
    """Its prose: nearest, which is what F.interpolate does; ours are those of the data set."""
    images, masks = side_by_side.read_test_images(args)
    full = open_split(args.data, "test", None)
    for index in range(len(full)):
        _, own = full.load(index)
        expected = F.interpolate(torch.from_numpy(own)[None].float(), size=(24, 24))[0]
        assert torch.equal(masks["the tutorial's"][index], expected)
    assert images.shape == (len(full), 3, 24, 24) and not torch.equal(*masks.values())


def test_the_curves_of_both_are_drawn(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir(), ours.mkdir()
    logged = [{"step": n, "train/loss": 1 / n, "val/loss": 2 / n} for n in (1, 2)]
    for row in logged:
        row.update({"train/acc": 0.9, "val/acc": 0.95})
    lines = ["Epoch 1", *(f"TUTORIAL {json.dumps(row)}" for row in logged)]
    lines.append('TUTORIAL {"step": null, "test/loss": 0.5}')
    (theirs / "log").write_text("\n".join(lines))
    (ours / "metrics.csv").write_text("epoch,train_loss,val_loss,train_acc,val_acc\n1,3,4,5,6\n")
    assert side_by_side.read_curves(theirs)["val_loss"] == [2, 1]
    assert side_by_side.read_curves(ours)["val_acc"] == [6]
    path = side_by_side.draw([(theirs, ours)], tmp_path / "curves.png", "title")
    assert np.asarray(Image.open(path)).std() > 10


def test_scores_of_weights_by_hand(tmp_path):
    model = UNet(n_filters=2, image_size=8)
    torch.save(model.state_dict(), tmp_path / "best_model.pth")
    assert side_by_side.read_weights(tmp_path, "best").n_filters == 2
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, 0, :4] = 1
    halves = torch.zeros(3, 1, 8, 8)
    halves[0, 0, :2] = 1  # of 32 pixels 16: Dice 2 x 16 / (16 + 32)
    model.forward = lambda images: images
    dice, accuracy = side_by_side.scores_of(model, halves, masks)
    assert dice == pytest.approx(2 / 3) and accuracy == pytest.approx(1 - 16 / 192)
