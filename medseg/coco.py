"""The one reader of COCO annotations: split names, records, paths, polygons and run lengths."""

import contextlib
import json
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from medseg.files import check_regular
from medseg.medical import read_settings

ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
LAYOUT = f"a data set is a folder with train/, valid/ and test/, each with images and {ANNOTATIONS}"


def read_annotations(folder, skipped=None):
    """The annotations of one split folder as a dict with lists of images, annotations, categories.

    skipped: a list; each image that has to be left out because its record, or that of one of its
    annotations, is damaged adds a line to it. Without it, they are a ValueError.
    Raises FileNotFoundError for a missing folder or file; ValueError for what is not COCO: every
    image needs an id, a file_name, a width and a height, every annotation the image_id of one.
    """
    folder = Path(folder)
    path = folder / ANNOTATIONS
    if not folder.parent.is_dir():
        raise FileNotFoundError(_missing(folder.parent))
    if not folder.is_dir():
        raise FileNotFoundError(_missing(folder))
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {LAYOUT}")
    return read_coco(path, skipped, advice=f": `python data.py {folder.parent}` lists them")


def read_coco(path, skipped=None, *, advice=""):
    """The content of one annotation file, wherever it is; see `read_annotations`.

    advice: ends the message that counts several damaged records.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if isinstance(content, dict):
        content.setdefault("categories", [])
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not COCO annotations: no list of {key}")
    problems = [f"{path}: not COCO annotations: {line}" for line in _drop_damaged_records(content)]
    if problems and skipped is None:
        more = f" ({len(problems)} such{advice})"
        raise ValueError(problems[0] + (more if len(problems) > 1 else ""))
    if problems:
        skipped.extend(problems)
    return content


def recorded_settings(folder):
    """The window and the orientation that the import of a split recorded; see `read_settings`.

    Raises as `read_annotations` does for a missing or unreadable file.
    """
    info = read_annotations(folder, skipped=[]).get("info")
    try:
        return read_settings(info if isinstance(info, dict) else {})
    except ValueError as error:
        raise ValueError(f"{Path(folder) / ANNOTATIONS}: its info has the {error}") from None


def _missing(folder):
    return (
        f"{folder}: no such folder; {LAYOUT}: "
        "give the path of one, or run `python download.py`, which makes dataset/"
    )


def load_coco(folder, skipped=None):
    """The annotations of one split folder as a pycocotools COCO object; see `read_annotations`."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = read_annotations(folder, skipped)
    with contextlib.redirect_stdout(None):  # createIndex reports its progress
        coco.createIndex()
    return coco


def used_categories(coco):
    """{name: set of category ids} of the categories with an annotation, in the order of the ids.

    Annotations of a category that is not listed are of "?".
    """
    used = {annotation["category_id"] for annotation in coco.anns.values()}
    categories = {}
    for category in coco.dataset.get("categories", []):
        if category["id"] in used:
            categories.setdefault(str(category.get("name")), set()).add(category["id"])
            used.remove(category["id"])
    if used:
        categories["?"] = used
    return categories


def check_classes(coco, classes, folder):
    """ValueError where none of the names in `classes` is a category of the annotations."""
    names = [str(entry.get("name")) for entry in coco.dataset.get("categories", [])]
    if classes and not set(classes) & set(names):
        raise ValueError(
            f"{folder / ANNOTATIONS}: has the categories {', '.join(names) or '(none)'}, "
            f"but the weights know {', '.join(classes)}"
        )


def image_path(folder, name):
    """Where the image of a record's file_name is. ValueError where that leads out of the folder."""
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        absolute = flavour.is_absolute() or flavour.drive
        if absolute or ".." in flavour.parts or "\0" in name:
            raise ValueError(f"{folder / ANNOTATIONS}: file_name {name!r} leads out of the folder")
    return folder / name


def _drop_damaged_records(content):
    """Remove what COCO cannot index, and images with such an annotation; yield a reason each."""
    images, damaged = {}, set()  # good images by id; ids of those that go
    for number, image in enumerate(content["images"]):
        reason = _image_problem(image, images)
        if reason:
            yield f"images[{number}] {reason}"
            if isinstance(image, dict) and isinstance(image.get("id"), (int, str)):
                damaged.add(image["id"])
        else:
            images[image["id"]] = image
    annotations = []
    for number, annotation in enumerate(content["annotations"]):
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        known = isinstance(owner, (int, str)) and (owner in images or owner in damaged)
        if not known:
            named = f" (image_id {owner!r})" if isinstance(annotation, dict) else ""
            yield f"annotations[{number}] belongs to no image{named}"
        elif not _has_usable_ids(annotation, number):
            yield f"annotations[{number}] has an id or category_id that is no number"
            damaged.add(owner)
        else:
            annotations.append(annotation)
    categories = []
    for number, category in enumerate(content["categories"]):
        if isinstance(category, dict) and isinstance(category.get("id"), (int, str)):
            categories.append(category)
        else:
            yield f"categories[{number}] has no id"
    content["images"] = [image for key, image in images.items() if key not in damaged]
    content["annotations"] = [entry for entry in annotations if entry["image_id"] not in damaged]
    content["categories"] = categories


def _has_usable_ids(annotation, number):
    """Whether id and category_id can be looked up; where they are missing, they are filled in."""
    defaults = {"id": number, "category_id": None}
    return all(
        isinstance(annotation.setdefault(key, default), (int, str, type(default)))
        for key, default in defaults.items()
    )


def _image_problem(image, earlier):
    """What is wrong with an image's record, or None."""
    if not isinstance(image, dict):
        return "is not an object"
    if not isinstance(image.get("id"), (int, str)) or image["id"] in earlier:
        return f"has id {image.get('id')!r}, which is missing or used twice"
    if not isinstance(image.get("file_name"), str):
        return "has no file_name"
    for side in ("width", "height"):
        if type(image.get(side)) is not int or image[side] <= 0:
            return "has no whole, positive width and height"
    return None


def rasterize(segmentation, height, width):
    """One COCO segmentation -> uint8 array (height, width) of 0 and 1.

    segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or a run-length encoding
    {"size": [height, width], "counts": list or compressed string}, as crowds have it.
    Raises ValueError. The checks come first: pycocotools reads memory that is not its own when
    runs do not add up to the image, and allocates by the length of an outline, however far it
    leads.
    """
    if isinstance(segmentation, list):
        return _rasterize_polygons(segmentation, height, width)
    if not isinstance(segmentation, dict):
        raise ValueError("a segmentation is neither polygons nor a run-length encoding")
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [height, width]:
        raise ValueError(f"run-length encoding of size {size} on an image of {[height, width]}")
    if isinstance(counts, (str, bytes)):
        counts = _decompress_counts(counts)
    valid = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
    if not valid or sum(counts) != height * width:
        raise ValueError(f"run-length counts do not add up to {height} x {width} pixels")
    values = np.arange(len(counts), dtype=np.int64) % 2  # background first, then by turns
    return np.repeat(values.astype(np.uint8), counts).reshape(width, height).T  # columns first


def _rasterize_polygons(polygons, height, width):
    if not polygons:
        raise ValueError("no segmentation (a box alone does not say which pixels)")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon needs three points or more, as a flat list x1, y1, x2, ...")
        if not all(type(value) in (int, float) for value in polygon):
            raise ValueError("a polygon holds something that is not a number")
        for side, values in ((width, polygon[::2]), (height, polygon[1::2])):
            if not all(-side <= value <= 2 * side for value in values):  # false for NaN too
                raise ValueError(f"a polygon leads far outside the {width}x{height} image")
    from pycocotools import mask as coco_mask

    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def _decompress_counts(text):
    """COCO's compressed counts -> list of ints.

    5 bits a character, low first; from the third count on, differences to the one but last.
    """
    codes = [byte - 48 for byte in (text if isinstance(text, bytes) else text.encode("utf-8"))]
    counts, value, shift = [], 0, 0
    for code in codes:
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("compressed run-length counts are damaged")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last character of this count; its fifth bit is the sign
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts
