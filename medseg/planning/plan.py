"""A plan for a data set: looked at, timed on this machine, printed, and handed over as flags."""

import shlex
import time
from pathlib import Path
from types import SimpleNamespace

from medseg.cli import flag_name, spell_flags
from medseg.device import describe_device, pick_device
from medseg.dist import started_by_torchrun
from medseg.layers import architecture_of
from medseg.phantoms import make_phantoms
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.rules import (
    Plan,
    choose_augmentation,
    choose_length,
    choose_start,
    choose_what_data_decide,
    may_start,
    shrink,
    wanted_steps,
)
from medseg.planning.start import try_pretrained
from medseg.planning.timing import time_network

NOT_REPEATED = ("recipe", "minutes", "out", "overwrite")  # in the command that a plan prints


def planned_flags(open_split, network, read_network, given):
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
    programs = {"open_split": open_split, "network": network, "read_network": read_network}
    plan = plan_training(root, given, minutes=minutes, **programs)
    print_plan(plan, root, folds)
    return plan.flags


def plan_training(root, given, *, open_split, network, read_network, minutes=0.0):
    """The Plan of a training on the data set in `root`: its flags, reasons and seconds.

    given: {name: value} of flags that the user gives, which win. open_split: that of data.py;
    network, read_network: UNet and load_model of net.py. minutes: how long the training may take,
    0: as long as the rules say.
    Raises FileNotFoundError or ValueError where the data set is damaged or has no foreground.
    """
    started = time.perf_counter()
    look = take_fingerprint(root, open_split, skip_bad=given.get("skip_bad", False))
    device = pick_device(given.get("device", "auto"))
    if not any(look.foreground):
        raise ValueError(f"{root / 'train'}: none of its masks has foreground: nothing to learn")
    smaller, start = {}, None
    if may_start(look, given):
        start = try_pretrained(root, open_split, read_network)
    while True:
        plan = Plan({**smaller, **given})
        if start:
            choose_start(plan, start)
        choose_what_data_decide(plan, look, "cuda" if device.type == "cuda" else "cpu")
        times = time_plan(plan, look, device, network)
        spent = time.perf_counter() - started
        steps, plan.seconds = choose_length(plan, look, times, minutes, spent)
        wanted = wanted_steps(plan, look)
        change = shrink(plan, look, given, steps) if minutes and steps < wanted else {}
        if not change:
            break
        smaller |= change
    choose_augmentation(plan, look, plan.epochs * plan.repeat)
    plan.device = describe_device(device)
    if smaller:
        reason = f"if larger, --minutes {minutes:g} would hold fewer than {wanted} steps"
        plan.lines.append(f"{spell_flags(smaller)}: {reason}")
    if look.empty["valid"] == 1:
        plan.lines.append("note: valid has no foreground: how good the masks are it cannot tell")
    if look.duplicates and not look.duplicates.startswith("0.0%"):
        plan.lines.append(f"note: of valid and test beside train, {look.duplicates}")
    return plan


def time_plan(plan, look, device, network):
    """The `Times` of the network that the flags of a plan make."""
    flags = {"arch": plan.given.get("arch", "tutorial"), **plan.flags}
    layers = architecture_of(SimpleNamespace(**flags)).as_dict()
    n_classes = look.n_classes if plan.classes == "each" else 1
    return time_network(
        network(plan.n_channels, n_classes, plan.n_filters, **layers),
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
    command = ["python", "train.py"]
    for name, value in {**given, **plan.flags}.items():
        switch = isinstance(value, bool)
        command += [spell_flags({name: value})] if switch else [flag_name(name), str(value)]
    print(f"the same without --recipe auto: {shlex.join(command)}", flush=True)


def spell_minutes(seconds):
    """'about 12 minutes'."""
    minutes = round(seconds / 60)
    return f"about {minutes} minutes" if minutes > 1 else "about a minute"
