"""Batches: which images an epoch draws, crops of them, and how each is changed.

Augmentation is checked against numpy, scipy, torch.rot90 and masks drawn by hand.
"""

import math
import time
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import brightness_model, scan, script_here
from scipy.interpolate import BSpline

from data import Batches, Order, Transform
from medseg.augment import AUGMENTATIONS, augment, count_draws, spline_basis, window_side
from medseg.cache import RaggedRows
from medseg.cli import parse_named_values
from medseg.crop import place_crops
from medseg.images import MEAN, STD, read_image
from medseg.predicting import ahead, inputs
from net import UNet


def to_pixels(images):
    """Normalised (B, 3, H, W) -> what they were made from, int64 (B, H, W, 3) of 0..255."""
    pixels = images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    return (pixels * 255).round().long()


# ---- which images an epoch draws -------------------------------------------------------------


def numbered_rows(count):
    rows = np.zeros((count, 8, 8, 4), np.uint8)
    rows[..., 0] = np.arange(count)[:, None, None]
    return rows


@pytest.mark.parametrize("crop", [0, 8])
@pytest.mark.parametrize("repeat, times", [(1, {1}), (3, {3}), (2.5, {2, 3}), (0.5, {0, 1})])
def test_an_epoch_draws_every_image_as_often_as_it_is_asked_to(repeat, times, crop):
    order, transform = Order(4, True, repeat=repeat), Transform(crop=crop)
    batches, epochs = Batches(numbered_rows(10), order, transform=transform), []
    for epoch in range(2):
        batches.set_epoch(epoch)
        drawn = torch.cat([to_pixels(images)[:, 0, 0, 0] for images, _ in batches]).tolist()
        assert drawn == batches.row_numbers()
        assert len(drawn) == round(10 * repeat) and len(batches) == math.ceil(10 * repeat / 4)
        epochs.append([drawn.count(number) for number in range(10)])
    assert all(set(counts) == times for counts in epochs)
    assert (epochs[0] != epochs[1]) == (repeat % 1 > 0)  # others each time


@pytest.mark.parametrize("free, resident", [(2, False), (3, True)])  # of the size of the rows
def test_a_split_that_leaves_room_on_the_gpu_is_moved_there(free, resident, monkeypatch):
    """The GPU is pretended: there may be none here."""
    rows, moved = numbered_rows(10), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * rows.nbytes, 0))
    monkeypatch.setattr(torch.Tensor, "to", lambda pixels, device: moved.append(device) or pixels)
    Batches(rows, Order(4), "cuda")
    assert moved == [torch.device("cuda")] * resident


# ---- crops, and images at their own size ------------------------------------------------------

SIZES = [(40, 60), (33, 20), (64, 64), (50, 41)]  # height, width


def ragged_rows(masks=1):
    """Images whose pixels hold their number, row and column; the first mask is a chessboard."""
    pixels = []
    for number, size in enumerate(SIZES):
        row, column = np.mgrid[: size[0], : size[1]].reshape(2, -1)
        other = [np.zeros_like(row)] * (masks - 1)
        pixels.append(np.stack([row * 0 + number, row, column, (row + column) % 2, *other], 1))
    return RaggedRows(np.concatenate(pixels).astype(np.uint8), SIZES)


def draw(crop, epoch=0, start=0, strengths=(), batch=4, rows=None, n_classes=1, **options):
    """[(pixels (H, W, 3), masks (C, H, W))] of an epoch of these rows, or of `ragged_rows`."""
    rows, pairs = ragged_rows() if rows is None else rows, []
    transform = Transform(n_classes=n_classes, crop=crop, strengths=dict(strengths))
    loader = Batches(rows, Order(batch, True, **options), transform=transform)
    loader.set_epoch(epoch, start)
    for images, masks in loader:
        pairs += zip(to_pixels(images).numpy(), masks.numpy(), strict=True)
    return pairs


@pytest.mark.parametrize("strengths", [{}, {"rotate": 1e-9}])  # resampled, and where they were
@pytest.mark.parametrize("crop, counts", [(20, [6, 2, 10, 5]), (45, [1, 1, 2, 1]), (0, [1] * 4)])
def test_crops_are_slices_of_the_images(crop, counts, strengths):
    """As many as would tile them; beyond the border of a smaller one its border is repeated."""
    rows, seen = ragged_rows(), Counter()
    for pixels, (mask,) in draw(crop, strengths=strengths):
        number, lines, columns = pixels[0, 0, 0], pixels[:, 0, 1], pixels[0, :, 2]
        source = rows[number][lines[:, None], columns]
        np.testing.assert_array_equal(pixels, source[..., :3])
        np.testing.assert_array_equal(mask, source[..., 3])
        for places, side in zip((lines, columns), SIZES[number], strict=True):
            size = crop or side
            assert len(places) == size and np.ptp(places) == min(side, size) - 1
            assert set(np.diff(places)) <= {0, 1}
        seen[number] += 1
    assert [seen[number] for number in range(4)] == counts  # height x width / size ** 2, rounded


def test_every_place_is_as_likely():
    draws = torch.rand(18_000, 2, generator=torch.Generator().manual_seed(0))
    top, left = place_crops(torch.tensor([[12, 9]]).expand(18_000, 2), draws, 7).T
    counts = torch.bincount(top * 3 + left)
    assert len(counts) == 18 and (counts - 1000).abs().max() < 5 * 1000**0.5
    small = place_crops(torch.tensor([[5, 9]]).repeat(99, 1), draws[:99], 7)
    assert [set(side.tolist()) for side in small.T] == [{-2, -1, 0}, {0, 1, 2}]


@pytest.mark.parametrize("crop, foreground, batch", [(20, 0.0, 4), (20, 0.5, 11), (0, 0.0, 1)])
def test_images_are_a_function_of_seed_epoch_and_place(crop, foreground, batch):
    """Crops or whole images, in any number of processes: some have none of the last batch."""

    def order(**options):
        options |= {"foreground": foreground, "batch": batch}
        strengths = {"rotate": 30.0, "flip": 1, "noise": 0.2}
        return [image.tobytes() for image, _ in draw(crop, strengths=strengths, **options)]

    first = order()
    assert first == order() and len(set(first)) == len(first) == (23 if crop else 4)
    assert first != order(epoch=1) and first != order(seed=1)
    assert order(epoch=2)[2 * batch :] == order(epoch=2, start=2)
    for rank in range(3):
        mine = [own for place, own in enumerate(first) if place % max(batch, 3) % 3 == rank]
        assert order(rank=rank, world=3) == mine


def test_so_many_crops_lie_around_foreground():
    """One pixel of class 0 in image 0, and 900 with one of class 9 in image 2."""

    def draw_around(share, epochs, rows, crop=16):
        """[(number of the image, top, left, the classes of the crop)]"""
        options, drawn = {"rows": rows, "n_classes": 10, "batch": 8, "foreground": share}, []
        for epoch in epochs:
            for pixels, masks in draw(crop, epoch, **options):
                drawn.append((*pixels[0, 0].tolist(), set(masks.nonzero()[0].tolist())))
        return drawn

    rows = ragged_rows(2)
    rows.pixels[:, 3] = 0
    rows[0][39, 10, 3] = rows[2][20:50, 30:60, 3] = 1
    rows[2][5, 33, 4] = 2
    around = draw_around(1.0, range(40), rows)
    for number, top, left, classes in around:
        assert classes and number in (0, 2)
        if number == 0:  # around its only pixel, as far as the image goes
            assert (top, left) == (40 - 16, 10 - 8)
        elif 9 in classes and 0 not in classes:
            assert (top, left) == (0, 33 - 8)
    assert len(around) == 40 * sum(round(height * width / 256) for height, width in SIZES)
    of_image = [9 in classes for number, *_, classes in around if number == 2]
    assert np.mean(of_image) == pytest.approx(0.5, abs=0.06)  # one pixel of 901, of two classes
    shares = []
    for share in (0.33, 0.0):
        drawn = draw_around(share, range(40), rows)
        shares.append(np.mean([bool(classes) for *_, classes in drawn]))
    assert shares[0] == pytest.approx(0.33 + 0.67 * shares[1], abs=0.03) and shares[1] < 0.4
    small = np.zeros((2, 12, 20, 5), np.uint8)  # lower than a crop, which then holds all its rows
    small[0, 3, 4, 3] = 1
    assert all(own[3] for own in draw_around(1.0, range(9), small))
    none = draw_around(0.33, [0], small * np.uint8([1, 1, 1, 0, 0]), crop=0)
    assert len(none) == 2  # there is none to prefer


@pytest.mark.parametrize("text", ["rotate,scale,shift,elastic", "scale=1,rotate=180"])
def test_what_turns_into_a_crop_comes_from_the_image(text):
    """Red is each pixel's row, green its column; both of a crop must be inside a larger image.

    A repeated border would show as two neighbours that are the same. The mask is the right half.
    """
    side, checked = 240, 0
    row = np.zeros((side, side, 4), np.uint8)
    row[..., 0], row[..., 1] = np.mgrid[:side, :side]
    row[..., 3] = row[..., 1] >= side // 2
    strengths = strengths_of(text)
    loader = Batches(row[None], Order(10), transform=Transform(crop=24, strengths=strengths))
    std, mean = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    for images, masks in loader:
        for image, mask in zip((images * std + mean)[:, :2] * 255, masks[:, 0], strict=True):
            if image.min() < 1 or image.max() > side - 2:
                continue  # at the border of the image
            checked += 1
            for steps in (image.diff(dim=2)[:, :-1], image.diff(dim=1)[:, :, :-1]):
                assert (steps**2).sum(0).min() > 0.1  # of squared pixels
            assert image.amax((1, 2)).sub(image.amin((1, 2))).max() <= window_side(24, strengths)
            beyond = image[1] - (side / 2 - 0.5)  # how far right of the middle
            assert ((beyond > 0) == (mask > 0))[beyond.abs() > 1].all()
    assert checked > 20


def test_large_images_one_by_one_and_one_too_large_for_the_memory(here, monkeypatch):
    """Each is gone when the next one is read; the one that does not fit is named."""
    Path("scans").mkdir()
    for number, (height, width) in enumerate(SIZES):
        scan(width, height, 5, 8, 9).save(f"scans/{number}.png")
    torch.save(brightness_model(None).state_dict(), "bright.pth")
    seen, alive, forward = [], [], UNet.forward

    def read(path, *more):
        until = time.monotonic() + 1  # a thread may still be about to let go of one
        while any(one() for one in seen) and time.monotonic() < until:
            time.sleep(0.01)
        alive.append(sum(one() is not None for one in seen))
        image = read_image(path, *more)
        seen.append(weakref.ref(image))
        return image

    def limited(model, images):
        if images.shape[2] == 50:
            raise MemoryError
        return forward(model, images)

    monkeypatch.setattr(ahead, "AHEAD_PIXELS", 1)  # then all images are large
    monkeypatch.setattr(inputs, "read_image", read)
    monkeypatch.setattr(UNet, "forward", limited)
    result = script_here("predict.py", "scans", "--model", "bright.pth", cwd=here)
    assert alive == [0, 0, 0, 0]
    assert all(word in result.stderr for word in ("3.png", "out of memory", "41x50"))
    assert sorted(path.name[0] for path in here.glob("*/*_mask.png")) == ["0", "1", "2"]


# ---- augmentation ----------------------------------------------------------------------------


def strengths_of(text):
    return parse_named_values(text, AUGMENTATIONS)


def squares(count, side=64):
    """Images -1 with a square of 1, and that square as the mask: (count, 3 and 1, side, side)."""
    masks = torch.zeros(count, 1, side, side)
    masks[..., 15:43, 14:40] = 1
    return (2 * masks - 1).repeat(1, 3, 1, 1), masks


CHANGES = "rotate=180 scale=0.5 shift=0.4 flip turn,flip elastic=0.15 gamma noise".split()


@pytest.mark.parametrize("text", [*CHANGES, ",".join(AUGMENTATIONS)])
def test_image_and_mask_stay_aligned(text):
    """The image is its own mask: they may differ only where interpolation blurs the edge."""
    strengths, (images, masks) = strengths_of(text), squares(48)
    torch.manual_seed(0)
    draws, noise = torch.rand(48, count_draws(strengths)), torch.randn(images.shape)
    new_images, new_masks = augment(images, masks, draws, strengths, noise=noise)
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


EXACT = {  # the change, its draws for each image, then quarter turns and flips of each image
    "flip=1": (
        [[0.6, 0.6], [0.4, 0.6], [0.6, 0.4], [0.4, 0.4]],
        [(0, ()), (0, (2,)), (0, (1,)), (0, (1, 2))],
    ),
    "mirror=1": ([[0.4], [0.6]], [(0, (2,)), (0, ())]),
    # With a value of 0.2, three images in twenty are turned.
    "turn=0.2": ([[0.06], [0.12], [0.18], [0.21], [0.9]], [(n, ()) for n in (1, 2, 3, 0, 0)]),
    "rotate=90": ([[1.0], [0.0], [0.5]], [(1, ()), (-1, ()), (0, ())]),
}


@pytest.mark.parametrize("text", EXACT)
def test_flips_and_quarter_turns_are_exact(text):
    draws, changes = EXACT[text]
    images, masks = torch.randn(5, 1, 24, 24), (torch.rand(5, 2, 24, 24) > 0.5).float()
    images, masks = images[: len(draws)], masks[: len(draws)]
    new_images, new_masks = augment(images, masks, torch.tensor(draws), strengths_of(text))
    for index, (quarters, dims) in enumerate(changes):
        image, mask = (torch.rot90(own[index], quarters, (1, 2)) for own in (images, masks))
        torch.testing.assert_close(new_images[index], image.flip(dims), atol=1e-4, rtol=0)
        assert torch.equal(new_masks[index], mask.flip(dims))


def test_shift_scale_and_rotation_by_hand():
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
    masks = torch.zeros(1, 1, 60, 120)  # oblong, and right angles stay right
    masks[..., 20:40, 50:70] = 1
    _, diamond = augment(masks, masks, torch.ones(1, 1), {"rotate": 45.0})
    assert abs(diamond.sum() - 400) < 25  # as large as the square
    for places in diamond[0, 0].nonzero().T:
        assert abs(int(places.max() - places.min()) - 20 * math.sqrt(2)) < 2.5


def test_elastic_is_bounded_and_a_spline():
    side, value = 128, 0.1
    ramp = torch.arange(side).expand(side, side).float()  # pixels are their own column
    images = torch.stack([ramp, ramp.T, torch.zeros(side, side)]).expand(40, 3, side, side)
    strengths = {"elastic": value}
    draws = torch.rand(40, count_draws(strengths), generator=torch.Generator().manual_seed(0))
    new_images, _ = augment(images, images[:, :1], draws, strengths)
    moved = (new_images - images)[:, :2, 20:-20, 20:-20]  # the border is repeated
    assert moved.abs().max() <= value * side
    assert moved.std() > 0.2 * value * side
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
