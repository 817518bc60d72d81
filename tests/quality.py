"""How good it is: recipes, splits and seeds trained and scored in turn, with a table at the end.

    python tests/quality.py --data dataset               # the tutorial's size, for a GPU: 256x256, 32 filters, 40 epochs
    python tests/quality.py --data dataset --rows ablation
    python tests/quality.py --data dataset --out runs/small --image-size 128 --n-filters 16 --epochs 12   # for a CPU

What this script does not know goes to train.py. It may be stopped at any time: the same command goes on from the last
checkpoint, and trains nothing twice. Everything is chosen on valid: the epoch by the loss, and the threshold.
"""
import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RECIPES = {"tutorial": ("--recipe", "tutorial"), "strong": ("--recipe", "strong")}
ABLATION = {name: (*RECIPES["strong"], *change) for name, change in {  # what strong is worth with one thing changed
    "strong": (),
    "no normalisation": ("--norm", "none"),
    "group normalisation": ("--norm", "group"),
    "no prior": ("--prior", "0"),
    "learning rate 1e-4": ("--lr", "1e-4"),
    "no weight decay": ("--weight-decay", "0"),
    "no warm-up": ("--warmup", "0"),
    "cosine": ("--schedule", "cosine"),
    "no averaging of weights": ("--ema", "0"),
    "no augmentation": ("--no-augment",),
    "Dice by image": ("--dice", "image"),
}.items()}
SHOWN = ("dice", "dice_chosen", "image_dice", "iou", "precision", "recall", "acc")


def call(*command):
    """Run a script of this repository, its output as it comes; SystemExit where it fails."""
    status = subprocess.run([sys.executable, *map(str, command)]).returncode
    if status:
        sys.exit(status)


def measure(data, folder, flags):
    """Train to the end in `folder`, score the best weights on test; what was done already is not done again."""
    if not (folder / "report.json").exists():
        if not (folder / "curves.png").exists():  # the last thing that train.py writes
            resume = ("--resume",) if any(folder.glob("last*.pth")) else ()
            call(ROOT / "train.py", "--data", data, "--out", folder, "--swanlab", "disabled", *flags, *resume)
        call(ROOT / "predict.py", data / "test", "--model", folder / "best_model.pth", "--output", folder)
        for checkpoint in folder.glob("last*.pth"):  # a gigabyte of each run at the tutorial's size
            checkpoint.unlink()
    report = json.loads((folder / "report.json").read_text())
    with open(folder / "metrics.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    valid = report["valid"]
    return {"epochs": len(seconds), "minutes": sum(seconds) / 60, **report["scores"], "dice_95": report["confidence_95"]["dice"],
            "chosen_threshold": valid["chosen_threshold"], "dice_chosen": valid["scores_with_it"]["dice"]}


def table(runs):
    """The runs as lines of Markdown: a row of each kind, mean over its seeds and, of several, from the least to the most."""
    lines = ["| split | row | Dice | Dice, threshold from valid | per-image Dice | IoU | precision | recall | accuracy | minutes |", "|---" * 10 + "|"]
    for split, name in dict.fromkeys((run["split"], run["row"]) for run in runs):
        own = [run for run in runs if (run["split"], run["row"]) == (split, name)]
        cells = []
        for key in SHOWN:
            values = [run[key] for run in own]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 and key in ("dice", "dice_chosen") else ""
            cells.append(f"{statistics.mean(values):.4f}" if key == "acc" else f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {split} | {name} | {' | '.join(cells)} | {statistics.mean(run['minutes'] for run in own):.1f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("dataset"))
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--rows", choices=("recipes", "ablation"), default="recipes")
    parser.add_argument("--splits", nargs="+", choices=("official", "grouped"), default=("official", "grouped"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    args, flags = parser.parse_known_args()

    import torch

    from data import grouped_split
    data = {"official": args.data, "grouped": args.out / "grouped"}
    if "grouped" in args.splits and not data["grouped"].exists():
        args.out.mkdir(parents=True, exist_ok=True)
        grouped_split(args.data, data["grouped"])
    rows, runs = RECIPES if args.rows == "recipes" else ABLATION, []
    machine = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "cores": os.cpu_count(),
               "torch": torch.__version__, "python": platform.python_version()}
    for seed in args.seeds:  # so that what a short time allows is a whole table
        for split in args.splits:
            for name, own in rows.items():
                folder = args.out / split / name.replace(" ", "_") / f"seed{seed}"
                runs.append({"split": split, "row": name, "seed": seed, **measure(data[split], folder, (*flags, *own, "--seed", seed))})
                (args.out / f"{args.rows}.json").write_text(json.dumps({"machine": machine, "flags": flags, "runs": runs}, indent=1))
    print(f"\n{table(runs)}\n\n{machine}, {' '.join(flags)}\nwritten to {args.out / f'{args.rows}.json'}")


if __name__ == "__main__":
    main()
