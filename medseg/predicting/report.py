"""The scores of a folder with annotations: report.json and report.png."""

import json
import math

import numpy as np

from medseg import metrics
from medseg.coco import recorded_group
from medseg.drawing import outline
from medseg.files import atomic_write
from medseg.own_files import REPORT
from medseg.predicting.figure import choose_cases, plot_report, spell_scores

TOLERANCE = 2  # pixels, or mm where known: about what two readers of an outline differ by
BINS = 15  # of probabilities, for their calibration: as many as Guo et al. take


def write_report(output, folder, scores, valid, class_names):
    """Write report.json and report.png on a folder to `output`, and print its scores.

    folder: what it is called; scores: its FolderScores; valid: the `sweep_thresholds` of the split
    in which the threshold that suits the model is sought, or None: it is never sought in the
    folder itself. With several classes a score is the mean over them, and SCORE/CLASS is of each.
    A class of which no image has a pixel has None for its scores and is left out of the means.
    Where groups are recorded, they have scores too, and intervals are of samples of groups.
    Returns what report.json holds.
    """
    dataset, (counts, distances, calibration) = scores.dataset, scores.result()
    if valid:
        chosen = 1 + metrics.SWEEP.index(valid["chosen_threshold"])
        scores_with_it = metrics.class_scores(counts[:, chosen], class_names)
        valid["scores_with_it"] = metrics.without_nan(scores_with_it)
    counts, names = counts[:, 0], dataset.names()
    group_names, groups = group_images(dataset, names)
    dice, pooled = metrics.mean_image_dice(counts), counts.sum(1)  # (N,), (N, 4) of all classes
    tp, fp, fn, _ = pooled.T
    no_lesion = tp + fn == 0
    report = {
        "folder": folder,
        "images": len(dataset),
        "image_size": dataset.image_size,
        "class_names": list(class_names),
        "channels": list(dataset.channel_names),
        **scores.inference.as_dict(),
        "scores": metrics.without_nan(metrics.class_scores(counts, class_names, groups)),
        "confidence_95": metrics.without_nan(metrics.bootstrap(counts, class_names, groups=groups)),
        "distance_unit": "mm" if scores.spacing else "px",
        "surface_tolerance": TOLERANCE,
        **_summarize_distances(distances, class_names),
        "calibration": _summarize_calibration(calibration, class_names),
        "valid": valid,
        "by_lesion_size": _scores_by_lesion_size(tp + fn, pooled, dice),
        "no_lesion": {
            "images": int(no_lesion.sum()),
            "with_false_alarm": int((no_lesion & (fp > 0)).sum()),
        },
        "per_image": dict(zip(names, dice.round(4).tolist(), strict=True)),
    }
    if groups is not None:
        report |= _score_groups(metrics.sum_groups(counts, groups), group_names, class_names)
    with atomic_write(output / REPORT) as file:
        file.write(json.dumps(report, indent=1).encode())
    cases = [(*scores.case(index), title) for index, title in choose_cases(names, dice, pooled)]
    plot_report(report, dice, cases, output / "report.png")
    print_report(folder, output, report)
    return report


def group_images(dataset, names):
    """(names of the groups, int (N,): the group of each image), as the import recorded them.

    (None, None) where it recorded none. An image without one is a group of its own, called as it
    is; names: of the images.
    """
    groups = [recorded_group(dataset.coco.imgs[number]) for number in dataset.image_ids]
    if not any(groups):
        return None, None
    own = [group or name for group, name in zip(groups, names, strict=True)]
    return np.unique(own, return_inverse=True)


def print_report(folder, output, written):
    """Print the scores that report.json has."""
    said, scores = spell_scores(written, 4), written["scores"]
    groups = f"per-group Dice {said['group_dice']}, " if said.get("group_dice") else ""
    summary = "no foreground in its annotations"
    if said["dice"]:
        summary = (
            f"Dice {said['dice']}, per-image Dice {said['image_dice']}, {groups}IoU {said['iou']}, "
            f"accuracy {said['acc']} (background everywhere: {scores['background_acc']:.4f})"
        )
    print(f"{folder}: {summary}; saved {output / REPORT} and {output / 'report.png'}")
    for name in filter(lambda name: name.startswith("dice/"), said):
        own = f"Dice {said[name]}" if said[name] else f"no image of it in {folder}"
        print(f"  {name.removeprefix('dice/')}: {own}")


def count_calibration(targets, probabilities, known=1):
    """Sums over the pixels of one image by their probability of foreground: float64 (C, BINS, 3).

    The last axis: pixels, pixels of foreground, sum of the probabilities. targets: bool (C, H, W);
    probabilities: float32 (C, H, W). Bin k, from 0, is of those from k / BINS up to (k + 1) / BINS.
    What is no number is in none. known: bool (H, W), which pixels count.
    """
    sums = np.zeros((len(targets), BINS, 3))
    for channel, (target, probability) in enumerate(zip(targets, probabilities, strict=True)):
        for column, weights in enumerate((np.ones_like(target), target, probability)):
            histogram = np.histogram(
                probability, BINS, (0, 1), weights=(weights * known).astype(float)
            )
            sums[channel, :, column] = histogram[0]
    return sums


def calibration_error(sums):
    """Expected calibration error, 0..1, from sums (BINS, 3) as `count_calibration` gives them.

    The mean, over all pixels, of the distance between the mean probability of their bin and its
    share of foreground: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    equation 3, with the probability of foreground in the place of the confidence.
    """
    pixels, foreground, probability = sums.T
    return float(np.abs(foreground - probability).sum() / max(pixels.sum(), 1))


def surface_scores(pred, target, spacing=(1, 1)):
    """(HD95, surface Dice) of two bool arrays (H, W), NaN where there is none.

    HD95: the 95th percentile Hausdorff distance in pixels, the larger of the two directed ones,
    between the pixels of the outlines; NaN if a mask is empty: Taha, Hanbury, "Metrics for
    evaluating 3D medical image segmentation", BMC Medical Imaging 2015.
    Surface Dice (NSD): the share of the pixels of both outlines that are at most TOLERANCE from
    the other one, 0..1; 0 if one mask is empty, NaN if both are: Nikolov et al., "Clinically
    Applicable Segmentation of Head and Neck Anatomy for Radiotherapy", JMIR 2021.
    spacing: of the pixels along each axis, in mm, where distances are to be in mm.
    """
    from scipy.spatial import KDTree  # a training does without it

    if not pred.any() or not target.any():
        return math.nan, 0.0 if pred.any() or target.any() else math.nan
    # Of the outlines alone: distances of every pixel would take 50 bytes each.
    pred, target = (np.argwhere(outline(mask)) * spacing for mask in (pred, target))
    directed = [KDTree(other).query(own)[0] for own, other in ((pred, target), (target, pred))]
    near = np.concatenate(directed) <= TOLERANCE
    return max(float(np.percentile(own, 95)) for own in directed), float(near.mean())


def _summarize_distances(distances, class_names):
    """hd95 and surface_dice, and of several classes those of each; distances: (N, C, 2)."""

    def summarize(values):
        measured = values[~np.isnan(values)]
        averages = {"mean": None, "median": None}
        if len(measured):
            averages = {"mean": float(measured.mean()), "median": float(np.median(measured))}
        return {**averages, "left_out": values.size - len(measured)}

    summary = {}
    for name, values in zip(("hd95", "surface_dice"), np.moveaxis(distances, 2, 0), strict=True):
        summary[name] = summarize(values)
        if len(class_names) > 1:
            by_class = zip(class_names, map(summarize, values.T), strict=True)
            summary[f"{name}_by_class"] = dict(by_class)
    return summary


def _score_groups(counts, names, class_names):
    """The Dice of each group, from its counts (G, C, 4), and of several classes in each class."""
    dice = {"per_group": metrics.mean_image_dice(counts)}
    if len(class_names) > 1:
        by_class = metrics.image_dice(counts).T
        dice |= {f"per_group/{name}": own for name, own in zip(class_names, by_class, strict=True)}
    named = {key: zip(names, own.round(4).tolist(), strict=True) for key, own in dice.items()}
    return {"groups": len(names), **{key: dict(pairs) for key, pairs in named.items()}}


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


def _scores_by_lesion_size(area, counts, dice):
    """Dice of the images with a lesion in thirds, by their number of lesion pixels, area (N,).

    counts: (N, 4), of all classes; dice: (N,) of the images, the mean over classes.
    """
    if not area.any():
        return []
    limits = np.unique(np.quantile(area[area > 0], [1 / 3, 2 / 3]))
    thirds = np.where(area > 0, np.searchsorted(limits, area, side="right"), -1)
    scores = []
    for third in np.unique(thirds[area > 0]):
        inside = thirds == third
        sizes = [int(area[inside].min()), int(area[inside].max())]
        own = {"images": int(inside.sum()), "image_dice": float(dice[inside].mean())}
        own["dice"] = metrics.image_dice(counts[inside].sum(0)).item()
        scores.append({"pixels": sizes, **own})
    return scores
