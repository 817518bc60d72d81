"""What masks hold, against label maps: encodings, --classes, --invert, and what is asked."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import PHOTO, grey, labels, palette, photo
from numpy.testing import assert_array_equal
from PIL import Image

from medseg.images import save_mask
from medseg.importing.class_names import parse_classes, parse_labels
from medseg.importing.values import Counted, classes_of_counts, find_classes

pytestmark = pytest.mark.usefixtures("here")

COLOURS = np.array([(0, 0, 0), (0, 0, 255), (255, 0, 0), (128, 128, 128)], np.uint8)


def masks_of(pictures, text=None, suffix=".tif", **options):
    """({class: bool array} of each picture or array, the MaskClasses) with --classes text."""
    Path("masks").mkdir(exist_ok=True)
    paths = [Path(f"masks/{number}{suffix}") for number, _ in enumerate(pictures)]
    for path, picture in zip(paths, pictures, strict=True):
        if suffix == ".npy":
            np.save(path, picture)
        else:
            picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
            picture.save(path)
    return read_masks(paths, text, **options)


def read_masks(paths, text=None, **options):
    classes = find_classes(paths, text and parse_classes(text), **options)
    masks = [classes.to_masks(*classes.read(path)) for path in paths]
    return [{name: runs.draw() for name, runs in own.items()} for own in masks], classes


def assert_masks(masks, label_map, numbers):
    """The masks are the classes NAME of these numbers in the label map, and no others."""
    assert set(masks) == {name for name, own in numbers.items() if np.isin(label_map, own).any()}
    for name, mask in masks.items():
        assert_array_equal(mask, np.isin(label_map, numbers[name]))


def commands_in(error):
    """The texts of --classes in a message, as a shell splits them."""
    texts = re.findall(r"--classes ('[^']*'|[^ ;,]+=[^ ;]+)", str(error))
    return [shlex.split(text)[0] for text in texts]


FOREGROUND = ["foreground"]
BLACK = COLOURS.__getitem__


def black_with_alpha(label_map):
    """Black everywhere, and transparent where it is background."""
    return np.pad((label_map > 0)[..., None] * np.uint8(255), ((0, 0), (0, 0), (3, 0)))


ENCODINGS = {  # suffix, picture or array of a label map, class names
    "1-bit PNG": (".png", lambda m: Image.fromarray(m > 0), FOREGROUND),
    "16-bit PNG": (".png", grey([0, 300, 65535], np.uint16), ["300", "65535"]),
    "float TIFF": (".tif", grey([0, 1, 2], np.float32), ["1", "2"]),
    "palette PNG": (".png", palette([0, 1, 15]), ["1", "15"]),
    "palette, white first": (".png", palette([1, 0], [(255, 255, 255), (0, 0, 0)]), FOREGROUND),
    "RGBA": (".png", lambda m: Image.fromarray(BLACK(m)).convert("RGBA"), ["#0000ff", "#ff0000"]),
    "alpha of black": (".png", black_with_alpha, FOREGROUND),
    "big-endian array": (".npy", lambda m: (m * 70000).astype(">i4"), FOREGROUND),
    "floats of a scale": (".npy", lambda m: m * 1.0000153, ["1", "2"]),
    "array (H, W, 1)": (".npy", lambda m: m[..., None].astype(np.int16), ["1", "2"]),
    "negative numbers": (".npy", lambda m: -m.astype(np.int8), FOREGROUND),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_masks_come_back_bit_for_bit(case, capsys):
    suffix, make, names = ENCODINGS[case]
    maps = [labels(seed, len(names)) for seed in range(2)]
    masks, classes = masks_of([make(label_map) for label_map in maps], suffix=suffix)
    assert classes.names == names
    assert ("opaque" in capsys.readouterr().out) == (case == "alpha of black")
    for own, label_map in zip(masks, maps, strict=True):
        assert_masks(own, label_map, {name: n for n, name in enumerate(names, 1)})


def test_alpha_of_a_black_mask_beside_others_is_no_mask(capsys):
    masks, _ = masks_of([black_with_alpha(labels(1)), COLOURS[labels(1)]])
    assert masks[0] == {} and "opaque" not in capsys.readouterr().out
    assert_array_equal(masks[1]["foreground"], labels(1) == 1)


@pytest.mark.parametrize(
    "suffix, mask, word",
    [
        (".png", photo(size=(80, 80)), "colours"),
        (".jpg", photo(), "colours"),  # they are no classes any more
        (".tif", Image.new("F", PHOTO, 0.5), "fractions"),
        (".tif", Image.new("F", PHOTO, 2**24 + 2), ""),
        (".npy", np.zeros((30, 40, 3), np.uint8), "3"),
        (".npy", np.full((30, 40), np.nan), ""),
    ],
)
def test_what_is_no_mask_is_named(suffix, mask, word):
    with pytest.raises(ValueError, match=f"masks/0{suffix}: .*{word}"):
        masks_of([mask], suffix=suffix)


# ---------------------------------------------------------------- --classes


GREYS, BORDER = grey([0, 85, 128, 255]), palette([0, 1, 2, 255])
BIT, ONE, FULL = (lambda m: Image.fromarray(m > 0)), grey([0, 1, 1, 1]), grey([0, 255, 255, 255])
ORDERED, UNORDERED = palette(range(4), COLOURS), palette([2, 3, 1, 0], COLOURS[[3, 2, 0, 1]])
SWAPPED, INDEX = palette([0, 2, 1, 3], COLOURS[[0, 2, 1, 3]]), grey(range(4))
ANY, ABC = [1, 2, 3], {"a": 1, "b": 2, "c": 3}
REGIONS = {"background": 0, "top": 3, "whole": [1, 2, 3], "core": [2, 3]}
CVAT = "# label:color_rgb:\nbackground:0,0,0::\nb: 2:255,0,0::\na:0,0,255::\nabsent:9,9,9::"
CASES = [  # masks of label maps of 0 to 3, --classes, the numbers of each class in their order
    ([GREYS], "80-130=a,200-300=b", {"a": [1, 2], "b": 3}),
    ([GREYS], "0=background,85=a=b", {"a=b": 1}),
    ([GREYS], "#808080=a,#FFFFFF=b", {"a": 2, "b": 3}),
    ([GREYS], "*", {"85": 1, "128": 2, "255": 3}),
    ([GREYS], "7-9=x,85=a,*=background", {"x": [], "a": 1}),
    ([GREYS, lambda m: GREYS(m).convert("RGB")], None, {"85": 1, "128": 2, "255": 3}),
    ([BORDER], "*=cell,255=border", {"cell": [1, 2], "border": 3}),
    ([grey([3, 7, 7, 7])], None, {"3": 0, "7": ANY}),
    ([ORDERED, UNORDERED], "#0000ff=v,#ff0000=a", {"v": 1, "a": 2}),
    # As programs write them that make 8-bit PNG of colours: an index is no number of a class.
    ([ORDERED, SWAPPED], None, {"#0000ff": 1, "#808080": 3, "#ff0000": 2}),
    # Of one class each, whatever its number; two in one mask are two classes.
    ([ONE, FULL, ONE, FULL], None, {"foreground": ANY}),
    ([FULL, grey([0, 1, 1, 255])], None, {"1": [], "255": []}),
    ([ONE, FULL], "*", {"1": [], "255": []}),  # what is asked for is done
    ([ONE, grey([0, 65535, 65535, 65535], np.uint16)], None, {"foreground": ANY}),
    ([BIT, FULL], "membrane", {"membrane": 0}, {"invert": True}),
    ([palette([0, 1, 1, 255])], None, {"foreground": 0, "ignore": 3}, {"invert": True}),
    # Files of names: LabelMe's, nnU-Net's, Roboflow's, CVAT's.
    ([INDEX], ("labels.txt", "__ignore__\r\n_background_\r\na\r\nb\r\nc"), ABC),
    ([INDEX], ("plain.TXT", "\ufeffa\nb\nc\n"), ABC),
    ([INDEX], ("r.json", {"labels": REGIONS}), {"top": 3, "whole": ANY, "core": [2, 3]}),
    ([INDEX], ("n.json", {"1": "a", "2": "b", "3": "c", "4": "absent"}), {**ABC, "absent": []}),
    ([INDEX], ("i.json", {"labels": {"a": 1, "b": 2, "ignore": 3}}), {"a": 1, "b": 2, "ignore": 3}),
    ([INDEX], ("u.json", {"0": "unlabelled", "1": "a", "2": "a", "3": "c"}), {"a": [1, 2], "c": 3}),
    ([INDEX], ("_classes.csv", "Value, Class\n0, background\n1, a\n2, b\n3, c\n"), ABC),
    ([BLACK, ORDERED], ("labelmap.txt", CVAT), {"a": 1, "absent": [], "b: 2": 2}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_of_classes(case, capsys):
    makers, text, numbers, *options = CASES[case]
    if isinstance(text, tuple):
        text, content = text
        Path(text).write_text(content if isinstance(content, str) else json.dumps(content))
    maps = [labels(number, 3) for number in range(len(makers))]
    pictures = [make(label_map) for make, label_map in zip(makers, maps, strict=True)]
    masks, classes = masks_of(pictures, text, **dict(*options))
    assert classes.names == list(numbers)
    said = capsys.readouterr().out
    assert ("(absent)" in said) == ("absent" in numbers)
    assert ("(unlabelled)" in said) == (text == "u.json")
    if text == "labels.txt":  # for outlines
        assert parse_labels(text) == parse_labels("a, b ,c") == list(numbers)
    classes.report()
    several = len(numbers.keys() - {"ignore"}) > 1
    hint = "=A," in capsys.readouterr().out
    assert hint == (several and text in (None, "*"))
    for own, label_map in zip(masks, maps, strict=True):
        if any(map(np.size, numbers.values())):
            assert_masks(own, label_map, numbers)


def test_values_that_are_not_named_and_named_ones_that_are_not_there_are_told(capsys):
    maps = [labels(1, 3), np.minimum(labels(2, 3), 2), np.zeros_like(labels())]
    masks_of([GREYS(label_map) for label_map in maps], "255=a,9=b")
    percent = 100 * np.isin(maps, [1, 2]).mean()
    absent, unnamed = capsys.readouterr().out.splitlines()
    assert "9 (b)" in absent
    assert re.search(rf"(85, 128|128, 85) \(2 .*{percent:.2f} %.*; 1 of 3 masks", unnamed)
    masks_of([GREYS(maps[0])], "255=a,*=background")
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"masks/0.*129 \(b\).*--classes.* 128"):
        masks_of([GREYS(maps[0])], "129=b")
    with pytest.raises(ValueError, match="#0000ff"):  # 255 is the code of blue, but no colour
        masks_of([COLOURS[maps[0]]], "255=a")


WRONG = ["1-9=a,2=a,8-12=b", "1=a,1=background", "1=", "=a", "1=a,b", "9-1=a"]
WRONG += ["#ff0000=a,#FF0000=b", "tumour=lesion", "1=a\tb", "absent.json", "masks/0.tif"]


@pytest.mark.parametrize("text", [*WRONG, "blank.txt", "binary.txt", "list.json", "fraction.json"])
def test_wrong_classes_are_named(text):
    Path("blank.txt").write_text("a\n\nb")
    Path("binary.txt").write_bytes(b"\x89PNG\xff\xfe")
    Path("list.json").write_text("[1]")
    Path("fraction.json").write_text('{"a": 1.5}')
    with pytest.raises((ValueError, OSError), match="--classes" if "=" in text else text):
        masks_of([ONE(labels())], text)


def test_strays_are_asked_about():
    for encoding, counts in (  # pixels beside 10**6 of background
        ("grey", {1: 5, 2: 6, 128: 9**6, 255: 9**6}),  # no more than classes
        ("grey", {1: 3000, 2: 3000, 3: 3000, 128: 9**6, 255: 9**6}),  # 0.1 % each
        ("grey", dict(zip(range(1, 7), (9**6, 9**6, 5, 6, 7, 9), strict=True))),  # numbers
        ("volume", {1: 9**6, 20: 9**6, 30: 5, 40: 6, 50: 7}),
        ("grey", {1: 9**6, 20: 9**6, 30: 9**6, 40: 5, 50: 6, 60: 7}),  # as many as classes
    ):
        classes = classes_of_counts([Counted("a.png", encoding, {0: 10**6, **counts})])
        assert classes.names == list(map(str, counts))
    strays = {0: 10**6, 1: 5, 2: 6, 3: 999, 128: 9**6, 255: 9**6}
    masks = [Counted("a.png", "grey", strays)]
    with pytest.raises(ValueError, match="3 values look like strays.*1, 2, 3, 128") as error:
        classes_of_counts(masks)
    chosen = classes_of_counts(masks, parse_classes(commands_in(error.value)[1]))
    assert chosen.names_of == {128: ("A",), 255: ("B",)}
    with pytest.raises(ValueError, match="2 classes, but there are 5"):
        classes_of_counts(masks, ["cell", "nucleus"])


def objects(count, first=1):
    """An array (60, 80) of `count` squares of 3 x 3 pixels, each of a value of its own."""
    mask = np.zeros((60, 80), np.uint8 if first < 200 else np.int32)
    for number in range(count):
        y, x = 1 + 4 * (number // 19), 1 + 4 * (number % 19)
        mask[y : y + 3, x : x + 3] = first + number
    return mask


def test_numbers_of_objects_are_asked_about():
    few, large = [*map(objects, (3, 12, 4))], [objects(20, 70000), objects(3, 9)]
    for arrays in (few, large):
        with pytest.raises(ValueError, match=r"masks/\d.*objects") as error:
            masks_of(arrays)
        masks, _ = masks_of(arrays, commands_in(error.value)[0])
        for own, array in zip(masks, arrays, strict=True):
            assert_masks(own, array > 0, {"foreground": 1})
    with pytest.raises(ValueError, match=r"\*="):
        masks_of(few, "cell")
    assert len(masks_of(few, "*")[1].names) == 12
    masks_of(few, ",".join("abcdefghijkl"))  # as many names as values: classes
    same = [*map(objects, (30, 30, 30, 29))]  # values, in most images
    assert len(masks_of(same)[1].names) == 30
    scattered = objects(30)
    scattered[scattered > 28] -= 28
    with pytest.raises(ValueError, match="objects"):  # two of 28 values in two pieces
        masks_of([scattered])
    scattered[scattered > 27] -= 25
    assert len(masks_of([scattered])[1].names) == 27  # three of 27


def test_255_classes_and_no_more():
    masks = [Counted(f"{n}.png", "volume", dict.fromkeys(range(n), 1)) for n in (256, 257)]
    assert len(classes_of_counts(masks[:1]).names) == 255
    with pytest.raises(ValueError, match=r"257\.png: .*255 "):
        classes_of_counts(masks)


def averaged(seed, factor):
    """Discs of 0 and 255 made smaller: the means of blocks of `factor` pixels a side."""
    rng, mask = np.random.default_rng(seed), np.zeros((120, 160))
    y, x = np.mgrid[:120, :160]
    for cy, cx, radius in rng.integers((9, 9, 3), (111, 151, 9), (12, 3)):
        mask[np.hypot(y - cy, x - cx) < radius] = 255
    blocks = mask.reshape(120 // factor, factor, 160 // factor, factor)
    return blocks.mean((1, 3)).round().astype(np.uint8)


def test_masks_of_soft_edges_are_cut_at_half(capsys):
    bicubic = Image.fromarray(averaged(0, 1)).resize((480, 360), Image.Resampling.BICUBIC)
    soft = [averaged(0, 2), averaged(1, 2), averaged(2, 4), np.asarray(bicubic)]
    one = labels(0)
    pictures = [*map(Image.fromarray, soft)]
    for mode in ("L", "RGB"):
        masks, _ = masks_of([*(picture.convert(mode) for picture in pictures), ONE(one)])
        assert "between 0 and 255" in capsys.readouterr().out
        for own, wanted in zip(masks, [*(array > 127 for array in soft), one], strict=True):
            assert_masks(own, wanted, {"foreground": 1})


def test_classes_beside_255_stay_classes():
    y, x = np.mgrid[:60, :80]
    distance = np.hypot(y - 30, x - 40)
    rings = np.select([distance < 9, distance < 11, distance < 13], [255, 170, 85], 0)
    lines = np.select([y % 9 == 3, x % 11 == 4, distance < 6], [170, 85, 255], 0)  # of vessels
    for mask in (rings, lines):
        assert masks_of([mask.astype(np.uint8)], "*")[1].names == ["85", "170", "255"]


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_smoothed_and_lossy_masks_take_halves_or_ranges(suffix):
    halves = {None: (128, 256), "255=x": (128, 256), "*=x": (128, 256), "0=x": (0, 128)}
    for text, (first, end) in (halves | {"60-255=x": (60, 256), "60-999=x": (60, 256)}).items():
        (masks,), classes = masks_of([averaged(0, 2)], text, suffix)
        values = np.asarray(Image.open(f"masks/0{suffix}"))
        assert_array_equal(masks[classes.names[0]], (values >= first) & (values < end))


def test_masks_that_cannot_be_inverted():
    several, full = grey([0, 128, 255])(labels(1, 2)), Image.new("L", PHOTO, 255)
    for mask, text in ((FULL(labels()), "0=a"), (full, None), (several, None)):
        with pytest.raises(ValueError, match=r"masks.*--invert.*0=NAME.* 255"):
            masks_of([mask], text, invert=True)


def test_predicted_masks_bring_the_names_of_their_classes():
    label_map, names = labels(1, 2), ("bright, or 1=so", "dark")
    paths = [Path("a_mask.png")]
    save_mask(label_map, paths[0], names)
    for text, numbers in (
        (None, {names[0]: 1, "dark": 2}),
        ("dark=lesion,1=x", {"lesion": 2, "x": 1}),
        ("x,y", {"x": 1, "y": 2}),
    ):
        (masks,), _ = read_masks(paths, text)
        assert_masks(masks, label_map, numbers)
    with pytest.raises(ValueError, match="a_mask.*bleed"):
        read_masks(paths, "bleed=lesion")
    save_mask(np.where(label_map == 2, 2, 0), paths[0], names)
    assert read_masks(paths)[1].names == list(names)  # a class in no mask keeps its place
    save_mask(label_map, Path("b_mask.png"), names[::-1])
    paths.append(Path("b_mask.png"))
    with pytest.raises(ValueError, match=r"b_mask\.png.*--classes"):
        read_masks(paths)
