"""The splits of a data set on disk: complete, present, put in place whole or not at all."""

import os
import shutil
import tempfile
from pathlib import Path

from medseg.coco import ANNOTATIONS, SPLITS, image_path, read_annotations


def read_split(folder, damaged):
    """The annotations of one complete split: the file parses and every image it lists exists.

    damaged: a list; each record that cannot be used is left out and adds a line to it.
    Raises ValueError naming the file that is missing or wrong.
    """
    folder = Path(folder)
    try:
        coco = read_annotations(folder, damaged)
    except FileNotFoundError:  # its message suggests to get the data, which is going on here
        raise ValueError(f"{folder / ANNOTATIONS} is missing") from None
    for image in coco["images"]:
        path = image_path(folder, image["file_name"])
        if not path.is_file():
            raise ValueError(f"{path} is listed in {ANNOTATIONS} but missing")
    return coco


def read_splits(root, damaged, splits=SPLITS):
    """{'train': annotations, 'valid': ..., 'test': ...} of a data set; see `read_split`."""
    return {split: read_split(Path(root) / split, damaged) for split in splits}


def occupied(root, splits=SPLITS):
    """Whether `root` holds anything under the name of one of these splits."""
    return any(os.path.lexists(Path(root) / split) for split in splits)


def check_disk_space(folder, needed):
    """Raise OSError unless the file system of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {needed / 2**20:.0f} MiB are needed and its disk has "
            f"{free / 2**20:.0f} MiB free"
        )


def install(root, write_splits, splits=SPLITS):
    """Let write_splits(folder) write the splits into a temporary folder, then move them in.

    The temporary folder is in `root`, so that moving is renaming. Splits that `root` already has
    are moved aside first, deleted only when the new ones are in place, and moved back if anything
    fails; those that `splits` does not name are not touched. Raises what `write_splits` raises,
    and ValueError for an incomplete split.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as new:
        new = Path(new)
        write_splits(new)
        try:
            read_splits(new, [], splits)
        except ValueError as error:  # the temporary folder is gone when the message is read
            raise ValueError(str(error).replace(f"{new}{os.sep}", "")) from None
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=root))
        try:
            for split in splits:
                if os.path.lexists(root / split):
                    os.rename(root / split, old / split)
                os.rename(new / split, root / split)
        except BaseException:  # Ctrl-C too
            for split in splits:
                if not (new / split).exists():
                    os.rename(root / split, new / split)
                if os.path.lexists(old / split):
                    os.rename(old / split, root / split)
            old.rmdir()
            raise
        shutil.rmtree(old)
