"""What a run may replace: what an earlier run of ours wrote, and nothing of a user's."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import brightness_model, make_dataset, scan, script_here, write_nifti
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import predict
from medseg.images import save_mask
from medseg.own_files import check_outputs


@pytest.fixture
def users_place(here):
    """best_model.pth, x.png, brain.nii.gz, and dataset/ with annotations."""
    torch.save(brightness_model(32).state_dict(), "best_model.pth")
    scan(40, 36, 5, 5, 20).save("x.png")
    voxels = np.zeros((20, 18, 3), np.int16)
    voxels[2:15, 4:9, 1] = 900
    write_nifti("brain.nii.gz", voxels, np.eye(4))
    make_dataset(here / "dataset")
    return here


PREDICTED = {  # file: (arguments that write it)
    "x_mask.png": ("x.png",),
    "x_prediction.png": ("x.png",),
    "x_probability.png": ("x.png", "--write", "probability"),
    "mask.png": ("x.png", "--output", "mask.png"),
    "out/x_mask.png": ("x.png", "dataset/test", "--output", "out"),
    "out/x_overlay.jpg": ("x.png", "dataset/test", "--output", "out"),
    "out/report.json": ("dataset/test", "--output", "out"),
    "out/report.png": ("dataset/test", "--output", "out"),
    "brain_mask.nii.gz": ("brain.nii.gz",),
    "brain_montage.png": ("brain.nii.gz",),
    "brain_probability.nii.gz": ("brain.nii.gz", "--write", "probability"),
    "b.nii": ("brain.nii.gz", "--output", "b.nii"),
}


def users_file(path):
    """Make a file that some other program could have written."""
    path.parent.mkdir(exist_ok=True)
    if ".nii" in path.name:
        write_nifti(path, np.ones((20, 20, 3), np.uint8), np.eye(4))
    elif path.suffix == ".json":
        path.write_text('{"folder": "mine"}')
    else:
        Image.new("L", (40, 36), 255).save(path)


@pytest.mark.parametrize("name", PREDICTED)
def test_predictions_replace_ours_alone(users_place, refused, name):
    path, arguments = Path(name), PREDICTED[name]
    users_file(path)
    content, before = path.read_bytes(), set(users_place.rglob("*"))
    refused("predict", *arguments, words=[name, "--output"])
    assert path.read_bytes() == content
    assert {own for own in users_place.rglob("*") if ".cache" not in own.parts} == before
    path.unlink()
    for _ in range(2):  # the second time over our own
        assert script_here("predict.py", *arguments, cwd=users_place).returncode == 0
    assert path.read_bytes() != content


@pytest.mark.parametrize("name", ["x_mask.png", "x_prediction.png", "brain_mask.nii.gz"])
def test_a_prediction_that_was_corrected_is_the_users(users_place, refused, name):
    predict.main(["x.png"]), predict.main(["brain.nii.gz"])
    if name.endswith(".png"):
        with Image.open(name) as image:
            pixels, text = np.array(image), PngInfo()
            text.add_text("medseg", image.text["medseg"])  # kept, as ImageMagick does
        pixels[0, 0] = 255 - pixels[0, 0]
        Image.fromarray(pixels).save(name, pnginfo=text)
    else:
        volume = nibabel.load(name)
        voxels = np.array(volume.dataobj)
        assert voxels.any()
        voxels[0, 0, 0] = 1
        nibabel.save(nibabel.Nifti1Image(voxels, None, volume.header), name)  # keeps its text
    source = "x.png" if name.startswith("x") else "brain.nii.gz"
    refused("predict", source, words=[name, "--output"])


@pytest.mark.parametrize("name", ["metrics.csv", "curves.png", "predictions.png", "skipped.txt"])
def test_a_training_replaces_ours_alone(users_place, refused, name):
    flags = ["--data", "dataset", "--epochs", "1", "--n-filters", "2", "--image-size", "32"]
    flags += ["--device", "cpu", "--skip-bad", "--overwrite"]
    path = Path("run") / name
    path.parent.mkdir()
    path.write_text("epoch,loss\n1,0.5\n")
    refused("train", *flags, "--out", "run", words=[path, "--out"])
    assert [own.name for own in path.parent.iterdir()] == [name]
    assert path.read_text() == "epoch,loss\n1,0.5\n"
    path.unlink()
    if name == "metrics.csv":  # all of them, twice
        Path("dataset/train/0_train.png").write_bytes(b"damaged")
        for _ in range(2):
            result = script_here("train.py", *flags, "--out", "run", cwd=users_place)
            assert result.returncode == 0, result.stderr
        Path("run/predictions.png").write_bytes(b"mine")
        refused("train", "--test-only", "--out", "run", words=["run/predictions.png", "--out"])


@pytest.mark.parametrize(
    "name", ["contact_sheet.jpg", pytest.param("model.onnx", marks=pytest.mark.slow)]
)
def test_sheets_and_exports_replace_ours_alone(users_place, refused, name):
    command = ("data",) if name.endswith(".jpg") else ("predict", "--export", name)
    Path(name).write_bytes(b"theirs")
    refused(*command, words=[name, "--out" if name.endswith(".jpg") else "--export"])
    assert Path(name).read_bytes() == b"theirs"
    Path(name).unlink()
    for _ in range(2):
        result = script_here(f"{command[0]}.py", *command[1:], cwd=users_place)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kept", [("medseg", "classes"), ("classes",)])
def test_a_corrected_mask_of_several_classes_is_the_users(tmp_path, kept):
    """kept: the texts that another program writes into the file again."""
    path, labels = tmp_path / "x_mask.png", np.zeros((20, 30), np.uint8)
    labels[2:9, 3:9], labels[10:15, 4:20] = 1, 2
    save_mask(labels, path, ("cup", "disc"))
    check_outputs([path])
    with Image.open(path) as image:
        text = PngInfo()
        for key in kept:
            add = text.add_itxt if key == "classes" else text.add_text
            add(key, image.text[key])
        image.putpixel((0, 0), 2)
        image.save(path, pnginfo=text)
    with pytest.raises(ValueError, match=path.name):
        check_outputs([path])
