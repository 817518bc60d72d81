"""download.py --coco: against pycocotools and masks drawn by hand."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    class_names,
    coco_file,
    labels,
    photo,
    polygon,
    read_rgb,
    refuse_download,
    run_download,
    save,
    square_mask,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image
from pycocotools import mask as coco_mask

COCO = ("--coco", "c.json", "images", *ALL)
ONE = [(0, 2, polygon(3, 4, 6))]
NFC, NFD = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))


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
    out = run_download(*COCO)
    assert "outlines: k3 (2), k2 (3)" in out and "k0 (0)" in out
    assert class_names() == ["k3", "k2"]
    got = stored()
    assert_array_equal(got["a"]["k2"], square_mask(3, 4, 6, 6) | square_mask(20, 4, 6, 6))
    assert_array_equal(got["a"]["k3"], blob)
    assert_array_equal(got["b"]["k2"], blob)
    decoded = coco_mask.decode(coco_mask.frPyObjects(uneven["segmentation"], 30, 40))[..., 0]
    assert_array_equal(got["b"]["k3"], decoded == 1)
    assert got["empty"] == {}
    run_download(*COCO, "--force", "--classes", "k2")
    assert set(stored()["a"]) == {"k2"}
    refuse_download(*COCO, "--force", "--classes", "k", words=["'k'", "k0"])


def test_coco_boxes(here):
    coco_file([*ONE, (0, 3, {"segmentation": [], "bbox": [20, 5, 7, 9]})])
    refuse_download(*COCO, words=["c.json", "1 of 2", "annotation 1", "--boxes"])
    assert "boxes: 1 annotations" in run_download(*COCO, "--boxes")
    assert_array_equal(stored()["a"]["k3"], square_mask(20, 5, 7, 9))


def test_coco_annotations_of_a_picture_before_turning(here):
    coco_file(ONE)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    save(photo(), "images/a.png", exif=exif)
    run_download(*COCO)
    assert_array_equal(stored()["a"]["k2"], np.rot90(square_mask(3, 4, 6, 6), -1))


def test_coco_file_names(here):
    names = ["images/1/a.png", "upload\\b.png", "../../c.png", "/data/d.png", "e.png"]
    coco_file(ONE, names)
    save(photo(4), "images/sub/e.png")
    save(photo(99), "c.png")
    run_download(*COCO)
    assert set(stored()) == {"a", "b", "c", "d", "e"}
    assert_array_equal(read_rgb("dataset/train/c.png"), photo(2))  # not the one outside
    save(photo(5), "images/sub/a.png")
    refuse_download(*COCO, "--force", words=["c.json", "images/a.png", "images/sub/a.png"])


def test_images_of_a_coco_file_are_found_in_any_unicode_form(here):
    coco_file(ONE, [f"p/{NFC}.png", f"q/{NFD}.png"])
    for seed, form, place in ((5, NFC, f"p/{NFD}.png"), (6, NFD, f"q/{NFC}.png")):
        Path(f"images/{form}.png").unlink()
        save(photo(seed), f"images/{place}")
    run_download(*COCO)
    assert_array_equal(read_rgb(f"dataset/train/p_{NFC}.png"), photo(5))
    assert_array_equal(read_rgb(f"dataset/train/q_{NFC}.png"), photo(6))
    save(photo(9), f"images/p/{NFC}.png")  # two of them: the one that is named exactly
    run_download(*COCO, "--force")
    assert_array_equal(read_rgb(f"dataset/train/p_{NFC}.png"), photo(9))


def test_coco_missing_images(here):
    coco_file(ONE, ["a.png", "b.png", "c.png"])
    Path("images/b.png").unlink()
    refuse_download(*COCO, words=["c.json", "1 of 3", "'b.png'", "--skip-unpaired"])
    assert "left out: 1 of 3" in run_download(*COCO, "--skip-unpaired")
    assert set(stored()) == {"a", "c"}
    coco_file(ONE, ["a.png", "x/a.png"])
    refuse_download(*COCO, "--force", words=["two records", "a.png"])


def change_record(**fields):
    return lambda content: content["images"][0].update(fields)


def change_annotation(**fields):
    return lambda content: content["annotations"][0].update(fields)


def outline(make):
    """A change of the outline [x1, y1, ...] of the first annotation."""

    def change(content):
        annotation = content["annotations"][0]
        annotation["segmentation"] = make(annotation["segmentation"][0])

    return change


def no_category(content):
    content["categories"] = [{"id": 2, "name": "k2"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = None


def add_annotation(**fields):
    own = {"id": 9, "image_id": 11, "category_id": 2}
    return lambda content: content["annotations"].append({**own, **fields})


def scaled(x, y):
    def change(content):
        for annotation in content["annotations"]:
            (values,) = annotation["segmentation"]
            own = [value / (y if place % 2 else x) for place, value in enumerate(values)]
            annotation["segmentation"] = [own]

    return change


FORGIVEN = {  # change of a file with two annotations, how many things are counted in a line
    "ids as text": (change_annotation(image_id="10", category_id="2"), "2 "),
    "ids as fractions": (change_annotation(image_id=10.0), "1 "),
    "text in the list": (change_record(id="10"), "1 "),
    "no category": (no_category, "2 "),
    "flat": (outline(lambda own: own), "1 "),
    "nested": (outline(lambda own: [[[own]]]), "1 "),
    "points": (outline(lambda own: [own[i : i + 2] for i in range(0, 8, 2)]), "1 "),
    "nested points": (outline(lambda own: [[own[i : i + 2] for i in range(0, 8, 2)]]), "1 "),
    "no point": (outline(lambda own: [own, []]), "1 "),
    "one point": (outline(lambda own: [[5, 5], own]), "1 "),
    "two points": (outline(lambda own: [own, [5, 5, 6, 6], [1]]), "2 "),
    "no outline": (add_annotation(segmentation=[[]]), "1 "),
    "a box of no size": (add_annotation(segmentation=[], bbox=[0, 0, 0, 0]), "1 "),
    "no size": (change_record(width=0, height=0), "1 "),
    "null": (change_record(width=None, height=30), "1 "),
    "64.0": (change_record(width=40.0, height=30.0), "1 "),
    "size as text": (change_record(width="40", height="30"), "1 "),
    "encoded": (change_record(file_name="x%2fa.png"), "1 "),
    "address": (change_record(file_name="https://x.org/y/a.png?t=1"), "1 "),
    "Label Studio": (change_record(file_name="/data/local-files/?d=b%5Ca.png"), "1 "),
    "no pixel": (add_annotation(segmentation=[[20.1, 3, 20.2, 9, 20.3, 3]]), "1 "),
}


@pytest.mark.parametrize("case", FORGIVEN)
def test_what_others_write_is_read_and_counted(here, case):
    change, count = FORGIVEN[case]
    coco_file([*ONE, (1, 2, polygon(8, 4, 6))], ["a.png", "b.png"])
    content = json.loads(Path("c.json").read_text())
    change(content)
    Path("c.json").write_text(json.dumps(content))
    notes = [line for line in run_download(*COCO).splitlines() if line.startswith("note: ")]
    assert notes and all(line.startswith(f"note: {count}") for line in notes)
    assert_array_equal(stored()["a"]["k2"], square_mask(3, 4, 6, 6))
    assert_array_equal(stored()["b"]["k2"], square_mask(8, 4, 6, 6))


def test_what_holds_no_numbers_is_no_fragment(here):
    points = {"segmentation": [{"x": 3, "y": 4}, {"x": 9, "y": 4}, {"x": 9, "y": 9}]}
    coco_file([*ONE, *ONE, (0, 2, points)])
    refuse_download(*COCO, words=["annotation 2 of a.png"])


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_are_read_or_named(here, encoding):
    coco_file([*ONE, (0, 3, polygon(20, 4, 6))])
    name = "lésion-äpfel" if encoding == "latin-1" else "肿瘤"
    text = Path("c.json").read_text().replace('"k2"', f'"{name}"')
    Path("c.json").write_text(text, encoding=encoding)
    if encoding == "latin-1":  # whose letters GB18030 would take for rare characters
        refuse_download(*COCO, words=["c.json", "UTF-8"])
        return
    out = run_download(*COCO)
    assert ("GB18030" in out) == (encoding == "gb18030")
    assert class_names() == ["k3", name]


BAD_COCO = {  # change of the content, what the message names
    "no images": (lambda content: content.update(images=[], annotations=[]), "c.json"),
    "no annotations": (lambda content: content.update(annotations=[]), "c.json"),
    "no category": (lambda content: content.update(categories=[]), "category_id 2"),
    "nothing to draw": (lambda content: content["annotations"][0].pop("segmentation"), "0"),
    "far": (change_annotation(**polygon(1e9, 0, 5)), "annotation 0 of a.png"),
    "size": (change_record(width=30, height=40), "30x40"),
    "terabytes": (change_record(width=10**9), "1000000000x30"),
    "runs": (
        change_annotation(segmentation={"size": [30, 40], "counts": [7]}),
        "annotation 0 of a.png",
    ),
    "hostile": (change_record(file_name="../../etc/passwd"), "passwd"),
    "no name": (change_record(file_name=None), "images[0]"),
    "fractions": (scaled(40, 30), "fractions"),
    "no pixel": (change_annotation(segmentation=[[20.1, 3, 20.2, 9, 20.3, 3]]), "cover no"),
    "box": (change_annotation(segmentation=None, bbox=[1, 2, "x", 4]), "annotation 0 of a.png"),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_bad_coco_is_one_line(here, case):
    change, word = BAD_COCO[case]
    coco_file(ONE)
    content = json.loads(Path("c.json").read_text())
    change(content)
    Path("c.json").write_text(json.dumps(content))
    refuse_download(*COCO, "--boxes", words=["c.json", word])


@pytest.mark.parametrize("content", ["[", "[]"])
def test_files_that_are_not_coco_are_one_line(here, content):
    coco_file(ONE)
    Path("c.json").write_text(content)
    refuse_download(*COCO, words=["c.json"])


def test_no_coco_file(here):
    coco_file(ONE)
    refuse_download("--coco", "none.json", "images", words=["none.json"])
    refuse_download("--coco", "c.json", "nowhere", words=["nowhere", "no such folder"])
