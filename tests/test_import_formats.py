"""download.py --labelme, --coco, --via, --yolo and --arrays.

Against masks drawn by hand, pycocotools and LabelMe's own rasteriser.
"""

import base64
import json
import math
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    annotations,
    box,
    class_names,
    coco_file,
    labelme,
    labels,
    photo,
    png_bytes,
    polygon,
    read_rgb,
    refuse_download,
    run_download,
    save,
    save_turned,
    script_here,
    shape,
    stored,
)
from numpy.testing import assert_array_equal, assert_equal
from PIL import Image, ImageDraw

from medseg.importing.labelme import draw_shapes

NFC, NFD = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))


def square_mask(x, y, width, height):
    mask = np.zeros(PHOTO[::-1], bool)
    mask[y : y + height, x : x + width] = True
    return mask


# ---- LabelMe -----------------------------------------------------------------------------------

LABELME = ("--labelme", "lm", *ALL)
AREA = [shape("a", box(2, 3, 5))]


def base64_png(pixels):
    return base64.b64encode(png_bytes(pixels)).decode()


def test_labelme_shapes_their_order_and_holes(here):
    diagonal = base64_png(np.eye(4, dtype=np.uint8)[..., None])
    # Corners of masks may be fractions, in any order, and span a pixel more or less than the mask.
    masks = ([23.4, 23.2], [20.4, 20.2]), ([30, 20], [32, 22]), ([4.9, 20], [0.1, 24])
    shapes = [
        shape("b", box(2, 3, 10)),
        shape("a", box(6, 3, 10), None),  # a missing shape_type is a polygon
        shape("_background_", box(3, 4, 2)),
        shape("a", [[30, 9], [22, 5]], "rectangle"),  # corners in any order
        *(shape("b", corners, "mask", mask=diagonal) for corners in masks),
        shape("a", [[38, 27], [44, 27], [44, 40], [38, 40]], "oriented_rectangle"),
        *(shape("c", [[1, 1], [5, 5]], kind) for kind in ("point", "line", "linestrip")),
        shape("__ignore__", box(15, 12, 1)),
    ]
    labelme("x", shapes, flags={"unknown": 1}, text="also allowed")
    assert "line (1), linestrip (1), point (1)" in run_download(*LABELME)
    ignored = square_mask(15, 12, 1, 1)
    a, b = square_mask(6, 3, 10, 10) & ~ignored, square_mask(2, 3, 4, 10)  # a covers some of b
    b[4:6, 3:5] = False
    for left in (20, 30, 0):
        b[range(20, 24), range(left, left + 4)] = True
    a |= square_mask(22, 5, 9, 5) | square_mask(38, 27, 2, 3)
    assert_equal(stored()["x"], {"a": a, "b": b, "ignore": ignored})


def test_labelme_circles_and_polygons():
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    drawn = draw_shapes([shape("a", [[20, 15], [20, 5]], "circle")], PHOTO, {"a": 1})
    distance = np.hypot(x - 20, y - 15)
    assert drawn[distance < 9.5].all() and not drawn[distance > 10.5].any()
    for points in np.random.default_rng(0).uniform(-9, 49, (6, 7, 2)):
        drawn = draw_shapes([shape("a", points.tolist())], PHOTO, {"a": 300})
        as_labelme = Image.new("1", PHOTO)  # the lines of LabelMe's shape_to_mask
        ImageDraw.Draw(as_labelme).polygon([*map(tuple, points.tolist())], outline=1, fill=1)
        assert_array_equal(drawn, 300 * np.asarray(as_labelme))


def test_the_window_is_that_of_the_images_not_of_masks_beside_them(here):
    deep = np.random.default_rng(0).integers(0, 4000, PHOTO[::-1]).astype(np.uint16)
    labelme("x", AREA, image=Image.fromarray(deep))
    save(photo(), "lm/x_mask.png")
    run_download(*LABELME)
    assert annotations("train")["info"]["window"] == [4095 / 2, 4095]


def test_labelme_image_places(here):
    """In whichever Unicode form they are stored; what imagePath leads to comes first."""
    places = {  # LabelMe file: (imagePath, where the picture lies)
        "lm/outside": ("../outside/o.png", "outside/o.png"),
        f"lm/{NFC}": (f"..\\lm\\{NFC}\\{NFD}.png", f"lm/{NFD}/{NFC}.png"),
        "lm/drive": (f"D:\\scans\\y{NFC}.png", f"lm/y{NFD}.png"),
        "lm/p/json/x": ("x.png", "lm/p/img/x.png"),
        "lm/q/json/x": ("x.png", "lm/q/img/x.png"),
    }
    save(photo(99), "lm/o.png")
    for seed, (file, (path, place)) in enumerate(places.items()):
        folder, stem = file.rsplit("/", 1)
        labelme(stem, [shape(NFD, box(2, 3, 5))], folder, image=None, imagePath=path)
        save(photo(seed), place)
    assert "3 of 5 LabelMe files have their image elsewhere" in run_download(*LABELME)
    for seed, name in enumerate(["outside", NFC, "drive", "p_json_x", "q_json_x"]):
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), photo(seed))
        assert stored()[name][NFC].sum() == 25
    save(photo(9), "lm/p/other/x.png")
    refuse_download(*LABELME, "--force", words=["x.json", "img/x.png", "other/x.png"])


def test_labelme_image_data_where_image_path_names_another_picture(here):
    """LabelMe shows imageData, and its points refer to that; a better copy of it is preferred."""
    meant = photo(7)
    data = base64_png(np.asarray(meant))
    better = meant.point(lambda value: value // 2 + 9)
    pictures = {  # what imagePath leads to; what is taken; imageData
        "nothing": (None, meant, data),
        "smaller": (photo(8, (20, 20)), meant, data),
        "other": (photo(8), meant, data),
        "better": (better, better, data),
        "damaged": (meant, meant, "AAAA"),
    }
    for name, (picture, _, own) in pictures.items():
        labelme(name, AREA, image=picture, imageData=own)
    assert "note: 3 of 5 LabelMe files" in run_download(*LABELME)
    for name, (_, taken, _) in pictures.items():
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), taken)


def test_labelme_shapes_of_other_programs_and_classes_that_are_picked(here):
    corners = box(4, 3, 6)
    closed = shape("a", [*corners, corners[0]], "rectangle")
    usual = shape("a", corners[::2], "rectangle")
    labelme("x", [closed, usual, shape("b", corners, "rotation", direction=0.3)])
    labelme("y", [shape(1.0, corners)])
    out = run_download(*LABELME)
    assert "note: 1 rect" in out and "note: 1 labels" in out
    square = square_mask(4, 3, 6, 6)
    assert_equal(stored(), {"x": {"b": square}, "y": {"1": square}})  # b covers a
    flags = (*LABELME, "--force", "--classes")
    refuse_download(*flags, "d", words=["'d'", "1, a, b"])
    run_download(*flags, "a,1")
    assert class_names() == ["a", "1"]
    assert_equal(stored(), {"x": {"a": square}, "y": {"1": square}})  # b is left out


def test_more_classes_than_a_network_tells_apart(here):
    """Thousands are imported, noted, and looked at; few are printed."""
    labelme("x", [shape(f"l{n}", [[n % 40, n // 40]] * 2, "rectangle") for n in range(300)])
    out = run_download("--labelme", "lm", "--into", "train")
    assert "l0 (1)" in out and "l99 " not in out and "note: 300 classes" in out
    assert set(stored()["x"]) == {f"l{n}" for n in range(300)}
    audited = script_here("data.py", "dataset", cwd=here)
    assert sum(line.startswith("  category") for line in audited.stdout.splitlines()) == 255


# ---- COCO --------------------------------------------------------------------------------------

COCO = ("--coco", "c.json", "images", *ALL)
ONE = [(0, 2, polygon(3, 4, 6))]
(OUTLINE,) = polygon(3, 4, 6)["segmentation"]
SLIVER = [20.1, 3, 20.2, 9, 20.3, 3]


def write_coco(record=(), annotation=(), more=(), **content):
    """Write c.json of a.png and b.png, a square each, with changes of the first or more."""
    coco_file([*ONE, (1, 2, polygon(8, 4, 6))], ["a.png", "b.png"])
    usual = json.loads(Path("c.json").read_text())
    usual["images"][0].update(record)
    usual["annotations"][0].update(annotation)
    usual["annotations"] += [{"id": 9, "image_id": 11, "category_id": 2, **own} for own in more]
    Path("c.json").write_text(json.dumps(usual | content))


def test_points_refer_to_the_image_as_it_is_shown_or_stored(here):
    coco_file([*ONE, (1, 2, polygon(3, 4, 6))], ["a.png", "b.tif"])
    labelme("x", AREA, imageWidth=PHOTO[1], imageHeight=PHOTO[0])
    for place, orientation in (("images/a.png", 6), ("images/b.tif", 5), ("lm/x.png", 6)):
        save_turned(photo(size=PHOTO[::-1]), place, orientation)
    run_download(*COCO)
    turned = np.rot90(square_mask(3, 4, 6, 6), -1)
    assert_equal(stored(), {"a": {"k2": turned}, "b": {"k2": square_mask(3, 4, 6, 6).T}})
    run_download(*LABELME, "--force")
    assert_array_equal(stored()["x"]["a"], np.pad(np.ones((5, 5), bool), ((3, 32), (2, 23))))


def test_coco_images_are_found(here):
    """By their path, else by their name, in any Unicode form, and not outside the folder."""
    coco_file(ONE, ["images/1/a.png", "../../c.png", "upload\\b.png", f"p/{NFC}.png"])
    Path(f"images/{NFC}.png").unlink()
    save(photo(3), f"images/p/{NFD}.png")
    save(photo(99), "c.png")
    run_download(*COCO)
    for seed, name in enumerate(("a", "c", "b", NFC)):
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), photo(seed))
    save(photo(5), "images/sub/a.png")
    refuse_download(*COCO, "--force", words=["c.json", "images/a.png", "images/sub/a.png"])
    coco_file(ONE, ["d.png", "e.png", "f.png"])
    Path("images/e.png").unlink()
    refuse_download(*COCO, "--force", words=["c.json", "1 of 3", "'e.png'", "--skip-unpaired"])
    run_download(*COCO, "--force", "--skip-unpaired")
    assert set(stored()) == {"d", "f"}
    coco_file(ONE, ["d.png", "x/d.png"])
    refuse_download(*COCO, "--force", words=["c.json", "d.png"])


def test_coco_as_others_write_it_is_read_and_counted(here):
    write_coco(
        record={"file_name": "/data/local-files/?d=b%5Ca.png"},  # Label Studio's
        annotation={"segmentation": [[5, 5], OUTLINE, [], [5, 5, 6, 6]]},
        more=[{"segmentation": [], "bbox": [0, 0, 0, 0]}, {"segmentation": [SLIVER]}],
    )
    notes = [line for line in run_download(*COCO).splitlines() if line.startswith("note: ")]
    assert sorted(int(note.split()[1]) for note in notes) == [1, 1, 1, 3]
    assert_array_equal(stored()["a"]["k2"], square_mask(3, 4, 6, 6))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "latin-1"])
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


# ---- VIA ---------------------------------------------------------------------------------------

VIA = ("--via", "v.json", "images", *ALL)
SIDES = {"all_points_x": [3, 9, 9, 3], "all_points_y": [4, 4, 10, 10]}  # 6 x 6 pixels
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


def test_via_shapes_and_classes(here):
    shapes = {
        "polygon": {"name": "polygon", **SIDES},
        "line": {"name": "polyline", **SIDES},
        "box": RECT,
        "circle": {"name": "circle", "cx": 20, "cy": 15, "r": 10},
        "oval": {"name": "ellipse", "cx": 20, "cy": 15, "rx": 12, "ry": 5, "theta": 0.6},
        "dot": {"name": "point", "cx": 3, "cy": 3},
    }
    several = [region(own, kind=name) for name, own in shapes.items()]
    via_file({"a.png": several, "b.png": [region(RECT, kind="")] * 2, "empty.png": None})
    out = run_download(*VIA)
    assert "1 regions without an area" in out and "2 regions without kind" in out
    assert class_names() == ["box", "circle", "line", "oval", "polygon"]
    got = stored()
    assert got["b"] == got["empty"] == {}
    assert_array_equal(got["a"]["box"], square_mask(20, 5, 7, 9))
    assert_array_equal(got["a"]["polygon"] & got["a"]["line"], square_mask(3, 4, 6, 6))
    for name, (rx, ry, degrees) in {"circle": (10, 10, 0), "oval": (12, 5, 34.38)}.items():
        filled, whole = np.zeros(PHOTO[::-1], np.uint8), (0, 360)
        cv2.ellipse(filled, (20, 15), (rx, ry), degrees, *whole, 1, -1)  # around a pixel's middle
        assert (got["a"][name] != filled).mean() < 0.05
        assert abs(got["a"][name].sum() / (math.pi * rx * ry) - 1) < 0.03


def test_via_of_version_1_without_attributes_and_checkboxes(here):
    via_file({"a.png": {"0": region(RECT), "1": region({"name": "polygon", **SIDES})}}, False)
    run_download(*VIA)
    both = square_mask(20, 5, 7, 9) | square_mask(3, 4, 6, 6)
    assert_array_equal(stored()["a"]["foreground"], both)
    kinds = {"cell": True, "dead": True, "other": False}
    via_file({"a.png": [region(RECT, kind=kinds, reader="x")]})
    refuse_download(*VIA, "--force", words=["v.json", "kind, reader"])
    run_download(*VIA[:3], "kind", *ALL, "--force")
    box = square_mask(20, 5, 7, 9)
    assert_equal(stored()["a"], {"cell": box, "dead": box})


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
    """Roboflow's four variants of each of five pictures stay together where they are dealt."""
    places = [("train", f"{n % 5}_png.rf.{n}a") for n in range(20)] + [("val", "v")]
    yolo({layout.format(*place): [SQUARE, TRIANGLE] for place in places})
    out = run_download(*YOLO)
    assert "no test split" in out and "groups: 5 " in out and list(stored("valid")) == ["v"]
    assert len({stem[0] for stem in stored("test")}) == 1 and len(stored("test")) == 4
    assert_array_equal(read_rgb("dataset/valid/v.png"), photo(20))
    run_download(*YOLO, "--split", 50, 50, 0, "--data", "anew")
    assert 8 <= len(stored("train", "anew")) <= 12


# ---- arrays --------------------------------------------------------------------------------------


def arrays(name, values, mask, keys=("image", "label")):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    np.savez(name, **dict(zip(keys, (values, mask), strict=True)))


def test_npz_files_of_cases(here):
    """Floating point and one window for all; the slices of a case are a group."""
    ramp = np.linspace(0, 1, 1200, dtype=np.float32).reshape(PHOTO[::-1])
    mask = np.array([0.0, 3, 7])[labels(0, 2)]
    for number in range(4):
        arrays(f"z/case{number // 2:04}_slice{number:03}.npz", ramp * (1 + number % 2), mask)
    run_download("--arrays", "z", *ALL, "--classes", "liver,spleen")
    low, high = np.percentile([ramp, 2 * ramp], (0.5, 99.5))
    groups = [int(image["group"].removeprefix("case")) for image in annotations("train")["images"]]
    assert groups == [0, 0, 1, 1]
    for stem, masks in stored().items():
        assert_equal(masks, {"liver": mask == 3, "spleen": mask == 7})
        got = read_rgb(f"dataset/train/{stem}.png")[..., 0] / 255
        grey = np.clip((ramp * (1 + int(stem[-1]) % 2) - low) / (high - low), 0, 1)
        assert abs(got - grey).max() < 0.51 / 255
    refuse_download("--arrays", "z", "--force", "--classes", "liver", words=["3, 7"])
    arrays("colour/x.npz", np.asarray(photo()), labels() == 1, ("img", "mask"))
    run_download("--arrays", "colour", *ALL, "--force")
    assert_array_equal(read_rgb("dataset/train/x.png"), photo())
    assert_equal(stored()["x"], {"foreground": labels() == 1})


def test_figshare_brain_tumours(here, monkeypatch):
    """As MATLAB stores them: columns first, text as numbers."""
    h5py, names = pytest.importorskip("h5py"), ["meningioma", "glioma", "pituitary"]
    Path("m").mkdir()
    pixels, mask = np.arange(1200, dtype=np.int16).reshape(PHOTO[::-1]), square_mask(3, 4, 6, 9)
    for kind in (1, 2, 3):
        patient = np.array([[ord(sign)] for sign in f"MR0{kind}"], np.uint16)
        with h5py.File(f"m/{kind}.mat", "w") as file:
            data = {"image": pixels.T, "tumorMask": mask.T.astype(np.uint8), "PID": patient}
            for key, value in {**data, "label": [[float(kind)]]}.items():
                file[f"cjdata/{key}"] = value
    run_download("--arrays", "m", *ALL)
    assert class_names() == names
    assert [image["group"] for image in annotations("train")["images"]] == ["MR01", "MR02", "MR03"]
    for stem, masks in stored().items():
        assert_equal(masks, {names[int(stem) - 1]: mask})
        grey = read_rgb(f"dataset/train/{stem}.png")[..., 0]
        assert (np.diff(grey.astype(int).ravel()) >= 0).all() and grey.max() == 255
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse_download("--arrays", "m", "--force", words=["m/1.mat", "pip install h5py"])


# ---- files that are wrong ------------------------------------------------------------------------


def bad_labelme(shapes=AREA, **change):
    return LABELME, lambda: labelme("x", shapes, **change)


def bad_shape(*points, kind="polygon", **fields):
    return bad_labelme([*AREA, shape("a", [list(point) for point in points], kind, **fields)])


def bad_coco(**changes):
    return (*COCO, "--boxes"), lambda: write_coco(**changes)


def bad_yolo(*lines, names=NAMES):
    return (*YOLO, *ALL), lambda: yolo({"images/a": lines or None}, names)


def bad_npz(values, *keys):
    image = np.asarray(photo())
    return ("--arrays", "z", *ALL), lambda: arrays("z/x.npz", image, values, keys)


FRACTIONS = [{"id": 1, "image_id": 10, "category_id": 2, "segmentation": [[0.1, 0.1, 0.2] * 2]}]
BAD = [  # ((flags, a function that writes the files), what the message names)
    (bad_labelme([shape("a", [[1, 1]], "point")]), "lm"),
    (bad_labelme([shape("a", [[0.1, 0.1], [0.5, 0.3], [0.2, 0.9]])]), "fractions"),
    (bad_labelme(imagePath="none.png"), "'none.png'"),
    (bad_labelme(imageWidth=41), "41x30"),
    (bad_shape(kind="spiral"), "spiral"),
    (bad_shape((1, 1), (2, math.nan), (3, 1)), "x.json: shapes[1]"),
    (bad_shape((1, 1), (4, 4), kind="mask", mask="AAAA"), "x.json: shapes[1]"),
    (bad_coco(categories=[]), "category_id 2"),
    (bad_coco(annotation={"segmentation": None}), "annotation 0"),
    ((COCO, lambda: write_coco(annotation={"segmentation": None})), "--boxes"),
    (bad_coco(annotation={"segmentation": {"size": [30, 40], "counts": [7]}}), "0 of a.png"),
    (bad_coco(record={"width": 30, "height": 40}), "30x40"),
    (bad_coco(annotations=FRACTIONS), "fractions"),
    (bad_coco(annotations=[{**FRACTIONS[0], "segmentation": [SLIVER]}]), "cover no"),
    ((COCO, lambda: Path("images").mkdir()), "c.json"),
    ((VIA, lambda: (coco_file(ONE), Path("c.json").rename("v.json"))), "v.json"),
    ((VIA, lambda: via_file({"a.png": [region({"name": "star"})]})), "star"),
    (bad_yolo(SQUARE, "0 3 3 9 3 9 9"), "labels/a.txt: line 2"),
    (bad_yolo("cell 0.1 0.1"), "labels/a.txt: line 1"),
    (bad_yolo("2" + SQUARE[1:]), "labels/a.txt: line 1"),
    (bad_yolo(SQUARE, names="nc: 2\n"), "data.yaml"),
    (bad_yolo(), "labels/a.txt"),
    (bad_npz(labels().T, "image", "label"), "z/x.npz"),
    (bad_npz(labels(), "imgs", "label"), "z/x.npz"),
]


@pytest.mark.parametrize("case, word", BAD)
def test_a_bad_file_is_one_line(here, case, word):
    flags, write = case
    write()
    refuse_download(*flags, words=[word])
