"""The tutorial's own program and this one, trained at a reduced size with the same recipe.

    python tools/side_by_side.py --tutorial DIR --data dataset --out runs/side --seeds 0 1 2

DIR holds the tutorial's net.py, data.py, train.py and a swanlab.py that prints what is logged as
lines of TUTORIAL and JSON. Of its text only the sizes change.
Each run is in a folder of its own, OUT/tutorial64_s0 or OUT/ours64_s0, and one that is complete is
not run again. Then the best weights of both are scored on the test images with the masks of either
program, and OUT/side_by_side.png has the curves.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from quality import ROOT, table_row

from data import open_split
from medseg.cli import ArgumentParser, number, run_main
from medseg.metrics import RunningScores
from medseg.plots import new_figure, save_figure
from net import load_model

CHANGES = {  # {file: [(text of the tutorial, what takes its place)]}
    "data.py": [("size=(256, 256)", "size=({size}, {size})")],
    "train.py": [
        ("transforms.Resize((256, 256))", "transforms.Resize(({size}, {size}))"),
        ("UNet(n_filters=32)", "UNet(n_filters={filters})"),
    ],
}
COLORS = {"tutorial": "C1", "ours": "C0"}
SEEDED = (
    "import random, runpy, sys, torch; sys.path.insert(0, '.'); "
    "torch.manual_seed({seed}); random.seed({seed}); "
    "runpy.run_path('train.py', run_name='__main__')"
)


def lay_out_tutorial(source, target, args):
    """Copy the tutorial's program at the size of `args`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("dataset", "*.pth"))
    (target / "dataset").symlink_to(args.data.resolve())
    for name, pairs in CHANGES.items():
        text = (target / name).read_text()
        for old, new in pairs:
            if text.count(old) != 1:
                raise ValueError(f"{source / name}: has {old!r} {text.count(old)} times, not once")
            text = text.replace(old, new.format(size=args.image_size, filters=args.n_filters))
        (target / name).write_text(text)


def run_once(place, command, epochs):
    """Run a training whose output goes to place/log; place/done says that it is complete."""
    environment = {**os.environ, "EPOCHS": str(epochs)}  # of the tutorial's program
    with open(place / "log", "a") as log:
        subprocess.run(command, cwd=place, env=environment, check=True, stdout=log, stderr=log)
    (place / "done").touch()


def train_both(args, seed):
    """The two folders of a seed, trained where they are not yet."""
    run = f"{args.image_size}_s{seed}"
    theirs, ours = args.out / f"tutorial{run}", args.out / f"ours{run}"
    if not (theirs / "done").exists():
        shutil.rmtree(theirs, ignore_errors=True)
        lay_out_tutorial(args.tutorial, theirs, args)
        run_once(theirs, [sys.executable, "-c", SEEDED.format(seed=seed)], args.epochs)
    if not (ours / "done").exists():
        ours.mkdir(parents=True, exist_ok=True)
        sizes = ("--image-size", args.image_size, "--n-filters", args.n_filters)
        flags = ("--data", args.data, *sizes, "--seed", seed, "--epochs", args.epochs)
        flags += ("--precision", "fp32", "--swanlab", "disabled")
        flags += ("--resume",) if (ours / "last.pth").exists() else ("--overwrite",)
        run_once(ours, [sys.executable, ROOT / "train.py", *map(str, flags)], args.epochs)
    return theirs, ours


def read_test_images(args):
    """Images (N, 3, S, S) of the test split, and its masks (N, 1, S, S) as either program has them.

    Where this one takes the pixel under the centre of a new one, the tutorial takes its corner.
    """
    size, dataset = args.image_size, open_split(args.data, "test", args.image_size)
    centres, corners = ([dataset[index] for index in range(len(dataset))], [])
    for index in range(len(dataset)):
        _, masks = dataset.load(index)
        rows, columns = (torch.arange(size) * side // size for side in masks.shape[1:])
        corners.append(torch.from_numpy(masks)[:, rows][:, :, columns].float())
    images, masks = map(torch.stack, zip(*centres, strict=True))
    return images, {"our": masks, "the tutorial's": torch.stack(corners)}


def scores_of(model, images, masks):
    """(Dice, accuracy) of the pixels of all images."""
    scores = RunningScores("cpu")
    with torch.inference_mode():
        for batch, targets in zip(images.split(32), masks.split(32), strict=True):
            scores.add(torch.zeros(()), model.eval()(batch), targets)
    result = scores.result()
    return result["dice"], result["acc"]


def read_curves(place):
    """{column of metrics.csv: a value for each epoch} of a run of either program."""
    if (place / "metrics.csv").exists():
        rows = list(csv.DictReader((place / "metrics.csv").open()))
    else:
        logged = [line.split("TUTORIAL ") for line in (place / "log").read_text().splitlines()]
        values = [json.loads(line[1]) for line in logged if len(line) == 2]
        rows = [{key.replace("/", "_"): one[key] for key in one} for one in values if one["step"]]
    names = ("train_loss", "val_loss", "train_acc", "val_acc")
    return {name: [float(row[name]) for row in rows] for name in names}


def draw(places, path, title):
    """Losses and accuracies of all runs over the epochs; places: [(tutorial's, ours)]."""
    figure = new_figure(11, 4.5)
    axes = dict(zip(("loss", "acc"), figure.subplots(1, 2), strict=True))
    for (label, color), runs in zip(COLORS.items(), zip(*places, strict=True), strict=True):
        for place in runs:
            for name, values in read_curves(place).items():
                split, quantity = name.split("_")
                style = "--" if split == "train" else "-"
                said = f"{label}, {split}" if place == runs[0] else None
                epochs = range(1, len(values) + 1)
                axes[quantity].plot(epochs, values, style, color=color, linewidth=1, label=said)
    for quantity, axis in axes.items():
        axis.set(xlabel="epoch", ylabel="loss" if quantity == "loss" else "pixel accuracy")
        axis.grid(alpha=0.3)
    axes["acc"].set_ylim(0.9, 0.98)
    axes["loss"].legend()
    figure.suptitle(title)
    return save_figure(figure, path)


def main():
    parser = ArgumentParser("tools/side_by_side.py", __doc__)
    add = parser.add_argument
    add("--tutorial", type=Path, required=True, help="folder with the tutorial's program")
    add("--data", type=Path, default=Path("dataset"), help="the data set")
    add("--out", type=Path, default=Path("runs/side"), help="folder of the runs")
    add("--image-size", type=number(32), default=64, help="pixels a side")
    add("--n-filters", type=number(1), default=8, help="channels of the first level")
    add("--epochs", type=number(1), default=40, help="most epochs")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each program for each")
    args = parser.parse_args()
    args.tutorial, args.data = args.tutorial.resolve(), args.data.resolve()
    args.out = args.out.resolve()
    places = [train_both(args, seed) for seed in args.seeds]
    images, masks = read_test_images(args)
    print(table_row("run", *(f"Dice, accuracy with {who} masks" for who in masks)))
    for place in [place for pair in zip(*places, strict=True) for place in pair]:
        model = load_model(place / "best_model.pth")
        found = [scores_of(model, images, own) for own in masks.values()]
        print(table_row(place.name, *(f"{dice:.3f}, {acc:.4f}" for dice, acc in found)), flush=True)
    title = f"{args.image_size}x{args.image_size} pixels, {args.n_filters} filters, seeds "
    path = args.out / "side_by_side.png"
    print(draw(places, path, title + ", ".join(map(str, args.seeds))))


if __name__ == "__main__":
    run_main(main)
