"""A folder with annotations: its predictions scored, and reported."""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Batches, load_split, open_split
from medseg import coco, metrics
from medseg.predicting.report import FolderScores, write_report


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
    """Write report.json and report.png of an annotated folder to `output`.

    scores: its FolderScores after the predictions; images that it has not met are predicted here.
    predict_image(PIL image) -> `medseg.predictor.Prediction`. Returns what report.json holds.
    The threshold that suits the model best is sought in the split `valid` beside the folder, never
    in the folder itself.
    Raises FileNotFoundError or ValueError where an annotated image cannot be read or predicted.
    """
    scores.complete(predict_image)
    valid, sweep = Path(folder).resolve().parent / "valid", None
    if (valid / coco.ANNOTATIONS).exists() and not valid.samefile(folder):
        sweep = sweep_thresholds(model, valid, scores.spacing)
    return write_report(output, str(folder), scores, sweep, model.info.class_names)


def sweep_thresholds(model, folder, spacing=None):
    """The Dice of a split at each threshold of metrics.SWEEP, and the threshold of the highest.

    None where no image of the split has foreground. Flips and clean-up are the model's. spacing: mm
    of a pixel along each axis, or None.
    """
    dataset, names = _open(open_split, model, folder), model.info.class_names
    sizes = {"n_channels": model.n_channels, "n_classes": len(names)}
    batches = Batches(_open(load_split, model, folder), model.batch_size, model.device, **sizes)
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
