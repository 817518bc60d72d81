"""The table of measurements that predict.py writes beside the masks, and what it refuses."""

import csv
import hashlib
import io
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    brightness_model,
    output_of,
    scan,
    script_here,
    write_dicom,
    write_nifti,
)
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import pdist

import predict
from medseg.full_size import full_size_stripes, sum_probabilities
from medseg.page.session import Session
from medseg.pieces import measure_pieces
from medseg.predicting.assessment import Assessment
from medseg.results.table import COLUMNS, Parts, measure, table_text


@pytest.fixture
def place(here):
    """The current folder: best_model.pth marks what is bright, at 32x32 pixels."""
    torch.save(brightness_model().state_dict(), "best_model.pth")
    return here


def bright_squares(height, width, *boxes):
    """A dark picture with bright boxes (x, y, width, height)."""
    pixels = np.full((height, width), 20, np.uint8)
    for x, y, box_width, box_height in boxes:
        pixels[y : y + box_height, x : x + box_width] = 235
    return pixels


def own_size():
    """Weights that mark the bright pixels themselves, whatever the size of the image."""
    torch.save(brightness_model(None).state_dict(), "best_model.pth")


def read_table(folder="predictions"):
    with open(Path(folder, "predictions.csv"), encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def table_of_page(place, folder):
    """The table that the page gives for the files in a folder."""
    session, model = Session(place, ("foreground",)), predict.open_model("best_model.pth", "cpu")
    session.predict([folder], lambda image: (model.predict(image), Assessment()))
    return session.table(0.5).read_text()


# ---- pieces ----------------------------------------------------------------------------------


def test_pieces_of_a_drawing():
    """Three pieces: a slanting line of 4 pixels that touch at corners, an L of 3, a dot."""
    drawing = """
        #.....##
        .#.....#
        ..#.....
        ...#..#.
    """
    rows = drawing.split()
    mask = np.array([[pixel == "#" for pixel in row] for row in rows])
    pieces = measure_pieces(mask, spacing=(1, 2))
    assert (pieces.count, pieces.largest, pieces.center) == (3, 4, (1.5, 1.5))
    assert pieces.diameter == pytest.approx(np.hypot(3, 3))
    assert pieces.diameter_mm == pytest.approx(np.hypot(3, 6))
    assert measure_pieces(mask[:, 4:6]) == (0, 0, None, None, None)
    assert measure_pieces(mask[:1, :1], (1, 1)) == (1, 1, (0, 0), 0, 0)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_pieces_against_scipy(dimensions):
    rng = np.random.default_rng(0)
    for share in (0.05, 0.2, 0.4, 1) * 5:
        mask = rng.random(rng.integers(1, 9, dimensions)) < share
        spacing = rng.random(dimensions) + 0.1
        numbers, count = ndimage.label(mask, np.ones((3,) * dimensions))
        pieces = measure_pieces(mask, spacing)
        assert pieces.count == count
        if not count:
            continue
        sizes = ndimage.sum_labels(mask, numbers, range(1, count + 1))
        pixels = np.argwhere(numbers == 1 + sizes.argmax())
        assert pieces.largest == sizes.max() and pieces.center == pytest.approx(pixels.mean(0))
        distances = [pdist(pixels * unit).max(initial=0) for unit in (1, spacing)]
        assert (pieces.diameter, pieces.diameter_mm) == pytest.approx(tuple(distances))


def test_measurements_of_two_classes_by_hand():
    labels = np.zeros((10, 20), np.uint8)
    labels[2:5, 4:9], labels[7, 18:], labels[9, 0] = 1, 1, 3
    left, none, dot = measure(
        *(labels, ["left", "none", "dot"], [0.9, 0.1, 0.8], [13.6, 0, 0.75]),
        **{"spacing": (0.5, 0.25), "depth": 4},
    )
    assert (left["pixels"], left["share"]) == (17, 17 / 200)
    assert (left["area_mm2"], left["volume_ml"]) == (17 * 0.125, 17 * 0.125 * 4 / 1000)
    assert (left["pieces"], left["largest_pixels"]) == (2, 15)
    assert (left["largest_x"], left["largest_y"], left["largest_z"]) == (6, 3, None)
    assert left["largest_diameter"] == pytest.approx(np.hypot(4, 2))
    assert left["largest_diameter_mm"] == pytest.approx(np.hypot(4 * 0.25, 2 * 0.5))
    assert left["highest_probability"] == 0.9
    assert left["mean_probability"] == pytest.approx(0.8)
    assert (none["pixels"], none["area_mm2"], none["pieces"]) == (0, 0, 0)
    assert none["largest_x"] is none["mean_probability"] is None
    assert (dot["largest_x"], dot["largest_y"], dot["mean_probability"]) == (0, 9, 0.75)
    (unknown,) = measure(labels, ["left"], [0.9], [13.6])
    assert unknown["area_mm2"] is unknown["volume_ml"] is unknown["largest_diameter_mm"] is None


def test_probabilities_at_the_size_of_the_image():
    rng = np.random.default_rng(0)
    probabilities = rng.random((2, 32, 32), np.float32)
    labels = rng.integers(0, 3, (70, 150)).astype(np.uint8)
    labels[:, :10] = 0
    sums = []
    for number, channel in enumerate(probabilities, 1):
        resized = Image.fromarray(channel).resize((150, 70), Image.Resampling.BILINEAR)
        full = np.concatenate([stripe for _, stripe in full_size_stripes(channel, (150, 70))], 1)
        np.testing.assert_array_equal(full, np.asarray(resized))
        sums.append(np.asarray(resized, float)[labels == number].sum())
    assert sum_probabilities(labels, probabilities) == pytest.approx(sums)


# ---- files -----------------------------------------------------------------------------------


def test_a_folder_of_pictures(place):
    own_size()
    Path("scans").mkdir()
    boxes = {"a": [(8, 4, 20, 10), (40, 30, 8, 4)], "b": []}
    for name, own in boxes.items():
        Image.fromarray(bright_squares(48, 64, *own)).save(f"scans/{name}.png")
    printed = output_of("predict.py", "scans", "--pixel-size", "0.5x0.25", cwd=place)
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


def test_the_page_measures_images_and_not_what_it_shows(place, monkeypatch):
    own_size()
    monkeypatch.setattr("medseg.page.session.VIEW_SIDE", 16)
    Image.fromarray(bright_squares(48, 64, (8, 4, 20, 10))).save("scan.png")
    output_of("predict.py", "scan.png", cwd=place)
    session, model = Session(place, ("foreground",)), predict.open_model("best_model.pth", "cpu")
    session.predict(["scan.png"], lambda image: (model.predict(image), Assessment()))
    shown, mask = session.view(0, 0.5), np.asarray(Image.open("scan_mask.png")) > 0
    assert shown.mask.size == shown.image.size == (16, 12)
    assert (shown.rows[0]["pixels"], shown.rows[0]["share"]) == (mask.sum(), mask.mean())


def test_one_picture_has_no_table(place):
    scan(40, 40, 5, 5, 20).save("scan.png")
    output_of("predict.py", "scan.png", "--output", "out", cwd=place)
    assert not list(Path("out").glob("*.csv"))


def test_a_dicom_series(place):
    """Slices that lie 2, 2 and 4 mm apart, in no order; the sum of the rows is the volume."""
    own_size()
    Path("ct").mkdir()
    axes = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}  # sagittal: slices along x
    for name, x in {"a": 4, "b": 0, "c": 8, "d": 2}.items():
        write_dicom(
            Path("ct", f"{name}.dcm"),
            bright_squares(32, 32, (8, 6, 10, 12)).astype(np.uint16),
            **{"PixelSpacing": [0.5, 0.8], "SeriesInstanceUID": "1.2.9", "WindowCenter": 128},
            **{"WindowWidth": 256, "ImagePositionPatient": [x, 70, 90], **axes},
        )
    printed = output_of("predict.py", "ct", cwd=place)
    rows = {row["image"]: row for row in read_table()}
    pixels = int(rows["a.dcm"]["pixels"])
    assert 100 < pixels < 150
    depths = {"b": 2, "d": 2, "a": 3, "c": 4}
    for name, depth in depths.items():
        row = rows[f"{name}.dcm"]
        assert float(row["area_mm2"]) == pytest.approx(pixels * 0.4)
        assert float(row["volume_ml"]) == pytest.approx(pixels * 0.4 * depth / 1000)
        assert row["series"] == "1.2.9"
    assert f"series 1.2.9: foreground {pixels * 0.4 * 11 / 1000:.4g} mL" in printed
    assert table_of_page(place, "ct") == Path("predictions/predictions.csv").read_text()


def test_pixel_size_is_that_of_files_that_tell_none(place):
    own_size()
    Path("scans").mkdir()
    pixels = bright_squares(32, 32, (8, 6, 10, 12))
    Image.fromarray(pixels).save("scans/a.png")
    write_dicom("scans/b.dcm", pixels.astype(np.uint16))
    write_dicom("scans/c.dcm", pixels.astype(np.uint16), PixelSpacing=[0.5, 0.8])
    voxels = np.repeat(pixels.T[..., None], 3, 2)
    write_nifti("scans/d.nii.gz", voxels, zooms=(0.5, 0.8, 3))
    output_of("predict.py", "scans", "--pixel-size", "0.3", cwd=place)
    rows = {row["image"]: row for row in read_table()}
    for name, area in {"a.png": 0.09, "b.dcm": 0.09, "c.dcm": 0.4}.items():
        own = float(rows[name]["area_mm2"])
        assert own == pytest.approx(int(rows[name]["pixels"]) * area), name
    volume = rows["d.nii.gz"]
    assert float(volume["volume_ml"]) == pytest.approx(int(volume["pixels"]) * 0.0012)
    session = Session(place, ("foreground",), pixel_size=(0.3, 0.3))
    model = predict.open_model("best_model.pth", "cpu")
    session.predict(
        sorted(Path("scans").iterdir()), lambda image: (model.predict(image), Assessment())
    )
    shown = [session.view(index, 0.5).rows[0] for index in range(4)]
    areas = [row["area_mm2"] / row["pixels"] for row in shown]
    assert areas == pytest.approx([0.09, 0.09, 0.4, 0.4])


@pytest.mark.parametrize(
    "values",
    [
        {"PixelSpacing": [0, 0.5]},
        {"PixelSpacing": [0.5, 0.5], "SeriesInstanceUID": "1.2.9"},  # two slices in one place
        {"ImagerPixelSpacing": [0.5, 0.5]},  # at the detector, not in the patient
    ],
)
def test_dicom_that_tells_less(place, values):
    Path("ct").mkdir()
    for name, z in {"a": 5, "b": 5, "c": 9}.items():
        where = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, z]}
        pixels = bright_squares(32, 32, (8, 6, 10, 12)).astype(np.uint16)
        write_dicom(Path("ct", f"{name}.dcm"), pixels, **where, **values)
    output_of("predict.py", "ct", cwd=place)
    for row in read_table():
        assert row["volume_ml"] == ""
        known = "SeriesInstanceUID" in values
        assert bool(row["area_mm2"]) == bool(row["largest_diameter_mm"]) == known


@pytest.mark.parametrize("unit, mm", [("mm", 1), ("micron", 1e-3), ("unknown", 1)])
def test_a_volume(place, unit, mm):
    """Two boxes, of which one reaches through three slices; spacing and places are the file's."""
    own_size()
    voxels = np.full((40, 36, 5), 20, np.uint8)
    voxels[5:15, 4:20, 1:4], voxels[30:36, 28:34, 2] = 235, 235
    write_nifti("brain.nii.gz", voxels, zooms=(0.5, 0.75, 3))
    image = nibabel.load("brain.nii.gz")
    image.header.set_xyzt_units(unit)
    nibabel.Nifti1Image(image.dataobj, image.affine, image.header).to_filename("brain.nii.gz")
    output_of("predict.py", "brain.nii.gz", "--output", "out", cwd=place)
    (row,) = read_table("out")
    mask = np.asarray(nibabel.load("out/brain_mask.nii.gz").dataobj) > 0
    numbers, count = ndimage.label(mask, np.ones((3, 3, 3)))
    largest = np.argwhere(numbers == 1)
    assert (row["image"], int(row["pieces"])) == ("brain.nii.gz", count) and count == 2
    assert int(row["pixels"]) == mask.sum() and int(row["largest_pixels"]) == len(largest)
    zooms = np.array(nibabel.load("brain.nii.gz").header.get_zooms()) * mm
    assert float(row["volume_ml"]) == pytest.approx(mask.sum() * np.prod(zooms) / 1000)
    center = [float(row[f"largest_{axis}"]) for axis in "xyz"]
    assert center == pytest.approx(largest.mean(0).tolist()) and row["area_mm2"] == ""
    expected = [pdist(largest * scale).max() for scale in (1, zooms)]
    found = [float(row["largest_diameter"]), float(row["largest_diameter_mm"])]
    assert found == pytest.approx(expected)
    assert table_of_page(place, "brain.nii.gz") == Path("out/predictions.csv").read_text()


def test_a_volume_whose_voxels_have_no_size(place):
    own_size()
    voxels = np.full((20, 20, 3), 20, np.uint8)
    voxels[5:15, 5:15] = 235
    content = bytearray(Path(write_nifti("a.nii", voxels)).read_bytes())
    content[80:84] = bytes(4)  # pixdim[1]
    Path("a.nii").write_bytes(content)
    printed = output_of("predict.py", "a.nii", "--output", "out", cwd=place)
    (row,) = read_table("out")
    assert "a.nii: its header gives a voxel no size" in printed and int(row["pixels"]) > 200
    assert row["volume_ml"] == row["largest_diameter_mm"] == ""


def test_texts_that_programs_would_misread():
    pandas = pytest.importorskip("pandas")
    names = ["=cmd|' /C calc'!A0", "+1.png", "-1.png", "@a.png", 'a,b\n"c".png', "脑 é.png"]
    rows = [{"image": name, "class": "=1", "pixels": 3, "share": 0.1 + 0.2} for name in names]
    text = table_text([*rows, {"image": "\udcff.png", "class": "x", "disagreement": 0.5}])
    content = text.encode("utf-8", "backslashreplace")
    assert content.startswith(b"\xef\xbb\xbfimage,class,")  # by which Excel knows UTF-8
    frame = pandas.read_csv(io.BytesIO(content))
    assert tuple(frame.columns) == (*COLUMNS, "disagreement")
    expected = [f"'{name}" for name in names[:4]] + names[4:] + ["\\udcff.png"]
    assert frame["image"].tolist() == expected and frame["class"][0] == "'=1"
    assert frame["share"][0] == pytest.approx(0.3) and frame["disagreement"][6] == 0.5
    assert frame["pixels"][0] == 3 and np.isnan(frame["largest_x"][0])


# ---- what cannot be written ------------------------------------------------------------------


def test_a_table_that_cannot_be_written_is_told_before_the_prediction(place, refused, monkeypatch):
    Path("scans").mkdir()
    for name in "ab":
        scan(40, 40, 5, 5, 20).save(f"scans/{name}.png")
    Path("out/predictions.csv").mkdir(parents=True)
    refused("predict", "scans", "--output", "out", words=["out/predictions.csv", "folder"])
    for name, content in {"predictions.csv": "id,label\n1,2\n", "predictions.json": "[]"}.items():
        Path("own").mkdir(exist_ok=True)
        Path("own", name).write_text(content)
        refused("predict", "scans", "--output", "own", words=[f"own/{name}", "was not written by"])
        assert Path("own", name).read_text() == content
        Path("own", name).unlink()
    assert [path.name for path in Path("out").iterdir()] == ["predictions.csv"]
    predict.main(["scans", "--output", "again"])
    predict.main(["scans", "--output", "again"])  # its own table is replaced
    real = open

    def locked(path, mode="r", *args, **options):
        if mode == "ab":  # as Windows does where Excel has the file open
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr("builtins.open", locked)
    refused("predict", "scans", "--output", "again", words=["again/predictions", "close it"])


def test_a_table_that_is_locked_meanwhile_is_kept_beside(place, refused, monkeypatch):
    Path("scans").mkdir()
    for name in "ab":
        scan(40, 40, 5, 5, 20).save(f"scans/{name}.png")
    replace = os.replace

    def locked(source, target):
        if Path(target).name == "predictions.csv":
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    other = f"predictions.{os.getpid()}.csv"
    refused("predict", "scans", words=["predictions/predictions.csv", other])
    (kept,) = Path("predictions").glob("*.csv")
    assert kept.name == other and kept.read_text(encoding="utf-8-sig").count("\n") == 3


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1x0", "1x2x3", "wide", ""])
def test_pixel_sizes_that_are_refused(place, refused, size):
    refused("predict", "--pixel-size", size, words=["--pixel-size"])


# ---- many, and several processes -------------------------------------------------------------


@pytest.mark.parametrize("other, write", [("d.dcm", "coco"), ("e.nii.gz", "mask")])
def test_failed_images_have_no_row_and_do_not_count(place, other, write):
    Path("scans").mkdir()
    for name in "abc":
        scan(40, 40, 5, 5, 20).save(f"scans/{name}.png")
    for name in ("b.png", other):
        Path("scans", name).write_bytes(b"damaged")
    result = script_here("predict.py", "scans", "--write", write, cwd=place)
    assert result.returncode == 2 and "2 of 4" in result.stderr
    assert "in 2 of 2 images" in result.stdout
    assert [row["image"] for row in read_table()] == ["a.png", "c.png"]
    settings = json.loads(Path("predictions/predictions.json").read_text())
    assert settings["images"] == 2
    left_out = {one["file"]: one["why"] for one in settings["left_out"]}
    assert sorted(left_out) == ["scans/b.png", f"scans/{other}"]
    assert all(name in why for name, why in left_out.items())
    for path in Path("predictions").glob("*.coco.json"):
        records = json.loads(path.read_text())["images"]
        assert [record["file_name"] for record in records] == ["a.png", "c.png"]


def test_up_to_twenty_images_have_a_line_each(place):
    Path("scans").mkdir()
    for number in range(20):
        scan(40, 40, 5, 5, 20).save(f"scans/{number:02}.png")
    assert output_of("predict.py", "scans", cwd=place).count("highest probability") == 20
    scan(40, 40, 5, 5, 20).save("scans/20.png")
    printed = output_of("predict.py", "scans", cwd=place)
    assert "highest probability" not in printed and "in 21 of 21 images" in printed


def test_the_last_process_puts_the_parts_together(here):
    Parts(here, 1, 3).put("old")  # of a run that was killed
    Path(".predictions-another-0-of-2.part").touch()
    parts = [Parts(here, rank, 3) for rank in range(3)]
    assert parts[2].put([2]) == parts[0].put([0]) == []
    assert parts[1].put([1]) == [[0], [1], [2]] and list(here.iterdir()) == []


def test_processes_write_one_table(place, monkeypatch):
    Path("scans").mkdir()
    for name in "abcde":
        scan(40, 40, 5, 5, 20).save(f"scans/{name}.png")
    printed = []
    for rank in "01":
        for key, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(key, value)
        assert not Path("predictions/predictions.csv").exists()
        printed.append(output_of("predict.py", "scans", cwd=place))
    assert [row["image"] for row in read_table()] == [f"{name}.png" for name in "abcde"]
    assert ["in 5 of 5 images" in text for text in printed] == [False, True]
    assert not list(Path("predictions").glob(".*"))
