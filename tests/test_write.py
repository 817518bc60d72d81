"""What predict.py writes beside the masks: annotations, probabilities, objects, the table."""

import csv
import io
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    brightness_model,
    output_of,
    run_download,
    save,
    save_turned,
    stored,
    write_dicom,
    write_nifti,
)
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from scipy import ndimage
from scipy.spatial.distance import pdist

import predict
from medseg.inference import Inference
from medseg.predicting.inputs import Frame
from medseg.predictor import Prediction
from medseg.results.folder import Results
from medseg.results.masks import Masks
from medseg.results.outlines import trace_labels
from medseg.results.table import COLUMNS, measure, program_version, table_text
from net import ModelInfo


def draw_as_labelme(shapes, size):
    """{label: bool array}, as LabelMe's own shape_to_mask draws polygons, later over earlier."""
    masks = {}
    for shape in shapes:
        canvas = Image.new("1", size)
        points = [tuple(point) for point in shape["points"]]
        assert len(points) > 2 and points[0] not in points[1:]  # which LabelMe takes for the end
        ImageDraw.Draw(canvas).polygon(points, outline=1, fill=1)
        for mask in masks.values():
            mask &= ~np.asarray(canvas)
        masks.setdefault(shape["label"], np.zeros(size[::-1], bool))
        masks[shape["label"]] |= np.asarray(canvas)
    return masks


@pytest.mark.parametrize("classes", [1, 3])
def test_outlines_give_back_every_pixel(classes):
    """Noise has it all: dots, lines, holes, pieces in holes, classes that cross at corners."""
    rng = np.random.default_rng(0)
    for trial in range(90):
        labels = rng.integers(1, classes + 1, rng.integers(1, 16, 2)).astype(np.uint8)
        labels[rng.random(labels.shape) > (0.2, 0.5, 0.8)[trial % 3]] = 0
        if trial % 2:
            labels = np.kron(labels, np.ones((3, 2), np.uint8))
        shapes = [{"label": number, "points": points} for number, points in trace_labels(labels)]
        drawn = np.zeros_like(labels)
        for number, mask in draw_as_labelme(shapes, labels.shape[::-1]).items():
            drawn[mask] = number
        np.testing.assert_array_equal(drawn, labels)
    between = np.array([[1, 1, 2], [1, 0, 2], [1, 1, 2]], np.uint8)  # no polygon covers the 0
    assert [number for number, _ in trace_labels(between)] == [1, 2]


# ---- annotations -----------------------------------------------------------------------------


def bright(height, width, *boxes):
    """A dark picture with boxes (x, y, width, height, value)."""
    pixels = np.full((height, width), 20, np.uint8)
    for x, y, box_width, box_height, value in boxes:
        pixels[y : y + box_height, x : x + box_width] = value
    return pixels


RING = ((4, 4, 30, 30, 235), (14, 14, 10, 10, 20), (18, 18, 3, 3, 235), (50, 10, 6, 30, 235))
SHOWN = bright(64, 40, (10, 4, 20, 50, 235), (2, 20, 4, 3, 235))


@pytest.fixture
def place(here):
    """best_model.pth, which marks bright pixels, and scans/ with a ring and a picture turned."""
    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    save(Image.fromarray(bright(48, 64, *RING)), "scans/a.png")
    save_turned(SHOWN, "scans/b.tif", 6)
    return here


def mask_of(path):
    return np.asarray(Image.open(path)) > 0


def test_annotations_are_read_back_bit_for_bit(place, refused):
    """LabelMe files beside their images and in a folder of their own; the COCO file."""
    for folder in ("scans", "m"):
        predict.main(["scans", "--write", "labelme,coco,mask", "--output", folder])
        content = json.loads(Path(folder, "a.json").read_text())
        assert {"version", "flags", "shapes", "imagePath", "imageData"} <= content.keys()
        assert content["imagePath"] == ("a.png" if folder == "scans" else "../scans/a.png")
        assert (content["imageHeight"], content["imageWidth"]) == (48, 64)
        masks = {name: mask_of(f"{folder}/{name}_mask.png") for name in "ab"}
        for path in Path(folder).glob("*_mask.png"):
            path.unlink()
        run_download("--labelme", folder, *ALL, "--data", folder + "_set")
        for name, mask in masks.items():
            own = stored("train", folder + "_set")[name]["foreground"]
            np.testing.assert_array_equal(own, mask)
    assert not masks["a"][15, 15] and masks["a"][19, 19]  # a hole, and a piece in it
    np.testing.assert_array_equal(masks["b"], SHOWN > 100)  # not as it is stored
    drawn = draw_as_labelme(content["shapes"], (64, 48))
    np.testing.assert_array_equal(drawn["foreground"], masks["a"])
    assert drawn.keys() == {"foreground", "_background_"}
    save(Image.new("L", (9, 9)), "scans/a_foreground.png")
    refused("predict", "scans", "--write=mask,classes", words=["a_foreground_mask.png"])
    # What may have been corrected since is not written again.
    refused("predict", "scans", "--write=labelme", "--output=m", words=["m/a.json", "--output"])
    run_download("--coco", "m/predictions.coco.json", "scans", *ALL)
    coco = COCO("m/predictions.coco.json")
    for number, name, count in ((1, "a.png", 3), (2, "b.tif", 2)):
        mask, (image,) = masks[name[0]], coco.loadImgs([number])
        assert (image["file_name"], image["height"], image["width"]) == (name, *mask.shape)
        outlines = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        pieces = [coco.annToMask(outline) for outline in outlines]
        assert len(pieces) == count
        for outline, piece in zip(outlines, pieces, strict=True):
            (top, left), (bottom, right) = np.argwhere(piece).min(0), np.argwhere(piece).max(0)
            assert outline["area"] == piece.sum()
            assert outline["bbox"] == [left, top, right - left + 1, bottom - top + 1]
        np.testing.assert_array_equal(np.sum(pieces, 0), mask)
        np.testing.assert_array_equal(stored()[name[0]]["foreground"], mask)


def test_predictions_that_nobody_has_saved_since_are_told_apart(place, refused):
    predict.main(["scans", "--write", "labelme", "--output", "scans"])
    corrected = Path("scans/b.json")
    content = json.loads(corrected.read_text())
    for label in content["shapes"]:  # as LabelMe saves a file, its own version in it
        label["label"] = label["label"].replace("foreground", "cell")
    corrected.write_text(json.dumps({**content, "version": "5.5.0"}, indent=2))
    run_download("--labelme", "scans", "--split", 50, 0, 50, "--unreviewed", "keep")
    assert len(stored()) == len(stored("test")) == 1
    run_download("--labelme", "scans", "--into", "train", "--unreviewed", "skip", "--force")
    assert set(stored()) == {"b"} and set(stored()["b"]) == {"cell"}
    run_download("--labelme", "scans", "--into", "valid")
    add = *("--labelme", "scans", "--into", "valid"), *("--add", "--duplicates=keep", "--prefix=n")
    refused("download", *add, words=["scans: 1 of 2 files", "a.json", "--unreviewed"])
    run_download(*add, "--unreviewed", "skip")
    assert set(stored("valid")) == {"a", "b", "nb"}
    corrected.unlink()
    refused("download", *add, "--unreviewed", "skip", words=["scans: 1 of 1 files"])


def save_one(write, masks, order=()):
    """Write files of masks, bool (C, H, W), here; returns rows of the table, a record of COCO."""
    frame = Frame(Path("scans/a.png"), "a", "a.png", None)
    info = ModelInfo(class_names=("a/b", "a b", "脑"), draw_order=order)
    results = Results(Path("."), SimpleNamespace(info=info, inference=Inference()), write)
    image = SimpleNamespace(size=masks.shape[:0:-1])
    results.add(frame, image, Prediction(masks.astype(np.float32)))
    return results.rows["a.png"], results.records.get("a.png")


def test_objects_are_numbered_class_by_class(here):
    """Two boxes that touch at a corner are one; of a third class, a line of dots and a dot."""
    masks = np.zeros((3, 48, 64), bool)
    masks[0, 30:40, 40:50] = masks[0, 2:5, 2:6] = masks[0, 5:9, 6:9] = True
    masks[2, range(20, 24), range(30, 34)] = masks[2, 0, 63] = True
    kinds = ("objects", "classes", "coco", "labelme", "probability")
    rows, record = save_one(kinds, masks)
    shapes = json.loads(Path("a.json").read_text())["shapes"]
    assert {shape["label"] for shape in shapes} == {"a/b", "脑"}
    numbers = np.asarray(Image.open("a_objects.png"))
    assert numbers.dtype == np.uint16
    assert np.unique(numbers[masks[0]]).tolist() == [1, 2] and numbers[3, 3] == numbers[7, 7]
    assert (numbers[0, 63], numbers[20, 30], numbers[23, 33]) == (3, 4, 4)
    np.testing.assert_array_equal(numbers > 0, masks.any(0))
    assert [row["pieces"] for row in rows] == [2, 0, 2]
    assert [row["first_object"] for row in rows] == [1, None, 3] and rows[0]["area_mm2"] is None
    assert (rows[0]["mean_pixels"], rows[2]["median_pixels"]) == (62, 2.5)
    found = [(one["category_id"], one["area"]) for one in record["annotations"]]
    assert found == [(1, 24), (1, 100), (3, 1), (3, 4)]
    for index, name in enumerate(("a_b_1", "a_b_2", "脑")):
        np.testing.assert_array_equal(Image.open(f"a_{name}_mask.png"), 255 * masks[index])
        levels = np.asarray(Image.open(f"a_{index + 1}_probability.png"))
        np.testing.assert_array_equal(levels, 65535 * masks[index])
    # A class within another: its objects are drawn over, and both are measured in full.
    masks = np.zeros((3, 20, 20), bool)
    masks[0, 5:9, 5:9], masks[2, 2:18, 2:18] = True, True
    rows, record = save_one(("objects", "classes", "coco"), masks, order=(2, 3, 1))
    assert [row["pixels"] for row in rows] == [16, 0, 256]
    assert [one["area"] for one in record["annotations"]] == [16, 256]
    np.testing.assert_array_equal(Image.open("a_脑_mask.png"), 255 * masks[2])
    np.testing.assert_array_equal(Image.open("a_objects.png"), np.where(masks[0], 1, 2 * masks[2]))
    with pytest.raises(ValueError, match="scans/a.png: more than 65535"):
        save_one(("objects",), np.kron(np.ones((3, 300, 300)), [[1, 0], [0, 0]]) > 0)


def test_outlines_are_thinned(place):
    y, x = np.mgrid[:48, :64]
    disc = np.hypot(x - 32, y - 24) < 20
    save(Image.fromarray(235 * disc.astype(np.uint8)), "scans/a.png")
    predict.main(["scans/a.png", "--write", "labelme", "--output", "out", "--simplify", "1"])
    (shape,) = json.loads(Path("out/a.json").read_text())["shapes"]
    assert len(shape["points"]) < 25
    drawing = draw_as_labelme([shape], (64, 48))["foreground"]
    assert (drawing != disc).sum() < 40  # of some 126 at its border


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("scans", "--write", "masks"), ["--write", "did you mean mask?"]),
        (("scans/a.png", "--write", "coco", "--output", "a.png"), ["--write", "a.png"]),
        (("v.nii", "--write", "labelme"), ["v.nii", "--write labelme", "3D Slicer"]),
        (("scans", "--pixel-size", "nan"), ["--pixel-size"]),
    ],
)
def test_what_cannot_be_written(place, refused, arguments, words):
    write_nifti("v.nii", np.zeros((20, 20, 2), np.uint8))
    refused("predict", *arguments, words=words)
    assert not list(Path("predictions").glob("*")) and not list(place.glob("v_*"))


# ---- the table -------------------------------------------------------------------------------


def read_table(folder="predictions"):
    with open(Path(folder, "predictions.csv"), encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_pieces_against_scipy(dimensions):
    rng = np.random.default_rng(0)
    for share in (0, 0.05, 0.2, 0.4, 1) * 5:
        mask = rng.random(rng.integers(1, 9, dimensions)) < share
        spacing = tuple(rng.random(dimensions) + 0.1)
        numbers, count = ndimage.label(mask, np.ones((3,) * dimensions))
        (row,) = measure(Masks(mask, mask[None], [0], [0]), "a", spacing)
        assert (row["pixels"], row["pieces"]) == (mask.sum(), count)
        if not count:
            continue
        sizes = ndimage.sum_labels(mask, numbers, range(1, count + 1))
        pixels = np.argwhere(numbers == 1 + sizes.argmax())
        center = [row[f"largest_{axis}"] for axis in ("yx" if dimensions == 2 else "xyz")]
        assert row["largest_pixels"] == sizes.max() and center == pytest.approx(pixels.mean(0))
        distances = [pdist(pixels * unit).max(initial=0) for unit in (1, spacing)]
        own = [row["largest_diameter"], row["largest_diameter_mm"]]
        assert own == pytest.approx(distances)


def test_the_version_is_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.results.table.ROOT", tmp_path)
    assert program_version() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a b"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert program_version() == commit.stdout.strip()


def test_a_folder_of_pictures_and_a_picture_alone(place, refused):
    torch.save(brightness_model(32).state_dict(), "best_model.pth")
    save(Image.fromarray(bright(48, 64, (8, 4, 20, 10, 235), (40, 30, 8, 4, 235))), "scans/a.png")
    save(Image.new("L", (64, 48), 20), "scans/b.tif")
    flags = ("--pixel-size", "0.5x0.25", "--write", "mask,overlay,objects,probability")
    printed = output_of("predict.py", "scans", *flags, cwd=place)
    assert "in 1 of 2 images" in printed and "measured: predictions/predictions.csv" in printed
    first, second = read_table()
    assert tuple(first) == COLUMNS and first["image"] == "a.png"
    mask, levels = mask_of("predictions/a_mask.png"), Image.open("predictions/a_probability.png")
    assert 200 < mask.sum() < 300  # the network blurs the edges of the 232 pixels
    assert int(first["pixels"]) == mask.sum() and first["pieces"] == "2"
    assert float(first["area_mm2"]) == pytest.approx(mask.sum() * 0.125)
    assert float(first["share"]) == pytest.approx(mask.mean())
    assert (second["image"], second["pixels"], second["largest_x"]) == ("b.tif", "0", "")
    levels = np.asarray(levels)
    assert levels.dtype == np.uint16 and levels.shape == (48, 64)
    model = predict.open_models(["best_model.pth"], "cpu")
    probabilities = predict.predict_image(model, Image.open("scans/a.png")).probabilities[0]
    resized = Image.fromarray(probabilities).resize((64, 48), Image.Resampling.BILINEAR)
    assert np.abs(levels / 65535 - np.asarray(resized)).max() < 0.51 / 65535
    np.testing.assert_array_equal(levels > 0.5 * 65535, mask)
    mean = levels[mask].mean() / 65535
    assert float(first["mean_probability"]) == pytest.approx(mean, abs=1e-5)
    settings = json.loads(Path("predictions/predictions.json").read_text())
    assert settings["models"][0]["file"] == "best_model.pth"
    assert settings["pixel_size_mm"] == [0.25, 0.5] and settings["threshold"] == 0.5
    assert settings["images"] == 2 and settings["left_out"] == []
    # Nothing of ours is predicted again.
    refused("predict", "predictions", "--output", "twice", words=["no images"])
    predict.main(["scans/a.png", "--output", "one", *flags[:2]])
    figures = {"a_mask.png", "a_overlay.jpg", "a_prediction.png"}
    written = {path.name for path in Path("one").iterdir()}
    assert written == {*figures, "predictions.csv", "predictions.json"}
    assert read_table("one") == [first]
    for name in ("a_mask.png", "a_overlay.jpg"):
        assert Path("one", name).read_bytes() == Path("predictions", name).read_bytes()
    predict.main(["scans/a.png", "--output", "mask.png"])
    assert Path("mask.png").read_bytes() == Path("one/a_mask.png").read_bytes()
    assert not Path("predictions.csv").exists()


def test_sizes_in_mm(here, capsys):
    """--pixel-size is that of files that tell none; slices reach halfway to their neighbours.

    At 0, 2 and 6 mm: 2, 3 and 4 mm each, the outer ones as far outwards as inwards.
    """
    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    pixels = bright(32, 32, (8, 6, 10, 12, 235))
    save(Image.fromarray(pixels), "scans/plain.png")
    series = {"SeriesInstanceUID": "1.2.9", "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    for name, z in {"a": 6, "b": 0, "c": 2}.items():
        fields = {"ImagePositionPatient": [0, 0, z], "PixelSpacing": [0.5, 0.8]}
        write_dicom(f"scans/{name}.dcm", pixels.astype(np.uint16), **fields, **series)
    detector = {"ImagerPixelSpacing": [0.5, 0.5]}  # not in the patient
    write_dicom("scans/d.dcm", pixels.astype(np.uint16), **detector)
    predict.main(["scans", "--pixel-size", "0.3"])
    rows = read_table()
    areas = [float(row["area_mm2"]) / int(row["pixels"]) for row in rows]
    assert areas == pytest.approx([0.4] * 3 + [0.09] * 2)
    depths = [float(row["volume_ml"]) / float(row["area_mm2"]) * 1000 for row in rows[:3]]
    assert depths == pytest.approx([4, 2, 3]) and rows[3]["volume_ml"] == ""
    volume = sum(float(row["volume_ml"]) for row in rows[:3])
    assert f"series 1.2.9: foreground {volume:.4g} mL" in capsys.readouterr().out


def test_a_volume(here):
    """Two boxes, of which one reaches through three slices; spacing and places are the file's."""
    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    voxels = np.full((40, 36, 5), 20, np.uint8)
    voxels[5:15, 4:20, 1:4], voxels[30:36, 28:34, 2] = 235, 235
    spacing, affine = (0.5, 0.75, 3), np.diag([-0.5, 0.75, 3, 1])
    write_nifti("v.nii", voxels, affine)
    predict.main(["v.nii", "--write", "mask,probability,classes,objects", "--output", "out"])
    kinds = ("mask", "probability", "foreground_mask", "objects")
    assert {path.name for path in Path("out").glob("v_*")} == {f"v_{one}.nii.gz" for one in kinds}
    images = [nibabel.load(f"out/v_{kind}.nii.gz") for kind in kinds]
    mask, probabilities, own, numbers = (image.get_fdata() for image in images)
    assert images[1].get_data_dtype() == np.uint16
    assert (images[1].affine == affine).all()
    np.testing.assert_array_equal(probabilities > 0.5, mask > 0)
    np.testing.assert_array_equal(own, mask > 0)
    np.testing.assert_array_equal(numbers, ndimage.label(mask, np.ones((3, 3, 3)))[0])
    (row,), largest = read_table("out"), np.argwhere(numbers == 1)
    assert (row["image"], row["pieces"], row["area_mm2"]) == ("v.nii", "2", "")
    center = [float(row[f"largest_{axis}"]) for axis in "xyz"]
    assert center == pytest.approx(largest.mean(0).tolist())
    volume = np.sum(mask > 0) * np.prod(spacing) / 1000
    assert float(row["volume_ml"]) == pytest.approx(volume)
    assert float(row["largest_diameter_mm"]) == pytest.approx(pdist(largest * spacing).max())


def test_texts_that_programs_would_misread():
    name = 'a,b\n"脑".png'
    text = table_text([{"image": name, "share": 0.1 + 0.2, "disagreement": 0.5}])
    assert text.startswith("\ufeffimage,class,")  # by which Excel knows UTF-8
    (row,) = csv.DictReader(io.StringIO(text[1:]))
    assert tuple(row) == (*COLUMNS, "disagreement") and row["image"] == name
    assert (row["share"], row["disagreement"], row["pixels"]) == ("0.3", "0.5", "")


def test_a_table_that_is_locked_is_kept_beside(place, refused, monkeypatch):
    replace, other = os.replace, f"predictions.{os.getpid()}.csv"

    def locked(source, target):
        if Path(target).name == "predictions.csv":
            raise PermissionError(13, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", locked)
    refused("predict", "scans", words=["predictions/predictions.csv", other])
    (kept,) = Path("predictions").glob("*.csv")
    assert kept.name == other and kept.read_text(encoding="utf-8-sig").count("\n") == 3
