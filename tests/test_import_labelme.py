"""download.py --labelme: against masks drawn by hand and LabelMe's own rasteriser."""

import json
import math
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    annotations,
    assert_refused,
    box,
    class_names,
    labelme,
    photo,
    png,
    read_rgb,
    refuse_download,
    run_download,
    save,
    script_here,
    shape,
    square_mask,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageDraw

from medseg.importing.labelme import draw_shapes

LABELME = ("--labelme", "lm", *ALL)
AREA = [shape("a", box(2, 3, 5))]


def test_labelme_shapes_order_and_holes(here):
    bitmap = np.eye(4, dtype=np.uint8)
    shapes = [
        shape("b", box(2, 3, 10)),
        shape("a", box(6, 3, 10), None),  # a missing shape_type is a polygon
        shape("_background_", box(3, 4, 2)),
        shape("a", [[30, 9], [22, 5]], "rectangle"),  # corners in any order
        shape("b", [[20.4, 20.2], [23.4, 23.2]], "mask", mask=png(bitmap)),
        shape("a", [[38, 27], [44, 27], [44, 40], [38, 40]], "oriented_rectangle"),
        *(shape("c", [[1, 1], [5, 5]], kind) for kind in ("point", "line", "linestrip")),
        shape("__ignore__", box(15, 12, 1)),
    ]
    labelme("x", shapes, flags={"unknown": 1}, text="also allowed")
    out = run_download(*LABELME)
    assert "line (1), linestrip (1), point (1)" in out and "ignore (1)" in out
    a, b = square_mask(6, 3, 10, 10), square_mask(2, 3, 4, 10)  # a covers the rest of b
    ignored = square_mask(15, 12, 1, 1)
    a &= ~ignored
    b[4:6, 3:5] = False
    a |= square_mask(22, 5, 9, 5) | square_mask(38, 27, 2, 3)
    b[range(20, 24), range(20, 24)] = True
    assert list(stored()["x"]) == ["a", "b", "ignore"]
    assert_array_equal(stored()["x"]["ignore"], ignored)
    assert_array_equal(stored()["x"]["a"], a)
    assert_array_equal(stored()["x"]["b"], b)


def test_labelme_circles_and_polygons():
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    drawn = draw_shapes([shape("a", [[20, 15], [20, 5]], "circle")], PHOTO, {"a": 1})
    distance = np.hypot(x - 20, y - 15)
    assert drawn[distance < 9.5].all() and not drawn[distance > 10.5].any()
    rng = np.random.default_rng(0)
    for _ in range(6):
        angles, radii = np.sort(rng.uniform(0, 2 * np.pi, 7)), rng.uniform(5, 25, 7)
        points = np.stack([20 + radii * np.cos(angles), 15 + radii * np.sin(angles)], 1)
        drawn = draw_shapes([shape("a", points.tolist())], PHOTO, {"a": 1})
        as_labelme = Image.new("L", PHOTO)  # the lines of LabelMe's shape_to_mask
        corners = [tuple(point) for point in points.tolist()]
        ImageDraw.Draw(as_labelme).polygon(xy=corners, outline=1, fill=1)
        assert_array_equal(drawn, np.asarray(as_labelme))


def test_labelme_polygons_of_many_points():
    """Drawn by OpenCV, which differs from Pillow in few pixels of the edge, of 7,700."""
    angles = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    radii = 700 + 100 * np.sin(9 * angles) + np.random.default_rng(0).uniform(-0.7, 0.7, 20_000)
    points = np.stack([1000 + radii * np.cos(angles), 1000 + radii * np.sin(angles)], 1).tolist()
    shapes = [shape("b", box(1000, 1000, 900)), shape("a", points)]
    drawn = draw_shapes(shapes, (2000, 2000), {"a": 7, "b": 300})
    by_pillow = Image.new("I", (2000, 2000))
    for value, corners in ((300, box(1000, 1000, 900)), (7, points)):
        corners = [tuple(point) for point in corners]
        ImageDraw.Draw(by_pillow).polygon(corners, outline=value, fill=value)
    assert 0 < (drawn != np.asarray(by_pillow)).sum() < 150


@pytest.mark.parametrize("corners", [[[20.6, 9.7], [23.2, 12.9]], [[23.9, 12.2], [20.1, 9.5]]])
def test_labelme_masks_with_fractional_corners(corners):
    """Their whole parts count, and a mask may be a pixel larger or smaller than they span."""
    for side, fits in {2: False, 3: True, 4: True, 5: True, 6: False}.items():
        bitmap = np.ones((side, side), np.uint8)
        bitmap[0, 1] = 0
        shapes = [shape("a", corners, "mask", mask=png(bitmap))]
        if fits:
            expected = square_mask(20, 9, side, side)
            expected[9, 21] = False
            assert_array_equal(draw_shapes(shapes, PHOTO, {"a": 1}), expected)
        else:
            with pytest.raises(ValueError, match="corners"):
                draw_shapes(shapes, PHOTO, {"a": 1})


def test_labelme_classes_are_picked_and_ordered(here):
    labelme("x", [shape("a", box(2, 3, 10)), shape("b", box(2, 3, 4)), shape("c", box(20, 3, 4))])
    labelme("y", [])
    refuse_download(*LABELME, "--classes", "d", words=["'d'", "a, b, c"])
    assert "left out: outlines: b (1)" in run_download(*LABELME, "--classes", "c,a")
    assert class_names() == ["c", "a"]
    assert stored()["x"]["a"].sum() == 100  # b, left out, does not cover it
    assert stored()["y"] == {}
    labelme("w", [shape("c", box(20, 3, 4))])  # the first of the files
    run_download(*LABELME, "--force")
    assert class_names() == ["a", "b", "c"]


# ---- images ------------------------------------------------------------------------------------


def test_labelme_image_places(here, monkeypatch):
    """In whichever Unicode form they are stored; what lies beside the file comes first."""
    nfc, nfd = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))
    places = {  # name of the file: (imagePath, where the picture lies, another that is not meant)
        "inside": ("inside.png", "lm/inside.png", ""),
        "windows": ("..\\lm\\sub\\w.png", "lm/sub/w.png", ""),
        "up": ("D:\\scans\\2024\\up.png", "lm/up.png", "outside/up.png"),
        "climbs": ("../outside/climbs.png", "lm/climbs.png", "outside/climbs.png"),
        "absolute": (f"{here}/outside/absolute.png", "lm/absolute.png", "outside/absolute.png"),
        "outside": ("../outside/o.png", "outside/o.png", ""),
        nfc: (f"..\\lm\\{nfc}\\{nfd}.png", f"lm/{nfd}/{nfc}.png", ""),
        "drive": (f"D:\\scans\\y{nfc}.png", f"lm/y{nfd}.png", ""),
    }
    for seed, (name, (path, place, other)) in enumerate(places.items()):
        labelme(name, [shape(nfd, box(2, 3, 5))], image=False, imagePath=path)
        save(photo(seed), place)
        if other:
            save(photo(99), other)
    run_download(*LABELME, "--classes", nfd)
    assert class_names() == [nfc]
    for seed, name in enumerate(places):
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), photo(seed))
        assert stored()[name][nfc].sum() == 25
    monkeypatch.chdir("lm")
    run_download("--labelme", ".", *ALL)
    assert set(stored()) == set(places)


def test_images_in_a_folder_beside_that_of_the_json_files(here):
    for seed, place in enumerate(("p", "q")):
        labelme("x", AREA, f"lm-{place}", image=False)
        Path(f"lm/{place}/json").mkdir(parents=True)
        Path(f"lm-{place}/x.json").rename(f"lm/{place}/json/x.json")
        save(photo(seed), f"lm/{place}/img/x.png")
    assert "note: 2 of 2" in run_download(*LABELME)
    for seed, place in enumerate(("p", "q")):
        assert_array_equal(read_rgb(f"dataset/train/{place}_json_x.png"), photo(seed))
    save(photo(3), "lm/p/other/x.png")
    refuse_download(*LABELME, "--force", words=["x.json", "img/x.png", "other/x.png"])


def test_image_data_counts_where_image_path_names_another_picture(here):
    """LabelMe shows imageData, and its points refer to that; a better copy of it is preferred."""
    meant = photo(7)
    data, thumb = (png(np.asarray(own)) for own in (meant, meant.resize((8, 6))))
    pictures = {  # what imagePath leads to; whether it is taken; imageData
        "nothing": (None, False, data),
        "smaller": (photo(8, (20, 20)), False, data),
        "other": (photo(8), False, data),
        "text": (b"none", False, data),
        "better": (meant.point(lambda value: value // 2 + 9), True, data),
        "copy": (meant, True, data),
        "damaged data": (meant, True, "AAAA"),
        "small data": (meant, True, thumb),
    }
    for name, (picture, _, own) in pictures.items():
        labelme(name, AREA, image=False, imageData=own)
        if isinstance(picture, bytes):
            Path(f"lm/{name}.png").write_bytes(picture)
        elif picture:
            save(picture, f"lm/{name}.png")
    out = run_download(*LABELME)
    assert "note: 4 of 8 LabelMe files" in out and "(nothing.json)" in out
    for name, (picture, taken, _) in pictures.items():
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), picture if taken else meant)
    labelme("smaller", AREA, image=False)  # without imageData
    refuse_download(*LABELME, "--force", words=["lm/smaller.json", "20x20"])


def test_labelme_points_refer_to_the_upright_image(here):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(photo(), "lm/x.jpg", exif=exif)
    upright = {"imageWidth": PHOTO[1], "imageHeight": PHOTO[0], "imagePath": "x.jpg"}
    labelme("x", [shape("a", box(2, 33, 5))], image=False, **upright)
    run_download(*LABELME)
    wanted = np.zeros(PHOTO, bool)
    wanted[33:38, 2:7] = True
    assert_array_equal(stored()["x"]["a"], wanted)


# ---- files of other programs, and damaged ones ---------------------------------------------------

CORNERS = [[4, 3], [9, 3], [9, 8], [4, 8]]  # 6 x 6 pixels
OTHERS = {  # a shape as other programs write it, what is printed of it
    "rectangle of four points": (shape("a", CORNERS, "rectangle"), "note: 1 rect"),
    "closed rectangle": (shape("a", [*CORNERS, CORNERS[0]], "rectangle"), "note: 1 rect"),
    "rotation": (shape("a", CORNERS, "rotation", direction=0.3), "outlines: a (1)"),
    "number": (shape(1, CORNERS), "note: 1 labels"),
    "fraction": (shape(1.0, CORNERS), "note: 1 labels"),
    "gb18030": (shape("肿瘤", CORNERS), "note: 1 files"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_shapes_of_other_programs(here, case):
    other, line = OTHERS[case]
    labelme("x", [other])
    if case == "gb18030":
        text = json.dumps(json.loads(Path("lm/x.json").read_text()), ensure_ascii=False)
        Path("lm/x.json").write_text(text, case)
    assert line in run_download(*LABELME)
    assert class_names() == [str(other["label"]).removesuffix(".0")]
    assert_array_equal(stored()["x"][class_names()[0]], square_mask(4, 3, 6, 6))


def polygon_of(*points):
    return {"shapes": [shape("a", [list(point) for point in points])]}


def mask_of(**fields):
    return {"shapes": [shape("a", [[1, 1], [4, 4]], "mask", **fields)]}


BAD_LABELME = {  # what is changed, what the message names
    "no shapes": ({"shapes": None}, "x.json"),
    "no area": ({"shapes": [shape("a", [[1, 1]], "point")]}, "lm"),
    "no label": ({"shapes": [{"points": []}]}, "x.json: shapes[0]"),
    "half a character": ({"shapes": [*AREA, shape("\ud800", box(2, 3, 5))]}, "\\ud800"),
    "unknown shape": ({"shapes": [shape("a", [], "spiral")]}, "spiral"),
    "two points": (polygon_of((1, 1), (2, 2)), "x.json: shapes[0]"),
    "NaN": (polygon_of((1, 1), (2, math.nan), (3, 1)), "x.json: shapes[0]"),
    "far": (polygon_of((1, 1), (2, 1e300), (3, 1)), "x.json: shapes[0]"),
    "text": (polygon_of(("1", 1), (2, 2), (3, 1)), "x.json: shapes[0]"),
    "fractions": (polygon_of((0.1, 0.1), (0.5, 0.3), (0.2, 0.9)), "fractions"),
    "mask without": (mask_of(), "x.json: shapes[0]"),
    "mask damaged": (mask_of(mask="AAAA"), "x.json: shapes[0]"),
    "mask elsewhere": (mask_of(mask=png(np.eye(9, dtype=np.uint8))), "(9, 9)"),
    "no image": ({"imagePath": "none.png"}, "'none.png'"),
    "no picture": ({"imagePath": "../lm/x.json"}, "x.json: its image"),
    "data damaged": ({"imagePath": "none.png", "imageData": "AAAA"}, "imageData"),
    "another size": ({"imageWidth": 41}, "41x30"),
}


@pytest.mark.parametrize("case", BAD_LABELME)
def test_bad_labelme_is_one_line(here, case):
    change, word = BAD_LABELME[case]
    labelme("x", **{"shapes": AREA} | change)
    refuse_download(*LABELME, words=[word])


def test_more_classes_than_a_network_tells_apart(here):
    """Thousands are imported, noted, and looked at; few are printed."""
    shapes = [shape(f"l{n}", [[n % 40, n // 40 % 30]] * 2, "rectangle") for n in range(2000)]
    labelme("x", shapes)
    out = run_download("--labelme", "lm", "--into", "train")
    assert "l0 (1)" in out and "(2000)" in out and "l99 " not in out and "note: 2000 classes" in out
    names = class_names()
    assert names == sorted(own["label"] for own in shapes)
    # Each of the 1200 pixels is of the label that was drawn last there.
    seen = {names[own["category_id"] - 1] for own in annotations("train")["annotations"]}
    assert seen == {f"l{n}" for n in range(800, 2000)}
    audited = script_here("data.py", "dataset", cwd=here)
    assert_refused(audited, "2 problem(s)")  # there are no valid and test
    assert sum(line.startswith("  category") for line in audited.stdout.splitlines()) == 255
    train = script_here("train.py", "--classes", "each", "--image-size", 32, cwd=here)
    assert_refused(train, "dataset", "1200 categories", "1 to 255")
