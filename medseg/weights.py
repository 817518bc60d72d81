"""Files of weights: read without trusting them, written whole or not at all."""

import os
import warnings
import zipfile
from contextlib import suppress

import torch

from medseg.cli import one_line
from medseg.files import atomic_write, check_regular


def load_weights(path):
    """What torch.save wrote to `path`, on the CPU: tensors and plain containers, never code.

    Raises FileNotFoundError; ValueError where the file is damaged or holds anything else.
    """
    check_regular(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters about an odd file is an error below
            if zipfile.is_zipfile(path):  # torch.load does not look at the file's checksums
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        raise ValueError(f"wrong checksum of {part}")
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content)
        return content
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; `python train.py` writes it") from None
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not saved by PyTorch, damaged, or more than weights ({reason})"
        ) from None


def check_tensors(content):
    """ValueError where a tensor in nested dicts and lists is more, or less, than an array."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for part in content:
            check_tensors(part)
    elif isinstance(content, torch.Tensor):
        dense = content.layout == torch.strided and content.device.type == "cpu"
        if not dense or content.is_quantized or content.is_nested or content.is_complex():
            raise ValueError("a tensor is sparse, quantised, nested, complex or without its data")


def save_weights(path, state, *, previous=None):
    """torch.save to a file that is whole or absent; `previous`: where the file before it goes."""
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what PyTorch makes of an OSError while writing
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(one_line(error)) from None
        if previous:
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.replace(path, previous)
