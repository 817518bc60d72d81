"""The folder of a data set: its splits, and what a killed import left in it.

An import writes into ROOT/.new-XXXX, or, to add to a split, into .add-XXXX beside it. Once all is
written it marks that folder as COMPLETE, moves what it holds to its place, and moves splits that it
replaces to .old-XXXX. From the mark on it can be completed, whenever it was killed.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from medseg.files import file_lock

ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
NEW, OLD, ADD = ".new-", ".old-", ".add-"  # beginnings of tempfile's names, of eight characters
COMPLETE = "complete"  # a file in them
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
    moving = any((folder / COMPLETE).exists() for folder in left)
    try:
        busy = f"{root}: an import is moving its files: waiting until it has ended"
        with file_lock(root / LOCK, busy=busy, wait=moving) as locked:
            if locked or moving:  # without locks, nothing tells whether it still runs
                _finish(root)
    except ValueError:  # it runs; the data set is as it was
        return


def _finish(root):
    for folder in _find_left(root):
        complete = (folder / COMPLETE).exists()
        if complete:
            move_out(folder)
        shutil.rmtree(folder)
        ended = "completed" if complete else "taken back: the data set is as it was before"
        print(f"{root}: an import that was killed is {ended}", flush=True)


def _find_left(root):
    """The folders that imports left in `root`, or beside a split that is a link elsewhere.

    They are known by their names and by what they hold: a user's folder stays.
    """
    name, left = re.compile(r"\.(new|add)-[a-z0-9_]{8}"), []
    with contextlib.suppress(OSError):
        links = [path.resolve().parent for path in root.iterdir() if path.is_symlink()]
        for place in dict.fromkeys([root, *links]):
            for path in place.iterdir():
                if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    held = {own.name for own in path.iterdir()} - {COMPLETE}
                    if held <= {*SPLITS} or (path.name.startswith(ADD) and len(held) <= 1):
                        left.append(path)
    return left


def move_out(folder):
    """Move all that an import has written into a folder to its place, or nothing where that fails.

    Split by split, what is replaced first; of an addition its images, then the annotations.
    """
    (folder / COMPLETE).touch()  # from here on `finish_import` completes it
    old, moves = folder.with_name(OLD + folder.name.removeprefix(NEW)), []
    for new in sorted(filter(Path.is_dir, folder.iterdir())):
        target = folder.parent / new.name
        if folder.name.startswith(NEW):
            if os.path.lexists(target):
                old.mkdir(exist_ok=True)
                moves.append((target, old / new.name))
            moves.append((new, target))
            continue
        for path in sorted(new.iterdir(), key=lambda path: path.name == ANNOTATIONS):
            if path.name == ANNOTATIONS or not os.path.lexists(target / path.name):
                moves.append((path, target / path.name))
    try:
        for path, target in moves:
            os.replace(path, target)
    except BaseException:  # Ctrl-C too
        last, target = moves[-1]
        if last.exists() or target.is_dir():  # else the annotations are replaced: all is done
            for path, target in reversed(moves):
                if not os.path.lexists(path):
                    os.replace(target, path)
            shutil.rmtree(old, ignore_errors=True)
        (folder / COMPLETE).unlink()
        raise
    if old.exists():
        shutil.rmtree(old)
