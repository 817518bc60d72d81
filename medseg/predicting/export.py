"""A UNet for other programs, as ONNX, torch.export or TorchScript; or its weights at half size."""

import contextlib
import io
import json
import math
import re
import shlex
import warnings
import zipfile
from functools import partial
from pathlib import Path

import torch

from medseg.cli import one_line
from medseg.files import atomic_write, check_replaceable
from medseg.images import mean_and_std
from medseg.predicting.models import INPUT, OUTPUT, OnnxModel
from medseg.predicting.onnx_file import (
    KEYS,
    check_metadata,
    import_onnx_library,
    read_metadata,
)
from medseg.tiles import tiling_of
from medseg.weights import load_weights
from net import load_model

ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
PT2_NEEDS = (2, 14)  # the oldest PyTorch that exports sides of any size to .pt2
DYNAMO_ONNX_NEEDS = (2, 7)  # and the oldest whose newer exporter writes them to .onnx
ONNX_LIMIT = 2**31 - 2**20  # bytes of an ONNX file, and some for what is not weights
MAX_DIFFERENCE = 1e-4  # from PyTorch's probabilities; float32 elsewhere differs by about 1e-6
MAX_HALF_DIFFERENCE = 0.02  # where the weights are rounded to float16
METADATA_FILE = "metadata.json"  # in .pt2 and .torchscript
# (B, H, W) that a file is checked on: any size is to work, and any batch.
SHAPES = ((1, 1, 1), (1, 37, 50), (1, 255, 257), (1, 64, 96), (3, 37, 50), (1, 640, 640))
EXAMPLE = (2, 37, 50)  # what exporters trace with: no multiple of a stride, no side of 1


def export(model, path):
    """Write a UNet on the CPU to `path`; the suffix decides the format, see FORMATS.

    Any batch, height and width. The file's metadata hold class names, image size, n_channels, the
    mean and deviation of the normalisation (of 0..1) and, of a model trained on DICOM or NIfTI
    files, their window and orientation; and how masks are made of the probabilities, where that was
    chosen on valid (`medseg.inference`), and how images are divided into tiles, where they keep
    their own size (`medseg.tiles`). With .pth it is the state dict in half
    precision, for predict.py and train.py. A file of that name is replaced, but only once the new
    one has been run and compared with PyTorch on SHAPES.
    Returns the largest difference of the probabilities. Raises ValueError where it is more than
    MAX_DIFFERENCE (MAX_HALF_DIFFERENCE), or the format cannot hold the network, and leaves nothing
    behind then.
    """
    path = Path(path)
    suffix = check_target(path)
    if suffix == ".pth":
        write, read = _write_half, partial(_read_half, type(model))
        limit, reason = MAX_HALF_DIFFERENCE, "its weights do not fit half precision"
    else:
        (write, read), limit = FORMATS[suffix], MAX_DIFFERENCE
        reason = "another version of PyTorch or onnxruntime may do better"
    model.eval()
    with atomic_write(path) as file, quiet():
        try:
            file.write(write(model, metadata_of(model)))
            file.flush()
            difference = largest_difference(model, read(Path(file.name)))
        except OSError:
            raise
        except Exception as error:  # exporters have many kinds, some in colours
            message = re.sub(r"\x1b\[[0-9;]*m", "", one_line(error))
            raise ValueError(f"{path}: cannot be exported: {message:.400}") from None
        if not difference <= limit:  # nan too
            raise ValueError(
                f"{path}: not written, for it differs from PyTorch by {difference:.1e}; {reason}"
            )
    return difference


def export_model(target, paths, inputs):
    """--export: write the weights in a file to `target`, in the format of its suffix.

    paths: of the one file; inputs: none. Raises ValueError as `export` does.
    """
    path, *others = paths
    if others:
        raise ValueError(f"--export {target}: takes one --model, not {len(paths)}: export each")
    if inputs:
        raise ValueError(f"--export {target}: takes no image; predict afterwards, with --model")
    check_export(target, path)
    difference = export(load_model(path), target)
    sizes = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
    print(f"saved {target}; largest difference from PyTorch {difference:.1e} (BxHxW {sizes})")
    if target.lower().endswith(".onnx"):
        print(f"next: python predict.py IMAGE --model {shlex.quote(target)}")


def check_target(path):
    """The suffix of an export. ValueError where it names no format or a library is missing."""
    suffix = Path(path).suffix.lower()
    if suffix not in (*FORMATS, ".pth"):
        suffixes = ", ".join((*FORMATS, ".pth"))
        raise ValueError(f"--export {path}: name a file that ends in {suffixes}")
    if suffix == ".onnx":
        for name in ONNX_LIBRARIES:
            try:
                import_onnx_library(name)
            except ImportError:
                install = f"pip install {' '.join(ONNX_LIBRARIES)}"
                raise ValueError(f"--export {path}: needs {name}: {install}") from None
    if suffix not in (*available_formats(), ".pth"):
        oldest = ".".join(map(str, PT2_NEEDS))
        raise ValueError(
            f"--export {path}: needs PyTorch {oldest} or newer, and this is {torch.__version__}: "
            "pip install --upgrade torch torchvision, or export to .onnx"
        )
    return suffix


def check_export(target, path):
    """ValueError where `target` cannot be made of the weights in `path`, or is not to be lost."""
    if Path(path).suffix.lower() in FORMATS:
        raise ValueError(f"{path}: an export already; give --model the weights (.pth)")
    if Path(target).suffix.lower() == ".pth" and Path(target).exists():
        raise ValueError(f"--export {target}: there already, maybe trained; name another file")
    check_replaceable(Path(target), _is_export, "--export")
    check_target(target)


def _is_export(path):
    """Whether `export` wrote a file, by its metadata."""
    if path.suffix.lower() == ".onnx":
        return bool(read_metadata(path))
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{METADATA_FILE}")]
        return any(set(KEYS) <= json.loads(archive.read(name)).keys() for name in names)


def available_formats():
    """The suffixes of FORMATS that the installed PyTorch can write."""
    return [name for name in FORMATS if name != ".pt2" or torch.__version__ >= PT2_NEEDS]


def metadata_of(model):
    """What a program needs to know of a UNet, JSON values. ValueError for 2 or 4 channels."""
    mean, std = mean_and_std(model.n_channels)
    tiling = tiling_of(model)
    metadata = {
        "class_names": list(model.class_names),
        "image_size": model.image_size,
        "n_channels": model.n_channels,
        "mean": list(mean),
        "std": list(std),
        "window": model.window,
        "orientation": model.orientation,
        "inference": model.inference and model.inference.as_dict(),
        "trained_flips": list(model.trained_flips),
        "tiling": tiling and tiling._asdict(),
        "exclusive": model.exclusive,
    }
    return check_metadata(metadata)


def largest_difference(model, run):
    """Between the probabilities of a UNet and of run(images), over SHAPES."""
    generator, difference = torch.Generator().manual_seed(0), 0.0
    for batch, height, width in SHAPES:
        images = torch.randn(batch, model.n_channels, height, width, generator=generator)
        with torch.inference_mode():
            change = (torch.as_tensor(run(images)) - model(images)).abs().max().item()
        if math.isnan(change):
            return change
        difference = max(difference, change)
    return difference


@contextlib.contextmanager
def quiet():
    """Exporters warn of their own insides, and of TorchScript that it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- ONNX: what onnxruntime and most other programs read -------------------------------------


def _write_onnx(model, metadata):
    from onnx import helper

    weights = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    if weights > ONNX_LIMIT:
        raise ValueError(
            f"an ONNX file holds at most 2 GB, and the weights take {weights} bytes; "
            "name a file that ends in .pt2"
        )
    proto = _trace_onnx(model)
    for part in (*proto.graph.node, *proto.graph.value_info):
        del part.metadata_props[:]  # lines of code, and the folders it lay in
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    helper.set_model_props(proto, texts)
    return proto.SerializeToString()


def _trace_onnx(model):
    """The network as an onnx.ModelProto."""
    import onnx

    axes = {0: "batch", 2: "height", 3: "width"}
    options = {"input_names": [INPUT], "output_names": [OUTPUT], "verbose": False}
    if torch.__version__ >= DYNAMO_ONNX_NEEDS:
        program = torch.onnx.export(
            model, (_example(model),), dynamo=True, dynamic_shapes=(axes,), **options
        )
        return program.model_proto
    # The older exporter, through TorchScript.
    file, dynamic_axes = io.BytesIO(), {INPUT: axes, OUTPUT: axes}
    torch.onnx.export(
        model, (_example(model),), file, dynamo=False, dynamic_axes=dynamic_axes, **options
    )
    proto = onnx.load_from_string(file.getvalue())
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = model.n_classes
    return proto


def _read_onnx(path):
    model = OnnxModel(path)
    return lambda images: model.run(images.numpy())


# ---- torch.export: for PyTorch, from Python and C++ ------------------------------------------


def _write_pt2(model, metadata):
    # Unlike torch.export.Dim, these include sides of 1.
    from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec

    batch, height, width = (ShapeVar(name, min=1) for name in ("batch", "height", "width"))
    shape = TensorSpec([batch, model.n_channels, height, width])
    shapes = ShapesSpec(params=ParamsSpec({"x": shape}))
    program = torch.export.export(model, (_example(model),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()


def _read_pt2(path):
    with open(path, "rb") as file:
        return torch.export.load(file).module()


# ---- TorchScript: for older programs; PyTorch has deprecated it ------------------------------


def _write_torchscript(model, metadata):
    file = io.BytesIO()
    # The check runs the network once more on the same example; ours takes others.
    traced = torch.jit.trace(model, _example(model), check_trace=False)
    torch.jit.save(traced, file, _extra_files={METADATA_FILE: json.dumps(metadata)})
    return file.getvalue()


def _read_torchscript(path):
    return torch.jit.load(str(path))


# ---- weights in half precision: for predict.py and train.py, at half the size ----------------


def _write_half(model, metadata):
    state = model.state_dict()
    for name, weight in state.items():
        if weight.dim() > 1:  # biases and normalisations are few, and may be large or tiny
            state[name] = weight.half()
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _read_half(network_class, path):
    return network_class.from_state_dict(load_weights(path)).eval()


def _example(model):
    batch, height, width = EXAMPLE
    return torch.zeros(batch, model.n_channels, height, width)


# {suffix: (write(model, metadata) -> bytes, read(path) -> run(images))}
FORMATS = {
    ".onnx": (_write_onnx, _read_onnx),
    ".pt2": (_write_pt2, _read_pt2),
    ".torchscript": (_write_torchscript, _read_torchscript),
}
