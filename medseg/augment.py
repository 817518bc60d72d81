"""Random changes of the training images, each by its name: rotate, scale, shift, ..."""

import functools
import math

import torch
import torch.nn.functional as F

from medseg.normalization import mean_and_std_tensors

# {name: (strength where none is given, highest)}, for `medseg.cli.parse_named_values`.
AUGMENTATIONS = {
    "rotate": (30.0, 180.0),  # by up to so many degrees
    "scale": (0.1, 1.0),  # by a factor from 1 / (1 + strength) to 1 + strength
    "shift": (0.05, 1.0),  # by up to so many half sides
    "contrast": (0.1, 1.0),  # normalised values times a factor as for scale
    "brightness": (0.1, 1.0),  # normalised values plus -strength to strength
    "flip": (1.0, 1.0),  # horizontally and vertically, each with probability strength / 2
    "mirror": (1.0, 1.0),  # horizontally, with probability strength / 2
    "turn": (1.0, 1.0),  # by 90, 180 or 270 degrees, each with probability strength / 4
    "elastic": (0.05, 0.2),  # no pixel moves by more than so many sides
    "gamma": (0.2, 2.0),  # pixels of 0..1 to a power from 1 / (1 + strength) to 1 + strength
    "noise": (0.05, 1.0),  # Gaussian; its deviation, of normalised values, is 0 to strength
}
# For networks that see an image few times: in `strong` of --recipe, and in short runs of auto.
SLIGHT = {"rotate": 5.0, "scale": 0.1, "shift": 0.05, "contrast": 0.1, "brightness": 0.1}
SPLINE_POINTS = 7  # a side of the grid that spans an elastic displacement
# Uniform numbers that each change needs for an image.
DRAWS = {**dict.fromkeys(AUGMENTATIONS, 1), "shift": 2, "flip": 2, "elastic": 2 * SPLINE_POINTS**2}
GEOMETRIC = ("rotate", "scale", "shift", "elastic")  # those that resample
OF_GREY_VALUES = ("contrast", "brightness", "gamma", "noise")


def count_draws(strengths, n_channels=3):
    """Columns of `draws` that `augment` needs for these strengths."""
    return sum(_draws_of(name, n_channels) for name in strengths)


def _draws_of(name, n_channels):
    """Grey values change a channel at a time; colours, which belong together, in one way."""
    return n_channels if name in OF_GREY_VALUES and n_channels not in (1, 3) else DRAWS[name]


def resamples(strengths):
    """Whether pixels move to places between pixels."""
    return any(strengths.get(name) for name in GEOMETRIC)


def window_side(crop, strengths):
    """Side of the square around a crop that these changes bring pixels in from."""
    if not resamples(strengths):
        return crop
    angle = math.radians(min(strengths.get("rotate", 0), 45))  # the corners reach out farthest
    reach = (math.cos(angle) + math.sin(angle)) * (1 + strengths.get("scale", 0))
    reach += strengths.get("shift", 0) + 2 * strengths.get("elastic", 0)
    return crop + 2 * (math.ceil(crop * (reach - 1) / 2) + 1)  # 1: the neighbour, for bilinear


def augment(images, masks, draws, strengths, *, size=None, noise=None):
    """Rotate, scale, shift, brighten ... each image in a way of its own.

    images: float32 (B, n_channels, H, W) normalised; masks: float32 (B, C, H, W) of 0 and 1, and so
    they stay; strengths: {name of AUGMENTATIONS: number}; draws: uniform in 0..1, on the CPU, (B,
    at least `count_draws(strengths, n_channels)`), which decide what happens to each image.
    size: (height, width) of what is returned, by default (H, W); what lies around it in the images
    is where its pixels may come from. noise: standard normal float32 (B, n_channels, *size),
    where strengths has it.
    Image and mask are resampled once, through the same map: the image bilinear, its border
    repeated, and the mask nearest, zero outside; not at all where no change moves pixels to places
    between pixels. turn takes square images.
    elastic: Simard, Steinkraus, Platt: "Best Practices for Convolutional Neural Networks",
    ICDAR 2003, with a cubic B-spline for their Gaussian filter.
    """
    height, width = size or images.shape[-2:]
    draws = Draws(draws.to(images.device, non_blocking=True), strengths, images.shape[1])
    if resamples(strengths):
        grid = _make_grid(draws, height, width)
        if (height, width) != images.shape[-2:]:
            grid[..., 0] *= width / images.shape[3]
            grid[..., 1] *= height / images.shape[2]
        images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
        masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    if strengths.get("flip"):
        flips = draws.uniform("flip") < strengths["flip"] / 2
        for column, dim in enumerate((3, 2)):
            flipped = flips[:, column, None, None, None]
            images = torch.where(flipped, images.flip(dim), images)
            masks = torch.where(flipped, masks.flip(dim), masks)
    if strengths.get("mirror"):
        mirrored = (draws.uniform("mirror") < strengths["mirror"] / 2)[..., None, None]
        images = torch.where(mirrored, images.flip(3), images)
        masks = torch.where(mirrored, masks.flip(3), masks)
    if strengths.get("turn"):
        quarters = (4 / strengths["turn"] * draws.uniform("turn")).floor()[..., None, None]
        for turns in (1, 2, 3):
            turned = quarters == turns
            images = torch.where(turned, images.rot90(turns, (2, 3)), images)
            masks = torch.where(turned, masks.rot90(turns, (2, 3)), masks)
    if strengths.get("gamma"):
        images = _gamma(images, draws.factor("gamma"))
    if strengths.get("contrast") or strengths.get("brightness"):
        contrast, brightness = draws.factor("contrast"), draws.amount("brightness")
        images = torch.addcmul(brightness[..., None, None], images, contrast[..., None, None])
    if strengths.get("noise"):
        deviation = strengths["noise"] * draws.uniform("noise")
        images = torch.addcmul(images, deviation[..., None, None], noise)
    return images.contiguous(memory_format=torch.channels_last), masks


class Draws:
    """The uniform numbers of each change, float32 (B, its draws), and what they stand for.

    values: (B, at least `count_draws(strengths, n_channels)`), in the order of AUGMENTATIONS.
    """

    def __init__(self, values, strengths, n_channels=3):
        self.strengths, self.zeros = strengths, torch.zeros_like(values[:, :1])
        given = [name for name in AUGMENTATIONS if name in strengths]
        counts = [_draws_of(name, n_channels) for name in given]
        parts = values[:, : sum(counts)].split(counts, 1)
        self._uniform = dict(zip(given, parts, strict=True))

    def uniform(self, name):
        """0..1."""
        return self._uniform[name]

    def signed(self, name):
        """-1..1; 0 for a change that is not asked for."""
        if name not in self._uniform:
            return self.zeros.expand(-1, DRAWS[name])
        return 2 * self._uniform[name] - 1

    def amount(self, name):
        """-strength..strength; 0 for a change that is not asked for."""
        return self.strengths.get(name, 0) * self.signed(name)

    def factor(self, name):
        """1 / (1 + strength) .. 1 + strength; 1 for a change that is not asked for."""
        return (1 + self.strengths.get(name, 0)) ** self.signed(name)


def _make_grid(draws, height, width):
    """Where each pixel comes from: float32 (B, height, width, 2), -1..1 as for grid_sample."""
    aspect = height / width  # a rotation keeps right angles
    angle = draws.signed("rotate")[:, 0] * math.radians(draws.strengths.get("rotate", 0))
    sines = angle.sin()
    rotation = [angle.cos(), -sines * aspect, sines / aspect, angle.cos()]
    rotation = torch.stack(rotation, 1).view(-1, 2, 2) * draws.factor("scale")[..., None]
    theta = torch.cat([rotation, draws.amount("shift")[..., None]], 2)  # from new to old
    grid = F.affine_grid(theta, (len(theta), 1, height, width), align_corners=False)
    if draws.strengths.get("elastic"):
        points = draws.amount("elastic").view(-1, 2, SPLINE_POINTS, SPLINE_POINTS)
        rows, columns = spline_basis(height, grid.device), spline_basis(width, grid.device)
        displacement = rows @ points @ columns.T  # (B, 2, height, width), in sides
        grid = grid + 2 * displacement.permute(0, 2, 3, 1)
    return grid


@functools.cache
def spline_basis(side, device):
    """Weights of the control points of a uniform cubic B-spline: float32 (side, SPLINE_POINTS).

    They are positive and add up to 1 for each pixel: no value exceeds those of the points.
    """
    position = (torch.arange(side) + 0.5) * ((SPLINE_POINTS - 3) / side)
    interval = position.long().clamp(max=SPLINE_POINTS - 4)
    u = position - interval
    pieces = [(1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3]
    basis = torch.zeros(side, SPLINE_POINTS)
    basis.scatter_(1, interval[:, None] + torch.arange(4), torch.stack(pieces, 1) / 6)
    return basis.to(device)


def _gamma(images, exponents):
    """Normalised images (B, C, H, W) with their pixels of 0..1 to the power of exponents.

    exponents: (B, 1), or (B, C) of a channel each.
    """
    mean, std = mean_and_std_tensors(images.shape[1], images.device)
    pixels = torch.addcmul(mean, images.permute(0, 2, 3, 1), std).clamp_(0, 1)
    pixels.pow_(exponents[:, None, None]).sub_(mean).div_(std)
    return pixels.permute(0, 3, 1, 2)
