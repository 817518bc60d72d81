"""What predict.py writes of its predictions, and the lines that it prints on them."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from medseg import images
from medseg.files import available_cores
from medseg.predicting import assessment, reading
from medseg.results.masks import describe, make_masks, stack_masks


def save_one(model, frame, image, prediction, results, draw):
    """Write one prediction: where results have a file for output, the mask alone, else all.

    model: a `medseg.predictor.Predictor`, results: a Results, here and below. draw:
    `predict.visualize_result`.
    """
    output, names, written = results.output, model.info.class_names, [results.output]
    masks = _make_masks(model, frame, image, prediction, results.write)
    if output.is_dir():
        written = results.add(frame, image, masks, **assessment.reliability_columns([prediction]))
        if "overlay" in results.write:
            written.append(output / f"{frame.name}_prediction.png")
            draw(image, masks.labels, path=written[-1], class_names=names, name=frame.title)
    else:
        images.save_mask(masks.labels, output, names)
    _tell(model, frame.path, masks, [(frame.path, prediction)], written)


def save_many(model, predicted, total, results, scores=None, *, lines=True):
    """Write the predictions of images, in threads, a few batches behind at most.

    predicted: as `predict.predict_images` yields them, `total` at most. scores: a FolderScores to
    tell of each, or None. lines: print one on each.
    """

    def write(frame, image, prediction):
        masks = _make_masks(model, frame, image, prediction, results.write)
        columns = assessment.reliability_columns([prediction])
        dice = scores.add(frame.path, image.size, prediction.probabilities) if scores else None
        columns |= {} if dice is None else {"dice": dice}
        results.add(frame, image, masks, **columns)
        return describe(frame.path, masks, model.info.class_names, model.inference)

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


def save_volume(model, volume, predicted, results, window, *, lines=True):
    """Write the predictions of the slices of a volume: the mask alone to a file, or all.

    volume: a `medseg.formats.nifti.Volume`; predicted: as `predict.predict_images` yields its
    slices. window: (center, width) or None. lines: print some.
    """
    from medseg.formats.nifti import write_mask

    assessed, slices, written = [], [], [results.output]
    for frame, image, prediction in predicted:
        slices.append(_make_masks(model, frame, image, prediction, results.write))
        assessed.append((frame.title, prediction._replace(probabilities=None)))
    masks, slices = stack_masks(slices), None  # as large
    if results.output.is_dir():
        columns = assessment.reliability_columns([one for _, one in assessed])
        written = results.add_volume(volume, masks, window, **columns)
    else:
        write_mask(results.output, volume, masks.labels)
    if lines:
        _tell(model, volume.path, masks, assessed, written, "slices")


def _make_masks(model, frame, image, prediction, write):
    return make_masks(model, prediction.probabilities, image.size, frame.spacing, write=write)


def _tell(model, path, masks, assessed, written, what="images"):
    """Print lines on masks of the image or volume at `path`, of which these files are written."""
    print(describe(path, masks, model.info.class_names, model.inference))
    assessment.print_assessments(assessed, what)
    print(f"saved {', '.join(map(str, written)) or 'nothing'}")
