"""--init: a training that starts from the weights of another, whose network it takes."""

from pathlib import Path

import pytest
import torch
from helpers import SMALL, set_classes

import train
from medseg.weights import PRETRAINED, load_weights
from net import UNet, load_model

pytestmark = pytest.mark.usefixtures("no_pictures")
QUICK = [str(flag) for flag in SMALL[4:]]
VESSELS = {"depth": 4, "norm": "batch", "up": "bilinear", "dropout": "none"}


def write_weights(path, n_classes=1, **arguments):
    torch.manual_seed(7)
    model = UNet(3, n_classes, 3, image_size=64, **arguments)
    torch.save(model.state_dict(), path)
    return model.state_dict()


@pytest.fixture
def run(dataset, here):
    """run(*flags): a training of one epoch at a rate of 0; what last.pth has is where it began."""
    for split in ("train", "valid", "test"):
        set_classes(dataset / split, ["core", "edge"], lambda number: 1 + number % 2)

    def train_one(*flags):
        train.main([*QUICK, "--epochs", "1", "--lr", "0", "--overwrite", *map(str, flags)])
        return load_weights("last.pth")

    return train_one


def test_it_takes_network_size_and_weights(run):
    before = write_weights("first.pth", **VESSELS)
    saved = run("--init", "first.pth", "--prior", 0.3)
    for name, weight in before.items():
        if "running" not in name and "num_batches" not in name:  # these follow the images
            assert torch.equal(saved["model"][name], weight), name
    expected = {"arch": "drive", "norm": "batch", "n_filters": 3, "image_size": 64}
    assert expected.items() <= saved["flags"].items()
    assert load_model("best_model.pth").architecture.depth == 4
    # A resumed run needs the first weights no more.
    Path("first.pth").unlink()
    train.main([*QUICK, "--resume", "--epochs", "2"])
    saved = load_weights("last.pth")
    assert saved["flags"]["init"] == "first.pth" and len(saved["progress"]["history"]) == 2
    # With crops images keep their own size, whatever the weights had.
    write_weights("first.pth", depth=2)
    run("--init", "first.pth", "--crop", 32)
    assert load_model("best_model.pth").info.image_size is None


def test_it_starts_from_the_weights_of_the_repository(run):
    saved = run("--init", PRETRAINED)
    first = load_weights(PRETRAINED)["down1.conv1.weight"]  # in float16
    assert torch.equal(saved["model"]["down1.conv1.weight"], first.float())
    assert (saved["flags"]["n_filters"], saved["flags"]["image_size"]) == (8, 128)


@pytest.mark.parametrize(
    "names, flags, kept",
    [
        (None, ("--classes", "each"), False),  # of one class
        (["edge", "core"], ("--classes", "each"), False),  # in another order
        (["core", "edge"], ("--classes", "each"), True),
        (["tumour"], (), True),  # the only class of each is the same thing under two names
    ],
)
def test_a_head_of_other_classes_starts_anew(names, flags, kept, run, capsys):
    first = write_weights("first.pth", len(names or "1"), class_names=names)
    saved = run("--init", "first.pth", "--image-size", 32, "--prior", 0.3, *flags)["model"]
    assert ("starts anew" in capsys.readouterr().out) != kept
    assert torch.equal(saved["up5.conv2.weight"], first["up5.conv2.weight"])
    if kept:
        assert torch.equal(saved["outc.weight"], first["outc.weight"])
        assert torch.equal(saved["outc.bias"], first["outc.bias"])
    else:
        assert saved["outc.bias"].sigmoid().tolist() == pytest.approx([0.3, 0.3])
    expected = ("core", "edge") if flags else ("foreground",)
    assert load_model("best_model.pth").info.class_names == expected


def test_files_that_are_no_weights(refused, tmp_path):
    (tmp_path / "text.pth").write_text("weights")
    write_weights(tmp_path / "odd.pth", up="nearest")
    for name in ("missing.pth", "text.pth", "odd.pth"):
        refused("train", "--init", name, words=[name])
