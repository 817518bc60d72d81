"""Binary masks as run lengths, counted down the columns as COCO does, by pycocotools.

A mask of 24 megapixels takes 24 MB as an array and a few kB as run lengths: of many classes only
these are kept, and one after the other is drawn.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from medseg.images import resize_nearest


@dataclass(frozen=True)
class RunLengths:
    """A binary mask (H, W). shape: (H, W). counts: COCO's compressed counts, bytes."""

    shape: tuple
    counts: bytes

    @property
    def coco(self):
        """The mask as pycocotools takes it."""
        return {"size": list(self.shape), "counts": self.counts}

    @property
    def area(self):
        """The number of foreground pixels."""
        return int(coco_mask.area(self.coco))

    @property
    def box(self):
        """[x, y, width, height] of the pixels of the foreground."""
        return coco_mask.toBbox(self.coco).tolist()

    def draw(self, height=None, width=None):
        """The mask, uint8 of 0 and 1; of another size as `resize_nearest` makes it."""
        drawn = coco_mask.decode(self.coco)
        return drawn if height is None else resize_nearest(drawn, height, width)


class ClassMasks(NamedTuple):
    """The masks of an image, drawn one after the other, for those of many classes are large.

    parts: {channel: RunLengths}, at C of the pixels to be ignored; shape: (C, H, W).
    """

    parts: dict
    shape: tuple

    def known(self):
        """bool (H, W): which pixels count, or None where all do."""
        ignored = self.parts.get(self.shape[0])
        return None if ignored is None else ignored.draw(*self.shape[1:]) == 0

    def __iter__(self):
        """Yield a bool array (H, W) for each class."""
        known = self.known()
        for channel in range(self.shape[0]):
            if channel in self.parts:
                mask = self.parts[channel].draw(*self.shape[1:]) > 0
                yield mask if known is None else mask & known
            else:
                yield np.zeros(self.shape[1:], bool)


def encode(mask):
    """Bool array (H, W) -> RunLengths."""
    return RunLengths(mask.shape, coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"])


def encode_counts(counts, shape):
    """COCO's uncompressed counts, background first, which add up to (H, W) -> RunLengths."""
    compressed = coco_mask.frPyObjects({"size": list(shape), "counts": counts}, *shape)
    return RunLengths(shape, compressed["counts"])


def encode_labels(labels):
    """Integer array (H, W) -> {value: RunLengths of its pixels}, of all values in one pass."""
    flat = labels.ravel(order="F")
    bounds = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    values = flat[bounds[:-1]]
    order = np.argsort(values, kind="stable")
    distinct, first = np.unique(values[order], return_index=True)
    masks = {}
    for value, runs in zip(distinct.tolist(), np.split(order, first[1:]), strict=True):
        edges = np.stack([bounds[runs], bounds[runs + 1]], 1).ravel()
        counts = np.diff(edges, prepend=0, append=flat.size)
        masks[value] = encode_counts(counts if counts[-1] else counts[:-1], labels.shape)
    return masks


def unite(masks):
    """The union of RunLengths of one shape."""
    runs = [mask.coco for mask in masks]
    while len(runs) > 1:  # a few at a time, for each is united with all of those before
        runs = [coco_mask.merge(runs[start : start + 32]) for start in range(0, len(runs), 32)]
    return RunLengths(masks[0].shape, runs[0]["counts"])


def decompress_counts(text):
    """COCO's compressed counts, a string or bytes -> int64 array; ValueError where damaged.

    5 bits a character, low first, the sixth says that more follow; the highest bit of the last
    one is the sign. From the third count on, differences to the one but last.
    """
    codes = np.frombuffer(text if isinstance(text, bytes) else text.encode("utf-8"), np.uint8)
    codes = codes - np.uint8(48)  # what is below becomes large
    last = np.flatnonzero(codes & 32 == 0)
    lengths = np.diff(last, prepend=-1)
    complete = len(last) and last[-1] == len(codes) - 1
    if not complete or codes.max() > 63 or lengths.max() > 7:  # pycocotools has 32 bits
        raise ValueError("compressed run-length counts are damaged")
    first = last - lengths + 1
    places = np.arange(len(codes)) - np.repeat(first, lengths)
    counts = np.add.reduceat((codes & 31).astype(np.int64) << 5 * places, first)
    counts -= np.where(codes[last] & 16, 1 << 5 * lengths, 0)
    for turn in (1, 2):
        counts[turn::2] = np.cumsum(counts[turn::2])
    return counts
