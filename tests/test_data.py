"""Reading, rasterising, caching and batching, against torchvision, PIL, hand-drawn masks and pycocotools."""
import json
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE, SMALL, assert_refused, edit_annotations, script, square, write_split
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

import data
from data import ANNOTATIONS, MEAN, STD, Batches, COCOSegmentationDataset, load_coco, load_split, rasterize


# ---- annotations -----------------------------------------------------------------------------

def compressed(mask):
    return {"size": list(mask.shape), "counts": coco_mask.encode(np.asfortranarray(mask))["counts"].decode()}


def uncompressed(mask):
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def test_a_rectangle_covers_the_pixels_it_should():
    mask = rasterize([[2, 3, 6, 3, 6, 5, 2, 5]], 10, 12)
    wanted = np.zeros((10, 12), np.uint8)
    wanted[3:5, 2:6] = 1
    np.testing.assert_array_equal(mask, wanted)


def test_polygons_agree_with_pil_but_for_the_border():
    rng = np.random.default_rng(1)
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(15, 40, 9)
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
        mask = (rng.random((17 + trial, 40)) < rng.choice([0, 0.02, 0.5, 0.98, 1])).astype(np.uint8)
        np.testing.assert_array_equal(rasterize(compressed(mask), *mask.shape), mask)
        np.testing.assert_array_equal(rasterize(uncompressed(mask), *mask.shape), mask)


@pytest.mark.parametrize("segmentation", [
    None, [], 5, "text", {}, [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [5, 5], [[1, 2, "3", 4, 5, 6]], [[True] * 6],
    [[float("nan")] * 6], [[float("inf"), 0, 1, 1, 2, 2]], [[0, 0, 1e12, 0, 5, 5]],  # would ask for terabytes
    {"size": [8, 9], "counts": [72]}, {"size": [9, 8], "counts": [3, 2]}, {"size": [9, 8], "counts": [100]},
    {"size": [9, 8], "counts": [-3, 75]}, {"size": [9, 8], "counts": [71.5, 0.5]}, {"size": [9, 8]},
    {"size": [9, 8], "counts": ""}, {"size": [9, 8], "counts": "0"}, {"size": [9, 8], "counts": "zzzz"},
    {"size": [9, 8], "counts": "o" * 100}, {"size": [9, 8], "counts": "\0"}, {"size": [9, 8], "counts": "é"},
], ids=str)
def test_damaged_segmentations_are_refused(segmentation):
    with pytest.raises(ValueError):
        rasterize(segmentation, 9, 8)


# ---- items -----------------------------------------------------------------------------------

@pytest.fixture
def split(tmp_path):
    """Six images of one split: polygon, several, none, RLE, crowd, overlapping; and their masks drawn by hand."""
    rng = np.random.default_rng(3)
    names = [f"{number}.png" for number in range(6)]
    images = {name: Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)) for name in names}
    masks = np.zeros((6, 90, 70), np.uint8)
    blob = (np.hypot(*np.mgrid[-45:45, -35:35]) < 20).astype(np.uint8)
    masks[0, 20:50, 10:40] = 1
    masks[1, 5:15, 5:15] = masks[1, 60:80, 40:60] = 1
    masks[3], masks[4] = blob, 1 - blob
    masks[5, 10:40, 10:40] = masks[5, 30:60, 30:60] = 1
    write_split(tmp_path / "train", images, [
        (0, square(10, 20, 30)), (1, square(5, 5, 10) + square(40, 60, 20)), (3, compressed(blob)), (4, uncompressed(1 - blob)),
        (5, square(10, 10, 30)), (5, square(30, 30, 30))])
    edit_annotations(tmp_path / "train", lambda content: content["annotations"][3].update(iscrowd=1))
    return tmp_path / "train", images, masks


def test_items_against_torchvision(split):
    from torchvision.transforms import v2
    folder, images, masks = split
    dataset = COCOSegmentationDataset(load_coco(folder), folder)
    assert len(dataset) == 6
    for (image, mask), picture, drawn in zip((dataset[i] for i in range(6)), images.values(), masks):
        assert image.shape == (3, 256, 256) and image.dtype == torch.float32
        assert mask.shape == (1, 256, 256) and mask.dtype == torch.float32
        wanted = F.interpolate(torch.from_numpy(drawn)[None, None].float(), size=(256, 256), mode="nearest-exact")[0]
        assert torch.equal(mask, wanted)
        plain = v2.functional.resize(v2.functional.to_image(picture).float() / 255, [256, 256], antialias=True)
        levels = (image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None] - plain).abs() * 255
        assert levels.max() < 1.01  # ours is rounded to whole grey levels


def test_the_tutorials_transform_works(split):
    from torchvision import transforms
    folder, images, masks = split
    transform = transforms.Compose([transforms.ToTensor(), transforms.Resize((64, 48)), transforms.Normalize(MEAN, STD)])
    image, mask = COCOSegmentationDataset(load_coco(folder), folder, transform=transform)[5]
    assert torch.equal(image, transform(np.asarray(images["5.png"])))
    assert torch.equal(mask, F.interpolate(torch.from_numpy(masks[5])[None, None].float(), size=(64, 48), mode="nearest-exact")[0])


@pytest.mark.parametrize("old, new", [(640, 256), (90, 256), (70, 33), (1, 7), (7, 1), (255, 256), (513, 96), (1000, 3)])
def test_nearest_is_torchs_and_pils(old, new):
    line = torch.arange(old, dtype=torch.float64)[None, None, :, None]
    wanted = F.interpolate(line, size=(new, 1), mode="nearest-exact").flatten().numpy()
    np.testing.assert_array_equal(data.resize_nearest(line[0, 0].numpy(), new, 1)[:, 0], wanted)
    image = Image.fromarray(line[0, 0].numpy().astype(np.float32))
    np.testing.assert_array_equal(np.asarray(image.resize((1, new), Image.Resampling.NEAREST))[:, 0], wanted)


def test_mask_and_image_stay_aligned(tmp_path):
    """A bright rectangle, resized, is bright where its mask is: the centres of gravity agree to a hundredth of a pixel."""
    pixels = np.zeros((640, 640), np.uint8)
    pixels[210:410, 130:290] = 255
    write_split(tmp_path / "train", {"0.png": Image.fromarray(pixels)}, [(0, [[130, 210, 290, 210, 290, 410, 130, 410]])])
    row = load_split(tmp_path, "train", 64)[0].astype(float)
    axis = np.arange(64)
    for weights in (row[..., 0], row[..., 3]):
        assert (weights.sum(0) @ axis / weights.sum(), weights.sum(1) @ axis / weights.sum()) == pytest.approx((20.5, 30.5), abs=0.01)


def test_one_row_is_what_training_and_prediction_see(split):
    from predict import preprocess_image
    folder, images, masks = split
    rows = load_split(folder.parent, "train")
    tensor, picture = preprocess_image(folder / "2.png")
    batches = list(Batches(rows, 6))
    assert torch.equal(batches[0][0][2], tensor[0]) and picture.size == (256, 256)
    assert torch.equal(batches[0][0][2], COCOSegmentationDataset(load_coco(folder), folder)[2][0])


# ---- pictures of every kind ------------------------------------------------------------------

def test_formats_and_modes(tmp_path):
    grey = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (40, 1))
    rgb = np.stack([grey] * 3, 2)
    pictures = {
        "grey.png": Image.fromarray(grey), "rgb.bmp": Image.fromarray(rgb), "rgb.tif": Image.fromarray(rgb),
        "rgba.png": Image.fromarray(rgb).convert("RGBA"), "palette.png": Image.fromarray(grey).convert("P"),
        "la.png": Image.fromarray(grey).convert("LA"),
        "16bit.png": Image.fromarray(grey.astype(np.uint16) * 257), "16bit.tif": Image.fromarray(grey.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 255), "32bit.tif": Image.fromarray(grey.astype(np.int32)),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        found = data.read_image(tmp_path / name)
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), rgb, err_msg=name)
    Image.fromarray(rgb).save(tmp_path / "photo.jpg", quality=95)
    assert np.abs(np.asarray(data.read_image(tmp_path / "photo.jpg")).astype(int) - rgb).max() < 12
    Image.fromarray(rgb).convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(np.asarray(data.read_image(tmp_path / "bilevel.png")))) == {0, 255}


def test_twelve_bits_in_sixteen_are_not_left_dark(tmp_path):
    values = np.array([[0, 2048, 4095]], np.uint16)
    Image.fromarray(values).save(tmp_path / "scan.png")
    assert np.asarray(data.read_image(tmp_path / "scan.png"))[0, :, 0].tolist() == [0, 128, 255]


def test_pictures_that_are_refused(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "fine.png")
    Image.new("L", (64, 64)).save(tmp_path / "stack.tif", save_all=True, append_images=[Image.new("L", (64, 64))])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    Image.effect_noise((200, 200), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    # 40,000 x 40,000 pixels claimed in the header of a small file
    bomb = bytearray((tmp_path / "fine.png").read_bytes())
    bomb[16:24] = struct.pack(">II", 40_000, 40_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "bomb.png").write_bytes(bomb)
    big = bytearray(bomb)
    big[16:24] = struct.pack(">II", 10_000, 10_000)  # over the limit at which Pillow only warns
    big[29:33] = struct.pack(">I", zlib.crc32(bytes(big[12:29])))
    (tmp_path / "big.png").write_bytes(big)
    for name in ("stack.tif", "text.png", "empty.jpg", "cut.jpg", "bomb.png", "big.png"):
        with pytest.raises(ValueError, match=name):
            data.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="folder"):
        data.read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.png"):
        data.read_image(tmp_path / "nothing.png")


# ---- the cache -------------------------------------------------------------------------------

def cached(root):
    return sorted(path.name for path in (root / ".cache").iterdir())


def test_cache_is_made_once_and_read_from_disk(dataset, monkeypatch):
    first = load_split(dataset, "train", 32)
    assert isinstance(first, np.memmap) and first.shape == (6, 32, 32, 4) and len(cached(dataset)) == 1
    monkeypatch.setattr(COCOSegmentationDataset, "load", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(load_split(dataset, "train", 32), first)
    shutil.move(dataset, dataset.parent / "elsewhere")  # the place is no part of what it was made from
    np.testing.assert_array_equal(load_split(dataset.parent / "elsewhere", "train", 32), first)


def test_cache_follows_its_sources(dataset):
    before = np.array(load_split(dataset, "train", 32))
    edit_annotations(dataset / "train", lambda content: content["annotations"][2].update(segmentation=square(0, 0, SIZE)))
    after = np.array(load_split(dataset, "train", 32))
    assert after[2, ..., 3].all() and not before[2, ..., 3].all()
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))
    Image.new("RGB", (SIZE, SIZE), (9, 9, 9)).save(dataset / "train" / "4_train.png")
    assert (load_split(dataset, "train", 32)[4, ..., :3] == 9).all()
    assert len(cached(dataset)) == 1  # what it replaced is gone
    load_split(dataset, "train", 16)
    load_split(dataset, "valid", 32)
    assert len(cached(dataset)) == 3


def test_cut_cache_is_made_anew(dataset):
    whole = np.array(load_split(dataset, "train", 32))
    path = dataset / ".cache" / cached(dataset)[0]
    path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(load_split(dataset, "train", 32), whole)


def test_memory_where_the_folder_cannot_be_written(dataset, capsys):
    (dataset / ".cache").write_text("a file where the folder should be")  # root may write anywhere else
    rows = load_split(dataset, "train", 32)
    assert not isinstance(rows, np.memmap) and rows.shape == (6, 32, 32, 4)
    assert "in memory" in capsys.readouterr().err


def test_nothing_is_left_when_building_fails(dataset):
    (dataset / "train" / "5_train.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="5_train.png"):
        load_split(dataset, "train", 32)
    assert cached(dataset) == []


# ---- batches ---------------------------------------------------------------------------------

def test_batches_hold_every_image_once_in_an_order_of_seed_and_epoch():
    rows = np.zeros((10, 8, 8, 4), np.uint8)
    rows[..., 0] = np.arange(10)[:, None, None]
    rows[3:, :4, :, 3] = 1

    def order(**options):
        batches = Batches(rows, 4, shuffle=True, **{"seed": options.pop("seed", 0)})
        batches.set_epoch(**{"epoch": 0, **options})
        images = [image for images, masks in batches for image in images]
        return [round((float(image[0, 0, 0]) * STD[0] + MEAN[0]) * 255) for image in images]

    assert sorted(order()) == list(range(10)) and order() == order()
    assert len({tuple(order(epoch=epoch)) for epoch in range(5)}) == 5 and order() != order(seed=1)
    assert order(epoch=3, start=1) == order(epoch=3)[4:]
    plain = list(Batches(rows, 4))
    assert [len(images) for images, _ in plain] == [4, 4, 2] and len(Batches(rows, 4)) == 3
    images, masks = plain[0]
    assert images.shape == (4, 3, 8, 8) and masks.shape == (4, 1, 8, 8) and masks.dtype == torch.float32
    assert masks.sum((1, 2, 3)).tolist() == [0, 0, 0, 32]
    assert images.is_contiguous(memory_format=torch.channels_last)


# ---- what is wrong with a data set -----------------------------------------------------------

def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BAD = {
    "no folder": (remove, "no such folder"),
    "no split": (lambda root: remove(root / "valid"), "valid"),
    "no annotations": (lambda root: remove(root / "train" / ANNOTATIONS), ANNOTATIONS),
    "not JSON": (lambda root: (root / "train" / ANNOTATIONS).write_text("{"), "not JSON"),
    "not text": (lambda root: (root / "train" / ANNOTATIONS).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "nested without end": (lambda root: (root / "train" / ANNOTATIONS).write_text("[" * 100_000), "not JSON"),
    "a list": (lambda root: (root / "train" / ANNOTATIONS).write_text("[]"), "not COCO"),
    "no images key": (lambda root: edit_annotations(root / "train", lambda c: c.pop("images")), "no list of images"),
    "record of another kind": (lambda root: edit_annotations(root / "train", lambda c: c["images"].append(5)), "not an object"),
    "id used twice": (lambda root: edit_annotations(root / "train", lambda c: c["images"][1].update(id=0)), "twice"),
    "no width": (lambda root: edit_annotations(root / "train", lambda c: c["images"][1].pop("width")), "width"),
    "of no image": (lambda root: edit_annotations(root / "train", lambda c: c["annotations"][1].update(image_id=99)), "image_id 99"),
    "empty split": (lambda root: edit_annotations(root / "train", lambda c: c.update(images=[], annotations=[])), "lists no images"),
    "image missing": (lambda root: remove(root / "train" / "3_train.png"), "3_train.png"),
    "image truncated": (lambda root: (root / "train" / "3_train.png").write_bytes((root / "train" / "3_train.png").read_bytes()[:900]), "3_train.png"),
    "another size": (lambda root: Image.new("RGB", (9, 8)).save(root / "train" / "3_train.png"), "is 9x8, but its record says 48x48"),
    "size of terabytes": (lambda root: edit_annotations(root / "train", lambda c: c["images"][3].update(width=10 ** 7, height=10 ** 7)), "record says"),
    "climbs out": (lambda root: edit_annotations(root / "train", lambda c: c["images"][3].update(file_name="../../secret.png")), "leads out"),
    "absolute": (lambda root: edit_annotations(root / "train", lambda c: c["images"][3].update(file_name="/etc/passwd")), "leads out"),
    "climbs out on Windows": (lambda root: edit_annotations(root / "train", lambda c: c["images"][3].update(file_name="..\\secret.png")), "leads out"),
    "damaged polygon": (lambda root: edit_annotations(root / "train", lambda c: c["annotations"][3].update(segmentation=[[1, 2]])), "annotation 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_and_status_2(name, dataset, tmp_path, refused):
    spoil, word = BAD[name]
    spoil(dataset)
    refused("train", "--data", dataset, "--out", tmp_path / "out", *SMALL, words=[word])
    assert list((tmp_path / "out").iterdir()) == []
    refused("data", dataset, words=["problem"])


def test_every_damaged_image_is_found_in_one_pass(dataset, tmp_path):
    for name in ("0_train.png", "4_train.png"):
        (dataset / "train" / name).write_bytes(b"damaged")
    (dataset / "test" / "1_test.png").unlink()
    audit = script("data.py", dataset, cwd=tmp_path)
    assert_refused(audit, "3 problem")
    for name in ("0_train.png", "4_train.png", "1_test.png"):
        assert audit.stdout.count(name) == 1
    with pytest.raises(ValueError, match="2 of 6 images in train"):
        load_split(dataset, "train", 32)


# ---- audit -----------------------------------------------------------------------------------

def test_audit_counts(dataset, tmp_path):
    edit_annotations(dataset / "train", lambda content: content["annotations"].pop(0))
    Image.new("RGB", (SIZE, SIZE)).save(dataset / "train" / "stray.png")
    audit = script("data.py", dataset, cwd=tmp_path)
    assert audit.returncode == 0, audit.stderr
    train = audit.stdout.split("valid:")[0]
    assert "train: 6 images, 5 annotations" in train and "48x48: 6" in train and "tumour: 5" in train
    share = 100 * 5 * 16 * 16 / (6 * SIZE * SIZE)  # five squares of 16 x 16
    assert f"{share:.2f} %" in train and f"{100 - share:.2f} %" in train
    assert "1 images" in train.split("no lesion")[1] and train.rstrip().endswith("1")  # one empty, one not listed
    assert Image.open(tmp_path / "contact_sheet.jpg").size == (1280, 320)


def test_outline():
    mask = np.zeros((7, 7))
    mask[1:6, 1:6] = 1
    edge = data.outline(mask)
    assert edge.sum() == 16 and not edge[2:5, 2:5].any()


# ---- augmentation ----------------------------------------------------------------------------

def test_augmentation_moves_image_and_mask_alike():
    """A white square is its own mask, wherever it goes: they may differ where the interpolation blurs its edge, no further."""
    images, masks = torch.full((64, 3, 64, 64), -1.0), torch.zeros(64, 1, 64, 64)
    images[:, :, 10:30, 24:50], masks[:, :, 10:30, 24:50] = 1, 1
    draws = torch.rand(64, 6, generator=torch.Generator().manual_seed(0))
    moved, found = data.augment(images, masks, draws)
    assert set(found.unique().tolist()) == {0, 1} and moved.shape == images.shape
    level = 0.1 * (2 * draws[:, 5] - 1)  # what a pixel halfway between black and white becomes
    bright = moved[:, :1] > level[:, None, None, None]
    edge = torch.nn.functional.max_pool2d(found, 3, 1, 1) - (1 - torch.nn.functional.max_pool2d(1 - found, 3, 1, 1))
    assert ((bright != (found > 0.5)) & (edge == 0)).sum() == 0
    assert (found.mean((1, 2, 3)) > 0.05).all()  # it does not leave the picture
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in found}) > 15  # each image goes its own way


def test_augmentation_by_hand():
    images, masks = torch.randn(2, 3, 80, 80), (torch.rand(2, 1, 80, 80) > 0.5).float()
    draws = torch.full((2, 6), 0.5)  # the middle changes nothing
    moved, found = data.augment(images, masks, draws)
    torch.testing.assert_close(moved, images, atol=1e-4, rtol=0)
    assert torch.equal(found, masks)
    draws[:, 2] = 1  # 5 % of half the width is 2 pixels
    moved, found = data.augment(images, masks, draws)
    torch.testing.assert_close(moved[..., :-2], images[..., 2:], atol=1e-4, rtol=0)
    assert torch.equal(found[..., :-2], masks[..., 2:]) and not found[..., -2:].any()


def test_augmentation_is_a_function_of_seed_epoch_and_place():
    rows = np.random.default_rng(0).integers(0, 2, (5, 32, 32, 4), dtype=np.uint8)

    def epoch(number, start=0, **more):
        batches = Batches(rows, 2, shuffle=True, augmented=True, **more)
        batches.set_epoch(number, start)
        return [images for images, _ in batches]

    first = epoch(0)
    assert all(map(torch.equal, first, epoch(0))) and all(map(torch.equal, first[1:], epoch(0, start=1)))
    assert not torch.equal(first[0], epoch(1)[0]) and not torch.equal(first[0], epoch(0, seed=1)[0])
    shares = [epoch(0, rank=rank, world=2) for rank in range(2)]
    torch.testing.assert_close(torch.cat([shares[0][0], shares[1][0]]), first[0])
    plain = Batches(rows, 2, shuffle=True)
    assert not torch.equal(next(iter(plain))[0], first[0])


# ---- neighbours ------------------------------------------------------------------------------

@pytest.fixture
def numbered(tmp_path):
    """60 images numbered 1 to 60, dealt to the splits in turn; 101 to 104 in valid are copies of four of train."""
    rng = np.random.default_rng(0)
    pictures = {number: Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)) for number in range(1, 61)}
    dealt = {split: {f"{number}_x.png": picture for number, picture in pictures.items() if number % 3 == place} for place, split in enumerate(data.SPLITS)}
    dealt["valid"] |= {f"{100 + number}_x.png": pictures[3 * number] for number in range(1, 5)}
    for split, images in dealt.items():
        write_split(tmp_path / "numbered" / split, images, [(index, square(index % 9, 2, 8)) for index in range(len(images))])
    return tmp_path / "numbered"


def test_the_audit_counts_what_splits_have_in_common(numbered, capsys, tmp_path):
    assert data.audit(numbered, tmp_path) == []
    said = capsys.readouterr().out
    # valid: 4 copies among 24; of 1, 4, ... 58 all but 1 are beside a multiple of 3, of 101 to 104 none. test: 2, 5, ... 59 all are
    assert re.search(r"valid beside train: 16\.7% .*, 79\.2% a neighbour", said)
    assert re.search(r"test beside train: 0\.0% .*, 100\.0% a neighbour", said)


def test_a_grouped_split_keeps_neighbours_together(numbered, tmp_path, refused):
    target = data.grouped_split(numbered, tmp_path / "grouped", block=8)
    found = {split: load_coco(target / split) for split in data.SPLITS}
    numbers = {split: sorted(data.slice_number(image["file_name"]) for image in coco.imgs.values()) for split, coco in found.items()}
    assert sorted(sum(numbers.values(), [])) == [*range(1, 61), *range(101, 105)]
    pairs = sum(number + 1 in held for held in numbers.values() for number in held)
    assert pairs >= 62 - 7  # 62 neighbouring pairs, of which the edges of 8 blocks part 7 at most
    for split, coco in found.items():
        for index, image in coco.imgs.items():
            old = next(path for path in numbered.glob(f"*/{image['file_name']}"))
            assert (target / split / image["file_name"]).read_bytes() == old.read_bytes()
            before = json.loads((old.parent / ANNOTATIONS).read_text())
            place = next(entry["id"] for entry in before["images"] if entry["file_name"] == image["file_name"])
            assert [a["segmentation"] for a in coco.imgToAnns[index]] == [a["segmentation"] for a in before["annotations"] if a["image_id"] == place]
    assert {split: len(load_split(target, split, 32)) for split in found} == {split: len(held) for split, held in numbers.items()}
    again = data.grouped_split(numbered, tmp_path / "again", block=8)
    assert all((again / split / ANNOTATIONS).read_bytes() == (target / split / ANNOTATIONS).read_bytes() for split in data.SPLITS)
    refused("data", numbered, "--grouped-split", target, words=["exists"])
    refused("data", numbered, "--grouped-split", tmp_path / "new", words=["too few images"])
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*.tmp"))
