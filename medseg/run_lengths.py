"""Binary masks as run lengths, counted down the columns as COCO does.

A mask of 24 megapixels takes 24 MB as an array and a few kB as runs: of many classes, only runs
are kept, and what is drawn of them has the size that is needed.
"""

from dataclasses import dataclass

import numpy as np

from medseg.images import resize_nearest

MAX_CHARACTERS = 7  # of one compressed count: 34 bits and a sign, where pycocotools has 32 bits


@dataclass(frozen=True)
class RunLengths:
    """A binary mask (H, W) as the runs of its foreground.

    shape: (H, W). starts, ends: integer arrays (R,). Pixel (y, x) has the number x * H + y, and
    run i covers the numbers from starts[i] to ends[i] - 1. Runs ascend and do not touch, so that
    equal masks have equal runs.
    """

    shape: tuple
    starts: np.ndarray
    ends: np.ndarray

    @property
    def area(self):
        """The number of foreground pixels."""
        return int((self.ends - self.starts).sum(dtype=np.int64))

    def __or__(self, other):
        return unite([self, other]) if isinstance(other, RunLengths) else np.asarray(self) | other

    def __array__(self, dtype=None, copy=None):
        return self.draw().astype(bool if dtype is None else dtype)

    def counts(self):
        """COCO's uncompressed counts, int64: background and foreground by turns."""
        edges = np.stack([self.starts, self.ends], 1).ravel()
        counts = np.diff(edges, prepend=0, append=self.shape[0] * self.shape[1])
        return counts if counts[-1] else counts[:-1]

    def draw(self, height=None, width=None):
        """The mask as `resize_nearest` makes it of this size, uint8 of 0 and 1.

        Without a size, as it is. Takes memory for the size that is asked for alone.
        """
        if height is None or (height, width) == self.shape:
            return self._paint(self.starts, self.ends, self.shape)
        indices = (_nearest(*sizes) for sizes in zip(self.shape, (height, width), strict=True))
        (rows, row_of), (columns, column_of) = indices
        pixels = (columns[:, None] * self.shape[0] + rows).ravel()
        first, last = np.searchsorted(pixels, self.starts), np.searchsorted(pixels, self.ends)
        meets = first < last  # a run between two of these pixels is not seen
        drawn = self._paint(first[meets], last[meets], (len(rows), len(columns)))
        return drawn[row_of[:, None], column_of]

    @staticmethod
    def _paint(starts, ends, shape):
        edges = np.stack([starts, ends], 1).ravel()
        counts = np.diff(edges, prepend=0, append=shape[0] * shape[1])
        values = np.resize(np.array([0, 1], np.uint8), len(counts))
        return np.repeat(values, counts).reshape(shape[::-1]).T


def _nearest(old, new):
    """np.unique of the indices that `resize_nearest` takes of an axis, and each one's place."""
    indices = resize_nearest(np.arange(old)[:, None], new, 1)[:, 0]
    return np.unique(indices, return_inverse=True)


def encode(mask):
    """Bool array (H, W) -> RunLengths."""
    return encode_labels(mask).get(True, _runs(mask.shape, [], []))


def encode_labels(labels):
    """Integer array (H, W) -> {value: RunLengths of its pixels}, of all values in one pass."""
    flat = np.ascontiguousarray(labels.T).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate([[0], edges, [flat.size]]).astype(_position_type(labels.shape))
    del edges
    values = flat[bounds[:-1]]
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    masks = {}
    for value, runs in zip(distinct.tolist(), np.split(order, first[1:]), strict=True):
        masks[value] = RunLengths(labels.shape, bounds[runs], bounds[1:][runs])
    return masks


def decode(counts, shape):
    """COCO's uncompressed counts, which add up to the pixels of (H, W) -> RunLengths."""
    edges = np.cumsum(counts, dtype=np.int64)
    ends = edges[1::2]
    return _runs(shape, edges[::2][: len(ends)], ends)


def unite(masks):
    """The union of RunLengths of one shape."""
    if len(masks) == 1:
        return masks[0]
    starts = np.concatenate([mask.starts for mask in masks])
    order = np.argsort(starts, kind="stable")
    ends = np.concatenate([mask.ends for mask in masks])
    return _runs(masks[0].shape, starts[order], ends[order])


def _runs(shape, starts, ends):
    """RunLengths of runs in ascending order of their starts, which may be empty or overlap."""
    starts, ends = (np.asarray(side, _position_type(shape)) for side in (starts, ends))
    filled = starts < ends
    starts, reach = starts[filled], np.maximum.accumulate(ends[filled])
    apart = starts[1:] > reach[:-1]
    edge = np.ones(min(len(starts), 1), bool)
    return RunLengths(
        shape, starts[np.concatenate([edge, apart])], reach[np.concatenate([apart, edge])]
    )


def _position_type(shape):
    return np.int32 if shape[0] * shape[1] < 2**31 else np.int64


def decompress_counts(text):
    """COCO's compressed counts, a string or bytes -> int64 array; ValueError where damaged.

    5 bits a character, low first, the sixth says that more follow; the highest bit of the last
    one is the sign. From the third count on, differences to the one but last.
    """
    codes = np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8"), np.uint8)
    codes = codes - np.uint8(48)  # what is below becomes large
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    complete = len(last) and last[-1] == len(codes) - 1
    if not complete or codes.max() > 63 or (last - first).max() >= MAX_CHARACTERS:
        raise ValueError("compressed run-length counts are damaged")
    lengths = last - first + 1
    places = np.arange(len(codes)) - np.repeat(first, lengths)
    counts = np.add.reduceat((codes & 31).astype(np.int64) << 5 * places, first)
    counts -= np.where(codes[last] & 16, 1 << 5 * lengths, 0)
    for turn in (1, 2):
        counts[turn::2] = np.cumsum(counts[turn::2])
    return counts
