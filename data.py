"""From a data set on disk to batches on the device (the tutorial's section 2).

examples:
  python data.py                             # audit dataset/: counts, problems, a contact sheet
  python data.py dataset/synthetic --out /tmp
  python data.py --grouped-split grouped     # split anew, neighbouring slices kept together

A data set is a folder with train/, valid/ and test/; each holds images and
`_annotations.coco.json`. Every image is decoded and every annotation rasterised once, to uint8 at
training size. The result is kept in ROOT/.cache as one array per split, (N, size, size, 4): red,
green, blue, mask (of several classes, a bit each).
"""

import functools
import hashlib
import json
import math
import mmap
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from medseg.audit import audit, grouped_split, require_data_set
from medseg.cache import cached_rows
from medseg.cli import ArgumentParser, output_folder, run_main
from medseg.coco import (
    ANNOTATIONS,
    SPLITS,
    image_path,
    load_coco,
    rasterize,
    used_categories,
)
from medseg.images import IMAGE_SIZE, mean_and_std, preprocess, read_image, resize_nearest


class COCOSegmentationDataset(Dataset):
    """The images of one split with their annotations, crowds included, as masks.

    coco: pycocotools COCO (`load_coco`, or `COCO(file)`); image_dir: where its file_names are.
    An item is (image float32 (n_channels, S, S) normalised, mask float32 (C, S, S) of 0 and 1),
    with S = image_size. With `transform`, as in the tutorial, the image is transform(uint8 array
    (H, W, 3)) and the mask is resized to its height and width.
    classes: names of categories, each a channel of the mask; None, the tutorial's way, is a single
    channel with the union of all annotations. n_channels: 3, or 1 for grey images.
    Items raise FileNotFoundError, or ValueError naming the file, where an image or annotation is
    damaged.
    """

    def __init__(
        self, coco, image_dir, transform=None, *, image_size=IMAGE_SIZE, classes=None, n_channels=3
    ):
        self.coco, self.image_dir, self.transform = coco, Path(image_dir), transform
        self.image_size, self.n_channels, self.classes = image_size, n_channels, classes
        self.channel_of = None  # {category id: channel of the mask}
        if classes is not None:
            channels = {name: channel for channel, name in enumerate(classes)}
            used = used_categories(coco)
            self.channel_of = {
                key: channels[name] for name, ids in used.items() if name in channels for key in ids
            }
        self.n_classes = 1 if classes is None else len(classes)
        self.image_ids = coco.getImgIds()
        if not self.image_ids:
            raise ValueError(f"{self.image_dir}: {ANNOTATIONS} lists no images")

    @property
    def row_shape(self):
        """Of `row`: eight classes share a byte."""
        return (self.image_size, self.image_size, self.n_channels + math.ceil(self.n_classes / 8))

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
        image, masks = self.load(index)
        image = self.transform(np.array(image))
        masks = [resize_nearest(mask, *image.shape[-2:]) for mask in masks]
        return image, torch.from_numpy(np.stack(masks)).float()

    def path(self, index):
        """Where the image is. ValueError for a file_name that leads out of image_dir."""
        return image_path(self.image_dir, self.coco.imgs[self.image_ids[index]]["file_name"])

    def load(self, index):
        """Image `index` as stored: PIL RGB image and its masks, uint8 (C, H, W) of 0 and 1."""
        record = self.coco.imgs[self.image_ids[index]]
        path = self.path(index)
        image = read_image(path)
        width, height = image.size
        if (width, height) != (record["width"], record["height"]):
            recorded = f"{record['width']}x{record['height']}"
            raise ValueError(f"{path}: is {width}x{height}, but its record says {recorded}")
        masks = np.zeros((self.n_classes, height, width), np.uint8)
        for annotation in self.coco.imgToAnns.get(record["id"], ()):
            channel = 0
            if self.channel_of is not None:
                channel = self.channel_of.get(annotation["category_id"])
                if channel is None:  # a category that is not asked for
                    continue
            try:
                masks[channel] |= rasterize(annotation.get("segmentation"), height, width)
            except ValueError as error:
                raise ValueError(f"{path}: annotation {annotation.get('id')}: {error}") from None
        return image, masks

    def row(self, index):
        """Image `index` at training size and its masks: uint8 (S, S, n_channels + bytes).

        The mask of class k is bit k % 8 of the byte k // 8.
        """
        image, masks = self.load(index)
        size = self.image_size
        masks = np.stack([resize_nearest(mask, size, size) for mask in masks], axis=2)
        pixels = preprocess(image, size, self.n_channels)
        return np.concatenate([pixels, np.packbits(masks, axis=2, bitorder="little")], axis=2)


def open_split(root, split, image_size=IMAGE_SIZE, *, skipped=None, classes=None, n_channels=3):
    """The COCOSegmentationDataset of root/split; `skipped` as in `load_split`."""
    folder = Path(root) / split
    coco = load_coco(folder, skipped)
    return COCOSegmentationDataset(
        coco, folder, image_size=image_size, classes=classes, n_channels=n_channels
    )


def load_split(root, split, image_size=IMAGE_SIZE, *, skipped=None, classes=None, n_channels=3):
    """Every image of a split at training size: uint8 array (N, S, S, n_channels + bytes).

    S = image_size; the last bytes are the masks, see COCOSegmentationDataset.row: with a single
    class, 0 and 1. Made once, in parallel, kept in root/.cache and mapped into memory
    (`medseg.cache`).
    skipped: a list; damaged images are left out and each adds a line to it. Without it they are a
    ValueError that counts them and names the first. Raises FileNotFoundError.
    """
    dataset = open_split(
        root, split, image_size, skipped=skipped, classes=classes, n_channels=n_channels
    )
    return cached_rows(dataset, Path(root) / ".cache", split, skipped=skipped)


def normalize(pixels):
    """uint8 tensor (B, H, W, C) -> float32 (B, C, H, W), mean 0 and deviation 1 by MEAN and STD.

    C is 3, or 1 for grey. The memory stays in the order of the pixels, which is what PyTorch
    calls channels_last.
    """
    mean, std = _mean_and_std(pixels.shape[-1], pixels.device)
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # in place: one array, not three


@functools.cache
def _mean_and_std(n_channels, device):
    """Of 0..255 and on the device, once: a copy in every step would wait for the GPU."""
    mean, std = mean_and_std(n_channels)
    return torch.tensor(mean, device=device) * 255, torch.tensor(std, device=device) * 255


def split_rows(rows, n_channels, n_classes):
    """uint8 tensor (B, S, S, n_channels + bytes) -> images and masks as a network takes them.

    Images: float32 (B, n_channels, S, S) normalised; masks: float32 (B, n_classes, S, S).
    """
    masks = rows[..., n_channels:]
    if n_classes > 1:
        bits = torch.arange(8, dtype=torch.uint8, device=rows.device)
        masks = ((masks[..., None] >> bits) & 1).flatten(-2)[..., :n_classes]
    return normalize(rows[..., :n_channels]), masks.permute(0, 3, 1, 2).float().contiguous()


def augment(images, masks, draws):
    """Rotate, scale, shift and brighten each image in a way of its own; shapes stay.

    images: float32 (B, 1 or 3, H, W) normalised; masks: float32 (B, C, H, W) of 0 and 1, and so
    they stay; draws: (B, 6) uniform in 0..1, on the CPU, which decide what happens to each image.
    Image and mask go through the same map, the image bilinear, the mask nearest. All of it is
    slight (5 degrees, 10 % scale, 5 % shift), for the masks are boxes, which a large rotation
    leaves askew.
    """
    draws = 2 * draws - 1
    angle, scale = draws[:, 0] * math.radians(5), 1.1 ** draws[:, 1]
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    rotation = rotation.view(-1, 2, 2) * scale[:, None, None]
    theta = torch.cat([rotation, 0.05 * draws[:, 2:4, None]], 2)  # (B, 2, 3): from new to old
    light = torch.stack([1.1 ** draws[:, 4], 0.1 * draws[:, 5]], 1)  # (B, 2): contrast, brightness
    theta = theta.to(images.device, non_blocking=True)
    light = light.to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    contrast, brightness = light[:, 0, None, None, None], light[:, 1, None, None, None]
    images = torch.addcmul(brightness, images, contrast)
    return images.contiguous(memory_format=torch.channels_last), masks


class Batches:
    """The batches of a split, on the device and normalised: what a DataLoader is to a Dataset.

    rows: uint8 array (N, S, S, n_channels + bytes) of `load_split`. Iterating yields (images
    float32 (B, n_channels, S, S), masks float32 (B, n_classes, S, S) of 0 and 1). With shuffle,
    the order is a function of seed and epoch alone, and so, with augmented, is what `augment`
    does to each image.
    On a GPU with room for it the whole split is moved there once, so that an epoch copies nothing.
    Of `world` processes each gets every world-th image of a batch, from its `rank` on; batch_size
    is that over all processes, and so is `global_batch_size`, the size of the batch last yielded.
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
        augmented=False,
        n_channels=3,
        n_classes=1,
    ):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: it must be at least 1")
        self.rows, self.batch_size = torch.from_numpy(rows), batch_size
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.shuffle, self.seed, self.augmented = shuffle, seed, augmented
        self.n_channels, self.n_classes = n_channels, n_classes
        self.memory_map = getattr(rows, "_mmap", None)
        self.set_epoch(0)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if rows.nbytes < 0.4 * free:
                self.rows = self.rows.to(self.device)

    def __len__(self):
        return math.ceil(len(self.rows) / self.batch_size)

    def set_epoch(self, epoch, start=0):
        """Choose the order of the next pass, and the batch it begins with (to resume within)."""
        self.epoch, self.start = epoch, start

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order, draws = torch.arange(len(self.rows)), None
        if self.shuffle:
            order = torch.randperm(len(self.rows), generator=generator)
        if self.augmented:
            draws = torch.rand(len(self.rows), 6, generator=generator).split(self.batch_size)
        batches = order.to(self.rows.device).split(self.batch_size)
        mine = slice(self.rank, None, self.world)
        for number in range(self.start, len(batches)):
            self.global_batch_size = len(batches[number])
            images, masks = self._load(batches[number][mine])
            if self.augmented and len(images):
                images, masks = augment(images, masks, draws[number][mine])
            yield images, masks

    def _load(self, indices):
        batch = self.rows[indices]
        if self.device.type == "cuda" and not batch.is_cuda:
            batch = batch.pin_memory()  # the copy then waits in the GPU's queue, and we do not
        batch = batch.to(self.device, non_blocking=True)
        if hasattr(self.memory_map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self.memory_map.madvise(mmap.MADV_DONTNEED)  # else the process grows to the file's size
        return split_rows(batch, self.n_channels, self.n_classes)


def main(argv=None):
    parser = ArgumentParser("data.py", __doc__)
    parser.add_argument("root", nargs="?", default="dataset", help="the data set")
    parser.add_argument("--out", default=".", metavar="FOLDER", help="folder for contact_sheet.jpg")
    parser.add_argument(
        "--grouped-split",
        metavar="FOLDER",
        help="write the images to FOLDER instead, split by blocks of neighbouring file numbers",
    )
    args = parser.parse_args(argv)
    if args.grouped_split:
        target = grouped_split(args.root, args.grouped_split)
        for split in SPLITS:
            print(f"{split}: {len(load_coco(target / split).imgs)} images")
        name = shlex.quote(str(target))
        print(f"next: python data.py {name}, python train.py --data {name}")
        return
    root = Path(args.root)
    require_data_set(root)
    problems = audit(root, output_folder(args.out), open_split)
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise ValueError(
            f"{args.root}: {len(problems)} problem(s), listed above: "
            "mend or remove them before training"
        )


if __name__ == "__main__":
    run_main(main)
