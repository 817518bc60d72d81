"""A plan for a data set: looked at, timed on this machine, printed, and handed over as flags."""

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from medseg.cli import spell_flags
from medseg.device import describe_device, pick_device
from medseg.dist import started_by_torchrun
from medseg.layers import architecture_of
from medseg.phantoms import make_phantoms
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.rules import (
    NO_STEPS,
    Plan,
    choose_augmentation,
    choose_length,
    choose_start,
    choose_what_data_decide,
    few_steps,
    lengthen,
    may_start,
    shrink,
    wanted_steps,
)
from medseg.planning.start import try_pretrained
from medseg.planning.timing import time_network
from net import UNet

NOT_REPEATED = ("recipe", "minutes", "out", "overwrite")  # in the command that a plan prints


def planned_flags(given):
    """The flags that --recipe auto adds to those that are given, printed with their reasons.

    What is taken and raised is as of `plan_training`; here `given` also holds data, synthetic,
    minutes and folds, of which each gets its part of the minutes.
    """
    if started_by_torchrun():
        raise ValueError(
            "--recipe auto: plan first, `python data.py FOLDER --plan`, and give torchrun the "
            "command that it prints"
        )
    root, folds = Path(given.get("data", "dataset")), given.get("folds", 0)
    if given.get("synthetic"):
        root = make_phantoms(root / "synthetic")
    minutes = given.get("minutes", 0.0) / max(folds, 1)
    plan = plan_training(root, given, minutes=minutes)
    print_plan(plan, root, folds)
    return plan.flags


def plan_training(root, given, *, minutes=0.0):
    """The Plan of a training on the data set in `root`: its flags, reasons and seconds.

    given: {name: value} of flags that the user gives, which win. minutes: how long the
    training, or that of each fold, may take, 0: as long as the rules say.
    Raises FileNotFoundError or ValueError where the data set is damaged or has no foreground.
    """
    started = time.perf_counter()
    look = take_fingerprint(root, skip_bad=given.get("skip_bad", False))
    if folds := given.get("folds", 0):
        look = look_at_fold(look, folds)
    device = pick_device(given.get("device", "auto"))
    if not any(look.foreground):
        raise ValueError(f"{root / 'train'}: none of its masks has foreground: nothing to learn")
    smaller, start, longer = {}, None, None
    if may_start(look, given):
        start = try_pretrained(root)
    while True:
        plan = Plan({**smaller, **given})
        if start:
            choose_start(plan, start)
        choose_what_data_decide(plan, look, "cuda" if device.type == "cuda" else "cpu")
        times = time_plan(plan, look, device)
        spent = (time.perf_counter() - started) / max(folds, 1)
        steps, plan.seconds = choose_length(plan, look, times, minutes, spent)
        wanted = wanted_steps(plan, look)
        change = shrink(plan, look, given, steps) if minutes and steps < wanted else {}
        if longer is None and not (change and shrink(plan, look, given, NO_STEPS)):
            longer = lengthen(plan, look, times, spent)  # with the smallest that is worth its time
        if not change:
            break
        smaller |= change
    choose_augmentation(plan, look, plan.epochs * plan.repeat)
    plan.device = describe_device(device)
    if smaller:
        reason = f"if larger, {minutes:g} minutes would hold fewer than {wanted} steps"
        plan.lines.append(f"{spell_flags(smaller)}: {reason}")
    if look.empty["valid"] == 1:
        plan.lines.append("note: valid has no foreground: how good the masks are it cannot tell")
    if look.duplicates and not look.duplicates.startswith("0.0%"):
        plan.lines.append(f"note: of valid and test beside train, {look.duplicates}")
    if steps < few_steps(plan)[0]:
        plan.lines.append(warn_of_few_steps(plan, steps, given, *longer))
    return plan


def look_at_fold(look, folds):
    """The Fingerprint of a fold, which trains on all images of train and valid but its own part."""
    pool = look.images["train"] + look.images["valid"]
    valid = math.ceil(pool / folds)
    return replace(look, images={**look.images, "train": max(pool - valid, 1), "valid": valid})


def warn_of_few_steps(plan, steps, given, longer, minutes):
    """A line on a run that is too short, with the command of one that is not.

    longer, minutes: as of `lengthen`, of each fold.
    """
    few, enough = few_steps(plan)
    folds = max(given.get("folds", 0), 1)
    if "minutes" in longer:
        longer = {"minutes": minutes * folds}
    learned = "nothing" if steps < few / 3 else "little"
    flags = {"recipe": "auto", **given, **longer}
    return (
        f"WARNING: {steps} steps are too few, the network will learn {learned} in that time; "
        f"{enough} take {spell_minutes(60 * minutes * folds)}: {spell_command(flags)}"
    )


def time_plan(plan, look, device):
    """The `Times` of the network that the flags of a plan make."""
    flags = {"arch": plan.given.get("arch", "tutorial"), **plan.flags}
    layers = architecture_of(SimpleNamespace(**flags)).as_dict()
    n_classes = look.n_classes if plan.classes == "each" else 1
    return time_network(
        UNet(plan.n_channels, n_classes, plan.n_filters, **layers),
        device,
        side=plan.side,
        batch_size=plan.batch_size,
        precision=plan.given.get("precision", "auto"),
    )


def print_plan(plan, root, folds=0):
    """The plan as lines, how long it will take, and the command that follows it."""
    print(f"plan for {root}:")
    for line in plan.lines:
        print(f"  {line}")
    each = f" for each of {folds} folds" if folds else ""
    print(
        f"  {spell_minutes(plan.seconds)}{each} on this machine ({plan.device}); "
        "--minutes N fits the plan to other times"
    )
    given = {name: value for name, value in plan.given.items() if name not in NOT_REPEATED}
    command = spell_command({**given, **plan.flags})
    print(f"the same without --recipe auto: {command}", flush=True)


def spell_command(flags):
    """The command that trains with these flags."""
    return f"python train.py {spell_flags(flags)}"


def spell_minutes(seconds):
    """'about 12 minutes'."""
    minutes = round(seconds / 60)
    return f"about {minutes} minutes" if minutes > 1 else "about a minute"
