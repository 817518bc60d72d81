"""Several classes, and pixels to ignore: masks, scores, files and weights, by hand and by MONAI."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SIZE,
    SMALL,
    brightness_model,
    edit_annotations,
    output_of,
    photo,
    read_metrics,
    set_classes,
    square,
    write_nifti,
    write_split,
)
from matplotlib.contour import ContourSet
from PIL import Image

import predict
import train
from data import Batches, COCOSegmentationDataset, Order, Transform, load_split, open_split
from medseg import metrics, plots
from medseg.coco import SPLITS, load_coco, used_categories
from medseg.drawing import class_colors, overlay
from medseg.images import save_mask
from medseg.inference import PLAIN, Inference, full_size_masks
from medseg.planning.audit import audit
from medseg.predicting.page import Session
from medseg.predicting.report import surface_scores
from medseg.training.feature_statistics import find_draw_order
from net import UNet, load_model

NAMES = ("core", "edema", "cyst")
SCORES = "acc dice iou precision recall miou background_acc image_dice".split()
SQUARES = {1: (4, 4, 20), 2: (16, 16, 20), 3: (8, 8, 6)}  # cyst lies within core, edema overlaps


def write_classes(folder, sizes, outlines, names=NAMES):
    """A split of noise of these (width, height), with (image, class from 1, square) each."""
    images = {f"{number}.png": photo(number, size) for number, size in enumerate(sizes)}
    write_split(folder, images, [(number, square(*where)) for number, _, where in outlines])
    set_classes(folder, names, lambda number: outlines[number][1])


@pytest.fixture
def three(here):
    """Three classes in 48x48 images, of which the last has nothing."""
    outlines = [(number, *one) for number in range(3) for one in SQUARES.items()]
    for split in SPLITS:
        write_classes(here / split, [(48, 48)] * 4, outlines)
    return here


def test_each_class_has_a_mask_of_its_own_and_the_union_is_the_tutorials(three, tmp_path, capsys):
    """And a cache of its own; the audit counts each, and names what a split lacks."""
    coco, drawn = load_coco(three / "train"), np.zeros((3, 48, 48), np.uint8)
    assert list(used_categories(coco)) == list(NAMES)
    for number, (x, y, side) in SQUARES.items():
        drawn[number - 1, y : y + side, x : x + side] = 1
    chosen = (list(NAMES), drawn), (["cyst", "core"], drawn[[2, 0]]), (None, drawn.any(0)[None])
    for classes, masks in chosen:
        split = COCOSegmentationDataset(coco, three / "train", image_size=48, classes=classes)
        np.testing.assert_array_equal(split[0][1].numpy(), masks)
        assert split[3][1].sum() == 0
        load_split(three, "train", 48, classes=classes)
    grey = load_split(three, "train", 48, n_channels=1)[0][..., 0]
    assert (grey == np.asarray(Image.open(three / "train" / "0.png").convert("L"))).all()
    assert len(list((three / ".cache").glob("*.npy"))) == 4

    set_classes(three / "valid", NAMES, lambda number: number % 2 + 1)
    assert audit(three, tmp_path) == []
    said = capsys.readouterr().out
    share = 100 * 3 * 20 * 20 / (4 * 48 * 48)
    assert f"core: 3 annotations, {share:.2f} % of the pixels, in 3 images" in said
    assert said.count("lacks") == 1 and "lacks        cyst" in said


@pytest.mark.slow
def test_scores_of_each_class_against_monai():
    from monai.metrics import compute_dice, get_confusion_matrix

    rng = np.random.default_rng(2)
    pred, target = (torch.from_numpy(rng.random((9, 3, 20, 20)) > 0.6).float() for _ in range(2))
    pred[:, 2], target[:, 2] = 0, 0  # a class that is nowhere
    scores = metrics.RunningScores("cpu", NAMES)
    for part in (slice(0, 4), slice(4, 9)):
        scores.add(torch.tensor(1.0), pred[part], target[part])
    result = scores.result()
    # MONAI's order is tp, fp, tn, fn.
    counts = get_confusion_matrix(pred, target).numpy()[..., [0, 1, 3, 2]].astype(int)
    tp, fp, fn, _ = counts.sum(0).T[:, :2]
    dice, iou = 2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)
    per_image = compute_dice(pred, target).mean(0).tolist()
    for index, name in enumerate(NAMES[:2]):
        found = [result[f"{score}/{name}"] for score in ("dice", "iou", "image_dice")]
        assert found == pytest.approx([dice[index], iou[index], per_image[index]], abs=1e-6)
    for score in SCORES:
        mean = (result[f"{score}/core"] + result[f"{score}/edema"]) / 2
        assert result[score] == pytest.approx(mean) and np.isnan(result[f"{score}/cyst"])
    own = metrics.class_scores(counts, NAMES)
    assert own == pytest.approx({key: result[key] for key in own}, nan_ok=True)


def test_a_mask_of_classes_is_a_palette_image_with_their_names(tmp_path):
    labels = np.array([[0, 1], [2, 3]], np.uint8)
    save_mask(labels, tmp_path / "mask.png", ("core", "Ödem", "cyst"))
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P" and image.text["classes"] == "1=core, 2=Ödem, 3=cyst"
        np.testing.assert_array_equal(np.asarray(image), labels)
        colors = np.asarray(image.convert("RGB"))
    assert [tuple(color) for color in colors.reshape(4, 3)] == [(0, 0, 0), *class_colors(3)]
    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    tinted = np.asarray(overlay(grey, labels, 3))
    assert tuple(tinted[0, 0]) == (100, 100, 100)
    red, green, blue = class_colors(3)[0]
    assert tinted[0, 1] == pytest.approx([60 + 0.4 * red, 60 + 0.4 * green, 60 + 0.4 * blue], abs=1)


def read_report(folder):
    text = Path(folder, "report.json").read_text()
    assert "NaN" not in text
    return json.loads(text)


@pytest.mark.usefixtures("no_pictures")
def test_trained_scored_and_predicted_by_class(three, capsys, refused):
    """A class that valid lacks, one that the test split lacks, one channel in."""

    def without_cyst(content):
        kept = [own for own in content["annotations"] if own["category_id"] != 3]
        content["annotations"] = kept

    edit_annotations(three / "valid", without_cyst)
    set_classes(three / "test", NAMES, lambda number: 2)
    flags = ("--classes", "each", "--n-channels", 1, "--epochs", 2, "--data", three)
    train.main([*map(str, (*SMALL, *flags)), "--out", "run"])
    said = capsys.readouterr().out
    assert said.count("  edema: Dice") == 1 and "--classes each" not in said
    assert all(f"  {name}: no image of it in test" in said for name in ("core", "cyst"))
    for row in read_metrics(three / "run"):
        assert row["val_dice/cyst"] == "" and "nan" not in row.values()
        mean = (float(row["val_dice/core"]) + float(row["val_dice/edema"])) / 2
        assert float(row["val_dice"]) == pytest.approx(mean)
    info = load_model("run/best_model.pth").info
    assert info.class_names == NAMES and not info.exclusive  # cyst lies within core
    assert info.draw_order.index(1) < info.draw_order.index(3)
    train.main(["--test-only", "--out", "run"])
    assert said.splitlines()[-5:-1] == capsys.readouterr().out.splitlines()[-5:-1]

    predict.main(["test", "--model", "run/best_model.pth", "--output", "masks"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in NAMES)
    report = read_report("masks")
    assert report["class_names"] == list(NAMES) and set(report["hd95_by_class"]) == set(NAMES)
    for part in (report["scores"], report["confidence_95"]):
        for score in SCORES:
            core, edema, cyst = (part[f"{score}/{name}"] for name in NAMES)
            assert core is cyst is None and edema == part[score] is not None
    assert Image.open("masks/0_mask.png").mode == "P"
    assert Image.open("masks/0_overlay.jpg").height > 48  # with a legend below
    model = UNet(n_classes=2, n_filters=2, image_size=32, class_names=("cat", "dog"))
    torch.save(model.state_dict(), "model.pth")
    words = ["core, edema, cyst", "cat, dog"]
    refused("predict", "test", "--model", "model.pth", "--output", "out", words=words)


@pytest.mark.usefixtures("no_pictures")
def test_a_split_without_foreground_has_no_score(three, capsys):
    """Answering nothing there is no 1.0000, and no threshold can be chosen on it."""
    for split in ("valid", "test"):
        edit_annotations(three / split, lambda content: content["annotations"].clear())
    flags = (*SMALL, "--epochs", 1, "--data", three, "--tune-prediction", "--out", "run")
    train.main(list(map(str, flags)))
    said = capsys.readouterr()
    assert "1.0000" not in said.out and "nan" not in said.out and not said.err.count("WARNING")
    assert load_model("run/best_model.pth").info.inference == PLAIN
    predict.main(["test", "--model", "run/best_model.pth", "--output", "masks"])
    report = read_report("masks")
    assert not any(report["scores"].values()) and not any(report["confidence_95"].values())
    assert report["valid"] is None and set(report["per_image"].values()) <= {0, 1}
    assert report["no_lesion"]["images"] == len(report["per_image"])


SIDES = (61, 47), (83, 40), (50, 50)  # width, height; of the network: 32


@pytest.fixture
def apart(here):
    """Weights of two classes in odd sizes, valid and test, annotated with squares side by side."""
    squares = (1, (3, 5, 21)), (2, (24, 9, 17))
    outlines = [(number, *one) for number in range(3) for one in squares]
    for split in ("valid", "test"):
        write_classes(here / split, SIDES, outlines, NAMES[:2])
    torch.manual_seed(4)
    model = UNet(n_classes=2, n_filters=4, image_size=32, class_names=NAMES[:2], depth=2).eval()
    for weight in model.parameters():  # else what it gives is the same everywhere
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    return model


def read_table(path):
    with open(path, encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "threshold, flags", [("0.52", ()), ("0.45", ("--clean", "min-area=30,fill", "--tta"))]
)
def test_the_scores_are_those_of_the_files_that_were_written(apart, flags, threshold):
    """Masks read back and counted: report.json, predictions.csv."""
    torch.save(apart.state_dict(), "model.pth")
    options = ("--model", "model.pth", "--threshold", threshold, "--device", "cpu", *flags)
    predict.main(["test", "--output", "out", *options])
    test, overlaps, sizes = open_split(Path(), "test", classes=list(NAMES[:2])), [], []
    for index, size in enumerate(SIDES):
        labels, target = np.asarray(Image.open(f"out/{index}_mask.png")), test.load(index)[1] > 0
        assert labels.shape == size[::-1]
        pred = np.stack([labels == number for number in (1, 2)])
        overlaps.append((pred & target).sum((1, 2)))
        sizes.append(pred.sum((1, 2)) + target.sum((1, 2)))
    dice = 2 * np.array(overlaps) / np.array(sizes)  # (images, classes)
    assert len(set(dice.ravel())) > 3  # no test by scores that are all the same
    report = read_report("out")
    pooled = 2 * np.sum(overlaps, 0) / np.sum(sizes, 0)
    found = [report["scores"][f"dice/{name}"] for name in NAMES[:2]]
    assert found == pytest.approx(pooled.tolist(), abs=1e-12)
    rows = read_table("out/predictions.csv")
    assert [float(row["dice"]) for row in rows] == pytest.approx(dice.ravel(), abs=1e-8)


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_page_measures_each_class_by_its_own_mask(apart, here, exclusive):
    """Both classes are above the threshold everywhere, and the second is the more probable."""
    for weight in (apart.outc.weight, apart.outc.bias):
        torch.nn.init.zeros_(weight)
    apart.outc.bias.data += torch.tensor([1.0, 2.0])
    apart.info.draw_order = () if exclusive else (1, 2)
    torch.save(apart.state_dict(), "model.pth")
    write_nifti("volume.nii.gz", np.ones((20, 24, 3), np.int16), np.diag([1, 1, 2, 1]))
    session = Session(here, predict.open_models(["model.pth"], "cpu"))
    session.predict(["volume.nii.gz"], 0.5)
    shares = [0 if exclusive else 1, 1]
    rows = read_table(session.download("table", 0.5))
    assert [float(row["share"]) for row in rows] == shares
    volumes = [share * 20 * 24 * 3 * 2 / 1000 for share in shares]
    assert [float(row["volume_ml"]) for row in rows] == pytest.approx(volumes)
    assert [row["share"] for row in session.view(0, 0.5)[2]] == shares


@pytest.mark.parametrize("names", [("in", "core", "whole"), ("whole", "core", "in")])
def test_a_class_within_another_is_drawn_over_it(here, names):
    """Three nested bands of brightness; the outermost is the most probable wherever it is."""
    model, nested = brightness_model(None, n_classes=3, class_names=names), ("whole", "core", "in")
    with torch.no_grad():
        model.outc.weight[:, 0] = 8
        model.outc.bias[:] = torch.tensor([-3.0 - 2 * nested.index(name) for name in names])
    numbers = [names.index(name) + 1 for name in nested]
    model.info.draw_order = tuple(numbers)
    state = model.state_dict()
    if numbers == [1, 2, 3]:  # as older weights have it: the classes as they are numbered
        del state._metadata[""]["draw_order"]
    torch.save(state, "best_model.pth")
    pixels = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    Image.fromarray(pixels).save("scan.png")
    predict.main(["scan.png", "--write", "mask,classes", "--output", "out"])
    whole, core, within = (
        np.asarray(Image.open(f"out/scan_{name}_mask.png")) > 0 for name in nested
    )
    assert (core & ~whole).sum() == (within & ~core).sum() == 0
    assert 0 < within.sum() < core.sum() < whole.sum()
    expected = np.select([within, core, whole], numbers[::-1])
    np.testing.assert_array_equal(np.asarray(Image.open("out/scan_mask.png")), expected)
    shares = {row["class"]: float(row["share"]) for row in read_table("out/predictions.csv")}
    assert shares["whole"] == pytest.approx(whole.mean())


def test_whether_classes_overlap_is_seen_in_the_training_masks(tmp_path):
    large, beside, within = (2, 2, 22), (23, 2, 22), (8, 8, 9)  # the first two share a border
    cases = (large, beside, ()), (large, within, (1, 2)), (within, large, (2, 1))
    for number, (first, second, order) in enumerate(cases):
        outlines = [(0, 1, (2, 2, 9)), (0, 2, (20, 20, 9)), (1, 1, first), (1, 2, second)]
        write_classes(tmp_path / f"{number}/train", [(48, 48)] * 2, outlines, NAMES[:2])
        rows = load_split(tmp_path / f"{number}", "train", 48, classes=list(NAMES[:2]))
        assert find_draw_order(rows, 3, 2) == order


@pytest.mark.parametrize("clean", [{}, {"largest": 1.0}])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("n_classes", [1, 3])
def test_counts_are_those_of_the_masks_made_one_by_one(n_classes, exclusive, clean):
    """At the size of an image, where even areas lie on a threshold, and stripes on none."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 21, (n_classes, 4, 6)) / 20
    probabilities = np.repeat(np.repeat(blocks, 8, 1), 8, 2).astype(np.float32)  # (C, 32, 48)
    probabilities[:, :, 30:] = 0.05  # the lowest threshold, which it is not above
    targets = rng.random((n_classes, 150, 300)) > 0.7
    counts = metrics.count_image(targets, probabilities, metrics.SWEEP, clean, exclusive=exclusive)
    for row, threshold in zip(counts, metrics.SWEEP, strict=True):
        how = Inference(threshold, clean=clean)
        masks = how.masks(probabilities, (300, 150), exclusive=exclusive)
        for (tp, fp, fn, tn), pred, target in zip(row, masks, targets, strict=True):
            assert (tp, fp) == ((pred & target).sum(), (pred & ~target).sum())
            assert (fn, tn) == ((~pred & target).sum(), (~pred & ~target).sum())


@pytest.mark.parametrize("size", [(300, 70), (65, 200), (7, 5), (32, 32)])
def test_labels_are_those_of_whole_probability_maps(size):
    """With maps resized whole and compared one by one, to the last pixel."""
    probabilities = np.random.default_rng(3).random((12, 32, 32), np.float32)
    probabilities[4:8, :, 6:] = 0  # of these only some columns are above the threshold
    probabilities[9] = probabilities[3]  # of equal ones the first
    probabilities[10, 5, 5] = np.nan
    labels, highest = np.zeros(size[::-1]), np.full(size[::-1], 0.6, np.float32)
    for number, channel in enumerate(probabilities, 1):
        resized = Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR)
        labels[resized > highest] = number
        highest = np.fmax(resized, highest)  # no number is no probability
    np.testing.assert_array_equal(full_size_masks(probabilities, size, 0.6), labels)


@pytest.mark.parametrize("n_classes", [1, 40])
def test_the_bootstrap_of_all_classes_is_that_of_each(n_classes):
    """The same images are drawn, and each sample is scored by itself."""
    rng = np.random.default_rng(4)
    counts = rng.integers(0, 3, (7, n_classes, 4)) * rng.integers(1, 999, (7, n_classes, 4))
    counts[..., 3] += 1
    counts[:4, 0, :3] = 0  # empty masks and empty predictions
    names = [f"class {number}" for number in range(n_classes)]
    again = np.random.default_rng(0)
    samples = [metrics.class_scores(counts[again.integers(0, 7, 7)], names) for _ in range(50)]
    found = metrics.bootstrap(counts, names, samples=50)
    assert list(found) == list(samples[0])
    for name, interval in found.items():
        # A sample without the class has no score.
        expected = np.nanpercentile([sample[name] for sample in samples], [2.5, 97.5])
        assert interval == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-12), name


def test_a_figure_outlines_at_most_twenty_classes(monkeypatch, tmp_path):
    """The largest of each case are among them, and the legend counts the others."""
    figures, names = [], [f"class {index}" for index in range(40)]
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    large, small = np.zeros((2, 40, 9, 9), bool)
    large[:30], small[35, :3, :3] = True, True
    cases = [(np.zeros((9, 9, 3)), mask, mask, "") for mask in (large, small)]
    plots.plot_predictions(cases, tmp_path / "figure.png", title="", class_names=names)
    assert [len(axis.findobj(ContourSet)) for axis in figures[0].axes] == [38, 2]
    *shown, rest = [text.get_text() for text in figures[0].legends[0].get_texts()][2:]
    assert len(shown) == 20 and {*shown} < {*names} and "class 35" in shown and "20" in rest


def test_a_class_that_is_only_predicted_is_left_out_of_the_dice_of_an_image():
    first = [5, 5, 5, 85], [10, 0, 0, 90], [0, 4, 4, 92]
    second = [0, 9, 0, 91], [0, 0, 0, 100], [0, 0, 0, 100]
    counts = np.stack([first, second], 1)
    assert metrics.mean_image_dice(counts).tolist() == [0.5, 1, 0]


# ---- pixels that nobody annotated: they count in no loss and in no score ---------------------

PLACE = np.s_[8:30, 4:28]  # rows and columns that nobody annotated; some hide tumours


@pytest.fixture
def ignoring(dataset):
    """With the polygon of PLACE as the category `ignore` in every image but the first."""

    def add_ignored(content):
        content["categories"].append({"id": 7, "name": "ignore"})
        for image in content["images"][1:]:
            outline = {"segmentation": [[4, 8, 28, 8, 28, 30, 4, 30]], "iscrowd": 0}
            ids = {"id": 900 + image["id"], "image_id": image["id"], "category_id": 7}
            content["annotations"].append(ids | outline)

    for split in SPLITS:
        edit_annotations(dataset / split, add_ignored)
    return dataset


@pytest.mark.parametrize("count", [1, 8])  # after eight classes it has a byte of its own
@pytest.mark.parametrize("crop", [0, SIZE])
def test_masks_are_minus_one_there(ignoring, count, crop):
    names = [f"c{number}" for number in range(count)] if count > 1 else None
    if names:  # of the six tumours, whose annotations come first
        numbers = [1, 2, 3, 4, 5, 6, *[count + 1] * 5]
        set_classes(ignoring / "train", [*names, "ignore"], lambda number: numbers[number])
    side = None if crop else SIZE
    dataset = open_split(ignoring, "train", side, classes=names)
    rows = load_split(ignoring, "train", side, classes=names)
    change = Transform(3, count, crop=crop)
    ((_, masks),) = Batches(rows, Order(len(rows)), transform=change)
    assert len(masks) == 6
    for index, mask in enumerate(masks.numpy()):
        _, own = dataset.load(index)
        truth, known = np.stack([*dataset.true_masks(index)]), np.ones((SIZE, SIZE), bool)
        known[PLACE] = index == 0
        assert (mask == own).all() and (own == dataset[index][1].numpy()).all()
        assert ((own == -1) == ~known).all() and (truth == (own == 1)).all()
        x, y, *_ = dataset.coco.imgToAnns[index][0]["segmentation"][0]
        tumour = np.zeros((SIZE, SIZE), bool)
        tumour[y : y + 16, x : x + 16] = True
        assert (own[index % count][known] == tumour[known]).all()


def test_crops_do_not_hold_it_as_foreground(ignoring):
    rows, order = load_split(ignoring, "train", None), Order(6, foreground=1.0, shuffle=True)
    for _, masks in Batches(rows, order, transform=Transform(crop=8)):
        assert ((masks == 1).sum((1, 2, 3)) > 0).all()


def test_loss_and_scores_are_those_of_the_other_pixels():
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(4, 2, 9, 7, generator=generator).requires_grad_()
    target = (torch.rand(4, 2, 9, 7, generator=generator) > 0.6).float()
    known = torch.rand(4, 1, 9, 7, generator=generator).expand_as(pred) > 0.3
    marked = target.where(known, torch.tensor(-1.0))
    for weights in ({"dice": 0.6, "bce": 0.4}, {"focal": 1.0, "dice": 0.5}):
        pred.grad = None
        loss = train.combined_loss(pred, marked, weights)
        loss.backward()
        torch.testing.assert_close(loss, train.combined_loss(pred[known], target[known], weights))
        assert (pred.grad[~known] == 0).all() and (pred.grad[known] != 0).all()
    scores = metrics.RunningScores("cpu", ("a", "b"))
    scores.add(loss.detach(), pred.detach(), marked)
    for index, name in enumerate("ab"):
        own = known[:, index]
        right, true = pred[:, index][own] > 0.5, target[:, index][own] > 0.5
        dice = 2 * (right & true).sum() / (right.sum() + true.sum())
        assert scores.result()[f"dice/{name}"] == pytest.approx(dice.item())
        assert scores.result()[f"acc/{name}"] == pytest.approx((right == true).float().mean())


@pytest.mark.parametrize("clean", [(), ("--clean", "min-area=3")])
def test_report_leaves_it_out(ignoring, tmp_path, clean, monkeypatch):
    monkeypatch.setattr("medseg.predicting.report.plot_report", lambda *_: None)
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    # At 0.02 some of what is dark is foreground too.
    how = ("--threshold", 0.02, "--output", "out", *clean)
    output_of("predict.py", ignoring / "test", *how, cwd=tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    dataset, counts, surfaces = open_split(ignoring, "test"), np.zeros(3), []
    for index in range(len(dataset)):
        known = np.ones((SIZE, SIZE), bool)
        known[PLACE] = index == 0
        mask = tmp_path / "out" / f"{dataset.path(index).stem}_mask.png"
        pred, target = np.asarray(Image.open(mask)) > 0, dataset.load(index)[1][0] > 0
        surfaces.append(surface_scores(pred & known, target))
        pred, target = pred[known], target[known]
        counts += (pred & target).sum(), (pred | target).sum(), (pred == target).mean()
    assert report["scores"]["iou"] == pytest.approx(counts[0] / counts[1])
    assert report["surface_dice"]["mean"] == pytest.approx(np.nanmean(surfaces, 0)[1])
    sizes = [SIZE**2, *[SIZE**2 - 22 * 24] * 3]
    pixels = report["calibration"]["classes"]["foreground"]["pixels"]
    assert abs(sum(pixels) / (32 / SIZE) ** 2 - sum(sizes)) < 0.05 * sum(sizes)
