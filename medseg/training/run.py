"""What the flags of a run stand for: its folder, its network, how it trains, what comes next."""

import shlex
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from data import count_channels
from medseg import coco, dist, plots
from medseg.cli import output_folder
from medseg.device import choose_precision, out_of_memory
from medseg.inference import learned_flips
from medseg.layers import architecture_of
from medseg.own_files import check_outputs
from medseg.phantoms import make_phantoms
from medseg.training import checkpoint as checkpoints
from medseg.training import optim
from net import UNet, copy_weights, load_model


@contextmanager
def open_folder(args, checkpoint):
    """Within, --out is a folder that no other training writes to.

    ValueError where one does, where it holds another run, or files that this run would replace and
    that are not ours. Of several processes, the first looks.
    """
    out, lock = output_folder(args.out), nullcontext()
    if dist.starts_first() and not args.test_only:
        lock = checkpoints.run_lock(out)
    with lock:
        if dist.starts_first():
            _refuse_others(out, args, checkpoint)
        yield


def _refuse_others(out, args, checkpoint):
    runs, drawn = checkpoints.fold_runs(out) if args.folds else [], ["predictions.png"]
    if not args.test_only:
        drawn += ["curves.png", "metrics.csv"]
        if not (checkpoint or args.overwrite or dist.restart_count()):
            checkpoints.refuse_other_run([out, *runs])
    written = [run / name for run in (runs if args.folds else [out]) for name in drawn]
    check_outputs([*written, *[out / "skipped.txt"] * args.skip_bad], "--out")


def data_root(args):
    """The folder of the data set; the phantoms of --synthetic are drawn there first."""
    if not args.synthetic:
        return Path(args.data)
    with dist.first_on_each_machine():
        return make_phantoms(Path(args.data) / "synthetic")


def make_network(args, root, device, *, start=True):
    """The UNet of these flags, or with --test-only that of best_model.pth, on the device.

    start: whether --init counts; a run that is resumed has weights of its own.
    """
    torch.manual_seed(args.seed)
    if args.test_only:
        model = load_model(Path(args.out) / checkpoints.BEST)
    else:
        model = _new_network(args, root)
        if args.init and start and not copy_weights(load_model(args.init), model):
            if dist.is_first():
                classes = ", ".join(model.info.class_names)
                print(f"the last layer starts anew: its classes are {classes}", flush=True)
    model = dist.synchronize_batch_norm(model, device)
    model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()  # in place: the weights keep their names
    return model


def _new_network(args, root):
    """The UNet of these flags with random weights."""
    names, folder = None, root / "train"
    if args.classes == "each":
        names = list(coco.used_categories(coco.load_coco(folder, [])))
        if not 1 <= len(names) <= coco.MAX_CLASSES:
            found = f"{len(names)} categories have annotations"
            raise ValueError(f"{folder}: {found}, and --classes each takes 1 to {coco.MAX_CLASSES}")
    model = UNet(
        count_channels(root, args.n_channels),
        len(names) if names else 1,
        args.n_filters,
        image_size=None if args.crop else args.image_size,
        class_names=names,
        trained_flips=learned_flips(args.augment),
        **coco.recorded_settings(folder),
        **vars(architecture_of(args)),
    )
    if args.prior:  # Lin et al.: "Focal Loss", ICCV 2017, section 4.1
        torch.nn.init.constant_(model.outc.bias, np.log(args.prior / (1 - args.prior)))
    return model


def settle_precision(name, device, checkpoint):
    """--precision `name` as 'fp32', 'fp16' or 'bf16'.

    'auto' stays what it was in the checkpoint, or None, on the same kind of device.
    """
    if checkpoint and name == "auto":
        kind, chosen = checkpoint["flags"]["computed_in"]
        if kind == device.type:
            return chosen
    return choose_precision(name, device)


def recorded_flags(args, root, computed_in, checkpoint):
    """The flags that last.pth keeps, and what else has to stay as it was; ValueError where not.

    computed_in: [kind of device, precision].
    """
    flags = {**vars(args), "computed_in": computed_in}
    if not args.test_only:
        flags["data_fingerprints"] = checkpoints.check_same_data(root, checkpoint)
    return flags


def training_options(args, optimizer, steps_per_epoch):
    """The `optim.TrainingOptions` of these flags."""
    steps = args.epochs * steps_per_epoch
    warmup, ema = optim.fit_to_run(args.warmup, args.ema, steps)
    return optim.TrainingOptions(
        patience=args.patience,
        grace=max(args.min_steps, args.warmup),
        schedule=optim.make_schedule(optimizer, args.schedule, warmup, steps),
        ema=ema,
        save_every=args.save_every,
    )


@contextmanager
def memory_advice(args):
    """Within, running out of memory becomes a ValueError that names the flags to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        memory, size = out_of_memory(error), "--crop" if args.crop else "--image-size"
        if memory is None:
            raise
        advice = f"halve --batch-size {args.batch_size}, or lower {size} or --n-filters"
        raise ValueError(f"out of {memory}: {advice}") from None


def finish(args, root, device, history, tracker):
    """Draw the curves of a finished run, log what is drawn, and print what comes next."""
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak GPU memory {memory:.2f} GiB", flush=True)
    out = Path(args.out)
    drawn = out / "predictions.png"
    tracker.image("predictions", drawn)
    if history:
        curves = plots.plot_curves(history, out / "curves.png", title=str(root))
        drawn = f"{drawn} and {curves}"
    print(f"drawn: {drawn}; next: {predict_command(args, root)}")


def command(script, *words, out=None):
    """A command to paste, with --out where that is not this folder."""
    if out is not None and out != Path("."):
        words = (*words, "--out", out)
    return shlex.join(["python", script, *map(str, words)])


def predict_command(args, root):
    """A command that shows a prediction of the weights in --out."""
    words = []
    if args.data != "dataset":  # predict.py finds an example of its own only there
        words.append(root / "test")
    if args.out != ".":
        words += ["--model", Path(args.out) / checkpoints.BEST]
    return command("predict.py", *words)
