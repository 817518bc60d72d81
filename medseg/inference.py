"""How masks are made with a network: averaging over flips, threshold, clean-up.

`medseg.training.tuning` chooses it on valid, the weights carry it, and prediction follows it.
Probabilities are brought to the size of the image a few columns at a time, so that a large image
needs few megabytes besides its masks.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from medseg.pieces import WORDS, class_mask, clean_masks, read_clean, spell_clean
from medseg.samples import STRIPE

# {name: (whether H and W change places, axes of (..., H, W) that are reversed then)}; the degrees
# are counterclockwise. With the image as it is, all symmetries of a square.
SYMMETRIES = {
    "horizontal": (False, (-1,)),
    "vertical": (False, (-2,)),
    "both": (False, (-2, -1)),
    "transpose": (True, ()),
    "turn90": (True, (-2,)),
    "turn270": (True, (-1,)),
    "antitranspose": (True, (-2, -1)),
}
VIEWS = tuple(SYMMETRIES)
FLIPS, LEARNED_TURNS = VIEWS[:3], ("both", "turn90", "turn270")
SPELLED = {FLIPS: "flips", VIEWS: "flips and turns", LEARNED_TURNS: "turns"}
MAX_LEVEL = 65535  # of a probability as 16 bits: 1.0


class Inference(NamedTuple):
    """What turns a network into masks; by default, the tutorial's threshold and nothing else.

    threshold: foreground is above this probability. flips: names of VIEWS, over which and the image
    as it is the probabilities are averaged. clean: as of `medseg.pieces.read_clean`.
    """

    threshold: float = 0.5
    flips: tuple = ()
    clean: dict = {}

    def masks(self, probabilities, size, *, exclusive=True, spacing=None):
        """Yield the mask of each class as it is written, bool (height, width).

        The others as of `full_size_masks`. spacing: mm of a pixel along each axis, or None.
        """
        masks = full_size_masks(probabilities, size, self.threshold, exclusive=exclusive)
        masks = clean_masks(masks, self.clean, spacing)
        yield from (class_mask(masks, number) for number in range(1, len(probabilities) + 1))

    def as_dict(self):
        """As reports have it: plain values, the clean-up as the text of --clean."""
        clean = spell_clean(self.clean)
        return {"threshold": self.threshold, "flips": list(self.flips), "clean": clean}

    def extras(self):
        """What is done beside the threshold, in words: ['flips', 'largest piece'], or less."""
        parts = [SPELLED.get(self.flips, f"flips ({', '.join(self.flips)})")] if self.flips else []
        return [*parts, *(WORDS[name].format(value) for name, value in self.clean.items())]

    def __str__(self):
        """'threshold 0.45, flips, largest piece'"""
        return ", ".join([f"threshold {self.threshold:g}", *self.extras()])


PLAIN = Inference()


def read_inference(value):
    """The Inference that weights or a report hold as a dict; what is missing is as in PLAIN.

    None for None. Raises ValueError where a value is none that it can have.
    """
    if value is None:
        return None
    value = {**PLAIN._asdict(), **value}
    threshold = float(value["threshold"])
    if not 0 <= threshold <= 1:
        raise ValueError(f"inference at threshold {threshold:g}")
    return Inference(threshold, read_flips(value["flips"]), read_clean(value["clean"]))


# ---- flips -----------------------------------------------------------------------------------


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
        return FLIPS
    return ("horizontal",) if flips else ()


def flips_to_average(recorded, trained_flips=()):
    """The names of VIEWS that --tta takes: those chosen on valid, else those of the training.

    recorded: the Inference in the weights, or None. Where neither is known, those of FLIPS.
    """
    return (recorded or PLAIN).flips or trained_flips or FLIPS


def view(images, name):
    """A tensor (..., H, W) as one of VIEWS; None is the image as it is."""
    swapped, axes = SYMMETRIES.get(name, (False, ()))
    images = images.swapaxes(-1, -2) if swapped else images
    return images.flip(axes) if axes else images


def undo_view(images, name):
    """What `view` has made into these."""
    swapped, axes = SYMMETRIES.get(name, (False, ()))
    images = images.flip(axes) if axes else images
    return images.swapaxes(-1, -2) if swapped else images


# ---- at the size of the image ----------------------------------------------------------------


def full_size_stripes(probabilities, size, columns=None, above=-1):
    """Yield (slice of columns, float32 (C, height, columns)) of probabilities at the image's size.

    probabilities: float32 (C, S, S); size: (width, height). Few columns are resized at a time:
    along the rows, then the columns, as Pillow does it. columns: the slice of those that are
    needed, or None for all. above: stripes without a probability above it are left out.
    """
    width, height = size
    if above >= probabilities.max():  # and so is every value between those of its pixels
        return
    probabilities = _resize(probabilities, (width, probabilities.shape[1]))
    first, last, _ = (columns or slice(None)).indices(width)
    step = min(max(8 * STRIPE // len(probabilities), 8), STRIPE)  # many classes are as large
    for start in range(first, last, step):
        part = slice(start, min(start + step, last))
        stripe = probabilities[..., part]
        if not stripe.max() <= above:  # a value may be no number
            yield part, _resize(stripe, (stripe.shape[2], height))


def _resize(channels, size):
    """float32 (C, H, W) -> (C, height, width)."""
    if channels.shape[:0:-1] == size:
        return channels
    resized = np.empty((len(channels), *size[::-1]), np.float32)  # large: np.stack has it twice
    for target, one in zip(resized, channels, strict=True):
        image = Image.fromarray(np.ascontiguousarray(one))
        target[...] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    return resized


def full_size_masks(probabilities, size, threshold, *, exclusive=True):
    """float32 array (C, S, S) of 0..1 -> class numbers, uint8 (height, width), 0 for background.

    size: (width, height). The most probable class counts. exclusive: whether a pixel has one class;
    if not, the mask of each is made by itself, bool (C, height, width).
    """
    shape, count = size[::-1], len(probabilities)
    masks = np.zeros(shape, np.uint8) if exclusive else np.zeros((count, *shape), bool)
    for columns, stripe in full_size_stripes(probabilities, size, above=threshold):
        marked = stripe > np.float32(threshold)
        if exclusive:
            number = np.where(marked, stripe, 0).argmax(0) + 1 if count > 1 else 1
            masks[:, columns] = marked.any(0) * number
        else:
            masks[..., columns] = marked
    return masks
