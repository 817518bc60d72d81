"""The folder of a data set: its splits, and what a killed import left in it.

An import writes into ROOT/.new-XXXX, and makes .old-XXXX for the splits that it replaces once the
new ones are whole. One that adds to a split writes into .add-XXXX beside it, and marks that as
COMPLETE once it is whole. From then on it can be completed, whenever it was killed.
"""

import contextlib
import os
import re
import shutil

from medseg.files import file_lock

ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
NEW, OLD, ADD = ".new-", ".old-", ".add-"  # beginnings of tempfile's names, of eight characters
COMPLETE = "complete"  # a file in .add-XXXX
LOCK = ".importing.lock"


@contextlib.contextmanager
def import_lock(root):
    """Hold the lock of the imports into a data set, after what killed ones left is finished."""
    busy = f"{root}: another import is writing to it: wait until it has ended"
    with file_lock(root / LOCK, busy=busy):
        _finish(root)
        yield


def finish_import(root):
    """Complete or remove what a killed import left in the data set `root`; a line says so.

    A running import is left alone while it writes, and waited for while it moves its files.
    """
    left = _find_left(root)
    if not left:
        return
    moving = any(_is_complete(folder) for folder in left)
    try:
        busy = f"{root}: an import is moving its files: waiting until it has ended"
        with file_lock(root / LOCK, busy=busy, wait=moving) as locked:
            if locked or moving:  # without locks, nothing tells whether it still runs
                _finish(root)
    except ValueError:  # it runs; the data set is as it was
        return


def _finish(root):
    for folder in _find_left(root):
        complete, old = _is_complete(folder), find_old(folder)
        if complete and old:
            replace_splits(folder, old)
            shutil.rmtree(old)
        elif complete:
            for new in filter(os.path.isdir, folder.iterdir()):
                _move_images(new, folder.parent / new.name)
        shutil.rmtree(folder)
        ended = "completed" if complete else "taken back: the data set is as it was before"
        print(f"{root}: an import that was killed is {ended}", flush=True)


def _find_left(root):
    """The folders that imports left in `root`, or beside a split that is a link elsewhere."""
    found = []
    with contextlib.suppress(OSError):
        links = [path.resolve().parent for path in root.iterdir() if path.is_symlink()]
        for place in dict.fromkeys([root, *links]):
            found += _temporary(place, NEW) + _temporary(place, ADD)
    return found


def _temporary(place, prefix):
    """The folders that imports made in a folder, known by their names and by what they hold."""
    name, found = re.compile(re.escape(prefix) + "[a-z0-9_]{8}"), []
    for path in place.iterdir():
        if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            held = {own.name for own in path.iterdir()}
            if held <= {*SPLITS} or (prefix == ADD and len(held - {COMPLETE}) <= 1):
                found.append(path)
    return found


def _is_complete(folder):
    """Whether all that is to be moved out of a folder was written."""
    return (folder / COMPLETE).exists() or find_old(folder) is not None


def old_folder(new):
    """Where the splits go that those in the folder `new` replace."""
    return new.with_name(OLD + new.name.removeprefix(NEW))


def find_old(folder):
    """The `old_folder` of a folder where it is there, else None."""
    old = old_folder(folder)
    return old if folder.name.startswith(NEW) and old.is_dir() else None


def replace_splits(new, old):
    """Move the splits in `new` to the folder that it is in, and those that are there to `old`."""
    for path in sorted(new.iterdir()):
        target = new.parent / path.name
        if os.path.lexists(target):
            os.rename(target, old / path.name)
        os.rename(path, target)


def _move_images(new, folder):
    """Move images into a split, then its annotation file, which replaces the one there."""
    for path in sorted(new.iterdir(), key=lambda path: path.name == ANNOTATIONS):
        target = folder / path.name
        if path.name == ANNOTATIONS or not os.path.lexists(target):
            os.replace(path, target)
