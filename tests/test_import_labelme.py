"""download.py --labelme: against masks drawn by hand and LabelMe's own rasteriser."""

import math
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    PHOTO,
    SMALL,
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
from matplotlib.path import Path as Outline
from numpy.testing import assert_array_equal
from PIL import Image, ImageDraw

from data import load_split
from medseg.importing.collect import existing_file
from medseg.importing.labelme import draw_shapes

LABELME = ("--labelme", "lm", *ALL)


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
    out = run_download(*LABELME)
    assert "left out: shapes without an area: line (1), linestrip (1), point (1)" in out
    assert "warning: 1 areas labelled __ignore__" in out
    a, b = square_mask(6, 3, 10, 10), square_mask(2, 3, 4, 10)  # a covers the rest of b
    assert (a.sum(), b.sum()) == (100, 40)
    a[12, 15] = False
    b[4:6, 3:5] = False
    a |= square_mask(22, 5, 9, 5) | square_mask(38, 27, 2, 3)
    b[range(20, 24), range(20, 24)] = True
    assert list(stored()["x"]) == ["a", "b"]
    assert_array_equal(stored()["x"]["a"], a)
    assert_array_equal(stored()["x"]["b"], b)


def test_labelme_circle():
    drawn = draw_shapes([shape("a", [[20, 15], [20, 5]], "circle")], PHOTO, {"a": 1})
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    distance = np.hypot(x - 20, y - 15)
    assert drawn[distance < 9.5].all() and not drawn[distance > 10.5].any()


def test_labelme_polygons_against_another_rasteriser():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: PHOTO[1], : PHOTO[0]]
    for _ in range(6):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        radii = rng.uniform(5, 25, 7)  # some points lie outside the image
        points = np.stack([20 + radii * np.cos(angles), 15 + radii * np.sin(angles)], 1)
        drawn = draw_shapes([shape("a", points.tolist())], PHOTO, {"a": 1})
        as_labelme = Image.new("L", PHOTO)  # the lines of LabelMe's shape_to_mask
        corners = [tuple(point) for point in points.tolist()]
        ImageDraw.Draw(as_labelme).polygon(xy=corners, outline=1, fill=1)
        assert_array_equal(drawn, np.asarray(as_labelme))
        steps = np.linspace(points, np.roll(points, 1, 0), 99).reshape(-1, 2)  # along the outline
        distance = np.hypot(x[..., None] - steps[:, 0], y[..., None] - steps[:, 1]).min(2)
        inside = Outline(points).contains_points(np.stack([x, y], 2).reshape(-1, 2))
        assert (drawn == inside.reshape(drawn.shape))[distance > 1.5].all()


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


def test_labelme_classes_are_picked_and_ordered(here):
    labelme("x", [shape("a", box(2, 3, 10)), shape("b", box(2, 3, 4)), shape("c", box(20, 3, 4))])
    labelme("y", [])
    refuse_download(*LABELME, "--classes", "d", words=["'d'", "a, b, c"])
    out = run_download(*LABELME, "--classes", "c,a")
    assert "left out: outlines: b (1)" in out
    assert class_names() == ["c", "a"]
    assert stored()["x"]["a"].sum() == 100  # b, left out, does not cover it
    assert stored()["y"] == {}
    labelme("w", [shape("c", box(20, 3, 4))])  # the first of the files
    run_download(*LABELME, "--force")
    assert class_names() == ["a", "b", "c"]


def test_labelme_image_places(here, monkeypatch):
    areas = [shape("a", box(2, 3, 5))]
    places = {  # imagePath, seed of the picture that is meant
        "inside": ("inside.png", 7),
        "windows": ("..\\lm\\sub\\w.png", 8),
        "up": ("D:\\scans\\2024\\up.png", 9),
        "climbs": ("../outside/climbs.png", 9),
        "absolute": (f"{here}/outside/absolute.png", 9),
    }
    for name, (path, _) in places.items():
        data = png(np.asarray(photo(7))) if name == "inside" else None
        labelme(name, areas, image=False, imagePath=path, imageData=data)
    save(photo(8), "lm/sub/w.png")
    for name in ("up", "climbs", "absolute"):
        save(photo(9), f"lm/{name}.png")
        save(photo(10), f"outside/{name}.png")
    run_download(*LABELME)
    for name, (_, seed) in places.items():
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), photo(seed))
        assert stored()[name]["a"].sum() == 25
    monkeypatch.chdir("lm")
    run_download("--labelme", ".", *ALL)
    assert set(stored()) == set(places)


def test_image_data_counts_where_image_path_names_another_picture(here):
    """LabelMe shows imageData, and its points refer to that; a better copy of it is preferred."""
    meant, areas = photo(7), [shape("a", box(2, 3, 5))]
    data = png(np.asarray(meant))
    pictures = {  # what imagePath leads to; whether it is taken
        "nothing": (None, False),
        "smaller": (photo(8, (20, 20)), False),
        "other": (photo(8), False),
        "text": (b"none", False),
        "better": (meant.point(lambda value: value // 2 + 9), True),
        "copy": (meant, True),
    }
    for name, (picture, _) in pictures.items():
        labelme(name, areas, image=False, imagePath=f"{name}.png", imageData=data)
        if isinstance(picture, bytes):
            Path(f"lm/{name}.png").write_bytes(picture)
        elif picture:
            save(picture, f"lm/{name}.png")
    labelme("damaged data", areas, image=False, imagePath="copy.png", imageData="AAAA")
    thumb = png(np.asarray(meant.resize((8, 6))))
    labelme("small data", areas, image=False, imagePath="copy.png", imageData=thumb)
    out = run_download(*LABELME)
    assert "note: 4 of 8 LabelMe files" in out and "(nothing.json)" in out
    for name, (picture, taken) in pictures.items():
        wanted = picture if taken else meant
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), wanted)
    for name in ("damaged data", "small data"):
        assert_array_equal(read_rgb(f"dataset/train/{name}.png"), meant)
    labelme("smaller", areas, image=False)  # without imageData
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


NFC, NFD = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))


def test_images_of_labelme_files_are_found_in_any_unicode_form(here):
    labelme(NFC, [shape(NFD, box(2, 3, 5))], imagePath=f"..\\lm\\{NFC}\\{NFD}.png", image=False)
    labelme("y", [shape(NFC, box(2, 3, 5))], imagePath=f"D:\\scans\\y{NFC}.png", image=False)
    save(photo(8), f"lm/y{NFD}.png")
    save(photo(7), f"lm/{NFD}/{NFC}.png")
    run_download(*LABELME, "--classes", NFD)
    assert class_names() == [NFC]
    assert_array_equal(read_rgb(f"dataset/train/{NFC}.png"), photo(7))
    assert stored()[NFC][NFC].sum() == stored()["y"][NFC].sum() == 25
    assert existing_file(f"lm/{NFC}") is None  # a folder


GOOD = [shape("a", box(2, 3, 5))]


def polygon_of(*points):
    return {"shapes": [shape("a", [list(point) for point in points])]}


def mask_of(**fields):
    return {"shapes": [shape("a", [[1, 1], [4, 4]], "mask", **fields)]}


CORNERS = [[4, 3], [9, 3], [9, 8], [4, 8]]  # 6 x 6 pixels
OTHERS = {  # a shape as other programs write it, what it is counted as
    "rectangle of four points": (shape("a", CORNERS, "rectangle"), "note: 1 rect"),
    "closed rectangle": (shape("a", [*CORNERS, CORNERS[0]], "rectangle"), "note: 1 rect"),
    "rotation": (shape("a", CORNERS, "rotation", direction=0.3), "outlines: a (1)"),
    "number": (shape(1, CORNERS), "note: 1 labels"),
    "fraction": (shape(1.0, CORNERS), "note: 1 labels"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_shapes_of_other_programs(here, case):
    other, line = OTHERS[case]
    labelme("x", [other])
    assert line in run_download(*LABELME)
    assert_array_equal(
        stored()["x"]["1" if "note: 1 labels" in line else "a"], square_mask(4, 3, 6, 6)
    )


def test_labelme_files_in_gb18030(here):
    for number in range(3):
        labelme(f"x{number}", [shape("label", CORNERS)])
        path = Path(f"lm/x{number}.json")
        encoding = "gb18030" if number else "utf-8"
        path.write_text(path.read_text().replace('"label": "label"', '"label": "肿瘤"'), encoding)
    assert "note: 2 files" in run_download(*LABELME) and class_names() == ["肿瘤"]


def test_images_in_a_folder_beside_that_of_the_json_files(here):
    for seed, place in enumerate(("p", "q")):
        labelme("x", [shape("a", CORNERS)], f"lm-{place}", image=False)
        Path(f"lm/{place}/json").mkdir(parents=True)
        Path(f"lm-{place}/x.json").rename(f"lm/{place}/json/x.json")
        save(photo(seed), f"lm/{place}/img/x.png")
    assert "note: 2 of 2" in run_download(*LABELME)
    for seed, place in enumerate(("p", "q")):
        assert_array_equal(read_rgb(f"dataset/train/{place}_json_x.png"), photo(seed))
    save(photo(3), "lm/p/other/x.png")
    refuse_download(*LABELME, "--force", words=["x.json", "img/x.png", "other/x.png"])


def test_points_that_are_fractions_are_refused(here):
    small = [[x / 40, y / 30] for x, y in CORNERS]
    labelme("x", [shape("a", small)])
    labelme("y", [])
    refuse_download(*LABELME, words=["x.json", "fractions"])


BAD_LABELME = {  # what is changed, what the message names
    "no label": ({"shapes": [{"points": []}]}, "shapes[0]"),
    "unknown shape": ({"shapes": [shape("a", [], "spiral")]}, "spiral"),
    "two points": (polygon_of((1, 1), (2, 2)), "shapes[0]"),
    "NaN": (polygon_of((1, 1), (2, math.nan), (3, 1)), "shapes[0]"),
    "huge": (polygon_of((1, 1), (2, 1e300), (3, 1)), "shapes[0]"),
    "text": (polygon_of(("1", 1), (2, 2), (3, 1)), "shapes[0]"),
    "mask without": (mask_of(), "shapes[0]"),
    "mask damaged": (mask_of(mask="AAAA"), "shapes[0]"),
    "mask elsewhere": (mask_of(mask=png(np.eye(9, dtype=np.uint8))), "(9, 9)"),
    "no image": ({"imagePath": "none.png"}, "'none.png'"),
    "hostile path": ({"imagePath": "../../../etc/passwd"}, "passwd"),
    "NUL": ({"imagePath": "a\0b"}, "imageData"),
    "path of another kind": ({"imagePath": 5}, "imageData"),
    "data damaged": ({"imagePath": "none.png", "imageData": "%%%é"}, "imageData"),
    "data no image": ({"imagePath": "none.png", "imageData": "AAAA"}, "imageData"),
    "another size": ({"imageWidth": 41}, "41x30"),
}


@pytest.mark.parametrize("case", BAD_LABELME)
def test_bad_labelme_is_one_line(here, case):
    change, word = BAD_LABELME[case]
    labelme("x", **{"shapes": GOOD} | change)
    refuse_download(*LABELME, words=["lm/x.json", word])


@pytest.mark.parametrize("content", [b"{", b'{"images": []}'])
def test_files_that_are_not_labelme_are_one_line(here, content):
    labelme("x", GOOD)
    Path("lm/x.json").write_bytes(content)
    refuse_download(*LABELME, words=["lm/x.json"])


def test_labelme_files_without_areas_are_one_line(here):
    labelme("x", [shape("a", [[1, 1]], "point")])
    refuse_download(*LABELME, words=["lm"])


@pytest.mark.parametrize("corners", [[[20.6, 9.7], [23.2, 12.9]], [[23.9, 12.2], [20.1, 9.5]]])
def test_labelme_masks_with_fractional_corners(corners):
    """Their whole parts count, and a mask may be a pixel larger or smaller than they span."""
    for side, fits in {2: False, 3: True, 4: True, 5: True, 6: False}.items():
        bitmap = np.ones((side, side), np.uint8)
        bitmap[0, 1] = 0
        shapes = [shape("a", corners, "mask", mask=png(bitmap))]
        if fits:
            drawn = draw_shapes(shapes, PHOTO, {"a": 1})
            expected = square_mask(20, 9, side, side)
            expected[9, 21] = False
            assert_array_equal(drawn, expected)
        else:
            with pytest.raises(ValueError, match="corners"):
                draw_shapes(shapes, PHOTO, {"a": 1})


def import_labels(count):
    """Import `count` labels, each a pixel of 80x60; returns (stdout, seconds of the processor)."""
    shapes = [shape(f"l{n}", [[n % 80, n // 80 % 60]] * 2, "rectangle") for n in range(count)]
    save(photo(size=(80, 60)), f"lm{count}/x.png")
    labelme("x", shapes, f"lm{count}", image=False, imageWidth=80, imageHeight=60)
    start = time.process_time()
    out = run_download("--labelme", f"lm{count}", "--data", f"d{count}", "--into", "train")
    return out, time.process_time() - start


def test_thousands_of_labels_take_time_in_proportion(here):
    """Sixteen times the labels may take sixteen times as long, not 256 times."""
    few, many = import_labels(2000)[1], import_labels(32_000)[1]
    assert many < 20 * few, (few, many)
    names = class_names(root="d32000")
    assert names == sorted(f"l{n}" for n in range(32_000))
    # Each of the 4800 pixels is of the label that was drawn last there.
    seen = {
        names[annotation["category_id"] - 1]
        for annotation in annotations("train", "d32000")["annotations"]
    }
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
    sheet = Image.open("contact_sheet.jpg")  # whose legend has columns
    assert sheet.height < 255 * 20 < sheet.height * (sheet.width // 70)
    train = script_here("train.py", "--data", "d4800", "--classes", "each", *SMALL, cwd=here)
    assert_refused(train, "d4800", "4800 categories", "1 to 255")
    assert load_split("d4800", "train", 32)[0, ..., 3].all()
