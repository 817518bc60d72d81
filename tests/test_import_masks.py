"""download.py --masks: encodings of masks, pairs of files, EXIF orientation, predicted masks."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    MASKS,
    PHOTO,
    STORED_TURNED,
    annotations,
    brightness_model,
    grey,
    labels,
    palette,
    photo,
    read_rgb,
    refuse_download,
    run_download,
    save,
    save_pair,
    save_turned,
    scan,
    script,
    stored,
)
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

import predict
from medseg.own_files import drawn_beside_masks

# ---------------------------------------------------------------- encodings of masks


COLOURS = [(0, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]
FOREGROUND = ["foreground"]


def colours(values, mode="RGB"):
    return lambda m: Image.fromarray(np.array(values, np.uint8)[m]).convert(mode)


def black_with_alpha(m):
    """Black everywhere, and transparent where it is background."""
    rgba = np.zeros((*m.shape, 4), np.uint8)
    rgba[..., 3] = np.where(m == 0, 0, 255)
    return Image.fromarray(rgba)


def write_mask(made, path):
    """A picture, or an array for a .npy file."""
    Path(path).parent.mkdir(exist_ok=True)
    if isinstance(made, np.ndarray):
        np.save(path, made, allow_pickle=True)
    else:
        made.save(path)


ENCODINGS = {  # suffix, image or array of a label map, class names
    "1-bit PNG": (".png", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "0/255 BMP": (".BMP", grey([0, 255]), FOREGROUND),
    "grey levels": (".png", grey([0, 85, 170, 255]), ["85", "170", "255"]),
    "grey alpha": (".png", lambda m: grey([0, 255])(m).convert("LA"), FOREGROUND),
    "no black": (".png", grey([3, 7]), ["3", "7"]),
    "16-bit PNG": (".png", grey([0, 300, 65535], np.uint16), ["300", "65535"]),
    "32-bit TIFF": (".tif", grey([0, 70000], np.int32), FOREGROUND),
    "float TIFF": (".tif", grey([0, 1, 2], np.float32), ["1", "2"]),
    "palette PNG": (".png", palette([0, 1, 15], COLOURS * 5), ["1", "15"]),
    "palette 0/255": (".png", palette([0, 255], COLOURS * 64), FOREGROUND),
    "RGBA": (".png", colours(COLOURS, "RGBA"), ["#0000ff", "#ff0000", "#ffffff"]),
    "alpha of black": (".png", black_with_alpha, FOREGROUND),
    "GIF of RGBA": (".gif", colours([(0, 0, 0), (255, 255, 255)], "RGBA"), FOREGROUND),
    "palette, white first": (".png", palette([1, 0], [(255, 255, 255), (0, 0, 0)]), FOREGROUND),
    "bool array": (".npy", lambda m: m > 0, FOREGROUND),
    "big-endian array": (".npy", lambda m: (m * 70000).astype(">i4"), FOREGROUND),
    "floats of a scale": (".npy", lambda m: m * 1.0000153, ["1", "2"]),
    "array (H, W, 1)": (".npy", lambda m: m[..., None].astype(np.int16), ["1", "2"]),
    "negative numbers": (".npy", lambda m: -m.astype(np.int8), FOREGROUND),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_masks_come_back_bit_for_bit(here, case):
    suffix, make, names = ENCODINGS[case]
    start = 0 if case == "no black" else 1
    maps = {f"{n}": labels(n, len(names) + start - 1) for n in range(3)}
    for stem, label_map in maps.items():
        save(photo(int(stem)), f"images/{stem}.png")
        write_mask(make(label_map), f"masks/{stem}{suffix}")
    out = run_download(*MASKS)
    assert "pairs: 3 images" in out and ("opaque" in out) == (case == "alpha of black")
    for stem, label_map in maps.items():
        masks = stored()[stem]
        assert list(masks) == names
        for number, name in enumerate(names, start):
            assert_array_equal(masks[name], label_map == number)
    categories = annotations("train")["categories"]
    assert [category["id"] for category in categories] == list(range(1, len(names) + 1))
    assert Path("dataset/train/0.png").read_bytes() == Path("images/0.png").read_bytes()


def test_alpha_of_a_black_mask_beside_others_is_no_mask(here):
    save_pair("a", black_with_alpha(labels(1)))
    save_pair("b", colours([(0, 0, 0), (7, 200, 0)])(labels(1)))
    assert "opaque" not in run_download(*MASKS)
    assert not stored()["a"]
    assert_array_equal(stored()["b"]["foreground"], labels(1) == 1)


BAD_MASKS = [  # name, picture or array, what the message names
    ("a.png", photo(5), "a.png"),
    ("a.jpg", photo(5), "a.jpg"),  # whose colours are no classes any more
    ("a.jpg", Image.new("L", PHOTO, 3), "empty"),
    ("a.png", Image.new("L", (30, 40), 1), "30x40, but its image images/a.png is"),
    ("a.tif", Image.new("F", PHOTO, 0.5), "a.tif"),
    ("a.tif", Image.new("F", PHOTO, 2**24 + 2), "a.tif"),
    ("a.npy", np.array([{}], dtype=object), "a.npy"),
    ("a.npy", np.zeros((30, 40, 3), np.uint8), "a.npy"),
    ("a.npy", np.full((30, 40), np.nan), "a.npy"),
]


@pytest.mark.parametrize("name, mask, word", BAD_MASKS)
def test_bad_masks_are_one_line(here, name, mask, word):
    save(photo(), "images/a.png")
    write_mask(mask, f"masks/{name}")
    refuse_download(*MASKS, words=["masks", word])


def test_a_damaged_image_or_an_empty_folder_leaves_nothing(here):
    for stem in "ab":
        save_pair(stem)
    Path("images/b.png").write_bytes(Path("images/b.png").read_bytes()[:500])
    refuse_download(*MASKS, words=["b.png"])
    Path("nothing").mkdir()
    refuse_download("--masks", "images", "nothing", words=["nothing"])


# ---------------------------------------------------------------- pairs


def test_names_that_cannot_be_printed(here):
    for stem in ("a\udcff", "b\nc"):
        save_pair(stem)
    result = script("download.py", *MASKS, cwd=here)
    assert (result.returncode, result.stderr) == (0, "")
    assert "such as images/a\\udcff.png with masks/a\\udcff.png\n" in result.stdout
    assert set(stored()) == {"a_", "b_c"}


def test_several_masks_of_an_image_are_united(here):
    """Of several encodings; classes may overlap, and both are kept."""
    one, two = labels(0, 2), labels(1, 2)
    save(photo(), "images/x.png")
    save(grey([0, 1, 2])(one), "masks/x_mask.tif")
    save(grey([0, 1, 2])(two).convert("RGBA"), "masks/x_mask_1.png")
    patterns = ("--masks", "images/{id}.png", "masks/{id}_mask{part}.*", *ALL)
    assert "1 times several masks, united" in run_download(*patterns)
    assert ((one == 1) & (two == 2)).any()
    for number in (1, 2):
        united = (one == number) | (two == number)
        assert_array_equal(stored()["x"][f"{number}"], united)
    save(Image.new("L", (30, 40), 1), "masks/x_mask_1.png")
    refuse_download(*patterns, "--force", words=["x_mask_1.png", "30x40", "x.png", "40x30"])


@pytest.mark.parametrize("folders", ["data data/masks", "data/images data", "data/i data/m"])
def test_nested_folders_and_one_inside_the_other(here, folders):
    images, masks = folders.split()
    for folder in ("p", "q"):
        save(photo(), f"{images}/{folder}/1_img.png")
        save(grey([0, 1])(labels(len(folder))), f"{masks}/{folder}/1_m.png")
    save(photo(), f"{images}/.hidden/2.jpg")
    command, pairs, *_ = run_download("--masks", images, masks, *ALL).splitlines()
    before = stored()
    assert "pairs: 2 " in pairs and set(before) == {"p_1", "q_1"}
    run_download(*shlex.split(command.removeprefix("the same as: ")), *ALL, "--force")
    np.testing.assert_equal(stored(), before)


# ---------------------------------------------------------------- EXIF


@pytest.mark.parametrize("suffix, orientation", [(".jpg", 6), (".png", 4), (".tif", 6)])
def test_images_are_stored_upright(here, suffix, orientation):
    Path("images").mkdir()
    save_turned(photo(), f"images/a{suffix}", orientation)
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
    assert copied == (suffix == ".tif")
    # A mask that says its own orientation, and one of the size before turning, are turned along.
    save_turned(label_map.astype(np.uint8), "masks/a.png", 6)
    run_download(*MASKS, "--force")
    assert_array_equal(stored()["a"]["foreground"], label_map == 1)
    if orientation >= 5:
        save(Image.fromarray(STORED_TURNED[orientation](label_map.astype(np.uint8))), "masks/a.png")
        run_download(*MASKS, "--force")
        assert_array_equal(stored()["a"]["foreground"], label_map == 1)


# ---------------------------------------------------------------- what predict.py wrote


def test_predicted_masks_are_imported_without_the_pictures_beside_them(here):
    """In a folder of their own, and in the folder of the images."""
    torch.save(brightness_model().state_dict(), "best_model.pth")
    for number, side in enumerate((20, 30)):
        save(scan(64, 48, 5, 7, side), f"scans/{number}.png")
    predict.main(["scans", "--output", "masks", "--write", "mask,overlay,probability"])
    save(photo(), "masks/report.png")
    shutil.copytree("masks", "both")
    shutil.copytree("scans", "both", dirs_exist_ok=True)
    for sides in (("scans", "masks"), ("both/{id}.png", "both/{id}_mask.png")):
        assert "pairs: 2" in run_download("--masks", *sides, *ALL, "--force")
        for stem, masks in stored().items():
            expected = np.asarray(Image.open(f"masks/{stem}_mask.png")) > 0
            assert_array_equal(masks["foreground"], expected)


def test_what_is_called_like_a_drawing_is_a_mask_where_it_stands_alone(here):
    beside, alone = Path("x_2_probability.png"), Path("y_2_probability.png")
    assert drawn_beside_masks([Path("x_mask.png"), beside, alone]) == {beside}
    for stem in "ab":
        save_pair(stem)
        Path(f"masks/{stem}.png").rename(f"masks/{stem}_overlay.png")
    assert "pairs: 2" in run_download(*MASKS)
