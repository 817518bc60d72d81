"""Named sets of flags, as plain values; what the command line gives besides wins."""

from medseg.augment import SLIGHT

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
        "augment": {"rotate": 180.0, "scale": 0.1, "contrast": 0.1, "brightness": 0.1, "flip": 1.0},
    },
}
# Of --synthetic without --recipe: about a minute on two cores, to a Dice above 0.8.
PHANTOMS = {
    "image_size": 64,
    "n_filters": 8,
    "norm": "batch",
    "prior": 0.04,
    "epochs": 10,
    "batch_size": 8,
    "lr": 2e-3,
    "schedule": "cosine",
}
