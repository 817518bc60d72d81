"""The network against the tutorial's listing, the named networks, and files of weights."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from medseg.inference import Inference
from medseg.layers import ARCHITECTURES, CHOICES, Architecture
from net import DownBlock, ModelInfo, UNet, UpBlock, load_model


def functional_unet(state, x, depth, up, padding, slope):
    """The forward pass without modules: an independent reading of what the sources describe.

    slope: of the activation where its input is negative.
    """

    def convolve(x, name, norm, stride=1):
        x = F.pad(x, (1, 1, 1, 1), mode=padding)
        x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride=stride)
        if f"{norm}.weight" in state:
            mean, variance = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
            x = F.batch_norm(x, mean, variance, state[f"{norm}.weight"], state[f"{norm}.bias"])
        return torch.where(x > 0, x, slope * x)

    def double(name, x):
        x = convolve(x, f"{name}.conv1", f"{name}.norm1")
        return convolve(x, f"{name}.conv2", f"{name}.norm2")

    skips = []
    for level in range(1, depth + 1):
        x, down = double(f"down{level}", x), f"down{level}.maxpool"
        skips.append(x)
        if f"{down}.0.weight" in state:
            x = convolve(x, f"{down}.0", f"{down}.1", stride=2)
        else:
            x = F.max_pool2d(x, 2)
    x = double("bottleneck", x)
    for level in range(1, depth + 1):
        name = f"up{level}.up"
        if up == "transpose":
            x = F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
        else:  # upsampling first, as the sources have it; the module convolves first
            corners = True if up == "bilinear" else None
            x = F.interpolate(x, scale_factor=2, mode=up, align_corners=corners)
            x = F.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"])
        x = double(f"up{level}", torch.cat([x, skips.pop()], 1))
    return torch.sigmoid(F.conv2d(x, state["outc.weight"], state["outc.bias"]))


@pytest.mark.parametrize(
    "name, n_filters, total, settings",  # weights counted by level, from what the sources describe
    [
        ("tutorial", 32, 31_094_497, (5, "transpose", "constant", 0)),
        ("drive", 64, 28_954_561, (4, "bilinear", "constant", 0)),
        ("study", 64, 32_084_033, (4, "nearest", "reflect", 0.01)),
    ],
)
def test_the_named_networks_are_those_of_the_sources(name, n_filters, total, settings):
    with torch.device("meta"):
        model = UNet(n_filters=n_filters, **ARCHITECTURES[name])
    assert sum(weight.numel() for weight in model.parameters()) == total
    torch.manual_seed(0)
    model = UNet(n_filters=4, **ARCHITECTURES[name])
    for weight in model.parameters():
        if weight.dim() == 4:  # with PyTorch's own initial weights the output is almost constant
            torch.nn.init.kaiming_normal_(weight)
    x = torch.randn(2, 3, 64, 96)
    model(x)  # moves the running means
    model.eval()
    with torch.no_grad():
        expected = functional_unet(model.state_dict(), x, *settings)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_the_output_is_as_large_as_the_input():
    model, x = UNet(n_filters=2).eval(), torch.rand(2, 3, 37, 50)
    with torch.no_grad():
        pred = model(x)
        padded = model(F.pad(x, (0, 14, 0, 27), mode="replicate"))
    assert pred.dtype == torch.float32 and 0 <= pred.min() and pred.max() <= 1
    torch.testing.assert_close(pred, padded[..., :37, :50])


def test_blocks():
    x, skip = DownBlock(3, 8)(torch.rand(2, 3, 16, 24))
    assert x.shape == (2, 8, 8, 12) and skip.shape == (2, 8, 16, 24)
    x, skip = DownBlock(3, 8, dropout_prob=0.4, max_pooling=False)(torch.rand(2, 3, 16, 24))
    assert x.shape == skip.shape == (2, 8, 16, 24)
    assert UpBlock(16, 8)(torch.rand(2, 16, 5, 6), skip[..., :10, :12]).shape == (2, 8, 10, 12)


def test_probabilities_stay_below_one_in_bfloat16():
    model = UNet(n_filters=2).eval()
    torch.nn.init.zeros_(model.outc.weight)
    # sigmoid(7) = 0.99909, which bfloat16 rounds to 1
    torch.nn.init.constant_(model.outc.bias, 7.0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        pred = model(torch.rand(1, 3, 32, 32))
    assert pred.dtype == torch.float32
    torch.testing.assert_close(pred, torch.full_like(pred, 0.99909), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_is_read_from_weights_and_has_its_own(dtype):
    """float32 ones on the CPU that can be trained, whatever the state dict holds later."""
    settings = {"channels": ("flair", "t1"), "context": 1, "class_names": ("a", "b")}
    settings |= {"draw_order": (2, 1), "image_size": None, "orientation": "LPS"}
    settings |= {"window": (40.0, 400.0)}
    original = UNet(6, 2, 2, norm="batch", **settings)
    state = original.to(dtype).state_dict()
    model = UNet.from_state_dict(state)
    assert model.info == original.info
    assert settings.items() <= vars(model.info).items() and model.n_channels == 6
    expected = {name: weight.clone() for name, weight in state.items()}
    for weight in state.values():
        weight.zero_()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), name
        assert weight.dtype != torch.float16 and weight.device.type == "cpu"
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())


CELLS = {"class_names": ("cell", "nucleus"), "trained_flips": ("horizontal",)}
CELLS["inference"] = Inference(0.35, ("horizontal",), {"largest": 1.0, "fill": 1.0})
CT = {"window": (40.0, 400.0), "orientation": "LPS"}
EARLIER = {  # the mean probabilities of a ramp from -1 to 1, and the settings; at commit 73d5e50
    "tutorial": ([0.598927], {}),
    "tuned": ([0.616708, 0.459437], {"depth": 1, "norm": "batch", "image_size": 32, **CELLS}),
    "volumes": ([0.52228], {"depth": 1, "up": "bilinear", "image_size": None, **CT}),
}


@pytest.mark.parametrize("name", EARLIER)
def test_weights_of_earlier_versions_are_read(name):
    """tests/weights has files as the tutorial saves them, and as commit 73d5e50 did."""
    means, settings = EARLIER[name]
    model = load_model(ROOT / "tests" / "weights" / f"{name}.pth").eval()
    size = (1, model.n_channels, 32, 32)
    images = torch.linspace(-1, 1, math.prod(size)).reshape(size)
    with torch.no_grad():
        assert model(images).mean((0, 2, 3)).tolist() == pytest.approx(means, abs=1e-5)
    statistics, model.info.feature_statistics = model.info.feature_statistics, None
    assert model.info == ModelInfo.of(len(means), **settings)
    assert bool(statistics) == (name == "tuned")
    assert not statistics or statistics.threshold == pytest.approx(5.48, abs=1e-6)


@pytest.mark.parametrize("norm", [None, "batch", "group"])
def test_weights_without_metadata_are_read(norm):
    """Those of the tutorial; earlier versions named no architecture, but may have had a norm."""
    state = UNet(n_filters=2, norm=norm, window=(40, 400)).state_dict()
    for weights in (state, dict(state)):
        state._metadata[""].pop("architecture", None)
        info = UNet.from_state_dict(weights).info
        assert info.architecture == Architecture(norm=norm)
        assert info.window == ((40, 400) if weights is state else None)


def test_files_that_hold_no_unet_are_refused(tmp_path):
    path, state = tmp_path / "model.pth", UNet(n_filters=2).state_dict()
    with pytest.raises(FileNotFoundError, match="model.pth: .*train.py"):
        load_model(path)
    for other, word in (
        ({"model": state, "epoch": 3}, "down1.conv1.weight"),  # as last.pth
        ({name: state[name] for name in state if name != "up3.up.bias"}, "up3.up"),
        ({**state, "outc.bias": torch.zeros(5)}, "outc.bias"),
        (print, ""),
    ):
        torch.save(other, path)
        with pytest.raises(ValueError, match=rf"^{path}: .*{word}") as error:
            load_model(path)
        assert "\n" not in str(error.value)
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    for damaged in (content, content[:9000], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.pth"):
            load_model(path)


def test_every_pair_of_settings():
    generator, choices = random.Random(3499), {**CHOICES, "depth": (1, 3)}
    for _ in range(16):  # every two values of two settings meet
        torch.manual_seed(0)
        settings = {name: generator.choice(values) for name, values in choices.items()}
        model = UNet(2, 2, 3, image_size=None, **settings)
        shape = (2, 2, 17, 30)
        model(torch.rand(shape)).log().sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
        loaded = UNet.from_state_dict(model.state_dict()).eval()
        assert loaded.architecture == Architecture(**settings)
        for size in (shape, (1, 2, 1, 1), (1, 2, 16, 33)):
            x = torch.rand(size)
            with torch.no_grad():
                pred = loaded(x)
                torch.testing.assert_close(pred, model.eval()(x), rtol=0, atol=0)
            assert pred.shape == size


def test_dropout_is_where_the_settings_say():
    values, channels = torch.nn.Dropout, torch.nn.Dropout2d
    for dropout, expected in (
        ("none", []),
        ("bottleneck", [(values, 0.4)]),
        ("channels", [(channels, 0.3)] * 11),  # one in each block, used after both convolutions
    ):
        modules = UNet(n_filters=2, dropout=dropout).modules()
        found = [(type(one), one.p) for one in modules if isinstance(one, (values, channels))]
        assert found == expected


def test_settings_that_are_refused():
    wrong = {"depth": 9, "window": (40, 0), "class_names": ("a",)}
    wrong |= dict.fromkeys(CHOICES, "other")
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name[:5]):
            UNet(n_classes=2, n_filters=2, **{name: value})
