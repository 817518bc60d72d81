"""The weights that come with the repository; docs/pretrained.md tells how they were made."""

from pathlib import Path

PRETRAINED = Path(__file__).parents[1] / "dataset" / "tumor.pth"
ABOUT_PRETRAINED = "brain tumours in MRI slices, test Dice 0.77"


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
