"""After training: what its images look like to the network, recorded in the weights."""

import numpy as np
import torch

from medseg.dist import is_first
from medseg.inference import view
from medseg.ood import MIN_IMAGES, FeatureRecorder, fit_with_threshold
from medseg.tiles import by_tiles, tiling_of
from medseg.training.checkpoint import BEST
from medseg.weights import save_weights

MAX_IMAGES = 500  # of a split that are looked at


def record_statistics(model, loaders, device, out, autocast):
    """Find the `medseg.ood.FeatureStatistics` of a trained UNet, and add them to best_model.pth.

    model: with its best weights. loaders: {split: `data.Batches`}, of which train and valid are
    passed through the network, whole images, and turned as the training has turned them. Only the
    first process does it. Of too few images there are none.
    """
    if not is_first() or len(loaders["train"].rows) < MIN_IMAGES:
        return
    features = [
        pool_features(model, loaders[split].whole_images(MAX_IMAGES), device, autocast)
        for split in ("train", "valid")
    ]
    model.feature_statistics = fit_with_threshold(*features)
    if model.feature_statistics:
        save_weights(out / BEST, model.state_dict())


def pool_features(model, batches, device, autocast):
    """Pooled features (N, D) of the images of batches, in the views that the UNet has learned.

    One image after the other has the next of them, so that all are there in equal numbers.
    """
    model.eval()
    recorder, pooled, seen = FeatureRecorder(model), [], 0
    views = (None, *model.trained_flips)

    def look(part):
        with torch.inference_mode(), autocast:
            # Not as it is compiled, which would leave the hooks out.
            by_tiles(model.forward, part, tiling_of(model), part.device, enter=recorder.look)

    try:
        for images, _ in batches:
            which = (torch.arange(len(images)) + seen) % len(views)
            seen += len(images)
            for number in which.unique().tolist():
                look(view(images[which == number].to(device), views[number]))
                pooled.append(recorder.take())
    finally:
        recorder.remove()
    return np.concatenate(pooled)
