"""Images of any number of channels: from their files to masks."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from helpers import (
    ALL,
    annotations,
    assert_refused,
    brightness_model,
    output_of,
    refuse_download,
    run_download,
    save,
    script_here,
    square,
    write_split,
)
from PIL import Image

import net
from data import Batches, Order, Transform, count_channels, load_split
from medseg.augment import augment, count_draws
from medseg.images import measure_window
from medseg.normalization import normalize

SIDE = 48
LAYOUT = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}


class Channels(NamedTuple):
    """Pixels (H, W, C) that are saved as a TIFF file."""

    pixels: np.ndarray

    @property
    def size(self):
        return self.pixels.shape[1::-1]

    def save(self, path):
        tifffile.imwrite(path, self.pixels, **LAYOUT)


def channel_image(seed, shown=True):
    """(Channels of seven, corner of the square): channel 5 shows it, the others noise."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (SIDE, SIDE, 7), np.uint8)
    pixels[..., 5] = generator.integers(60, 100, (SIDE, SIDE))
    x, y = generator.integers(4, SIDE - 20, 2).tolist()
    if shown:
        pixels[y : y + 16, x : x + 16, 5] += 90
    return Channels(pixels), (x, y)


def channel_set(root, shown=True):
    """A data set of seven channels as it would be anybody's: nothing records how many."""
    for number, (split, count) in enumerate({"train": 24, "valid": 6, "test": 8}.items()):
        made = [channel_image(1000 * number + index, shown) for index in range(count)]
        images = {f"{index}.tif": image for index, (image, _) in enumerate(made)}
        outlines = [(index, square(*corner, 16)) for index, (_, corner) in enumerate(made)]
        write_split(root / split, images, outlines)
    return root


def test_a_data_set_has_as_many_channels_as_its_images(tmp_path):
    root = channel_set(tmp_path / "set")
    assert count_channels(root, 3) == count_channels(root, 7) == 7
    with pytest.raises(ValueError, match="--n-channels 5"):
        count_channels(root, 5)
    rows = load_split(root, "test", SIDE, n_channels=7)
    assert rows.shape == (8, SIDE, SIDE, 8)
    np.testing.assert_array_equal(rows[2, ..., :7], channel_image(2002)[0].pixels)
    images, masks = next(iter(Batches(rows, Order(8), transform=Transform(7))))
    assert images.shape == (8, 7, SIDE, SIDE) and masks.sum() == 8 * 16 * 16
    expected = (channel_image(2002)[0].pixels / 255 - 0.449) / 0.226
    np.testing.assert_allclose(images[2].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(("shown", "least", "most"), [(True, 0.9, 1), (False, 0, 0.1)])
def test_what_one_of_seven_channels_shows_is_learned(tmp_path, shown, least, most):
    """Without the square in channel 5 the masks are of nothing that can be seen."""
    root = channel_set(tmp_path / "set", shown)
    flags = f"--data {root} --device cpu --swanlab disabled --image-size {SIDE} --n-filters 8"
    flags += " --depth 3 --norm batch --lr 0.01 --batch-size 8 --epochs 12 --seed 1"
    output_of("train.py", *flags.split(), cwd=tmp_path)
    model = net.load_model(tmp_path / "best_model.pth")
    assert model.n_channels == 7
    options = "--model best_model.pth --device cpu --output out".split()
    output_of("predict.py", root / "test", *options, cwd=tmp_path)
    report = json.loads(Path(tmp_path, "out/report.json").read_text())
    assert least <= report["scores"]["dice"] <= most


def test_other_channels_than_those_of_the_weights_are_refused(tmp_path):
    torch.save(net.UNet(7, 1, 2, depth=1, image_size=16).state_dict(), tmp_path / "seven.pth")
    tifffile.imwrite(tmp_path / "two.tif", np.zeros((9, 9, 2), np.uint8), **LAYOUT)
    result = script_here("predict.py", "two.tif", "--model", "seven.pth", cwd=tmp_path)
    assert_refused(result, "two.tif", "2 channels", "7")


def test_grey_values_change_a_channel_at_a_time():
    """Of images that are 1 everywhere contrast leaves its factor, brightness what it adds."""
    images, masks = torch.ones(4, 5, 6, 6), torch.zeros(4, 1, 6, 6)
    draws = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    strengths = {"contrast": 0.5, "brightness": 0.2}
    assert count_draws(strengths, 5) == 10 and count_draws(strengths, 3) == 2
    changed, _ = augment(images, masks, draws, strengths)
    expected = 1.5 ** (2 * draws[:, :5] - 1) + 0.2 * (2 * draws[:, 5:10] - 1)
    torch.testing.assert_close(changed, expected[..., None, None].expand(4, 5, 6, 6))
    colours, _ = augment(images[:, :3], masks, draws, strengths)
    assert (colours == colours[:, :1]).all() and len(colours.unique()) == 4
    noise = torch.ones(4, 5, 6, 6)
    noisy, _ = augment(images, masks, draws, {"noise": 0.3}, noise=noise)
    torch.testing.assert_close(noisy[:, :, 0, 0], 1 + 0.3 * draws[:, :5])
    pixels = torch.full((1, 2, 2, 4), 100, dtype=torch.uint8)
    half = torch.tensor([[0.0, 1.0, 0.5, 0.25]])  # exponents 1 / 2, 2, 1, 1 / sqrt(2)
    darker, _ = augment(normalize(pixels), masks[:1, :, :2, :2], half, {"gamma": 1.0})
    shown = darker[0, :, 0, 0] * 0.226 + 0.449
    expected = [(100 / 255) ** power for power in (0.5, 2, 1, 0.5**0.5)]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_grey_values_of_a_set_are_shown_alike(here):
    """A hot pixel in every second image of 12 bits does not darken it, here and in predict.py."""

    def write(left, right, dtype):
        for number in range(6):
            values = np.full((40, 40), left, dtype)
            values[:, 20:] = right
            if dtype == np.uint16 and number % 2:
                values[3, 3] = 65000
            save(Image.fromarray(values), f"images/{number}.png")
            save(Image.fromarray(np.uint8(255 * (values == right))), f"masks/{number}.png")

    write(400, 1200, np.uint16)
    assert "400 to 1200" in run_download("--masks", "images", "masks", "--split", 50, 50, 0)
    for split in ("train", "valid"):
        assert annotations(split)["info"]["window"] == [800, 800]
        rows = load_split("dataset", split, None)
        assert all(row[8, 8, 0] == 0 and row[8, 30, 0] == 255 for row in rows)
    into = ("--masks", "images", "masks", "--into", "test")
    refuse_download(*into, "--window", "800", "1600", words=["--window 800 800"])
    run_download(*into, "--window", "800", "1600", "--data", "wide")
    assert [row[8, 8, 0] for row in load_split("wide", "test", None)] == [64] * 6
    torch.save(brightness_model(window=(800, 800)).state_dict(), "model.pth")
    for number in (0, 1):
        options = f"--model model.pth --device cpu --output {number}.png"
        output_of("predict.py", f"images/{number}.png", *options.split(), cwd=here)
        mask = np.asarray(Image.open(f"{number}.png"))
        assert mask[8, 8] == 0 and mask[8, 30] == 255
    write(600, 1800, np.uint16)  # brighter ones are shown as those that are there
    run_download(*into)
    assert [row[8, 8, 0] for row in load_split("dataset", "test", None)] == [64] * 6
    write(7, 9, np.uint8)  # 8 bits stay as they are
    assert "grey values" not in run_download("--masks", "images", "masks", "--force", *ALL)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ([0, 3000], (2047.5, 4095)),  # of 12 bits
        ([700, 40000], (32767.5, 65535)),  # of 16
        ([0, 200], (127.5, 255)),  # 8 bits, stored as 16
        ([31000, 33000], (32000, 2000)),  # CT values with an offset: little of their range
    ],
)
def test_the_window_of_a_set_is_a_range_that_it_fills(tmp_path, values, window):
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        pixels = np.kron(np.uint16([values]), np.ones((30, 15), np.uint16))
        pixels[:number, 0] = 65000  # up to three hot pixels
        save(Image.fromarray(pixels), path)
    assert measure_window(paths) == pytest.approx(window)


def test_weights_of_other_channels_are_no_start(tmp_path):
    root = channel_set(tmp_path / "set")
    torch.save(net.UNet(3, 1, 8).state_dict(), tmp_path / "three.pth")
    flags = f"--data {root} --init three.pth --swanlab disabled --device cpu --out run"
    result = script_here("train.py", *flags.split(), cwd=tmp_path)
    assert_refused(result, "3 channels", "7 channels")
    named, other = (
        net.UNet(2, 1, 2, depth=1, channels=names) for names in (("a", "b"), ("b", "a"))
    )
    with pytest.raises(ValueError, match="a, b.*b, a"):
        net.copy_weights(named, other)
    assert net.copy_weights(named, net.UNet(2, 1, 2, depth=1))
