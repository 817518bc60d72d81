"""Images of a data set with their masks in one picture, each with its file name below it."""

import math

import numpy as np
from PIL import Image, ImageDraw

from medseg.coco import MAX_CLASSES
from medseg.drawing import are_thin, class_colors, outline, with_legend, with_note
from medseg.files import write_picture
from medseg.fonts import drawable, fit_lines, pillow_font

CELL, GAP = 160, 8  # pixels: of an image in the sheet with the gap that it has
COLUMNS = 8  # at least; more where a sheet would become higher than wide
FINE = 4  # pixels of thin structures for each of the sheet, along each axis
NARROWEST = 12  # pixels of the shorter side of an image
CAPTION_LINES, TEXT, LINE = 4, 11, 14  # of a file name; pixels of its letters and lines
MOST = 500  # images of each split: a sheet of three times as many has 80 megapixels
BACKGROUND = (240, 240, 240)


def spread_by_foreground(shares, count):
    """At most `count` places in the list of images' shares of foreground, by rising share.

    Both extremes are among them, and the others lie evenly between, by rank.
    """
    chosen = np.linspace(0, len(shares) - 1, min(count, len(shares))).round().astype(int)
    return np.argsort(shares, kind="stable")[chosen].tolist()


def draw_tile(image, masks, n_classes):
    """A PIL image with the outlines of its masks in the class colours, to fit into a cell.

    masks: {channel: RunLengths}. What is too small to be seen at this size is drawn as a dot, and
    thin structures, of which only outlines would be left, are tinted by the share that they cover.
    """
    scale = (CELL - GAP) / max(image.size)
    width, height = (max(round(side * scale), NARROWEST) for side in image.size)
    pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    colors = class_colors(n_classes)
    thin = are_thin(mask.draw(height, width) for mask in masks.values())
    for channel, mask in list(masks.items())[:MAX_CLASSES]:
        small = mask.draw(height, width)
        if thin and small.any():
            fine = mask.draw(FINE * height, FINE * width).reshape(height, FINE, width, FINE)
            share = 0.8 * fine.mean((1, 3))[..., None]
            pixels = (pixels * (1 - share) + share * np.array(colors[channel])).astype(np.uint8)
            continue
        if mask.area and not small.any():
            column, row = divmod(int(mask.draw().T.argmax()), mask.shape[0])
            row, column = row * height // mask.shape[0], column * width // mask.shape[1]
            small[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
        pixels[outline(small)] = colors[channel]
    return Image.fromarray(pixels)


def save_contact_sheet(rows, class_names, path, note=""):
    """Write a JPEG of tiles with their captions, the names of the classes and a note.

    rows: a list for each split of (PIL image from `draw_tile`, file name, second line); each
    begins a line of its own. Returns `path`.
    """
    columns = max(COLUMNS, math.ceil(math.sqrt(sum(map(len, rows)))))
    names, font_path = drawable(*(name for row in rows for _, name, _ in row))
    font, names, lines = pillow_font(font_path, TEXT), iter(names), []
    for row in rows:
        cells = [
            (tile, [*fit_lines(next(names), font, CELL - GAP, CAPTION_LINES), about])
            for tile, _, about in row
        ]
        for start in range(0, len(cells), columns):
            lines.append(_draw_line(cells[start : start + columns], font, columns))
    lines.append(Image.new("RGB", (columns * CELL, GAP), BACKGROUND))
    sheet = Image.fromarray(np.concatenate([np.asarray(line) for line in lines]))
    drawn = with_note(with_legend(sheet, class_names, single=True), note)
    write_picture(path, lambda file: drawn.save(file, "JPEG", quality=90))
    return path


def _draw_line(cells, font, columns):
    """A line of the sheet: tiles beside each other, as high as the highest, captions below."""
    tallest = max(tile.height for tile, _ in cells)
    most = max(len(caption) for _, caption in cells)
    line = Image.new("RGB", (columns * CELL, tallest + most * LINE + 2 * GAP), BACKGROUND)
    pen = ImageDraw.Draw(line)
    for place, (tile, caption) in enumerate(cells):
        left, top = place * CELL + GAP // 2, GAP + tallest
        line.paste(tile, (left + (CELL - GAP - tile.width) // 2, top - tile.height))
        for number, text in enumerate(caption):
            color = "black" if number < len(caption) - 1 else "dimgray"
            pen.text((left, top + 2 + number * LINE), text, fill=color, font=font)
    return line
