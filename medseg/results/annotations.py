"""Predictions as annotations: LabelMe files to be corrected, one COCO file for other programs."""

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.own_files import LABELME_VERSION
from medseg.pieces import class_masks, number_pieces
from medseg.results.outlines import trace_labels
from medseg.results.table import settings_text
from medseg.run_lengths import encode_labels

BACKGROUND = "_background_"  # LabelMe's label of what cuts a hole


def write_labelme(path, pictured, labels, class_names, *, simplify=0):
    """Write the outlines of one prediction as a LabelMe file at `path`.

    pictured: the path of its image, which the file names by the way that leads there; labels: class
    numbers, uint8 (height, width). simplify: as for `trace_labels`.
    """
    names, shapes = (BACKGROUND, *class_names), []
    for number, points in trace_labels(labels, simplify):
        shape = {"label": names[number], "points": points, "group_id": None}
        shapes.append({**shape, "description": "", "shape_type": "polygon", "flags": {}})
    content = {"version": LABELME_VERSION, "flags": {}, "shapes": shapes}
    content |= {"imagePath": _way(pictured, path.parent), "imageData": None}
    content |= {"imageHeight": labels.shape[0], "imageWidth": labels.shape[1]}
    with atomic_write(path, sync=False) as file:
        file.write(json.dumps(content, indent=1).encode())


def _way(path, folder):
    """How a file is named from a folder, with / in it; from the top on another drive."""
    path = path.parent.resolve() / path.name
    with suppress(ValueError):  # Windows has no way from one drive to another
        path = Path(os.path.relpath(path, folder.resolve()))
    return path.as_posix()


def coco_record(frame, masks):
    """What the COCO file has of one prediction: plain values for `coco_text`.

    masks: as of `medseg.pieces.class_masks`, of a picture. Each piece is an annotation, as run
    lengths.
    """
    annotations, (height, width) = [], masks.shape[-2:]
    for number, box, mask in class_masks(masks):
        pieces = np.zeros((height, width), np.int32)
        pieces[box], *_ = number_pieces(mask)
        for index, runs in sorted(encode_labels(pieces).items()):
            if index == 0:
                continue
            one = {"category_id": number, "area": runs.area, "iscrowd": 0}
            one["segmentation"] = {**runs.coco, "counts": runs.counts.decode()}
            annotations.append({**one, "bbox": [int(value) for value in runs.box]})
    image = {"file_name": frame.title, "width": width, "height": height}
    return {"image": image, "annotations": annotations}


def coco_text(records, class_names):
    """The text of a COCO file of [what `coco_record` returns]; categories are numbered from 1."""
    names = enumerate(class_names, 1)
    categories = [{"id": number, "name": name, "supercategory": ""} for number, name in names]
    images, annotations = [], []
    for number, record in enumerate(records, 1):
        images.append({"id": number, **record["image"]})
        for one in record["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
    return settings_text({"images": images, "categories": categories, "annotations": annotations})
