"""download.py --via, --yolo and --arrays: against pixel counts by hand and Pillow."""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    class_names,
    photo,
    read_rgb,
    refuse_download,
    run_download,
    save,
    square_mask,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageDraw

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
        entries[f"{name}-1"]["file_attributes"] = {}
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
    healthy = [region(RECT, kind="")]
    via_file({"a.png": several, "b.png": healthy, "empty.png": None})
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
    run_download(*VIA, "--force", "--classes", "box")
    assert class_names() == ["box"]


def test_via_annotations_alone_of_version_1_without_attributes(here):
    via_file({"a.png": {"0": region(RECT), "1": region({"name": "polygon", **CORNERS})}}, False)
    run_download(*VIA)
    both = square_mask(20, 5, 7, 9) | square_mask(3, 4, 6, 6)
    assert_array_equal(stored()["a"]["foreground"], both)


def test_via_attributes_and_checkboxes(here):
    kinds = {"cell": True, "dead": True, "other": False}
    via_file({"a.png": [region(RECT, kind=kinds, reader="x")]})
    refuse_download(*VIA, words=["v.json", "kind, reader"])
    run_download(*VIA[:3], "kind", *ALL)
    assert class_names() == ["cell", "dead"]
    assert_array_equal(stored()["a"]["cell"], stored()["a"]["dead"])


BAD_VIA = {
    "COCO": ({"images": [], "annotations": []}, "VIA"),
    "no list": ([1], "VIA"),
    "text": ({"a": {"filename": "a.png", "regions": [region({**RECT, "x": "1"})]}}, "a.png"),
    "lengths": (
        {"a": {"filename": "a.png", "regions": [region({**CORNERS, "all_points_x": [1]})]}},
        "a.png",
    ),
    "shape": ({"a": {"filename": "a.png", "regions": [region({"name": "star"})]}}, "star"),
    "elsewhere": ({"a": {"filename": "b.png", "regions": []}}, "b.png"),
}


@pytest.mark.parametrize("case", BAD_VIA)
def test_bad_via_is_one_line(here, case):
    save(photo(), "images/a.png")
    content, word = BAD_VIA[case]
    Path("v.json").write_text(json.dumps(content))
    refuse_download(*VIA, words=["v.json", word])


# ---- YOLO --------------------------------------------------------------------------------------

SQUARE = "0 0.075 0.1 0.225 0.1 0.225 0.3 0.075 0.3"  # of 40 x 30: from (3, 3) to (9, 9)
TRIANGLE = "1 0.5 0.1 0.9 0.1 0.9 0.9"  # corners (20, 3), (36, 3), (36, 27)
NAMES = "path: ../x\nnc: 2\nnames: ['cell', 'spot']\n"


def yolo(files, names=NAMES, folder="y"):
    """Write a folder: {path of an image without suffix: lines of its labels or None}."""
    for number, (place, lines) in enumerate(files.items()):
        save(photo(number), f"{folder}/{place}.png")
        path = Path(f"{folder}/{place}.txt".replace("images", "labels"))
        path.parent.mkdir(parents=True, exist_ok=True)
        if lines is not None:
            path.write_text("\n".join(lines))
    Path(folder, "data.yaml").write_text(names)


@pytest.mark.parametrize("names", [NAMES, "names:\n  0: cell\n  1: spot\n"])
def test_yolo_outlines(here, names):
    yolo({"images/a": [SQUARE, TRIANGLE], "images/b": [], "images/c": None}, names)
    assert "1 of 3 images have no labels" in run_download("--yolo", "y", *ALL)
    got = stored()
    assert class_names() == ["cell", "spot"] and got["b"] == got["c"] == {}
    assert_array_equal(got["a"]["cell"], square_mask(3, 3, 6, 6))
    drawn = Image.new("L", PHOTO)
    ImageDraw.Draw(drawn).polygon([(20, 3), (35, 3), (35, 26)], fill=1)
    assert (got["a"]["spot"] != np.asarray(drawn)).sum() <= 24  # the slanted side
    assert abs(got["a"]["spot"].sum() - 16 * 24 / 2) <= 16


def test_yolo_names_of_label_studio(here):
    yolo({"images/a": [SQUARE, TRIANGLE]})
    Path("y/data.yaml").unlink()
    refuse_download("--yolo", "y", *ALL, words=["y:", "data.yaml"])
    Path("y/classes.txt").write_text("lung\nheart")
    run_download("--yolo", "y", *ALL)
    assert class_names() == ["lung", "heart"]


def test_yolo_boxes(here):
    yolo({"images/a": [SQUARE, "1 0.5 0.5 0.1 0.2"]})
    refuse_download("--yolo", "y", *ALL, words=["y:", "--boxes"])
    run_download("--yolo", "y", *ALL, "--boxes")
    assert_array_equal(stored()["a"]["spot"], square_mask(18, 12, 4, 6))


@pytest.mark.parametrize("layout", ["{}/images/{}", "images/{}/{}"])
def test_yolo_splits_are_kept_and_missing_ones_dealt(here, layout):
    places = [("train", f"t{n}") for n in range(20)] + [("val", "v")]
    yolo({layout.format(*place): [SQUARE, TRIANGLE] for place in places})
    assert "no test split" in run_download("--yolo", "y")
    assert set(stored("valid")) == {"v"}
    assert len(stored("test")) == 3 and len(stored("train")) == 17  # 15 % of 20
    (image,) = Path("dataset/valid").glob("v.png")
    assert_array_equal(read_rgb(image), photo(20))
    run_download("--yolo", "y", "--split", 50, 50, 0, "--force", "--data", "anew")
    assert len(stored("train", "anew")) in (10, 11)


def test_variants_of_one_picture_stay_in_one_split(here):
    yolo({f"images/{number % 4}_png.rf.{number}a": [SQUARE] for number in range(12)})
    assert "groups: 4 " in run_download("--yolo", "y", "--split", 50, 25, 25)
    for split in ("train", "valid", "test"):
        stems = Counter(name.split("_")[0] for name in stored(split))
        assert set(stems.values()) == {3}


BAD_YOLO = {  # lines of the labels, data.yaml, what the message names
    "a name that is missing": (["2" + SQUARE[1:]], NAMES, "labels/a.txt: line 1"),
    "pixels": ([SQUARE, "0 3 3 9 3 9 9"], NAMES, "labels/a.txt: line 2"),
    "NaN": (["0 nan 0.1 0.2 0.1 0.2 0.2"], NAMES, "labels/a.txt: line 1"),
    "text": (["cell 0.1 0.1"], NAMES, "labels/a.txt: line 1"),
    "odd": ([SQUARE + " 0.1"], NAMES, "labels/a.txt: line 1"),
    "two points": (["0 0.1 0.1"], NAMES, "labels/a.txt: line 1"),
    "no names": ([SQUARE], "nc: 2\n", "data.yaml"),
    "no YAML": ([SQUARE], "names: [", "data.yaml"),
    "no labels": (None, NAMES, "labels/a.txt"),
}


@pytest.mark.parametrize("case", BAD_YOLO)
def test_bad_yolo_is_one_line(here, case):
    lines, names, word = BAD_YOLO[case]
    yolo({"images/a": lines}, names)
    refuse_download("--yolo", "y", *ALL, words=[word])


# ---- Roboflow's masks ----------------------------------------------------------------------------


def test_names_of_roboflow_masks(here):
    for number in range(3):
        save(photo(number), f"r/{number}_jpg.rf.a{number}.jpg")
        mask = np.zeros(PHOTO[::-1], np.uint8)
        mask[4:10, 3:9], mask[5:14, 20:27] = 1, 2
        save(Image.fromarray(mask), f"r/{number}_jpg.rf.a{number}_mask.png")
    Path("r/_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cell\n2, spot, dark\n")
    run_download("--masks", "r/{id}.jpg", "r/{id}_mask.png", *ALL, "--classes", "r/_classes.csv")
    assert class_names() == ["cell", "spot, dark"]
    for own in stored().values():
        assert_array_equal(own["cell"], square_mask(3, 4, 6, 6))
        assert_array_equal(own["spot, dark"], square_mask(20, 5, 7, 9))


# ---- arrays --------------------------------------------------------------------------------------


def arrays(name, values, labels, keys=("image", "label")):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(name, **dict(zip(keys, (values, labels), strict=True)))


def label_map(*squares):
    values = np.zeros(PHOTO[::-1])
    for value, own in squares:
        values[square_mask(*own)] = value
    return values


def test_npz_files_of_cases(here):
    """Floating point and one window for all; the slices of a case stay together."""
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(PHOTO[::-1])
    labels = label_map((3, (3, 4, 6, 6)), (7, (20, 5, 7, 9)))
    for number in range(12):
        arrays(f"z/case{number // 3:04}_slice{number:03}.npz", ramp * (1 + number % 2), labels)
    run_download("--arrays", "z", "--split", 50, 25, 25, "--classes", "liver,spleen")
    seen = {}
    for split in ("train", "valid", "test"):
        for stem, masks in stored(split).items():
            assert seen.setdefault(stem[:8], split) == split
            assert_array_equal(masks["liver"], square_mask(3, 4, 6, 6))
            assert_array_equal(masks["spleen"], square_mask(20, 5, 7, 9))
            got = read_rgb(f"dataset/{split}/{stem}.png")[..., 0] / 255
            low, high = np.percentile([ramp, 2 * ramp], (0.5, 99.5))
            wanted = np.clip((ramp * (1 + int(stem[-1]) % 2) - low) / (high - low), 0, 1)
            assert abs(got - wanted).max() < 0.51 / 255
    assert len(seen) == 4
    refuse_download("--arrays", "z", "--force", "--classes", "liver", words=["3, 7"])


def test_npz_files_of_colour(here):
    arrays("z/x.npz", np.asarray(photo()), label_map((1, (3, 4, 6, 6))) > 0, ("img", "mask"))
    run_download("--arrays", "z", *ALL)
    assert_array_equal(read_rgb("dataset/train/x.png"), photo())
    assert_array_equal(stored()["x"]["foreground"], square_mask(3, 4, 6, 6))


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


def test_figshare_brain_tumours(here):
    """As MATLAB stores them: columns first, text as numbers."""
    h5py = pytest.importorskip("h5py")
    Path("m").mkdir()
    pixels = np.arange(1200, dtype=np.int16).reshape(PHOTO[::-1])
    for number, kind in enumerate([1, 2, 3, 2, 1, 3]):
        patient = np.array([[ord(sign)] for sign in f"MR0{number // 2}"], np.uint16)
        with h5py.File(f"m/{number}.mat", "w") as file:
            data = {"image": pixels.T, "tumorMask": square_mask(3, 4, 6, 9).T.astype(np.uint8)}
            for key, value in {**data, "label": [[float(kind)]], "PID": patient}.items():
                file[f"cjdata/{key}"] = value
    run_download("--arrays", "m", "--split", 34, 33, 33)
    assert class_names() == ["meningioma", "glioma", "pituitary"]
    for split in ("train", "valid", "test"):
        first, second = sorted(stored(split))
        assert int(first) // 2 == int(second) // 2
        for stem, masks in stored(split).items():
            (name,) = masks
            assert name == ["meningioma", "glioma", "pituitary"][[1, 2, 3, 2, 1, 3][int(stem)] - 1]
            assert_array_equal(masks[name], square_mask(3, 4, 6, 9))
            grey = read_rgb(f"dataset/{split}/{stem}.png")[..., 0]
            assert (np.diff(grey.astype(int).ravel()) >= 0).all() and grey.max() == 255
    with h5py.File("m/0.mat", "w") as file:
        file["x"] = 1
    refuse_download("--arrays", "m", "--force", words=["m/0.mat", "cjdata"])


def test_h5py_is_named_where_it_is_missing(here, monkeypatch):
    Path("m").mkdir()
    Path("m/x.mat").write_bytes(b"MATLAB 5.0")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse_download("--arrays", "m", words=["m/x.mat", "pip install h5py"])
