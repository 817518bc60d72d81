"""Every figure drawn with matplotlib: predictions, curves, the report of a folder."""

import math
from pathlib import Path

import numpy as np

from medseg.drawing import are_thin, class_colors
from medseg.files import write_picture
from medseg.fonts import dejavu, drawable, fit_lines, pillow_font
from medseg.images import mean_and_std

# Blue and orange of Okabe and Ito's palette: red-green blind readers tell them apart, and the
# prediction is dashed besides.
TARGET_COLOR, PRED_COLOR = "#56B4E9", "#E69F00"
PIXEL_COLORS = {"right": "#009E73", "missed": TARGET_COLOR, "wrong": PRED_COLOR}
SCORE_LABELS = {  # precision, recall and loss are labels as they are
    **{"acc": "pixel accuracy", "background_acc": "all-background accuracy"},
    **{"dice": "Dice", "image_dice": "Dice per image", "group_dice": "Dice per group"},
    **{"iou": "IoU", "miou": "mean IoU"},
}
MAX_SIDE = 1600  # pixels of a picture that are drawn: an outline among 10,000 takes a minute
MAX_DRAWN = 20  # classes that a figure outlines: more can be told apart neither there nor below
CAPTION_SIZE = 10  # points of a file name


def new_figure(width, height):
    """An empty figure, in inches. Not by pyplot, which looks for a screen and keeps figures."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure as a PNG of 80 pixels an inch that is whole or absent; returns `path`."""
    write_picture(path, lambda file: figure.savefig(file, dpi=80, format="png"))
    return path


def mark_whole_numbers(axis):
    """Ticks at whole numbers alone, a single one among them; axis: of x or y."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def as_drawn(text, **style):
    """(text, keywords) for matplotlib: no formula of a $, a font that has its characters."""
    (shown,), path = drawable(text)
    font = {"font": Path(path)} if path else {}
    return shown, {**font, **style, "parse_math": False}


def denormalize(images):
    """float32 tensor (B, C, H, W) as `data.normalize` gives -> array (B, H, W, 1 or 3) of 0..1.

    Of two channels the first, of more than three the first three.
    """
    mean, std = mean_and_std(images.shape[1])
    pixels = (images.permute(0, 2, 3, 1).cpu().numpy() * std + mean).clip(0, 1)
    return pixels[..., : 1 if pixels.shape[3] < 3 else 3]


def outline_colors(n_classes):
    """(color of the true outline, color of the prediction) of each class."""
    if n_classes == 1:
        return [(TARGET_COLOR, PRED_COLOR)]
    colors = [tuple(value / 255 for value in color) for color in class_colors(n_classes)]
    return [(color, color) for color in colors]


def draw_outline(axis, mask, color, style):
    """Draw the outline of a bool array (H, W) over the image that an axis shows."""
    if mask.any():
        height, width = mask.shape
        columns, rows = np.arange(-1, width + 1), np.arange(-1, height + 1)
        padded = np.pad(mask, 1).astype(float)  # an outline at the border is closed there
        axis.contour(columns, rows, padded, [0.5], colors=[color], linestyles=style, linewidths=1.8)


def choose_classes(cases):
    """The class indices to outline in a figure, in order: all, or the MAX_DRAWN with most pixels.

    cases: [(targets, preds)], arrays (C, H, W) of 0 and 1. What counts is a class's share of the
    pixels of a case, true and predicted together, so that a case of small ones is outlined too.
    """
    n_classes = len(cases[0][0])
    if n_classes <= MAX_DRAWN:
        return list(range(n_classes))
    pixels = np.stack([np.sum(target, (1, 2)) + np.sum(pred, (1, 2)) for target, pred in cases])
    shares = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)  # within each case
    return sorted(np.argsort(-shares.max(0), kind="stable")[:MAX_DRAWN].tolist())


def reduce_case(picture, targets, preds):
    """Of a large picture and its masks every second pixel, third, ...: as many as are drawn."""
    step = math.ceil(max(picture.shape[:2]) / MAX_SIDE)
    reduced = ([np.array(mask[::step, ::step], bool) for mask in own] for own in (targets, preds))
    return picture[::step, ::step].copy(), *map(np.stack, reduced)


def mark_pixels(picture, targets, preds):
    """The picture (0..1 or uint8) with the pixels that are right, missed or wrong in PIXEL_COLORS.

    Of several classes a pixel is right where it is in any; else wrong where one is predicted.
    """
    from matplotlib.colors import to_rgb

    marked = picture / (255 if picture.dtype == np.uint8 else 1)
    right = (targets & preds).any(0)
    missed, wrong = (targets & ~preds).any(0) & ~right, (preds & ~targets).any(0) & ~right
    for where, color in zip((right, missed, wrong), PIXEL_COLORS.values(), strict=True):
        marked[where] = to_rgb(color)
    return marked


def draw_cases(axes, cases):
    """Draw cases (picture, targets, preds, title), one in each of an array of axes.

    Pictures (H, W, 1 or 3) have the outlines of their masks, bool arrays (C, H, W), over them, or
    where structures are thin their pixels coloured, see `mark_pixels`. Returns the class indices
    that are drawn, see `choose_classes`, and whether structures are thin.
    """
    thin = are_thin(np.any(targets, 0) for _, targets, *_ in cases)
    classes = choose_classes([(targets, preds) for _, targets, preds, _ in cases])
    for axis in axes.flat:  # there may be more of them
        axis.axis("off")
    for axis, (*case, title) in zip(axes.flat, cases, strict=False):
        picture, targets, preds = reduce_case(*case)
        picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
        axis.imshow(mark_pixels(picture, targets, preds) if thin else picture)
        colors = outline_colors(len(targets))
        for index in () if thin else classes:
            draw_outline(axis, targets[index], colors[index][0], "solid")
            draw_outline(axis, preds[index], colors[index][1], "dashed")
        title, style = as_drawn(title, fontsize=12)
        axis.set_title(title, **style)
    return classes, thin


def add_legend(figure, title, class_names, classes, thin=False):
    """Title and, below the panels, what the colors mean; the rest is what `draw_cases` returns."""
    from matplotlib.lines import Line2D

    colors = outline_colors(len(class_names))
    target, pred = colors[0] if len(colors) == 1 else ("black", "black")
    lines = [("true outline", target, "solid"), ("prediction", pred, "dashed")]
    if len(colors) > 1:
        lines += [(class_names[index], colors[index][0], "solid") for index in classes]
    if len(colors) > len(classes):
        lines.append((f"and {len(colors) - len(classes)} more, not drawn", "none", "solid"))
    if thin:
        lines = [(f"{name} pixels", color, "solid") for name, color in PIXEL_COLORS.items()]
    title, style = as_drawn(title, fontsize=13)
    figure.suptitle(title, **style)
    legend = figure.legend(
        [Line2D([], [], color=c, linestyle=s, linewidth=8 if thin else 2) for _, c, s in lines],
        [label for label, *_ in lines],
        loc="outside lower center",
        ncols=min(6, int(figure.get_figwidth() // 2)),
        frameon=False,
        fontsize=12,
    )
    for text in legend.get_texts():
        shown, style = as_drawn(text.get_text(), fontsize=12)
        text.set(text=shown, **style)


def plot_predictions(cases, path, *, title, class_names, captions=()):
    """Pictures (0..1 or uint8) with both outlines, five in a row; returns `path`.

    cases: [(picture, targets, preds, title)], with bool arrays (C, H, W). captions: the file name
    of each, or none.
    """
    columns = min(len(cases), 5)
    captions, font = drawable(*captions)
    font = Path(font or dejavu())
    lines = [
        fit_lines(name, pillow_font(font, CAPTION_SIZE), width=260, most=3) for name in captions
    ]
    shapes = [min(max(len(picture) / picture.shape[1], 0.2), 2) for picture, *_ in cases]
    room = 0.3 + max(map(len, lines), default=0) * CAPTION_SIZE / 60
    heights = [
        4 * max(shapes[start : start + columns]) + room for start in range(0, len(shapes), columns)
    ]
    figure = new_figure(max(4 * columns, 8), sum(heights) + 1)  # wide enough for the legend
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    add_legend(figure, title, class_names, *draw_cases(axes, cases))
    for axis, own in zip(axes.flat, lines, strict=False):
        axis.set_axis_on()
        axis.set(xticks=[], yticks=[], frame_on=False)
        axis.set_xlabel("\n".join(own), font=font, fontsize=CAPTION_SIZE, parse_math=False)
    return save_figure(figure, path)


def plot_curves(history, path, *, title=""):
    """Loss, overlap and accuracy over the epochs of a history, see train_model; returns `path`."""
    figure = new_figure(15, 4.2)
    axes = figure.subplots(1, 3)
    panels = {
        "loss": ("train_loss", "val_loss"),
        "foreground overlap": ("train_dice", "val_dice", "val_iou"),
        "pixel accuracy": ("train_acc", "val_acc"),
    }
    epochs = [row["epoch"] for row in history]
    marker = "." if len(epochs) < 20 else None
    for axis, (name, keys) in zip(axes, panels.items(), strict=True):
        for key in keys:
            values = [row[key] for row in history]
            split, score = key.split("_")
            axis.plot(
                epochs, values, label=f"{split} {SCORE_LABELS.get(score, score)}", marker=marker
            )
        axis.set(title=name, xlabel="epoch")
        mark_whole_numbers(axis.xaxis)
        axis.grid(alpha=0.3)
    best = min(history, key=lambda row: row["val_loss"])
    label = f"best weights (epoch {best['epoch']})"
    axes[0].plot(best["epoch"], best["val_loss"], "k*", markersize=11, label=label)
    axes[1].set_ylim(0, 1)
    background = history[0]["val_background_acc"]
    axes[2].axhline(background, color="gray", linestyle="--", label="all background (val)")
    for axis in axes:
        axis.legend()
    title, style = as_drawn(title)
    figure.suptitle(title, **style)
    return save_figure(figure, path)
