"""The one reader of COCO annotations: split names, records, paths, polygons and run lengths."""

import contextlib
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from pycocotools import mask as coco_mask

from medseg.coco_dialects import (
    FRACTIONS,
    are_fractions,
    drop_without_outline,
    mend_records,
    name_forms,
)
from medseg.dataset_folder import ANNOTATIONS, SPLITS, finish_import
from medseg.files import name_file, read_json
from medseg.run_lengths import RunLengths, decompress_counts, encode_counts, unite
from medseg.samples import open_picture, size_as_shown
from medseg.settings import is_spacing, read_settings

MAX_PROBLEMS = 100  # lines about the damaged records of one file
IGNORE = "ignore"  # the category of pixels that nobody annotated: they count nowhere
MAX_CLASSES = 255  # that are told apart: a mask has a byte a pixel, and 0 is background
_FOLDERS = "{}/, {}/ and {}/".format(*SPLITS)
LAYOUT = f"a data set is a folder with {_FOLDERS}, each with images and {ANNOTATIONS}"
GET_ONE = "give the path of one, or run `python download.py`, which makes dataset/"


def read_annotations(folder, skipped=None, forgiven=None):
    """The annotations of one split folder as a dict with lists of images, annotations, categories.

    skipped: a list; damaged records of images and annotations of no image are left out. Each adds
    a line to it; after the first MAX_PROBLEMS, a line says how many more there are. Without it,
    they are a ValueError. forgiven: as for `read_coco`.
    Raises FileNotFoundError for a missing folder or file; ValueError for what is not COCO: every
    image needs an id, a file_name, a width and a height, every annotation the image_id of one.
    """
    folder = Path(folder)
    finish_import(folder.parent)
    path = folder / ANNOTATIONS
    for place in (folder.parent, folder, path):
        if not place.exists():
            raise FileNotFoundError(f"{place}: not there; {LAYOUT}: {GET_ONE}")
    forgiven = Counter() if forgiven is None else forgiven
    advice = f": `python data.py {folder.parent}` lists them"
    content = read_coco(path, skipped, advice=advice, forgiven=forgiven)
    names = {image["file_name"] for image in content["images"]}
    for image in content["images"]:
        if set(image["file_name"]) & set("%?\\"):
            stored = _stored_name(folder, image["file_name"], names)
            if stored != image["file_name"]:
                image["file_name"] = stored
                forgiven["file names of Windows or the web: decoded"] += 1
        if not image["width"]:
            image["width"], image["height"] = shown_size(folder / image["file_name"])
    return content


def read_coco(path, skipped=None, *, advice="", forgiven=None, boxes=False):
    """The content of one annotation file, wherever it is; see `read_annotations`.

    What other programs write is brought into COCO's form: ids as text, null for the only category,
    flat or nested outlines, sizes such as "64" or 64.0; a size that is not told is 0. Outlines of
    fewer than three points go, and so do annotations without any, where most have one.
    advice: ends the message that counts several damaged records. forgiven: a Counter, to which each
    of these is added, in words. boxes: annotations with a box stay.
    """
    forgiven = Counter() if forgiven is None else forgiven
    content = read_json(path, forgiven)
    if isinstance(content, dict):
        content.setdefault("categories", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not COCO annotations: no list of {key}")
    mend_records(content, forgiven)
    problems = [f"{path}: not COCO annotations: {line}" for line in _drop_damaged(content)]
    if problems and skipped is None:
        total = f" ({len(problems)} such{advice})" if len(problems) > 1 else ""
        raise ValueError(problems[0] + total)
    if more := len(problems[MAX_PROBLEMS:]):
        problems[MAX_PROBLEMS:] = [f"{path}: not COCO annotations: {more:,} more damaged records"]
    if problems:
        skipped.extend(problems)
    drop_without_outline(content, forgiven, boxes)
    outlines = (annotation.get("segmentation") for annotation in content["annotations"])
    if are_fractions([outline for outline in outlines if outline]):
        raise ValueError(f"{path}: {FRACTIONS}")
    return content


def recorded_settings(folder, content=None):
    """What the import of a split recorded for prediction; see `read_settings`.

    content: of its file, where that has been read already; else raises as `read_annotations` does.
    """
    content = read_annotations(folder, skipped=[]) if content is None else content
    info = content.get("info")
    with name_file(Path(folder) / ANNOTATIONS):
        return read_settings(info if isinstance(info, dict) else {})


def load_coco(folder, skipped=None, forgiven=None):
    """The annotations of one split folder as a pycocotools COCO object; see `read_annotations`."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = read_annotations(folder, skipped, forgiven)
    with contextlib.redirect_stdout(None):  # createIndex reports its progress
        coco.createIndex()
    return coco


def recorded_spacing(record):
    """mm of a pixel along each axis that the import recorded with an image, or None."""
    spacing = record.get("spacing")
    return tuple(spacing) if isinstance(spacing, list) and is_spacing(spacing) else None


def recorded_group(record):
    """The group that the import recorded with an image (its patient, its volume), or ""."""
    return str(record.get("group") or "")


def used_categories(coco):
    """{name: set of category ids} of the categories with an annotation, in the order of the ids.

    Annotations of a category that is not listed are of "?"; IGNORE is none of them.
    """
    used = {annotation["category_id"] for annotation in coco.anns.values()} - ignored(coco)
    categories = {}
    for category in coco.dataset.get("categories", []):
        if category["id"] in used:
            categories.setdefault(str(category.get("name")), set()).add(category["id"])
            used.remove(category["id"])
    if used:
        categories["?"] = used
    return categories


def ignored(coco):
    """The ids of the category IGNORE, a set."""
    categories = coco.dataset.get("categories", [])
    return {category["id"] for category in categories if category.get("name") == IGNORE}


def check_classes(coco, classes, folder):
    """ValueError where none of the names in `classes` is a category of the annotations."""
    names = [str(entry.get("name")) for entry in coco.dataset.get("categories", [])]
    if classes and not set(classes) & set(names):
        raise ValueError(
            f"{folder / ANNOTATIONS}: has the categories {listed(names) or '(none)'}, "
            f"but the weights know {listed(classes)}"
        )


def listed(names, most=8):
    """Names in one line, of many the first: 'a, b, ... (20000)'."""
    more = f", ... ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def image_path(folder, name):
    """Where the image of a record's file_name is. ValueError where that leads out of the folder."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        absolute = flavour.is_absolute() or flavour.drive
        if absolute or ".." in flavour.parts or "\0" in name:
            path = folder / ANNOTATIONS
            raise ValueError(f"{path}: file_name {name!r:.120} leads out of the folder")
    return folder / name


def _stored_name(folder, name, taken):
    """That form of a file_name by which there is a file in the folder, else the name itself.

    taken: names of other images, to which that of the file is added.
    """
    forms = [name, *name_forms(name.replace("\\", "/"))]
    for form in (*forms, *(PurePosixPath(form).name for form in forms)):
        with contextlib.suppress(ValueError):  # it leads out of the folder
            if (form == name or form not in taken) and image_path(folder, form).is_file():
                taken.add(form)
                return form
    return name


def shown_size(path):
    """(width, height) of an image as it is shown; (0, 0) where it cannot be read."""
    try:
        with name_file(path), open_picture(path) as picture:
            return size_as_shown(picture)
    except (OSError, ValueError):
        return 0, 0


# ---------------------------------------------------------------- records that cannot be used


def _drop_damaged(content):
    """Remove what COCO cannot index, and annotations of such images; returns a reason each."""
    images, annotations, damaged, problems = {}, [], set(), []  # good images by id; ids that go
    for number, image in enumerate(content["images"]):
        if problem := _image_problem(image, images):
            problems.append(f"images[{number}] {problem}")
            damaged.add(_get_id(image, "id"))
        else:
            images[image["id"]] = image
    for number, annotation in enumerate(content["annotations"]):
        owner = _get_id(annotation, "image_id")
        if owner is None or (owner not in images and owner not in damaged):
            problems.append(f"annotations[{number}] belongs to no image (image_id {owner!r:.40})")
            continue
        annotations.append({"id": number, "category_id": None, **annotation})
    content["images"] = [image for key, image in images.items() if key not in damaged]
    content["annotations"] = [own for own in annotations if own["image_id"] not in damaged]
    content["categories"] = [own for own in content["categories"] if _get_id(own, "id") is not None]
    return problems


def _get_id(record, key):
    """An id in a record, or None where there is none that can be looked up."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, (int, str)) else None


def _image_problem(image, earlier):
    """What is wrong with an image's record, or None."""
    own = _get_id(image, "id")
    if own is None or own in earlier:
        return f"has id {own!r:.40}, which is missing or used twice"
    sides = image.get("width"), image.get("height")
    whole = all(type(side) is int and side >= 0 for side in sides)
    if not isinstance(image.get("file_name"), str) or not whole:
        return "has no file_name, or no whole, positive width and height"
    return None


# ---------------------------------------------------------------- outlines


def read_segmentation(segmentation, height, width):
    """One COCO segmentation -> RunLengths of shape (height, width).

    segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or a run-length encoding
    {"size": [height, width], "counts": list or compressed string}, as crowds have it.
    Raises ValueError. The checks come first: pycocotools does not end, or reads memory that is not
    its own, when runs do not add up to the image.
    """
    shape = height, width
    if isinstance(segmentation, list):
        return _read_polygons(segmentation, shape)
    if not isinstance(segmentation, dict):
        raise ValueError("a segmentation is neither polygons nor a run-length encoding")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"run-length encoding of size {size} on an image of {[height, width]}")
    is_text = isinstance(counts, (str, bytes))
    plain = decompress_counts(counts).tolist() if is_text else counts
    numbers = isinstance(plain, list) and all(type(n) is int and n >= 0 for n in plain)
    if not numbers or sum(plain) != height * width:
        raise ValueError(f"run-length counts do not add up to {height} x {width} pixels")
    if is_text:
        return RunLengths(shape, counts if isinstance(counts, bytes) else counts.encode())
    return encode_counts(plain, shape)


def _read_polygons(polygons, shape):
    """The union of polygons; pycocotools would allocate by the length of one that leads far out."""
    if not polygons:
        raise ValueError("no segmentation (a box alone does not say which pixels)")
    size, drawn = np.array(shape[::-1]), []
    for polygon in polygons:
        values = np.asarray(polygon)
        if values.ndim != 1 or values.dtype.kind not in "if" or len(values) % 2 or len(values) < 6:
            raise ValueError("a polygon needs three points or more, as a list x1, y1, x2, ...")
        points = values.reshape(-1, 2)
        if not ((-size <= points) & (points <= 2 * size)).all():  # false for NaN too
            raise ValueError(f"a polygon leads far outside the {size[0]}x{size[1]} image")
        drawn.append(points.ravel())
    runs = coco_mask.frPyObjects(drawn, *shape)
    return unite([RunLengths(shape, own["counts"]) for own in runs])


def require_data_set(root):
    """FileNotFoundError where the folder holds no split at all."""
    finish_import(root)
    if not any((root / split / ANNOTATIONS).is_file() for split in SPLITS):
        what = "no data set in this folder" if root.is_dir() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; {LAYOUT}: {GET_ONE}")
