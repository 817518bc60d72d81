"""Files of weights, and the state of a training: saved, checked, restored."""

import copy
import math
import sys
import time
from contextlib import contextmanager

import torch

from data import open_split
from medseg.cache import fingerprint
from medseg.cli import one_line
from medseg.dist import all_reduce_max, is_first, restart_count
from medseg.files import file_lock, remove_partial_writes
from medseg.signals import Stopped
from medseg.weights import load_weights, save_weights

NON_FINITE_LIMIT = 20  # steps in a row before training stops: fp16 may need 16 to find its scale
BEST, LAST = "best_model.pth", "last.pth"
FOLDS = "folds.json"  # of a cross-validation, whose runs are in folders beside it
AFRESH = "start afresh without --resume, with --overwrite or another --out"
KEYS = {"flags", "model", "running_mean", "guarded_step", "scores", "progress", "rng"}


def read_checkpoint(out):
    """What last.pth in the folder holds, and its "path".

    Raises FileNotFoundError, or ValueError where it does not load.
    """
    path = out / LAST
    state = load_weights(path)
    if not (isinstance(state, dict) and KEYS <= state.keys()):
        raise ValueError(f"{path}: not written by train.py (of this version): {AFRESH}")
    return {**state, "path": path}


def find_checkpoint(out, *, wanted, test_only):
    """The checkpoint in the folder whose flags are to be taken, or None. wanted: by --resume."""
    exists = (out / LAST).exists()
    if wanted or (exists and restart_count()):  # torchrun: after a process died
        return read_checkpoint(out)
    if test_only and exists:
        try:
            return read_checkpoint(out)
        except ValueError as error:  # best_model.pth may be good all the same
            print(f"WARNING: {error}: testing with the flags given", file=sys.stderr)
    return None


def run_lock(out):
    """Hold the folder of a run, within. ValueError where another training is writing to it."""
    busy = f"{out}: another training is writing to this folder; give this one another --out"
    return file_lock(out / ".lock", busy=busy)


def fold_runs(out):
    """The folders of the runs of a cross-validation, those of earlier ones too."""
    return [path for path in out.glob("fold[0-9]*") if path.is_dir()]


def refuse_other_run(folders):
    """ValueError where a folder holds the weights of another run, or a cross-validation."""
    for path in (folder / name for folder in folders for name in (BEST, LAST, FOLDS)):
        if path.exists():
            raise ValueError(
                f"{path}: written by an earlier run: go on with --resume, replace it with "
                "--overwrite, or give this run another --out"
            )


def prepare_folder(out, checkpoint):
    """Remove what an earlier run left, unless there is a checkpoint to go on from."""
    remove_partial_writes(out)
    for name in (BEST, LAST, FOLDS) if checkpoint is None else ():
        (out / name).unlink(missing_ok=True)


def check_same_data(root, checkpoint):
    """Fingerprints of train and valid; ValueError where a checkpoint was trained on others."""
    datasets = [open_split(root, split, skipped=[]) for split in ("train", "valid")]
    fingerprints = [fingerprint(dataset, "st_size") for dataset in datasets]
    if checkpoint and checkpoint["flags"].get("data_fingerprints") != fingerprints:
        raise ValueError(
            f"{checkpoint['path']}: was trained on other data than {root} holds now: "
            "give it the same --data, or start afresh without --resume"
        )
    return fingerprints


class Progress:
    """How far a training has come: epochs and steps done, the best epoch and its weights."""

    def __init__(self):
        self.epoch = 0  # epochs that are complete
        self.step = 0  # batches done of the one that is not
        self.best_loss, self.best_epoch, self.best_weights = math.inf, 0, None
        self.waited = 0  # epochs in a row without a lower loss, for which patience counts
        self.history = []  # a dict for each epoch

    def end_epoch(self, loss, model, *, free):
        """Count an epoch; returns whether `loss` is the lowest so far, and keeps model's weights.

        free: whether patience does not count the epoch. NaN is never the lowest.
        """
        self.epoch, self.step = self.epoch + 1, 0
        better = bool(all_reduce_max(loss < self.best_loss)[0])
        self.waited = 0 if better or free else self.waited + 1
        if better:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best_weights = copy.deepcopy(model.state_dict())
        return better

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state)


class RandomState:
    """PyTorch's random number generators, of the CPU and of the GPU in use."""

    def __init__(self, device):
        self.device = device

    def state_dict(self):
        on_gpu = self.device.type == "cuda"
        cuda = torch.cuda.get_rng_state(self.device) if on_gpu else None
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state):
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)


class Checkpointer:
    """Writes best_model.pth and last.pth, and restores what last.pth holds.

    objects: name -> object with state_dict and load_state_dict; together the state of a training.
    options: `optim.TrainingOptions`, of which flags, save_every and signals count. Of several
    processes all call `save`, and the first writes.
    """

    def __init__(self, out, objects, options):
        self.out, self.objects, self.options = out, objects, options
        self.best_saved, self.next_save = 0, time.monotonic() + options.save_every

    def save(self, *, last_chance=False):
        """Write best_model.pth where the best epoch changed, then last.pth.

        A disk that is full or broken is a warning, and with last_chance a ValueError.
        """
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        if not is_first():
            return
        progress = self.objects["progress"]
        with self.disk(last_chance):
            if self.best_saved != progress.best_epoch:
                save_weights(self.out / BEST, progress.best_weights)
                self.best_saved = progress.best_epoch
            save_weights(self.out / LAST, {**state, "flags": self.options.flags})
        self.next_save = time.monotonic() + self.options.save_every

    def poll(self):
        """After a batch: save where it is time, stop where asked to or where no step succeeds.

        Raises Stopped, and ValueError after NON_FINITE_LIMIT skipped steps in a row.
        """
        in_a_row = self.objects["guarded_step"].skipped_in_a_row()
        due = is_first() and time.monotonic() >= self.next_save
        stop, due, in_a_row = all_reduce_max(self.options.signals.received, due, in_a_row)
        failed = in_a_row >= NON_FINITE_LIMIT
        if stop or due or failed:
            self.save(last_chance=bool(stop or failed))
        if stop:
            raise Stopped(int(stop), checkpointed=True)
        if failed:
            progress = self.objects["progress"]
            raise ValueError(
                f"epoch {progress.epoch + 1}, step {progress.step}: the loss or its gradient was "
                f"not finite in {int(in_a_row)} steps in a row; the weights in {self.out} are "
                "from before. Start again with a lower --lr, or --precision fp32"
            )

    def polling(self, loader):
        """The batches of a loader, with a `poll` after each."""
        for batch in loader:
            yield batch
            self.poll()

    def restore(self, state):
        """Give every object its part of a checkpoint. ValueError where it does not fit them."""
        try:
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
        except Exception as error:  # of many kinds
            raise ValueError(
                f"{self.out / LAST}: does not fit this program or network ({one_line(error)}): "
                f"{AFRESH}"
            ) from None
        if is_first():
            print(f"going on after {self.objects['progress'].epoch} epochs", flush=True)

    @contextmanager
    def disk(self, last_chance=False):
        """On a full or broken disk, warn and go on; with last_chance, raise ValueError."""
        try:
            yield
        except OSError as error:
            text = (
                f"{self.out}: {error.strerror or error}: what was written before is whole; "
                "make room or mend the folder"
            )
            if last_chance:
                raise ValueError(f"{text}, then go on from there with --resume") from None
            print(f"WARNING: {text}, writing is tried again later", file=sys.stderr, flush=True)
