"""--clean: what it does to masks, and that everything goes by it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import brightness_model, output_of, save
from PIL import Image
from scipy import ndimage

from medseg.inference import Inference
from medseg.metrics import count_image
from medseg.pieces import clean_masks, number_pieces, read_clean
from medseg.results.masks import make_masks
from net import ModelInfo


def drawing(text):
    """Lines of digits and dots -> class numbers, uint8 (H, W)."""
    rows = [[0 if pixel == "." else int(pixel) for pixel in row] for row in text.split()]
    return np.array(rows, np.uint8)


def cleaned(labels, text, spacing=None):
    return clean_masks(labels, read_clean(text), spacing)


SPECKS = "11111..1... 1...1...1.. 1.1.1...... 1...1.222.. 11111.2.2.1 ......222.."
FILLED = "11111..1... 11111...1.. 11111...... 11111.222.. 11111.222.1 ......222.."
ALL = "11111...... 11111...... 11111...... 11111...... 11111...... ..........."
RINGS = "2222222. 2.....2. 2.111.2. 2.1.1.2. 2.111.2. 2.....2. 2222222. 3333...."
RINGS_FILLED = "2222222. 2222222. 2211122. 2211122. 2211122. 2222222. 2222222. 3333...."


@pytest.mark.parametrize(
    "text, clean, expected",
    [
        (SPECKS, "largest=0,fill=0", SPECKS),
        # Two that touch at a corner are one piece.
        (SPECKS, "min-area=2", SPECKS.replace("1.1.1", "1...1").replace("2.1", "2..")),
        (SPECKS, "fill", FILLED),
        (SPECKS, "fill,largest,min-area=9", ALL),  # whatever the order in which they are written
        # Of equal ones the first row by row, which is not the leftmost.
        ("....11 ...... 11..11", "largest", "....11 ...... ......"),
        ("1.1.1 1.1.1 111.1", "largest", "1.1.. 1.1.. 111.."),  # the U is one piece
        ("1.22. ....7 11.2.", "largest", "..22. ....7 11..."),  # each class keeps one
        (RINGS, "fill", RINGS_FILLED),
        # A hole between two classes is one of neither, nor is one that leads out of the image.
        *((text, "fill", text) for text in ("1112 1..2 1112", "1111 1... 1111")),
        # An island that is removed is a hole like any other.
        ("1111 1.21 1111", "min-area=2,fill", "1111 1111 1111"),
    ],
)
def test_a_drawing_cleaned(text, clean, expected):
    labels = drawing(text)
    np.testing.assert_array_equal(cleaned(labels, clean), drawing(expected))
    np.testing.assert_array_equal(labels, drawing(text))  # left as it was


def test_discs_that_touch_are_split():
    """A hundred discs of two classes that overlap a little, in rows: each becomes a piece."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:300, :300]
    discs, labels = [], np.zeros((300, 300), np.uint8)
    for row, column in np.ndindex(10, 10):
        distance = np.hypot(y - 40 - 24 * row, x - 40 - 24 * column)
        discs.append((distance < rng.uniform(11, 13)) & (labels == 0))
        labels[discs[-1]] = 1 + column // 5
    assert sum(len(number_pieces(labels == number)[1]) for number in (1, 2)) < 60
    split = cleaned(labels, "split")
    numbers = [number_pieces(split == number)[0] for number in (1, 2)]
    owners = {
        tuple(np.bincount(one[disc & (one > 0)], minlength=1).argmax() for one in numbers)
        for disc in discs
    }
    assert len(owners) == 100 and [one.max() for one in numbers] == [50, 50]
    assert ((labels != split) == ((split == 0) & (labels > 0))).all()
    assert (labels != split).sum() < 0.025 * np.count_nonzero(labels)  # lines of one pixel


def test_what_has_no_neck_is_not_split():
    y, x = np.mgrid[-50:50, -120:120]
    rod, ellipse = (abs(y) < 10) & (abs(x) < 100), (y / 20) ** 2 + (x / 110) ** 2 < 1
    dots, lines = (y % 3 == 0) & (x % 4 < 2), (abs(y - x) < 2) | (abs(y) == 20)
    for mask in (rod, ellipse, dots, lines, x > 500):
        labels = mask.astype(np.uint8)
        np.testing.assert_array_equal(cleaned(labels, "split"), labels)


def test_counts_of_cleaned_masks_by_hand():
    """At 0.5 a piece of 3 and one of 2 pixels; at 0.8 what is left of the second is larger."""
    target = np.array([[[1, 1, 1, 0, 0, 0]]], bool)
    probabilities = np.array([[[0.9, 0.6, 0.6, 0.1, 0.9, 0.9]]], np.float32)
    counts = count_image(target, probabilities, [0.8, 0.5], {"largest": 1.0})
    assert counts.tolist() == [[[0, 2, 3, 1]], [[3, 0, 0, 3]]]
    assert count_image(target, probabilities, [0.5]).tolist() == [[[3, 2, 0, 1]]]


def test_areas_count_pixels_of_the_image_or_mm2():
    labels = drawing("11.1 11.. ...1")
    for area, pixels in ((0.1, 6), (0.3, 4), (0.4, 4), (0.5, 0)):  # of 0.1 mm2 each
        assert (cleaned(labels, f"min-mm2={area}", (0.5, 0.2)) > 0).sum() == pixels
    assert cleaned(drawing("111"), "min-mm2=2.1", (0.7, 1)).all()  # 2.1 / 0.7 is above 3
    # Of probabilities at a quarter of the image's sides, an area is counted in the image.
    target, probabilities = labels[None].repeat(4, 1).repeat(4, 2) > 0, labels[None] * np.float32(1)
    for clean, some in (("min-area=16", True), ("min-area=150", False), ("min-mm2=999", False)):
        counts = count_image(target, probabilities, [0.4], read_clean(clean), spacing=(1, 1))
        assert counts[..., :2].any() == some


def test_the_pixels_before_the_clean_up_are_counted_where_classes_overlap():
    probabilities = np.array([[[0.9, 0.9, 0.1, 0.9]], [[0.9, 0.1, 0.1, 0.1]]], np.float32)
    info = ModelInfo(class_names=("one", "other"), draw_order=(1, 2))
    model = SimpleNamespace(info=info, inference=Inference(0.5, clean={"min-area": 2.0}))
    masks = make_masks(model, probabilities, (4, 1))
    assert (masks.labels.tolist(), masks.marked.tolist()) == ([[1, 1, 0, 0]], [3, 1])


def test_predictions_are_cleaned_and_say_so(here, refused):
    """Of a ring, a speck and a dot."""

    def predict_scans(*flags, output):
        printed = output_of("predict.py", "scans", "--output", output, *flags, cwd=here)
        return np.asarray(Image.open(f"{output}/a_mask.png")) > 0, printed

    torch.save(brightness_model(None).state_dict(), "best_model.pth")
    pixels = np.full((48, 64), 20, np.uint8)
    pixels[5:35, 5:35], pixels[15:25, 15:25] = 235, 20
    pixels[40:46, 40:46], pixels[5:8, 50:53] = 235, 235
    save(Image.fromarray(pixels), "scans/a.png")
    numbers, count = ndimage.label(predict_scans(output="plain")[0], np.ones((3, 3)))
    sizes = np.bincount(numbers.ravel())[1:]
    limit = int(np.median(sizes))  # the dot goes, the speck of this size stays
    assert count == 3
    kept = np.isin(numbers, np.flatnonzero(sizes >= limit) + 1)
    text = f"min-mm2={limit * 0.08},fill"
    mask, _ = predict_scans("--clean", text, "--pixel-size", "0.4x0.2", output="mm")
    np.testing.assert_array_equal(mask, ndimage.binary_fill_holes(kept))
    assert json.loads(Path("mm/predictions.json").read_text())["clean"] == text
    line = f"{sizes.sum()} pixels above 0.5, {sizes[sizes >= limit].sum()} after min-area={limit}"
    assert line in predict_scans("--clean", f"min-area={limit}", output="out")[1]
    refused("predict", "scans", "--clean", "min-mm2=4", words=["scans/a.png", "--pixel-size"])
    assert not Path("predictions").exists()


@pytest.mark.parametrize("clean", ["larges", "largest=2", "min-area", "min-area=many"])
def test_clean_ups_that_are_refused(clean):
    with pytest.raises(ValueError, match=clean.partition("=")[0]):
        read_clean(clean)
