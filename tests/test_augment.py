"""Augmentation: each change alone and all of them together.

Checked against numpy, scipy, torch.rot90 and masks drawn by hand.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import BSpline

from data import Batches, Order, Transform
from medseg.augment import AUGMENTATIONS, augment, count_draws, spline_basis
from medseg.cli import parse_named_values

DEFAULTS = {name: default for name, (default, _) in AUGMENTATIONS.items()}


def strengths_of(text):
    return parse_named_values(text, AUGMENTATIONS)


def uniform(count, strengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, count_draws(strengths), generator=generator)


def squares(count, side=64):
    """Images -1 with a square of 1, and that square as the mask: (count, 3 and 1, side, side)."""
    masks = torch.zeros(count, 1, side, side)
    masks[..., 15:43, 14:40] = 1
    return (2 * masks - 1).repeat(1, 3, 1, 1), masks


@pytest.mark.parametrize(
    "text",
    "rotate=180 scale=0.5 shift=0.4 flip turn,flip elastic=0.15 gamma noise all".split(),
)
def test_image_and_mask_stay_aligned(text):
    """The image is its own mask: they may differ only where interpolation blurs the edge."""
    strengths = dict(DEFAULTS) if text == "all" else strengths_of(text)
    images, masks = squares(48)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    new_images, new_masks = augment(images, masks, uniform(48, strengths), strengths, noise=noise)
    assert new_images.shape == images.shape and new_images.dtype == torch.float32
    assert new_images.is_contiguous(memory_format=torch.channels_last)
    assert set(new_masks.unique().tolist()) == {0, 1} and new_masks.shape == masks.shape
    bright = new_images.mean(1, keepdim=True) > 0
    dilated, eroded = F.max_pool2d(new_masks, 3, 1, 1), 1 - F.max_pool2d(1 - new_masks, 3, 1, 1)
    inner_or_outer = dilated == eroded
    assert ((bright != (new_masks > 0.5)) & inner_or_outer).sum() == 0
    assert (new_masks.mean((1, 2, 3)) > 0.02).all()
    different = {tuple(image.flatten().tolist()) for image in new_images}
    expected = {"flip": 4, "turn,flip": 8}.get(text, 48)  # else each in a way of its own
    assert len(different) == expected


def turned(quarters):
    return lambda images: torch.rot90(images, quarters, (1, 2))


def flipped(*dims):
    return lambda images: images.flip(dims)


EXACT = {  # the change, its draws for each image, and what becomes of each image (C, H, W)
    "flip=1": (
        [[0.6, 0.6], [0.4, 0.6], [0.6, 0.4], [0.4, 0.4]],
        [flipped(), flipped(2), flipped(1), flipped(1, 2)],
    ),
    "flip=0": ([[0.0, 0.0]], [flipped()]),
    "mirror=1": ([[0.4], [0.6]], [flipped(2), flipped()]),
    "turn=1": ([[0.1], [0.3], [0.6], [0.9], [0.0]], [turned(n) for n in (0, 1, 2, 3, 0)]),
    # With a value of 0.2, three images in twenty are turned.
    "turn=0.2": ([[0.06], [0.12], [0.18], [0.21], [0.9]], [turned(n) for n in (1, 2, 3, 0, 0)]),
    "turn=0": ([[0.3]], [flipped()]),
    "rotate=90": ([[1.0], [0.0], [0.5]], [turned(1), turned(-1), flipped()]),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("text", EXACT)
def test_flips_and_quarter_turns_are_exact(text, channels):
    draws, changes = EXACT[text]
    images, masks = torch.randn(5, channels, 24, 24), (torch.rand(5, 2, 24, 24) > 0.5).float()
    images, masks = images[: len(draws)], masks[: len(draws)]
    new_images, new_masks = augment(images, masks, torch.tensor(draws), strengths_of(text))
    for index, change in enumerate(changes):
        torch.testing.assert_close(new_images[index], change(images[index]), atol=1e-4, rtol=0)
        assert torch.equal(new_masks[index], change(masks[index]))


def test_a_rotation_keeps_right_angles_in_an_oblong_image():
    masks = torch.zeros(1, 1, 60, 120)
    masks[..., 20:40, 50:70] = 1
    _, turned = augment(masks, masks, torch.ones(1, 1), {"rotate": 45.0})
    rows, columns = turned[0, 0].nonzero().T
    assert abs(turned.sum() - 400) < 25  # a diamond as large as the square
    for places in (rows, columns):
        assert abs(int(places.max() - places.min()) - 20 * math.sqrt(2)) < 2.5


def test_shift_and_scale_by_hand():
    images, masks = torch.randn(2, 3, 80, 80), (torch.rand(2, 1, 80, 80) > 0.5).float()
    strengths = strengths_of("scale=1,shift=0.05")
    draws = torch.full((2, 3), 0.5)  # the middle changes nothing
    new_images, new_masks = augment(images, masks, draws, strengths)
    torch.testing.assert_close(new_images, images, atol=1e-4, rtol=0)
    assert torch.equal(new_masks, masks)
    draws[:, 1] = 1  # 5 % of half the width is 2 pixels
    new_images, new_masks = augment(images, masks, draws, strengths)
    torch.testing.assert_close(new_images[..., :-2], images[..., 2:], atol=1e-4, rtol=0)
    assert torch.equal(new_masks[..., :-2], masks[..., 2:]) and not new_masks[..., -2:].any()
    draws = torch.tensor([[1.0, 0.5, 0.5], [0.0, 0.5, 0.5]])  # half as large, twice as large
    _, (small, large) = augment(*squares(2), draws, strengths)
    assert small.sum() == pytest.approx(28 * 26 / 4, rel=0.1)
    assert large.sum() == pytest.approx((56 - 2) * (52 - 4), rel=0.05)  # 2 and 4 are outside


def test_elastic_is_smooth_and_bounded():
    side, value = 128, 0.1
    ramp = torch.arange(side).expand(side, side).float()  # pixels are their own column
    images = torch.stack([ramp, ramp.T, torch.zeros(side, side)]).expand(40, 3, side, side)
    strengths = {"elastic": value}
    new_images, _ = augment(images, images[:, :1], uniform(40, strengths), strengths)
    moved = (new_images - images)[:, :2, 20:-20, 20:-20]  # the border is repeated
    assert moved.abs().max() <= value * side
    assert moved.std() > 0.2 * value * side
    for dim in (2, 3):
        slope = moved.diff(dim=dim)
        assert slope.abs().max() < 0.6 and slope.diff(dim=dim).abs().max() < 0.1
    middle = torch.full((40, count_draws(strengths)), 0.5)
    still, _ = augment(images, images[:, :1], middle, strengths)
    torch.testing.assert_close(still, images, atol=1e-3, rtol=0)
    places, knots = (np.arange(50) + 0.5) * 4 / 50, np.arange(-3, 8)
    expected = BSpline.design_matrix(places, knots, 3).toarray()
    np.testing.assert_allclose(spline_basis(50, torch.device("cpu")), expected, atol=1e-6)


def test_noise_differs_by_image_batch_and_epoch():
    rows, fields = np.zeros((4, 16, 16, 4), np.uint8), []
    loader = Batches(rows, Order(2), transform=Transform(strengths={"noise": 1.0}))
    for epoch in range(2):
        loader.set_epoch(epoch)
        for images, _ in loader:
            fields += [image[0].flatten() for image in images]
    correlations = torch.corrcoef(torch.stack(fields)) - torch.eye(8)
    assert correlations.abs().max() < 0.3  # of 256 values: deviation 0.06
