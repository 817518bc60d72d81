"""Large images predicted by tiles, with the result of the whole image. No torch.

Every pixel of a tile is computed from what the whole image has around it: a tile takes its place on
the grid on which the network halves the sides, and a margin beyond which nothing reaches its
pixels. What is at the border of the image is at the border of its tiles.
"""

import functools
import math
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from medseg.images import give_memory_back, large_array
from medseg.inference import average_over_flips

# Bytes that a pass through the network may take before an image is divided.
TILE_MEMORY = 3 << 28
# Of the memory that is free, for an image whose tiles would differ, or for the tiles on a GPU.
WHOLE_SHARE, GPU_SHARE = 1 / 2, 1 / 4
# Of a convolution's input of so many values or fewer, PyTorch's sums on a CPU are made otherwise
# (`use_mkldnn` in ATen/native/Convolution.cpp) and differ in the last bits.
SMALL_INPUT = 20480
UNKNOWN_MEMORY = 4 << 30  # where the system does not tell what is free
WHOLE = slice(None), slice(None)  # of height and width


class Tiling(NamedTuple):
    """What dividing an image takes, of one network.

    stride: both sides are halved to this fraction; a power of two. margin: how many pixels from
    a border that is none of the image's the network's answer may change. bytes_per_pixel: of a
    pass through it. least_pixels: of a tile; fewer may be rounded otherwise. differs: what sees the
    whole image, so that no margin is enough, or "".
    """

    stride: int
    margin: int
    bytes_per_pixel: int
    least_pixels: int = 0
    differs: str = ""


def tiling_of(network):
    """The Tiling of a UNet that takes images at their own size; None of any other network.

    Images of one size are as large as those of the training, which takes more memory.
    """
    layers = getattr(network, "architecture", None)
    if layers is None or network.image_size is not None:
        return None
    differs = "group normalisation" if layers.norm == "group" else ""
    if layers.up == "bilinear":  # whose corners are aligned: a step depends on the side
        differs = " and ".join(filter(None, [differs, "bilinear upsampling"]))
    # At the finest level: the two parts of the decoder's input, the two as one, what is made of
    # them, and what convolutions take for themselves. Measured with PyTorch on a CPU.
    values = 8 * network.n_filters + 2 * (network.n_channels + network.n_classes)
    # The first convolution below the last halving has the fewest values for its input.
    least_pixels = SMALL_INPUT * 2 ** (layers.depth + 1) // network.n_filters
    return Tiling(2**layers.depth, changed_border(layers), 4 * values, least_pixels, differs)


def changed_border(layers):
    """How far from a border that is moved the answer of a UNet may change, in pixels.

    layers: its `medseg.layers.Architecture`. Followed through the network, level by level, from a
    border at a multiple of 2^depth: a 3x3 convolution reaches one pixel further, halving halves
    the distance, and so on.
    """
    border = 0
    for _ in range(layers.depth):
        border += 2
        border = border // 2 + 1 if layers.down == "stride" else (border + 1) // 2
    border += 2
    for _ in range(layers.depth):
        border = 2 * border + (layers.up == "bilinear") + 2
    return border


def combine_tilings(tilings):
    """The Tiling that suits several networks at once; None where one has none."""
    if None in tilings:
        return None
    *numbers, differs = zip(*tilings, strict=True)
    reasons = " and ".join(dict.fromkeys(filter(None, differs)))
    return Tiling(*map(max, numbers), reasons)


def read_tiling(value):
    """The Tiling that metadata hold as `Tiling._asdict` gives it; ValueError unless it, or None."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {*Tiling._fields}:
        raise ValueError(f"tiling {value!r:.60}")
    tiling = Tiling(**value)
    *numbers, differs = tiling
    possible = all(type(number) is int and 0 <= number <= 1 << 30 for number in numbers)
    possible = possible and tiling.stride in [2**depth for depth in range(1, 9)]
    if not possible or not tiling.margin or not isinstance(differs, str):
        raise ValueError(f"tiling {value!r:.60}")
    return tiling._replace(differs=differs[:100])


# ---- dividing --------------------------------------------------------------------------------


class Part(NamedTuple):
    """Part of a side: the pixels that are wanted, and those that the network is shown for them."""

    start: int
    end: int
    first: int
    last: int


def make_tiles(height, width, tiling, pixels):
    """[(Part of the height, Part of the width)], for each of which the network sees few pixels.

    At most `pixels`, and of all such tiles those with the least to compute. Where that would leave
    less than half a margin between the margins, or be too few, the network sees more. It sees as
    many for all of them: the memory that one has freed is then what the next one takes.
    """
    stride = tiling.stride
    margins = [sum(_margins(side, tiling)) for side in (height, width)]
    inside = _round_up(tiling.margin // 2, stride)
    smallest = [
        min(each + inside, side) for each, side in zip(margins, (height, width), strict=True)
    ]
    # Twice, as parts that are made equal may turn out half as large.
    pixels = max(pixels, math.prod(smallest), 2 * tiling.least_pixels)
    best, least = (1, 1), math.inf
    for rows in range(1, max(-(-(height - margins[0]) // stride), 1) + 1):
        tall, columns = _shown(height, rows, tiling), 1
        wide = min(pixels // tall, width)
        if wide < width:
            inside = (wide - margins[1]) // stride * stride
            if inside < stride:
                continue
            columns = -(-(width - margins[1]) // inside)
        seen = rows * tall * columns * _shown(width, columns, tiling)
        if seen < least:
            best, least = (rows, columns), seen
    rows, columns = (divide(*given, tiling) for given in zip((height, width), best, strict=True))
    return [(row, column) for row in rows for column in columns]


def divide(side, parts, tiling):
    """A side in so many `Part`s, for which the network is shown equally many pixels.

    What it is shown begins and ends at a multiple of the stride, as seen from either end of the
    side, for a flipped image has its multiples from the other.
    """
    shown, (before, after) = _shown(side, parts, tiling), _margins(side, tiling)
    firsts = [min(part * (shown - before - after), side - shown) for part in range(parts)]
    starts = [0, *(first + before for first in firsts[1:]), side]
    return [
        Part(starts[part], starts[part + 1], first, first + shown)
        for part, first in enumerate(firsts)
    ]


def _shown(side, parts, tiling):
    """Pixels that the network is shown for each part of a side."""
    between, rest = sum(_margins(side, tiling)), side % tiling.stride
    least = -(-(side + (parts - 1) * between) // parts)
    return min(_round_up(least - rest, tiling.stride) + rest, side)


def _margins(side, tiling):
    """Pixels before and after a part of a side that the network is shown besides."""
    rest = side % tiling.stride
    before = _round_up(tiling.margin + rest, tiling.stride)
    return before, _round_up(tiling.margin, tiling.stride) + rest


def _round_up(number, multiple):
    return -(-number // multiple) * multiple


# ---- predicting ------------------------------------------------------------------------------


def apply_network(network, images, flips=()):
    """network(images), averaged over flips; of a UNet for images of their own size, `by_tiles`.

    images: normalised, tensor (B, n_channels, H, W). flips: names of `medseg.inference.FLIPS`.
    """

    def run(part):
        return average_over_flips(network, part, flips)

    return by_tiles(run, images, tiling_of(network), images.device)


def by_tiles(predict, images, tiling, device="cpu", memory=None, *, enter=lambda inside: None):
    """predict(images), of images that may be too large for it.

    images: tensor or array (B, C, H, W). predict(part of them) -> tensor or array
    (B, n_classes, H, W). tiling: of the network within, or None, which never divides. memory:
    bytes that predict may take; by default TILE_MEMORY, and more on a GPU. Where the tiles would
    differ from the whole image, the image is divided only if the memory cannot hold it, and a line
    on stderr says so, once. enter(inside): called before each predict, with the slices of height
    and width whose result counts: together, those of all tiles are the image.
    Within predict, nothing is divided again, and no other `enter` is called.
    """
    if _is_part.get():
        return predict(images)
    if tiling is None:
        enter(WHOLE)
        return predict(images)
    token = _is_part.set(True)
    try:
        return _by_tiles(predict, images, tiling, device, memory, enter)
    finally:
        _is_part.reset(token)


_is_part = ContextVar("is_part", default=False)


def _by_tiles(predict, images, tiling, device, memory, enter):
    count, _, height, width = images.shape
    needed = count * height * width * tiling.bytes_per_pixel
    if needed <= (memory or TILE_MEMORY):
        enter(WHOLE)
        return predict(images)
    free = available_memory(device)
    if memory is None:
        on_gpu = getattr(device, "type", device) == "cuda"
        memory = max(TILE_MEMORY, int(GPU_SHARE * free) if on_gpu else 0)
    if needed <= (max(memory, WHOLE_SHARE * free) if tiling.differs else memory):
        enter(WHOLE)
        return predict(images)
    if tiling.differs:
        _note_difference(tiling.differs)
    tiles = make_tiles(height, width, tiling, memory // (count * tiling.bytes_per_pixel))
    result = None
    for row, column in tqdm(tiles, f"{width}x{height}", unit=" tiles", disable=None, leave=False):
        inside = tuple(map(_inside, (row, column)))
        enter(inside)
        part = predict(images[..., row.first : row.last, column.first : column.last])
        if result is None:
            shape = (*part.shape[:-2], height, width)
            tensor = hasattr(part, "new_empty")
            result = part.new_empty(shape) if tensor else large_array(shape, part.dtype)
        wanted = np.s_[..., row.start : row.end, column.start : column.end]
        result[wanted] = part[(..., *inside)]
    give_memory_back()  # what follows has large arrays of other sizes
    return result


def _inside(part):
    """Which of the pixels that are shown for a `Part` are wanted: a slice, open at the end."""
    end = None if part.end == part.last else part.end - part.first
    return slice(part.start - part.first, end)


@functools.cache
def _note_difference(differs):
    print(
        f"an image is larger than the free memory can hold whole, so it is predicted by tiles: "
        f"{differs} sees each tile by itself, and masks differ somewhat from the whole image's",
        file=sys.stderr,
    )


def available_memory(device="cpu"):
    """Bytes that are free, of a GPU or of this machine as far as this process may use it."""
    if getattr(device, "type", device) == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")  # of a container
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            limits.append(int(most) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    if not limits and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(min(limits, default=UNKNOWN_MEMORY), 0)
