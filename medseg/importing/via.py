"""A file of the VGG Image Annotator (VIA 1 and 2), read as the content of a COCO file."""

from collections import Counter
from pathlib import Path

import numpy as np

from medseg.coco import listed
from medseg.files import read_json
from medseg.importing.coco_files import corners, examples_of
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
    records, regions = [], []
    for number, (key, entry) in enumerate(entries.items()):
        name, own = str(entry.get("filename") or key), entry["regions"] or []
        records.append({"id": number, "file_name": name, "width": 0, "height": 0})
        own = own.values() if isinstance(own, dict) else own  # VIA 1 numbers them
        regions += [(records[-1], region) for region in own]
    attribute = _choose_attribute(path, [region for _, region in regions], attribute)
    annotations, left_out = [], Counter()
    for record, region in regions:
        try:
            outline = _outline(region["shape_attributes"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: a region of {record['file_name']}: {error!r:.80}") from None
        classes = _classes_of(region, attribute)
        if not outline or not classes:
            left_out["without an area" if not outline else f"without {attribute}"] += 1
            continue
        for own in classes:
            ids = {"id": len(annotations), "image_id": record["id"], "category_id": own}
            annotations.append({**ids, "segmentation": [outline]})
    for what, count in left_out.items():
        print(f"left out: {count} regions {what}")
    names = sorted({annotation["category_id"] for annotation in annotations})
    categories = [{"id": name, "name": name} for name in names]
    content = {"images": records, "annotations": annotations, "categories": categories}
    return examples_of(content, path, images, **options)


def _choose_attribute(path, regions, attribute):
    """The region attribute that names the class, or None where regions have none."""
    counts = Counter(key for region in regions for key in region.get("region_attributes") or {})
    if attribute is None and len(counts) < 2:
        return next(iter(counts), None)
    if attribute not in counts:
        raise ValueError(
            f"{path}: its regions have the attributes {listed(list(counts)) or '(none)'}: name the "
            "one that is the class after the folder of images"
        )
    return attribute


def _classes_of(region, attribute):
    """The names of the classes of a region: several where it is a choice of checkboxes."""
    value = (region.get("region_attributes") or {}).get(attribute) if attribute else ONE_CLASS
    chosen = [key for key, on in value.items() if on] if isinstance(value, dict) else [value]
    return [same_form(str(one).strip()) for one in chosen if one not in (None, "")]


def _outline(shape):
    """[x1, y1, x2, y2, ...] of the shape_attributes of a region; [] for one without an area."""
    kind = shape["name"]
    if kind in WITHOUT_AREA:
        return []
    if kind == "rect":
        return corners(shape[key] for key in ("x", "y", "width", "height"))
    if kind in ("polygon", "polyline"):
        points = np.stack([shape["all_points_x"], shape["all_points_y"]], 1)
        return points.ravel().tolist() if len(points) > 2 else []
    if kind not in ("circle", "ellipse"):
        raise ValueError(f"the unknown shape {kind}")
    rx, ry = (shape["r"],) * 2 if kind == "circle" else (shape["rx"], shape["ry"])
    angles = np.linspace(0, 2 * np.pi, max(16, int(4 * max(rx, ry))), endpoint=False)
    turn = np.exp(1j * shape.get("theta", 0))
    points = (rx * np.cos(angles) + 1j * ry * np.sin(angles)) * turn
    x, y = shape["cx"] + points.real, shape["cy"] + points.imag
    return np.stack([x, y], 1).ravel().tolist()
