"""A training that is killed at random moments and resumed ends as one that was left alone."""

import random
import time

import pytest
import torch
from helpers import SMALL, fork_script, make_dataset, outcome, skip_pictures, wait_until

from medseg.weights import load_weights

KILLS = 12


@pytest.fixture
def start(tmp_path):
    """start("FOLDER", more flags): a training in a fork, which saves after every step."""
    data = ("--data", make_dataset(tmp_path / "dataset"))
    more = "--dropout channels --epochs 15 --patience 15 --save-every 0"
    flags = (*SMALL, *data, *more.split())

    def start(folder, *more):
        command = ("train.py", *flags, "--out", tmp_path / folder, *more)
        return fork_script(*command, log=tmp_path / "log", prepare=skip_pictures)

    torch.set_num_threads(1)  # threads do not survive a fork
    return start


def kill_after(process, seconds):
    """Kill a process after some seconds; returns whether it was still running."""
    process.join(seconds)
    running = process.exitcode is None
    process.kill()
    process.join()
    return running


def wait_for_checkpoint(process, out, before):
    """Wait until another last.pth is there than at the time `before`, or the process has ended."""
    last = out / "last.pth"
    wait_until(lambda: not process.is_alive() or (last.exists() and last.stat().st_mtime > before))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path, start):
    assert not kill_after(start("calm"), 120)  # makes the cache of the images, too
    process = start("timed")
    wait_for_checkpoint(process, tmp_path / "timed", 0)
    began = time.monotonic()
    assert not kill_after(process, 120)
    seconds, chance, kills, again, ended = time.monotonic() - began, random.Random(), 0, (), 0
    while kills < KILLS and ended < KILLS:
        out, before = tmp_path / f"run{ended}", time.time()
        process = start(out.name, *again)
        if chance.random() < 0.8:  # while it trains, else at any time
            wait_for_checkpoint(process, out, before)
        kills += kill_after(process, chance.uniform(0, seconds))
        for path in out.glob("*.pth"):
            load_weights(path)  # complete, whenever the kill came
        again = ("--resume",) if any(out.glob("last*.pth")) else ("--overwrite",)
        if process.exitcode == 0:
            ended, again = ended + 1, ()
    if again:
        assert not kill_after(start(out.name, *again), 120)
    assert kills > KILLS / 3
    outcomes = [outcome(path) for path in (tmp_path / "calm", *tmp_path.glob("run*"))]
    assert len(outcomes) > 1 and all(one == outcomes[0] for one in outcomes)
    assert not list(tmp_path.glob("run*/.*.tmp"))
