"""--init: a training that starts from the weights of another, whose network it takes."""

from pathlib import Path

import pytest
import torch
from helpers import make_dataset, set_classes

import train
from medseg.pretrained import PRETRAINED
from medseg.weights import load_weights
from net import UNet, load_model

pytestmark = pytest.mark.usefixtures("no_pictures")
QUICK = ("--batch-size", "2", "--swanlab", "disabled", "--device", "cpu")
VESSELS = {"depth": 4, "norm": "batch", "up": "bilinear", "dropout": "none"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a data set of two categories; the current one."""
    root = make_dataset(tmp_path / "dataset")
    for split in ("train", "valid", "test"):
        set_classes(root / split, ["core", "edge"], lambda number: 1 + number % 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_weights(path, n_classes=1, **arguments):
    torch.manual_seed(7)
    model = UNet(3, n_classes, 3, image_size=64, **arguments)
    torch.save(model.state_dict(), path)
    return model.state_dict()


def run(*flags):
    """A training of one epoch whose steps change nothing: its last.pth holds what it began with."""
    train.main([*QUICK, "--epochs", "1", "--lr", "0", *map(str, flags)])
    return torch.load("last.pth", weights_only=True)


def test_it_takes_network_size_and_weights(here):
    before = write_weights("first.pth", **VESSELS)
    saved = run("--init", "first.pth", "--prior", 0.3)
    for name, weight in before.items():
        if "running" not in name and "num_batches" not in name:  # these follow the images
            assert torch.equal(saved["model"][name], weight), name
    flags = saved["flags"]
    expected = {"arch": "drive", "norm": "batch", "n_filters": 3, "image_size": 64}
    assert {name: flags[name] for name in expected} == expected
    assert flags["init"] == "first.pth"
    assert load_model("best_model.pth").architecture.depth == 4


def test_it_starts_from_the_weights_of_the_repository(here):
    saved = run("--init", PRETRAINED)
    first = load_weights(PRETRAINED)["down1.conv1.weight"]
    assert first.dtype == torch.float16
    assert torch.equal(saved["model"]["down1.conv1.weight"], first.float())
    assert (saved["flags"]["n_filters"], saved["flags"]["image_size"]) == (8, 128)


def test_a_head_of_other_classes_starts_anew(here, capsys):
    before = write_weights("first.pth")
    saved = run("--init", "first.pth", "--classes", "each", "--image-size", 32, "--prior", 0.3)
    assert "the last layer starts anew: its classes are core, edge" in capsys.readouterr().out
    assert saved["model"]["outc.weight"].shape == (2, 3, 1, 1)
    assert saved["model"]["outc.bias"].sigmoid().tolist() == pytest.approx([0.3, 0.3])
    assert torch.equal(saved["model"]["up5.conv2.weight"], before["up5.conv2.weight"])
    # From weights of the same two classes it keeps the head.
    Path("best_model.pth").rename("second.pth")
    second = torch.load("second.pth", weights_only=True)
    saved = run("--init", "second.pth", "--classes", "each", "--overwrite", "--prior", 0.1)
    assert torch.equal(saved["model"]["outc.bias"], second["outc.bias"])


def test_a_head_of_as_many_classes_by_other_names_or_in_another_order_starts_anew(here, capsys):
    said = "the last layer starts anew"
    for names in (["cyst", "edge"], ["edge", "core"]):
        first = write_weights("first.pth", 2, class_names=names)
        flags = ("--classes", "each", "--image-size", 32, "--prior", 0.3, "--overwrite")
        saved = run("--init", "first.pth", *flags)["model"]
        assert said in capsys.readouterr().out
        assert saved["outc.bias"].sigmoid().tolist() == pytest.approx([0.3, 0.3])
        assert not torch.equal(saved["outc.weight"], first["outc.weight"])
        assert torch.equal(saved["up5.conv2.weight"], first["up5.conv2.weight"])
    # The only class of each is the same thing under two names, as tumour and foreground.
    first = write_weights("first.pth", class_names=["tumour"])
    saved = run("--init", "first.pth", "--image-size", 32, "--overwrite")["model"]
    assert said not in capsys.readouterr().out
    assert torch.equal(saved["outc.weight"], first["outc.weight"])
    assert load_model("best_model.pth").info.class_names == ("foreground",)


def test_a_resumed_run_needs_the_first_weights_no_more(here):
    write_weights("first.pth")
    run("--init", "first.pth", "--image-size", 32)
    Path("first.pth").unlink()
    train.main([*QUICK, "--resume", "--epochs", "2"])
    saved = torch.load("last.pth", weights_only=True)
    assert saved["flags"]["init"] == "first.pth" and len(saved["progress"]["history"]) == 2


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--n-filters", 8), ["--n-filters 3, not 8", "leave --n-filters away"]),
        (("--norm", "batch"), ["--norm none, not batch"]),
        (("--arch", "study"), ["--arch tutorial, not study"]),
        (("--depth", 4), ["--depth 5, not 4"]),
        (("--n-channels", 1), ["--n-channels 3, not 1"]),
    ],
)
def test_flags_that_contradict_the_weights(flags, words, refused, tmp_path):
    write_weights(tmp_path / "first.pth")
    refused("train", "--init", "first.pth", *flags, words=["first.pth", *words])


def test_a_recipe_gives_way_to_the_network_of_the_weights(here, capsys):
    write_weights("first.pth")
    run("--init", "first.pth", "--recipe", "strong", "--image-size", 32)
    assert "recipe strong: --norm none" in capsys.readouterr().out  # as test_flags has it


def test_with_crops_images_keep_their_own_size_whatever_the_weights_had(here):
    write_weights("first.pth", depth=2)
    saved = run("--init", "first.pth", "--crop", 32)
    assert saved["flags"]["crop"] == 32 and load_model("best_model.pth").info.image_size is None


def test_files_that_are_no_weights(refused, tmp_path):
    refused("train", "--init", "missing.pth", words=["missing.pth", "no such file"])
    (tmp_path / "text.pth").write_text("weights")
    refused("train", "--init", "text.pth", words=["text.pth", "not saved by PyTorch"])
    write_weights(tmp_path / "odd.pth", up="nearest")
    refused("train", "--init", "odd.pth", words=["odd.pth", "none that --arch has a name for"])
