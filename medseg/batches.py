"""Batches of a split, on the device: which images an epoch draws, and what is made of each."""

import math
import mmap
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from medseg.augment import augment, count_draws, window_side
from medseg.crop import Images, find_foreground
from medseg.normalization import split_rows


@dataclass
class Order:
    """Which images an epoch draws: with shuffle, a function of seed and epoch alone.

    batch_size: over all processes; of `world`, each gets every world-th image of a batch, from its
    `rank` on. repeat: times that an epoch draws each image; of 0.1, a tenth of them, which with
    shuffle are others in each epoch. foreground: share of the draws that must hold foreground: they
    are of images that have some, and crops lie around it.
    """

    batch_size: int
    shuffle: bool = False
    seed: int = 0
    repeat: float = 1.0
    foreground: float = 0.0
    rank: int = 0
    world: int = 1
    epoch: int = field(default=0, init=False)
    start: int = field(default=0, init=False)  # the batch that the next pass begins with

    def count(self, numbers):
        """How many of the images `numbers` an epoch draws."""
        return max(round(self.repeat * len(numbers)), 1)

    def generator(self, device="cpu", position=0):
        """Random numbers of this seed and epoch, and of the image at a position of its order."""
        seed = self.seed * 1_000_003 + self.epoch + position * 1_000_003**2
        return torch.Generator(device).manual_seed(seed % 2**63)

    def draw(self, numbers, marked, generator):
        """The images of the epoch in order, int64 (n,), and which must hold foreground, bool (n,).

        numbers: int64, all images; marked: int64, those with foreground.
        """
        count = self.count(numbers)
        holding = round(self.foreground * count) if len(marked) else 0
        order, holds = self._repeat(numbers, count - holding, generator), torch.arange(count) < 0
        if holding:
            order = torch.cat([order, self._repeat(marked, holding, generator)])
            holds[-holding:] = True
        if self.shuffle:
            shuffled = torch.randperm(count, generator=generator)
            order, holds = order[shuffled], holds[shuffled]
        return order, holds

    def _repeat(self, numbers, count, generator):
        """`count` of the images: each as often, and of a part of them some others each time."""
        whole, rest = divmod(count, len(numbers))
        order = numbers.repeat(whole)
        if rest and self.shuffle:
            numbers = numbers[torch.randperm(len(numbers), generator=generator)]
        return torch.cat([order, numbers[:rest]])

    def bounds(self, count):
        """(first, end) of each batch of this pass, in the order of `count` images."""
        for first in range(self.start * self.batch_size, count, self.batch_size):
            yield first, min(first + self.batch_size, count)


@dataclass(frozen=True)
class Transform:
    """What is made of a row: its channels and classes, a crop, and what `augment` does to it.

    crop: side of square crops of the images, see `medseg.crop`; each image is drawn as often as
    they would tile it. strengths: {name: number} of `medseg.augment.AUGMENTATIONS`.
    """

    n_channels: int = 3
    n_classes: int = 1
    crop: int = 0
    strengths: dict = field(default_factory=dict)


class Batches:
    """The batches of a split, on the device and normalised: what a DataLoader is to a Dataset.

    rows: uint8 array (N, S, S, n_channels + bytes) or RaggedRows, see `data.load_split`. Iterating
    yields (images float32 (B, n_channels, S, S), masks float32 (B, n_classes, S, S) of 0 and 1, and
    -1 where a pixel is to be ignored).
    Crops and augmentation are, as the `Order`, a function of seed and epoch. dataset: of the rows,
    if `true_masks` are wanted. RaggedRows without crop come one image at a time, for each process.
    On a GPU with room for it the whole split is moved there once, so that an epoch copies nothing.
    """

    def __init__(self, rows, order, device="cpu", *, transform=None, dataset=None):
        self.rows, self.device, self.dataset = rows, torch.device(device), dataset
        self.transform, places = transform or Transform(), ()
        if order.foreground:
            change = self.transform
            places = find_foreground(rows, change.n_channels, change.n_classes)
        crop = self.transform.crop
        window = window_side(crop, self.transform.strengths)
        self.images = Images(rows, self.device, crop=crop, window=window, places=places)
        self.one_by_one = self.images.one_by_one
        self.order = replace(order, batch_size=order.world) if self.one_by_one else replace(order)
        self.images_per_epoch = order.count(self.images.numbers)

    def whole_images(self, most):
        """Batches of the images as prediction takes them; of more than `most`, so many at random.

        This process has them all.
        """
        size, part = max(self.order.batch_size // self.order.world, 1), most / len(self.rows)
        order = Order(size, shuffle=True, seed=self.order.seed, repeat=min(1, part))
        plain = replace(self.transform, crop=0, strengths={})
        return Batches(self.rows, order, self.device, transform=plain)

    def __len__(self):
        return math.ceil(self.images_per_epoch / self.order.batch_size)

    def set_epoch(self, epoch, start=0):
        """Choose the order of the next pass, and the batch it begins with (to resume within)."""
        self.order.epoch, self.order.start = epoch, start

    def __iter__(self):
        generator, change = self.order.generator(), self.transform
        numbers, holds = self.order.draw(self.images.numbers, self.images.marked, generator)
        columns = [count_draws(change.strengths, change.n_channels), self.images.n_draws]
        draws = torch.rand(len(numbers), sum(columns), generator=generator)
        for_augment, for_images = draws.split(columns, 1)
        for first, end in self.order.bounds(len(numbers)):
            mine = slice(first + self.order.rank, end, self.order.world)
            pixels = self.images.gather(numbers[mine], holds[mine], for_images[mine])
            pixels = self._to_device(pixels)
            images, masks = split_rows(pixels, change.n_channels, change.n_classes)
            if change.strengths and len(images):
                images, masks = self._augment(images, masks, for_augment[mine], first, end)
            yield images, masks

    def _to_device(self, pixels):
        if self.device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.pin_memory()  # the copy then waits in the GPU's queue, and we do not
        pixels = pixels.to(self.device, non_blocking=True)
        if hasattr(self.images.memory_map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self.images.memory_map.madvise(mmap.MADV_DONTNEED)  # else the process grows to its size
        return pixels

    def _augment(self, images, masks, draws, first, end):
        """`augment` our part of the batch of the images `first` to `end` - 1 of the order."""
        change, noise = self.transform, None
        size = (change.crop, change.crop) if change.crop else images.shape[-2:]
        if change.strengths.get("noise"):
            noise = self._noise(first, end, size)
        return augment(images, masks, draws, change.strengths, size=size, noise=noise)

    def _noise(self, first, end, size):
        """Standard normal noise for our part of the batch of the images `first` to `end` - 1.

        Drawn on the device for the batch of all processes, so that it is the same in any number of
        them; where the images differ in size, for each image.
        """
        count, mine = end - first, slice(self.order.rank, None, self.order.world)
        if self.one_by_one:
            first, count, mine = first + self.order.rank, 1, slice(None)
        generator = self.order.generator(self.device, 1 + first)  # 0: the order's
        shape = (count, self.transform.n_channels, *size)
        return torch.randn(shape, generator=generator, device=self.device)[mine]

    # ---- which images they are -----------------------------------------------------------------

    def row_numbers(self):
        """The numbers of the rows that this pass yields here, in order, a list."""
        order, mine = self.order, []
        numbers, _ = order.draw(self.images.numbers, self.images.marked, order.generator())
        for first, end in order.bounds(len(numbers)):
            mine += numbers[first + order.rank : end : order.world].tolist()
        return mine

    @property
    def knows_images(self):
        """Whether a data set tells which image a row is."""
        return self.dataset is not None and len(self.dataset) == len(self.rows)

    def names_in_order(self):
        """The names of the images that this pass yields here, a list. Only where `knows_images`."""
        names = self.dataset.names()
        return [names[number] for number in self.row_numbers()]

    def true_masks(self, number, masks):
        """The masks (C, H, W) of a row at the image's own size; masks: those of its batch.

        They are returned where nothing tells which image it is.
        """
        return self.dataset.true_masks(number) if self.knows_images else masks.cpu().numpy() > 0.5

    def original(self, position):
        """Image `position` of this pass as shown: uint8 (H, W, 3) and its masks, bool (C, H, W).

        Only where `knows_images`.
        """
        image, masks = self.dataset.load(self.row_numbers()[position])
        return np.asarray(image.rgb()), masks > 0
