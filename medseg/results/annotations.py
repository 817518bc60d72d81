"""Predictions as annotations: LabelMe files to be corrected, one COCO file for other programs."""

import json
import os
from pathlib import Path

import numpy as np

from medseg.files import atomic_write
from medseg.formats.medical import file_format
from medseg.images import save_png
from medseg.pieces import class_masks, number_pieces
from medseg.results.outlines import trace_labels
from medseg.results.table import settings_text
from medseg.run_lengths import encode_labels

LABELME_VERSION = "5.5.0"  # of the format: versions 4 to 7 read it
BACKGROUND = "_background_"  # LabelMe's label of what cuts a hole


def labelme_files(frame, folder):
    """Paths of the LabelMe file of a frame, and of the picture to write beside it, if any.

    LabelMe does not open DICOM, whose frames are written as pictures.
    """
    picture = [folder / f"{frame.name}.png"] if file_format(frame.path) else []
    return [folder / f"{frame.name}.json", *picture]


def write_labelme(frame, image, labels, folder, class_names, *, simplify=0):
    """Write the outlines of one prediction as a LabelMe file.

    image: PIL RGB image; labels: class numbers, uint8 (height, width). The file names its image by
    the way that leads there from `folder`. simplify: as for `trace_labels`.
    """
    path, *pictures = labelme_files(frame, folder)
    for picture in pictures:
        save_png(image, picture)
    names, shapes = (BACKGROUND, *class_names), []
    for number, points in trace_labels(labels, simplify):
        shape = {"label": names[number], "points": points, "group_id": None}
        shapes.append({**shape, "description": "", "shape_type": "polygon", "flags": {}})
    content = {"version": LABELME_VERSION, "flags": {}, "shapes": shapes}
    named = pictures[0] if pictures else frame.path
    content |= {"imagePath": _way(named, folder), "imageData": None}
    content |= {"imageHeight": labels.shape[0], "imageWidth": labels.shape[1]}
    with atomic_write(path, sync=False) as file:
        file.write(json.dumps(content, indent=1).encode())


def _way(path, folder):
    """How a file is named from a folder, with / in it; from the top on another drive."""
    path = path.parent.resolve() / path.name
    try:
        path = Path(os.path.relpath(path, folder.resolve()))
    except ValueError:  # Windows has no way from one drive to another
        pass
    return path.as_posix()


def coco_record(frame, masks):
    """What the COCO file has of one prediction: plain values for `coco_text`.

    masks: as of `medseg.pieces.class_masks`, of a picture. Each piece is an annotation, as run
    lengths.
    """
    from pycocotools import mask as coco_mask

    annotations, (height, width) = [], masks.shape[-2:]
    for number, box, mask in class_masks(masks):
        pieces = np.zeros((height, width), np.int32)
        pieces[box], *_ = number_pieces(mask)
        for index, runs in sorted(encode_labels(pieces).items()):
            if index == 0:
                continue
            plain = {"size": [height, width], "counts": runs.counts().tolist()}
            encoded = coco_mask.frPyObjects(plain, height, width)
            one = {"category_id": number}
            one["segmentation"] = {**plain, "counts": encoded["counts"].decode()}
            one["area"] = runs.area
            one["bbox"] = [int(value) for value in coco_mask.toBbox(encoded)]
            annotations.append({**one, "iscrowd": 0})
    image = {"file_name": frame.title, "width": width, "height": height}
    return {"image": image, "annotations": annotations}


def coco_text(records, class_names):
    """The text of a COCO file of [what `coco_record` returns]; categories are numbered from 1."""
    images, annotations, numbered = [], [], enumerate(class_names, 1)
    for number, record in enumerate(records, 1):
        images.append({"id": number, **record["image"]})
        for one in record["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
    categories = [{"id": of, "name": name, "supercategory": ""} for of, name in numbered]
    return settings_text({"images": images, "categories": categories, "annotations": annotations})
