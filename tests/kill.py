"""Kill a training with SIGKILL at random moments, resume it, and compare it with one that ran through: bit for bit.

    python tests/kill.py                          # 20 kills
    python tests/kill.py --kills 200 --seed 7     # a campaign

The training writes last.pth after every step, so that many kills hit it while it writes. Half of the resumed
runs are killed again. Each run is a forked process; prints where the kills fell; status 1 where a promise broke.
"""
import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import SMALL, make_dataset
from pycocotools import coco  # noqa: F401  imported once here, not in every child

import train
from data import run
from net import load_weights

TIMES = ("seconds", "images_per_second")  # what no two runs have in common


def start(arguments, log):
    """Fork a process that runs train.py with these arguments; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        train.visualize_predictions = lambda *_, path, **__: path  # pictures take longer than all the rest
        train.plot_curves = lambda _, path: path
        run(lambda: train.main(list(map(str, arguments))))
        status = 0
    except SystemExit as leaving:
        status = leaving.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(child, log):
    """Wait a minute at most for a process to end well."""
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"no end within a minute:\n{log.read_text()}")
        time.sleep(0.005)
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()


def identity(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns


def wait_for_change(path, before, seconds=10):
    """Until another file stands at `path`; not for ever, for the process may have had nothing left to write."""
    deadline = time.monotonic() + seconds
    while identity(path) in (None, before) and time.monotonic() < deadline:
        time.sleep(0.001)


def outcome(out):
    """What has to be the same: weights, best weights, metrics of every epoch, the best epoch."""
    last = load_weights(out / "last.pth")
    history = [{key: value for key, value in row.items() if key not in TIMES} for row in last["progress"]["history"]]
    return load_weights(out / "best_model.pth"), last["model"], last["best"], last["optimizer"]["state"], history, last["progress"]["best_epoch"]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    chance = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        flags = [*SMALL, "--data", make_dataset(place / "dataset"), "--epochs", 4, "--save-every", 0]
        log = place / "log"
        finish(start([*flags, "--out", place / "cache", "--epochs", 1], log), log)
        begun = time.monotonic()
        calm = start([*flags, "--out", place / "calm"], log)
        wait_for_change(place / "calm" / "last.pth", None)
        first = time.monotonic()
        finish(calm, log)
        took, after_first = time.monotonic() - begun, time.monotonic() - first
        wanted = outcome(place / "calm")

        kills = afresh = writing = between = trial = 0
        while kills < args.kills:
            trial += 1
            out, resume = place / f"run{trial}", []
            while True:
                before = identity(out / "last.pth")
                child = start([*flags, "--out", out, *resume], log)
                if kills >= args.kills or resume and chance.random() < 0.5:
                    finish(child, log)
                    break
                if chance.random() < 0.8:  # while it trains
                    wait_for_change(out / "last.pth", before)
                    time.sleep(chance.uniform(0, after_first))
                else:  # at any time
                    time.sleep(chance.uniform(0, took))
                os.kill(child, signal.SIGKILL)  # not waited for yet, so the id is still its own
                _, status = os.waitpid(child, 0)
                if os.WIFEXITED(status):  # it was faster
                    assert os.WEXITSTATUS(status) == 0, log.read_text()
                    break
                kills += 1
                writing += any(out.glob(".*.tmp"))
                for path in out.glob("*.pth"):
                    load_weights(path)  # whole, whenever the kill came
                resume = ["--resume"] if any(out.glob("last*.pth")) else []
                between += bool(resume) and not (out / "last.pth").exists()
                afresh += not resume
            assert same(outcome(out), wanted), f"run {trial} ended elsewhere than the calm one"
            assert not list(out.glob(".*.tmp"))
        print(f"{kills} kills in {trial} runs of {took:.1f} s, all equal to the calm run: {writing} while a file was written, "
              f"{between} between two renamings, {afresh} before the first checkpoint")


if __name__ == "__main__":
    main()
