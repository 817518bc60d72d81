"""Prediction: the functions, the files it writes, and what it refuses; and scores of a folder."""

import csv
import itertools
import json
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    assert_done,
    brightness_model,
    edit_annotations,
    run_python,
    sample,
    scan,
    square,
    write_nifti,
    write_split,
)
from matplotlib.text import Text
from PIL import Image
from scipy import ndimage

import data
import predict
from medseg import plots
from medseg.drawing import class_colors
from medseg.inference import Inference
from medseg.metrics import SWEEP, image_dice
from medseg.predicting import inputs
from medseg.predicting.figure import choose_cases
from medseg.predicting.report import TOLERANCE, surface_scores, write_report
from medseg.predicting.scoring import FolderScores
from medseg.weights import PRETRAINED


@pytest.fixture
def place(here):
    """An empty folder with best_model.pth, which is the current one."""
    torch.save(brightness_model().state_dict(), "best_model.pth")
    return here


def write_scans(folder, stems):
    folder.mkdir()
    for stem in stems:
        scan(40, 40, 5, 5, 20).save(folder / f"{stem}.png")


def pictures(folder, ending=""):
    """The names of what is in a folder, but for the table."""
    names = {path.name for path in folder.iterdir()} - {"predictions.csv", "predictions.json"}
    return {name for name in names if name.endswith(ending)}


def dice_of(masks, targets):
    return 2 * (masks & targets).sum() / (masks.sum() + targets.sum())


def test_the_tutorials_functions(place):
    """On the default device, 'cuda', which is the CPU where there is no GPU."""
    scan(640, 640, 200, 300, 160).save(place / "scan.png")
    model = predict.load_model(place / "best_model.pth")
    assert not model.training and model.info.image_size == 32
    tensor, picture = predict.preprocess_image(place / "scan.png")
    assert tensor.shape == (1, 3, 256, 256) and tensor.dtype == torch.float32
    assert picture.size == (256, 256)
    mask = predict.predict_mask(model, tensor)
    assert mask.shape == (1, 1, 256, 256) and mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask[0, 0, 120:184, 80:144].mean() > 0.98 and mask.sum() < 66**2
    assert predict.predict_mask(model, tensor, threshold=1.0).sum() == 0
    predict.visualize_result(picture, mask)
    assert Image.open("predictions.png").width > 3 * 256

    labels = np.zeros((1, 1, 40, 80), np.uint8)
    labels[..., 20:30], labels[..., 40:50], labels[..., 60:70] = 1, 2, 3  # an eighth each
    options = {"class_names": "abc", "name": "a name that is long" * 20, "path": Path("f.png")}
    predict.visualize_result(Image.new("RGB", (80, 40)), labels, **options)
    figure = np.asarray(Image.open("f.png").convert("RGB"))
    for color in class_colors(3):
        assert (figure == color).all(2).sum() == pytest.approx(400 * 200 / 8, rel=0.1)
        assert (figure[250:, :21] == color).all(2).sum() > 100  # the legend, below the panels
    assert (figure[:24, :100] < 60).any()  # the name


def test_one_image(place, capsys):
    """Into this folder, into a file, and into a folder with a dot in its name."""
    own = {"scan_mask.png", "scan_overlay.jpg", "scan_prediction.png"}
    scan(200, 120, 60, 40, 40).save("scan.png")
    predict.main(["scan.png"])
    out, mask = capsys.readouterr().out, Image.open("scan_mask.png")
    assert pictures(place) == {"best_model.pth", "scan.png", *own}
    assert mask.size == (200, 120) and mask.mode == "L" and set(np.unique(mask)) == {0, 255}
    foreground, expected = np.asarray(mask) > 0, np.zeros((120, 200), bool)
    expected[40:80, 60:100] = True
    assert dice_of(foreground, expected) > 0.85
    assert f"foreground {100 * foreground.mean():.2f} %" in out and "highest probability" in out
    predict.main(["scan.png", "--output", "folder.v2"])
    assert pictures(place / "folder.v2") == own
    before = pictures(place)
    predict.main(["scan.png", "scan.png", "--output", "m.png"])  # named twice, it is one image
    assert pictures(place) == {*before, "m.png"}
    assert Path("m.png").read_bytes() == Path("scan_mask.png").read_bytes()


def test_images_that_differ_in_their_suffix_keep_it(place, refused):
    """A volume does not: its masks are volumes."""
    write_scans(place / "scans", "v")
    sides = {"a.png": 40, "a.jpg": 41, "b.bmp": 43, "c.tif": 44, "c.TIF": 45}
    for name, side in sides.items():
        scan(side, 40, 5, 5, 20).save(place / "scans" / name)
    for name in ("v.nii", "w.nii.gz", "w.nii"):
        write_nifti(place / "scans" / name, np.zeros((9, 9, 2), np.uint8))
    refused("predict", "scans", words=["w.nii", "w.nii.gz", "--output"])
    (place / "scans" / "w.nii").unlink()
    predict.main(["scans", "--output", "out"])
    masks = {path.name: Image.open(path).width for path in place.glob("out/*_mask.png")}
    expected = {"a_png": 40, "a_jpg": 41, "b": 43, "c_tif": 44, "c_TIF": 45, "v_png": 40}
    assert masks == {f"{name}_mask.png": side for name, side in expected.items()}
    assert pictures(place / "out", "_mask.nii.gz") == {"v_mask.nii.gz", "w_mask.nii.gz"}


@pytest.mark.slow
def test_long_and_odd_names_lose_nothing_and_no_more_is_loaded_than_needed(place):
    """Names of 250 bytes, equal but for their ends, and one of bytes that are no text."""
    code = """
import sys, predict
from medseg.cli import run_main
run_main(predict.main)
print(sorted({'torchvision', 'swanlab', 'matplotlib.pyplot'} & set(sys.modules)))
"""
    odd = os.fsdecode(b"\xff")
    write_scans(place / "scans", ["x" * 245 + "a", "x" * 245 + "b", "é" * 122, odd])
    write_nifti(place / "scans" / f"{'v' * 248}.nii", np.zeros((9, 9, 2), np.uint8))
    environment = {"PYTHONIOENCODING": "utf-8:strict", "LC_ALL": "C.UTF-8"}
    out = assert_done(run_python("-c", code, "scans", cwd=place, **environment))
    assert "saved 8 files in predictions" in out and out.strip().endswith("[]")
    masks = pictures(place / "predictions", "_mask.png")
    assert sorted(name[:90] for name in masks) == ["x" * 90] * 2 + ["é" * 90, f"{odd}_mask.png"]
    (volume,) = pictures(place / "predictions", "_mask.nii.gz")
    assert volume.startswith("v" * 90)


def test_files_that_cannot_be_read_are_counted_and_the_others_predicted(place, refused):
    """A picture, and one frame of two. They have no row, and the settings say why.

    What the folder holds besides is counted.
    """
    write_scans(place / "scans", ["a", "b_mask"])
    Path("scans/b.png").write_bytes(b"damaged")
    Path("scans/deeper").mkdir()
    # macOS writes the file with two dots before its name.
    for name in ("a.mat", "b.MAT", "README", "._a.png"):
        Path("scans", name).write_text("no picture")
    frames = Path(sample("SC_rgb_rle_2frame.dcm")).read_bytes()
    Path("scans/one.dcm").write_bytes(frames[:2600])
    words = ["2 of 4 left out", "b.png", "one.dcm"]
    refused("predict", "scans", "--output", "out", "--write", "mask,coco", words=words)
    assert pictures(place / "out", "_mask.png") == {"a_mask.png", "one_f000_mask.png"}
    aside = ".mat (2), files of these scripts (1), folders (1), no suffix (1)"
    assert inputs.left_aside(place / "scans") == aside
    titles = ["a.png", "one.dcm, frame 0"]
    settings = json.loads(Path("out/predictions.json").read_text())
    left_out = {(one["file"], Path(one["file"]).name in one["why"]) for one in settings["left_out"]}
    assert left_out == {("scans/b.png", True), ("scans/one.dcm", True)}
    assert settings["images"] == 2
    rows = csv.DictReader(Path("out/predictions.csv").read_text("utf-8-sig").splitlines())
    assert [row["image"] for row in rows] == titles
    coco = json.loads(Path("out/predictions.coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == titles
    several = inputs.describe_left_out([("x", str(number)) for number in range(5)], 9)
    assert several == "5 of 9 left out: 0; 1; 2; and 2 more"


def test_a_strangers_first_prediction(place, refused, monkeypatch, capsys):
    """Without an image it takes the example; without best_model.pth the repository's weights."""
    refused("predict", words=["download.py"])
    for path in (
        Path("dataset/synthetic/test/9.png"),
        inputs.EXAMPLE.with_name("1.jpg"),
        inputs.EXAMPLE,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        scan(64, 64, 10, 10, 20).save(path)
        predict.main([])
        out = capsys.readouterr().out
        assert f"taking {path}" in out and str(PRETRAINED) not in out
    Path("best_model.pth").unlink()
    predict.main([])
    assert str(PRETRAINED) in capsys.readouterr().out
    monkeypatch.setattr("medseg.weights.PRETRAINED", place / "none.pth")
    refused("predict", words=["best_model.pth", "python train.py"])


def test_bad_input(place, refused):
    write_scans(place / "scans", "ab")
    write_scans(place / "other", "a")
    (place / "text.png").write_text("no picture")
    (place / "text").write_text("no folder")
    (place / "empty").mkdir()
    (place / "empty" / "a.mat").write_text("no picture")
    before = sorted(place.rglob("*"))
    for command, word in {
        "text.png": "text.png",
        "nothing.png": "nothing.png",
        "empty": ".mat (1)",
        "scans/a.png --model missing.pth": "missing.pth",
        "scans/a.png --threshold 1.5": "--threshold",
        "scans/a.png other/a.png": "both",
        "scans/a.png --device warp": "warp",
        "scan.png --out_put masks": "did you mean --output?",
        "scans/a.png --output text": "--output",
        "scans --output out.png": "--output",
        "scans/a.png --output out.jpg": ".png",
        "scans/a.png --output scans/a.png": "--output scans/a.png",
        f"scans/a.png --output {'x' * 300}.png": "xxx.png",
    }.items():
        line = refused("predict", *command.split(), words=[word])
        assert ".tmp" not in line  # the file that was to become the named one
    assert sorted(place.rglob("*")) == before


def report_on(folder, *flags):
    """What report.json has to say after predict.py has scored a folder."""
    with mock.patch("medseg.predicting.report.plot_report"):  # which takes seconds
        predict.main([str(folder), "--output", "scored", *flags])
    return json.loads(Path("scored/report.json").read_text())


@pytest.mark.slow  # importing it takes seconds
def test_distances_are_monais():
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    noise = np.random.default_rng(0).normal(size=(2, 20, 40, 40))
    preds, targets = ndimage.gaussian_filter(noise, (0, 0, 4, 4)) > 0.05
    tensors = [torch.from_numpy(masks)[:, None] for masks in (preds, targets)]
    for spacing in (1.0, 1.0), (0.7, 0.3), (0.5, 2.0):  # mm from row to row, column to column
        pairs = zip(preds, targets, strict=True)
        scores = np.array([surface_scores(*pair, spacing) for pair in pairs])
        options = {"include_background": True, "spacing": spacing}
        distances = compute_hausdorff_distance(*tensors, percentile=95, **options)
        np.testing.assert_allclose(scores[:, 0], distances[:, 0], atol=1e-5)
        dice = compute_surface_dice(*tensors, class_thresholds=[TOLERANCE], **options)
        np.testing.assert_allclose(scores[:, 1], dice[:, 0], atol=1e-6)


def test_a_folder_with_annotations_is_scored(place, dataset):
    """Scores from the mask files and the squares, of which one lies beside and one is missed.

    Of four images two are of one patient, and one has no group.
    """
    test, (masks, targets) = dataset / "test", np.zeros((2, 4, 48, 48), bool)
    torch.save(brightness_model(image_size=48).state_dict(), "best_model.pth")
    scan(48, 48, 30, 30, 17).save(test / "0_test.png")
    scan(48, 48, 0, 0, 5).save(test / "1_test.png")

    def group(content):
        for number, name in {0: "patient 1", 2: "patient 1", 3: "patient 2"}.items():
            content["images"][number]["group"] = name
        for number, record in enumerate(content["annotations"]):
            ((x, y, *_),) = record["segmentation"]
            targets[number, y : y + 16, x : x + 16] = True

    edit_annotations(test, group)
    report = report_on(test)
    for number in range(4):
        masks[number] = np.asarray(Image.open(f"scored/{number}_test_mask.png")) > 0
    groups = {"patient 1": [0, 2], "1_test.png": [1], "patient 2": [3]}
    dice = {name: dice_of(masks[own], targets[own]) for name, own in groups.items()}
    assert report["per_group"] == pytest.approx(dice, abs=1e-4) and report["groups"] == 3
    assert report["scores"]["group_dice"] == pytest.approx(np.mean([*dice.values()]))
    assert report["scores"]["dice"] == pytest.approx(dice_of(masks, targets))
    dice = {f"{n}_test.png": dice_of(masks[n], targets[n]) for n in range(4)}
    assert report["per_image"] == pytest.approx(dice, abs=1e-4)
    assert report["scores"]["image_dice"] == pytest.approx(np.mean([*dice.values()]))
    assert 0.5 < report["scores"]["dice"] < 1
    assert report_on(f"{test}/../valid")["valid"] is None  # valid itself


def test_a_damaged_image_or_annotation_leaves_no_report_but_masks(place, dataset, refused):
    folder = dataset / "test"
    edit_annotations(folder, lambda content: content["annotations"][2].update(segmentation="x"))
    refused("predict", folder, words=["2_test.png: annotation 2"])
    assert len(pictures(place / "predictions", "mask.png")) == 4
    (folder / "1_test.png").write_bytes(b"damaged")
    options = ("predict", folder, "--output", "scored")
    refused(*options, words=["1 of 4", "1_test.png", f"{folder} has no report"])
    assert pictures(place / "scored", "mask.png") == {f"{n}_test_mask.png" for n in (0, 2, 3)}
    assert not (place / "scored" / "report.json").exists()
    (folder / "1_test.png").unlink()  # then no image is damaged, but a record has none
    refused(*options, words=["1_test.png"])


def test_the_threshold_is_chosen_on_valid_alone(place, dataset):
    """Of two models; other annotations in test leave the choice as it is.

    Without foreground, none is chosen. An image in a folder below is in the report, too.
    """
    test, valid, other = dataset / "test", dataset / "valid", brightness_model()
    torch.nn.init.constant_(other.outc.bias, -2.0)
    torch.save(other.state_dict(), "other.pth")
    models = ("--model", "best_model.pth", "other.pth")
    first = report_on(test, *models)["valid"]
    by_threshold = dict(zip(first["thresholds"], first["dice"], strict=True))
    for threshold in (0.1, 0.9):
        dice = report_on(valid, *models, "--threshold", str(threshold))["scores"]["dice"]
        assert by_threshold[threshold] == pytest.approx(dice)
    assert first["chosen_threshold"] == max(by_threshold, key=by_threshold.get)
    assert max(first["dice"]) > 0.9 > 0.5 > min(first["dice"])
    edit_annotations(test, lambda content: content["annotations"].clear())
    assert report_on(test, *models)["valid"]["dice"] == first["dice"]
    edit_annotations(valid, lambda content: content["annotations"].clear())
    (test / "deeper").mkdir()
    (test / "1_test.png").rename(test / "deeper" / "1.png")
    edit_annotations(test, lambda content: content["images"][1].update(file_name="deeper/1.png"))
    report, names = report_on(test), ["0_test.png", "deeper/1.png", "2_test.png", "3_test.png"]
    assert report["valid"] is None and list(report["per_image"]) == names


BOXES = [(4, 4, 20), (20, 8, 10), (10, 20, 16)]  # x, y, side: lesions of the images below


@pytest.fixture
def graded(tmp_path):
    """FolderScores of three images of their own grey, met in another order.

    The probability is 0.62 in the lesion, 0.42 in the four columns right of it and 0.22 elsewhere.
    """
    images = {f"{n}_x.png": Image.new("RGB", (48, 48), (40 * n,) * 3) for n in range(3)}
    write_split(tmp_path / "test", images, [(n, square(*box)) for n, box in enumerate(BOXES)])
    scores = FolderScores(data.open_split(tmp_path, "test", 48))
    for number in (2, 0, 1):
        x, y, side = BOXES[number]
        probabilities = np.full((1, 48, 48), 0.22, np.float32)
        probabilities[0, y : y + side, x : x + side + 4] = 0.42
        probabilities[0, y : y + side, x : x + side] = 0.62
        scores.add(tmp_path / "test" / f"{number}_x.png", (48, 48), probabilities)
    return scores


def test_a_report_by_hand(graded, tmp_path, monkeypatch):
    """Scores with the threshold from valid, calibration, the cases and the words of the figure.

    Names may hold what matplotlib takes for formulas.
    """
    valid, figures = {"thresholds": SWEEP, "dice": [0.5] * len(SWEEP), "chosen_threshold": 0.3}, []
    groups = ["g"], np.zeros(3, int)
    monkeypatch.setattr("medseg.predicting.report.group_images", lambda *_: groups)
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    report = write_report(tmp_path, r"a $\frac$ b", graded, valid, ["foreground"])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    sides = np.array([side for _, _, side in BOXES])
    with_it, lesion, right = report["valid"]["scores_with_it"], (sides**2).sum(), 4 * sides.sum()
    assert with_it["dice"] == pytest.approx(2 * lesion / (2 * lesion + right))
    assert with_it["precision"] == pytest.approx(lesion / (lesion + right))
    assert report["scores"]["dice"] == 1  # at 0.5
    # 0.62 where there are lesions alone, 0.42 and 0.22 where there is none: three of 15 bins.
    total, calibration = 3 * 48**2, report["calibration"]
    rest = total - lesion - right
    error = (0.38 * lesion + 0.42 * right + 0.22 * rest) / total
    assert calibration["expected_calibration_error"] == pytest.approx(error)
    curve = calibration["classes"]["foreground"]
    assert curve["pixels"] == [rest, right, lesion] and curve["foreground"] == [0, 0, 1]
    assert curve["mean_probability"] == pytest.approx([0.22, 0.42, 0.62])
    for number, (x, y, side) in enumerate(BOXES):
        picture, target, pred = graded.case(number)
        expected = np.zeros((1, 48, 48), bool)
        expected[0, y : y + side, x : x + side] = True
        assert (picture == 40 * number).all() and picture.shape == (48, 48, 3)
        assert (target == expected).all() and (pred == expected).all()

    (figure,) = figures
    figure.draw_without_rendering()
    words = "\n".join(text.get_text() for text in figure.findobj(Text))
    shown = (r"a $\frac$ b", "pixel accuracy", "Dice per image", "\n(1)")
    assert all(name in words for name in shown)
    assert not any(key in words for key in ("acc ", "image_dice", "background_acc", "miou", "more"))
    (sweep,) = (axis for axis in figure.axes if axis.get_xlabel() == "threshold")
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in sweep.lines]  # the one in use
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text()]
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other), axis.get_title()


def test_the_sweep_and_the_distances_in_mm_are_of_the_cleaned_masks(tmp_path):
    """The true square, moved by four columns, and a speck that the clean-up removes."""
    write_split(tmp_path / "test", {"a.png": Image.new("RGB", (48, 48))}, [(0, square(5, 8, 10))])
    dataset = data.open_split(tmp_path, "test", 48)
    scores = FolderScores(dataset, Inference(clean={"largest": 1.0}), spacing=(2.0, 3.0))
    probabilities = np.zeros((1, 48, 48), np.float32)
    probabilities[0, 8:18, 9:19] = probabilities[0, 40, 40] = 0.92
    scores.add(tmp_path / "test/a.png", (48, 48), probabilities)
    counts, distances, _ = scores.result()
    own = {tuple(row) for row in counts[0, :, 0]}
    assert own == {(60, 40, 40, 48 * 48 - 140), (0, 0, 100, 2204)}
    # Of each outline of 36 pixels, the rows that both have and the pixels next to them are near.
    assert distances[0, 0].tolist() == [12, 14 / 36]
    empty = np.zeros((48, 48), bool)
    np.testing.assert_equal(surface_scores(~empty, empty), (math.nan, 0))
    np.testing.assert_equal(surface_scores(empty, empty), (math.nan, math.nan))


def test_lesion_sizes_false_alarms_and_distances_by_hand(graded, tmp_path, monkeypatch):
    """Seven lesions of 10 to 70 pixels, each half found; three images without one."""
    counts = [[size // 2, 0, size // 2, 100 - size] for size in range(10, 80, 10)]
    counts += [[0, alarm, 0, 100 - alarm] for alarm in (0, 5, 7)]
    distances = np.array([[[1, 0.5]], [[2, 1]], [[9, 0]], *[[[math.nan, math.nan]]] * 7])
    monkeypatch.setattr(graded.dataset, "names", lambda: list("abcdefghij"))
    for name in ("group_images", "plot_report"):
        monkeypatch.setattr(f"medseg.predicting.report.{name}", lambda *_: (None, None))
    graded.result = lambda: (np.array(counts)[:, None, None], distances, np.zeros((1, 15, 3)))
    graded.case = lambda index: (None,) * 3
    report = write_report(tmp_path, "test", graded, None, ["foreground"])
    thirds = [(one["pixels"], one["images"]) for one in report["by_lesion_size"]]
    assert thirds == [([10, 20], 2), ([30, 40], 2), ([50, 70], 3)]
    assert [one["dice"] for one in report["by_lesion_size"]] == pytest.approx([2 / 3] * 3)
    assert report["no_lesion"] == {"images": 3, "with_false_alarm": 2}
    assert report["hd95"] == {"mean": 4.0, "median": 2.0, "left_out": 7}
    assert report["surface_dice"] == {"mean": 0.5, "median": 0.5, "left_out": 7}


def test_a_report_names_false_alarms_and_missed_lesions():
    cases = {  # true positives, false positives, false negatives, true negatives
        "perfect": (32, 0, 0, 32),
        "eye_PNG.rf.B2a2b9811786cc32a23c46c560f04d07.png": (16, 0, 16, 32),
        "alarm": (0, 16, 0, 48),
        "patient" * 9 + "_1.png": (0, 0, 32, 32),
        "beside": (0, 32, 32, 0),  # it was not missed, but is not there
        "empty": (0, 0, 0, 64),
    }
    names, counts = list(cases), np.array(list(cases.values()))
    cases = choose_cases(names, image_dice(counts), counts)
    assert [title for _, title in cases] == [
        *("best: perfect, Dice 1.00", "best: eye, Dice 0.67"),  # 2 x 16 / (32 + 16)
        "median: empty, Dice 1.00",
        *("worst: alarm, false alarm", "worst: patientpatien…patient_1.png, missed lesion"),
        "worst: beside, no overlap",
    ]
    assert [index for index, _ in cases] == [0, 1, 5, 2, 3, 4]
    for count in range(2, 14):  # of few images each once
        dice = np.random.default_rng(count).permutation(count) / 20 + 0.1
        cases = choose_cases([f"{n}.png" for n in range(count)], dice, np.ones((count, 4), int))
        shown = [index for index, _ in cases]
        assert len(set(shown)) == len(cases) == min(count, 8) and cases[0][1].startswith("best")
        assert dice[shown[0]] == dice.max() and dice[shown[-1]] == dice.min()
