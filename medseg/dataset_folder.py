"""The folder of a data set: its splits, and an import into it, which is whole or not at all.

An import writes into ROOT/.new-XXXX. Once all is written it marks that folder as COMPLETE, moves
the splits that it replaces into it, and the new ones to their place. From the mark on it can be
completed, whenever it was killed.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from medseg.files import file_lock

ANNOTATIONS = "_annotations.coco.json"
SPLITS = ("train", "valid", "test")
NEW = ".new-"  # the beginning of tempfile's name, of eight characters
COMPLETE, OLD = "complete", "old"  # in it: the mark, and a folder of what is replaced
LOCK = ".importing.lock"


def install(root, write_splits):
    """Let write_splits(folder) write splits into a temporary folder, then move them into `root`.

    The temporary folder is in `root`, so that moving is renaming. Splits that are there already
    are deleted only when the new ones are in place, and moved back if anything fails; where the
    process is killed, `finish_import` completes it or takes it back. Returns what `write_splits`
    returns, and raises what it raises.
    """
    root.mkdir(parents=True, exist_ok=True)
    busy = f"{root}: another import is writing to it: wait until it has ended"
    with file_lock(root / LOCK, busy=busy):
        _finish(root)
        with tempfile.TemporaryDirectory(prefix=NEW, dir=root) as new:
            new = Path(new)
            result = write_splits(new)
            (new / COMPLETE).touch()  # from here on `finish_import` completes it
            try:
                _move_out(new)
            except BaseException:  # Ctrl-C too
                (new / COMPLETE).unlink()
                raise
    return result


def finish_import(root):
    """Complete or remove what a killed import left in the data set `root`; a line says so.

    An import that is running is left alone: the data set is as it was.
    """
    if _find_left(root):
        with contextlib.suppress(ValueError), file_lock(root / LOCK, busy="") as locked:
            if locked:
                _finish(root)


def _finish(root):
    for folder in _find_left(root):
        complete = (folder / COMPLETE).exists()
        if complete:
            _move_out(folder)
        shutil.rmtree(folder)
        ended = "completed" if complete else "taken back: the data set is as it was before"
        print(f"{root}: an import that was killed is {ended}", flush=True)


def _find_left(root):
    """The folders that imports left in `root`, by name and by what they hold: a user's stays."""
    left = []
    with contextlib.suppress(OSError):
        for path in root.glob(f"{NEW}????????"):
            if {own.name for own in path.iterdir()} <= {*SPLITS, OLD, COMPLETE}:
                left.append(path)
    return left


def _move_out(folder):
    """Move the splits in the folder of an import to their place, or none where that fails."""
    moves = []
    (folder / OLD).mkdir(exist_ok=True)
    for new in sorted(path for path in folder.iterdir() if path.name in SPLITS):
        target = folder.parent / new.name
        if os.path.lexists(target):
            moves.append((target, folder / OLD / new.name))
        moves.append((new, target))
    try:
        for path, target in moves:
            os.replace(path, target)
    except BaseException:
        for path, target in reversed(moves):
            if not os.path.lexists(path):
                os.replace(target, path)
        raise
    shutil.rmtree(folder / OLD)  # before the mark
