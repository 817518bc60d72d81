"""What a UNet is built of: the settings that choose its layers, named sets of them, their flags."""

import argparse
import math
from dataclasses import dataclass

import torch.nn as nn

CHOICES = {
    "depth": range(1, 9),
    "bias": (True, False),
    "norm": (None, "batch", "group"),
    "up": ("transpose", "bilinear", "nearest"),
    "down": ("maxpool", "stride"),
    "activation": ("relu", "leaky_relu"),
    "padding": ("zeros", "reflect"),
    "dropout": ("bottleneck", "channels", "none"),
}


@dataclass(frozen=True)
class Architecture:
    """The settings that describe a UNet; the defaults are the tutorial's.

    depth: levels of the encoder, 1 to 8, each of which halves both sides.
    norm: after each 3x3 convolution, None, 'batch', or 'group' (8 groups). bias: whether these
    convolutions have one; a normalisation after them has its own.
    up: 'transpose', a transposed convolution, or an upsampling, 'bilinear' or 'nearest', with a
    1x1 convolution that halves the channels.
    down: 'maxpool', or 'stride', a 3x3 convolution of stride 2 with norm and activation.
    activation: 'relu' or 'leaky_relu' (slope 0.01). padding: of the 3x3 convolutions, 'zeros' or
    'reflect'.
    dropout: 'bottleneck', 40 % of the values of the deepest level; 'channels', 30 % of the
    channels after each 3x3 convolution; 'none'.
    Raises ValueError for any other value.
    """

    depth: int = 5
    norm: str | None = None
    bias: bool = True
    up: str = "transpose"
    down: str = "maxpool"
    activation: str = "relu"
    padding: str = "zeros"
    dropout: str = "bottleneck"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"{name} {value!r:.20}: it must be one of {known}")

    def conv3x3(self, in_channels, out_channels, stride=1):
        options = {"padding_mode": self.padding, "bias": self.bias}
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, **options)

    def make_norm(self, channels):
        """The layer after a 3x3 convolution."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        if self.norm == "group":
            return nn.GroupNorm(math.gcd(8, channels), channels)
        return nn.Identity()

    def make_activation(self):
        return nn.ReLU(inplace=True) if self.activation == "relu" else nn.LeakyReLU(inplace=True)

    def make_channel_dropout(self):
        return nn.Dropout2d(0.3) if self.dropout == "channels" else nn.Identity()

    def make_down(self, channels):
        """(B, channels, H, W) -> (B, channels, H/2, W/2)."""
        if self.down == "maxpool":
            return nn.MaxPool2d(2)
        halving = self.conv3x3(channels, channels, stride=2)
        return nn.Sequential(halving, self.make_norm(channels), self.make_activation())

    def make_up(self, in_channels, out_channels):
        """(B, in_channels, H, W) -> (B, out_channels, 2H, 2W)."""
        if self.up == "transpose":
            return nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        corners = True if self.up == "bilinear" else None
        # The 1x1 convolution first: the result is the same, for a quarter of the work.
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1),
            nn.Upsample(scale_factor=2, mode=self.up, align_corners=corners),
        )


FOUR_LEVELS = {"depth": 4, "norm": "batch"}
# Named networks: arguments of `Architecture`, without those that are the tutorial's.
ARCHITECTURES = {
    "tutorial": {},
    # Four levels, batch normalisation and bilinear upsampling; see docs/networks.md.
    "drive": {**FOUR_LEVELS, "up": "bilinear", "dropout": "none"},
    # Strided convolutions down, nearest up, reflected borders, dropout of whole channels.
    "study": {
        **{**FOUR_LEVELS, "bias": False, "up": "nearest", "down": "stride"},
        **{"activation": "leaky_relu", "padding": "reflect", "dropout": "channels"},
    },
}
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
