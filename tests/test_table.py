"""The table of measurements that predict.py writes beside the masks, and what it refuses."""

import csv
import hashlib
import io
import json
import os
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import brightness_model, output_of, scan, write_dicom, write_nifti
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import pdist

import predict
from medseg.results.masks import Masks
from medseg.results.table import COLUMNS, measure, program_version, table_text


@pytest.fixture
def place(here):
    """The current folder: best_model.pth marks what is bright, whatever the size of the image."""
    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    return here


def bright_squares(height, width, *boxes):
    """A dark picture with bright boxes (x, y, width, height)."""
    pixels = np.full((height, width), 20, np.uint8)
    for x, y, box_width, box_height in boxes:
        pixels[y : y + box_height, x : x + box_width] = 235
    return pixels


def save_scans(names):
    Path("scans").mkdir(exist_ok=True)
    for name in names:
        scan(40, 40, 5, 5, 20).save(f"scans/{name}.png")


def read_table(folder="predictions"):
    with open(Path(folder, "predictions.csv"), encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


# ---- measured --------------------------------------------------------------------------------


@pytest.mark.parametrize("dimensions", [2, 3])
def test_pieces_against_scipy(dimensions):
    rng = np.random.default_rng(0)
    for share in (0, 0.05, 0.2, 0.4, 1) * 5:
        mask = rng.random(rng.integers(1, 9, dimensions)) < share
        spacing = tuple(rng.random(dimensions) + 0.1)
        numbers, count = ndimage.label(mask, np.ones((3,) * dimensions))
        none, row = measure(
            Masks(mask, np.stack([mask & False, mask]), [0, 1], [0, 0]), "ab", spacing
        )
        assert none["pixels"] == none["pieces"] == 0 and none["largest_x"] is None
        assert row["pieces"] == count
        if not count:
            assert row["largest_pixels"] == 0 and row["largest_x"] is None
            continue
        sizes = ndimage.sum_labels(mask, numbers, range(1, count + 1))
        pixels = np.argwhere(numbers == 1 + sizes.argmax())
        center = [row[f"largest_{axis}"] for axis in ("yx" if dimensions == 2 else "xyz")]
        assert row["largest_pixels"] == sizes.max() and center == pytest.approx(pixels.mean(0))
        own = row["mean_pixels"], row["median_pixels"]
        assert own == pytest.approx((sizes.mean(), np.median(sizes)))
        distances = [pdist(pixels * unit).max(initial=0) for unit in (1, spacing)]
        own = row["largest_diameter"], row["largest_diameter_mm"]
        assert own == pytest.approx(tuple(distances))


def test_the_version_is_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.results.table.ROOT", tmp_path)
    assert program_version() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a b"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert program_version() == commit.stdout.strip()


# ---- files -----------------------------------------------------------------------------------


def test_a_folder_of_pictures_and_a_picture_alone(place):
    Path("scans").mkdir()
    boxes = {"a": [(8, 4, 20, 10), (40, 30, 8, 4)], "b": []}
    for name, own in boxes.items():
        Image.fromarray(bright_squares(48, 64, *own)).save(f"scans/{name}.png")
    flags = ("--pixel-size", "0.5x0.25")
    printed = output_of("predict.py", "scans", *flags, cwd=place)
    assert "in 1 of 2 images" in printed and "measured: predictions/predictions.csv" in printed
    first, second = read_table()
    assert tuple(first) == COLUMNS and first["image"] == "a.png"
    mask = np.asarray(Image.open("predictions/a_mask.png")) > 0
    assert 200 < mask.sum() < 300  # the network blurs the edges of the 232 pixels
    assert int(first["pixels"]) == mask.sum() and first["pieces"] == "2"
    assert float(first["area_mm2"]) == pytest.approx(mask.sum() * 0.125)
    assert float(first["share"]) == pytest.approx(mask.mean())
    assert float(first["largest_x"]) == pytest.approx(17.5, abs=0.3)
    assert float(first["largest_y"]) == pytest.approx(8.5, abs=0.3)
    assert 0.5 < float(first["mean_probability"]) <= float(first["highest_probability"]) < 1
    assert (second["image"], second["pixels"], second["largest_x"]) == ("b.png", "0", "")
    settings = json.loads(Path("predictions/predictions.json").read_text())
    weights = hashlib.sha256(Path("best_model.pth").read_bytes()).hexdigest()
    assert settings["models"] == [{"file": "best_model.pth", "sha256": weights}]
    assert settings["pixel_size_mm"] == [0.25, 0.5] and settings["threshold"] == 0.5
    assert settings["images"] == 2 and settings["left_out"] == []
    predict.main(["scans/a.png", "--output", "one", *flags])
    names = {path.name for path in Path("one").iterdir()}
    figures = {"a_mask.png", "a_overlay.jpg", "a_prediction.png"}
    assert names == {*figures, "predictions.csv", "predictions.json"}
    assert read_table("one") == [first]
    for name in ("a_mask.png", "a_overlay.jpg"):
        assert Path("one", name).read_bytes() == Path("predictions", name).read_bytes()
    predict.main(["scans/a.png", "--output", "mask.png"])
    assert Path("mask.png").read_bytes() == Path("one/a_mask.png").read_bytes()
    assert not Path("predictions.csv").exists()


def test_pixel_size_is_that_of_files_that_tell_none(place):
    Path("scans").mkdir()
    pixels = bright_squares(32, 32, (8, 6, 10, 12))
    Image.fromarray(pixels).save("scans/a.png")
    told = {"b": {}, "c": {"PixelSpacing": [0.5, 0.8]}, "e": {"PixelSpacing": [0, 0.5]}}
    told["f"] = {"ImagerPixelSpacing": [0.5, 0.5]}  # at the detector, not in the patient
    told["g"] = {"PixelSpacing": ["1e200", "0.5"]}
    for name, values in told.items():
        write_dicom(f"scans/{name}.dcm", pixels.astype(np.uint16), **values)
    write_nifti("scans/d.nii.gz", np.repeat(pixels.T[..., None], 3, 2), zooms=(0.5, 0.8, 3))
    predict.main(["scans", "--pixel-size", "0.3"])
    *rows, volume = sorted(read_table(), key=lambda row: row["image"].startswith("d"))
    for row in rows:
        area = 0.4 if row["image"] == "c.dcm" else 0.09
        assert float(row["area_mm2"]) == pytest.approx(int(row["pixels"]) * area), row
        assert row["volume_ml"] == ""
    assert len(rows) == 6
    assert float(volume["volume_ml"]) == pytest.approx(int(volume["pixels"]) * 0.0012)


def test_slices_of_a_series_reach_halfway_to_their_neighbours(place, capsys):
    """At 0, 2 and 6 mm: 2, 3 and 4 mm each, the outer ones as far outwards as inwards."""
    pixels = bright_squares(32, 32, (8, 6, 10, 12)).astype(np.uint16)
    Path("scans").mkdir()
    for name, z in {"a": 6, "b": 0, "c": 2}.items():
        fields = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        fields |= {"PixelSpacing": [0.5, 0.8], "SeriesInstanceUID": "1.2.9"}
        write_dicom(f"scans/{name}.dcm", pixels, **fields)
    predict.main(["scans"])
    rows = read_table()
    volumes = [
        int(row["pixels"]) * 0.4 * mm / 1000 for row, mm in zip(rows, (4, 2, 3), strict=True)
    ]
    assert [float(row["volume_ml"]) for row in rows] == pytest.approx(volumes)
    assert f"series 1.2.9: foreground {sum(volumes):.4g} mL" in capsys.readouterr().out


@pytest.mark.parametrize("unit, mm", [("micron", 1e-3), ("unknown", 1), ("mm", None)])
def test_a_volume(place, unit, mm):
    """Two boxes, of which one reaches through three slices; spacing and places are the file's.

    mm: of a unit, or None for voxels whose width the header does not tell.
    """
    voxels = np.full((40, 36, 5), 20, np.uint8)
    voxels[5:15, 4:20, 1:4], voxels[30:36, 28:34, 2] = 235, 235
    image = nibabel.Nifti1Image(voxels, np.diag([0.5, 0.75, 3, 1]))
    image.header.set_xyzt_units(unit)
    image.to_filename("brain.nii")
    if mm is None:
        content = bytearray(Path("brain.nii").read_bytes())
        content[80:84] = bytes(4)  # pixdim[1]
        Path("brain.nii").write_bytes(content)
    predict.main(["brain.nii", "--output", "out", "--write", "mask,probability"])
    (row,) = read_table("out")
    mask = np.asarray(nibabel.load("out/brain_mask.nii.gz").dataobj) > 0
    largest = np.argwhere(ndimage.label(mask, np.ones((3, 3, 3)))[0] == 1)
    assert (row["image"], row["pieces"], row["area_mm2"]) == ("brain.nii", "2", "")
    assert int(row["pixels"]) == mask.sum() and int(row["largest_pixels"]) == len(largest)
    center = [float(row[f"largest_{axis}"]) for axis in "xyz"]
    assert center == pytest.approx(largest.mean(0).tolist())
    highest = nibabel.load("out/brain_probability.nii.gz").get_fdata().max()
    assert float(row["highest_probability"]) == pytest.approx(highest, abs=1e-4)
    measured = [row[name] for name in ("volume_ml", "largest_diameter_mm")]
    if mm is None:
        assert measured == ["", ""]
        return
    zooms = np.array([0.5, 0.75, 3]) * mm
    expected = [mask.sum() * np.prod(zooms) / 1000, pdist(largest * zooms).max()]
    assert [float(text) for text in measured] == pytest.approx(expected)


def test_texts_that_programs_would_misread():
    names = ["=cmd|' /C calc'!A0", "+1.png", "-1.png", "@a.png", 'a,b\n"c".png', "脑 é.png"]
    rows = [{"image": name, "class": "=1", "pixels": 3, "share": 0.1 + 0.2} for name in names]
    text = table_text([*rows, {"image": "x.png", "class": "x", "disagreement": 0.5}])
    assert text.startswith("\ufeffimage,class,")  # by which Excel knows UTF-8
    found = list(csv.DictReader(io.StringIO(text[1:])))
    assert tuple(found[0]) == (*COLUMNS, "disagreement")
    assert [row["image"] for row in found] == [f"'{name}" for name in names[:4]] + names[4:] + [
        "x.png"
    ]
    assert (found[0]["class"], found[0]["share"]) == ("'=1", "0.3")
    assert found[6]["disagreement"] == "0.5"


# ---- what cannot be written, or read ---------------------------------------------------------


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.json"])
def test_a_table_of_somebody_else_stays(place, refused, name):
    save_scans("ab")
    Path("out").mkdir()
    Path("out", name).write_text("id,label\n1,2\n")
    refused("predict", "scans", "--output", "out", words=[f"out/{name}"])
    assert Path("out", name).read_text() == "id,label\n1,2\n"
    Path("out", name).unlink()
    assert not list(Path("out").iterdir())
    for _ in range(2):  # its own table is replaced
        predict.main(["scans", "--output", "out"])


def test_a_table_that_is_locked_is_kept_beside(place, refused, monkeypatch):
    save_scans("ab")
    replace, other = os.replace, f"predictions.{os.getpid()}.csv"

    def locked(source, target):
        if Path(target).name == "predictions.csv":
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    refused("predict", "scans", words=["predictions/predictions.csv", other])
    (kept,) = Path("predictions").glob("*.csv")
    assert kept.name == other and kept.read_text(encoding="utf-8-sig").count("\n") == 3


@pytest.mark.parametrize("size", ["0", "nan", "1x2x3", "wide"])
def test_pixel_sizes_that_are_refused(place, refused, size):
    refused("predict", "--pixel-size", size, words=["--pixel-size"])


def test_up_to_twenty_images_have_a_line_each(place, capsys):
    save_scans([f"{number:02}" for number in range(20)])
    predict.main(["scans"])
    assert capsys.readouterr().out.count("highest probability") == 20
    save_scans(["20"])
    predict.main(["scans"])
    printed = capsys.readouterr().out
    assert "highest probability" not in printed and "in 21 of 21 images" in printed
