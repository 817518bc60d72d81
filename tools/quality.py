"""How good it is: recipes, splits and seeds trained and scored in turn, with a table at the end.

    python tools/quality.py --data dataset               # the tutorial's size, for a GPU
    python tools/quality.py --data dataset --rows ablation
    python tools/quality.py --data drive --rows vessels --splits official --seeds 0
    python tools/quality.py --data dataset --image-size 128 --n-filters 16 --epochs 12   # a CPU

The tutorial's size is 256x256, 32 filters, 40 epochs. Flags that are not of this script go to
train.py. It may be stopped at any time: the same command resumes from the last checkpoint, and
trains nothing twice. Everything is chosen on valid: the epoch by the loss, and the threshold.
"""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from harness import ROOT, describe_machine, table_row

from medseg.cli import ArgumentParser

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
ABLATION = {name: (*RECIPES["strong"], *change) for name, change in CHANGES.items()}
NETWORKS = {  # with the tutorial's training, and with strong's
    **RECIPES,
    "drive": ("--arch", "drive"),
    "study": ("--arch", "study"),
    "drive, strong": ("--recipe", "strong", "--arch", "drive"),
    "study, strong": ("--recipe", "strong", "--arch", "study"),
}
WITHOUT_FLIP = "rotate=180,scale=0.1,contrast=0.1,brightness=0.1"
WITHOUT_ROTATE = "scale=0.1,contrast=0.1,brightness=0.1,flip=1"
VESSEL_CHANGES = {  # one thing changed in vessels, for DRIVE
    "vessels": (),
    "loss bce": ("--loss", "bce"),
    "loss bce=0.5,dice=1": ("--loss", "bce=0.5,dice=1"),
    "loss dice,focal=20": ("--loss", "dice,focal=20"),
    "no flip": ("--augment", WITHOUT_FLIP),
    "no rotate": ("--augment", WITHOUT_ROTATE),
    "no augmentation": ("--augment", "none"),
    "elastic": ("--augment", f"{WITHOUT_FLIP},flip=1,elastic"),
    "gamma": ("--augment", f"{WITHOUT_FLIP},flip=1,gamma"),
    "crop 64, batch 32": ("--crop", "64", "--batch-size", "32"),
    "whole images of 576x576": ("--crop", "0", "--image-size", "576", "--batch-size", "1"),
    "5 levels": ("--depth", "5"),
    "network drive": ("--arch", "drive", "--depth", "4"),
    "network study": ("--arch", "study", "--depth", "4", "--dropout", "channels"),
}
VESSELS = {name: ("--recipe", "vessels", *change) for name, change in VESSEL_CHANGES.items()}
ROWS = {"recipes": RECIPES, "ablation": ABLATION, "networks": NETWORKS, "vessels": VESSELS}

COLUMNS = {  # of the table, by their name in a report
    "dice": "Dice",
    "dice_chosen": "Dice, threshold from valid",
    "image_dice": "per-image Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "acc": "accuracy",
}


def call(*command):
    """Run a script of this repository; SystemExit where it fails."""
    status = subprocess.run([sys.executable, *map(str, command)]).returncode
    if status:
        sys.exit(status)


def measure(data, folder, flags):
    """Train in `folder` and score the best weights on test, unless that has been done already."""
    from net import load_model

    weights = folder / "best_model.pth"
    if not (folder / "report.json").exists():
        if not (folder / "curves.png").exists():  # the last thing that train.py writes
            # Before its first checkpoint, a run that was killed may have left weights.
            can_resume = any(folder.glob("last*.pth"))
            restart = "--resume" if can_resume else "--overwrite"
            command = ("--data", data, "--out", folder, "--swanlab", "disabled", *flags, restart)
            call(ROOT / "train.py", *command)
        call(ROOT / "predict.py", data / "test", "--model", weights, "--output", folder)
        for checkpoint in folder.glob("last*.pth"):  # a gigabyte of each run at the tutorial's size
            checkpoint.unlink()
    report = json.loads((folder / "report.json").read_text())
    with open(folder / "metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    valid = report["valid"]
    return {
        "epochs": len(seconds),
        "minutes": sum(seconds) / 60,
        "parameters": sum(weight.numel() for weight in load_model(weights).parameters()),
        **report["scores"],
        "dice_95": report["confidence_95"]["dice"],
        "chosen_threshold": valid["chosen_threshold"],
        "dice_chosen": valid["scores_with_it"]["dice"],
    }


def cell(key, values):
    """The mean of a score over the seeds and, for Dice, from the least to the most."""
    if key == "acc":
        return f"{statistics.mean(values):.4f}"
    text = f"{statistics.mean(values):.3f}"
    if len(values) > 1 and key in ("dice", "dice_chosen"):
        text += f" ({min(values):.3f} to {max(values):.3f})"
    return text


def table(runs):
    """The runs as lines of Markdown: a line for each split and row of flags."""
    header = ("split", "row", *COLUMNS.values(), "parameters", "minutes")
    lines = [table_row(*header), "|---" * len(header) + "|"]
    for split, name in dict.fromkeys((run["split"], run["row"]) for run in runs):
        own = [run for run in runs if (run["split"], run["row"]) == (split, name)]
        cells = [cell(key, [run[key] for run in own]) for key in COLUMNS]
        minutes = statistics.mean(run["minutes"] for run in own)
        lines.append(table_row(split, name, *cells, f"{own[0]['parameters']:,}", f"{minutes:.1f}"))
    return "\n".join(lines)


def get_args(argv):
    """(this script's own flags, those for train.py)."""
    parser = ArgumentParser("tools/quality.py", __doc__)
    splits = ("official", "grouped")
    parser.add_argument("--data", type=Path, default=Path("dataset"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--rows", choices=ROWS, default="recipes")
    parser.add_argument("--splits", nargs="+", choices=splits, default=splits)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    return parser.parse_known_args(argv)


def main(argv=None):
    from medseg.splits import grouped_split

    args, flags = get_args(argv)

    data = {"official": args.data, "grouped": args.out / "grouped"}
    if "grouped" in args.splits and not data["grouped"].exists():
        args.out.mkdir(parents=True, exist_ok=True)
        grouped_split(args.data, data["grouped"])
    machine = describe_machine()
    written, runs = args.out / f"{args.rows}.json", []
    for seed in args.seeds:  # outermost, so that every row has a result soon
        for split in args.splits:
            for name, own in ROWS[args.rows].items():
                folder = args.out / split / name.replace(" ", "_") / f"seed{seed}"
                result = measure(data[split], folder, (*flags, *own, "--seed", seed))
                runs.append({"split": split, "row": name, "seed": seed, **result})
                content = {"machine": machine, "flags": flags, "runs": runs}
                written.write_text(json.dumps(content, indent=1))
    print(f"\n{table(runs)}\n\n{machine}, {' '.join(flags)}\nwritten to {written}")


if __name__ == "__main__":
    main()
