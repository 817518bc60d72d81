"""A run gone on with: its checkpoint, the flags it keeps, what is left to do."""

import sys

from medseg.cli import flag_name, spell_value
from medseg.dist import restart_count
from medseg.training.checkpoint import BEST, CURVES, LAST, read_checkpoint

# What --resume makes of a flag; its line in medseg/training/flags.py says which of these.
KEPT = "kept"  # it decides the result, and has to be as it was
FREE = "free"  # it may change
ALONE = "alone"  # it may change, but not in a cross-validation: the folds that are done had it
ANEW = "anew"  # it is not restored: each command says it


def find_checkpoint(out, *, wanted, test_only):
    """The checkpoint in the folder whose flags are to be taken, or None. wanted: by --resume."""
    exists = (out / LAST).exists()
    if wanted or (exists and restart_count()):  # torchrun: after a process died
        return read_checkpoint(out)
    if test_only and exists:
        try:
            return read_checkpoint(out)
        except ValueError as error:  # best_model.pth may be good all the same
            print(f"WARNING: {error}: testing with the flags given", file=sys.stderr)
    return None


def check_same_run(flags, checkpoint, on_resume):
    """ValueError where a flag that decides the result differs from the checkpoint's.

    flags: {name: value} of this run; on_resume: {name: KEPT, FREE, ALONE or ANEW}.
    """
    kept = [name for name, what in on_resume.items() if what == KEPT]
    if flags["folds"]:
        kept += [name for name, what in on_resume.items() if what == ALONE]
    elif flags["schedule"] != "constant":
        kept.append("epochs")  # with which it ends
    for name in kept:
        now, before = flags[name], checkpoint["flags"].get(name, flags[name])
        if now != before:
            flag, now, before = flag_name(name), spell_value(now), spell_value(before)
            raise ValueError(
                f"{checkpoint['path']}: was trained with {flag} {before}, not {now}: leave {flag} "
                "away, or start afresh without --resume"
            )


def check_can_go_on(flags, checkpoint):
    """ValueError where a run has ended, and these flags leave nothing to do.

    One that was stopped in its test goes on with that, one that has ended with --tune-prediction,
    and torchrun may restart one.
    """
    path, before, progress = checkpoint["path"], checkpoint["flags"], checkpoint["progress"]
    done, waited = progress["epoch"], progress["waited"]
    if flags["epochs"] > done and flags["patience"] > waited:
        return
    changed = any(flags[name] != before[name] for name in ("epochs", "patience"))
    tunes = flags["tune_prediction"] and not before["tune_prediction"]
    if not changed and (tunes or restart_count() or not _was_tested(path.parent)):
        return
    more = f"give --epochs above {done} and --patience above {waited}"
    if flags["schedule"] != "constant" and done >= before["epochs"]:
        more = f"its --schedule ends there: start another run with --init {path.parent / BEST}"
    raise ValueError(
        f"{path}: {done} of {before['epochs']} epochs done, {waited} in a row without a lower "
        f"validation loss: {more}; to test its weights again, give --test-only, not --resume"
    )


def _was_tested(out):
    """Whether the run in a folder has been tested since its last checkpoint."""
    try:
        return (out / CURVES).stat().st_mtime_ns >= (out / LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return False
