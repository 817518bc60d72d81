"""Going on with a run: its checkpoint, and the flags that have to stay as they were."""

import sys

from medseg.cli import flag_name, spell_value
from medseg.dist import restart_count
from medseg.training.checkpoint import LAST, read_checkpoint

# What --resume makes of a flag; its line in medseg/training/flags.py says which of these.
KEPT = "kept"  # it decides the result, and has to be as it was
FREE = "free"  # it may change
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

    flags: {name: value} of this run; on_resume: {name: KEPT, FREE or ANEW}.
    """
    kept = [name for name, what in on_resume.items() if what == KEPT]
    if flags["folds"]:
        kept += ["data", "epochs", "patience"]  # the folds that are done had these
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
