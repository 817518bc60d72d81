"""After training, on valid: threshold, averaging over flips and largest piece, where they gain."""

import math
from functools import partial

import numpy as np
import torch

from medseg.dist import is_first
from medseg.inference import PLAIN
from medseg.metrics import SWEEP, class_scores, count_image, count_pixels, mean_image_dice
from medseg.predictor import Predictor
from medseg.training.checkpoint import BEST
from medseg.weights import save_weights

MIN_GAIN = 0.002  # of the Dice of the split: less is not worth another way to make masks
MIN_IMAGES = 4  # of valid, to choose a threshold or whether pieces are removed


def gains(before, after, *, expected=False):
    """Whether masks became better by more than noise; counts of the same images, (N, C, 4).

    The Dice of the split must gain MIN_GAIN, which one large image can do alone, and the mean Dice
    of the images more than its standard error: so a gain has to be seen in many images. After the
    one-standard-error rule of Breiman, Friedman, Olshen, Stone: "Classification and Regression
    Trees", 1984, chapter 3. It takes at least two images.
    expected: of a change that is expected to help whatever valid says, as the mean of several
    predictions of a network that has learned the flips: then the Dice of the images must not fall.
    """
    difference = mean_image_dice(after) - mean_image_dice(before)  # (N,)
    noise = 0 if expected else difference.std(ddof=1) / math.sqrt(len(difference))
    gained = split_dice(after) - split_dice(before)
    return bool(gained >= MIN_GAIN and difference.mean() > noise)


def split_dice(counts):
    """Dice of the summed pixels of counts (N, C, 4), the mean over the classes that are there."""
    return class_scores(counts, range(counts.shape[1]))["dice"]


def choose(count, flips):
    """(the Inference that suits a split, a line on each choice that was tried).

    count(inference, thresholds) -> counts (N, T, C, 4) of the split at these thresholds, with the
    flips and the clean-up of an Inference. flips: names to try.
    One choice after the other, each beside what was chosen before: threshold, flips (which may need
    another threshold), largest piece. What does not gain stays as in the tutorial.
    """
    chosen, lines = PLAIN, []
    counts, at = count(chosen, SWEEP), SWEEP.index(PLAIN.threshold)
    if math.isnan(split_dice(counts[:, at])):
        return chosen, ["no image has foreground, so that nothing can be chosen"]
    enough = len(counts) >= MIN_IMAGES
    if not enough:
        lines.append(f"too few images ({len(counts)}) for a threshold and the largest piece")

    def take(other, after, **expected):
        before, taken = counts[:, at], gains(counts[:, at], after, **expected)
        verdict = "chosen" if taken else "not chosen: no clear gain"
        dice = f"Dice {split_dice(after):.4f} instead of {split_dice(before):.4f}"
        lines.append(f"{other}: {dice}, {verdict}")
        return taken

    if enough and (best := better_threshold(counts, at)) != at:
        other = chosen._replace(threshold=SWEEP[best])
        if take(other, counts[:, best]):
            chosen, at = other, best
    if flips:
        after = count(chosen._replace(flips=flips), SWEEP)
        best = better_threshold(after, at) if enough else at
        other = chosen._replace(threshold=SWEEP[best], flips=flips)
        if take(other, after[:, best], expected=True):
            chosen, counts, at = other, after, best
    if enough:
        other = chosen._replace(clean={"largest": 1.0})
        if take(other, count(other, [other.threshold])[:, 0]):
            chosen = other
    return chosen, lines


def better_threshold(counts, at):
    """The index in SWEEP of the highest Dice where it gains, else `at`; counts: (N, T, C, 4).

    Not among those that may be chosen are the lowest and the highest, beyond which the best may
    lie, and those that mark nearly all or nothing of each class: that leave less than a tenth of
    the background's area unmarked, or mark less than a tenth of the foreground's.
    """
    dice = np.array([split_dice(counts[:, index]) for index in range(len(SWEEP))])
    tp, fp, fn, tn = np.moveaxis(counts.sum(0), -1, 0)  # (T, C) each
    usable = ~((tn + fn <= 0.1 * (tn + fp)) | (tp + fp <= 0.1 * (tp + fn))).all(1)
    usable[[0, -1]] = False
    best = int(np.argmax(np.where(usable, dice, -1)))
    return best if usable[best] and gains(counts[:, at], counts[:, best]) else at


def tune_prediction(model, loaders, out, autocast):
    """Choose how the masks of a trained UNet are made, and record it in out/best_model.pth.

    model: with its best weights. loaders: {split: `data.Batches`}, of which valid is predicted
    some times over. Every process calls it, with its part of the batches.
    """
    count = partial(count_split, model, loaders["valid"], autocast)
    model.info.inference, lines = choose(count, model.info.trained_flips)
    if is_first():
        save_weights(out / BEST, model.state_dict())
        for line in lines:
            print(f"on valid, {line}")
        print(f"chosen on valid: {model.info.inference}", flush=True)


def count_split(model, batches, autocast, inference, thresholds):
    """Counts (N, T, C, 4) of a split, see `count_pixels`: of masks at the images' own size.

    batches: `data.Batches`, each process with its part of them. inference: whose flips and clean-up
    there are.
    """
    model.eval()
    predictor = Predictor([model], batches.device, inference=inference, autocast=autocast)
    numbers = iter(batches.row_numbers())

    def pairs():
        for images, masks in batches:
            outputs = predictor(images).cpu().numpy()
            for mask, probabilities in zip(masks, outputs, strict=True):
                yield batches.true_masks(next(numbers), mask), probabilities

    return count_pixels(pairs(), thresholds, inference.clean, exclusive=model.info.exclusive)


def count_batch(model, inference, truths, outputs):
    """int64 tensor (B, C, 4) of tp, fp, fn, tn of the masks that predict.py would write.

    truths: the true masks of each image, see `data.Batches.true_masks`; outputs: probabilities of
    the UNet, (B, C, S, S), already averaged over the flips of `inference`.
    """
    pairs = zip(truths, outputs.float().cpu().numpy(), strict=True)
    how = ([inference.threshold], inference.clean)
    counts = [count_image(*pair, *how, exclusive=model.info.exclusive) for pair in pairs]
    counts = np.array(counts, np.int64).reshape(-1, model.n_classes, 4)
    return torch.from_numpy(counts).to(outputs.device)
