"""A UNet for other programs, as ONNX or TorchScript; or its weights at half size."""

import io
import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from medseg.cli import one_line
from medseg.files import atomic_write, check_replaceable
from medseg.images import mean_and_std
from net import load_model

INPUT, OUTPUT = "images", "probabilities"  # of an ONNX file
ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
DYNAMO_ONNX_NEEDS = (2, 7)  # the oldest PyTorch whose newer exporter writes sides of any size
METADATA_FILE = "metadata.json"  # in .torchscript
FIELDS = "class_names image_size exclusive draw_order trained_flips window orientation".split()
# (B, H, W) that a file is checked on: any size is to work, and any batch.
SHAPES = ((1, 1, 1), (1, 37, 50), (1, 255, 257), (1, 64, 96), (3, 37, 50), (1, 640, 640))


def export(model, path):
    """Write a UNet on the CPU to `path`, in the format of its suffix, see FORMATS.

    A file there is replaced once the new one has been compared with PyTorch on SHAPES. Returns the
    largest difference of the probabilities. Raises ValueError, and leaves nothing behind, where
    that is too large or the format cannot hold the network.
    """
    write, read, limit = FORMATS[check_target(path)]
    with atomic_write(Path(path)) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters warn of their own insides
        try:
            file.write(write(model.eval(), metadata_of(model)))
            file.flush()
            difference = largest_difference(model, read(file.name))
        except OSError:
            raise
        except Exception as error:  # exporters have many kinds
            raise ValueError(f"{path}: cannot be exported: {one_line(error):.400}") from None
        if not difference <= limit:  # nan too
            raise ValueError(f"{path}: not written: differs from PyTorch by {difference:.1e}")
    return difference


def export_model(target, paths, inputs):
    """--export: `export` the weights in the one file of `paths`; inputs: none."""
    if len(paths) > 1 or inputs:
        raise ValueError(f"--export {target}: takes one --model and no image: export each alone")
    if check_target(target) == ".pth" and Path(target).exists():
        raise ValueError(f"--export {target}: there already, maybe trained; name another file")
    check_replaceable(Path(target), _is_export, "--export")
    difference = export(load_model(paths[0]), target)
    print(f"saved {target}; largest difference from PyTorch {difference:.1e}")


def check_target(path):
    """The suffix of an export. ValueError where it names no format or a library is missing."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"--export {path}: name a file that ends in {', '.join(FORMATS)}")
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else importing it leaves files in the home folder
    missing = [name for name in ONNX_LIBRARIES if not find_spec(name)]
    if suffix == ".onnx" and missing:
        raise ValueError(f"--export {path}: needs more: pip install {' '.join(missing)}")
    return suffix


def metadata_of(model):
    """What a program needs to know of a UNet, JSON values; docs/export.md explains them."""
    metadata = {"n_channels": model.n_channels, **{key: getattr(model.info, key) for key in FIELDS}}
    metadata["mean"], metadata["std"] = mean_and_std(model.n_channels)
    metadata["channels"] = list(model.info.channel_names) or None
    metadata["inference"] = model.info.inference and model.info.inference.as_dict()
    return {
        key: value for key, value in metadata.items() if value is not None or key == "image_size"
    }


def _is_export(path):
    """Whether `export` wrote a file: every format has the names of the metadata as they are."""
    return all(name.encode() in path.read_bytes() for name in ("n_channels", *FIELDS[:2]))


def example_of(model):
    """Images that exporters trace with: no multiple of a stride, no side of 1."""
    return torch.zeros(2, model.n_channels, 37, 50)


def largest_difference(model, run):
    """Between the probabilities of a UNet and of run(images), over SHAPES."""
    generator, differences = torch.Generator().manual_seed(0), []
    for batch, *sides in SHAPES:
        images = torch.randn(batch, model.n_channels, *sides, generator=generator)
        with torch.inference_mode():
            differences.append((torch.as_tensor(run(images)) - model(images)).abs().max())
    return torch.stack(differences).max().item()  # NaN where any is


def _write_onnx(model, metadata):
    import onnx

    file, example = io.BytesIO(), example_of(model)
    options = {"input_names": [INPUT], "output_names": [OUTPUT], "verbose": False}
    axes = {0: "batch", 2: "height", 3: "width"}
    if torch.__version__ >= DYNAMO_ONNX_NEEDS:
        options |= {"dynamo": True, "dynamic_shapes": (axes,)}
        proto = torch.onnx.export(model, (example,), **options).model_proto
    else:  # the older exporter, through TorchScript
        options |= {"dynamo": False, "dynamic_axes": {INPUT: axes, OUTPUT: axes}}
        torch.onnx.export(model, (example,), file, **options)
        proto = onnx.load_from_string(file.getvalue())
    for part in (*proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # lines of code, and the folders it lay in
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    onnx.helper.set_model_props(proto, texts)
    return proto.SerializeToString()


def _read_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images.numpy()})[0]


def _write_torchscript(model, metadata):
    file = io.BytesIO()
    # The check runs the network once more on the same example; ours takes others.
    traced = torch.jit.trace(model, example_of(model), check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()


def _write_half(model, metadata):
    file, state = io.BytesIO(), model.state_dict()
    for name, weight in state.items():
        if weight.dim() > 1:  # biases and normalisations are few, and may be large or tiny
            state[name] = weight.half()
    torch.save(state, file)
    return file.getvalue()


# {suffix: (write(model, metadata) -> bytes, read(path) -> run(images), largest difference)}
FORMATS = {
    ".onnx": (_write_onnx, _read_onnx, 1e-4),
    ".torchscript": (_write_torchscript, torch.jit.load, 1e-4),
    ".pth": (_write_half, lambda path: load_model(path).eval(), 0.02),
}
