"""A plan for a data set: looked at, timed on this machine, printed, and handed over as flags."""

import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import open_split
from medseg.cli import spell_flags
from medseg.device import describe_device, pick_device
from medseg.dist import started_by_torchrun
from medseg.layers import architecture_of, network_flags
from medseg.phantoms import make_phantoms
from medseg.planning import rules
from medseg.planning.fingerprint import take_fingerprint
from medseg.planning.timing import time_network
from medseg.weights import pretrained_path
from net import UNet, load_model

NOT_REPEATED = ("recipe", "minutes", "out", "overwrite")  # in the command that a plan prints
# Of these flags each asks for a network, or for its size: then none is started from weights.
NETWORK = {"init", "arch", "depth", "norm", "dropout", "n_filters", "n_channels"}
SIZE = {"image_size", "crop"}
TRIED = 32  # training images on which weights are tried


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
    plan = plan_training(root, given, minutes=given.get("minutes", 0.0) / max(folds, 1))
    print(f"plan for {root}:", *plan.lines, sep="\n  ")
    each = f" for each of {folds} folds" if folds else ""
    took = f"about {max(round(plan.seconds / 60), 1)} minute(s){each}"
    print(f"  {took} on this machine ({plan.device}); --minutes N fits the plan to other times")
    repeated = {name: value for name, value in plan.given.items() if name not in NOT_REPEATED}
    command = spell_flags({**repeated, **plan.flags})
    print(f"the same without --recipe auto: python train.py {command}", flush=True)
    return plan.flags


def plan_training(root, given, *, minutes=0.0):
    """The `rules.Plan` of a training on the data set in `root`: its flags, reasons and seconds.

    given: {name: value} of flags that the user gives, which win. minutes: how long the
    training, or that of each fold, may take, 0: as long as the rules say.
    Raises FileNotFoundError or ValueError where the data set is damaged or has no foreground.
    """
    started, folds = time.perf_counter(), given.get("folds", 0)
    look = take_fingerprint(root, skip_bad=given.get("skip_bad", False))
    if not any(look.foreground):
        raise ValueError(f"{root / 'train'}: none of its masks has foreground: nothing to learn")
    if folds:  # each trains on all images of train and valid but its own part
        pool = look.images["train"] + look.images["valid"]
        valid = math.ceil(pool / folds)
        parts = {"train": max(pool - valid, 1), "valid": valid}
        look = look._replace(images={**look.images, **parts})
    device, smaller, start, longer = pick_device(given.get("device", "auto")), {}, None, None
    if look.images["train"] < rules.FEW and not (NETWORK | SIZE) & given.keys():
        start = try_pretrained(root)
    while True:
        plan = rules.Plan({**smaller, **given})
        if start:
            rules.choose_start(plan, *start)
        rules.choose_images(plan, look)
        rules.choose_network(plan, look, "cuda" if device.type == "cuda" else "cpu")
        times = time_plan(plan, look, device)
        spent = (time.perf_counter() - started) / max(folds, 1)
        steps, plan.seconds = rules.choose_length(plan, look, times, minutes, spent)
        change = rules.shrink(plan, look, given, steps) if minutes else {}
        if longer is None and not (change and rules.shrink(plan, look, given, rules.NO_STEPS)):
            longer = rules.lengthen(plan, look, times, spent)  # of the smallest worth its time
        if not change:
            break
        smaller |= change
    rules.choose_augmentation(plan, look, plan.epochs * plan.repeat)
    plan.device = describe_device(device)
    if smaller:
        reason = f"if larger, {minutes:g} minutes would hold too few steps"
        plan.lines.append(f"{spell_flags(smaller)}: {reason}")
    if look.empty["valid"] == 1:
        plan.lines.append("note: valid has no foreground: how good the masks are it cannot tell")
    if look.duplicates and not look.duplicates.startswith("0.0%"):
        plan.lines.append(f"note: of valid and test beside train, {look.duplicates}")
    few, enough = rules.few_steps(plan)
    if steps < few:
        flag, value = longer
        flag = spell_flags({flag: value * max(folds, 1) if flag == "minutes" else value})
        learned = "nothing" if steps < few / 3 else "little"
        plan.lines.append(
            f"WARNING: {steps} steps are too few, the network will learn {learned} from them: "
            f"{flag} would give it {enough}"
        )
    return plan


def try_pretrained(root):
    """(flags that start from the weights that come with the repository, their Dice), or None.

    None where they were removed. The Dice is that of evenly spaced training images, their pixels
    counted together, all annotations as one class. Damaged images are passed over.
    """
    path = pretrained_path()
    if path is None:
        return None
    model = load_model(path).eval()
    size, both, marked = model.info.image_size, 0, 0
    dataset = open_split(root, "train", size, n_channels=model.n_channels, skipped=[])
    for index in np.unique(np.linspace(0, len(dataset) - 1, TRIED).astype(int)).tolist():
        try:
            image, mask = dataset[index]
        except (FileNotFoundError, ValueError):
            continue
        with torch.inference_mode():
            pred = model(image[None])[0] > 0.5
        both += int((pred & (mask > 0)).sum())
        marked += int(pred.sum() + mask.sum())
    flags = {"init": str(path), "image_size": size, **network_flags(model, path)}
    return flags, 2 * both / max(marked, 1)


def time_plan(plan, look, device):
    """The `Times` of the network that the flags of a plan make."""
    flags = {"arch": plan.given.get("arch", "tutorial"), **plan.flags}
    layers = vars(architecture_of(SimpleNamespace(**flags)))
    n_classes = look.n_classes if plan.classes == "each" else 1
    network = UNet(plan.n_channels, n_classes, plan.n_filters, **layers)
    precision = plan.given.get("precision", "auto")
    return time_network(network, device, plan.side, plan.batch_size, precision)
