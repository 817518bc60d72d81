"""How masks are made with a network: threshold, averaging over flips, clean-up. No torch.

`medseg.training.tuning` chooses it on valid, the weights carry it, and prediction follows it.
"""

from typing import NamedTuple

import numpy as np

from medseg.cli import parse_named_values
from medseg.pieces import CLEANINGS, clean_masks, describe_clean

# {name: axes of (..., H, W) that are reversed}
FLIPS = {"horizontal": (-1,), "vertical": (-2,), "both": (-2, -1)}
MAX_TEXT = 200  # characters of a clean-up


class Inference(NamedTuple):
    """What turns a network into masks; by default, the tutorial's threshold and nothing else.

    threshold: foreground is above this probability. flips: names of FLIPS, over which and the image
    as it is the probabilities are averaged. clean: as --clean, see `medseg.pieces`.
    """

    threshold: float = 0.5
    flips: tuple = ()
    clean: str = "none"

    def masks(self, probabilities):
        """float32 array (C, H, W) -> bool (C, H, W); min-area counts pixels of this array."""
        return clean_masks(probabilities > self.threshold, self.clean)

    def as_dict(self):
        """As it is recorded: plain values, which JSON has too."""
        return {"threshold": self.threshold, "flips": list(self.flips), "clean": self.clean}

    def extras(self):
        """What is done beside the threshold, in words: ['flips', 'largest piece'], or less."""
        parts = []
        if self.flips:
            every = len(self.flips) == len(FLIPS)
            parts.append("flips" if every else f"flips ({', '.join(self.flips)})")
        return [*parts, *describe_clean(self.clean)]

    def __str__(self):
        """'threshold 0.45, flips, largest piece'"""
        return ", ".join([f"threshold {self.threshold:g}", *self.extras()])


PLAIN = Inference()


def read_inference(value):
    """The Inference that metadata hold as `Inference.as_dict` gives it; None for None.

    Raises ValueError for anything else, also for what a later version may do: masks made in
    another way than was chosen would pass unnoticed.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != PLAIN.as_dict().keys():
        raise ValueError(f"inference {value!r:.60}")
    threshold, flips, clean = (value[name] for name in Inference._fields)
    if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
        raise ValueError(f"inference at threshold {threshold!r:.20}")
    known = isinstance(flips, list) and len(flips) <= len(FLIPS)
    if not known or [name for name in FLIPS if name in flips] != flips:
        raise ValueError(f"inference with flips {flips!r:.60}")
    if not isinstance(clean, str) or len(clean) > MAX_TEXT:
        raise ValueError(f"inference with clean-up {clean!r:.60}")
    try:
        parse_named_values(clean, CLEANINGS)
    except ValueError as error:
        raise ValueError(f"inference with clean-up {clean!r:.60}: {error}") from None
    return Inference(float(threshold), tuple(flips), clean)


def combine(inferences):
    """The Inference of several models whose probabilities are averaged.

    inferences: that of each, None where a file records none. The mean of their thresholds, and the
    flips and the clean-up where all have the same. None where no file records any.
    """
    if all(one is None for one in inferences):
        return None
    thresholds, flips, clean = zip(*(one or PLAIN for one in inferences), strict=True)
    return Inference(
        sum(thresholds) / len(thresholds),
        flips[0] if len(set(flips)) == 1 else PLAIN.flips,
        clean[0] if len(set(clean)) == 1 else PLAIN.clean,
    )


def average_over_flips(run, images, flips):
    """Mean of what run() gives for images (B, C, H, W) as they are and for each of their flips.

    run(images) -> probabilities (B, C, H, W), which are flipped back; tensors or arrays. Without
    flips it is run(images), to the last bit.
    """
    total = run(images)
    for name in flips:
        total = total + flip(run(flip(images, FLIPS[name])), FLIPS[name])
    return total / (1 + len(flips)) if flips else total


def flip(images, axes):
    """A tensor or an array with these axes reversed."""
    return images.flip(axes) if hasattr(images, "flip") else np.flip(images, axes)
