"""Large images: predicted by tiles, equal to the whole image; and the limit on pixels."""

import platform
import random
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_refused,
    brightness_model,
    output_of,
    run_python,
    scan,
    script_here,
)
from PIL import Image

import predict
import train
from data import Batches
from medseg import images, tiles
from medseg.cache import RaggedRows
from medseg.cli import MAX_MEGAPIXELS
from medseg.full_size import full_size_labels
from medseg.inference import FLIPS, VIEWS, Inference
from medseg.layers import ARCHITECTURES
from medseg.ood import count_features, fit
from medseg.predicting import inputs, reading
from medseg.predicting.ensemble import Ensemble
from medseg.predicting.models import TorchModel
from medseg.results import folder
from medseg.tiles import Tiling, make_tiles, tiling_of
from net import UNet


@pytest.fixture
def small_tiles(monkeypatch):
    """Any image is larger than the memory: tiles are as small as their margins allow."""
    monkeypatch.setattr(tiles, "TILE_MEMORY", 1)
    monkeypatch.setattr(tiles, "SMALL_INPUT", 0)
    tiles._note_difference.cache_clear()
    yield
    images.set_pixel_limit(MAX_MEGAPIXELS)


def network(seed=0, **architecture):
    """A UNet for images at their own size, of random weights, with logits of deviation 2."""
    torch.manual_seed(seed)
    model = UNet(n_filters=2, image_size=None, **architecture).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        else:
            torch.nn.init.normal_(weight, std=0.2)
    for name, values in model.named_buffers():
        if name.endswith("running_var"):
            values.uniform_(0.5, 2)
    logits = []
    hook = model.outc.register_forward_hook(lambda module, given, found: logits.append(found))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        scale = 2 / logits[0].std((0, 2, 3))
        model.outc.bias -= logits[0].mean((0, 2, 3))
        model.outc.bias *= scale
        model.outc.weight *= scale[:, None, None, None]
    hook.remove()
    return model


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def whole_and_tiled(model, pixels, monkeypatch):
    """The probabilities of one image (C, H, W), whole and by tiles, and the number of tiles."""
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "TILE_MEMORY", 1 << 60)
        whole = model.probabilities(pixels[None])[0]
    count = len(make_tiles(*pixels.shape[:2], model.tiling, 1))
    return whole, model.probabilities(pixels[None])[0], count


def assert_same_masks(whole, tiled):
    """Probabilities within the rounding of other sums; masks bit for bit.

    At the threshold in the widest of the gaps between the probabilities in the middle, so that
    another processor, which rounds otherwise, gives the same.
    """
    assert tiled.dtype == np.float32
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    middle = np.sort(whole.ravel())[whole.size // 3 : -whole.size // 3]
    place = np.diff(middle).argmax()
    threshold = middle[place : place + 2].mean()
    np.testing.assert_array_equal(tiled > threshold, whole > threshold)


EXACT = {
    "depth 3": ({"depth": 3, "norm": "batch"}, (), 231, 57),
    "depth 4": ({"depth": 4}, (), 413, 111),
    "depth 5": ({"depth": 5, "norm": "batch"}, (), 803, 95),
    "strides, nearest": ({**ARCHITECTURES["study"], "depth": 3}, (), 302, 101),
    "multiples": ({"depth": 3}, (), 64, 256),
    "flips": ({"depth": 2}, tuple(FLIPS), 107, 99),
}


@pytest.mark.parametrize("architecture, flips, height, width", EXACT.values(), ids=EXACT)
def test_tiles_are_equal_to_the_whole_image(
    architecture, flips, height, width, small_tiles, monkeypatch, capsys
):
    model = TorchModel(network(**architecture), "cpu", "fp32")
    model.inference = Inference(flips=flips)
    whole, tiled, count = whole_and_tiled(model, noise(height, width), monkeypatch)
    assert count > 1
    assert_same_masks(whole, tiled)
    assert capsys.readouterr().err == ""


def test_the_margin_is_the_reach_of_the_network():
    """Each network's answer changes up to the margin from a border that is moved, no further."""
    for depth, options in ((2, {}), (3, {}), (2, {"down": "stride"})):
        model, stride = network(depth=depth, **options).double(), 2**depth
        model.outc.float()
        model.sigmoid = torch.nn.Identity()
        margin, side = tiling_of(model).margin, 24 * stride
        image = torch.randn(1, 3, side, stride, dtype=torch.double)
        with torch.inference_mode():
            for cut in (np.s_[..., side // 2 :, :], np.s_[..., : side // 2, :]):
                changed = (model(image)[cut] - model(image[cut])).abs().amax((0, 1, 3)) > 1e-6
                rows = changed.nonzero()[:, 0]
                reach = rows.max() + 1 if cut[1].start else side // 2 - rows.min()
                assert reach <= margin
                if not options:  # else that at the top is larger than that at the bottom
                    assert reach == margin


def test_every_tile_has_its_margins():
    """Each pixel once, margins at borders that are none, multiples of the stride from both ends."""
    draw = random.Random(0)
    for _ in range(300):
        stride = 2 ** draw.randint(1, 6)
        tiling = Tiling(stride, draw.randint(stride, 8 * stride), 1, draw.randint(0, 10**5))
        margin, pixels = tiling.margin, draw.choice([1, 40 * tiling.margin**2])
        sides = [draw.randint(1, 12 * margin) for _ in range(2)]
        made = make_tiles(*sides, tiling, pixels)
        shown = {(row.last - row.first, column.last - column.first) for row, column in made}
        assert len(shown) == 1  # equally large
        most = max(pixels, (3 * margin + 6 * stride) ** 2, 2 * tiling.least_pixels)
        assert min(tiling.least_pixels, np.prod(sides)) <= np.prod(shown.pop()) <= most
        for side, parts in zip(sides, zip(*made, strict=True), strict=True):
            parts = sorted(set(parts))
            assert (parts[0].start, parts[-1].end) == (0, side)
            assert all(one.end == other.start for one, other in pairwise(parts))
            for start, end, first, last in parts:
                flipped = side - end, side - start, side - last, side - first
                for begin, stop, low, high in ((start, end, first, last), flipped):
                    assert low % stride == 0 and (low == 0 or begin - low >= margin)
                    assert high == side or high // stride * stride - stop >= margin


def test_bf16_and_several_classes(small_tiles, monkeypatch):
    torch_model = network(depth=3, n_classes=3)
    for precision, difference in (("fp32", 1e-5), ("bf16", 0.1)):
        model = TorchModel(torch_model, "cpu", precision)
        whole, tiled, count = whole_and_tiled(model, noise(222, 51), monkeypatch)
        assert whole.shape == (3, 222, 51) and count > 1
        np.testing.assert_allclose(tiled, whole, atol=difference)


def test_an_ensemble_has_the_tiles_of_its_deepest_member(small_tiles, monkeypatch):
    members = [
        TorchModel(network(seed, depth=depth), "cpu", "fp32") for seed, depth in ((1, 1), (2, 3))
    ]
    model = Ensemble(members, ["a.pth", "b.pth"])
    assert model.tiling[:2] == (8, 46)
    whole, tiled, count = whole_and_tiled(model, noise(231, 57), monkeypatch)
    assert count > 1
    assert_same_masks(whole, tiled)


@pytest.mark.parametrize("depths", [(3,), (2, 3)], ids=str)
def test_tiles_are_assessed_as_the_whole_image(depths, small_tiles, monkeypatch):
    """Agreement of all views, of two models too, and the distance from training images."""
    draw, members = np.random.default_rng(0), []
    for seed, depth in enumerate(depths, 1):
        trained = network(seed, depth=depth)
        features = draw.normal(size=(20, count_features(2, depth)))
        trained.feature_statistics = fit(features)._replace(threshold=1.0)
        members.append(TorchModel(trained, "cpu", "fp32"))
    model = Ensemble(members, "ab") if len(members) > 1 else members[0]
    model.inference = Inference(threshold=0.6, flips=VIEWS)
    pixels = noise(231, 121)[None]
    pixels[:, :50] //= 8  # so that parts of the image differ
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "TILE_MEMORY", 1 << 60)
        _, (whole,) = model.assess(pixels)
    _, (tiled,) = model.assess(pixels)
    assert 0 < whole.agreement < 1
    assert tiled.agreement == pytest.approx(whole.agreement, abs=1e-5)
    assert tiled.unlike == pytest.approx(whole.unlike, rel=1e-4)


@pytest.mark.parametrize("option", [{"norm": "group"}, {"up": "bilinear"}], ids=str)
def test_what_sees_the_whole_image_keeps_it_where_it_fits(option, small_tiles, monkeypatch, capsys):
    model = TorchModel(network(depth=3, **option), "cpu", "fp32")
    whole, kept, _ = whole_and_tiled(model, noise(231, 57), monkeypatch)
    np.testing.assert_array_equal(kept, whole)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tiles, "available_memory", lambda device: 1000)
    for _ in range(2):  # it is said once
        divided = model.probabilities(noise(231, 57)[None])[0]
    assert divided.shape == whole.shape and (divided != whole).any()
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiles" in line and model.tiling.differs in line


@pytest.mark.parametrize(
    "most, used, free",
    [
        ("4096", 3072, 1024),  # what is in use in a container is not free
        ("4096", 5000, 0),
        ("max", 3072, 2048),
        ("9216", 3072, 2048),  # the machine has less
        (None, None, 2048),  # no container
    ],
)
def test_memory_in_use_is_not_free(most, used, free, here, monkeypatch):
    monkeypatch.setattr(tiles, "Path", lambda path: here / path.lstrip("/"))
    for place in ("proc", "sys/fs/cgroup"):
        (here / place).mkdir(parents=True)
    (here / "proc/meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 2 kB\n")
    if most:
        (here / "sys/fs/cgroup/memory.max").write_text(f"{most}\n")
        (here / "sys/fs/cgroup/memory.current").write_text(f"{used}\n")
    assert tiles.available_memory() == free


def test_images_of_one_size_are_never_divided():
    assert tiling_of(UNet(n_filters=2, image_size=64)) is None
    assert tiling_of(torch.nn.Identity()) is None


def test_the_evaluation_of_a_training_takes_tiles(small_tiles, monkeypatch):
    """Loss and scores of `evaluate`, with chosen flips too, and what `tune_prediction` counts."""
    model = network(depth=3)
    model.inference = Inference(0.5, tuple(FLIPS))
    row = np.concatenate([noise(51, 223), noise(51, 223, 1)[..., :1] > 127], 2).astype(np.uint8)
    loader = Batches(RaggedRows.of_array(row[None]), 1)
    seen, widths = [], []
    model.register_forward_hook(lambda module, given, found: seen.append(found.shape[-1]))
    for inference in (None, model.inference):
        scores = []
        for memory in (1 << 60, 1):
            monkeypatch.setattr(tiles, "TILE_MEMORY", memory)
            options = {"inference": inference}
            scores.append(train.evaluate(model, loader, train.combined_loss, "cpu", **options))
            widths.append(max(seen))
            seen.clear()
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        assert scores[0]["dice"] == scores[1]["dice"] > 0.1
    assert widths[0] == widths[2] == 223 > max(widths[1], widths[3])
    ((image, _),) = loader
    mask = predict.predict_mask(model, image, "cpu")
    assert max(seen) < 223 and mask.shape == (1, 1, 51, 223)


def test_labels_at_the_size_of_the_image():
    """The most probable class above the threshold; of equal ones, the first."""
    probabilities = np.random.default_rng(0).integers(0, 9, (3, 70, 50)).astype(np.float32) / 8
    labels = full_size_labels(probabilities, (50, 70), 0.5)
    for (row, column), label in np.ndenumerate(labels):
        values = probabilities[:, row, column].tolist()
        assert label == (1 + values.index(max(values)) if max(values) > 0.5 else 0)


def test_on_the_command_line(small_tiles, here):
    """A bright square across the tiles of an image, with and without a report."""
    model = brightness_model(image_size=None)
    torch.save(model.state_dict(), "model.pth")
    scan(1100, 150, 500, 20, 100).save("scan.png")
    assert len(make_tiles(150, 1100, tiling_of(model), 1)) > 1
    said = output_of("predict.py", "scan.png", "--model", "model.pth", "--device", "cpu", cwd=here)
    assert "foreground 6.06 %" in said  # 10000 of 165000 pixels
    mask = np.asarray(Image.open("scan_mask.png"))
    expected = np.zeros((150, 1100), np.uint8)
    expected[20:120, 500:600] = 255
    np.testing.assert_array_equal(mask, expected)


def test_a_folder_of_large_images_is_taken_one_at_a_time(here, monkeypatch):
    """Of more pixels than may wait, none is read before the last one is written."""
    torch.save(brightness_model().state_dict(), "model.pth")
    (here / "scans").mkdir()
    for number in range(4):
        scan(40, 30, 5, 5, 20).save(f"scans/{number}.png")
    events, read, write = [], inputs.read_image, folder.save_overlay
    monkeypatch.setattr(inputs, "read_image", lambda path: events.append("read") or read(path))
    monkeypatch.setattr(
        folder, "save_overlay", lambda *given: write(*given) or events.append("write")
    )
    orders = []
    for pixels in (1, 1 << 20):
        for module in (reading, predict):
            monkeypatch.setattr(module, "AHEAD_PIXELS", pixels)
        output_of("predict.py", "scans", "--model", "model.pth", "--device", "cpu", cwd=here)
        orders.append(list(events))
        events.clear()
    assert orders[0] == 4 * ["read", "write"] and orders[1][:4] == 4 * ["read"]


def test_an_overlay_fits_its_format(here):
    images.save_overlay(Image.new("RGB", (70_000, 4)), np.zeros((4, 70_000)), "o.jpg", ["one"])
    assert Image.open("o.jpg").size == (65_500, 4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_the_memory_that_tiles_took_is_given_back():
    """A mask of 16 MB by tiles of up to 300 MB, where freed memory is kept for the next tensors."""
    code = """
import torch
from medseg.device import keep_freed_memory
from medseg.tiles import by_tiles, tiling_of
from net import UNet
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) >> 10
keep_freed_memory()
network, images = UNet(1, 1, 8, depth=3).eval(), torch.zeros(1, 1, 2000, 2000)
network.image_size = None
before = resident()
with torch.inference_mode():
    masks = by_tiles(network, images, tiling_of(network), memory=300 << 20)
print(resident() - before)
"""
    result = run_python("-c", code, cwd=ROOT)
    grown = int(result.stdout)  # 36 MiB; 392 where it is kept
    assert grown < 150, f"{grown} MiB"


# ---- the limit on pixels ---------------------------------------------------------------------


@pytest.fixture
def bomb(here):
    """144 megapixels in 18 kB."""
    Image.new("1", (12000, 12000)).save("bomb.png")
    torch.save(brightness_model().state_dict(), "model.pth")
    return here


def test_a_bomb_is_refused_at_once_and_named_the_flag(bomb, refused):
    started = time.monotonic()
    refused(
        "predict", "bomb.png", "--model", "model.pth", words=["bomb.png", "--max-megapixels 144"]
    )
    assert time.monotonic() - started < 5
    refused("predict", "bomb.png", "--model", "model.pth", "--max-megapixels", 143, words=["144"])
    Image.new("1", (1100, 1000)).save("small.png")
    words = ["small.png", "--max-megapixels 2"]
    refused("predict", "small.png", "--model", "model.pth", "--max-megapixels", 1, words=words)
    images.set_pixel_limit(144)
    with images.open_image("bomb.png") as image:
        assert image.size == (12000, 12000)
    images.set_pixel_limit(MAX_MEGAPIXELS)
    for value in (0, -5, "many", "nan"):
        words = ["--max-megapixels", value]
        refused("predict", "bomb.png", f"--max-megapixels={value}", words=words)


@pytest.mark.parametrize("name", ["data.py", "download.py", "train.py", "predict.py"])
def test_every_script_that_reads_images_has_the_flag(name, here):
    result = script_here(name, "--max-megapixels", 0, cwd=here)
    assert_refused(result, "--max-megapixels")
