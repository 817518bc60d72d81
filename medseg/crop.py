"""The pixels of a split's images: whole, or random square crops of them."""

import numpy as np
import torch

from medseg.cache import RaggedRows

MOST_PLACES = 256  # that are kept of each class of an image


class Images:
    """Images of one size, images of their own sizes, of which a batch holds one, or crops.

    rows: uint8 array (N, S, S, C) or RaggedRows; they move to the device, a GPU, if it has room.
    crop: side in pixels of random squares, of each image as many as would tile it, at least one; 0:
    whole images. window: side of the squares that `gather` returns, with the same middle: at least
    `crop`. places: of `find_foreground`, where crops must hold some.
    numbers: int64 (n,), the images of an epoch, unshuffled; marked: those with foreground; n_draws:
    how many uniform random values `gather` needs for each.
    """

    def __init__(self, rows, device, *, crop=0, window=0, places=()):
        if crop and not isinstance(rows, RaggedRows):
            rows = RaggedRows.of_array(rows)
        self.ragged, self.crop, self.window = isinstance(rows, RaggedRows), crop, window
        self.places, self.numbers = places, torch.arange(len(rows))
        self.one_by_one, self.n_draws = self.ragged and not crop, 0
        if self.ragged:
            self.starts, self.sizes = rows.starts.tolist(), rows.sizes.tolist()
        if crop:
            self.n_draws = 4 if places else 2
            times = (torch.from_numpy(rows.sizes).prod(1) / crop**2).round().long().clamp(min=1)
            self.numbers = self.numbers.repeat_interleave(times)
        holding = torch.tensor([bool(classes) for classes in places] or [False] * len(rows))
        self.marked = self.numbers[holding[self.numbers]]
        pixels = rows.pixels if self.ragged else rows
        self.memory_map = getattr(pixels, "_mmap", None)
        self.pixels = torch.from_numpy(pixels)
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if pixels.nbytes < 0.4 * free:
                self.pixels = self.pixels.to(device)

    def gather(self, numbers, holds, draws):
        """uint8 (B, H, W, C) of some of the numbers (B,).

        holds: bool (B,), which crops must hold foreground; draws: (B, n_draws), on the CPU.
        """
        if not self.ragged:
            return self.pixels[numbers.to(self.pixels.device)]
        channels, side, numbers = self.pixels.shape[1], self.window, numbers.tolist()
        if not numbers:  # of several processes, one may have no image of the last batch
            return self.pixels.new_empty(0, self.crop or 1, self.crop or 1, channels)
        if not self.crop:
            return self.image(*numbers)[None]
        windows = self.pixels.new_empty(len(numbers), side, side, channels)
        corners = place_crops(torch.tensor([self.sizes[n] for n in numbers]), draws, self.crop)
        for index in holds.nonzero().flatten().tolist():
            corners[index] = self._around_foreground(numbers[index], *draws[index, 2:])
        corners -= (side - self.crop) // 2
        # Slices, for an index of every pixel takes ten times as long on a CPU.
        for window, number, corner in zip(windows, numbers, corners.tolist(), strict=True):
            copy_window(self.image(number), *corner, window)
        return windows

    def image(self, number):
        """Image `number` of its own size: uint8 (H, W, C), a view."""
        start, (height, width) = self.starts[number], self.sizes[number]
        return self.pixels[start : start + height * width].view(height, width, -1)

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


def find_foreground(rows, n_channels, n_classes):
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
        for number in np.flatnonzero(present[:n_classes]):
            pixels = marked[packed[:, number // 8] >> number % 8 & 1 > 0]
            if len(pixels) > MOST_PLACES:
                pixels = pixels[rng.integers(len(pixels), size=MOST_PLACES)]
            classes.append(pixels)
        found.append(classes)
    return found


def place_crops(sizes, draws, crop):
    """Top and left of a crop of each image, int64 (n, 2); every place inside is as likely.

    sizes: int64 (n, 2) of heights and widths; draws: (n, 2 or more) uniform in 0..1, 1 excluded.
    Where a side of the image is shorter than the crop, the crop holds all of it, and top or left is
    negative.
    """
    room = sizes - crop
    steps = (draws[:, :2].double() * (room.abs() + 1)).floor().long()
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
