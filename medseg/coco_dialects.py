"""COCO annotations as other programs write them: brought into COCO's form, and counted in words."""

from urllib.parse import parse_qsl, unquote

FRACTIONS = (
    "the outlines are fractions of the image's size, from 0 to 1: multiply x by the width, y by "
    "the height"
)
FRACTION = 1.1  # outlines without a larger coordinate are fractions of their image's size


def name_forms(name):
    """A file_name as it is written, then what it means where it is an address of the web.

    %20 is a space, and what follows ? is no part of the name, or holds it (Label Studio's ?d=PATH).
    """
    place, _, query = name.partition("?")
    forms = [unquote(name), place, unquote(place), *(value for _, value in parse_qsl(query))]
    return list(dict.fromkeys([name, *filter(None, forms)]))


def print_forgiven(forgiven, begin="note: "):
    """Print what `read_coco` counted, a line each."""
    for what, count in forgiven.items():
        print(f"{begin}{count} {what}")


def mend_records(content, forgiven):
    """Bring ids, sizes and outlines into COCO's form, and count it."""
    known = {"image_id": _ids(content["images"]), "category_id": _ids(content["categories"])}
    for image in filter(_is_record, content["images"]):
        _mend_size(image, forgiven)
    for annotation in filter(_is_record, content["annotations"]):
        for key, ids in known.items():
            value = annotation.get(key)
            if value is None and key == "category_id" and len(ids) == 1:
                (annotation[key],) = ids.values()
                forgiven["annotations without a category: they are of the only one"] += 1
                continue
            own = ids.get(str(value).removesuffix(".0"), value)
            if type(own) is not type(value):
                annotation[key] = own
                forgiven["ids of another type than in the list of images or categories"] += 1
        if isinstance(annotation.get("segmentation"), list) and annotation["segmentation"]:
            _mend_outline(annotation, forgiven)


def _is_record(record):
    return isinstance(record, dict)


def _ids(records):
    """{text of an id: id} of records."""
    ids = (record.get("id") for record in filter(_is_record, records))
    return {str(own): own for own in ids if isinstance(own, (int, str))}


def _mend_size(image, forgiven):
    """Give a record whole numbers as its size, and 0 for both sides where one is not told."""
    sides = [image.get("width"), image.get("height")]
    try:
        numbers = [float(side or 0) for side in sides]
    except (TypeError, ValueError):
        return
    if not all(numbers):
        image["width"] = image["height"] = 0
        forgiven["images with a size of 0: the picture's own is taken"] += 1
    elif {*map(type, sides)} != {int} and all(map(float.is_integer, numbers)):
        image["width"], image["height"] = map(int, numbers)
        forgiven["images with a size that is no whole number"] += 1


def _mend_outline(annotation, forgiven):
    """Make a list the list of flat polygons that it means, without those of too few points."""
    outline = annotation["segmentation"]
    polygons = _flatten(outline)
    kept = [own for own in polygons if len(own) > 5 or not all(map(_is_number, own))]
    if polygons != outline:
        forgiven["outlines that are nested in another way"] += 1
    if few := len(polygons) - len(kept):
        forgiven["fragments of outlines, of fewer than three points: left out"] += few
    annotation["segmentation"] = kept


def _flatten(outline):
    """The polygons [x1, y1, x2, ...] in nested lists; those that are lists of points [x, y] too."""
    parts = [part for part in outline if isinstance(part, list)]
    if len(parts) < len(outline) or not outline:
        return [outline]
    if len(parts) > 2 and all(len(p) == 2 and all(map(_is_number, p)) for p in parts):
        return [[value for point in parts for value in point]]
    return [polygon for part in parts for polygon in _flatten(part)]


def _is_number(value):
    return type(value) in (int, float)


def are_fractions(outlines):
    """Whether nested lists of coordinates, some of them there, are all of fractions.

    Anything else in them, such as run lengths, is none.
    """
    if not isinstance(outlines, list):
        return _is_number(outlines) and abs(outlines) <= FRACTION
    return bool(outlines) and all(map(are_fractions, outlines))


def drop_without_outline(content, forgiven, boxes):
    """Remove annotations without an outline, unless half have none, and count it."""

    def is_drawn(annotation):
        box = annotation.get("bbox")
        has_area = isinstance(box, list) and len(box) == 4 and box[2] != 0 != box[3]
        return bool(annotation.get("segmentation")) or (boxes and has_area)

    drawn = list(filter(is_drawn, content["annotations"]))
    count = len(content["annotations"]) - len(drawn)
    if 0 < 2 * count < len(content["annotations"]):
        content["annotations"] = drawn
        boxed = "" if boxes else " (download.py --boxes draws their boxes)"
        forgiven[f"annotations without an outline: left out{boxed}"] += count
