"""download.py's imports: names, groups, splits, what is replaced or added, and flags.

Imports are also stopped and killed: the old data set is there, or the new one.
"""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    annotations,
    assert_done,
    box,
    brightness_model,
    edit_annotations,
    fork_script,
    grey,
    labelme,
    labels,
    output_of,
    photo,
    refuse_download,
    run_download,
    save,
    save_pair,
    script_here,
    set_classes,
    shape,
    stored,
    tree,
)
from numpy.testing import assert_array_equal, assert_equal
from PIL import Image

from data import load_split
from medseg import phantoms
from medseg.files import file_lock
from medseg.importing import collect
from medseg.importing.adding import find_known
from medseg.importing.writing import Example, deal_examples
from medseg.splits import ANNOTATIONS, SPLITS

UNSPLIT = ("--masks", "images", "masks")


def content(root="dataset"):
    """{split: names of its images}, where the files and the annotations agree."""
    names = {}
    for split in SPLITS:
        if Path(root, split).exists():
            images = [record["file_name"] for record in annotations(split, root)["images"]]
            files = [path.name for path in Path(root, split).iterdir()]
            assert sorted(files) == sorted([*images, ANNOTATIONS])
            names[split] = sorted(images)
    return names


def write_groups(groups, path="groups.csv"):
    rows = "".join(f"{image},{group}\n" for image, group in groups.items())
    Path(path).write_text(f"image,group\n{rows}")


def test_nothing_is_replaced_unasked(here):
    for number in range(20):
        save_pair(f"{number}", seed=number)
    out = run_download(*UNSPLIT, "--split", 80, 20, 0)
    assert [len(names) for names in content().values()] == [16, 4]
    assert "missing: test" in out and "--into test" in out and "train.py --" not in out
    foreground = np.mean([labels(number) == 1 for number in range(20)])
    assert f"class foreground: value 1, {100 * foreground:.2f} % of the pixels" in out
    before, into = tree("dataset"), (*UNSPLIT, "--into", "test")
    assert "next: python train.py --recipe auto\n" in run_download(*into)
    assert [len(names) for names in content().values()] == [16, 4, 20]
    assert before.items() <= tree("dataset").items()
    Path("dataset/notes.txt").write_text("mine")
    for flags in (into, UNSPLIT, ("--synthetic",), (), ("--zip", "a.zip")):
        refuse_download(*flags, words=["dataset", "--force"])
    run_download(*UNSPLIT, "--force", "--seed", 3)
    assert Path("dataset/notes.txt").read_text() == "mine"
    inside = ("--masks", "dataset/train", "masks", "--force", "--skip-unpaired")
    refuse_download(*inside, words=["dataset/train"])
    refuse_download("--labelme", ".", "--into", "test", "--force", words=["--data"])
    phantoms.make_phantoms("drawn", (1, 1, 1), size=64)
    refuse_download(*UNSPLIT, "--data", "drawn", words=["drawn/train", "--force"])
    shutil.rmtree("drawn/test")
    refuse_download(*into, "--data", "drawn", "--classes", "tumour", words=["drawn/train"])


# ---- splits and groups ---------------------------------------------------------------------------


def test_every_split_gets_an_image():
    for count in range(3, 30):
        items = [Example(str(number), "", None) for number in range(count)]
        dealt = deal_examples(items, (90, 5, 5), None, 0)
        assert deal_examples(items[::-1], (90, 5, 5), None, 0) == dealt
        sizes = [len(own) for own in dealt.values()]
        assert sum(sizes) == count and min(sizes) >= 1 and abs(sizes[0] - 0.9 * count) < 2.1
    assert deal_examples(items, (90, 5, 5), None, 1) != dealt
    with pytest.raises(ValueError, match="3 splits"):
        deal_examples(items[:2], (90, 5, 5), None, 0)


def test_groups_stay_together(here):
    for patient in range(8):
        for number in range(patient % 3 + 1):
            save_pair(f"p{patient}/{number}")
    names = [path.relative_to("images").as_posix() for path in Path("images").rglob("*.png")]
    flags = (*UNSPLIT, "--split", 50, 25, 25, "--force", "--groups", "groups.csv")
    write_groups({name: name.split("/")[0] for name in names})
    assert "groups: 8 of groups.csv" in run_download(*flags)
    patients = [{stem.split("_")[0] for stem in stored(split)} for split in SPLITS]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 8
    for record in annotations("train")["images"]:
        assert record["group"] == record["file_name"].split("_")[0]
    for groups, word in (
        (dict.fromkeys(names, "p"), "1 groups"),
        (dict.fromkeys(names[1:], "p"), names[0]),
        ({"1.png,p\n1.png": "q"}, "1.png"),
    ):
        write_groups(groups)
        refuse_download(*flags, words=[word])
    refuse_download(*flags[:-1], "none.csv", words=["none.csv"])


def test_groups_are_subjects_of_bids_or_come_from_a_table(here):
    paths = [f"sub-{subject}_T{number}w.png" for subject in (1, 10, "b2") for number in (1, 2)]
    paths += ["a/sub-z.png", "SUB-1_T1w.png", "my_sub-1_T1w.png", "sub-_1.png", "sub-1é_T1w.png"]
    subjects = ["sub-1"] * 2 + ["sub-10"] * 2 + ["sub-b2"] * 2 + ["sub-z"]
    assert collect.find_groups(paths) == subjects + [""] * 4
    write_groups({"a": 1, "C/b.PNG": 2, "c.png": 3})
    assert collect.find_groups(["x/a.png", "x/c/b.png"], "groups.csv") == ["1", "2"]


WRONG = [  # flags; the one that the message names
    ("--masks a", "--masks"),
    ("--labelme a --coco b c", "--coco"),
    ("--labelme a --split 50 20 20", "--split"),
    ("--labelme a --boxes", "--coco"),
    ("--masks a b --window 40 0", "--window"),
    ("--into test --synthetic", "--into"),
    ("--two-classes", "--two-classes"),
    ("x --zip y", "x"),
    ("--dry-run", "FOLDER"),
    ("--masks a b --add", "--into"),
    ("--masks a b --into train --add --force", "--add"),
    ("--masks a b --into train --duplicates skip", "--duplicates"),
]


@pytest.mark.parametrize("flags, word", WRONG)
def test_wrong_flags(here, flags, word):
    refuse_download(*flags.split(), words=[word, "--help"])


def test_names_are_unique_and_safe():
    names = collect.unique_names
    assert names(["a/1.png", "a/2.jpg"]) == ["1", "2"]
    assert names(["a/1.png", "b/1.png", "b/2.png"]) == ["a_1", "b_1", "b_2"]
    assert len(set(names(["a_b/1.png", "a/b_1.png", "c/1.png", "c/1.jpg"]))) == 4
    assert len({name.casefold() for name in names(["x/A.png", "x/a.jpg"])}) == 2
    for name in names(["..png", "a\nb.png", "é" * 300 + ".png", "\udcff.png", "c:d.png"]):
        assert len(name.encode()) < 230 and not name.startswith(".")
        assert not set(name) & set('\n\\/:*?"<>|') and name.isprintable()


# ---- images that are added to a split ------------------------------------------------------------

CLASSES = ("--classes", "cup,disc")
MORE = ("--masks", "more/images", "more/masks")
NEW = (*MORE, "--into", "train", "--add")
FORCE = (*MORE, "--split", 50, 25, 25, "--force", *CLASSES)
ADD = (*NEW, *CLASSES)
LM = ("--labelme", "lm", "--into", "train", "--add")
AREA = [shape("cup", box(2, 3, 5))]


def pairs(folder, *names, size=(40, 30)):
    """Noise images and masks of 0, 1 and 2; names end with a seed of two digits."""
    for name in names:
        seed = int(name[-2:])
        save(photo(seed, size), f"{folder}/images/{name}.png")
        save(grey([0, 1, 2])(labels(seed, 2, size)), f"{folder}/masks/{name}.png")


@pytest.fixture
def grown(here):
    """dataset/ with six images, and four more in more/."""
    pairs("first", *(f"p{n}_{n:02}" for n in range(6)))
    run_download("--masks", "first/images", "first/masks", *CLASSES, "--split", 34, 33, 33)
    pairs("more", "n10", "n11")
    pairs("more", "n12", "n13", size=(50, 64))
    return here


def test_what_is_there_stays_and_what_is_new_comes(grown):
    def as_others_write_it(coco):
        coco["categories"] = [{"id": 7, "name": "cup"}, {"id": "z", "name": "disc", "x": 1}]
        coco["images"][0] |= {"id": 5, "licence": 3}
        coco["images"][1]["id"] = "one"
        for number, annotation in enumerate(coco["annotations"]):
            annotation["id"] = number
            annotation["category_id"] = {1: 7, 2: "z"}[annotation["category_id"]]
            annotation["image_id"] = [5, "one"][annotation["image_id"]]
        del coco["annotations"][-1]["id"]

    edit_annotations(Path("dataset/train"), as_others_write_it)
    Path("dataset/train/notes.txt").write_text("mine")
    before, old = tree("dataset"), annotations("train")
    assert "train: 4 images added, 6 in all" in run_download(*ADD)
    after, new, added = tree("dataset"), annotations("train"), [f"n{n}.png" for n in range(10, 14)]
    assert sorted(after.keys() - before.keys()) == [f"train/{name}" for name in added]
    assert [name for name in before if before[name] != after[name]] == [f"train/{ANNOTATIONS}"]
    for key in ("images", "annotations"):
        assert new[key][: len(old[key])] == old[key]
        ids = [entry.get("id", number) for number, entry in enumerate(new[key])]
        assert len(set(ids)) == len(ids)
    assert new["categories"] == old["categories"]
    for name in added:
        assert Path("dataset/train", name).read_bytes() == Path("more/images", name).read_bytes()
        mask = np.asarray(Image.open(f"more/masks/{name}"))
        assert_equal(stored()[name[:3]], {"cup": mask == 1, "disc": mask == 2})
    assert len(load_split("dataset", "train", 32)) == 6


REFUSED = {  # flags; what the message names
    "another order": ((*NEW, "--classes", "disc,cup"), ["dataset/train", "disc, cup"]),
    "a new class": (NEW, ["dataset/train", "1, 2", "--classes"]),
    "a group of test": ((*ADD, "--groups", "test.csv"), ["dataset/test", "--into test"]),
    "no split there": ((*NEW, "--data", "none"), ["none/train", "--add"]),
    "itself": (("--masks", "dataset/train", "more/masks", *NEW[3:]), ["dataset/train"]),
    "a name in valid": (ADD, ["dataset/valid", "n11.png", "--prefix"]),
    "unlisted": (ADD, ["dataset/train/n11.png"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_disagrees_changes_nothing(grown, case):
    flags, words = REFUSED[case]
    edit_annotations(Path("dataset/test"), lambda content: content["images"][0].update(group="1"))
    write_groups({f"n1{n}": 1 for n in range(4)}, "test.csv")
    if case == "a name in valid":
        change = {"file_name": "N11.JPG"}
        edit_annotations(Path("dataset/valid"), lambda content: content["images"][0].update(change))
    if case == "unlisted":
        shutil.copy("more/images/n12.png", "dataset/train/n11.png")
    refuse_download(*flags, words=words)


def test_the_same_images_again_are_one_line(grown):
    run_download(*ADD)
    refuse_download(*ADD, words=["4 of the 4", "dataset/train", "n10.png", "nothing to add"])
    for folder in ("images", "masks"):
        os.rename(f"more/{folder}/n10.png", f"more/{folder}/a10.png")
    pairs("more", "n14")
    refuse_download(*ADD, words=["a10.png as n10.png", "--duplicates skip"])
    out = run_download(*ADD, "--duplicates", "skip")
    assert "left out: 4 of the 5" in out and "train: 1 images added, 7 in all" in out
    assert "n14" in stored() and "a10" not in stored()
    refuse_download(*ADD, "--duplicates", "keep", words=["n11.png", "--prefix"])
    out = run_download(*ADD, "--duplicates", "keep", "--prefix", "b/")
    assert "5 images added, 12 in all" in out
    assert_array_equal(stored()["b_a10"]["cup"], stored()["n10"]["cup"])


def test_copies_and_near_duplicates_of_other_splits_are_known(here):
    """Grey stored as colours is a copy, black slices are none; other splits are named first."""
    for name, mode in (("grey", "L"), ("colours", "RGB")):
        photo(1).convert("L").convert(mode).save(f"{name}.png")
        Image.new(mode, (40, 30)).save(f"black_{name}.png")
    near = Image.blend(photo(1), photo(2), 0.1)  # a correlation of 0.99: no copy
    near.save("near.png")
    new = [Path(f"{name}.png") for name in ("colours", "black_colours", "near")]
    known = [("train", Path("grey.png")), ("train", Path("black_grey.png"))]
    assert find_known(known, "train", new) == {"colours.png": ("train", "grey.png")}
    assert find_known(known, "test", new).keys() == {"colours.png", "near.png"}
    for seed in range(3, 9):  # what all images have in common does not count
        photo(seed).save(f"{seed}.png")
        known.append(("train", Path(f"{seed}.png")))
    known.append(("test", Path("near.png")))  # less like it than grey.png is
    assert find_known(known, "train", new[:1]) == {"colours.png": ("test", "near.png")}


def test_labels_count_by_name_and_healthy_images_are_added(grown):
    """Labels come sorted, as LabelMe files have them, and not as the data set has them."""
    for split in SPLITS:
        set_classes(Path("dataset", split), ("disc", "cup"), lambda number: number % 2 + 1)
    labelme("x", [*AREA, shape("disc", box(20, 3, 4))], image=photo(77))
    refuse_download(*LM, "--classes", "cup,disc", words=["disc, cup", "cup, disc"])
    run_download(*LM)
    assert {name: mask.sum() for name, mask in stored()["x"].items()} == {"cup": 25, "disc": 16}
    save(photo(50), "h/images/masks.png")
    save(Image.new("L", (40, 30)), "h/masks/masks.png")
    labelme("labelme", [], "healthy", image=photo(51))
    for flags in (("--masks", "h/images", "h/masks"), ("--labelme", "healthy")):
        refuse_download(*flags, "--data", "new", words=["empty", "--add"])
        run_download(*flags, "--into", "train", "--add")
        assert stored()[flags[0].strip("-")] == {}


# ---- stopped and killed --------------------------------------------------------------------------


def killed(arguments, call):
    """Run download.py in a process that kills itself at its call-th change of a folder.

    Returns whether it was killed: not where it ended before.
    """

    def prepare():
        count, changes = itertools.count(), ("os.rename", "os.mkdir", "os.rmdir", "os.remove")

        def hook(event, _):
            if event in changes and next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    process = fork_script("download.py", *arguments, log="log", prepare=prepare)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), Path("log").read_text()
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FORCE, ADD], ids=["force", "add"])
def test_a_killed_import_is_completed_or_taken_back(grown, flags):
    shutil.copytree("dataset", "before")
    shutil.copytree("dataset", "after")
    run_download(*flags, "--data", "after")
    expected, outcomes = [content("before"), content("after")], set()
    for call in itertools.count():
        shutil.rmtree("dataset")
        shutil.copytree("before", "dataset")
        if not killed(flags, call):
            break
        left = {path.name for path in Path("dataset").iterdir()} - {*SPLITS, ".importing.lock"}
        assert ("killed" in output_of("data.py", "dataset", cwd=grown)) == bool(left), (call, left)
        assert {path.name for path in Path("dataset").iterdir()} - {".importing.lock"} == {*SPLITS}
        outcomes.add(expected.index(content()))
    assert outcomes == {0, 1} and content() == expected[1] and call > 6


COMMANDS = {
    "train": ("--epochs", 1, "--n-filters", 2, "--image-size", 16, "--device", "cpu"),
    "download": (*LM, "--classes", "cup"),
    "predict": ("dataset/test", "--model", "m.pth"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_completes_an_import(grown, no_pictures, command):
    """It was killed between the renames."""
    run_download(*FORCE, "--data", "fresh")
    new = Path("fresh").rename("dataset/.new-abcdefgh")
    (new / "complete").touch()
    (new / "old").mkdir()
    Path("dataset/train").rename(new / "old" / "train")
    (new / "train").rename("dataset/train")
    Path("dataset/test").rename(new / "old" / "test")
    torch.save(brightness_model(32).state_dict(), "m.pth")
    labelme("x", AREA)
    printed = assert_done(script_here(f"{command}.py", *COMMANDS[command], cwd=grown))
    assert printed.count("killed") == 1 and not list(Path("dataset").glob(".new*"))
    assert all(name.startswith("n1") for name in content()["test"])


def test_folders_of_a_user_stay_and_a_running_import_is_left_alone(grown):
    Path("dataset/.new-settings").mkdir()
    Path("dataset/.new-settings/notes.txt").touch()
    output_of("data.py", cwd=grown)
    assert Path("dataset/.new-settings/notes.txt").exists()
    with file_lock(Path("dataset/.importing.lock"), busy=""):
        Path("dataset/.new-abcdefgh/train").mkdir(parents=True)
        output_of("data.py", cwd=grown)
        assert Path("dataset/.new-abcdefgh/train").exists()
        result = script_here("download.py", *FORCE, cwd=grown)
        assert result.returncode == 2 and "dataset" in result.stderr
