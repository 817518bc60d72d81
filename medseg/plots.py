"""Every figure drawn with matplotlib: predictions, curves, the report of a folder."""

import math
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.images import MEAN, STD

# Blue and orange of Okabe and Ito's palette: red-green blind readers tell them apart, and the
# prediction is dashed besides.
TARGET_COLOR, PRED_COLOR = "#56B4E9", "#E69F00"


def new_figure(width, height):
    """An empty figure, in inches. Not by pyplot, which looks for a screen and keeps figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure as a PNG of 80 pixels an inch that is whole or absent; returns `path`."""
    with atomic_write(Path(path), sync=False) as file:
        figure.savefig(file, dpi=80, format="png")
    return path


def denormalize(images):
    """float32 tensor (B, 3, H, W) normalised by MEAN and STD -> array (B, H, W, 3) of 0..1."""
    return (images.permute(0, 2, 3, 1).cpu().numpy() * STD + MEAN).clip(0, 1)


def draw_outline(axis, mask, color, style):
    """Draw the outline of a bool array (H, W) over the image that an axis shows."""
    if mask.any():
        height, width = mask.shape
        columns, rows = np.arange(-1, width + 1), np.arange(-1, height + 1)
        padded = np.pad(mask, 1).astype(float)  # an outline at the border is closed there
        axis.contour(columns, rows, padded, [0.5], colors=color, linestyles=style, linewidths=1.8)


def draw_case(axis, picture, target, pred, title):
    """Show a picture with the outlines of target and prediction, bool arrays (H, W)."""
    axis.imshow(picture)
    draw_outline(axis, target, TARGET_COLOR, "solid")
    draw_outline(axis, pred, PRED_COLOR, "dashed")
    axis.set_title(title, fontsize=12)
    axis.axis("off")


def add_legend(figure, title):
    """Title and, below the panels, which outline is which."""
    from matplotlib.lines import Line2D

    figure.suptitle(title, fontsize=13)
    lines = [
        Line2D([], [], color=TARGET_COLOR, linestyle="solid", linewidth=2, label="true outline"),
        Line2D([], [], color=PRED_COLOR, linestyle="dashed", linewidth=2, label="prediction"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=12)


def plot_predictions(pictures, targets, preds, titles, path, *, title):
    """Pictures (0..1 or uint8) with both outlines, five in a row; returns `path`."""
    columns = min(len(pictures), 5)
    rows = math.ceil(len(pictures) / columns)
    figure = new_figure(4 * columns, 4.2 * rows + 1)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, *case in zip(axes.flat, pictures, targets, preds, titles, strict=False):
        draw_case(axis, *case)
    add_legend(figure, title)
    return save_figure(figure, path)


def plot_curves(history, path, *, title=""):
    """Loss, overlap and accuracy over the epochs of a history, see train_model; returns `path`."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(15, 4.2)
    panels = figure.subplots(1, 3)
    groups = {
        "Dice + BCE loss": ("train_loss", "val_loss"),
        "foreground overlap": ("train_dice", "val_dice", "val_iou"),
        "pixel accuracy": ("train_acc", "val_acc"),
    }
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 20 else None
    for axis, (name, keys) in zip(panels, groups.items(), strict=True):
        for key in keys:
            values = [row[key] for row in history]
            axis.plot(epochs, values, label=key.replace("_", " "), marker=marker)
        axis.set(title=name, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    best = min(history, key=lambda row: row["val_loss"])
    label = f"best weights (epoch {best['epoch']})"
    panels[0].plot(best["epoch"], best["val_loss"], "k*", markersize=11, label=label)
    panels[1].set_ylim(0, 1)
    background = history[0]["val_background_acc"]
    panels[2].axhline(background, color="gray", linestyle="--", label="all background (val)")
    for axis in panels:
        axis.legend()
    figure.suptitle(title)
    return save_figure(figure, path)


def plot_report(report, dice, cases, path):
    """Scores, histogram, threshold sweep, lesion sizes and eight cases of a scored folder.

    report: what report.json holds; dice: (N,) of its images; cases: at most eight
    (picture, target, prediction, title).
    """
    figure = new_figure(18, 14)
    axes = figure.subplots(3, 4, height_ratios=(3, 4, 4))
    table, histogram, sweep, sizes = axes[0]
    _draw_score_table(table, report)
    histogram.hist(dice, bins=20, range=(0, 1))
    histogram.set(title="Dice of each image", xlabel="Dice", ylabel="images")
    _draw_threshold_sweep(sweep, report["valid"])
    labels, heights = [], []
    for group in report["by_lesion_size"]:
        low, high = group["pixels"]
        labels.append(f"{low} to {high}\n({group['images']})")
        heights.append(group["image_dice"])
    sizes.bar(labels, heights)
    sizes.set(title="mean Dice by lesion size", xlabel="pixels (images)", ylim=(0, 1))
    for axis in axes[1:].flat:
        axis.axis("off")
    for axis, case in zip(axes[1:].flat, cases, strict=False):
        draw_case(axis, *case)
    size = report["image_size"]
    add_legend(figure, f"{report['folder']}, scored at {size}x{size}")
    return save_figure(figure, path)


def _draw_score_table(axis, report):
    lines = []
    for name, value in report["scores"].items():
        low, high = report["confidence_95"][name]
        lines.append(f"{name:<14} {value:.3f}  [{low:.3f}, {high:.3f}]")
    distance = report["hd95"]["median"]
    hd95 = "HD95: no image has both masks"
    if distance is not None:
        hd95 = f"HD95 median {distance:.1f} px, {report['hd95']['left_out']} left out"
    lines += [
        "",
        f"threshold {report['threshold']:g}, {report['images']} images",
        "95 % intervals: bootstrap over images",
        hd95,
    ]
    text = "\n".join(lines)
    axis.text(0, 1, text, va="top", family="monospace", fontsize=11, transform=axis.transAxes)
    axis.axis("off")


def _draw_threshold_sweep(axis, valid):
    if valid is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "no other split valid:\nthreshold as given", ha="center")
        return
    chosen, dice = valid["chosen_threshold"], valid["scores_with_it"]["dice"]
    axis.plot(valid["thresholds"], valid["dice"], marker=".")
    axis.axvline(chosen, color="gray", linestyle="--")
    axis.set(
        title=f"on valid: best at {chosen:g}; with it here Dice {dice:.3f}",
        xlabel="threshold",
        ylabel="Dice",
        ylim=(0, 1),
    )
