"""Kill a training with SIGKILL at random moments, resume it, and compare the end bit for bit.

    python tools/kill.py                          # 20 kills
    python tools/kill.py --kills 200 --seed 7     # a campaign

What it is compared with is a training that was not killed. The trainings write last.pth after
every step, so that many kills come while it is written. Half of the resumed runs are killed again.
Each run is a forked process. Prints where the kills came; status 1 where a run ends otherwise.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from helpers import SMALL, fork_script, make_dataset
from pycocotools import coco  # noqa: F401  imported here once, not in every fork

import train
from medseg.weights import load_weights

TIMES = ("seconds", "images_per_second")  # these differ between any two runs
KINDS = {
    "writing": "while a file was written",
    "between": "between two renamings",
    "early": "before the first checkpoint",
}


def skip_pictures():
    """Drawing takes longer than all the rest."""
    train.visualize_predictions = lambda *_, path, **__: path
    train.plot_curves = lambda history, path, **__: path


class Runs:
    """Trainings with the same flags, each in a folder of its own below `place`."""

    def __init__(self, place):
        self.place, self.log = place, place / "log"
        data = ("--data", make_dataset(place / "dataset"))
        self.flags = (*SMALL, *data, "--epochs", 3, "--save-every", 0)

    def start(self, out, *more):
        return fork_script(
            "train.py", *self.flags, "--out", out, *more, log=self.log, prepare=skip_pictures
        )

    def finish(self, process):
        """Wait a minute at most for a run to end well."""
        process.join(60)
        try:
            assert process.exitcode is not None, f"no end within a minute:\n{self.log.read_text()}"
            assert process.exitcode == 0, self.log.read_text()
        finally:
            process.kill()


def identity(path):
    """What changes where another file is renamed to `path`; None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_ino, path.stat().st_mtime_ns


def wait_for_change(path, before, process, seconds=10):
    """Wait until another file stands at `path`, or the process has ended."""
    deadline = time.monotonic() + seconds
    while identity(path) in (None, before) and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.001)


def outcome(out):
    """What has to be the same: weights, best weights, metrics of every epoch, the best epoch."""
    last = load_weights(out / "last.pth")
    progress = last["progress"]
    history = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in progress["history"]
    ]
    optimizer = last["guarded_step"]["optimizer"]["state"]
    best = load_weights(out / "best_model.pth")
    kept = progress["best_weights"], progress["best_epoch"]
    return best, last["model"], *kept, optimizer, history


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Calm:
    """A training that is not killed: how long it takes, and how it ends."""

    def __init__(self, runs):
        out = runs.place / "calm"
        started = time.monotonic()
        process = runs.start(out)
        wait_for_change(out / "last.pth", None, process)
        first_saved = time.monotonic()
        runs.finish(process)
        ended = time.monotonic()
        self.seconds, self.seconds_after_first = ended - started, ended - first_saved
        self.outcome = outcome(out)


def kill_and_resume(runs, out, calm, chance, kills, limit):
    """Train in `out` to the end; kill and resume on the way. Counts in `kills` what was hit."""
    last, restart = out / "last.pth", ()
    while True:
        before = identity(last)
        process = runs.start(out, *restart)
        resumed_well = restart == ("--resume",) and chance.random() < 0.5
        if kills["all"] >= limit or resumed_well:
            runs.finish(process)
            return
        if chance.random() < 0.8:  # while it trains
            wait_for_change(last, before, process)
            time.sleep(chance.uniform(0, calm.seconds_after_first))
        else:  # at any time
            time.sleep(chance.uniform(0, calm.seconds))
        process.kill()
        process.join()
        if process.exitcode >= 0:  # it had ended before
            assert process.exitcode == 0, runs.log.read_text()
            return
        kills["all"] += 1
        kills["writing"] += any(out.glob(".*.tmp"))
        for path in out.glob("*.pth"):
            load_weights(path)  # complete, whenever the kill came
        can_resume = any(out.glob("last*.pth"))
        restart = ("--resume",) if can_resume else ("--overwrite",)
        kills["between"] += can_resume and not last.exists()
        kills["early"] += not can_resume


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    chance, kills, trials = random.Random(args.seed), Counter(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        runs = Runs(Path(place))
        runs.finish(runs.start(runs.place / "cache"))  # makes the cache of the images
        calm = Calm(runs)
        while kills["all"] < args.kills:
            trials += 1
            out = runs.place / f"run{trials}"
            kill_and_resume(runs, out, calm, chance, kills, args.kills)
            assert same(outcome(out), calm.outcome), f"run {trials} ended otherwise"
            assert not list(out.glob(".*.tmp"))
    hits = ", ".join(f"{kills[kind]} {name}" for kind, name in KINDS.items())
    print(
        f"{kills['all']} kills in {trials} runs of {calm.seconds:.1f} s, all equal to the calm "
        f"run: {hits}"
    )


if __name__ == "__main__":
    main()
