"""A folder with annotations, scored: report.json and report.png."""

import json
import math
import re
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from medseg.files import atomic_write
from medseg.fonts import drawable
from medseg.formats.own_files import REPORT
from medseg.images import preprocess, read_image, resize_nearest
from medseg.inference import Inference
from medseg.metrics import (
    SWEEP,
    bootstrap,
    calibration_error,
    class_scores,
    count_calibration,
    count_image,
    count_masks,
    count_pixels,
    hausdorff95,
    image_dice,
    mean_image_dice,
    pooled_scores,
    without_nan,
)
from medseg.plots import MAX_SIDE, plot_report

ROBOFLOW_SUFFIX = re.compile(r"_(jpe?g|png|bmp|tiff?|webp)\.rf\.[0-9a-f]{32}\.\w+$", re.IGNORECASE)


def threshold_sweep(model, batches, dataset, spacing=None):
    """The Dice of a split at each threshold of SWEEP, and the threshold of the highest.

    None where no image of the split has foreground.
    batches: its images in the order of `dataset`, as `data.Batches` gives them. Flips and clean-up
    are the model's. spacing: mm of a pixel along each axis, or None.
    """
    bar, names = tqdm(batches, "valid", unit=" batches", disable=None), model.class_names
    predicted = (one for images, _ in bar for one in model.average(images))
    pairs = ((dataset.true_masks(index), one) for index, one in enumerate(predicted))
    options = {"exclusive": model.exclusive, "spacing": spacing}
    counts = count_pixels(pairs, SWEEP, model.inference.clean, **options)
    dice = [class_scores(counts[:, index], names)["dice"] for index in range(len(SWEEP))]
    if math.isnan(dice[0]):
        return None
    return {"thresholds": SWEEP, "dice": dice, "chosen_threshold": SWEEP[int(np.argmax(dice))]}


class FolderScores:
    """The predictions of an annotated folder, compared with its annotations as they are made.

    What is scored are the masks that are written, at the size of each image. dataset: the folder as
    `data.COCOSegmentationDataset`. threshold, flips, clean: those of the predictions, see
    `medseg.inference.Inference`. exclusive: whether a pixel has one class, which is then the most
    probable. spacing: mm of a pixel along each axis, or None.
    """

    def __init__(self, dataset, threshold, *, flips=(), clean="none", exclusive=True, spacing=None):
        self.dataset, self.thresholds = dataset, [threshold, *SWEEP]
        self.flips, self.clean, self.spacing = flips, clean, spacing
        self.exclusive = exclusive
        self._indices = {}  # of a file; several records may name it
        for index in range(len(dataset)):
            self._indices.setdefault(_identity(dataset.path(index)), []).append(index)
        # index -> counts (T, C, 4), HD95 (C,), prediction as run lengths, calibration (C, BINS, 3)
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

        targets = self.dataset.true_masks(index, size)
        options = {"exclusive": self.exclusive, "spacing": self.spacing}
        preds = Inference(self.thresholds[0], clean=self.clean).masks(
            probabilities, size, **options
        )
        counts, distances, encoded, calibration = [], [], [], []
        for target, pred, channel in zip(targets, preds, probabilities, strict=True):
            counts.append(count_masks([target], [pred])[0])
            distances.append([hausdorff95(pred, target), math.nan])
            if self.spacing:
                distances[-1][1] = hausdorff95(pred, target, self.spacing)
            encoded.append(coco_mask.encode(np.asfortranarray(pred, dtype=np.uint8)))
            reduced = resize_nearest(target, *channel.shape)
            calibration.append(count_calibration(reduced[None], channel[None])[0])
        swept = count_image(targets, probabilities, self.thresholds[1:], self.clean, **options)
        counts = np.stack([counts, *swept])
        self._images[index] = counts, distances, encoded, np.stack(calibration)
        return image_dice(counts[0])

    def missing(self):
        """The indices of the annotated images that have not been compared."""
        return [index for index in range(len(self.dataset)) if index not in self._images]

    def complete(self, model):
        """Predict the images that are missing, as those with a record in a folder further down.

        Raises FileNotFoundError or ValueError where one cannot be read or predicted.
        """
        for index in self.missing():
            image = read_image(self.dataset.path(index))
            self.compare(index, image.size, model.predict(image))

    def result(self):
        """Counts (N, T, C, 4), at `thresholds`; HD95 (N, C, 2) in pixels and mm; of all images."""
        images = [self._images[index] for index in range(len(self.dataset))]
        counts, distances, *_ = zip(*images, strict=True)
        return np.stack(counts), np.array(distances)

    def calibration(self):
        """`count_calibration`, float64 (C, BINS, 3), of all images: of their probabilities."""
        return sum(calibration for *_, calibration in self._images.values())

    def case(self, index):
        """What to draw of an image: uint8 (H, W, n_channels), target and prediction (C, H, W).

        Of a large one, every second pixel, third, ...: as many as a figure draws.
        """
        from pycocotools import mask as coco_mask

        image = read_image(self.dataset.path(index))
        step = math.ceil(max(image.size) / MAX_SIDE)
        pixels = preprocess(image, None, self.dataset.n_channels)[::step, ::step].copy()
        targets = self.dataset.true_masks(index, image.size)
        preds = (coco_mask.decode(one) for one in self._images[index][2])
        target, pred = (
            np.stack([np.array(mask[::step, ::step], np.uint8) for mask in masks])
            for masks in (targets, preds)
        )
        return pixels, target, pred


def _identity(path):
    """The same for every way to name a file; links to one file differ, as their names do."""
    return path.parent.resolve() / path.name


def write_report(output, folder, scores, valid, class_names):
    """Write report.json and report.png on a folder to `output`. Returns what the first holds.

    folder: what it is called; scores: its FolderScores; valid: the `threshold_sweep` of the split
    in which the threshold that suits the model is sought, or None: it is never sought in the
    folder itself. With several classes a score is the mean over them, and SCORE/CLASS is of each.
    A class of which no image has a pixel has None for its scores and is left out of the means.
    """
    dataset, (counts, distances) = scores.dataset, scores.result()
    if valid:
        chosen = 1 + SWEEP.index(valid["chosen_threshold"])
        valid["scores_with_it"] = without_nan(class_scores(counts[:, chosen], class_names))
    counts, names = counts[:, 0], image_names(dataset)
    dice = mean_image_dice(counts)
    pooled = counts.sum(1)  # of all classes
    report = {
        "folder": folder,
        "images": len(dataset),
        "image_size": dataset.image_size,
        "class_names": list(class_names),
        "threshold": scores.thresholds[0],
        "flips": list(scores.flips),
        "clean": scores.clean,
        "scores": without_nan(class_scores(counts, class_names)),
        "confidence_95": without_nan(bootstrap(counts, class_names)),
        "hd95": _summarize_distances(distances[..., 0]),
        "calibration": _summarize_calibration(scores.calibration(), class_names),
        "valid": valid,
        "by_lesion_size": _scores_by_lesion_size(pooled),
        "no_lesion": _count_false_alarms(pooled),
        "per_image": dict(zip(names, dice.round(4).tolist(), strict=True)),
    }
    if len(class_names) > 1:
        report["hd95_by_class"] = {
            name: _summarize_distances(distances[:, index, 0])
            for index, name in enumerate(class_names)
        }
    if scores.spacing:
        report["hd95_mm"] = _summarize_distances(distances[..., 1])
    with atomic_write(output / REPORT) as file:
        file.write(json.dumps(report, indent=1).encode())
    cases = [(*scores.case(index), title) for index, title in choose_cases(names, dice, pooled)]
    plot_report(report, dice, cases, output / "report.png")
    return report


def image_names(dataset):
    """A name for each image: its file's, unless two of them are called the same."""
    files = [dataset.coco.imgs[number]["file_name"] for number in dataset.image_ids]
    for names in ([dataset.path(index).name for index in range(len(dataset))], files):
        if len(set(names)) == len(names):
            return names
    return [f"{file}, id {number}" for file, number in zip(files, dataset.image_ids, strict=True)]


def print_report(folder, output, written):
    """Print the scores of what `report` returned."""
    scores, intervals = written["scores"], written["confidence_95"]
    said, by_class = {}, [name for name in scores if name.startswith("dice/")]
    for name, value in scores.items():
        if value is not None:
            said[name] = "{:.4f} [{:.4f}, {:.4f}]".format(value, *intervals[name])
    summary = "no foreground in its annotations"
    if said:
        summary = (
            f"Dice {said['dice']}, per-image Dice {said['image_dice']}, IoU {said['iou']}, "
            f"accuracy {said['acc']} (background everywhere: {scores['background_acc']:.4f})"
        )
    print(f"{folder}: {summary}; saved {output / REPORT} and {output / 'report.png'}")
    for name in by_class:
        own = f"Dice {said[name]}" if name in said else f"no image of it in {folder}"
        print(f"  {name.removeprefix('dice/')}: {own}")


def _summarize_distances(distances):
    measured = distances[~np.isnan(distances)]
    return {
        "mean": float(measured.mean()) if len(measured) else None,
        "median": float(np.median(measured)) if len(measured) else None,
        "left_out": distances.size - len(measured),
    }


def _summarize_calibration(sums, class_names):
    """Expected calibration error, its mean over the classes, and the reliability curve of each.

    sums: (C, BINS, 3), see `count_calibration`. A curve has a point for each bin with pixels.
    """
    classes = {}
    for name, own in zip(class_names, sums, strict=True):
        pixels, foreground, probability = own[own[:, 0] > 0].T
        classes[name] = {
            "expected_calibration_error": calibration_error(own),
            "pixels": pixels.astype(int).tolist(),
            "mean_probability": (probability / pixels).tolist(),
            "foreground": (foreground / pixels).tolist(),
        }
    errors = [own["expected_calibration_error"] for own in classes.values()]
    return {"expected_calibration_error": float(np.mean(errors)), "classes": classes}


def _scores_by_lesion_size(counts):
    """Dice of the images with a lesion in thirds, by their number of lesion pixels."""
    area = counts[:, 0] + counts[:, 2]
    if not area.any():
        return []
    limits = np.unique(np.quantile(area[area > 0], [1 / 3, 2 / 3]))
    groups = np.searchsorted(limits, area, side="right")
    found = []
    for group in np.unique(groups[area > 0]):
        inside = (area > 0) & (groups == group)
        scores = pooled_scores(counts[inside])
        found.append(
            {
                "pixels": [int(area[inside].min()), int(area[inside].max())],
                "images": int(inside.sum()),
                "dice": scores["dice"],
                "image_dice": scores["image_dice"],
            }
        )
    return found


def _count_false_alarms(counts):
    tp, fp, fn, _ = counts.T
    no_lesion = tp + fn == 0
    return {
        "images": int(no_lesion.sum()),
        "with_false_alarm": int((no_lesion & (fp > 0)).sum()),
    }


def choose_cases(names, dice, counts):
    """(index, title) of at most eight images: the two best with a hit, three median, three worst.

    Of few images fewer of each kind, and each image once. dice: (N,); counts: (N, 4), of all
    classes.
    """
    order = np.argsort(-dice, kind="stable")
    hits_first = order[np.argsort(counts[order, 0] == 0, kind="stable")]
    best = hits_first[: min(max(len(order) // 3, 1), 2)]
    rest = order[~np.isin(order, best)]
    middle, worst = np.split(rest, [len(rest) - min(len(order) // 2, 3)])
    median = middle[max(len(middle) - 3, 0) // 2 :][:3]
    cases = []
    for group, indices in {"best": best, "median": median, "worst": worst}.items():
        for index in indices:
            outcome = _describe_outcome(dice[index], *counts[index])
            (name,), _ = drawable(names[index])  # before it is cut: an escape takes six characters
            title = f"{shorten_name(name)}, {outcome}"
            cases.append((index, f"{group}: {title}" if len(names) > 1 else title))
    return cases


def _describe_outcome(dice, tp, fp, fn, tn):
    """What to say of an image, by its pixels of all classes."""
    if fp and not tp + fn:
        return "false alarm"
    if tp or not fn:
        return f"Dice {dice:.2f}"
    return "no overlap" if fp else "missed lesion"


def shorten_name(name, longest=28):
    """A file's name without what Roboflow adds on export, cut in the middle where it is long."""
    name = ROBOFLOW_SUFFIX.sub("", name)
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"
