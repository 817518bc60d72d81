"""An import that is killed, wherever: the next command finds the old data set or the new one."""

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import brightness_model, fork_script, output_of, run_download, script_here
from PIL import Image

from medseg.coco import SPLITS, load_coco

CALLS = ("rename", "replace", "mkdir", "rmdir", "unlink")


def pair(folder, name, value):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    image = np.random.default_rng(value).integers(0, 256, (16, 16), np.uint8)
    for part, pixels in (("images", image), ("masks", mask)):
        Path(folder, part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(Path(folder, part, f"{name}.png"))


def content(root):
    """{split: names of its images}, where the files and the annotations agree."""
    found = {}
    for split in SPLITS:
        images = [record["file_name"] for record in load_coco(root / split).imgs.values()]
        files = [path.name for path in (root / split).iterdir()]
        assert sorted(files) == sorted([*images, "_annotations.coco.json"])
        found[split] = sorted(images)
    return found


def killed(arguments, script, call):
    """Run a command in a process that kills itself at its call-th change of a folder.

    Returns whether it was killed: not where it ended before.
    """

    def prepare():
        count = itertools.count()
        for name in CALLS:
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


@pytest.fixture
def place(here):
    """old/ and new/, six pairs each; dataset/, made of old/; more/, two pairs."""
    for number in range(6):
        pair("old", f"{number}_old", 20 + 30 * number)
        pair("new", f"{number}_new", 30 + 30 * number)
    for number in range(2):
        pair("more", f"{number}_more", 35 + 60 * number)
    run_download("--masks", "old/images", "old/masks", "--split", 34, 33, 33)
    shutil.copytree("dataset", "before")
    return here


IMPORTS = {
    "force": ("--masks", "new/images", "new/masks", "--split", 34, 33, 33, "--force"),
    "add": ("--masks", "more/images", "more/masks", "--into", "train", "--add"),
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_a_killed_import_is_completed_or_taken_back(place, kind):
    shutil.copytree("before", "after")
    output_of("download.py", *IMPORTS[kind], "--data", "after", cwd=place)
    expected, outcomes = [content(place / "before"), content(place / "after")], set()
    for call in itertools.count():
        shutil.rmtree("dataset")
        shutil.copytree("before", "dataset")
        if not killed(IMPORTS[kind], "download.py", call):
            break
        left = {path.name for path in Path("dataset").iterdir()} - {*SPLITS, ".importing.lock"}
        result = script_here("data.py", "dataset", cwd=place)
        assert result.returncode == 0, result.stderr
        assert ("killed" in result.stdout) == bool(left), (call, left)
        assert {path.name for path in Path("dataset").iterdir()} - {".importing.lock"} == {*SPLITS}
        outcomes.add(expected.index(content(place / "dataset")))
    assert outcomes == {0, 1} and content(place / "dataset") == expected[1]
    assert call > 6


def cut_short(place, *moved):
    """dataset/ as earlier versions left it where they were killed between the renames."""
    run_download(*IMPORTS["force"], "--data", "fresh")
    Path("fresh").rename("dataset/.new-abcdefgh")
    Path("dataset/.old-12345678").mkdir()
    for split in moved:
        Path("dataset", split).rename(f"dataset/.old-12345678/{split}")
        Path("dataset/.new-abcdefgh", split).rename(f"dataset/{split}")


@pytest.mark.parametrize("command", ["train", "data", "download", "predict"])
def test_every_command_completes_it(place, command):
    cut_short(place, "train")
    Path("dataset/test").rename("dataset/.old-12345678/test")
    torch.save(brightness_model(32).state_dict(), "m.pth")
    arguments = {
        "train": ("--epochs", "1", "--n-filters", "2", "--image-size", "16", "--device", "cpu"),
        "data": (),
        "download": ("--masks", "more/images", "more/masks", "--into", "train", "--add"),
        "predict": ("dataset/test", "--model", "m.pth"),
    }[command]
    result = script_here(f"{command}.py", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("killed") == 1
    assert not list(Path("dataset").glob(".[no]*"))
    assert all("new" in name for name in content(place / "dataset")["test"])


def test_folders_of_a_user_stay(place):
    for name in (".new-settings", ".old-12345678", ".add-settings"):
        Path("dataset", name, "mine").mkdir(parents=True)
        Path("dataset", name, "notes.txt").touch()
    output_of("data.py", cwd=place)
    assert len(list(Path("dataset").glob(".*-*/notes.txt"))) == 3


def test_a_running_import_is_left_alone(place):
    from medseg.dataset_folder import import_lock

    with import_lock(Path("dataset")):
        Path("dataset/.new-abcdefgh/train").mkdir(parents=True)
        output_of("data.py", cwd=place)
        assert Path("dataset/.new-abcdefgh/train").exists()
        result = script_here("download.py", *IMPORTS["force"], cwd=place)
        assert result.returncode == 2 and "dataset" in result.stderr


def test_a_killed_grouped_split_leaves_nothing(place):
    run_download(*("--synthetic", "--phantoms", 60, 60, 60, "--data", "many"))
    arguments = ("many", "--grouped-split", "grouped")
    for call in itertools.count():
        if not killed(arguments, "data.py", call):
            break
        left = list(place.glob(".grouped.*.tmp"))
        if not Path("grouped").exists():
            assert ("killed" in output_of("data.py", *arguments, cwd=place)) == bool(left)
        assert not list(place.glob(".grouped.*.tmp")) and content(place / "grouped")
        shutil.rmtree("grouped")
    assert call > 4
