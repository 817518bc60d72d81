"""--write: probabilities, LabelMe and COCO files, and the way back by download.py."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    brightness_model,
    run_download,
    save,
    save_turned,
    stored,
    write_dicom,
    write_nifti,
)
from PIL import Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from scipy import ndimage

import predict
from medseg.inference import Inference, full_size_masks
from medseg.predicting.inputs import Frame
from medseg.predictor import Prediction
from medseg.results.folder import Results
from medseg.results.outlines import trace_labels
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


def drawn(labels):
    """Class numbers as the outlines of `trace_labels` give them back."""
    shapes = [{"label": number, "points": points} for number, points in trace_labels(labels)]
    result = np.zeros_like(labels)
    for number, mask in draw_as_labelme(shapes, labels.shape[::-1]).items():
        result[mask] = number
    return result


@pytest.mark.parametrize("classes", [1, 3])
def test_outlines_give_back_every_pixel(classes):
    """Noise has it all: dots, lines, holes, pieces in holes, classes that cross at corners."""
    rng = np.random.default_rng(0)
    for trial in range(90):
        labels = rng.integers(1, classes + 1, rng.integers(1, 16, 2)).astype(np.uint8)
        labels[rng.random(labels.shape) > (0.2, 0.5, 0.8)[trial % 3]] = 0
        if trial % 2:
            labels = np.kron(labels, np.ones((3, 2), np.uint8))
        np.testing.assert_array_equal(drawn(labels), labels)


def test_outlines_of_a_drawing():
    """A ring with a dot in its larger hole: corners, and three points within the one pixel."""
    labels = np.zeros((9, 12), np.uint8)
    labels[1:8, 2:10], labels[2:7, 3:9], labels[4, 5] = 1, 0, 1
    ring, hole, dot = trace_labels(labels)
    assert [number for number, _ in (ring, hole, dot)] == [1, 0, 1]
    assert sorted(ring[1]) == [(2.5, 1.5), (2.5, 7.5), (9.5, 1.5), (9.5, 7.5)]
    assert sorted(hole[1]) == [(3.5, 2.5), (3.5, 6.5), (8.5, 2.5), (8.5, 6.5)]
    assert all((int(x), int(y)) == (5, 4) for x, y in dot[1]) and len(dot[1]) == 3


# ---- the command -----------------------------------------------------------------------------


def bright(height, width, *boxes):
    pixels = np.full((height, width), 20, np.uint8)
    for x, y, box_width, box_height, value in boxes:
        pixels[y : y + box_height, x : x + box_width] = value
    return pixels


RING = ((4, 4, 30, 30, 235), (14, 14, 10, 10, 20), (18, 18, 3, 3, 235), (50, 10, 6, 30, 235))


@pytest.fixture
def place(here):
    """best_model.pth, which marks bright pixels, and scans/ with a ring and a picture turned."""
    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    Path("scans").mkdir()
    Image.fromarray(bright(48, 64, *RING)).save("scans/a.png")
    turned = Image.fromarray(bright(40, 64, *RING))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save("scans/b.jpg", exif=exif, quality=95)
    return here


def two_classes():
    """Weights of two classes: bright pixels are both, the second is less probable."""
    model = brightness_model(None, n_classes=2, class_names=("cell", "nucleus"))
    with torch.no_grad():
        model.outc.weight[:, 0] = 8
        model.outc.bias[:] = torch.tensor([-4.0, -5.0])
    torch.save(model.state_dict(), "best_model.pth")


def mask_of(path):
    return np.asarray(Image.open(path)) > 0


def test_labelme_files_are_read_back_bit_for_bit(place):
    """Beside their images, and in a folder of their own from where they lead there."""
    for folder in ("scans", "m"):
        predict.main(["scans", "--write", "labelme,mask", "--output", folder])
        content = json.loads(Path(folder, "a.json").read_text())
        assert {"version", "flags", "shapes", "imagePath", "imageData"} <= content.keys()
        assert content["imagePath"] == ("a.png" if folder == "scans" else "../scans/a.png")
        assert (content["imageHeight"], content["imageWidth"]) == (48, 64)
        masks = {name: mask_of(f"{folder}/{name}_mask.png") for name in "ab"}
        assert not masks["a"][15, 15] and masks["a"][19, 19]  # a hole, and a piece in it
        assert masks["b"].shape == (64, 40)  # as it is shown
        drawing = draw_as_labelme(content["shapes"], (64, 48))["foreground"]
        np.testing.assert_array_equal(drawing, masks["a"])
        for path in Path(folder).glob("*_mask.png"):
            path.unlink()
        run_download("--labelme", folder, *ALL, "--data", f"{folder}_set")
        for name, mask in masks.items():
            own = stored("train", f"{folder}_set")[name]["foreground"]
            np.testing.assert_array_equal(own, mask)
    assert mask_of("m_set/train/a.png").shape[:2] == (48, 64)


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
    refused("download", "--coco", "c", "i", "--unreviewed", "skip", words=["--labelme"])


def test_corrections_are_not_overwritten(place, refused):
    predict.main(["scans", "--write", "labelme"])
    path = Path("predictions/b.json")
    assert json.loads(path.read_text())["imagePath"] == "../scans/b.jpg"
    path.write_text("corrected")
    refused("predict", "scans", "--write", "labelme", words=["predictions/a.json", "--output"])
    Path("predictions/a.json").unlink()
    refused("predict", "scans/b.jpg", "--output", "predictions", "--write", "labelme", words=[path])
    assert path.read_text() == "corrected" and not Path("predictions/a.json").exists()


def test_dicom_frames_become_pictures_for_labelme(place, refused):
    window = {"WindowCenter": 128, "WindowWidth": 256}
    Path("ct").mkdir()
    write_dicom("ct/a.dcm", bright(48, 64, *RING).astype(np.uint16), **window)
    predict.main(["ct", "--write", "labelme,mask", "--output", "out"])
    content = json.loads(Path("out/a.json").read_text())
    assert content["imagePath"] == "a.png" and Image.open("out/a.png").size == (64, 48)
    drawing = draw_as_labelme(content["shapes"], (64, 48))["foreground"]
    np.testing.assert_array_equal(drawing, mask_of("out/a_mask.png"))
    Path("out/a.json").unlink()
    Image.new("L", (4, 4)).save("out/a.png")  # another one than was written
    refused("predict", "ct", "--write", "labelme", "--output", "out", words=["out/a.png"])


def test_a_coco_file_is_read_by_pycocotools_and_read_back(place):
    predict.main(["scans", "--write", "coco,mask"])
    coco = COCO("predictions/predictions.coco.json")
    sizes = [(one["file_name"], one["width"], one["height"]) for one in coco.loadImgs([1, 2])]
    assert sizes == [("a.png", 64, 48), ("b.jpg", 40, 64)]  # as it is shown
    run_download("--coco", "predictions/predictions.coco.json", "scans", *ALL)
    for number, name in enumerate("ab", 1):
        mask = mask_of(f"predictions/{name}_mask.png")
        outlines = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert len(outlines) == ndimage.label(mask, np.ones((3, 3)))[1] == 3
        union = np.zeros(mask.shape, int)
        for outline in outlines:
            piece = coco.annToMask(outline)
            (top, left), (bottom, right) = np.argwhere(piece).min(0), np.argwhere(piece).max(0)
            assert outline["area"] == piece.sum()
            assert outline["bbox"] == [left, top, right - left + 1, bottom - top + 1]
            union += piece
        np.testing.assert_array_equal(union, mask)
        np.testing.assert_array_equal(stored()[name]["foreground"], mask)


def test_several_classes(place, refused):
    two_classes()
    kinds = "probability,labelme,coco,mask,classes"
    predict.main(["scans/a.png", "--write", kinds, "--output", "out"])
    wanted = {"mask", "1_probability", "2_probability", "cell_mask", "nucleus_mask"}
    names = {path.name for path in Path("out").glob("a*")}
    assert names == {"a.json", *(f"a_{kind}.png" for kind in wanted)}
    labels = np.asarray(Image.open("out/a_mask.png"))
    np.testing.assert_array_equal(mask_of("out/a_cell_mask.png"), labels == 1)
    shapes = json.loads(Path("out/a.json").read_text())["shapes"]
    np.testing.assert_array_equal(draw_as_labelme(shapes, (64, 48))["cell"], labels == 1)
    assert {shape["label"] for shape in shapes} == {"cell", "_background_"}
    content = json.loads(Path("out/predictions.coco.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["cell", "nucleus"]
    first, second = (np.asarray(Image.open(f"out/a_{n}_probability.png")) for n in (1, 2))
    assert first.dtype == np.uint16 and (first[labels == 1] > second[labels == 1]).all()
    Path("scans/a.png").rename("scans/b_nucleus.png")
    refused("predict", "scans", "--write", "classes,mask", words=["b_nucleus_mask.png"])


def save_one(labels, write, masks=None):
    """The files of class numbers, or of masks that overlap, as --write says, in this folder."""
    frame = Frame(Path("scans/a.png"), "a", "a.png", None)
    order = () if masks is None else (2, 3, 1)
    info = ModelInfo(class_names=("a/b", "a b", "脑"), draw_order=order)
    model = SimpleNamespace(info=info, inference=Inference())
    masks = labels == np.arange(1, 4)[:, None, None] if masks is None else masks
    prediction = Prediction(masks.astype(np.float32))
    results = Results(Path("."), model, write)
    results.add(frame, SimpleNamespace(size=masks.shape[:0:-1]), prediction)
    return results.rows["a.png"], results.records.get("a.png")


def test_objects_are_numbered_class_by_class(place):
    """Two boxes that touch at a corner are one; of a third class, a line of dots and a dot."""
    labels = np.zeros((48, 64), np.uint8)
    labels[30:40, 40:50], labels[2:5, 2:6], labels[5:9, 6:9] = 1, 1, 1
    labels[range(20, 24), range(30, 34)] = labels[0, 63] = 3
    rows, record = save_one(labels, ("objects", "classes", "coco"))
    numbers = np.asarray(Image.open("a_objects.png"))
    assert numbers.dtype == np.uint16
    assert np.unique(numbers[labels == 1]).tolist() == [1, 2] and numbers[3, 3] == numbers[7, 7]
    assert (numbers[0, 63], numbers[20, 30], numbers[23, 33]) == (3, 4, 4)
    np.testing.assert_array_equal(numbers > 0, labels > 0)
    assert [row["pieces"] for row in rows] == [2, 0, 2]
    assert [row["first_object"] for row in rows] == [1, None, 3]
    assert (rows[0]["mean_pixels"], rows[2]["median_pixels"]) == (62, 2.5)
    found = [(one["category_id"], one["area"], one["bbox"]) for one in record["annotations"]]
    assert found == [
        (1, 24, [2, 2, 7, 7]),
        (1, 100, [40, 30, 10, 10]),
        (3, 1, [63, 0, 1, 1]),
        (3, 4, [30, 20, 4, 4]),
    ]
    for name, number in {"a_a_b_1": 1, "a_a_b_2": 2, "a_脑": 3}.items():
        mask = np.asarray(Image.open(f"{name}_mask.png"))
        np.testing.assert_array_equal(mask, 255 * (labels == number))
    with pytest.raises(ValueError, match="scans/a.png: more than 65535"):
        noise = np.kron(np.ones((300, 300), np.uint8), [[1, 0], [0, 0]]).astype(np.uint8)
        save_one(noise, ("objects",))


def test_classes_that_overlap_have_files_of_their_own_masks(place):
    """A class within another: its objects are drawn over, and both are measured in full."""
    masks = np.zeros((3, 20, 20), bool)
    masks[0, 5:9, 5:9], masks[2, 2:18, 2:18] = True, True
    rows, record = save_one(None, ("objects", "classes", "coco"), masks)
    assert [row["pixels"] for row in rows] == [16, 0, 256]
    assert [one["area"] for one in record["annotations"]] == [16, 256]
    np.testing.assert_array_equal(Image.open("a_脑_mask.png"), 255 * masks[2])
    np.testing.assert_array_equal(Image.open("a_objects.png"), np.where(masks[0], 1, 2 * masks[2]))


def test_outlines_are_thinned(place):
    y, x = np.mgrid[:48, :64]
    disc = (np.hypot(x - 32, y - 24) < 20).astype(np.uint8)
    Image.fromarray(235 * disc).save("scans/a.png")
    counts = []
    for folder, thin in {"exact": (), "thin": ("--simplify", "1")}.items():
        predict.main(["scans/a.png", "--write", "labelme,mask", "--output", folder, *thin])
        (shape,) = json.loads(Path(folder, "a.json").read_text())["shapes"]
        counts.append(len(shape["points"]))
        drawing = draw_as_labelme([shape], (64, 48))["foreground"]
        differs = (drawing != mask_of(f"{folder}/a_mask.png")).sum()
        assert differs <= (2 * np.pi * 20 if thin else 0)
    assert counts[1] < counts[0] / 2


def test_probabilities_of_16_bits(place, refused):
    torch.save(brightness_model(32).state_dict(), "best_model.pth")
    predict.main(["scans", "--write", "probability,mask"])
    path = Path("predictions/a_probability.png")
    levels = np.asarray(Image.open(path))
    assert levels.dtype == np.uint16 and levels.shape == (48, 64)
    model = predict.open_models(["best_model.pth"], "cpu")
    probabilities = predict.predict_image(model, Image.open("scans/a.png")).probabilities
    resized = Image.fromarray(probabilities[0]).resize((64, 48), Image.Resampling.BILINEAR)
    assert np.abs(levels / 65535 - np.asarray(resized)).max() < 0.51 / 65535
    labels = full_size_masks(probabilities, (64, 48), 0.5)
    np.testing.assert_array_equal(levels > 0.5 * 65535, labels > 0)
    text = Path("predictions/predictions.csv").read_text("utf-8-sig")
    row, *_ = csv.DictReader(text.splitlines())
    mean = levels[labels > 0].mean() / 65535
    assert float(row["mean_probability"]) == pytest.approx(mean, abs=1e-5)
    predict.main(["scans", "--write", "mask,overlay,objects"])
    assert list(Path("predictions").glob("*_overlay.jpg"))  # nothing of ours is predicted again
    refused("predict", "predictions", "--output", "twice", words=["no images"])


def test_files_of_a_volume(place):
    voxels = np.full((40, 36, 3), 20, np.uint8)
    voxels[5:25, 4:20, 1], voxels[30:38, 25:33, :2] = 235, 235
    write_nifti("v.nii.gz", voxels, np.diag([-1, 1, 4, 1]))
    predict.main(["v.nii.gz", "--write", "probability,mask,classes,objects", "--output", "out"])
    kinds = ("mask", "probability", "foreground_mask", "objects")
    assert {path.name for path in Path("out").glob("v_*")} == {f"v_{one}.nii.gz" for one in kinds}
    images = [nibabel.load(f"out/v_{kind}.nii.gz") for kind in kinds]
    mask, probabilities, own, numbers = (image.get_fdata() for image in images)
    assert images[1].get_data_dtype() == np.uint16
    assert (images[1].affine == np.diag([-1, 1, 4, 1])).all()
    assert 0 <= probabilities.min() < 0.5 < probabilities.max() <= 1
    np.testing.assert_array_equal(probabilities > 0.5, mask > 0)
    np.testing.assert_array_equal(own, mask > 0)
    expected, count = ndimage.label(mask, np.ones((3, 3, 3)))
    pairs = np.unique(np.stack([numbers, expected]).reshape(2, -1), axis=1)
    assert count == 2 and pairs.shape == (2, 3)  # background, and a number for each piece


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("scans", "--write", "masks"), ["--write", "did you mean mask?"]),
        (("scans/a.png", "--write", "coco", "--output", "a.png"), ["--write", "a.png"]),
        (("v.nii", "--write", "labelme"), ["v.nii", "--write labelme", "3D Slicer"]),
        (("scans", "v.nii", "--write", "coco"), ["v.nii", "--write coco"]),
    ],
)
def test_what_cannot_be_written(place, refused, arguments, words):
    write_nifti("v.nii", np.zeros((20, 20, 2), np.uint8))
    refused("predict", *arguments, words=words)
    assert not list(Path("predictions").glob("*"))
    assert not Path("v_mask.nii.gz").exists()


@pytest.mark.parametrize("orientation", [2, 6, 8])
def test_what_is_stored_turned_is_predicted_as_it_is_shown(place, orientation):
    """Every file of a picture, in four formats, is that of its upright copy, in numbers too."""
    shown, kinds = (
        bright(40, 64, *RING, (60, 2, 3, 2, 255)),
        "mask,overlay,probability,labelme,coco",
    )
    Path("turned").mkdir()
    for suffix in ("png", "webp", "tif", "jpg"):
        save(Image.fromarray(shown), f"plain/{suffix}.png")
        options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
        save_turned(shown, f"turned/{suffix}.{suffix}", orientation, **options)
    # Of a JPEG file the values are others.
    ImageOps.exif_transpose(Image.open("turned/jpg.jpg")).save("plain/jpg.png")
    for folder in ("plain", "turned"):
        predict.main([folder, "--write", kinds, "--output", f"{folder}_out"])
    for path in Path("plain_out").glob("*.[pj][np]g"):
        own = np.asarray(Image.open(Path("turned_out") / path.name))
        np.testing.assert_array_equal(own, np.asarray(Image.open(path)), err_msg=path.name)
    np.testing.assert_array_equal(Image.open("turned_out/png_mask.png"), 255 * (shown > 100))
    for name in ("jpg", "png", "webp", "tif", "predictions.coco"):
        pair = [json.loads(Path(f"{of}_out/{name}.json").read_text()) for of in ("turned", "plain")]
        for key in {"shapes", "imageHeight", "imageWidth", "annotations"} & pair[0].keys():
            assert pair[0][key] == pair[1][key], (name, key)
