"""The named networks against counts by hand, and every pair of settings of an architecture."""

import random

import pytest
import torch
import torch.nn.functional as F

from medseg.layers import ARCHITECTURES, CHOICES, Architecture
from net import UNet


@pytest.mark.parametrize("name, total", [("drive", 28_954_561), ("study", 32_084_033)])
def test_parameters_of_the_named_networks(name, total):
    """64 filters, four levels, counted level by level."""

    def conv3x3(i, o):
        """Weights, a bias in the vessel network, and the normalisation behind it."""
        return 9 * i * o + (name == "drive") * o + 2 * o

    levels = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    encoder = sum(conv3x3(i, o) + conv3x3(o, o) for i, o in levels)
    strided = sum(conv3x3(o, o) for _, o in levels[:4]) if name == "study" else 0
    # 1x1 convolution, then the two 3x3 convolutions, the first with what the encoder had
    decoder = sum(2 * o * o + o + conv3x3(2 * o, o) + conv3x3(o, o) for _, o in levels[:4])
    assert encoder + strided + decoder + 64 + 1 == total
    with torch.device("meta"):
        model = UNet(n_filters=64, **ARCHITECTURES[name])
    assert sum(weight.numel() for weight in model.parameters()) == total


def study_forward(state, x):
    """The study network's forward pass in evaluation mode, without modules."""

    def block(name, part, x, stride=1):
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        x = F.conv2d(x, state[f"{name}.{part}.weight"], stride=stride)
        norm = f"{name}.norm{part[-1]}" if part.startswith("conv") else f"{name}.maxpool.1"
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        x = F.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"])
        return torch.where(x > 0, x, 0.01 * x)

    skips = []
    for level in range(1, 5):
        x = block(f"down{level}", "conv2", block(f"down{level}", "conv1", x))
        skips.append(x)
        x = block(f"down{level}", "maxpool.0", x, stride=2)
    x = block("bottleneck", "conv2", block("bottleneck", "conv1", x))
    for level in range(1, 5):
        # Upsampling first, as the study has it; the module convolves first.
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(x, state[f"up{level}.up.0.weight"], state[f"up{level}.up.0.bias"])
        x = torch.cat([x, skips.pop()], 1)
        x = block(f"up{level}", "conv2", block(f"up{level}", "conv1", x))
    return torch.sigmoid(F.conv2d(x, state["outc.weight"], state["outc.bias"]))


def test_forward_of_the_study_network():
    torch.manual_seed(0)
    model = UNet(n_filters=4, **ARCHITECTURES["study"])
    for weight in model.parameters():
        if weight.dim() == 4:  # for which the output is not nearly constant
            torch.nn.init.kaiming_normal_(weight)
    x = torch.randn(2, 3, 64, 48)
    model(x)  # moves the running means
    model.eval()
    with torch.no_grad():
        expected = study_forward(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


def test_bilinear_upsampling_is_that_of_the_vessel_network():
    """Upsampling with aligned corners, then the convolution, gives what the module gives."""
    torch.manual_seed(0)
    up = Architecture(up="bilinear").make_up(8, 4)
    x = torch.randn(2, 8, 5, 7)
    larger = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(up(x), up[0](larger), rtol=1e-4, atol=1e-5)


RANDOM = random.Random(3499)  # with it, every two values of two settings meet
SETTINGS = [
    {name: RANDOM.choice(values) for name, values in {**CHOICES, "depth": (1, 3)}.items()}
    for _ in range(16)
]


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_every_pair_of_settings(settings):
    torch.manual_seed(0)
    model = UNet(2, 2, 3, image_size=None, **settings)
    shape = (2, 2, 17, 30)
    model(torch.rand(shape)).log().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    loaded = UNet.from_state_dict(model.state_dict()).eval()
    assert loaded.architecture == Architecture(**settings) and loaded.info.image_size is None
    for size in (shape, (1, 2, 1, 1), (1, 2, 16, 33)):
        x = torch.rand(size)
        with torch.no_grad():
            pred = loaded(x)
            torch.testing.assert_close(pred, model.eval()(x), rtol=0, atol=0)
        assert pred.shape == size


def test_dropout_is_where_the_settings_say():
    def shares(settings):
        """Of each dropout layer in training: the share of channels that are wholly 0."""
        model = UNet(n_filters=16, **settings).train()
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, (torch.nn.Dropout, torch.nn.Dropout2d)):
                out = layer(torch.ones(8, 64, 4, 4))
                found[name] = (out.amax((2, 3)) == 0).float().mean().item()
        return found

    assert shares({"dropout": "none"}) == {}
    assert list(shares({})) == ["bottleneck.dropout"] and shares({})["bottleneck.dropout"] < 0.01
    zeros = UNet(n_filters=2).train().bottleneck.dropout(torch.ones(100_000)) == 0
    assert zeros.float().mean().item() == pytest.approx(0.4, abs=0.01)  # the tutorial's
    channels = shares(ARCHITECTURES["study"])
    assert len(channels) == 9  # a block each, used after both of its convolutions
    assert all(0.2 < share < 0.4 for share in channels.values())


@pytest.mark.parametrize(
    "settings", [{"depth": 0}, {"depth": 9}, *({name: "other"} for name in CHOICES)]
)
def test_settings_that_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        UNet(n_filters=2, **settings)
