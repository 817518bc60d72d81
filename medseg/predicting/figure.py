"""report.png: scores, charts and cases of a scored folder."""

import math
import re
import textwrap
from pathlib import Path

import numpy as np

from medseg import plots
from medseg.drawing import describe_shown
from medseg.fonts import dejavu, drawable
from medseg.inference import read_inference

MAX_GROUPS = 16  # whose names are written beside their Dice
MAX_SCORES = 14  # lines of the table in a report: more would run into the panels below
TABLE_WIDTH = 47  # characters of its lines
ROBOFLOW_SUFFIX = re.compile(r"_(jpe?g|png|bmp|tiff?|webp)\.rf\.[0-9a-f]{32}\.\w+$", re.IGNORECASE)


def plot_report(report, dice, cases, path):
    """Scores, charts and eight cases of a scored folder; returns `path`.

    report: what report.json holds; dice: (N,) of its images; cases: at most eight
    (picture, target, prediction, title).
    """
    rows = math.ceil(len(cases) / 4)  # of four cases, below a row of charts
    figure = plots.new_figure(20, 5 + 4.9 * rows)
    above, below = figure.add_gridspec(2, 1, height_ratios=(3, 4 * rows))
    widths = (5, 4, 4, 4, 4, 4) if "per_group" in report else (5, 4, 4, 4, 4)
    charts = above.subgridspec(1, len(widths), width_ratios=widths).subplots()
    table, histogram, sweep, calibration, sizes, *groups = charts
    axes = below.subgridspec(rows, 4).subplots(squeeze=False)
    _draw_score_table(table, report)
    histogram.hist(dice, bins=20, range=(0, 1))
    histogram.set(title="Dice of each image", xlabel="Dice", ylabel="images")
    plots.mark_whole_numbers(histogram.yaxis)
    _draw_threshold_sweep(sweep, report["valid"], report["threshold"])
    _draw_lesion_sizes(sizes, report["by_lesion_size"])
    for axis in groups:
        _draw_groups(axis, report["per_group"])
    classes, thin = plots.draw_cases(axes, cases)
    _draw_calibration(calibration, report["calibration"], classes)
    title = f"{report['folder']}, scored at the size of each image"
    title += describe_shown(report["channels"], ", ")
    plots.add_legend(figure, title, report["class_names"], classes, thin)
    return plots.save_figure(figure, path)


def spell_scores(report, digits):
    """{name: '0.77 [0.75, 0.79]', or '' where there is none} of the scores in a report."""
    texts = {}
    for name, value in report["scores"].items():
        texts[name] = ""
        if value is not None:
            low, high = report["confidence_95"][name]
            texts[name] = f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    return texts


def _draw_score_table(axis, report):
    lines = []
    for name, text in spell_scores(report, 3).items():
        score, _, class_name = name.partition("/")
        if not class_name or score == "dice":  # report.json has them all
            label = f"{plots.SCORE_LABELS.get(score, score)} {class_name}"
            lines.append(f"{label:<23.23} {text or 'none'}")
    if len(lines) > MAX_SCORES:
        more = len(lines) - MAX_SCORES + 1
        lines = [*lines[: MAX_SCORES - 1], f"and {more} more: report.json has them"]
    settings = read_inference(report)
    about = f"{settings}, {report['images']} images"
    drawn = f"{report['groups']} groups" if "groups" in report else "images"
    lines += ["", *textwrap.wrap(about, TABLE_WIDTH), f"95 % intervals: bootstrap over {drawn}"]
    unit, hd95, mean = report["distance_unit"], report["hd95"], report["surface_dice"]["mean"]
    if hd95["median"] is not None:
        lines.append(f"HD95 median {hd95['median']:.1f} {unit}, {hd95['left_out']} left out")
    if mean is not None:
        lines.append(f"surface Dice at {report['surface_tolerance']:g} {unit}: {mean:.3f}")
    lines, path = drawable(*lines)  # class names are among them
    font = {"family": "monospace"} if path in (None, dejavu()) else {"font": Path(path)}
    place = {"va": "top", "transform": axis.transAxes, "fontsize": 11, "parse_math": False}
    axis.text(0, 1, "\n".join(lines), **font, **place)
    axis.axis("off")


def _draw_calibration(axis, calibration, classes):
    """The reliability curves of these class indices; large points are of many pixels."""
    curves = list(calibration["classes"].values())
    axis.plot([0, 1], [0, 1], color="gray", linestyle="--")
    for index in classes:
        curve, color = curves[index], plots.outline_colors(len(curves))[index][1]
        x, y = curve["mean_probability"], curve["foreground"]
        size = 6 * np.log10(1 + np.array(curve["pixels"]))
        axis.plot(x, y, color=color, linewidth=1)
        axis.scatter(x, y, size, color=[color], clip_on=False, zorder=3)
    error = calibration["expected_calibration_error"]
    axis.set(title=f"calibration: expected error {error:.3f}", xlim=(0, 1), ylim=(0, 1))
    axis.set(xlabel="probability (15 bins of pixels)", ylabel="share of foreground")


def _draw_lesion_sizes(axis, groups):
    labels = []
    for group in groups:
        low, high = group["pixels"]
        sizes = f"{low}\nto {high}" if low < high else str(low)
        labels.append(f"{sizes}\n({group['images']})")
    axis.bar(labels, [group["image_dice"] for group in groups], width=0.8 * len(groups) / 3)
    axis.margins(x=0.1)
    axis.set(title="mean Dice by lesion size", xlabel="pixels (images)", ylim=(0, 1))


def _draw_groups(axis, dice):
    """A point for each group, {name: Dice}, from the lowest to the highest."""
    ranked = sorted(dice.items(), key=lambda item: item[1])
    axis.plot([value for _, value in ranked], range(len(ranked)), "o", clip_on=False, zorder=3)
    for place, (name, _) in enumerate(ranked if len(ranked) <= MAX_GROUPS else ()):
        shown, style = plots.as_drawn(f"{shorten_name(name, 20)} ", ha="right", va="center")
        axis.text(0, place, shown, transform=axis.get_yaxis_transform(), **style, fontsize=9)
    axis.set(title=f"Dice of each of {len(ranked)} groups", xlabel="Dice", xlim=(0, 1), yticks=[])
    axis.grid(alpha=0.3)


def _draw_threshold_sweep(axis, valid, threshold):
    """Dice on valid at each threshold; threshold: the one in use."""
    axis.set(title="Dice on valid", xlabel="threshold", ylabel="Dice", ylim=(0, 1))
    axis.axvline(threshold, color="gray", linestyle="--", label=f"in use: {threshold:g}")
    if valid is None:
        return axis.legend(title="no other split valid\nwith foreground")
    chosen, dice = valid["chosen_threshold"], valid["scores_with_it"]["dice"]
    shown = "none" if dice is None else f"{dice:.3f}"
    axis.plot(valid["thresholds"], valid["dice"], marker=".")
    axis.plot(chosen, max(valid["dice"]), "k*", label=f"best: {chosen:g}, here Dice {shown}")
    return axis.legend()


def choose_cases(names, dice, counts):
    """(index, title) of at most eight images: the two best with a hit, three median, three worst.

    Of few images fewer of each kind, and each image once. dice: (N,); counts: (N, 4), of all
    classes.
    """
    order = np.argsort(-dice, kind="stable")
    hits_first = order[np.argsort(counts[order, 0] == 0, kind="stable")]
    best = hits_first[: min(max(len(order) // 3, 1), 2)]
    rest = order[~np.isin(order, best)]
    middle, worst = np.split(rest, [len(rest) - min(len(order) // 2, 3)])
    median = middle[max(len(middle) - 3, 0) // 2 :][:3]
    cases = []
    for group, indices in {"best": best, "median": median, "worst": worst}.items():
        for index in indices:
            outcome = _describe_outcome(dice[index], *counts[index])
            (name,), _ = drawable(names[index])  # before it is cut: an escape takes six characters
            title = f"{shorten_name(name)}, {outcome}"
            cases.append((index, f"{group}: {title}" if len(names) > 1 else title))
    return cases


def _describe_outcome(dice, tp, fp, fn, tn):
    """What to say of an image, by its pixels of all classes."""
    if fp and not tp + fn:
        return "false alarm"
    if tp or not fn:
        return f"Dice {dice:.2f}"
    return "no overlap" if fp else "missed lesion"


def shorten_name(name, longest=28):
    """A file's name without what Roboflow adds on export, cut in the middle where it is long."""
    name = ROBOFLOW_SUFFIX.sub("", name)
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
