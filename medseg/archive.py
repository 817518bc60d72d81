"""A zip of the three splits: check it, unpack it safely, and put the splits in place.

No entry of an archive is trusted. Names that lead out of the folder, links, encrypted entries and
entries that unpack to far more bytes than they take are refused before anything is written.
"""

import json
import lzma
import os
import re
import stat
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from medseg.coco import ANNOTATIONS, SPLITS
from medseg.splits import (
    augmented_groups,
    check_disk_space,
    deal_missing,
    present_splits,
    read_split,
)

# Names that the folder of a split may have in an archive.
ALIASES = {split: (split,) for split in SPLITS} | {"valid": ("valid", "val", "validation")}

MAX_ENTRIES = 100_000
MAX_BYTES = 4 * 2**30  # unpacked
MAX_RATIO = 200  # unpacked to packed bytes of one entry: JPEGs have about 1, JSON about 20

# What zipfile raises for an archive that is damaged, or packed in a way that it does not know.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


def is_intact(archive):
    """Whether `archive` is a zip whose every entry agrees with its checksum."""
    try:
        with zipfile.ZipFile(archive) as z:
            return z.testzip() is None
    except DAMAGED:
        return False


def refusal_reason(entry):
    """Why a zip entry (a ZipInfo) is not unpacked, or None if it may be."""
    name = entry.orig_filename  # as stored: `filename` is already cut at a NUL
    leaves = name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name)
    if leaves or "\\" in name or "\0" in name:
        return "has a name that leads out of its folder"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        return "unpacks to suspiciously many bytes"
    return None


def find_splits(names):
    """{folder in the archive: split}, at any depth, for the names of an archive's entries.

    Raises ValueError if train is missing.
    """
    candidates = {}  # folder that holds splits -> {split: its folder}
    for path in map(PurePosixPath, names):
        for split, aliases in ALIASES.items():
            if path.name == ANNOTATIONS and path.parent.name.lower() in aliases:
                candidates.setdefault(path.parent.parent, {})[split] = path.parent
    best = max(candidates.values(), key=len, default={})
    if SPLITS[0] not in best:
        raise ValueError(f"holds no {SPLITS[0]}/{ANNOTATIONS}")
    return {folder: split for split, folder in best.items()}


def unpack(archive, folder, seed=0):
    """Write the splits of the zip `archive` to folder/{train,valid,test} (a Path).

    Those that it lacks are dealt from train, by the seed. Raises FileNotFoundError if there is no
    archive; ValueError if it is damaged, not this data set, or unsafe to unpack.
    """
    try:
        with zipfile.ZipFile(archive) as z:
            _check_entries(z.infolist())
            _extract(z, folder)
        _deal_missing(folder, seed)
    except DAMAGED as error:
        raise ValueError(f"damaged or not a zip ({error})") from None


class _Stored(NamedTuple):
    """An image of the train split; name: of its file."""

    name: str
    group: str
    record: dict


def _deal_missing(folder, seed):
    """Move images and annotations from train to the splits that are not in the folder."""
    present = present_splits(folder)
    if len(present) == len(SPLITS):
        return
    train = folder / SPLITS[0]
    try:
        content = read_split(train, None)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None
    names = [record["file_name"] for record in content["images"]]
    images = zip(names, augmented_groups(names), content["images"], strict=True)
    try:
        drawn = deal_missing([_Stored(*image) for image in images], present, seed)
    except ValueError as error:  # whose advice, after the colon, is for flags of other imports
        raise ValueError(str(error).partition(":")[0]) from None
    for split, stored in drawn.items():
        ids = {image.record["id"] for image in stored}
        own = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        lists = {"images": [image.record for image in stored], "annotations": own}
        for image in stored if split != SPLITS[0] else ():
            target = folder / split / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(train / image.name, target)
        (folder / split / ANNOTATIONS).write_text(json.dumps({**content, **lists}))


def _check_entries(entries):
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"holds more than {MAX_ENTRIES} entries")
    for entry in entries:
        if reason := refusal_reason(entry):
            raise ValueError(f"holds {entry.filename!r}, which {reason}")


def _extract(z, folder):
    entries = z.infolist()
    splits = find_splits([entry.filename for entry in entries])
    check_disk_space(folder, min(sum(entry.file_size for entry in entries), MAX_BYTES))
    remaining = MAX_BYTES  # counted here: the sizes in an archive's headers may be false
    for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
        path = PurePosixPath(entry.filename)
        source_folder = next((parent for parent in path.parents if parent in splits), None)
        if source_folder is None or entry.is_dir():
            continue
        target = folder / splits[source_folder] / path.relative_to(source_folder)
        try:
            remaining -= _extract_file(z, entry, target, remaining)
        except (FileExistsError, NotADirectoryError) as error:
            reason = f"collides with another entry ({error.strerror})"
            raise ValueError(f"holds {entry.filename!r}, which {reason}") from None


def _extract_file(z, entry, target, max_bytes):
    """Write one entry to the new file `target`; return its size in bytes."""
    written = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with z.open(entry) as source, open(target, "xb") as out:
        while chunk := source.read(2**20):
            written += len(chunk)
            if written > max_bytes:
                raise ValueError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
            out.write(chunk)
    return written
