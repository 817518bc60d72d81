"""Several models as one: the mean of their probabilities."""

import numpy as np

from medseg.inference import PLAIN, combine
from medseg.predicting.models import Model
from medseg.tiles import combine_tilings

# What the members have in common, and what to call it.
COMMON = {
    "class_names": "classes",
    "image_size": "image size",
    "n_channels": "channels",
    "window": "window",
    "orientation": "orientation",
}


class Ensemble(Model):
    """Models of the same images and classes, each a TorchModel or an OnnxModel.

    paths: their files. Raises ValueError that names the first one that differs.
    """

    def __init__(self, models, paths):
        for name, what in COMMON.items():
            expected = getattr(models[0], name)
            for model, path in zip(models, paths, strict=True):
                if getattr(model, name) != expected:
                    raise ValueError(
                        f"{path}: {what} {_spell(getattr(model, name))}, but {paths[0]} has "
                        f"{_spell(expected)}: models predict together only where they agree"
                    )
        self.models, devices = models, {str(model.device) for model in models}
        # An ONNX file takes its images from the CPU; weights fetch them.
        self.device = models[0].device if len(devices) == 1 else "cpu"
        super().__init__(models[0], str(self.device).partition(":")[0])
        self.recorded = combine([model.recorded for model in models])
        self.inference = self.recorded or PLAIN
        flips = {model.trained_flips for model in models}
        self.trained_flips = flips.pop() if len(flips) == 1 else ()
        self.exclusive = all(model.exclusive for model in models)
        orders = [model.draw_order for model in models if model.draw_order]
        self.draw_order = orders[0] if orders else ()
        self.tiling = combine_tilings([model.tiling for model in models])
        for model in models:
            model.tiling = None  # each gets the tiles of all
        self.batch_size = min(model.batch_size for model in models)
        timed = [model for model in models if model.precision_note]
        self.precision = (timed or models)[0].precision
        self.precision_note = (timed or models)[0].precision_note

    @property
    def inference(self):
        """That of every member: each averages over the flips."""
        return self.models[0].inference

    @inference.setter
    def inference(self, inference):
        for model in self.models:
            model.inference = inference

    def members(self):
        """The models that are averaged."""
        return self.models

    def predict_part(self, pixels):
        """uint8 (B, n_channels, H, W) -> float32 (B, n_classes, H, W), values 0..1."""
        pixels = np.moveaxis(pixels, 1, -1)
        return sum(model.probabilities(pixels) for model in self.models) / len(self.models)

    def run(self, images):
        """Normalised images (B, n_channels, H, W) -> probabilities of one pass through each."""
        return sum(model.run(images) for model in self.models) / len(self.models)


def _spell(value):
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
