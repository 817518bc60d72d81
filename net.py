"""The U-Net of the tutorial's section 3: five levels down, a bottleneck, five levels up.

    from net import UNet
    model = UNet(n_filters=32)                       # 31,094,497 parameters
    probabilities = model(torch.rand(1, 3, 256, 256))  # (1, 1, 256, 256), values 0..1

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, https://arxiv.org/abs/1505.04597. Unlike the paper's, these convolutions are padded,
so the output is as large as the input.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

from medseg.cli import one_line
from medseg.images import IMAGE_SIZE
from medseg.inference import read_flips, read_inference
from medseg.layers import Architecture
from medseg.ood import count_features, read_statistics
from medseg.settings import read_settings
from medseg.weights import load_weights

TUTORIAL = Architecture()


@contextmanager
def _refuse_other_weights():
    """Turn whatever goes wrong with the weights of something else into one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of many kinds
        raise ValueError(f"not the weights of a UNet: {one_line(error)}") from None


class DownBlock(nn.Module):
    """Two 3x3 convolutions, then (where max_pooling) a halving of both sides.

    (B, in_channels, H, W) -> x (B, out_channels, H/2, W/2), skip (B, out_channels, H, W).
    """

    def __init__(
        self, in_channels, out_channels, dropout_prob=0, max_pooling=True, *, layers=TUTORIAL
    ):
        super().__init__()
        self.conv1 = layers.conv3x3(in_channels, out_channels)
        self.conv2 = layers.conv3x3(out_channels, out_channels)
        self.norm1 = layers.make_norm(out_channels)
        self.norm2 = layers.make_norm(out_channels)
        self.relu = layers.make_activation()
        self.drop_channels = layers.make_channel_dropout()
        self.maxpool = layers.make_down(out_channels) if max_pooling else None
        self.dropout = nn.Dropout(dropout_prob) if dropout_prob > 0 else None

    def forward(self, x):
        x = self.relu(self.drop_channels(self.norm1(self.conv1(x))))
        x = self.relu(self.drop_channels(self.norm2(self.conv2(x))))
        if self.dropout is not None:
            x = self.dropout(x)
        skip = x
        if self.maxpool is not None:
            x = self.maxpool(x)
        return x, skip


class UpBlock(nn.Module):
    """Double both sides, append the encoder's features of that size, then two 3x3 convolutions.

    x (B, in_channels, H, W), skip (B, out_channels, 2H, 2W) -> (B, out_channels, 2H, 2W).
    """

    def __init__(self, in_channels, out_channels, *, layers=TUTORIAL):
        super().__init__()
        self.up = layers.make_up(in_channels, out_channels)
        self.conv1 = layers.conv3x3(out_channels * 2, out_channels)
        self.conv2 = layers.conv3x3(out_channels, out_channels)
        self.norm1 = layers.make_norm(out_channels)
        self.norm2 = layers.make_norm(out_channels)
        self.relu = layers.make_activation()
        self.drop_channels = layers.make_channel_dropout()

    def forward(self, x, skip):
        x = self.up(x)
        x = torch.cat([x, skip], dim=1)
        x = self.relu(self.drop_channels(self.norm1(self.conv1(x))))
        x = self.relu(self.drop_channels(self.norm2(self.conv2(x))))
        return x


class UNet(nn.Module):
    """(B, n_channels, H, W), any H, W >= 1 -> probabilities (B, n_classes, H, W), float32, 0..1.

    The names of its weights and their shapes are the tutorial's, so either's `best_model.pth`
    loads in the other. architecture: depth, norm, up, ... of `medseg.layers.Architecture`, whose
    defaults are the tutorial's. `image_size` is the side in pixels the model is trained at, or None
    where images keep their own: it changes no arithmetic and tells predict.py how to resize.
    `class_names`: a name for each class, by default "1", "2", ... or, of a single one,
    "foreground". `window` and `orientation`: what was done to the grey values and the axes of
    DICOM and NIfTI files at their import, which prediction repeats; see
    `medseg.settings.read_settings`. `inference`: how masks are made of the probabilities, a
    `medseg.inference.Inference`, where that was chosen on valid. `trained_flips`: names of
    `medseg.inference.VIEWS` that the training has shown; `feature_statistics`: what its images look
    like, a `medseg.ood.FeatureStatistics`; `exclusive`: whether a pixel has one class, as in the
    masks of the training; `draw_order`: if not, the numbers of the classes in the order in which
    they are drawn, else (). All of it travels in the state dict's metadata.
    """

    def __init__(
        self,
        n_channels=3,
        n_classes=1,
        n_filters=32,
        *,
        image_size=IMAGE_SIZE,
        class_names=None,
        window=None,
        orientation=None,
        inference=None,
        trained_flips=(),
        feature_statistics=None,
        exclusive=True,
        draw_order=(),
        **architecture,
    ):
        super().__init__()
        settings = read_settings({"window": window, "orientation": orientation})
        self.window, self.orientation = settings["window"], settings["orientation"]
        self.inference, self.trained_flips = inference, tuple(trained_flips)
        self.feature_statistics, self.exclusive = feature_statistics, exclusive
        self.draw_order = tuple(draw_order)
        self.image_size, self.n_channels, self.n_classes = image_size, n_channels, n_classes
        self.n_filters, self.architecture = n_filters, Architecture(**architecture)
        self.class_names = tuple(class_names or default_class_names(n_classes))
        if len(self.class_names) != n_classes:
            raise ValueError(f"{len(self.class_names)} class names for {n_classes} classes")
        layers, depth = self.architecture, self.architecture.depth

        # Encoder: down1 to down5 in the tutorial. Its channels are 32, 64, 128, 256 and 512, its
        # sides 128, 64, 32, 16 and 8 for a 256x256 input.
        channels = [n_filters * 2**level for level in range(depth + 1)]
        for level in range(depth):
            in_channels = channels[level - 1] if level else n_channels
            block = DownBlock(in_channels, channels[level], layers=layers)
            self.add_module(f"down{level + 1}", block)

        self.bottleneck = DownBlock(
            channels[depth - 1],
            channels[depth],
            dropout_prob=0.4 if layers.dropout == "bottleneck" else 0,
            max_pooling=False,
            layers=layers,
        )

        # Decoder: up1 to up5, from the deepest level to the first.
        for level in reversed(range(depth)):
            block = UpBlock(channels[level + 1], channels[level], layers=layers)
            self.add_module(f"up{depth - level}", block)

        self.outc = nn.Conv2d(n_filters, n_classes, 1)
        self.sigmoid = nn.Sigmoid()
        self.register_state_dict_post_hook(_record_metadata)

    def forward(self, x):
        # Always pad and crop, by arithmetic on the sides: an `if` would be decided once and for
        # all when the network is exported.
        height, width = x.shape[-2:]
        bottom, right = self._padding(height), self._padding(width)
        # Repeat the border: a black frame would be an edge that is not in the image.
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")

        skips = []
        for level in range(1, self.architecture.depth + 1):
            x, skip = self.get_submodule(f"down{level}")(x)
            skips.append(skip)

        x, _ = self.bottleneck(x)

        for level in range(1, self.architecture.depth + 1):
            x = self.get_submodule(f"up{level}")(x, skips.pop())

        # In bfloat16 sigmoid(7) is exactly 1, whose logarithm the loss needs: float32 from here on.
        with _without_autocast(x.device.type):
            logits = self.outc(x.float())
        return self.sigmoid(F.pad(logits, (0, -right, 0, -bottom)))

    def _padding(self, side):
        """Pixels to add to a side: every level halves it, and a reflection needs two at the end."""
        stride = 2**self.architecture.depth
        strides = (side + stride - 1) // stride
        if self.architecture.padding == "reflect":
            # One becomes two. As strides + 1 // strides, onnxruntime 1.31 would rewrite it wrongly:
            # it takes 1 / n * m for m / n, even where the division is of integers.
            strides = strides + 2 // (strides + 1)
        return strides * stride - side

    @classmethod
    @_refuse_other_weights()
    def from_state_dict(cls, state):
        """The UNet that these weights belong to, read off their shapes and metadata.

        state: mapping of names to tensors, as `UNet.state_dict()` gives and as the tutorial saves.
        Raises ValueError where it is not one, or where metadata and tensors contradict each other.
        """
        arguments = _read_arguments(state)
        n_filters, depth = arguments["n_filters"], arguments["depth"]
        # Before memory is taken for a network that a few bytes claim to be: are its largest
        # weights there?
        largest, width = state.get("bottleneck.conv2.weight"), 2**depth * n_filters
        complete = getattr(largest, "shape", None) == (width, width, 3, 3)
        if not complete or largest.untyped_storage().nbytes() < largest.numel():
            raise ValueError(
                f"bottleneck.conv2.weight does not fit {n_filters} filters and {depth} levels"
            )
        with torch.device("meta"):  # random weights, to be replaced at once, would cost time
            model = cls(**arguments)
        own = model.state_dict()
        expected = {name: tuple(weight.shape) for name, weight in own.items()}
        shapes = {name: getattr(weight, "shape", None) for name, weight in state.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise ValueError(
                    f"{name} has shape {shapes.get(name)}, but with {n_filters} filters it has "
                    f"{expected.get(name)}"
                )
        copies = {name: state[name].to("cpu", own[name].dtype, copy=True) for name in own}
        model.load_state_dict(copies, assign=True)
        return model


def _without_autocast(device_type):
    """A context that ends autocast; where there is none it does nothing, for exporters' sake."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _read_arguments(state):
    """The arguments of the UNet that a state dict belongs to, those of `Architecture` among them.

    Weights of the tutorial have no metadata; those of an earlier version name no architecture, and
    of what it can be they had a normalisation only.
    """
    if not isinstance(state, dict) or not {"down1.conv1.weight", "outc.weight"} <= state.keys():
        raise ValueError("no down1.conv1.weight and outc.weight in it")
    n_filters, n_channels = state["down1.conv1.weight"].shape[:2]
    n_classes = state["outc.weight"].shape[0]
    metadata = getattr(state, "_metadata", {}).get("", {})
    image_size = metadata.get("image_size", IMAGE_SIZE)
    if image_size is not None and not (type(image_size) is int and 1 <= image_size <= 8192):
        raise ValueError(f"trained at image size {image_size!r:.20}?")
    names = metadata.get("class_names", default_class_names(n_classes))
    if len(names) != n_classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class names {names!r:.80}?")
    architecture = metadata.get("architecture")
    if architecture is None:
        norm = "batch" if "down1.norm1.running_mean" in state else "group"
        architecture = {"norm": norm if "down1.norm1.weight" in state else None}
    architecture = Architecture(**architecture).as_dict()
    n_features = count_features(n_filters, architecture["depth"])
    return {
        "n_channels": n_channels,
        "n_classes": n_classes,
        "n_filters": n_filters,
        "image_size": image_size,
        "class_names": names,
        "inference": read_inference(metadata.get("inference")),
        "trained_flips": read_flips(metadata.get("trained_flips", [])),
        "feature_statistics": read_statistics(metadata.get("feature_statistics"), n_features),
        **read_settings(metadata),
        "exclusive": metadata.get("exclusive") is not False,  # weights without it: as they did
        "draw_order": read_draw_order(metadata, n_classes),
        **architecture,
    }


def read_draw_order(metadata, n_classes):
    """The numbers of classes that overlap, a tuple in the order in which they are drawn, or ().

    Older weights do not record it: the classes as they are numbered.
    """
    if metadata.get("exclusive") is not False:
        return ()
    numbers = range(1, n_classes + 1)
    order = tuple(metadata.get("draw_order") or numbers)
    if sorted(order) != list(numbers):
        raise ValueError(f"classes drawn in the order {order!r:.60}")
    return order


def load_model(path):
    """The UNet in a file of weights, ours or the tutorial's, on the CPU.

    Raises FileNotFoundError; ValueError where the file holds no UNet.
    """
    weights = load_weights(path)
    try:
        return UNet.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def copy_weights(source, model):
    """Start a UNet from another one's weights; its last layer stays new where classes differ.

    A single class is taken for the other's whatever it is called. Returns whether the last layer
    was copied too.
    """
    weights, single = source.state_dict(), source.n_classes == model.n_classes == 1
    same_classes = single or source.class_names == model.class_names
    if not same_classes:
        own = model.state_dict()
        weights.update({name: own[name] for name in ("outc.weight", "outc.bias")})
    model.load_state_dict(weights)
    return same_classes


def class_names(model):
    """The names of the classes of a UNet; any other model has one, "foreground"."""
    return getattr(model, "class_names", default_class_names(1))


def default_class_names(n_classes):
    if n_classes == 1:
        return ("foreground",)
    return tuple(str(number + 1) for number in range(n_classes))


def _record_metadata(model, state, prefix, metadata):
    """Hook of `state_dict`: what is not in the tensors travels with the weights."""
    metadata["architecture"] = model.architecture.as_dict()
    metadata["image_size"] = model.image_size
    metadata["class_names"] = list(model.class_names)
    metadata["window"], metadata["orientation"] = model.window, model.orientation
    if model.inference is not None:
        metadata["inference"] = model.inference.as_dict()
    if not model.exclusive:
        metadata["exclusive"], metadata["draw_order"] = False, list(model.draw_order)
    if model.trained_flips:
        metadata["trained_flips"] = list(model.trained_flips)
    if model.feature_statistics is not None:
        metadata["feature_statistics"] = model.feature_statistics.as_dict()
