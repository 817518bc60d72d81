"""A file of the VGG Image Annotator (VIA 1 and 2), read as the content of a COCO file."""

import math
from collections import Counter
from pathlib import Path

from medseg.coco import listed
from medseg.files import read_json
from medseg.importing.coco_files import examples_of
from medseg.patterns import same_form

WITHOUT_AREA = ("point",)
ONE_CLASS = "foreground"  # of regions that have no attributes


def via_examples(path, images, attribute=None, **options):
    """What `coco_examples` returns, of a VIA file, a project or only its annotations.

    attribute: the region attribute whose values are the classes; needed where there are several.
    Raises ValueError or FileNotFoundError that names the file.
    """
    path = Path(path)
    content = read_json(path)
    entries = content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    if not entries or not all(isinstance(e, dict) and "regions" in e for e in entries.values()):
        raise ValueError(f"{path}: not a VIA file: its entries have no filename and regions")
    regions = {key: _list_regions(entry) for key, entry in entries.items()}
    attribute = _choose_attribute(path, regions, attribute)
    annotations, images_of, left_out = [], [], Counter()
    for number, (key, entry) in enumerate(entries.items()):
        name = str(entry.get("filename") or key)
        images_of.append({"id": number, "file_name": name, "width": 0, "height": 0})
        for region in regions[key]:
            classes = _classes_of(region, attribute)
            try:
                outline = _outline(region["shape_attributes"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: a region of {name}: {error!r:.80}") from None
            if not outline or not classes:
                left_out["without an area" if not outline else f"without {attribute}"] += 1
                continue
            for own in classes:
                annotation = {"id": len(annotations), "image_id": number, "category_id": own}
                annotations.append({**annotation, "segmentation": [outline]})
    for what, count in left_out.items():
        print(f"left out: {count} regions {what}")
    names = dict.fromkeys(annotation["category_id"] for annotation in annotations)
    categories = [{"id": name, "name": name} for name in sorted(names)]
    content = {"images": images_of, "annotations": annotations, "categories": categories}
    return examples_of(content, path, images, **options)


def _list_regions(entry):
    regions = entry["regions"] or []
    return list(regions.values()) if isinstance(regions, dict) else regions  # VIA 1 has numbers


def _choose_attribute(path, regions, attribute):
    """The region attribute that names the class, or None where regions have none."""
    counts = Counter(key for own in regions.values() for r in own for key in _attributes(r))
    if attribute is None and len(counts) < 2:
        return next(iter(counts), None)
    if attribute not in counts:
        raise ValueError(
            f"{path}: its regions have the attributes {listed(list(counts)) or '(none)'}: name the "
            "one that is the class after the folder of images"
        )
    return attribute


def _attributes(region):
    return region.get("region_attributes") or {}


def _classes_of(region, attribute):
    """The names of the classes of a region: several where it is a choice of checkboxes."""
    value = _attributes(region).get(attribute) if attribute else ONE_CLASS
    chosen = [key for key, on in value.items() if on] if isinstance(value, dict) else [value]
    return [same_form(str(one).strip()) for one in chosen if one not in (None, "")]


def _outline(shape):
    """[x1, y1, x2, y2, ...] of the shape_attributes of a region; [] for one without an area."""
    kind = shape["name"]
    if kind in WITHOUT_AREA:
        return []
    if kind in ("polygon", "polyline"):
        x, y = shape["all_points_x"], shape["all_points_y"]
        outline = [value for point in zip(x, y, strict=True) for value in point]
        return outline if len(outline) > 4 else []
    if kind == "rect":
        x, y, width, height = (shape[key] for key in ("x", "y", "width", "height"))
        return [x, y, x + width, y, x + width, y + height, x, y + height]
    if kind not in ("circle", "ellipse"):
        raise ValueError(f"the unknown shape {kind}")
    rx, ry = (shape["r"],) * 2 if kind == "circle" else (shape["rx"], shape["ry"])
    sine, cosine = math.sin(shape.get("theta", 0)), math.cos(shape.get("theta", 0))
    count, outline = max(16, math.ceil(4 * max(rx, ry))), []
    for step in range(count):
        angle = 2 * math.pi * step / count
        x, y = rx * math.cos(angle), ry * math.sin(angle)
        outline += [shape["cx"] + x * cosine - y * sine, shape["cy"] + x * sine + y * cosine]
    return outline
