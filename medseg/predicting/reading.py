"""Images read ahead of the network: several at a time, as long as they are small."""

import math
from contextlib import closing, suppress

from medseg.files import file_format, name_file, parallel_map
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
    with closing(reading) as ahead:  # by this thread: none of its own could wait for itself
        for frame in frames:
            result = next(ahead)
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
