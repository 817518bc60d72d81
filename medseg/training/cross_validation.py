"""Cross-validation: an ordinary run for each fold, and the scores of all their images together."""

import argparse
import gc
import json
import shlex
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medseg.cli import one_line, output_folder
from medseg.coco import load_coco, recorded_group
from medseg.dist import started_by_torchrun
from medseg.files import atomic_write, read_json
from medseg.inference import PLAIN, read_inference
from medseg.metrics import (
    bootstrap,
    class_scores,
    count_pixels,
    mean_image_dice,
    without_nan,
)
from medseg.phantoms import make_phantoms
from medseg.signals import Stopped
from medseg.training.checkpoint import (
    AFRESH,
    BEST,
    FOLDS,
    LAST,
    PREVIOUS,
    fold_runs,
    prepare_folder,
    read_checkpoint,
    recorded_flags,
    run_lock,
)
from medseg.training.folds import deal_images, write_folds
from medseg.training.history import list_skipped
from medseg.training.precision import keep_precision
from medseg.training.tracking import experiment_name
from medseg.training.tuning import predict

DATA = "folds"  # in --out: the data sets fold1, fold2, ...
# {title of a column: score}
COLUMNS = {
    "  Dice": "dice",
    "per-image Dice": "image_dice",
    "   IoU": "iou",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "acc",
}


def check_folds(args):
    """ValueError where --folds goes with other flags, or with what is in --out, in no way."""
    if args.folds == 1:
        raise ValueError("--folds 1: nothing would be left to train on: give 2 or more")
    if args.folds and args.test_only:
        one = Path(args.out) / "fold1"
        raise ValueError(f"--test-only tests one run, not --folds: give it one, as --out {one}")
    if args.folds and started_by_torchrun():
        raise ValueError("--folds trains in one process: start it without torchrun")
    data = Path(args.out) / DATA
    if args.folds and data.exists() and not (Path(args.out) / FOLDS).exists():
        raise ValueError(f"{data}: is there already: remove it, or name another folder with --out")


def read_folds(args):
    """What OUT/folds.json holds where --resume goes on with a cross-validation, else None.

    "flags" of the run, "folds" that are done, and the file's "path". Raises ValueError.
    """
    path = Path(args.out) / FOLDS
    if not (args.resume or args.test_only) or not path.exists():
        return None
    try:
        record, folds = read_json(path), []
        flags = {**record["flags"]}
        for number, fold in enumerate(record["folds"], 1):
            if fold["class_names"] != record["folds"][0]["class_names"]:
                raise ValueError("its folds have different classes")
            counts = np.array(fold["counts"], np.int64)
            chosen = read_inference(fold)
            images = {"per_image": dict(fold["per_image"]), "groups": fold.get("groups", [])}
            folds.append(_fold_result(number, counts, fold["class_names"], images, chosen))
        if flags["folds"] < max(2, len(folds)):
            raise ValueError("more folds than its flags ask for")
    except Exception as error:  # of many kinds
        raise ValueError(
            f"{path}: damaged, or not written by train.py ({one_line(error)}): {AFRESH}"
        ) from None
    return {"flags": flags, "folds": folds, "path": path}


@dataclass
class Fold:
    """A run of a cross-validation: its flags, and the checkpoint to go on from or None."""

    number: int
    args: argparse.Namespace
    checkpoint: dict
    result: dict = None  # what folds.json holds of it

    @contextmanager
    def training(self):
        """Hold the lock of the fold's folder; a run stopped within goes on with --resume."""
        with run_lock(Path(self.args.out)), _resumable():
            yield

    def score(self, model, batches, autocast):
        """Score its valid split by the network that was trained on the others."""
        inference, names = model.info.inference or PLAIN, model.info.class_names
        pairs = predict(model, batches, batches.device, inference.flips, autocast)
        options = {"clean": inference.clean, "exclusive": model.info.exclusive}
        counts = count_pixels(pairs, [inference.threshold], **options)[:, 0]
        images = _describe_images(counts, Path(self.args.data) / "valid")
        self.result = _fold_result(self.number, counts, names, images, inference)


@contextmanager
def _resumable():
    """Within, folds.json is there for --resume to find."""
    try:
        yield
    except Stopped as stop:
        stop.checkpointed = True
        raise


def untrained_folds(args, record):
    """--folds: yield each `Fold` that is to be trained and scored; then score all images together.

    record: of `read_folds`, to go on with; folds that are done stay. The runs are in OUT/fold1,
    OUT/fold2, ..., the scores in folds.json. ValueError for too many folds.
    """
    out = Path(args.out)
    data, deal = out / DATA, None
    if not (record and data.exists()):  # stopped before they were written
        deal = _deal(args)
    if record is None:
        _clear(out)
        record = {"flags": recorded_flags(args), "folds": []}
    flags, folds = record["flags"], record["folds"]
    _write(out, flags, folds)
    if deal:
        with _resumable():
            write_folds(deal, data)
    for number in range(len(folds) + 1, args.folds + 1):
        print(f"fold {number} of {args.folds}", flush=True)
        fold = _open_fold(args, number)
        yield fold
        folds.append(fold.result)
        _free_memory(fold)
        _write(out, flags, folds)
    _print_table(folds, _pool(folds))
    test, weights = _root(args) / "test", f"{shlex.quote(str(out))}/fold*/{BEST}"
    images = shlex.quote(str(test)) if test.is_dir() else "IMAGE"
    print(f"saved {out / FOLDS}; next: python predict.py {images} --model {weights}")


def _root(args):
    """The folder of the data set that is dealt."""
    return Path(args.data) / "synthetic" if args.synthetic else Path(args.data)


def _deal(args):
    """Deal the images of the data set, and say how."""
    root, skipped = _root(args), [] if args.skip_bad else None
    if args.synthetic:
        make_phantoms(root)
    each_class = args.classes == "each"
    deal = deal_images(root, args.folds, args.seed, each_class=each_class, damaged=skipped)
    list_skipped(skipped, Path(args.out))
    sizes = ", ".join(str(len(parts["valid"])) for parts in deal.folds)
    how = f"{deal.groups} groups, each in one fold"
    if not deal.groups:
        how = (
            "one by one, for no groups are recorded (where several are of one patient, import them "
            "with {group} in download.py --masks, or --groups)"
        )
    print(f"{root}: train and valid dealt into folds of {sizes} images: {how}", flush=True)
    return deal


def _clear(out):
    """Make room for a new cross-validation, in place of one that `refuse_other_run` let pass."""
    for folder in (out, *fold_runs(out)):
        prepare_folder(folder, None)
    for folder in (out / DATA, *out.glob(f".{DATA}.*.tmp")):  # these of a process that was killed
        shutil.rmtree(folder, ignore_errors=True)


def _open_fold(args, number):
    """The Fold of this number, with flags of its own."""
    name, checkpoint = f"fold{number}", None
    own = argparse.Namespace(**vars(args))
    own.data, own.out = str(Path(args.out) / DATA / name), str(Path(args.out) / name)
    own.folds, own.synthetic, own.resume, own.overwrite = 0, False, False, False
    own.experiment_name = f"{args.experiment_name or experiment_name(args)}-{name}"
    out = output_folder(own.out)
    if any((out / last).exists() for last in (LAST, PREVIOUS)):
        checkpoint = read_checkpoint(out)
        keep_precision(own, argparse.ArgumentParser(), checkpoint["flags"])
    return Fold(number, own, checkpoint)


def _free_memory(fold):
    """Give back what a fold that is done has taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is free counts where the next fold moves its images there
    # Each fold has all the images: their caches would take that many times the disk.
    shutil.rmtree(Path(fold.args.data) / ".cache", ignore_errors=True)


def _fold_result(number, counts, names, images, inference):
    """What folds.json holds of a fold.

    counts: int64 (N, C, 4); images: of `_describe_images`; inference: that made the masks.
    """
    if counts.shape[1:] != (len(names), 4) or counts.min() < 0:
        raise ValueError(f"no counts of {len(names)} classes")
    return {
        "fold": number,
        "images": len(counts),
        "class_names": list(names),
        **inference.as_dict(),
        "scores": without_nan(class_scores(counts, names)),
        **images,
        "counts": counts.tolist(),  # of each image and class: tp, fp, fn, tn
    }


def _describe_images(counts, folder):
    """per_image, {file name: Dice, the mean over the classes}, and groups, a name each or "".

    Either is empty where it is not known: --skip-bad left images out, or no groups are recorded.
    """
    coco = load_coco(folder)
    records = [coco.imgs[number] for number in coco.getImgIds()]
    if len(records) != len(counts):
        return {"per_image": {}, "groups": []}
    names, dice = [record["file_name"] for record in records], mean_image_dice(counts).round(4)
    per_image = dict(zip(names, dice.tolist(), strict=True))
    groups = [recorded_group(record) for record in records]
    return {"per_image": per_image, "groups": groups if any(groups) else []}


def _pool(folds):
    """The scores of the images of all folds together, as report.json of predict.py has them."""
    names = folds[0]["class_names"]
    counts = np.concatenate([np.array(fold["counts"], np.int64) for fold in folds])
    groups, numbers = [], None
    for fold in folds:
        groups += fold["groups"] or [""] * len(fold["counts"])
    if any(groups):  # an image without one is a group of its own
        own = [group or f"image {index}" for index, group in enumerate(groups)]
        numbers = np.unique(own, return_inverse=True)[1]
    thresholds = {fold["threshold"] for fold in folds}
    return {
        "class_names": names,
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,  # each fold's own
        "images": len(counts),
        "scores": without_nan(class_scores(counts, names, numbers)),
        "confidence_95": without_nan(bootstrap(counts, names, groups=numbers)),
    }


def _write(out, flags, folds):
    """Write folds.json, which has scores once all folds are done."""
    pooled = _pool(folds) if len(folds) == flags["folds"] else {}
    with atomic_write(out / FOLDS) as file:
        file.write(json.dumps({"flags": flags, **pooled, "folds": folds}, indent=1).encode())


def _print_table(folds, pooled):
    """A row for each fold and for all of them, with their intervals, and a line for each class."""
    rows = [(fold["fold"], fold["images"], fold["scores"]) for fold in folds]
    rows.append(("pooled", pooled["images"], pooled["scores"]))
    for end, title in enumerate(("95 % from", "95 % to")):
        intervals = pooled["confidence_95"].items()
        limits = {name: interval and interval[end] for name, interval in intervals}
        rows.append((title, "", limits))
    print(f"{'fold':>9}{'images':>8}   " + "   ".join(COLUMNS))
    for title, images, scores in rows:
        values = (
            f"{'none':>{len(head)}}" if scores[name] is None else f"{scores[name]:{len(head)}.4f}"
            for head, name in COLUMNS.items()
        )
        print(f"{title:>9}{images:>8}   " + "   ".join(values))
    for name in pooled["class_names"] if len(pooled["class_names"]) > 1 else ():
        dice, interval = (pooled[key][f"dice/{name}"] for key in ("scores", "confidence_95"))
        said = "no image of it in train and valid"
        if dice is not None:
            said = "pooled Dice {:.4f} [{:.4f}, {:.4f}]".format(dice, *interval)
        print(f"  {name}: {said}")
