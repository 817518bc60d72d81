"""Exported files: PyTorch's probabilities and masks, without PyTorch; and what is refused."""

import ast
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys

import nibabel
import numpy as np
import parity
import pytest
import torch
from helpers import ROOT, assert_done, run_python, sample, script_here, start_python, write_nifti
from PIL import Image
from torch.torch_version import TorchVersion

import predict
from medseg import tiles
from medseg.layers import ARCHITECTURES
from medseg.predicting import export
from medseg.predicting.models import INPUT, OUTPUT, OnnxModel, available_threads
from medseg.predicting.onnx_file import read_metadata
from medseg.tiles import Tiling
from net import UNet

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # where a test imports onnxruntime before the scripts do
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.slow

# One level where the depth does not matter: an export takes seconds for each.
NETWORKS = {
    **{name: {**architecture, "depth": 1} for name, architecture in ARCHITECTURES.items()},
    "tutorial": {},
    "group": {"depth": 1, "n_filters": 8, "norm": "group", "n_classes": 2, "n_channels": 1},
    "volumes": {"depth": 1, "n_channels": 1, "window": (40, 400), "orientation": "LPS"},
}
SIZES = [(1, 1, 1), (1, 37, 50), (1, 255, 257), (3, 40, 33)]  # (B, H, W)


def make_model(name, **arguments):
    """A network whose output is far from constant: its weights are drawn anew."""
    torch.manual_seed(0)
    model = UNet(**{"n_filters": 2, "image_size": 32, **NETWORKS[name], **arguments})
    for key, weight in model.named_parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
        elif key.endswith("weight"):  # of a normalisation
            weight.data.uniform_(0.5, 1.5)
        else:
            weight.data.normal_(0, 0.1)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


# The system call socket(), by machine.
CALLS = {"x86_64": 41, "aarch64": 198} if sys.platform == "linux" else {}
SOCKET = CALLS.get(platform.machine())
# From here on a process is killed (SIGSYS) once it opens a socket of another kind than AF_UNIX,
# whatever library does it: a filter of seccomp(2), for which no rights are needed.
NO_NETWORK = f"""
import ctypes, struct, sys, time
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
rows = [(LOAD, 0, 0, 0), (EQUAL, 0, 2, {SOCKET}), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 1)]
rows += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
"""
PREDICT_AND_STAY = (
    "import predict\n"
    "predict.main(['scan.png', '--model', 'm.onnx', '--output', 'mask.png'])\n"
    "time.sleep(15)"  # onnxruntime asks for its maker's server nine seconds after its import
)


@pytest.fixture(scope="module", autouse=True)
def watched(tmp_path_factory):
    """A prediction without a network, with a home folder of its own, which runs beside the tests.

    (the process, its folder, with `home` and `tmp`)
    """
    folder = tmp_path_factory.mktemp("watched")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    (folder / "m.onnx").write_bytes(other_network().SerializeToString())
    Image.new("RGB", (40, 30), "grey").save(folder / "scan.png")
    places = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    code = (NO_NETWORK if SOCKET else "import time\n") + PREDICT_AND_STAY
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            patch.delenv(name, raising=False)
        process = start_python("-c", code, cwd=folder, ORT_DISABLE_TELEMETRY="0", **places)
    yield process, folder
    process.kill()
    process.communicate()


@pytest.fixture(scope="module", autouse=True)
def small_checks():
    """640x640 once, in the tutorial's network; elsewhere the export's own check is small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SHAPES", ((1, 1, 1), (2, 33, 40)))
        # pytest would format what PyTorch traces, which doubles the time.
        patch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(name, suffix) -> path of a network's export, written once; its .pth is beside."""
    folder = tmp_path_factory.mktemp("exported")

    def write(name, suffix):
        path = folder / f"{name}{suffix}"
        if not path.exists():
            model = make_model(name)
            torch.save(model.state_dict(), path.with_suffix(".pth"))
            assert export.export(model, path) < 1e-5
        return path

    return write


# ---- the same probabilities ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", export.available_formats())
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "volumes"])
def test_probabilities_are_those_of_pytorch(name, suffix, exported):
    model, (_, load) = make_model(name), export.FORMATS[suffix]
    run = load(exported(name, suffix))
    sizes = [*SIZES, (1, 640, 640)] if (name, suffix) == ("tutorial", ".onnx") else SIZES
    for batch, height, width in sizes:
        images = torch.randn(batch, model.n_channels, height, width)
        with torch.no_grad():
            expected = model(images)
            result = torch.as_tensor(run(images))
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
        assert min(height, width) == 1 or expected.std() > 0.01


def test_padding_is_that_of_an_independent_formula():
    for depth in range(1, 9):
        for padding in ("zeros", "reflect"):
            with torch.device("meta"):
                model = UNet(n_filters=1, depth=depth, padding=padding)
            least = 2**depth * (2 if padding == "reflect" else 1)
            for side in range(1, 1030):
                padded = side + model._padding(side)
                smallest = next(n for n in range(least, 2**11, 2**depth) if n >= side)
                assert padded == smallest, (depth, padding, side)


def test_normalisation_without_pytorch_is_that_of_training(exported):
    from data import normalize

    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), np.uint8)
    model, given = OnnxModel(exported("tutorial", ".onnx")), []
    model.run = given.append
    model.probabilities(pixels)
    np.testing.assert_array_equal(given[0], normalize(torch.from_numpy(pixels)).numpy())


def test_threads(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert available_threads() == 3
    (tmp_path / "m.onnx").write_bytes(other_network().SerializeToString())
    session = OnnxModel(tmp_path / "m.onnx").session
    assert session.get_session_options().intra_op_num_threads == 3
    for text in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert available_threads() == len(os.sched_getaffinity(0))


# ---- metadata, read by others ----------------------------------------------------------------

COLOUR = {"n_channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
GREY = {"n_channels": 1, "mean": [0.449], "std": [0.226], "image_size": 32}
SCANNED = {"window": [40, 400], "orientation": "LPS"}
METADATA = {
    "tutorial": {**COLOUR, "image_size": 32, "class_names": ["foreground"]},
    "group": {**GREY, "class_names": ["1", "2"]},
    "volumes": {**GREY, **SCANNED, "class_names": ["foreground"]},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(name, exported):
    path = exported(name, ".onnx")
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    found = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert found == METADATA[name] == json.loads(json.dumps(read_metadata(path)))
    assert [value.name for value in proto.graph.input] == [INPUT]
    assert [value.name for value in proto.graph.output] == [OUTPUT]
    torch_formats = {".torchscript": (torch.jit.load, "_extra_files")}
    if ".pt2" in export.available_formats():
        torch_formats[".pt2"] = (torch.export.load, "extra_files")
    for suffix, (load, argument) in torch_formats.items():
        files = {export.METADATA_FILE: ""}
        load(str(exported(name, suffix)), **{argument: files})
        assert json.loads(files[export.METADATA_FILE]) == METADATA[name]


def test_volumes_without_pytorch_are_scaled_and_turned_as_with_it(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, half = exported("volumes", ".onnx"), str(tmp_path / "half.pth")
    assert export.export(make_model("volumes"), half) < 0.02
    voxels = np.random.default_rng(0).integers(-900, 900, (20, 24, 9), np.int16)
    write_nifti("v.nii.gz", voxels, np.diag([1, 1, 3, 1]))
    masks = []
    for model in (path, path.with_suffix(".pth"), half):
        assert predict.open_model(model, "cpu").orientation == "LPS"
        flags = ("--model", str(model), "--device", "cpu", "--precision", "fp32")
        flags += ("--threshold", "0.3")  # the median of its probabilities is 0.28
        predict.main(["v.nii.gz", "--output", "m.nii.gz", *flags])
        masks.append(np.asarray(nibabel.load("m.nii.gz").dataobj))
    np.testing.assert_array_equal(masks[0], masks[1])
    assert 0.02 < masks[0].mean() < 0.98 and (masks[0] != masks[2]).mean() < 0.01
    predict.main(["v.nii.gz", "--output", "m.nii.gz", "--window", "900", "100", *flags])
    assert (masks[0] != np.asarray(nibabel.load("m.nii.gz").dataobj)).mean() > 0.02


def test_an_export_names_no_folder_of_its_machine(exported):
    assert str(ROOT).encode() not in exported("tutorial", ".onnx").read_bytes()


# ---- the command -----------------------------------------------------------------------------


def write_inputs(folder):
    """A picture, a DICOM file, a volume and a folder of pictures, of noise and squares."""
    rng = np.random.default_rng(0)
    (folder / "scans").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 80, (50 + number, 70, 3), np.uint8)
        pixels[10:30, 20:45] = 230
        Image.fromarray(pixels).save(folder / "scans" / f"{number}.png")
    shutil.copy(folder / "scans" / "0.png", folder / "scan.png")
    write_nifti(folder / "v.nii.gz", pixels[..., 0:1].repeat(5, 2))
    shutil.copy(sample("CT_small.dcm"), folder / "ct.dcm")


CASES = [("scan.png",), ("scans",), ("ct.dcm", "--window", "40", "400"), ("v.nii.gz",)]


def test_masks_without_pytorch_are_those_with_it(exported, tmp_path):
    write_inputs(tmp_path)
    path = exported("tutorial", ".onnx")
    flags = ("--output", "torch", "--device", "cpu", "--precision", "fp32")
    for inputs in CASES:
        command = (*inputs, "--model", path.with_suffix(".pth"), *flags)
        assert_done(script_here("predict.py", *command, cwd=tmp_path))
    code = (
        "import sys, predict\n"
        f"for inputs in {CASES}:\n"
        f"    predict.main([*inputs, '--model', {str(path)!r}, '--output', 'onnx'])\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'torch'])"
    )
    said = assert_done(run_python("-c", code, cwd=tmp_path))
    assert said.splitlines()[-1] == "[]"
    masks = sorted((tmp_path / "onnx").glob("*_mask*"))
    assert len(masks) == 1 + 6 + 1 + 1
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "torch" / mask.name).read_bytes(), mask.name
    share = np.mean(np.asarray(Image.open(tmp_path / "onnx" / "3_mask.png")) > 0)
    assert 0.02 < share < 0.98


@pytest.mark.parametrize("tiling", [None, Tiling(8, 4, 10)], ids=["whole", "tiles"])
def test_images_of_their_own_sizes_are_predicted_together(tiling, tmp_path, monkeypatch):
    """The network is the logistic function, so that a mask is what is above the mean of grey."""
    monkeypatch.setattr(tiles, "TILE_MEMORY", 1)
    network = other_network(image_size=None, tiling=tiling and tiling._asdict())
    (tmp_path / "m.onnx").write_bytes(network.SerializeToString())
    (tmp_path / "scans").mkdir()
    rng, pictures = np.random.default_rng(0), {}
    for number, size in enumerate([(20, 30), (31, 17), (20, 30), (20, 30), (1, 40), (64, 50)]):
        pictures[number] = rng.integers(0, 256, size, np.uint8)
        Image.fromarray(pictures[number]).save(tmp_path / "scans" / f"{number}.png")
    arguments = (tmp_path / "scans", "--model", tmp_path / "m.onnx", "--output", tmp_path / "out")
    assert_done(script_here("predict.py", *arguments, cwd=tmp_path))
    for number, pixels in pictures.items():
        mask = np.asarray(Image.open(tmp_path / "out" / f"{number}_mask.png"))
        np.testing.assert_array_equal(mask == 255, pixels / 255 > METADATA["group"]["mean"][0])


def test_the_report_of_an_onnx_file_is_that_of_its_weights(exported, dataset, tmp_path):
    reports = []
    for suffix in (".onnx", ".pth"):
        model = exported("tutorial", ".onnx").with_suffix(suffix)
        arguments = (dataset / "test", "--model", model, "--output", tmp_path / suffix[1:])
        assert_done(script_here("predict.py", *arguments, "--precision", "fp32", cwd=tmp_path))
        reports.append(json.loads((tmp_path / suffix[1:] / "report.json").read_text()))
    errors = [report["calibration"].pop("expected_calibration_error") for report in reports]
    assert errors[0] == pytest.approx(errors[1])  # of probabilities, which differ in the last bits
    curves = [report["calibration"].pop("classes")["foreground"] for report in reports]
    assert curves[0]["pixels"] == curves[1]["pixels"]
    assert reports[0] == reports[1]


def test_the_command_exports(tmp_path):
    model = make_model("group", class_names=["gland", "Läsion"])
    torch.save(model.state_dict(), tmp_path / "best_model.pth")
    result = script_here("predict.py", "--export", "model.onnx", cwd=tmp_path)
    assert re.search(r" \d\.\de-\d\d .*1x1x1, 2x33x40", assert_done(result))  # the difference
    assert "python predict.py IMAGE --model model.onnx" in result.stdout
    assert len(result.stdout.splitlines()) == 2 and not result.stderr.strip()
    assert {path.name for path in tmp_path.iterdir()} == {"best_model.pth", "model.onnx"}
    assert OnnxModel(tmp_path / "model.onnx").class_names == ("gland", "Läsion")


# ---- what is refused -------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with best_model.pth and an image, which is the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save(make_model("group").state_dict(), "best_model.pth")
    Image.new("RGB", (40, 30)).save("scan.png")
    return tmp_path


def wrong(change):
    write, load = export.FORMATS[".torchscript"]
    return {".torchscript": (write, lambda path: lambda images: load(path)(images) + change)}


@pytest.mark.parametrize("change, difference", [(2e-4, "2.0e-04"), (float("nan"), "nan")])
def test_an_export_that_differs_is_not_written(change, difference, place, refused, monkeypatch):
    monkeypatch.setattr(export, "FORMATS", wrong(change))
    refused("predict", "--export", "model.torchscript", words=["model.torchscript", difference])
    assert len(list(place.iterdir())) == 2


def test_an_older_pytorch_exports_to_onnx_and_names_the_version_for_pt2(
    place, refused, monkeypatch
):
    """The oldest that requirements.txt allows; one that new has the older exporter as well."""
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    refused("predict", "--export", "m.pt2", words=["m.pt2", "2.14", "2.6.0", ".onnx"])
    assert not (place / "m.pt2").exists()
    predict.main(["--export", "m.onnx"])
    (value,) = onnx.load("m.onnx").graph.input
    sides = [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
    assert sides == ["batch", 1, "height", "width"]
    images = torch.randn(3, 1, 45, 31)
    with torch.no_grad():
        expected = predict.load_model("best_model.pth", "cpu")(images).numpy()
    np.testing.assert_allclose(OnnxModel("m.onnx").run(images.numpy()), expected, atol=1e-5)


def test_the_message_of_an_exporter_is_one_plain_line(place, refused, monkeypatch):
    def fail(model, metadata):
        raise RuntimeError("\x1b[96mstep 1\x1b[0m\n\n## of the export\x1b[1;31m!\x1b[m")

    monkeypatch.setattr(export, "FORMATS", {".torchscript": (fail, None)})
    line = refused("predict", "--export", "m.torchscript", words=["step 1 ## of the export!"])
    assert line.strip().isprintable()


def test_an_interrupted_export_leaves_nothing(place, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    write = export.FORMATS[".torchscript"][0]
    monkeypatch.setattr(export, "FORMATS", {".torchscript": (write, interrupt)})
    result = script_here("predict.py", "--export", "model.torchscript", cwd=place)
    assert result.returncode == 130
    assert {path.name for path in place.iterdir()} == {"best_model.pth", "scan.png"}


def test_exports_that_are_refused(place, refused, monkeypatch):
    before = sorted(place.iterdir())
    for arguments, words in {
        ("--export", "model.h5"): (".onnx, .pt2, .torchscript",),
        ("--export", "model"): (".onnx",),
        ("scan.png", "--export", "m.pt2"): ("--export",),
        ("--export", "m.pt2", "--model", "other.onnx"): ("other.onnx",),
        ("--export", "m.torchscript", "--model", "none.pth"): ("none.pth", "train.py"),
        ("--export", "scan.png/m.torchscript"): ("scan.png",),
    }.items():
        refused("predict", *arguments, words=words)
    for name in export.ONNX_LIBRARIES:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            command = "pip install onnx onnxscript onnxruntime"
            refused("predict", "--export", "model.onnx", words=[name, command])
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    refused("predict", "--export", "model.onnx", words=["model.onnx", "2 GB"])
    torch.save(UNet(2, 1, 2, depth=1).state_dict(), "best_model.pth")
    refused("predict", "--export", "m.torchscript", words=["m.torchscript", "n_channels 2"])
    assert sorted(place.iterdir()) == before


def onnx_file(path, proto, **metadata):
    """Write `proto` with other metadata (None: without that key) to `path`; returns its name."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    texts = {entry.key: entry.value for entry in proto.metadata_props}
    texts.update(metadata)
    del changed.metadata_props[:]
    onnx.helper.set_model_props(changed, {key: text for key, text in texts.items() if text})
    path.write_bytes(changed.SerializeToString())
    return path.name


LIES = {
    "class_names": [
        *(None, '["a"]', '["a", 2]', "[]", '"ab"', "[" * 90_000),
        *(json.dumps(["x"] * 300), json.dumps(["x" * 200_000, "b"])),
    ],
    "image_size": ["1000000000", "0", "true", "9" * 6000],
    "n_channels": ["3", "2", "[1]"],
    "mean": ["[0.1, 0.2]", "[Infinity]", "0.1"],
    "std": ["[0]", "[NaN]", "[-1]", "not json"],
    "window": ["[40, 0]", "[40]", '"all"', "[NaN, 1]", "not json"],
    "orientation": ['"RAR"', "[1, 2, 3]"],
    "tiling": [
        *("8", "{}", '{"stride": 8}'),
        *(
            json.dumps(lie._asdict())
            for lie in (Tiling(7, 4, 9), Tiling(8, -1, 9), Tiling(8, 4, 9.5))
        ),
    ],
    "inference": [
        *("0.5", "[]", "{}", '{"threshold": 0.5}', "[" * 90_000),
        *(
            f'{{"threshold": {threshold}, "flips": {flips}, "clean": {clean}}}'
            for threshold, flips, clean in (
                *(("2", "[]", '"none"'), ("NaN", "[]", '"none"'), ("0.5", '["up"]', '"none"')),
                *(("0.5", "[[]]", '"none"'), ("0.5", "[]", '"larger"'), ("0.5", "[]", "null")),
            )
        ),
    ],
}


def test_metadata_that_lie(exported, place, refused):
    proto = onnx.load(exported("group", ".onnx"))
    for key, lie in ((key, lie) for key, lies in LIES.items() for lie in lies):
        name = onnx_file(place / "lie.onnx", proto, **{key: lie})
        refused("predict", "scan.png", "--model", name, words=["lie.onnx"])
    no_size = onnx_file(place / "none.onnx", proto, image_size="null")
    assert OnnxModel(no_size).image_size is None
    null = dict.fromkeys(("window", "orientation", "inference", "tiling"), "null")
    model = OnnxModel(onnx_file(place / "none.onnx", proto, **null))
    assert model.window is model.orientation is model.recorded is None
    assert not list(place.glob("*_mask.png"))


def external(proto, location, attribute=False):
    """The same network, whose first weights lie in another file."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    tensor = changed.graph.initializer[0]
    if attribute:
        tensor = changed.graph.node.add(op_type="Constant", output=["x"]).attribute.add().t
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return changed


def other_network(name="images", sides=("b", 1, "h", "w"), operators="Sigmoid", **metadata):
    """An ONNX file of a few operators, one after the other, with the metadata of ours."""
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    out = helper.make_tensor_value_info("probabilities", kind, sides)
    values = [name, *operators.split()[1:], "probabilities"]
    steps = zip(operators.split(), values, values[1:], strict=False)
    nodes = []
    for operator, before, after in steps:
        attributes = {"perm": (0, 1, 3, 2)} if operator == "Transpose" else {}
        nodes.append(helper.make_node(operator, [before], [after], **attributes))
    given = helper.make_tensor_value_info(name, kind, sides)
    graph = helper.make_graph(nodes, "other", [given], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    metadata = {**METADATA["group"], "class_names": ["a"], **metadata}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return model


def test_hostile_files(exported, place, refused, monkeypatch):
    good = exported("group", ".onnx")
    proto, content = onnx.load(good), good.read_bytes()
    files = {
        **{"text": b"this is no network\n" * 50, "empty": b"", "zeros": bytes(1000)},
        "weights": (place / "best_model.pth").read_bytes(),
        **{f"cut{share}": content[: len(content) * share // 10] for share in (1, 5, 9)},
        "short": content[:-1],
    }
    networks = {
        "passwd": external(proto, "../../../../etc/passwd"),
        "beside": external(proto, "scan.png"),
        "constant": external(proto, "scan.png", attribute=True),
        "name": other_network("pictures"),
        "rank": other_network(sides=("b", 1, "h")),
        "channels": other_network(sides=("b", 3, "h", "w")),
        "fixed": other_network(sides=(1, 1, 32, 32)),
        "range": other_network(operators="Neg"),  # 1.99 for black
        "negative": other_network(operators="Identity"),
        "nan": other_network(operators="Sqrt"),
        "turned": other_network(operators="Sigmoid Transpose", image_size=None),  # W x H
        "operator": other_network(operators="Frobnicate"),
    }
    reasons = dict.fromkeys(("passwd", "beside", "constant"), "another file")
    reasons |= dict.fromkeys(("range", "negative", "nan", "turned"), "no probabilities")
    files |= {name: network.SerializeToString() for name, network in networks.items()}
    for name, data in files.items():
        (place / f"{name}.onnx").write_bytes(data)
        words = [f"{name}.onnx", reasons.get(name, "")]
        line = refused("predict", "scan.png", "--model", f"{name}.onnx", words=words)
        assert len(line) < 700, line
    with monkeypatch.context() as patch:
        patch.setattr("medseg.predicting.onnx_file.MAX_FIELDS", 10)
        shutil.copy(good, "good.onnx")
        refused("predict", "scan.png", "--model", "good.onnx", words=["good.onnx", "10 fields"])
    (place / "range.onnx").write_bytes(other_network().SerializeToString())
    predict.main(["scan.png", "--model", "range.onnx"])  # so the others fail for their faults


def test_models_that_cannot_be_run(place, refused, monkeypatch):
    for name, word in {"none.onnx": "--export", "m.pt2": ".pth", "m.torchscript": ".pth"}.items():
        refused("predict", "scan.png", "--model", name, words=[name, word])
    (place / "m.onnx").write_bytes(other_network().SerializeToString())
    command = ("predict", "scan.png", "--model", "m.onnx")
    for device in ("cuda", "mps", "0"):
        refused(*command, "--device", device, words=["--device", "CPU"])
    refused(*command, "--precision", "bf16", words=["--precision bf16", "fp32"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(*command, words=["m.onnx", "pip install onnxruntime"])


# ---- nothing is sent ---------------------------------------------------------------------------


def test_a_prediction_leaves_nothing_in_the_home_folder_and_opens_no_connection(watched):
    process, folder = watched
    said = process.communicate(timeout=120)
    assert process.returncode == 0, (process.returncode, said)
    assert (folder / "mask.png").exists()
    for name in ("home", "tmp"):
        assert list((folder / name).iterdir()) == []


def test_every_import_of_onnxruntime_comes_after_its_switch(monkeypatch, tmp_path):
    for use in (lambda: OnnxModel(tmp_path / "m.onnx"), lambda: export.check_target("m.onnx")):
        (tmp_path / "m.onnx").write_bytes(other_network().SerializeToString())
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
        use()
        assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("medseg/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not [name for name in names if name.startswith("onnxruntime")], path


def test_a_connection_would_have_been_seen(tmp_path):
    if SOCKET is None:
        pytest.skip("connections are watched on Linux with x86-64 or arm64")
    for family, status in {"UNIX": 0, "INET": -signal.SIGSYS, "INET6": -signal.SIGSYS}.items():
        code = f"{NO_NETWORK}import socket\nsocket.socket(socket.AF_{family}, socket.SOCK_DGRAM)"
        assert run_python("-c", code, cwd=tmp_path).returncode == status, family


# ---- weights in half precision ---------------------------------------------------------------


def test_half_precision_is_half_the_file_and_the_same_masks(place, capsys):
    """Every weight is the nearest float16; what is not a convolution's weight stays as it was."""
    model = make_model("tutorial", n_filters=8, norm="batch")
    torch.save(model.state_dict(), "own.pth")
    predict.main(["--model", "own.pth", "--export", "half.pth"])
    assert re.search(r"half\.pth.* \d\.\de-\d\d ", capsys.readouterr().out)  # the difference
    assert os.path.getsize("half.pth") < 0.52 * os.path.getsize("own.pth")
    half = predict.load_model("half.pth", "cpu")
    assert half.architecture == model.architecture and half.image_size == model.image_size
    for name, weight in model.state_dict().items():
        rounded = weight.numpy().astype(np.float16) if weight.dim() > 1 else weight.numpy()
        np.testing.assert_array_equal(half.state_dict()[name].numpy(), rounded, name)
        assert half.state_dict()[name].dtype == weight.dtype
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 50), np.uint8)).save("scan.png")
    masks = []
    for name in ("own", "half"):
        predict.main(["scan.png", "--model", f"{name}.pth", "--output", f"{name}.png"])
        masks.append(np.asarray(Image.open(f"{name}.png")) > 0)
    assert masks[0].any() and (masks[0] ^ masks[1]).mean() < 0.01


def test_half_precision_that_would_spoil_the_weights_is_refused(place, refused):
    model = make_model("tutorial", depth=1)
    model.down1.conv1.weight.data[0, 0, 0, 0] = 1e6  # float16 ends at 65504
    torch.save(model.state_dict(), "own.pth")
    command = ("predict", "--model", "own.pth", "--export")
    refused(*command, "half.pth", words=["half.pth"])
    assert not os.path.exists("half.pth")
    before = (place / "own.pth").read_bytes()
    for target in ("own.pth", "best_model.pth"):  # weights that were trained are not replaced
        refused(*command, target, words=[target])
    assert (place / "own.pth").read_bytes() == before


# ---- tools/parity.py -------------------------------------------------------------------------


def test_parity_counts_pixels_and_dice_by_hand(dataset, monkeypatch, capsys):
    """One stand-in marks all that is annotated, the other a row of pixels less in two images."""

    class Marks:
        image_size, n_channels, n_classes, class_names = 48, 3, 1, ("foreground",)
        exclusive = True

        def __init__(self, rows_less):
            self.rows_less = list(rows_less)

        def probabilities(self, pixels):
            bright = (pixels[..., 0] > 200)[:, None].astype(np.float32)
            rows = np.flatnonzero(bright[0, 0].any(1))
            bright[0, 0, rows[len(rows) - self.rows_less.pop(0) :]] = 0
            return bright

    stand_ins = {"fp32": Marks([0, 0, 0, 0]), "other": Marks([1, 0, 0, 1])}
    monkeypatch.setattr(parity, "open_models", lambda path, folder: stand_ins)
    parity.compare_masks("weights", dataset / "test", None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"4 images, {4 * 48 * 48} pixels")
    assert lines[2] == "| fp32 | 0 | 0 | 1.000000 |"
    dice = 2 * (1024 - 32) / (1024 - 32 + 1024)  # four squares of 16x16
    assert lines[3] == f"| other | 32 | 2 | {dice:.6f} |"


def test_parity_of_every_format(dataset, tmp_path, capsys):
    torch.save(make_model("tutorial", depth=1).state_dict(), tmp_path / "own.pth")
    parity.main(["--images", str(dataset / "test"), "--model", str(tmp_path / "own.pth")])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == ["fp32", "bf16", *export.available_formats()]
    for name, pixels, images, _ in rows:
        assert int(pixels) < (100 if "bf16" in name else 3) and int(images) <= 4


def test_parity_of_networks_shows_each_difference_or_why_there_is_none(monkeypatch, capsys):
    def write(model, path):
        if path.suffix == ".pt2":
            raise ValueError("too old")
        return 2e-7

    monkeypatch.setattr(export, "export", write)
    parity.compare_networks({"small": make_model("tutorial", depth=1)}, ROOT)
    *_, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(export.FORMATS, row.strip("| ").split(" | ")[2:], strict=True))
    assert cells == {**dict.fromkeys(export.FORMATS, "2.0e-07"), ".pt2": "too old"}


# ---- torch.hub -------------------------------------------------------------------------------


def test_torch_hub_loads_a_clone(tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("hubconf.py", "net.py"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "medseg", clone / "medseg", ignore=shutil.ignore_patterns("__pycache__"))
    weights = tmp_path / "weights.pth"
    torch.save(make_model("group").state_dict(), weights)
    code = f"""
import shutil, torch
hub = lambda **arguments: torch.hub.load({str(clone)!r}, "unet", source="local", **arguments)
model = hub(n_filters=4, norm="batch")
assert model.training and model.n_filters == 4 and model.down1.norm1.num_features == 4
model = hub(weights={str(weights)!r})
assert not model.training and model.n_classes == 2
for arguments in ({{"pretrained": True}}, {{"pretrained": True, "n_filters": 4}}):
    try:
        hub(**arguments)
    except (FileNotFoundError, ValueError) as error:
        print(str(error))
(clone := __import__("pathlib").Path({str(clone)!r}) / "dataset").mkdir()
shutil.copy({str(weights)!r}, clone / "tumor.pth")
assert torch.equal(hub(pretrained=True).outc.bias, model.outc.bias)
"""
    said = assert_done(run_python("-c", code, cwd=tmp_path, PYTHONPATH=""))
    missing, arguments = said.splitlines()
    assert "dataset/tumor.pth" in missing and "weights=PATH" in missing
    assert arguments.startswith("n_filters")


def test_hub_dependencies_are_required():
    tree = ast.parse((ROOT / "hubconf.py").read_text())
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    required = (ROOT / "requirements.txt").read_text()
    for name in ast.literal_eval(names):
        assert {"PIL": "pillow"}.get(name, name) in required


# ---- several models --------------------------------------------------------------------------


def test_weights_and_an_export_predict_together(exported, tmp_path):
    export_file = exported("group", ".onnx")
    paths = [str(export_file), str(export_file.with_suffix(".pth"))]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    single = [predict.open_model(path, "cpu").predict(image) for path in paths]
    both = predict.open_models(paths, "cpu", "auto", 0)
    np.testing.assert_allclose(both.predict(image), np.mean(single, 0), atol=1e-6)
    images, _ = predict.preprocess_image(image, image_size=both.image_size, n_channels=1)
    np.testing.assert_allclose(both.run(images)[0], np.mean(single, 0), atol=1e-5)
    image.save(tmp_path / "scan.png")
    # Of exports alone, PyTorch is not loaded.
    code = (
        f"import sys, predict\npredict.main(['scan.png', '--model', *{[paths[0]] * 2}])\n"
        "assert 'torch' not in sys.modules"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "scan_mask.png").exists()
