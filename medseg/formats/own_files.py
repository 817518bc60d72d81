"""The names of the files that these scripts write, which are no input when they are read again."""

import re

from medseg.formats.medical import base_name

TABLE, SETTINGS, COCO = "predictions.csv", "predictions.json", "predictions.coco.json"
REPORT = "report.json"
OWN_JSON = (SETTINGS, COCO, REPORT)
OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "compare.png", "contact_sheet.jpg")
OWN_FILES = (*OWN_PICTURES, *OWN_JSON, TABLE)
MASK_ENDING = "_mask"
# Of what is drawn beside a mask. The probabilities of class 2 are x_2_probability.png.
PICTURE_ENDINGS = ("_prediction", "_overlay", "_montage", "_probability")
OWN_ENDINGS = (MASK_ENDING, *PICTURE_ENDINGS)


def is_own(path):
    """Whether a file is called as one that these scripts write."""
    return path.name in OWN_FILES or base_name(path).endswith(OWN_ENDINGS)


def drawn_beside_masks(paths):
    """Which of the files are pictures that these scripts draw: a set.

    Those with names of their own, and x_overlay.jpg beside x_mask.png: without that mask it may be
    anybody's.
    """
    masks = {(path.parent, base_name(path)) for path in paths}
    drawn = set()
    for path in paths:
        name = base_name(path)
        images = [name.removesuffix(end) for end in PICTURE_ENDINGS if name.endswith(end)]
        if name.endswith("_probability"):
            images.append(re.sub(r"(_\d+)?_probability$", "", name))
        beside = any((path.parent, image + MASK_ENDING) in masks for image in images)
        if path.name in OWN_PICTURES or beside:
            drawn.add(path)
    return drawn
