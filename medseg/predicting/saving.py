"""Predictions written in threads, behind the network."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from medseg.files import available_cores
from medseg.predicting import reading


def save_images(predicted, total, results, scores=None, *, lines=True):
    """Write the predictions of images, a few batches behind at most, and print where.

    predicted: as `predict.predict_images` yields them, `total` at most. results: a Results. scores:
    a FolderScores to tell of each, or None. lines: print one on each.
    """

    def write(frame, image, prediction):
        dice = scores and scores.add(frame.path, image.size, prediction.probabilities)
        columns = {} if dice is None else {"dice": dice}
        return results.add(frame, image, prediction, **columns)

    def finish_first():
        line, paths = writing.popleft().result()
        written.extend(paths)
        if lines:
            tqdm.write(line)

    writing, written, size = deque(), [], results.model.batch_size
    # Not around `predicted`: the bar would keep a reference to the last image.
    bar = tqdm(total=total, unit=" images", disable=total == 1 or None)
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for frame, image, prediction in predicted:
            bar.update()
            writing.append(pool.submit(write, frame, image, prediction))
            large = image.width * image.height > reading.AHEAD_PIXELS // (2 * size)
            image = prediction = None  # as large
            while len(writing) > (0 if large else 2 * size):
                finish_first()
        while writing:
            finish_first()
    print_saved(written, results.output if total > 1 else None)


def print_saved(paths, folder=None):
    """Print which files are written, or how many in a folder."""
    named = f"{len(paths)} files in {folder}" if folder else ", ".join(map(str, paths))
    print(f"saved {named or 'nothing'}")
