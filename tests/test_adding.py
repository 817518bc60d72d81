"""download.py --add: what a split holds stays, what is new comes, or nothing does."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    SMALL,
    annotations,
    box,
    coco_file,
    edit_annotations,
    grey,
    labelme,
    labels,
    output_of,
    photo,
    refuse_download,
    run_download,
    save,
    save_pair,
    shape,
    stored,
    tree,
    write_dicom,
    write_groups,
)
from numpy.testing import assert_array_equal
from PIL import Image

from data import load_split
from medseg import splits
from medseg.planning.fingerprint import take_fingerprint

NEW = ("--masks", "more/images", "more/masks", "--into", "train", "--add")
CLASSES = ("--classes", "cup,disc")


def pairs(folder, *names, size=(40, 30)):
    """FOLDER/images and FOLDER/masks with a noise image and a mask of 0, 1 and 2 for each name.

    The seed of both is the number that the name ends with.
    """
    for name in names:
        seed = int(name[-2:])
        save(photo(seed, size), f"{folder}/images/{name}.png")
        save(grey([0, 1, 2])(labels(seed, 2, size)), f"{folder}/masks/{name}.png")


@pytest.fixture
def grown(here):
    """dataset/ with six images, and four more in more/."""
    pairs("first", *(f"p{n}_{n:02}" for n in range(6)))
    grouped = ("--masks", "first/images/{group}_{id}.png", "first/masks/{group}_{id}.png", *CLASSES)
    run_download(*grouped, "--split", 34, 33, 33)
    pairs("more", "n10", "n11")
    pairs("more", "n12", "n13", size=(50, 64))
    return here


def test_what_is_there_stays_and_what_is_new_comes(grown):
    def as_others_write_it(content):
        content["categories"] = [{"id": 7, "name": "cup"}, {"id": "z", "name": "disc", "x": 1}]
        content["images"][0] |= {"id": 5, "licence": 3}
        content["images"][1]["id"] = "one"
        content["images"].append({"id": 55, "file_name": None})  # damaged
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = {1: 7, 2: "z"}[annotation["category_id"]]
            annotation["image_id"] = [5, "one"][annotation["image_id"]]
            annotation["id"] = 3 + number

    edit_annotations(Path("dataset/train"), as_others_write_it)
    Path("dataset/train/notes.txt").write_text("mine")
    before, old = tree("dataset"), annotations("train")
    out = run_download(*NEW, *CLASSES)
    assert "train: 4 images added, 7 in all" in out
    after, new = tree("dataset"), annotations("train")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"train/_annotations.coco.json"}
    added = [f"n{n}.png" for n in range(10, 14)]
    assert sorted(after.keys() - before.keys()) == [f"train/{name}" for name in added]
    for key in ("images", "annotations"):
        assert new[key][: len(old[key])] == old[key]
        assert len({entry["id"] for entry in new[key]}) == len(new[key])
    assert {key: new[key] for key in ("info", "categories")} == {
        key: old[key] for key in ("info", "categories")
    }
    for name in added:
        assert Path("dataset/train", name).read_bytes() == Path("more/images", name).read_bytes()
    edit_annotations(Path("dataset/train"), lambda content: content["images"].pop(2))
    for name in (10, 11, 12, 13):
        mask = np.asarray(Image.open(f"more/masks/n{name}.png"))
        assert_array_equal(stored()[f"n{name}"]["cup"], mask == 1)
        assert_array_equal(stored()[f"n{name}"]["disc"], mask == 2)


def test_training_sees_the_new_images(grown, no_pictures):
    def count():
        return take_fingerprint(Path("dataset")).images["train"]

    assert (len(load_split("dataset", "train", 32)), count()) == (2, 2)
    run_download(*NEW, *CLASSES)
    assert (len(load_split("dataset", "train", 32)), count()) == (6, 6)
    assert "6 train, 2 valid" in output_of("train.py", *SMALL, "--epochs", 1, cwd=grown)


REFUSED = {  # more flags, or those in place of NEW; what the message names
    "other classes": (("--classes", "cup,lens"), ["dataset/train", "cup, lens", "--classes"]),
    "another order": (("--classes", "disc,cup"), ["dataset/train", "disc, cup", "--classes"]),
    "a new class": ((), ["dataset/train", "1, 2", "--classes"]),
    "--force": ((*CLASSES, "--force"), ["--add", "--force"]),
    "a group of test": ((*CLASSES, "--groups", "test.csv"), ["dataset/test", "--into test"]),
    "a group of valid": ((*CLASSES, "--groups", "valid.csv"), ["dataset/valid", "--into valid"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_disagrees_changes_nothing(grown, case):
    flags, words = REFUSED[case]
    for split, group in {"valid": "3", "test": "1"}.items():
        edit_annotations(
            Path("dataset", split), lambda content, g=group: content["images"][0].update(group=g)
        )
    write_groups({f"n1{n}": 1 for n in range(4)}, "test.csv")
    write_groups({f"n1{n}": n for n in range(4)}, "valid.csv")
    refuse_download(*NEW, *flags, words=words)


def test_what_add_goes_with(grown):
    refuse_download(*NEW[:3], *CLASSES, "--add", words=["--add", "--into train"])
    refuse_download("--synthetic", "--add", words=["--add", "--masks"])
    refuse_download(*NEW[:5], *CLASSES, "--duplicates", "skip", words=["--duplicates", "--add"])
    refuse_download(*NEW[:5], *CLASSES, words=["dataset/train", "--add", "--force"])
    refuse_download(*NEW, "--data", "none", words=["none/train", "--add"])
    inside = ("--masks", "dataset/train", "more/masks", *NEW[3:])
    refuse_download(*inside, words=["dataset/train"])


def test_another_window_is_refused(here):
    rows = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    for folder, count in (("a", 3), ("b", 1)):
        for number in range(count):
            Path(folder, "images").mkdir(parents=True, exist_ok=True)
            write_dicom(f"{folder}/images/{folder}{number}.dcm", np.roll(rows, number * 5 + 1))
            save(
                grey([0, 1])(labels(number, size=(64, 64))), f"{folder}/masks/{folder}{number}.png"
            )
    run_download("--masks", "a/images", "a/masks", "--window", 40, 400)
    add = ("--masks", "b/images", "b/masks", "--into", "train", "--add", "--window")
    refuse_download(*add, 50, 400, words=["dataset/train", "--window 40 400"])


def test_the_same_images_again_are_one_line(grown):
    run_download(*NEW, *CLASSES)
    line = refuse_download(*NEW, *CLASSES, words=["4 of the 4", "dataset/train", "n10.png"])
    assert "nothing to add" in line
    refuse_download(*NEW, *CLASSES, "--duplicates", "skip", words=["nothing to add"])
    os.rename("more/images/n10.png", "more/images/a10.png")  # under another name
    os.rename("more/masks/n10.png", "more/masks/a10.png")
    pairs("more", "n14")
    refuse_download(*NEW, *CLASSES, words=["a10.png as n10.png", "--duplicates skip"])
    out = run_download(*NEW, *CLASSES, "--duplicates", "skip")
    assert "left out: 4 of the 5" in out and "train: 1 images added, 7 in all" in out
    assert set(stored()) >= {"n14"} and "a10" not in stored()
    refuse_download(*NEW, *CLASSES, "--duplicates", "keep", words=["n11.png", "--prefix"])
    keep = ("--duplicates", "keep", "--prefix", "b/")
    assert "5 images added, 12 in all" in run_download(*NEW, *CLASSES, *keep)
    assert_array_equal(stored()["b_a10"]["cup"], stored()["n10"]["cup"])


def test_images_of_other_splits_are_told(grown):
    """Leaking images of test into train would make its score too good."""
    (stem, *_) = stored("test")
    with Image.open(f"dataset/test/{stem}.png") as image:
        brighter = image.point(lambda value: value * 7 // 8 + 20)
    save(brighter, "lm/again.jpg", quality=80)
    labelme("again", [shape("cup", box(2, 3, 5))], image=False, imagePath="again.jpg")
    labelme("other", [shape("cup", box(2, 3, 5))], image=False, imagePath="other.jpg")
    save(photo(77), "lm/other.jpg")
    add = ("--labelme", "lm", "--into", "train", "--add")
    words = ["1 of the 2", "dataset/test", f"again.jpg as {stem}.png", "--duplicates skip"]
    refuse_download(*add, words=words)
    run_download(*add, "--duplicates", "skip")
    assert "other" in stored() and "again" not in stored()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_an_image_near_train_and_another_split_is_told(grown, split):
    """The one in train is more alike: that of the other split counts all the same."""
    (stem, *_) = stored(split)
    pixels = np.asarray(Image.open(f"dataset/{split}/{stem}.png")) // 2
    for name, level in (("first", 9), ("second", 10)):
        save(Image.fromarray(pixels + np.uint8(level)), f"{name}/{name}.png")
        labelme(name, [shape("cup", box(2, 3, 5))], name, image=False)
    add = ("--into", "train", "--add", "--duplicates")
    run_download("--labelme", "first", *add, "keep")
    words = [f"dataset/{split}", f"second.png as {stem}.png"]
    refuse_download("--labelme", "second", *add[:3], words=words)
    refuse_download("--labelme", "second", *add, "skip", words=words)
    assert len(stored()) == 3


def test_names_of_any_split_are_taken(grown):
    for seed, split in ((77, "train"), (78, "test"), (79, "valid")):
        name = annotations(split)["images"][0]["file_name"].upper()
        area, folder = shape("disc", box(2, 3, 5)), f"lm_{split}"
        labelme(Path(name).stem, [area], folder, image=False, imagePath="x.jpg")
        save(photo(seed), f"{folder}/x.jpg")
        add = ("--labelme", folder, "--into", "train", "--add")
        refuse_download(*add, words=[f"dataset/{split}", "--prefix"])
        run_download(*add, "--prefix", f"{split}-")
    assert len(stored()) == 5


def test_labels_count_by_name_whatever_their_order(grown):
    """Sorted, as LabelMe files have them, and not as the data set has them."""
    for split in splits.SPLITS:
        edit_annotations(
            Path("dataset", split),
            lambda content: [c.update(name="ab"[c["id"] % 2]) for c in content["categories"]],
        )
    areas = [shape("a", box(2, 3, 5)), shape("b", box(20, 3, 4))]
    labelme("x", areas, image=False)
    save(photo(77), "lm/x.png")
    add = ("--labelme", "lm", "--into", "train", "--add")
    refuse_download(*add, "--classes", "a,b", words=["b, a", "a, b"])
    run_download(*add)
    assert {name: mask.sum() for name, mask in stored()["x"].items()} == {"a": 25, "b": 16}
    labelme("y", [shape("c", box(2, 3, 5))], "lm2")
    add = ("--labelme", "lm2", "--into", "train", "--add")
    refuse_download(*add, words=["dataset/train", "b, a", "images c"])


@pytest.mark.parametrize("source", ["masks", "labelme", "coco"])
def test_healthy_images_are_added(grown, source):
    save(photo(50), "h/images/h.png")
    save(Image.new("L", (40, 30)), "h/masks/h.png")
    labelme("h", [], "lm", image=False)
    save(photo(50), "lm/h.png")
    coco_file([], ["h.png"])
    save(photo(50), "images/h.png")
    flags = {
        "masks": ("--masks", "h/images", "h/masks"),
        "labelme": ("--labelme", "lm"),
        "coco": ("--coco", "c.json", "images"),
    }[source]
    refuse_download(*flags, "--data", "new", words=["empty", "--add"])
    run_download(*flags, "--into", "train", "--add")
    assert stored()["h"] == {}


@pytest.mark.parametrize("place", ["write", "rename", "replace"])
def test_an_interrupted_addition_leaves_the_old_split(grown, monkeypatch, place):
    from helpers import script_here

    def stop(*_):
        raise KeyboardInterrupt

    def rename(source, target, calls=[]):  # noqa: B006, counts its calls
        calls.append(target)
        return stop() if len(calls) == 3 else os.replace(source, target)

    before = tree(grown)
    if place == "write":
        monkeypatch.setattr("medseg.importing.adding.leave_out_known", stop)
    else:
        replacement = rename if place == "rename" else stop
        monkeypatch.setattr(f"medseg.splits.os.{place}", replacement)
    result = script_here("download.py", *NEW, *CLASSES, cwd=grown)
    assert (result.returncode, result.stderr) == (130, "download.py: interrupted\n")
    assert tree(grown) == before


def test_what_a_killed_addition_left_is_taken_over(grown):
    image = Path("more/images/n11.png").read_bytes()
    Path("dataset/train/n11.png").write_bytes(image[:-1])
    refuse_download(*NEW, *CLASSES, words=["dataset/train/n11.png"])
    Path("dataset/train/n11.png").write_bytes(image)
    run_download(*NEW, *CLASSES)
    assert len(stored()) == 6


def test_slices_that_show_nothing_are_no_duplicates(here):
    for number in range(4):
        save_pair(f"a{number}", seed=number)
    save(Image.new("RGB", (40, 30)), "images/a0.png")
    run_download("--masks", "images", "masks", "--split", 50, 25, 25)
    save(Image.new("RGB", (40, 30)), "more/images/b.png")
    save(grey([0, 1])(labels(9)), "more/masks/b.png")
    run_download(*NEW)
    assert "b" in stored()
