"""Named sets of flags, the recipes, and what --loss takes."""

from medseg.augment import SLIGHT

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
        "augment": SLIGHT,
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
