"""The names of the files that these scripts write, which are no images when they are read again."""

from medseg.formats.medical import base_name

OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "compare.png", "contact_sheet.jpg")
MASK_ENDING = "_mask"
PICTURE_ENDINGS = ("_prediction", "_overlay", "_montage")  # of what is drawn beside a mask
OWN_ENDINGS = (MASK_ENDING, *PICTURE_ENDINGS)


def is_own(path):
    """Whether a file is called as a mask or picture that these scripts write."""
    return path.name in OWN_PICTURES or base_name(path).endswith(OWN_ENDINGS)


def drawn_beside_masks(paths):
    """Which of the files are pictures that these scripts draw: a set.

    Those with names of their own, and x_overlay.jpg beside x_mask.png: without that mask it may be
    anybody's.
    """
    masks = {(path.parent, base_name(path)) for path in paths}
    drawn = set()
    for path in paths:
        name = base_name(path)
        ending = next((end for end in PICTURE_ENDINGS if name.endswith(end)), None)
        mask = ending and (path.parent, name.removesuffix(ending) + MASK_ENDING)
        if path.name in OWN_PICTURES or mask in masks:
            drawn.add(path)
    return drawn
