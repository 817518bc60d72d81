"""Pictures of many images: which are chosen, and the names below them."""

import warnings

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from helpers import SIZE, brightness_model, scan, script_here, square, write_split
from matplotlib.colors import to_rgb
from PIL import Image

import data
import train
from data import Batches, Order
from medseg import drawing, fonts, plots
from medseg.drawing import describe_shown, rgb_image, with_legend
from medseg.fonts import drawable, fit_lines, pillow_font
from medseg.planning.audit import audit
from medseg.planning.contact_sheet import draw_tile, save_contact_sheet, spread_by_foreground
from medseg.results.folder import montage
from medseg.run_lengths import encode

ODD = "$\\frac$ 病人_7"  # what matplotlib takes for a formula; characters that few fonts have


@pytest.fixture
def chinese_font(tmp_path, monkeypatch):
    """The one font of this machine beside DejaVu: with an É for two Chinese characters."""
    font, path = TTFont(fonts.dejavu()), str(tmp_path / "two.ttf")
    for table in font["cmap"].tables:
        table.cmap |= dict.fromkeys(map(ord, "病人"), table.cmap.get(ord("É")))
    font.save(path)
    monkeypatch.setattr(fonts, "_font_files", lambda: [fonts.dejavu(), path])
    fonts._best_font.cache_clear()
    yield path
    fonts._best_font.cache_clear()


def test_a_name_is_drawn_with_a_font_that_has_its_characters(chinese_font, monkeypatch):
    assert drawable("plain $x^2$") == (["plain $x^2$"], None)
    assert drawable("naïve") == (["naïve"], fonts.dejavu())
    assert drawable("a", "病人") == (["a", "病人"], chinese_font)
    assert drawable("病肿") == (["病\\u80bf"], chinese_font)  # of 肿 there is no glyph
    assert drawable("a\nb\udcff") == (["a\\nb\\udcff"], None)  # one line, and text that can be
    odd, plain = (with_legend(Image.new("L", (9, 9)), [name], single=True) for name in ("病", "É"))
    assert odd == plain
    monkeypatch.setattr(fonts, "_font_files", lambda: [fonts.dejavu()])
    fonts._best_font.cache_clear()
    assert drawable("病人_7") == (["\\u75c5\\u4eba_7"], None)


def test_a_name_is_broken_and_cut_in_the_middle():
    font, name = pillow_font(None, 11), "b" * 120 + "0123456789" * 8
    assert fit_lines("short.png", font, 152, 4) == ["short.png"]
    lines = fit_lines(name, font, 152, 4)
    assert len(lines) == 4 and all(font.getlength(line) <= 152 for line in lines)
    start, _, end = "".join(lines).partition("...")
    assert name.startswith(start) and name.endswith(end) and abs(len(start) - len(end)) <= 1


def test_each_image_of_the_sheet_has_its_name_and_its_own_mask(tmp_path, monkeypatch):
    """Dark images in which squares of 1, 2, 3 times 8 pixels are annotated; file names mixed."""
    shares = [0.5, 0.1, 0.0, 0.3, 0.2, 0.4]
    assert spread_by_foreground(shares, 3) == [2, 4, 0]  # 0, 0.2, 0.5 of 0, 0.1, ..., 0.5
    assert spread_by_foreground(shares, 99) == [2, 1, 4, 3, 5, 0]
    sides, rows = {"c.png": 8, ODD + ".png": 24, "a.png": 16}, []
    images = {name: Image.new("RGB", (48, 96)) for name in sides}
    annotations = [(n, square(0, 0, side)) for n, side in enumerate(sides.values())]
    write_split(tmp_path / "set" / "train", images, annotations)
    write_split(tmp_path / "set" / "valid", {"empty.png": Image.new("RGB", (9, 9))})
    sheet = "medseg.planning.audit.save_contact_sheet"
    monkeypatch.setattr(sheet, lambda given, *_: rows.extend(given))
    script_here("data.py", "set", "--show", 2, cwd=tmp_path)
    (small, large), (empty,) = rows
    assert empty[1:] == ("valid/empty.png", "0 % foreground")
    assert small[1:] == ("train/c.png", f"{100 * 8 * 8 / 48 / 96:.3g} % foreground")
    assert large[1] == f"train/{ODD}.png"
    for (tile, *_), side in ((small, 8), (large, 24)):
        assert tile.size == (76, 152)  # in proportion
        red = np.argwhere((np.asarray(tile) == (255, 0, 0)).all(2))
        assert red.min() == 0 and red.max() == pytest.approx(side * 152 / 96 - 1, abs=1)
    path = save_contact_sheet([[small] * 20], [], tmp_path / "twenty.jpg")  # in lines of 8
    assert Image.open(path).size == (8 * 160, 3 * (152 + 2 * 14 + 16) + 8)


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (10, 2000)])
def test_images_of_any_shape_and_masks_of_a_pixel_are_seen(size, tmp_path):
    outline = {"size": [size[1], size[0]], "counts": [size[0] * size[1] - 1, 1]}
    image = {f"{ODD}.png": Image.new("RGB", size)}
    write_split(tmp_path / "set" / "train", image, [(0, outline)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of glyphs that a font has not
        audit(tmp_path / "set", tmp_path)
    tile = np.asarray(Image.open(tmp_path / "contact_sheet.jpg")).astype(int)[:170]
    assert (tile[..., 0] - tile[..., 1:].max(2) > 60).any()  # red


def test_predictions_are_shown_at_the_size_of_their_images(tmp_path, monkeypatch):
    """A network at 32x32 sees squares in wide images, of which one is damaged and left out."""
    boxes = {"a.png": (30, 10, 40), "broken.png": (1, 1, 9), "b.png": (80, 20, 33)}
    images = {name: scan(160, 64, *box) for name, box in boxes.items()}
    write_split(tmp_path / "test", images, [(index, square(25, 5, 40)) for index in range(3)])
    (tmp_path / "test" / "broken.png").write_bytes(b"no picture")
    drawn, skipped = [], []

    def keep(cases, *_, captions, **options):
        drawn.append((cases, captions))

    monkeypatch.setattr(train.plots, "plot_predictions", keep)
    rows = data.load_split(tmp_path, "test", 32, skipped=skipped)
    dataset = data.open_split(tmp_path, "test", 32).without(skipped)
    loader = Batches(rows, Order(2), dataset=dataset)
    for batches in (loader, list(loader)):  # the second are those of any loader
        train.visualize_predictions(brightness_model(), batches, "cpu")
    (cases, names), (plain, unnamed) = drawn
    assert (names, unnamed) == (["a.png", "b.png"], ())
    for name, (picture, (target,), (pred,), title) in zip(names, cases, strict=True):
        shown = np.asarray(images[name])
        np.testing.assert_array_equal(picture, np.repeat(shown[..., None], 3, 2))
        assert target[5:45, 25:65].all() and target.sum() == 1600
        assert (pred != (shown > 99)).mean() < 0.1
        assert title == f"Dice {2 * (pred & target).sum() / (pred.sum() + 1600):.2f}"
    for row, (picture, (target,), (pred,), _) in zip(rows, plain, strict=True):
        np.testing.assert_allclose(255 * picture, row[..., :3], atol=0.01)
        assert (target == row[..., 3]).all() and (pred != (row[..., 0] > 99)).mean() < 0.1


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    drawn, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda *given: (drawn.append(given[0]), save(*given)))
    return drawn


def ribbons(width, size=200):
    """bool (size, size): lines of so many pixels across the picture."""
    return (np.arange(size) % 40 < width)[:, None] & np.ones((1, size), bool)


@pytest.mark.parametrize("width, thin", [(3, True), (12, False)])
def test_thin_structures_are_marked_pixel_by_pixel(width, thin, figures, tmp_path):
    """Vessels as right, missed and wrong pixels; what is broader by its outlines."""
    mask, picture = ribbons(width), np.full((200, 200, 3), 90, np.uint8)
    pred = np.roll(mask, 1, 0)
    case, path = (picture, mask[None], pred[None], "title"), tmp_path / "predictions.png"
    plots.plot_predictions([case], path, title="", class_names=["vessel"])
    (axis,) = (axis for axis in figures[0].axes if axis.images)
    pixels = np.asarray(axis.images[0].get_array())
    words = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert drawing.are_thin([mask]) == thin and bool(axis.collections) == (not thin)
    if not thin:
        assert (pixels == 90).all() and words == ["true outline", "prediction"]
        return
    assert words == ["right pixels", "missed pixels", "wrong pixels"]
    expected = [mask & pred, mask & ~pred, pred & ~mask, ~mask & ~pred]
    for where, color in zip(expected, [*plots.PIXEL_COLORS.values(), "#5a5a5a"], strict=True):
        assert where.any() and np.allclose(pixels[where], to_rgb(color))
    # A vessel of 3 pixels covers less than one of the contact sheet: the image is seen below it.
    mask = encode(ribbons(3, 600).T)
    tile = np.asarray(draw_tile(Image.new("RGB", (600, 600), (0, 0, 200)), {0: mask}, 1))
    assert tile[..., 0].mean() / 255 == pytest.approx(0.8 * 3 / 40, rel=0.05)
    assert tile[..., 2].min() > 30


def test_the_names_below_predictions_are_no_formulas(tmp_path, figures, chinese_font):
    mask, path = np.ones((1, SIZE, SIZE), bool), tmp_path / "predictions.png"
    cases = [(np.zeros((SIZE, SIZE, 3)), mask, mask, "Dice 1.00")] * 2
    names = {"title": ODD, "class_names": [ODD], "captions": [ODD, "x" * 300]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_predictions(cases, path, **names)
    first, second = (axis.xaxis.label for axis in figures[0].axes)
    assert "病人" in first.get_text() and first.get_fontproperties().get_file() == chinese_font
    box, axes = (thing.get_window_extent() for thing in (second, figures[0].axes[1]))
    assert box.width <= axes.width * 1.1 and second.get_text().count("\n") == 2


def test_the_channels_and_the_slices_that_are_shown():
    assert rgb_image(np.uint8([[[40, 80]]])).getpixel((0, 0)) == (40, 40, 40)
    assert describe_shown(["t1", "t2"], "a, ") == "a, shown: t1"
    assert rgb_image(np.uint8([[[40, 80, 120, 160]]])).getpixel((0, 0)) == (40, 80, 120)
    assert describe_shown(["t1", "t2", "flair", "x"]) == "shown: red t1, green t2, blue flair"
    assert describe_shown(()) == describe_shown(["t1"], "a, ") == ""
    pictures = [np.full((40, 80), 3 * index, np.uint8) for index in range(60)]
    masks, shown = np.zeros((60, 40, 80), np.uint8), []
    masks[10:13, 5:10, 5:10] = 2

    def draw(image, mask):
        shown.append((image.getpixel((0, 0))[0] // 3, int(mask.max())))
        return image

    montage(pictures, masks, draw=draw)
    assert shown == [(10, 2), (11, 2), (12, 2)]
    sheet = montage(pictures, masks * 0, draw=draw)
    assert len(shown) == 23 and (shown[3], shown[-1]) == ((0, 0), (59, 0))
    assert sheet.mode == "RGB" and max(sheet.size) < 2000
