"""How good it is: recipes, data sets and seeds trained and scored in turn, with a table at the end.

    python tools/quality.py --data dataset                            # the tutorial's size: a GPU
    python tools/quality.py --data dataset grouped --rows ablation
    python tools/quality.py --data drive --rows vessels --seeds 0
    python tools/quality.py --data drive busi cells --rows plans --minutes 5
    python tools/quality.py --data dataset --image-size 128 --n-filters 16 --epochs 12   # a CPU

The tutorial's size is 256x256, 32 filters, 40 epochs. Flags that are not of this script go to
train.py. It may be stopped at any time: the same command resumes from the last checkpoint, and
trains nothing twice. Everything is chosen on valid: the epoch by the loss, and the threshold.
With --minutes, `--recipe auto` plans for this time, and the other rows get the number of epochs
that fit it, from the second epoch of a trial: let nothing else run beside it.
"""

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from medseg.cli import ArgumentParser  # noqa: E402  found by the line above

RECIPES = {"tutorial": ("--recipe", "tutorial"), "strong": ("--recipe", "strong")}
CHANGES = {  # one thing changed in strong
    "strong": (),
    "no normalisation": ("--norm", "none"),
    "group normalisation": ("--norm", "group"),
    "no prior": ("--prior", "0"),
    "learning rate 1e-4": ("--lr", "1e-4"),
    "no weight decay": ("--weight-decay", "0"),
    "no warm-up": ("--warmup", "0"),
    "cosine": ("--schedule", "cosine"),
    "no averaging of weights": ("--ema", "0"),
    "no augmentation": ("--augment", "none"),
}
NETWORKS = {  # with the tutorial's training, and with strong's
    **RECIPES,
    "drive": ("--arch", "drive"),
    "study": ("--arch", "study"),
    "drive, strong": ("--recipe", "strong", "--arch", "drive"),
    "study, strong": ("--recipe", "strong", "--arch", "study"),
}
WITHOUT_FLIP = "rotate=180,scale=0.1,contrast=0.1,brightness=0.1"
VESSEL_CHANGES = {  # one thing changed in vessels, for DRIVE
    "vessels": (),
    "loss bce": ("--loss", "bce"),
    "no flip": ("--augment", WITHOUT_FLIP),
    "no rotate": ("--augment", "scale=0.1,contrast=0.1,brightness=0.1,flip=1"),
    "elastic": ("--augment", f"{WITHOUT_FLIP},flip=1,elastic"),
    "gamma": ("--augment", f"{WITHOUT_FLIP},flip=1,gamma"),
    "whole images of 576x576": ("--crop", "0", "--image-size", "576", "--batch-size", "1"),
    "network drive": ("--arch", "drive", "--depth", "4"),
}
BY_HAND = ("--image-size", "128", "--n-filters", "16")
PLANS = {  # --recipe auto beside what a user who knows the flags would try
    "auto": ("--recipe", "auto"),
    "strong": ("--recipe", "strong", *BY_HAND),
    "vessels": ("--recipe", "vessels"),
    "by hand: strong, batch 8, cosine, flips": (
        *("--recipe", "strong", *BY_HAND, "--batch-size", "8", "--schedule", "cosine"),
        *("--augment", f"{WITHOUT_FLIP},flip"),
    ),
}
ROWS = {
    "recipes": RECIPES,
    "ablation": {name: (*RECIPES["strong"], *change) for name, change in CHANGES.items()},
    "networks": NETWORKS,
    "vessels": {name: ("--recipe", "vessels", *flags) for name, flags in VESSEL_CHANGES.items()},
    "plans": PLANS,
}
COLUMNS = {  # of the table, by their name in a report
    "dice": "Dice",
    "dice_chosen": "Dice, threshold from valid",
    "image_dice": "per-image Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "acc": "accuracy",
}


def describe_machine():
    """Processor, cores, GPU and versions, as a dict for JSON."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def table_row(*cells):
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def call(name, *arguments):
    """Run a script of this repository; SystemExit where it fails."""
    status = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)]).returncode
    if status:
        sys.exit(status)


def train(data, folder, flags):
    """Train in `folder`, or go on there; returns the seconds of each epoch."""
    # Before its first checkpoint, a run that was killed may have left weights.
    restart = "--resume" if any(folder.glob("last*.pth")) else "--overwrite"
    call("train.py", "--data", data, "--out", folder, "--swanlab", "disabled", *flags, restart)
    with open(folder / "metrics.csv") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)]


def fit_epochs(data, folder, flags, minutes):
    """The flags with those that make a training take some minutes."""
    if "auto" in flags:
        return (*flags, "--minutes", minutes)
    seconds = train(data, folder / "trial", (*flags, "--epochs", 2, "--patience", 2))[-1]
    epochs = max(int(60 * minutes / seconds), 1)
    return (*flags, "--epochs", epochs, "--patience", epochs)


def measure(data, folder, flags, minutes):
    """Train in `folder` and score the best weights on test, unless that has been done already."""
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text())
    resumes = any(folder.glob("last*.pth"))
    if minutes and not resumes:
        flags = fit_epochs(data, folder, flags, minutes)
    # The last thing that train.py writes is curves.png.
    if not (folder / "curves.png").exists():
        train(data, folder, () if resumes else flags)
    call("predict.py", data / "test", "--model", folder / "best_model.pth", "--output", folder)
    for checkpoint in folder.rglob("last*.pth"):  # a gigabyte of each run at the tutorial's size
        checkpoint.unlink()
    report = json.loads((folder / "report.json").read_text())
    with open(folder / "metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    chosen = report["valid"]["scores_with_it"]["dice"]
    result = {**report["scores"], "dice_chosen": chosen, "minutes": sum(seconds) / 60}
    (folder / "result.json").write_text(json.dumps(result))
    return result


def cell(key, values):
    """The mean of a score over the seeds and, for Dice, from the least to the most."""
    if key == "acc":
        return f"{statistics.mean(values):.4f}"
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1 and key in ("dice", "dice_chosen"):
        text += f" ({min(values):.3f} to {max(values):.3f})"
    return text


def table(runs):
    """The runs as lines of Markdown: a line for each data set and row of flags."""
    header = ("data", "row", *COLUMNS.values(), "minutes")
    lines = [table_row(*header), "|---" * len(header) + "|"]
    for data, name in dict.fromkeys((run["data"], run["row"]) for run in runs):
        own = [run for run in runs if (run["data"], run["row"]) == (data, name)]
        cells = [cell(key, [run[key] for run in own]) for key in COLUMNS]
        minutes = statistics.mean(run["minutes"] for run in own)
        lines.append(table_row(data, name, *cells, f"{minutes:.1f}"))
    return "\n".join(lines)


def main():
    parser = ArgumentParser("tools/quality.py", __doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", default=[Path("dataset")], help="one or more data sets")
    add("--out", type=Path, default=Path("runs/quality"), help="folder of the runs")
    add("--rows", choices=ROWS, default="recipes", help="which rows of flags to train")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run of each row for each")
    add("--minutes", type=float, default=0.0, help="for each training; 0: as its flags say")
    args, flags = parser.parse_known_args()
    runs, machine = [], describe_machine()
    for seed in args.seeds:  # outermost, so that every row has a result soon
        for data in args.data:
            for name, own in ROWS[args.rows].items():
                folder = args.out / data.name / re.sub(r"\W+", "_", name) / f"seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                result = measure(data, folder, (*flags, *own, "--seed", seed), args.minutes)
                runs.append({"data": data.name, "row": name, "seed": seed, **result})
                content = {"machine": machine, "flags": flags, "runs": runs}
                (args.out / f"{args.rows}.json").write_text(json.dumps(content, indent=1))
    print(f"\n{table(runs)}\n\n{machine}, {' '.join(flags)}")


if __name__ == "__main__":
    main()
