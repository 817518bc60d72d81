"""Files of weights: read without trusting them, written whole; those that the repository has."""

import warnings
import zipfile
from pathlib import Path

import torch

from medseg.cli import one_line
from medseg.files import atomic_write

# docs/pretrained.md tells how they were made.
PRETRAINED = Path(__file__).parents[1] / "dataset" / "tumor.pth"
ABOUT_PRETRAINED = "brain tumours in MRI slices, test Dice 0.77"


def load_weights(path):
    """What torch.save wrote to `path`, on the CPU: tensors and plain containers, never code.

    Raises FileNotFoundError; ValueError where the file is damaged or holds anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters about an odd file is an error below
            if zipfile.is_zipfile(path):  # torch.load does not look at the file's checksums
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        raise ValueError(f"wrong checksum of {part}")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; `python train.py` writes it") from None
    except Exception as error:  # RuntimeError, EOFError, UnpicklingError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__  # PyTorch's goes on
        raise ValueError(
            f"{path}: not saved by PyTorch, damaged, or more than weights ({reason})"
        ) from None


def save_weights(path, state):
    """torch.save to a file that is whole or absent."""
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what PyTorch makes of an OSError while writing
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(one_line(error)) from None


def pretrained_path():
    """PRETRAINED as it is seen from the current folder, or None where it was removed."""
    if not PRETRAINED.exists():
        return None
    here = Path.cwd()
    return PRETRAINED.relative_to(here) if PRETRAINED.is_relative_to(here) else PRETRAINED


def default_model():
    """The weights to use where none are named: best_model.pth, else PRETRAINED, and says so."""
    own, path = Path("best_model.pth"), pretrained_path()
    if own.exists() or path is None:
        return str(own)
    print(f"no {own} here: taking {path} ({ABOUT_PRETRAINED}; see docs/pretrained.md)")
    return str(path)
