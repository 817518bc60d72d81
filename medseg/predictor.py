"""From images to probabilities: passes through networks, by flips and by tiles, and their mean."""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from medseg.device import available_device, out_of_memory
from medseg.inference import PLAIN, Inference, undo_view, view
from medseg.metrics import dice_score
from medseg.ood import recording_features
from medseg.tiles import apply_by_tiles

COMMON = ("class_names", "image_size", "window", "orientation")  # what several models share


class Prediction(NamedTuple):
    """What is predicted for one image; None is what is not known.

    probabilities: float32 (C, S, S). agreement: 0..1, the mean Dice between the masks of two
    members, which are the networks and the flips of each: about what Dice one of them would have if
    another were right. unlike: distance from the training images, in units of the distance above
    which an image is unlike them (`medseg.ood`).
    """

    probabilities: np.ndarray
    agreement: float | None = None
    unlike: float | None = None


class Predictor:
    """Networks of the same images and classes, and how masks are made with them.

    networks: [UNet], or other modules with an `info` given. names: their files, for messages. info:
    what they have in common, a `net.ModelInfo`; by default, of `common_info`. inference: the
    `medseg.inference.Inference` to predict with; by default, the recorded one. autocast: a context
    for the networks, see `medseg.device.make_autocast`.
    """

    def __init__(
        self, networks, device, *, names=(), info=None, inference=None, autocast=nullcontext()
    ):
        self.networks, self.device = networks, available_device(device)
        self.info = info or common_info(networks, names)
        self.n_channels = channels_of(networks[0])
        self.inference = inference or self.info.inference or PLAIN
        self.autocast = autocast
        # How many images at a time: more do not fit a CPU's caches.
        self.batch_size = 4 if self.device.type == "cpu" else 16
        if self.info.image_size is None:  # images keep their own
            self.batch_size = 1

    def __call__(self, images):
        """Images (B, n_channels, H, W) -> probabilities, float32 (B, C, H, W).

        images: a tensor, normalised float32, or uint8, which is normalised part by part. Averaged
        over networks and flips. What is returned is on the device, or on the CPU where an image is
        divided. Raises ValueError where the memory does not suffice.
        """
        return self._average(images)[0]

    def predict(self, images):
        """Images, as above -> [`Prediction`] of each."""
        probabilities, masks, ratios = self._average(images, assess=True)
        columns = []
        for column in (pairwise_dice(masks), np.mean(ratios, 0) if ratios else None):
            columns.append([None] * len(images) if column is None else column.tolist())
        probabilities = probabilities.cpu().numpy()
        return [Prediction(*values) for values in zip(probabilities, *columns, strict=True)]

    @torch.inference_mode()
    def _average(self, images, *, assess=False):
        """(mean probabilities, packed masks of each member, distances from the training images).

        The last two are empty without `assess`; see `pairwise_dice` and `medseg.ood`.
        """
        total, masks, ratios = 0, [], []
        count = len(self.networks) * (1 + len(self.inference.flips))
        for network, name in itertools.product(self.networks, (None, *self.inference.flips)):
            known = getattr(network, "info", self.info).feature_statistics
            assessed = assess and known and name is None
            recording = recording_features(network) if assessed else nullcontext()
            with self.autocast, _out_of_memory(images, self.device), recording as pooled:
                one = apply_by_tiles(network, view(images, name), self.device)
            one = undo_view(one, name)
            if assessed:
                ratios.append(known.ratios(pooled()))
            if assess and count > 1:
                marked = (one > self.inference.threshold).flatten(2)
                masks.append(np.packbits(marked.cpu().numpy(), axis=-1))
            total = one.add_(total)  # in place: large images fill the memory
        return (total.div_(count) if count > 1 else total), masks, ratios


@contextmanager
def _out_of_memory(images, device):
    """Turn memory that does not suffice into a ValueError with the size of the images."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        count, _, height, width = images.shape
        other = "" if device.type == "cpu" else "try --device cpu, or "
        raise ValueError(
            f"out of {memory} with {count} x {width}x{height} pixels: {other}give smaller images"
        ) from None


def channels_of(network):
    """Those that a UNet has, or the three of the tutorial."""
    return getattr(network, "n_channels", 3)


def common_info(networks, names=()):
    """The `net.ModelInfo` of networks whose probabilities are averaged.

    names: their files. Thresholds are averaged; flips and clean-up count where all have the same.
    Raises ValueError that names the first network that differs in what all must share.
    """
    infos = [network.info for network in networks]
    shared = [
        {"channels": channels_of(network), **{key: getattr(network.info, key) for key in COMMON}}
        for network in networks
    ]
    for name, values in zip(names, shared, strict=False):
        for key, value in values.items():
            if value != shared[0][key]:
                raise ValueError(
                    f"{name}: {key} {value}, but {names[0]} has {shared[0][key]}: models predict "
                    "together only where they agree"
                )
    inference = None
    if any(info.inference for info in infos):
        thresholds, flips, cleans = zip(*(info.inference or PLAIN for info in infos), strict=True)
        mean = sum(thresholds) / len(thresholds)
        inference = Inference(mean, _shared(flips, ()), _shared(cleans, {}))
    return replace(
        infos[0],
        inference=inference,
        trained_flips=_shared([info.trained_flips for info in infos], ()),
        draw_order=next((info.draw_order for info in infos if info.draw_order), ()),
        feature_statistics=None,
    )


def _shared(values, otherwise):
    return values[0] if all(value == values[0] for value in values) else otherwise


def pairwise_dice(masks):
    """float64 (B,): the mean Dice of all pairs of members and of the classes; None of a single one.

    masks: of each member uint8 (B, C, bytes), as np.packbits packs its pixels. Two empty masks
    agree: 1. An empty one and another do not: 0. Roy et al.: "Inherent Brain Segmentation Quality
    Control from Fully ConvNet Monte Carlo Sampling", MICCAI 2018, have this mean as d_MC, for
    samples of one network.
    """
    pairs, bits = [], np.array([number.bit_count() for number in range(256)], np.uint8)
    for one, other in itertools.combinations(masks, 2):
        either, both = (bits[packed].sum(-1) for packed in (one | other, one & other))
        pairs.append(dice_score(both, either - both, 0))
    return np.mean(pairs, axis=(0, 2)) if pairs else None
