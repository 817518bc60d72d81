"""The U-Net of the tutorial's section 3: five levels down, a bottleneck, five levels up.

    from net import UNet
    model = UNet(n_filters=32)                       # 31,094,497 parameters
    probabilities = model(torch.rand(1, 3, 256, 256))  # (1, 1, 256, 256), values 0..1

A library: `python train.py --synthetic` trains it, `python predict.py IMAGE` uses it, and
docs/networks.md has the settings of its layers.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, https://arxiv.org/abs/1505.04597. Unlike the paper's, these convolutions are padded,
so the output is as large as the input.
"""

from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

from medseg.files import name_file
from medseg.layers import Architecture
from medseg.model_info import ModelInfo
from medseg.weights import load_weights

TUTORIAL = Architecture()


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
    loads in the other. info: its `ModelInfo`, or in its place fields of it, or of
    `medseg.layers.Architecture`, as keywords: depth, norm, up, ... By default the tutorial's.
    """

    def __init__(self, n_channels=3, n_classes=1, n_filters=32, *, info=None, **settings):
        super().__init__()
        self.info = info or ModelInfo.of(n_classes, **settings)
        self.n_channels, self.n_classes, self.n_filters = n_channels, n_classes, n_filters
        self.architecture = self.info.architecture
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
    def from_state_dict(cls, state):
        """The UNet that these weights belong to, read off their shapes and metadata.

        state: mapping of names to tensors, as `UNet.state_dict()` gives and as the tutorial saves.
        Raises ValueError, or another error, where it is not one.
        """
        if "down1.conv1.weight" not in state:
            raise ValueError("not the weights of a UNet: no down1.conv1.weight in it")
        n_filters, n_channels = state["down1.conv1.weight"].shape[:2]
        n_classes = len(state["outc.weight"])
        metadata = dict(getattr(state, "_metadata", {}).get("", {}))
        if metadata.get("architecture") is None:  # the tutorial's, or of an earlier version
            norm = "batch" if "down1.norm1.running_mean" in state else "group"
            metadata["architecture"] = {"norm": norm if "down1.norm1.weight" in state else None}
        info = ModelInfo.from_metadata(metadata, n_classes, n_filters)
        with torch.device("meta"):  # random weights, to be replaced at once, would cost time
            model = cls(n_channels, n_classes, n_filters, info=info)
        dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
        copies = {
            name: weight.to("cpu", dtypes.get(name), copy=True) for name, weight in state.items()
        }
        model.load_state_dict(copies, assign=True)
        return model


def _without_autocast(device_type):
    """A context that ends autocast; where there is none it does nothing, for exporters' sake."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def load_model(path):
    """The UNet in a file of weights, ours or the tutorial's, on the CPU.

    Raises FileNotFoundError; ValueError where the file holds no UNet.
    """
    state = load_weights(path)
    with name_file(path):
        return UNet.from_state_dict(state)


def copy_weights(source, model):
    """Start a UNet from another one's weights; its last layer stays new where classes differ.

    A single class is taken for the other's whatever it is called. Returns whether the last layer
    was copied too. Raises ValueError where they take other channels.
    """
    names = [one.info.channels for one in (source, model)]
    if source.n_channels != model.n_channels or (all(names) and names[0] != names[1]):
        taken, wanted = (
            f"{one.n_channels} channels ({', '.join(one.info.channels) or 'no names'})"
            for one in (source, model)
        )
        raise ValueError(f"the weights to start from take {taken}, and the images have {wanted}")
    weights, single = source.state_dict(), source.n_classes == model.n_classes == 1
    same_classes = single or source.info.class_names == model.info.class_names
    if not same_classes:
        own = model.state_dict()
        weights.update({name: own[name] for name in ("outc.weight", "outc.bias")})
    model.load_state_dict(weights)
    return same_classes


def info_of(model):
    """The `ModelInfo` of a UNet; of any other model, that of the tutorial's."""
    return getattr(model, "info", None) or ModelInfo()


def _record_metadata(model, state, prefix, metadata):
    """Hook of `state_dict`: what is not in the tensors travels with the weights."""
    metadata |= model.info.as_metadata()


if __name__ == "__main__":
    print(__doc__)
