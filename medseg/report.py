"""A folder with annotations, scored: report.json and report.png."""

import json
import math

import numpy as np

from medseg.files import atomic_write
from medseg.metrics import bootstrap, class_scores, hausdorff95, image_dice, pooled_scores
from medseg.plots import plot_report

SWEEP = [step / 20 for step in range(1, 20)]  # the thresholds tried on valid


def count_pixels(predict, rows, thresholds):
    """Counts of each image and class at each threshold, and its HD95 at the first.

    predict(rows): yields batches (targets bool (B, C, H, W), probabilities float32 (B, C, H, W))
    of numpy arrays. Returns int (N, T, C, 4) of tp, fp, fn, tn, and (N, C) in pixels.
    """
    counts, distances = [], []
    for targets, probabilities in predict(rows):
        at_thresholds = []
        for threshold in thresholds:
            preds = probabilities > threshold
            tp, fp, fn = (
                (one & other).sum((2, 3))
                for one, other in ((preds, targets), (preds, ~targets), (~preds, targets))
            )
            pixels = targets.shape[2] * targets.shape[3]
            at_thresholds.append(np.stack([tp, fp, fn, pixels - tp - fp - fn], 2))
        counts.append(np.stack(at_thresholds, 1))
        for image in zip(probabilities > thresholds[0], targets, strict=True):
            distances.append([hausdorff95(*masks) for masks in zip(*image, strict=True)])
    return np.concatenate(counts), np.array(distances)


def threshold_sweep(predict, rows, names):
    """The Dice of a split at each threshold of SWEEP, and the threshold of the highest."""
    counts, _ = count_pixels(predict, rows, SWEEP)
    dice = [class_scores(counts[:, index], names)["dice"] for index in range(len(SWEEP))]
    return {"thresholds": SWEEP, "dice": dice, "chosen_threshold": SWEEP[int(np.argmax(dice))]}


def write_report(output, folder, names, rows, valid_rows, predict, threshold, class_names):
    """Score a folder; write report.json and report.png to `output`. Returns what the first holds.

    folder: what it is called; names: of its images; rows: as of `data.load_split`, of one size or
    of different ones (then "image_size" is None); valid_rows: those of the split in which the
    threshold that suits the model is sought, or None: it is never sought in the folder itself.
    predict: see `count_pixels`. With several classes a score is the mean over them, and
    SCORE/CLASS is of each.
    """
    valid, thresholds = None, [threshold]
    if valid_rows is not None:
        valid = threshold_sweep(predict, valid_rows, class_names)
        thresholds.append(valid["chosen_threshold"])
    counts, distances = count_pixels(predict, rows, thresholds)
    if valid:
        valid["scores_with_it"] = class_scores(counts[:, 1], class_names)
    counts = counts[:, 0]
    dice = np.stack([image_dice(counts[:, index]) for index in range(len(class_names))]).mean(0)
    pooled = counts.sum(1)  # of all classes
    report = {
        "folder": folder,
        "images": len(rows),
        "image_size": rows.shape[1] if isinstance(rows, np.ndarray) else None,
        "class_names": list(class_names),
        "threshold": threshold,
        "scores": class_scores(counts, class_names),
        "confidence_95": bootstrap(counts, class_names),
        "hd95": _summarize_distances(distances),
        "valid": valid,
        "by_lesion_size": _scores_by_lesion_size(pooled),
        "no_lesion": _count_false_alarms(pooled),
        "per_image": dict(zip(names, dice.round(4).tolist(), strict=True)),
    }
    if len(class_names) > 1:
        report["hd95_by_class"] = {
            name: _summarize_distances(distances[:, index])
            for index, name in enumerate(class_names)
        }
    with atomic_write(output / "report.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    cases = _choose_cases(names, rows, dice, pooled, predict, threshold)
    plot_report(report, dice, cases, output / "report.png")
    return report


def _summarize_distances(distances):
    measured = distances[~np.isnan(distances)]
    return {
        "mean": float(measured.mean()) if len(measured) else None,
        "median": float(np.median(measured)) if len(measured) else None,
        "left_out": distances.size - len(measured),
    }


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


def _choose_cases(names, rows, dice, counts, predict, threshold):
    """Two best images with a lesion, three median and three worst, as `plot_report` takes them.

    dice: (N,); counts: (N, 4), of all classes.
    """
    lesion = counts[:, 0] + counts[:, 2] > 0
    order = np.argsort(-dice, kind="stable")
    with_lesion_first = order[np.argsort(~lesion[order], kind="stable")]
    middle = max(len(order) // 2 - 1, 0)
    chosen = {
        "best": with_lesion_first[:2],
        "median": order[middle : middle + 3],
        "worst": order[-3:],
    }
    cases = []
    for kind, indices in chosen.items():
        for index in indices:
            ((targets, probabilities),) = predict(rows[index : index + 1])
            n_channels = rows[index].shape[2] - math.ceil(targets.shape[1] / 8)
            tp, fp, _, _ = counts[index]
            outcome = f"Dice {dice[index]:.2f}"
            if fp and not lesion[index]:
                outcome = "false alarm"
            elif lesion[index] and not tp:
                outcome = "missed lesion"
            title = f"{kind}: {names[index].split('_')[0]}, {outcome}"
            picture = np.asarray(rows[index][..., :n_channels])
            cases.append((picture, targets[0], probabilities[0] > threshold, title))
    return cases
