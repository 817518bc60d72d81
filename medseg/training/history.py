"""What an epoch shows on the screen and leaves behind: bar, line, metrics.csv, tracked values."""

import csv
import io
import math
import sys
import time
from datetime import timedelta

from tqdm import tqdm

from medseg.cli import spell_flags
from medseg.coco import listed, used_categories
from medseg.dist import is_first, rank_and_world
from medseg.files import atomic_write
from medseg.training.recipes import RECIPES

FEW_STEPS = 300  # of a whole run
SPELLED = {
    **{"dice": "Dice", "iou": "IoU", "miou": "mIoU", "precision": "precision"},
    **{"recall": "recall", "image_dice": "per-image Dice"},
}


def progress_bar(batches, loader, done, title):
    """tqdm over the batches of `loader` that the epoch has left, after `done` of them.

    Silent in all processes but the first.
    """
    return tqdm(
        batches,
        title,
        initial=done,
        total=len(loader) if hasattr(loader, "__len__") else None,
        unit=" batches",
        leave=False,
        disable=None if is_first() else True,  # None: where stderr is no terminal
    )


def show_loss(bar, scores, images_before):
    if not bar.disable:
        loss, images = scores.running_loss()
        rate = (images - images_before) * rank_and_world()[1] / (time.time() - bar.start_t)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s", refresh=False)


def epoch_row(epoch, train_scores, val_scores, step):
    """What the history keeps of an epoch that ended, but for its time; step: its GuardedStep."""
    return {
        "epoch": epoch,
        **{f"train_{name}": value for name, value in train_scores.items()},
        **{f"val_{name}": value for name, value in val_scores.items()},
        "lr": step.lr,
        "skipped": step.end_epoch(),
    }


def write_history(history, path):
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0])
    writer.writeheader()
    for row in history:  # a class that no image has is without a score
        writer.writerow({name: value if value == value else "" for name, value in row.items()})
    with atomic_write(path) as file:
        file.write(table.getvalue().encode())


def print_epoch(history, num_epochs, better):
    """A line on the epoch that just ended."""
    row, width = history[-1], len(str(num_epochs))
    elapsed = sum(epoch["seconds"] for epoch in history)
    left = elapsed / len(history) * (num_epochs - len(history))
    validated = "no foreground in valid"
    if not math.isnan(row["val_dice"]):
        scores = ("acc", "dice", "iou")
        validated = " ".join(f"{name} {row[f'val_{name}']:.4f}" for name in scores)
    parts = [
        f"epoch {row['epoch']:>{width}}/{num_epochs}",
        f"train loss {row['train_loss']:.4f} acc {row['train_acc']:.4f} "
        f"dice {row['train_dice']:.4f}",
        f"val loss {row['val_loss']:.4f} {validated}",
        f"{row['images_per_second']:.0f} images/s",
        f"{timedelta(seconds=round(elapsed))} elapsed, {timedelta(seconds=round(left))} left",
    ]
    if better:
        parts.append("best")
    if row["skipped"]:
        parts.append(f"{row['skipped']} steps skipped: not finite")
    print(" | ".join(parts), flush=True)


def print_early_stop(progress, patience):
    print(
        f"stopping early: no lower validation loss since epoch {progress.best_epoch}; "
        f"--resume with a --patience above {patience} goes on"
    )


def log_values(row):
    """A row of the history under SwanLab's keys, the tutorial's among them."""
    values = {
        "train/epoch": row["epoch"],
        "train/lr": row["lr"],
        "perf/images_per_second": row["images_per_second"],
    }
    for name, value in row.items():
        split, _, score = name.partition("_")
        if split in ("train", "val") and name != "train_background_acc":
            values[f"{split}/{score}"] = value
    return values


def print_test(scores, class_names, inference):
    """The scores of the test, with masks made by an Inference, and of each of several classes."""
    if "loss" in scores:
        title = f"the best weights: loss {scores['loss']:.4f}, "
    else:
        title = f"{inference}, as chosen on valid: "
    print(f"test with {title}{_spell(scores, *SPELLED)}", flush=True)
    if "loss" in scores and not math.isnan(scores["acc"]):
        background = f"answering background everywhere scores {scores['background_acc']:.4f}"
        print(f"test accuracy {scores['acc']:.4f}; {background}", flush=True)
    for name in class_names if len(class_names) > 1 else ():
        own = {key: scores[f"{key}/{name}"] for key in ("dice", "iou", "precision", "recall")}
        print(f"  {name}: {_spell(own, *own, lacking='no image of it in test')}", flush=True)
    if "loss" in scores and scores["dice"] == 0 and scores["acc"] == scores["background_acc"]:
        print(
            "WARNING: the masks are empty, nothing was learned: --recipe auto chooses flags that "
            "suit the data set, with more --minutes for a longer run; look at the masks with "
            "data.py",
            file=sys.stderr,
            flush=True,
        )


def _spell(scores, *names, lacking="no foreground in test"):
    """'Dice 0.8000, IoU 0.6667', or what to say where there is no score."""
    if math.isnan(scores["dice"]):
        return lacking
    return ", ".join(f"{SPELLED[name]} {scores[name]:.4f}" for name in names)


def print_run(args, root, model, loaders, machine):
    """What is about to be trained or tested: images, device, size of the network, steps."""
    counts = ", ".join(f"{len(loader.rows)} {split}" for split, loader in loaders.items())
    world, weights = rank_and_world()[1], sum(weight.numel() for weight in model.parameters())
    processes = f"{world} x " if world > 1 else ""
    side = model.info.image_size
    sizes = f"{side}x{side}" if side else "their own size"
    cropped = f", trained on crops of {args.crop}x{args.crop}" if args.crop else ""
    print(
        f"{root}: {counts} images at {sizes}{cropped}; {processes}{machine}; "
        f"{weights:,} parameters; writing to {args.out}",
        flush=True,
    )
    if not args.test_only:
        _print_training(args, loaders)
    if RECIPES[args.recipe]:
        values = {name: getattr(args, name) for name in RECIPES[args.recipe]}
        print(f"recipe {args.recipe}: {spell_flags(values)}", flush=True)


def _print_training(args, loaders):
    """How many steps there will be, and of which classes; a warning where they are too few."""
    per_epoch = len(loaders["train"])
    steps = args.epochs * per_epoch
    print(f"{args.epochs} epochs of {per_epoch} steps, {steps} in all", flush=True)
    names = list(used_categories(loaders["valid"].dataset.coco))
    if args.recipe == "auto":  # the plan has told
        return
    if args.classes == "union" and len(names) > 1:
        print(
            f"the classes {listed(names)} are taken together as one foreground: --classes each "
            "keeps them apart",
            flush=True,
        )
    if steps < FEW_STEPS or per_epoch == 1:
        print(
            f"WARNING: {steps} steps, {per_epoch} an epoch, are few to learn from at a learning "
            f"rate of {args.lr:g}: give --recipe auto, or a smaller --batch-size and a larger "
            "--repeat or --epochs",
            flush=True,
        )


def list_skipped(lines, out):
    """Write what --skip-bad left out, if anything, to out/skipped.txt, a line for each image."""
    if not lines:
        return
    path = out / "skipped.txt"
    with atomic_write(path) as file:
        file.write("\n".join(["left out by train.py --skip-bad:", *lines, ""]).encode())
    print(f"{len(lines)} damaged images left out, listed in {path}", flush=True)
