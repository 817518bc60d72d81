"""Whether an image is unlike those of the training (out-of-distribution detection).

The features of the first levels of the encoder are pooled over the image: their mean and deviation,
channel by channel. The Mahalanobis distance of these from those of the training images is what
tells: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018, section 2, with a single class. Their covariance is that of
probabilistic PCA (Tipping, Bishop, JRSS B 1999), which needs few images and few numbers.
"""

import base64
import math
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

LEVELS = 2  # of the encoder, from the finest: deeper features tell less, see docs/unlike.md
COMPONENTS = 32  # at most, of the covariance
MIN_IMAGES = 10  # of the training, to tell from
FOLDS = 5  # in which the distances of the training images are measured
QUANTILE = 0.99  # of the distances of images that are like the training
MIN_SCALE = 0.01  # of the largest deviation: a channel that never changes tells nothing finer
TINY = 1e-6


class FeatureStatistics(NamedTuple):
    """Mean and covariance of the pooled features of training images, float32 arrays.

    mean, scale: (D,), what features are standardised by. variances, components: (R,) and (R, D),
    the variances along R orthonormal directions of the standardised features; residual: (1,), that
    along any other. threshold: the distance above which an image is unlike the training images.
    """

    mean: np.ndarray
    scale: np.ndarray
    variances: np.ndarray
    residual: np.ndarray
    components: np.ndarray
    threshold: float = np.inf

    def distances(self, features):
        """Mahalanobis distances (N,) of pooled features (N, D)."""
        standard = (np.asarray(features, float) - self.mean) / self.scale
        along = standard @ self.components.T
        rest = ((standard - along @ self.components) ** 2).sum(1)
        return np.sqrt((along**2 / self.variances).sum(1) + rest / self.residual[0])

    def ratios(self, features):
        """Distances (N,) divided by the threshold: above 1 is unlike the training images."""
        return self.distances(features) / self.threshold

    def as_dict(self):
        """As it is recorded: plain values, which JSON has too."""
        values = np.concatenate([np.ravel(part) for part in self[:5]]).astype("<f4")
        text = base64.b64encode(values.tobytes()).decode()
        return {"threshold": float(self.threshold), "levels": LEVELS, "values": text}


def count_features(n_filters, depth):
    """D of a UNet: a mean and a deviation for each channel of its first levels."""
    return 2 * n_filters * (2 ** min(LEVELS, depth) - 1)


def read_statistics(value, n_features):
    """The FeatureStatistics that metadata hold as `FeatureStatistics.as_dict` gives it, or None.

    n_features: those that the network has. Raises ValueError where they are of another network.
    """
    if value is None:
        return None
    values = np.frombuffer(base64.b64decode(value["values"], validate=True), "<f4")
    count, rest = divmod(len(values) - 2 * n_features - 1, n_features + 1)
    if value["levels"] != LEVELS or rest or count < 1 or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} numbers for {n_features} features")
    parts = np.split(values, np.cumsum([n_features, n_features, count, 1]))
    return FeatureStatistics(*parts[:4], parts[4].reshape(count, -1), float(value["threshold"]))


def fit(features):
    """The FeatureStatistics of pooled features (N, D), N >= 2; without a threshold."""
    features = np.asarray(features, float)
    mean, scale = features.mean(0), features.std(0)
    scale = np.maximum(scale, MIN_SCALE * scale.max()) + TINY
    _, singular, directions = np.linalg.svd((features - mean) / scale, full_matrices=False)
    n_images, n_features = features.shape
    count = max(min(COMPONENTS, n_images // 4, n_features - 1), 1)
    variances = singular**2 / n_images
    residual = max(variances[count:].sum() / (n_features - count), TINY)
    variances = np.maximum(variances[:count], residual)
    parts = mean, scale, variances, [residual], directions[:count]
    return FeatureStatistics(*(np.asarray(part, np.float32) for part in parts))


def fit_with_threshold(train, valid):
    """The FeatureStatistics of pooled features of train (N, D), or None where they do not suffice.

    The threshold is the QUANTILE of the distances of valid (M, D) and of the images of train, each
    measured from statistics of the others: those of images that are among them would be too small.
    It is raised by a share that falls with their number, for that of few images is uncertain.
    """
    if len(train) < MIN_IMAGES or not (np.isfinite(train).all() and np.isfinite(valid).all()):
        return None
    statistics, number = fit(train), np.arange(len(train)) % FOLDS
    distances = [statistics.distances(valid)]
    for fold in range(FOLDS):
        distances.append(fit(train[number != fold]).distances(train[number == fold]))
    distances = np.concatenate(distances)
    threshold = np.quantile(distances, QUANTILE) * (1 + 1 / math.sqrt(len(distances)))
    return statistics._replace(threshold=max(float(threshold), TINY))


@contextmanager
def recording_features(network):
    """A context that pools the features of a UNet's passes, over an image or over its tiles.

    Yields a function that returns them, float64 (B, D), of the images that have passed. Margins of
    tiles count like other pixels.
    """
    levels = range(min(LEVELS, network.architecture.depth))
    sums, pixels = [0] * len(levels), [0] * len(levels)  # of features and of their squares

    def record(level, block, inputs, outputs):
        features = outputs[1].float()  # before pooling to the next level
        # Of a tile the means, not the sums: those of float32 would lose digits.
        moments = torch.cat([features.mean((2, 3)), features.square().mean((2, 3))], 1)
        count = features[0, 0].numel()
        sums[level] = sums[level] + moments.cpu().numpy().astype(float) * count
        pixels[level] += count

    def pooled():
        columns = []
        for level in levels:
            mean, square = np.split(sums[level] / pixels[level], 2, axis=1)
            columns += [mean, np.sqrt(np.maximum(square - mean**2, 0))]
        return np.concatenate(columns, 1)

    with ExitStack() as hooks:
        for level in levels:
            block = network.get_submodule(f"down{level + 1}")
            hooks.enter_context(block.register_forward_hook(partial(record, level)))
        yield pooled
