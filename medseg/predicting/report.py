"""A folder with annotations, scored: report.json and report.png."""

import json
from contextlib import suppress

import numpy as np

from medseg import metrics
from medseg.coco import recorded_group
from medseg.files import atomic_write
from medseg.formats.own_files import REPORT
from medseg.images import preprocess, read_image, resize_nearest
from medseg.inference import PLAIN
from medseg.plots import reduce_case
from medseg.predicting.figure import choose_cases, plot_report


class FolderScores:
    """The predictions of an annotated folder, compared with its annotations as they are made.

    What is scored are the masks that are written, at the size of each image. dataset: the folder as
    `data.COCOSegmentationDataset`. inference: the `medseg.inference.Inference` of the predictions.
    exclusive: whether a pixel has one class, which is then the most probable. spacing: mm of a
    pixel along each axis, or None.
    """

    def __init__(self, dataset, inference=PLAIN, *, exclusive=True, spacing=None):
        self.dataset, self.inference, self.spacing = dataset, inference, spacing
        self.thresholds = [inference.threshold, *metrics.SWEEP]
        self._options = {"exclusive": exclusive, "spacing": spacing}
        self._indices = {}  # of a file; several records may name it
        for index in range(len(dataset)):
            self._indices.setdefault(_identity(dataset.path(index)), []).append(index)
        # index -> counts (T, C, 4), `surface_scores` (C, 2), prediction as run lengths, calibration
        # (C, BINS, 3)
        self._images = {}

    def add(self, path, size, probabilities):
        """Compare the probabilities, float32 (C, S, S), of an image with its annotations.

        size: (width, height) of the image. May be called from several threads. Images without a
        record are left out, and so are those whose annotations are damaged: `missing` has them.
        Returns the Dice of each class, (C,), or None of such an image.
        """
        dice = None
        for index in self._indices.get(_identity(path), ()):
            with suppress(ValueError):
                dice = self.compare(index, size, probabilities)
        return dice

    def compare(self, index, size, probabilities):
        """As `add`, of image `index`. Raises ValueError where its annotations are damaged."""
        from pycocotools import mask as coco_mask

        targets, options = self.dataset.true_masks(index, size), self._options
        preds = self.inference.masks(probabilities, size, **options)
        distances, encoded, reduced = [], [], []
        for target, pred in zip(targets, preds, strict=True):
            distances.append(metrics.surface_scores(pred, target, self.spacing or (1, 1)))
            encoded.append(coco_mask.encode(np.asfortranarray(pred, dtype=np.uint8)))
            reduced.append(resize_nearest(target, *probabilities.shape[1:]))
        calibration = metrics.count_calibration(reduced, probabilities)
        clean = self.inference.clean
        counts = metrics.count_image(targets, probabilities, self.thresholds, clean, **options)
        self._images[index] = counts, distances, encoded, calibration
        return metrics.image_dice(counts[0])

    def missing(self):
        """The indices of the annotated images that have not been compared."""
        return [index for index in range(len(self.dataset)) if index not in self._images]

    def complete(self, predict_image):
        """Predict the images that are missing, as those with a record in a folder further down.

        predict_image(PIL image) -> `medseg.predictor.Prediction`.
        Raises FileNotFoundError or ValueError where one cannot be read or predicted.
        """
        for index in self.missing():
            image = read_image(self.dataset.path(index))
            self.compare(index, image.size, predict_image(image).probabilities)

    def result(self):
        """Counts (N, T, C, 4), at `thresholds`, and `surface_scores` (N, C, 2) of all images."""
        images = [self._images[index] for index in range(len(self.dataset))]
        counts, distances, *_ = zip(*images, strict=True)
        return np.stack(counts), np.array(distances)

    def calibration(self):
        """`count_calibration`, float64 (C, BINS, 3), of all images: of their probabilities."""
        return sum(calibration for *_, calibration in self._images.values())

    def case(self, index):
        """`medseg.plots.reduce_case` of an image, its true and its predicted masks."""
        from pycocotools import mask as coco_mask

        image = read_image(self.dataset.path(index))
        pixels = preprocess(image, None, self.dataset.n_channels)
        targets = self.dataset.true_masks(index, image.size)
        preds = (coco_mask.decode(one) for one in self._images[index][2])
        return reduce_case(pixels, targets, preds)


def _identity(path):
    """The same for every way to name a file; links to one file differ, as their names do."""
    return path.parent.resolve() / path.name


def write_report(output, folder, scores, valid, class_names):
    """Write report.json and report.png on a folder to `output`. Returns what the first holds.

    folder: what it is called; scores: its FolderScores; valid: the `sweep_thresholds` of the split
    in which the threshold that suits the model is sought, or None: it is never sought in the
    folder itself. With several classes a score is the mean over them, and SCORE/CLASS is of each.
    A class of which no image has a pixel has None for its scores and is left out of the means.
    Where groups are recorded, they have scores too, and intervals are of samples of groups.
    """
    dataset, (counts, distances) = scores.dataset, scores.result()
    if valid:
        chosen = 1 + metrics.SWEEP.index(valid["chosen_threshold"])
        scores_with_it = metrics.class_scores(counts[:, chosen], class_names)
        valid["scores_with_it"] = metrics.without_nan(scores_with_it)
    counts, names = counts[:, 0], image_names(dataset)
    group_names, groups = group_images(dataset, names)
    dice = metrics.mean_image_dice(counts)
    pooled = counts.sum(1)  # of all classes
    report = {
        "folder": folder,
        "images": len(dataset),
        "image_size": dataset.image_size,
        "class_names": list(class_names),
        **scores.inference.as_dict(),
        "scores": metrics.without_nan(metrics.class_scores(counts, class_names, groups)),
        "confidence_95": metrics.without_nan(metrics.bootstrap(counts, class_names, groups=groups)),
        "distance_unit": "mm" if scores.spacing else "px",
        "surface_tolerance": metrics.TOLERANCE,
        **_summarize_distances(distances, class_names),
        "calibration": _summarize_calibration(scores.calibration(), class_names),
        "valid": valid,
        "by_lesion_size": _scores_by_lesion_size(counts, dice),
        "no_lesion": _count_false_alarms(pooled),
        "per_image": dict(zip(names, dice.round(4).tolist(), strict=True)),
    }
    if groups is not None:
        report |= _score_groups(metrics.sum_groups(counts, groups), group_names, class_names)
    with atomic_write(output / REPORT) as file:
        file.write(json.dumps(report, indent=1).encode())
    cases = [(*scores.case(index), title) for index, title in choose_cases(names, dice, pooled)]
    plot_report(report, dice, cases, output / "report.png")
    return report


def image_names(dataset):
    """A name for each image: its file's below the folder, which several records may have."""
    names = dataset.names()
    if len(set(names)) == len(names):
        return names
    return [f"{name}, id {number}" for name, number in zip(names, dataset.image_ids, strict=True)]


def group_images(dataset, names):
    """(names of the groups, int (N,): the group of each image), as the import recorded them.

    (None, None) where it recorded none. An image without one is a group of its own, called as it
    is; names: of the images.
    """
    records = (dataset.coco.imgs[number] for number in dataset.image_ids)
    groups = [recorded_group(record) for record in records]
    if not any(groups):
        return None, None
    own = [group or name for group, name in zip(groups, names, strict=True)]
    return np.unique(own, return_inverse=True)


def print_report(folder, output, written):
    """Print the scores of what `report` returned."""
    scores, intervals = written["scores"], written["confidence_95"]
    said, by_class = {}, [name for name in scores if name.startswith("dice/")]
    for name, value in scores.items():
        if value is not None:
            said[name] = "{:.4f} [{:.4f}, {:.4f}]".format(value, *intervals[name])
    summary = "no foreground in its annotations"
    groups = f"per-group Dice {said['group_dice']}, " if "group_dice" in said else ""
    if said:
        summary = (
            f"Dice {said['dice']}, per-image Dice {said['image_dice']}, {groups}IoU {said['iou']}, "
            f"accuracy {said['acc']} (background everywhere: {scores['background_acc']:.4f})"
        )
    print(f"{folder}: {summary}; saved {output / REPORT} and {output / 'report.png'}")
    for name in by_class:
        own = f"Dice {said[name]}" if name in said else f"no image of it in {folder}"
        print(f"  {name.removeprefix('dice/')}: {own}")


def _summarize_distances(distances, class_names):
    """hd95 and surface_dice, and of several classes those of each; distances: (N, C, 2)."""

    def summarize(values):
        measured = values[~np.isnan(values)]
        return {
            "mean": float(measured.mean()) if len(measured) else None,
            "median": float(np.median(measured)) if len(measured) else None,
            "left_out": values.size - len(measured),
        }

    summary = {}
    for which, name in enumerate(("hd95", "surface_dice")):
        summary[name] = summarize(distances[..., which])
        if len(class_names) > 1:
            of_classes = zip(class_names, distances[..., which].T, strict=True)
            summary[f"{name}_by_class"] = {one: summarize(own) for one, own in of_classes}
    return summary


def _score_groups(counts, names, class_names):
    """The Dice of each group, from its counts (G, C, 4), and of several classes in each class."""
    scores = {"groups": len(names)}
    dice = {"per_group": metrics.mean_image_dice(counts)}
    if len(class_names) > 1:
        by_class = metrics.image_dice(counts).T
        dice |= {f"per_group/{name}": own for name, own in zip(class_names, by_class, strict=True)}
    for key, values in dice.items():
        scores[key] = dict(zip(names, values.round(4).tolist(), strict=True))
    return scores


def _summarize_calibration(sums, class_names):
    """Expected calibration error, its mean over the classes, and the reliability curve of each.

    sums: (C, BINS, 3), see `count_calibration`. A curve has a point for each bin with pixels.
    """
    classes = {}
    for name, own in zip(class_names, sums, strict=True):
        pixels, foreground, probability = own[own[:, 0] > 0].T
        classes[name] = {
            "expected_calibration_error": metrics.calibration_error(own),
            "pixels": pixels.astype(int).tolist(),
            "mean_probability": (probability / pixels).tolist(),
            "foreground": (foreground / pixels).tolist(),
        }
    errors = [own["expected_calibration_error"] for own in classes.values()]
    return {"expected_calibration_error": float(np.mean(errors)), "classes": classes}


def _scores_by_lesion_size(counts, dice):
    """Dice of the images with a lesion in thirds, by their number of lesion pixels.

    counts: (N, C, 4); dice: (N,) of the images, the mean over classes.
    """
    counts = counts.sum(1)
    area = counts[:, 0] + counts[:, 2]
    if not area.any():
        return []
    limits = np.unique(np.quantile(area[area > 0], [1 / 3, 2 / 3]))
    groups = np.searchsorted(limits, area, side="right")
    found = []
    for group in np.unique(groups[area > 0]):
        inside = (area > 0) & (groups == group)
        about = {"pixels": [int(area[inside].min()), int(area[inside].max())]}
        about |= {"images": int(inside.sum()), "image_dice": float(dice[inside].mean())}
        found.append({**about, "dice": metrics.pooled_scores(counts[inside])["dice"]})
    return found


def _count_false_alarms(counts):
    tp, fp, fn, _ = counts.T
    no_lesion = tp + fn == 0
    alarms = no_lesion & (fp > 0)
    return {"images": int(no_lesion.sum()), "with_false_alarm": int(alarms.sum())}
