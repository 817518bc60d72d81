"""--recipe auto: what is measured of a data set, what follows from it, and that it trains."""

import math
import re
import shlex
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import (
    brightness_model,
    edit_annotations,
    output_of,
    scan,
    set_classes,
    square,
    write_split,
)
from PIL import Image

import train
from medseg.images import read_image
from medseg.planning import rules
from medseg.planning.fingerprint import SIDES, Fingerprint, take_fingerprint
from medseg.planning.plan import plan_training, planned_flags
from medseg.planning.timing import Times
from medseg.run_lengths import encode
from medseg.weights import load_weights


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr("medseg.planning.timing.SECONDS", 0.05)


QUICK = ("--device", "cpu", "--swanlab", "disabled")


def picture(width, height):
    return Image.new("RGB", (width, height))


def write_set(root, images, annotations, others=None):
    """A data set whose train split has these images; valid and test one each, or `others`."""
    write_split(root / "train", images, annotations)
    for split in ("valid", "test"):
        write_split(root / split, *(others or ({"v.png": picture(8, 8)}, [(0, square(1, 1, 2))])))
    return root


# ---- what is measured ------------------------------------------------------------------------


def test_the_numbers_of_a_data_set_counted_by_hand(tmp_path, monkeypatch):
    """They are kept until an image or an annotation changes."""
    images = {"a.png": picture(40, 20), "b.png": picture(40, 20), "c.png": picture(20, 40)}
    # 8x8 and 4x4 pixels in the first, which overlap in 2x2; 8x8 in the second; none in the third.
    annotations = [(0, square(0, 0, 8)), (0, square(6, 6, 4)), (1, square(2, 2, 8))]
    others = {"wide.png": picture(90, 10)}, [(0, square(1, 1, 2))]
    root = write_set(tmp_path / "set", images, annotations, others)
    set_classes(root / "train", ["liver", "tumour"], lambda number: 1 + number % 2)
    look = take_fingerprint(root)
    assert look.images == {"train": 3, "valid": 1, "test": 1} and look.read == 5
    assert (look.width, look.height, look.largest) == (40, 20, 90)
    assert (look.n_classes, look.channels) == (2, 1)
    assert look.foreground == pytest.approx([128 / 2400, 16 / 2400])
    assert look.together == pytest.approx(1 / 3)
    assert look.boxes == 0.5  # the two in the first are no rectangle together
    assert look.empty == {"train": pytest.approx(1 / 3), "valid": 0, "test": 0}
    read = Mock(side_effect=read_image)
    monkeypatch.setattr("medseg.images.read_image", read)
    assert take_fingerprint(root) == look and not read.called
    images["c.png"].putpixel((17, 4), (0, 1, 0))
    images["c.png"].save(root / "train" / "c.png")
    assert take_fingerprint(root).channels == 3 and read.call_count == 5
    edit_annotations(root / "valid", lambda content: content["annotations"].pop())
    assert take_fingerprint(root).empty["valid"] == 1


def disc(radius, side):
    rows, columns = np.mgrid[:side, :side] - side // 2
    return rows**2 + columns**2 <= radius**2


def measure(root, mask):
    """The fingerprint of a data set of a black image with this mask."""
    outline = {"size": list(mask.shape), "counts": encode(mask).counts.decode()}
    return take_fingerprint(write_set(root, {"0.png": picture(*mask.shape[::-1])}, [(0, outline)]))


def test_thickness_and_what_masks_keep_when_they_are_resized(tmp_path):
    slanting = abs(np.subtract(*np.mgrid[:600, :600])) <= 6 * math.sqrt(2)  # 12 pixels wide
    large = np.pad(disc(40, 100), ((0, 0), (0, 4200)))  # measured at a part of its pixels
    for number, (mask, thickness) in enumerate(((disc(40, 200), 40), (slanting, 12), (large, 40))):
        look = measure(tmp_path / str(number), mask)
        assert look.thickness == pytest.approx(thickness, rel=0.13)
        assert look.largest == max(mask.shape) and look.boxes == 0
        assert look.foreground == [pytest.approx(mask.mean())]
    stripes = np.arange(256)[:, None] % 8 < np.full((1, 256), 2)  # of a row of eight, two
    look = measure(tmp_path / "stripes", stripes)
    assert list(look.kept) == list(SIDES) and look.kept[256] == look.kept[1024] == 1
    # By PyTorch's own resizing: nearest-exact down, bilinear up.
    target = torch.from_numpy(stripes)[None, None].float()
    for side in (64, 96, 192):
        small = torch.nn.functional.interpolate(target, size=side, mode="nearest-exact")
        back = torch.nn.functional.interpolate(small, size=256, mode="bilinear") > 0.5
        expected = 2 * (back * target).sum() / (back.sum() + target.sum())
        assert look.kept[side] == pytest.approx(float(expected), abs=0.01)


def test_the_orientation_of_images(tmp_path):
    """Bright above, hardly so, bright left, bright in the middle."""
    fall, rng = np.linspace(200, 0, 64), np.random.default_rng(0)
    shades = [fall[:, None], 0.15 * fall[:, None], fall, 200 * disc(20, 64)]
    expected = [{"flip", "turn"}, set(), {"mirror", "turn"}, set()]
    for case, (shade, changes) in enumerate(zip(shades, expected, strict=True)):
        images = {}
        for number in range(12):
            blocks = rng.integers(0, 55, (8, 8)).repeat(8, 0).repeat(8, 1)
            images[f"{number}.png"] = Image.fromarray((shade + blocks).astype(np.uint8))
        look = take_fingerprint(write_set(tmp_path / str(case), images, [(0, square(4, 4, 9))]))
        assert {change for change, differs in look.oriented.items() if differs} == changes


def test_images_from_first_to_last_are_read_and_measured(tmp_path, monkeypatch):
    """Of eight images the first four have thin masks and are grey, the others neither."""
    monkeypatch.setattr("medseg.planning.fingerprint.MAX_READ", 5)
    monkeypatch.setattr("medseg.planning.fingerprint.MAX_MEASURED", 2)
    images = {f"{n}.png": Image.new("RGB", (64, 64), (9, 9, 9 + n // 4)) for n in range(8)}
    outlines = [(n, square(2, 2, 8 if n < 4 else 40)) for n in range(8)]
    look = take_fingerprint(write_set(tmp_path / "set", images, outlines))
    assert look.channels == 3
    assert look.foreground == [pytest.approx((8**2 + 40**2) / (2 * 64**2))]
    assert look.thickness == pytest.approx((8 + 40) / 2 / (math.pi / 2), rel=0.01)


# ---- what follows from it --------------------------------------------------------------------

BLOBS = {side: 0.9 + 0.1 * min(side / 256, 1) for side in SIDES}  # 0.96 from 160 on
LINES = {side: min(side / 1024, 1) for side in SIDES}
LOOK = Fingerprint(  # of 60 grey images of 300x200 pixels with one class
    **{"images": {"train": 60, "valid": 20, "test": 20}, "read": 100, "duplicates": ""},
    **{"width": 300, "height": 200, "largest": 300, "channels": 1, "n_classes": 1},
    **{"together": 0.0, "boxes": 0.0, "foreground": [0.05], "thickness": 30.0, "kept": BLOBS},
    empty={"train": 0.0, "valid": 0.0, "test": 0.0},
    oriented={"mirror": False, "flip": True, "turn": True},
)


def decide(given=(), device="cpu", passes=100, **changes):
    """The flags of a plan for LOOK with these changes, but for the length of the run."""
    plan, look = rules.Plan(dict(given)), LOOK._replace(**changes)
    rules.choose_images(plan, look)
    rules.choose_network(plan, look, device)
    rules.choose_augmentation(plan, look, passes)
    return plan.flags


def test_each_rule_follows_what_it_looks_at():
    usual, free = decide(), {"mirror": False, "flip": False, "turn": False}
    assert usual["n_channels"] == 1 and decide(channels=3)["n_channels"] == 3
    assert usual["crop"] == 0 and BLOBS[usual["image_size"]] >= 0.96
    thin = decide(kept=LINES, thickness=3.0)
    assert thin["crop"] and "image_size" not in thin
    several = {"n_classes": 2, "foreground": [0.1, 0.3]}
    assert decide(**several, together=0.4)["classes"] == "each"
    assert decide(**several)["classes"] == usual["classes"] == "union"
    assert usual["prior"] == 0.05 and decide(foreground=[0.0])["prior"] > 0
    assert usual["augment"]["rotate"] != 180 and "mirror" in usual["augment"]
    assert decide(oriented=free)["augment"]["rotate"] == 180
    assert "flip" in decide(oriented=free)["augment"]
    boxes = decide(oriented=free, boxes=0.9)["augment"]
    assert "turn" in boxes and boxes["rotate"] < 180
    for passes in (2, 30):
        slight = decide(oriented=free, passes=passes)["augment"]
        assert slight["rotate"] == 5 and "flip" not in slight
    assert "flip" in decide({"crop": 64}, oriented=free, passes=2)["augment"]
    left_and_right = {"mirror": True, "flip": True, "turn": True}
    assert not left_and_right.keys() & decide(oriented=left_and_right)["augment"].keys()
    assert usual["norm"] == "batch" and usual["batch_size"] >= 4
    assert decide(device="cuda")["n_filters"] > usual["n_filters"]
    assert decide(kept=LINES, largest=7000)["crop"] == 0  # too large to be decoded whole
    for side in SIDES:  # down to a few pixels
        flags = decide(kept={own: float(own >= side) for own in SIDES}, largest=side)
        bottom = (flags["crop"] or flags["image_size"]) / 2 ** flags["depth"]
        assert 2 <= bottom <= 16
    # A flag that is given wins, and the others go by it.
    flags = decide({"image_size": 32, "augment": {}, "n_filters": 3})
    assert (flags["image_size"], flags["augment"], flags["n_filters"]) == (32, {}, 3)
    assert flags["depth"] == 3 and flags["crop"] == 0
    assert decide({"crop": 64})["crop"] == 64 and decide({"crop": 64})["depth"] == 3
    assert decide({"image_size": 512}, kept=LINES)["crop"] == 0
    assert decide({"crop": 0}, kept=LINES)["image_size"] >= 300


def test_weights_that_find_the_masks_are_a_start(tmp_path, monkeypatch):
    """They mark the bright square of each image; of the last quarter, the mask is another one."""
    path, count = tmp_path / "known.pth", 64  # of which every second is tried
    torch.save(brightness_model().state_dict(), path)
    monkeypatch.setattr("medseg.weights.PRETRAINED", path)
    monkeypatch.setattr("medseg.planning.plan.time_plan", lambda *_: Times(step=0.1, image=0.001))
    images = {f"{number}.png": scan(32, 32, 4, 4, 8) for number in range(count)}
    outlines = [(n, square(4, 4, 8) if n < 48 else square(20, 20, 8)) for n in range(count)]
    root = write_set(tmp_path / "set", images, outlines)
    plan = plan_training(root, {"device": "cpu"})
    assert "Dice of 0.75" in plan.lines[0] and f"--init {path}" in plan.lines[0]
    chosen = {"n_filters": 2, "n_channels": 3, "image_size": 32, "norm": "none", "depth": 5}
    assert chosen.items() <= plan.flags.items() and "prior" not in plan.flags
    assert chosen.items() <= plan_training(root, {"device": "cpu"}, minutes=0.01).flags.items()
    for given in ({"n_filters": 4}, {"init": str(path)}, {"crop": 16}):
        assert "--init" not in " ".join(plan_training(root, {"device": "cpu", **given}).lines)
    for name, value in (("KNOWN", 0.76), ("FEW", count)):  # too bad; as many images
        with monkeypatch.context() as patch:
            patch.setattr(rules, name, value)
            assert "init" not in plan_training(root, {"device": "cpu"}).flags


@pytest.mark.parametrize("minutes", [1, 60])
@pytest.mark.parametrize("images", [2, 60, 40_000])
@pytest.mark.parametrize("crop", [0, 64])
def test_a_run_takes_the_minutes_that_there_are(minutes, images, crop):
    counts = {"train": images, "valid": max(images // 10, 1), "test": 20}
    look, times = LOOK._replace(images=counts), Times(step=0.1, image=0.01)
    plan, spent = rules.Plan({"crop": crop}), 12 * minutes  # a fifth of them went by with planning
    rules.choose_images(plan, look)
    rules.choose_network(plan, look, "cpu")
    _, seconds = rules.choose_length(plan, look, times, minutes, spent)
    flags, tiles = plan.flags, round(300 * 200 / 64**2) if crop else 1
    per_epoch = math.ceil(round(flags["repeat"] * images * tiles) / flags["batch_size"])
    if counts["valid"] * tiles * times.image < 10:  # else three evaluations take over a minute
        assert 0.8 * minutes * 60 < seconds + spent < 1.05 * minutes * 60
    assert flags["patience"] == flags["epochs"]  # the schedule ends with the run
    assert flags["warmup"] <= flags["epochs"] * per_epoch / 5


@pytest.fixture
def make_plan(monkeypatch):
    """(the flags of a plan, (name, value) of the flag that its warning asks for, the plan).

    step: seconds, or a function of the Plan; changes: of LOOK.
    """

    def make(step, minutes=0.0, changes=(), **given):
        look, seconds = LOOK._replace(**dict(changes)), step if callable(step) else lambda _: step
        patch = {"take_fingerprint": lambda *_, **__: look, "try_pretrained": lambda *_: None}
        patch["time_plan"] = lambda plan, *_: Times(seconds(plan), 0.001)
        for name, function in patch.items():
            monkeypatch.setattr(f"medseg.planning.plan.{name}", function)
        plan = plan_training(".", {"device": "cpu", **given}, minutes=minutes)
        flag = re.search(r"WARNING: .*--(minutes|epochs) (\d+)", "\n".join(plan.lines))
        return plan.flags, flag and (flag[1], int(flag[2])), plan

    return make


@pytest.mark.parametrize("folds", [0, 5])
@pytest.mark.parametrize("step", [0.5, 20])
def test_a_plan_that_teaches_nothing_tells_the_minutes_that_it_needs(step, folds, make_plan):
    """A step takes so many seconds, whatever the network; 0.5 are 120 in a minute."""
    parts = max(folds, 1)
    _, (flag, minutes), _ = make_plan(step, 1, folds=folds)
    assert flag == "minutes"
    assert (400 * step / 60 + 0.2) * parts <= minutes <= (440 * step / 60 + 2) * parts
    assert make_plan(step, minutes / parts, folds=folds)[1] is None


def test_fewer_steps_than_teach_something_are_told(make_plan):
    few = {"epochs": 3, "repeat": 1.0, "batch_size": 8}  # of 8 steps each
    assert make_plan(0.1, **few)[1] == ("epochs", 50)
    assert make_plan(0.1, **{**few, "epochs": 50})[1] is None
    # From weights a third of the steps will do; a minute holds 120 to 250.
    assert make_plan(0.2, 1)[1] and make_plan(0.2, 1, init="w.pth")[1] is None
    assert make_plan(0.2, 0.3, init="w.pth")[1][1] < 3
    # Masks of 64x64, which lose too much, are taken only where others leave less than 40 steps.
    slow = {"step": lambda plan: 5.0 if plan.side > 64 else 2.0}
    slow["changes"] = {"kept": {96: 1.0, 64: 0.5}}
    flags, (_, minutes), _ = make_plan(minutes=1, **slow)
    assert flags["image_size"] == 64 and minutes > 400 * 5 / 60
    flags, warning, _ = make_plan(minutes=minutes, **slow)
    assert warning is None and flags["image_size"] == 96


def test_folds_share_the_minutes_and_the_images(make_plan, capsys):
    """Of 20 and 80 images in train and valid each of 5 folds trains on 80, in a fifth of them."""
    make_plan(0.05, 4, {"images": {"train": 20, "valid": 80, "test": 20}})
    flags = planned_flags({"data": ".", "device": "cpu", "folds": 5, "minutes": 20.0})
    per_epoch = math.ceil(round(flags["repeat"] * 80) / flags["batch_size"])
    assert 0.8 * 240 < flags["epochs"] * per_epoch * 0.05 < 240
    assert "about 4 minute(s) for each of 5 folds" in capsys.readouterr().out


def test_size_then_filters_then_crops_give_way_to_a_short_time(make_plan):
    """A step takes 40 ms at 64x64 with 8 filters, and 400 of them are wanted."""

    def step(plan):
        return 0.04 * (plan.side / 64) ** 2 * plan.n_filters / 8

    def sizes(given=(), **changes):
        changes["images"] = {"train": 500, "valid": 2, "test": 2}
        flags, *_ = make_plan(step, 0.7, changes, **dict(given))
        return [flags.get(name) for name in ("crop", "image_size", "n_filters")]

    assert sizes() == [0, 64, 8]
    assert sizes({"image_size": 96}) == [0, 96, 8]
    blurred = {side: dice - (side < 128) / 5 for side, dice in BLOBS.items()}
    assert sizes(kept=blurred) == [0, 128, 8]
    assert sizes(kept=LINES, width=900, height=900) == [128, None, 8]
    huge = {"kept": LINES, "largest": 5000, "width": 5000, "height": 4000}
    assert sizes(**huge) == [0, 256, 8] and sizes({"crop": 128}, **huge)[0] == 128
    # 940 steps of 8 images are 125 passes over 60 images, but 3 over 2,400, which takes more.
    for images, filters in {60: 16, 2400: 8, 100_000: 8}.items():
        counts = {"images": {"train": images, "valid": 20, "test": 20}}
        flags, _, plan = make_plan(0.3, 5, counts, image_size=96)
        assert flags["n_filters"] == filters
        assert any("--n-filters 8: if larger" in line for line in plan.lines) == (filters == 8)


# ---- from the command line -------------------------------------------------------------------


@pytest.mark.usefixtures("dataset", "no_pictures")
def test_a_plan_is_printed_recorded_and_repeated(here, monkeypatch):
    flags = ("--recipe", "auto", "--image-size", 32, "--n-filters", 2, "--repeat", 1, "--epochs", 2)
    printed = output_of("train.py", *flags, *QUICK, "--out", "run", cwd=here)
    command = re.search("the same.*?: (.*)", printed)[1]
    assert printed.count("2 steps are too few") == 1  # of each run the plan tells, not the run
    words = shlex.split(command)[2:]
    assert "--recipe" not in words and "--n-filters" in words
    assert "plan for" not in output_of("train.py", *words, "--out", "again", cwd=here)
    first, again = (load_weights(here / out / "best_model.pth") for out in ("run", "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert load_weights(here / "run" / "last.pth")["flags"]["recipe"] == "auto"
    # A run that goes on is not planned again.
    monkeypatch.setattr(train, "planned_flags", lambda *_: 1 / 0)
    assert "plan for" not in output_of("train.py", "--resume", "--out", "run", cwd=here)


def test_what_cannot_be_planned_is_refused(dataset, tmp_path, refused, monkeypatch):
    empty = write_set(tmp_path / "set", {"a.png": picture(20, 20)}, [])
    refused("data", empty, "--plan", words=["set/train", "foreground"])
    refused("data", "nowhere", "--plan", words=["nowhere"])
    refused("train", "--minutes", 5, words=["--minutes", "--recipe auto"])
    (dataset / "train" / "2_train.png").write_bytes(b"no picture")
    refused("data", dataset, "--plan", words=["2_train.png"])
    assert take_fingerprint(dataset, skip_bad=True).read == 13
    assert plan_training(dataset, {"skip_bad": True, "device": "cpu"}).flags
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("train", "--recipe", "auto", "--data", dataset, words=["--plan", "torchrun"])


def noise(width, height):
    values = np.random.default_rng(0).integers(0, 255, (height, width), dtype=np.uint8)
    return Image.fromarray(values)


ONE = {"a.png": noise(40, 40)}
ABSURD = {  # data sets that no rule was made for: images, outlines, those of valid and of test
    "one pixel, none in valid": (ONE, [(0, square(7, 7, 1))], (ONE, [])),
    "long and thin": ({"a.png": noise(2000, 3)}, [(0, square(8, 0, 3))]),
    "40 classes": ({"a.png": noise(64, 64)}, [(0, square(n, n, 3)) for n in range(40)]),
}


@pytest.mark.parametrize("layout", ABSURD)
@pytest.mark.usefixtures("no_pictures")
def test_a_plan_for_an_absurd_data_set_runs(layout, tmp_path):
    root = write_set(tmp_path / "set", *ABSURD[layout])
    if layout == "40 classes":
        set_classes(root / "train", [f"organ {n}" for n in range(40)], lambda number: number + 1)
    short = ("--n-filters", 2, "--repeat", 1, "--batch-size", 2, "--epochs", 1)
    flags = ("--data", root, "--recipe", "auto", *short, *QUICK, "--out", "run")
    output_of("train.py", *flags, cwd=tmp_path)
