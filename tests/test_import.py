"""download.py --masks, --labelme, --coco: against masks drawn by hand and other rasterisers."""

import base64
import contextlib
import io
import json
import math
import random
import shutil
import sys
import time
import tracemalloc
import unicodedata
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import (
    NIBABEL_DATA,
    SMALL,
    assert_refused,
    rasterize,
    sample,
    script,
    script_here,
    write_dicom,
    write_nifti,
)
from helpers import tree as tree_with_times
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco_mask

import download
from data import load_split
from medseg import phantoms
from medseg.cli import run_main
from medseg.formats.dicom import read_dicom
from medseg.images import read_image
from medseg.importing import collect, flags, volumes, writing
from medseg.importing.labelme import draw_shapes
from medseg.importing.mask_values import classes_of_counts
from medseg.importing.pairing import pair_files
from medseg.importing.writing import Example, write_dataset
from medseg.splits import draw_splits

SIZE = (40, 30)  # width, height
ALL = ("--split", "100", "0", "0")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(root):
    """{path: hash, and for files the modification time} of everything below `root`."""
    found = tree_with_times(root)
    return {path: state if state[0] != "folder" else "folder" for path, state in found.items()}


def run(*flags):
    """download.py in this process: (exit status, stdout, lines on stderr)."""
    out, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        mock.patch.object(sys, "argv", ["download.py", *map(str, flags)]),
    ):
        try:
            run_main(download.main)
        except SystemExit as leaving:
            status = leaving.code
    return status, out.getvalue(), errors.getvalue().splitlines()


def done(*flags):
    status, out, errors = run(*flags)
    assert (status, errors) == (0, [])
    return out


def refused(*flags, words=()):
    """The one line on stderr of a run that changed nothing below the working folder."""
    before = tree(Path())
    status, _, errors = run(*flags)
    assert status == 2 and len(errors) == 1, errors
    for word in words:
        assert str(word) in errors[0], errors[0]
    assert tree(Path()) == before
    return errors[0]


def content(split, root="dataset"):
    return json.loads((Path(root) / split / "_annotations.coco.json").read_text())


def stored(split="train", root="dataset"):
    """{file stem: {class: bool array}} of a split; what pycocotools decodes has to be the same."""
    coco = content(split, root)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    masks = {}
    records = {record["id"]: record for record in coco["images"]}
    for record in records.values():
        image = read_image(Path(root) / split / record["file_name"])
        assert image.size == (record["width"], record["height"])
        masks[Path(record["file_name"]).stem] = {}
    for annotation in coco["annotations"]:
        record = records[annotation["image_id"]]
        outline = annotation["segmentation"]
        mask = rasterize(outline, record["height"], record["width"]).astype(bool)
        decoded = coco_mask.decode([{**outline, "counts": outline["counts"].encode()}])[..., 0]
        np.testing.assert_array_equal(mask, decoded)
        assert mask.sum() == annotation["area"]
        own = masks[Path(record["file_name"]).stem]
        assert names[annotation["category_id"]] not in own
        own[names[annotation["category_id"]]] = mask
    return masks


def save(image, path, *args, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, *args, **options)


def photo(seed=0, size=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def labels(seed=0, classes=1, size=SIZE):
    """A label map (H, W) with every number from 0 to `classes`, most of it 0."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2 * classes + 2, (size[1], size[0]))
    values[values > classes] = 0
    values.flat[: classes + 1] = range(classes + 1)
    return values


# ---------------------------------------------------------------- kinds of masks


def grey(values, dtype=np.uint8):
    return lambda m: Image.fromarray(np.array(values, dtype)[m])


def palette(indices, colours):
    def make(m):
        image = Image.fromarray(np.array(indices, np.uint8)[m]).convert("P")
        image = Image.frombytes("P", image.size, np.array(indices, np.uint8)[m].tobytes())
        image.putpalette([channel for colour in colours for channel in colour])
        return image

    return make


COLOURS = [(0, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]


def colours(values, mode="RGB"):
    return lambda m: Image.fromarray(np.array(values, np.uint8)[m]).convert(mode)


def with_alpha(m):
    """White everywhere, and transparent where it is background."""
    rgba = np.full((*m.shape, 4), 255, np.uint8)
    rgba[m == 0, 3] = 0
    return Image.fromarray(rgba)


FOREGROUND = ["foreground"]
KINDS = {  # suffix, image of a label map, class names
    "1-bit PNG": (".png", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "1-bit TIFF": (".tif", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "0/1 PNG": (".png", grey([0, 1]), FOREGROUND),
    "0/255 PNG": (".PNG", grey([0, 255]), FOREGROUND),
    "0/255 BMP": (".bmp", grey([0, 255]), FOREGROUND),
    "0/128 TIFF": (".tiff", grey([0, 128]), FOREGROUND),
    "0/255 GIF": (".gif", grey([0, 255]), FOREGROUND),
    "palette GIF": (".gif", palette([0, 1], [(9, 9, 9), (0, 0, 0)]), FOREGROUND),
    "grey levels": (".png", grey([0, 85, 170, 255]), ["85", "170", "255"]),
    "grey alpha": (".png", lambda m: grey([0, 255])(m).convert("LA"), FOREGROUND),
    "no black": (".png", grey([3, 7]), ["3", "7"]),
    "65 classes": (".png", grey(range(66)), [str(n) for n in range(1, 66)]),
    "16-bit PNG": (".png", grey([0, 300, 65535], np.uint16), ["300", "65535"]),
    "16-bit TIFF": (".tif", grey([0, 1, 2], np.uint16), ["1", "2"]),
    "32-bit TIFF": (".tif", grey([0, 70000], np.int32), FOREGROUND),
    "float TIFF": (".tif", grey([0, 1, 2], np.float32), ["1", "2"]),
    "palette PNG": (".png", palette([0, 1, 15], COLOURS * 5), ["1", "15"]),
    "palette 0/255": (".png", palette([0, 255], COLOURS * 64), FOREGROUND),
    "RGB grey": (".png", lambda m: grey([0, 255])(m).convert("RGB"), FOREGROUND),
    "RGB levels": (".png", lambda m: grey([0, 1, 2])(m).convert("RGB"), ["1", "2"]),
    "RGB one colour": (".png", colours([(0, 0, 0), (7, 200, 0)]), FOREGROUND),
    "RGB green": (".png", colours([(0, 0, 0), (0, 255, 0)]), FOREGROUND),
    "RGB": (".png", colours(COLOURS), ["#0000ff", "#ff0000", "#ffffff"]),
    "RGBA": (".png", colours(COLOURS, "RGBA"), ["#0000ff", "#ff0000", "#ffffff"]),
    "alpha": (".png", with_alpha, FOREGROUND),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_come_back_bit_for_bit(here, kind):
    suffix, make, names = KINDS[kind]
    classes = 1 if kind == "no black" else len(names)
    maps = {f"{number}": labels(number, classes) for number in range(3)}
    for stem, label_map in maps.items():
        save(photo(), f"images/{stem}.jpg")
        save(make(label_map), f"masks/{stem}{suffix}")
    out = done("--masks", "images", "masks", *ALL)
    assert "pairs: 3 by name" in out
    got = stored()
    first = 0 if kind == "no black" else 1
    for stem, label_map in maps.items():
        assert list(got[stem]) == names
        for number, name in enumerate(names, start=first):
            np.testing.assert_array_equal(got[stem][name], label_map == number)
    assert [c["id"] for c in content("train")["categories"]] == list(range(1, len(names) + 1))
    file = Path("dataset/train/0.jpg")
    assert file.read_bytes() == Path("images/0.jpg").read_bytes()


def blob(m):
    """0/255 of large areas, whose borders JPEG blurs."""
    small = Image.fromarray((m[:6, :8] > 0).astype(np.uint8) * 255)
    return small.resize((72, 54), Image.Resampling.NEAREST)  # not JPEG's 8


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_masks_are_cut_at_half(here, quality):
    mask = blob(labels(1))
    save(photo(size=mask.size), "images/a.png")
    save(mask, "masks/a.jpg", quality=quality)
    assert (np.asarray(Image.open("masks/a.jpg")) % 255 != 0).any()
    out = done("--masks", "images", "masks", *ALL)
    assert "warning: JPEG masks hold values between" in out and "value above 127" in out
    np.testing.assert_array_equal(stored()["a"]["foreground"], np.asarray(mask) == 255)


def test_smoothed_masks_are_cut_at_half(here):
    mask = blob(labels(1)).resize((333, 250), Image.Resampling.BICUBIC)
    pixels = np.asarray(mask)
    assert len(np.unique(pixels)) > 32
    save(photo(size=mask.size), "images/a.png")
    save(mask, "masks/a.png")
    out = done("--masks", "images", "masks", *ALL)
    assert "warning: grey masks hold values between" in out
    np.testing.assert_array_equal(stored()["a"]["foreground"], pixels > 127)


def test_ignored_index_of_a_palette_is_background(here):
    label_map = labels(2, 3)
    save(photo(), "images/a.png")
    save(palette([0, 1, 15, 255], COLOURS * 64)(label_map), "masks/a.png")
    out = done("--masks", "images", "masks", *ALL)
    percent = 100 * (label_map == 3).mean()
    assert f"warning: palette index 255 ({percent:.2f} % of the pixels) counts as back" in out
    assert list(stored()["a"]) == ["1", "15"]


def test_ignored_index_beside_one_class_leaves_that_class(here):
    label_map = labels(2, 2)
    save(photo(), "images/a.png")
    save(palette([0, 1, 255], COLOURS * 64)(label_map), "masks/a.png")
    assert "class foreground: value 1, " in done("--masks", "images", "masks", *ALL)
    assert list(stored()["a"]) == FOREGROUND
    np.testing.assert_array_equal(stored()["a"]["foreground"], label_map == 1)
    save(grey([0, 1, 255])(label_map), "masks/a.png")  # no palette: 255 is a class
    done("--masks", "images", "masks", *ALL, "--force")
    np.testing.assert_array_equal(stored()["a"]["255"], label_map == 2)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_pixels_of_less_than_half_alpha_are_background(here, mode):
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32))
    mask = Image.new(mode, alpha.size, 9 if mode == "LA" else (9, 0, 7))
    mask.putalpha(alpha)
    save(photo(size=alpha.size), "images/a.png")
    save(mask, "masks/a.png")
    done("--masks", "images", "masks", *ALL)
    wanted = np.arange(256).reshape(8, 32) >= 128
    np.testing.assert_array_equal(stored()["a"]["foreground"], wanted)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_127_is_background_and_128_foreground(here, suffix):
    values = np.array([*range(256), *[0, 255] * 128], np.uint8).reshape(16, 32)
    if suffix == ".jpg":
        values = np.array([[0, 127, 128, 255]], np.uint8)
    pixels = np.kron(values, np.ones((8, 8), np.uint8))  # whole blocks, which JPEG keeps
    save(photo(size=pixels.shape[::-1]), "images/a.png")
    save(Image.fromarray(pixels), f"masks/a{suffix}", quality=100)
    np.testing.assert_array_equal(np.asarray(Image.open(f"masks/a{suffix}")), pixels)
    assert "value above 127, 50.00 % of the" in done("--masks", "images", "masks", *ALL)
    np.testing.assert_array_equal(stored()["a"]["foreground"], pixels >= 128)


def test_jpeg_masks_of_0_and_255_need_no_warning(here):
    pixels = np.kron(labels() * 255, np.ones((8, 8), int)).astype(np.uint8)
    save(photo(size=pixels.shape[::-1]), "images/a.png")
    save(Image.fromarray(pixels), "masks/a.jpg", quality=100)
    assert "warning" not in done("--masks", "images", "masks", *ALL)
    np.testing.assert_array_equal(stored()["a"]["foreground"], pixels == 255)


def test_masks_are_turned_by_their_own_orientation(here):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = grey([0, 1])(labels(1, size=SIZE[::-1]))
    save(photo(), "images/a.png")
    save(mask, "masks/a.png", exif=exif)
    done("--masks", "images", "masks", *ALL)
    shown = np.asarray(mask.transpose(Image.Transpose.ROTATE_270)) == 1  # 6: a quarter clockwise
    np.testing.assert_array_equal(stored()["a"]["foreground"], shown)


def evenly(count, top=255):
    """`count` values from 0 to `top`, evenly spaced, one pixel each."""
    return dict.fromkeys(np.linspace(0, top, count).round().astype(int).tolist(), 1)


SMOOTHED = {  # pixels of each value, whether the mask is cut at half
    "33 values": (evenly(33) | {0: 16, 255: 15}, True),
    "32 values": (evenly(32) | {0: 99, 255: 99}, False),
    "mostly between": (evenly(33) | {0: 15, 255: 15}, False),
    "a gap of 32 values": ({v: 1 for v in range(256) if v // 32 != 3} | {0: 999, 255: 9}, False),
    "never 255": (evenly(40, 254) | {0: 999}, False),
    "never 0": ({value + 1: 1 for value in evenly(40, 254)} | {255: 999}, False),
}


@pytest.mark.parametrize("case", SMOOTHED)
def test_what_counts_as_smoothed(case):
    counts, cut = SMOOTHED[case]
    mask_classes = classes_of_counts([("a.png", "grey", counts)], "masks")
    if cut:
        assert mask_classes.names == FOREGROUND and mask_classes.class_of == {
            ("grey", 255): "foreground"
        }
    else:
        assert mask_classes.names == [str(value) for value in sorted(counts) if value]


def test_255_classes_and_no_more():
    everything = dict.fromkeys(range(256), 1)
    mask_classes = classes_of_counts([("a.png", "volume", everything)], "masks")
    assert mask_classes.names == [str(value) for value in range(1, 256)]
    with pytest.raises(ValueError, match=r"a\.png: holds 257 "):
        classes_of_counts([("a.png", "grey", everything | {256: 1})], "masks")
    with pytest.raises(ValueError, match=r"b\.png: with this one"):
        classes_of_counts([("a.png", "grey", everything), ("b.png", "grey", {256: 1})], "masks")


def test_whole_numbers_of_a_float_tiff(here):
    save(photo(), "images/a.png")
    flags = ("--masks", "images", "masks", *ALL)
    for top, good in ((2**24, True), (2**24 + 2, False), (-(2**24) - 2, False)):
        values = labels().astype(np.float32) * top
        save(Image.fromarray(values), "masks/a.tif")
        if good:
            done(*flags)
            np.testing.assert_array_equal(stored()["a"]["foreground"], values == top)
            shutil.rmtree("dataset")
        else:
            refused(*flags, words=["a.tif", "whole numbers"])


def test_shares_and_names_of_classes_of_two_kinds(here):
    maps = labels(3), labels(4)
    for stem, make, label_map in zip(
        "ab", (grey([0, 7]), colours(COLOURS[::2])), maps, strict=True
    ):
        save(photo(), f"images/{stem}.png")
        save(make(label_map), f"masks/{stem}.png")
    out = done("--masks", "images", "masks", *ALL, "--classes", "x")
    for value, kind, label_map in (("7", "grey", maps[0]), ("#ff0000", "colour", maps[1])):
        percent = 100 * (label_map == 1).sum() / (2 * label_map.size)
        assert f"class x: value {value} ({kind}), {percent:.2f} % of the pixels of" in out


def test_kinds_may_be_mixed_where_each_has_one_value(here):
    maps = [labels(number) for number in range(3)]
    makers = (grey([0, 1]), lambda m: Image.fromarray(m > 0), colours([(0, 0, 0), (9, 0, 0)]))
    for number, make in enumerate(makers):
        save(photo(), f"images/{number}.png")
        save(make(maps[number]), f"masks/{number}.png")
    done("--masks", "images", "masks", *ALL)
    for number, label_map in enumerate(maps):
        np.testing.assert_array_equal(stored()[f"{number}"]["foreground"], label_map == 1)
    save(grey([0, 1, 2])(labels(0, 2)), "masks/0.png")
    refused("--masks", "images", "masks", "--force", words=["several kinds", "grey (2)"])


def test_grey_masks_may_be_stored_as_colours(here):
    maps = {"a": labels(0, 2), "b": labels(1, 2)}
    for stem, label_map in maps.items():
        save(photo(), f"images/{stem}.png")
        save(grey([0, 1, 2])(label_map).convert("L" if stem == "a" else "RGB"), f"masks/{stem}.png")
    out = done("--masks", "images", "masks", *ALL)
    for value in (1, 2):
        percent = 100 * np.mean([label_map == value for label_map in maps.values()])
        assert f"class {value}: value {value}, {percent:.2f} % of the pixels" in out
        for stem, label_map in maps.items():
            np.testing.assert_array_equal(stored()[stem][f"{value}"], label_map == value)


def test_classes_are_named_in_ascending_order(here):
    label_map = labels(1, 2)
    save(photo(), "images/a.png")
    save(grey([0, 200, 100])(label_map), "masks/a.png")
    flags = ("--masks", "images", "masks", *ALL)
    refused(*flags, "--classes", "cup", words=["names 1 classes", "hold 2", "100, 200"])
    refused(*flags, "--classes", "cup,cup", words=["'cup'"])
    out = done(*flags, "--classes", "cup, disc")
    assert "class cup: value 100" in out
    np.testing.assert_array_equal(stored()["a"]["cup"], label_map == 2)
    np.testing.assert_array_equal(stored()["a"]["disc"], label_map == 1)


def bad_masks():
    random_colours = photo(5)
    damaged = io.BytesIO()
    grey([0, 255])(labels()).save(damaged, "PNG")
    frames = io.BytesIO()
    Image.new("L", SIZE).save(
        frames, "GIF", save_all=True, append_images=[Image.new("L", SIZE, 255)]
    )
    return {
        "a photograph": (".png", random_colours, "different values"),
        "colours in JPEG": (".jpg", random_colours, "changed the colours"),
        "small values in JPEG": (
            ".jpg",
            grey([0, 3])(np.kron(labels(), np.ones((8, 8), int))[:30, :40]),
            "JPEG",
        ),
        "empty": (".png", Image.new("L", SIZE), "empty"),
        "another size": (".png", Image.new("L", (30, 40), 1), "30x40"),
        "fractions": (".tif", Image.new("F", SIZE, 0.5), "fractions"),
        "CMYK": (".tif", Image.new("CMYK", SIZE), "CMYK"),
        "cut": (".png", damaged.getvalue()[:60], "a.png"),
        "text": (".gif", b"GIF89a, or not", "a.gif"),
        "several frames": (".gif", frames.getvalue(), "2 pictures"),
    }


@pytest.mark.parametrize("name", bad_masks())
def test_bad_masks_are_one_line(here, name):
    suffix, mask, word = bad_masks()[name]
    save(photo(), "images/a.png")
    if isinstance(mask, bytes):
        Path("masks").mkdir()
        Path(f"masks/a{suffix}").write_bytes(mask)
    else:
        save(mask, f"masks/a{suffix}")
    line = refused("--masks", "images", "masks", *ALL, words=["masks", word])
    if name == "another size":
        assert str(Path("images/a.png")) in line and "40x30" in line


def test_damaged_image_leaves_nothing(here):
    for stem in "abc":
        save(photo(), f"images/{stem}.png")
        save(grey([0, 1])(labels()), f"masks/{stem}.png")
    path = Path("images/b.png")
    path.write_bytes(path.read_bytes()[:500])
    refused("--masks", "images", "masks", words=["b.png"])
    refused("--masks", "nowhere", "masks", words=["nowhere", "no such folder"])
    Path("nothing").mkdir()
    refused("--masks", "images", "nothing", words=["nothing", "holds no"])


# ---------------------------------------------------------------- pairs


def paired(images, masks, image_root="i", mask_root="m", surplus=()):
    """({image: mask}, missing, several) of names, as strings without the roots.

    Several masks of an image are a list. Asserts which masks belong to no image.
    """
    image_paths = [Path(image_root, name) for name in images]
    mask_paths = [Path(mask_root, name) for name in masks]
    pairing = pair_files(image_paths, mask_paths, Path(image_root), Path(mask_root))
    short = {Path(image_root, name): name for name in images}
    short |= {Path(mask_root, name): name for name in masks}
    several = {short[image]: [short[m] for m in found] for image, found in pairing.several}
    assert [short[mask] for mask in pairing.surplus] == list(surplus)
    pairs = {short[image]: [short[mask] for mask in found] for image, found in pairing.pairs}
    pairs = {image: found if found[1:] else found[0] for image, found in pairs.items()}
    return pairs, [short[image] for image in pairing.missing], several


NFC, NFD = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))
NAMES = {
    "name": (["a.jpg", "B.JPG"], ["A.png", "b.gif"]),
    "x_mask": (["x.jpg", "y.jpg"], ["x_mask.gif", "y_mask.gif"]),
    "one": (["scan.jpg"], ["scan_mask.png"]),
    "ISIC": (
        ["ISIC_0000001.jpg", "ISIC_0000010.jpg"],
        ["ISIC_0000001_Segmentation.png", "ISIC_0000010_segmentation.png"],
    ),
    "DRIVE": (["21_training.tif", "22_training.tif"], ["21_manual1.gif", "22_manual1.gif"]),
    "numbers": ([f"{n}.png" for n in range(1, 12)], [f"{n}-label.png" for n in range(1, 12)]),
    "beginnings": (["img_1.png", "img_12.png"], ["mask_1.png", "mask_12.png"]),
    "no separator": (["image001.png", "image002.png"], ["label001.png", "label002.png"]),
    "nnU-Net": (
        [f"case_{n:03}_0000.png" for n in range(5)],
        [f"case_{n:03}.png" for n in range(5)],
    ),
    "brackets": (
        ["benign (1).png", "benign (12).png"],
        ["benign (1)_mask.png", "benign (12)_mask.png"],
    ),
    "folders": (["p/1.png", "q/1.png"], ["p/1.png", "q/1.png"]),
    "folders of two forms": ([f"{NFD}/1.png", "q/1.png"], [f"{NFC}/1.png", "q/1.png"]),
    "NIfTI": (["a_t1.nii.gz", "b_t1.nii.gz"], ["a_seg.nii.gz", "b_seg.nii.gz"]),
    "PH2": (
        ["IMD002/IMD002_Dermoscopic_Image/IMD002.bmp", "IMD3/IMD3_Dermoscopic_Image/IMD3.bmp"],
        ["IMD002/IMD002_lesion/IMD002_lesion.bmp", "IMD3/IMD3_lesion/IMD3_lesion.bmp"],
    ),
}


@pytest.mark.parametrize("rule", NAMES)
def test_pairs_are_found(rule):
    images, masks = NAMES[rule]
    wanted = dict(zip(images, masks, strict=True))
    assert paired(images, masks[::-1]) == (wanted, [], {})


def test_images_and_masks_in_one_folder():
    everything = ["x.jpg", "y.jpg", "x_mask.png", "y_mask.png", "x_roi.png"]
    pairs, missing, several = paired(everything, everything, "d", "d")
    assert pairs == {"x.jpg": "x_mask.png", "y.jpg": "y_mask.png"}
    assert (missing, several) == (["x_roi.png"], {})


def test_missing_and_ambiguous_masks_are_listed():
    images = ["1.jpg", "2.jpg", "3.jpg"]
    assert paired(images, ["1.png", "3.png"])[1] == ["2.jpg"]
    assert paired(images, ["1_m.png", "2_m.png", "2_m.gif"])[1:] == (
        ["3.jpg"],
        {"2.jpg": ["2_m.gif", "2_m.png"]},
    )
    readers = [f"{n}_{reader}.png" for n in (1, 2, 3) for reader in ("1stHO", "2ndHO")]
    pairs, missing, several = paired(images, readers)
    assert (pairs, missing) == ({}, [])
    assert several["2.jpg"] == ["2_1stHO.png", "2_2ndHO.png"]
    twice = paired(["a.png", "a.jpg", "b.png"], ["a.gif", "b.gif"])
    assert twice[0] == {"b.png": "b.gif"} and set(twice[2]) == {"a.png", "a.jpg"}
    for unrelated in (["x.png", "y.png", "z.png"], ["4_m.png", "5_m.png", "6_m.png"]):
        with pytest.raises(ValueError, match="no rule"):
            paired(images, unrelated)
    with pytest.raises(ValueError, match="no rule"):
        paired(["scan_5.png", "scan_6.png"], ["scan_7_mask.png", "scan_8_mask.png"])


UNITED = {  # images, masks of each, masks of none
    "BUSI": (
        ["benign (1).png", "benign (12).png"],
        [
            ["benign (1)_mask.png", "benign (1)_mask_1.png", "benign (1)_mask_2.png"],
            ["benign (12)_mask.png"],
        ],
        [],
    ),
    "all images have two": (
        ["x.jpg", "y.jpg"],
        [["x_mask.png", "x_mask_1.png"], ["y_mask.png", "y_mask_1.png"]],
        [],
    ),
    "separators": (["x.jpg"], [["x_mask.png", "x_mask (3).png", "x_mask-2.png"]], []),
    "as many as images": (
        ["img_1.png", "img_2.png"],
        [
            ["img_1_mask.png", "img_1_mask_1.png", "img_1_mask_2.png", "img_1_mask_3.png"],
            ["img_2_mask.png"],
        ],
        [],
    ),
    "DRIVE": (
        ["21_training.tif", "22_training.tif"],
        [["21_m.gif", "21_m_1.gif"], ["22_m.gif"]],
        [],
    ),
    "numbered images of nnU-Net": (
        ["case_0000.png", "case_1_0000.png"],
        [["case.png"], ["case_1.png"]],
        [],
    ),
    "numbered images": (["a.png", "a_1.png"], [["a.png"], ["a_1.png"]], []),
    "numbered images with endings": (
        ["a.png", "a_1.png"],
        [["a_mask.png"], ["a_1_mask.png", "a_1_mask_1.png"]],
        [],
    ),
    "an image that is missing": (["a.png", "b.png"], [["a.png"], ["b.png"]], ["a_1.png"]),
    "one that a number counts": (
        ["img_1.png", "img_2.png"],
        [["mask_1.png"], ["mask_2.png"]],
        ["mask_1_1.png"],
    ),
    "another ending": (["x.jpg", "y.jpg"], [["x_mask.png"], ["y_mask.png"]], ["x_roi.png"]),
    "a number of none": (["x.jpg", "y.jpg"], [["x_mask.png"], ["y_mask.png"]], ["z_mask_1.png"]),
    "a second reader of one": (["1.jpg", "2.jpg"], [["1_A.png"], ["2_A.png"]], ["1_B.png"]),
    "another folder": (
        ["p/x.jpg", "p/y.jpg"],
        [["x_mask.png"], ["y_mask.png"]],
        ["q/x_mask_1.png"],
    ),
}


@pytest.mark.parametrize("case", UNITED)
def test_masks_with_a_number_belong_together(case):
    images, masks_of, surplus = UNITED[case]
    masks = sorted([*sum(masks_of, []), *surplus])
    wanted = {
        image: masks if masks[1:] else masks[0]
        for image, masks in zip(images, masks_of, strict=True)
    }
    assert paired(images, masks, surplus=surplus) == (wanted, [], {})


def test_most_masks_may_be_of_one_image():
    masks = ["a_m.png", *(f"a_m_{number}.png" for number in range(5))]
    pairs, missing, _ = paired([f"{letter}.png" for letter in "abcdefghi"], masks)
    assert pairs == {"a.png": masks} and len(missing) == 8


def test_one_folder_of_images_and_several_masks():
    masks = [f"{stem}_mask{end}.png" for stem in "xy" for end in ("", *(f"_{n}" for n in range(6)))]
    everything = sorted(["x.png", "y.png", *masks])
    pairs, missing, several = paired(everything, everything, "d", "d")
    assert pairs == {"x.png": sorted(masks[:7]), "y.png": sorted(masks[7:])}
    assert (missing, several) == ([], {})
    pairs, missing, _ = paired([*everything, "x_roi.png"], [*everything, "x_roi.png"], "d", "d")
    assert set(pairs) == {"x.png", "y.png"} and missing == ["x_roi.png"]


def test_names_pair_in_any_unicode_form(here):
    assert NFC != NFD
    save(photo(1), f"images/{NFD}/{NFD} 1.png")
    save(photo(2), f"images/{NFC}/{NFC} 2.png")
    masks = {1: f"masks/{NFC}/{NFC.upper()} 1_m.png", 2: f"masks/{NFD}/{NFD} 2_m.png"}
    for seed, path in masks.items():
        save(grey([0, 1])(labels(seed)), path)
    flags = ("--masks", "images", "masks", *ALL)
    assert "pairs: 2 by the part" in done(*flags)
    for seed in masks:
        got = stored()[f"{NFC} {seed}"]["foreground"]
        np.testing.assert_array_equal(got, labels(seed) == 1)
    for seed, path in masks.items():  # the same path below the two folders
        save(grey([0, 1])(labels(seed)), path.replace("_m", ""))
        Path(path).unlink()
    assert "pairs: 2 by name" in done(*flags, "--force")
    group = ("--split", "50", "50", "0", "--force", "--group")
    done(*flags[:3], *group, f"({NFD} .)\\.png")
    refused(*flags[:3], *group, f"{NFD}", words=["1 groups"])


def test_names_that_look_the_same_are_told_apart(here):
    for stem in ("a", "b", NFC):
        save(photo(), f"images/{stem}.png")
    for stem in ("a", "b", NFC, NFD):
        save(grey([0, 1])(labels()), f"masks/{stem}.png")
    words = [ascii(stem)[1:-1] + ".png" for stem in (NFC, NFD)]
    refused("--masks", "images", "masks", *ALL, words=words)
    Path(f"masks/{NFD}.png").unlink()
    save(photo(), f"images/{NFD}.png")
    refused("--masks", "images", "masks", *ALL, words=words)


def test_names_that_cannot_be_printed(here):
    for stem in ("a\udcff", "b\nc"):
        save(photo(), f"images/{stem}.png")
        save(grey([0, 1])(labels()), f"masks/{stem}.png")
    result = script("download.py", "--masks", "images", "masks", *ALL, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert "such as a\\udcff.png and a\\udcff.png\n" in result.stdout
    assert set(stored()) == {"a_", "b_c"}


def test_several_masks_of_an_image_are_united(here):
    first, second, other = (labels(number, 2) for number in range(3))
    for stem in "xyz":
        save(photo(), f"images/{stem}.png")
    save(grey([0, 1, 2])(first), "masks/x_mask.png")
    save(grey([0, 1, 2])(second), "masks/x_mask_1.png")
    save(grey([0, 1, 0])(other), "masks/x_mask_2.tif")
    for stem in "yz":
        save(grey([0, 1, 2])(other), f"masks/{stem}_mask.png")
    flags = ("--masks", "images", "masks", *ALL)
    out = done(*flags)
    assert "such as x.png and x_mask.png; 1 image has several masks, united" in out
    one = (first == 1) | (second == 1) | (other == 1)
    two = (first == 2) | (second == 2)
    assert (one & two).any()  # classes may overlap, and both are kept
    np.testing.assert_array_equal(stored()["x"]["1"], one)
    np.testing.assert_array_equal(stored()["x"]["2"], two)
    np.testing.assert_array_equal(stored()["y"]["1"], other == 1)
    pixels = sum((labels(number, 2) == 2).sum() for number in (0, 1, 2, 2))
    assert f"class 2: value 2, {100 * pixels / (5 * first.size):.2f} % of the pixels of the" in out
    save(Image.new("L", (30, 40), 1), "masks/x_mask_1.png")
    refused(*flags, "--force", words=["x_mask_1.png", "30x40", "x.png", "40x30"])


def test_united_masks_may_be_of_several_kinds(here):
    first, second = labels(1), labels(2)
    for stem in "xy":
        save(photo(), f"images/{stem}.png")
        save(Image.fromarray(first > 0), f"images/masks/{stem}_mask.png")
        save(
            colours([(0, 0, 0), (255, 255, 255)], "RGBA")(second), f"images/masks/{stem}_mask_1.png"
        )
    assert "2 images have several masks, united" in done("--masks", "images", "images/masks", *ALL)
    np.testing.assert_array_equal(stored()["x"]["foreground"], (first | second) > 0)


def test_masks_of_no_image_are_refused(here):
    folders(3)
    for stem in "abcd":
        save(grey([0, 1])(labels()), f"masks/more/{stem}.png")
    flags = ("--masks", "images", "masks", *ALL)
    words = ["4 of 7 masks in masks", "more/a.png, more/b.png, more/c.png, ..."]
    line = refused(*flags, words=[*words, "--skip-unpaired"])
    assert "have no mask" not in line
    out = done(*flags, "--skip-unpaired")
    assert "left out: " in out and all(word in out for word in words)
    assert set(stored()) == {"0", "1", "2"}


def test_a_file_that_is_in_no_pair_in_one_folder(here):
    for stem in "ab":
        save(photo(), f"one/{stem}.jpg")
        save(grey([0, 1])(labels()), f"one/{stem}_mask.gif")
    save(grey([0, 1])(labels()), "one/a_roi.gif")
    Path("link").symlink_to("one")
    for masks in ("one", "link"):
        refused("--masks", "one", masks, *ALL, words=["1 of 3 images", "(a_roi.gif)"])
    Path("one/a_roi.gif").unlink()
    assert "pairs: 2" in done("--masks", "one", "link", *ALL)


def test_skip_unpaired(here):
    for stem in "abcdefg":
        save(photo(), f"images/{stem}.jpg")
    for stem in "abc":
        save(grey([0, 1])(labels()), f"masks/{stem}.png")
    save(grey([0, 1])(labels()), "masks/c.tif")
    flags = ("--masks", "images", "masks", *ALL)
    words = [
        "4 of 7 images have no mask in masks (d.jpg, e.jpg, f.jpg, ...)",
        "c.jpg: c.png, c.tif",
    ]
    refused(*flags, words=[*words, "--skip-unpaired"])
    out = done(*flags, "--skip-unpaired")
    assert "pairs: 2 by name, such as a.jpg and a.png" in out and words[0] in out
    assert set(stored()) == {"a", "b"}


def test_candidates_of_one_name_are_told_apart(here):
    for place in ("images/x", "images/y", "masks/p/x", "masks/q/x", "masks/p/y"):
        make = photo() if place.startswith("images") else grey([0, 1])(labels())
        save(make, f"{place}.png")
    refused("--masks", "images", "masks", *ALL, words=["x.png: p/x.png, q/x.png"])


def test_nested_folders_and_one_inside_the_other(here):
    for folder in ("p", "q"):
        save(photo(), f"data/{folder}/1.jpg")
        save(grey([0, 1])(labels(len(folder))), f"data/masks/{folder}/1.png")
    save(photo(), "data/.hidden/2.jpg")
    done("--masks", "data", "data/masks", *ALL)
    assert set(stored()) == {"p_1", "q_1"}
    save(grey([0, 1])(labels()), "one/x_mask.png")
    save(photo(), "one/x.jpg")
    assert "x.jpg and x_mask.png" in done("--masks", "one", "./one/", *ALL, "--force")


# ---------------------------------------------------------------- NIfTI and DICOM


def volume(number, classes=2, name="case_{:03}"):
    """(voxels, class numbers) of a pair of volumes that is written to vi/ and vm/.

    They are cut along axis 1, into 4 slices and `number` more.
    """
    rng = np.random.default_rng(number)
    voxels = rng.integers(0, 1000, (12, 4 + number, 10)).astype(np.int16)
    numbers = rng.integers(0, classes + 1, voxels.shape).astype(np.uint8)
    numbers[:, 0] = 0  # a slice with nothing
    name = name.format(number)
    for path in (Path("vi", f"{name}_0000.nii.gz"), Path("vm", f"{name}.nii.gz")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, voxels if path.parts[0] == "vi" else numbers, zooms=(1, 3, 1))
    return voxels, numbers


VOLUMES = ("--masks", "vi", "vm")


def test_several_mask_volumes_are_refused(here):
    for number in range(3):
        volume(number)
    shutil.copy("vm/case_001.nii.gz", "vm/case_001_1.nii.gz")
    words = ["case_001_0000.nii.gz: case_001.nii.gz, case_001_1.nii.gz"]
    refused(*VOLUMES, *ALL, words=words)
    done(*VOLUMES, *ALL, "--skip-unpaired")
    assert {stem[:8] for stem in stored()} == {"case_000", "case_002"}


def test_volumes_become_slices(here):
    made = {f"case_{number:03}_0000": volume(number) for number in range(3)}
    flags = (*VOLUMES, "--window", "500", "1000", "--classes", "core, edema")
    out = done(*flags, "--split", "34", "33", "33")
    assert "pairs: 3 by the part that their names share, such as case_000_0000.nii.gz" in out
    assert "slices: 15 of 3 volumes, across axis 1" in out
    everything = np.concatenate([numbers.ravel() for _, numbers in made.values()])
    for value, name in enumerate(("core", "edema"), start=1):
        percent = 100 * (everything == value).mean()
        assert f"class {name}: value {value}, {percent:.2f} % of the pixels" in out
    seen = set()
    for split in ("train", "valid", "test"):
        masks = stored(split)
        (name,) = {stem.rpartition("_")[0] for stem in masks}  # one volume in one split
        voxels, numbers = made[name]
        seen.add(name)
        assert set(masks) == {f"{name}_z{index:03}" for index in range(voxels.shape[1])}
        for index in range(voxels.shape[1]):
            own = masks[f"{name}_z{index:03}"]
            assert set(own) == (set() if index == 0 else {"core", "edema"})
            for value, mask in enumerate((own.get("core", False), own.get("edema", False)), 1):
                np.testing.assert_array_equal(numbers[:, index] == value, mask)
            with Image.open(f"dataset/{split}/{name}_z{index:03}.png") as picture:
                assert picture.mode == "L"
                wanted = (voxels[:, index] * 0.255).round()
                np.testing.assert_array_equal(np.asarray(picture), wanted)
    assert seen == set(made)


def test_one_value_in_volumes_is_foreground(here):
    _, numbers = volume(0, classes=1)
    pair = ("vi/case_000_0000.nii.gz", "vm/case_000.nii.gz")
    out = done("--masks", *pair, "--into", "test")  # two files
    assert "class foreground: value 1" in out
    got = stored("test")
    for index in range(4):
        mask = got[f"case_000_0000_z{index:03}"].get("foreground", np.zeros((12, 10), bool))
        np.testing.assert_array_equal(mask, numbers[:, index] == 1)
    refused("--masks", *pair, "--data", "mine", words=["1 groups", "too few", "--into"])
    refused("--masks", pair[0], "vm", *ALL, words=[pair[0], "vm a folder"])
    refused("--masks", pair[0], "none.nii", *ALL, words=["none.nii", "no such"])


def test_a_regular_expression_groups_volumes(here):
    for number in range(6):
        volume(number, name=f"p{number % 3}/{{}}")
    done(*VOLUMES, "--split", "34", "33", "33", "--group", r"^(p\d)/")
    # The names differ without their folders, which are left out of them: 4_0000_z003.
    numbers = [{int(stem[0]) for stem in stored(split)} for split in ("train", "valid", "test")]
    assert sorted(map(sorted, numbers)) == [[0, 3], [1, 4], [2, 5]]
    refused(*VOLUMES, "--force", "--group", "q", words=["--group", "finds nothing"])


def test_each_pair_of_volumes_is_opened_twice(here, monkeypatch):
    opened = []

    def counting(image, mask, *options):
        opened.append(image.name)
        return nifti_pairs(image, mask, *options)

    nifti_pairs = volumes.open_pair
    monkeypatch.setattr(volumes, "open_pair", counting)
    for number in range(5):
        volume(number)
    done(*VOLUMES, *ALL)
    names = [f"case_{number:03}_0000.nii.gz" for number in range(5)]
    # All are opened to count the values, and again to load the slices: two are kept.
    assert sorted(opened) == sorted(2 * names)


def test_volumes_cut_in_different_directions_are_noted(here):
    for number in range(3):
        volume(number)
    voxels = np.zeros((3, 4, 5), np.int16)
    write_nifti(Path("vi/other_0000.nii.gz"), voxels + np.arange(5, dtype=np.int16))
    write_nifti(Path("vm/other.nii.gz"), voxels.astype(np.uint8))
    out = done(*VOLUMES, *ALL)
    assert "warning: 1 of 4 volumes" in out and "another direction" in out


ZEROS = np.zeros((12, 4, 10), np.uint8)
SHIFTED = np.diag([1.0, 3, 1, 1])
SHIFTED[0, 3] = 5
BAD_VOLUMES = {
    "shape": (lambda: write_nifti(Path("vm/case_000.nii.gz"), ZEROS[1:]), "11 x 4 x 10 voxels"),
    "affine": (lambda: write_nifti(Path("vm/case_000.nii.gz"), ZEROS, SHIFTED), "affines differ"),
    "4-D": (
        lambda: shutil.copy(NIBABEL_DATA / "example4d.nii.gz", "vi/case_000_0000.nii.gz"),
        "more than one volume",
    ),
    "fractions": (
        lambda: write_nifti(Path("vm/case_000.nii.gz"), ZEROS + np.float32(0.5), zooms=(1, 3, 1)),
        "class numbers",
    ),
    "many values": (
        lambda: shutil.copy("vi/case_000_0000.nii.gz", "vm/case_000.nii.gz"),
        "different values",
    ),
    "cut": (
        lambda: Path("vi/case_000_0000.nii.gz").write_bytes(
            Path("vi/case_000_0000.nii.gz").read_bytes()[:300]
        ),
        "case_000_0000.nii.gz",
    ),
    "a picture among volumes": (lambda: save(photo(), "vi/a.png"), "a.png is not"),
    "a mask that is a picture": (lambda: save(photo(), "vm/a.png"), "a.png is not"),
    "DICOM among volumes": (
        lambda: shutil.copy(sample("CT_small.dcm"), "vi/a.dcm"),
        "a.dcm is not",
    ),
    "no mask": (lambda: volume(1) and Path("vm/case_001.nii.gz").unlink(), "have no mask in vm"),
}


@pytest.mark.parametrize("name", BAD_VOLUMES)
def test_bad_volumes_are_one_line(here, name):
    volume(0)
    volume(2)
    change, word = BAD_VOLUMES[name]
    change()
    refused(*VOLUMES, *ALL, words=["case_000" if name in ("shape", "affine") else "v", word])


def dicom_pair(name="scan.dcm", mask_name="scan.png"):
    """The mask, bool (2, 3), of a DICOM file in di/ and a picture in dm/."""
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    Path("di").mkdir(exist_ok=True)
    write_dicom(Path("di", name))  # 0 100 150 / 200 300 1000
    save(Image.fromarray(mask), Path("dm", mask_name))
    return mask


def test_dicom_images_and_a_window(here):
    mask = dicom_pair()
    flags = ("--masks", "di", "dm", *ALL)
    done(*flags, "--window", "150", "200")  # from 50 to 250
    with Image.open("dataset/train/scan.png") as picture:
        by_hand = [[0, 64, 128], [191, 255, 255]]
        np.testing.assert_array_equal(np.asarray(picture.convert("L")), by_hand)
    np.testing.assert_array_equal(stored()["scan"]["foreground"], mask)
    done(*flags, "--force")  # the range of all its values
    with Image.open("dataset/train/scan.png") as picture:
        assert picture.convert("L").getpixel((1, 0)) == round(25.5)


def test_dicom_files_without_a_suffix(here):
    shutil.copy(sample("CT_small.dcm"), "one")
    mask = labels(3, size=(128, 128))
    for name in ("IM7", "1.2.840.5", "1.2.840.12.dcm"):
        Path("di").mkdir(exist_ok=True)
        shutil.copy("one", f"di/{name}")
        save(grey([0, 1])(mask), f"dm/{name.removesuffix('.dcm')}.tif")
    Path("di/README").write_text("not an image")
    assert "pairs: 3 by name" in done("--masks", "di", "dm", *ALL)
    got = stored()
    assert set(got) == {"IM7", "1.2.840.5", "1.2.840.12"}
    for name, masks in got.items():
        np.testing.assert_array_equal(masks["foreground"], mask == 1)
        with Image.open(f"dataset/train/{name}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture.convert("L")), read_dicom("one")[0])
    shutil.copytree("dm", "di", dirs_exist_ok=True)  # images and masks in one folder
    done("--masks", "di", "di", "--into", "test")
    assert set(stored("test")) == set(got)


def test_bad_dicom_is_one_line(here):
    dicom_pair()
    flags = ("--masks", "di", "dm", *ALL)
    save(Image.new("1", (9, 9), 1), "dm/scan.png")
    refused(*flags, words=["scan.png", "9x9", "di/scan.dcm", "3x2"])
    shutil.copy(sample("SC_rgb_rle_2frame.dcm"), "di/scan.dcm")
    refused(*flags, words=["di/scan.dcm", "2 frames"])
    Path("di/scan.dcm").write_bytes(Path(sample("CT_small.dcm")).read_bytes()[:9000])
    refused(*flags, words=["di/scan.dcm", "cut short"])
    write_nifti(Path("dm/scan.nii"), np.zeros((3, 2, 1), np.uint8))
    refused(*flags, words=["dm/scan.nii is a volume", "scan.dcm is not"])


def test_windows_that_are_refused(here):
    dicom_pair()
    refused("--masks", "di", "dm", "--window", "40", "0", words=["--window", "width 0"])
    refused("--labelme", "di", "--window", "40", "80", words=["--window: goes with --masks"])
    save(photo(size=(3, 2)), "di/scan.png")
    Path("di/scan.dcm").unlink()
    refused("--masks", "di", "dm", *ALL, "--window", "40", "80", words=["di", "no DICOM"])


@pytest.mark.parametrize("library", ["pydicom", "nibabel"])
def test_missing_libraries_are_one_line(here, monkeypatch, library):
    dicom_pair()
    for number in range(2):
        volume(number)
    monkeypatch.setitem(sys.modules, library, None)
    flags = ("--masks", "di", "dm") if library == "pydicom" else VOLUMES
    refused(*flags, *ALL, words=["di/" if library == "pydicom" else "vi/", f"install {library}`"])


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_stored_upright(here, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(photo(), f"images/a{suffix}", exif=exif)
    image = Image.open(f"images/a{suffix}")
    if suffix != ".tif":
        image = ImageOps.exif_transpose(image)
    shown = np.asarray(image.convert("RGB"))
    label_map = labels(1, size=shown.shape[1::-1])  # drawn on the picture as it is shown
    save(grey([0, 1])(label_map), "masks/a.png")
    done("--masks", "images", "masks", *ALL)
    (file,) = (path for path in Path("dataset/train").iterdir() if path.suffix != ".json")
    np.testing.assert_array_equal(np.asarray(read_image(file)), shown)
    np.testing.assert_array_equal(stored()["a"]["foreground"], label_map == 1)
    copied = file.read_bytes() == Path(f"images/a{suffix}").read_bytes()
    assert copied == (orientation == 1 or suffix == ".tif")
    if orientation >= 5:  # a mask of the size before turning is turned along
        before = labels(2)
        save(grey([0, 1])(before), "masks/a.png")
        done("--masks", "images", "masks", *ALL, "--force")
        code = Image.fromarray((before == 1).astype(np.uint8))
        code.getexif()[0x0112] = orientation
        wanted = np.asarray(ImageOps.exif_transpose(code)) == 1
        np.testing.assert_array_equal(stored()["a"]["foreground"], wanted)


def test_turn_agrees_with_pillow():
    image = photo()
    for orientation in range(1, 9):
        image.getexif()[0x0112] = orientation
        wanted = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(collect.turn(np.asarray(image), orientation), wanted)


# ---------------------------------------------------------------- splits


def folders(count=20, name="{}"):
    for number in range(count):
        stem = name.format(number)
        save(photo(number), f"images/{stem}.png")
        save(grey([0, 1])(labels(number)), f"masks/{stem}.png")


def counts(root="dataset"):
    return {path.name: len(content(path.name, root)["images"]) for path in Path(root).iterdir()}


def test_two_calls_keep_a_published_split(here):
    folders()
    out = done("--masks", "images", "masks", "--split", "80", "20", "0", "--data", "mine")
    assert counts("mine") == {"train": 16, "valid": 4}
    assert "missing: test" in out and "--into test" in out
    assert "next: python data.py mine, python train.py --data mine" in out
    foreground = np.mean([labels(number) == 1 for number in range(20)])
    assert f"class foreground: value 1, {100 * foreground:.2f} % of the pixels" in out
    before = tree(Path("mine"))
    into = ("--masks", "images", "masks", "--into", "test", "--data", "mine")
    refused(*into, "--classes", "vessel", words=["classes foreground", "vessel", "--classes"])
    assert "missing" not in done(*into)
    assert counts("mine") == {"train": 16, "valid": 4, "test": 20}
    after = tree(Path("mine"))
    assert all(after[name] == state for name, state in before.items())
    line = refused(*into, words=[Path("mine/test"), "--force"])
    assert "Traceback" not in line
    shutil.rmtree("images")
    folders(3)
    done(*into, "--force", "--skip-unpaired")
    assert counts("mine") == {"train": 16, "valid": 4, "test": 3}


def test_a_later_split_may_lack_a_class(here):
    save(photo(), "images/a.png")
    save(grey([0, 1, 2, 3])(labels(0, 3)), "masks/a.png")
    save(photo(), "more/b.png")
    save(grey([0, 1, 0, 3])(labels(0, 3)), "more_masks/b.png")
    names = ("--classes", "one,two,three")
    done("--masks", "images", "masks", "--into", "train", *names)
    into = ("--masks", "more", "more_masks", "--into", "test")
    refused(*into, words=["one, two, three", "1, 3"])
    refused(*into, "--classes", "three,one", words=["one, two, three"])
    done(*into, "--classes", "one,three")
    assert [c["name"] for c in content("test")["categories"]] == ["one", "two", "three"]
    assert {a["category_id"] for a in content("test")["annotations"]} == {1, 3}


def test_split_is_drawn_by_the_seed(here):
    folders()
    done("--masks", "images", "masks", "--data", "a")
    done("--masks", "images", "masks", "--data", "b")
    done("--masks", "images", "masks", "--data", "c", "--seed", "1")
    assert counts("a") == counts("c") == {"train": 14, "valid": 3, "test": 3}
    assert set(stored("test", "a")) == set(stored("test", "b")) != set(stored("test", "c"))
    everything = [set(stored(split, "a")) for split in ("train", "valid", "test")]
    assert set.union(*everything) == {str(n) for n in range(20)}


def test_groups_stay_together(here):
    for patient in range(8):
        for number in range(patient % 3 + 1):
            save(photo(), f"images/p{patient}/{number}.png")
            save(grey([0, 1])(labels()), f"masks/p{patient}/{number}.png")
    flags = ("--masks", "images", "masks", "--split", "50", "25", "25")
    out = done(*flags, "--group", r"p(\d+)/")
    where = {}
    for split in ("train", "valid", "test"):
        for name in stored(split):
            where.setdefault(name.split("_")[0], set()).add(split)
    assert len(where) == 8 and all(len(splits) == 1 for splits in where.values())
    assert "groups" in out
    refused(*flags, "--force", "--group", "x(.)", words=["'x(.)'", "finds nothing", "p0/0.png"])
    refused(*flags, "--force", "--group", "(", words=["--group", "regular expression"])
    refused(*flags, "--force", "--group", "p", words=["1 groups", "too few", "--split"])


def test_bids_names_are_subjects(here):
    names = [f"sub-{n}_ses-{s}_T{t}w" for n in (1, 10, "b2") for s in (1, 2) for t in (1, 2)]
    names += [f"sub-{n}/{t}" for n in ("x", "y") for t in ("flair", "dwi")]
    names += ["sub-z", "SUB-1_T1w", "my_sub-1_T1w", "sub-_1", "sub-1é_T1w"]
    for name in names:
        save(photo(), f"images/{name}.png")
        save(grey([0, 1])(labels()), f"masks/{name}.png")
    flags = ("--masks", "images", "masks", "--split", "34", "33", "33")
    out = done(*flags)
    line = next(line for line in out.splitlines() if line.startswith("groups: "))
    assert "6 subjects" in line and "17 images" in line and "sub-1:" in line and "--group" in line
    where = {}
    for split in ("train", "valid", "test"):
        for name in stored(split):
            where.setdefault(name.split("_")[0], []).append(split)
    subjects = {"sub-1": 4, "sub-10": 4, "sub-b2": 4, "sub-x": 2, "sub-y": 2, "sub-z": 1}
    for subject, count in subjects.items():
        assert len(where[subject]) == count and len(set(where[subject])) == 1
    assert len(where) == 6 + 4  # the others are no subjects
    out = done(*flags, "--force", "--group", r"(.)\.png$")
    assert "subjects" not in out
    assert collect.find_groups(["sub-1", "site/sub-2/x.png", "x.png"]) == ["sub-1", "sub-2", ""]
    ends = [{name[-1] for name in stored(split)} for split in ("train", "valid", "test")]
    assert sum(map(len, ends)) == len(set.union(*ends))


@pytest.mark.parametrize("source", ["labelme", "coco"])
def test_bids_names_of_annotated_images(here, source):
    stems = [f"sub-{subject}_{number}" for subject in "abc" for number in range(4)]
    if source == "labelme":
        for stem in stems:
            labelme(stem, GOOD)
    else:
        outlines = [(number, 2, polygon(3, 4, 6)) for number in range(12)]
        coco_file(outlines, [f"{stem}.png" for stem in stems])
    flags = ("--labelme", "lm") if source == "labelme" else ("--coco", "c.json", "images")
    assert "3 subjects in the names of 12 images" in done(*flags, "--split", "34", "33", "33")
    for split in ("train", "valid", "test"):
        assert len({name[:5] for name in stored(split)}) == 1


def test_volumes_of_a_subject_stay_in_one_split(here):
    for number in range(6):
        volume(number, name=f"sub-{number % 3}_ses-{{}}")
    assert "3 subjects" in done(*VOLUMES, "--split", "34", "33", "33")
    for split in ("train", "valid", "test"):
        assert {int(name[10]) for name in stored(split)} in ({0, 3}, {1, 4}, {2, 5})


def test_every_split_gets_an_image():
    for count in range(3, 30):
        items = [Example(str(number), "", None) for number in range(count)]
        drawn = draw_splits(items, (90, 5, 5), 0)
        sizes = [len(drawn[split]) for split in ("train", "valid", "test")]
        assert sum(sizes) == count and min(sizes) >= 1
        assert abs(sizes[0] - 0.9 * count) < 2.1
    with pytest.raises(ValueError, match="2 images .* too few for 3 splits"):
        draw_splits(items[:2], (90, 5, 5), 0)


def test_nothing_is_replaced_unasked(here):
    folders(4)
    flags = ("--masks", "images", "masks")
    done(*flags)
    Path("dataset/notes.txt").write_text("mine")
    refused(*flags, words=["dataset/train is there already", "--force"])
    refused("--synthetic", words=["something else", "--force"])
    refused(words=["holds own data"])
    refused("--zip", "a.zip", words=["holds own data"])
    done(*flags, "--force", "--seed", "3")
    assert Path("dataset/notes.txt").read_text() == "mine"
    lies = ("--masks", "dataset/train", "masks", "--force")
    refused(*lies, words=["dataset/train", "would be replaced"])
    refused("--labelme", ".", "--into", "test", "--force", words=["lies in it", "--data"])
    phantoms.make_phantoms("drawn", (1, 1, 1), size=64)
    refused(*flags, "--data", "drawn", words=["is there already"])
    shutil.rmtree("drawn/test")
    into = (*flags, "--data", "drawn", "--into", "test", "--classes", "tumour")
    refused(*into, words=["drawn/train holds phantoms"])


def test_interrupted_import_leaves_nothing(here, monkeypatch):
    folders(9)
    done("--masks", "images", "masks")
    before = tree(Path())
    convert = writing._convert

    def stop(item, **options):
        if item.name == "5":
            raise KeyboardInterrupt
        return convert(item, **options)

    monkeypatch.setattr(writing, "_convert", stop)
    for data in ("dataset", "new"):
        status, _, errors = run("--masks", "images", "masks", "--force", "--data", data)
        assert (status, errors) == (130, ["download.py: interrupted"])
        assert tree(Path()) == before


def test_full_disk(here, monkeypatch):
    folders(3)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.shutil, "copyfile", full)
    refused("--masks", "images", "masks", words=["disk of dataset is full"])


@pytest.mark.parametrize(
    "flags, word",
    [
        (("--masks", "a"), "expected 2"),
        (("--masks", "a", "b", "--zip", "c"), "not allowed with"),
        (("--labelme", "a", "--coco", "b", "c"), "not allowed with"),
        (("--synthetic", "--labelme", "a"), "not allowed with"),
        (("--labelme", "a", "--split", "50", "20", "20"), "not 100"),
        (("--labelme", "a", "--into", "test", "--split", "80", "20", "0"), "not allowed with"),
        (("--labelme", "a", "--into", "tests"), "invalid choice"),
        (("--labelme", "a", "--boxes"), "--coco"),
        (("--group", "x"), "goes with --masks"),
        (("--into", "test", "--synthetic"), "goes with --masks"),
    ],
)
def test_wrong_flags(here, flags, word):
    refused(*flags, words=[word, "--help"])


def test_names_are_unique_and_safe():
    names = collect.unique_names
    assert names(["a/1.png", "a/2.jpg"]) == ["1", "2"]
    assert names(["a/1.png", "b/1.png", "b/2.png"]) == ["a_1", "b_1", "b_2"]
    assert len(set(names(["a_b/1.png", "a/b_1.png", "c/1.png", "c/1.jpg"]))) == 4
    assert len({name.casefold() for name in names(["x/A.png", "x/a.jpg"])}) == 2
    for name in names(["..png", "a\nb.png", "é" * 300 + ".png", "\udcff.png", "c:d.png"]):
        assert len(name.encode()) < 230 and not name.startswith(".")
        assert not set(name) & set('\n\\/:*?"<>|') and name.isprintable()


def test_memory_does_not_grow_with_the_images(here):
    def load():
        mask = np.zeros((256, 256), bool)
        mask[50:90, 60:99] = True
        return Image.new("RGB", (256, 256)), {"a": mask}

    def peak(count):
        items = [Example(f"{number:04}", "", load) for number in range(count)]
        tracemalloc.start()
        write_dataset(Path(f"d{count}"), items, ["a"])
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(60), peak(360)
    assert large - small < 300 * 6000, (small, large)  # bytes; a mask and image have 260,000


# ---------------------------------------------------------------- LabelMe


def shape(label, points, shape_type="polygon", **more):
    kind = {"shape_type": shape_type} if shape_type else {}
    return {"label": label, "points": points, "group_id": None, "flags": {}, **kind, **more}


def box(x, y, side):
    """A polygon whose border is part of it: side x side pixels."""
    far_x, far_y = x + side - 1, y + side - 1
    return [[x, y], [far_x, y], [far_x, far_y], [x, far_y]]


def labelme(stem, shapes, folder="lm", image=True, **more):
    if image:
        save(photo(), f"{folder}/{stem}.png")
    record = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{stem}.png",
        "imageData": None,
        "imageHeight": SIZE[1],
        "imageWidth": SIZE[0],
        **more,
    }
    Path(folder).mkdir(exist_ok=True)
    Path(folder, f"{stem}.json").write_text(json.dumps(record))


def square_mask(x, y, width, height):
    mask = np.zeros(SIZE[::-1], bool)
    mask[y : y + height, x : x + width] = True
    return mask


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_labelme_shapes_order_and_holes(here):
    bitmap = np.eye(4, dtype=np.uint8)
    shapes = [
        shape("b", box(2, 3, 10)),
        shape("a", box(6, 3, 10), None),  # a missing shape_type is a polygon
        shape("_background_", box(3, 4, 2)),
        shape("a", [[30, 9], [22, 5]], "rectangle"),  # corners in any order
        shape("b", [[20.4, 20.2], [23.4, 23.2]], "mask", mask=png(bitmap)),
        shape("a", [[38, 27], [44, 27], [44, 40], [38, 40]], "oriented_rectangle"),
        shape("c", [[1, 1]], "point"),
        shape("c", [[1, 1], [5, 5]], "line"),
        shape("c", [[1, 1], [5, 5], [9, 1]], "linestrip"),
        shape("__ignore__", box(15, 12, 1)),
    ]
    labelme("x", shapes, flags={"unknown": 1}, text="also allowed")
    out = done("--labelme", "lm", *ALL)
    assert "left out: shapes without an area: line (1), linestrip (1), point (1)" in out
    assert "warning: 1 areas labelled __ignore__" in out
    a, b = square_mask(6, 3, 10, 10), square_mask(2, 3, 4, 10)  # a covers the rest of b
    assert (a.sum(), b.sum()) == (100, 40)
    a[12, 15] = False
    b[4:6, 3:5] = False
    a |= square_mask(22, 5, 9, 5) | square_mask(38, 27, 2, 3)
    b[range(20, 24), range(20, 24)] = True
    assert list(stored()["x"]) == ["a", "b"]
    np.testing.assert_array_equal(stored()["x"]["a"], a)
    np.testing.assert_array_equal(stored()["x"]["b"], b)


def test_labelme_circle():
    drawn = draw_shapes([shape("a", [[20, 15], [20, 5]], "circle")], SIZE, {"a": 1})
    y, x = np.mgrid[: SIZE[1], : SIZE[0]]
    distance = np.hypot(x - 20, y - 15)
    assert drawn[distance < 9.5].all() and not drawn[distance > 10.5].any()


def crossings(x, y, points):
    """Whether (x, y) is inside a polygon: an odd number of edges to the right of it."""
    inside = False
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        if (y1 > y) != (y2 > y) and x < (x2 - x1) * (y - y1) / (y2 - y1) + x1:
            inside = not inside
    return inside


def distance_to_outline(x, y, points):
    nearest = math.inf
    for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1], strict=True):
        length = (x2 - x1) ** 2 + (y2 - y1) ** 2
        t = max(0, min(1, ((x - x1) * (x2 - x1) + (y - y1) * (y2 - y1)) / (length or 1)))
        nearest = min(nearest, math.hypot(x - x1 - t * (x2 - x1), y - y1 - t * (y2 - y1)))
    return nearest


def test_labelme_polygons_against_another_rasteriser():
    rng = np.random.default_rng(0)
    for _ in range(6):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        radii = rng.uniform(5, 25, 7)  # some points lie outside the image
        points = np.stack([20 + radii * np.cos(angles), 15 + radii * np.sin(angles)], 1).tolist()
        drawn = draw_shapes([shape("a", points)], SIZE, {"a": 1})
        as_labelme = Image.new("L", SIZE)  # the lines of LabelMe's shape_to_mask
        corners = [tuple(point) for point in points]
        ImageDraw.Draw(as_labelme).polygon(xy=corners, outline=1, fill=1)
        np.testing.assert_array_equal(drawn, np.asarray(as_labelme))
        for y in range(SIZE[1]):
            for x in range(SIZE[0]):
                if distance_to_outline(x, y, points) > 1.5:
                    assert drawn[y, x] == crossings(x, y, points), (x, y)


def test_labelme_classes_are_picked_and_ordered(here):
    labelme("x", [shape("a", box(2, 3, 10)), shape("b", box(2, 3, 4)), shape("c", box(20, 3, 4))])
    labelme("y", [])
    refused("--labelme", "lm", "--classes", "d", *ALL, words=["'d'", "a, b, c"])
    out = done("--labelme", "lm", "--classes", "c,a", *ALL)
    assert "left out: other labels: b (1)" in out
    assert [c["name"] for c in content("train")["categories"]] == ["c", "a"]
    assert stored()["x"]["a"].sum() == 100  # b, left out, does not cover it
    assert stored()["y"] == {}


def test_labelme_image_places(here, monkeypatch):
    image = io.BytesIO()
    photo(7).save(image, "PNG")
    data = base64.b64encode(image.getvalue()).decode()
    areas = [shape("a", box(2, 3, 5))]
    labelme("inside", areas, image=False, imageData=data)
    labelme("windows", areas, image=False, imagePath="..\\lm\\sub\\w.png")
    labelme("up", areas, image=False, imagePath="D:\\scans\\2024\\up.png")
    labelme("climbs", areas, image=False, imagePath="../outside/climbs.png")
    labelme("absolute", areas, image=False, imagePath=f"{here}/outside/absolute.png")
    save(photo(8), "lm/sub/w.png")
    for name in ("up", "climbs", "absolute"):
        save(photo(9), f"lm/{name}.png")
        save(photo(10), f"outside/{name}.png")
    done("--labelme", "lm", *ALL)
    seeds = {"inside": 7, "windows": 8, "up": 9, "climbs": 9, "absolute": 9}
    for name, seed in seeds.items():
        got = np.asarray(read_image(f"dataset/train/{name}.png"))
        np.testing.assert_array_equal(got, np.asarray(photo(seed)))
        assert stored()[name]["a"].sum() == 25
    monkeypatch.chdir("lm")
    done("--labelme", ".", *ALL)
    assert counts() == {"train": 5}


def test_labelme_points_refer_to_the_upright_image(here):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(photo(), "lm/x.jpg", exif=exif)
    upright = {"imageWidth": SIZE[1], "imageHeight": SIZE[0], "imagePath": "x.jpg"}
    labelme("x", [shape("a", box(2, 33, 5))], image=False, **upright)
    done("--labelme", "lm", *ALL)
    wanted = np.zeros(SIZE, bool)
    wanted[33:38, 2:7] = True
    np.testing.assert_array_equal(stored()["x"]["a"], wanted)


GOOD = [shape("a", box(2, 3, 5))]
BAD_LABELME = {
    "not JSON": (b"{", "not JSON"),
    "not LabelMe": (b'{"images": []}', "not a LabelMe file"),
    "no label": ({"shapes": [{"points": []}]}, "shapes[0] has no label"),
    "unknown shape": ({"shapes": [shape("a", [], "spiral")]}, "spiral"),
    "two points": ({"shapes": [shape("a", [[1, 1], [2, 2]])]}, "three or more points"),
    "NaN": ({"shapes": [shape("a", [[1, 1], [2, math.nan], [3, 1]])]}, "far outside"),
    "huge": ({"shapes": [shape("a", [[1, 1], [2, 1e300], [3, 1]])]}, "far outside"),
    "text": ({"shapes": [shape("a", [["1", 1], [2, 2], [3, 1]])]}, "no point"),
    "mask without": ({"shapes": [shape("a", [[1, 1], [4, 4]], "mask")]}, "needs its picture"),
    "mask damaged": (
        {"shapes": [shape("a", [[1, 1], [4, 4]], "mask", mask="AAAA")]},
        "its mask is damaged",
    ),
    "mask elsewhere": (
        {"shapes": [shape("a", [[1, 1], [4, 4]], "mask", mask=png(np.eye(9, dtype=np.uint8)))]},
        "corners",
    ),
    "no image": ({"imagePath": "none.png"}, "'none.png' is not below lm"),
    "hostile path": ({"imagePath": "../../../etc/passwd"}, "not below lm"),
    "NUL": ({"imagePath": "a\0b"}, "not below lm"),
    "path of another kind": ({"imagePath": 5}, "not below lm"),
    "data damaged": ({"imagePath": "none.png", "imageData": "%%%é"}, "imageData"),
    "data no image": ({"imagePath": "none.png", "imageData": "AAAA"}, "imageData: not a JPEG"),
    "another size": ({"imageWidth": 41}, "41x30"),
    "no areas": ({"shapes": [shape("a", [[1, 1]], "point")]}, "no labelled areas"),
}


@pytest.mark.parametrize("name", BAD_LABELME)
def test_bad_labelme_is_one_line(here, name):
    change, word = BAD_LABELME[name]
    labelme("x", **{"shapes": GOOD} | (change if isinstance(change, dict) else {}))
    if isinstance(change, bytes):
        Path("lm/x.json").write_bytes(change)
    refused("--labelme", "lm", *ALL, words=["lm", word])


def test_text_of_half_a_character_is_one_line(here):
    labelme("x", [*GOOD, shape("a\ud800", box(2, 3, 5))])
    refused("--labelme", "lm", *ALL, words=["lm/x.json", "shapes[1]", "\\ud800"])
    coco_file([(0, 2, polygon(3, 4, 6))])
    made = json.loads(Path("c.json").read_text())
    made["categories"][2]["name"] = "\ud800"
    Path("c.json").write_text(json.dumps(made))
    refused("--coco", "c.json", "images", *ALL, words=["c.json", "\\ud800"])


def test_images_of_labelme_files_are_found_in_any_unicode_form(here):
    labelme(NFC, [shape(NFD, box(2, 3, 5))], imagePath=f"..\\lm\\{NFC}\\{NFD}.png", image=False)
    labelme("y", [shape(NFC, box(2, 3, 5))], imagePath=f"D:\\scans\\y{NFC}.png", image=False)
    save(photo(8), f"lm/y{NFD}.png")
    save(photo(7), f"lm/{NFD}/{NFC}.png")
    done("--labelme", "lm", *ALL, "--classes", NFD)
    assert [c["name"] for c in content("train")["categories"]] == [NFC]
    got = np.asarray(read_image(f"dataset/train/{NFC}.png"))
    np.testing.assert_array_equal(got, np.asarray(photo(7)))
    assert stored()[NFC][NFC].sum() == stored()["y"][NFC].sum() == 25
    assert collect.existing_file(f"lm/{NFC}") is None  # a folder


def test_images_of_a_coco_file_are_found_in_any_unicode_form(here):
    coco_file([(0, 2, polygon(3, 4, 6))], [f"p/{NFC}.png", f"q/{NFD}.png"])
    for seed, form, place in ((5, NFC, f"p/{NFD}.png"), (6, NFD, f"q/{NFC}.png")):
        Path(f"images/{form}.png").unlink()
        save(photo(seed), f"images/{place}")

    def imported(folder):
        return np.asarray(read_image(f"dataset/train/{folder}_{NFC}.png"))

    flags = ("--coco", "c.json", "images", *ALL)
    done(*flags)
    np.testing.assert_array_equal(imported("p"), np.asarray(photo(5)))
    np.testing.assert_array_equal(imported("q"), np.asarray(photo(6)))
    save(photo(9), f"images/p/{NFC}.png")  # two of them: the one that is named exactly
    done(*flags, "--force")
    np.testing.assert_array_equal(imported("p"), np.asarray(photo(9)))


def test_large_labelme_files_are_not_read(here, monkeypatch):
    labelme("x", GOOD, imageData="A" * 2000)
    monkeypatch.setattr("medseg.importing.labelme.MAX_BYTES", 2000)
    refused("--labelme", "lm", *ALL, words=["x.json", "larger than"])


@pytest.mark.parametrize("corners", [[[20.6, 9.7], [23.2, 12.9]], [[23.9, 12.2], [20.1, 9.5]]])
def test_labelme_masks_with_fractional_corners(corners):
    """Their whole parts count, and a mask may be a pixel larger or smaller than they span."""
    for side, fits in {2: False, 3: True, 4: True, 5: True, 6: False}.items():
        bitmap = np.ones((side, side), np.uint8)
        bitmap[0, 1] = 0
        shapes = [shape("a", corners, "mask", mask=png(bitmap))]
        if fits:
            drawn = draw_shapes(shapes, SIZE, {"a": 1})
            expected = square_mask(20, 9, side, side)
            expected[9, 21] = False
            np.testing.assert_array_equal(drawn, expected)
        else:
            with pytest.raises(ValueError, match="corners"):
                draw_shapes(shapes, SIZE, {"a": 1})


def import_labels(count):
    """Import `count` labels, each a pixel of 80x60; returns (stdout, seconds of the processor)."""
    shapes = [shape(f"l{n}", [[n % 80, n // 80 % 60]] * 2, "rectangle") for n in range(count)]
    save(photo(size=(80, 60)), f"lm{count}/x.png")
    labelme("x", shapes, f"lm{count}", image=False, imageWidth=80, imageHeight=60)
    start = time.process_time()
    out = done("--labelme", f"lm{count}", "--data", f"d{count}", "--into", "train")
    return out, time.process_time() - start


def test_thousands_of_labels_take_time_in_proportion(here):
    """Sixteen times the labels may take sixteen times as long, not 256 times."""
    few, many = import_labels(2000)[1], import_labels(32_000)[1]
    assert many < 20 * few, (few, many)
    made = content("train", "d32000")
    names = [category["name"] for category in made["categories"]]
    assert names == sorted(f"l{n}" for n in range(32_000))
    # Each of the 4800 pixels is of the label that was drawn last there.
    seen = {names[annotation["category_id"] - 1] for annotation in made["annotations"]}
    assert seen == {f"l{n}" for n in range(32_000 - 4800, 32_000)}


def test_more_classes_than_a_network_tells_apart(here):
    """They are noted, looked at, and trained on as one; few are printed."""
    out, _ = import_labels(4800)
    assert "l0 (1)" in out and "(4800)" in out and "l99 " not in out
    assert "note: 4800 classes" in out and "--classes union" in out
    audited = script_here("data.py", "d4800", cwd=here)
    assert_refused(audited, "2 problem(s)")  # there are no valid and test
    assert "and 4545 more categories" in audited.stdout
    assert sum(line.startswith("  category") for line in audited.stdout.splitlines()) == 255
    assert Image.open("contact_sheet.jpg").height > 255 * 20
    train = script_here("train.py", "--data", "d4800", "--classes", "each", *SMALL, cwd=here)
    assert_refused(train, "d4800", "4800 categories", "1 to 255")
    assert load_split("d4800", "train", 32)[0, ..., 3].all()


# ---------------------------------------------------------------- COCO


def coco_file(annotations, images=("a.png",), path="c.json", folder="images", **more):
    """A COCO file with annotations (index of the image, category id, fields), and its images."""
    records = []
    for number, name in enumerate(images):
        record = {"id": 10 + number, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        records.append(record)
        save(photo(number), Path(folder) / Path(name.replace("\\", "/")).name)
    entries = [
        {"id": number, "image_id": 10 + image, "category_id": category, **fields}
        for number, (image, category, fields) in enumerate(annotations)
    ]
    categories = [{"id": n, "name": f"k{n}", "supercategory": "none"} for n in (0, 3, 2)]
    made = {"images": records, "annotations": entries, "categories": categories, **more}
    Path(path).write_text(json.dumps(made))


def polygon(x, y, side):
    return {"segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]]}


def test_coco_polygons_and_run_lengths(here):
    blob = labels(3) == 1
    rle = coco_mask.encode(np.asfortranarray(blob.astype(np.uint8)))
    compressed = {"size": [30, 40], "counts": rle["counts"].decode()}
    flat = blob.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    runs = np.diff(edges).tolist()
    uncompressed = {"size": [30, 40], "counts": [0] * int(flat[0]) + runs}
    uneven = {"segmentation": [[1.3, 2.7, 30.2, 5.5, 17.9, 25.1]]}
    annotations = [
        (0, 2, polygon(3, 4, 6)),
        (0, 2, polygon(20, 4, 6)),
        (0, 3, {"segmentation": compressed}),
        (1, 2, {"segmentation": uncompressed, "iscrowd": 1}),
        (1, 3, uneven),
    ]
    coco_file(annotations, ["a.png", "b.png", "empty.png"])
    out = done("--coco", "c.json", "images", *ALL)
    assert "left out: categories: k0 (0)" in out
    assert [c["name"] for c in content("train")["categories"]] == ["k3", "k2"]
    got = stored()
    np.testing.assert_array_equal(
        got["a"]["k2"], square_mask(3, 4, 6, 6) | square_mask(20, 4, 6, 6)
    )
    np.testing.assert_array_equal(got["a"]["k3"], blob)
    np.testing.assert_array_equal(got["b"]["k2"], blob)
    decoded = coco_mask.decode(coco_mask.frPyObjects(uneven["segmentation"], 30, 40))[..., 0]
    np.testing.assert_array_equal(got["b"]["k3"], decoded == 1)
    assert got["empty"] == {}
    done("--coco", "c.json", "images", *ALL, "--force", "--classes", "k2")
    assert set(stored()["a"]) == {"k2"}
    refused("--coco", "c.json", "images", *ALL, "--force", "--classes", "k", words=["'k'", "k0"])


def test_coco_boxes(here):
    coco_file([(0, 2, polygon(3, 4, 6)), (0, 3, {"segmentation": [], "bbox": [20, 5, 7, 9]})])
    words = ["c.json", "1 of 2 annotations have a box", "annotation 1", "--boxes"]
    refused("--coco", "c.json", "images", *ALL, words=words)
    assert "boxes: 1 annotations" in done("--coco", "c.json", "images", *ALL, "--boxes")
    np.testing.assert_array_equal(stored()["a"]["k3"], square_mask(20, 5, 7, 9))


def test_coco_file_names(here):
    names = ["images/1/a.png", "upload\\b.png", "../../c.png", "/data/d.png", "e.png"]
    coco_file([(0, 2, polygon(3, 4, 6))], names)
    save(photo(4), "images/sub/e.png")
    save(photo(99), "c.png")
    done("--coco", "c.json", "images", *ALL)
    assert set(stored()) == {"a", "b", "c", "d", "e"}
    got = np.asarray(read_image("dataset/train/c.png"))
    np.testing.assert_array_equal(got, np.asarray(photo(2)))  # not the one outside
    save(photo(5), "images/sub/a.png")
    line = refused("--coco", "c.json", "images", *ALL, "--force", words=["may be"])
    assert "images/a.png" in line and "images/sub/a.png" in line


def test_coco_missing_images(here):
    coco_file([(0, 2, polygon(3, 4, 6))], ["a.png", "b.png", "c.png"])
    Path("images/b.png").unlink()
    flags = ("--coco", "c.json", "images", *ALL)
    refused(*flags, words=["1 of 3 images are not below images: 'b.png'", "--skip-unpaired"])
    assert "left out: 1 of 3" in done(*flags, "--skip-unpaired")
    assert set(stored()) == {"a", "c"}
    coco_file([(0, 2, polygon(3, 4, 6))], ["a.png", "x/a.png"])
    refused(*flags, "--force", words=["two records", "a.png"])


BAD_COCO = {
    "not JSON": (lambda c: "[", "not JSON"),
    "a list": (lambda c: [], "no list of images"),
    "no images": (lambda c: {**c, "images": [], "annotations": []}, "no annotations"),
    "no annotations": (lambda c: {**c, "annotations": []}, "no annotations"),
    "no category": (lambda c: {**c, "categories": []}, "category_id 2"),
    "nothing to draw": (lambda c: c["annotations"][0].pop("segmentation") and c, "neither"),
    "far": (lambda c: c["annotations"][0].update(polygon(1e9, 0, 5)) or c, "far outside"),
    "size": (lambda c: c["images"][0].update(width=30, height=40) or c, "30x40"),
    "terabytes": (lambda c: c["images"][0].update(width=10**9) or c, "1000000000x30"),
    "runs": (
        lambda c: c["annotations"][0].update(segmentation={"size": [30, 40], "counts": [7]}) or c,
        "annotation 0 of a.png",
    ),
    "hostile": (lambda c: c["images"][0].update(file_name="../../etc/passwd") or c, "passwd"),
    "no name": (lambda c: c["images"][0].update(file_name=None) or c, "no file_name"),
    "box": (
        lambda c: c["annotations"][0].update(segmentation=None, bbox=[1, 2, "3", 4]) or c,
        "bbox",
    ),
}


@pytest.mark.parametrize("name", BAD_COCO)
def test_bad_coco_is_one_line(here, name):
    change, word = BAD_COCO[name]
    coco_file([(0, 2, polygon(3, 4, 6))])
    changed = change(json.loads(Path("c.json").read_text()))
    Path("c.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    refused("--coco", "c.json", "images", *ALL, "--boxes", words=[word])


def test_no_coco_file(here):
    coco_file([(0, 2, polygon(3, 4, 6))])
    refused("--coco", "none.json", "images", words=["none.json", "no such file"])
    refused("--coco", "c.json", "nowhere", words=["nowhere", "no such folder"])


# ---------------------------------------------------------------- mutations


SPECIAL = [None, True, -1, 0, 2**63, 10**30, 0.5, 1e308, math.nan, "", "../../x", "/etc/passwd"]
SPECIAL += ["C:\\x", "a\0b", "\ud800", "é" * 300, [], {}, [[]], [None], {"counts": [10**18]}]


def mutate(value, rng, depth=0):
    """Replace, remove or repeat something somewhere in nested lists and dicts."""
    if depth > 6 or not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return json.loads(json.dumps(rng.choice(SPECIAL)))
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.randrange(8)
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, list):
        value.extend([value[key]] * 5)
    else:
        value[key] = mutate(value[key], rng, depth + 1)
    return value


@pytest.mark.parametrize("source", ["labelme", "coco"])
def test_mutated_files_end_in_success_or_one_line(here, source):
    rng = random.Random(11)
    bitmap = np.eye(4, dtype=np.uint8)
    labelme("y", [*GOOD, shape("b", [[1, 1], [4, 4]], "mask", mask=png(bitmap))], "images")
    labelme("x", [shape("a", [[9, 9], [3, 4]], "circle")], "images", imageData=png(bitmap))
    coco_file([(0, 2, polygon(3, 4, 6)), (1, 3, {"bbox": [1, 2, 3, 4]})], ["x.png", "y.png"])
    path = Path("c.json" if source == "coco" else "images/y.json")
    good = path.read_bytes()
    flags = ("--coco", path, "images", "--boxes") if source == "coco" else ("--labelme", "images")
    ended = set()
    for _ in range(40):
        if rng.random() < 0.75:
            made = json.loads(good)
            for _ in range(rng.randint(1, 3)):
                made = mutate(made, rng)
            path.write_text(json.dumps(made))
        else:
            changed = bytearray(good)
            changed[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed[: rng.choice([len(good), rng.randrange(len(good))])])
        before = set(tree(Path()))
        status, _, errors = run(*flags, *ALL)
        assert status in (0, 2) and len(errors) == (status == 2), errors
        ended.add(status)
        if status == 0:
            stored()
            shutil.rmtree("dataset")
        assert set(tree(Path())) == before
    assert ended == {0, 2}


def test_two_classes_of_phantoms(here):
    flags = ("--synthetic", "--phantoms", "4", "1", "1", "--data")
    done(*flags, "two", "--two-classes")
    done(*flags, "one")
    assert [c["name"] for c in content("train", "two")["categories"]] == ["bright", "dark"]
    assert {a["category_id"] for a in content("train", "two")["annotations"]} == {1, 2}
    assert "already there" in done(*flags, "two", "--two-classes")
    refused(*flags, "two", words=["something else", "--force"])
    refused("--two-classes", words=["--two-classes: goes with --synthetic"])


def test_flags_are_documented():
    parser_flags = {"--" + name.replace("_", "-") for name in flags.NEED_AN_IMPORTER}
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), pytest.raises(SystemExit):
        download.get_args(["--help"])
    for flag in {*parser_flags, "--masks", "--labelme", "--coco", "--window", "--two-classes"}:
        assert flag in help_text.getvalue()
