"""A folder with annotations: its predictions compared with them, and reported."""

import math
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Batches, Order, Transform, load_split, open_split
from medseg import coco, metrics
from medseg.images import resize_nearest
from medseg.inference import PLAIN
from medseg.plots import reduce_case
from medseg.predicting.report import count_calibration, surface_scores, write_report


class FolderScores:
    """The predictions of an annotated folder, compared with its annotations as they are made.

    What is scored are the masks that are written, at the size of each image. dataset: the folder as
    `data.COCOSegmentationDataset`. inference: the `medseg.inference.Inference` of the predictions.
    exclusive: whether a pixel has one class, which is then the most probable. spacing: mm of a
    pixel along each axis, or None: those that the import recorded, where all images have them.
    """

    def __init__(self, dataset, inference=PLAIN, *, exclusive=True, spacing=None):
        self.dataset, self.inference, self._exclusive = dataset, inference, exclusive
        records = [dataset.coco.imgs[image_id] for image_id in dataset.image_ids]
        spacings = [spacing or coco.recorded_spacing(record) for record in records]
        self._spacings = spacings if all(spacings) else [None] * len(spacings)
        self.spacing = next(iter(self._spacings), None)
        self.thresholds = [inference.threshold, *metrics.SWEEP]
        self._indices = {dataset.path(index).resolve(): index for index in range(len(dataset))}
        # index -> counts (T, C, 4), `surface_scores` (C, 2), calibration (C, BINS, 3), run lengths
        self._images = {}

    def add(self, path, size, probabilities):
        """Compare the probabilities, float32 (C, S, S), of an image with its annotations.

        size: (width, height) of the image. May be called from several threads. Returns the Dice of
        each class, (C,), or None where the image has no record or its annotations are damaged:
        `missing` has it.
        """
        index = self._indices.get(path.resolve())
        with suppress(ValueError):
            return None if index is None else self.compare(index, size, probabilities)

    def compare(self, index, size, probabilities):
        """As `add`, of an image by its index; ValueError where its annotations are damaged."""
        from pycocotools import mask as coco_mask

        targets, spacing = self.dataset.true_masks(index, size), self._spacings[index]
        options = {"exclusive": self._exclusive, "spacing": spacing}
        preds = self.inference.masks(probabilities, size, **options)
        distances, encoded, reduced, known = [], [], [], metrics.known_pixels(targets)
        for target, pred in zip(targets, preds, strict=True):
            pred = pred & known
            distances.append(surface_scores(pred, target, spacing or (1, 1)))
            encoded.append(coco_mask.encode(np.asfortranarray(pred, dtype=np.uint8)))
            reduced.append(resize_nearest(target, *probabilities.shape[1:]))
        counted = resize_nearest(known, *probabilities.shape[1:])
        calibration = count_calibration(reduced, probabilities, counted)
        clean = self.inference.clean
        counts = metrics.count_image(targets, probabilities, self.thresholds, clean, **options)
        self._images[index] = counts, distances, calibration, encoded
        return metrics.image_dice(counts[0])

    def missing(self):
        """The indices of the annotated images that have not been compared."""
        return [index for index in range(len(self.dataset)) if index not in self._images]

    def result(self):
        """Counts (N, T, C, 4), at `thresholds`, and `surface_scores` (N, C, 2) of all images.

        And `count_calibration` (C, BINS, 3) of their probabilities.
        """
        images = [self._images[index] for index in range(len(self.dataset))]
        counts, distances, calibration, _ = zip(*images, strict=True)
        return np.stack(counts), np.array(distances), sum(calibration)

    def case(self, index):
        """`medseg.plots.reduce_case` of an image, its true and its predicted masks."""
        from pycocotools import mask as coco_mask

        image = self.dataset.read(index)
        pixels = np.asarray(image.rgb())
        preds = (coco_mask.decode(one) for one in self._images[index][-1])
        return reduce_case(pixels, self.dataset.true_masks(index, image.size), preds)


def open_folder(model, folder, spacing=None):
    """The FolderScores of a folder with annotations, for the predictions of a `Predictor`.

    spacing: mm of a pixel along each axis, or None.
    Raises ValueError where the annotations are damaged or of other classes.
    """
    dataset = _open(open_split, model, folder.resolve())  # `dataset/test/` and `.` have a parent
    coco.check_classes(dataset.coco, dataset.classes, folder)
    exclusive = model.info.exclusive
    return FolderScores(dataset, model.inference, exclusive=exclusive, spacing=spacing)


def report(model, folder, scores, output, predict_image):
    """Write report.json and report.png of an annotated folder to `output`, print its scores.

    scores: its FolderScores after the predictions; images that it has not met, as those with a
    record in a folder further down, are predicted here.
    predict_image(Picture) -> `medseg.predictor.Prediction`.
    The threshold that suits the model best is sought in the split `valid` beside the folder, never
    in the folder itself.
    Raises FileNotFoundError or ValueError where an annotated image cannot be read or predicted.
    """
    for index in scores.missing():
        image = scores.dataset.read(index)
        scores.compare(index, image.size, predict_image(image).probabilities)
    valid, sweep = Path(folder).resolve().parent / "valid", None
    if (valid / coco.ANNOTATIONS).exists() and not valid.samefile(folder):
        sweep = sweep_thresholds(model, valid, scores.spacing)
    write_report(output, str(folder), scores, sweep, model.info.class_names)


def sweep_thresholds(model, folder, spacing=None):
    """The Dice of a split at each threshold of metrics.SWEEP, and the threshold of the highest.

    None where no image of the split has foreground. Flips and clean-up are the model's. spacing: mm
    of a pixel along each axis, or None.
    """
    dataset, names = _open(open_split, model, folder), model.info.class_names
    rows, transform = _open(load_split, model, folder), Transform(model.n_channels, len(names))
    batches = Batches(rows, Order(model.batch_size), model.device, transform=transform)
    bar = tqdm(batches, "valid", unit=" batches", disable=None)
    predicted = (one for images, _ in bar for one in model(images).cpu().numpy())
    pairs = ((dataset.true_masks(index), one) for index, one in enumerate(predicted))
    options = {"exclusive": model.info.exclusive, "spacing": spacing}
    counts = metrics.count_pixels(pairs, metrics.SWEEP, model.inference.clean, **options)
    dice = [metrics.class_scores(own, names)["dice"] for own in counts.swapaxes(0, 1)]
    if math.isnan(dice[0]):
        return None
    chosen = metrics.SWEEP[int(np.argmax(dice))]
    return {"thresholds": metrics.SWEEP, "dice": dice, "chosen_threshold": chosen}


def _open(function, model, folder):
    """What `open_split` or `load_split` gives of a folder, as the model takes it."""
    names, channels = list(model.info.class_names), model.n_channels
    content = {"classes": names if len(names) > 1 else None, "n_channels": channels}
    return function(folder.parent, folder.name, model.info.image_size, **content)
