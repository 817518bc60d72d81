"""From a data set on disk to batches on the device (the tutorial's section 2).

examples:
  python data.py                             # audit dataset/: counts, problems, a contact sheet
  python data.py dataset/synthetic --out /tmp
  python data.py own --show 40               # a contact sheet of 40 images of each split
  python data.py own --plan                  # the flags that suit it, and how long they will take
  python data.py --grouped-split grouped     # split anew, neighbouring slices kept together

A data set is a folder with train/, valid/ and test/; each holds images and
`_annotations.coco.json`. Every image is decoded and every annotation rasterised once, to uint8 at
training size, or at its own. The result is kept in ROOT/.cache as one array per split,
(N, size, size, 4): red, green, blue, mask (of several classes, a bit each).
"""

import copy
import hashlib
import json
import math
import mmap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from medseg import coco as coco_json
from medseg import dist, samples
from medseg import images as pictures
from medseg.augment import AUGMENTATIONS, augment, count_draws, window_side
from medseg.cache import RaggedRows, cached_rows
from medseg.cli import parse_named_values, run_main
from medseg.coco_dialects import print_forgiven
from medseg.crop import Crops, OneSize, OwnSizes
from medseg.device import tune_convolutions
from medseg.normalization import normalize
from medseg.run_lengths import encode, unite
from medseg.settings import count_recorded


class COCOSegmentationDataset(Dataset):
    """The images of one split with their annotations, crowds included, as masks.

    coco: pycocotools COCO (`load_coco`, or `COCO(file)`); image_dir: where its file_names are.
    An item is (image float32 (n_channels, S, S) normalised, mask float32 (C, S, S) of 0 and 1),
    with S = image_size; with None, of the image's own height and width. With `transform`, as in
    the tutorial, the image is transform(uint8 array (H, W, 3)) and the mask is resized to its
    height and width.
    classes: names of categories, each a channel of the mask; None, the tutorial's way, is a single
    channel with the union of all annotations. n_channels: 3, or 1 for grey images.
    Items raise FileNotFoundError, or ValueError naming the file, where an image or annotation is
    damaged.
    """

    def __init__(
        self,
        coco,
        image_dir,
        transform=None,
        *,
        image_size=pictures.IMAGE_SIZE,
        classes=None,
        n_channels=3,
    ):
        self.coco, self.image_dir, self.transform = coco, Path(image_dir), transform
        self.image_size, self.n_channels, self.classes = image_size, n_channels, classes
        self.window = coco_json.recorded_window(coco.dataset)
        self.forgiven = {}  # what `load_coco` counted
        self.turned = set()  # indices of the images that `row` has read and turned (EXIF)
        self.channel_of = None  # {category id: channel of the mask}
        if classes is not None:
            channels = {name: channel for channel, name in enumerate(classes)}
            used = coco_json.used_categories(coco)
            self.channel_of = {
                key: channels[name] for name, ids in used.items() if name in channels for key in ids
            }
        self.n_classes = 1 if classes is None else len(classes)
        self.image_ids = coco.getImgIds()
        if not self.image_ids:
            raise ValueError(f"{self.image_dir}: {coco_json.ANNOTATIONS} lists no images")

    @property
    def row_shape(self):
        """Of `row`, without a height and width of the image's own: eight classes share a byte."""
        side = (self.image_size, self.image_size) if self.image_size else ()
        return (*side, self.n_channels + math.ceil(self.n_classes / 8))

    @property
    def channel_names(self):
        """As the import recorded them: see `medseg.settings.channel_names`."""
        return coco_json.recorded_channels(self.coco.dataset)

    @property
    def variant(self):
        """A word for what `row` holds that is not the tutorial's, for the cache's name."""
        if self.classes is None and self.n_channels == 3:
            return ""
        content = json.dumps([self.classes, self.n_channels])
        return "-v" + hashlib.sha256(content.encode()).hexdigest()[:8]

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        if self.transform is None:
            row = torch.from_numpy(self.row(index))[None]
            image, masks = split_rows(row, self.n_channels, self.n_classes)
            return image[0], masks[0]
        picture = self.read(index)
        image = self.transform(np.array(picture.rgb()))
        masks = self.load_masks(index, picture.size, image.shape[-2:])
        return image, torch.from_numpy(masks).float()

    def path(self, index):
        """Where the image is. ValueError for a file_name that leads out of image_dir."""
        return coco_json.image_path(
            self.image_dir, self.coco.imgs[self.image_ids[index]]["file_name"]
        )

    def names(self):
        """The paths of the images below image_dir."""
        paths = [self.path(index) for index in range(len(self))]
        return [path.relative_to(self.image_dir).as_posix() for path in paths]

    def without(self, skipped):
        """The same without the images that a line of `skipped` names."""
        kept = copy.copy(self)
        starts = [" ".join(f"{self.path(index)}:".split()) for index in range(len(self))]
        kept.image_ids = [
            number
            for number, start in zip(self.image_ids, starts, strict=True)
            if not any(line.startswith(start) for line in skipped or ())
        ]
        return kept

    def read(self, index):
        """The `Picture` of image `index`; grey values by the recorded window."""
        return pictures.read_image(self.path(index), self.window)

    def load(self, index):
        """Image `index` as shown, a `Picture`, and its masks, uint8 (C, H, W) of 0 and 1."""
        image = self.read(index)
        return image, self.load_masks(index, image.size)

    def load_masks(self, index, size, shape=None):
        """The masks of image `index`, uint8 (C, H, W) of 0 and 1; size: its (width, height).

        shape: another (height, width), to which `resize_nearest` would bring them. Many classes of
        a large image take memory for that size alone.
        """
        shape = shape or (size[1], size[0])
        masks = np.zeros((self.n_classes, *shape), np.uint8)
        for channel, mask in self.run_lengths(index, size).items():
            masks[channel] = mask.draw(*shape)
        return masks

    def true_masks(self, index, size=None):
        """The `ClassMasks` of image `index` at its own size: what predictions are scored by.

        size: its (width, height), if it was read already.
        """
        if size is None:
            record, path = self.coco.imgs[self.image_ids[index]], self.path(index)
            # Where height and width are exchanged, the record may have either size.
            turned = samples.stored_orientation(path)[0] > 4
            size = self.read(index).size if turned else (record["width"], record["height"])
        shape = (self.n_classes, *size[::-1])
        return ClassMasks(self.run_lengths(index, size), shape)

    def run_lengths(self, index, size):
        """{channel: RunLengths} of the classes that image `index`, of (width, height), has.

        Outlines are of the image as it is shown; where the record has the size before turning
        (EXIF), if that is another, they are of the stored image and are turned along.
        """
        record, path = self.coco.imgs[self.image_ids[index]], self.path(index)
        width, height, orientation = record["width"], record["height"], 1
        if (width, height) != tuple(size):
            if (height, width) == tuple(size):
                orientation, _ = samples.stored_orientation(path)
            if orientation < 5:
                actual, recorded = f"{size[0]}x{size[1]}", f"{width}x{height}"
                raise ValueError(f"{path}: is {actual}, but its record says {recorded}")
        outlines = {}
        for annotation in self.coco.imgToAnns.get(record["id"], ()):
            channel = 0
            if self.channel_of is not None:
                channel = self.channel_of.get(annotation["category_id"])
                if channel is None:  # a category that is not asked for
                    continue
            try:
                outline = coco_json.read_segmentation(annotation.get("segmentation"), height, width)
            except ValueError as error:
                raise ValueError(f"{path}: annotation {annotation.get('id')}: {error}") from None
            outlines.setdefault(channel, []).append(outline)
        masks = {channel: unite(parts) for channel, parts in sorted(outlines.items())}
        if orientation == 1:
            return masks
        drawn = {channel: mask.draw() > 0 for channel, mask in masks.items()}
        return {channel: encode(samples.turn(mask, orientation)) for channel, mask in drawn.items()}

    def preprocess(self, index):
        """Image `index` at training size, uint8 (S, S, n_channels), and its masks (C, S, S)."""
        image = self.read(index)
        pixels = pictures.preprocess(image, self.image_size, self.n_channels)
        return pixels, self.load_masks(index, image.size, pixels.shape[:2])

    def row(self, index):
        """Image `index` at training size and its masks: uint8 (S, S, n_channels + bytes).

        The mask of class k is bit k % 8 of the byte k // 8.
        """
        image = self.read(index)
        if image.orientation > 1:
            self.turned.add(index)
        pixels = pictures.preprocess(image, self.image_size, self.n_channels)
        height, width = pixels.shape[:2]
        row = np.zeros((height, width, self.row_shape[-1]), np.uint8)
        row[..., : self.n_channels] = pixels
        for channel, mask in self.run_lengths(index, image.size).items():
            byte = self.n_channels + channel // 8
            row[..., byte] |= mask.draw(height, width) << channel % 8
        return row


class ClassMasks(NamedTuple):
    """The masks of an image, drawn one after the other, for those of many classes are large.

    parts: {channel: RunLengths}; shape: (C, H, W).
    """

    parts: dict
    shape: tuple

    def __iter__(self):
        """Yield a bool array (H, W) for each class."""
        for channel in range(self.shape[0]):
            if channel in self.parts:
                yield self.parts[channel].draw(*self.shape[1:]) > 0
            else:
                yield np.zeros(self.shape[1:], bool)


def open_split(
    root,
    split,
    image_size=pictures.IMAGE_SIZE,
    *,
    skipped=None,
    classes=None,
    n_channels=3,
    coco=None,
):
    """The COCOSegmentationDataset of root/split; `skipped` as in `load_split`.

    coco: what `load_coco` has read of it, where that is at hand.
    """
    folder, forgiven = Path(root) / split, Counter()
    coco = coco or coco_json.load_coco(folder, skipped, forgiven)
    dataset = COCOSegmentationDataset(
        coco, folder, image_size=image_size, classes=classes, n_channels=n_channels
    )
    dataset.forgiven = forgiven
    return dataset


def load_split(
    root, split, image_size=pictures.IMAGE_SIZE, *, skipped=None, classes=None, n_channels=3
):
    """Every image of a split at training size: uint8 array (N, S, S, n_channels + bytes).

    S = image_size; with None, every image keeps its own size, and the result is a
    `medseg.cache.RaggedRows` of N arrays (H, W, n_channels + bytes). The last bytes are the masks,
    see COCOSegmentationDataset.row: with a single class, 0 and 1. Made once, in parallel, kept in
    root/.cache and mapped into memory (`medseg.cache`).
    skipped: a list; damaged images are left out and each adds a line to it. Without it they are a
    ValueError that counts them and names the first. Raises FileNotFoundError.
    """
    dataset = open_split(
        root, split, image_size, skipped=skipped, classes=classes, n_channels=n_channels
    )
    return cached_rows(dataset, Path(root) / ".cache", split, skipped=skipped)


def count_channels(root, chosen):
    """The channels of the images of a data set: as the import recorded, or its first image has.

    chosen: 1 or 3, which is returned where that is grey or colour. ValueError for another number
    that the images do not have.
    """
    count = count_recorded(coco_json.recorded_settings(Path(root) / "train"))
    if count is None:
        dataset = open_split(root, "train", skipped=[])
        of_tiff = dataset.path(0).suffix.lower() in (".tif", ".tiff")  # no other has more than 3
        count = dataset.read(0).n_channels if of_tiff else 3
        if count in (1, 3) and chosen in (1, 3):
            return chosen
    if chosen not in (1, 3, count):
        raise ValueError(f"--n-channels {chosen}: the images of {root} have {count}")
    return count


def split_rows(rows, n_channels, n_classes):
    """uint8 tensor (B, S, S, n_channels + bytes) -> images and masks as a network takes them.

    Images: float32 (B, n_channels, S, S) normalised; masks: float32 (B, n_classes, S, S).
    """
    masks = rows[..., n_channels:]
    if n_classes > 1:
        bits = torch.arange(8, dtype=torch.uint8, device=rows.device)
        masks = ((masks[..., None] >> bits) & 1).flatten(-2)[..., :n_classes]
    return normalize(rows[..., :n_channels]), masks.permute(0, 3, 1, 2).float().contiguous()


class Batches:
    """The batches of a split, on the device and normalised: what a DataLoader is to a Dataset.

    rows: uint8 array (N, S, S, n_channels + bytes) or RaggedRows, see `load_split`. Iterating
    yields (images float32 (B, n_channels, S, S), masks float32 (B, n_classes, S, S) of 0 and 1).
    With shuffle, the order is a function of seed and epoch alone, and so are the crops and, with
    `strengths` ({name: number} of `medseg.augment.AUGMENTATIONS`), what `augment` does to each.
    crop: side of square crops of the images, see `medseg.crop`; each image is drawn as often as
    they would tile it. repeat: how often, times that, an epoch draws each image; of 0.1, a tenth
    of them, which with shuffle are others in each epoch. dataset: of the rows, if `true_masks` are
    wanted. RaggedRows without crop come one image at
    a time, for each process.
    On a GPU with room for it the whole split is moved there once, so that an epoch copies nothing.
    Of `world` processes each gets every world-th image of a batch, from its `rank` on; batch_size
    is that over all processes. names: of the images, see `names_in_order`.
    """

    def __init__(
        self,
        rows,
        batch_size,
        device="cpu",
        *,
        shuffle=False,
        seed=0,
        rank=0,
        world=1,
        strengths=None,
        crop=None,
        repeat=1,
        n_channels=3,
        n_classes=1,
        names=(),
        dataset=None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: it must be at least 1")
        self.rows, self.device, self.crop = rows, torch.device(device), crop
        self.shuffle, self.seed, self.rank, self.world = shuffle, seed, rank, world
        self.strengths, self.n_channels, self.n_classes = strengths or {}, n_channels, n_classes
        self.names, self.dataset = names, dataset
        self.images = self._open_images()
        self.images_per_epoch = max(round(repeat * len(self.images.numbers)), 1)
        self.one_by_one = type(self.images) is OwnSizes
        self.batch_size = world if self.one_by_one else batch_size
        self.set_epoch(0)

    def _open_images(self):
        """Where the pixels come from: OneSize, OwnSizes or Crops, on the GPU if it has room."""
        rows, ragged = self.rows, isinstance(self.rows, RaggedRows)
        if self.crop and not ragged:
            rows, ragged = RaggedRows.of_array(rows), True
        pixels = rows.pixels if ragged else rows
        self.memory_map = getattr(pixels, "_mmap", None)
        pixels = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if pixels.nbytes < 0.4 * free:
                pixels = pixels.to(self.device)
        if not ragged:
            return OneSize(pixels)
        if not self.crop:
            return OwnSizes(pixels, rows.starts, rows.sizes)
        window = window_side(self.crop, self.strengths)
        return Crops(pixels, rows.starts, rows.sizes, self.crop, window)

    def whole_images(self, most):
        """Batches of the images as prediction takes them; of more than `most`, so many at random.

        This process has them all.
        """
        return Batches(
            self.rows,
            max(self.batch_size // self.world, 1),
            self.device,
            shuffle=True,
            seed=self.seed,
            repeat=min(1, most / len(self.rows)),
            n_channels=self.n_channels,
            n_classes=self.n_classes,
        )

    def __len__(self):
        return math.ceil(self.images_per_epoch / self.batch_size)

    def set_epoch(self, epoch, start=0):
        """Choose the order of the next pass, and the batch it begins with (to resume within)."""
        self.epoch, self.start = epoch, start

    def __iter__(self):
        generator = self._generator()
        order = self._order(generator)
        columns = [count_draws(self.strengths, self.n_channels), self.images.n_draws]
        draws = torch.rand(len(order), sum(columns), generator=generator)
        for_augment, for_images = draws.split(columns, 1)
        for first, end in self._bounds(len(order)):
            mine = slice(first + self.rank, end, self.world)
            pixels = self.images.gather(order[mine], for_images[mine])
            images, masks = split_rows(self._to_device(pixels), self.n_channels, self.n_classes)
            if self.strengths and len(images):
                images, masks = self._augment(images, masks, for_augment[mine], first, end)
            yield images, masks

    def _bounds(self, count):
        """(first, end) of each batch of this pass, in the order of `count` images."""
        for first in range(self.start * self.batch_size, count, self.batch_size):
            yield first, min(first + self.batch_size, count)

    def names_in_order(self):
        """The names of the images that this pass yields here, a list; empty where they miss."""
        if len(self.names) != len(self.rows):
            return []
        return [self.names[number] for number in self.row_numbers()]

    def row_numbers(self):
        """The numbers of the rows that this pass yields here, in order, a list."""
        order = self._order(self._generator()).tolist()
        mine = (
            order[first + self.rank : end : self.world] for first, end in self._bounds(len(order))
        )
        return [number for numbers in mine for number in numbers]

    def true_masks(self, number, masks):
        """The masks (C, H, W) of a row at the image's own size; masks: those of its batch.

        They are returned where nothing tells which image it is.
        """
        return self.dataset.true_masks(number) if self.knows_images else masks.cpu().numpy() > 0.5

    @property
    def knows_images(self):
        """Whether a data set tells which image a row is."""
        return self.dataset is not None and len(self.dataset) == len(self.rows)

    def original(self, position):
        """Image `position` of this pass as shown: uint8 (H, W, 3) and its masks, bool (C, H, W).

        Only where `knows_images`.
        """
        image, masks = self.dataset.load(self.row_numbers()[position])
        return np.asarray(image.rgb()), masks > 0

    def _order(self, generator):
        """The numbers of the images of an epoch, int64 (images_per_epoch,)."""
        numbers = self.images.numbers
        whole, rest = divmod(self.images_per_epoch, len(numbers))
        order = numbers.repeat(whole)
        if rest:  # of a part of the images, some others each time
            if self.shuffle:
                numbers = numbers[torch.randperm(len(numbers), generator=generator)]
            order = torch.cat([order, numbers[:rest]])
        if self.shuffle:
            order = order[torch.randperm(len(order), generator=generator)]
        return order

    def _to_device(self, pixels):
        if self.device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.pin_memory()  # the copy then waits in the GPU's queue, and we do not
        pixels = pixels.to(self.device, non_blocking=True)
        if hasattr(self.memory_map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self.memory_map.madvise(mmap.MADV_DONTNEED)  # else the process grows to the file's size
        return pixels

    def _augment(self, images, masks, draws, first, end):
        """`augment` our part of the batch of the images `first` to `end` - 1 of the order."""
        size, noise = (self.crop, self.crop) if self.crop else images.shape[-2:], None
        if self.strengths.get("noise"):
            noise = self._noise(first, end, size)
        return augment(images, masks, draws, self.strengths, size=size, noise=noise)

    def _generator(self, device="cpu", position=0):
        """Random numbers of this seed and epoch, and of the image at a position of its order."""
        seed = self.seed * 1_000_003 + self.epoch + position * 1_000_003**2
        return torch.Generator(device).manual_seed(seed % 2**63)

    def _noise(self, first, end, size):
        """Standard normal noise for our part of the batch of the images `first` to `end` - 1.

        Drawn on the device for the batch of all processes, so that it is the same in any number of
        them; where the images differ in size, for each image.
        """
        count, mine = end - first, slice(self.rank, None, self.world)
        if self.one_by_one:
            first, count, mine = first + self.rank, 1, slice(None)
        generator = self._generator(self.device, 1 + first)  # 0: the order's
        shape = (count, self.n_channels, *size)
        return torch.randn(shape, generator=generator, device=self.device)[mine]


def describe_turned(count, total):
    """What to say where `count` images of a split of `total` are stored turned."""
    return (
        f"{count} of {total} images are stored turned (EXIF): they are read as they are shown, "
        "and so are their outlines, unless a record has the stored size"
    )


def make_loaders(args, root, model, device, skipped):
    """{split: Batches} as the flags of train.py and the network ask for; with --test-only of test.

    The images of train are shuffled, cropped and changed, and no others. skipped: as in
    `load_split`. Raises ValueError where a batch has fewer images than there are processes.
    """
    rank, world = dist.rank_and_world()
    if args.batch_size < world:
        raise ValueError(
            f"--batch-size {args.batch_size} is over all {world} processes together: "
            f"give at least {world}"
        )
    each = args.classes == "each" or model.n_classes > 1
    classes, n_channels = list(model.info.class_names) if each else None, model.n_channels
    changes = {"crop": args.crop, "repeat": args.repeat}
    changes["strengths"] = parse_named_values(args.augment, AUGMENTATIONS)
    loaders = {}
    with dist.first_on_each_machine():
        for split in ("test",) if args.test_only else coco_json.SPLITS:
            dataset = open_split(
                root,
                split,
                model.info.image_size,
                skipped=skipped,
                classes=classes,
                n_channels=n_channels,
            )
            rows = cached_rows(dataset, Path(root) / ".cache", split, skipped=skipped)
            if dist.is_first():
                print_forgiven(dataset.forgiven, f"{split}: ")
            if dataset.turned:  # once, when the cache is made
                print(f"{split}: {describe_turned(len(dataset.turned), len(dataset))}")
            train = split == "train"
            loaders[split] = Batches(
                rows,
                args.batch_size,
                device,
                shuffle=train,
                seed=args.seed,
                rank=rank,
                world=world,
                n_channels=n_channels,
                n_classes=model.n_classes,
                names=dataset.without(skipped).names() if split == "test" else (),
                dataset=dataset.without(skipped) if split != "train" else None,
                **changes if train else {},
            )
    tune_convolutions(device, one_size=not any(own.one_by_one for own in loaders.values()))
    return loaders


def main(argv=None):
    """The command line, which stands on this file as any wing does."""
    from medseg.planning.command import main as audit_or_plan

    audit_or_plan(argv)


if __name__ == "__main__":
    run_main(main)
