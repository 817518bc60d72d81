"""`ModelInfo`: what travels with weights besides the tensors, as metadata of their state dict."""

from dataclasses import dataclass, fields

from medseg.images import IMAGE_SIZE
from medseg.inference import Inference, read_flips, read_inference
from medseg.layers import Architecture
from medseg.ood import FeatureStatistics, count_features, read_statistics
from medseg.settings import OF_IMPORT, channel_names, read_settings


@dataclass
class ModelInfo:
    """What prediction, and a training that goes on from them, have to know of weights.

    architecture: the layers. image_size: the side in pixels that the network was trained at, or
    None where images keep their own. class_names: a name for each class. window, orientation,
    channels, pattern, context: what the import did, which prediction repeats; see
    `medseg.settings.read_settings`. inference: how masks are made of the
    probabilities, where that was chosen on valid, else None. trained_flips: names of
    `medseg.inference.VIEWS` that the training has shown. feature_statistics: what its images look
    like, or None. draw_order: the numbers of classes that overlap in the masks of the training, in
    the order in which they are drawn; () where a pixel has one class.
    """

    architecture: Architecture = Architecture()
    image_size: int | None = IMAGE_SIZE
    class_names: tuple = ("foreground",)
    window: tuple | str | None = None
    orientation: str | None = None
    channels: tuple = ()
    pattern: str | None = None
    context: int = 0
    inference: Inference | None = None
    trained_flips: tuple = ()
    feature_statistics: FeatureStatistics | None = None
    draw_order: tuple = ()

    def __post_init__(self):
        vars(self).update(read_settings(vars(self)))

    @classmethod
    def of(cls, n_classes=1, *, class_names=None, **settings):
        """That of so many classes; settings: further fields, or those of `Architecture`."""
        own = {field.name for field in fields(cls)} & settings.keys()
        info = cls(**{name: settings.pop(name) for name in own})
        if settings:
            info.architecture = Architecture(**settings)
        numbers = [str(number) for number in range(1, n_classes + 1)]
        info.class_names = tuple(class_names or (numbers if n_classes > 1 else info.class_names))
        if len(info.class_names) != n_classes:
            raise ValueError(f"{len(info.class_names)} class names for {n_classes} classes")
        return info

    @classmethod
    def from_metadata(cls, metadata, n_classes, n_filters):
        """Read leniently: what is missing is as in the tutorial's weights, what is unknown is left.

        metadata: a dict, as `as_metadata` gives it. Raises ValueError, or another error, where it
        is of no such network.
        """
        known = {field.name for field in fields(Architecture)} & metadata["architecture"].keys()
        layers = Architecture(**{name: metadata["architecture"][name] for name in known})
        n_features = count_features(n_filters, layers.depth)
        # Earlier versions recorded no order: that of the numbers.
        order = metadata.get("draw_order") or range(1, n_classes + 1)
        plain = {"image_size", "class_names", *OF_IMPORT} & metadata.keys()
        return cls.of(
            n_classes,
            architecture=layers,
            inference=read_inference(metadata.get("inference")),
            trained_flips=read_flips(metadata.get("trained_flips", [])),
            feature_statistics=read_statistics(metadata.get("feature_statistics"), n_features),
            draw_order=() if metadata.get("exclusive", True) else tuple(order),
            **{name: metadata[name] for name in plain},
        )

    @property
    def channel_names(self):
        """Of all channels, see `medseg.settings.channel_names`."""
        return channel_names(self.channels, self.context)

    @property
    def exclusive(self):
        """Whether a pixel has one class."""
        return not self.draw_order

    def as_metadata(self):
        """Plain values, which JSON has too."""
        return {
            **vars(self),
            "architecture": dict(vars(self.architecture)),
            "inference": self.inference and self.inference._asdict(),
            "feature_statistics": self.feature_statistics and self.feature_statistics.as_dict(),
            "exclusive": self.exclusive,
        }
