"""How good the plans are: --recipe auto beside other flags, on many data sets, for the same time.

    python tools/plan.py SETS --minutes 5                    # every data set in the folder SETS
    python tools/plan.py SETS --sets drive --rows auto --seeds 0

A data set is a folder with train/, valid/ and test/, as download.py writes it. The other rows get
the number of epochs that fit the time, from the second epoch of a trial. Scores are those of the
masks that predict.py writes, at the images' own size. It may be stopped at any time: the same
command goes on, and trains nothing twice. Let nothing else run beside it: what a plan can do in
some minutes depends on the machine.
"""

import csv
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from harness import ROOT, describe_machine, run, table_row

from medseg.cli import ArgumentParser, number

SMALL = ("--image-size", 128, "--n-filters", 16)
FREE = "rotate=180,scale=0.1,contrast=0.1,brightness=0.1,flip"
TURNED = "rotate=15,scale=0.2,shift=0.05,contrast=0.2,brightness=0.2"
ROWS = {
    "auto": ("--recipe", "auto"),
    "strong": ("--recipe", "strong", *SMALL),
    "vessels": ("--recipe", "vessels"),
    # What a user who knows the flags would try.
    "by hand: strong, small batches, flips": (
        *("--recipe", "strong", *SMALL, "--batch-size", 8, "--schedule", "cosine"),
        *("--augment", FREE),
    ),
    "by hand: vessels, wider crops": ("--recipe", "vessels", "--crop", 192, "--depth", 4),
    "by hand: from tumor.pth": (
        *("--init", ROOT / "dataset" / "tumor.pth", "--lr", 1e-3, "--batch-size", 8),
        *("--schedule", "cosine", "--augment", TURNED),
    ),
}


def train(data, out, flags):
    """Run train.py; returns the seconds of each epoch."""
    command = (ROOT / "train.py", "--data", data, "--out", out, "--overwrite", *flags)
    run([sys.executable, *command, "--swanlab", "disabled"])
    with open(out / "metrics.csv") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def classes_of(data):
    """The flag for the classes of a data set: each its own output where images have several."""
    from medseg.planning.fingerprint import take_fingerprint

    return ("--classes", "each") if take_fingerprint(data).together else ()


def measure(data, folder, flags, minutes):
    """Train in `folder` for some minutes and score the masks, unless that has been done already."""
    done = folder / "scores.json"
    if done.exists():
        return json.loads(done.read_text())
    started = time.perf_counter()
    if "auto" in flags:
        flags = (*flags, "--minutes", minutes)
    else:
        flags = (*flags, *classes_of(data))
        trial = train(data, folder, (*flags, "--epochs", 2, "--patience", 2))[-1]
        started = time.perf_counter()
        epochs = max(int(60 * minutes / trial), 1)
        flags = (*flags, "--epochs", epochs, "--patience", epochs)
    epochs = train(data, folder, flags)
    wall = time.perf_counter() - started
    for checkpoint in folder.glob("last*.pth"):
        checkpoint.unlink()
    scores = {"epochs": len(epochs), "minutes": wall / 60}
    for split in ("valid", "test"):
        scores[split] = score(data, split, folder / "best_model.pth", folder / split)
    done.write_text(json.dumps(scores))
    return scores


def score(data, split, weights, masks):
    """Dice of the masks that predict.py writes, pooled over a split, the mean over the classes."""
    import numpy as np
    from PIL import Image

    from data import open_split
    from net import load_model

    command = (ROOT / "predict.py", data / split, "--model", weights, "--output", masks)
    run([sys.executable, *command])
    model = load_model(weights)
    classes = list(model.info.class_names) if model.n_classes > 1 else None
    dataset, sums = open_split(data, split, classes=classes), np.zeros((model.n_classes, 2))
    for index in range(len(dataset)):
        path = dataset.path(index)
        labels = np.asarray(Image.open(masks / f"{path.stem}_mask.png"))
        if classes is None:
            labels = labels > 0
        _, targets = dataset.load(index)
        for label, target in enumerate(targets, 1):
            pred = labels == label
            sums[label - 1] += 2 * (pred & (target > 0)).sum(), pred.sum() + target.sum()
    shutil.rmtree(masks)
    return float((sums[:, 0] / np.maximum(sums[:, 1], 1)).mean())


def table(runs, sets):
    """The Dice of the test splits as lines of Markdown: a row for each, a column for each set."""
    lines = [table_row("flags", *sets), "|---" * (len(sets) + 1) + "|"]
    for row in dict.fromkeys(own["row"] for own in runs):
        cells = []
        for name in sets:
            dice = [own["test"] for own in runs if (own["row"], own["set"]) == (row, name)]
            text = f"{statistics.mean(dice):.3f}" if dice else ""
            if len(dice) > 1:
                text += f" ({min(dice):.3f} to {max(dice):.3f})"
            cells.append(text)
        lines.append(table_row(row, *cells))
    return "\n".join(lines)


def main(argv=None):
    parser = ArgumentParser("tools/plan.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="SETS", help="holds a folder for each data set")
    add("--out", type=Path, default=Path("runs/plan"))
    add("--minutes", type=number(0.1, type=float), default=5.0, help="for each training")
    add("--sets", nargs="+", metavar="NAME", help="default: all folders in SETS")
    add("--rows", nargs="+", choices=ROWS, default=tuple(ROWS), metavar="ROW")
    add(
        "--seeds", type=int, nargs="+", default=(0, 1, 2), help="of auto; other rows have the first"
    )
    args = parser.parse_args(argv)
    found = sorted(path.parent.name for path in args.folder.glob("*/train"))
    sets, runs, machine = args.sets or found, [], describe_machine()
    for seed in args.seeds:
        for row in args.rows if seed == args.seeds[0] else {"auto"} & set(args.rows):
            for name in sets:
                folder = args.out / name / row.replace(" ", "_") / f"seed{seed}"
                scores = measure(
                    args.folder / name, folder, (*ROWS[row], "--seed", seed), args.minutes
                )
                runs.append({"set": name, "row": row, "seed": seed, **scores})
                print(f"{name}, {row}, seed {seed}: test Dice {scores['test']:.4f}", flush=True)
                content = {"machine": machine, "minutes": args.minutes, "runs": runs}
                (args.out / "plan.json").write_text(json.dumps(content, indent=1))
    print(f"\n{table(runs, sets)}\n\n{machine}\nwritten to {args.out / 'plan.json'}")


if __name__ == "__main__":
    main()
