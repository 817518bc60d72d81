"""download.py --coco, --via, --yolo and --arrays: against pycocotools and counts by hand."""

import json
import math
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
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
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

# ---- COCO --------------------------------------------------------------------------------------

COCO = ("--coco", "c.json", "images", *ALL)
ONE = [(0, 2, polygon(3, 4, 6))]
(OUTLINE,) = polygon(3, 4, 6)["segmentation"]
POINTS = np.reshape(OUTLINE, (4, 2)).tolist()
SLIVER = [20.1, 3, 20.2, 9, 20.3, 3]


def write_coco(record=(), annotation=(), more=(), **content):
    """Write c.json of a.png and b.png, a square each, with changes of the first or more."""
    coco_file([*ONE, (1, 2, polygon(8, 4, 6))], ["a.png", "b.png"])
    usual = json.loads(Path("c.json").read_text())
    usual["images"][0].update(record)
    usual["annotations"][0].update(annotation)
    usual["annotations"] += [{"id": 9, "image_id": 11, "category_id": 2, **own} for own in more]
    Path("c.json").write_text(json.dumps(usual | content))


def test_coco_polygons_and_run_lengths(here):
    blob = labels(3) == 1
    rle = coco_mask.encode(np.asfortranarray(blob, np.uint8))["counts"].decode()
    flat = blob.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    counts = [0] * int(flat[0]) + np.diff(edges).tolist()
    uneven = [[1.3, 2.7, 30.2, 5.5, 17.9, 25.1]]
    annotations = [
        (0, 2, {"segmentation": [OUTLINE, *polygon(20, 4, 6)["segmentation"]]}),
        (0, 3, {"segmentation": {"size": [30, 40], "counts": rle}}),
        (1, 2, {"segmentation": {"size": [30, 40], "counts": counts}, "iscrowd": 1}),
        (1, 3, {"segmentation": uneven}),
    ]
    coco_file(annotations, ["a.png", "b.png", "empty.png"])
    out = run_download(*COCO)
    assert "k3 (2), k2 (2)" in out and "k0 (0)" in out and class_names() == ["k3", "k2"]
    got = stored()
    assert_array_equal(got["a"]["k2"], square_mask(3, 4, 6, 6) | square_mask(20, 4, 6, 6))
    assert_array_equal(got["a"]["k3"], blob)
    assert_array_equal(got["b"]["k2"], blob)
    decoded = coco_mask.decode(coco_mask.frPyObjects(uneven, 30, 40))[..., 0]
    assert_array_equal(got["b"]["k3"], decoded == 1)
    assert got["empty"] == {}
    run_download(*COCO, "--force", "--classes", "k2")
    assert set(stored()["a"]) == {"k2"}
    refuse_download(*COCO, "--force", "--classes", "k", words=["'k'", "k0"])


def test_coco_boxes(here):
    coco_file([*ONE, (0, 3, {"segmentation": [], "bbox": [20, 5, 7, 9]})])
    refuse_download(*COCO, words=["c.json", "1 of 2", "annotation 1", "--boxes"])
    run_download(*COCO, "--boxes")
    assert_array_equal(stored()["a"]["k3"], square_mask(20, 5, 7, 9))


def test_coco_annotations_of_a_picture_before_turning(here):
    coco_file(ONE)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    save(photo(), "images/a.png", exif=exif)
    run_download(*COCO)
    assert_array_equal(stored()["a"]["k2"], np.rot90(square_mask(3, 4, 6, 6), -1))


def test_coco_images_are_found(here):
    """By their path, else by their name, in any Unicode form, and not outside the folder."""
    nfc, nfd = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))
    names = ["images/1/a.png", "/data/d.png", "../../c.png", "upload\\b.png", "e.png"]
    coco_file(ONE, [*names, f"p/{nfc}.png", f"q/{nfd}.png"])
    for seed, form, place in ((5, nfc, f"p/{nfd}.png"), (6, nfd, f"q/{nfc}.png")):
        Path(f"images/{form}.png").unlink()
        save(photo(seed), f"images/{place}")
    save(photo(4), "images/sub/e.png")
    save(photo(99), "c.png")
    run_download(*COCO)
    expected = {"c": 2, f"p_{nfc}": 5, f"q_{nfc}": 6}
    assert list(stored()) == sorted(["a", "b", "d", "e", *expected])
    for name, seed in expected.items():
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), photo(seed))
    save(photo(9), f"images/p/{nfc}.png")  # two of them: the one that is named exactly
    run_download(*COCO, "--force")
    assert_array_equal(read_rgb(f"dataset/train/p_{nfc}.png"), photo(9))
    save(photo(5), "images/sub/a.png")
    refuse_download(*COCO, "--force", words=["c.json", "images/a.png", "images/sub/a.png"])


def test_coco_missing_images(here):
    coco_file(ONE, ["a.png", "b.png", "c.png"])
    Path("images/b.png").unlink()
    refuse_download(*COCO, words=["c.json", "1 of 3", "'b.png'", "--skip-unpaired"])
    assert "left out: 1 of 3" in run_download(*COCO, "--skip-unpaired")
    assert set(stored()) == {"a", "c"}
    coco_file(ONE, ["a.png", "x/a.png"])
    refuse_download(*COCO, "--force", words=["c.json", "a.png"])


FORGIVEN = {  # what `write_coco` changes, how many things are counted in a line
    "ids as text": ({"annotation": {"image_id": "10", "category_id": "2"}}, 2),
    "ids as fractions": ({"annotation": {"image_id": 10.0}}, 1),
    "text in the list": ({"record": {"id": "10"}}, 1),
    "no category": ({"annotation": {"category_id": None}, "categories": [{"id": 2}]}, 1),
    "flat": ({"annotation": {"segmentation": OUTLINE}}, 1),
    "nested": ({"annotation": {"segmentation": [[[OUTLINE]]]}}, 1),
    "points": ({"annotation": {"segmentation": POINTS}}, 1),
    "nested points": ({"annotation": {"segmentation": [POINTS]}}, 1),
    "no point": ({"annotation": {"segmentation": [OUTLINE, []]}}, 1),
    "one point": ({"annotation": {"segmentation": [[5, 5], OUTLINE]}}, 1),
    "two points": ({"annotation": {"segmentation": [OUTLINE, [5, 5, 6, 6], [1]]}}, 2),
    "no outline": ({"more": [{"segmentation": [[]]}]}, 1),
    "a box of no size": ({"more": [{"segmentation": [], "bbox": [0, 0, 0, 0]}]}, 1),
    "no size": ({"record": {"width": 0, "height": 0}}, 1),
    "null": ({"record": {"width": None}}, 1),
    "64.0": ({"record": {"width": 40.0, "height": 30.0}}, 1),
    "size as text": ({"record": {"width": "40", "height": "30"}}, 1),
    "encoded": ({"record": {"file_name": "x%2fa.png"}}, 1),
    "address": ({"record": {"file_name": "https://x.org/y/a.png?t=1"}}, 1),
    "Label Studio": ({"record": {"file_name": "/data/local-files/?d=b%5Ca.png"}}, 1),
    "no pixel": ({"more": [{"segmentation": [SLIVER]}]}, 1),
}


@pytest.mark.parametrize("case", FORGIVEN)
def test_what_others_write_is_read_and_counted(here, case):
    changes, count = FORGIVEN[case]
    write_coco(**changes)
    notes = [line for line in run_download(*COCO).splitlines() if line.startswith("note: ")]
    assert notes and all(line.startswith(f"note: {count} ") for line in notes)
    for name, x in {"a": 3, "b": 8}.items():
        (mask,) = stored()[name].values()
        assert_array_equal(mask, square_mask(x, 4, 6, 6))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings_are_read_or_named(here, encoding):
    coco_file([*ONE, (0, 3, polygon(20, 4, 6))])
    name = "lésion-äpfel" if encoding == "latin-1" else "肿瘤"
    text = Path("c.json").read_text().replace('"k2"', f'"{name}"')
    Path("c.json").write_text(text, encoding=encoding)
    if encoding == "latin-1":  # whose letters GB18030 would take for rare characters
        refuse_download(*COCO, words=["c.json", "UTF-8"])
        return
    assert ("GB18030" in run_download(*COCO)) == (encoding == "gb18030")
    assert class_names() == ["k3", name]


NO_NUMBERS = [{"x": 3, "y": 4}, {"x": 9, "y": 4}, {"x": 9, "y": 9}]
FRACTIONS = [{"id": 1, "image_id": 10, "category_id": 2, "segmentation": [[0.1, 0.1, 0.2] * 2]}]
BAD_COCO = {  # what `write_coco` changes, what the message names
    "no images": ({"images": [], "annotations": []}, "c.json"),
    "no list": ({"images": None}, "c.json"),
    "no annotations": ({"annotations": []}, "c.json"),
    "no category": ({"categories": []}, "category_id 2"),
    "no text": ({"categories": [{"id": 2, "name": "\ud800"}]}, "\\ud800"),
    "nothing to draw": ({"annotation": {"segmentation": None}}, "annotation 0"),
    "box": ({"annotation": {"segmentation": None, "bbox": [1, 2, "x", 4]}}, "annotation 0"),
    "no numbers": ({"annotation": {"segmentation": NO_NUMBERS}}, "annotation 0 of a.png"),
    "far": ({"annotation": polygon(1e9, 0, 5)}, "annotation 0 of a.png"),
    "size": ({"record": {"width": 30, "height": 40}}, "30x40"),
    "terabytes": ({"record": {"width": 10**9}}, "1000000000x30"),
    "runs": (
        {"annotation": {"segmentation": {"size": [30, 40], "counts": [7]}}},
        "annotation 0 of a.png",
    ),
    "no name": ({"record": {"file_name": None}}, "images[0]"),
    "fractions": ({"annotations": FRACTIONS}, "fractions"),
    "no pixel": ({"annotations": [{**FRACTIONS[0], "segmentation": [SLIVER]}]}, "cover no"),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_bad_coco_is_one_line(here, case):
    changes, word = BAD_COCO[case]
    write_coco(**changes)
    refuse_download(*COCO, "--boxes", words=["c.json", word])


def test_files_that_are_not_there_or_not_json_are_one_line(here):
    coco_file(ONE)
    refuse_download("--coco", "none.json", "images", words=["none.json"])
    refuse_download("--coco", "c.json", "nowhere", words=["nowhere"])
    Path("c.json").write_text("[")
    refuse_download(*COCO, words=["c.json"])


# ---- VIA ---------------------------------------------------------------------------------------

VIA = ("--via", "v.json", "images", *ALL)
CORNERS = {"all_points_x": [3, 9, 9, 3], "all_points_y": [4, 4, 10, 10]}  # 6 x 6 pixels
RECT = {"name": "rect", "x": 20, "y": 5, "width": 7, "height": 9}


def region(shape, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def via_file(regions_of, project=True):
    """Write v.json and images/; regions_of: {file name: regions}."""
    entries = {}
    for number, (name, regions) in enumerate(regions_of.items()):
        save(photo(number), f"images/{name}")
        entries[f"{name}-1"] = {"filename": name, "size": -1, "regions": regions}
    content = {"_via_settings": {}, "_via_img_metadata": entries} if project else entries
    Path("v.json").write_text(json.dumps(content))


def ellipse(x, y, rx, ry, theta):
    """Pixels whose centre is in an ellipse, and those near its edge."""
    rows, columns = np.mgrid[: PHOTO[1], : PHOTO[0]] + 0.5
    along = (columns - x) * math.cos(theta) + (rows - y) * math.sin(theta)
    across = (rows - y) * math.cos(theta) - (columns - x) * math.sin(theta)
    distance = np.hypot(along / rx, across / ry)
    return distance < 1, abs(distance - 1) * min(rx, ry) < 0.8


def test_via_shapes_and_classes(here):
    shapes = {
        "polygon": {"name": "polygon", **CORNERS},
        "line": {"name": "polyline", **CORNERS},
        "box": RECT,
        "circle": {"name": "circle", "cx": 20, "cy": 15, "r": 10},
        "oval": {"name": "ellipse", "cx": 20, "cy": 15, "rx": 12, "ry": 5, "theta": 0.6},
        "dot": {"name": "point", "cx": 3, "cy": 3},
    }
    several = [region(own, kind=name) for name, own in shapes.items()]
    via_file({"a.png": several, "b.png": [region(RECT, kind="")], "empty.png": None})
    out = run_download(*VIA)
    assert "1 regions without an area" in out and "1 regions without kind" in out
    assert class_names() == ["box", "circle", "line", "oval", "polygon"]
    got = stored()
    assert got["b"] == got["empty"] == {}
    assert_array_equal(got["a"]["box"], square_mask(20, 5, 7, 9))
    for name in ("polygon", "line"):
        assert_array_equal(got["a"][name], square_mask(3, 4, 6, 6))
    for name, own in {"circle": (10, 10, 0), "oval": (12, 5, 0.6)}.items():
        inside, near = ellipse(20, 15, *own)
        assert (got["a"][name] == inside)[~near].all()
        assert abs(got["a"][name].sum() / (math.pi * own[0] * own[1]) - 1) < 0.03


def test_via_of_version_1_without_attributes_and_checkboxes(here):
    via_file({"a.png": {"0": region(RECT), "1": region({"name": "polygon", **CORNERS})}}, False)
    run_download(*VIA)
    both = square_mask(20, 5, 7, 9) | square_mask(3, 4, 6, 6)
    assert_array_equal(stored()["a"]["foreground"], both)
    kinds = {"cell": True, "dead": True, "other": False}
    via_file({"a.png": [region(RECT, kind=kinds, reader="x")]})
    refuse_download(*VIA, "--force", words=["v.json", "kind, reader"])
    run_download(*VIA[:3], "kind", *ALL, "--force")
    assert class_names() == ["cell", "dead"]
    assert_array_equal(stored()["a"]["cell"], stored()["a"]["dead"])


BAD_VIA = {  # the content, or a shape; what the message names
    "COCO": ({"images": [], "annotations": []}, "v.json"),
    "text": ({**RECT, "x": "a"}, "a.png"),
    "lengths": ({"name": "polygon", **CORNERS, "all_points_x": [1]}, "a.png"),
    "shape": ({"name": "star"}, "star"),
    "elsewhere": ({"a": {"filename": "b.png", "regions": []}}, "b.png"),
}


@pytest.mark.parametrize("case", BAD_VIA)
def test_bad_via_is_one_line(here, case):
    content, word = BAD_VIA[case]
    via_file({"a.png": [region(content)]}, False)
    if "name" not in content:
        Path("v.json").write_text(json.dumps(content))
    refuse_download(*VIA, words=["v.json", word])


# ---- YOLO --------------------------------------------------------------------------------------

YOLO = ("--yolo", "y")
SQUARE = "0 0.075 0.1 0.225 0.1 0.225 0.3 0.075 0.3"  # of 40 x 30: from (3, 3) to (9, 9)
TRIANGLE = "1 0.5 0.1 0.9 0.1 0.9 0.9"  # corners (20, 3), (36, 3), (36, 27)
NAMES = "path: ../x\nnc: 2\nnames: ['cell', 'spot']\n"


def yolo(files, names=NAMES):
    """Write y/: {path of an image without suffix: lines of its labels or None}."""
    for number, (place, lines) in enumerate(files.items()):
        save(photo(number), f"y/{place}.png")
        path = Path(f"y/{place}.txt".replace("images", "labels"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            path.write_text("\n".join(lines))
    Path("y/data.yaml").write_text(names)


@pytest.mark.parametrize("names", [NAMES, "names:\n  0: cell\n  1: spot\n", None])
def test_yolo_outlines_and_boxes(here, names):
    files = {"images/a": [SQUARE, TRIANGLE], "images/b": [], "images/c": None}
    yolo({**files, "images/d": ["1 0.5 0.5 0.1 0.2"]}, names or NAMES)
    if not names:  # as Label Studio writes them
        Path("y/data.yaml").unlink()
        refuse_download(*YOLO, *ALL, words=["y:", "data.yaml"])
        Path("y/classes.txt").write_text("cell\nspot")
    refuse_download(*YOLO, *ALL, words=["y:", "--boxes"])
    assert "1 of 4 images have no labels" in run_download(*YOLO, *ALL, "--boxes")
    got = stored()
    assert class_names() == ["cell", "spot"] and got["b"] == got["c"] == {}
    assert_array_equal(got["a"]["cell"], square_mask(3, 3, 6, 6))
    assert_array_equal(got["d"]["spot"], square_mask(18, 12, 4, 6))
    drawn = Image.new("L", PHOTO)
    ImageDraw.Draw(drawn).polygon([(20, 3), (35, 3), (35, 26)], fill=1)
    assert (got["a"]["spot"] != np.asarray(drawn)).sum() <= 24  # the slanted side
    assert abs(got["a"]["spot"].sum() - 16 * 24 / 2) <= 16


@pytest.mark.parametrize("layout", ["{}/images/{}", "images/{}/{}"])
def test_yolo_splits_are_kept_and_missing_ones_dealt(here, layout):
    places = [("train", f"t{n}") for n in range(20)] + [("val", "v")]
    yolo({layout.format(*place): [SQUARE, TRIANGLE] for place in places})
    assert "no test split" in run_download(*YOLO)
    assert set(stored("valid")) == {"v"}
    assert len(stored("test")) == 3 and len(stored("train")) == 17  # 15 % of 20
    assert_array_equal(read_rgb("dataset/valid/v.png"), photo(20))
    run_download(*YOLO, "--split", 50, 50, 0, "--data", "anew")
    assert len(stored("train", "anew")) in (10, 11)


def test_variants_of_one_picture_stay_in_one_split(here):
    yolo({f"images/{number % 4}_png.rf.{number}a": [SQUARE] for number in range(12)})
    assert "groups: 4 " in run_download(*YOLO, "--split", 50, 25, 25)
    for split in ("train", "valid", "test"):
        stems = Counter(name.split("_")[0] for name in stored(split))
        assert set(stems.values()) == {3}


BAD_YOLO = {  # lines of the labels, data.yaml, what the message names
    "no such name": (["2" + SQUARE[1:]], NAMES, "labels/a.txt: line 1"),
    "pixels": ([SQUARE, "0 3 3 9 3 9 9"], NAMES, "labels/a.txt: line 2"),
    "NaN": (["0 nan 0.1 0.2 0.1 0.2 0.2"], NAMES, "labels/a.txt: line 1"),
    "text": (["cell 0.1 0.1"], NAMES, "labels/a.txt: line 1"),
    "odd": ([SQUARE + " 0.1"], NAMES, "labels/a.txt: line 1"),
    "no names": ([SQUARE], "nc: 2\n", "data.yaml"),
    "no YAML": ([SQUARE], "names: [", "data.yaml"),
    "no labels": (None, NAMES, "labels/a.txt"),
}


@pytest.mark.parametrize("case", BAD_YOLO)
def test_bad_yolo_is_one_line(here, case):
    lines, names, word = BAD_YOLO[case]
    yolo({"images/a": lines}, names)
    refuse_download(*YOLO, *ALL, words=[word])


# ---- Roboflow's masks, arrays --------------------------------------------------------------------


def label_map(*squares):
    values = np.zeros(PHOTO[::-1])
    for value, own in squares:
        values[square_mask(*own)] = value
    return values


TWO = ((3, 4, 6, 6), (20, 5, 7, 9))


def test_names_of_roboflow_masks(here):
    for number in range(3):
        save(photo(number), f"r/{number}_jpg.rf.a{number}.jpg")
        mask = label_map((1, TWO[0]), (2, TWO[1])).astype(np.uint8)
        save(Image.fromarray(mask), f"r/{number}_jpg.rf.a{number}_mask.png")
    Path("r/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cell\n2, spot, dark\n")
    run_download("--masks", "r/{id}.jpg", "r/{id}_mask.png", *ALL, "--classes", "r/_classes.csv")
    assert class_names() == ["cell", "spot, dark"]
    for own in stored().values():
        for mask, square in zip(own.values(), TWO, strict=True):
            assert_array_equal(mask, square_mask(*square))


def arrays(name, values, labels, keys=("image", "label")):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(name, **dict(zip(keys, (values, labels), strict=True)))


def test_npz_files_of_cases(here):
    """Floating point and one window for all; the slices of a case stay together."""
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(PHOTO[::-1])
    for number in range(12):
        name = f"z/case{number // 3:04}_slice{number:03}.npz"
        arrays(name, ramp * (1 + number % 2), label_map((3, TWO[0]), (7, TWO[1])))
    run_download("--arrays", "z", "--split", 50, 25, 25, "--classes", "liver,spleen")
    seen = {}
    for split in ("train", "valid", "test"):
        for stem, masks in stored(split).items():
            assert seen.setdefault(stem[:8], split) == split
            for name, square in zip(("liver", "spleen"), TWO, strict=True):
                assert_array_equal(masks[name], square_mask(*square))
            got = read_rgb(f"dataset/{split}/{stem}.png")[..., 0] / 255
            low, high = np.percentile([ramp, 2 * ramp], (0.5, 99.5))
            wanted = np.clip((ramp * (1 + int(stem[-1]) % 2) - low) / (high - low), 0, 1)
            assert abs(got - wanted).max() < 0.51 / 255
    assert len(seen) == 4
    refuse_download("--arrays", "z", "--force", "--classes", "liver", words=["3, 7"])


def test_npz_files_of_colour(here):
    arrays("z/x.npz", np.asarray(photo()), label_map((1, TWO[0])) > 0, ("img", "mask"))
    run_download("--arrays", "z", *ALL)
    assert_array_equal(read_rgb("dataset/train/x.png"), photo())
    assert_array_equal(stored()["x"]["foreground"], square_mask(*TWO[0]))


BAD_NPZ = {
    "other keys": (("imgs", "label"), label_map()),
    "another size": (("image", "label"), label_map().T),
    "fractions": (("image", "label"), label_map() + 0.5),
    "objects": (("image", "label"), np.array([{}])),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_bad_npz_is_one_line(here, case):
    keys, labels = BAD_NPZ[case]
    arrays("z/x.npz", np.asarray(photo()), labels, keys)
    refuse_download("--arrays", "z", *ALL, words=["z/x.npz"])


def test_figshare_brain_tumours(here, monkeypatch):
    """As MATLAB stores them: columns first, text as numbers."""
    h5py, names = pytest.importorskip("h5py"), ["meningioma", "glioma", "pituitary"]
    Path("m").mkdir()
    pixels, kinds = np.arange(1200, dtype=np.int16).reshape(PHOTO[::-1]), [1, 2, 3, 2, 1, 3]
    for number, kind in enumerate(kinds):
        patient = np.array([[ord(sign)] for sign in f"MR0{number // 2}"], np.uint16)
        with h5py.File(f"m/{number}.mat", "w") as file:
            data = {"image": pixels.T, "tumorMask": square_mask(3, 4, 6, 9).T.astype(np.uint8)}
            for key, value in {**data, "label": [[float(kind)]], "PID": patient}.items():
                file[f"cjdata/{key}"] = value
    run_download("--arrays", "m", "--split", 34, 33, 33)
    assert class_names() == names
    for split in ("train", "valid", "test"):
        first, second = sorted(stored(split))
        assert int(first) // 2 == int(second) // 2
        for stem, masks in stored(split).items():
            ((name, mask),) = masks.items()
            assert name == names[kinds[int(stem)] - 1]
            assert_array_equal(mask, square_mask(3, 4, 6, 9))
            grey = read_rgb(f"dataset/{split}/{stem}.png")[..., 0]
            assert (np.diff(grey.astype(int).ravel()) >= 0).all() and grey.max() == 255
    with h5py.File("m/0.mat", "w") as file:
        file["x"] = 1
    refuse_download("--arrays", "m", "--force", words=["m/0.mat", "cjdata"])
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse_download("--arrays", "m", "--force", words=["m/0.mat", "pip install h5py"])
