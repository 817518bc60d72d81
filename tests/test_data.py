"""Reading, rasterising, caching and batching; what is wrong with a data set, and the audit.

Checked against torchvision, PIL, pycocotools and masks drawn by hand.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SIZE,
    SMALL,
    STORED_TURNED,
    brightness_model,
    edit_annotations,
    output_of,
    rasterize,
    save_turned,
    set_classes,
    square,
    write_split,
)
from numpy.testing import assert_array_equal
from PIL import Image
from pycocotools import mask as coco_mask

from data import Batches, COCOSegmentationDataset, Order, load_split, open_split
from medseg.cache import RaggedRows
from medseg.coco import ANNOTATIONS, SPLITS, load_coco
from medseg.images import MEAN, STD, resize_nearest
from medseg.planning.audit import audit
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


def test_polygons_and_run_lengths_against_masks():
    expected = np.zeros((10, 12), np.uint8)
    expected[3:5, 2:6] = 1
    assert_array_equal(rasterize([[2, 3, 6, 3, 6, 5, 2, 5]], 10, 12), expected)
    assert rasterize([[-8, -9, 16, -9, 16, 18, -8, 18]], 9, 8).all()  # outside by the image's size
    rng = np.random.default_rng(4)
    for trial in range(40):
        height, width = (int(side) for side in rng.integers(1, 30, 2))
        share = rng.choice([0, 0.05, 0.5, 0.95, 1])
        mask, other = rng.random((2, height, width)) < share
        pixels = mask.astype(np.uint8)
        for segmentation in (compressed(pixels), uncompressed(pixels)):
            assert_array_equal(rasterize(segmentation, height, width), pixels)
        runs, others = encode(mask), encode(other)
        assert runs.area == mask.sum()
        assert_array_equal(unite([runs, others, runs]).draw(), mask | other)
        size = (trial + 1, 41 - trial)  # smaller and larger
        assert_array_equal(runs.draw(*size), resize_nearest(mask, *size))
        labels = rng.choice([0, 3, 200, 65535], (height, width)).astype(np.uint16)
        masks = encode_labels(labels)
        assert sorted(masks) == np.unique(labels).tolist()
        for value, own in masks.items():
            assert_array_equal(own.draw(), labels == value)
    mask = rasterize({"size": [2, 5], "counts": [0, 2, 0, 1, 3, 0, 1, 3]}, 2, 5)
    assert mask.T.ravel().tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1]  # with empty runs


DAMAGED_SEGMENTATIONS = [
    *(None, [], {}, [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, "3", 4, 5, 6]]),
    *([[0, 0, 17, 0, 5, 5]], [[0, 0, -9, 0, 5, 5]], [[0, 19, 5, 0, 5, 5]], [[float("nan")] * 6]),
    *({"size": [8, 9], "counts": [72]}, {"size": [9, 8]}),
    *({"size": [9, 8], "counts": counts} for counts in ([3, 2], [-3, 75], "", "zzzz", "o" * 100)),
]


@pytest.mark.parametrize("segmentation", DAMAGED_SEGMENTATIONS, ids=str)
def test_damaged_segmentations_are_refused(segmentation):
    with pytest.raises(ValueError):
        rasterize(segmentation, 9, 8)


# ---- items -----------------------------------------------------------------------------------


def nearest(mask, *size):
    """torch's nearest-exact resize of a uint8 array (H, W), as float32 (1, *size)."""
    batch = torch.from_numpy(mask)[None, None].float()
    return F.interpolate(batch, size=size, mode="nearest-exact")[0]


def test_items_batches_and_prediction_against_torchvision(tmp_path):
    """One polygon, two in one annotation, nothing, run lengths, a crowd's, two that overlap."""
    from torchvision import transforms
    from torchvision.transforms import v2

    from predict import preprocess_image

    pixels = np.random.default_rng(3).integers(0, 256, (6, 90, 70, 3), dtype=np.uint8)
    images = {f"{number}.png": Image.fromarray(own) for number, own in enumerate(pixels)}
    masks, folder = np.zeros((6, 90, 70), np.uint8), tmp_path / "train"
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
    write_split(folder, images, annotations)
    edit_annotations(folder, lambda content: content["annotations"][3].update(iscrowd=1))
    dataset = COCOSegmentationDataset(load_coco(folder), folder)
    ((batch, marked),) = Batches(load_split(tmp_path, "train"), Order(6))
    assert len(dataset) == 6 and batch.is_contiguous(memory_format=torch.channels_last)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for index, (picture, drawn) in enumerate(zip(images.values(), masks, strict=True)):
        image, mask = dataset[index]
        assert image.shape == (3, 256, 256) and image.dtype == mask.dtype == torch.float32
        assert torch.equal(mask, nearest(drawn, 256, 256)) and torch.equal(mask, marked[index])
        plain = v2.functional.to_image(picture).float() / 255
        plain = v2.functional.resize(plain, [256, 256], antialias=True)
        levels = (image * std + mean - plain).abs() * 255
        assert levels.max() < 1.01  # ours is rounded to whole grey levels
        tensor, _ = preprocess_image(folder / f"{index}.png")
        assert torch.equal(image, tensor[0]) and torch.equal(image, batch[index])
    steps = [transforms.ToTensor(), transforms.Resize((64, 48)), transforms.Normalize(MEAN, STD)]
    transform = transforms.Compose(steps)  # as in the tutorial
    image, mask = COCOSegmentationDataset(load_coco(folder), folder, transform=transform)[5]
    assert torch.equal(image, transform(np.array(images["5.png"])))
    assert torch.equal(mask, nearest(masks[5], 64, 48))


# ---- pictures that are stored turned (EXIF) --------------------------------------------------


@pytest.mark.parametrize(
    "width, orientation, as_stored", [(48, 6, False), (64, 8, False), (64, 7, True)]
)
def test_pictures_that_are_stored_turned(tmp_path, width, orientation, as_stored, no_pictures):
    """Grey values under the masks are 160, and 60 elsewhere; so are they scored and counted."""
    root, shown = tmp_path / "set", np.full((48, width, 3), 60, np.uint8)
    shown[8:20, 4:16] = 160
    recorded = STORED_TURNED[orientation](shown) if as_stored else shown
    rows, columns = np.nonzero(recorded[..., 0] > 100)
    outline = square(int(columns.min()), int(rows.min()), 12)
    for split in SPLITS:
        names = {f"{split}{number}.jpg": Image.fromarray(recorded) for number in range(3)}
        write_split(root / split, names, [(number, outline) for number in range(3)])
        for name in names:
            save_turned(shown, root / split / name, orientation, quality=100)
    dataset = open_split(root, "train", None)
    picture, (mask,) = dataset.load(0)
    for row in [np.dstack([picture.rgb(), mask]), dataset.row(0), *load_split(root, "valid", None)]:
        assert (
            row.shape == (48, width, 4)
            and np.ptp(row[8:20, 4:16, 3]) == 0
            and row[..., 3].sum() == 144
        )
        assert row[row[..., 3] > 0][:, 0].mean() > 158 and row[row[..., 3] == 0][:, 0].mean() < 63
    said = output_of("data.py", root, "--out", tmp_path, cwd=tmp_path)
    assert said.count("3 of 3 images are stored turned") == 3 and "problem" not in said
    torch.save(brightness_model(None).state_dict(), tmp_path / "best_model.pth")
    options = ("--output", tmp_path / "out", "--device", "cpu", "--threshold", 0.5)
    output_of("predict.py", root / "test", *options, cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scores"]["dice"] > 0.99
    mask = np.asarray(Image.open(tmp_path / "out" / "test0_mask.png")) > 0
    assert mask.shape == (48, width) and mask[8:20, 4:16].all() and mask.sum() == 144


# ---- the cache -------------------------------------------------------------------------------


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert_array_equal(row, other)


def load_again(root, size, monkeypatch, **options):
    """The rows, which must not be decoded."""
    with monkeypatch.context() as patch:
        patch.setattr(COCOSegmentationDataset, "row", lambda *_: pytest.fail("decoded again"))
        return load_split(root, "train", size, **options)


@pytest.fixture(params=[32, None], ids=["one size", "own sizes"])
def cache(dataset, request):
    """(data set, size of its rows, copy of the rows); one image has another size."""
    pixels = np.asarray(Image.open(dataset / "train" / "1_train.png"))[:40]
    Image.fromarray(pixels).save(dataset / "train" / "1_train.png")
    edit_annotations(dataset / "train", lambda content: content["images"][1].update(height=40))
    rows = load_split(dataset, "train", request.param)
    assert isinstance(rows, RaggedRows) == (request.param is None)
    assert isinstance(rows if request.param else rows.pixels, np.memmap)
    return dataset, request.param, [np.array(row) for row in rows]


def test_cache_is_made_once_and_follows_its_sources(cache, monkeypatch):
    dataset, size, rows = cache
    assert_same(load_again(dataset, size, monkeypatch), rows)
    files, whole = list((dataset / ".cache").iterdir()), {"segmentation": square(0, 0, SIZE)}
    edit_annotations(dataset / "train", lambda content: content["annotations"][2].update(whole))
    after = load_split(dataset, "train", size)
    assert after[2][..., 3].all() and not rows[2][..., 3].all()
    assert_same([*after][3:], rows[3:])
    assert len(list((dataset / ".cache").iterdir())) == len(files)  # the stale array is gone
    path, lengths = dataset / "train" / "4_train.png", []
    for brightness, kind, seconds in ((10, "BMP", 1000), (20, "BMP", 2000), (30, "PNG", 2000)):
        Image.new("RGB", (SIZE, SIZE), (brightness,) * 3).save(path, kind)
        os.utime(path, (seconds, seconds))
        after = load_split(dataset, "train", size)
        assert (after[4][..., :3] == brightness).all()
        lengths.append(path.stat().st_size)
    assert lengths[0] == lengths[1] != lengths[2]  # first the time alone changes, then the length
    moved = dataset.parent / "elsewhere"
    shutil.move(dataset, moved)  # the cache does not depend on where the data set is
    assert_same(load_again(moved, size, monkeypatch), after)


def test_what_cannot_be_used_is_made_again_or_left_out(cache, monkeypatch, capsys):
    """A cache that is cut, gone, of other rows; a damaged image; a folder that is no folder."""
    dataset, size, rows = cache
    folder = dataset / ".cache"
    complete = {path: path.read_bytes() for path in folder.iterdir()}
    (array,) = folder.glob("*.npy")
    for path, content in complete.items():
        for part in (content[:-1], b""):
            path.write_bytes(part)
            assert_same(load_split(dataset, "train", size), rows)
    np.save(array, np.load(array)[:-1])
    assert_same(load_split(dataset, "train", size), rows)
    assert {path: path.read_bytes() for path in complete} == complete
    (dataset / "train" / "3_train.png").write_bytes(b"no picture")
    rows, made, again = rows[:3] + rows[4:], [], []
    assert_same(load_split(dataset, "train", size, skipped=made), rows)
    assert_same(load_again(dataset, size, monkeypatch, skipped=again), rows)
    assert len(made) == 1 and "3_train.png" in made[0] and again == made
    with pytest.raises(ValueError, match="3_train.png.*1 of 6 images in train"):
        load_split(dataset, "train", size)  # not the rows without it
    shutil.rmtree(folder)
    folder.write_text("not a folder")  # as root, a test may write to any folder
    again = load_split(dataset, "train", size, skipped=[])
    assert not isinstance(again if size else again.pixels, np.memmap)
    assert_same(again, rows)
    assert "in memory" in capsys.readouterr().err


# ---- what is wrong with a data set -----------------------------------------------------------


def edit(change):
    """A function that applies change(content) to the annotations of train."""
    return lambda root: edit_annotations(root / "train", change)


def fractions(content):
    for annotation in content["annotations"]:
        annotation["segmentation"] = square(0.1, 0.2, 0.3)


# name: (a function that spoils the data set, what the message names, ...)
BAD = {
    "no folder": (shutil.rmtree, "dataset:", "download.py"),
    "no annotations": (lambda root: (root / "train" / ANNOTATIONS).unlink(), ANNOTATIONS),
    "no images key": (edit(lambda own: own.pop("images")), "list of images"),
    "two records": (edit(lambda own: own["images"].extend("ab")), "images[6]", "(2 such"),
    "id used twice": (edit(lambda own: own["images"][1].update(id=0)), "images[1] has id 0"),
    "of no image": (edit(lambda own: own["annotations"][1].update(image_id=99)), "image_id 99"),
    "empty split": (edit(lambda own: own.update(images=[], annotations=[])), ANNOTATIONS),
    "another size": (edit(lambda own: own["images"][3].update(width=50)), "3_train.png", "50x48"),
    "climbs out": (edit(lambda own: own["images"][3].update(file_name="../s.png")), "../s.png"),
    "fractions": (edit(fractions), "fractions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_one_line_and_status_2(name, dataset, tmp_path, refused):
    spoil, *words = BAD[name]
    spoil(dataset)
    refused("train", "--data", dataset, "--out", tmp_path / "out", *SMALL, words=words)
    assert list((tmp_path / "out").iterdir()) == []
    refused("data", dataset, words=["problem"] if dataset.exists() else words)


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
    assert_array_equal(load_split(dataset, "train", SIZE), before)
    out = output_of("data.py", dataset, cwd=tmp_path).split("valid:")[0]
    counts = [line.split()[1] for line in out.splitlines() if line.startswith("  note")]
    assert sorted(counts) == ["1", "2", "3", "3", "5", "6", "6", "7"]


def test_of_many_damaged_records_a_hundred_are_named_and_all_counted(dataset):
    damaged, skipped = [{"image_id": "x" * 10**6}] + [{"image_id": 99}] * 249, []
    edit_annotations(dataset / "train", lambda content: content["annotations"].extend(damaged))
    assert len(load_coco(dataset / "train", skipped).imgs) == 6
    assert len(skipped) == 101 and "150 more" in skipped[100]
    assert max(map(len, skipped)) < 300 + len(str(dataset))
    with pytest.raises(ValueError, match=r"annotations\[6\].*250 such"):
        load_coco(dataset / "train")


# ---- the audit -------------------------------------------------------------------------------


def test_audit_counts(dataset, tmp_path):
    def change(content):
        content["annotations"].pop(0)
        content["annotations"][0] |= {"category_id": 7, "segmentation": square(0, 0, 24)}
        content["categories"].append({"id": 7, "name": "ignore"})

    edit_annotations(dataset / "train", change)
    Image.new("RGB", (SIZE, SIZE)).save(dataset / "train" / "stray.png")
    train = output_of("data.py", dataset, cwd=tmp_path).split("valid:")[0]
    assert "train: 6 images, 5 annotations" in train
    assert "48x48: 6" in train and "tumour: 4" in train
    percent = 100 * 4 * 16 * 16 / (6 * SIZE * SIZE)  # four squares of 16 x 16
    assert f"{percent:.2f} %" in train and f"{100 - percent:.2f} %" in train
    assert f"{100 * 24 * 24 / (6 * SIZE * SIZE):.2f} %" in train.split("ignored")[1]
    assert "2 images" in train.split("no lesion")[1]
    assert train.rstrip().endswith("1")  # the number of images that are not listed: stray.png
    assert Image.open(tmp_path / "contact_sheet.jpg").width == 8 * 160


def test_many_classes_are_packed_into_bits(tmp_path):
    values = np.random.default_rng(6).integers(0, 20, (20, 30), np.uint8)
    names = [str(value) for value in range(1, 20)]
    outlines = [(0, compressed(np.uint8(values == int(name)))) for name in names]
    write_split(tmp_path / "train", {"0.png": Image.fromarray(values)}, outlines)
    set_classes(tmp_path / "train", names, lambda number: number + 1)
    row = open_split(tmp_path, "train", 40, classes=names).row(0)
    bits = np.unpackbits(row[..., 3:], axis=2, count=19, bitorder="little")
    assert_array_equal(bits, resize_nearest(values, 40, 40)[..., None] == np.arange(1, 20))


# ---- neighbours, and a split that keeps them together ----------------------------------------


def test_a_grouped_split_keeps_neighbours_together(tmp_path, refused, capsys):
    """60 images numbered 1 to 60, given to the splits in turn.

    Images 3, 6, 9 and 12 of train are also in valid, as 101 to 104.
    """
    numbered, splits = tmp_path / "numbered", {split: {} for split in SPLITS}
    noise = np.random.default_rng(0).integers(0, 64, (62, 16, 16, 3), dtype=np.uint8)
    pixels = noise[1:] + noise[:-1] + 127 * (noise[0] > 31)  # neighbours look alike
    pictures = list(map(Image.fromarray, pixels.astype(np.uint8)))
    for number in range(1, 61):
        splits[SPLITS[number % 3]][f"{number}_x.png"] = pictures[number]
    splits["valid"] |= {f"{100 + number}_x.png": pictures[3 * number] for number in range(1, 5)}
    for split, images in splits.items():
        outlines = [(n, square(n % 9, 2, 8)) for n in range(len(images))]
        write_split(numbered / split, images, outlines)

    def segmentations(root, split):
        """{file name: [segmentation]}"""
        coco = load_coco(root / split)
        of_image = {key: [own["segmentation"] for own in coco.imgToAnns[key]] for key in coco.imgs}
        return {coco.imgs[key]["file_name"]: outlines for key, outlines in of_image.items()}

    assert audit(numbered, tmp_path) == []
    out = capsys.readouterr().out
    # valid has 24 images: 4 duplicates; and 1, 4, ... 58, all of which but the first follow a
    # multiple of 3, while 101 to 104 have no neighbour. test has 2, 5, ... 59: all have one.
    beside = (
        r"valid beside train: 16\.7% .* such as 10\d_x.png of \d+_x.png, .*, 79\.2% a neighbour"
    )
    assert re.search(beside, out)
    assert re.search(r"test beside train: 0\.0% .*, 100\.0% a neighbour", out)
    target = grouped_split(numbered, tmp_path / "new", block=8)
    before = {split: segmentations(numbered, split) for split in SPLITS}
    outlines, numbers, pairs = {**before["train"], **before["valid"], **before["test"]}, [], 0
    for split in SPLITS:
        after = segmentations(target, split)
        assert abs(len(after) - len(before[split])) <= 8  # about the shares of before
        own = [slice_number(name) for name in after]
        pairs += sum(number + 1 in own for number in own)
        numbers += own
        for name, segmentation in after.items():
            (path,) = numbered.glob(f"*/{name}")
            assert (target / split / name).read_bytes() == path.read_bytes()
            assert segmentation == outlines[name]
    assert sorted(numbers) == [*range(1, 61), *range(101, 105)]
    assert pairs >= 62 - 7  # of 62 neighbouring pairs, the edges of 8 blocks part 7 at most
    refused("data", numbered, "--grouped-split", target, words=[target])
    refused("data", numbered, "--grouped-split", tmp_path / "few", words=[numbered, "50"])
    assert not (tmp_path / "few").exists() and not list(tmp_path.glob(".*.tmp"))
