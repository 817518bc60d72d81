"""A training that is killed at random moments and resumed ends as one that was left alone."""

import csv
import random
import time

import pytest
import torch
from helpers import SMALL, fork_script, make_dataset, skip_pictures, wait_until

from medseg.weights import load_weights

KILLS = 12
TIMES = ("seconds", "images_per_second")  # these differ between any two runs


@pytest.fixture
def start(tmp_path):
    """start("FOLDER", more flags): a training in a fork, which saves after every step."""
    data = ("--data", make_dataset(tmp_path / "dataset"))
    flags = (*SMALL, *data, "--epochs", 3, "--save-every", 0)

    def start(folder, *more):
        command = ("train.py", *flags, "--out", tmp_path / folder, *more)
        return fork_script(*command, log=tmp_path / "log", prepare=skip_pictures)

    torch.set_num_threads(1)  # threads do not survive a fork
    return start


def outcome(out):
    """The weights, the best ones, and the metrics of every epoch."""
    with open(out / "metrics.csv") as file:
        rows = [{key: row[key] for key in row.keys() - TIMES} for row in csv.DictReader(file)]
    weights = [load_weights(out / "best_model.pth"), load_weights(out / "last.pth")["model"]]
    bits = [{key: value.numpy().tobytes() for key, value in one.items()} for one in weights]
    return rows, bits


def wait_or_kill(process, seconds):
    """Kill a process after some seconds; returns whether it was still running."""
    process.join(seconds)
    running = process.exitcode is None
    process.kill()
    process.join()
    return running


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, start):
    assert not wait_or_kill(start("calm"), 120)  # makes the cache of the images, too
    process, started = start("timed"), time.monotonic()
    wait_until(lambda: (tmp_path / "timed" / "last.pth").exists())
    first = time.monotonic() - started
    assert not wait_or_kill(process, 120)
    seconds, chance, kills, again, ended = time.monotonic() - started, random.Random(), 0, (), 0
    while kills < KILLS and ended < KILLS:
        out = tmp_path / f"run{ended}"
        process = start(out.name, *again)
        kills += wait_or_kill(process, chance.uniform(first / 2, seconds))
        for path in out.glob("*.pth"):
            load_weights(path)  # complete, whenever the kill came
        again = ("--resume",) if any(out.glob("last*.pth")) else ("--overwrite",)
        if process.exitcode == 0:
            ended, again = ended + 1, ()
    if again:
        assert not wait_or_kill(start(out.name, *again), 120)
    assert kills > 3
    outcomes = [outcome(path) for path in (tmp_path / "calm", *tmp_path.glob("run*"))]
    assert all(one == outcomes[0] for one in outcomes)
    assert not list(tmp_path.glob("run*/.*.tmp"))
