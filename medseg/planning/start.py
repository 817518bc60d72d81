"""How well the weights that come with the repository mark the images of a data set already."""

from collections import namedtuple

import numpy as np
import torch

from data import open_split
from medseg.layers import network_flags
from medseg.pretrained import pretrained_path
from net import load_model

MOST = 32  # images to tell from

# flags: {name: value} that start a training from the weights; dice: of the training images, 0..1.
Start = namedtuple("Start", ["flags", "dice"])


def try_pretrained(root):
    """The Start from the weights that come with the repository, or None.

    None where they were removed, or others put there that mark several classes or take images at
    their own size. The Dice is that of evenly spaced training images of the data set in `root`,
    their pixels counted together, all annotations as one class. Damaged images are passed over.
    """
    path = pretrained_path()
    if path is None:
        return None
    model = load_model(path).eval()
    if model.n_classes > 1 or model.info.image_size is None:
        return None
    flags = {"init": str(path), "image_size": model.info.image_size, **network_flags(model, path)}
    dataset = open_split(
        root, "train", model.info.image_size, n_channels=model.n_channels, skipped=[]
    )
    both = marked = 0
    for index in np.unique(np.linspace(0, len(dataset) - 1, MOST).astype(int)).tolist():
        try:
            image, mask = dataset[index]
        except (FileNotFoundError, ValueError):
            continue
        with torch.inference_mode():
            pred = model(image[None])[0] > 0.5
        both += int((pred & (mask > 0)).sum())
        marked += int(pred.sum() + mask.sum())
    return Start(flags, 2 * both / max(marked, 1))
