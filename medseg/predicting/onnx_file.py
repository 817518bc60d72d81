"""An ONNX file before onnxruntime sees it: whose it is, what it says of its network.

onnxruntime tells a file's metadata only once it has made a session of it. By then it has read what
lies in other files (version 1.32 those beside it, 1.20 any of the machine) and run parts of the
network. So the structure is walked here first, and any file is refused that keeps weights
elsewhere or was not written by `medseg.predicting.export`.
"""

import importlib
import json
import mmap
import os

from medseg.cli import one_line
from medseg.files import check_regular
from medseg.inference import read_flips, read_inference
from medseg.settings import read_settings
from medseg.tiles import read_tiling

KEYS = ("class_names", "image_size", "n_channels", "mean", "std")  # of the metadata, JSON each
# Where DICOM or NIfTI files were trained on; where threshold, flips and pieces were chosen; where
# flips were trained. And how images of their own size may be divided into tiles.
OPTIONAL_KEYS = ("window", "orientation", "inference", "trained_flips", "tiling")
MAX_FIELDS, MAX_TEXT = 1_000_000, 100_000  # of a file's structure; bytes of one metadata value

# The parts of an ONNX file (onnx.proto) in which a tensor can lie: {message: {field: message}}.
MESSAGES = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {
        **{5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
        **{22: "sparse tensor", 23: "sparse tensor"},
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
METADATA, EXTERNAL_DATA, DATA_LOCATION = 14, 13, 14  # fields: of model, tensor and tensor
VARINT, EIGHT_BYTES, LENGTH_DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types


def import_onnx_library(name):
    """The module `name`: onnxruntime, or another that may import it. Raises ImportError.

    When onnxruntime is imported, it would write a device id and a database into the home folder
    and report to its maker's server. Its own switch turns both off, also where a user set it
    otherwise: nothing that is run here may be sent.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    return importlib.import_module(name)


def not_ours(path, reason):
    """The ValueError for an ONNX file that another program wrote."""
    return ValueError(f"{path}: not written by `python predict.py --export`: {reason}")


def read_metadata(path):
    """What `export` wrote into an ONNX file: {"class_names": [str], "mean": [float], ...}.

    Raises FileNotFoundError; ValueError for a file that is damaged, keeps weights in other files,
    or has no such metadata.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _scan(data)
    except FileNotFoundError:
        hint = "`python predict.py --export` writes it"
        raise FileNotFoundError(f"{path}: no such file; {hint}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not an ONNX file that can be used: {error}") from None
    missing = [key for key in KEYS if key not in found]
    if missing:
        raise not_ours(path, f"it has no {' and '.join(missing)} in its metadata")
    try:
        keys = [key for key in (*KEYS, *OPTIONAL_KEYS) if key in found]
        return check_metadata({key: json.loads(found[key]) for key in keys})
    except (ValueError, RecursionError) as error:
        raise not_ours(path, f"metadata: {one_line(error)}") from None


def check_metadata(metadata):
    """`metadata` without optional keys of no value. ValueError where it cannot be of a UNet."""
    names, size, n_channels, mean, std = (metadata[key] for key in KEYS)
    if not isinstance(names, list) or not 1 <= len(names) <= 255:
        raise ValueError("class_names is not a list of 1 to 255 names")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("class_names holds something else than names")
    if size is not None and (type(size) is not int or not 1 <= size <= 8192):
        raise ValueError(f"image_size {size!r:.20}")
    if type(n_channels) is not int or n_channels not in (1, 3):
        raise ValueError(f"n_channels {n_channels!r:.20}")
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, list) or len(values) != n_channels:
            raise ValueError(f"{key} is not a list of {n_channels}")
        if not all(type(value) in (int, float) and abs(value) <= 1e6 for value in values):
            raise ValueError(f"{key} {values!r:.60}")
    if min(std) < 1e-6:
        raise ValueError(f"std {std!r:.60}")
    read_inference(metadata.get("inference"))
    flips = metadata.get("trained_flips")
    read_flips(flips or [])
    read_tiling(metadata.get("tiling"))
    settings = read_settings(metadata) | {key: metadata.get(key) for key in ("inference", "tiling")}
    settings["trained_flips"] = flips or None
    settings["exclusive"] = False if metadata.get("exclusive") is False else None
    settings = {key: value for key, value in settings.items() if value is not None}
    return {key: metadata[key] for key in KEYS} | settings


def _scan(data):
    """{key: text} of the metadata in `data`, bytes of an ONNX file, each field of it looked at.

    Raises ValueError where the structure is damaged, or a tensor lies in another file.
    """
    metadata, count, graphs = {}, 0, 0
    pending = [("model", 0, len(data))]
    while pending:  # not recursion, whose depth the file would decide
        message, *limits = pending.pop()
        for field, value, part in _fields(data, *limits):
            count += 1
            if count > MAX_FIELDS:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            if message == "tensor" and field in (EXTERNAL_DATA, DATA_LOCATION):
                if part or value:
                    raise ValueError("its weights lie in another file, which is not read")
            elif message == "model" and field == METADATA and part:
                entry = {key: data[slice(*text)] for key, _, text in _fields(data, *part) if text}
                if len(entry.get(2, b"")) <= MAX_TEXT:
                    key, text = (entry.get(number, b"").decode() for number in (1, 2))
                    metadata[key] = text
            elif field in MESSAGES[message] and part:
                pending.append((MESSAGES[message][field], *part))
                graphs += message == "model"
    if not graphs:
        raise ValueError("it holds no network")
    return metadata


def _fields(data, position, end):
    """Yield (field number, value, None) or (field number, None, (start, end)) of a message.

    Protocol buffers' encoding: https://protobuf.dev/programming-guides/encoding
    """
    while position < end:
        key, position = _varint(data, position, end)
        kind, value, part = key & 7, None, None
        if kind == VARINT:
            value, position = _varint(data, position, end)
        elif kind == LENGTH_DELIMITED:
            length, position = _varint(data, position, end)
            part = (position, position + length)
            position += length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            position += 8 if kind == EIGHT_BYTES else 4
        else:
            raise ValueError("not in the ONNX format")
        if position > end:
            raise ValueError("it is damaged, or only a part")
        yield key >> 3, value, part


def _varint(data, position, end):
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        value, position = value | (byte & 127) << shift, position + 1
        if byte < 128:
            return value, position
    raise ValueError("it is damaged, or not in the ONNX format")
