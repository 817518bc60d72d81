"""From masks to scores: pixel counts, running sums, bootstrap."""

import math

import numpy as np
import torch

from medseg.dist import all_gather, all_reduce_sum, is_first
from medseg.inference import Inference, full_size_masks, full_size_stripes

SWEEP = [step / 20 for step in range(1, 20)]  # the thresholds tried on valid


def dice_score(tp, fp, fn):
    """2 tp / (2 tp + fp + fn), 0..1; 1 where target and prediction are both empty.

    tp, fp, fn: numbers of pixels, as Python numbers, numpy arrays or floating-point tensors.
    """
    empty = tp + fp + fn == 0
    return (2 * tp + empty) / (2 * tp + fp + fn + empty)


def metrics(tp, fp, fn, tn):
    """Scores of the foreground from counts of pixels (true/false positives and negatives), 0..1.

    tp, fp, fn, tn: Python numbers, or numpy arrays for as many scores.
    Where target and prediction are both empty, Dice, IoU, precision and recall are 1; where only
    one of them is, they are 0. miou is the mean IoU of foreground and background;
    background_acc is what answering "background" everywhere would score as acc.
    """
    total = tp + fp + fn + tn
    empty = tp + fp + fn == 0

    def safe_divide(part, whole, otherwise):
        zero = whole == 0  # and so is the part
        return (part + zero * otherwise) / (whole + zero)

    iou = safe_divide(tp, tp + fp + fn, 1)
    background_iou = safe_divide(tn, tn + fp + fn, 1)
    return {
        "acc": (tp + tn) / total,
        "dice": dice_score(tp, fp, fn),
        "iou": iou,
        "precision": safe_divide(tp, tp + fp, empty),
        "recall": safe_divide(tp, tp + fn, empty),
        "miou": (iou + background_iou) / 2,
        "background_acc": (fp + tn) / total,
    }


def split_scores(counts, names, **means):
    """{name: (...)} of a split: `metrics` and the `means`; NaN where no image of it has the class.

    counts: (C, ..., 4), the summed pixels of each class; names: of the classes; means: (C, ...),
    image_dice, the mean Dice of the images, and group_dice, that of groups of them.
    With several classes NAME is the mean over those that have a score, and NAME/CLASS is of each.
    """
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    scores = {**metrics(tp, fp, fn, tn), **means}
    present, result = tp + fn > 0, {}
    classes = present.sum(0)
    for key, values in scores.items():
        scores[key] = values = np.where(present, values, math.nan)
        mean = np.nansum(values, 0) / np.maximum(classes, 1)
        result[key] = np.where(classes > 0, mean, math.nan)
    for index, name in enumerate(names if len(names) > 1 else ()):
        result |= {f"{key}/{name}": values[index] for key, values in scores.items()}
    return result


def confusion_counts(pred, target, n_classes):
    """pred: bool (B, C, H, W); target: of 0 and 1, and -1 where a pixel is to be ignored.

    Returns int64 (B, n_classes, 4) of tp, fp, fn, tn of each image. A single class is of all
    channels together.
    """
    # A process may have no image of the last batch.
    pixels = pred.shape[1:].numel() // n_classes
    pred, target = (mask.reshape(len(mask), n_classes, pixels) for mask in (pred, target))
    known, target = target >= 0, target > 0.5
    pred = pred & known
    tp, positive, true = (pred & target).sum(2), pred.sum(2), target.sum(2)
    fp, fn = positive - tp, true - tp
    return torch.stack([tp, fp, fn, known.sum(2) - tp - fp - fn], 2)


class RunningScores:
    """Sums over the images of a split, kept on the device: adding a batch never waits for it.

    names: of the classes. Their scores are counted for each class by itself.
    """

    def __init__(self, device, names=("foreground",)):
        device, self.names = torch.device(device), tuple(names)
        exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        # tp, fp, fn, tn of each class
        self.counts = torch.zeros(len(names), 4, dtype=torch.int64, device=device)
        # images, their losses, their Dice in each class
        self.sums = torch.zeros(2 + len(names), dtype=exact, device=device)
        self.shown = torch.zeros(2, dtype=exact, pin_memory=device.type == "cuda")

    @torch.no_grad()
    def add(self, loss, pred, target, threshold=0.5, *, finite=True):
        """Count a batch. loss: scalar tensor, the batch's; pred, target: (B, C, H, W), 0..1.

        Pixels with a target below 0 are ignored.
        finite: bool or bool tensor; where False, the batch counts nothing.
        """
        counts = confusion_counts(pred > threshold, target, len(self.names))
        self.add_counts(loss, counts, finite=finite)

    @torch.no_grad()
    def add_counts(self, loss, of_images, *, finite=True):
        """As `add`, of int64 (B, C, 4): tp, fp, fn, tn of each image and class."""
        exact = self.sums.dtype
        tp, fp, fn, _ = of_images.unbind(2)  # (B, C) each
        dice = dice_score(tp.to(exact), fp.to(exact), fn.to(exact)).T.contiguous().sum(1)
        counts = of_images.sum(0)
        images = dice.new_full((1,), len(of_images))
        sums = torch.cat([images, (loss.to(exact) * len(of_images)).view(1), dice])
        self.counts += counts if finite is True else torch.where(finite, counts, 0)
        self.sums += sums if finite is True else torch.where(finite, sums, 0)

    def keys(self):
        """The names of what `result` gives."""
        ones = np.ones((len(self.names), 4))
        return ("loss", *split_scores(ones, self.names, image_dice=ones[:, 0]))

    def result(self):
        """dict of floats: loss and `split_scores`. All are NaN where nothing was counted."""
        state = self.state_dict()
        images, loss, *image_dice = state["sums"].tolist()
        if not images:  # every step of the epoch was skipped
            return dict.fromkeys(self.keys(), math.nan)
        means = {"image_dice": np.array(image_dice) / images}
        scores = split_scores(state["counts"].cpu().numpy(), self.names, **means)
        return {"loss": loss / images, **{name: value.item() for name, value in scores.items()}}

    def images(self):
        """Images counted, over all processes."""
        return self.state_dict()["sums"][0].item()

    def running_loss(self):
        """(mean loss, images) of this process as of a moment ago: the GPU is not waited for."""
        self.shown.copy_(self.sums[:2], non_blocking=True)
        images, loss = self.shown.tolist()
        return loss / max(images, 1), images

    def reset(self):
        self.counts.zero_()
        self.sums.zero_()

    @torch.no_grad()
    def state_dict(self):
        """The sums over all processes, which all have to call this."""
        return {"counts": all_reduce_sum(self.counts), "sums": all_reduce_sum(self.sums)}

    def load_state_dict(self, state):
        if is_first():  # once is enough for the sum
            self.counts.copy_(state["counts"])
            self.sums.copy_(state["sums"])


# ---- of a folder: numpy counts, an image a row -----------------------------------------------


def count_image(targets, probabilities, thresholds, clean=None, *, exclusive=True, spacing=None):
    """Counts of one image, of the masks that are written: int (T, C, 4) of tp, fp, fn, tn.

    targets: bool (C, H, W) at the image's own size, or a run_lengths.ClassMasks, which knows what
    is ignored; probabilities: float32 (C, S, S); thresholds: T of them; clean, exclusive, spacing:
    see `medseg.inference.Inference.masks`.
    """
    size = targets.shape[:0:-1]
    if clean:
        masks = (
            Inference(threshold, clean=clean).masks(
                probabilities, size, exclusive=exclusive, spacing=spacing
            )
            for threshold in thresholds
        )
        return np.stack([count_masks(targets, preds) for preds in masks])
    order = np.argsort(-np.asarray(thresholds))
    falling = np.asarray(thresholds, probabilities.dtype)[order]
    bins, lowest = len(falling), falling[-1]
    counts = np.zeros((bins, len(probabilities), 4), np.int64)
    labels, known = None, known_pixels(targets)
    if exclusive and len(probabilities) > 1:  # the most probable class is that at any threshold
        labels = full_size_masks(probabilities, size, lowest)
    for channel, (target, probability) in enumerate(zip(targets, probabilities, strict=True)):
        # A pixel of bin k is above falling[k:], and not above falling[:k]. Those above none, and
        # those that are no number, are most and are in no bin.
        histogram = np.zeros(2 * bins, np.int64)
        for columns, (stripe,) in full_size_stripes(probability[None], size, above=lowest):
            marked = (stripe > lowest) & known[:, columns]
            if labels is not None:
                marked &= labels[:, columns] == channel + 1
            found = np.searchsorted(-falling, -stripe[marked], side="right")
            found += bins * target[:, columns][marked]
            histogram += np.bincount(found, minlength=2 * bins)
        fp, tp = histogram.reshape(2, bins).cumsum(1)
        positives = np.count_nonzero(target)
        negatives = np.count_nonzero(known) - positives
        counts[order, channel] = np.stack([tp, fp, positives - tp, negatives - fp], 1)
    return counts


def count_masks(targets, preds):
    """Bool arrays (C, H, W), or the masks one by one -> int (C, 4) of tp, fp, fn, tn."""
    counts, known = [], known_pixels(targets)
    for target, pred in zip(targets, preds, strict=True):
        masks = target & pred, pred & known, target, known
        tp, positive, true, pixels = map(np.count_nonzero, masks)
        counts.append((tp, positive - tp, true - tp, pixels - positive - true + tp))
    return np.array(counts)


def known_pixels(targets):
    """bool (H, W): which pixels of true masks count."""
    known = targets.known() if hasattr(targets, "known") else None
    return np.broadcast_to(True, targets.shape[1:]) if known is None else known


def count_pixels(pairs, thresholds, clean=None, **options):
    """`count_image` of every image, int (N, T, C, 4), of all processes one after the other.

    pairs: iterable of (targets (C, H, W), probabilities (C, S, S)) of the images of this process.
    """
    counts = [count_image(*pair, thresholds, clean, **options) for pair in pairs]
    return np.stack(all_gather(counts))


def image_dice(counts):
    """(..., 4) of tp, fp, fn, tn -> (...) Dice, as (N, 4) -> (N,) that of each image."""
    tp, fp, fn, _ = np.moveaxis(counts, -1, 0)
    return dice_score(tp, fp, fn)


def mean_image_dice(counts):
    """(N, C, 4) -> (N,) Dice of each image, the mean over the classes that any of them has."""
    present = counts[..., [0, 2]].sum((0, 2)) > 0
    return image_dice(counts[:, present | ~present.any()]).mean(1)


def without_nan(scores):
    """The same with None for what is no score, or an interval of one, as JSON has it."""
    return {name: None if np.isnan(value).any() else value for name, value in scores.items()}


def sum_groups(counts, groups):
    """(N, ...) of images -> (G, ...) summed over the images of each group; groups: int (N,)."""
    sums = np.zeros((groups.max() + 1, *counts.shape[1:]), counts.dtype)
    np.add.at(sums, groups, counts)
    return sums


def class_scores(counts, names, groups=None):
    """(N, C, 4) -> `split_scores` of the images, a dict of floats.

    groups: int (N,), the number of each image's group, or None. With them group_dice is the mean
    of the Dice of the groups, of the pixels of all images of a group together.
    """
    drawn = np.arange(len(counts) if groups is None else groups.max() + 1)
    scores = _score_samples(counts, names, groups, [drawn])
    return {name: value.item() for name, value in scores.items()}


def resamples(size, samples=1000):
    """Yield `samples` arrays of `size` image numbers, drawn with replacement; always the same."""
    rng = np.random.default_rng(0)
    for _ in range(samples):
        yield rng.integers(0, size, size)


def bootstrap(counts, names, samples=1000, *, groups=None):
    """[2.5th, 97.5th percentile] of each of `class_scores` over resampled images, or groups.

    Samples in which no image has the class are left out; NaN where all are.
    counts, groups: as there. Images of one patient are alike: where groups are known, whole ones
    are drawn. Efron's percentile method. It says how much a score owes to the choice of images, not
    what another training, or another hospital, would give.
    """
    size, intervals = len(counts) if groups is None else groups.max() + 1, {}
    scores = _score_samples(counts, names, groups, resamples(size, samples))
    for name, values in scores.items():
        known = values[~np.isnan(values)]
        limits = np.percentile(known, [2.5, 97.5]) if len(known) else np.full(2, math.nan)
        intervals[name] = limits.tolist()
    return intervals


def _score_samples(counts, names, groups, samples):
    """`split_scores`, (S,) each, of samples: numbers of images, or of groups where they are known.

    counts, groups: see `class_scores`.
    """
    numbers = np.arange(len(counts)) if groups is None else groups
    dice_sums, sizes = sum_groups(image_dice(counts), numbers), np.bincount(numbers)
    counts = sum_groups(counts, numbers)
    group_dice = image_dice(counts)
    sums, means = [], {"image_dice": [], "group_dice": []}  # of each sample
    for drawn in samples:
        sums.append(counts[drawn].sum(0))
        means["image_dice"].append(dice_sums[drawn].sum(0) / sizes[drawn].sum())
        means["group_dice"].append(group_dice[drawn].mean(0))
    if groups is None:
        del means["group_dice"]
    means = {name: np.stack(values, 1) for name, values in means.items()}
    return split_scores(np.stack(sums, 1), names, **means)
