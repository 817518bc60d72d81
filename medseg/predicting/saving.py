"""What predict.py writes of its predictions, and the lines that it prints on them."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from medseg import images
from medseg.files import available_cores
from medseg.predicting import assessment, reading
from medseg.results.folder import Results
from medseg.results.volume import VolumeMasks


def make_masks(model, frame, image, prediction, marked):
    """(labels, mask of each class or None) of a prediction, at the size of its image.

    As of `medseg.inference.Inference`; the masks only where a pixel may have several classes.
    marked: int64 (256,), to which the pixels of each class before the clean-up are added.
    """
    probabilities, size = prediction.probabilities, image.size
    options = {"marked": marked, "draw_order": model.info.draw_order}
    labels = model.inference.labels(probabilities, size, frame.spacing, **options)
    exclusive, spacing = model.info.exclusive, frame.spacing
    masks = model.inference.overlapping(probabilities, size, spacing, exclusive=exclusive)
    return labels, masks


def describe(model, path, labels, masks, highest, marked):
    """`medseg.images.describe` of what `make_masks` has made."""
    measured = labels if masks is None else masks
    names = model.info.class_names
    return images.describe(path, measured, highest, names, model.inference, marked)


def save_one(model, frame, image, prediction, output, results, draw):
    """Write one prediction: the mask alone to the file `output`, or all to the folder `output`.

    model: a `medseg.predictor.Predictor`, here and below. results: a Results of this folder, or
    None. draw: `predict.visualize_result`.
    """
    marked, names = np.zeros(256, np.int64), model.info.class_names
    labels, masks = make_masks(model, frame, image, prediction, marked)
    written = [output]
    if output.is_dir():
        results, probabilities = results or Results(output, names), prediction.probabilities
        columns = {"agreement": prediction.agreement, "unlike": prediction.unlike}
        written = results.add(frame, image, labels, probabilities, masks=masks, **columns)
        if "overlay" in results.write:
            written.append(output / f"{frame.name}_prediction.png")
            draw(image, labels, path=written[-1], class_names=names, name=frame.title)
    else:
        images.save_mask(labels, output, names)
    print(describe(model, frame.path, labels, masks, prediction.probabilities.max((1, 2)), marked))
    assessment.print_assessments([(frame.path, prediction)])
    print(f"saved {' and '.join(map(str, written)) or 'nothing'}")


def save_many(model, predicted, total, results, scores=None, *, lines=True):
    """Write the predictions of images, in threads, a few batches behind at most.

    predicted: as `predict.predict_images` yields them, `total` at most. results: a Results that is
    to have their rows. scores: a FolderScores to tell of each, or None. lines: print one on each.
    """

    def write(frame, image, prediction):
        marked, probabilities = np.zeros(256, np.int64), prediction.probabilities
        labels, masks = make_masks(model, frame, image, prediction, marked)
        dice = scores.add(frame.path, image.size, probabilities) if scores else None
        columns = {"agreement": prediction.agreement, "unlike": prediction.unlike}
        results.add(frame, image, labels, probabilities, masks=masks, dice=dice, **columns)
        return describe(model, frame.path, labels, masks, probabilities.max((1, 2)), marked)

    def tell(line):
        if lines:
            tqdm.write(line)

    writing, assessed = deque(), []
    # Not around `predicted`: the bar would keep a reference to the last image.
    bar = tqdm(total=total, unit=" images", disable=None)
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for frame, image, prediction in predicted:
            bar.update()
            assessed.append((frame.title, prediction._replace(probabilities=None)))
            writing.append(pool.submit(write, frame, image, prediction))
            large = image.width * image.height > reading.AHEAD_PIXELS // (2 * model.batch_size)
            image = prediction = None  # as large
            while len(writing) > (0 if large else 2 * model.batch_size):
                tell(writing.popleft().result())
        for line in writing:
            tell(line.result())
    assessment.print_assessments(assessed)
    if total:
        count, what = len(assessed), results.what()
        print(f"saved {count} {what} in {results.output}" if what else f"{count} done")


def save_volume(model, volume, predicted, output, window, results=None, *, lines=True):
    """Write the predictions of the slices of a volume: the mask alone to the file `output`, or all.

    volume: a `medseg.formats.nifti.Volume`; predicted: as `predict.predict_images` yields its
    slices. results: a Results of a folder, which is to have the rows of the volume. window:
    (center, width) or None. lines: print some.
    """
    from medseg.formats.nifti import write_mask

    found = VolumeMasks(volume, len(model.info.class_names), results.write if results else ())
    assessed, written, marked = [], [output], np.zeros(256, np.int64)
    for frame, image, prediction in predicted:
        labels, masks = make_masks(model, frame, image, prediction, marked)
        found.add(labels, prediction.probabilities, masks)
        assessed.append((frame.title, prediction._replace(probabilities=None)))
    if results:
        columns = assessment.assess_volume([one for _, one in assessed])
        written = results.add_volume(found, window, **columns)
    else:
        write_mask(output, volume, found.masks)
    if lines:
        print(describe(model, volume.path, found.masks, found.class_masks, found.highest, marked))
        assessment.print_assessments(assessed, "slices")
        print(f"saved {' and '.join(map(str, written)) or 'nothing'}")
