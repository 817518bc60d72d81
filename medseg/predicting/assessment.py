"""How far to rely on a prediction: do members agree, is the image like the training? No torch.

Members are the models that are averaged, and the flips of each.
"""

from typing import NamedTuple

import numpy as np

from medseg.tiles import WHOLE

MAX_LISTED = 5  # images named on the screen
CHUNK = 1 << 20  # pixels whose masks are compared at a time
FAR = "unlike the training images"


class Assessment(NamedTuple):
    """Of one prediction; None is what is not known.

    agreement: 0..1, the mean Dice between the masks of two members: about what Dice one of them
    would have if another were right. unlike: distance from the training images, in units of the
    distance above which an image is unlike them (`medseg.ood`).
    """

    agreement: float | None = None
    unlike: float | None = None

    @property
    def is_unlike(self):
        return self.unlike is not None and self.unlike > 1


class Agreement:
    """The mean Dice between the masks of members, each of which is seen once and then forgotten.

    threshold: foreground is above it. members: how many there are of each image, or part of it.
    Roy et al.: "Inherent Brain Segmentation Quality Control from Fully ConvNet Monte Carlo
    Sampling", MICCAI 2018, have the mean Dice of all pairs as d_MC, for samples of one network.
    """

    def __init__(self, threshold, members):
        self.threshold, self.members = threshold, members
        self.inside = WHOLE  # what of the next part counts, the other pixels being of others too
        self._masks, self._overlaps = [], 0

    def add(self, probabilities):
        """Those of one member, (B, C, H, W); all members of a part come before the next part."""
        if self.members > 1:
            masks = np.asarray(probabilities)[(..., *self.inside)] > self.threshold
            self._masks.append(np.packbits(masks.reshape(*masks.shape[:2], -1), axis=-1))
            if len(self._masks) == self.members:
                self._overlaps = self._overlaps + count_overlaps(np.stack(self._masks))
                self._masks = []

    def result(self):
        """float64 (B,), means over the pairs and the classes, or None of a single member.

        Two empty masks agree: 1. An empty one and another do not: 0.
        """
        if np.ndim(self._overlaps) == 0:
            return None
        first, second = np.triu_indices(self.members, 1)
        sizes = np.diagonal(self._overlaps, axis1=-2, axis2=-1)
        totals = sizes[..., first] + sizes[..., second]
        dice = np.ones(totals.shape)
        np.divide(2 * self._overlaps[..., first, second], totals, out=dice, where=totals > 0)
        return dice.mean((1, 2))


def count_overlaps(packed):
    """Pixels that two members both mark, float64 (B, C, M, M); on the diagonal, what each marks.

    packed: uint8 (M, B, C, bytes), masks as np.packbits packs their pixels.
    """
    overlaps = np.zeros((*packed.shape[1:3], len(packed), len(packed)))
    for start in range(0, packed.shape[-1], CHUNK // 8):
        part = np.unpackbits(packed[..., start : start + CHUNK // 8], axis=-1).astype(np.float32)
        part = part.transpose(1, 2, 0, 3)
        overlaps += part @ part.swapaxes(-1, -2)  # whole numbers below 2^24: exact
    return overlaps


def assess(agreements, ratios, count):
    """[Assessment] of `count` images.

    agreements: (B,) or None. ratios: of each model (B,), or None where it does not tell; the mean
    of those that do counts.
    """
    known = [ratio for ratio in ratios if ratio is not None]
    columns = []
    for column in (agreements, np.mean(known, 0) if known else None):
        columns.append([None] * count if column is None else column.tolist())
    return [Assessment(*values) for values in zip(*columns, strict=True)]


def assess_volume(slices):
    """The Assessment of a volume from those of its slices: mean agreement, median distance."""
    columns = zip(*slices, strict=True)
    known = [[value for value in column if value is not None] for column in columns]
    return Assessment(
        *(
            float(of(values)) if values else None
            for of, values in zip((np.mean, np.median), known, strict=True)
        )
    )


def describe_unlike(assessed, what="images"):
    """Lines on the images that are unlike the training.

    assessed: [(title, Assessment)]; what: they are.
    """
    far = sorted((-one.unlike, title) for title, one in assessed if one.is_unlike)
    if len(far) <= MAX_LISTED:
        return [
            f"{title}: {FAR} (distance {-ratio:.1f}, limit 1): do not rely on its mask"
            for ratio, title in far
        ]
    farthest = ", ".join(str(title) for _, title in far[:MAX_LISTED])
    return [
        f"{len(far)} of {len(assessed)} {what} are {FAR}: do not rely on their masks; "
        f"the farthest: {farthest}"
    ]


def print_assessments(assessed, what="images"):
    """Print which images are unlike the training and, of several, which to check first.

    assessed: [(title, Assessment)]; what: they are.
    """
    for line in describe_unlike(assessed, what):
        print(line)
    known = [(one.agreement, title) for title, one in assessed if one.agreement is not None]
    if len(known) == 1:
        print(f"agreement {known[0][0]:.2f}: the mean Dice between members")
    elif lowest := sorted(entry for entry in known if entry[0] < 1)[:MAX_LISTED]:
        listed = ", ".join(f"{title} {agreement:.2f}" for agreement, title in lowest)
        print(f"to check first, for there the members agree least (mean Dice): {listed}")
