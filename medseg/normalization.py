"""Pixels as a network takes them: mean 0 and deviation 1."""

import functools

import torch

from medseg.images import mean_and_std


def split_rows(rows, n_channels, n_classes):
    """uint8 tensor (B, S, S, n_channels + bytes) -> images and masks as a network takes them.

    Images: float32 (B, n_channels, S, S) normalised; masks: float32 (B, n_classes, S, S) of 0 and
    1, and -1 where the bit that follows those of the classes says that a pixel is to be ignored.
    """
    masks = rows[..., n_channels:]
    if n_classes > 1:
        bits = torch.arange(8, dtype=torch.uint8, device=rows.device)
        masks = ((masks[..., None] >> bits) & 1).flatten(-2)
        masks, ignored = masks[..., :n_classes], masks[..., n_classes : n_classes + 1] > 0
    else:
        ignored = masks > 1
    masks = masks.permute(0, 3, 1, 2).float().contiguous()
    if ignored.shape[-1]:  # of eight classes without it, there is no such bit
        masks.masked_fill_(ignored.permute(0, 3, 1, 2), -1)
    return normalize(rows[..., :n_channels]), masks


def normalize(pixels):
    """uint8 (B, H, W, C) -> float32 (B, C, H, W), on the same device; C is 3, or 1 for grey.

    The memory stays in the order of the pixels, which is what PyTorch calls channels_last.
    """
    mean, std = mean_and_std_tensors(pixels.shape[-1], pixels.device, white=255)
    images = pixels - mean
    images /= std  # in place: one array, not two
    return images.swapaxes(3, 2).swapaxes(2, 1)


@functools.cache
def mean_and_std_tensors(n_channels, device, white=1):
    """Mean and deviation (n_channels,) of pixels of 0..white, on the device.

    Made once: a copy in every step would wait for the GPU.
    """
    mean, std = mean_and_std(n_channels)
    return torch.tensor(mean, device=device) * white, torch.tensor(std, device=device) * white
