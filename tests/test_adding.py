"""download.py --add, and imports that are killed: the old data set is there, or the new one."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    annotations,
    box,
    brightness_model,
    coco_file,
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
    shape,
    stored,
    tree,
    write_dicom,
    write_groups,
)
from numpy.testing import assert_array_equal
from PIL import Image

from data import load_split
from medseg.dataset_folder import import_lock
from medseg.importing.adding import find_known
from medseg.planning.fingerprint import take_fingerprint
from medseg.settings import check_window
from medseg.splits import ANNOTATIONS, SPLITS

CLASSES = ("--classes", "cup,disc")
NEW = ("--masks", "more/images", "more/masks", "--into", "train", "--add")
FORCE = ("--masks", "more/images", "more/masks", "--split", 50, 25, 25, "--force")
LM = ("--labelme", "lm", "--into", "train", "--add")
AREA = [shape("cup", box(2, 3, 5))]


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
            annotation["id"] = number
        del content["annotations"][-1]["id"]

    edit_annotations(Path("dataset/train"), as_others_write_it)
    Path("dataset/train/notes.txt").write_text("mine")
    before, old = tree("dataset"), annotations("train")
    assert "train: 4 images added, 7 in all" in run_download(*NEW, *CLASSES)
    after, new = tree("dataset"), annotations("train")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"train/_annotations.coco.json"}
    added = [f"n{n}.png" for n in range(10, 14)]
    assert sorted(after.keys() - before.keys()) == [f"train/{name}" for name in added]
    for key in ("images", "annotations"):
        assert new[key][: len(old[key])] == old[key]
        ids = [entry.get("id", number) for number, entry in enumerate(new[key])]
        assert len(set(ids)) == len(ids)
    assert [new[key] == old[key] for key in ("info", "categories")] == [True, True]
    edit_annotations(Path("dataset/train"), lambda content: content["images"].pop(2))
    for name in added:
        assert Path("dataset/train", name).read_bytes() == Path("more/images", name).read_bytes()
        mask = np.asarray(Image.open(f"more/masks/{name}"))
        assert_array_equal(stored()[name[:3]]["cup"], mask == 1)
        assert_array_equal(stored()[name[:3]]["disc"], mask == 2)


def test_training_sees_the_new_images(grown):
    def count():
        seen = take_fingerprint(Path("dataset")).images["train"]
        return len(load_split("dataset", "train", 32)), seen

    assert count() == (2, 2)
    run_download(*NEW, *CLASSES)
    assert count() == (6, 6)


REFUSED = {  # flags; what the message names
    "other classes": ((*NEW, "--classes", "cup,lens"), ["dataset/train", "cup, lens"]),
    "another order": ((*NEW, "--classes", "disc,cup"), ["dataset/train", "disc, cup"]),
    "a new class": (NEW, ["dataset/train", "1, 2", "--classes"]),
    "--force": ((*NEW, *CLASSES, "--force"), ["--add", "--force"]),
    "a group of test": ((*NEW, *CLASSES, "--groups", "test.csv"), ["dataset/test", "--into test"]),
    "a group of valid": ((*NEW, *CLASSES, "--groups", "valid.csv"), ["dataset/valid"]),
    "no --into": ((*NEW[:3], *CLASSES, "--add"), ["--add", "--into"]),
    "phantoms": (("--synthetic", "--add"), ["--add"]),
    "no --add": ((*NEW[:5], *CLASSES, "--duplicates", "skip"), ["--duplicates", "--add"]),
    "a split there": ((*NEW[:5], *CLASSES), ["dataset/train", "--add", "--force"]),
    "no split there": ((*NEW, "--data", "none"), ["none/train", "--add"]),
    "itself": (("--masks", "dataset/train", "more/masks", *NEW[3:]), ["dataset/train"]),
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
    refuse_download(*flags, words=words)


def test_another_window_is_refused(here):
    rows, size = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64), (64, 64)
    for name in ("a/images/0", "a/images/1", "a/images/2", "b/images/3"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_dicom(f"{name}.dcm", np.roll(rows, int(name[-1]) * 5 + 1))
        save(grey([0, 1])(labels(0, size=size)), f"{name.replace('images', 'masks')}.png")
    run_download("--masks", "a/images", "a/masks", "--window", 40, 400)
    add = ("--masks", "b/images", "b/masks", "--into", "train", "--add", "--window")
    refuse_download(*add, 50, 400, words=["dataset/train", "--window 40 400"])


def test_every_split_that_stays_is_compared():
    present = [(name, {"window": (center, 400.0)}) for name, center in (("a", 40.0), ("b", 50.0))]
    with pytest.raises(ValueError, match="^b: .*--window 50 400"):
        check_window(present, (40.0, 400.0))


def test_the_same_images_again_are_one_line(grown):
    run_download(*NEW, *CLASSES)
    words = ["4 of the 4", "dataset/train", "n10.png", "nothing to add"]
    refuse_download(*NEW, *CLASSES, words=words)
    refuse_download(*NEW, *CLASSES, "--duplicates", "skip", words=words)
    os.rename("more/images/n10.png", "more/images/a10.png")  # under another name
    os.rename("more/masks/n10.png", "more/masks/a10.png")
    pairs("more", "n14")
    refuse_download(*NEW, *CLASSES, words=["a10.png as n10.png", "--duplicates skip"])
    out = run_download(*NEW, *CLASSES, "--duplicates", "skip")
    assert "left out: 4 of the 5" in out and "train: 1 images added, 7 in all" in out
    assert "n14" in stored() and not Path("dataset/train/a10.png").exists()
    refuse_download(*NEW, *CLASSES, "--duplicates", "keep", words=["n11.png", "--prefix"])
    keep = ("--duplicates", "keep", "--prefix", "b/")
    assert "5 images added, 12 in all" in run_download(*NEW, *CLASSES, *keep)
    assert_array_equal(stored()["b_a10"]["cup"], stored()["n10"]["cup"])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_images_of_other_splits_are_told(grown, split):
    """They would make its score too good, even where train has one that is more alike."""
    (stem, *_) = stored(split)
    pixels = np.asarray(Image.open(f"dataset/{split}/{stem}.png")) // 2
    for name, level in (("first", 9), ("second", 10)):
        save(Image.fromarray(pixels + np.uint8(level)), f"{name}/{name}.png")
        labelme(name, AREA, name, image=False)
    save(photo(77), "second/other.png")
    labelme("other", AREA, "second", image=False)
    add = ("--into", "train", "--add", "--duplicates")
    run_download("--labelme", "first", *add, "keep")
    words = ["1 of the 2", f"dataset/{split}", f"second.png as {stem}.png", "--duplicates skip"]
    refuse_download("--labelme", "second", *add[:3], words=words)
    run_download("--labelme", "second", *add, "skip")
    assert "other" in stored() and "second" not in stored()


def test_names_of_any_split_are_taken(grown):
    for seed, split in enumerate(SPLITS, 77):
        name, folder = annotations(split)["images"][0]["file_name"].upper(), f"lm_{split}"
        labelme(Path(name).stem, AREA, folder, image=False, imagePath="x.jpg")
        save(photo(seed), f"{folder}/x.jpg")
        add = ("--labelme", folder, *LM[2:])
        refuse_download(*add, words=[f"dataset/{split}", "--prefix"])
        run_download(*add, "--prefix", f"{split}-")
    assert len(stored()) == 5


def test_labels_count_by_name_whatever_their_order(grown):
    """Sorted, as LabelMe files have them, and not as the data set has them."""
    for split in SPLITS:
        edit_annotations(
            Path("dataset", split),
            lambda content: [c.update(name="ab"[c["id"] % 2]) for c in content["categories"]],
        )
    labelme("x", [shape("a", box(2, 3, 5)), shape("b", box(20, 3, 4))], image=False)
    save(photo(77), "lm/x.png")
    refuse_download(*LM, "--classes", "a,b", words=["b, a", "a, b"])
    run_download(*LM)
    assert {name: mask.sum() for name, mask in stored()["x"].items()} == {"a": 25, "b": 16}
    labelme("y", [shape("c", box(2, 3, 5))], "lm2")
    refuse_download("--labelme", "lm2", *LM[2:], words=["dataset/train", "b, a", "images c"])


HEALTHY = (("--masks", "h/images", "h/masks"), LM[:2], ("--coco", "c.json", "images"))


@pytest.mark.parametrize("flags", HEALTHY)
def test_healthy_images_are_added(grown, flags):
    save(Image.new("L", (40, 30)), "h/masks/h.png")
    labelme("h", [], "lm", image=False)
    coco_file([], ["h.png"])
    for folder in ("h/images", "lm", "images"):
        save(photo(50), f"{folder}/h.png")
    refuse_download(*flags, "--data", "new", words=["empty", "--add"])
    run_download(*flags, "--into", "train", "--add")
    assert stored()["h"] == {}


def test_slices_that_show_nothing_are_no_duplicates(here):
    for number in range(4):
        save_pair(f"a{number}", seed=number)
    for name in ("images/a0", "more/images/b"):
        save(Image.new("RGB", (40, 30)), f"{name}.png")
    save(grey([0, 1])(labels(9)), "more/masks/b.png")
    run_download("--masks", "images", "masks", "--split", 50, 25, 25)
    run_download(*NEW)
    assert "b" in stored()


# ---- stopped and killed --------------------------------------------------------------------------


STOPS = {"write": NEW, "train/n11.png": NEW, f"train/{ANNOTATIONS}": NEW, "train": FORCE}


@pytest.mark.parametrize("place", STOPS)
def test_an_interrupted_import_leaves_the_old_splits(grown, monkeypatch, place):
    original, stopped = os.replace, []

    def replace(source, target):
        if Path(target).resolve() == Path("dataset", place).resolve() and not stopped:
            stop()
        original(source, target)

    def stop(*_):
        stopped.append(place)
        raise KeyboardInterrupt

    before = tree(grown)
    monkeypatch.setattr(os, "replace", replace)
    if place == "write":
        monkeypatch.setattr("medseg.importing.adding.leave_out_known", stop)
    result = script_here("download.py", *STOPS[place], *CLASSES, cwd=grown)
    assert (result.returncode, result.stderr) == (130, "download.py: interrupted\n")
    assert tree(grown) == before


def test_what_a_killed_addition_left_is_taken_over(grown):
    image = Path("more/images/n11.png").read_bytes()
    Path("dataset/train/n11.png").write_bytes(image[:-1])
    refuse_download(*NEW, *CLASSES, words=["dataset/train/n11.png"])
    Path("dataset/train/n11.png").write_bytes(image)
    run_download(*NEW, *CLASSES)
    assert len(stored()) == 6


def content(root):
    """{split: names of its images}, where the files and the annotations agree."""
    names = {}
    for split in SPLITS:
        images = [record["file_name"] for record in annotations(split, root)["images"]]
        files = [path.name for path in Path(root, split).iterdir()]
        assert sorted(files) == sorted([*images, "_annotations.coco.json"])
        names[split] = sorted(images)
    return names


def killed(arguments, script, call):
    """Run a command in a process that kills itself at its call-th change of a folder.

    Returns whether it was killed: not where it ended before.
    """

    def prepare():
        count = itertools.count()
        for name in ("rename", "replace", "mkdir", "rmdir", "unlink"):
            original = getattr(os, name)

            def change(*args, original=original, **options):
                if next(count) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **options)

            setattr(os, name, change)

    process = fork_script(script, *arguments, log="log", prepare=prepare)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), Path("log").read_text()
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FORCE, NEW], ids=["force", "add"])
def test_a_killed_import_is_completed_or_taken_back(grown, flags):
    flags = (*flags, *CLASSES)
    shutil.copytree("dataset", "before")
    shutil.copytree("dataset", "after")
    output_of("download.py", *flags, "--data", "after", cwd=grown)
    expected, outcomes = [content("before"), content("after")], set()
    for call in itertools.count():
        shutil.rmtree("dataset")
        shutil.copytree("before", "dataset")
        if not killed(flags, "download.py", call):
            break
        left = {path.name for path in Path("dataset").iterdir()} - {*SPLITS, ".importing.lock"}
        result = script_here("data.py", "dataset", cwd=grown)
        assert result.returncode == 0, result.stderr
        assert ("killed" in result.stdout) == bool(left), (call, left)
        assert {path.name for path in Path("dataset").iterdir()} - {".importing.lock"} == {*SPLITS}
        outcomes.add(expected.index(content("dataset")))
    assert outcomes == {0, 1} and content("dataset") == expected[1]
    assert call > 6


COMMANDS = {
    "train": ("--epochs", 1, "--n-filters", 2, "--image-size", 16, "--device", "cpu"),
    "data": (),
    "download": (*LM, "--classes", "cup"),
    "predict": ("dataset/test", "--model", "m.pth"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_completes_an_import(grown, command):
    """It was killed between the renames."""
    run_download(*FORCE, *CLASSES, "--data", "fresh")
    Path("fresh").rename("dataset/.new-abcdefgh")
    Path("dataset/.new-abcdefgh/complete").touch()
    Path("dataset/.old-abcdefgh").mkdir()
    Path("dataset/train").rename("dataset/.old-abcdefgh/train")
    Path("dataset/.new-abcdefgh/train").rename("dataset/train")
    Path("dataset/test").rename("dataset/.old-abcdefgh/test")
    torch.save(brightness_model(32).state_dict(), "m.pth")
    labelme("x", AREA)
    result = script_here(f"{command}.py", *COMMANDS[command], cwd=grown)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed") == 1
    assert not list(Path("dataset").glob(".[no]*"))
    assert all(name.startswith("n1") for name in content("dataset")["test"])


def test_folders_of_a_user_stay_and_a_running_import_is_left_alone(grown):
    for name in (".new-settings", ".old-12345678", ".add-settings"):
        Path("dataset", name, "mine").mkdir(parents=True)
        Path("dataset", name, "notes.txt").touch()
    output_of("data.py", cwd=grown)
    assert len(list(Path("dataset").glob(".*-*/notes.txt"))) == 3
    with import_lock(Path("dataset")):
        Path("dataset/.new-abcdefgh/train").mkdir(parents=True)
        output_of("data.py", cwd=grown)
        assert Path("dataset/.new-abcdefgh/train").exists()
        result = script_here("download.py", *FORCE, *CLASSES, cwd=grown)
        assert result.returncode == 2 and "dataset" in result.stderr


@pytest.mark.slow
def test_a_killed_grouped_split_leaves_nothing(here):
    run_download(*("--synthetic", "--phantoms", 60, 60, 60, "--data", "many"))
    arguments = ("many", "--grouped-split", "grouped")
    for call in itertools.count():
        if not killed(arguments, "data.py", call):
            break
        left = list(here.glob(".grouped.*.tmp"))
        if not Path("grouped").exists():
            assert ("killed" in output_of("data.py", *arguments, cwd=here)) == bool(left)
        assert not list(here.glob(".grouped.*.tmp")) and content("grouped")
        shutil.rmtree("grouped")
    assert call > 4


def test_grey_stored_as_colours_is_the_same_image(here):
    photo(1).convert("L").save("grey.png")
    Image.open("grey.png").convert("RGB").save("colours.png")
    (known,) = find_known([("test", Path("grey.png"))], "train", [Path("colours.png")])
    assert known == ("colours.png", "test", "grey.png", True)
