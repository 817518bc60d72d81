"""From a data set on disk to batches on the device (the tutorial's section 2).

    python data.py                 # audit dataset/: what is in it, what is wrong with it, a contact sheet
    python data.py dataset/synthetic --out /tmp
    python data.py --grouped-split grouped   # the same images, split so that neighbouring slices stay together

A data set is a folder with train/, valid/ and test/; each holds images and `_annotations.coco.json`.
Every image is decoded and every annotation rasterised once, to uint8 at training size; the result is
kept in ROOT/.cache as one array per split, (N, size, size, 4): red, green, blue, mask.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import shlex
import shutil
import sys
import tempfile
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from net import IMAGE_SIZE

ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green, blue, in 0..1: the tutorial's
STD = (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG", "TIFF", "BMP")  # named, so that no rarely used decoder meets a stranger's file
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")
CACHE_VERSION = 1  # raise it when the pixels of a cached row change

# Pillow warns above 89 megapixels and refuses at twice that: refuse at once.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd metadata: the pixels are what counts, and an error where they are damaged


# ---- one image -------------------------------------------------------------------------------

def read_image(path):
    """The picture in a JPEG, PNG, TIFF or BMP file as a PIL image of mode RGB, its stored size kept.

    More than 8 bits a sample are scaled linearly to 0..255 from the range that holds the largest
    value: 8, 10, 12 or 16 bits (0..1 for floating point). Alpha is dropped.
    Raises FileNotFoundError; ValueError for what is not one whole picture of at most 89 megapixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"holds {frames} pictures: save each slice in a file of its own")
            image.load()
            return _to_8_bits(image) if image.mode[0] in "IF" else image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not an image") from None
    except PermissionError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"{path}: not a JPEG, PNG, TIFF or BMP image") from None
    except Exception as error:  # decoders raise many kinds on damaged files: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path}: {error}") from None


def _to_8_bits(image):
    with np.errstate(invalid="ignore"):  # what is not a number is refused below
        values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("has negative or non-finite pixels: rescale it to 0..65535 first")
    ranges = [1, 255, 1023, 4095, 65535] if image.mode == "F" else [255, 1023, 4095, 65535]
    white = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8)).convert("RGB")


def preprocess(image, image_size=IMAGE_SIZE):
    """PIL image -> uint8 array (image_size, image_size, 3), bilinear and antialiased.

    The one resizing of the project: training, evaluation and prediction all come through here.
    """
    return np.array(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR))


def normalize(pixels):
    """uint8 tensor (B, H, W, 3) -> float32 (B, 3, H, W), mean 0 and deviation 1 by MEAN and STD.

    The memory stays in the order of the pixels, which is what PyTorch calls channels_last.
    """
    mean, std = _statistics(pixels.device)
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)  # in place: one array, not three


@functools.cache
def _statistics(device):
    """MEAN and STD of 0..255 on the device, put there once: a copy from the host in every step would wait for the GPU."""
    return torch.tensor(MEAN, device=device) * 255, torch.tensor(STD, device=device) * 255


def augment(images, masks, draws):
    """Turn, scale, shift and light each image in a way of its own; shapes stay, masks stay 0 and 1.

    images float32 (B, 3, H, W) normalised, masks float32 (B, 1, H, W), on any device; draws: (B, 6) in 0..1 on the CPU,
    what each image's way is made from. Image and mask go through one and the same map, the image bilinear, the mask nearest.
    All of it is slight, for masks are boxes here, which a large turn leaves askew.
    """
    draws = 2 * draws - 1
    turn, scale = draws[:, 0] * math.radians(5), 1.1 ** draws[:, 1]
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    theta = torch.cat([rotation, 0.05 * draws[:, 2:4, None]], 2)  # (B, 2, 3): from new places to old ones
    light = torch.stack([1.1 ** draws[:, 4], 0.1 * draws[:, 5]], 1)
    theta, light = theta.to(images.device, non_blocking=True), light.to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    masks = F.grid_sample(masks, grid, "nearest", "zeros", align_corners=False)
    return torch.addcmul(light[:, 1, None, None, None], images, light[:, 0, None, None, None]).contiguous(memory_format=torch.channels_last), masks


# ---- annotations -----------------------------------------------------------------------------

def load_coco(folder, bad=None):
    """The annotations of one split folder as a pycocotools COCO object.

    bad: a list; each image that has to be left out because its record, or that of one of its annotations, is
    damaged adds a line to it. Without it, they are a ValueError.
    Raises FileNotFoundError for a missing folder or file; ValueError for what is not COCO: every image
    needs an id, a file_name, a width and a height, every annotation the image_id of one of them.
    """
    from pycocotools.coco import COCO

    folder = Path(folder)
    path = folder / ANNOTATIONS
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; get the data with `python download.py`, or name its place with --data")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; get the data again with `python download.py --force`")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.setdefault(key, [] if key == "categories" else None), list):
            raise ValueError(f"{path}: not COCO annotations: no list of {key}")
    problems = [f"{path}: not COCO annotations: {problem}" for problem in _drop_damaged_records(content)]
    if problems and bad is None:
        raise ValueError(problems[0] + _and_more(problems, folder.parent))
    if problems:
        bad.extend(problems)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(None):  # createIndex reports its progress
        coco.createIndex()
    return coco


def _and_more(problems, root):
    return f" ({len(problems)} such: `python data.py {root}` lists them)" if len(problems) > 1 else ""


def _drop_damaged_records(content):
    """Remove from `content` what COCO cannot index, and images with such an annotation; yield a reason for each."""
    good, spoiled = {}, set()  # images by id; ids of those that go
    for number, image in enumerate(content["images"]):
        reason = _image_problem(image, good)
        if reason:
            yield f"images[{number}] {reason}"
            spoiled |= {image["id"]} if isinstance(image, dict) and isinstance(image.get("id"), (int, str)) else set()
        else:
            good[image["id"]] = image
    annotations = []
    for number, annotation in enumerate(content["annotations"]):
        owner = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(owner, (int, str)) or owner not in good and owner not in spoiled:
            yield f"annotations[{number}] belongs to no image" + (f" (image_id {owner!r})" if isinstance(annotation, dict) else "")
        elif not all(isinstance(annotation.setdefault(key, default), (int, str, type(default))) for key, default in (("id", number), ("category_id", None))):
            yield f"annotations[{number}] has an id or category_id that is no number"
            spoiled.add(owner)
        else:
            annotations.append(annotation)
    for number, category in enumerate(content["categories"]):
        if not isinstance(category, dict) or not isinstance(category.get("id"), (int, str)):
            yield f"categories[{number}] has no id"
    content["images"] = [image for key, image in good.items() if key not in spoiled]
    content["annotations"] = [annotation for annotation in annotations if annotation["image_id"] not in spoiled]
    content["categories"] = [entry for entry in content["categories"] if isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))]


def _image_problem(image, earlier):
    """What is wrong with an image's record, or None."""
    if not isinstance(image, dict):
        return "is not an object"
    if not isinstance(image.get("id"), (int, str)) or image["id"] in earlier:
        return f"has id {image.get('id')!r}, which is missing or used twice"
    if not isinstance(image.get("file_name"), str):
        return "has no file_name"
    if not all(type(image.get(side)) is int and image[side] > 0 for side in ("width", "height")):
        return "has no whole, positive width and height"
    return None


def rasterize(segmentation, height, width):
    """One COCO segmentation -> uint8 array (height, width) of 0 and 1.

    segmentation: a list of polygons [x1, y1, x2, y2, ...] in pixels, or a run-length encoding
    {"size": [height, width], "counts": list or compressed string}, as crowds have it.
    Raises ValueError. The checks come first: pycocotools reads memory that is not its own when runs
    do not add up to the image, and allocates by the length of an outline, however far it leads.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            raise ValueError("no segmentation (a box alone does not say which pixels)")
        for polygon in segmentation:
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise ValueError("a polygon needs three points or more, as a flat list x1, y1, x2, y2, ...")
            if not all(type(value) in (int, float) for value in polygon):
                raise ValueError("a polygon holds something that is not a number")
            if not all(-side <= value <= 2 * side for side, values in ((width, polygon[::2]), (height, polygon[1::2]))
                       for value in values):  # false for NaN too
                raise ValueError(f"a polygon leads far outside the {width}x{height} image")
        from pycocotools import mask as coco_mask
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width)))
    if not isinstance(segmentation, dict):
        raise ValueError("a segmentation is neither polygons nor a run-length encoding")
    if segmentation.get("size") != [height, width]:
        raise ValueError(f"run-length encoding of size {segmentation.get('size')} on an image of {[height, width]}")
    counts = segmentation.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _decompress_counts(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts) \
            or sum(counts) != height * width:
        raise ValueError(f"run-length counts do not add up to {height} x {width} pixels")
    values = np.arange(len(counts), dtype=np.int64) % 2  # background first, then by turns
    return np.repeat(values.astype(np.uint8), counts).reshape(width, height).T  # columns first


def _decompress_counts(text):
    """COCO's compressed counts -> list of ints: 5 bits a character, low first, from the third on as differences."""
    codes = [byte - 48 for byte in (text if isinstance(text, bytes) else text.encode("utf-8"))]
    counts, value, shift = [], 0, 0
    for code in codes:
        if not 0 <= code < 64 or shift > 60:
            raise ValueError("compressed run-length counts are damaged")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:  # the last character of this count; its fifth bit is the sign
            if code & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def resize_nearest(mask, height, width):
    """(H, W) array -> (height, width): for each new pixel, the old one under its centre.

    torch calls this nearest-exact. The tutorial's plain nearest takes the corner, which shifts the mask
    against its image by half a new pixel.
    """
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(mask.shape, (height, width)))
    return mask[rows[:, None], columns]


# ---- the data set ----------------------------------------------------------------------------

class COCOSegmentationDataset(Dataset):
    """The images of one split with the union of their annotations, crowds included, as foreground.

    coco: pycocotools COCO (`load_coco`, or `COCO(file)`); image_dir: where its file_names are.
    An item is (image float32 (3, S, S) normalised, mask float32 (1, S, S) of 0 and 1), S = image_size.
    With `transform`, as in the tutorial, the image is transform(uint8 array (H, W, 3)) and the mask is
    resized to its height and width.
    Items raise FileNotFoundError, or ValueError naming the file, where image or annotation is damaged.
    """

    def __init__(self, coco, image_dir, transform=None, *, image_size=IMAGE_SIZE):
        self.coco, self.image_dir, self.transform, self.image_size = coco, Path(image_dir), transform, image_size
        self.image_ids = coco.getImgIds()
        if not self.image_ids:
            raise ValueError(f"{self.image_dir}: {ANNOTATIONS} lists no images")

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        if self.transform is None:
            row = torch.from_numpy(self.row(index))
            return normalize(row[None, ..., :3])[0], row[..., 3][None].float()
        image, mask = self.load(index)
        image = self.transform(np.array(image))
        return image, torch.from_numpy(resize_nearest(mask, *image.shape[-2:]))[None].float()

    def path(self, index):
        """Where the image is. ValueError for a file_name that leads out of image_dir."""
        name = self.coco.imgs[self.image_ids[index]]["file_name"]
        for flavour in (PurePosixPath(name), PureWindowsPath(name)):
            if flavour.is_absolute() or flavour.drive or ".." in flavour.parts or "\0" in name:
                raise ValueError(f"{self.image_dir / ANNOTATIONS}: file_name {name!r} leads out of the folder")
        return self.image_dir / name

    def load(self, index):
        """Image `index` as stored: PIL RGB image, and its mask, uint8 array (height, width) of 0 and 1."""
        record = self.coco.imgs[self.image_ids[index]]
        path = self.path(index)
        image = read_image(path)
        width, height = image.size
        if (width, height) != (record["width"], record["height"]):
            raise ValueError(f"{path}: is {width}x{height}, but its record says {record['width']}x{record['height']}")
        mask = np.zeros((height, width), np.uint8)
        for annotation in self.coco.imgToAnns.get(record["id"], ()):
            try:
                mask |= rasterize(annotation.get("segmentation"), height, width)
            except ValueError as error:
                raise ValueError(f"{path}: annotation {annotation.get('id')}: {error}") from None
        return image, mask

    def row(self, index):
        """Image `index` at training size with its mask as a fourth channel: uint8 array (S, S, 4)."""
        image, mask = self.load(index)
        mask = resize_nearest(mask, self.image_size, self.image_size)
        return np.concatenate([preprocess(image, self.image_size), mask[..., None]], axis=2)


def load_split(root, split, image_size=IMAGE_SIZE, *, skipped=None):
    """Every image of a split at training size: uint8 array (N, image_size, image_size, 4), memory-mapped.

    Made once, in parallel, and kept in root/.cache under a name that depends on the annotations and on
    the name, size and time of every image; made anew when one of them changes, in memory where the folder
    cannot be written. While another process makes it, this one waits.
    skipped: a list; damaged images are left out and each adds a line to it. Without it they are a
    ValueError that counts them and names the first. Raises FileNotFoundError.
    """
    folder = Path(root) / split
    dataset = COCOSegmentationDataset(load_coco(folder, skipped), folder, image_size=image_size)
    path = Path(root) / ".cache" / f"{split}-{image_size}-{CACHE_VERSION}{fingerprint(dataset, 'st_size', 'st_mtime_ns')}.npy"
    found = _cached(path, dataset, skipped)
    if found is None:
        try:
            path.parent.mkdir(exist_ok=True)
            with locked(path.parent / "lock", f"{path.parent}: another process is making the cache; waiting for it") as held:
                found = _cached(path, dataset, skipped)  # the other may have made this one
                if found is None:
                    _write_cache(path, dataset, split, skipped)
                    found = _cached(path, dataset, skipped)
                    if held:
                        _tidy(path, f"{split}-{image_size}-*")
        except OSError as error:
            print(f"{path.parent}: {error.strerror}; keeping {split} in memory instead", file=sys.stderr)
    if found is None:
        bad = []
        found = np.stack(list(_rows(dataset, split, None if skipped is None else bad))), bad
    rows, bad = found
    if skipped is not None:
        skipped.extend(bad)
    return rows


def _cached(path, dataset, skipped):
    """What is in the cache, as (rows, lines for the images left out), or None where it is not what is asked for."""
    try:
        rows = np.load(path, mmap_mode="c")
        bad = path.with_suffix(".txt").read_text("utf-8").splitlines() if path.with_suffix(".txt").exists() else []
    except (OSError, ValueError):  # not there yet, or cut short
        return None
    expected = (len(dataset) - len(bad), dataset.image_size, dataset.image_size, 4)
    return (rows, bad) if rows.shape == expected and rows.dtype == np.uint8 and (skipped is not None or not bad) else None


def _write_cache(path, dataset, split, skipped):
    bad, count = [], 0
    with whole(path, sync=False) as file:
        def header(rows):
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, dataset.image_size, dataset.image_size, 4)})

        header(len(dataset))
        for row in _rows(dataset, split, None if skipped is None else bad):
            file.write(row.tobytes())  # not through a memory map: a full disk would be a bus error
            count += 1
        file.seek(0)
        header(count)  # as long as the first: numpy leaves room in it for any number of rows
        listed = path.with_suffix(".txt")
        listed.unlink(missing_ok=True)
        if bad:
            with whole(listed, sync=False) as lines:
                lines.write("".join(f"{line}\n" for line in bad).encode())


def _tidy(path, pattern):
    """Remove earlier caches of this split, and what a killed process left of one."""
    for stale in {*path.parent.glob(pattern), *path.parent.glob(f".{pattern}")} - {path, path.with_suffix(".txt")}:
        with contextlib.suppress(OSError):  # another process may have it open, or have removed it
            stale.unlink()


def fingerprint(dataset, *fields):
    """16 hexadecimal digits that depend on the annotations, and on every image's name and these fields of its os.stat."""
    digest = hashlib.sha256((dataset.image_dir / ANNOTATIONS).read_bytes())
    for index in range(len(dataset)):
        path = dataset.path(index)
        state = path.stat() if path.exists() else None
        digest.update(repr((path.name, state and [getattr(state, field) for field in fields])).encode())
    return digest.hexdigest()[:16]


def _rows(dataset, split, bad=None):
    """Yield dataset.row(i) for every i, in order, decoding on all cores.

    Damaged images are left out, with a line each in `bad`; without it they are a ValueError once all were tried.
    """
    problems = [] if bad is None else bad
    for row in tqdm(each(dataset.row, range(len(dataset))), f"caching {split}", len(dataset), unit=" images", disable=None):
        if isinstance(row, Exception):
            problems.append(" ".join(str(row).split()))
        elif bad is not None or not problems:
            yield row
    if bad is None and problems:
        raise ValueError(f"{problems[0]} ({len(problems)} of {len(dataset)} images in {split} are damaged: "
                         f"`python data.py {dataset.image_dir.parent}` lists them)")
    if len(problems) == len(dataset):
        raise ValueError(f"{problems[0]} (and so are all {len(dataset)} images in {split})")


def each(function, items):
    """Yield function(item), or the FileNotFoundError or ValueError that it raised, in the order of the items.

    On all cores, a few items ahead and no more, so that memory does not grow with their number. Threads,
    not processes: decoding and resizing release the interpreter's lock, and nothing is copied.
    """
    def attempt(item):
        try:
            return function(item)
        except (FileNotFoundError, ValueError) as error:
            return error

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        running = deque()
        try:
            for item in items:
                running.append(pool.submit(attempt, item))
                if len(running) > 4 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Batches:
    """The batches of a split, on the device and normalised: what a DataLoader is to a DataSet.

    rows: uint8 array (N, S, S, 4) of `load_split`. Iterating yields (images float32 (B, 3, S, S),
    masks float32 (B, 1, S, S) of 0 and 1). With shuffle, the order is a function of seed and epoch alone, and so,
    with augmented, is what `augment` does to each image.
    On a GPU with room for it the whole split is moved there once, so that an epoch copies nothing.
    Of `world` processes each gets every world-th image of a batch, from its `rank` on; batch_size is that
    of all together, and so is `whole`, the size of the batch last yielded.
    """

    def __init__(self, rows, batch_size, device="cpu", *, shuffle=False, seed=0, rank=0, world=1, augmented=False):
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: it must be at least 1")
        self.rows, self.batch_size, self.device = torch.from_numpy(rows), batch_size, torch.device(device)
        self.shuffle, self.seed, self.rank, self.world, self.augmented = shuffle, seed, rank, world, augmented
        self.mapped = getattr(rows, "_mmap", None)
        self.set_epoch(0)
        if self.device.type == "cuda" and rows.nbytes < 0.4 * torch.cuda.mem_get_info(self.device)[0]:
            self.rows = self.rows.to(self.device)

    def __len__(self):
        return math.ceil(len(self.rows) / self.batch_size)

    def set_epoch(self, epoch, start=0):
        """Choose the order of the next pass, and the batch that it begins with (to resume within an epoch)."""
        self.epoch, self.start = epoch, start

    def __iter__(self):
        order = torch.arange(len(self.rows))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.shuffle:
            order = torch.randperm(len(self.rows), generator=generator)
        draws = torch.rand(len(self.rows), 6, generator=generator).split(self.batch_size) if self.augmented else None
        for number, indices in list(enumerate(order.to(self.rows.device).split(self.batch_size)))[self.start:]:
            self.whole = len(indices)
            batch = self.rows[indices[self.rank::self.world]]
            if self.device.type == "cuda" and not batch.is_cuda:
                batch = batch.pin_memory()  # then the copy waits in the GPU's queue, and we do not wait for it
            batch = batch.to(self.device, non_blocking=True)
            if hasattr(self.mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
                self.mapped.madvise(mmap.MADV_DONTNEED)  # else the process grows to the size of the file
            images, masks = normalize(batch[..., :3]), batch[..., 3:].permute(0, 3, 1, 2).float().contiguous()
            yield augment(images, masks, draws[number][self.rank::self.world]) if self.augmented and len(images) else (images, masks)


# ---- audit -----------------------------------------------------------------------------------

def audit(root, out=Path(".")):
    """Print what a data set holds and what is wrong with it; write contact_sheet.jpg to the folder `out`.

    Returns the list of problems, a line each, in the order of the splits.
    """
    problems, tiles, looks = [], [], {}
    for split in SPLITS:
        folder = Path(root) / split
        try:
            dataset = COCOSegmentationDataset(load_coco(folder, problems), folder)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        shown = set(np.linspace(0, len(dataset) - 1, 8).astype(int).tolist())

        def examine(index):
            image, mask = dataset.load(index)
            return image.size, int(mask.sum()), (dataset.path(index).name, _look(image)), _tile(image, mask) if index in shown else None

        looks[split] = []
        sizes, foreground, pixels, empty, unreadable = Counter(), 0, 0, 0, 0
        for found in tqdm(each(examine, range(len(dataset))), f"reading {split}", len(dataset), unit=" images", disable=None):
            if isinstance(found, Exception):
                unreadable += 1
                problems.append(str(found))
                continue
            size, area, look, tile = found
            looks[split].append(look)
            sizes[size] += 1
            foreground, pixels, empty = foreground + area, pixels + size[0] * size[1], empty + (area == 0)
            tiles += [tile] if tile is not None else []

        listed = {PurePosixPath(record["file_name"]).name for record in dataset.coco.imgs.values()}
        extra = sum(path.suffix.lower() in SUFFIXES and path.name not in listed for path in folder.iterdir())
        annotations = dataset.coco.anns.values()
        names = {category["id"]: str(category.get("name")) for category in dataset.coco.dataset.get("categories", [])}
        used = Counter(names.get(annotation["category_id"], "?") for annotation in annotations)
        share = 100 * foreground / pixels if pixels else 0
        print(f"{split}: {len(dataset)} images, {len(annotations)} annotations")
        print("  sizes        " + ", ".join(f"{w}x{h}: {n}" for (w, h), n in sizes.most_common(5)) + (" ..." if len(sizes) > 5 else ""))
        print(f"  foreground   {share:.2f} % of the pixels (answering background everywhere is {100 - share:.2f} % accurate)")
        print("  categories   " + ", ".join(f"{name}: {n}" for name, n in used.most_common()))
        print(f"  no lesion    {empty} images; unreadable {unreadable}; not listed in {ANNOTATIONS} {extra}")
    for split in SPLITS[1:]:
        if looks.get(split) and looks.get("train"):
            print(f"{split} beside train: {_resemblance(looks[split], looks['train'])}")
    if tiles:
        sheet = Image.new("RGB", (8 * 160, math.ceil(len(tiles) / 8) * 160))
        for number, tile in enumerate(tiles):
            sheet.paste(tile, (number % 8 * 160, number // 8 * 160))
        path = out / "contact_sheet.jpg"
        with whole(path, sync=False) as file:
            sheet.save(file, "JPEG", quality=90)
        print(f"contact sheet: {path}")
    return problems


def _look(image):
    """An image as 256 numbers, mean 0 and length 1, so that the product of two is their correlation."""
    values = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BILINEAR), np.float32).ravel()
    values = values - values.mean()
    return values / max(np.linalg.norm(values), 1e-6)


def _resemblance(some, train):
    """What a split's images have in common with those of train; both lists of (file name, look)."""
    highest = np.stack([look for _, look in some]) @ np.stack([look for _, look in train]).T
    text = f"{(highest.max(1) >= 0.99).mean():.1%} of the images have a near-duplicate there (correlation of 16x16 grey pixels from 0.99 on)"
    numbers = {slice_number(name) for name, _ in train}
    neighbours = [{number - 1, number + 1} & numbers for number in (slice_number(name) for name, _ in some) if number is not None]
    return text + (f", {np.mean([bool(found) for found in neighbours]):.1%} a neighbour by the number in the file name" if neighbours else "")


def slice_number(name):
    """The number that a file name begins with, or None."""
    found = re.match(r"\d+", name)
    return int(found[0]) if found else None


def grouped_split(root, target, seed=0, block=50):
    """Write the images of all splits of `root` to `target`, split anew by blocks of file numbers: returns target.

    Neighbouring slices then stay together, but for the edges of the blocks, so that a score owes less to them. The new
    splits have about the shares of the old ones; `block` images each go to one, drawn by `seed`. Files are linked
    where the file system can, else copied. Raises ValueError where target exists or a name has no number.
    """
    root, target = Path(root), Path(target)
    if target.exists():
        raise ValueError(f"{target}: exists; remove it, or name another folder")
    entries, shares, categories = [], [], None
    for split in SPLITS:
        coco = load_coco(root / split)
        dataset = COCOSegmentationDataset(coco, root / split)
        categories = categories or coco.dataset["categories"]
        shares.append(len(dataset))
        for index, key in enumerate(dataset.image_ids):
            path = dataset.path(index)
            if slice_number(path.name) is None:
                raise ValueError(f"{path}: the file name does not begin with a number, so its neighbours are not known")
            entries.append((slice_number(path.name), path.name, path, coco.imgs[key], coco.imgToAnns.get(key, [])))
    if len({name for _, name, *_ in entries}) < len(entries):
        raise ValueError(f"{root}: two splits hold images of one name, which cannot share a folder")
    entries.sort(key=lambda entry: entry[:2])
    blocks = [entries[start:start + block] for start in range(0, len(entries), block)]
    order = [blocks[index] for index in np.random.default_rng(seed).permutation(len(blocks))]
    ends = np.cumsum(shares) / len(entries) * len(blocks)
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for number, split in enumerate(SPLITS):
            chosen = sorted((entry for place, part in enumerate(order) if np.searchsorted(ends, place + 0.5) == number for entry in part), key=lambda entry: entry[:2])
            if not chosen:
                raise ValueError(f"{root}: too few images for blocks of {block} in three splits")
            (building / split).mkdir(parents=True)
            for _, name, path, *_ in chosen:
                try:
                    os.link(path, building / split / name)
                except OSError:
                    shutil.copy2(path, building / split / name)
            content = {"images": [{**image, "id": index, "file_name": name} for index, (_, name, _, image, _) in enumerate(chosen)],
                       "annotations": [], "categories": categories}
            for index, (*_, annotations) in enumerate(chosen):
                content["annotations"] += [{**annotation, "id": len(content["annotations"]) + more, "image_id": index} for more, annotation in enumerate(annotations)]
            (building / split / ANNOTATIONS).write_text(json.dumps(content))
        os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _tile(image, mask):
    """A 160x160 picture of the image with the outline of its mask in red."""
    pixels = np.array(image.resize((160, 160), Image.Resampling.BILINEAR))
    pixels[outline(resize_nearest(mask, 160, 160))] = (255, 40, 40)
    return Image.fromarray(pixels)


def outline(mask):
    """(H, W) array of 0 and 1 -> bool array of its foreground pixels that touch background or the border."""
    inside = np.pad(np.asarray(mask, bool), 1)
    core = inside[1:-1, 1:-1]
    return core & ~(inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:])


# ---- the command line ------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see python {self.prog} --help)\n")


def number(low, high=math.inf, kind=int):
    """An argparse type: a finite number of `kind` from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"must be at least {low}{f' and at most {high}' if high < math.inf else ''}, not {text}")
        return value
    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


@contextlib.contextmanager
def whole(path, *, sync=True):
    """A binary file to write that appears at `path` once it is complete, or not at all; with sync, even if the power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed it since
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, waiting=None):
    """Hold a lock that ends with the process. Yields False where the file system has none (or cannot be written).

    waiting: what to say before waiting for another process that holds it; without it, ValueError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise ValueError(f"{path.parent}: another training is writing to this folder; give this one another --out") from None
        print(waiting, file=sys.stderr, flush=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        pass
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(path)  # before the release: then it is nobody else's
        lock.release()


def output_folder(path, flag="--out"):
    """`path` as a folder that can be written to, made if need be; ValueError naming `flag` if it cannot."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{path}: cannot write to this folder ({error.strerror}); choose another with {flag}") from None


def run(main):
    """Call main(); what the user can mend becomes one line on stderr and status 2, Ctrl-C status 130."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"{name}: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = ArgumentParser(description="Audit a data set and write a contact sheet of it.")
    parser.add_argument("root", nargs="?", default="dataset", help="folder that holds train/ valid/ test/ (default: dataset)")
    parser.add_argument("--out", default=".", help="folder for contact_sheet.jpg")
    parser.add_argument("--grouped-split", metavar="FOLDER", help="instead, write the images there, split by blocks of neighbouring file numbers")
    args = parser.parse_args()
    if args.grouped_split:
        target = grouped_split(args.root, args.grouped_split)
        for split in SPLITS:
            print(f"{split}: {len(load_coco(target / split).imgs)} images")
        print(f"next: python data.py {shlex.quote(str(target))}, python train.py --data {shlex.quote(str(target))}")
        return
    problems = audit(args.root, output_folder(args.out))
    for problem in problems:
        print(f"problem: {problem}")
    if problems:
        raise ValueError(f"{args.root}: {len(problems)} problem(s), listed above: mend or remove them before training")


if __name__ == "__main__":
    run(main)
