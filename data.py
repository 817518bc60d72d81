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
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from medseg import coco as coco_json
from medseg import dist, samples
from medseg import images as pictures
from medseg.batches import Batches, Order, Transform
from medseg.cache import cached_rows
from medseg.cli import run_main
from medseg.coco_dialects import print_forgiven
from medseg.device import tune_convolutions
from medseg.normalization import split_rows
from medseg.run_lengths import ClassMasks, encode, unite
from medseg.settings import channel_names

TURNED = (
    "of {} images are stored turned (EXIF): they are read as they are shown, and so are their "
    "outlines, unless a record has the stored size"
)


class COCOSegmentationDataset(Dataset):
    """The images of one split with their annotations, crowds included, as masks.

    coco: pycocotools COCO (`load_coco`, or `COCO(file)`); image_dir: where its file_names are.
    An item is (image float32 (n_channels, S, S) normalised, mask float32 (C, S, S) of 0 and 1),
    with S = image_size; with None, of the image's own height and width. With `transform`, as in
    the tutorial, the image is transform(uint8 array (H, W, 3)) and the mask is resized to its
    height and width.
    classes: names of categories, each a channel of the mask; None, the tutorial's way, is a single
    channel with the union of all annotations. n_channels: 3, or 1 for grey images.
    Pixels of the category `ignore` are -1 in the masks of all classes: they count nowhere.
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
        self.recorded = coco_json.recorded_settings(image_dir, coco.dataset)
        window = self.recorded["window"]
        self.window = window if isinstance(window, tuple) else None  # else volumes had theirs
        self.forgiven = {}  # what `load_coco` counted
        self.turned = set()  # indices of the images that `row` has read and turned (EXIF)
        self.n_classes = 1 if classes is None else len(classes)
        ignored = coco_json.ignored(coco)
        self.ignores = any(one["category_id"] in ignored for one in coco.anns.values())
        self.channel_of = dict.fromkeys(ignored, self.n_classes)  # {category id: channel of masks}
        for name, ids in coco_json.used_categories(coco).items():
            if classes is None or name in classes:
                self.channel_of |= dict.fromkeys(ids, classes.index(name) if classes else 0)
        self.image_ids = coco.getImgIds()
        if not self.image_ids:
            raise ValueError(f"{self.image_dir}: {coco_json.ANNOTATIONS} lists no images")

    @property
    def row_shape(self):
        """Of `row`, without a height and width of the image's own: eight classes share a byte."""
        side = (self.image_size, self.image_size) if self.image_size else ()
        return (*side, self.n_channels + math.ceil((self.n_classes + self.ignores) / 8))

    @property
    def channel_names(self):
        """As the import recorded them: see `medseg.settings.channel_names`."""
        return channel_names(self.recorded["channels"], self.recorded["context"])

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
        """Image `index` as shown, a `Picture`, and its masks: see `load_masks`."""
        image = self.read(index)
        return image, self.load_masks(index, image.size)

    def load_masks(self, index, size, shape=None):
        """The masks of image `index`, int8 (C, H, W) of 0, 1 and -1; size: its (width, height).

        shape: another (height, width), to which `resize_nearest` would bring them. Many classes of
        a large image take memory for that size alone.
        """
        shape = shape or (size[1], size[0])
        masks = np.zeros((self.n_classes, *shape), np.int8)
        for channel, mask in self.outlines(index, size).items():
            if channel < self.n_classes:
                masks[channel] = mask.draw(*shape)
            else:
                masks[:, mask.draw(*shape) > 0] = -1
        return masks

    def true_masks(self, index, size=None):
        """The `ClassMasks` of image `index` at its own size: what predictions are scored by.

        size: its (width, height), if it was read already.
        """
        size = size or coco_json.shown_size(self.path(index))
        shape = (self.n_classes, *size[::-1])
        return ClassMasks(self.outlines(index, size), shape)

    def outlines(self, index, size):
        """{class: RunLengths} of image `index`, of (width, height); at n_classes what to ignore.

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

    def row(self, index):
        """Image `index` at training size and its masks: uint8 (S, S, n_channels + bytes).

        The mask of class k is bit k % 8 of the byte k // 8; that of what is ignored comes last.
        """
        image = self.read(index)
        if image.orientation > 1:
            self.turned.add(index)
        pixels = pictures.preprocess(image, self.image_size, self.n_channels)
        height, width = pixels.shape[:2]
        row = np.zeros((height, width, self.row_shape[-1]), np.uint8)
        row[..., : self.n_channels] = pixels
        for channel, mask in self.outlines(index, image.size).items():
            drawn, byte = mask.draw(height, width), self.n_channels + channel // 8
            if channel == self.n_classes:
                row[drawn > 0, self.n_channels :] = 0
            row[..., byte] |= drawn << channel % 8
        return row


def open_split(
    root, split, image_size=pictures.IMAGE_SIZE, *, skipped=None, classes=None, n_channels=3
):
    """The COCOSegmentationDataset of root/split; `skipped` as in `load_split`."""
    folder, forgiven = Path(root) / split, Counter()
    options = {"image_size": image_size, "classes": classes, "n_channels": n_channels}
    coco = coco_json.load_coco(folder, skipped, forgiven)
    dataset = COCOSegmentationDataset(coco, folder, **options)
    dataset.forgiven = forgiven
    return dataset


def load_split(root, split, image_size=pictures.IMAGE_SIZE, *, skipped=None, **options):
    """Every image of a split at training size: uint8 array (N, S, S, n_channels + bytes).

    S = image_size; with None, every image keeps its own size, and the result is a
    `medseg.cache.RaggedRows` of N arrays (H, W, n_channels + bytes). The last bytes are the masks,
    see COCOSegmentationDataset.row: with a single class, 0 and 1. Made once, in parallel, kept in
    root/.cache and mapped into memory (`medseg.cache`).
    skipped: a list; damaged images are left out and each adds a line to it. Without it they are a
    ValueError that counts them and names the first. options: classes and n_channels, as for
    `open_split`. Raises FileNotFoundError.
    """
    return cached_rows(open_split(root, split, image_size, skipped=skipped, **options), skipped)


def count_channels(root, chosen):
    """The channels of the images of a data set: as the import recorded, or its first image has.

    chosen: 1 or 3, which is returned where that is grey or colour. ValueError for another number
    that the images do not have.
    """
    recorded = coco_json.recorded_settings(Path(root) / "train")
    count = len(channel_names(recorded["channels"], recorded["context"]))
    if not count:
        dataset = open_split(root, "train", skipped=[])
        of_tiff = dataset.path(0).suffix.lower() in (".tif", ".tiff")  # no other has more than 3
        count = dataset.read(0).n_channels if of_tiff else 3
        if count in (1, 3) and chosen in (1, 3):
            return chosen
    if chosen not in (1, 3, count):
        raise ValueError(f"--n-channels {chosen}: the images of {root} have {count}")
    return count


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
    classes = list(model.info.class_names) if each else None
    options = {"classes": classes, "n_channels": model.n_channels, "skipped": skipped}
    order = Order(args.batch_size, seed=args.seed, rank=rank, world=world)
    plain = Transform(model.n_channels, model.n_classes)
    loaders = {}
    with dist.first_on_each_machine():
        for split in ("test",) if args.test_only else coco_json.SPLITS:
            dataset = open_split(root, split, model.info.image_size, **options)
            rows = cached_rows(dataset, skipped)
            notes = dataset.forgiven
            if dataset.turned:  # once, when the cache is made
                notes[TURNED.format(len(dataset))] = len(dataset.turned)
            if dist.is_first():
                print_forgiven(notes, f"{split}: ")
            if split == "train":
                drawn = replace(order, shuffle=True, repeat=args.repeat, foreground=args.foreground)
                changed = replace(plain, crop=args.crop, strengths=args.augment)
                loaders[split] = Batches(rows, drawn, device, transform=changed)
            else:
                known = dataset.without(skipped)
                loaders[split] = Batches(rows, order, device, transform=plain, dataset=known)
    tune_convolutions(device, one_size=not any(own.one_by_one for own in loaders.values()))
    return loaders


def main(argv=None):
    """The command line, which stands on this file as any wing does."""
    from medseg.planning.command import main as audit_or_plan

    audit_or_plan(argv)


if __name__ == "__main__":
    run_main(main)
