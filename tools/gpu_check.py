"""Whether a GPU trains as the CPU does: two epochs on phantoms on either, the losses compared.

    python tools/gpu_check.py                 # the first GPU
    python tools/gpu_check.py --device 1      # another
    python tools/gpu_check.py --device cpu    # the CPU with itself: that the check runs

Both are train.py's, in fp32, from the same weights, in the same order and without dropout, whose
random numbers differ. Exit status 1 where a loss differs by more than the tolerance.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# Rounding moves these losses by 1e-8 in fp32 and by 3e-5 in bf16, as a CPU shows; a GPU's fp32
# convolutions lie between, in TF32. A learning rate twice as high moves them by 3e-3 and more.
TOLERANCE = 1e-4
FLAGS = (
    *("--synthetic", "--epochs", "2", "--image-size", "64", "--n-filters", "8"),
    *("--batch-size", "16", "--lr", "1e-4", "--dropout", "none", "--precision", "fp32"),
    *("--swanlab", "disabled", "--overwrite"),
)


def train_on(device, place, name):
    """The rows of metrics.csv of a training on the device."""
    where = ("--data", place, "--out", place / name, "--device", device)
    status = subprocess.run([sys.executable, TRAIN, *FLAGS, *map(str, where)]).returncode
    if status:  # train.py has said why
        sys.exit(status)
    return list(csv.DictReader((place / name / "metrics.csv").read_text().splitlines()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="as train.py has it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = train_on("cpu", Path(place), "cpu")
        others = train_on(args.device, Path(place), "other")
    differences = []
    for row, other in zip(rows, others, strict=True):
        for name in ("train_loss", "val_loss"):
            one, two = float(row[name]), float(other[name])
            differences.append(abs(one - two))
            print(f"epoch {row['epoch']} {name:<10} {one:.7f} {two:.7f}  {abs(one - two):.1e}")
    for device, last in (("cpu", rows[-1]), (args.device, others[-1])):
        print(f"{device}: {float(last['images_per_second']):.0f} images/s in the second epoch")
    agree = all(difference <= TOLERANCE for difference in differences)  # not where one is NaN
    print(f"{args.device} and cpu {'agree' if agree else 'DO NOT agree'} (within {TOLERANCE:g})")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
