"""Named sets of flags: recipes, and what --arch and --loss stand for."""

import argparse

from medseg.layers import ARCHITECTURES, Architecture

# Named sets of flags; what the command line gives besides wins.
RECIPES = {
    "tutorial": {},
    "auto": {},  # what medseg/planning finds for the data set
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
# {name: (weight where none is given, highest)}, for `medseg.cli.parse_named_values`.
LOSSES = {"dice": (1.0, 100.0), "bce": (1.0, 100.0), "focal": (1.0, 100.0)}
N_FILTERS = {"tutorial": 32, "drive": 64, "study": 64}  # of the first level, as published


def arch_flags(arch):
    """The flags that --arch sets besides, as a dict."""
    return {**_layer_flags(Architecture(**ARCHITECTURES[arch])), "n_filters": N_FILTERS[arch]}


def _layer_flags(architecture):
    """What of an `Architecture` has a flag of its own."""
    norm = architecture.norm or "none"
    return {"depth": architecture.depth, "norm": norm, "dropout": architecture.dropout}


def architecture_of(args):
    """The `Architecture` that --arch and the flags beside it give."""
    norm = None if args.norm == "none" else args.norm
    own = {"depth": args.depth, "norm": norm, "dropout": args.dropout}
    settings = {**ARCHITECTURES[args.arch], **own}
    if norm is None:
        settings.pop("bias", None)  # left out only where a normalisation has one
    return Architecture(**settings)


def network_flags(model, path):
    """The flags that make the UNet in the file `path`, as a dict. ValueError where none do."""
    flags = _layer_flags(model.architecture)
    for arch in ARCHITECTURES:
        if architecture_of(argparse.Namespace(arch=arch, **flags)) == model.architecture:
            flags = {"arch": arch, **flags, "n_filters": model.n_filters}
            return {**flags, "n_channels": model.n_channels}
    raise ValueError(f"{path}: its network is none that --arch has a name for")
