"""Whether an image is unlike those of the training (out-of-distribution detection). No torch.

The features of the first levels of the encoder are pooled over the image: their mean and deviation,
channel by channel. The Mahalanobis distance of these from those of the training images is what
tells: Lee et al., "A Simple Unified Framework for Detecting Out-of-Distribution Samples and
Adversarial Attacks", NeurIPS 2018, section 2, with a single class. Their covariance is that of
probabilistic PCA (Tipping, Bishop, JRSS B 1999), which needs few images and few numbers.
"""

import base64
import binascii
import math
from functools import partial
from typing import NamedTuple

import numpy as np

from medseg.tiles import WHOLE

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

    n_features: those that the network has. Raises ValueError for anything else.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"threshold", "levels", "values"}:
        raise ValueError(f"feature statistics {value!r:.60}")
    threshold, levels, text = value["threshold"], value["levels"], value["values"]
    if type(levels) is not int or levels != LEVELS:
        raise ValueError(f"feature statistics of {levels!r:.20} levels")
    if type(threshold) not in (int, float) or not 0 < threshold < 1e9:
        raise ValueError(f"feature statistics with threshold {threshold!r:.20}")
    longest = 2 * n_features + 1 + COMPONENTS * (n_features + 1)
    if not isinstance(text, str) or len(text) > 4 * (4 * longest // 3 + 1):
        raise ValueError(f"feature statistics of {text!r:.40}")
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
    except (ValueError, binascii.Error):
        raise ValueError(f"feature statistics of {text!r:.40}") from None
    count, rest = divmod(len(values) - 2 * n_features - 1, n_features + 1)
    if rest or not 1 <= count <= COMPONENTS:
        raise ValueError(f"feature statistics of {len(values)} numbers for {n_features} features")
    ends = np.cumsum([n_features, n_features, count, 1])
    mean, scale, variances, residual, components = np.split(values, ends)
    if not np.isfinite(values).all() or min(scale.min(), variances.min(), residual[0]) <= 0:
        raise ValueError("feature statistics that are no mean and covariance")
    components = components.reshape(count, n_features)
    return FeatureStatistics(mean, scale, variances, residual, components, float(threshold))


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


class FeatureRecorder:
    """Pools the features of a UNet in the forward passes that it is asked to look at.

    It hooks the network; nothing else changes, and a pass that it does not look at costs nothing.
    """

    def __init__(self, network):
        levels = range(1, min(LEVELS, network.architecture.depth) + 1)
        blocks = [network.get_submodule(f"down{level}") for level in levels]
        self._hooks = [
            block.register_forward_hook(partial(self._record, block is blocks[-1]))
            for block in blocks
        ]
        self._moments, self._parts, self._inside = [], [], None

    def look(self, inside=WHOLE):
        """Look at the next forward pass, at the pixels `inside` (as of `medseg.tiles.by_tiles`)."""
        self._inside = inside

    def _record(self, is_last, block, inputs, outputs):
        if self._inside is None:
            return
        scale = 2 ** (len(self._moments) // 2)  # pixels of the image in one of this level
        inside = (
            slice(side.start and side.start // scale, side.stop and -(-side.stop // scale))
            for side in self._inside
        )
        features = outputs[1][(..., *inside)].float()  # before pooling to the next level
        self._moments += [features.mean((2, 3)), features.square().mean((2, 3))]
        if is_last:
            self._parts.append((features[0, 0].numel(), self._moments))
            self._moments, self._inside = [], None

    def take(self):
        """Pooled features, float64 (B, D), of the passes looked at since the last call, or None.

        Those of several passes are of parts of the same images, and count by their pixels.
        """
        parts, self._parts, self._moments, self._inside = self._parts, [], [], None
        if not parts:
            return None
        weights = [pixels for pixels, _ in parts]
        columns = []
        for moment in zip(*(moments for _, moments in parts), strict=True):
            values = [one.cpu().numpy().astype(float) for one in moment]
            columns.append(np.average(values, axis=0, weights=weights))
        pooled = []
        for mean, square in zip(columns[0::2], columns[1::2], strict=True):
            pooled += [mean, np.sqrt(np.maximum(square - mean**2, 0))]
        return np.concatenate(pooled, 1)

    def remove(self):
        """Take the hooks off the network."""
        for hook in self._hooks:
            hook.remove()
