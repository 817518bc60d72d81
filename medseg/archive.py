"""A zip of the three splits: unpacked, and what it lacks of them dealt from train."""

import json
import os
import zipfile
import zlib
from pathlib import PurePosixPath
from types import SimpleNamespace

from tqdm import tqdm

from medseg.coco import ANNOTATIONS, SPLITS
from medseg.splits import (
    augmented_groups,
    check_disk_space,
    deal_missing,
    present_splits,
    read_split,
    read_splits,
)

# Names that the folder of a split may have in an archive.
ALIASES = {split: (split,) for split in SPLITS} | {"valid": ("valid", "val", "validation")}

# What zipfile raises for an archive that is damaged, or packed in a way that it does not know.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)


def is_intact(archive):
    """Whether `archive` is a zip whose every entry agrees with its checksum."""
    try:
        with zipfile.ZipFile(archive) as z:
            return z.testzip() is None
    except (*DAMAGED, OSError):  # a place before its beginning
        return False


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
    archive; ValueError if it is damaged, not this data set, or has names that lead elsewhere.
    """
    try:
        with zipfile.ZipFile(archive) as z:
            _extract(z, folder)
        _deal_missing(folder, seed)
        read_splits(folder, [])
    except DAMAGED as error:
        raise ValueError(f"damaged or not a zip ({error})") from None
    except ValueError as error:  # the folder may be gone when the message is read
        raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None


def _extract(z, folder):
    entries = [entry for entry in z.infolist() if not entry.is_dir()]
    splits, size = find_splits(z.namelist()), sum(entry.file_size for entry in entries)
    check_disk_space(folder, size)
    for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
        path = PurePosixPath(entry.filename)
        for source in splits.keys() & set(path.parents):
            if ".." in path.parts:
                raise ValueError(f"holds {entry.filename!r}, which leads out of its folder")
            target = folder / splits[source] / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(z.read(entry))


def _deal_missing(folder, seed):
    """Move images and annotations from train to the splits that are not in the folder."""
    present = present_splits(folder)
    if len(present) == len(SPLITS):
        return
    train = folder / SPLITS[0]
    content = read_split(train, None)
    images = [SimpleNamespace(name=one["file_name"], record=one) for one in content["images"]]
    for image, group in zip(images, augmented_groups([i.name for i in images]), strict=True):
        image.group = group
    drawn = deal_missing(images, present, seed)
    for split, stored in drawn.items():
        ids = {image.record["id"] for image in stored}
        own = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        lists = {"images": [image.record for image in stored], "annotations": own}
        for image in stored if split != SPLITS[0] else ():
            target = folder / split / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(train / image.name, target)
        (folder / split / ANNOTATIONS).write_text(json.dumps({**content, **lists}))
