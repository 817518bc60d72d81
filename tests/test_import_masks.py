"""download.py --masks: what the values of masks mean, pairs of files, EXIF orientation."""

import io
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    MASKS,
    PHOTO,
    annotations,
    brightness_model,
    grey,
    labels,
    photo,
    read_rgb,
    refuse_download,
    run_download,
    save,
    save_pair,
    scan,
    script,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

import predict
from medseg.importing.values import classes_of_counts
from medseg.own_files import drawn_beside_masks
from medseg.samples import turn

# ---------------------------------------------------------------- encodings of masks


def palette(indices, colours):
    def make(m):
        image = Image.fromarray(np.array(indices, np.uint8)[m]).convert("P")
        image = Image.frombytes("P", image.size, np.array(indices, np.uint8)[m].tobytes())
        image.putpalette([channel for colour in colours for channel in colour])
        return image

    return make


def colours(values, mode="RGB"):
    return lambda m: Image.fromarray(np.array(values, np.uint8)[m]).convert(mode)


COLOURS = [(0, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]


def with_alpha(m, colour=255):
    """Of one colour everywhere, and transparent where it is background."""
    rgba = np.full((*m.shape, 4), colour, np.uint8)
    rgba[..., 3] = np.where(m == 0, 0, 255)
    return Image.fromarray(rgba)


FOREGROUND = ["foreground"]
ENCODINGS = {  # suffix, image of a label map, class names
    "1-bit PNG": (".png", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "1-bit TIFF": (".tif", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "0/1 PNG": (".png", grey([0, 1]), FOREGROUND),
    "0/255 PNG": (".PNG", grey([0, 255]), FOREGROUND),
    "0/255 BMP": (".bmp", grey([0, 255]), FOREGROUND),
    "0/128 TIFF": (".tiff", grey([0, 128]), FOREGROUND),
    "0/255 GIF": (".gif", grey([0, 255]), FOREGROUND),
    "palette GIF": (".gif", palette([1, 0], [(9, 9, 9), (0, 0, 0)]), FOREGROUND),
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
    "alpha of black": (".png", lambda m: with_alpha(m, 0), FOREGROUND),
    "GIF of RGB": (".gif", colours([(0, 0, 0), (255, 255, 255)]), FOREGROUND),
    "GIF of RGBA": (".gif", colours([(0, 0, 0), (255, 255, 255)], "RGBA"), FOREGROUND),
    "palette, white first": (".png", palette([1, 0], [(255, 255, 255), (0, 0, 0)]), FOREGROUND),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_masks_come_back_bit_for_bit(here, case):
    suffix, make, names = ENCODINGS[case]
    first = 0 if case == "no black" else 1
    maps = {f"{n}": labels(n, len(names) + first - 1) for n in range(3)}
    for stem, label_map in maps.items():
        save_pair(stem, make(label_map), suffix)
    assert "pairs: 3 images" in run_download(*MASKS)
    for stem, label_map in maps.items():
        masks = stored()[stem]
        assert list(masks) == names
        for number, name in enumerate(names, start=first):
            assert_array_equal(masks[name], label_map == number)
    categories = annotations("train")["categories"]
    assert [category["id"] for category in categories] == list(range(1, len(names) + 1))
    assert Path("dataset/train/0.png").read_bytes() == Path("images/0.png").read_bytes()


def test_alpha_of_a_black_mask_beside_others_is_no_mask(here):
    label_map = labels(1)
    save_pair("a", with_alpha(label_map, 0))
    assert "opaque" in run_download(*MASKS)
    assert_array_equal(stored()["a"]["foreground"], label_map == 1)
    save_pair("b", colours([(0, 0, 0), (7, 200, 0)])(label_map))
    assert "opaque" not in run_download(*MASKS, "--force")
    assert not stored()["a"]
    assert_array_equal(stored()["b"]["foreground"], label_map == 1)


def blob():
    """0/255 of large areas, whose borders JPEG blurs."""
    small = Image.fromarray((labels(1)[:6, :8] > 0).astype(np.uint8) * 255)
    return small.resize((72, 54), Image.Resampling.NEAREST)  # not JPEG's 8


@pytest.mark.parametrize("quality", [50, 75, 95, None])
def test_masks_with_blurred_borders_are_cut_at_half(here, quality):
    mask, suffix, options = blob(), ".jpg", {"quality": quality}
    wanted = np.asarray(mask) == 255
    if not quality:  # smoothed by resizing
        mask, suffix, options = mask.resize((333, 250), Image.Resampling.BICUBIC), ".png", {}
        wanted = np.asarray(mask) > 127
    save_pair("a", mask, suffix, **options)
    assert len(np.unique(np.asarray(Image.open(f"masks/a{suffix}")))) > 2
    out = run_download(*MASKS)
    assert "warning: " in out and "value above 127" in out
    assert_array_equal(stored()["a"]["foreground"], wanted)


def test_ignored_index_of_a_palette_is_background(here):
    several, one = labels(2, 3), labels(2, 2)
    save_pair("a", palette([0, 1, 15, 255], COLOURS * 64)(several))
    out = run_download(*MASKS)
    percent = 100 * (several == 3).mean()
    assert f"warning: palette index 255 ({percent:.2f} % of the pixels)" in out
    assert list(stored()["a"]) == ["1", "15"]
    save_pair("a", palette([0, 1, 255], COLOURS * 64)(one))
    assert "class foreground: value 1, " in run_download(*MASKS, "--force")
    assert list(stored()["a"]) == FOREGROUND
    assert_array_equal(stored()["a"]["foreground"], one == 1)
    save_pair("a", grey([0, 1, 255])(one))  # no palette: 255 is a class
    run_download(*MASKS, "--force")
    assert_array_equal(stored()["a"]["255"], one == 2)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_pixels_of_less_than_half_alpha_are_background(here, mode):
    alpha = np.arange(256, dtype=np.uint8).reshape(8, 32)
    mask = Image.new(mode, (32, 8), 9 if mode == "LA" else (9, 0, 7))
    mask.putalpha(Image.fromarray(alpha))
    save_pair("a", mask)
    run_download(*MASKS)
    assert_array_equal(stored()["a"]["foreground"], alpha >= 128)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("between", [True, False])
def test_127_is_background_and_128_foreground(here, suffix, between):
    values = np.array([*range(256), *[0, 255] * 128], np.uint8).reshape(16, 32)
    if suffix == ".jpg" or not between:
        values = np.array([[0, 127, 128, 255] if between else [0, 0, 255, 255]], np.uint8)
    pixels = np.kron(values, np.ones((8, 8), np.uint8))  # whole blocks, which JPEG keeps
    save_pair("a", Image.fromarray(pixels), suffix, quality=100)
    assert_array_equal(np.asarray(Image.open(f"masks/a{suffix}")), pixels)
    out = run_download(*MASKS)
    assert ", 50.00 % of the" in out and ("warning" in out) == between
    assert ("value above 127" in out) == (between or suffix == ".jpg")
    assert_array_equal(stored()["a"]["foreground"], pixels >= 128)


def test_masks_are_turned_by_their_own_orientation(here):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = grey([0, 1])(labels(1, size=PHOTO[::-1]))
    save(photo(), "images/a.png")
    save(mask, "masks/a.png", exif=exif)
    run_download(*MASKS)
    shown = np.asarray(mask.transpose(Image.Transpose.ROTATE_270)) == 1  # 6: a quarter clockwise
    assert_array_equal(stored()["a"]["foreground"], shown)


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
        assert mask_classes.names == FOREGROUND
        assert mask_classes.names_of == {255: ("foreground",)}
    else:
        assert mask_classes.names == [str(value) for value in sorted(counts) if value]


def test_255_classes_and_no_more():
    everything = dict.fromkeys(range(256), 1)
    mask_classes = classes_of_counts([("a.png", "volume", everything)], "masks")
    assert mask_classes.names == [str(value) for value in range(1, 256)]
    with pytest.raises(ValueError, match=r"a\.png: holds 257 "):
        classes_of_counts([("a.png", "grey", everything | {256: 1})], "masks")
    with pytest.raises(ValueError, match=r"b\.png: .* 257 "):
        classes_of_counts([("a.png", "grey", everything), ("b.png", "grey", {256: 1})], "masks")


@pytest.mark.parametrize("top, refused", [(2**24, 0), (2**24 + 2, 1), (-(2**24) - 2, 1)])
def test_whole_numbers_of_a_float_tiff(here, top, refused):
    values = labels().astype(np.float32) * top
    save_pair("a", Image.fromarray(values), ".tif")
    if refused:
        refuse_download(*MASKS, words=["masks/a.tif"])
        return
    run_download(*MASKS)
    assert_array_equal(stored()["a"]["foreground"], values == top)


def test_grey_masks_may_be_stored_as_colours(here):
    maps = {"a": labels(0, 2), "b": labels(1, 2)}
    for stem, mode in (("a", "L"), ("b", "RGB")):
        save_pair(stem, grey([0, 1, 2])(maps[stem]).convert(mode))
    out = run_download(*MASKS)
    for value in (1, 2):
        percent = 100 * np.mean([label_map == value for label_map in maps.values()])
        assert f"class {value}: value {value}, {percent:.2f} % of the pixels" in out
        for stem, label_map in maps.items():
            assert_array_equal(stored()[stem][f"{value}"], label_map == value)


def test_classes_are_named_in_ascending_order(here):
    label_map = labels(1, 2)
    save_pair("a", grey([0, 200, 100])(label_map))
    refuse_download(*MASKS, "--classes", "cup", words=["--classes", "100, 200"])
    refuse_download(*MASKS, "--classes", "cup,cup", words=["'cup'"])
    assert "class cup: value 100" in run_download(*MASKS, "--classes", "cup, disc")
    assert_array_equal(stored()["a"]["cup"], label_map == 2)
    assert_array_equal(stored()["a"]["disc"], label_map == 1)


def frames():
    out = io.BytesIO()
    pages = [Image.new("L", PHOTO, value) for value in (0, 255)]
    pages[0].save(out, "GIF", save_all=True, append_images=pages[1:])
    return out.getvalue()


def cut_png():
    out = io.BytesIO()
    grey([0, 255])(labels()).save(out, "PNG")
    return out.getvalue()[:60]


BAD_MASKS = {  # name, picture or bytes, what the message names
    "a photograph": ("a.png", photo(5), "a.png"),
    "colours in JPEG": ("a.jpg", photo(5), "a.jpg"),
    "small values in JPEG": ("a.jpg", Image.new("L", PHOTO, 3), "JPEG"),
    "empty": ("a.png", Image.new("L", PHOTO), "empty"),
    "empty JPEG": ("a.jpg", Image.new("L", PHOTO), "empty"),
    "another size": ("a.png", Image.new("L", (30, 40), 1), "30x40"),
    "fractions": ("a.tif", Image.new("F", PHOTO, 0.5), "a.tif"),
    "CMYK": ("a.tif", Image.new("CMYK", PHOTO), "CMYK"),
    "cut": ("a.png", cut_png(), "a.png"),
    "text": ("a.gif", b"GIF89a, or not", "a.gif"),
    "several frames": ("a.gif", frames(), "2 pictures"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_bad_masks_are_one_line(here, case):
    name, mask, word = BAD_MASKS[case]
    save(photo(), "images/a.png")
    Path("masks").mkdir()
    if isinstance(mask, bytes):
        Path("masks", name).write_bytes(mask)
    else:
        mask.save(Path("masks", name))
    line = refuse_download(*MASKS, words=["masks", word])
    if case == "another size":
        assert str(Path("images/a.png")) in line and "40x30" in line


def test_damaged_image_leaves_nothing(here):
    for stem in "abc":
        save_pair(stem)
    path = Path("images/b.png")
    path.write_bytes(path.read_bytes()[:500])
    refuse_download(*MASKS, words=["b.png"])
    refuse_download("--masks", "nowhere", "masks", words=["nowhere"])
    Path("nothing").mkdir()
    refuse_download("--masks", "images", "nothing", words=["nothing"])


# ---------------------------------------------------------------- pairs

NFC, NFD = (unicodedata.normalize(form, "Läsion é") for form in ("NFC", "NFD"))


def test_names_pair_in_any_unicode_form(here):
    assert NFC != NFD
    save(photo(1), f"images/{NFD}/{NFD} 1.png")
    save(photo(2), f"images/{NFC}/{NFC} 2.png")
    masks = {1: f"masks/{NFC}/{NFC.upper()} 1_m.png", 2: f"masks/{NFD}/{NFD} 2_m.png"}
    for seed, path in masks.items():
        save(grey([0, 1])(labels(seed)), path)
    assert "pairs: 2 images with 2 masks" in run_download(*MASKS)
    kept = stored()
    assert len(kept) == 2
    for seed in masks:
        (name,) = (name for name in kept if name.endswith(f"{seed}"))
        assert_array_equal(kept[name]["foreground"], labels(seed) == 1)


def test_names_that_cannot_be_printed(here):
    for stem in ("a\udcff", "b\nc"):
        save_pair(stem)
    result = script("download.py", *MASKS, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert "such as images/a\\udcff.png with masks/a\\udcff.png\n" in result.stdout
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
    patterns = ("--masks", "images/{id}.png", "masks/{id}_mask{part}.*", *ALL)
    assert "1 times several masks, united" in run_download(*patterns)
    one = (first == 1) | (second == 1) | (other == 1)
    two = (first == 2) | (second == 2)
    assert (one & two).any()  # classes may overlap, and both are kept
    assert_array_equal(stored()["x"]["1"], one)
    assert_array_equal(stored()["x"]["2"], two)
    assert_array_equal(stored()["y"]["1"], other == 1)
    save(Image.new("L", (30, 40), 1), "masks/x_mask_1.png")
    refuse_download(*patterns, "--force", words=["x_mask_1.png", "30x40", "x.png", "40x30"])


def test_united_masks_may_be_of_several_encodings(here):
    first, second = labels(1), labels(2)
    white = colours([(0, 0, 0), (255, 255, 255)], "RGBA")
    for stem in "xy":
        save(photo(), f"images/{stem}.png")
        save(Image.fromarray(first > 0), f"images/masks/{stem}_mask.png")
        save(white(second), f"images/masks/{stem}_mask_1.png")
    run_download("--masks", "images/{id}.png", "images/masks/{id}_mask{part}.png", *ALL)
    assert_array_equal(stored()["x"]["foreground"], (first | second) > 0)


def test_skip_unpaired(here):
    for stem in "abcdefgh":
        save(photo(), f"images/{stem}.jpg")
    for stem in (*"abch", *(f"more/{number}" for number in range(4))):
        save(grey([0, 1])(labels()), f"masks/{stem}.png")
    names = ["4 of 8", "images/d.jpg, images/e.jpg", "4 of 8", "more/0.png, masks/more/1.png"]
    refuse_download(*MASKS, words=[*names, "--skip-unpaired"])
    out = run_download(*MASKS, "--skip-unpaired")
    assert all(name in out for name in names)
    assert set(stored()) == {"a", "b", "c", "h"}
    for stem in "defg":
        Path(f"images/{stem}.jpg").unlink()
    assert "have no mask" not in refuse_download(*MASKS, "--force", words=["4 of 8"])
    save(grey([0, 1])(labels()), "masks/c.tif")
    refuse_download(*MASKS, "--force", "--skip-unpaired", words=["masks/c.png", "masks/c.tif"])


@pytest.mark.parametrize(
    "images, masks", [("data", "data/masks"), ("data/images", "data"), ("data/i", "data/m")]
)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_nested_folders_and_one_inside_the_other(here, images, masks, suffix):
    for folder in ("p", "q"):
        save(photo(), f"{images}/{folder}/1_img{suffix}")
        save(grey([0, 1])(labels(len(folder))), f"{masks}/{folder}/1_m.png")
    save(photo(), f"{images}/.hidden/2.jpg")
    assert "pairs: 2 " in run_download("--masks", images, masks, *ALL)
    assert set(stored()) == {"p_1", "q_1"}


def test_two_folders_are_said_as_patterns_that_do_the_same(here):
    for stem in ("21", "22"):
        save_pair(stem, suffix="_manual1.gif")
        Path(f"images/{stem}.png").rename(f"images/{stem}_training.png")
    out = run_download(*MASKS)
    (line,) = (line for line in out.splitlines() if line.startswith("the same as: "))
    before = stored()
    run_download(*shlex.split(line.removeprefix("the same as: ")), *ALL, "--force")
    np.testing.assert_equal(stored(), before)
    assert set(before) == {"21", "22"}


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
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
    run_download(*MASKS)
    (file,) = (path for path in Path("dataset/train").iterdir() if path.suffix != ".json")
    assert_array_equal(read_rgb(file), shown)
    assert_array_equal(stored()["a"]["foreground"], label_map == 1)
    copied = file.read_bytes() == Path(f"images/a{suffix}").read_bytes()
    assert copied == (orientation == 1 or suffix == ".tif")
    if orientation >= 5:  # a mask of the size before turning is turned along
        before = labels(2)
        save(grey([0, 1])(before), "masks/a.png")
        run_download(*MASKS, "--force")
        code = Image.fromarray((before == 1).astype(np.uint8))
        code.getexif()[0x0112] = orientation
        wanted = np.asarray(ImageOps.exif_transpose(code)) == 1
        assert_array_equal(stored()["a"]["foreground"], wanted)


def test_turn_agrees_with_pillow():
    image = photo()
    for orientation in range(1, 9):
        image.getexif()[0x0112] = orientation
        wanted = np.asarray(ImageOps.exif_transpose(image))
        assert_array_equal(turn(np.asarray(image), orientation), wanted)


# ---------------------------------------------------------------- what predict.py wrote


WRITE = ("--write", "mask,overlay,probability")


@pytest.mark.parametrize("single", [False, True])
def test_predicted_masks_are_imported_without_the_pictures_beside_them(single, here):
    """A folder with its masks in another, and single images with all in the folder they are in."""
    torch.save(brightness_model().state_dict(), "best_model.pth")
    for number, side in enumerate((20, 30)):
        save(scan(64, 48, 5, 7, side), f"scans/{number}.png")
    if single:
        for number in range(2):
            predict.main([f"scans/{number}.png", "--output", "scans", *WRITE])
    else:
        predict.main(["scans", "--output", "masks", *WRITE])
        save(photo(), "masks/report.png")
        save(photo(), "masks/predictions.png")
    masks = Path("scans" if single else "masks")
    sides = ("scans/{id}.png", "scans/{id}_mask.png") if single else ("scans", "masks")
    assert "pairs: 2" in run_download("--masks", *sides, *ALL)
    for number in range(2):
        expected = np.asarray(Image.open(masks / f"{number}_mask.png")) > 0
        assert_array_equal(stored()[str(number)]["foreground"], expected)


def test_the_probabilities_of_a_class_lie_beside_the_mask_of_their_image():
    beside, alone = Path("x_2_probability.png"), Path("y_2_probability.png")
    assert drawn_beside_masks([Path("x_mask.png"), beside, alone]) == {beside}


def test_what_is_called_like_a_drawing_is_a_mask_where_it_stands_alone(here):
    for stem in "ab":
        save_pair(stem)
        Path(f"masks/{stem}.png").rename(f"masks/{stem}_overlay.png")
    out = run_download(*MASKS)
    assert "pairs: 2" in out
