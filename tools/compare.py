"""Reports of several runs on the same images, side by side: one table, one picture.

    python tools/compare.py runs/one-test runs/other-test
    python tools/compare.py runs/*/report.json --out runs

A report is the report.json that predict.py writes of a folder with annotations, or the folder that
it is in. Each run is compared with the first. The difference is that of the mean Dice of the
images, or of the groups (patients, volumes) where these are recorded, and its 95 % interval is a
paired bootstrap: images, or groups, are drawn with replacement, and the two runs compared on those
that were drawn. Where the interval excludes 0, the choice of images does not explain the
difference; another training of the same recipe may differ by more. compare.png, in the folder of
--out, shows the same.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from quality import table_row

from medseg.cli import ArgumentParser, output_folder, run_main
from medseg.files import read_json
from medseg.metrics import resamples
from medseg.own_files import check_outputs
from medseg.plots import as_drawn, new_figure, save_figure

NAMED = 3  # images with the largest gain, and with the largest loss, that are printed
HEADS = ("run", "threshold", "Dice", "per-{} Dice", "difference per {}", "better, same, worse")


class Run(NamedTuple):
    """A report: its folder, what it holds, and the Dice of each image or group."""

    name: str
    report: dict
    dice: np.ndarray


def read_report(path):
    """(name, content) of a report.json, or of that in a folder. Raises what `read_json` does."""
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    report = read_json(file)
    if not isinstance(report, dict) or not {"per_image", "scores"} <= report.keys():
        raise ValueError(
            f"{file}: no report; `python predict.py FOLDER --output OUT` writes one of a folder "
            "with annotations"
        )
    return str(file.parent), report


def read_runs(paths):
    """("image" or "group", their names, [Run]), each Dice in the order of these names.

    Groups are taken where all reports have the same ones. Raises ValueError where the reports are
    not of the same images.
    """
    reports = [read_report(path) for path in paths]
    first, images = reports[0][0], reports[0][1]["per_image"].keys()
    for name, report in reports[1:]:
        differing = sorted(images ^ report["per_image"].keys())
        if differing:
            raise ValueError(
                f"{len(differing)} images are in one of {first} and {name} alone "
                f"({', '.join(differing[:3])}, ...): predict the same folder with each model"
            )
    groups = reports[0][1].get("per_group", {}).keys()
    same = groups and all(report.get("per_group", {}).keys() == groups for _, report in reports)
    unit, names = ("group", groups) if same else ("image", images)
    runs = []
    for name, report in reports:
        values = report[f"per_{unit}"]
        runs.append(Run(name, report, np.array([values[one] for one in names], float)))
    return unit, list(names), runs


def compare(run, first):
    """(difference of each unit, its mean, low and high end of its 95 % interval)."""
    differences = run.dice - first.dice
    means = [differences[drawn].mean() for drawn in resamples(len(differences))]
    return differences, differences.mean(), *np.percentile(means, [2.5, 97.5])


def print_table(unit, runs, compared):
    """A row for each run, in Markdown; `compared` is of all but the first."""
    heads = [head.format(unit) for head in HEADS]
    print(f"{table_row(*heads)}\n{table_row(*['---'] * len(heads))}")
    for run, comparison in zip(runs, [None, *compared], strict=True):
        cells = [run.name, f"{run.report['threshold']:g}"]
        for score in ("dice", f"{unit}_dice"):
            value, interval = run.report["scores"][score], run.report["confidence_95"][score]
            known = value is not None and interval
            cells.append("{:.4f} [{:.4f}, {:.4f}]".format(value, *interval) if known else "none")
        if comparison:
            differences, mean, low, high = comparison
            signs = [int((np.sign(differences) == sign).sum()) for sign in (1, 0, -1)]
            cells += [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", ", ".join(map(str, signs))]
        else:
            cells += ["", ""]
        print(table_row(*cells))


def print_images(names, run, differences):
    """The images, or groups, that a run gained and lost most on."""
    order = np.argsort(-differences, kind="stable")
    gains = [index for index in order[:NAMED] if differences[index] > 0]
    losses = [index for index in order[::-1][:NAMED] if differences[index] < 0]
    for what, indices in (("gains", gains), ("losses", losses)):
        shown = ", ".join(f"{names[index]} {differences[index]:+.2f}" for index in indices)
        print(f"{run.name}, largest {what}: {shown or 'none'}")


def draw(unit, runs, compared, path):
    """Mean Dice of each run, its difference from the first, and both of each image or group."""
    figure = new_figure(16, max(4.5, 1.5 + 0.4 * len(runs)))
    scores, gaps, images = figure.subplots(1, 3)
    for place, (run, comparison) in enumerate(zip(runs, [None, *compared], strict=True)):
        color = f"C{place % 10}"
        interval = run.report["confidence_95"][f"{unit}_dice"] or [run.dice.mean()] * 2
        scores.plot(interval, [place, place], color=color)
        scores.plot(run.dice.mean(), place, "o", color=color)
        label, style = as_drawn(f"{run.name} ", ha="right", va="center")
        scores.text(0, place, label, transform=scores.get_yaxis_transform(), **style)
        if comparison:
            _, mean, low, high = comparison
            gaps.plot([low, high], [place, place], color=color)
            gaps.plot(mean, place, "o", color=color)
            images.plot(runs[0].dice, run.dice, ".", color=color, alpha=0.6)
    gaps.axvline(0, color="gray", linestyle="--")
    images.plot([0, 1], [0, 1], color="gray", linestyle="--")
    for axis in (scores, gaps):
        axis.set(yticks=[], ylim=(len(runs) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    scores.set(title=f"mean Dice of the {unit}s", xlabel="Dice, 95 % interval")
    gaps.set(title="difference from the first, paired", xlabel="difference of the means, 95 %")
    images.set(title=f"each {unit}", xlabel="Dice in the first", ylabel="Dice in the others")
    images.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return save_figure(figure, path)


def main():
    parser = ArgumentParser("tools/compare.py", __doc__)
    parser.add_argument("first", metavar="REPORT", help="report.json, or its folder")
    parser.add_argument("others", nargs="+", metavar="REPORT", help="what is compared with it")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="folder for compare.png")
    args = parser.parse_args()
    unit, names, runs = read_runs([args.first, *args.others])
    compared = [compare(run, runs[0]) for run in runs[1:]]
    path = output_folder(args.out) / "compare.png"
    check_outputs([path], "--out")
    print(f"{len(names)} {unit}s")
    print_table(unit, runs, compared)
    for run, comparison in zip(runs[1:], compared, strict=True):
        print_images(names, run, comparison[0])
    print(f"drawn: {draw(unit, runs, compared, path)}")


if __name__ == "__main__":
    run_main(main)
