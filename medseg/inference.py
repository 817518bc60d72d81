"""How masks are made with a network: threshold, averaging over flips, clean-up.

`medseg.training.tuning` chooses it on valid, the weights carry it, and prediction follows it.
"""

from typing import NamedTuple

import numpy as np

from medseg.cli import parse_named_values
from medseg.full_size import full_size_labels, full_size_mask
from medseg.pieces import CLEANINGS, clean_labels, count_numbers, describe_clean, pixel_area

# {name: axes of (..., H, W) that are reversed}
FLIPS = {"horizontal": (-1,), "vertical": (-2,), "both": (-2, -1)}
# The same after H and W have changed places; the degrees are counterclockwise.
TURNS = {"transpose": (), "turn90": (-2,), "turn270": (-1,), "antitranspose": (-2, -1)}
VIEWS = (*FLIPS, *TURNS)  # with the image as it is, all symmetries of a square


class Inference(NamedTuple):
    """What turns a network into masks; by default, the tutorial's threshold and nothing else.

    threshold: foreground is above this probability. flips: names of VIEWS, over which and the image
    as it is the probabilities are averaged. clean: as --clean, see `medseg.pieces`.
    """

    threshold: float = 0.5
    flips: tuple = ()
    clean: str = "none"

    def labels(self, probabilities, size, spacing=None, *, marked=None):
        """float32 (C, S, S) -> class numbers, uint8 (height, width), as they are written.

        The most probable class counts. size: (width, height) of the image; spacing: mm of its
        pixels along each axis, or None. marked: int64 (256,), to which the pixels of each number
        before the clean-up are added, where there is one.
        """
        labels = full_size_labels(probabilities, size, self.threshold)
        if marked is not None and self.clean != "none":
            marked += count_numbers(labels)
        return clean_labels(labels, self.clean, pixel_area(spacing))

    def masks(self, probabilities, size, *, exclusive=True, spacing=None, marked=None):
        """Yield the same as the mask of each class, bool (height, width).

        exclusive: whether a pixel has one class; if not, each class counts by its own mask.
        """
        if exclusive or len(probabilities) == 1:
            labels = self.labels(probabilities, size, spacing, marked=marked)
            yield from (labels == number for number in range(1, len(probabilities) + 1))
            return
        for number, channel in enumerate(probabilities, 1):
            own = full_size_mask(channel, size, self.threshold).view(np.uint8)
            if marked is not None:
                marked[number] += np.count_nonzero(own)
            yield clean_labels(own, self.clean, pixel_area(spacing)).view(bool)

    def as_dict(self):
        """As it is recorded: plain values, which JSON has too."""
        return {"threshold": self.threshold, "flips": list(self.flips), "clean": self.clean}

    def extras(self):
        """What is done beside the threshold, in words: ['flips', 'largest piece'], or less."""
        flips = tuple(self.flips or ())  # a list, where a report has them
        parts = [SPELLED.get(flips, f"flips ({', '.join(flips)})")] if flips else []
        return [*parts, *describe_clean(self.clean)]

    def __str__(self):
        """'threshold 0.45, flips, largest piece'"""
        return ", ".join([f"threshold {self.threshold:g}", *self.extras()])


PLAIN = Inference()
LEARNED_TURNS = ("both", "turn90", "turn270")
SPELLED = {tuple(FLIPS): "flips", VIEWS: "flips and turns", LEARNED_TURNS: "turns"}


def read_inference(value):
    """The Inference that metadata hold as `Inference.as_dict` gives it; None for None.

    Raises ValueError where a value is none that it can have.
    """
    if value is None:
        return None
    threshold, clean = float(value["threshold"]), value["clean"]
    if not 0 <= threshold <= 1:
        raise ValueError(f"inference at threshold {threshold:g}")
    parse_named_values(clean, CLEANINGS)
    return Inference(threshold, read_flips(value["flips"]), clean)


def read_flips(value):
    """The names of VIEWS that metadata hold as a list, as a tuple. ValueError for anything else."""
    if [name for name in VIEWS if name in value] != list(value):
        raise ValueError(f"flips {value!r:.60}")
    return tuple(value)


def learned_flips(strengths):
    """The names of VIEWS that a training has shown; strengths: of its augmentations."""
    flips = bool(strengths.get("flip") or strengths.get("mirror"))
    if strengths.get("turn"):
        return VIEWS if flips else LEARNED_TURNS
    if strengths.get("flip"):
        return tuple(FLIPS)
    return ("horizontal",) if flips else ()


def flips_to_average(recorded, trained_flips=()):
    """The names of VIEWS that --tta takes: those chosen on valid, else those of the training.

    recorded: the Inference in the weights, or None. Where neither is known, those of FLIPS.
    """
    return (recorded or PLAIN).flips or trained_flips or tuple(FLIPS)


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


def view(images, name):
    """A tensor (..., H, W) as one of VIEWS; None is the image as it is."""
    if name in TURNS:
        return images.swapaxes(-1, -2).flip(TURNS[name])
    return images.flip(FLIPS[name]) if name else images


def undo_view(images, name):
    """What `view` has made into these."""
    if name in TURNS:
        return images.flip(TURNS[name]).swapaxes(-1, -2)
    return view(images, name)
