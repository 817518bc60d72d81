"""Images read ahead of the network, and predictions written behind it, in threads."""

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

from tqdm import tqdm

from medseg.files import available_cores, file_format, name_file, parallel_map
from medseg.predicting.inputs import check_channels
from medseg.samples import open_picture

AHEAD_PIXELS = 64 << 20  # of images that are read ahead of the network, or written behind it


def read_ahead(frames, info, prepare, leave_out):
    """Yield (frame, Picture, tensor (1, C, S, S)) of the `Frame`s that can be read.

    A few are read ahead, in threads. info: the `net.ModelInfo` of what sees them.
    prepare(Picture): `predict.preprocess_image`. leave_out(frame, error) is told of the others.
    """

    def read(frame):
        image = frame.read()
        with name_file(frame.path):
            check_channels(image, info)
            tensor, image = prepare(image)
        return frame, image, tensor

    reading = parallel_map(read, frames, cost=count_pixels, limit=AHEAD_PIXELS)
    with closing(reading) as images:  # by this thread: none of its own could wait for itself
        for frame in frames:
            result = next(images)
            if isinstance(result, Exception):
                leave_out(frame, result)
            else:
                yield result
                result = None  # a large image is not kept while the next one is read, as by zip


def take_batch(readable, size):
    """The next of what `read_ahead` gives: `size`, or fewer large ones, or none."""
    batch, pixels = [], 0
    for frame, image, tensor in readable:
        batch.append((frame, image, tensor))
        pixels += image.width * image.height
        if len(batch) == size or pixels > AHEAD_PIXELS:
            break
    return batch


def count_pixels(frame):
    """How many pixels the image file of a Frame says it has; 0 of a frame of another file."""
    if file_format(frame.path) is None:
        with suppress(Exception), open_picture(frame.path) as picture:  # told when read
            return math.prod(picture.size)
    return 0


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
            large = image.width * image.height > AHEAD_PIXELS // (2 * size)
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
