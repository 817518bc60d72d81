"""--recipe auto: what is measured of a data set, what follows from it, and that it trains."""

import math
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    assert_done,
    brightness_model,
    edit_annotations,
    output_of,
    scan,
    script_here,
    set_classes,
    square,
    tree,
    write_split,
)
from PIL import Image

from medseg.planning import fingerprint as fingerprints
from medseg.planning import plan as plans
from medseg.planning import timing
from medseg.planning.fingerprint import SIDES, Fingerprint, take_fingerprint
from medseg.planning.plan import plan_training, try_pretrained
from medseg.planning.rules import (
    Plan,
    choose_augmentation,
    choose_images,
    choose_length,
    choose_network,
    shrink,
)
from medseg.planning.timing import Times
from medseg.weights import load_weights
from net import UNet


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.05)


QUICK = ("--device", "cpu", "--swanlab", "disabled")


def picture(width, height, value=0, mode="RGB"):
    return Image.new(mode, (width, height), value if mode == "L" else (value, value, value))


def write_set(root, images, annotations, others=None):
    """A data set whose train split has these images; valid and test one each, or `others`."""
    write_split(root / "train", images, annotations)
    for split in ("valid", "test"):
        write_split(root / split, *(others or ({"v.png": picture(8, 8)}, [(0, square(1, 1, 2))])))
    return root


# ---- what is measured ------------------------------------------------------------------------


def test_the_numbers_of_a_data_set_counted_by_hand(tmp_path):
    images = {"a.png": picture(40, 20), "b.png": picture(40, 20), "c.png": picture(20, 40)}
    # 8x8 and 4x4 pixels in the first, which overlap in 2x2; 8x8 in the second; none in the third.
    annotations = [(0, square(0, 0, 8)), (0, square(6, 6, 4)), (1, square(2, 2, 8))]
    others = {"wide.png": picture(90, 10)}, [(0, square(1, 1, 2))]
    root = write_set(tmp_path / "set", images, annotations, others)
    set_classes(root / "train", ["liver", "tumour"], lambda number: 1 + number % 2)
    look = take_fingerprint(root)
    assert look.images == {"train": 3, "valid": 1, "test": 1} and look.read == 5
    assert (look.width, look.height, look.largest) == (40, 20, 90)
    assert look.n_classes == 2
    assert look.foreground == pytest.approx([128 / 2400, 16 / 2400])
    assert look.together == pytest.approx(1 / 3) and look.channels == 1
    assert look.boxes == 0.5  # the two in the first are no rectangle together
    assert look.empty == {"train": pytest.approx(1 / 3), "valid": 0, "test": 0}


def test_one_colour_pixel_makes_an_image_a_colour_image(tmp_path):
    image = picture(30, 30, 90)
    image.putpixel((17, 4), (90, 91, 90))
    images, annotations = {"a.png": picture(30, 30), "b.png": image}, [(0, square(1, 1, 9))]
    assert take_fingerprint(write_set(tmp_path / "set", images, annotations)).channels == 3


def disc(radius, side):
    rows, columns = np.mgrid[:side, :side] - side // 2
    return rows**2 + columns**2 <= radius**2


def write_masks(root, masks):
    """A data set of black images with these masks, as run lengths."""
    from medseg.run_lengths import encode

    images = {f"{number}.png": picture(*mask.shape[::-1]) for number, mask in enumerate(masks)}
    outlines = [
        (number, {"size": list(mask.shape), "counts": encode(mask).counts.decode()})
        for number, mask in enumerate(masks)
    ]
    return write_set(root, images, outlines)


def test_thickness_is_the_width_of_a_stripe_and_the_radius_of_a_disc(tmp_path):
    look = take_fingerprint(write_masks(tmp_path / "disc", [disc(40, 200)]))
    assert look.thickness == pytest.approx(40, rel=0.03) and look.boxes == 0
    rows, columns = np.mgrid[:600, :600]
    slanting = abs(rows - columns) <= 6 * math.sqrt(2)  # 12 pixels across
    assert take_fingerprint(
        write_masks(tmp_path / "stripe", [slanting])
    ).thickness == pytest.approx(
        12,
        rel=0.13,  # slanting edges have more steps than the formula has on average
    )


def test_large_masks_are_measured_in_pixels_of_the_image(tmp_path):
    """A disc in an image of 4,300 pixels, of which every second or third is looked at."""
    masks = [np.pad(disc(40, 100), ((0, 0), (0, 4200)))]
    measured = take_fingerprint(write_masks(tmp_path / "set", masks))
    assert measured.thickness == pytest.approx(40, rel=0.05) and measured.largest == 4300
    assert measured.foreground == [pytest.approx(masks[0].mean())]


def test_what_masks_keep_of_themselves_when_they_are_resized(tmp_path):
    stripes = np.zeros((256, 256), bool)
    stripes[::8] = True  # a row of eight
    stripes[1::8] = True
    look = take_fingerprint(write_masks(tmp_path / "set", [stripes]))
    assert list(look.kept) == list(SIDES)
    assert look.kept[256] == look.kept[512] == look.kept[1024] == 1
    # By PyTorch's own resizing: nearest-exact down, bilinear up.
    target = torch.from_numpy(stripes)[None, None].float()
    for side in (64, 96, 192):
        small = torch.nn.functional.interpolate(target, size=side, mode="nearest-exact")
        back = torch.nn.functional.interpolate(small, size=256, mode="bilinear") > 0.5
        expected = 2 * (back * target).sum() / (back.sum() + target.sum())
        assert look.kept[side] == pytest.approx(float(expected), abs=0.01)
    assert look.kept[64] < 0.7


@pytest.mark.parametrize(
    "shades, expected",
    [
        (np.zeros((64, 64)), set()),
        (np.linspace(200, 0, 64)[:, None] * np.ones(64), {"flip", "turn"}),  # bright above
        (np.linspace(200, 0, 64) * np.ones((64, 1)), {"mirror", "turn"}),  # bright left
        (200.0 * disc(20, 64), set()),
        (np.linspace(30, 0, 64)[:, None] * np.ones(64), set()),  # hardly bright above
    ],
    ids=["noise", "above", "left", "round", "hardly"],
)
def test_the_orientation_of_images(shades, expected, tmp_path):
    rng, images = np.random.default_rng(0), {}
    for number in range(12):
        blocks = rng.integers(0, 55, (8, 8)).repeat(8, 0).repeat(8, 1)
        images[f"{number}.png"] = Image.fromarray((shades + blocks).astype(np.uint8))
    look = take_fingerprint(write_set(tmp_path / "set", images, [(0, square(4, 4, 9))]))
    assert {change for change, differs in look.oriented.items() if differs} == expected


def test_a_data_set_is_looked_at_once(dataset, monkeypatch):
    first, read = take_fingerprint(dataset), []
    monkeypatch.setattr(fingerprints, "read_image", lambda path: read.append(path))
    assert take_fingerprint(dataset) == first and read == []
    edit_annotations(dataset / "valid", lambda content: content["annotations"].pop())
    with pytest.raises(AttributeError):  # the stand-in reads no image
        take_fingerprint(dataset)
    assert read


def test_images_from_first_to_last_are_read_and_measured(tmp_path, monkeypatch):
    """Of eight images the first four have thin masks and are grey, the others neither."""
    monkeypatch.setattr(fingerprints, "MAX_READ", 5)
    monkeypatch.setattr(fingerprints, "MAX_MEASURED", 2)
    images = {f"{n}.png": Image.new("RGB", (64, 64), (9, 9, 9 + n // 4)) for n in range(8)}
    outlines = [(n, square(2, 2, 8 if n < 4 else 40)) for n in range(8)]
    measured = take_fingerprint(write_set(tmp_path / "set", images, outlines))
    assert measured.channels == 3
    assert measured.foreground == [pytest.approx((8**2 + 40**2) / (2 * 64**2))]
    assert measured.thickness == pytest.approx((8 + 40) / 2 / (math.pi / 2), rel=0.01)


# ---- what follows from it --------------------------------------------------------------------

BLOBS = {side: 0.9 + 0.1 * min(side / 256, 1) for side in SIDES}  # 0.96 from 160 on
SLIGHT = {"rotate": 5, "scale": 0.1, "shift": 0.05, "contrast": 0.1, "brightness": 0.1}
LINES = {side: min(side / 1024, 1) for side in SIDES}


def look(**changes):
    """A Fingerprint of 60 grey images of 300x200 pixels with one class."""
    return Fingerprint(
        **{
            "images": {"train": 60, "valid": 20, "test": 20},
            "read": 100,
            "width": 300,
            "height": 200,
            "largest": 300,
            "channels": 1,
            "n_classes": 1,
            "together": 0.0,
            "boxes": 0.0,
            "foreground": [0.05],
            "empty": {"train": 0.0, "valid": 0.0, "test": 0.0},
            "thickness": 30.0,
            "kept": BLOBS,
            "oriented": {"mirror": False, "flip": True, "turn": True},
            "duplicates": "",
            **changes,
        }
    )


def decide(given=(), device="cpu", passes=100, **changes):
    """The flags of a plan for `look(**changes)`, but for the length of the run."""
    plan = Plan(dict(given))
    choose_images(plan, look(**changes))
    choose_network(plan, look(**changes), device)
    choose_augmentation(plan, look(**changes), passes)
    assert all(line.startswith("--") and ": " in line for line in plan.lines)
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
        assert decide(oriented=free, passes=passes)["augment"] == SLIGHT
    assert "flip" in decide({"crop": 64}, oriented=free, passes=2)["augment"]
    left_and_right = {"mirror": True, "flip": True, "turn": True}
    assert not left_and_right.keys() & decide(oriented=left_and_right)["augment"].keys()
    assert usual["norm"] == "batch" and usual["batch_size"] >= 4
    assert decide(device="cuda")["n_filters"] > usual["n_filters"]


def test_lines_are_of_flags_that_are_on_and_numbers_that_people_read(monkeypatch):
    monkeypatch.setattr(plans, "take_fingerprint", lambda *_, **__: look())
    monkeypatch.setattr(plans, "time_plan", lambda *_: Times(step=20, image=0.001))
    plan = plan_training(Path("."), {"device": "cpu", "n_filters": 8}, minutes=1)  # of few steps
    text = "\n".join(plan.lines)
    assert plan.flags["ema"] == plan.flags["warmup"] == 0 and "--patience" in text
    assert not re.search(r"--(ema|warmup|crop) 0|0\.0 times", text)


def test_a_network_goes_down_to_a_few_pixels():
    for side in SIDES:
        flags = decide(kept={own: float(own >= side) for own in SIDES}, largest=side)
        bottom = (flags["crop"] or flags["image_size"]) / 2 ** flags["depth"]
        assert 2 <= bottom <= 16


def test_a_flag_that_is_given_wins_and_the_others_go_by_it():
    flags = decide({"image_size": 32, "augment": {}, "n_filters": 3})
    assert (flags["image_size"], flags["augment"], flags["n_filters"]) == (32, {}, 3)
    assert flags["depth"] == 3 and flags["crop"] == 0
    assert decide({"crop": 64})["crop"] == 64 and decide({"crop": 64})["depth"] == 3
    assert decide({"image_size": 512}, kept=LINES)["crop"] == 0
    assert decide({"crop": 0}, kept=LINES)["image_size"] >= 300


@pytest.mark.parametrize("astray", [1, 3])
def test_weights_that_find_the_masks_are_a_start(astray, tmp_path, monkeypatch):
    """They mark the bright square of each of four images; of some, the mask is another square."""
    path = tmp_path / "known.pth"
    torch.save(brightness_model().state_dict(), path)
    monkeypatch.setattr("medseg.weights.PRETRAINED", path)
    images = {f"{number}.png": scan(32, 32, 4, 4, 8) for number in range(4)}
    squares = [square(4, 4, 8)] * (4 - astray) + [square(20, 20, 8)] * astray
    root = write_set(tmp_path / "set", images, list(enumerate(squares)))
    plan = plan_training(root, {"device": "cpu"})
    if astray == 3:  # Dice 1 / 4
        assert "init" not in plan.flags and plan.flags["n_filters"] > 2
        return
    assert "Dice of 0.75" in plan.lines[0] and f"--init {path}" in plan.lines[0]
    chosen = {"n_filters": 2, "n_channels": 3, "image_size": 32, "norm": "none", "depth": 5}
    assert chosen.items() <= plan.flags.items() and "prior" not in plan.flags
    short = plan_training(root, {"device": "cpu"}, minutes=0.01)
    assert chosen.items() <= short.flags.items()
    for given in ({"n_filters": 4}, {"init": str(path)}, {"crop": 16}):
        assert "--init" not in " ".join(plan_training(root, {"device": "cpu", **given}).lines)
    monkeypatch.setattr("medseg.planning.rules.FEW", 4)  # there are as many images
    assert "init" not in plan_training(root, {"device": "cpu"}).flags


def test_images_from_first_to_last_decide_on_a_start(tmp_path, monkeypatch):
    """The weights mark the squares of the first 32 of 64 images, and not those of the others."""
    path = tmp_path / "known.pth"
    torch.save(brightness_model().state_dict(), path)
    monkeypatch.setattr("medseg.weights.PRETRAINED", path)
    images = {f"{number}.png": scan(32, 32, 4, 4, 8) for number in range(64)}
    outlines = [(n, square(4, 4, 8) if n < 32 else square(20, 20, 8)) for n in range(64)]
    root = write_set(tmp_path / "set", images, outlines)
    assert try_pretrained(root)[1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("minutes", [1, 5, 60])
@pytest.mark.parametrize("images", [2, 60, 40_000])
@pytest.mark.parametrize("crop", [0, 64])
def test_a_run_takes_the_minutes_that_there_are(minutes, images, crop):
    counts = {"train": images, "valid": max(images // 10, 1), "test": 20}
    own, times = look(images=counts), Times(step=0.1, image=0.01)
    plan = Plan({"crop": crop})
    choose_images(plan, own)
    choose_network(plan, own, "cpu")
    _, seconds = choose_length(plan, own, times, minutes)
    flags = plan.flags
    pool = images * (round(300 * 200 / 64**2) if crop else 1)
    per_epoch = math.ceil(round(flags["repeat"] * pool) / flags["batch_size"])
    assert seconds >= flags["epochs"] * per_epoch * times.step
    evaluation = counts["valid"] * (pool / images) * times.image
    if evaluation < 10:  # else three of them take longer than a minute
        assert 0.8 * minutes * 60 < seconds < 1.05 * minutes * 60
    assert flags["patience"] == flags["epochs"]  # the schedule ends with the run
    assert flags["warmup"] <= flags["epochs"] * per_epoch / 5


@pytest.mark.parametrize("folds, each", [(0, 20), (5, 4)])
def test_folds_share_the_minutes(folds, each, monkeypatch, capsys):
    """A plan of 5 folds is that of one training in a fifth of the time, and says so."""

    def note(root, given, *, minutes):
        taken.append(minutes)
        return SimpleNamespace(flags={}, lines=[], given={}, seconds=60 * minutes, device="cpu")

    taken = []
    monkeypatch.setattr(plans, "plan_training", note)
    plans.planned_flags({"folds": folds, "minutes": 20.0})
    printed = capsys.readouterr().out
    assert taken == [each] and f"{each} minutes" in printed
    assert ("5 folds" in printed) == bool(folds)


def test_looking_at_the_data_counts_as_planning(monkeypatch):
    def take_slowly(*_, **__):
        time.sleep(0.3)
        return look()

    monkeypatch.setattr(plans, "take_fingerprint", take_slowly)
    monkeypatch.setattr(plans, "time_plan", lambda *_: Times(step=0.001, image=0.0001))
    given = {"device": "cpu", "image_size": 64}
    slow = plan_training(".", given, minutes=0.3).seconds
    monkeypatch.setattr(plans, "take_fingerprint", lambda *_, **__: look())
    assert plan_training(".", given, minutes=0.3).seconds - slow > 0.2


def measured(monkeypatch, fingerprint, time_plan):
    """plan_training meets this Fingerprint and these times, and no weights to start from."""
    monkeypatch.setattr(plans, "take_fingerprint", lambda *_, **__: fingerprint)
    monkeypatch.setattr(plans, "time_plan", time_plan)
    monkeypatch.setattr(plans, "try_pretrained", lambda *_: None)


def needed(plan):
    """The flag of a plan's warning that would make the run long enough: (name, value) or None."""
    found = re.search(r"WARNING: .*--(minutes|epochs) (\d+)", "\n".join(plan.lines))
    return found and (found[1], int(found[2]))


@pytest.mark.parametrize("folds", [0, 5])
@pytest.mark.parametrize("step", [0.5, 20])
def test_a_plan_that_teaches_nothing_tells_the_minutes_that_it_needs(step, folds, monkeypatch):
    """A step takes so many seconds, whatever the network; 0.5 are 120 in a minute."""
    measured(monkeypatch, look(), lambda *_: Times(step=step, image=0.001))
    given, parts = {"device": "cpu", "folds": folds}, max(folds, 1)
    flag, minutes = needed(plan_training(".", given, minutes=1))
    assert flag == "minutes"
    assert (400 * step / 60 + 0.2) * parts <= minutes <= (440 * step / 60 + 2) * parts
    longer = plan_training(".", given, minutes=minutes / parts)
    assert needed(longer) is None and all("of 0 steps" not in line for line in longer.lines)


def test_minutes_that_are_needed_are_those_of_a_size_that_is_worth_them(monkeypatch):
    """Masks of 64x64, which lose too much, are taken only where others leave less than 40 steps."""

    def time_plan(plan, *_):
        return Times(step=5.0 if plan.side > 64 else 2.0, image=0.001)

    measured(monkeypatch, look(kept={96: 1.0, 64: 0.5}), time_plan)
    short = plan_training(".", {"device": "cpu"}, minutes=1)
    _, minutes = needed(short)
    assert short.flags["image_size"] == 64 and minutes > 400 * 5 / 60
    longer = plan_training(".", {"device": "cpu"}, minutes=minutes)
    assert needed(longer) is None and longer.flags["image_size"] == 96


def test_epochs_that_are_given_are_told_to_be_few(monkeypatch):
    measured(monkeypatch, look(), lambda *_: Times(step=0.1, image=0.001))
    given = {"device": "cpu", "epochs": 3, "repeat": 1.0, "batch_size": 8}  # of 8 steps each
    assert needed(plan_training(".", given)) == ("epochs", 50)
    assert needed(plan_training(".", {**given, "epochs": 50})) is None


def test_a_start_from_weights_needs_fewer_steps(monkeypatch):
    """The time holds 120 to 250 of them."""
    measured(monkeypatch, look(), lambda *_: Times(step=0.2, image=0.001))
    assert needed(plan_training(".", {"device": "cpu"}, minutes=1))
    started = {"device": "cpu", "init": "w.pth"}
    assert needed(plan_training(".", started, minutes=1)) is None
    assert needed(plan_training(".", started, minutes=0.3))[1] < 3


def test_a_plan_of_folds_counts_the_images_of_a_fold(monkeypatch):
    """Of 20 and 80 images in train and valid, a fold trains on 80; they fill the minutes."""
    counts = {"train": 20, "valid": 80, "test": 20}
    measured(monkeypatch, look(images=counts), lambda *_: Times(step=0.05, image=0.001))
    flags = plan_training(".", {"device": "cpu", "folds": 5}, minutes=4).flags
    per_epoch = math.ceil(round(flags["repeat"] * 80) / flags["batch_size"])
    assert 0.8 * 240 < flags["epochs"] * per_epoch * 0.05 < 240


# ---- from the command line -------------------------------------------------------------------


@pytest.fixture
def planned(dataset, tmp_path, monkeypatch):
    """A training of --recipe auto of a second or two, in run/: what it printed."""
    monkeypatch.chdir(tmp_path)
    flags = ("--recipe", "auto", "--image-size", 32, "--n-filters", 2, "--repeat", 1, "--epochs", 2)
    return output_of("train.py", *flags, *QUICK, "--out", "run", cwd=tmp_path)


def test_a_plan_is_printed_recorded_and_repeated(planned, dataset, tmp_path):
    lines = planned.splitlines()
    (command,) = (line.split(": ", 1)[1] for line in lines if line.startswith("the same"))
    recorded = load_weights(tmp_path / "run" / "last.pth")["flags"]
    assert recorded["recipe"] == "auto" and recorded["n_filters"] == 2
    assert planned.count("2 steps are too few") == 1  # of each run the plan tells, not the run
    words = shlex.split(command)[2:]
    assert "--recipe" not in words and "--n-filters" in words
    repeated = output_of("train.py", *words, "--out", "again", cwd=tmp_path)
    assert "plan for" not in repeated
    weights = [load_weights(tmp_path / out / "best_model.pth") for out in ("run", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    own = load_weights(tmp_path / "again" / "last.pth")["flags"]
    same = own.keys() - {"recipe", "out", "data_fingerprints", "tracker_runs"}
    assert {name: own[name] for name in same} == {name: recorded[name] for name in same}


def test_a_resumed_run_is_not_planned_again(planned, dataset, tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "planned_flags", lambda *_: 1 / 0)
    (tmp_path / "run" / "curves.png").unlink()  # as if it had been stopped in its test
    result = script_here("train.py", "--resume", "--out", "run", cwd=tmp_path)
    assert_done(result)
    assert "plan for" not in result.stdout


def test_data_py_prints_a_plan_whose_command_can_be_pasted(planned, dataset, tmp_path):
    dataset = dataset.rename(tmp_path / "my data")
    before = tree(tmp_path)
    text = output_of("data.py", dataset, "--plan", cwd=tmp_path)
    assert tree(tmp_path) == before  # the fingerprint was kept by the training
    words = shlex.split(text.splitlines()[-1])
    assert words[words.index("--data") + 1] == str(dataset) and "--tune-prediction" in words
    assert words[words.index("--image-size") + 1] in {str(side) for side in SIDES}
    assert "minutes" in text or "a minute" in text


def test_damaged_images_are_left_out_where_that_is_asked_for(dataset, refused):
    (dataset / "train" / "2_train.png").write_bytes(b"no picture")
    refused("data", dataset, "--plan", words=["2_train.png"])
    with pytest.raises(ValueError, match="2_train.png"):
        plan_training(dataset, {})
    assert take_fingerprint(dataset, skip_bad=True).read == 13
    assert plan_training(dataset, {"skip_bad": True, "device": "cpu"}).flags


def test_flags_that_do_not_go_with_a_plan(dataset, refused, monkeypatch):
    refused("train", "--minutes", 5, words=["--minutes", "--recipe auto"])
    refused("data", "nowhere", "--plan", words=["nowhere"])
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("train", "--recipe", "auto", "--data", dataset, words=["--plan", "torchrun"])


# ---- data sets that no rule was made for -------------------------------------------------------


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)
    return Image.fromarray(values)


ONE, OUTLINE = {"a.png": noise(40, 40)}, [(0, square(8, 8, 16))]
ABSURD = {  # images, outlines, those of valid and of test
    "two images": (ONE, OUTLINE, (ONE, OUTLINE)),
    "one pixel": (ONE, [(0, square(7, 7, 1))]),
    "empty valid": (ONE, OUTLINE, (ONE, [])),
    "long and thin": ({"a.png": noise(2000, 3)}, [(0, square(8, 0, 3))]),
    "other sizes": ({f"{n}.png": noise(n, 2 * n) for n in (3, 30, 300)}, [(2, square(20, 20, 90))]),
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
    assert_done(script_here("train.py", *flags, cwd=tmp_path))


def test_a_data_set_without_foreground_cannot_be_planned(tmp_path, refused):
    root = write_set(tmp_path / "set", {"a.png": noise(20, 20)}, [])
    refused("data", root, "--plan", words=["set/train", "foreground"])


def test_size_then_filters_then_crops_give_way_to_a_short_time(monkeypatch):
    """A step takes 40 ms at 64x64 with 8 filters, and 400 of them are wanted."""

    def time_plan(plan, *_):
        work = (plan.side / 64) ** 2 * plan.n_filters / 8
        return Times(step=0.04 * work, image=0.001 * work)

    def flags_for(given=(), **changes):
        monkeypatch.setattr(plans, "take_fingerprint", lambda *_, **__: look(**changes))
        plan = plan_training(".", {"device": "cpu", **dict(given)}, minutes=0.7)
        return {name: plan.flags.get(name) for name in ("crop", "image_size", "n_filters")}

    monkeypatch.setattr(plans, "time_plan", time_plan)
    many = {"train": 500, "valid": 2, "test": 2}
    small = {"crop": 0, "image_size": 64, "n_filters": 8}
    assert flags_for(images=many) == small
    assert flags_for({"image_size": 96}, images=many) == {**small, "image_size": 96}
    coarse = {side: dice - (side < 128) / 5 for side, dice in BLOBS.items()}
    assert flags_for(images=many, kept=coarse) == {**small, "image_size": 128}
    wide = {"kept": LINES, "width": 900, "height": 900}
    assert flags_for(images=many, **wide) == {"crop": 128, "image_size": None, "n_filters": 8}
    huge = {"kept": LINES, "largest": 5000, "width": 5000, "height": 4000}
    assert flags_for(images=many, **huge) == {"crop": 0, "image_size": 256, "n_filters": 8}
    assert flags_for({"crop": 128}, images=many, **huge)["crop"] == 128
    assert decide(**{**huge, "largest": 7000})["crop"] == 0 < decide(**huge)["crop"]


def test_sizes_at_which_masks_stay_as_they_are_give_way_before_the_filters():
    own = look(kept={**BLOBS, 64: 0.95, 96: 0.965, 128: 0.98})
    given, changes = {"image_size": 128}, []
    while True:
        plan = Plan(given)
        choose_images(plan, own)
        choose_network(plan, own, "cpu")
        if not (change := shrink(plan, own, {}, steps=100)):
            break
        changes.append(change)
        given |= change
    assert changes == [{"image_size": 96}, {"n_filters": 8}, {"image_size": 64}]


def test_many_images_take_more_steps_and_so_a_smaller_network(monkeypatch):
    """The time holds 940 steps of 8 images: 125 passes over 60 images, 3 over 2,400."""
    monkeypatch.setattr(plans, "time_plan", lambda *_: Times(step=0.3, image=0.001))
    filters = {}
    for images in (60, 2400, 100_000):
        counts = {"train": images, "valid": 20, "test": 20}
        monkeypatch.setattr(plans, "take_fingerprint", lambda *_, c=counts, **__: look(images=c))
        plan = plan_training(".", {"device": "cpu", "image_size": 96}, minutes=5)
        filters[images] = plan.flags["n_filters"]
        assert any("--n-filters 8: if larger" in line for line in plan.lines) == (images > 60)
    assert filters == {60: 16, 2400: 8, 100_000: 8}


def test_a_step_takes_what_most_of_the_steps_take(monkeypatch):
    """Of calls that take 9, 1, 2, 3, 4 and 5 s the first is left out, and the median is 3 s."""
    durations, clock = [9, 1, 2, 3, 4, 5], [0]

    def call():
        clock[0] += durations.pop(0)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(timing, "SECONDS", 15)
    assert timing._seconds(call, torch.device("cpu")) == 3 and not durations


def test_a_large_image_is_timed_by_a_smaller_one(monkeypatch):
    sides = []

    class Network(UNet):
        def forward(self, images):
            sides.append(images.shape[-1])
            return super().forward(images)

    def seconds(function, device):
        function()
        return 1.0

    monkeypatch.setattr(timing, "_seconds", seconds)
    network = Network(1, 1, 2, depth=1)
    cpu = torch.device("cpu")
    usual, large = (timing.time_network(network, cpu, side, 2, "fp32") for side in (64, 512))
    assert set(sides) == {64, 256}
    assert usual == (pytest.approx(1.15), 0.5)
    # Twice the side has four times the pixels, each of which takes 1.46 times as long.
    assert large.step / usual.step == large.image / usual.image == pytest.approx(4 * 1.46, rel=0.05)
