"""Prediction: the functions, the files it writes, and what it refuses; and scores of a folder."""

import csv
import hashlib
import importlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from argparse import SUPPRESS
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_done,
    assert_refused,
    brightness_model,
    edit_annotations,
    probabilities_of,
    scan,
    script,
    script_here,
    square,
    write_dicom,
    write_split,
)
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.text import Text
from nibabel import Nifti1Image
from PIL import Image
from pydicom.data import get_testdata_file

import data
import predict
from medseg import device, plots, predictor
from medseg.cli import ArgumentParser
from medseg.drawing import class_colors, overlay
from medseg.files import atomic_write
from medseg.full_size import full_size_labels
from medseg.images import save_overlay
from medseg.inference import PLAIN
from medseg.metrics import (
    SWEEP,
    TOLERANCE,
    RunningScores,
    bootstrap,
    calibration_error,
    class_scores,
    count_calibration,
    count_image,
    image_dice,
    pooled_scores,
    surface_scores,
)
from medseg.phantoms import draw_phantom
from medseg.predicting import scoring
from medseg.predicting.figure import choose_cases, plot_report, shorten_name
from medseg.predicting.inputs import EXAMPLE, describe_left_out, expand, left_aside, open_file
from medseg.predicting.page import Session
from medseg.predicting.report import FolderScores, write_report
from medseg.predictor import Predictor
from medseg.pretrained import ABOUT_PRETRAINED, PRETRAINED
from medseg.training.checkpoint import history_row


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with best_model.pth, which is the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    return tmp_path


def write_scans(folder, stems):
    folder.mkdir()
    for stem in stems:
        scan(40, 40, 5, 5, 20).save(folder / f"{stem}.png")


def names(folder):
    return {path.name for path in folder.iterdir()}


def pictures(folder):
    """The names of what is in a folder, but for the table."""
    return names(folder) - {"predictions.csv", "predictions.json"}


def predict_here(place, *arguments):
    """What predict.py prints; it has to succeed."""
    result = script_here("predict.py", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    return result.stdout


def overlap(mask, other):
    return (mask & other).sum() / (mask | other).sum()


# ---- the weights that come with the repository -----------------------------------------------


def test_before_any_training_the_repositorys_weights_are_used(tmp_path, monkeypatch, capsys):
    """A stranger's first prediction; with best_model.pth, that one is taken."""
    monkeypatch.chdir(tmp_path)
    pixels, _ = draw_phantom(np.random.default_rng(1), 256)
    Image.fromarray(pixels).save("scan.png")
    result = script("predict.py", "scan.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (note,) = [line for line in result.stdout.splitlines() if "no best_model.pth" in line]
    assert str(PRETRAINED) in note and ABOUT_PRETRAINED in note
    written = np.asarray(Image.open("scan_mask.png"))  # read now: the next run replaces the file
    assert written.shape == (256, 256)
    named = script("predict.py", "scan.png", "--model", PRETRAINED, cwd=tmp_path)
    assert named.returncode == 0 and "no best_model.pth" not in named.stdout
    np.testing.assert_array_equal(np.asarray(Image.open("scan_mask.png")), written)
    torch.save(brightness_model().state_dict(), "best_model.pth")
    predict.main(["scan.png"])
    assert "no best_model.pth" not in capsys.readouterr().out


def test_without_any_weights_the_next_command_is_named(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("medseg.pretrained.PRETRAINED", tmp_path / "none.pth")
    scan(40, 40, 5, 5, 20).save(tmp_path / "scan.png")
    refused("predict", "scan.png", words=["best_model.pth", "python train.py"])


def test_the_card_of_the_repositorys_weights():
    """Size, network and Dice in docs/pretrained.md and in the line that predict.py prints."""
    card = (ROOT / "docs" / "pretrained.md").read_text()
    assert PRETRAINED.stat().st_size < 5e6
    assert f"{PRETRAINED.stat().st_size / 1e6:.1f} MB" in card
    model = predict.load_model(PRETRAINED, "cpu")
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters:,} parameters" in card
    assert f"{model.info.image_size}x{model.info.image_size} pixels" in card
    (row,) = re.findall(r"\| official test \|.*", card)
    dice = float(row.split(" | ")[2])
    assert ABOUT_PRETRAINED.endswith(f"test Dice {dice:.2f}")
    hashes = [hashlib.sha256(PRETRAINED.read_bytes()).hexdigest()]
    assert re.findall("[0-9a-f]{64}", card) == hashes  # of the file that the scores are of


# ---- precision -------------------------------------------------------------------------------


def test_bf16_ends_before_the_last_convolution(place):
    """It marks the same square; its probabilities are near those of fp32 and not equal."""
    model, types = brightness_model(), {}
    for name in ("bottleneck", "outc"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, inputs, output, name=name: types.update({name: (inputs, output)})
        )
    pixels = np.random.default_rng(0).integers(0, 255, (2, 33, 50, 3), dtype=np.uint8)
    contexts = (device.make_autocast(word, torch.device("cpu")) for word in ("fp32", "bf16"))
    fp32, bf16 = (Predictor([model], "cpu", autocast=context) for context in contexts)
    exact, near = probabilities_of(fp32, pixels), probabilities_of(bf16, pixels)
    (inputs,), output = types["outc"]
    assert inputs.dtype == output.dtype == torch.float32 == torch.from_numpy(near).dtype
    assert types["bottleneck"][1][0].dtype == torch.bfloat16
    assert 0 < np.abs(exact - near).max() < 0.05
    scan(64, 64, 10, 20, 30).save("scan.png")
    masks = []
    for word in ("fp32", "bf16"):
        predict.main(["scan.png", "--precision", word, "--output", f"{word}.png"])
        masks.append(np.asarray(Image.open(f"{word}.png")))
    assert masks[0].any() and overlap(*(mask > 0 for mask in masks)) > 0.99


# ---- functions -------------------------------------------------------------------------------


def test_the_tutorials_functions(place):
    scan(640, 640, 200, 300, 160).save(place / "scan.png")
    model = predict.load_model(place / "best_model.pth", "cpu")
    assert not model.training and model.info.image_size == 32
    tensor, picture = predict.preprocess_image(place / "scan.png")
    assert tensor.shape == (1, 3, 256, 256) and tensor.dtype == torch.float32
    assert picture.size == (256, 256)
    mask = predict.predict_mask(model, tensor, "cpu")
    assert mask.shape == (1, 1, 256, 256) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask[0, 0, 120:184, 80:144].mean() > 0.98 and mask.sum() < 66**2
    assert predict.predict_mask(model, tensor, "cpu", threshold=1.0).sum() == 0
    predict.visualize_result(picture, mask.cpu().numpy(), path=place / "figure.png")
    figure = np.asarray(Image.open(place / "figure.png").convert("RGB")).astype(int)
    assert ((figure[..., 0] - figure[..., 1]) > 60).sum() > 500  # something is tinted red


def test_cuda_by_default_falls_back(place):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    model = predict.load_model(place / "best_model.pth")
    tensor, _ = predict.preprocess_image(place / "scan.png")
    assert predict.predict_mask(model, tensor).shape == (1, 1, 256, 256)


def test_masks_return_to_the_place_they_came_from():
    probabilities = np.zeros((32, 32), np.float32)
    probabilities[8:16, 16:24] = 1
    mask = full_size_labels(probabilities[None], (320, 160), 0.5) > 0
    expected = np.zeros((160, 320), bool)
    expected[40:80, 160:240] = True
    assert mask.shape == (160, 320) and overlap(mask, expected) > 0.97


def test_overlay_tints_the_foreground_alone():
    image = Image.new("RGB", (4, 3), (100, 50, 200))
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    pixels = np.asarray(overlay(image, mask))
    assert pixels[1, 2].tolist() == [162, 30, 120]
    assert (pixels[~mask] == (100, 50, 200)).all()


@pytest.mark.parametrize("side, factor", [(40, 10), (200, 2), (384, 1), (500, 1)])
def test_a_small_overlay_is_enlarged(tmp_path, side, factor):
    labels = np.zeros((side, side), np.uint8)
    labels[side // 2 :] = 1
    path = tmp_path / "overlay.jpg"
    save_overlay(Image.new("RGB", (side, side), (90, 90, 90)), labels, path, ["one"])
    drawn = np.asarray(Image.open(path)).astype(int)
    assert drawn.shape == (side * factor, side * factor, 3)
    red = drawn[..., 0] - drawn[..., 1] > 60
    edge = side * factor // 2
    assert red[edge + 5 :].all() and not red[: edge - 5].any()


def test_the_figure_of_a_file_has_its_name_and_a_legend(tmp_path):
    picture, labels, sizes = Image.new("RGB", (80, 40)), np.ones((40, 80)), []
    for name in (None, "a.png", "a name that is long" * 20):
        path = tmp_path / "figure.png"
        predict.visualize_result(picture, labels, path=path, name=name)
        figure = Image.open(path)
        sizes.append(figure.size)
        above = np.asarray(figure.convert("L"))[:24, :100]
        assert (above < 60).any() == (name is not None)
        legend = figure.crop((0, sizes[0][1], 30, figure.height))
        assert (count_color(legend, (255, 0, 0)) > 100) == (name is not None)
    assert len({width for width, _ in sizes}) == 1


def count_color(figure, color):
    return (np.asarray(figure.convert("RGB")) == color).all(2).sum()


@pytest.mark.parametrize("n_classes", [1, 3])
def test_the_mask_panel_has_the_colours_of_the_legend(tmp_path, n_classes):
    """Exactly, and each on the share of the panel that its pixels have of the mask."""
    labels = np.zeros((40, 80), np.uint8)
    for number in range(1, n_classes + 1):
        labels[:, 20 * number : 20 * number + 10] = number  # an eighth of the width each
    names, picture = [f"class {number}" for number in range(n_classes)], Image.new("RGB", (80, 40))
    path = tmp_path / "figure.png"
    predict.visualize_result(picture, labels, path=path, class_names=names)
    colors = [(255, 255, 255)] if n_classes == 1 else class_colors(n_classes)
    for color in colors:
        assert count_color(Image.open(path), color) == pytest.approx(400 * 200 / 8, rel=0.1)
    legend = Image.open(path).crop((0, 250, 21, 250 + 26 * n_classes))  # below the panels
    assert n_classes == 1 or all(count_color(legend, color) > 100 for color in colors)


@pytest.mark.parametrize("image_size", [32, None])
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (2, 1)])
def test_an_image_of_one_pixel_in_a_side(place, size, image_size):
    """Alone, among others and in the page's session, of all three as the network has it."""
    model = brightness_model(image_size)
    torch.save(model.state_dict(), "best_model.pth")
    (place / "scans").mkdir()
    picture = Image.new("RGB", size, (235, 235, 235))
    picture.save("scans/a.png")
    tensor, shown = predict.preprocess_image("scans/a.png", image_size=image_size)
    expected = (image_size, image_size) if image_size else size
    assert shown.size == expected and shown.mode == "RGB" and tensor.shape[2:] == expected[::-1]
    predict.main(["scans/a.png"])
    predict.main(["scans", "--output", "many"])
    mask = np.asarray(Image.open("a_mask.png"))
    assert mask.shape == size[::-1]
    np.testing.assert_array_equal(np.asarray(Image.open("many/a_mask.png")), mask)
    session = Session(place, predict.open_models(["best_model.pth"], "cpu"))
    session.predict([place / "scans" / "a.png"], 0.5)
    assert session.problems == [] and session.view(0, 0.5)[0][1].size == size
    written = Image.open(session.download("masks", 0.5))
    np.testing.assert_array_equal(np.asarray(written), mask)
    for labels in (np.ones((1, 1, *size)), np.ones(size), np.ones((*size, 1))):  # any that squeezes
        predict.visualize_result(picture, labels)


# ---- the command -----------------------------------------------------------------------------


TABLE = ("predictions.csv", "predictions.json")
ONE = {"scan_mask.png", "scan_overlay.jpg", "scan_prediction.png", *TABLE}


def test_one_image(place):
    scan(200, 120, 60, 40, 40).save(place / "scan.png")
    result = script("predict.py", "scan.png", cwd=place)
    assert result.returncode == 0, result.stderr
    assert names(place) == {"best_model.pth", "scan.png", *ONE}
    mask = Image.open(place / "scan_mask.png")
    assert mask.size == (200, 120) and mask.mode == "L" and set(np.unique(mask)) == {0, 255}
    foreground = np.asarray(mask) > 0
    expected = np.zeros((120, 200), bool)
    expected[40:80, 60:100] = True
    assert overlap(foreground, expected) > 0.75
    assert f"foreground {100 * foreground.mean():.2f} %" in result.stdout
    assert "highest probability" in result.stdout
    assert np.asarray(Image.open(place / "scan_prediction.png")).std() > 10


def test_output_names_the_mask_of_one_image(place):
    scan(200, 120, 60, 40, 40).save(place / "scan.png")
    predict.main(["scan.png"])
    before = names(place)
    predict.main(["scan.png", "--output", "out.png"])
    assert names(place) == {*before, "out.png"}
    assert (place / "out.png").read_bytes() == (place / "scan_mask.png").read_bytes()


def test_output_with_a_dot_is_a_folder_unless_it_names_a_picture(place):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    predict.main(["scan.png", "--output", "folder.v2"])
    assert names(place / "folder.v2") == ONE
    (place / "folder.png").mkdir()
    predict.main(["scan.png", "--output", "folder.png"])
    assert names(place / "folder.png") == ONE


def test_output_that_does_not_fit_is_refused(place, refused):
    write_scans(place / "scans", "ab")
    before = sorted(place.rglob("*"))
    for inputs, output, reason in [
        (["scans/a.png", "scans/b.png"], "out.png", "several images"),
        (["scans"], "out.png", "several images"),
        (["scans/a.png"], "out.jpg", ".png"),
        (["scans/a.png"], "out.webp", ".png"),
        (["scans/a.png"], "scans/a.png", "the image itself"),
        (["scans/a.png"], "scans/b.png/out.png", "cannot write"),
    ]:
        refused("predict", *inputs, "--output", output, words=["--output", reason])
    assert sorted(place.rglob("*")) == before


def test_a_folder_of_every_format(place, refused):
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
    (folder / "notes.txt").write_text("this is no picture")
    result = script("predict.py", "scans", cwd=place)
    assert result.returncode == 0, result.stderr
    masks = {}
    for path in (place / "predictions").glob("*_mask.png"):
        masks[path.name[0]] = np.asarray(Image.open(path))
    assert set(masks) == set("abcdefg")
    for name in "cdefg":
        np.testing.assert_array_equal(masks[name], masks["b"], err_msg=name)
    assert overlap(masks["a"] > 0, masks["b"] > 0) > 0.9
    assert len(list((place / "predictions").glob("*_overlay.jpg"))) == 7
    # Masks and overlays are not taken for images.
    refused("predict", "predictions", "--output", "twice", words=["no images"])


def test_many_are_predicted_as_one_is(place):
    folder = place / "scans"
    folder.mkdir()
    for number in range(3 * 16 + 5):
        scan(40 + number, 50, number % 20, number % 15, 20).save(folder / f"{number:03}.png")
    result = script("predict.py", "scans", "--output", "all", cwd=place)
    assert result.returncode == 0, result.stderr
    table = (place / "all" / "predictions.csv").read_text(encoding="utf-8-sig").splitlines()
    predicted = [row.split(",")[0] for row in table[1:]]
    assert predicted == [f"{number:03}.png" for number in range(53)]
    model = predict.open_models([place / "best_model.pth"], "cpu")
    for number in (0, 17, 52):
        (picture,), _ = open_file(*expand([folder / f"{number:03}.png"]))
        predict.predict_one(model, picture, place)
        name = f"{number:03}_mask.png"
        alone, among_many = Image.open(place / name), Image.open(place / "all" / name)
        np.testing.assert_array_equal(alone, among_many)


def test_a_damaged_image_among_many_is_named_and_the_others_predicted(place, refused):
    write_scans(place / "scans", "abc")
    damaged = place / "scans" / "b.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    refused("predict", "scans", words=["1 of 3", "b.png"])
    written = {"a_mask.png", "a_overlay.jpg", "c_mask.png", "c_overlay.jpg"}
    assert pictures(place / "predictions") == written


DAMAGED_ELEMENTS = {
    "series": lambda content: content.replace(b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x00ZZ"),
    "rows": lambda content: content.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00SQ"),
    "window": lambda content: content.replace(b"\x28\x00\x50\x10DS", b"\x28\x00\x50\x10ZZ"),
}


@pytest.mark.parametrize("element", DAMAGED_ELEMENTS)
def test_a_damaged_element_of_a_dicom_file_harms_that_file_alone(element, place, refused):
    (place / "scans").mkdir()
    axes = {"ImagePositionPatient": [0, 0, 1], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    window = {"WindowCenter": 500, "WindowWidth": 1000}
    for name in "abc":
        path = place / "scans" / f"{name}.dcm"
        write_dicom(path, SeriesInstanceUID="1.2", PixelSpacing=[1, 1], **axes, **window)
    damaged = place / "scans" / "b.dcm"
    content = DAMAGED_ELEMENTS[element](damaged.read_bytes())
    assert content != damaged.read_bytes()
    damaged.write_bytes(content)
    line = refused("predict", "scans", words=["1 of 3"])
    assert line.count("b.dcm") == 1
    masks = {name for name in names(place / "predictions") if name.endswith("_mask.png")}
    assert masks == {"a_mask.png", "c_mask.png"}


@pytest.mark.parametrize("spacing", [["1e200", "1e200"], ["1e-320", "1e-320"], ["1e200", "0.5"]])
def test_a_spacing_that_no_scanner_has_is_none(spacing, place):
    (place / "scans").mkdir()
    write_dicom(place / "scans" / "a.dcm", PixelSpacing=[1, 1])
    write_dicom(place / "scans" / "b.dcm", PixelSpacing=spacing)
    assert_done(script_here("predict.py", "scans", cwd=place))
    table = (place / "predictions" / "predictions.csv").read_text("utf-8-sig").splitlines()
    rows = {row["image"]: row for row in csv.DictReader(table)}
    assert rows["a.dcm"]["area_mm2"] and not rows["b.dcm"]["area_mm2"]


def test_of_many_files_that_cannot_be_read_the_first_are_named():
    problems = [(f"{number}.png", f"{number}.png: damaged") for number in range(20_000)]
    line = describe_left_out(problems, files=30_000, frames=30_000)
    assert len(line) < 300 and "20000 of 30000" in line
    assert "0.png: damaged; 1.png" in line and "3.png" not in line


def test_what_a_folder_holds_besides_is_counted_in_one_line(place, capsys, refused):
    write_scans(place / "scans", ["a", "b_mask", "contact_sheet"])
    (place / "scans" / "contact_sheet.png").rename(place / "scans" / "contact_sheet.jpg")
    (place / "scans" / "deeper").mkdir()
    for name in ("a.mat", "b.MAT", "notes.txt", "README", "_annotations.coco.json.old"):
        (place / "scans" / name).write_text("no picture")
    os.mkfifo(place / "scans" / "pipe.png")
    predict.main(["scans"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left aside" in line]
    for part in (".mat (2)", ".txt (1)", ".old (1)", "no suffix (1)", "folders (1)", "special"):
        assert part in line
    assert "scripts (2)" in line and "scans" in line  # b_mask.png and contact_sheet.jpg
    assert pictures(place / "predictions") == {"a_mask.png", "a_overlay.jpg"}
    write_scans(place / "plain", "ab")
    (place / "plain" / "_annotations.coco.json").write_text("{}")
    assert left_aside(place / "plain") == ""  # the annotations belong to a data set
    (place / "outer" / "inner").mkdir(parents=True)
    refused("predict", "outer", words=["outer: no images", "folders (1)"])


def test_images_that_differ_in_their_suffix_keep_it(place, capsys):
    """Also where a name so made is there already, and beside one that stays as it is."""
    (place / "scans").mkdir()
    sides = {"a.png": 40, "a.jpg": 41, "a_png.png": 42, "b.bmp": 43, "c.tif": 44, "c.TIF": 45}
    for name, side in sides.items():
        scan(side, 40, 5, 5, 20).save(place / "scans" / name)
    expected = {"a_png": 40, "a_jpg": 41, "a_png_png": 42, "b": 43, "c_tif": 44, "c_TIF": 45}
    given = [["scans"], [f"scans/{name}" for name in reversed(sides)]]
    for number, inputs in enumerate(given):
        predict.main([*inputs, "--output", f"out{number}"])
        masks = {path.name: Image.open(path).width for path in place.glob(f"out{number}/*_mask.*")}
        assert masks == {f"{name}_mask.png": side for name, side in expected.items()}
    assert "left aside" not in capsys.readouterr().out


def test_names_of_frames_and_volumes_are_told_apart_too(place, refused):
    """What cannot be: a frame that is called as another image is."""
    write_scans(place / "scans", ["two_f001"])
    shutil.copy(get_testdata_file("SC_rgb_rle_2frame.dcm", download=False), "scans/two.dcm")
    refused("predict", "scans", words=["two.dcm", "two_f001.png", "--output"])
    write_scans(place / "mixed", ["v"])
    for name in ("v.nii", "w.nii.gz", "w.nii"):
        Nifti1Image(np.zeros((9, 9, 2), np.uint8), np.eye(4)).to_filename(place / "mixed" / name)
    refused("predict", "mixed", words=["w.nii", "w.nii.gz", "--output"])
    (place / "mixed" / "w.nii").unlink()
    predict.main(["mixed", "--output", "out"])
    masks = {name for name in names(place / "out") if "_mask" in name}
    assert masks == {"v_png_mask.png", "v_mask.nii.gz", "w_mask.nii.gz"}


def test_long_and_odd_names_lose_nothing(place):
    """Names of 250 bytes, equal but for their ends, and one of bytes that are no text."""
    long = ["x" * 245 + end for end in "ab"]
    write_scans(place / "scans", [*long, "é" * 122, "b"])
    volume = Nifti1Image(np.zeros((9, 9, 2), np.uint8), np.eye(4))
    volume.to_filename(place / "scans" / f"{'v' * 248}.nii")
    odd = os.fsdecode(b"\xff.png")
    scan(40, 40, 5, 5, 20).save(place / "scans" / odd)
    environment = {"PYTHONIOENCODING": "utf-8:strict", "LC_ALL": "C.UTF-8"}
    result = script("predict.py", "scans", cwd=place, **environment)
    assert result.returncode == 0, result.stderr
    written = pictures(place / "predictions")
    assert len(written) == 2 * 6 and not any(name.endswith(".tmp") for name in written)
    assert "saved 5 masks and overlays in predictions" in result.stdout
    assert {"b_mask.png", f"{odd[:-4]}_mask.png"} < written
    assert sum(name.startswith("x" * 100) and name.endswith("_mask.png") for name in written) == 2
    assert sum(name.startswith("é" * 90) and name.endswith("_mask.png") for name in written) == 1
    assert sum(name.startswith("v" * 100) and name.endswith(".nii.gz") for name in written) == 1
    one = predict_here(place, f"scans/{long[0]}.png", "--output", "alone")
    assert "x" * 100 in one and len(names(place / "alone")) == 5


def test_an_error_names_the_file_and_not_a_hidden_one(place, refused):
    scan(40, 40, 5, 5, 20).save(place / "scan.png")
    line = refused("predict", "scan.png", "--output", "x" * 300 + ".png", words=["xxx.png"])
    assert ".tmp" not in line
    (place / "taken.png").mkdir()  # what has its place cannot be replaced
    with pytest.raises(OSError) as caught, atomic_write(place / "taken.png") as file:
        file.write(b"content")
    assert "taken.png" in str(caught.value) and ".tmp" not in str(caught.value)
    predict.main(["scan.png", "--output", "x" * 250 + ".png"])  # which just fits
    assert names(place) == {"best_model.pth", "scan.png", "taken.png", "x" * 250 + ".png"}


def test_frames_that_cannot_be_read_are_counted_with_their_file(place, refused):
    """Of two frames one or both, alone and beside an image."""
    content = Path(get_testdata_file("SC_rgb_rle_2frame.dcm", download=False)).read_bytes()
    (place / "scans").mkdir()
    for name, kept in {"one.dcm": 2600, "both.dcm": 1600, "fine.dcm": 2696}.items():
        (place / "scans" / name).write_bytes(content[:kept])
    refused("predict", "scans/both.dcm", words=["2 of 2 pictures", "1 of 1 files"])
    scan(40, 40, 5, 5, 20).save(place / "scans" / "a.png")
    (place / "scans" / "b.png").write_bytes(b"damaged")
    words = ["4 of 8 pictures", "3 of 5 files", "one.dcm", "both.dcm", "b.png"]
    refused("predict", "scans", "--output", "out", words=words)
    masks = {name for name in names(place / "out") if name.endswith("_mask.png")}
    assert masks == {"a_mask.png", "one_f000_mask.png", "fine_f000_mask.png", "fine_f001_mask.png"}


def test_what_is_left_out_is_counted_once():
    problems = [("a.dcm", "a: cut"), ("a.dcm", "a: cut"), ("b.png", "b: bad")]
    line = describe_left_out(problems, files=5, frames=9)
    assert (
        "3 of 9 pictures" in line and "2 of 5 files" in line and line.endswith(": a: cut; b: bad")
    )
    assert describe_left_out(problems[1:], files=5, frames=5) == "2 of 5 left out: a: cut; b: bad"


@pytest.mark.parametrize("threshold", [0.02, 0.5, 0.97])
def test_the_threshold_holds_for_volumes(place, capsys, threshold):
    """A mask of each slice as that of the same picture alone; the line says its share."""
    ramp = np.linspace(0, 255, 40)[:, None, None] * np.linspace(0.4, 1, 6)  # to each slice its own
    voxels = np.broadcast_to(ramp, (40, 30, 6)).astype(np.uint8)
    Nifti1Image(voxels, np.eye(4)).to_filename(place / "ramp.nii")
    predict.main(["ramp.nii", "--window", "127.5", "255", "--threshold", str(threshold)])
    out, mask = capsys.readouterr().out, np.asarray(nibabel.load("ramp_mask.nii.gz").dataobj)
    assert 0 < mask.mean() < 1 and f"foreground {100 * mask.mean():.2f} %" in out
    for index in range(6):
        Image.fromarray(voxels[..., index]).save("slice.png")
        predict.main(["slice.png", "--threshold", str(threshold), "--output", "slice_mask.png"])
        own = np.asarray(Image.open("slice_mask.png")) > 0
        np.testing.assert_array_equal(mask[..., index] > 0, own)
    highest = [float(part) for part in re.findall(r"probability (\S+)", capsys.readouterr().out)]
    assert f"highest probability {max(highest):.3f}" in out  # of all slices, the last the brightest


def test_without_an_image_it_takes_the_example(place, refused, capsys):
    refused("predict", words=["download.py"])
    phantoms = place / "dataset" / "synthetic" / "test"
    phantoms.mkdir(parents=True)
    real = place / EXAMPLE
    real.parent.mkdir()
    for path in (phantoms / "9.png", real.parent / "1.jpg", real):
        scan(64, 64, 10, 10, 20).save(path)
        predict.main([])
        assert f"taking {path.relative_to(place)}" in capsys.readouterr().out


# ---- refusals --------------------------------------------------------------------------------


class Evil:
    """Unpickled without care, it leaves a file behind."""

    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


def bad_models(folder):
    """Write files that are no weights of a UNet; returns their stems, and one that is missing."""
    good = (folder / "best_model.pth").read_bytes()
    torch.save({"weights": Evil()}, folder / "code.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Evil()))
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.pth").write_text("not weights")
    torch.save(torch.nn.Linear(3, 4).state_dict(), folder / "linear.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    return ("code", "pickle", "cut", "empty", "text", "linear", "list", "missing")


def test_bad_models(place, refused):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    for name in bad_models(place):
        refused("predict", "scan.png", "--model", f"{name}.pth", words=[f"{name}.pth"])
    assert not names(place) & {"EXECUTED", "scan_prediction.png", "scan_mask.png"}


def test_bad_input(place, refused):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    (place / "text.png").write_text("no picture")
    (place / "text").write_text("no folder")
    (place / "cut.png").write_bytes((place / "scan.png").read_bytes()[:70])
    (place / "empty").mkdir()
    (place / "other").mkdir()
    scan(64, 64, 10, 10, 20).save(place / "other" / "scan.jpg")
    before = sorted(place.rglob("*"))
    for arguments, word in {
        ("text.png",): "text.png",
        ("cut.png",): "cut.png",
        ("nothing.png",): "nothing.png",
        ("empty",): "empty",
        ("scan.png", "--threshold", 1.5): "--threshold",
        ("scan.png", "--threshold", -0.1): "--threshold",
        ("scan.png", "--threshold", "nan"): "--threshold",
        ("scan.png", "--output", "text"): "--output",
        ("scan.png", "other/scan.jpg"): "both",
        ("scan.png", "--device", "warp"): "warp",
        ("--frobnicate",): "--frobnicate",
    }.items():
        refused("predict", *arguments, words=[word])
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "name, given, meant",
    [
        ("predict", ("scan.png", "--thresh", 0.4), "--threshold"),
        ("predict", ("scan.png", "--out_put", "masks"), "--output"),
        ("data", ("--grouped_split", "grouped"), "--grouped-split"),
    ],
)
def test_a_misspelt_flag_is_refused_with_its_right_spelling(name, given, meant, refused):
    refused(name, *given, words=["unrecognized arguments", f"did you mean {meant}?"])


def test_the_command_itself_refuses_in_one_line(place):
    assert_refused(script("predict.py", "nothing.png", cwd=place), "predict.py: nothing.png")


def test_a_single_prediction_loads_no_more_than_it_needs(place):
    scan(64, 64, 10, 10, 20).save(place / "scan.png")
    code = (
        "import sys, predict; predict.main(['scan.png', '--device', 'cpu'])\n"
        "slow = {'torchvision', 'swanlab', 'kaggle', 'matplotlib.pyplot', 'pycocotools'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr


@pytest.mark.parametrize("name", ["data", "predict", "train", "download"])
def test_help_explains_every_option_and_shows_its_default(name, tmp_path, monkeypatch):
    parsers = []

    def parse_args(parser, *_):
        parsers.append(parser)
        sys.exit()

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_args)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([])
    result = script(f"{name}.py", "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    shown = "".join(result.stdout.split())  # long texts are wrapped
    for action in parsers[0]._actions:
        assert action.help, action
        help = action.help.removesuffix(" (default: %(default)s)")  # Python 3.10 adds it
        text = f"{help} (default: {action.default})"
        if isinstance(action.default, bool):
            text = f"{help} (default: {'on' if action.default else 'off'})"
        elif isinstance(action.default, tuple):
            text = f"{help} (default: {' '.join(map(str, action.default))})"
        elif action.default in (None, SUPPRESS):
            text = help
        assert "".join(text.replace("%%", "%").split()) in shown
        for flag in action.option_strings:
            assert flag in shown


# ---- scores of a folder with annotations -----------------------------------------------------


def random_masks(count, seed):
    """Rectangles of many sizes, the first mask empty: bool (count, 40, 40)."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 40, 40), bool)
    for mask in masks[1:]:
        for _ in range(rng.integers(1, 3)):
            x, y, width, height = rng.integers(0, 25, 2).tolist() + rng.integers(1, 15, 2).tolist()
            mask[y : y + height, x : x + width] = True
    return masks


def test_hausdorff_by_hand_and_against_monai():
    from monai.metrics import compute_hausdorff_distance

    pred, target = np.zeros((2, 9, 9), bool)
    pred[4, 1], target[4, 5] = True, True
    empty = np.zeros((9, 9), bool)
    assert surface_scores(pred, target) == (4, 0)
    assert surface_scores(pred, target, (1, 0.5)) == (2, 1)  # in mm
    assert np.isnan(surface_scores(pred, empty)).tolist() == [True, False]
    assert np.isnan(surface_scores(empty, empty)).all() and surface_scores(pred, empty)[1] == 0
    preds, targets = random_masks(20, 0)[1:], random_masks(20, 1)[1:]
    expected = compute_hausdorff_distance(
        torch.from_numpy(preds)[:, None],
        torch.from_numpy(targets)[:, None],
        include_background=True,
        percentile=95,
    )
    scores = np.array(list(map(surface_scores, preds, targets)))
    np.testing.assert_allclose(scores[:, 0], expected[:, 0], atol=1e-5)
    # Outlines of 30,000 pixels: every pixel of one is 5 columns from the other.
    pred = np.zeros((1000, 900), bool)
    pred[:, ::30] = True
    assert surface_scores(pred, np.roll(pred, 5, 1)) == (5, 0)


def test_surface_dice_against_monai_and_by_all_distances():
    from monai.metrics import compute_surface_dice
    from scipy import ndimage
    from scipy.spatial.distance import cdist

    preds, targets = random_masks(20, 2)[1:], random_masks(20, 3)[1:]
    for spacing in (1.0, 1.0), (0.5, 2.0):
        found = [surface_scores(*masks, spacing)[1] for masks in zip(preds, targets, strict=True)]
        expected = compute_surface_dice(
            torch.from_numpy(preds)[:, None],
            torch.from_numpy(targets)[:, None],
            class_thresholds=[TOLERANCE],
            include_background=True,
            spacing=spacing,
        )
        np.testing.assert_allclose(found, expected[:, 0], atol=1e-6)
        for pred, target, dice in zip(preds, targets, found, strict=True):
            edges = (mask & ~ndimage.binary_erosion(mask) for mask in (pred, target))
            distances = cdist(*(np.argwhere(edge) * spacing for edge in edges))
            nearest = np.concatenate([distances.min(0), distances.min(1)])
            assert dice == pytest.approx((nearest <= TOLERANCE).mean())
    assert 0.1 < np.mean(found) < 0.9


def test_hausdorff_in_mm_against_distance_transforms():
    """Pixels that are higher than wide: every pixel's distance from an outline, by scipy."""
    from scipy import ndimage

    spacing = (0.7, 0.2)  # mm from row to row, from column to column
    for pred, target in zip(random_masks(20, 0)[1:], random_masks(20, 1)[1:], strict=True):
        edges = [mask & ~ndimage.binary_erosion(mask) for mask in (pred, target)]
        away = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
        directed = [np.percentile(away[1 - own][edges[own]], 95) for own in (0, 1)]
        assert surface_scores(pred, target, spacing)[0] == pytest.approx(max(directed))


def test_scores_against_monai():
    from monai.metrics import compute_dice, compute_iou, get_confusion_matrix

    preds, targets = random_masks(30, 2), random_masks(30, 3)
    tp, fp, fn, tn = preds & targets, preds & ~targets, ~preds & targets, ~preds & ~targets
    counts = np.stack([pixels.sum((1, 2)) for pixels in (tp, fp, fn, tn)], 1)
    tensors = [torch.from_numpy(masks)[:, None].float() for masks in (preds, targets)]
    expected = compute_dice(*tensors)[:, 0]
    np.testing.assert_allclose(image_dice(counts)[1:], expected[1:], atol=1e-6)
    assert image_dice(counts)[0] == 1  # both are empty, and MONAI leaves that undefined
    confusion = get_confusion_matrix(*tensors)[:, 0].numpy()
    np.testing.assert_array_equal(confusion, counts[:, [0, 1, 3, 2]])
    pooled = [masks.reshape(1, 1, -1, 40) for masks in tensors]
    scores = pooled_scores(counts)
    assert scores["dice"] == pytest.approx(compute_dice(*pooled).item(), abs=1e-6)
    assert scores["iou"] == pytest.approx(compute_iou(*pooled).item(), abs=1e-6)
    low, high = bootstrap(counts)["dice"]
    assert low < scores["dice"] < high
    same = np.repeat(counts[5:6], 9, 0)  # whichever images are drawn, the score is the same
    dice = pooled_scores(counts[5:6])["dice"]
    assert bootstrap(same)["dice"] == pytest.approx([dice, dice])


def test_the_bootstrap_gives_the_middle_95_percent():
    """Of images of which half score 1 and half 0, the mean follows the binomial distribution."""
    images = 100
    counts = np.array([[1, 0, 0, 9], [0, 0, 1, 9]] * (images // 2))
    chance = [math.comb(images, hits) / 2**images for hits in range(images + 1)]
    cumulative = np.cumsum(chance)
    expected = [np.searchsorted(cumulative, share) / images for share in (0.025, 0.975)]
    assert expected == [0.40, 0.60]
    interval = bootstrap(counts, samples=4000)["image_dice"]
    assert interval == pytest.approx(expected, abs=0.0101)  # the 5th percentile is 0.42


def test_a_folder_with_annotations_is_scored(place, dataset):
    """Against the scores of train.py for the same weights, and report.json against itself."""
    options = ("--output", "scored", "--threshold", 0.3)
    result = script("predict.py", dataset / "test", *options, cwd=place)
    assert result.returncode == 0, result.stderr
    report = json.loads((place / "scored" / "report.json").read_text())
    model = predict.load_model(place / "best_model.pth", "cpu")
    scores, test = RunningScores("cpu"), data.open_split(dataset, "test")
    for index in range(len(test)):
        image, target = test.load(index)
        tensor, _ = predict.preprocess_image(image, image_size=model.info.image_size)
        probabilities = Predictor([model], "cpu")(tensor)[0].numpy()
        pred = full_size_labels(probabilities, image.size, 0.3)[None, None]
        scores.add(torch.zeros(()), torch.from_numpy(pred), torch.from_numpy(target[None]))
    result = scores.result()
    expected = {name: result[name] for name in report["scores"]}
    assert report["scores"] == pytest.approx(expected, abs=1e-9)
    assert set(report["per_image"]) == {f"{number}_test.png" for number in range(4)}
    mean = np.mean(list(report["per_image"].values()))
    assert mean == pytest.approx(report["scores"]["image_dice"], abs=1e-4)
    with_lesion = sum(group["images"] for group in report["by_lesion_size"])
    assert with_lesion + report["no_lesion"]["images"] == 4
    assert report["hd95"]["left_out"] in range(5)
    assert Image.open(place / "scored" / "report.png").size[0] > 1000
    masks = list((place / "scored").glob("*_mask.png"))
    assert len(masks) == 4  # the images are predicted as in any other folder


def test_groups_have_scores_and_are_drawn_whole(place, dataset, capsys):
    """Of four images two are of one patient, and one has no group; by hand, from the counts."""

    def group(content):
        for number, record in enumerate(content["images"]):
            record |= {"group": "patient 1"} if number in (0, 2) else {}
        content["images"][3]["group"] = "patient 2"

    edit_annotations(dataset / "test", group)
    torch.save(brightness_model(image_size=48).state_dict(), "best_model.pth")
    scan(48, 48, 30, 30, 17).save(dataset / "test" / "0_test.png")  # partly outside its annotation
    scan(48, 48, 0, 0, 5).save(dataset / "test" / "1_test.png")
    predict.main([str(dataset / "test"), "--output", "scored"])
    assert "per-group Dice" in capsys.readouterr().out
    report = json.loads(Path("scored/report.json").read_text())
    test, pixels = data.open_split(dataset, "test"), []
    for index in range(4):
        _, (target,) = test.load(index)
        mask = np.asarray(Image.open(f"scored/{index}_test_mask.png")) > 0
        pixels.append([2 * (mask & (target > 0)).sum(), mask.sum() + target.sum()])
    pixels = np.array([np.add(pixels[0], pixels[2]), pixels[1], pixels[3]])
    dice = pixels[:, 0] / pixels[:, 1]
    names = ["patient 1", "1_test.png", "patient 2"]
    expected = dict(zip(names, dice.round(4), strict=True))
    assert report["per_group"] == pytest.approx(expected) and report["groups"] == 3
    assert report["scores"]["group_dice"] == pytest.approx(dice.mean())
    order = np.argsort(names)  # groups are drawn from their sorted names
    draws = np.random.default_rng(0)
    drawn = np.array([order[draws.integers(0, 3, 3)] for _ in range(1000)])
    pooled = pixels[drawn].sum(1)
    for name, samples in (
        ("group_dice", dice[drawn].mean(1)),
        ("dice", pooled[:, 0] / pooled[:, 1]),
    ):
        interval = np.percentile(samples, [2.5, 97.5])
        assert report["confidence_95"][name] == pytest.approx(interval.tolist()), name


def test_groups_of_several_classes():
    """An image without a class counts as right in it, and a group by the pixels of its images."""
    counts = np.array([[[4, 1, 1, 9], [0, 0, 0, 15]], [[0, 3, 0, 12], [2, 0, 1, 12]]] * 2)
    groups = np.array([0, 1, 0, 1])
    scores = class_scores(counts, ["a", "b"], groups)
    assert scores["group_dice/a"] == pytest.approx((0.8 + 0) / 2)
    assert scores["group_dice/b"] == pytest.approx((1 + 0.8) / 2)
    assert scores["group_dice"] == pytest.approx((0.4 + 0.9) / 2)
    found = bootstrap(counts, ["a", "b"], groups=groups)
    # Of the two groups, one alone or both; without class b there is no score.
    assert found["group_dice/b"] == pytest.approx([0.8, 0.9])
    assert "group_dice" not in bootstrap(counts, ["a", "b"])


def test_the_report_scores_the_masks_that_were_written(place, dataset, monkeypatch, capsys):
    """Scores from the mask files and the squares; the network sees every image once."""
    torch.save(brightness_model(image_size=48).state_dict(), "best_model.pth")
    scan(48, 48, 30, 30, 17).save(dataset / "test" / "0_test.png")  # partly outside its annotation
    seen, run = [], predictor.apply_by_tiles

    def count(network, images, *given, **options):
        seen.extend(images)
        return run(network, images, *given, **options)

    monkeypatch.setattr(predictor, "apply_by_tiles", count)
    predict.main([str(dataset / "test"), "--output", "scored"])
    assert len(seen) == 4 + 4  # test and, for the threshold, valid
    records = json.loads((dataset / "test" / "_annotations.coco.json").read_text())["annotations"]
    both = predicted = annotated = 0
    for number, record in enumerate(records):
        (corners,) = record["segmentation"]  # x, y of each
        x, y, target = corners[0], corners[1], np.zeros((48, 48), bool)
        target[y : y + 16, x : x + 16] = True
        mask = np.asarray(Image.open(f"scored/{number}_test_mask.png")) > 0
        both, predicted = both + (mask & target).sum(), predicted + mask.sum()
        annotated += target.sum()
    report = json.loads((place / "scored" / "report.json").read_text())
    assert report["scores"]["dice"] == pytest.approx(2 * both / (predicted + annotated))
    assert 0.7 < report["scores"]["dice"] < 1
    assert "Dice" in capsys.readouterr().out


def test_annotated_images_that_no_folder_lists_are_scored_too(place, dataset):
    """A file_name may lead into a folder below."""
    (dataset / "test" / "below").mkdir()
    (dataset / "test" / "0_test.png").rename(dataset / "test" / "below" / "0_test.png")

    def move(content):
        content["images"][0]["file_name"] = "below/0_test.png"

    edit_annotations(dataset / "test", move)
    predict.main([str(dataset / "test"), "--output", "scored"])
    report = json.loads((place / "scored" / "report.json").read_text())
    assert report["images"] == 4 and set(report["per_image"]) >= {"below/0_test.png"}


def test_a_damaged_image_has_no_report(place, dataset, refused):
    (dataset / "test" / "1_test.png").write_bytes(b"damaged")
    folder = dataset / "test"
    refused(
        *("predict", folder, "--output", "scored"),
        words=["1 of 4 left out", "1_test.png: not a JPEG", f"{folder} has no report"],
    )
    assert pictures(place / "scored") == {
        f"{number}_test_{what}" for number in (0, 2, 3) for what in ("mask.png", "overlay.jpg")
    }
    (folder / "1_test.png").unlink()  # then no image is damaged, but a record has none
    refused("predict", folder, "--output", "scored", words=["1_test.png: no such image"])


def test_the_threshold_is_chosen_on_valid_alone(place, dataset):
    """Other annotations in test leave the choice as it is, and other ones in valid change it.

    Without valid, no threshold is chosen.
    """
    model = predict.open_models([place / "best_model.pth"], "cpu")

    def choose():
        folder = dataset / "test"
        scores, given = scoring.open_folder(model, folder), partial(predict.predict_image, model)
        return scoring.report(model, folder, scores, place, given)["valid"]

    first = choose()
    batches = data.Batches(data.load_split(dataset, "valid", model.info.image_size), 3)
    probabilities = [one for images, _ in batches for one in model(images).numpy()]
    valid, dice = data.open_split(dataset, "valid"), []
    for threshold in first["thresholds"]:
        both = total = 0
        for index, one in enumerate(probabilities):
            image, (target,) = valid.load(index)
            pred = PLAIN._replace(threshold=threshold).labels(one, image.size)
            both += (pred & target).sum()
            total += pred.sum() + target.sum()
        dice.append(2 * both / total)
    assert first["dice"] == pytest.approx(dice)
    assert first["chosen_threshold"] == first["thresholds"][int(np.argmax(dice))]
    edit_annotations(dataset / "test", lambda content: content["annotations"].clear())
    second = choose()
    for key in ("dice", "chosen_threshold"):
        assert second[key] == first[key]
    edit_annotations(dataset / "valid", lambda content: content["annotations"].clear())
    assert choose() is None  # without foreground there is nothing to choose by
    shutil.rmtree(dataset / "valid")
    assert choose() is None


def counts_of(**preds):
    """(file names, counts (N, 4)) of images of 8x8; name=(lesion rows, predicted rows)."""
    rows = []
    for target_rows, pred_rows in preds.values():
        target, pred = np.zeros((2, 1, 8, 8), bool)
        target[:, target_rows], pred[:, pred_rows] = True, True
        rows.append(count_image(target, pred.astype(np.float32), [0.5])[0, 0])
    return [f"{name}.png" for name in preds], np.array(rows)


NOTHING = slice(0, 0)


@pytest.mark.parametrize("given", ["valid", "valid/", "test/../valid", "link"])
def test_no_threshold_is_chosen_on_the_folder_that_is_scored(place, dataset, given, monkeypatch):
    """However `valid` is named; and it is predicted once."""
    (dataset / "link").symlink_to(dataset / "valid")
    seen, run = [], predictor.apply_by_tiles

    def count(network, images, *given, **options):
        seen.extend(images)
        return run(network, images, *given, **options)

    monkeypatch.setattr(predictor, "apply_by_tiles", count)
    predict.main([f"{dataset}/{given}", "--output", "scored"])
    report = json.loads((place / "scored" / "report.json").read_text())
    assert report["valid"] is None and len(seen) == 4


def test_a_report_names_false_alarms_and_missed_lesions():
    names, counts = counts_of(
        perfect=(slice(4), slice(4)),
        partial=(slice(4), slice(2)),  # Dice 2 x 16 / (32 + 16)
        alarm=(NOTHING, slice(2)),
        missed=(slice(4), NOTHING),
        beside=(slice(4), slice(4, 8)),  # it was not missed, but is not there
        empty=(NOTHING, NOTHING),
    )
    cases = choose_cases(names, image_dice(counts), counts)
    assert [title for _, title in cases] == [
        *("best: perfect.png, Dice 1.00", "best: partial.png, Dice 0.67"),
        "median: empty.png, Dice 1.00",
        "worst: alarm.png, false alarm",
        "worst: missed.png, missed lesion",
        "worst: beside.png, no overlap",
    ]
    assert [names[index] in title for index, title in cases] == [True] * 6


def test_the_best_are_never_missed_lesions_though_another_class_is_rightly_empty():
    counts = np.array([[0, 0, 9, 55], [4, 30, 4, 26], [0, 0, 9, 55], [2, 30, 6, 26]])
    dice = np.array([0.5, 0.2, 0.5, 0.1])  # the mean over two classes
    (_, best), *others = choose_cases(["a", "b", "c", "d"], dice, counts)
    assert best == "best: b, Dice 0.20" and "median: a, missed lesion" in dict(others).values()


@pytest.mark.parametrize("count", range(1, 14))
def test_a_report_shows_each_image_once_and_of_few_all(count):
    dice = np.random.default_rng(count).permutation(count) / 20 + 0.1
    cases = choose_cases([f"{n}.png" for n in range(count)], dice, np.ones((count, 4), int))
    shown = [index for index, _ in cases]
    assert len(shown) == len(set(shown)) == min(count, 8)
    kinds = {"best": [], "median": [], "worst": []}
    if count == 1:
        assert cases == [(0, "0.png, Dice 0.10")]
        return
    for index, title in cases:
        kind, _, rest = title.partition(": ")
        kinds[kind].append(dice[index])
        assert rest == f"{index}.png, Dice {dice[index]:.2f}"
    best, median, worst = kinds.values()
    ranked = sorted(dice, reverse=True)
    assert best == ranked[: len(best)] and worst == ranked[-len(worst) :]
    assert 1 <= len(best) <= 2 and 1 <= len(worst) <= 3
    if count > 8:
        assert (len(best), len(median), len(worst)) == (2, 3, 3)
        assert min(median) <= np.median(dice) <= max(median)


@pytest.mark.parametrize(
    "name, shown",
    [
        ("27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg", "27"),
        ("Tr-gl_0010_jpg.rf.B2A2b9811786cc32a23c46c560f04d07.jpg", "Tr-gl_0010"),
        ("left_eye_PNG.rf.b2a2b9811786cc32a23c46c560f04d07.png", "left_eye"),
        ("scan_0001.png", "scan_0001.png"),
        ("scan.rf.1_2.png", "scan.rf.1_2.png"),
    ],
)
def test_only_what_roboflow_adds_is_cut_from_a_name(name, shown):
    assert shorten_name(name) == shown


def test_a_long_name_keeps_both_its_ends():
    first, second = (shorten_name(f"{'patient' * 9}_{number}.png") for number in (1, 2))
    assert first != second and first.startswith("patient") and first.endswith("_1.png")
    assert len(first) <= 28


BOXES = [(4, 4, 20), (20, 8, 10), (10, 20, 16)]  # x, y, side: lesions of the images below


@pytest.fixture
def graded(tmp_path):
    """FolderScores of three images of their own grey, met in another order.

    The probability is 0.62 in the lesion, 0.42 in the four columns right of it and 0.22 elsewhere.
    """
    images = {f"{n}_x.png": Image.new("RGB", (48, 48), (40 * n,) * 3) for n in range(3)}
    write_split(tmp_path / "test", images, [(n, square(*box)) for n, box in enumerate(BOXES)])
    dataset = data.open_split(tmp_path, "test", 48)
    scores = FolderScores(dataset, 0.5)
    for number in (2, 0, 1):
        x, y, side = BOXES[number]
        probabilities = np.full((1, 48, 48), 0.22, np.float32)
        probabilities[0, y : y + side, x : x + side + 4] = 0.42
        probabilities[0, y : y + side, x : x + side] = 0.62
        scores.add(tmp_path / "test" / f"{number}_x.png", (48, 48), probabilities)
    return scores


@pytest.mark.parametrize("chosen, columns", [(0.3, 4), (0.45, 0), (0.05, None)])
def test_the_scores_with_the_threshold_from_valid_by_hand(graded, tmp_path, chosen, columns):
    valid = {"thresholds": SWEEP, "dice": [0.5] * len(SWEEP), "chosen_threshold": chosen}
    report = write_report(tmp_path, "test", graded, valid, ["foreground"])
    lesion = np.array([side**2 for _, _, side in BOXES])
    predicted = np.full(3, 48**2)
    if columns is not None:
        predicted = np.array([side * (side + columns) for _, _, side in BOXES])
    with_it = report["valid"]["scores_with_it"]
    assert with_it["dice"] == pytest.approx(2 * lesion.sum() / (lesion + predicted).sum())
    assert with_it["precision"] == pytest.approx(lesion.sum() / predicted.sum())
    assert report["scores"]["dice"] == 1  # at 0.5


def test_the_sweep_and_the_distances_in_mm_are_of_the_cleaned_masks(tmp_path):
    """The true square, moved by four columns, and a speck that the clean-up removes."""
    write_split(tmp_path / "test", {"a.png": Image.new("RGB", (48, 48))}, [(0, square(5, 8, 10))])
    dataset = data.open_split(tmp_path, "test", 48)
    scores = FolderScores(dataset, 0.5, clean="largest", spacing=(2.0, 3.0))
    probabilities = np.zeros((1, 48, 48), np.float32)
    probabilities[0, 8:18, 9:19] = probabilities[0, 40, 40] = 0.92
    scores.add(tmp_path / "test/a.png", (48, 48), probabilities)
    counts, distances = scores.result()
    assert {tuple(own) for own in counts[0, :, 0]} == {
        (60, 40, 40, 48 * 48 - 140),
        (0, 0, 100, 2204),
    }
    # Of each outline of 36 pixels, the rows that both have and the pixels next to them are near.
    assert distances[0, 0].tolist() == [12, 14 / 36]


def test_a_panel_shows_the_image_that_its_title_names(graded, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "medseg.predicting.report.plot_report", lambda *arguments: drawn.append(arguments)
    )
    write_report(tmp_path, "test", graded, None, ["foreground"])
    ((_, dice, cases, _),) = drawn
    assert dice.tolist() == [1, 1, 1] and len(cases) == 3
    for picture, target, pred, title in cases:
        number = int(re.search(r"(\d)_x\.png", title)[1])
        x, y, side = BOXES[number]
        expected = np.zeros((48, 48), bool)
        expected[y : y + side, x : x + side] = True
        assert (picture == 40 * number).all() and picture.shape == (48, 48, 3)
        np.testing.assert_array_equal(target[0] > 0, expected)
        np.testing.assert_array_equal(pred[0] > 0, expected)


def test_a_pixel_at_the_threshold_is_background():
    target, probabilities = np.ones((1, 2, 2), bool), np.full((1, 2, 2), 0.5, np.float32)
    counts = count_image(target, probabilities, [0.45, 0.5])
    assert counts.tolist() == [[[4, 0, 0, 0]], [[0, 0, 4, 0]]]


def test_calibration_by_hand(graded, tmp_path):
    """0.62 where there are lesions alone, 0.42 and 0.22 where there is none: three of 15 bins."""
    report = write_report(tmp_path, "test", graded, None, ["foreground"])["calibration"]
    total, lesion = 3 * 48**2, sum(side**2 for _, _, side in BOXES)
    right = sum(4 * side for _, _, side in BOXES)
    rest = total - lesion - right
    error = (0.38 * lesion + 0.42 * right + 0.22 * rest) / total
    assert report["expected_calibration_error"] == pytest.approx(error)
    curve = report["classes"]["foreground"]
    assert curve["pixels"] == [rest, right, lesion] and curve["foreground"] == [0, 0, 1]
    assert curve["mean_probability"] == pytest.approx([0.22, 0.42, 0.62])
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["calibration"] == report


def test_calibration_at_the_edges_of_the_bins():
    """Of 1/15 in the first bin, of what is just above in the second; 0 and 1 in the outer ones."""
    values = np.array([0, 1 / 15, np.nextafter(np.float32(1 / 15), 1), 1, np.nan], np.float32)
    sums = count_calibration(np.array([[[0, 1, 1, 1, 1]]], bool), values.reshape(1, 1, 5))[0]
    assert sums[:, 0].tolist() == [2, 1, *[0] * 12, 1] and sums[:, 1].tolist()[:2] == [1, 1]
    assert calibration_error(np.zeros((15, 3))) == 0


def test_calibration_against_monai():
    monai_calibration = pytest.importorskip("monai.metrics.calibration")
    rng = np.random.default_rng(0)
    probabilities = rng.beta(0.3, 0.5, (2, 3, 40, 50)).astype(np.float32)
    targets = rng.random(probabilities.shape) < probabilities**2
    tensors = torch.from_numpy(probabilities), torch.from_numpy(targets).float()
    means, shares, pixels = monai_calibration.calibration_binning(*tensors, num_bins=15)
    for image in range(2):
        sums = count_calibration(targets[image], probabilities[image])
        np.testing.assert_array_equal(sums[..., 0], pixels[image])
        np.testing.assert_allclose(sums[..., 2] / sums[..., 0], means[image], rtol=1e-5)
        gaps = (means - shares)[image].abs() * pixels[image] / (40 * 50)
        for channel in range(3):
            error = calibration_error(sums[channel])
            assert error == pytest.approx(gaps[channel].sum().item(), rel=1e-5) and error > 0.05


def test_lesion_sizes_false_alarms_and_distances_by_hand(graded, tmp_path, monkeypatch):
    """Six lesions of 10 to 60 pixels, each half found; three images without one."""
    lesions, alarms = [10, 20, 30, 40, 50, 60, 0, 0, 0], [0] * 7 + [5, 7]
    found = [size // 2 for size in lesions]
    missed = [size - hit for size, hit in zip(lesions, found, strict=True)]
    rest = [100 - size - alarm for size, alarm in zip(lesions, alarms, strict=True)]
    counts = np.array([found, alarms, missed, rest]).T
    distances = np.array([[[1, 0.5]], [[2, 1]], [[9, 0]], *[[[math.nan, math.nan]]] * 6])
    each = dict.fromkeys(range(9))
    monkeypatch.setattr("medseg.predicting.report.image_names", lambda _: list(map(str, each)))
    monkeypatch.setattr("medseg.predicting.report.plot_report", lambda *_: None)
    graded.result = lambda: (counts[:, None, None], distances)
    graded.case = lambda index: (None,) * 3
    report = write_report(tmp_path, "test", graded, None, ["foreground"])
    thirds = [[10, 20], [30, 40], [50, 60]]
    assert [group["pixels"] for group in report["by_lesion_size"]] == thirds
    dice = [2 * (low + high) / 2 / (1.5 * (low + high)) for low, high in thirds]
    assert [group["dice"] for group in report["by_lesion_size"]] == pytest.approx(dice)
    assert [group["images"] for group in report["by_lesion_size"]] == [2, 2, 2]
    assert report["no_lesion"] == {"images": 3, "with_false_alarm": 2}
    assert report["hd95"] == {"mean": 4.0, "median": 2.0, "left_out": 6}
    assert report["surface_dice"] == {"mean": 0.5, "median": 0.5, "left_out": 6}
    assert report["distance_unit"] == "px"


def test_outlines_run_around_their_pixels(monkeypatch, tmp_path):
    target, pred = np.zeros((2, 1, 12, 12), bool)
    target[0, 2:6, 3:9], pred[0, 7:, 8:] = True, True  # the second up to the border
    figure = figure_of(
        *(monkeypatch, plots.plot_predictions, [np.zeros((12, 12, 3))], [target], [pred], [""]),
        *(tmp_path / "predictions.png",),
        **{"title": "", "class_names": ["foreground"]},
    )
    extents = {}
    for contour in figure.axes[0].findobj(ContourSet):
        (path,) = contour.get_paths()
        box = path.get_extents()
        extents[to_hex(contour.get_edgecolor()[0])] = (box.x0, box.x1, box.y0, box.y1)
    # Half way between the centre of the last pixel inside and the first outside.
    assert extents[plots.TARGET_COLOR.lower()] == (2.5, 8.5, 1.5, 5.5)
    assert extents[plots.PRED_COLOR.lower()] == (7.5, 11.5, 6.5, 11.5)


CURVE = {"pixels": [9, 90], "mean_probability": [0.1, 0.9], "foreground": [0.2, 0.8]}


def figure_of(monkeypatch, plot, *arguments, **options):
    """The matplotlib figure that a function of medseg.plots draws; it is written too."""
    figures, save = [], plots.save_figure

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)
    plot(*arguments, **options)
    return figures[0]


def texts_in(figure):
    """Every word of a drawn figure."""
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def ticks_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_ticklocs() if low <= tick <= high]


def test_a_report_of_two_classes_is_in_words(monkeypatch, tmp_path):
    """File, folder and class names may hold what matplotlib takes for formulas."""
    names, odd = ("_edge", r"$\frac$ core"), r"a $\frac$ b"
    counts = np.array([[[9, 1, 2, 88], [0, 3, 4, 93]]] * 3)
    report = {
        "folder": odd,
        "image_size": 10,
        "images": 3,
        "class_names": names,
        "threshold": 0.5,
        "scores": class_scores(counts, names),
        "confidence_95": bootstrap(counts, names, samples=9),
        **{"hd95": {"median": None, "left_out": 6}, "surface_dice": {"mean": None}},
        "valid": None,
        "by_lesion_size": [{"pixels": [15, 15], "images": 3, "image_dice": 0.5}],
        "calibration": {"expected_calibration_error": 0.25, "classes": dict.fromkeys(names, CURVE)},
    }
    mask = np.zeros((2, 10, 10), bool)
    case = np.zeros((10, 10, 3), np.uint8), mask, mask, odd
    arguments = report, np.full(3, 0.4), [case] * 3, tmp_path / "report.png"
    figure = figure_of(monkeypatch, plot_report, *arguments)
    words = "\n".join(texts_in(figure))
    for name in (*names, odd, "pixel accuracy", "mean IoU", "Dice per image"):
        assert name in words, name
    for key in ("acc ", "image_dice", "background_acc", "miou", "dice/"):
        assert key not in words, key
    assert "15\n(3)" in words
    (counted,) = (axis for axis in figure.axes if axis.get_ylabel() == "images")
    assert ticks_in_view(counted.yaxis) == [0, 1, 2, 3]


def test_the_ticks_of_a_report_lie_apart_and_its_threshold_is_the_one_in_use(
    graded, tmp_path, monkeypatch
):
    valid = {"thresholds": SWEEP, "dice": [0.5] * len(SWEEP), "chosen_threshold": 0.3}
    figures, save = [], plots.save_figure
    monkeypatch.setattr(
        plots, "save_figure", lambda *given: (figures.append(given[0]), save(*given))
    )
    monkeypatch.setattr(
        "medseg.predicting.report.group_images", lambda *_: (["g"], np.zeros(3, int))
    )
    sizes = [{"pixels": [123456, 234567], "images": 99, "image_dice": 0.5}] * 3
    sizes = [{**one, "pixels": [n * 111111, n * 234567]} for n, one in enumerate(sizes, 1)]
    monkeypatch.setattr("medseg.predicting.report._scores_by_lesion_size", lambda _: sizes)
    write_report(tmp_path, "test", graded, valid, ["foreground"])
    (figure,) = figures
    (sweep,) = (axis for axis in figure.axes if axis.get_xlabel() == "threshold")
    (line,) = (line for line in sweep.lines if line.get_linestyle() == "--")
    assert list(line.get_xdata()) == [0.5, 0.5]
    assert any(axis.get_title() == "Dice of each of 1 groups" for axis in figure.axes)
    figure.draw_without_rendering()
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text()]
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other), axis.get_title()


@pytest.mark.parametrize("epochs", [1, 2, 50])
def test_curves_have_whole_epochs_and_words(epochs, monkeypatch, tmp_path):
    row = history_row(RunningScores("cpu").keys())
    history = [
        {**row, "epoch": number + 1, "val_loss": 1 / (number + 1)} for number in range(epochs)
    ]
    path = tmp_path / "curves.png"
    figure = figure_of(monkeypatch, plots.plot_curves, history, path, title=r"a $\frac$")
    words = texts_in(figure)
    assert {r"a $\frac$", "val pixel accuracy", "train Dice", "val IoU", "train loss"} <= set(words)
    assert f"best weights (epoch {epochs})" in words
    for axis in figure.axes:
        ticks = ticks_in_view(axis.xaxis)
        assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize("count", [1, 5])
def test_the_legend_of_predictions_fits_the_figure(count, monkeypatch, tmp_path):
    names = ("core", "edema", "enhancing", "necrosis", "vessel", "ventricle")
    mask = np.ones((6, 9, 9), bool)
    pictures = [np.zeros((9, 9, 3))] * count
    arguments = pictures, [mask] * count, [mask] * count, ["Dice 1.00"] * count
    options = {"title": "dataset/test: 256x256, 32 filters, threshold 0.5", "class_names": names}
    path = tmp_path / "predictions.png"
    figure = figure_of(monkeypatch, plots.plot_predictions, *arguments, path, **options)
    figure.draw_without_rendering()  # at the resolution that is measured
    width = figure.bbox.width
    for thing in (*figure.legends, figure._suptitle):
        box = thing.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= width


def test_images_of_one_name_and_records_of_one_file_are_all_in_the_report(place, dataset):
    """In folders below, files may be called the same; and two records may name one file."""
    test = dataset / "test"
    for number in (1, 2):
        (test / f"{number}").mkdir()
        (test / f"{number}_test.png").rename(test / f"{number}" / "same.png")

    def move(content):
        content["images"][1]["file_name"] = "1/same.png"
        content["images"][2]["file_name"] = "2/same.png"

    edit_annotations(test, move)
    predict.main([str(test), "--output", "scored"])
    report = json.loads((place / "scored" / "report.json").read_text())
    assert set(report["per_image"]) == {"0_test.png", "1/same.png", "2/same.png", "3_test.png"}

    def again(content):
        content["images"].append({**content["images"][0], "id": 99})
        content["annotations"].append({**content["annotations"][0], "id": 99, "image_id": 99})

    edit_annotations(test, again)
    predict.main([str(test), "--output", "scored"])
    report = json.loads((place / "scored" / "report.json").read_text())
    assert report["images"] == len(report["per_image"]) == 5
    first, second = (dice for name, dice in report["per_image"].items() if "0_test" in name)
    assert first == second
