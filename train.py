"""Train the U-Net and test its best weights (the tutorial's sections 4 to 6).

    python train.py                             # 40 epochs on dataset/, GPU if there is one
    python train.py --synthetic --device cpu    # on drawn phantoms: no account, no network
    python train.py --resume                    # go on where the last run stopped
    python train.py --test-only                 # test best_model.pth again
    torchrun --standalone --nproc_per_node=4 train.py   # on four GPUs; the batch size is that of all together

Writes to --out: best_model.pth (the weights with the lowest validation loss), last.pth and last.previous.pth
(everything that --resume needs), metrics.csv (a line an epoch), curves.png and predictions.png.
"""
import argparse
import copy
import csv
import io
import itertools
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from data import (MEAN, SPLITS, STD, ArgumentParser, Batches, COCOSegmentationDataset, fingerprint, load_coco, load_split, locked, number,
                  output_folder, run, whole)
from net import IMAGE_SIZE, UNet, keep_freed_memory, load_model, load_weights, pick_device

# What of the command line decides the result: a resumed run has to have it in common with its beginning.
RESULT_FLAGS = ("synthetic", "batch_size", "lr", "patience", "image_size", "n_filters", "seed", "precision", "skip_bad",
                "norm", "prior", "weight_decay", "warmup", "schedule", "ema", "augment", "dice")
# Named sets of flags; what the command line gives besides wins.
RECIPES = {"tutorial": {}, "strong": {"norm": "batch", "prior": 0.04, "lr": 1e-3, "weight_decay": 0.01, "warmup": 100, "ema": 0.995, "augment": True}}
CHECKPOINT_KEYS = {"progress", "best", "model", "optimizer", "scaler", "scores", "health", "flags", "rng", "cuda_rng"}
NON_FINITE_LIMIT = 20  # steps in a row before training stops: fp16's scaler may need 16 to find its scale
BLIND_LIMIT = 3  # epochs in a row without one pixel of foreground before a warning


# ---- several processes (torchrun); each function does nothing in one -------------------------

def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class SumOverRanks(torch.autograd.Function):
    """A tensor's sum over all processes. Its gradient is summed too: with DDP's mean over processes, the right one."""

    @staticmethod
    def forward(ctx, part):
        total = part.clone()
        dist.all_reduce(total)
        return total

    backward = forward


def sum_over_ranks(part):
    return SumOverRanks.apply(part) if dist.is_initialized() else part


def agree(*numbers):
    """The largest of each number over all processes: what one of them decided, all know. They wait for each other."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, over gloo: the GPU is not waited for
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


@contextmanager
def first_on_each_machine():
    """Let one process of each machine do something (make a cache, draw phantoms) before the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        agree(0)
    yield
    if first:
        agree(0)


class SharedDropout(torch.nn.Dropout):
    """Dropout that draws the noise of the whole batch in each process, so that their number changes nothing."""

    def __init__(self, p, batches):
        super().__init__(p)
        self.batches = batches

    def forward(self, x):
        if not self.training:
            return x
        order = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        noise = torch.ones(self.batches.whole, *x.shape[1:], dtype=x.dtype, device=x.device).contiguous(memory_format=order)
        return x * F.dropout(noise, self.p)[self.batches.rank::self.batches.world]


# ---- loss (tutorial, section 5) --------------------------------------------------------------

def dice_loss(pred, target, smooth=1e-6):
    """1 - Dice of the whole batch, 0..1, from probabilities; pred and target of any one shape, values 0..1.

    Milletari, Navab, Ahmadi: "V-Net", 3DV 2016, equation 3, without the squares.
    """
    pred, target = pred.reshape(-1), target.reshape(-1)
    intersection, total = sum_over_ranks(torch.stack([(pred * target).sum(), pred.sum() + target.sum()]))
    return 1 - (2 * intersection + smooth) / (total + smooth)


def image_dice_loss(pred, target, smooth=1.0):
    """1 - the mean Dice of the images, 0..1, each by itself; pred and target (B, C, H, W).

    A larger `smooth` than in `dice_loss`, of one pixel: an image without foreground has a gradient too.
    """
    pred, target = pred.flatten(1), target.flatten(1)
    dice = (2 * (pred * target).sum(1) + smooth) / (pred.sum(1) + target.sum(1) + smooth)
    total, images = sum_over_ranks(torch.stack([dice.sum(), dice.new_full((), len(dice))]))
    return 1 - total / images


def combined_loss_by_image(pred, target):
    """`combined_loss` with the Dice of each image by itself, so that a small lesion counts as much as a large one."""
    return combined_loss(pred, target, dice=image_dice_loss)


def combined_loss(pred, target, *, dice=dice_loss):
    """0.6 Dice loss + 0.4 binary cross-entropy, on probabilities in float32; not a number where a probability is not."""
    # On a GPU binary_cross_entropy ends the process at what is no probability; the Dice keeps what is not a number.
    bce = F.binary_cross_entropy(pred.nan_to_num(0.5), target, reduction="sum")
    bce, pixels = sum_over_ranks(torch.stack([bce, pred.new_full((), pred.numel())]))
    return 0.6 * dice(pred, target) + 0.4 * bce / pixels


# ---- metrics ---------------------------------------------------------------------------------

def metrics(tp, fp, fn, tn):
    """Scores of the foreground from counts of pixels (true/false positives and negatives), all 0..1.

    With no foreground in truth and answer alike, Dice, IoU, precision and recall are 1;
    where only one of them has any, they are 0.
    """
    def share(part, whole):
        return part / whole if whole else float(tp + fp + fn == 0)

    iou = share(tp, tp + fp + fn)
    total = tp + fp + fn + tn
    return {
        "acc": (tp + tn) / total,
        "dice": share(2 * tp, 2 * tp + fp + fn),
        "iou": iou,
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "miou": (iou + (tn / (tn + fp + fn) if tn + fp + fn else 1.0)) / 2,
        "background_acc": (fp + tn) / total,  # what answering "background" everywhere would score as acc
    }


class Scores:
    """Sums over the images of a split, kept on the device: adding a batch never waits for it."""

    def __init__(self, device):
        device = torch.device(device)
        exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)  # tp, fp, fn, tn
        self.sums = torch.zeros(3, dtype=exact, device=device)  # images, their losses, their own Dice
        self.shown = torch.zeros(3, dtype=exact, pin_memory=device.type == "cuda")

    @torch.no_grad()
    def add(self, loss, pred, target, threshold=0.5, *, finite=True):
        """loss: the batch's, a scalar tensor; pred, target: (B, C, H, W), values 0..1; finite: False, as a tensor too, counts nothing."""
        found, truth = (pred > threshold).flatten(1), (target > 0.5).flatten(1)
        tp, found, truth = (found & truth).sum(1), found.sum(1), truth.sum(1)  # (B,) each
        empty = (found + truth == 0).to(self.sums.dtype)  # both empty: 1 / 1
        dice = ((2 * tp + empty) / (found + truth + empty)).sum()
        tp, found, truth = tp.sum(), found.sum(), truth.sum()
        counts = torch.stack([tp, found - tp, truth - tp, target.numel() - found - truth + tp])
        sums = torch.stack([torch.full_like(dice, len(pred)), loss.to(dice.dtype) * len(pred), dice])
        self.counts += counts if finite is True else torch.where(finite, counts, 0)
        self.sums += sums if finite is True else torch.where(finite, sums, 0)

    def result(self):
        """dict of floats: loss, those of `metrics`, and image_dice, the mean of the images' own Dice."""
        state = self.state()
        images, loss, image_dice = state["sums"].tolist()
        if not images:  # every step of the epoch was skipped
            return dict.fromkeys(("loss", *metrics(1, 0, 0, 0), "image_dice"), math.nan)
        return {"loss": loss / images, **metrics(*state["counts"].tolist()), "image_dice": image_dice / images}

    def glance(self):
        """(mean loss, images) as of a moment ago: for a progress bar, which must not make the GPU wait."""
        self.shown.copy_(self.sums, non_blocking=True)
        images, loss, _ = self.shown.tolist()
        return loss / max(images, 1), images

    @torch.no_grad()
    def state(self):
        """The sums of all processes."""
        return {"counts": sum_over_ranks(self.counts), "sums": sum_over_ranks(self.sums)}

    def load_state(self, state):
        if rank_and_world()[0] == 0:  # once is enough for the sum
            self.counts.copy_(state["counts"])
            self.sums.copy_(state["sums"])


def evaluate(model, loader, criterion, device, *, autocast=nullcontext(), poll=lambda: None):
    """Scores of `model` over every batch of `loader`, as `Scores.result` gives them; poll() is called after each."""
    model.eval()
    scores = Scores(device)
    with torch.inference_mode():
        for images, masks in loader:
            images, masks = images.to(device), masks.to(device)
            with autocast:
                outputs = model(images)
            scores.add(criterion(outputs, masks), outputs, masks)
            poll()
    return scores.result()


# ---- files -----------------------------------------------------------------------------------

def save(path, state, *, keep=None):
    """torch.save to a file that is whole or absent; keep: the path that the file before it gets."""
    with whole(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what PyTorch makes of an OSError while writing
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(_one_line(error)) from None
        if keep:
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.replace(path, keep)


def load_checkpoint(out):
    """What the newest checkpoint in the folder that loads holds. Raises FileNotFoundError or ValueError where none does."""
    trouble = None
    for path in (out / "last.pth", out / "last.previous.pth"):
        try:
            state = load_weights(path)
            if not isinstance(state, dict) or not CHECKPOINT_KEYS <= state.keys() or not isinstance(state["flags"], dict):
                raise ValueError(f"{path}: not written by train.py, so there is nothing to resume")
        except (FileNotFoundError, ValueError) as error:
            trouble = trouble or error
            continue
        if trouble:
            print(f"WARNING: {trouble}\nWARNING: going on from the checkpoint before it, {path}", file=sys.stderr)
        return {**state, "path": path}
    raise trouble


def make_schedule(kind, warmup, steps):
    """The share of the learning rate at each step: from 0 to 1 over `warmup` steps, then 1, or with 'cosine' down to 0 at `steps`.

    Loshchilov, Hutter: "SGDR", ICLR 2017, equation 5, one cycle.
    """
    def share(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2 if kind == "cosine" else 1.0
    return share


def _alike(found, template):
    """Whether what a file holds has the types, keys and shapes of `template`; a whole number may stand for a float."""
    if isinstance(template, torch.Tensor):
        return isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (template.shape, template.dtype)
    if isinstance(template, dict):
        return isinstance(found, dict) and found.keys() == template.keys() and all(_alike(found[key], template[key]) for key in template)
    return type(found) is type(template) or type(found) is int and type(template) is float


# ---- SwanLab (tutorial, section 4) -----------------------------------------------------------

class SwanLab:
    """Experiment tracking that never stops, blocks or crashes the training; with mode "disabled", nothing at all.

    mode: "online"; "offline" (files to upload later); "disabled" (imports nothing); or "auto": what the user's
        SwanLab settings say (SWANLAB_MODE, swanlab.yaml, ...), else online with an API key, else offline.
    config: the hyperparameters, recorded with the run.    log_dir: where SwanLab keeps its files.
    run_id: the run to continue, or None for a new one; `self.run_id` is what to pass when resuming.

    Nothing prompts. A run that cannot start online is recorded offline; if that fails too, training goes on
    without SwanLab. One line says so. Call `finish` on every way out: without it SwanLab's own exit hook uploads
    what is left, and with the network gone that never ends. If `SwanLab.hung` is true afterwards, one of its
    threads is stuck and may delay the exit by a minute or more: flush and leave with `os._exit(status)`.

    Raises ValueError for a project name SwanLab refuses, and for mode "online" without an API key.
    """

    ANSWER_TIMEOUT = 5    # seconds for the API host to answer anything at all
    START_TIMEOUT = 30
    FINISH_TIMEOUT = 30
    hung = False          # about the process, so on the class

    def __init__(self, mode, *, project, experiment_name, config, log_dir, run_id=None):
        self.run = None   # the swanlab.Run, while there is one
        self.run_id = run_id
        self._complained = False
        if mode == "disabled":
            return
        if not re.fullmatch(r"[0-9a-zA-Z_\-+.]{1,100}", project):
            raise ValueError(f"--project {project!r}: SwanLab takes 1 to 100 letters, digits and _ - + . here")
        try:
            import swanlab
            settings = swanlab.Settings()    # environment, .env, swanlab.yaml, .netrc; no network
        except Exception as error:           # not installed, or settings it refuses
            return self._say(f"going on without it: {_one_line(error)}")

        if mode == "auto":
            mode = settings.mode if "mode" in settings.model_fields_set else "online"
            if mode == "local":
                self._say("its local mode is not supported; recording offline")
            if mode == "local" or mode == "online" and not settings.api_key:
                mode = "offline"
        elif mode == "online" and not settings.api_key:
            raise ValueError("--swanlab online: no API key; run `swanlab login` first, or use --swanlab offline")

        options = dict(project=project, name=experiment_name, config=config, log_dir=str(Path(log_dir).absolute()),
                       id=run_id, resume="allow" if run_id else "never")
        if mode == "online" and not self._start(mode, options, settings.api_host) and not self.hung:
            mode = "offline"
        if mode == "offline":
            self._start(mode, options)

    def _start(self, mode, options, api_host=None):
        """Start a run and return True, or say why there is none."""
        import swanlab
        try:
            if api_host:
                _check_answers(api_host, self.ANSWER_TIMEOUT)
            # Off the main thread, where swanlab also leaves our SIGINT handler alone.
            self.run = _bounded(lambda: swanlab.init(mode=mode, **options), self.START_TIMEOUT)
            self.run_id = self.run.id
        except Exception as error:
            SwanLab.hung = isinstance(error, TimeoutError)    # then it holds a lock that another init would wait for
            self._say(f"no {mode} run: {_one_line(error)}")
        return self.run is not None

    def log(self, values, step=None):
        """Log a dict of numbers at `step`; SwanLab keeps the first value of a key at a step."""
        # swanlab reads tensors later, on another thread, and drops a step that is not a Python int.
        self._try(lambda: self.run.log({key: float(value) for key, value in values.items()},
                                       step=None if step is None else int(step)))

    def image(self, key, path):
        """Log a picture file (PNG, JPEG), read now."""
        def log_image():
            from swanlab import Image
            self.run.log({key: Image(str(path))})
        self._try(log_image)

    def _try(self, function):
        try:
            if self.run:
                function()
        except Exception as error:
            if not self._complained:
                self._say(f"could not log: {_one_line(error)} (further errors are not shown)")
            self._complained = True

    def finish(self, failed=False):
        """Upload what is left, for FINISH_TIMEOUT seconds at most; `failed` marks the run as crashed."""
        run, self.run = self.run, None
        if run is None:
            return
        outcome = {"state": "crashed", "error": "training failed"} if failed else {}
        try:
            _bounded(lambda: run.finish(**outcome), self.FINISH_TIMEOUT)
        except Exception as error:
            SwanLab.hung = isinstance(error, TimeoutError)
            self._say(f"the run did not finish: {_one_line(error)}")
        if self.hung or run.mode == "offline":
            self._say("to upload this run: " + shlex.join(["swanlab", "sync", str(run.dir), "--id", run.id]))

    @staticmethod
    def _say(text):
        print(f"SwanLab: {text}", flush=True)


def _check_answers(host, seconds):
    """Raise ConnectionError unless `host` answers, whatever the status; swanlab itself tries for 16 to 76 seconds."""
    import requests    # as swanlab does: the same proxies and certificates
    try:
        _bounded(lambda: requests.head(host, timeout=seconds), 2 * seconds)
    except Exception as error:
        raise ConnectionError(f"{host} does not answer ({type(error).__name__})") from error


def _bounded(function, seconds):
    """Return or raise what function() does, run in a daemon thread; TimeoutError if it takes longer."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds} s")
    result, error = outcome[0]
    if error:
        raise error
    return result


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- stopping --------------------------------------------------------------------------------

class Stopped(BaseException):
    """SIGINT or SIGTERM came. Not an Exception: nothing on the way out may swallow it."""

    def __init__(self, signum):
        self.signum = signum


class Signals:
    """Asked to stop once, the training loop ends its step and saves; asked twice, the process ends."""

    def __init__(self):
        self.came, self.deferred = None, False

    @contextmanager
    def installed(self):
        before = {signum: signal.signal(signum, self.receive) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def receive(self, signum, frame):
        if self.came:
            os._exit(128 + signum)
        self.came = signum
        if not self.deferred:
            raise Stopped(signum)

    @contextmanager
    def defer(self):
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False


# ---- training (tutorial, section 5) ----------------------------------------------------------

def train_model(model, train_loader, val_loader, criterion, optimizer, num_epochs, device, *, patience=8, out=".", autocast=nullcontext(),
                scaler=None, schedule=None, ema=0.0, resume=None, flags=None, log=lambda values, step: None, signals=None, save_every=60):
    """Train for num_epochs, or until the validation loss has not fallen for `patience` epochs.

    train_loader, val_loader: iterables of (images (B, C, H, W), masks (B, 1, H, W));
    criterion(probabilities, masks): scalar tensor. Leaves the best weights in `model` and in
    out/best_model.pth, everything needed to go on in out/last.pth (anew at least every `save_every`
    seconds, within an epoch too), and out/metrics.csv.
    Keyword-only: autocast, a context for the forward pass; scaler, a GradScaler for fp16; schedule(step), the share
    of the learning rate at that step of the whole run; ema, the decay of a running mean of the weights that is
    evaluated and kept in place of the weights themselves (0: none); both need a train_loader with a length;
    resume, what last.pth held; flags, recorded in it; log(dict, step), called after each epoch; signals, a
    `Signals` to be stopped by. Under torchrun every process calls this, with its share of the batches.
    A step whose loss or gradient is not finite changes nothing and is counted ("skipped" in the history).
    Returns the history, a dict for each epoch. Raises Stopped with last.pth written; ValueError after
    NON_FINITE_LIMIT such steps in a row, where no validation loss was a number, and where the last
    checkpoint cannot be written (one in between is only a warning).
    """
    out, device, signals = Path(out), torch.device(device), signals or Signals()
    # A scaler skips steps that are not finite without waiting for the GPU: beside fp16, one that scales by 1.
    scaler, fixed_scale = (scaler, None) if scaler else (torch.amp.GradScaler(device.type, init_scale=1.0), 1.0)
    rank, world = rank_and_world()
    # Epochs that are complete; batches of the one that is not; the best so far.
    progress = {"epoch": 0, "step": 0, "best_loss": math.inf, "best_epoch": 0, "history": []}
    scores, best, best_saved = Scores(device), None, 0
    health = torch.zeros(2, dtype=torch.int64, device=device)  # steps skipped in this epoch, and in a row up to now
    health_shown = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")
    evaluated = copy.deepcopy(model) if ema else model  # the running mean, where there is one
    if resume:
        names = ("loss", *metrics(1, 0, 0, 0), "image_dice")
        row = {"epoch": 0, **{f"{split}_{name}": 0.0 for split in ("train", "val") for name in names},
               "lr": 0.0, "skipped": 0, "images_per_second": 0.0, "seconds": 0.0}
        moments = [{"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight} for weight in model.parameters()]
        try:
            weights = model.state_dict()
            template = {"model": weights, "best": None if resume["best"] is None else weights, "averaged": weights if ema else None,
                        "progress": progress, "scores": scores.state(), "health": health, "scaler": scaler.state_dict()}
            fits = all(_alike(resume[key], value) for key, value in template.items()) and all(_alike(found, row) for found in resume["progress"]["history"])
            if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and (found := resume["optimizer"]["state"]):
                fits = fits and _alike(found, dict(enumerate(moments)))
            if not fits:
                raise ValueError("another network, or another program")
            progress, best = resume["progress"], resume["best"]
            model.load_state_dict(resume["model"])
            if ema:
                evaluated.load_state_dict(resume["averaged"])
            optimizer.load_state_dict({**resume["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})  # the flags say those
            scaler.load_state_dict(resume["scaler"])
            scores.load_state(resume["scores"])
            health.copy_(resume["health"])
            torch.set_rng_state(resume["rng"])
            if device.type == "cuda" and resume["cuda_rng"] is not None:
                torch.cuda.set_rng_state(resume["cuda_rng"], device)
        except Exception as error:  # of many kinds: whatever does not fit
            raise ValueError(f"{out / 'last.pth'}: does not fit this training ({_one_line(error)})") from None
    means, currents = ([value for value in network.state_dict().values() if value.is_floating_point()] for network in (evaluated, model))
    buffers = [value for value in model.buffers() if value.is_floating_point()]  # of batch normalisation
    base_lr = optimizer.param_groups[0]["lr"]
    wrapped = model  # what is trained; what is saved stays the model itself, whose weights keep their names
    if world > 1:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Dropout):
                model.set_submodule(name, SharedDropout(module.p, train_loader))
        wrapped = DistributedDataParallel(model)
    next_save = time.monotonic() + save_every

    @contextmanager
    def disk(last_chance):
        """On a full or broken disk go on training and warn; give up where it is the last chance to write."""
        try:
            yield
        except OSError as error:
            text = f"{out}: {error.strerror or error}: what was written before is whole; make room or mend the folder"
            if last_chance:
                raise ValueError(f"{text}, then go on from there with --resume") from None
            print(f"WARNING: {text}, writing is tried again later", file=sys.stderr, flush=True)

    def checkpoint(last_chance=False):
        """Write best_model.pth where it changed, then last.pth. All processes call it, the first one writes."""
        nonlocal best_saved, next_save
        sums = scores.state()
        if rank > 0:
            return
        started = time.monotonic()
        with disk(last_chance):
            if best_saved != progress["best_epoch"]:
                save(out / "best_model.pth", best)
                best_saved = progress["best_epoch"]
            save(out / "last.pth", {
                "progress": progress, "best": best, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "averaged": evaluated.state_dict() if ema else None, "scaler": scaler.state_dict(), "scores": sums, "health": health,
                "flags": flags, "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}, keep=out / "last.previous.pth")
        took = time.monotonic() - started  # on a slow disk, writing stays under a twentieth of the run
        next_save = time.monotonic() + (max(save_every, 20 * took) if save_every else 0)

    def poll():
        stop, due, in_a_row = agree(signals.came or 0, rank == 0 and time.monotonic() >= next_save, health_shown[1].item())
        failed = in_a_row >= NON_FINITE_LIMIT
        if stop or due or failed:
            checkpoint(last_chance=stop or failed)
        if stop:
            raise Stopped(int(stop))
        if failed:
            raise ValueError(f"epoch {progress['epoch'] + 1}, step {progress['step']}: the loss or its gradient was not finite in {int(in_a_row)} steps in a row; "
                             f"the weights in {out} are from before. Start again with a lower --lr, or --precision fp32")

    with signals.defer():
        if world > 1 and not resume:
            checkpoint()  # a restart by torchrun goes on from here, and not from what an older run left
        while progress["epoch"] < num_epochs and progress["epoch"] - progress["best_epoch"] < patience:
            epoch = progress["epoch"]
            started, before = time.perf_counter(), scores.state()["sums"][0].item()
            batches = train_loader
            if hasattr(train_loader, "set_epoch"):
                train_loader.set_epoch(epoch, progress["step"])
            else:
                batches = itertools.islice(train_loader, progress["step"], None)
            bar = tqdm(batches, f"epoch {epoch + 1}/{num_epochs}", initial=progress["step"], unit=" batches", leave=False,
                       total=len(train_loader) if hasattr(train_loader, "__len__") else None, disable=None if rank == 0 else True)
            model.train()
            for images, masks in bar:
                images, masks = images.to(device), masks.to(device)
                steps = epoch * len(train_loader) + progress["step"] if schedule or ema else 0
                if schedule:
                    for group in optimizer.param_groups:
                        group["lr"] = base_lr * schedule(steps)
                before_step = [buffer.clone() for buffer in buffers]
                with autocast:
                    outputs = wrapped(images)
                loss = criterion(outputs, masks)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
                gradients[0].add_(loss.detach() * 0)  # a loss that is not a number leaves no number in the gradient
                finite = torch.isfinite(get_total_norm(gradients, math.inf))
                scaler.step(optimizer)  # unless a gradient is not finite
                scaler.update(fixed_scale)
                for buffer, value in zip(buffers, before_step):
                    buffer.copy_(torch.where(finite, buffer, value))
                if ema:  # of few steps at first, so that it forgets the random weights
                    torch._foreach_lerp_(means, currents, 1 - min(ema, (1 + steps) / (10 + steps)))

                scores.add(loss, outputs, masks, finite=finite)
                health = torch.stack([health[0] + ~finite, (health[1] + 1) * ~finite])
                health_shown.copy_(health, non_blocking=True)
                progress["step"] += 1
                if not bar.disable:
                    loss, seen = scores.glance()
                    rate = (seen - before) * world / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)
                poll()
            train, skipped = scores.result(), health[0].item()
            rate = (scores.state()["sums"][0].item() - before) / (time.perf_counter() - started)
            val = evaluate(evaluated, val_loader, criterion, device, autocast=autocast, poll=poll)

            progress["epoch"], progress["step"], scores = epoch + 1, 0, Scores(device)
            health[0] = 0
            better = agree(val["loss"] < progress["best_loss"])[0]
            if better:
                progress["best_loss"], progress["best_epoch"] = val["loss"], epoch + 1
                best = copy.deepcopy(evaluated.state_dict())
            lr = base_lr * (schedule((epoch + 1) * len(train_loader) - 1) if schedule else 1)  # of the last step
            progress["history"].append({
                "epoch": epoch + 1, **{f"train_{key}": value for key, value in train.items()},
                **{f"val_{key}": value for key, value in val.items()}, "lr": lr, "skipped": skipped,
                "images_per_second": rate, "seconds": time.perf_counter() - started})
            if rank > 0:
                continue
            table = io.StringIO(newline="")
            lines = csv.DictWriter(table, progress["history"][0])
            lines.writeheader()
            lines.writerows(progress["history"])
            with disk(last_chance=False), whole(out / "metrics.csv") as file:
                file.write(table.getvalue().encode())
            print(f"epoch {epoch + 1:>{len(str(num_epochs))}}/{num_epochs}"
                  f" | train loss {train['loss']:.4f} acc {train['acc']:.4f} dice {train['dice']:.4f}"
                  f" | val loss {val['loss']:.4f} acc {val['acc']:.4f} dice {val['dice']:.4f} iou {val['iou']:.4f}"
                  f" | {rate:.0f} images/s{' | best' if better else ''}"
                  f"{f' | {skipped} steps skipped: not finite' if skipped else ''}", flush=True)
            blind = [row["val_dice"] == 0 and row["val_acc"] == row["val_background_acc"] for row in progress["history"][-BLIND_LIMIT - 1:]]
            if len(blind) >= BLIND_LIMIT and all(blind[-BLIND_LIMIT:]) and (len(blind) == BLIND_LIMIT or not blind[0]):
                print(f"WARNING: for {BLIND_LIMIT} epochs the answer was background everywhere: that is {100 * val['background_acc']:.2f} % "
                      f"accurate and finds nothing. Some more epochs may mend it; else try another --lr", file=sys.stderr, flush=True)
            log({**{f"train/{key}": value for key, value in train.items() if key != "background_acc"},
                 **{f"val/{key}": value for key, value in val.items()},
                 "train/epoch": epoch + 1, "train/lr": lr, "perf/images_per_second": rate}, epoch + 1)
        if progress["epoch"] < num_epochs and rank == 0:
            print(f"stopping early: no lower validation loss since epoch {progress['best_epoch']}")
        checkpoint(last_chance=True)
    if best is None:
        raise ValueError("the validation loss never was a number: lower --lr, or try --precision fp32")
    model.load_state_dict(best)
    return progress["history"]


# ---- pictures --------------------------------------------------------------------------------

def visualize_predictions(model, test_loader, device, num_samples=5, threshold=0.5, *, path="predictions.png"):
    """Draw image, true mask, predicted mask and overlay of samples spread over the first batch; returns path."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen and keeps every figure alive

    model.eval()
    images, masks = next(iter(test_loader))
    chosen = np.linspace(0, len(images) - 1, min(num_samples, len(images))).astype(int)
    images, masks = images[chosen].to(device), masks[chosen].to(device)
    with torch.inference_mode():
        found = model(images) > threshold
    pictures = (images.permute(0, 2, 3, 1).cpu().numpy() * STD + MEAN).clip(0, 1)
    rows = math.ceil(len(chosen) / 2)
    figure = Figure(figsize=(16, 2.2 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 8, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (picture, mask, answer) in enumerate(zip(pictures, masks.cpu(), found.cpu())):
        scores = Scores("cpu")
        scores.add(torch.zeros(()), answer[None], mask[None])
        dice = metrics(*scores.counts.tolist())["dice"]
        mask, answer = mask[0].numpy(), answer[0].numpy()
        panels = axes[index // 2, index % 2 * 4:][:4]
        for axis, title in zip(panels, ("image", "true mask", "predicted mask", f"overlay, Dice {dice:.2f}")):
            axis.set_title(title, fontsize=9)
        panels[0].imshow(picture)
        panels[1].imshow(mask, cmap="gray", vmin=0, vmax=1)
        panels[2].imshow(answer, cmap="gray", vmin=0, vmax=1)
        panels[3].imshow(picture)
        panels[3].imshow(np.ma.masked_equal(answer, 0), cmap="Reds", vmin=0, vmax=1.3, alpha=0.5)
        panels[3].contour(mask, [0.5], colors="lime", linewidths=0.8)
    figure.suptitle(f"Predictions at threshold {threshold:g} (red) and true outline (green)", fontsize=10)
    save_figure(figure, path)
    return path


def plot_curves(history, path):
    """Draw loss, foreground overlap and accuracy over the epochs to `path`; returns path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    for axis, keys in zip(panels, (("train_loss", "val_loss"), ("train_dice", "val_dice", "val_iou"), ("train_acc", "val_acc"))):
        for key in keys:
            axis.plot(epochs, [row[key] for row in history], label=key.replace("_", " "), marker="." if len(epochs) < 20 else None)
        axis.set_xlabel("epoch")
    best = min(history, key=lambda row: row["val_loss"])
    panels[0].plot(best["epoch"], best["val_loss"], "k*", markersize=11, label=f"best weights (epoch {best['epoch']})")
    panels[1].set_ylim(0, 1)
    panels[2].axhline(history[0]["val_background_acc"], color="gray", linestyle="--", label="all background (val)")
    for axis, title in zip(panels, ("Dice + BCE loss", "foreground overlap", "pixel accuracy")):
        axis.set_title(title)
        axis.legend()
        axis.grid(alpha=0.3)
    save_figure(figure, path)
    return path


def save_figure(figure, path):
    with whole(Path(path), sync=False) as file:
        figure.savefig(file, dpi=80, format="png")


# ---- the command line ------------------------------------------------------------------------

def parse_arguments(argv):
    """The command line, and what last.pth holds where it asks to resume (else None)."""
    parser = ArgumentParser(prog="train.py", description="Train the U-Net and test its best weights.")
    # data
    parser.add_argument("--data", default="dataset", help="folder that holds train/ valid/ test/")
    parser.add_argument("--synthetic", action="store_true", help="draw phantoms in DATA/synthetic and train on them")
    parser.add_argument("--image-size", type=number(1, 8192), default=IMAGE_SIZE, help="side in pixels that images are resized to")
    parser.add_argument("--skip-bad", action="store_true", help="leave damaged images out, and list them in OUT/skipped.txt")
    # training
    parser.add_argument("--epochs", type=number(1), default=40)
    parser.add_argument("--batch-size", type=number(1), default=32)
    parser.add_argument("--lr", type=number(0.0, kind=float), default=1e-4, help="Adam's learning rate")
    parser.add_argument("--patience", type=number(1), default=8, help="epochs without a lower validation loss before stopping")
    parser.add_argument("--n-filters", type=number(1, 1024), default=32, help="channels of the first level")
    parser.add_argument("--seed", type=number(0), default=0)
    # what the tutorial does without
    parser.add_argument("--recipe", choices=RECIPES, default="tutorial", help=f"a set of flags; strong: {spell_flags(RECIPES['strong'])}")
    parser.add_argument("--norm", choices=("none", "batch", "group"), default="none", help="normalisation after each 3x3 convolution")
    parser.add_argument("--prior", type=number(0.0, 0.99, float), default=0.0, help="probability that the untrained network begins at; 0: as PyTorch draws it, near 0.5")
    parser.add_argument("--weight-decay", type=number(0.0, kind=float), default=0.0, help="AdamW's, decoupled; with 0 that is Adam")
    parser.add_argument("--warmup", type=number(0), default=0, help="steps over which the learning rate rises to --lr")
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="cosine: the learning rate falls to 0 at the end of --epochs")
    parser.add_argument("--ema", type=number(0.0, 0.9999, float), default=0.0, help="decay of a running mean of the weights, which is then what is evaluated and kept")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=False, help="turn, scale, shift and light the training images, slightly")
    parser.add_argument("--dice", choices=("batch", "image"), default="batch", help="the Dice loss of the whole batch, or the mean of its images'")
    # machine
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 on a GPU that has it, fp16 on one that has not, else fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the network: slow to start, for long runs")
    # files
    parser.add_argument("--out", default=".", help="folder for weights, metrics and pictures")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pth, with its flags")
    parser.add_argument("--test-only", action="store_true", help="test OUT/best_model.pth, train nothing")
    parser.add_argument("--save-every", type=number(0.0, kind=float), default=60, help="seconds between two writings of last.pth")
    # SwanLab
    parser.add_argument("--swanlab", choices=("auto", "online", "offline", "disabled"), default="auto")
    parser.add_argument("--project", default="Unet-Medical-Segmentation")
    parser.add_argument("--experiment-name", default="bs32-epoch40")
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])
    args = parser.parse_args(argv)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, after a process died
    if not args.resume and not (restarted and (Path(args.out) / "last.pth").exists()):
        return args, None
    if args.test_only:
        raise ValueError("--resume trains and --test-only does not: give one of them")
    state = load_checkpoint(Path(args.out))
    path, saved = state["path"], []  # what is not given again stays as it was
    for name, value in state["flags"].items():
        if name in vars(args) and name not in ("out", "resume", "test_only"):
            flag = "--" + name.replace("_", "-")
            saved += [f"{flag}={value}"] if not isinstance(value, bool) else [flag] if value else ["--no-augment"] if name == "augment" else []
    args = parser.parse_args(saved + list(sys.argv[1:] if argv is None else argv))
    for name in RESULT_FLAGS + ("epochs",) * (args.schedule != "constant"):
        was, now = state["flags"].get(name, parser.get_default(name)), getattr(args, name)
        if was != now:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{path}: was trained with {flag} {was}, not {now}: leave {flag} away, or start afresh without --resume")
    return args, state


def spell_flags(values):
    """{"weight_decay": 0.01, "augment": True} -> "--weight-decay 0.01 --augment"."""
    return " ".join(("--" if value is not False else "--no-") + flag.replace("_", "-") + ("" if isinstance(value, bool) else f" {value}")
                    for flag, value in values.items())


def main(argv=None):
    args, resume = parse_arguments(argv)
    out, signals = output_folder(args.out), Signals()
    writes = os.environ.get("RANK", "0") == "0" and not args.test_only  # of several processes the first
    try:
        with signals.installed(), locked(out / ".lock") if writes else nullcontext():
            train_and_test(args, resume, signals)
    except Stopped as stop:
        print(f"stopped by {signal.Signals(stop.signum).name}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (MemoryError, RuntimeError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        raise ValueError(f"out of {'GPU ' if on_gpu else ''}memory with --batch-size {args.batch_size}: halve it, or lower --image-size or --n-filters") from None


def choose_precision(name, device):
    """'bf16', 'fp16' or 'fp32' for the --precision of the command line on this device."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def train_and_test(args, resume, signals):
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun started this process
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A prefix for each attempt: after a restart the addresses of the dead are still in the store.
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, timeout=timedelta(hours=1),
                                store=dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store))
    rank, world = rank_and_world()
    if args.batch_size < world:
        raise ValueError(f"--batch-size {args.batch_size} is that of all {world} processes together: give at least {world}")
    say = print if rank == 0 else lambda *_, **__: None
    precision = choose_precision(args.precision, device)
    autocast = torch.autocast(device.type, torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "fp32")
    scaler = torch.amp.GradScaler("cuda") if precision == "fp16" and device.type == "cuda" else None
    out, root = Path(args.out), Path(args.data)
    if rank == 0 and not args.test_only:
        for remains in out.glob(".*.tmp"):  # of a process that was killed while it wrote
            remains.unlink(missing_ok=True)
        if resume and resume["path"] != out / "last.pth":
            os.replace(resume["path"], out / "last.pth")  # so that the next one does not push the good one out
    if args.synthetic:
        from download import make_phantoms
        with first_on_each_machine():
            root = make_phantoms(root / "synthetic")

    torch.manual_seed(args.seed)
    if args.test_only:
        model = load_model(out / "best_model.pth")
        args.image_size = model.image_size
    else:
        model = UNet(n_filters=args.n_filters, image_size=args.image_size, norm=None if args.norm == "none" else args.norm)
        if args.prior:  # Lin et al.: "Focal Loss for Dense Object Detection", ICCV 2017, section 4.1
            torch.nn.init.constant_(model.outc.bias, math.log(args.prior / (1 - args.prior)))
    if args.norm == "batch" and world > 1:
        if device.type != "cuda":
            raise ValueError("--norm batch among several processes takes GPUs: use --norm group")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # of the whole batch, as in one process
    model.to(device, memory_format=torch.channels_last)

    if args.compile:
        model.compile()  # in place: the weights keep their names

    splits, skipped = ["test"] if args.test_only else SPLITS, [] if args.skip_bad else None
    with first_on_each_machine():
        rows = {split: load_split(root, split, args.image_size, skipped=skipped) for split in splits}
    loader = {split: Batches(rows[split], args.batch_size, device, shuffle=split == "train", seed=args.seed, rank=rank, world=world,
                             augmented=args.augment and split == "train")
              for split in rows}
    say(f"{root}: {', '.join(f'{len(rows[split])} {split}' for split in rows)} images at {args.image_size}x{args.image_size}; "
        f"{f'{world} x ' if world > 1 else ''}{device.type}, {precision}; "
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters; writing to {out}", flush=True)
    if args.recipe != "tutorial":
        say(f"recipe {args.recipe}: {spell_flags({flag: getattr(args, flag) for flag in RECIPES[args.recipe]})}", flush=True)
    if skipped and rank == 0:
        with whole(out / "skipped.txt") as file:
            file.write("".join(f"{line}\n" for line in skipped).encode())
        print(f"{len(skipped)} damaged images left out, listed in {out / 'skipped.txt'}", flush=True)

    flags = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "test_only")}
    if not args.test_only:
        flags["data_fingerprints"] = [fingerprint(COCOSegmentationDataset(load_coco(root / split, []), root / split), "st_size") for split in ("train", "valid")]
        if resume and resume["flags"].get("data_fingerprints") != flags["data_fingerprints"]:
            raise ValueError(f"{resume['path']}: was trained on other data than {root} holds now: give it the same --data, or start afresh without --resume")
    criterion = combined_loss_by_image if args.dice == "image" else combined_loss
    tracker = SwanLab("disabled" if args.test_only or rank > 0 else args.swanlab, project=args.project, experiment_name=args.experiment_name,
                      config=flags, log_dir=out / "swanlog", run_id=resume and resume["flags"].get("swanlab_run"))
    flags["swanlab_run"] = tracker.run_id
    try:
        if not args.test_only:
            history = train_model(
                model, loader["train"], loader["valid"], criterion, torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True),
                args.epochs, device, patience=args.patience, out=out, autocast=autocast, scaler=scaler,
                schedule=make_schedule(args.schedule, args.warmup, args.epochs * len(loader["train"])) if args.warmup or args.schedule != "constant" else None,
                ema=args.ema, resume=resume, flags=flags,
                log=tracker.log, signals=signals, save_every=args.save_every)
        test = evaluate(model, loader["test"], criterion, device, autocast=autocast)
        say(f"test with the best weights: loss {test['loss']:.4f}, Dice {test['dice']:.4f}, IoU {test['iou']:.4f}, "
            f"mIoU {test['miou']:.4f}, precision {test['precision']:.4f}, recall {test['recall']:.4f}, "
            f"per-image Dice {test['image_dice']:.4f}\n"
            f"test accuracy {test['acc']:.4f}; answering background everywhere scores {test['background_acc']:.4f}", flush=True)
        tracker.log({f"test/{key}": value for key, value in test.items()})
        if rank == 0:
            drawn = [visualize_predictions(model, loader["test"], device, num_samples=10, path=out / "predictions.png")]
            tracker.image("predictions", drawn[0])
            if not args.test_only:
                drawn.append(plot_curves(history, out / "curves.png"))
            say(f"drawn: {' and '.join(map(str, drawn))}; next: python predict.py")
    finally:
        tracker.finish(failed=sys.exc_info()[0] is not None)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    status = 0
    try:
        run(main)
    except SystemExit as leaving:
        status = leaving.code
    if SwanLab.hung or "LOCAL_RANK" in os.environ:
        # A stuck upload would hold up the exit for a minute, and a thread of gloo that lets go of its last tensor
        # while Python shuts down would make it an abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
