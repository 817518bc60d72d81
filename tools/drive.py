"""DRIVE's usual figures: area under the ROC curve, sensitivity, specificity in the field of view.

    python tools/drive.py DRIVE/test --model runs/vessels/best_model.pth --threshold 0.45

DRIVE/test is the folder as published, with images/, 1st_manual/ and mask/, the field of view.
Images are predicted at the model's size and scored at their own. The threshold is to come from
the validation part of the training images: "chosen_threshold" in report.json of predict.py.
"""

from pathlib import Path

import harness  # noqa: F401  from where the scripts are found
import numpy as np
from PIL import Image

from medseg.cli import ArgumentParser
from medseg.predictor import Predictor


def roc_auc(probabilities, targets):
    """Area under the ROC curve of float values against bools; ties count half.

    It is the probability that a foreground pixel has a higher value than one of background:
    Hanley, McNeil, Radiology 1982.
    """
    values, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # of each value, from 1, the mean where tied
    positives = int(targets.sum())
    negatives = targets.size - positives
    rank_sum = ranks[inverse][targets].sum()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def scores_at(probabilities, targets, threshold):
    """Dice, sensitivity, specificity and accuracy of the pixels, as a dict."""
    preds = probabilities > threshold
    tp, fp = (preds & targets).sum(), (preds & ~targets).sum()
    fn, tn = (~preds & targets).sum(), (~preds & ~targets).sum()
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "sensitivity": tp / (tp + fn),
        "specificity": tn / (tn + fp),
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
    }


def read_mask(folder, number):
    """The one file of a folder whose name begins with `number`, as a bool array (H, W)."""
    (path,) = folder.glob(f"{number}_*")
    return np.asarray(Image.open(path).convert("L")) > 127


def measure(folder, model, threshold):
    """{"whole image": scores, "field of view": scores}, over the pixels of all images."""
    from predict import preprocess_image

    parts = {"whole image": [], "field of view": []}
    for path in sorted((folder / "images").iterdir()):
        number = path.name[:2]
        tensor, _ = preprocess_image(path, image_size=model.info.image_size)
        probabilities = Predictor([model], "cpu")(tensor)[0, 0].numpy()
        target = read_mask(folder / "1st_manual", number)
        if probabilities.shape != target.shape:  # a model that resizes
            size = target.shape[::-1]
            image = Image.fromarray(probabilities).resize(size, Image.Resampling.BILINEAR)
            probabilities = np.asarray(image)
        inside = read_mask(folder / "mask", number)
        parts["whole image"].append((probabilities.ravel(), target.ravel()))
        parts["field of view"].append((probabilities[inside], target[inside]))
    result = {}
    for name, pairs in parts.items():
        probabilities, targets = map(np.concatenate, zip(*pairs, strict=True))
        scores = scores_at(probabilities, targets, threshold)
        result[name] = {**scores, "auc": roc_auc(probabilities, targets)}
    return result


def main(argv=None):
    from predict import load_model

    parser = ArgumentParser("tools/drive.py", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="best_model.pth")
    parser.add_argument("--threshold", type=float, default=0.5)
    args = parser.parse_args(argv)
    result = measure(args.folder, load_model(args.model, "cpu"), args.threshold)
    for name, scores in result.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))


if __name__ == "__main__":
    main()
