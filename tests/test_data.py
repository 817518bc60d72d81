"""Reading, rasterising, caching and batching.

Checked against torchvision, PIL, pycocotools and masks drawn by hand.
"""

import json
import math
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SIZE,
    SMALL,
    STORED_TURNED,
    assert_done,
    brightness_model,
    edit_annotations,
    output_of,
    png_bytes,
    rasterize,
    save_turned,
    script,
    script_here,
    square,
    write_split,
)
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

import data
import download
from data import (
    Batches,
    COCOSegmentationDataset,
    Order,
    Transform,
    load_split,
    open_split,
)
from medseg.coco import ANNOTATIONS, SPLITS, listed, load_coco
from medseg.drawing import outline
from medseg.duplicates import near_duplicates
from medseg.images import MEAN, STD, resize_nearest
from medseg.inference import full_size_masks
from medseg.normalization import normalize
from medseg.planning.audit import audit
from medseg.predicting.scoring import FolderScores
from medseg.run_lengths import encode, encode_labels, unite
from medseg.splits import grouped_split, slice_number

# ---- annotations -----------------------------------------------------------------------------


def compressed(mask):
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    return {"size": list(mask.shape), "counts": counts}


def uncompressed(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def test_a_rectangle_covers_the_pixels_it_should():
    mask = rasterize([[2, 3, 6, 3, 6, 5, 2, 5]], 10, 12)
    expected = np.zeros((10, 12), np.uint8)
    expected[3:5, 2:6] = 1
    np.testing.assert_array_equal(mask, expected)


def test_polygons_agree_with_pil_except_at_the_border():
    rng = np.random.default_rng(1)
    for _ in range(20):
        angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 9)), rng.uniform(15, 40, 9)
        points = np.stack([50 + radius * np.cos(angle), 45 + radius * np.sin(angle)], 1)
        drawn = Image.new("1", (100, 90))
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in points], fill=1)
        mask = rasterize([points.ravel().tolist()], 90, 100)
        perimeter = np.hypot(*(points - np.roll(points, 1, 0)).T).sum()
        assert (mask != np.asarray(drawn)).sum() < 1.5 * perimeter
        x, y = points.T
        area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2  # the shoelace formula
        assert abs(mask.sum() - area) < perimeter


def test_run_lengths_give_back_the_mask_they_were_made_from():
    rng = np.random.default_rng(2)
    for trial in range(20):
        share = rng.choice([0, 0.02, 0.5, 0.98, 1])
        mask = (rng.random((17 + trial, 40)) < share).astype(np.uint8)
        np.testing.assert_array_equal(rasterize(compressed(mask), *mask.shape), mask)
        np.testing.assert_array_equal(rasterize(uncompressed(mask), *mask.shape), mask)


BAD_COUNTS = [[3, 2], [100], [-3, 75], [71.5, 0.5], "", "0", "zzzz", "o" * 100, "\0", "é"]
DAMAGED_SEGMENTATIONS = [
    *(None, [], 5, "text", {}),
    *([[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [5, 5], [[1, 2, "3", 4, 5, 6]], [[True] * 6]),
    *([[0, 0, 17, 0, 5, 5]], [[0, 0, -9, 0, 5, 5]], [[0, 19, 5, 0, 5, 5]]),  # just too far out
    *([[float("nan")] * 6], [[float("inf"), 0, 1, 1, 2, 2]]),
    [[0, 0, 1e12, 0, 5, 5]],  # pycocotools would ask for terabytes
    *({"size": [8, 9], "counts": [72]}, {"size": [9, 8]}),
    *({"size": [9, 8], "counts": counts} for counts in BAD_COUNTS),
]


def test_long_outlines_are_drawn_in_pieces(monkeypatch):
    """Bit for bit as pycocotools draws them at once."""
    rng = np.random.default_rng(0)
    for limit in (20, 100, 400) * 10:
        monkeypatch.setattr("medseg.coco.MAX_OUTLINE", limit)
        height, width = map(int, rng.integers(5, 80, 2))
        points = rng.uniform(-0.9, 1.9, (int(rng.integers(3, 60)), 2)) * [width, height]
        outline = points.ravel().tolist()
        (whole,) = coco_mask.frPyObjects([outline], height, width)
        np.testing.assert_array_equal(rasterize([outline], height, width), coco_mask.decode(whole))


def test_a_polygon_may_lead_out_of_the_image_by_its_size():
    outside = rasterize([[-8, -9, 16, -9, 16, 18, -8, 18]], 9, 8)
    np.testing.assert_array_equal(outside, np.ones((9, 8)))


@pytest.mark.parametrize("segmentation", DAMAGED_SEGMENTATIONS, ids=str)
def test_damaged_segmentations_are_refused(segmentation):
    with pytest.raises(ValueError):
        rasterize(segmentation, 9, 8)


# ---- items -----------------------------------------------------------------------------------


@pytest.fixture
def split(tmp_path):
    """(folder, images by name, masks) of a split with six images; the masks are drawn by hand.

    The images have, in order: one polygon, two polygons in one annotation, nothing, compressed
    run lengths, the run lengths of a crowd, two annotations that overlap.
    """
    pixels = np.random.default_rng(3).integers(0, 256, (6, 90, 70, 3), dtype=np.uint8)
    images = {f"{number}.png": Image.fromarray(own) for number, own in enumerate(pixels)}
    masks = np.zeros((6, 90, 70), np.uint8)
    blob = (np.hypot(*np.mgrid[-45:45, -35:35]) < 20).astype(np.uint8)
    masks[0, 20:50, 10:40] = 1
    masks[1, 5:15, 5:15] = masks[1, 60:80, 40:60] = 1
    masks[3], masks[4] = blob, 1 - blob
    masks[5, 10:40, 10:40] = masks[5, 30:60, 30:60] = 1
    annotations = [
        *((0, square(10, 20, 30)), (1, square(5, 5, 10) + square(40, 60, 20))),
        *((3, compressed(blob)), (4, uncompressed(1 - blob))),
        *((5, square(10, 10, 30)), (5, square(30, 30, 30))),
    ]
    folder = tmp_path / "train"
    write_split(folder, images, annotations)
    edit_annotations(folder, lambda content: content["annotations"][3].update(iscrowd=1))
    return folder, images, masks


def nearest(mask, *size):
    """torch's nearest-exact resize of a uint8 array (H, W), as float32 (1, *size)."""
    batch = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(batch, size=size, mode="nearest-exact")[0]


def test_items_against_torchvision(split):
    from torchvision.transforms import v2

    folder, images, masks = split
    dataset = COCOSegmentationDataset(load_coco(folder), folder)
    assert len(dataset) == 6
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for index, (picture, drawn) in enumerate(zip(images.values(), masks, strict=True)):
        image, mask = dataset[index]
        assert image.shape == (3, 256, 256) and image.dtype == torch.float32
        assert mask.shape == (1, 256, 256) and mask.dtype == torch.float32
        assert torch.equal(mask, nearest(drawn, 256, 256))
        pixels = v2.functional.to_image(picture).float() / 255
        plain = v2.functional.resize(pixels, [256, 256], antialias=True)
        levels = (image * std + mean - plain).abs() * 255
        assert levels.max() < 1.01  # ours is rounded to whole grey levels


def test_the_tutorials_transform_works(split):
    from torchvision import transforms

    folder, images, masks = split
    steps = [transforms.ToTensor(), transforms.Resize((64, 48)), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(steps)
    image, mask = COCOSegmentationDataset(load_coco(folder), folder, transform=transform)[5]
    assert torch.equal(image, transform(np.array(images["5.png"])))
    assert torch.equal(mask, nearest(masks[5], 64, 48))


LENGTHS = [(640, 256), (90, 256), (70, 33), (1, 7), (7, 1), (255, 256), (513, 96), (1000, 3)]


@pytest.mark.parametrize("old, new", LENGTHS)
def test_nearest_is_torchs_and_pils(old, new):
    line = torch.arange(old, dtype=torch.float64)[None, None, :, None]
    expected = F.interpolate(line, size=(new, 1), mode="nearest-exact").flatten().numpy()
    column = line[0, 0].numpy()
    np.testing.assert_array_equal(resize_nearest(column, new, 1)[:, 0], expected)
    image = Image.fromarray(column.astype(np.float32)).resize((1, new), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(image)[:, 0], expected)


def test_mask_and_image_stay_aligned(tmp_path):
    """A bright rectangle that is its own mask: after resizing, both have the same centre."""
    pixels = np.zeros((640, 640), np.uint8)
    pixels[210:410, 130:290] = 255
    rectangle = [[130, 210, 290, 210, 290, 410, 130, 410]]
    write_split(tmp_path / "train", {"0.png": Image.fromarray(pixels)}, [(0, rectangle)])
    row = load_split(tmp_path, "train", 64)[0].astype(float)
    axis = np.arange(64)
    for weights in (row[..., 0], row[..., 3]):
        center = (weights.sum(0) @ axis / weights.sum(), weights.sum(1) @ axis / weights.sum())
        assert center == pytest.approx((20.5, 30.5), abs=0.01)


def test_training_and_prediction_see_the_same_pixels(split):
    from predict import preprocess_image

    folder, _, _ = split
    rows = load_split(folder.parent, "train")
    tensor, picture = preprocess_image(folder / "2.png")
    ((images, _),) = Batches(rows, Order(6))
    assert torch.equal(images[2], tensor[0]) and picture.size == (256, 256)
    item, _ = COCOSegmentationDataset(load_coco(folder), folder)[2]
    assert torch.equal(images[2], item)


# ---- pictures that are stored turned (EXIF) --------------------------------------------------


def turned_data_set(root, size, orientation, *, recorded_as_stored=False):
    """A data set of three pictures a split with a disc, stored turned, outlined as it is shown.

    size: (height, width) of the shown pictures. recorded_as_stored: the outlines, and the sizes in
    the records, are of the pictures before turning instead.
    """
    height, width = size
    shown = np.full((height, width, 3), 60, np.uint8)
    shown[8:20, 4:16] = 160
    box = STORED_TURNED[orientation](shown) if recorded_as_stored else shown
    rows, columns = np.nonzero(box[..., 0] > 100)
    outline = square(int(columns.min()), int(rows.min()), 12)
    for split in SPLITS:
        names = {f"{split}{number}.jpg": Image.fromarray(box) for number in range(3)}
        write_split(root / split, names, [(number, outline) for number in range(3)])
        for name in names:
            save_turned(shown, root / split / name, orientation, quality=100)
    return root


TURNED_SETS = {
    "square": ((48, 48), 6, False),
    "upside down": ((48, 64), 3, False),
    "mirrored": ((48, 64), 2, False),
    "recorded as shown": ((48, 64), 8, False),
    "recorded as stored": ((48, 64), 6, True),
    "recorded as stored, mirrored": ((48, 64), 7, True),
}


@pytest.mark.parametrize("case", TURNED_SETS)
def test_outlines_lie_on_pictures_that_are_stored_turned(tmp_path, case):
    """By the grey values under the masks: 160, and 60 elsewhere."""
    size, orientation, as_stored = TURNED_SETS[case]
    root = turned_data_set(tmp_path / "set", size, orientation, recorded_as_stored=as_stored)
    dataset = open_split(root, "train", None)
    picture, (mask,) = dataset.load(0)
    for row in [np.dstack([picture.rgb(), mask]), dataset.row(0), *load_split(root, "valid", None)]:
        assert row.shape == (*size, 4)
        assert np.ptp(row[8:20, 4:16, 3]) == 0 and row[..., 3].sum() == 144
        assert row[row[..., 3] > 0][:, 0].mean() > 158 and row[row[..., 3] == 0][:, 0].mean() < 63
    out = output_of("data.py", root, "--out", tmp_path, cwd=tmp_path)
    assert out.count("3 of 3 images are stored turned") == 3 and "problem" not in out


def test_ordinary_pictures_are_not_said_to_be_turned(dataset, tmp_path):
    assert "turned" not in output_of("data.py", dataset, "--out", tmp_path, cwd=tmp_path)


def test_a_record_of_neither_size_is_a_problem(tmp_path):
    root = turned_data_set(tmp_path / "set", (48, 64), 3)
    edit_annotations(root / "train", lambda own: own["images"][0].update(width=48, height=64))
    with pytest.raises(ValueError, match="train0.jpg: is 64x48.*48x64"):
        open_split(root, "train").row(0)


def test_turned_pictures_train_and_are_scored_as_they_are_shown(tmp_path, no_pictures):
    """The line comes when the cache is made, and the weights' Dice is that of upright pictures."""
    torch.save(brightness_model(None).state_dict(), tmp_path / "best_model.pth")
    for case, (size, orientation, as_stored) in TURNED_SETS.items():
        root = turned_data_set(tmp_path / case, size, orientation, recorded_as_stored=as_stored)
        options = ("--output", tmp_path / f"out {case}", "--device", "cpu", "--threshold", 0.5)
        output_of("predict.py", root / "test", *options, cwd=tmp_path)
        report = json.loads((tmp_path / f"out {case}" / "report.json").read_text())
        assert report["scores"]["dice"] > 0.99, case
        mask = np.asarray(Image.open(tmp_path / f"out {case}" / "test0_mask.png")) > 0
        assert mask.shape == size and mask[8:20, 4:16].all() and mask.sum() == 144
    command = ("--data", tmp_path / "square", "--epochs", 1, *SMALL)
    for told in (3, 0):
        out = output_of("train.py", *command, "--out", tmp_path / f"run{told}", cwd=tmp_path)
        assert out.count("3 of 3 images are stored turned") == told


# ---- masks, and data sets of other formats ---------------------------------------------------


@pytest.mark.parametrize("alpha", [False, True])
def test_lossy_webp_masks_are_cut_at_half_as_jpeg_is(tmp_path, refused, alpha):
    """By the file's chunks: values alone do not tell, and a lossless WebP is as good as a PNG."""
    blocks = np.random.default_rng(1).integers(0, 2, (6, 8), dtype=np.uint8) * 255
    mask = Image.fromarray(np.kron(blocks, np.ones((9, 9), np.uint8)))
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    mask.save(tmp_path / "images" / "a.png")
    drawn = Image.merge("RGBA", [mask] * 4) if alpha else mask
    drawn.save(tmp_path / "masks" / "a.webp", quality=30)
    command = ("--masks", "images", "masks", "--split", 100, 0, 0, "--force")
    assert_done(script_here("download.py", *command, cwd=tmp_path))
    masks = open_split(tmp_path / "dataset", "train").load_masks(0, mask.size)
    np.testing.assert_array_equal(masks[0], np.asarray(mask) > 0)
    colours = np.stack([np.asarray(mask), np.zeros_like(mask), np.asarray(mask)], 2)
    Image.fromarray(colours).save(tmp_path / "masks" / "a.webp", quality=90)
    refused("download", *command, words=["a.webp"])


def test_a_data_set_of_new_formats_trains_and_predicts(tmp_path, no_pictures):
    rng = np.random.default_rng(0)
    saved = {".ppm": {}, ".webp": {"lossless": True}, ".gif": {}, ".pgm": {}}
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number, suffix in enumerate(2 * [*saved]):
        pixels = rng.integers(0, 90, (SIZE, SIZE), dtype=np.uint8)
        pixels[8:24, 8:24] = 230
        Image.fromarray(pixels).save(tmp_path / f"images/{number}{suffix}", **saved[suffix])
        mask = Image.fromarray((pixels == 230).astype(np.uint8) * 255)
        other = [*saved][number % 3]
        mask.convert("L").save(tmp_path / f"masks/{number}{other}", **saved[other])
    for command in (
        ("download.py", "--masks", "images", "masks", "--split", 50, 25, 25),
        ("data.py",),
        ("train.py", *SMALL, "--epochs", 1),
        ("predict.py", "dataset/test", "--output", "out"),
    ):
        assert_done(script_here(*command, cwd=tmp_path))
    copied = [path for path in tmp_path.glob("dataset/[tv]*/*") if path.suffix != ".json"]
    assert len(copied) == 8
    for path in copied:
        assert path.read_bytes() == (tmp_path / "images" / path.name).read_bytes()
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2
    assert (tmp_path / "out" / "report.json").exists()


# ---- the cache -------------------------------------------------------------------------------


def cached(root):
    return sorted(path.name for path in (root / ".cache").iterdir())


def test_cache_is_made_once_and_read_from_disk(dataset, monkeypatch):
    first = load_split(dataset, "train", 32)
    assert isinstance(first, np.memmap) and first.shape == (6, 32, 32, 4)
    assert len(cached(dataset)) == 1
    monkeypatch.setattr(data.pictures, "read_image", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load_split(dataset, "train", 32), first)
    moved = dataset.parent / "elsewhere"
    shutil.move(dataset, moved)  # the cache does not depend on where the data set is
    np.testing.assert_array_equal(load_split(moved, "train", 32), first)


def test_cache_follows_its_sources(dataset):
    before = np.array(load_split(dataset, "train", 32))
    update("annotations", 2, segmentation=square(0, 0, SIZE))(dataset)
    after = np.array(load_split(dataset, "train", 32))
    assert after[2, ..., 3].all() and not before[2, ..., 3].all()
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
    assert len(cached(dataset)) == 1  # the stale array is gone
    load_split(dataset, "train", 16)
    load_split(dataset, "valid", 32)
    assert len(cached(dataset)) == 3


def test_a_cache_that_is_not_what_it_should_be_is_made_again(dataset):
    """Cut, of other rows, type or bytes a pixel, or of an earlier version, whose pixels differ."""
    rows = np.array(load_split(dataset, "train", 32))
    path = dataset / ".cache" / cached(dataset)[0]
    path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(load_split(dataset, "train", 32), rows)
    for wrong in (rows[:-1], rows.astype(np.int8), rows[..., :3]):
        np.save(path, wrong)
        again = load_split(dataset, "train", 32)
        assert again.dtype == np.uint8
        np.testing.assert_array_equal(again, rows)
    name, size, version = path.name.split("-")  # train, 32, and one digit with the fingerprint
    path.unlink()
    for earlier in range(int(version[0])):
        np.save(path.with_name(f"{name}-{size}-{earlier}{version[1:]}"), np.zeros_like(rows))
    np.testing.assert_array_equal(load_split(dataset, "train", 32), rows)
    assert version[0] > "2"  # whose pictures were not turned
    assert cached(dataset) == [path.name]


def test_memory_where_the_folder_cannot_be_written(dataset, capsys):
    # A file in its place: as root, a test may write to any folder.
    (dataset / ".cache").write_text("not a folder")
    rows = load_split(dataset, "train", 32)
    assert not isinstance(rows, np.memmap) and rows.shape == (6, 32, 32, 4)
    assert "in memory" in capsys.readouterr().err


def test_nothing_is_left_when_building_fails(dataset):
    (dataset / "train" / "5_train.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="5_train.png"):
        load_split(dataset, "train", 32)
    assert cached(dataset) == []


# ---- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [None, 8])
@pytest.mark.parametrize("repeat, times", [(1, {1}), (3, {3}), (2.5, {2, 3}), (0.5, {0, 1})])
def test_an_epoch_draws_every_image_as_often_as_it_is_asked_to(repeat, times, crop):
    rows = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 4), np.uint8)
    rows[..., 3] = 0
    batches = Batches(rows, Order(4, True, repeat=repeat), transform=Transform(crop=crop))
    epochs = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        shades = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
        assert len(shades) == round(10 * repeat) and len(batches) == math.ceil(10 * repeat / 4)
        epochs.append([int((shades == shade).sum()) for shade in normalize_shades(10)])
    assert all(set(counts) == times for counts in epochs)
    assert (epochs[0] != epochs[1]) == (repeat % 1 > 0)  # others each time


def normalize_shades(count):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 1, 3)
    return normalize(pixels)[:, 0, 0, 0]


def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch():
    rows = np.zeros((10, 8, 8, 4), np.uint8)
    rows[..., 0] = np.arange(10)[:, None, None]
    rows[3:, :4, :, 3] = 1

    def order(epoch=0, start=0, seed=0):
        """The numbers of the images, which are their red pixels, as they come."""
        batches = Batches(rows, Order(4, True, seed))
        batches.set_epoch(epoch, start)
        red = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
        return ((red * STD[0] + MEAN[0]) * 255).round().int().tolist()

    assert sorted(order()) == list(range(10)) and order() == order()
    assert len({tuple(order(epoch)) for epoch in range(5)}) == 5
    assert order() != order(seed=1)
    assert order(epoch=3, start=1) == order(epoch=3)[4:]
    plain = list(Batches(rows, Order(4)))
    assert [len(images) for images, _ in plain] == [4, 4, 2] and len(Batches(rows, Order(4))) == 3
    images, masks = plain[0]
    assert images.shape == (4, 3, 8, 8)
    assert masks.shape == (4, 1, 8, 8) and masks.dtype == torch.float32
    assert masks.sum((1, 2, 3)).tolist() == [0, 0, 0, 32]
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("free, resident", [(2, False), (3, True)])  # of the size of the rows
def test_a_split_that_leaves_room_on_the_gpu_is_moved_there(free, resident, monkeypatch):
    """The GPU is pretended: there may be none here."""
    rows, moved = np.zeros((10, 8, 8, 4), np.uint8), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * rows.nbytes, 0))
    monkeypatch.setattr(torch.Tensor, "to", lambda pixels, device: moved.append(device) or pixels)
    Batches(rows, Order(4), "cuda")
    assert moved == [torch.device("cuda")] * resident


# ---- what is wrong with a data set -----------------------------------------------------------


def remove(name):
    """A function that removes a folder of a data set, '' for all of it."""
    return lambda root: shutil.rmtree(root / name)


def rewrite(name, content):
    """A function that writes other bytes, or none and no file, to a file of train."""

    def spoil(root):
        (root / "train" / name).unlink()
        if content is not None:
            (root / "train" / name).write_bytes(content)

    return spoil


def edit(change):
    """A function that applies change(content) to the annotations of train."""
    return lambda root: edit_annotations(root / "train", change)


def update(key, index, **values):
    """A function that changes one record of train: content[key][index]."""
    return edit(lambda content: content[key][index].update(values))


# name: (a function that spoils the data set, what the message names, ...)
PNG = png_bytes(np.zeros((40, 50, 1), np.uint8))
BAD = {
    "no folder": (remove(""), "dataset:", "download.py"),
    "no split": (remove("valid"), "valid"),
    "no annotations": (rewrite(ANNOTATIONS, None), ANNOTATIONS),
    "not JSON": (rewrite(ANNOTATIONS, b"{"), ANNOTATIONS, "JSON"),
    "not text": (rewrite(ANNOTATIONS, b"\xff\xfe\x00"), ANNOTATIONS, "JSON"),
    "nested without end": (rewrite(ANNOTATIONS, b"[" * 100_000), ANNOTATIONS, "JSON"),
    "a list": (rewrite(ANNOTATIONS, b"[]"), ANNOTATIONS, "COCO"),
    "no images key": (edit(lambda content: content.pop("images")), "list of images"),
    "record of another kind": (edit(lambda content: content["images"].append(5)), "images[6]"),
    "two records": (edit(lambda content: content["images"].extend("ab")), "images[6]", "(2 such"),
    "id used twice": (update("images", 1, id=0), "images[1] has id 0"),
    "width below 0": (update("images", 1, width=-5), "images[1] has no"),
    "of no image": (update("annotations", 1, image_id=99), "image_id 99"),
    "empty split": (edit(lambda content: content.update(images=[], annotations=[])), ANNOTATIONS),
    "image missing": (rewrite("3_train.png", None), "3_train.png"),
    "image truncated": (
        rewrite("3_train.png", PNG[:200]),
        "3_train.png",
    ),
    "another size": (
        rewrite("3_train.png", PNG),
        "3_train.png",
        "50x40",
        "48x48",
    ),
    "size of terabytes": (update("images", 3, width=10**7, height=10**7), "10000000x10000000"),
    "climbs out": (update("images", 3, file_name="../../secret.png"), "../../secret.png"),
    "absolute": (update("images", 3, file_name="/etc/passwd"), "/etc/passwd"),
    "climbs out on Windows": (update("images", 3, file_name="..\\a.png"), "..\\\\a.png"),
    "damaged polygon": (update("annotations", 3, segmentation=[[1, 2] * 3 + [4]]), "annotation 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_and_status_2(name, dataset, tmp_path, refused):
    spoil, *words = BAD[name]
    spoil(dataset)
    refused("train", "--data", dataset, "--out", tmp_path / "out", *SMALL, words=words)
    assert list((tmp_path / "out").iterdir()) == []
    refused("data", dataset, words=["problem"] if dataset.exists() else words)


@pytest.mark.parametrize("there", [False, True])
def test_no_data_set_is_said_once(there, tmp_path, refused, capsys):
    folder = tmp_path / "scans"
    if there:
        (folder / "train").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(folder / "train" / "0.png")
    before = sorted(tmp_path.rglob("*"))
    refused("data", folder, words=[folder, ANNOTATIONS, "download.py"])
    with pytest.raises(FileNotFoundError):
        data.main([str(folder)])
    assert capsys.readouterr().out == ""  # the message on stderr is all there is
    assert sorted(tmp_path.rglob("*")) == before


def in_other_words(content):
    """Rewrite annotations as other programs write them, meaning the same."""
    for number, image in enumerate(content["images"]):
        image |= {"width": 0, "height": float(SIZE)} if number % 2 else {"width": f"{SIZE}"}
        image["file_name"] = f"up\\{image['file_name'].replace('_', '%5F')}?t=1"
    for number, annotation in enumerate(content["annotations"]):
        (own,) = annotation["segmentation"]
        points = [own[i : i + 2] for i in range(0, len(own), 2)]
        annotation["segmentation"] = [[[own]], own, points, [own, [3, 4]]][number % 4]
        annotation |= {"image_id": str(annotation["image_id"]), "category_id": None}
    image_id = content["images"][0]["id"]
    content["annotations"].append({"image_id": image_id, "segmentation": [[]], "area": []})


def test_a_data_set_in_the_words_of_other_programs(dataset, tmp_path):
    before = load_split(dataset, "train", SIZE).copy()
    edit_annotations(dataset / "train", in_other_words)
    np.testing.assert_array_equal(load_split(dataset, "train", SIZE), before)
    out = assert_done(script_here("data.py", dataset, cwd=tmp_path)).split("valid:")[0]
    counts = [line.split()[1] for line in out.splitlines() if line.startswith("  note")]
    assert sorted(counts) == ["1", "2", "3", "3", "5", "6", "6", "7"]
    trained = script_here("train.py", "--data", dataset, "--out", tmp_path, *SMALL, cwd=tmp_path)
    assert assert_done(trained).count("train: ") >= 7


@pytest.mark.parametrize("factor", [SIZE, 2000])
def test_outlines_that_are_fractions_are_refused(dataset, tmp_path, refused, factor):
    def divide(content):
        for annotation in content["annotations"]:
            (own,) = annotation["segmentation"]
            annotation["segmentation"] = [[value / factor for value in own]]

    edit_annotations(dataset / "train", divide)
    refused("train", "--data", dataset, "--out", tmp_path / "o", *SMALL, words=["fractions"])


# ---- audit -----------------------------------------------------------------------------------


def test_audit_counts(dataset, tmp_path):
    edit_annotations(dataset / "train", lambda content: content["annotations"].pop(0))
    Image.new("RGB", (SIZE, SIZE)).save(dataset / "train" / "stray.png")
    train = assert_done(script("data.py", dataset, cwd=tmp_path)).split("valid:")[0]
    assert "train: 6 images, 5 annotations" in train
    assert "48x48: 6" in train and "tumour: 5" in train
    percent = 100 * 5 * 16 * 16 / (6 * SIZE * SIZE)  # five squares of 16 x 16
    assert f"{percent:.2f} %" in train and f"{100 - percent:.2f} %" in train
    assert "1 images" in train.split("no lesion")[1]
    assert train.rstrip().endswith("1")  # the number of images that are not listed: stray.png
    assert Image.open(tmp_path / "contact_sheet.jpg").width == 8 * 160


def test_outline():
    mask = np.zeros((7, 7))
    mask[1:6, 1:6] = 1
    edge = outline(mask)
    assert edge.sum() == 16 and not edge[2:5, 2:5].any()


# ---- neighbours ------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """60 images numbered 1 to 60, given to the splits in turn, and four duplicates.

    The duplicates are images 3, 6, 9 and 12 of train, as 101 to 104 in valid.
    """
    pixels = np.random.default_rng(0).integers(0, 127, (62, 24, 24, 3), dtype=np.uint8)
    pixels = pixels[1:] + pixels[:-1]  # neighbours look alike: they have half in common
    pictures, splits = list(map(Image.fromarray, pixels)), {split: {} for split in SPLITS}
    for number in range(1, 61):
        splits[SPLITS[number % 3]][f"{number}_x.png"] = pictures[number]
    splits["valid"] |= {f"{100 + number}_x.png": pictures[3 * number] for number in range(1, 5)}
    for split, images in splits.items():
        annotations = [(index, square(index % 9, 2, 8)) for index in range(len(images))]
        write_split(tmp_path / "numbered" / split, images, annotations)
    return tmp_path / "numbered"


def test_the_audit_counts_what_splits_have_in_common(numbered, capsys, tmp_path):
    assert audit(numbered, tmp_path) == []
    out = capsys.readouterr().out
    # valid has 24 images: 4 duplicates; and 1, 4, ... 58, all of which but the first follow a
    # multiple of 3, while 101 to 104 have no neighbour. test has 2, 5, ... 59: all have one.
    assert re.search(r"valid beside train: 16\.7% .*, 79\.2% a neighbour", out)
    assert re.search(r"test beside train: 0\.0% .*, 100\.0% a neighbour", out)


def segmentations_by_name(folder):
    """{file name: [segmentation]} of the annotation file of a split, read with json alone."""
    content = json.loads((folder / ANNOTATIONS).read_text())
    names = {record["id"]: record["file_name"] for record in content["images"]}
    segmentations = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        segmentations[names[annotation["image_id"]]].append(annotation["segmentation"])
    return segmentations


def test_a_grouped_split_keeps_neighbours_together(numbered, tmp_path, refused):
    target = grouped_split(numbered, tmp_path / "grouped", block=8)
    cocos = {split: load_coco(target / split) for split in SPLITS}
    numbers = {}
    for split, coco in cocos.items():
        numbers[split] = [slice_number(image["file_name"]) for image in coco.imgs.values()]
    assert sorted(sum(numbers.values(), [])) == [*range(1, 61), *range(101, 105)]
    pairs = 0
    for own in numbers.values():
        pairs += sum(number + 1 in own for number in own)
    assert pairs >= 62 - 7  # of 62 neighbouring pairs, the edges of 8 blocks part 7 at most
    before = {}
    for split in SPLITS:
        before |= segmentations_by_name(numbered / split)
    for split, coco in cocos.items():
        for index, image in coco.imgs.items():
            name = image["file_name"]
            (old,) = numbered.glob(f"*/{name}")
            assert (target / split / name).read_bytes() == old.read_bytes()
            after = [annotation["segmentation"] for annotation in coco.imgToAnns[index]]
            assert after == before[name]
        assert len(load_split(target, split, 32)) == len(numbers[split])
    again = grouped_split(numbered, tmp_path / "again", block=8)
    for split in SPLITS:
        path = f"{split}/{ANNOTATIONS}"
        assert (target / path).read_bytes() == (again / path).read_bytes()
    refused("data", numbered, "--grouped-split", target, words=[target])
    refused("data", numbered, "--grouped-split", tmp_path / "new", words=[numbered, "50"])
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*.tmp"))


# ---- run lengths, and many classes -----------------------------------------------------------


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(4)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 30, 2))
        mask, other = rng.random((2, height, width)) < rng.choice([0, 0.05, 0.5, 0.95, 1])
        runs, others = encode(mask), encode(other)
        assert runs.coco == coco_mask.encode(np.asfortranarray(mask, np.uint8))
        np.testing.assert_array_equal(np.asarray(runs), mask)
        assert runs.area == mask.sum()
        union = unite([runs, others, runs])
        np.testing.assert_array_equal(np.asarray(union), mask | other)
        assert union == encode(mask | other)
        np.testing.assert_array_equal(np.asarray(runs | other), mask | other)
        size = tuple(int(side) for side in rng.integers(1, 50, 2))  # smaller and larger
        np.testing.assert_array_equal(runs.draw(*size), resize_nearest(mask, *size))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32])
def test_the_run_lengths_of_all_labels_in_one_pass(dtype):
    labels = np.random.default_rng(5).choice([0, 3, 200, np.iinfo(dtype).max], (91, 134))
    labels = labels.astype(dtype)
    masks = encode_labels(labels)
    assert sorted(masks) == np.unique(labels).tolist()
    for value, runs in masks.items():
        assert runs == encode(labels == value)


def test_counts_may_hold_empty_runs():
    mask = rasterize({"size": [2, 5], "counts": [0, 2, 0, 1, 3, 0, 1, 3]}, 2, 5)
    assert mask.T.ravel().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]


def peak_of(function, *arguments):
    """The bytes that were taken at most while the function ran, those of its numpy arrays too."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_many_classes_of_a_large_image_take_little_memory(tmp_path, capsys):
    """249 classes at once would be 249 bytes a pixel, in each of these steps."""
    rng = np.random.default_rng(6)
    values = rng.integers(0, 250, (40, 60), np.uint8)
    values.flat[:250] = range(250)
    large = np.kron(values, np.ones((20, 20), np.uint8))  # 800 x 1200
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.fromarray(large).save(tmp_path / folder / "0.png")
    limit = 80 * large.size
    root = tmp_path / "many"
    command = ["--masks", tmp_path / "images", tmp_path / "masks", "--data", root]
    assert peak_of(download.main, [*map(str, command), "--into", "train"]) < limit
    names = [str(value) for value in range(1, 250)]
    assert peak_of(audit, root, tmp_path) < limit
    assert "category     249: 1 annotations" in capsys.readouterr().out
    dataset = open_split(root, "train", 40, classes=names)
    assert peak_of(dataset.row, 0) < limit
    masks = dataset.load_masks(0, (1200, 800), (40, 40))
    small = resize_nearest(large, 40, 40)
    np.testing.assert_array_equal(masks, small == np.arange(1, 250)[:, None, None])
    bits = np.unpackbits(dataset.row(0)[..., 3:], axis=2, count=249, bitorder="little")
    np.testing.assert_array_equal(bits.transpose(2, 0, 1), masks)
    scores, probabilities = FolderScores(dataset), masks.astype(np.float32)
    assert peak_of(scores.add, dataset.path(0), (1200, 800), probabilities) < limit
    counts, distances, _ = scores.result()
    labels = full_size_masks(probabilities, (1200, 800), 0.5)
    assert counts[0, 0, :, 0].sum() == ((labels == large) & (large > 0)).sum() > 0


# ---- annotations without end -----------------------------------------------------------------


def test_of_many_damaged_records_a_hundred_are_named_and_all_counted(dataset, tmp_path):
    def change(content):
        content["annotations"] += [{"image_id": 99}] * 250

    edit_annotations(dataset / "train", change)
    skipped = []
    assert len(load_coco(dataset / "train", skipped).imgs) == 6
    assert len(skipped) == 101 and "annotations[105]" in skipped[99]
    assert "150 more" in skipped[100] and str(dataset / "train") in skipped[100]
    with pytest.raises(ValueError, match=r"annotations\[6\].*250 such"):
        load_coco(dataset / "train")
    problems = audit(dataset, tmp_path)
    assert problems == skipped


def test_of_many_names_a_line_has_the_first():
    assert listed(list("abcdefgh")) == "a, b, c, d, e, f, g, h"
    assert listed(list("abcdefghi")) == "a, b, c, d, e, f, g, h, ... (9)"


def test_long_names_and_ids_do_not_fill_the_line(dataset):
    def change(content):
        content["annotations"].append({"image_id": "x" * 10**6})
        content["images"].append({"id": ["y" * 10**6], "width": 3, "height": 3})

    edit_annotations(dataset / "train", change)
    skipped = []
    load_coco(dataset / "train", skipped)
    assert len(skipped) == 2 and max(map(len, skipped)) < 300 + len(str(dataset))


# ---- what else may go unseen -----------------------------------------------------------------


def test_the_cache_follows_the_size_and_the_time_of_every_image(dataset):
    path = dataset / "train" / "4_train.png"

    def store(brightness, file_format, seconds):
        Image.new("RGB", (SIZE, SIZE), (brightness,) * 3).save(path, file_format)
        os.utime(path, (seconds, seconds))
        rows = load_split(dataset, "train", 32)
        assert (rows[4, ..., :3] == brightness).all()
        return path.stat().st_size

    size = store(10, "BMP", 1000)
    assert store(20, "BMP", 2000) == size  # the time alone has changed
    assert store(30, "PNG", 2000) != size  # the size alone


def thumbnails(**values):
    """[(file name, thumbnail)] as the audit has them; n5_x is 5_x.png."""
    return [(f"{name.removeprefix('n')}.png", value) for name, value in values.items()]


def test_what_all_images_share_makes_no_duplicate():
    rng = np.random.default_rng(7)
    shared = 100 * rng.standard_normal(256)
    own = shared + rng.standard_normal((8, 256))
    train = thumbnails(**{f"a{number}": value for number, value in enumerate(own[:6])})
    assert near_duplicates(thumbnails(b=own[6], c=own[7]), train).startswith("0.0%")
    assert near_duplicates(thumbnails(b=own[6], c=own[1]), train).startswith("50.0%")
    assert near_duplicates(thumbnails(b=own[0]), train[:1]).startswith("100.0%")  # one alone


def test_neighbours_are_of_the_next_number_and_not_of_the_same():
    flat = np.arange(256.0)
    train = thumbnails(n10_x=flat, n20_x=-flat, n5_x=flat, other=flat)
    some = thumbnails(n10_y=flat, n11_y=flat, n19_y=-flat, n22_y=flat, nameless=flat)
    # 11 and 19 have one; 10 has the same number only, 22 none, and one has no number at all.
    assert "50.0% a neighbour" in near_duplicates(some, train)


def test_numbers_of_unrelated_images_are_no_series():
    values = np.random.default_rng(7).standard_normal((40, 256))
    train = thumbnails(**{f"n{number}": values[number] for number in range(0, 40, 2)})
    for weight, told in ((0.0, False), (0.8, True)):  # of what an image has of the one before
        some = {f"n{n}": (1 - weight) * values[n] + weight * values[n - 1] for n in range(1, 40, 2)}
        assert ("neighbour" in near_duplicates(thumbnails(**some), train)) == told


def test_all_images_of_a_large_split_are_looked_at(tmp_path):
    """Of 40 images the very last is damaged."""
    images = {f"{n:02}.png": Image.new("RGB", (8, 8), (9, 9, 9 + n // 20)) for n in range(40)}
    for split in SPLITS:
        own = images if split == "train" else {"a.png": Image.new("RGB", (8, 8))}
        write_split(tmp_path / "set" / split, own, [(0, square(1, 1, 2))])
    (tmp_path / "set/train/39.png").write_bytes(b"no picture")
    (problem,) = audit(tmp_path / "set", tmp_path)
    assert "39.png" in problem
