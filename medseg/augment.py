"""Random changes of the training images, each with a word: rotate, scale, shift, ..."""

import functools
import math

import torch
import torch.nn.functional as F

from medseg.images import mean_and_std

# {word: (value where none is given, highest value)}, for `medseg.cli.parse_words`.
AUGMENTATIONS = {
    "rotate": (30.0, 180.0),  # by up to so many degrees
    "scale": (0.1, 1.0),  # by a factor from 1 / (1 + value) to 1 + value
    "shift": (0.05, 1.0),  # by up to so many half sides
    "contrast": (0.1, 1.0),  # normalised values times a factor as for scale
    "brightness": (0.1, 1.0),  # normalised values plus -value to value
    "flip": (1.0, 1.0),  # horizontally and vertically, each with probability value / 2
    "turn": (1.0, 1.0),  # by 90, 180 or 270 degrees, each with probability value / 4
    "elastic": (0.05, 0.2),  # no pixel moves by more than so many sides
    "gamma": (0.2, 2.0),  # pixels of 0..1 to a power from 1 / (1 + value) to 1 + value
    "noise": (0.05, 1.0),  # Gaussian; its deviation, of normalised values, is 0 to value
}
SPLINE_POINTS = 7  # a side of the grid that spans an elastic displacement
# Uniform numbers that each word needs for an image.
DRAWS = {**dict.fromkeys(AUGMENTATIONS, 1), "shift": 2, "flip": 2, "elastic": 2 * SPLINE_POINTS**2}
GEOMETRIC = ("rotate", "scale", "shift", "elastic")  # the words that resample


def count_draws(words):
    """Columns of `draws` that `augment` needs for these words."""
    return sum(DRAWS[word] for word in words)


def resamples(words):
    """Whether pixels move to places between pixels."""
    return any(words.get(word) for word in GEOMETRIC)


def window_side(crop, words):
    """Side of the square around a crop that these words bring pixels in from."""
    if not resamples(words):
        return crop
    angle = math.radians(min(words.get("rotate", 0), 45))  # the corners reach out farthest
    reach = (math.cos(angle) + math.sin(angle)) * (1 + words.get("scale", 0))
    reach += words.get("shift", 0) + 2 * words.get("elastic", 0)
    return crop + 2 * (math.ceil(crop * (reach - 1) / 2) + 1)  # 1: the neighbour, for bilinear


def augment(images, masks, draws, words, *, size=None, noise=None):
    """Rotate, scale, shift, brighten ... each image in a way of its own.

    images: float32 (B, 1 or 3, H, W) normalised; masks: float32 (B, C, H, W) of 0 and 1, and so
    they stay; words: {word of AUGMENTATIONS: value}; draws: (B, at least `count_draws(words)`)
    uniform in 0..1, on the CPU, which decide what happens to each image.
    size: (height, width) of what is returned, by default (H, W); what lies around it in the images
    is where its pixels may come from. noise: standard normal float32 (B, 1 or 3, *size), for the
    word noise.
    Image and mask are resampled once, through the same map: the image bilinear, its border
    repeated, and the mask nearest, zero outside. Without a word that moves pixels to places
    between pixels, they are not resampled. The word turn takes square images.
    elastic: Simard, Steinkraus, Platt: "Best Practices for Convolutional Neural Networks",
    ICDAR 2003, with a cubic B-spline for their Gaussian filter.
    """
    height, width = size or images.shape[-2:]
    draws = Draws(draws.to(images.device, non_blocking=True), words)
    if resamples(words):
        grid = _make_grid(draws, height, width)
        if (height, width) != images.shape[-2:]:
            grid[..., 0] *= width / images.shape[3]
            grid[..., 1] *= height / images.shape[2]
        images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
        masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    if words.get("flip"):
        flips = draws.uniform("flip") < words["flip"] / 2
        for column, dim in enumerate((3, 2)):
            flipped = flips[:, column, None, None, None]
            images = torch.where(flipped, images.flip(dim), images)
            masks = torch.where(flipped, masks.flip(dim), masks)
    if words.get("turn"):
        quarters = (4 / words["turn"] * draws.uniform("turn")).floor()[..., None, None]
        for turns in (1, 2, 3):
            turned = quarters == turns
            images = torch.where(turned, images.rot90(turns, (2, 3)), images)
            masks = torch.where(turned, masks.rot90(turns, (2, 3)), masks)
    if words.get("gamma"):
        images = _gamma(images, draws.factor("gamma"))
    if words.get("contrast") or words.get("brightness"):
        contrast, brightness = draws.factor("contrast"), draws.amount("brightness")
        images = torch.addcmul(brightness[..., None, None], images, contrast[..., None, None])
    if words.get("noise"):
        deviation = words["noise"] * draws.uniform("noise")
        images = torch.addcmul(images, deviation[..., None, None], noise)
    return images.contiguous(memory_format=torch.channels_last), masks


class Draws:
    """The uniform numbers of each word, float32 (B, DRAWS[word]), and what they stand for.

    values: (B, at least `count_draws(words)`), in the order of AUGMENTATIONS.
    """

    def __init__(self, values, words):
        self.words, self.zeros = words, torch.zeros_like(values[:, :1])
        given = [word for word in AUGMENTATIONS if word in words]
        parts = values[:, : count_draws(words)].split([DRAWS[word] for word in given], 1)
        self._uniform = dict(zip(given, parts, strict=True))

    def uniform(self, word):
        """0..1."""
        return self._uniform[word]

    def signed(self, word):
        """-1..1; 0 for a word that is not given."""
        if word not in self._uniform:
            return self.zeros.expand(-1, DRAWS[word])
        return 2 * self._uniform[word] - 1

    def amount(self, word):
        """-value..value; 0 for a word that is not given."""
        return self.words.get(word, 0) * self.signed(word)

    def factor(self, word):
        """1 / (1 + value) .. 1 + value; 1 for a word that is not given."""
        return (1 + self.words.get(word, 0)) ** self.signed(word)


def _make_grid(draws, height, width):
    """Where each pixel comes from: float32 (B, height, width, 2), -1..1 as for grid_sample."""
    aspect = height / width  # a rotation keeps right angles
    angle = draws.signed("rotate")[:, 0] * math.radians(draws.words.get("rotate", 0))
    sines = angle.sin()
    rotation = [angle.cos(), -sines * aspect, sines / aspect, angle.cos()]
    rotation = torch.stack(rotation, 1).view(-1, 2, 2) * draws.factor("scale")[..., None]
    theta = torch.cat([rotation, draws.amount("shift")[..., None]], 2)  # from new to old
    grid = F.affine_grid(theta, (len(theta), 1, height, width), align_corners=False)
    if draws.words.get("elastic"):
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
    """Normalised images (B, C, H, W) with their pixels of 0..1 to the power of exponents (B, 1)."""
    mean, std = statistics_tensors(images.shape[1], images.device)
    pixels = torch.addcmul(mean, images.permute(0, 2, 3, 1), std).clamp_(0, 1)
    pixels.pow_(exponents[..., None, None]).sub_(mean).div_(std)
    return pixels.permute(0, 3, 1, 2)


@functools.cache
def statistics_tensors(n_channels, device, white=1):
    """Mean and deviation (n_channels,) of pixels of 0..white, on the device.

    Made once: a copy in every step would wait for the GPU.
    """
    mean, std = mean_and_std(n_channels)
    return torch.tensor(mean, device=device) * white, torch.tensor(std, device=device) * white
