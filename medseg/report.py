"""A folder with annotations, scored: report.json and report.png."""

import json

import numpy as np

from medseg.files import atomic_write
from medseg.metrics import bootstrap, hausdorff95, image_dice, pooled_scores
from medseg.plots import plot_report

SWEEP = [step / 20 for step in range(1, 20)]  # the thresholds tried on valid


def count_pixels(predict, rows, thresholds):
    """Counts of each image at each threshold, int (N, T, 4) of tp, fp, fn, tn; and HD95 (N,).

    predict(rows): yields batches (target bool (B, S, S), probabilities float32 (B, S, S)) of
    numpy arrays. The Hausdorff distance is of the first threshold.
    """
    counts, distances = [], []
    for target, probabilities in predict(rows):
        preds = np.stack([probabilities > threshold for threshold in thresholds], 1)
        truth = target[:, None]  # (B, 1, S, S) beside (B, T, S, S)
        tp, fp, fn = (
            (one & other).sum((2, 3))
            for one, other in ((preds, truth), (preds, ~truth), (~preds, truth))
        )
        counts.append(np.stack([tp, fp, fn, target[0].size - tp - fp - fn], 2))
        distances += [hausdorff95(*masks) for masks in zip(preds[:, 0], target, strict=True)]
    return np.concatenate(counts), np.array(distances)


def threshold_sweep(predict, rows):
    """The pooled Dice of a split at each threshold of SWEEP, and the threshold of the highest."""
    counts, _ = count_pixels(predict, rows, SWEEP)
    dice = [pooled_scores(counts[:, index])["dice"] for index in range(len(SWEEP))]
    return {"thresholds": SWEEP, "dice": dice, "chosen_threshold": SWEEP[int(np.argmax(dice))]}


def write_report(output, folder, names, rows, valid_rows, predict, threshold):
    """Score a folder; write report.json and report.png to `output`. Returns what the first holds.

    folder: what it is called; names: of its images; rows: uint8 (N, S, S, 4) as of `load_split`;
    valid_rows: those of the split in which the threshold that suits the model is sought, or None:
    it is never sought in the folder itself. predict: see `count_pixels`.
    """
    valid, thresholds = None, [threshold]
    if valid_rows is not None:
        valid = threshold_sweep(predict, valid_rows)
        thresholds.append(valid["chosen_threshold"])
    counts, distances = count_pixels(predict, rows, thresholds)
    if valid:
        valid["scores_with_it"] = pooled_scores(counts[:, 1])
    counts = counts[:, 0]
    dice = image_dice(counts)
    report = {
        "folder": folder,
        "images": len(rows),
        "image_size": rows.shape[1],
        "threshold": threshold,
        "scores": pooled_scores(counts),
        "confidence_95": bootstrap(counts),
        "hd95": _summarize_distances(distances),
        "valid": valid,
        "by_lesion_size": _scores_by_lesion_size(counts),
        "no_lesion": _count_false_alarms(counts),
        "per_image": dict(zip(names, dice.round(4).tolist(), strict=True)),
    }
    with atomic_write(output / "report.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    cases = _choose_cases(names, rows, counts, predict, threshold)
    plot_report(report, dice, cases, output / "report.png")
    return report


def _summarize_distances(distances):
    measured = distances[~np.isnan(distances)]
    return {
        "mean": float(measured.mean()) if len(measured) else None,
        "median": float(np.median(measured)) if len(measured) else None,
        "left_out": len(distances) - len(measured),
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


def _choose_cases(names, rows, counts, predict, threshold):
    """Two best images with a lesion, three median and three worst, as `plot_report` takes them."""
    dice, lesion = image_dice(counts), counts[:, 0] + counts[:, 2] > 0
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
            ((target, probabilities),) = predict(rows[index : index + 1])
            tp, fp, _, _ = counts[index]
            outcome = f"Dice {dice[index]:.2f}"
            if fp and not lesion[index]:
                outcome = "false alarm"
            elif lesion[index] and not tp:
                outcome = "missed lesion"
            title = f"{kind}: {names[index].split('_')[0]}, {outcome}"
            picture = np.asarray(rows[index, ..., :3])
            cases.append((picture, target[0], probabilities[0] > threshold, title))
    return cases
