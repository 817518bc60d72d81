"""Pixels as a network takes them: mean 0 and deviation 1."""

import functools

import torch

from medseg.images import mean_and_std


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
