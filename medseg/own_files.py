"""The files that these scripts write: their names, and whether a file is one of them."""

import re

from medseg.files import VOLUME_SUFFIXES, base_name, check_replaceable, is_sealed
from medseg.volume_files import is_sealed_mask

TABLE, SETTINGS, COCO = "predictions.csv", "predictions.json", "predictions.coco.json"
REPORT = "report.json"
OWN_JSON = (SETTINGS, COCO, REPORT)
OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "compare.png", "contact_sheet.jpg")
OWN_FILES = (*OWN_PICTURES, *OWN_JSON, TABLE)
MASK_ENDING = "_mask"
# Of what is drawn beside a mask. The probabilities of class 2 are x_2_probability.png.
PICTURE_ENDINGS = ("_prediction", "_overlay", "_montage", "_objects", "_probability")
OWN_ENDINGS = (MASK_ENDING, *PICTURE_ENDINGS)
# What a file of text begins with.
BEGINNINGS = {
    "metrics.csv": b"epoch,train_loss,",
    "skipped.txt": b"left out by train.py",
    TABLE: "\ufeffimage,class,pixels,".encode(),
    SETTINGS: b'{\n "program": "predict.py",',
    COCO: b'{\n "program": "predict.py",',
    REPORT: b'{\n "folder": "',
}
# Of a LabelMe file. LabelMe and programs like it put their own version there when they save one.
LABELME_VERSION = "5.5.0+predict.py"
UNREVIEWED = f'{{\n "version": "{LABELME_VERSION}"'.encode()


def check_outputs(paths, flag="--output"):
    """ValueError where a file that is to be written would replace one that is not ours.

    paths: of what a run writes, but for weights and tables; flag: that names the folder.
    """
    for path in paths:
        check_replaceable(path, _is_unchanged, flag)


def _is_unchanged(path):
    """Whether these scripts wrote a file, as far as its content tells."""
    name = path.name
    if name in BEGINNINGS:
        with open(path, "rb") as file:
            return file.read(100).startswith(BEGINNINGS[name])
    if name.lower().endswith(VOLUME_SUFFIXES):
        return is_sealed_mask(path)
    return is_sealed(path)


def is_unreviewed(path):
    """Whether a LabelMe file is as predict.py wrote it: nobody has saved it since."""
    with open(path, "rb") as file:
        return file.read(len(UNREVIEWED)) == UNREVIEWED


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
