"""Large images predicted by tiles, with the result of the whole image to 1e-5.

A tile begins on the grid on which the network halves the sides, and has a margin as wide as the
network looks: what is beyond it changes none of the pixels that are kept.
"""

import functools
import itertools
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from medseg.images import give_memory_back
from medseg.normalization import normalize
from medseg.samples import large_array

TILE_MEMORY = 3 << 28  # bytes that a pass through the network may take before an image is divided
WHOLE_MEMORY = 4 << 30  # the same, of a network whose tiles differ from the whole image


def apply_by_tiles(network, images, device, *, forward=None):
    """network(images), by tiles where that takes more memory than `memory_limits`.

    images: tensor (B, n_channels, H, W) on any device, normalised float32, or uint8, which is
    normalised part by part: a large image in float32 would fill the memory. forward: by default
    the network itself. Returns float32 (B, n_classes, H, W), on the device, or on the CPU of an
    image that is divided. Only networks that take images at their own size are divided;
    one whose tiles would differ from the whole image only above WHOLE_MEMORY, and a line on stderr
    says so, once.
    """

    def prepare(part):
        part = part.to(device)
        return normalize(part.permute(0, 2, 3, 1)) if part.dtype == torch.uint8 else part

    forward, (count, _, height, width) = forward or network, images.shape
    if not must_divide(network, count * height * width, device):
        return forward(prepare(images)).float()
    stride, margin = 2**network.architecture.depth, margin_of(network)
    pixels = memory_limits(device)[0] // (count * pass_memory(network))
    tiles = make_tiles(height, width, stride, margin, pixels)
    result = torch.from_numpy(large_array((count, network.n_classes, height, width), np.float32))
    for kept, shown in tqdm(tiles, f"{width}x{height}", unit=" tiles", disable=None, leave=False):
        part = forward(prepare(images[(..., *shown)])).float()
        pairs = zip(kept, shown, strict=True)
        inner = [slice(own.start - all.start, own.stop - all.start) for own, all in pairs]
        result[(..., *kept)] = part[(..., *inner)]
    give_memory_back()  # what follows has large arrays of other sizes
    return result


def must_divide(network, pixels, device):
    """Whether a pass of so many pixels through a network is to be made by tiles."""
    layers = getattr(network, "architecture", None)
    if layers is None or network.info.image_size is not None:
        return False
    differs = ["group normalisation"] if layers.norm == "group" else []
    if layers.up == "bilinear":  # whose corners are aligned: a step depends on the side
        differs.append("bilinear upsampling")
    needed = pixels * pass_memory(network)
    if needed <= TILE_MEMORY or needed <= memory_limits(device)[bool(differs)]:
        return False
    if differs:
        note_difference(" and ".join(differs))
    return True


def pass_memory(network):
    """Bytes a pixel that a pass through a UNet takes, measured with PyTorch on a CPU.

    At the finest level: the two parts of the decoder's input, the two as one, what is made of them,
    and what convolutions take for themselves.
    """
    return 4 * (8 * network.n_filters + 2 * (network.n_channels + network.n_classes))


def margin_of(network):
    """How far from a border that is moved the answer of a UNet may change, in pixels.

    Followed through the network, level by level, from a border at a multiple of 2^depth: a 3x3
    convolution reaches one pixel further, halving halves the distance, and so on. Rounded up to
    such a multiple.
    """
    layers, border = network.architecture, 0
    for _ in range(layers.depth):
        border += 2
        border = border // 2 + 1 if layers.down == "stride" else (border + 1) // 2
    border += 2
    for _ in range(layers.depth):
        border = 2 * border + (layers.up == "bilinear") + 2
    return round_up(border, 2**layers.depth)


def make_tiles(height, width, stride, margin, pixels):
    """[(slices that are kept, slices that the network sees)], each of height and width.

    It sees at most `pixels` of a tile; where that would leave less between the margins than half
    of one, more.
    """
    sides = []
    for side, other in ((height, width), (width, height)):
        shown = max(math.isqrt(pixels), pixels // other)
        step = max(shown // stride * stride - 2 * margin, round_up(margin // 2, stride))
        parts = -(-side // step) if side > shown else 1
        step = round_up(-(-side // parts), stride)  # nearly equal: one takes the memory of another
        kept = [slice(first, min(first + step, side)) for first in range(0, side, step)]
        ends = [(max(one.start - margin, 0), min(one.stop + margin, side)) for one in kept]
        sides.append([(one, slice(*end)) for one, end in zip(kept, ends, strict=True)])
    return [tuple(zip(*tile, strict=True)) for tile in itertools.product(*sides)]


def round_up(number, multiple):
    return -(-number // multiple) * multiple


@functools.cache
def note_difference(differs):
    print(
        f"an image takes too much memory to be predicted whole, so it is predicted by tiles: "
        f"{differs} sees each tile by itself, and masks differ somewhat from the whole image's",
        file=sys.stderr,
    )


def memory_limits(device):
    """Bytes that the tiles of an image may take, and an image whose tiles would differ from it."""
    if torch.device(device).type != "cuda":
        return TILE_MEMORY, WHOLE_MEMORY
    free = torch.cuda.mem_get_info(device)[0]
    return max(TILE_MEMORY, free // 4), free // 2
