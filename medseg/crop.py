"""Where the pixels of a batch come from: images of one size, images of their own size, crops.

The three have

    numbers     int64 (n,): the numbers of the images of an epoch, unshuffled
    n_draws     how many uniform random values `gather` needs for each
    gather()    some of the numbers (B,), whether each must hold foreground, bool (B,), and draws
                (B, n_draws), on the CPU -> uint8 (B, H, W, C)
"""

import numpy as np
import torch

MOST_PLACES = 256  # that are kept of each class of an image


class OneSize:
    """Images of one size. pixels: uint8 tensor (N, S, S, C)."""

    n_draws = 0

    def __init__(self, pixels):
        self.pixels, self.numbers = pixels, torch.arange(len(pixels))

    def gather(self, numbers, holds, draws):
        return self.pixels[numbers.to(self.pixels.device)]


class OwnSizes:
    """Images of different sizes, of which a batch holds one, or none.

    pixels: uint8 tensor (P, C), the pixels of all images one after the other. starts (N,), sizes
    (N, 2): int64 arrays, of each image its first pixel, and its height and width.
    """

    n_draws = 0

    def __init__(self, pixels, starts, sizes):
        self.pixels, self.numbers = pixels, torch.arange(len(starts))
        self.starts, self.sizes = starts.tolist(), sizes.tolist()

    def image(self, number):
        """Image `number`: uint8 (H, W, C), a view."""
        start, (height, width) = self.starts[number], self.sizes[number]
        return self.pixels[start : start + height * width].view(height, width, -1)

    def gather(self, numbers, holds, draws):
        if not len(numbers):  # of several processes, one may have no image of the last batch
            return self.pixels.new_empty(0, 1, 1, self.pixels.shape[1])
        (number,) = numbers.tolist()
        return self.image(number)[None]


class Crops(OwnSizes):
    """Random squares of images, of each as many as would tile it, at least one.

    crop: their side in pixels. window: side of the squares that `gather` returns, with the same
    middle: at least `crop`. places: of `find_foreground`, where crops must hold some.
    """

    def __init__(self, pixels, starts, sizes, *, crop, window, places=()):
        super().__init__(pixels, starts, sizes)
        self.crop, self.window, self.places = crop, window, places
        self.n_draws = 4 if places else 2
        times = (torch.from_numpy(sizes).prod(1) / crop**2).round().long().clamp(min=1)
        self.numbers = self.numbers.repeat_interleave(times)

    def gather(self, numbers, holds, draws):
        if not len(numbers):
            return self.pixels.new_empty(0, self.crop, self.crop, self.pixels.shape[1])
        sizes = torch.tensor([self.sizes[number] for number in numbers.tolist()])
        corners = place_crops(sizes, draws[:, :2], self.crop)
        for index in holds.nonzero().flatten().tolist():
            corners[index] = self._around_foreground(int(numbers[index]), *draws[index, 2:])
        corners -= (self.window - self.crop) // 2
        shape = (len(numbers), self.window, self.window, self.pixels.shape[1])
        windows = self.pixels.new_empty(shape)
        # Slices, for an index of every pixel takes ten times as long on a CPU.
        for window, number, corner in zip(windows, numbers.tolist(), corners.tolist(), strict=True):
            copy_window(self.image(number), *corner, window)
        return windows

    def _around_foreground(self, number, class_draw, place_draw):
        """Top and left of a crop around a pixel of a class of image `number`, both drawn evenly.

        Isensee et al.: "nnU-Net", Nature Methods 2021, whose crops do so in a third of the draws.
        """
        classes = self.places[number]
        places = classes[int(class_draw * len(classes))]
        size = torch.tensor(self.sizes[number])
        pixel = torch.tensor(divmod(int(places[int(place_draw * len(places))]), int(size[1])))
        room = size - self.crop
        return (pixel - self.crop // 2).clamp(room.clamp(max=0), room.clamp(min=0))


def find_foreground(rows, n_channels):
    """Where each image has foreground: of every class in it, int array (k,) of pixels of it.

    rows: uint8 arrays (H, W, n_channels + bytes), see `data.load_split`. Pixels are numbered line
    by line; of more than MOST_PLACES of a class, so many at random are kept.
    """
    rng, found = np.random.default_rng(0), []  # the same in every process
    for row in rows:
        masks = row[..., n_channels:].reshape(-1, row.shape[2] - n_channels)
        marked = np.flatnonzero(masks.any(1))
        packed, classes = masks[marked], []
        present = np.unpackbits(np.bitwise_or.reduce(packed, 0), bitorder="little")
        for number in np.flatnonzero(present):
            pixels = marked[packed[:, number // 8] >> number % 8 & 1 > 0]
            if len(pixels) > MOST_PLACES:
                pixels = pixels[rng.integers(len(pixels), size=MOST_PLACES)]
            classes.append(pixels)
        found.append(classes)
    return found


def place_crops(sizes, draws, crop):
    """Top and left of a crop of each image, int64 (n, 2); every place inside is as likely.

    sizes: int64 (n, 2) of heights and widths; draws: (n, 2) uniform in 0..1, 1 excluded. Where a
    side of the image is shorter than the crop, the crop holds all of it, and top or left is
    negative.
    """
    room = sizes - crop
    steps = (draws.double() * (room.abs() + 1)).floor().long()
    return room.clamp(max=0) + steps


def copy_window(image, top, left, window):
    """Fill `window` (side, side, C) with the square of an image (H, W, C) that begins at top, left.

    Beyond the image its border is repeated. The square has pixels of the image in it.
    """
    side = len(window)
    inside = image[max(top, 0) : top + side, max(left, 0) : left + side]
    above, before = max(-top, 0), max(-left, 0)
    below, after = above + inside.shape[0], before + inside.shape[1]
    window[above:below, before:after] = inside
    window[above:below, :before] = inside[:, :1]
    window[above:below, after:] = inside[:, -1:]
    window[:above] = window[above].clone()
    window[below:] = window[below - 1].clone()
