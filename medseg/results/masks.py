"""The masks of a picture or a volume, with what is measured of them, and the line on them."""

from typing import NamedTuple

import numpy as np

from medseg.inference import MAX_LEVEL, full_size_masks, full_size_stripes
from medseg.pieces import class_mask, class_masks, clean_masks, number_pieces, spell_clean

MAX_OBJECTS = 65535  # which 16 bits count


class Masks(NamedTuple):
    """The masks of one prediction, (H, W), or of all slices of a volume, (N, H, W).

    labels: class numbers, uint8, as they are drawn. measured: the same, or of classes that overlap
    the mask of each, bool (C, ...). highest: the highest probability of each class, (C,); sums:
    what `sum_probabilities` gives, (C,). marked: the pixels of each class before the clean-up,
    (C,). levels: uint16 (H, W) of each class, (C, N, H, W) of a volume, where they are wanted.
    """

    labels: np.ndarray
    measured: np.ndarray
    highest: np.ndarray
    sums: np.ndarray
    marked: np.ndarray | None = None
    levels: np.ndarray | tuple = ()

    def of_class(self, number):
        """The mask of a class, bool (H, W) or (N, H, W)."""
        return class_mask(self.measured, number)


def make_masks(model, probabilities, size, spacing=None, *, inference=None, write=()):
    """The Masks of an image from its probabilities, float32 (C, S, S).

    model: a `medseg.predictor.Predictor`; size: (width, height) of the image; spacing: mm of its
    pixels along each axis, or None; inference: by default the model's; write: names of
    `medseg.results.folder.WRITTEN`, which tell whether levels are wanted.
    """
    inference, exclusive = inference or model.inference, model.info.exclusive
    masks = full_size_masks(probabilities, size, inference.threshold, exclusive=exclusive)
    classes = range(1, len(probabilities) + 1)
    marked = np.array([np.count_nonzero(class_mask(masks, number)) for number in classes])
    labels = measured = clean_masks(masks, inference.clean, spacing)
    if not exclusive:
        labels = np.zeros(size[::-1], np.uint8)
        for number in model.info.draw_order:  # each is drawn over those before it
            labels[measured[number - 1]] = number
    sums, wanted = sum_probabilities(measured, probabilities), "probability" in write
    levels = full_size_levels(probabilities, size) if wanted else ()
    return Masks(labels, measured, probabilities.max((1, 2)), sums, marked, levels)


def full_size_levels(probabilities, size):
    """float32 (C, S, S) of 0..1 -> uint16 (C, height, width) of 0..MAX_LEVEL."""
    levels = np.zeros((len(probabilities), *size[::-1]), np.uint16)
    for columns, stripe in full_size_stripes(probabilities, size):
        levels[..., columns] = np.rint(stripe * MAX_LEVEL)
    return levels


def sum_probabilities(masks, probabilities):
    """float64 (C,): the sum of a class's probabilities over the pixels of its mask, of each class.

    masks: as of `medseg.pieces.class_masks`, of a picture; probabilities: float32 (C, S, S).
    """
    sums, size = np.zeros(len(probabilities)), masks.shape[:-3:-1]
    for number, (rows, sides), mask in class_masks(masks):
        for columns, (stripe,) in full_size_stripes(probabilities[[number - 1]], size, sides):
            marked = mask[:, columns.start - sides.start : columns.stop - sides.start]
            sums[number - 1] += stripe[rows][marked].sum(dtype=np.float64)
    return sums


def stack_masks(slices):
    """The Masks of a volume from those of its slices."""
    labels, measured, highest, sums, marked, levels = zip(*slices, strict=True)
    labels = np.stack(labels)
    measured = np.stack(measured, 1) if measured[0].dtype == bool else labels
    levels = np.stack(levels, 1) if len(levels[0]) else ()
    return Masks(labels, measured, np.max(highest, 0), sum(sums), sum(marked), levels)


def describe(path, masks, class_names, inference):
    """A line on a prediction, or with several classes one for each.

    masks: its Masks; inference: the `medseg.inference.Inference` that made them. The highest
    probability of a class tells why its mask is empty.
    """
    lines = [] if len(class_names) == 1 else [f"{path}:"]
    for number, name in enumerate(class_names, 1):
        what = f"{path}: foreground" if len(class_names) == 1 else f"  {name}"
        count, before = np.count_nonzero(masks.of_class(number)), masks.marked[number - 1]
        how = f"above {inference.threshold:g}"
        if before != count:
            how = f"({before} pixels {how}, {count} after {spell_clean(inference.clean)})"
        share, highest = 100 * count / masks.labels.size, masks.highest[number - 1]
        lines.append(f"{what} {share:.2f} % {how}, highest probability {highest:.3f}")
    return "\n".join(lines)


def number_objects(masks, path):
    """Numbers of all connected pieces, uint16 of the shape of labels, from 1 on class by class.

    Where classes overlap, a pixel is of the class that the labels show. ValueError, which names the
    image at `path`, where there are too many.
    """
    numbers, count = np.zeros(masks.labels.shape, np.uint16), 0
    for number, box, mask in class_masks(masks.measured):
        pieces, sizes, _ = number_pieces(mask)
        if count + len(sizes) > MAX_OBJECTS:
            raise ValueError(
                f"{path}: more than {MAX_OBJECTS} objects, which 16 bits cannot number: remove "
                "specks with --clean min-area=9"
            )
        visible = masks.labels[box] == number
        numbers[box][visible] = pieces[visible] + count
        count += len(sizes)
    return numbers
