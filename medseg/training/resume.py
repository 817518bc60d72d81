"""A run gone on with: its checkpoint, the flags it keeps, and whether there is more to do."""

import math
import sys
from pathlib import Path

from medseg.cli import flag_name
from medseg.dist import restart_count
from medseg.training.checkpoint import (
    BEST,
    CURVES,
    LAST,
    NOT_RECORDED,
    PREVIOUS,
    grace_epochs,
    read_checkpoint,
)

# The flags that a resumed run need not have in common with its beginning. Any other decides the
# result; how far --epochs and --patience may change, `check_can_go_on` says.
MAY_CHANGE = (
    *(*NOT_RECORDED, "data", "epochs", "patience", "device", "compile", "save_every"),
    "tune_prediction",  # which is done once the training has ended
    *("tracker", "swanlab", "project", "experiment_name"),
)


# Nor these, but in a cross-validation, whose folds that are done had them.
FIXED_IN_FOLDS = ("data", "epochs", "patience")


def find_checkpoint(args):
    """The checkpoint whose flags are to be taken, or None."""
    out = Path(args.out)
    has_checkpoint = any((out / name).exists() for name in (LAST, PREVIOUS))
    restarted = restart_count() > 0 and has_checkpoint  # by torchrun, after a process died
    if args.resume or restarted:
        return read_checkpoint(out)
    if args.test_only and has_checkpoint:
        try:
            return read_checkpoint(out)
        except ValueError as error:  # best_model.pth may be good all the same
            print(f"WARNING: {error}: testing with the flags given", file=sys.stderr)
    return None


def check_same_run(args, checkpoint, parser):
    """ValueError where a flag that decides the result differs from the checkpoint's.

    parser: whose defaults are the checkpoint's flags.
    """
    may_change = {*MAY_CHANGE}.difference(FIXED_IN_FOLDS if args.folds else ())
    for name, now in vars(args).items():
        before = parser.get_default(name)
        if name not in may_change and before != now:
            flag = flag_name(name)
            raise ValueError(
                f"{checkpoint['path']}: was trained with {flag} {before}, not {now}: leave {flag} "
                "away, or start afresh without --resume"
            )


def check_can_go_on(args, checkpoint):
    """ValueError unless the epochs done are the beginning of a run with these flags that goes on.

    The message says which flag to give. A run that was stopped in its test goes on with that, one
    that has ended goes on with --tune-prediction, and torchrun may restart one.
    """
    path, before = checkpoint["path"], {**vars(args), **checkpoint["flags"]}
    epochs, patience = before["epochs"], before["patience"]
    done, wait = waits(checkpoint, max(args.min_steps, args.warmup))
    same = (args.epochs, args.patience) == (epochs, patience)
    tunes = args.tune_prediction and not checkpoint["flags"].get("tune_prediction")
    if same and (tunes or restart_count() or not has_ended(path.parent)):
        return
    to_test = "to test its weights again, give --test-only in place of --resume"
    if args.schedule != "constant" and done >= epochs:
        raise ValueError(
            f"{path}: {done} of {epochs} epochs done, and --epochs cannot change, for --schedule "
            f"{args.schedule} ends with them: start a new run from its weights with --init "
            f"{path.parent / BEST} and another --out; {to_test}"
        )
    if args.schedule != "constant" and args.epochs != epochs:
        raise ValueError(
            f"{path}: --schedule {args.schedule} ends with --epochs {epochs}, not {args.epochs}: "
            "leave --epochs away, or start afresh without --resume"
        )
    needed = []
    if args.epochs <= done:
        needed.append(f"--epochs N, more than {done}")
    if args.patience <= wait:
        needed.append(f"--patience N, more than {wait}")
    if needed:
        state = f"{done} of {epochs} epochs done"
        if args.patience <= wait:
            state += f", {wait} in a row without a lower validation loss"
        raise ValueError(f"{path}: {state}: give {' and '.join(needed)}; {to_test}")


def waits(checkpoint, grace=0):
    """(epochs done, most of them in a row without a lower validation loss) of a checkpoint.

    Epochs that end within the first `grace` steps are not among the latter.
    """
    progress, free = checkpoint["progress"], 0
    losses = [row["val_loss"] for row in progress["history"]]
    if grace and losses:
        steps = checkpoint["guarded_step"]["steps"] - progress["step"]
        free = grace_epochs(grace, steps / len(losses))
    lowest, wait, longest = math.inf, 0, 0
    for epoch, loss in enumerate(losses, 1):
        wait = 0 if loss < lowest or epoch <= free else wait + 1  # NaN is never lower
        lowest, longest = min(lowest, loss), max(longest, wait)
    return len(losses), longest


def has_ended(out):
    """Whether the run in a folder has been tested since its last checkpoint."""
    try:
        return (out / CURVES).stat().st_mtime_ns >= (out / LAST).stat().st_mtime_ns
    except FileNotFoundError:
        return False
