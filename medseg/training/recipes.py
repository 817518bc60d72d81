"""Named sets of flags: recipes, and what --arch and --loss stand for."""

import argparse

from medseg.images import IMAGE_SIZE
from medseg.layers import ARCHITECTURES, Architecture

# Named sets of flags; what the command line gives besides wins.
RECIPES = {
    "tutorial": {},
    "strong": {
        "norm": "batch",
        "prior": 0.04,
        "lr": 1e-3,
        "weight_decay": 0.01,
        "warmup": 100,
        "ema": 0.995,
        "augment": "rotate=5,scale=0.1,shift=0.05,contrast=0.1,brightness=0.1",
    },
    "vessels": {
        "crop": 128,
        "depth": 3,
        "n_filters": 16,
        "norm": "batch",
        "dropout": "none",
        "prior": 0.1,
        "epochs": 80,
        "patience": 80,
        "batch_size": 8,
        "lr": 2e-3,
        "schedule": "cosine",
        "ema": 0.99,
        "augment": "rotate=180,scale=0.1,contrast=0.1,brightness=0.1,flip=1",
    },
}
LOSSES = {"dice": (1.0, 100.0), "bce": (1.0, 100.0), "focal": (1.0, 100.0)}  # for `parse_words`
N_FILTERS = {"tutorial": 32, "drive": 64, "study": 64}  # of the first level, as published


def arch_flags(arch):
    """The flags that --arch sets besides, as a dict."""
    return {**_word_flags(Architecture(**ARCHITECTURES[arch])), "n_filters": N_FILTERS[arch]}


def _word_flags(words):
    """The words of an `Architecture` that have a flag of their own."""
    return {"depth": words.depth, "norm": words.norm or "none", "dropout": words.dropout}


def network_words(args):
    """The words of `medseg.layers.Architecture` that --arch and the flags beside it give."""
    norm = None if args.norm == "none" else args.norm
    own = {"depth": args.depth, "norm": norm, "dropout": args.dropout}
    words = {**ARCHITECTURES[args.arch], **own}
    if norm is None:
        words.pop("bias", None)  # left out only where a normalisation has one
    return words


def network_flags(model, path):
    """The flags that make the UNet in the file `path`, as a dict. ValueError where none do."""
    words = model.architecture
    flags = _word_flags(words)
    for arch in ARCHITECTURES:
        named = argparse.Namespace(arch=arch, **flags)
        if Architecture(**network_words(named)) == words:
            flags |= {"arch": arch, "n_filters": model.n_filters, "n_channels": model.n_channels}
            return {**flags, "image_size": model.image_size or IMAGE_SIZE}
    raise ValueError(f"{path}: its network is none that --arch has a name for")
