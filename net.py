"""The U-Net of the tutorial's section 3: five levels down, a bottleneck, five levels up.

    from net import UNet
    model = UNet(n_filters=32)                       # 31,094,497 parameters
    probabilities = model(torch.rand(1, 3, 256, 256))  # (1, 1, 256, 256), values 0..1

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015, https://arxiv.org/abs/1505.04597. Unlike the paper's, these convolutions are padded,
so the output is as large as the input.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from medseg.checkpoint import load_weights
from medseg.images import IMAGE_SIZE

STRIDE = 32  # five poolings: both sides of what enters the encoder are multiples of this


def make_norm(kind, channels):
    """The layer after a 3x3 convolution: 'batch', 'group' (8 groups), or None: no change."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(8, channels), channels)
    if kind is None:
        return nn.Identity()
    raise ValueError(f"norm {kind!r}: it must be None, 'batch' or 'group'")


class DownBlock(nn.Module):
    """Two 3x3 convolutions, then (where max_pooling) a halving of both sides.

    (B, in_channels, H, W) -> x (B, out_channels, H/2, W/2), skip (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, dropout_prob=0, max_pooling=True, *, norm=None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm1 = make_norm(norm, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2) if max_pooling else None
        self.dropout = nn.Dropout(dropout_prob) if dropout_prob > 0 else None

    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
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

    def __init__(self, in_channels, out_channels, *, norm=None):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.conv1 = nn.Conv2d(out_channels * 2, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm1 = make_norm(norm, out_channels)
        self.norm2 = make_norm(norm, out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, skip):
        x = self.up(x)
        x = torch.cat([x, skip], dim=1)
        x = self.relu(self.norm1(self.conv1(x)))
        x = self.relu(self.norm2(self.conv2(x)))
        return x


class UNet(nn.Module):
    """(B, n_channels, H, W), any H, W >= 1 -> probabilities (B, n_classes, H, W), float32, 0..1.

    The names of its weights and their shapes are the tutorial's, so either's `best_model.pth`
    loads in the other. norm: 'batch' or 'group' puts such a layer after each 3x3 convolution; the
    tutorial has None. `image_size` is the side in pixels the model is trained at: it changes no
    arithmetic and tells predict.py how to resize. `class_names`: a name for each class, by default
    "1", "2", ... or, of a single one, "foreground". Both travel in the state dict's metadata.
    """

    def __init__(
        self,
        n_channels=3,
        n_classes=1,
        n_filters=32,
        *,
        image_size=IMAGE_SIZE,
        norm=None,
        class_names=None,
    ):
        super().__init__()
        self.image_size, self.n_channels, self.n_classes = image_size, n_channels, n_classes
        self.class_names = tuple(class_names or default_class_names(n_classes))
        if len(self.class_names) != n_classes:
            raise ValueError(f"{len(self.class_names)} class names for {n_classes} classes")

        # Encoder (sides for a 256x256 input)
        self.down1 = DownBlock(n_channels, n_filters, norm=norm)  # -> 128
        self.down2 = DownBlock(n_filters, n_filters * 2, norm=norm)  # -> 64
        self.down3 = DownBlock(n_filters * 2, n_filters * 4, norm=norm)  # -> 32
        self.down4 = DownBlock(n_filters * 4, n_filters * 8, norm=norm)  # -> 16
        self.down5 = DownBlock(n_filters * 8, n_filters * 16, norm=norm)  # -> 8

        self.bottleneck = DownBlock(
            n_filters * 16, n_filters * 32, dropout_prob=0.4, max_pooling=False, norm=norm
        )

        # Decoder
        self.up1 = UpBlock(n_filters * 32, n_filters * 16, norm=norm)  # -> 16
        self.up2 = UpBlock(n_filters * 16, n_filters * 8, norm=norm)  # -> 32
        self.up3 = UpBlock(n_filters * 8, n_filters * 4, norm=norm)  # -> 64
        self.up4 = UpBlock(n_filters * 4, n_filters * 2, norm=norm)  # -> 128
        self.up5 = UpBlock(n_filters * 2, n_filters, norm=norm)  # -> 256

        self.outc = nn.Conv2d(n_filters, n_classes, 1)
        self.sigmoid = nn.Sigmoid()
        self.register_state_dict_post_hook(_record_metadata)

    def forward(self, x):
        height, width = x.shape[-2:]
        if height % STRIDE or width % STRIDE:
            # Repeat the border: a black frame would be an edge that is not in the image.
            x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")

        x1, skip1 = self.down1(x)
        x2, skip2 = self.down2(x1)
        x3, skip3 = self.down3(x2)
        x4, skip4 = self.down4(x3)
        x5, skip5 = self.down5(x4)

        x6, _ = self.bottleneck(x5)

        x = self.up1(x6, skip5)
        x = self.up2(x, skip4)
        x = self.up3(x, skip3)
        x = self.up4(x, skip2)
        x = self.up5(x, skip1)

        logits = self.outc(x)[..., :height, :width]
        # In bfloat16 sigmoid(7) is exactly 1, whose logarithm the loss needs: float32 from here on.
        return self.sigmoid(logits.float())

    @classmethod
    def from_state_dict(cls, state):
        """The UNet that these weights belong to, its width and channels read off their shapes.

        state: mapping of names to tensors, as `UNet.state_dict()` gives and as the tutorial saves.
        Raises ValueError where it is not one, with what is wrong.
        """
        try:
            if not isinstance(state, dict):
                raise TypeError
            n_filters, n_channels = state["down1.conv1.weight"].shape[:2]
            n_classes = state["outc.weight"].shape[0]
            metadata = getattr(state, "_metadata", {}).get("", {})
            image_size = metadata.get("image_size", IMAGE_SIZE)
            class_names = metadata.get("class_names", default_class_names(n_classes))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            raise ValueError(
                "not the weights of a UNet: no down1.conv1.weight and outc.weight in it"
            ) from None
        if not isinstance(image_size, int) or not 1 <= image_size <= 8192:
            raise ValueError(f"not the weights of a UNet: trained at image size {image_size!r}?")
        names = class_names if isinstance(class_names, (list, tuple)) else ()
        if len(names) != n_classes or not all(isinstance(name, str) for name in names):
            raise ValueError(f"not the weights of a UNet: class names {class_names!r:.80}?")
        # Before memory is taken for a network that a few bytes claim to be: are its largest
        # weights there?
        largest, width = state.get("bottleneck.conv2.weight"), 32 * n_filters
        complete = getattr(largest, "shape", None) == (width, width, 3, 3)
        if not complete or largest.untyped_storage().nbytes() < largest.numel():
            raise ValueError(
                f"not the weights of a UNet of {n_filters} filters: "
                "bottleneck.conv2.weight does not fit"
            )
        norm = None
        if "down1.norm1.weight" in state:
            norm = "batch" if "down1.norm1.running_mean" in state else "group"
        model = cls(
            n_channels, n_classes, n_filters, image_size=image_size, norm=norm, class_names=names
        )
        expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        shapes = {name: getattr(weight, "shape", None) for name, weight in state.items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                raise ValueError(
                    f"not the weights of a UNet of {n_filters} filters: {name} has shape "
                    f"{shapes.get(name)}, expected {expected.get(name)}"
                )
        model.load_state_dict(state)
        return model


def load_model(path):
    """The UNet in a file of weights, ours or the tutorial's, on the CPU.

    Raises FileNotFoundError; ValueError where the file holds no UNet.
    """
    weights = load_weights(path)
    try:
        return UNet.from_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def default_class_names(n_classes):
    if n_classes == 1:
        return ("foreground",)
    return tuple(str(number + 1) for number in range(n_classes))


def _record_metadata(model, state, prefix, metadata):
    """Hook of `state_dict`: image size and class names travel with the weights."""
    metadata["image_size"] = model.image_size
    metadata["class_names"] = list(model.class_names)
