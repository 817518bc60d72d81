"""Images at their own size: the cache, crops of them, prediction and scores, end to end."""

import json
import time
import weakref
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import edit_annotations, output_of, square, write_split
from PIL import Image

import predict
from data import (
    Batches,
    Order,
    Transform,
    load_split,
    open_split,
)
from medseg.augment import AUGMENTATIONS, window_side
from medseg.cache import RaggedRows
from medseg.cli import parse_named_values
from medseg.coco import SPLITS
from medseg.crop import copy_window, place_crops
from medseg.images import MEAN, STD, read_image
from medseg.predicting import reading, scoring
from medseg.predicting.inputs import expand, sort_files
from medseg.predictor import Predictor
from medseg.results.folder import Results
from net import ModelInfo, UNet

SIZES = [(40, 60), (33, 20), (64, 64), (50, 41)]  # height, width
BRIGHT = 170  # of the square that is the mask


def write_images(root, seed=0):
    """root/{train,valid,test}, each with four images of noise of different sizes and a square."""
    rng = np.random.default_rng(seed)
    for split in SPLITS:
        images, annotations = {}, []
        for number, (height, width) in enumerate(SIZES):
            pixels = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
            pixels[8:18, 5:15] += BRIGHT
            images[f"{number}.png"] = Image.fromarray(pixels)
            annotations.append((number, [[5, 8, 15, 8, 15, 18, 5, 18]]))
        write_split(root / split, images, annotations)
    return root


@pytest.fixture
def own_sizes(tmp_path):
    return write_images(tmp_path / "own")


def expected_row(folder, number):
    pixels = np.asarray(Image.open(folder / f"{number}.png"))
    mask = np.zeros((*pixels.shape[:2], 1), np.uint8)
    mask[8:18, 5:15] = 1
    return np.concatenate([pixels, mask], 2)


def to_pixels(images):
    """Normalised (B, 3, H, W) -> what they were made from, int64 (B, H, W, 3) of 0..255."""
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    return (pixels * 255).round().long()


def numbered_rows():
    """Images whose pixels hold their number, row and column: no two pixels are the same."""
    rows = []
    for number, (height, width) in enumerate(SIZES):
        row = np.zeros((height, width, 4), np.uint8)
        row[..., 0] = number
        row[..., 1], row[..., 2] = np.mgrid[:height, :width]
        row[..., 3] = (row[..., 1] + row[..., 2]) % 2
        rows.append(row)
    return RaggedRows(np.concatenate([row.reshape(-1, 4) for row in rows]), SIZES)


# ---- whole images ----------------------------------------------------------------------------


def test_whole_images_come_one_by_one(own_sizes):
    rows = load_split(own_sizes, "train", None)
    loader = Batches(rows, Order(32))
    assert len(loader) == len(rows) == 4
    for number, (images, masks) in enumerate(loader):
        expected = expected_row(own_sizes / "train", number)
        np.testing.assert_array_equal(rows[number], expected)
        np.testing.assert_array_equal(to_pixels(images), expected[None, ..., :3])
        np.testing.assert_array_equal(masks[0, 0], expected[..., 3])
    with pytest.raises(ValueError):
        RaggedRows(rows.pixels, [[3, 4]])
    image, mask = open_split(own_sizes, "train", None)[1]
    assert image.shape == (3, 33, 20) and mask.sum() == 100
    assert load_split(own_sizes, "train", None, n_channels=1)[0].shape == (40, 60, 2)


def test_processes_get_a_whole_image_each():
    transform, parts = Transform(strengths={"flip": 1.0, "rotate": 30.0, "noise": 0.1}), []
    alone = list(Batches(numbered_rows(), Order(4, True), transform=transform))
    assert sorted(tuple(images.shape[2:]) for images, _ in alone) == sorted(SIZES)
    for rank in range(3):
        order = Order(4, True, rank=rank, world=3)
        parts.append(list(Batches(numbered_rows(), order, transform=transform)))
        assert len(parts[-1]) == 2
    for index, (images, masks) in enumerate(alone):
        own_images, own_masks = parts[index % 3][index // 3]
        assert torch.equal(own_images, images) and torch.equal(own_masks, masks)
    empty, _ = parts[1][1]  # the last batch has one image: none for the second process
    assert empty.shape[:2] == (0, 3) and UNet(n_filters=2)(empty).shape[0] == 0


# ---- crops -----------------------------------------------------------------------------------


def crops(rows, size, epoch=0, start=0, strengths=(), **options):
    """[(pixels (size, size, 3), mask (size, size))] of an epoch."""
    transform = Transform(crop=size, strengths=dict(strengths))
    loader = Batches(rows, Order(4, **{"shuffle": True, **options}), transform=transform)
    loader.set_epoch(epoch, start)
    pairs = []
    for images, masks in loader:
        assert images.shape[2:] == masks.shape[2:] == (size, size)
        pairs += zip(to_pixels(images).numpy(), masks[:, 0].numpy(), strict=True)
    return pairs


@pytest.mark.parametrize("strengths", [{}, {"rotate": 1e-9}])  # resampled, and where they were
def test_crops_are_slices_of_the_images(strengths):
    one_size = np.stack([numbered_rows()[2]] * 3)
    for pixels, _ in crops(one_size, 16, strengths=strengths):
        _, top, left = pixels[0, 0]
        np.testing.assert_array_equal(pixels, one_size[0, top:, left:, :3][:16, :16])
    assert len(crops(one_size, 16)) == 3 * 16
    rows, seen = numbered_rows(), dict.fromkeys(range(4), 0)
    for pixels, mask in crops(rows, 20, strengths=strengths):
        number, top, left = pixels[0, 0]
        source = rows[number][top : top + 20, left : left + 20]
        np.testing.assert_array_equal(pixels, source[..., :3])
        np.testing.assert_array_equal(mask, source[..., 3])
        seen[number] += 1
    assert seen == {0: 6, 1: 2, 2: 10, 3: 5}  # height x width / 400, rounded
    assert len(Batches(rows, Order(4), transform=Transform(crop=20))) == 6


def test_every_place_is_as_likely():
    sizes = torch.tensor([[12, 9]]).expand(24_000, 2)
    draws = torch.rand(24_000, 2, generator=torch.Generator().manual_seed(0))
    top, left = place_crops(sizes, draws, 7).T
    counts = torch.bincount(top * 3 + left, minlength=18).reshape(6, 3)
    assert counts.shape == (6, 3) and counts.sum() == 24_000
    assert (counts - 24_000 / 18).abs().max() < 5 * (24_000 / 18) ** 0.5
    last = place_crops(sizes[:1], torch.full((1, 2), 1 - 2**-24), 7)
    assert last.tolist() == [[5, 2]]  # the bottom right corner
    small = place_crops(torch.tensor([[5, 9]]).repeat(9, 1), draws[:9], 7)
    assert set(small[:, 0].tolist()) <= {-2, -1, 0} and (small[:, 1] >= 0).all()


def test_windows_against_clamped_indices():
    rows, rng = numbered_rows(), np.random.default_rng(0)
    for _ in range(200):
        number, side = int(rng.integers(4)), int(rng.integers(1, 90))
        height, width = SIZES[number]
        top, left = int(rng.integers(1 - side, height)), int(rng.integers(1 - side, width))
        window = torch.zeros(side, side, 4, dtype=torch.uint8)
        copy_window(torch.from_numpy(rows[number]), top, left, window)
        lines = np.clip(np.arange(top, top + side), 0, height - 1)
        columns = np.clip(np.arange(left, left + side), 0, width - 1)
        np.testing.assert_array_equal(window, rows[number][lines[:, None], columns])


@pytest.mark.parametrize("foreground", [0.0, 0.5])
def test_crops_are_a_function_of_seed_epoch_and_place(foreground):
    strengths = {"rotate": 30.0, "flip": 1.0, "noise": 0.2}

    def order(**options):
        options |= {"strengths": strengths, "foreground": foreground}
        return [image.tobytes() for image, _ in crops(numbered_rows(), 20, **options)]

    first = order()
    assert first == order() and len(set(first)) == len(first)
    assert first != order(epoch=1) and first != order(seed=1)
    assert order(epoch=2)[8:] == order(epoch=2, start=2)
    for rank in range(2):
        mine = [own for place, own in enumerate(first) if place % 4 % 2 == rank]
        assert order(rank=rank, world=2) == mine
    transform = Transform(crop=20, strengths={"rotate": 30.0})
    rows = numbered_rows()[0][None]  # 6 crops of 20, in batches of 5
    *_, (images, masks) = Batches(rows, Order(5, rank=1, world=2), transform=transform)
    assert images.shape == (0, 3, 20, 20) and masks.shape == (0, 1, 20, 20)


# ---- where the foreground is -----------------------------------------------------------------


def marked_rows():
    """`numbered_rows` with one pixel of class 0 in image 0, and 900 with one of class 9 in image 2.

    The masks are their fourth and fifth bytes.
    """
    plain = numbered_rows()
    rows = RaggedRows(np.pad(plain.pixels[:, :3], ((0, 0), (0, 2))), SIZES)
    rows[0][39, 10, 3] = 1
    rows[2][20:50, 30:60, 3] = 1
    rows[2][5, 33, 4] = 2
    return rows


def draw_foreground(share, epochs, rows=None, crop=16, **options):
    """[(number of the image, top, left, {class: pixels of it})] of some epochs."""
    transform, drawn = Transform(n_classes=10, crop=crop), []
    order = Order(8, shuffle=True, foreground=share, **options)
    loader = Batches(marked_rows() if rows is None else rows, order, transform=transform)
    for epoch in epochs:
        loader.set_epoch(epoch)
        for images, masks in loader:
            sums = masks.sum((2, 3)).int().tolist()
            for pixels, own in zip(to_pixels(images).tolist(), sums, strict=True):
                drawn.append((*pixels[0][0], {c: count for c, count in enumerate(own) if count}))
    return drawn


def test_so_many_crops_lie_around_foreground():
    for number, top, left, classes in draw_foreground(1.0, range(9)):
        assert classes and number in (0, 2)
        if number == 0:  # around its only pixel, as far as the image goes
            assert (top, left) == (40 - 16, 10 - 8)
        elif 9 in classes and 0 not in classes:
            assert (top, left) == (0, 33 - 8)
    small = np.zeros((2, 12, 20, 5), np.uint8)  # lower than a crop, which then holds all its rows
    small[0, 3, 4, 3] = 1
    assert all(own[3][0] >= 1 for own in draw_foreground(1.0, range(9), small))
    drawn = draw_foreground(0.33, range(40))
    total = sum(round(height * width / 256) for height, width in SIZES)
    assert len(drawn) == 40 * total
    share = sum(bool(classes) for *_, classes in drawn) / len(drawn)
    plain = sum(bool(classes) for *_, classes in draw_foreground(0.0, range(40))) / len(drawn)
    assert share == pytest.approx(0.33 + 0.67 * plain, abs=0.03) and plain < 0.4
    of_image = [classes for number, *_, classes in draw_foreground(1.0, range(40)) if number == 2]
    rare = sum(9 in classes for classes in of_image) / len(of_image)
    assert rare == pytest.approx(0.5, abs=0.06)  # one pixel of 901, but one class of two


@pytest.mark.parametrize("repeat", [1, 0.3, 2.5])
def test_whole_images_without_foreground_are_drawn_less_often(repeat):
    rows = np.zeros((40, 4, 4, 4), np.uint8)
    rows[..., 0] = np.arange(40)[:, None, None]
    rows[[3, 11, 30], 1, 2, 3] = 1
    seen, marked = Counter(), (3, 11, 30)
    for epoch in range(50):
        drawn = draw_foreground(0.33, [epoch], rows, crop=0, repeat=repeat)
        counts = Counter(number for number, *_ in drawn)
        assert len(drawn) == round(40 * repeat)
        assert sum(counts[number] for number in marked) >= round(0.33 * len(drawn))
        seen += counts
    counts = [seen[number] for number in marked]
    assert sum(counts) / seen.total() == pytest.approx(0.33 + 0.67 * 3 / 40, abs=0.03)
    assert len(seen) == 40 and max(counts) < 1.3 * min(counts)
    plain = draw_foreground(0.33, [0], rows * np.uint8([1, 1, 1, 0]), crop=0)
    assert sorted(number for number, *_ in plain) == list(range(40))  # there is none to prefer


@pytest.mark.parametrize("text", ["rotate=180", "rotate,scale,shift,elastic", "scale=1,rotate=180"])
def test_what_turns_into_a_crop_comes_from_the_image(text):
    """Red is each pixel's row, green its column; both of a crop must be inside a larger image.

    A repeated border would show as two neighbours that are the same.
    """
    side = 240
    row = np.zeros((side, side, 4), np.uint8)
    row[..., 0], row[..., 1] = np.mgrid[:side, :side]
    strengths = parse_named_values(text, AUGMENTATIONS)
    window = window_side(24, strengths)
    loader = Batches(row[None], Order(10), transform=Transform(crop=24, strengths=strengths))
    assert len(loader) == 10
    checked = 0
    for images, _ in loader:
        std, mean = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
        for image in (images * std + mean)[:, :2] * 255:
            if image.min() < 1 or image.max() > side - 2:
                continue  # at the border of the image
            checked += 1
            across = image.diff(dim=2)[:, :-1] ** 2
            down = image.diff(dim=1)[:, :, :-1] ** 2
            for steps in (across, down):
                assert steps.sum(0).min() > 0.1  # of squared pixels
            assert image.amax((1, 2)).sub(image.amin((1, 2))).max() <= window
    assert checked > 20


def test_image_and_mask_of_a_crop_stay_aligned():
    rng, side = np.random.default_rng(0), 96
    row = np.zeros((side, side, 4), np.uint8)
    field = torch.from_numpy(rng.random((1, 1, side, side)))
    for _ in range(2):  # smooth: a part thinner than a pixel may be in one of the two only
        field = F.avg_pool2d(field, 15, 1, 7, count_include_pad=False)
    row[..., 3] = field[0, 0] > field.median()
    row[..., :3] = 255 * row[..., 3:]
    strengths = {name: default for name, (default, _) in AUGMENTATIONS.items()}
    for image, mask in crops(row[None], 32, strengths=strengths):
        new = torch.from_numpy(mask)[None, None]
        sure = F.max_pool2d(new, 3, 1, 1) == 1 - F.max_pool2d(1 - new, 3, 1, 1)
        wrong = (torch.from_numpy(image[..., 0] > 127) != (new[0, 0] > 0.5)) & sure[0, 0]
        assert wrong[1:-1, 1:-1].sum() == 0  # the others have neighbours outside


# ---- prediction and scores -------------------------------------------------------------------


class Threshold(torch.nn.Module):
    """Probability over 0.5 where a pixel is bright: what a network of any size must give."""

    info = ModelInfo(image_size=None)

    def forward(self, images):
        return torch.sigmoid(10 * images.mean(1, keepdim=True))


def predict_all(network, frames, folder):
    model, problems = Predictor([network], "cpu"), []
    predict.predict_many(model, frames, Results(folder, model), problems)
    return problems


def test_a_folder_is_scored_at_full_resolution(own_sizes, tmp_path):
    # A second square that the network cannot see.
    edit_annotations(
        own_sizes / "test",
        lambda content: content["annotations"][2].update(
            segmentation=square(40, 40, 10) + [[5, 8, 15, 8, 15, 18, 5, 18]]
        ),
    )
    model, folder = Predictor([Threshold()], "cpu"), own_sizes / "test"
    scores = scoring.open_folder(model, folder)
    report = scoring.report(model, folder, scores, tmp_path, partial(predict.predict_image, model))
    assert report["image_size"] is None and report["images"] == 4
    assert json.loads((tmp_path / "report.json").read_text())["image_size"] is None
    assert report["per_image"] == {"0.png": 1, "1.png": 1, "2.png": 0.6667, "3.png": 1}
    assert report["scores"]["dice"] == pytest.approx(2 * 400 / (400 + 500))
    assert report["valid"]["scores_with_it"]["dice"] > 0
    assert Image.open(tmp_path / "report.png").size[0] > 1000


def test_memory_that_does_not_suffice_is_said_with_the_image(own_sizes, tmp_path, capsys):
    class Greedy(Threshold):
        def forward(self, images):
            if images.shape[2] == 64:
                raise MemoryError
            return super().forward(images)

    pictures, _, _ = sort_files(expand([own_sizes / "test"]), None)
    ((_, problem),) = predict_all(Greedy(), pictures, tmp_path)
    for word in ("2.png", "out of memory", "64x64", "smaller"):
        assert word in problem
    assert len(list(tmp_path.glob("*_mask.png"))) == 3  # the others are predicted


def test_a_large_image_is_gone_when_the_next_one_is_read(own_sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD_PIXELS", 1)  # then all images are large
    seen, alive = [], []

    def read(path):
        until = time.monotonic() + 1  # a thread may still be about to let go of one
        while any(one() for one in seen) and time.monotonic() < until:
            time.sleep(0.01)
        alive.append(sum(one() is not None for one in seen))
        image = read_image(path)
        seen.append(weakref.ref(image))
        return image

    pictures, _, _ = sort_files(expand([own_sizes / "test"]), None)
    frames = [frame._replace(read=partial(read, frame.path)) for frame in pictures]
    predict_all(Threshold(), frames, tmp_path)
    assert alive == [0, 0, 0, 0]


# ---- end to end ------------------------------------------------------------------------------


def test_train_on_crops_and_predict(own_sizes, tmp_path):
    flags = ("--n-filters", 2, "--batch-size", 4, "--swanlab", "disabled", "--device", "cpu")
    crops = ("--crop", 20, "--augment", "rotate=90,flip,noise", "--data", own_sizes)
    out, options = ("--out", tmp_path / "run", "--epochs"), (*crops, "--foreground", 0.5)
    said = output_of("train.py", *flags, *options, *out, 2, cwd=tmp_path)
    assert "their own size, trained on crops of 20x20" in said
    output_of("train.py", "--resume", *out, 3, cwd=tmp_path)
    curves = []
    output_of(
        "train.py", *flags, *options, "--out", tmp_path / "at once", "--epochs", 3, cwd=tmp_path
    )
    for run in ("run", "at once"):
        lines = (tmp_path / run / "metrics.csv").read_text().splitlines()
        curves.append([line.split(",")[:12] for line in lines])
    assert curves[0] == curves[1] and len(curves[0]) == 4
    model = tmp_path / "run" / "best_model.pth"
    output_of("predict.py", own_sizes / "test", "--model", model, cwd=tmp_path)
    report = json.loads((tmp_path / "predictions" / "report.json").read_text())
    assert report["image_size"] is None and report["images"] == 4
    for number, (height, width) in enumerate(SIZES):
        mask = Image.open(tmp_path / "predictions" / f"{number}_mask.png")
        assert mask.size == (width, height)
