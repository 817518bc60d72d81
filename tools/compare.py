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

import harness
import numpy as np

from medseg.cli import ArgumentParser, output_folder, run_main
from medseg.files import escape, read_json
from medseg.fonts import dejavu, drawable, fit_lines, pillow_font
from medseg.metrics import resamples
from medseg.own_files import check_outputs
from medseg.plots import as_drawn, new_figure, save_figure

NAMED = 3  # images with the largest gain, and with the largest loss, that are printed
SAME = ("class_names", "image_size")  # what runs have in common, as a rule; else a line says so


class Run(NamedTuple):
    """A report: what it is called, what it holds, the Dice of each unit in the order of names."""

    name: str
    report: dict
    dice: np.ndarray
    unit: str = "image"  # or "group"


class Difference(NamedTuple):
    """What a run has over another: of each unit, their mean, and its 95 % interval."""

    of_units: np.ndarray
    mean: float
    low: float
    high: float


def read_report(path):
    """(name, content) of a report.json, or of that in a folder.

    Raises FileNotFoundError; ValueError for what is no report.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        hint = "`python predict.py FOLDER --output OUT` writes one of a folder with annotations"
        raise FileNotFoundError(f"{file}: no such report; {hint}")
    report, number = read_json(file), (int, float)
    images = report.get("per_image") if isinstance(report, dict) else None
    lacks = not images or not isinstance(images, dict)
    if lacks or not all(type(dice) in number for dice in images.values()):
        raise ValueError(f"{file}: not a report of predict.py: no Dice of each image (per_image)")
    if not {"scores", "confidence_95", "threshold", *SAME} <= report.keys():
        raise ValueError(f"{file}: not a report of predict.py: some of its scores are missing")
    return str(path.parent if path == file and path.name == "report.json" else path), report


def read_runs(paths):
    """(names of the images or groups, [Run]), the Dice of every run in the order of these names.

    Groups are taken where all reports have the same ones. Raises ValueError where the reports are
    not of the same images.
    """
    reports = [read_report(path) for path in paths]
    first, names = reports[0][0], reports[0][1]["per_image"]
    for name, report in reports[1:]:
        own = report["per_image"]
        lacking, more = [n for n in names if n not in own], [n for n in own if n not in names]
        parts = []
        if lacking:
            parts.append(f"{_first(lacking)} of {first} in {name}")
        if more:
            parts.append(f"{_first(more)} of {name} in {first}")
        if parts:
            raise ValueError(
                f"not reports of the same images: missing are {' and '.join(parts)}; predict the "
                "same folder with each model"
            )
    groups, unit, runs = reports[0][1].get("per_group", {}), "image", []
    if groups and all(report.get("per_group", {}).keys() == groups.keys() for _, report in reports):
        names, unit = groups, "group"
    for name, report in reports:
        dice = np.array([report[f"per_{unit}"][one] for one in names], float)
        runs.append(Run(name, report, dice, unit))
    return list(names), runs


def _first(names):
    shown = ", ".join(escape(name) for name in names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"


def compare(run, first):
    """The Difference of a Run from the first one, by a paired bootstrap over the units."""
    of_units = run.dice - first.dice
    means = [of_units[drawn].mean() for drawn in resamples(len(of_units))]
    return Difference(of_units, of_units.mean(), *np.percentile(means, [2.5, 97.5]))


def print_table(runs, differences):
    """A row for each run, in Markdown; under `differences` those of all but the first."""
    unit = runs[0].unit
    heads = ("run", "size", "threshold", "Dice", f"per-{unit} Dice", "calibration error")
    print(harness.table_row(*heads, f"difference per {unit}", "better, same, worse"))
    print(harness.table_row(*["---"] * (len(heads) + 2)))
    for run, difference in zip(runs, [None, *differences], strict=True):
        report, cells = run.report, []
        for score in ("dice", f"{unit}_dice"):
            values = report["scores"][score], report["confidence_95"][score]
            if values[0] is None:  # no foreground
                cells.append("none")
            else:
                cells.append("{:.4f} [{:.4f}, {:.4f}]".format(values[0], *values[1]))
        error = report.get("calibration", {}).get("expected_calibration_error")
        cells.append("" if error is None else f"{error:.4f}")
        if difference:
            values = difference.of_units
            counts = ((values > 0).sum(), (values == 0).sum(), (values < 0).sum())
            interval = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
            cells += [f"{difference.mean:+.4f} {interval}", ", ".join(map(str, counts))]
        else:
            cells += ["", ""]
        size = report["image_size"] or "own"
        print(harness.table_row(escape(run.name), size, f"{report['threshold']:g}", *cells))


def print_images(names, run, difference):
    """The images, or groups, that a run gained and lost most on."""
    order = np.argsort(difference.of_units, kind="stable")
    for what, indices in (("gains", order[::-1][:NAMED]), ("losses", order[:NAMED])):
        sign = 1 if what == "gains" else -1
        values = [(escape(names[index]), difference.of_units[index]) for index in indices]
        shown = [f"{name} {value:+.2f}" for name, value in values if sign * value > 0]
        if shown:
            print(f"{escape(run.name)}, largest {what}: {', '.join(shown)}")


def draw(runs, differences, path):
    """Mean Dice of each run, its difference from the first, and both of each image or group."""
    unit = runs[0].unit
    figure = new_figure(16, max(4.5, 1.5 + 0.4 * len(runs)))
    scores, gaps, images = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    places, colors = range(len(runs)), [f"C{number % 10}" for number in range(len(runs))]
    intervals = [run.report["confidence_95"][f"{unit}_dice"] for run in runs]
    rows = zip(places, [run.dice.mean() for run in runs], intervals, colors, strict=True)
    for place, mean, interval, color in rows:
        if interval:
            scores.plot(interval, [place, place], color=color)
        scores.plot(mean, place, "o", color=color)
    for place, difference, color in zip(places[1:], differences, colors[1:], strict=True):
        gaps.plot([difference.low, difference.high], [place, place], color=color)
        gaps.plot(difference.mean, place, "o", color=color)
        images.plot(runs[0].dice, runs[place].dice, ".", color=color, alpha=0.6)
    gaps.axvline(0, color="gray", linestyle="--")
    images.plot([0, 1], [0, 1], color="gray", linestyle="--")
    names, path_of_font = drawable(*(run.name for run in runs))
    font = pillow_font(path_of_font or dejavu(), 10)
    labels = [fit_lines(name, font, 200, 1)[0] for name in names]
    for axis in (scores, gaps):
        axis.set(yticks=[], ylim=(len(runs) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    for place, label in enumerate(labels):  # labels of ticks would be taken for formulas
        label, style = as_drawn(f"{label} ", ha="right", va="center")
        scores.text(0, place, label, transform=scores.get_yaxis_transform(), **style)
    scores.set(title=f"mean Dice of the {unit}s", xlabel="Dice, 95 % interval")
    gaps.set(title="difference from the first, paired", xlabel="difference of the means, 95 %")
    first, style = as_drawn(f"Dice in {labels[0]}")
    images.set_xlabel(first, **style)
    images.set(title=f"each {unit}", ylabel="Dice in the others", xlim=(-0.02, 1.02))
    images.set(ylim=(-0.02, 1.02), aspect="equal")
    return save_figure(figure, path)


def main(argv=None):
    parser = ArgumentParser("tools/compare.py", __doc__)
    parser.add_argument("reports", nargs="+", metavar="REPORT", help="report.json, or its folder")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="folder for compare.png")
    args = parser.parse_args(argv)
    if len(args.reports) < 2:
        raise ValueError(f"{args.reports[0]}: one report is compared with nothing: name another")
    names, runs = read_runs(args.reports)
    differences = [compare(run, runs[0]) for run in runs[1:]]
    path = output_folder(args.out) / "compare.png"
    check_outputs([path], "--out")
    print(f"{len(names)} {runs[0].unit}s")
    print_table(runs, differences)
    for run, difference in zip(runs[1:], differences, strict=True):
        print_images(names, run, difference)
        for key in SAME:
            own, other = run.report[key], runs[0].report[key]
            if own != other:
                print(f"note: {key} of {escape(run.name)} is {own}, of {runs[0].name} {other}")
    print(f"drawn: {draw(runs, differences, path)}")


if __name__ == "__main__":
    run_main(main)
