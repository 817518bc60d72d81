"""The network against the tutorial's listing: names, shapes, counts, arithmetic."""
import pytest
import torch
import torch.nn.functional as F

from net import DownBlock, UNet, UpBlock, load_model, pick_device


def tutorial_shapes(c=32):
    """Every weight of the tutorial's section 3, written out from its constructor calls."""
    shapes = {}

    def convolution(name, to, come, kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (to, come, kernel, kernel), (to,)

    down = {"down1": (3, c), "down2": (c, 2 * c), "down3": (2 * c, 4 * c), "down4": (4 * c, 8 * c), "down5": (8 * c, 16 * c),
            "bottleneck": (16 * c, 32 * c)}
    for name, (come, to) in down.items():
        convolution(f"{name}.conv1", to, come, 3)
        convolution(f"{name}.conv2", to, to, 3)
    up = {"up1": (32 * c, 16 * c), "up2": (16 * c, 8 * c), "up3": (8 * c, 4 * c), "up4": (4 * c, 2 * c), "up5": (2 * c, c)}
    for name, (come, to) in up.items():
        shapes[f"{name}.up.weight"], shapes[f"{name}.up.bias"] = (come, to, 2, 2), (to,)
        convolution(f"{name}.conv1", to, 2 * to, 3)
        convolution(f"{name}.conv2", to, to, 3)
    convolution("outc", 1, c, 1)
    return shapes


def test_weights_are_the_tutorials():
    with torch.device("meta"):
        model = UNet()
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == tutorial_shapes()
    assert sum(weight.numel() for weight in model.parameters()) == 31_094_497


def functional_unet(state, x):
    """The tutorial's forward pass, written without modules: an independent reading of section 3."""
    def double(name, x):
        for part in ("conv1", "conv2"):
            x = F.relu(F.conv2d(x, state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"], padding=1))
        return x

    skips = []
    for level in range(1, 6):
        x = double(f"down{level}", x)
        skips.append(x)
        x = F.max_pool2d(x, 2)
    x = double("bottleneck", x)
    for level in range(1, 6):
        x = F.conv_transpose2d(x, state[f"up{level}.up.weight"], state[f"up{level}.up.bias"], stride=2)
        x = double(f"up{level}", torch.cat([x, skips.pop()], 1))
    return torch.sigmoid(F.conv2d(x, state["outc.weight"], state["outc.bias"]))


def test_forward_is_the_tutorials():
    torch.manual_seed(0)
    model = UNet(n_filters=4).eval()
    for weight in model.parameters():  # default weights leave the answer almost constant: nothing to tell apart
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(x), functional_unet(model.state_dict(), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (37, 50), (255, 257), (32, 32)])
def test_any_size_in_the_same_size_out(size):
    model = UNet(n_filters=2).eval()
    with torch.no_grad():
        x = torch.rand(2, 3, *size)
        answer = model(x)
        assert answer.shape == (2, 1, *size) and answer.dtype == torch.float32
        assert 0 <= answer.min() and answer.max() <= 1
        bottom, right = -size[0] % 32, -size[1] % 32
        padded = model(F.pad(x, (0, right, 0, bottom), mode="replicate"))
    torch.testing.assert_close(answer, padded[..., :size[0], :size[1]])


def test_blocks():
    x, skip = DownBlock(3, 8)(torch.rand(2, 3, 16, 24))
    assert x.shape == (2, 8, 8, 12) and skip.shape == (2, 8, 16, 24)
    x, skip = DownBlock(3, 8, dropout_prob=0.4, max_pooling=False)(torch.rand(2, 3, 16, 24))
    assert x.shape == skip.shape == (2, 8, 16, 24)
    assert UpBlock(16, 8)(torch.rand(2, 16, 5, 6), torch.rand(2, 8, 10, 12)).shape == (2, 8, 10, 12)


def test_probabilities_stay_below_one_in_bfloat16():
    model = UNet(n_filters=2).eval()
    torch.nn.init.zeros_(model.outc.weight)
    torch.nn.init.constant_(model.outc.bias, 7.0)  # sigmoid(7) = 0.99909, which bfloat16 rounds to 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = model(torch.rand(1, 3, 32, 32))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, torch.full_like(answer, 0.99909), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [dict(n_filters=4), dict(n_channels=1, n_classes=3, n_filters=6, image_size=96)])
def test_architecture_is_read_off_the_weights(shape, tmp_path):
    model = UNet(**shape).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    same = load_model(tmp_path / "model.pth").eval()
    x = torch.rand(1, shape.get("n_channels", 3), 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
    assert same.image_size == shape.get("image_size", 256)


def test_from_state_dict_copies():
    model = UNet(n_filters=2)
    same = UNet.from_state_dict(model.state_dict())
    with torch.no_grad():
        same.outc.bias += 1
    assert model.outc.bias != same.outc.bias


@pytest.mark.parametrize("spoil, word", [
    (lambda state: state.clear(), "down1.conv1.weight"),
    (lambda state: state.pop("up3.conv2.bias"), "up3.conv2.bias"),
    (lambda state: state.update(extra=torch.zeros(1)), "extra"),
    (lambda state: state.update({"outc.bias": torch.zeros(5)}), "outc.bias"),
    (lambda state: state.update({"outc.bias": "zero"}), "outc.bias"),
    (lambda state: state.update({"down1.conv1.weight": torch.zeros(0)}), "not the weights"),
    (lambda state: state.update({"bottleneck.conv2.weight": torch.zeros(1).expand(64, 64, 3, 3)}), "bottleneck"),  # claimed, not there
    (lambda state: state._metadata[""].update(image_size=10 ** 9), "image size"),
    (lambda state: setattr(state, "_metadata", 5), "not the weights"),
])
def test_other_weights_are_refused(spoil, word):
    state = UNet(n_filters=2).state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=word):
        UNet.from_state_dict(state)


@pytest.mark.parametrize("thing", [[], 5, None, torch.zeros(3), {"down1.conv1.weight": 1, "outc.weight": 2}])
def test_what_is_no_state_dict_is_refused(thing):
    with pytest.raises(ValueError, match="not the weights of a UNet"):
        UNet.from_state_dict(thing)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("warp", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=name):
            pick_device(name)


@pytest.mark.parametrize("norm, layer", [("batch", torch.nn.BatchNorm2d), ("group", torch.nn.GroupNorm)])
def test_normalisation_is_read_off_the_weights(norm, layer):
    model = UNet(n_filters=4, norm=norm)
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))  # moves the running means
    assert sum(isinstance(module, layer) for module in model.modules()) == 22  # one for each 3x3 convolution
    found = UNet.from_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(found.eval()(x), model.eval()(x))
    with pytest.raises(ValueError, match="norm"):
        UNet(n_filters=4, norm="layer")
