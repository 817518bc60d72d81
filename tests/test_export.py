"""Exported files: PyTorch's probabilities and masks, without PyTorch; and what is refused."""

import json
import logging
import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_done, run_python, save_turned, script_here
from PIL import Image
from torch.torch_version import TorchVersion

import predict
from medseg.inference import VIEWS, Inference
from medseg.layers import ARCHITECTURES
from medseg.predicting import export
from net import UNet

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # where a test imports onnxruntime before the scripts do
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

# One level where the depth does not matter: an export takes seconds for each.
NETWORKS = {
    **{name: {**architecture, "depth": 1} for name, architecture in ARCHITECTURES.items()},
    "tutorial": {"depth": 5},
    "group": {"n_filters": 8, "norm": "group", "n_classes": 2, "n_channels": 1},
    "regions": {"n_classes": 3, "draw_order": (2, 1, 3), "inference": Inference(0.86, VIEWS)},
    "window": {"n_channels": 1, "image_size": None, "window": (40, 400)},
    "slices": {"n_channels": 6, "channels": ("t1", "t2"), "context": 1, "orientation": "LPS"},
}


def make_model(name, **arguments):
    """A network of new weights: bright and dark pixels are on two sides of its threshold."""
    torch.manual_seed(0)
    sizes = {"n_filters": 2, "depth": 1, "image_size": 32}
    model = UNet(**{**sizes, **NETWORKS[name], **arguments})
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            torch.nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        for _ in range(3):  # running means and variances
            model(torch.randn(2, model.n_channels, 64, 64))
        sides = torch.tensor([-1.8, 2.0]).repeat_interleave(32).expand(1, model.n_channels, 64, 64)
        model.eval().outc.bias -= model(sides).logit().mean((0, 2, 3))
        model.outc.bias += torch.tensor((model.info.inference or Inference()).threshold).logit()
    return model


@pytest.fixture(scope="module", autouse=True)
def small_checks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHAPES", ((1, 1, 1), (2, 33, 40)))
        # pytest would format what PyTorch traces, which doubles the time.
        patch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
        yield


def write_export(name, path):
    """Export a network; its .pth is beside."""
    model = make_model(name)
    torch.save(model.state_dict(), path.with_suffix(".pth"))
    assert export.export(model, path) < 1e-5
    return path


CASES = [(name, ".onnx") for name in (*ARCHITECTURES, "group")] + [("group", ".torchscript")]


@pytest.mark.parametrize("name, suffix", CASES)
def test_probabilities_are_those_of_pytorch(name, suffix, tmp_path):
    model = make_model(name)
    run = export.FORMATS[suffix][1](write_export(name, tmp_path / f"m{suffix}"))
    for batch, height, width in ((1, 1, 1), (1, 255, 257), (3, 40, 33)):
        images = torch.randn(batch, model.n_channels, height, width)
        with torch.no_grad():
            expected = model(images)
            result = torch.as_tensor(run(images))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
        assert min(height, width) == 1 or expected.std() > 0.01


def test_metadata(tmp_path):
    metadata = {
        **{"n_channels": 6, "mean": [0.449] * 6, "std": [0.226] * 6, "image_size": 32},
        **{"exclusive": True, "trained_flips": [], "draw_order": [], "orientation": "LPS"},
        **{"class_names": ["foreground"]},
        **{"channels": ["t1", "t2", "t1 -1", "t2 -1", "t1 +1", "t2 +1"]},
    }
    path, files = write_export("slices", tmp_path / "m.onnx"), {export.METADATA_FILE: ""}
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {entry.key: json.loads(entry.value) for entry in proto.metadata_props} == metadata
    assert str(ROOT).encode() not in path.read_bytes()
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["probabilities"]
    torch.jit.load(write_export("slices", tmp_path / "m.torchscript"), _extra_files=files)
    assert json.loads(files["metadata.json"]) == metadata
    # The script takes pictures alone.
    result = run_python(ROOT / "docs" / "predict_onnx.py", path, "a.tif", cwd=tmp_path)
    assert result.returncode == 2 and "t1, t2, t1 -1" in result.stderr


# ---- docs/predict_onnx.py: the same masks without PyTorch ------------------------------------

WITHOUT_TORCH = """
import runpy, sys
sys.modules |= dict.fromkeys(["torch", "cv2", "scipy", "medseg", "net"])  # cannot be imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["group", "regions", "window"])
def test_masks_without_pytorch_are_those_of_predict(name, here):
    """Of noise and squares: colour, grey, 16 bits, palette, alpha, turned."""
    path, rng = write_export(name, here / "m.onnx"), np.random.default_rng(0)
    for folder in ("home", "scans"):
        Path(folder).mkdir()
    for number, mode in enumerate(("RGB", "L", "I;16", "P", "RGBA", "LA", "1")):
        pixels = rng.integers(0, 80, (50 + number, 70, 3), np.uint8)
        pixels[10:30, 20:45] = 230
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 17)  # of 12 bits
        image.convert(mode).save(f"scans/{number}.png")
        save_turned(pixels, f"scans/turned{number}.jpg", number + 2)
    flags = ("--model", "m.pth", "--output", "torch", "--device", "cpu", "--precision", "fp32")
    assert_done(script_here("predict.py", "scans", *flags, cwd=here))
    command = (ROOT / "docs" / "predict_onnx.py", path, *Path("scans").iterdir(), "--output=onnx")
    environment = {"HOME": str(here / "home"), "XDG_CACHE_HOME": "", "ORT_DISABLE_TELEMETRY": "0"}
    assert_done(run_python("-c", WITHOUT_TORCH, *command, cwd=here, **environment))
    assert not list(Path("home").iterdir())  # onnxruntime would leave a device id and a database
    expected = {
        path.name: np.asarray(Image.open(path)) for path in Path("torch").glob("*_mask.png")
    }
    assert {path.name for path in Path("onnx").iterdir()} == expected.keys()
    for name, mask in expected.items():
        np.testing.assert_array_equal(Image.open(f"onnx/{name}"), mask, name)
    assert len(expected) == 14
    assert 0.02 < np.mean([np.mean(mask > 0) for mask in expected.values()]) < 0.98


# ---- the command -----------------------------------------------------------------------------


def test_the_command_exports_and_refuses(here, refused, monkeypatch, capsys):
    """With the oldest PyTorch allowed: one that new has the older exporter as well."""
    model = make_model("group", class_names=["gland", "Läsion"])
    torch.save(model.state_dict(), "best_model.pth")
    Image.new("RGB", (40, 30)).save("scan.png")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    predict.main(["--export", "m.onnx"])
    (said,) = capsys.readouterr().out.splitlines()
    assert re.search(r" \d\.\de-\d\d", said)  # the difference
    texts = {entry.key: entry.value for entry in onnx.load("m.onnx").metadata_props}
    assert json.loads(texts["class_names"]) == ["gland", "Läsion"]
    images = torch.randn(3, 1, 45, 31)
    with torch.no_grad():
        expected = predict.load_model("best_model.pth", "cpu")(images).numpy()
    np.testing.assert_allclose(export.FORMATS[".onnx"][1]("m.onnx")(images), expected, atol=1e-5)
    for flags, word in {
        "--export model.pt2": ".onnx, .torchscript, .pth",
        "scan.png --export m.torchscript": "--export",
        "--export m.torchscript --model none.pth": "none.pth",
        "--export scan.png/m.torchscript": "scan.png",
    }.items():
        refused("predict", *flags.split(), words=[word])
    write, load, limit = export.FORMATS[".torchscript"]
    for change, difference in {2e-4: "2.0e-04", float("nan"): "nan"}.items():
        wrong = (write, lambda path, by=change: lambda images: load(path)(images) + by, limit)
        monkeypatch.setitem(export.FORMATS, ".torchscript", wrong)
        refused("predict", "--export", "m.torchscript", words=["m.torchscript", difference])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused("predict", "--export", "m.onnx", words=["m.onnx", "pip install onnxscript"])
    assert {path.name for path in here.iterdir()} == {"best_model.pth", "scan.png", "m.onnx"}


def test_half_precision_is_half_the_file(here, refused):
    """Every weight is the nearest float16; what is not a convolution's weight stays as it was."""
    model = make_model("tutorial", n_filters=8, norm="batch")
    torch.save(model.state_dict(), "own.pth")
    predict.main(["--model", "own.pth", "--export", "half.pth"])
    # Weights that were trained are not replaced.
    refused("predict", "--model", "half.pth", "--export", "own.pth", words=["own.pth"])
    assert os.path.getsize("half.pth") < 0.52 * os.path.getsize("own.pth")
    half = predict.load_model("half.pth", "cpu")
    assert half.architecture == model.architecture and half.info.image_size == model.info.image_size
    for name, weight in model.state_dict().items():
        rounded = weight.numpy().astype(np.float16) if weight.dim() > 1 else weight.numpy()
        np.testing.assert_array_equal(half.state_dict()[name].numpy(), rounded, name)
    model.down1.conv1.weight.data[0, 0, 0, 0] = 1e6  # float16 ends at 65504
    torch.save(model.state_dict(), "own.pth")
    refused("predict", "--model", "own.pth", "--export", "new.pth", words=["new.pth"])
    assert {path.name for path in here.iterdir()} == {"own.pth", "half.pth"}


def test_torch_hub_loads_a_clone(tmp_path):
    hub = partial(torch.hub.load, str(ROOT), "unet", source="local")
    model = hub(n_filters=4, norm="batch")
    assert model.training and model.n_filters == 4
    torch.save(make_model("group").state_dict(), tmp_path / "weights.pth")
    model = hub(weights=str(tmp_path / "weights.pth"))
    assert not model.training and model.n_classes == 2
    tumor = torch.load(ROOT / "dataset" / "tumor.pth", weights_only=True)
    assert torch.equal(hub(pretrained=True).outc.bias, tumor["outc.bias"])
    with pytest.raises(ValueError, match="n_filters"):
        hub(pretrained=True, n_filters=4)
