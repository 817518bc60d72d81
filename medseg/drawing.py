"""What was found in a picture, drawn on it: colours, tints, outlines, legends, montages."""

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medseg.fonts import drawable, fit_lines, pillow_font

THIN = 0.01  # of the longer side of a picture: foreground this thin is hidden by its outlines
LEGEND_LINES = 8  # of a legend, from which on it has several columns
STRIPE = 64  # rows that are tinted at a time: few megabytes
GREY = (240, 240, 240)

# Okabe and Ito's palette, which colour-blind readers tell apart.
PALETTE = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66)),
    *((0, 114, 178), (213, 94, 0), (204, 121, 167)),
)


def class_colors(n_classes):
    """Red, green, blue (0..255) of each class; a single one is red."""
    if n_classes == 1:
        return [(255, 0, 0)]
    colors = list(PALETTE[:n_classes])
    for number in range(len(colors), n_classes):  # hues a golden angle apart
        color = colorsys.hsv_to_rgb(number * 0.618 % 1, 0.75, 0.9)
        colors.append(tuple(round(255 * part) for part in color))
    return colors


def rgb_image(pixels):
    """uint8 (H, W) or (H, W, C) -> PIL RGB image: one of two channels, else the first three."""
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def describe_shown(channels, before=""):
    """Which of these named channels `rgb_image` shows, in words; '' of fewer than two.

    before: a text that then comes before it.
    """
    if len(channels) < 3:
        return f"{before}shown: {channels[0]}" if len(channels) == 2 else ""
    shown = zip(("red", "green", "blue"), channels, strict=False)
    return f"{before}shown: {', '.join(f'{color} {name}' for color, name in shown)}"


def draw_labels(labels, n_classes=1):
    """Class numbers (H, W) -> PIL image in the colours of the legend; of a single class, white."""
    if n_classes == 1:
        return Image.fromarray(labels > 0).convert("L")
    colors = np.array([(0, 0, 0), *class_colors(n_classes)], np.uint8)
    return Image.fromarray(colors[labels])


def overlay(image, labels, n_classes=1, *, opacity=0.4, outlined=False):
    """PIL RGB image and class numbers (H, W), or a bool mask -> PIL image with them tinted.

    opacity: 0..1, of the tint; outlined: draw the outline of each class too, in its full colour.
    """
    if outlined:
        image = overlay(image, labels, n_classes, opacity=opacity)
        labels, opacity = outline_labels(labels, n_classes), 1
    drawn, colors = image.copy(), np.array([(0, 0, 0), *class_colors(n_classes)], np.uint8)
    for top in range(0, len(labels), STRIPE):
        numbers = labels[top : top + STRIPE].astype(np.uint8)
        if numbers.any():
            below = image.crop((0, top, image.width, top + len(numbers)))
            tinted = Image.blend(below, Image.fromarray(colors[numbers]), opacity)
            drawn.paste(tinted, (0, top), Image.fromarray(numbers > 0))
    return drawn


def _add_room(image, height):
    """(the PIL image with so many rows of grey below it, what draws on it)"""
    taller = Image.new("RGB", (max(image.width, 200), image.height + height), GREY)
    taller.paste(image)
    return taller, ImageDraw.Draw(taller)


def with_legend(image, class_names, *, single=False):
    """The PIL image with the colour of each class below it; a single class needs none.

    More than LEGEND_LINES are put in as many columns as fit. single: of a single class too.
    """
    if len(class_names) <= 1 and not (class_names and single):
        return image
    colors, (names, path) = class_colors(len(class_names)), drawable(*class_names)
    font, line, width = pillow_font(path, 14), 20, max(image.width, 200)
    names = [fit_lines(name, font, width - 34, 1)[0] for name in names]
    column = math.ceil(max(map(font.getlength, names))) + 44
    columns = max(min(width // column, math.ceil(len(names) / LEGEND_LINES)), 1)
    lines = math.ceil(len(names) / columns)
    taller, draw = _add_room(image, line * lines + 6)
    for number, (name, color) in enumerate(zip(names, colors, strict=True)):
        left, top = number // lines * column, image.height + 4 + number % lines * line
        draw.rectangle((left + 6, top + 2, left + 20, top + 16), fill=color)
        draw.text((left + 28, top + 9), name, fill="black", font=font, anchor="lm")
    return taller


def with_note(image, note):
    """The PIL image with a text below it; without one, as it is."""
    if not note:
        return image
    (note,), path = drawable(note)
    font = pillow_font(path, 14)
    lines = fit_lines(note, font, max(image.width, 200) - 12, 4)
    taller, draw = _add_room(image, 20 * len(lines) + 6)
    draw.multiline_text((6, image.height + 4), "\n".join(lines), fill="black", font=font)
    return taller


def draw_panels(panels, name=None):
    """{title: PIL image}, all of one size -> one PIL RGB image with them beside each other.

    name: of the file that they show, which stands above them, or None.
    """
    width, height = next(iter(panels.values())).size
    column, top = max(width, 150), 28 if name else 0
    size = (len(panels) * (column + 10) + 10, height + 50 + top)
    figure = Image.new("RGB", size, GREY)
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    if name:
        (shown,), path = drawable(name)
        own = pillow_font(path, 16)
        shown = fit_lines(shown, own, size[0] - 20, 1)[0]
        draw.text((10, 16), shown, fill="black", font=own, anchor="lm")
    for index, (title, panel) in enumerate(panels.items()):
        left = 10 + index * (column + 10)
        draw.text((left + column / 2, top + 32), title, fill="black", font=font, anchor="ms")
        figure.paste(panel, (left + (column - width) // 2, top + 40))
    return figure


def outline(mask):
    """(H, W) array of 0 and 1 -> bool array of its foreground pixels at background or border."""
    inside = np.pad(np.asarray(mask, bool), 1)
    core = inside[1:-1, 1:-1]
    return core & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])


def are_thin(masks):
    """Whether the foreground of bool masks (H, W) is thin, as vessels are, or small.

    Measured is the area for each pixel of outline: half the width of a ribbon, a quarter of the
    diameter of a disc, as a share of the picture's longer side.
    """
    area = lengths = 0
    for mask in masks:
        area += np.count_nonzero(mask)
        lengths += np.count_nonzero(outline(mask)) * max(mask.shape)
    return 0 < area < THIN * lengths


def outline_labels(labels, n_classes=1):
    """Class numbers (H, W) -> those of them that are `outline` of their class, the others 0.

    The lines are wider in larger images, which are shown smaller.
    """
    edges = np.zeros_like(labels)
    for number in range(1, n_classes + 1):
        mask = labels == number
        for _ in range(1 + max(labels.shape) // 350):
            edge = outline(mask)
            edges[edge], mask = number, mask & ~edge
    return edges
