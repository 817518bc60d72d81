"""After training: what its images look like to the network, recorded in the weights."""

import numpy as np
import torch

from medseg.dist import is_first
from medseg.inference import view
from medseg.ood import fit_with_threshold, recording_features
from medseg.tiles import apply_by_tiles
from medseg.training.checkpoint import BEST
from medseg.weights import save_weights

MAX_IMAGES = 500  # of a split that are looked at
MAX_SHARED = 0.05  # of the pixels of a class that may be of another one, too


def record_statistics(model, loaders, out, autocast):
    """Add to best_model.pth what a UNet was trained on: `FeatureStatistics`, how classes overlap.

    model: with its best weights. loaders: {split: `Batches`}, of which train and valid are passed
    through the network, whole images, and turned as the training has turned them, by the first
    process. Of too few images there are no statistics.
    """
    rows = loaders["train"].rows
    model.info.draw_order = find_draw_order(rows, model.n_channels, model.n_classes)
    if not is_first():
        return
    splits = (loaders[split].whole_images(MAX_IMAGES) for split in ("train", "valid"))
    features = [pool_features(model, batches, autocast) for batches in splits]
    model.info.feature_statistics = fit_with_threshold(*features)
    save_weights(out / BEST, model.state_dict())


def pool_features(model, batches, autocast):
    """Pooled features (N, D) of the images of batches, in the views that the UNet has learned.

    One image after the other has the next of them, so that all are there in equal numbers.
    """
    model.eval()
    pooled, seen, views = [], 0, (None, *model.info.trained_flips)
    for images, _ in batches:
        which = (torch.arange(len(images)) + seen) % len(views)
        seen += len(images)
        for number in which.unique().tolist():
            part = view(images[which == number], views[number])
            with torch.inference_mode(), autocast, recording_features(model) as features:
                # Not as it is compiled, which would leave the hooks out.
                apply_by_tiles(model, part, batches.device, forward=model.forward)
            pooled.append(features())
    return np.concatenate(pooled)


def find_draw_order(rows, n_channels, n_classes):
    """Numbers of classes that overlap, in the order in which they are drawn; () if they do not.

    rows: of the training split, see `data.load_split`. The larger one comes first: so a class that
    lies inside another is drawn over it. Outlines of classes that touch share the pixels of their
    border or cross a little: two classes overlap where they share more than MAX_SHARED of the
    pixels of the smaller one.
    """
    both = np.zeros((n_classes, n_classes), np.int64)
    for row in rows if n_classes > 1 else ():
        packed = np.asarray(row[..., n_channels:])
        packed = packed[packed.any(-1)]
        bits = np.unpackbits(packed, axis=-1, count=n_classes, bitorder="little").astype(np.float32)
        both += np.rint(bits.T @ bits).astype(np.int64)
    areas = both.diagonal()
    shared = both - np.diag(areas)
    if (shared <= MAX_SHARED * np.minimum.outer(areas, areas)).all():
        return ()
    return tuple((np.argsort(-areas, kind="stable") + 1).tolist())
