"""A folder of LabelMe files (versions 4 to 7) -> examples for `write_dataset`.

Shapes are drawn as LabelMe draws them (Pillow's polygon with its outline), in order, later over
earlier ones. `_background_` cuts holes; `__ignore__` is what nobody annotated. LabelMe shows
pictures turned by their EXIF orientation, and its points refer to that.
"""

import base64
import contextlib
import io
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image, ImageDraw

from medseg.coco import IGNORE, MAX_CLASSES, listed
from medseg.coco_dialects import FRACTIONS, are_fractions, print_forgiven
from medseg.duplicates import NEAR_DUPLICATE, correlate, is_flat, shrink, thumbnail
from medseg.files import read_json
from medseg.images import SUFFIXES, read_image
from medseg.importing.coco_files import by_name, choose_classes, find_images
from medseg.importing.collect import find_groups, is_text, list_files, read_upright, unique_names
from medseg.importing.writing import Example
from medseg.own_files import OWN_JSON, is_own, is_unreviewed
from medseg.patterns import same_form
from medseg.run_lengths import encode_labels

BACKGROUND, IGNORED = "_background_", "__ignore__"
POINTS = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2, "oriented_rectangle": 4}
OR_MORE = ("polygon", "rectangle")  # which may have more points
ROTATED = ("rotation", "quadrilateral")  # X-AnyLabeling's polygons
LEFT_OUT = ("point", "points", "line", "linestrip")  # they cover no area
MANY_POINTS = 10_000  # from which on Pillow takes long; OpenCV differs in 1 % of the edge's pixels
FAR = 10  # coordinates may lie this many sides outside the image


def labelme_examples(folder, *, classes=None, group=None, prefix="", unreviewed="keep"):
    """(examples, class names, late) of the LabelMe files below a folder.

    Prints what is left out. classes: labels to use, in their order; without it all labels, sorted.
    late: {what to print once the examples are read: LabelMe files that it is about}.
    group: a table as `find_groups` reads it, of the JSON files or images. prefix: of names.
    unreviewed: what becomes of predictions that nobody has saved since, as of `_select`.
    Raises ValueError or FileNotFoundError that names the file.
    """
    folder = Path(folder)
    paths = [path for path in list_files(folder, (".json",)) if path.name not in OWN_JSON]
    if not paths:
        raise ValueError(f"{folder}: holds no LabelMe files (.json)")
    paths = _select(folder, paths, unreviewed)
    pictures = list_files(folder, SUFFIXES)
    stems = {path.stem for path in paths}
    unlabelled = sum(path.stem not in stems and not is_own(path) for path in pictures)
    if unlabelled:
        print(f"note: {unlabelled} images have no LabelMe file of their name")
    names = choose_classes(_count_labels(paths), classes, f"{folder}: no area is labelled")
    numbers = {BACKGROUND: 0, **{name: n for n, name in enumerate(names, start=1)}}
    relative = [path.relative_to(folder) for path in paths]
    wrong, elsewhere = [], []
    find = partial(_find_picture, by_name(pictures), elsewhere)
    examples = [
        Example(stem, own_group, partial(_read_example, path, find, numbers, wrong))
        for stem, own_group, path in zip(
            unique_names(relative, prefix), find_groups(relative, group), paths, strict=True
        )
    ]
    ours = f"of {len(paths)} LabelMe files have"
    late = {
        f"{ours} an imagePath that leads to nothing or to another picture: their imageData was "
        "taken": wrong,
        f"{ours} their image elsewhere than imagePath says: it was found by its name": elsewhere,
    }
    return examples, names, late


def _select(folder, paths, unreviewed):
    """The files, with predictions that nobody has saved since or without them: "keep" or "skip".

    None is a ValueError where there are some.
    """
    untouched = {path for path in paths if path.is_file() and is_unreviewed(path)}
    if not untouched:
        return paths
    what = (
        f"{len(untouched)} of {len(paths)} files are predictions that nobody has saved in LabelMe "
        f"since ({min(untouched).name})"
    )
    if unreviewed is None or unreviewed == "skip" and len(untouched) == len(paths):
        ways = "--unreviewed skip leaves them out, keep takes them as they are"
        raise ValueError(f"{folder}: {what}: {ways}")
    print(f"{'left out' if unreviewed == 'skip' else 'note'}: {what}")
    return paths if unreviewed == "keep" else [path for path in paths if path not in untouched]


def _count_labels(paths):
    """{label: number of its areas} of all files, sorted, without those of the background.

    Prints what is not as LabelMe writes it, and what is left out. ValueError where all points are
    fractions.
    """
    counts, left_out, forgiven, fractions = Counter(), Counter(), Counter(), []
    for path in paths:
        shapes = read_labelme(path, forgiven)["shapes"]
        areas = [shape for shape in shapes if shape["shape_type"] not in LEFT_OUT]
        counts.update(shape["label"] for shape in areas)
        left_out.update(own["shape_type"] for own in shapes if own["shape_type"] in LEFT_OUT)
        if areas:
            fractions.append(are_fractions([shape.get("points") for shape in areas]))
    if fractions and all(fractions):
        raise ValueError(f"{paths[0]}: {FRACTIONS}")
    print_forgiven(forgiven)
    if left_out:
        shown = [f"{name} ({n})" for name, n in sorted(left_out.items())]
        print(f"left out: shapes without an area: {listed(shown, MAX_CLASSES)}")
    return {name: counts[name] for name in sorted(counts.keys() - {BACKGROUND})}


# ---------------------------------------------------------------- one file


def _read_example(path, find, numbers, wrong):
    """What `Example.read` returns, of the LabelMe file at `path`.

    find: `_find_picture` of its folder. numbers: {label: number of its class, from 1 on, or 0}.
    wrong: the list of files whose imageData was taken.
    """
    content = read_labelme(path)
    recorded = content.get("imageWidth"), content.get("imageHeight")
    upright = _read_picture(path, find, content, wrong)
    if all(recorded) and recorded != upright.size:
        made, actual = ("x".join(map(str, size)) for size in (recorded, upright.size))
        raise ValueError(f"{path}: was made on an image of {made}, but its image is {actual}")
    try:
        runs = encode_labels(draw_shapes(content["shapes"], upright.size, numbers))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    masks = {name: runs[number] for name, number in numbers.items() if number in runs.keys() - {0}}
    return upright.image, masks


def read_labelme(path, forgiven=None):
    """The content of a LabelMe file, a shape_type filled in where it is missing.

    forgiven: a Counter, to which is added, in words, what LabelMe writes otherwise.
    Raises FileNotFoundError; ValueError for what is not LabelMe: a list of shapes, each with a
    label and a known shape_type.
    """
    forgiven = Counter() if forgiven is None else forgiven
    content = read_json(path, forgiven)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise ValueError(f"{path}: not a LabelMe file (no list of shapes): move it elsewhere")
    for number, shape in enumerate(content["shapes"]):
        label = shape.get("label") if isinstance(shape, dict) else None
        if type(label) in (int, float):
            label = str(label).removesuffix(".0")
            forgiven["labels are numbers: taken as text"] += 1
        if not isinstance(label, str) or not is_text(label):
            raise ValueError(f"{path}: shapes[{number}] has no label that is text: {label!r:.40}")
        kind = shape.get("shape_type") or "polygon"
        kind = "polygon" if kind in ROTATED else kind
        if kind not in (*POINTS, *LEFT_OUT):
            raise ValueError(f"{path}: shapes[{number}] has the unknown shape_type {kind!r:.40}")
        if kind == "rectangle" and len(shape.get("points") or ()) > 2:
            forgiven["rectangles of more than two points: the box around these is taken"] += 1
        label = IGNORE if label == IGNORED else same_form(label)
        shape |= {"label": label, "shape_type": kind}
    return content


def _read_picture(path, find, content, wrong):
    """The Upright picture of a LabelMe file: the image that imagePath names, else imageData.

    LabelMe shows imageData, where there is any, whatever imagePath names. The named image, of which
    that may be a poor copy, is taken where both are alike; `wrong` is added to where not.
    """
    name, data, inside = content.get("imagePath"), content.get("imageData"), None
    named = find(path, name) if isinstance(name, str) else None
    if isinstance(data, str):
        with contextlib.suppress(ValueError):  # it is damaged
            inside = read_upright(io.BytesIO(base64.b64decode(data)))
    if not inside and not named:
        raise ValueError(
            f"{path}: its image {name!r:.120} is not there, nor is it in imageData: name the "
            "folder that holds both"
        )
    if not inside:
        return read_upright(named)
    if named:
        with contextlib.suppress(ValueError):  # what is damaged, or no image, is the wrong one
            upright = read_upright(named)
            if _are_alike(upright, inside):
                return upright
    wrong.append(path)
    return inside


def _are_alike(upright, inside):
    """Whether two Upright images show the same: of the first, its `image` may be a Path."""
    if upright.size != inside.size:
        return False
    image = upright.image
    one = thumbnail(shrink(read_image(image) if isinstance(image, Path) else image))
    other = thumbnail(shrink(inside.image))
    return is_flat(one) or is_flat(other) or correlate([one], [other])[0, 0] >= NEAR_DUPLICATE


def _find_picture(named, elsewhere, path, name):
    """The file that a LabelMe file at `path` means by its imagePath `name`, or None.

    named: `by_name` of the images in the folder. The path comes first, out of the folder too, then
    the nearest of that name: the file is added to `elsewhere`. ValueError where several are that.
    """
    meant = Path(os.path.normpath(path.parent / PureWindowsPath(name).as_posix()))
    if meant.name.lower().endswith(SUFFIXES) and os.path.isfile(meant):
        return meant
    candidates = find_images(name, path.parent, named)
    steps = [os.path.relpath(own, path.parent).count(os.sep) for own in candidates]
    nearest = [own for own, count in zip(candidates, steps, strict=True) if count == min(steps)]
    if len(nearest) > 1:
        raise ValueError(f"{path}: its image {name!r:.120} may be {nearest[0]} or {nearest[1]}")
    if nearest and same_form(str(nearest[0])) != same_form(str(meant)):
        elsewhere.append(path)
    return nearest[0] if nearest else None


# ---------------------------------------------------------------- drawing


def draw_shapes(shapes, size, numbers):
    """The number of the class at each pixel, int32 (H, W), 0 for background.

    shapes: as `read_labelme` returns them. size: (width, height). numbers: {label: number} of what
    is to be drawn. Raises ValueError.
    """
    canvas = Image.new("I", size)
    for number, shape in enumerate(shapes):
        label = shape["label"]
        if shape["shape_type"] in LEFT_OUT or label not in numbers:
            continue
        try:
            _draw_shape(canvas, shape, _read_points(shape, size), numbers[label])
        except ValueError as error:
            raise ValueError(f"shapes[{number}] ({label!r:.40}): {error}") from None
    return np.asarray(canvas)


def _read_points(shape, size):
    """The points (N, 2) of a shape. ValueError: they are too few, no numbers, or far outside."""
    kind, points = shape["shape_type"], np.array(shape.get("points"))
    if points.dtype.kind not in "if" or points.shape[1:] != (2,):
        raise ValueError("its points are no list of [x, y]")
    count = len(points)
    if count < POINTS[kind] or count > POINTS[kind] and kind not in OR_MORE:
        raise ValueError(f"a {kind} needs {POINTS[kind]} points, and has {count}")
    if not (abs(points) <= FAR * max(size)).all():  # false for NaN too
        raise ValueError(f"its points lead far outside the {size[0]}x{size[1]} image")
    return points


def _draw_shape(canvas, shape, points, value):
    """Draw one shape into a PIL image of mode I; ValueError where it cannot be drawn."""
    draw, kind = ImageDraw.Draw(canvas), shape["shape_type"]
    low, high = points.min(0), points.max(0)
    if kind == "mask":
        bitmap = _read_bitmap(shape.get("mask"))
        left, top = low.astype(int).tolist()  # as LabelMe: whole numbers, both corners inside
        size = high.astype(int) - (left, top) + 1
        if (abs(bitmap.size - size) > 1).any():
            raise ValueError(f"its mask is {bitmap.size}, but its corners span {tuple(size)}")
        canvas.paste(value, (left, top), bitmap)
    elif kind == "circle":
        center, edge = points
        radius = math.dist(center, edge)
        draw.ellipse([*(center - radius), *(center + radius)], outline=value, fill=value)
    elif kind == "rectangle":
        draw.rectangle([*low, *high], outline=value, fill=value)
    elif len(points) > MANY_POINTS:
        import cv2

        filled = np.zeros(canvas.size[::-1], np.uint8)
        cv2.fillPoly(filled, [np.trunc(points).astype(np.int32)], 255)  # Pillow cuts them, too
        canvas.paste(value, mask=Image.fromarray(filled))
    else:
        draw.polygon(points.ravel().tolist(), outline=value, fill=value)


def _read_bitmap(text):
    """A PIL image of mode "1" from base64 of a PNG whose pixels are 0 or not."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as image:
            return Image.fromarray(np.asarray(image) != 0)
    except Exception as error:  # decoders raise many kinds on damaged files
        raise ValueError(f"its mask is damaged ({error!r:.80})") from None
