"""What a run may replace: what an earlier run of ours wrote, and nothing of a user's."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    assert_done,
    brightness_model,
    make_dataset,
    scan,
    script_here,
    write_nifti,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FOLDER = ("dataset/test", "--output", "out")
TRAIN = ("--epochs", 1, *SMALL, "--skip-bad", "--overwrite", "--out", "run")
WRITTEN = {  # file: (the command that writes it)
    "x_mask.png": ("predict", "x.png"),
    "mask.png": ("predict", "x.png", "--output", "mask.png"),
    "out/0_test_overlay.jpg": ("predict", *FOLDER),
    "out/predictions.csv": ("predict", *FOLDER),
    "out/predictions.json": ("predict", *FOLDER),
    "out/predictions.coco.json": ("predict", *FOLDER, "--write", "coco"),
    "out/report.json": ("predict", *FOLDER),
    "brain_mask.nii.gz": ("predict", "brain.nii.gz"),
    "run/metrics.csv": ("train", *TRAIN),
    "run/predictions.png": ("train", *TRAIN),
    "run/skipped.txt": ("train", *TRAIN),
    "contact_sheet.jpg": ("data",),
    "model.onnx": ("predict", "--export", "model.onnx"),
}


@pytest.fixture
def users_place(here):
    """best_model.pth, x.png, brain.nii.gz, and dataset/ with a damaged image."""
    torch.save(brightness_model(32).state_dict(), "best_model.pth")
    scan(40, 36, 5, 5, 20).save("x.png")
    voxels = np.zeros((20, 18, 3), np.int16)
    voxels[2:15, 4:9, 1] = 900
    write_nifti("brain.nii.gz", voxels, np.eye(4))
    make_dataset(here / "dataset")
    return here


def users_file(path):
    """Make a file that some other program could have written."""
    path.parent.mkdir(exist_ok=True)
    if ".nii" in path.name:
        write_nifti(path, np.ones((20, 20, 3), np.uint8), np.eye(4))
    elif path.suffix in (".png", ".jpg"):
        Image.new("L", (40, 36), 255).save(path)
    else:
        path.write_text('{"folder": "mine"}')


@pytest.mark.parametrize(
    "name",
    [pytest.param(own, marks=[pytest.mark.slow] * own.endswith(".onnx")) for own in WRITTEN],
)
def test_what_we_write_replaces_ours_alone(users_place, refused, name):
    (command, *flags), path = WRITTEN[name], Path(name)
    if command == "train":
        Path("dataset/train/0_train.png").write_bytes(b"damaged")
    users_file(path)
    content, before = path.read_bytes(), set(users_place.rglob("*"))
    refused(command, *flags, words=[name])
    assert path.read_bytes() == content
    assert {own for own in users_place.rglob("*") if ".cache" not in own.parts} == before
    path.unlink()
    for _ in range(2):  # the second time over our own
        assert_done(script_here(f"{command}.py", *flags, cwd=users_place))
    assert path.read_bytes() != content


@pytest.mark.parametrize("name", ["x_mask.png", "x_prediction.png", "brain_mask.nii.gz"])
def test_a_prediction_that_was_corrected_is_the_users(users_place, refused, name):
    source = "x.png" if name.startswith("x") else "brain.nii.gz"
    assert_done(script_here("predict.py", source, cwd=users_place))
    if name.endswith(".png"):
        with Image.open(name) as image:
            pixels, text = np.array(image), PngInfo()
            text.add_text("medseg", image.text["medseg"])  # kept, as ImageMagick does
        pixels[0, 0] = 255 - pixels[0, 0]
        Image.fromarray(pixels).save(name, pnginfo=text)
    else:
        volume = nibabel.load(name)
        voxels = np.array(volume.dataobj)
        voxels[0, 0, 0] = 1
        nibabel.save(nibabel.Nifti1Image(voxels, None, volume.header), name)  # keeps its text
    refused("predict", source, words=[name, "--output"])
