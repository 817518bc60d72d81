"""Every image of a split, decoded once: a memory-mapped array beside the data set."""

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from medseg.coco import ANNOTATIONS
from medseg.files import atomic_write, file_lock, parallel_map

CACHE_VERSION = 3  # raise it when the pixels of a cached row change


class RaggedRows(Sequence):
    """Images of different sizes in one array: item i is uint8 (H, W, C), a view.

    pixels: uint8 array (P, C), the pixels of all images one after the other; sizes: (N, 2) of
    heights and widths, which add up to P pixels, else ValueError.
    """

    def __init__(self, pixels, sizes):
        self.pixels, self.sizes = pixels, np.asarray(sizes, np.int64).reshape(-1, 2)
        counts = self.sizes.prod(1)
        if len(pixels) != counts.sum():
            raise ValueError("the sizes of the images do not fit their pixels")
        self.ends = np.cumsum(counts)
        self.starts = self.ends - counts

    @classmethod
    def of_array(cls, rows):
        """The same of an array (N, H, W, C), without a copy."""
        count, height, width, channels = rows.shape
        return cls(rows.reshape(-1, channels), np.tile((height, width), (count, 1)))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        index = range(len(self))[index]
        height, width = self.sizes[index]
        return self.pixels[self.starts[index] : self.ends[index]].reshape(height, width, -1)


def cached_rows(dataset, skipped=None):
    """dataset.row(i) of every image, memory-mapped: uint8 array (N, S, S, C), or RaggedRows.

    dataset: has `image_dir`, ROOT/SPLIT, `path(i)`, `image_size` S (None where every image keeps
    its own), `row_shape` = (S, S, C), or (C,) where S is None, `variant` (names what rows hold that
    the tutorial's do not, '' where that is nothing) and a length. The arrays are kept in
    ROOT/.cache, under a name that depends on the annotations and on the name, size and time of
    every image; what has changed is made anew. Where the folder cannot be written, the array
    stays in memory. While another process makes the array, this one waits.
    skipped: as for `data.load_split`.
    """
    folder, split = dataset.image_dir.parent / ".cache", dataset.image_dir.name
    prefix = f"{split}-{dataset.image_size or 'full'}{dataset.variant}-"
    key = f"{CACHE_VERSION}{fingerprint(dataset, 'st_size', 'st_mtime_ns')}"
    path = folder / f"{prefix}{key}.npy"
    cached = _read(path, dataset, skipped)
    if cached is None:
        try:
            folder.mkdir(exist_ok=True)
            busy = f"{folder}: another process is making the cache; waiting for it"
            with file_lock(folder / "lock", busy=busy, wait=True) as locked:
                cached = _read(path, dataset, skipped)  # the other process may have made this one
                if cached is None:
                    _write(path, dataset, split, skipped)
                    cached = _read(path, dataset, skipped)
                    if locked:  # earlier caches, of any version, and what a killed process left
                        pattern = f"{prefix}{'?' * len(key)}.*"
                        stale = {*folder.glob(pattern), *folder.glob(f".{pattern}")}
                        for other in stale - {path, _beside(path)}:
                            with contextlib.suppress(OSError):  # another process may have it open
                                other.unlink()
        except OSError as error:
            print(f"{folder}: {error.strerror}; keeping {split} in memory instead", file=sys.stderr)
    if cached is None:
        damaged = None if skipped is None else []
        cached = _stack(list(_decode(dataset, split, damaged)), dataset), damaged
    rows, damaged = cached
    if skipped is not None:
        skipped.extend(damaged)
    return rows


def fingerprint(dataset, *fields):
    """16 hexadecimal digits of the annotations, every image's name and these fields of os.stat."""
    digest = hashlib.sha256((dataset.image_dir / ANNOTATIONS).read_bytes())
    for index in range(len(dataset)):
        path = dataset.path(index)
        state = path.stat() if path.exists() else None
        values = state and [getattr(state, field) for field in fields]
        digest.update(repr((path.name, values)).encode())
    return digest.hexdigest()[:16]


def _read(path, dataset, skipped):
    """(rows, lines about images left out), or None where the cache is not what is asked for."""
    more = _beside(path)
    try:
        rows = np.load(path, mmap_mode="c")
        more = json.loads(more.read_text("utf-8")) if more.exists() else {}
        damaged = more.get("damaged", [])
        if dataset.image_size is None:
            rows = RaggedRows(rows, more.get("sizes", []))
    except (OSError, ValueError, EOFError):  # not there yet, or cut short
        return None
    if len(rows) != len(dataset) - len(damaged) or (damaged and skipped is None):
        return None
    return rows, damaged


def _beside(path):
    """The file beside the pixels with what they lack: sizes, and a line for each image left out."""
    return path.with_suffix(".json")


def _stack(rows, dataset):
    """The rows of a dataset, in memory."""
    if dataset.image_size:
        return np.stack(rows)
    pixels = np.concatenate([row.reshape(-1, *dataset.row_shape) for row in rows])
    return RaggedRows(pixels, [row.shape[:2] for row in rows])


def _write(path, dataset, split, skipped):
    damaged, sizes = None if skipped is None else [], []
    with atomic_write(path, sync=False) as file:

        def write_header(rows):
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *dataset.row_shape)}
            np.lib.format.write_array_header_1_0(file, header)

        write_header(len(dataset))
        for row in _decode(dataset, split, damaged):
            file.write(row.tobytes())  # not through a memory map: a full disk would be a bus error
            sizes.append(row.shape[:2])
        file.seek(0)  # numpy leaves room for any number of rows: the header is as long as the first
        ragged = dataset.image_size is None
        write_header(sum(map(math.prod, sizes)) if ragged else len(sizes))
        _beside(path).unlink(missing_ok=True)
        if ragged or damaged:  # before the pixels, which say that the pair is complete
            more = {"damaged": damaged or [], "sizes": sizes if ragged else []}
            with atomic_write(_beside(path), sync=False) as beside:
                beside.write(json.dumps(more).encode())


def _decode(dataset, split, damaged=None):
    """Yield dataset.row(i) for every i, in order, decoding on all cores.

    Damaged images are left out, with a line each in the list `damaged`; without it they are a
    ValueError once all were tried.
    """
    total = len(dataset)
    problems = [] if damaged is None else damaged
    rows = parallel_map(dataset.row, range(total))
    for row in tqdm(rows, f"caching {split}", total, unit=" images", disable=None):
        if isinstance(row, Exception):
            problems.append(" ".join(str(row).split()))
        elif damaged is not None or not problems:
            yield row
    if damaged is None and problems:
        raise ValueError(
            f"{problems[0]} ({len(problems)} of {total} images in {split} are damaged: "
            f"`python data.py {dataset.image_dir.parent}` lists them)"
        )
    if len(problems) == total:
        raise ValueError(f"{problems[0]} (and so are all {total} images in {split})")
