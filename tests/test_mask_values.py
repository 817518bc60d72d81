"""download.py --classes and --invert: which values of masks are which class, and what is asked."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    MASKS,
    PHOTO,
    box,
    class_names,
    coco_file,
    grey,
    labelme,
    labels,
    photo,
    polygon,
    refuse_download,
    run_download,
    save,
    save_pair,
    shape,
    stored,
    write_nifti,
)
from numpy.testing import assert_array_equal
from PIL import Image

from medseg.images import save_mask
from medseg.sources import class_names as spelled
from medseg.sources.mask_values import classes_of_counts

LEVELS = np.array([0, 85, 128, 255], np.uint8)
COLOURS = np.array([(0, 0, 0), (0, 0, 255), (255, 0, 0), (128, 128, 128)], np.uint8)


def again(*flags):
    return run_download(*MASKS, "--force", *flags)


ANY_COLOURS = np.arange(256 * 3) % 251


def palette(indices, colours=ANY_COLOURS):
    """Label map -> PIL image of these indices of a palette."""

    def make(label_map):
        image = Image.fromarray(np.array(indices, np.uint8)[label_map])
        image.putpalette(np.array(colours, np.uint8).tobytes())
        return image

    return make


def assert_stored(label_map, **numbers):
    """The one image in train has the classes NAME of these numbers in the label map, no others."""
    (masks,) = stored().values()
    assert set(masks) == {name for name, own in numbers.items() if own}
    for name, mask in masks.items():
        assert_array_equal(mask, np.isin(label_map, numbers[name]))


# ---------------------------------------------------------------- values


CHOICES = {  # --classes of the values 0, 85, 128 and 255, the numbers of each class
    "85=a,128=b,255=c": {"a": [1], "b": [2], "c": [3]},
    "255=c, 85=a": {"c": [3], "a": [1]},
    "85=a,128=b,255=a": {"a": [1, 3], "b": [2]},
    "80-130=a,200-300=b": {"a": [1, 2], "b": [3]},
    "1-100=a,50-85=a": {"a": [1]},
    "*=a": {"a": [1, 2, 3]},
    "85=background,*=a": {"a": [2, 3]},
    "0=a,255=b": {"a": [0], "b": [3]},
    "0=background,85=a=b": {"a=b": [1]},
    "#808080=a,#FFFFFF=b": {"a": [2], "b": [3]},
    "*": {"85": [1], "128": [2], "255": [3]},
}


@pytest.mark.parametrize("text", CHOICES)
def test_values_of_classes(here, text):
    label_map = labels(1, 3)
    save_pair("a", grey(LEVELS)(label_map))
    out = again("--classes", text)
    assert_stored(label_map, **CHOICES[text])
    assert class_names() == list(CHOICES[text])  # in the order in which they are named
    for name, numbers in CHOICES[text].items():
        percent = 100 * np.isin(label_map, numbers).mean()
        values = ", ".join(map(str, LEVELS[numbers]))
        s = "s" if len(numbers) > 1 else ""
        assert f"class {name}: value{s} {values}, {percent:.2f} % of the pixels" in out


def test_border_of_palette_masks_is_not_among_all_values(here):
    label_map = labels(1, 3)
    save_pair("a", palette([0, 1, 2, 255])(label_map))
    assert "so background: 255" in again("--classes", "*=cell")
    assert_stored(label_map, cell=[1, 2])
    again("--classes", "*=cell,255=border")
    assert_stored(label_map, cell=[1, 2], border=[3])


def test_values_that_are_not_named_are_counted(here):
    label_map = labels(1, 3)
    save_pair("a", grey(LEVELS)(label_map))
    percent = 100 * np.isin(label_map, [1, 2]).mean()
    line = f"so background: {{}}; 2 values, {percent:.2f} % of the pixels"
    out = again("--classes", "255=a")
    assert any(line.format(pair) in out for pair in ("85, 128", "128, 85"))
    assert "background" not in again("--classes", "255=a,*=background")


def test_named_values_that_no_mask_has(here):
    save_pair("a", grey(LEVELS)(labels(1, 3)))
    flags = (*MASKS, "--classes")
    # With another that is not named, it is probably mistyped.
    refuse_download(*flags, "85=a,129=b,255=c", words=["129 (b)", "128 is not named", "'*=back"])
    refuse_download(*flags, "129=b", words=["masks", "--classes", "85", "128", "255"])
    out = again("--classes", "85=a,128=b,129=c,255=d")
    assert "no mask has 129 (c)" in out and class_names() == ["a", "b", "c", "d"]
    assert "no mask has 7-9 (x)" in again("--classes", "7-9=x,85=a,*=background")


def test_colours_of_classes(here):
    """Also of palettes, which may list them in any order."""
    label_map = labels(1, 3)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        indexed = palette(np.argsort(order), COLOURS[order])(label_map)
        for mask in (indexed, Image.fromarray(COLOURS[label_map])):
            assert_array_equal(np.asarray(mask.convert("RGB")), COLOURS[label_map])
            save_pair("a", mask)
            again("--classes", "#0000ff=vein,#ff0000=artery,#808080=vein")
            assert_stored(label_map, vein=[1, 3], artery=[2])
    # A number is no colour, even where the code of one has it: 255 is not blue.
    words = ["no mask has 255 (a)", "#0000ff, #ff0000"]
    refuse_download(*MASKS, "--force", "--classes", "255=a,#808080=b", words=words)
    refuse_download(*MASKS, "--force", "--classes", "0-255=a", words=["#0000ff"])
    save_pair("a", Image.fromarray(COLOURS[np.where(label_map == 3, 3, 0)]))  # only greys
    assert "class x: value 128" in again("--classes", "128=x")


def test_palettes_that_differ_are_read_by_colour(here):
    """As programs write them that make 8-bit PNG of colours; equal ones hold numbers of classes."""
    label_map = labels(1, 2)
    for stem, order in {"a": [0, 1, 2], "b": [0, 2, 1]}.items():
        save_pair(stem, palette(np.argsort(order), COLOURS[order])(label_map))
    again()
    assert class_names() == ["#0000ff", "#ff0000"]
    for masks in stored().values():
        assert_array_equal(masks["#0000ff"], label_map == 1)
    save_pair("b", palette([0, 1, 2], COLOURS[:3])(label_map))
    again()
    assert class_names() == ["1", "2"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("1=a,1=b", ["1=a and 1=b", "two classes"]),
        ("1-9=a,5=b", ["1-9=a and 5=b"]),
        ("1-9=a,2=a,8-12=b", ["1-9=a and 8-12=b"]),
        ("1=a,1=background", ["1=a and 1=background"]),
        ("*=a,*=b", ["*=a and *=b"]),
        ("#ff0000=a,#FF0000=b", ["#ff0000=a and #FF0000=b"]),
        ("1=", ["'1'", "empty"]),
        ("=a", ["'=a'", "VALUE=NAME"]),
        ("1=a,b", ["'b'", "VALUE=NAME"]),
        ("9-1=a", ["9-1", "1-9"]),
        ("tumour=1", ["1=tumour"]),
        ("tumour=lesion", ["'tumour'", "number"]),
        ("1=a\tb", ["'a\\tb'"]),
        ("1.5=a", ["'1.5'"]),
        (f"{'9' * 5000}=a", ["'999"]),
        ("names.json", ["names.json", "no such file"]),
        ("masks/a.png", ["masks/a.png", ".json"]),
    ],
)
def test_wrong_values(here, text, words):
    save_pair("a")
    words = ["--classes", *words] if "=" in text else words
    refuse_download(*MASKS, "--classes", text, words=words)


def test_lossy_and_smoothed_masks_take_halves_or_ranges(here):
    small = np.kron(labels(1)[:6, :8] > 0, np.ones((9, 9))).astype(np.uint8) * 255
    large = Image.fromarray(small).resize((333, 250), Image.Resampling.BICUBIC)
    for suffix in (".png", ".jpg"):
        save_pair("a", large, suffix)
        stored_values = np.asarray(Image.open(f"masks/a{suffix}"))
        for text, value in (("255=x", 128), ("*=x", 128), ("60-255=x", 60), ("60-999=x", 60)):
            again("--classes", text)
            assert_array_equal(stored()["a"]["x"], stored_values >= value)
        again("--classes", "0=x")
        assert_array_equal(stored()["a"]["x"], stored_values < 128)
        Path(f"masks/a{suffix}").unlink()
    save_pair("a", large, ".jpg")
    flags = (*MASKS, "--force", "--classes", "128=x,255=y")
    refuse_download(*flags, words=["JPEG", "ranges"])


# ---------------------------------------------------------------- files of names


NUMBERS = {"a": [1], "b": [2], "c": [3]}
FILES = {  # content of a file for masks of 0 to 3, the numbers of each class
    "class_names.txt": ("_background_\na\nb\nc\n\n", NUMBERS),
    "labels.txt": ("__ignore__\r\n_background_\r\na\r\nb\r\nc", NUMBERS),
    "plain.TXT": ("\ufeffa\nb\nc\n", NUMBERS),
    "values.txt": ("3 = c\n1-2 = a\n", {"c": [3], "a": [1, 2]}),
    "v1.json": ({"labels": {"0": "background", "3": "c", "1": "a", "2": "b"}}, NUMBERS),
    "v2.json": ({"labels": {"background": 0, "b": 2, "a": 1, "c": 3}, "file_ending": ""}, NUMBERS),
    "regions.json": (
        {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "top": 3}},
        {"whole": [1, 2, 3], "core": [2, 3], "top": [3]},
    ),
    "numbers.json": ({"1": "a", "2": "b", "3": "c", "4": "absent"}, {**NUMBERS, "absent": []}),
    "names.json": ({"a": 1, "b": 2, "c": 3}, NUMBERS),
    "ignore.json": (
        {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}},
        {"a": [1], "b": [2]},
    ),
    "unlabelled.json": ({"0": "unlabelled", "1": "a", "2": "a", "3": "c"}, {"a": [1, 2], "c": [3]}),
    "list.json": (["background", "a", "b", "c"], NUMBERS),
}


def write(name, content):
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_names_by_colour_of_cvat(here, mode):
    rows = ["# label:color_rgb:parts:actions", "background:0,0,0::", "b: 2:255,0,0:x:"]
    write("labelmap.txt", "\n".join([*rows, "a:0,0,255::", "absent:9,9,9::"]) + "\n")
    label_map = labels(1, 2)
    save_pair("a", Image.fromarray(COLOURS[label_map]).convert(mode))
    assert "absent" in again("--classes", "labelmap.txt")
    assert sorted(class_names()) == ["a", "absent", "b: 2"]
    assert_stored(label_map, **{"a": [1], "b: 2": [2]})


@pytest.mark.parametrize("name", FILES)
def test_files_of_names(here, name):
    content, numbers = FILES[name]
    write(name, content)
    label_map = labels(1, 3)
    save_pair("a", grey(range(4))(label_map))
    out = again("--classes", name)
    assert_stored(label_map, **numbers)
    assert class_names() == list(numbers)
    for part in ("ignore", "unlabelled", "absent"):
        assert (f"({part})" in out) == (f'"{part}' in json.dumps(content))


def test_a_file_of_names_beside_other_values(here):
    write("c.txt", "_background_\na\nb\n")
    save_pair("a", grey(LEVELS)(labels(1, 3)))
    refuse_download(*MASKS, "--classes", "c.txt", words=["masks", "c.txt", "85"])
    save_pair("a", grey([0, 1, 9, 9])(labels(1, 3)))  # 2 is in no mask, and 9 not in the file
    out = again("--classes", "c.txt")
    assert "c.txt: no mask has 2 (b)" in out and "not named in c.txt, so background: 9; 1 v" in out
    assert class_names() == ["a", "b"]


BAD_FILES = {
    "empty.txt": "",
    "blank.txt": "a\n\nb",
    "binary.txt": b"\x89PNG\xff\xfe",
    "control.txt": "a\0b",
    "empty.json": "",
    "no.json": {},
    "deep.json": "[" * 500_000,
    "coco.json": {"images": [], "annotations": []},
    "fraction.json": {"a": 1.5},
    "truth.json": {"a": True},
    "regions.json": {"a": [1, [2]]},
    "twice.json": {"a": 1, "b": 1},
    "unnamed.json": {"1": ""},
    "huge.txt": None,
    "folder.json": "folder",
    "fifo.txt": "fifo",
    "loop.json": "loop",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_names_are_one_line(here, name):
    save_pair("a")
    content = BAD_FILES[name]
    if content is None:
        with open(name, "wb") as file:
            file.truncate(2**40)
    elif content == "folder":
        Path(name).mkdir()
    elif content == "fifo":
        os.mkfifo(name)
    elif content == "loop":
        Path(name).symlink_to(name)
    elif isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        write(name, content)
    before = os.listdir()
    with pytest.MonkeyPatch.context() as patch:  # a tree with a FIFO or a hole cannot be read
        patch.setattr("helpers.tree", lambda root: os.listdir(root))
        words = [name, "FIFO"] if content == "fifo" else [name]
        line = refuse_download(*MASKS, "--classes", name, words=words)
    assert "Traceback" not in line and os.listdir() == before


def test_a_file_of_labels_for_labelme_and_coco(here):
    labelme("x", [shape("a", box(2, 3, 5)), shape("b", box(9, 3, 5)), shape("c", box(15, 9, 5))])
    write("labels.txt", "__ignore__\n_background_\nc\na\n")
    run_download("--labelme", "lm", *ALL, "--classes", "labels.txt")
    assert class_names() == ["c", "a"]
    coco_file([(0, 2, polygon(3, 4, 6)), (0, 3, polygon(9, 4, 6))])
    write("l.json", {"k2": 7})
    run_download("--coco", "c.json", "images", *ALL, "--classes", "l.json", "--force")
    assert class_names() == ["k2"]


def test_volumes_of_a_hundred_labels(here):
    """As TotalSegmentator's, with a JSON of its names; some labels are in no volume."""
    names = {str(number): f"organ_{number}" for number in range(1, 105)}
    write("names.json", names)
    write("reversed.json", {name: int(number) for number, name in names.items()})
    rng = np.random.default_rng(0)
    numbers = rng.permuted(np.arange(2 * 3 * 17) % 101).reshape(6, 17, 1).repeat(2, 2)
    Path("vi").mkdir(), Path("vm").mkdir()
    write_nifti(Path("vi/s1_ct.nii.gz"), rng.integers(0, 9, numbers.shape).astype(np.int16))
    write_nifti(Path("vm/s1.nii.gz"), numbers.astype(np.uint8))
    pair = ("--masks", "vi/s1_ct.nii.gz", "vm/s1.nii.gz", *ALL, "--force")
    for file in ("names.json", "reversed.json"):
        out = run_download(*pair, "--classes", file)
        assert "class organ_7: value 7, " in out and "no mask has 101 (organ_101)" in out
        assert class_names() == list(names.values())
        for index, masks in enumerate(stored().values()):
            assert len(masks) == 100
            for name, mask in masks.items():
                assert_array_equal(mask, numbers[..., index] == int(name[6:]))
    run_download(*pair, "--classes", "1-50=upper,51-104=lower")
    assert_array_equal(stored()["s1_ct_z000"]["upper"], np.isin(numbers[..., 0], range(1, 51)))
    write_nifti(Path("vm/s1.nii.gz"), (numbers > 50).astype(np.uint8))
    run_download(*pair, "--invert")
    assert_array_equal(stored()["s1_ct_z001"]["foreground"], numbers[..., 1] <= 50)
    wide = np.arange(600).reshape(20, 30, 1).astype(np.uint16)
    write_nifti(Path("vi/s1_ct.nii.gz"), wide.astype(np.int16))
    write_nifti(Path("vm/s1.nii.gz"), wide)
    refuse_download(*pair, words=["vm/s1.nii.gz", "600", "--classes '*=foreground'"])
    assert "class cell: values 1, 2, 3" in run_download(*pair, "--classes", "*=cell")


# ---------------------------------------------------------------- strays, numbers of objects


def with_strays(strays, pixels=1):
    """A mask of 128 and 255, 200 x 100, in which each of these values has so many pixels."""
    mask = np.zeros((100, 200), np.uint8)
    mask[:40], mask[40:70] = 128, 255
    mask.ravel()[: len(strays) * pixels] = np.repeat(strays, pixels)
    return mask


def command_in(line):
    """The first flag --classes VALUE=NAME of a message, as a shell splits it."""
    return shlex.split(re.search(r"--classes ('[^']*'|[^ ;]+=[^ ;]+)", line)[0])


STRAYS = [1, 3, 64, 126, 127, 129, 130, 250, 252, 253, 254]


def test_strays_are_asked_about(here):
    mask = with_strays(STRAYS)
    save_pair("a", Image.fromarray(mask))
    words = [
        "masks/{id}.png: 128 (39.95",
        "255 (30.00 %",
        "11 values like strays",
        "1, 3, 64, 126, 127, 129",
    ]
    line = refuse_download(*MASKS, words=words)
    again(*command_in(line))
    assert_array_equal(stored()["a"]["A"], mask == 128)
    assert_array_equal(stored()["a"]["B"], mask == 255)
    assert set(stored()["a"]) == {"A", "B"}
    line = refuse_download(*MASKS, "--force", "--classes", "cell,nucleus", words=["13 beside"])
    out = again(*command_in(line))
    assert "; 11 values, 0.06 % of the pixels" in out and class_names() == ["cell", "nucleus"]
    assert "--classes '*'" in refuse_download(*MASKS, "--force")
    again("--classes", "*")
    assert len(class_names()) == 13


@pytest.mark.parametrize(
    "values, asked",
    [
        (with_strays([1, 2, 3]), True),
        (with_strays([1, 2]), False),  # no more than classes: a warning
        (with_strays([1, 2, 3], 20), False),  # 0.1 % each
        (with_strays([1, 2, 3], 19), True),
    ],
)
def test_which_values_are_strays(values, asked):
    counts = dict(
        zip(*(array.tolist() for array in np.unique(values, return_counts=True)), strict=True)
    )
    mask = [("a.png", "grey", counts)]
    if asked:
        with pytest.raises(ValueError, match="strays"):
            classes_of_counts(mask, "masks")
        return
    mask_classes = classes_of_counts(mask, "masks")
    small = [value for value in counts if 0 < counts[value] < 20]
    assert mask_classes.names == [str(value) for value in counts if value]
    assert [("leaves it out" in line) for line in mask_classes.warnings] == [True] * bool(small)


def test_class_numbers_are_no_strays():
    for encoding, counts in (
        ("grey", {0: 10**6, 1: 9**6, 2: 9**6, 3: 5, 4: 6, 5: 7, 6: 9}),
        ("volume", {0: 10**6, 1: 9**6, 20: 9**6, 30: 5, 40: 6, 50: 7, 60: 9}),
    ):
        mask_classes = classes_of_counts([("a", encoding, counts)], "masks")
        assert len(mask_classes.names) == 6 and not mask_classes.warnings
    # Where small values have 1 % of the pixels together, or more, they are no strays either.
    many = {0: 10**5, 255: 10**5} | dict.fromkeys(range(1, 16), 199)
    assert len(classes_of_counts([("a", "grey", many)], "masks").names) == 16


def averaged(mask, factor, step=1):
    """A mask of 0 and 255 made smaller: the means of blocks of `factor` times `step` pixels."""
    height, width = mask.shape[0] // step, mask.shape[1] // factor
    blocks = mask[: height * step, : width * factor].reshape(height, step, width, factor)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def discs(seed, size=(120, 160), count=12):
    rng, mask = np.random.default_rng(seed), np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    for center_y, center_x, radius in rng.integers(
        (9, 9, 3), (size[0] - 9, size[1] - 9, 9), (count, 3)
    ):
        mask[np.hypot(y - center_y, x - center_x) < radius] = 255
    return mask


def saved_as(kind, values):
    """uint8 (H, W) as a picture of one channel or of three alike."""
    return Image.fromarray(values).convert(kind)


@pytest.mark.parametrize("kind", ["L", "RGB"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_averaged_masks_are_cut_at_half(here, factor, kind):
    masks = {f"{seed}": averaged(discs(seed), factor, factor) for seed in range(3)}
    for stem, mask in masks.items():
        save_pair(stem, saved_as(kind, mask))
    for flags in ((*MASKS,), ("--masks", "images/{id}.png", "masks/{id}.{class}", *ALL)):
        assert "cut at half" in run_download(*flags, "--force")
        for stem, mask in masks.items():
            assert_array_equal(stored()[stem][class_names()[0]], mask > 127)


def drawn_classes(case):
    """Masks of 0 to 255 whose values between are classes, not edges."""
    y, x = np.mgrid[:60, :80]
    distance = np.hypot(y - 30, x - 40)
    if case == "rings":
        return np.digitize(distance, [9, 11, 13])[..., None].choose([255, 170, 85, 0])[..., 0]
    if case == "lines":  # vessels of two kinds, and what crosses them
        return np.where(y % 9 == 3, 170, np.where(x % 11 == 4, 85, np.where(distance < 6, 255, 0)))
    if case == "border":  # of one value, such as the border of a cell, which averaging makes too
        return np.digitize(distance, [9, 10]).choose([255, 128, 0])
    return np.select([y + x < 30, y + x < 40, y + x < 45], [255, 191, 64], 0)


@pytest.mark.parametrize("case", ["rings", "lines", "border", "stripes"])
def test_classes_beside_255_stay_classes(here, case):
    mask = drawn_classes(case).astype(np.uint8)
    save_pair("a", Image.fromarray(mask))
    run_download(*MASKS)
    assert class_names() == [str(value) for value in np.unique(mask)[1:]]


MIXED = {  # the foreground of masks of one class; the types of these
    "1 and 255": ({"a": 1, "b": 255, "c": 1, "d": 255}, np.uint8),
    "16 bits": ({"a": 1, "b": 255, "c": 65535}, np.uint16),
}


@pytest.mark.parametrize("case", MIXED)
def test_masks_of_0_and_1_beside_0_and_255(here, case):
    values, dtype = MIXED[case]
    for stem, value in values.items():
        save_pair(stem, grey([0, value], dtype)(labels(ord(stem), 1)))
    for flags in ((), ("--classes", "x")):
        assert "one class" in run_download(*MASKS, "--force", *flags)
        for stem in values:
            assert_array_equal(stored()[stem][class_names()[0]], labels(ord(stem), 1) == 1)
    run_download(*MASKS, "--force", "--classes", "*")  # what is asked for is done
    assert len(class_names()) == len(set(values.values()))


def test_masks_of_0_and_1_beside_averaged_ones(here):
    mask = averaged(discs(1), 2, 2)
    save_pair("a", Image.fromarray(mask))
    save_pair("b")
    run_download(*MASKS)
    assert_array_equal(stored()["a"]["foreground"], mask > 127)
    assert_array_equal(stored()["b"]["foreground"], labels(0) == 1)


def test_values_1_and_255_of_one_mask_are_two_classes(here):
    save_pair("a", grey([0, 1, 255])(labels(1, 2)))
    save_pair("b")
    save_pair("c", grey([0, 255])(labels(2, 1)))
    run_download(*MASKS)
    assert class_names() == ["1", "255"]
    assert {stem: list(masks) for stem, masks in stored().items()} == {
        "a": ["1", "255"],
        "b": ["1"],
        "c": ["255"],
    }


def test_masks_that_are_all_empty_are_refused_where_their_class_is_named(here):
    save_pair("a", grey([0, 0])(labels(0)))
    patterns = ("--masks", "images/{id}.png", "masks/{id}.{class}")
    refuse_download(*patterns, *ALL, words=["no pixel"])


def test_the_values_of_all_files_are_classes(here):
    """Of 40 masks the last alone holds a 2."""
    for number in range(40):
        save_pair(f"{number:02}", grey([0, 1, 2])(labels(number, 1 + (number == 39), (8, 6))))
    run_download(*MASKS)
    assert class_names() == ["1", "2"] and {len(masks) for masks in stored().values()} == {1, 2}


def objects(count, first=1, step=1, size=(80, 60)):
    """An array (H, W) of `count` squares of 3 x 3 pixels, each of a value of its own."""
    mask = np.zeros(size[::-1], np.int32)
    places = [(y, x) for y in range(1, size[1] - 3, 4) for x in range(1, size[0] - 3, 4)]
    for number, (y, x) in enumerate(places[:count]):
        mask[y : y + 3, x : x + 3] = first + number * step
    assert len(np.unique(mask)) == count + 1
    return mask


OBJECTS = {
    "59 in one file": [objects(59)],
    "few and many": [objects(3), objects(12), objects(4)],
    "spread": [objects(63, 7, 4), objects(50, 7, 4)],  # smoothed masks have as many values
    "16 bits": [objects(260)],
    "large numbers": [objects(20, 70000), objects(3, 9)],
}


@pytest.mark.parametrize("case", OBJECTS)
def test_numbers_of_objects_are_asked_about(here, case):
    masks = OBJECTS[case]
    for number, mask in enumerate(masks):
        highest = mask.max()
        kind = np.uint8 if highest < 256 else np.uint16 if highest < 65536 else np.int32
        save_pair(f"{number}", Image.fromarray(mask.astype(kind)), ".tif")
    line = refuse_download(*MASKS, words=["masks/", "objects"])
    again(*command_in(line))
    for number, mask in enumerate(masks):
        assert_array_equal(stored()[f"{number}"]["foreground"], mask > 0)
    line = refuse_download(
        *MASKS, "--force", "--classes", "cell", words=["'*=cell'"] * (case != "16 bits")
    )
    if case == "few and many":
        again("--classes", "*")
        assert len(class_names()) == 12
        again("--classes", ",".join("abcdefghijkl"))  # as many names as values: classes


def test_objects_may_touch_at_corners(here):
    """Each is one piece, as those of predictions are."""
    pair = np.kron(np.eye(2, dtype=np.uint8), np.ones((3, 3), np.uint8))
    numbers = np.arange(1, 31, dtype=np.uint8).reshape(5, 6)
    mask = np.kron(numbers, np.pad(pair, 1))
    save_pair("a", Image.fromarray(mask))
    again(*command_in(refuse_download(*MASKS, words=["masks/", "objects"])))
    assert_array_equal(stored()["a"]["foreground"], mask > 0)


def test_numbers_of_objects_as_colours(here):
    codes = np.random.default_rng(1).integers(1, 256, (60, 3), dtype=np.uint8)
    mask = objects(59)
    save_pair("a", Image.fromarray(np.where(mask[..., None] > 0, codes[mask], 0).astype(np.uint8)))
    again(*command_in(refuse_download(*MASKS, words=["masks/a.png", "objects"])))
    assert_array_equal(stored()["a"]["foreground"], mask > 0)


def test_classes_in_one_piece_each_are_no_objects(here):
    for stem in "abc":  # the same values in most images
        save_pair(stem, Image.fromarray(objects(30).astype(np.uint8)))
    save_pair("d", Image.fromarray(objects(29).astype(np.uint8)))
    again()
    assert len(class_names()) == 30
    scattered = objects(30)
    scattered[scattered > 20] -= 20  # ten of twenty values in two pieces
    for stem in "abcd":
        Path(f"masks/{stem}.png").unlink()
        Path(f"images/{stem}.png").unlink()
    save_pair("a", Image.fromarray(scattered.astype(np.uint8)))
    again()
    assert len(class_names()) == 20


# ---------------------------------------------------------------- --invert


def test_inverted_masks(here):
    first, second = labels(1), labels(2)
    save_pair("a", grey([0, 255])(first))
    save_pair("b", Image.fromarray(second > 0))
    flags = ("--invert", "--classes", "membrane")
    out = again(*flags)
    pixels = (first == 0).sum() / (2 * first.size)
    assert f"class membrane: value 0 (grey), {100 * pixels:.2f} % of the pixels of" in out
    assert_array_equal(stored()["a"]["membrane"], first == 0)
    assert_array_equal(stored()["b"]["membrane"], second == 0)
    again("--invert")
    assert class_names() == ["foreground"]
    refuse_download(*MASKS, "--force", "--invert", "--classes", "a,b", words=["--classes", "2 cl"])
    refuse_download(*MASKS, "--force", "--invert", "--classes", "0=a", words=["--invert", "0=NAME"])
    for stem in "ab":
        save_pair(stem, Image.new("L", PHOTO, 255))
    refuse_download(*MASKS, "--force", "--invert", words=["masks", "--invert", "empty"])
    assert "--invert" in again()  # a hint, where most is foreground
    refuse_download("--labelme", "lm", "--invert", words=["--masks"])


def test_inverted_masks_of_several_values(here):
    label_map = labels(1, 2)
    save_pair("a", grey([0, 128, 255])(label_map))
    line = refuse_download(*MASKS, "--invert", words=["masks", "--invert", "128, 255"])
    again(*command_in(line))
    assert_stored(label_map, NAME=[0])
    save_pair(
        "a", palette([0, 1, 255])(label_map)
    )  # 255 is PASCAL VOC's border, which is background either way
    again("--invert")
    assert_stored(label_map, foreground=[0])


# ---------------------------------------------------------------- NumPy's files


ARRAYS = {
    "uint8": lambda m: m.astype(np.uint8) * 255,
    "bool": lambda m: m > 0,
    "int64": lambda m: m.astype(np.int64),
    "big-endian": lambda m: (m * 70000).astype(">i4"),
    "float": lambda m: m.astype(np.float64),
    "(H, W, 1)": lambda m: m[..., None].astype(np.int16),
    "columns first": lambda m: np.asfortranarray(m.astype(np.uint8)),
    "negative": lambda m: -m.astype(np.int8),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_masks_of_numpy(here, case):
    label_map = labels(1)
    save(photo(), "images/a.jpg")
    Path("masks").mkdir()
    np.save("masks/a_mask.npy", ARRAYS[case](label_map))
    out = run_download(*MASKS)
    assert "a.jpg with masks/a_mask.npy" in out and ("value 70000" in out) == (case == "big-endian")
    assert_stored(label_map, foreground=[1])
    save(photo(), "one/a.jpg")
    Path("masks/a_mask.npy").rename("one/a_mask.npy")
    run_download("--masks", "one/a.jpg", "one/a_mask.npy", *ALL, "--force")
    assert_stored(label_map, foreground=[1])


class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def huge_header():
    """A header that asks for a terabyte, and nothing behind it."""
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1048576, 1048576), }".ljust(117)
    return b"\x93NUMPY\x01\x00" + len(text + "\n").to_bytes(2, "little") + text.encode() + b"\n"


BAD_ARRAYS = {
    "pickle": np.array([Trap()], dtype=object),
    "colours": np.zeros((*PHOTO[::-1], 3), np.uint8),
    "fractions": np.full(PHOTO[::-1], 0.5),
    "not a number": np.full(PHOTO[::-1], np.nan),
    "complex": np.ones(PHOTO[::-1], complex),
    "text": np.full(PHOTO[::-1], "a"),
    "empty": np.zeros((0, 9)),
    "a number": np.ones(()),
    "another size": np.ones(PHOTO),
    "no array": b"PK\x03\x04, or not",
    "cut": huge_header(),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_one_line(here, case):
    save(photo(), "images/a.png")
    Path("masks").mkdir()
    content = BAD_ARRAYS[case]
    if isinstance(content, bytes):
        Path("masks/a.npy").write_bytes(content)
    else:
        np.save("masks/a.npy", content, allow_pickle=True)
    refuse_download(*MASKS, words=["masks/a.npy", *["(0, 9)"] * (case == "empty")])


def test_arrays_are_measured_before_they_are_read(here):
    save(photo(), "images/a.png")
    Path("masks").mkdir()
    for shape_text, word in (("(30000, 30000)", "900000000 pixels"), ("(60000, 60000)", "MiB")):
        header = huge_header().replace(b"(1048576, 1048576)", shape_text.encode())
        header = header[:-1].ljust(127) + b"\n"
        with open("masks/a.npy", "wb") as file:
            file.write(header)
            file.truncate(len(header) + eval(shape_text)[0] ** 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("helpers.tree", lambda root: os.listdir(root))
            refuse_download(*MASKS, words=["masks/a.npy", word])


# ---------------------------------------------------------------- names in the files


def test_predicted_masks_bring_the_names_of_their_classes(here):
    label_map = labels(1, 2)
    save(photo(), "images/a.png")
    Path("masks").mkdir()
    names = ("bright, or 1=so", "dark")
    save_mask(label_map, Path("masks/a_mask.png"), names)
    again()
    assert_stored(label_map, **{names[0]: [1], "dark": [2]})
    again("--classes", "dark=lesion")
    assert_stored(label_map, lesion=[2])
    again("--classes", "x,y")
    assert class_names() == ["x", "y"]
    flags = (*MASKS, "--force", "--classes")
    refuse_download(*flags, "bleed=lesion", words=["'bleed'", "bright, or 1=so, dark"])
    refuse_download(*flags, "dark=lesion,2=other", words=["dark=lesion and 2=other"])
    save_mask(np.where(label_map == 2, 2, 0), Path("masks/a_mask.png"), names)
    again()  # a class that is in no mask keeps its place
    assert class_names() == list(names)
    save(photo(), "images/b.png")
    save_mask(label_map, Path("masks/b_mask.png"), ("dark", "bright"))
    words = ["masks/a_mask.png and masks/b_mask.png", "--classes"]
    refuse_download(*MASKS, "--force", words=words)
    again("--classes", "1=x,2=y")


def test_overlaps_are_found_wherever_they_are():
    """Against every pair, in files of many ranges."""
    rng = np.random.default_rng(3)
    for _ in range(300):
        ends = np.sort(rng.integers(1, 60, (rng.integers(2, 7), 2)), axis=1)
        ranges = [(first, last, "ab"[rng.integers(2)]) for first, last in ends.tolist()]
        clash = any(p[0] <= q[1] and q[0] <= p[1] and p[2] != q[2] for p in ranges for q in ranges)
        text = ",".join(f"{first}-{last}={name}" for first, last, name in ranges)
        if clash:
            with pytest.raises(ValueError, match="two classes"):
                spelled.parse_classes(text)
        else:
            spelled.parse_classes(text)
