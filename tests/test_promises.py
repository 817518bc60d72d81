"""What the README promises of breakdowns, tested by causing them.

Checkpoints and images are damaged, disks are full, memory runs out, two start at once.
"""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers import (
    ROOT,
    SMALL,
    assert_done,
    edit_annotations,
    fork_script,
    make_dataset,
    outcome,
    output_of,
    script_here,
    skip_pictures,
    start_python,
    tree,
    wait_until,
)
from PIL import Image

import train
from data import load_split
from medseg.signals import Signals
from medseg.weights import load_weights

pytestmark = pytest.mark.usefixtures("no_pictures")


def flags(place, out, *more):
    return (*SMALL, "--data", place / "dataset", "--out", place / out, *more)


def train_here(place, out, *more):
    """What a training in this process prints."""
    return output_of("train.py", *flags(place, out, *more), cwd=place)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data set, and in run/ a training of two epochs, saved after every step."""
    place = tmp_path_factory.mktemp("trained")
    make_dataset(place / "dataset")
    with pytest.MonkeyPatch.context() as monkeypatch:
        skip_pictures(monkeypatch)
        train_here(place, "run", "--epochs", 2, "--save-every", 0)
    return place


def other_data(last, split):
    folder = last.parent.parent / "dataset" / split
    edit_annotations(folder, lambda content: content["annotations"].pop())


HARMS = {
    "cut": lambda last: last.write_bytes(last.read_bytes()[:5000]),
    "gone": Path.unlink,
    "of another program": lambda last: torch.save({"progress": 5}, last),
    "of another network": lambda last: torch.save({**load_weights(last), "model": {}}, last),
    "of other images": partial(other_data, split="train"),
    "of another valid": partial(other_data, split="valid"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_last_that_does_not_fit_is_one_line_and_stays(harm, trained, tmp_path, refused):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "run" / "last.pth"
    HARMS[harm](last)
    before = tree(last.parent)
    refused("train", *flags(tmp_path, "run", "--resume", "--epochs", 3), words=[last])
    assert tree(last.parent) == before


@pytest.mark.slow
def test_a_reader_that_goes_ends_it_without_a_word(dataset, tmp_path):
    process = start_python(ROOT / "data.py", dataset, cwd=tmp_path)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_a_second_signal_ends_at_once():
    """The first comes in the middle of a step; the second must not wait for its end."""

    def receive_two():
        signals = Signals()
        with signals.installed(), signals.defer():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    process = multiprocessing.get_context("fork").Process(target=receive_two)
    process.start()
    process.join(10)
    assert process.exitcode == 130


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of its own, of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16M", "tmpfs", place]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"only root may mount a file system, as this test does: {result.stderr}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk, leave=0):
    """Write a file that leaves this many bytes free."""
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - leave))


@pytest.mark.parametrize("room", [0.5, 2.5])
def test_a_full_disk_costs_no_checkpoint(trained, disk, room):
    """There is room for `room` times last.pth. Later more is made, and the run ends as usual."""
    run = disk / "run"
    shutil.copytree(trained / "run", run)
    before = (run / "last.pth").read_bytes()
    fill(disk, int(room * len(before)))
    go_on = flags(trained, run, "--resume", "--epochs", 3)
    result = script_here("train.py", *go_on, cwd=trained)
    # One more checkpoint needs room for one beside it.
    assert result.returncode == (0 if room > 1 else 2), result.stderr
    if room < 1:
        assert not list(run.glob(".*.tmp")) and (run / "last.pth").read_bytes() == before
        load_weights(run / "best_model.pth")
        warning, *_, line = result.stderr.splitlines()
        assert "WARNING" in warning and "No space left" in warning
        assert str(run) in line and "--resume" in line
        (disk / "filler").unlink()
        assert_done(script_here("train.py", *go_on, cwd=trained))
    train_here(trained, disk.parent / "three", "--epochs", 3)
    assert outcome(run) == outcome(disk.parent / "three")


def test_a_full_disk_is_named_with_what_helps(trained, disk, refused):
    fill(disk)
    model = ("--model", trained / "run" / "best_model.pth", "--device", "cpu")
    images = trained / "dataset" / "test"
    refused("predict", images, *model, "--output", disk, words=[disk, "_mask.png", "--output"])


@pytest.mark.slow
def test_out_of_memory_is_one_line(trained, tmp_path):
    """Truly out of memory: 1.5 GiB more than now, and 0.8 GB for every map of 32 channels."""

    def limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bound = pages * resource.getpagesize() + (3 << 29)
        resource.setrlimit(resource.RLIMIT_AS, (bound, bound))

    huge = "--image-size 1024 --n-filters 32 --batch-size 6".split()
    command = ("train.py", *flags(trained, tmp_path / "run", *huge))
    process = fork_script(*command, log=tmp_path / "log", prepare=limit)
    process.join(120)
    process.kill()
    assert process.exitcode == 2
    summary, *_, line = (tmp_path / "log").read_text().splitlines()
    assert "images at 1024x1024" in summary
    assert "out of memory" in line and "--batch-size 6" in line


def test_a_gpu_without_memory_is_one_line(dataset, refused, monkeypatch):
    """The error is raised by hand: there may be no GPU here."""
    monkeypatch.setattr(train.run, "make_network", Mock(side_effect=torch.OutOfMemoryError("CUDA")))
    refused("train", "--device", "cpu", words=["GPU", "--batch-size 32"])


def test_damaged_images_are_refused_or_left_out_and_listed(dataset, refused):
    """Six are damaged, each in a way of its own."""
    damaged = "0_train.png 1_train.png 2_train.png 3_train.png images[4] 0_valid.png".split()
    folder, command = dataset / "train", flags(dataset.parent, "refused")
    (folder / "0_train.png").write_bytes((folder / "0_train.png").read_bytes()[:500])
    (folder / "1_train.png").unlink()
    Image.new("RGB", (20, 30)).save(folder / "2_train.png")
    (dataset / "valid" / "0_valid.png").write_bytes(b"not an image")

    def change(content):
        content["annotations"][3]["segmentation"] = [[1, 2, 3, 4, 5, 6, 7]]
        content["images"][4]["width"] = -5

    edit_annotations(folder, change)

    def assert_named_once(lines):
        named = [[word for word in damaged if word in line] for line in lines]
        assert sorted(named) == sorted([word] for word in damaged)

    refused("train", *command, words=["images[4]", "width"])
    for out in ("run", "from_cache"):
        said = train_here(dataset.parent, out, "--epochs", 1, "--skip-bad")
        assert "1 train, 3 valid, 4 test" in said and "6 damaged images left out" in said
        assert_named_once((dataset.parent / out / "skipped.txt").read_text().splitlines()[1:])
    audit = script_here("data.py", dataset, cwd=dataset).stdout.splitlines()
    assert_named_once([line for line in audit if line.startswith("problem")])
    rows = load_split(dataset, "train", 48, skipped=[])
    good = np.asarray(Image.open(folder / "5_train.png"))
    np.testing.assert_array_equal(rows[0, ..., :3], good)
    # The cache of the good images is not taken for that of all.
    refused("train", *command, words=["images[4]", "width"])
    edit_annotations(folder, lambda content: content["images"][4].update(width=48))
    refused("train", *command, words=["0_train.png", "4 of 6 images in train", "data.py"])
    # With no good image left nothing can be trained.
    for path in (dataset / "test").glob("*.png"):
        path.write_bytes(b"damaged")
    refused("train", *command, "--skip-bad", words=["all 4 images in test"])


def test_one_waits_while_another_makes_the_cache(dataset):
    cache, log = dataset / ".cache", dataset / "log"
    cache.mkdir()
    command = flags(dataset.parent, "run", "--epochs", 1)
    with FileLock(cache / "lock").acquire():
        process = fork_script("train.py", *command, log=log)
        wait_until(lambda: log.exists() and f"{cache}:" in log.read_text())
        time.sleep(0.5)  # in which it would be made
        assert not list(cache.glob("*.npy"))
    process.join(60)
    assert process.exitcode == 0 and len(list(cache.glob("*.npy"))) == 3


def test_every_load_is_of_weights_only():
    loads = []
    for path in (*ROOT.glob("*.py"), *ROOT.glob("medseg/**/*.py"), *ROOT.glob("tools/*.py")):
        loads += re.findall(r"\b(?:torch|jit|pickle|np)\.loads?\(.*", path.read_text())
    assert loads
    for call in loads:  # numpy loads no pickled objects unless it is told to
        of_arrays = call.startswith("np.load") and "allow_pickle" not in call
        assert "weights_only=True" in call or of_arrays, call
