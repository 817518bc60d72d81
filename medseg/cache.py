"""Every image of a split, decoded once: a memory-mapped array beside the data set."""

import contextlib
import hashlib
import sys

import numpy as np
from tqdm import tqdm

from medseg.coco import ANNOTATIONS
from medseg.files import atomic_write, file_lock, parallel_map

CACHE_VERSION = 1  # raise it when the pixels of a cached row change


def cached_rows(dataset, folder, split, *, skipped=None):
    """dataset.row(i) of every image as one uint8 array (N, S, S, C), memory-mapped.

    dataset: has `image_dir`, `path(i)`, `row_shape` = (S, S, C), `variant` (a word for what rows
    hold besides, '' where there is nothing to say) and a length. folder: where the arrays are
    kept, under a name that depends on the annotations and on the name, size and time of every
    image; what has changed is made anew. Where the folder cannot be written, the array
    stays in memory. While another process makes the array, this one waits.
    skipped: a list; damaged images are left out and each adds a line to it. Without it they are
    a ValueError that counts them and names the first.
    """
    prefix = f"{split}-{dataset.row_shape[0]}{dataset.variant}-{CACHE_VERSION}"
    path = folder / f"{prefix}{fingerprint(dataset, 'st_size', 'st_mtime_ns')}.npy"
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
                    if locked:
                        _remove_stale(path, f"{prefix}*")
        except OSError as error:
            print(f"{folder}: {error.strerror}; keeping {split} in memory instead", file=sys.stderr)
    if cached is None:
        damaged = None if skipped is None else []
        cached = np.stack(list(_decode(dataset, split, damaged))), damaged
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
    listed = path.with_suffix(".txt")
    try:
        rows = np.load(path, mmap_mode="c")
        damaged = listed.read_text("utf-8").splitlines() if listed.exists() else []
    except (OSError, ValueError):  # not there yet, or cut short
        return None
    fits = rows.shape == (len(dataset) - len(damaged), *dataset.row_shape)
    if not fits or rows.dtype != np.uint8 or (damaged and skipped is None):
        return None
    return rows, damaged


def _write(path, dataset, split, skipped):
    damaged, count = None if skipped is None else [], 0
    with atomic_write(path, sync=False) as file:

        def write_header(rows):
            header = {"descr": "|u1", "fortran_order": False, "shape": (rows, *dataset.row_shape)}
            np.lib.format.write_array_header_1_0(file, header)

        write_header(len(dataset))
        for row in _decode(dataset, split, damaged):
            file.write(row.tobytes())  # not through a memory map: a full disk would be a bus error
            count += 1
        file.seek(0)
        write_header(count)  # as long as the first: numpy leaves room for any number of rows
        listed = path.with_suffix(".txt")
        listed.unlink(missing_ok=True)
        if damaged:
            with atomic_write(listed, sync=False) as lines:
                lines.write("".join(f"{line}\n" for line in damaged).encode())


def _remove_stale(path, pattern):
    """Remove earlier caches of this split, and what a killed process left of one."""
    stale = {*path.parent.glob(pattern), *path.parent.glob(f".{pattern}")}
    for other in stale - {path, path.with_suffix(".txt")}:
        with contextlib.suppress(OSError):  # another process may have it open, or have removed it
            other.unlink()


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
