"""Files of weights, and the state of a training: saved, checked, restored."""

import copy
import math
import os
import sys
import time
import warnings
from contextlib import contextmanager

import torch

from medseg.cache import fingerprint
from medseg.cli import one_line
from medseg.device import out_of_memory
from medseg.dist import all_reduce_max, is_first
from medseg.files import file_lock, remove_partial_writes
from medseg.own_files import check_outputs
from medseg.signals import Stopped
from medseg.weights import load_weights, save_weights

NON_FINITE_LIMIT = 20  # steps in a row before training stops: fp16 may need 16 to find its scale
BEST, LAST, PREVIOUS = "best_model.pth", "last.pth", "last.previous.pth"
FOLDS = "folds.json"  # of a cross-validation, whose runs are in folders beside it
CURVES = "curves.png"  # the last file that a training writes, after its test
AFRESH = "start afresh without --resume, with --overwrite or another --out"
LARGEST = 10**9  # of what is counted in a checkpoint
NOT_RECORDED = ("out", "resume", "test_only", "overwrite", "max_megapixels")  # of the flags
KEYS = {"flags", "model", "running_mean", "guarded_step", "scores", "progress", "rng"}


def read_checkpoint(out):
    """What the newest checkpoint in the folder that loads holds, and its "path".

    Raises FileNotFoundError or ValueError where none does.
    """
    first_error = None
    for path in (out / LAST, out / PREVIOUS):
        try:
            state = load_weights(path)
            if not isinstance(state, dict) or not KEYS <= state.keys():
                raise ValueError(
                    f"{path}: not written by train.py (of this version), so it cannot be resumed"
                )
            with checkpoint_errors(path):
                check_numbers(state)
        except (FileNotFoundError, ValueError) as error:
            first_error = first_error or error
            continue
        if first_error:
            print(f"WARNING: {first_error}", file=sys.stderr)
            print(f"WARNING: going on from the checkpoint before it, {path}", file=sys.stderr)
        return {**state, "path": path}
    raise first_error


@contextmanager
def checkpoint_errors(path):
    """Turn whatever a damaged checkpoint makes fail into one line: the file, and what to run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # of many kinds
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{path}: damaged, or of another program or network ({one_line(error)}): {AFRESH}"
        ) from None


def check_numbers(state):
    """Raise anything where a checkpoint does not say how far its run has come.

    What is of another network, `Checkpointer.restore` finds.
    """
    state["flags"].items()
    Progress().load_state_dict(state["progress"])
    if not is_alike(state["guarded_step"]["steps"], 0):
        raise ValueError("no number of steps")


def recorded_flags(args):
    """The flags that last.pth keeps, as a dict."""
    return {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}


def run_lock(out):
    """Hold the folder of a run, within. ValueError where another training is writing to it."""
    busy = f"{out}: another training is writing to this folder; give this one another --out"
    return file_lock(out / ".lock", busy=busy)


def fold_runs(out):
    """The folders of the runs of a cross-validation, those of earlier ones too."""
    return [path for path in out.glob("fold[0-9]*") if path.is_dir()]


def refuse_other_run(out, *, folds=0):
    """ValueError where the folder holds the weights of another run, or a cross-validation.

    folds: of this run; where there are any, those of another one count too.
    """
    for run in [out, *fold_runs(out)] if folds else [out]:
        for name in (BEST, LAST, PREVIOUS, FOLDS):
            if (run / name).exists():
                raise ValueError(
                    f"{run / name}: written by an earlier run: go on with --resume, replace it "
                    "with --overwrite, or give this run another --out"
                )


def check_run_folder(out, args):
    """ValueError where a file that this run is to write is there, and is not of a run of ours.

    args: the flags of the run. Weights are left to `refuse_other_run`, and to --overwrite.
    """
    drawn = ["predictions.png"] if args.test_only else ["predictions.png", CURVES, "metrics.csv"]
    runs = fold_runs(out) if args.folds else [out]
    check_outputs([run / name for run in runs for name in drawn], "--out")
    if args.skip_bad:
        check_outputs([out / "skipped.txt"], "--out")


def prepare_folder(out, checkpoint):
    """Remove what an earlier run left, or put the checkpoint to go on from in its place."""
    remove_partial_writes(out)
    if checkpoint is None:
        for name in (BEST, LAST, PREVIOUS, FOLDS):
            (out / name).unlink(missing_ok=True)
    elif checkpoint["path"] != out / LAST:
        os.replace(checkpoint["path"], out / LAST)  # the next one must not push the good one out


def check_same_data(datasets, root, checkpoint):
    """Fingerprints of data sets; ValueError where a checkpoint was trained on others."""
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
        self.history = []  # a dict for each epoch

    def epochs_waited(self, grace_epochs=0):
        """Epochs in a row, up to this one, without a lower loss; the first `grace_epochs` free."""
        return max(self.epoch - max(self.best_epoch, grace_epochs), 0)

    def end_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0

    def keep_best(self, loss, model):
        """Copy the weights of the epoch that just ended as the best so far."""
        self.best_loss, self.best_epoch = loss, self.epoch
        self.best_weights = copy.deepcopy(model.state_dict())

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        """Raises ValueError, or another error, where the numbers cannot be true."""
        history, counts = state["history"], [state[key] for key in ("epoch", "step", "best_epoch")]
        counts += [round(row["seconds"]) for row in history]
        losses = [float(row["val_loss"]) for row in history]
        if not is_alike(counts, [0] * len(counts)) or len(losses) != state["epoch"]:
            raise ValueError("its epochs and steps contradict each other")
        vars(self).update(state)


def grace_epochs(grace, steps_per_epoch):
    """How many epochs end within the first `grace` steps."""
    return int(grace // max(steps_per_epoch, 1))


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
    flags: recorded with it. save_every: seconds between two checkpoints that `due` asks for.
    Of several processes all call `save`, and the first writes.
    """

    def __init__(self, out, objects, *, flags, save_every):
        self.out, self.objects, self.flags = out, objects, flags
        self.save_every, self.best_saved = save_every, 0
        self.next_save = time.monotonic() + save_every

    def due(self):
        return is_first() and time.monotonic() >= self.next_save

    def save(self, *, last_chance=False):
        """Write best_model.pth where the best epoch changed, then last.pth.

        A disk that is full or broken is a warning, and with last_chance a ValueError.
        """
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        if not is_first():
            return
        started, progress = time.monotonic(), self.objects["progress"]
        with self.disk(last_chance):
            if self.best_saved != progress.best_epoch:
                save_weights(self.out / BEST, progress.best_weights)
                self.best_saved = progress.best_epoch
            state["flags"] = self.flags
            save_weights(self.out / LAST, state, previous=self.out / PREVIOUS)
        # On a slow disk, writing stays under a twentieth of the run.
        took = time.monotonic() - started
        pause = max(self.save_every, 20 * took) if self.save_every else 0
        self.next_save = time.monotonic() + pause

    def poll(self, signals):
        """After a batch: save where it is time, stop where asked to or where no step succeeds.

        Raises Stopped, and ValueError after NON_FINITE_LIMIT skipped steps in a row.
        """
        in_a_row = self.objects["guarded_step"].skipped_in_a_row()
        stop, due, in_a_row = all_reduce_max(signals.received, self.due(), in_a_row)
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

    def restore(self, state):
        """Give every object its part of a checkpoint. ValueError where it does not fit them."""
        with checkpoint_errors(self.out / LAST):
            check_fits(state, self.objects)
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])

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


def history_row(keys):
    """A row of the history with the types it has. keys: of the scores."""
    scores = {f"{split}_{key}": 0.0 for split in ("train", "val") for key in keys}
    speed = {"images_per_second": 0.0, "seconds": 0.0}
    return {"epoch": 0, **scores, "lr": 0.0, "skipped": 0, **speed}


def check_fits(state, objects):
    """ValueError unless a checkpoint has the keys, types and shapes that `objects` have."""
    own = {name: thing.state_dict() for name, thing in objects.items()}
    weights, progress = own["model"], state["progress"]
    row = history_row(objects["scores"].keys())
    own["progress"]["best_weights"] = None if progress["best_weights"] is None else weights
    own["progress"]["history"] = [row] * len(progress["history"])
    optimizer = state["guarded_step"]["optimizer"]
    own["guarded_step"]["optimizer"] = optimizer  # torch checks it, but for the moments of Adam
    fits = all(is_alike(state[name], template) for name, template in own.items() if name != "rng")
    is_adam = isinstance(objects["guarded_step"].optimizer, (torch.optim.Adam, torch.optim.AdamW))
    if is_adam and optimizer["state"]:
        template = {
            number: {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            for number, weight in enumerate(objects["model"].parameters())
        }
        fits = fits and is_alike(optimizer["state"], template)
    if not fits:
        raise ValueError("other names, types or shapes")


def is_alike(value, template):
    """Whether `value` has the types, keys and shapes of `template`; an int may be a float.

    Of whole numbers there are counts only: from 0 on, and below LARGEST.
    """
    if isinstance(template, torch.Tensor):
        same_kind = isinstance(value, torch.Tensor)
        return same_kind and (value.shape, value.dtype) == (template.shape, template.dtype)
    if isinstance(template, dict):
        same_keys = isinstance(value, dict) and value.keys() == template.keys()
        return same_keys and all(is_alike(value[key], template[key]) for key in template)
    if isinstance(template, list):
        same_length = isinstance(value, list) and len(value) == len(template)
        return same_length and all(map(is_alike, value, template))
    if type(value) is int and type(template) in (int, float):
        return 0 <= value < LARGEST
    return type(value) is type(template)
