"""Train the U-Net and test its best weights (the tutorial's sections 4 to 6).

examples:
  python train.py                             # 40 epochs on dataset/, on a GPU if there is one
  python train.py --synthetic --device cpu    # on drawn phantoms: no account, no network
  python train.py --recipe strong --out runs/strong
  python train.py --resume                    # go on where the last run stopped
  python train.py --folds 5 --out runs/folds  # cross-validation on train and valid
  python train.py --test-only                 # test best_model.pth again
  torchrun --standalone --nproc_per_node=4 train.py   # four GPUs, which share each batch

Writes to --out: best_model.pth (the weights with the lowest validation loss), last.pth and
last.previous.pth (everything that --resume needs), metrics.csv (a line for each epoch),
curves.png and predictions.png.
"""

import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import medseg.threads  # noqa: F401, sets what torch reads when it is loaded

import numpy as np
import torch
import torch.nn.functional as F

from data import Batches, count_channels, make_loaders, open_split
from medseg import cli, coco, dist, drawing, inference, layers, metrics, phantoms, plots, predictor
from medseg import device as devices
from medseg.planning.plan import planned_flags
from medseg.signals import Signals
from medseg.training import checkpoint as checkpoints
from medseg.training import cross_validation, feature_statistics, optim, tracking, tuning
from medseg.training import flags as command_line
from medseg.training import history as reports
from medseg.training.precision import settle_precision
from net import UNet, copy_weights, info_of, load_model

# ---- loss (tutorial, section 5) --------------------------------------------------------------


def dice_loss(pred, target, smooth=1e-6):
    """1 - Dice of the whole batch, 0..1; pred: probabilities, target: 0 and 1, of one shape.

    Milletari, Navab, Ahmadi: "V-Net", 3DV 2016, equation 3, without the squares.
    """
    pred, target = pred.reshape(-1), target.reshape(-1)
    sums = torch.stack([(pred * target).sum(), pred.sum() + target.sum()])
    intersection, total = dist.all_reduce_sum(sums)
    return 1 - (2 * intersection + smooth) / (total + smooth)


def focal_loss(pred, target, alpha=0.25, gamma=2.0, *, reduction="mean"):
    """Cross-entropy that counts sure pixels less; pred: probabilities, target: 0 and 1.

    -a (1 - p)^gamma log(p), with p the probability of the right answer and a = alpha where that is
    foreground, else 1 - alpha. Lin et al.: "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 5. reduction: "mean" or "sum" over the pixels of this process.
    """
    cross_entropy = F.binary_cross_entropy(pred, target, reduction="none")
    right = pred * target + (1 - pred) * (1 - target)
    weight = alpha * target + (1 - alpha) * (1 - target)
    loss = weight * (1 - right) ** gamma * cross_entropy
    return loss.mean() if reduction == "mean" else loss.sum()


def combined_loss(pred, target, *, dice=0.6, bce=0.4, focal=0.0):
    """The weighted sum of Dice loss, binary cross-entropy and focal loss; NaN where pred is.

    pred: float32 probabilities, target: 0 and 1, of one shape. The tutorial's weights are 0.6 for
    the Dice loss and 0.4 for the cross-entropy. Means are over the pixels of all processes.
    """
    # On a GPU, binary_cross_entropy of NaN ends the process; what is added last passes it on.
    finite, loss = pred.nan_to_num(0.5), pred.new_zeros(())
    if bce:
        loss = loss + bce * F.binary_cross_entropy(finite, target, reduction="sum")
    if focal:
        loss = loss + focal * focal_loss(finite, target, reduction="sum")
    loss, pixels = dist.all_reduce_sum(torch.stack([loss, pred.new_full((), pred.numel())]))
    overlap = dice * dice_loss(pred, target) if dice else 0 * pred.sum()
    return overlap + loss / pixels


# ---- training (tutorial, section 5) ----------------------------------------------------------


def evaluate(
    model, loader, criterion, device, *, autocast=nullcontext(), poll=lambda: None, inference=None
):
    """Scores of `model` over every batch of `loader`, see RunningScores.result.

    poll() is called after each batch. inference: score the masks that predict.py makes with it, at
    the size of each image, `loader` being Batches; else those above 0.5 at the network's size.
    """
    model.eval()
    chosen = inference or predictor.PLAIN
    options = {"info": info_of(model), "inference": chosen, "autocast": autocast}
    predict = predictor.Predictor([model], device, **options)  # large images by tiles
    scores = metrics.RunningScores(device, info_of(model).class_names)
    numbers = iter(loader.row_numbers() if inference else ())
    with torch.inference_mode():
        for images, masks in loader:
            images, masks = images.to(device), masks.to(device)
            outputs = predict(images).to(device)
            loss = criterion(outputs, masks)
            if inference:
                truths = (loader.true_masks(next(numbers), mask) for mask in masks)
                scores.add_counts(loss, tuning.count_batch(model, inference, truths, outputs))
            else:
                scores.add(loss, outputs, masks)
            poll()
    return scores.result()


def train_one_epoch(model, loader, criterion, state, device, title, *, autocast, poll):
    """Train on the batches that the epoch has left; returns (scores, images per second).

    state: the objects that `train_model` makes. poll() is called after each step.
    """
    scores, progress, step = state.scores, state.progress, state.guarded_step
    started, images_before = time.perf_counter(), scores.images()
    if hasattr(loader, "set_epoch"):  # Batches: in the order of this epoch, from that step on
        loader.set_epoch(progress.epoch, progress.step)
        batches = loader
    else:  # any other loader is gone through again, but for the batches done
        batches = islice(loader, progress.step, None)
    model.train()
    with reports.progress_bar(batches, loader, progress.step, title) as bar:
        for images, masks in bar:
            images, masks = images.to(device), masks.to(device)
            step.begin()
            with autocast:
                outputs = model(images)
            loss = criterion(outputs, masks)
            finite = step.finish(loss)  # backward, and the weights' update where it is finite
            state.running_mean.update(step.steps)
            scores.add(loss, outputs, masks, finite=finite)
            progress.step += 1
            reports.show_loss(bar, scores, images_before)
            poll()
    images = scores.images() - images_before
    return scores.result(), images / (time.perf_counter() - started)


def train_model(
    model,
    train_loader,
    val_loader,
    criterion,
    optimizer,
    num_epochs,
    device,
    *,
    patience=8,
    grace=0,  # steps before whose end patience does not count
    out=".",
    autocast=nullcontext(),  # for the forward pass
    scaler=None,  # a GradScaler, for fp16
    schedule=None,  # schedule(step): factor of the learning rate at that step of the run
    ema=0.0,  # decay of a running mean of the weights, evaluated and kept in their place; 0: none
    resume=None,  # what last.pth held
    flags=None,  # recorded in last.pth
    log=lambda values, step: None,  # called after each epoch
    signals=None,  # a `Signals` to be stopped by
    save_every=60,  # seconds between two checkpoints, within an epoch too
):
    """Train for num_epochs, or until the validation loss has not fallen for `patience` epochs.

    train_loader, val_loader: iterables of (images (B, C, H, W), masks (B, 1, H, W));
    criterion(probabilities, masks): scalar tensor. Leaves the best weights in `model` and in
    out/best_model.pth, everything needed to go on in out/last.pth, and a line for each epoch in
    out/metrics.csv. Under torchrun every process calls this, with its part of the batches.
    A step whose loss or gradient is not finite changes nothing and is counted ("skipped" in the
    history). Returns the history, a dict for each epoch. Raises Stopped with last.pth written;
    ValueError after 20 such steps in a row, where no validation loss was a number,
    and where the last checkpoint cannot be written (an earlier one is only a warning).
    """
    out, device, signals = Path(out), torch.device(device), signals or Signals()
    state = SimpleNamespace(  # what last.pth keeps: objects with state_dict and load_state_dict
        model=model,
        running_mean=optim.RunningMean(model, ema),
        guarded_step=optim.GuardedStep(model, optimizer, device, scaler=scaler, schedule=schedule),
        scores=metrics.RunningScores(device, info_of(model).class_names),
        progress=checkpoints.Progress(),
        rng=checkpoints.RandomState(device),
    )
    checkpointer = checkpoints.Checkpointer(out, vars(state), flags=flags, save_every=save_every)
    if resume:
        checkpointer.restore(resume)
    progress, averaged = state.progress, state.running_mean.model  # the model itself without ema
    wrapped = dist.distribute(model)  # likewise in a single process
    poll = partial(checkpointer.poll, signals)

    with signals.defer():
        if wrapped is not model and not resume:
            checkpointer.save()  # what a restart by torchrun goes on from, not an older run's
        free = checkpoints.grace_epochs(grace, len(train_loader)) if grace else 0
        while progress.epoch < num_epochs and progress.epochs_waited(free) < patience:
            started, title = time.perf_counter(), f"epoch {progress.epoch + 1}/{num_epochs}"
            train_scores, speed = train_one_epoch(
                wrapped, train_loader, criterion, state, device, title, autocast=autocast, poll=poll
            )
            val_scores = evaluate(
                averaged, val_loader, criterion, device, autocast=autocast, poll=poll
            )
            progress.end_epoch()
            better = dist.all_reduce_max(val_scores["loss"] < progress.best_loss)[0]
            if better:
                progress.keep_best(val_scores["loss"], averaged)
            row = reports.epoch_row(progress.epoch, train_scores, val_scores, state.guarded_step)
            row |= {"images_per_second": speed, "seconds": time.perf_counter() - started}
            progress.history.append(row)
            state.scores.reset()
            if dist.is_first():
                with checkpointer.disk():
                    reports.write_history(progress.history, out / "metrics.csv")
                reports.print_epoch(progress.history, num_epochs, better)
                log(reports.log_values(row), progress.epoch)
        if progress.epoch < num_epochs and dist.is_first():
            reports.print_early_stop(progress, patience)
        checkpointer.save(last_chance=True)
    if progress.best_weights is None:
        raise ValueError("the loss on valid never was a number: lower --lr or try --precision fp32")
    model.load_state_dict(progress.best_weights)
    return progress.history


def visualize_predictions(
    model,
    test_loader,
    device,
    num_samples=5,
    threshold=0.5,
    *,
    path="predictions.png",
    title="",
    names=(),
    chosen=None,
):
    """Draw samples of the first batches with their true and predicted masks.

    The samples are spread evenly over as many batches as hold num_samples images. Those of
    `data.Batches` with a data set are drawn in their own size, with the masks that predict.py
    writes; others as the network takes them. names: of the images, in the loader's order, to write
    below the samples. chosen: the Inference that makes the masks, in the place of the threshold.
    Returns path.
    """
    model.eval()
    chosen, samples, cases = chosen or inference.Inference(threshold), [], []
    options = {"info": info_of(model), "inference": chosen}
    predict = predictor.Predictor([model], device, **options)
    for images, masks in test_loader:
        samples += zip(images, masks, strict=True)
        if len(samples) >= num_samples:
            break
    shown = np.linspace(0, len(samples) - 1, min(num_samples, len(samples))).astype(int)
    for index in shown:
        image, mask = samples[index]  # their sizes may differ
        picture, target = plots.denormalize(image[None])[0], mask.cpu().numpy() > 0.5
        if isinstance(test_loader, Batches) and test_loader.knows_images:
            picture, target = test_loader.original(index)
        with torch.inference_mode():
            outputs = predict(image[None])[0].cpu().numpy()
        size, exclusive = target.shape[:0:-1], predict.info.exclusive
        pred = np.stack(list(chosen.masks(outputs, size, exclusive=exclusive)))
        dice = metrics.image_dice(metrics.count_masks(target, pred))
        cases.append((*plots.reduce_case(picture, target, pred), f"Dice {dice.mean():.2f}"))
    return plots.plot_predictions(
        cases,
        path,
        title=title or f"predictions at {chosen}",
        class_names=predict.info.class_names,
        captions=[names[index] for index in shown] if names else (),
    )


# ---- the command line ------------------------------------------------------------------------


def main(argv=None):
    args, checkpoint = command_line.parse_arguments(argv, __doc__, planned_flags)
    by_default = "classes" not in command_line.make_parser(__doc__).parse_given(argv, ("classes",))
    unasked = by_default and args.classes == "union" and args.recipe != "auto"  # which tells why
    out, signals, lock = cli.output_folder(args.out), Signals(), nullcontext()
    writes = dist.starts_first() and not args.test_only  # the first of the processes
    if writes:
        lock = checkpoints.run_lock(out)
    try:
        go_on = command_line.command("train.py", "--resume", out=out)
        with signals.installed(), signals.exit_when_stopped(go_on), lock:
            if writes and not (checkpoint or args.overwrite or dist.restart_count()):
                checkpoints.refuse_other_run(out, folds=args.folds)
            if dist.starts_first():
                checkpoints.check_run_folder(out, args)
            if writes and not checkpoint and unasked and not args.synthetic:
                reports.print_union(Path(args.data))
            if args.folds:
                for fold in cross_validation.untrained_folds(args, checkpoint):
                    fold.score(*train_and_test(fold.args, fold.checkpoint, signals))
            else:
                train_and_test(args, checkpoint, signals)
    except (MemoryError, RuntimeError) as error:
        memory = devices.out_of_memory(error)
        if memory is None:
            raise
        size = "--crop" if args.crop else "--image-size"
        raise ValueError(
            f"out of {memory} with --batch-size {args.batch_size}: halve it, "
            f"or lower {size} or --n-filters"
        ) from None


def train_and_test(args, checkpoint, signals):
    """One run, in each process of torchrun; returns its network, `valid` and the autocast."""
    device = devices.pick_device(args.device)
    if device.type == "cpu":
        devices.keep_freed_memory()
    with dist.process_group(device):
        root, out = data_root(args), Path(args.out)
        model = make_model(args, root, device, start=not checkpoint)
        skipped = [] if args.skip_bad else None
        loaders = make_loaders(args, root, model, device, skipped)
        precision = settle_precision(args, device)
        if dist.is_first():
            note = f"{devices.describe_device(device)}, {precision}"
            reports.print_run(root, args, loaders, model, note)
            reports.list_skipped(skipped, out)
        flags = checkpoints.recorded_flags(args)
        if not args.test_only:
            command_line.check_batch_norm(args, loaders["train"].images_per_epoch)
            datasets = [open_split(root, split, skipped=[]) for split in ("train", "valid")]
            flags["data_fingerprints"] = checkpoints.check_same_data(datasets, root, checkpoint)
        tracker, history = tracking.start_tracker(args, flags, checkpoint), None
        criterion, autocast = loss_of(args), devices.make_autocast(precision, device)
        try:
            if not args.test_only:
                if dist.is_first():
                    checkpoints.prepare_folder(out, checkpoint)
                steps = args.epochs * len(loaders["train"])
                warmup, ema = optim.fit_to_run(args.warmup, args.ema, steps)
                history = train_model(
                    model,
                    loaders["train"],
                    loaders["valid"],
                    criterion,
                    make_optimizer(args, model),
                    args.epochs,
                    device,
                    patience=args.patience,
                    grace=max(args.min_steps, args.warmup),
                    out=out,
                    autocast=autocast,
                    scaler=devices.make_scaler(precision, device),
                    schedule=optim.make_schedule(args.schedule, warmup, steps),
                    ema=ema,
                    resume=checkpoint,
                    flags=flags,
                    log=tracker.log,
                    signals=signals,
                    save_every=args.save_every,
                )
                feature_statistics.record_statistics(model, loaders, device, out, autocast)
                if args.tune_prediction:
                    tuning.tune_prediction(model, loaders, device, out, autocast)
            planned = args.recipe == "auto"
            test(model, loaders["test"], criterion, device, autocast, tracker, planned=planned)
            if dist.is_first():
                draw(args, root, model, loaders["test"], device, history, tracker)
        finally:
            tracker.finish(failed=sys.exc_info()[0] is not None)
        return model, loaders.get("valid"), autocast


def data_root(args):
    """The folder of the data set; the phantoms of --synthetic are drawn there first."""
    if not args.synthetic:
        return Path(args.data)
    with dist.first_on_each_machine():
        return phantoms.make_phantoms(Path(args.data) / "synthetic")


def test(model, loader, criterion, device, autocast, tracker, *, planned=False):
    """Print and log the scores of the best weights, at 0.5 and as was chosen on valid.

    Those of the masks that predict.py writes, at the size of each image.
    """
    score = partial(evaluate, model, loader, criterion, device, autocast=autocast)
    scores = score(inference=inference.PLAIN)
    tracker.log({f"test/{name}": value for name, value in scores.items()})
    if dist.is_first():
        memory = devices.peak_memory(device)
        reports.print_test(scores, model.info.class_names, memory, planned=planned)
    if model.info.inference not in (None, inference.PLAIN):
        scores = score(inference=model.info.inference)
        tracker.log({f"test/chosen_{name}": scores[name] for name in scores if name != "loss"})
        if dist.is_first():
            reports.print_chosen_test(scores, model.info.inference, model.info.class_names)


def make_optimizer(args, model):
    """Adam, as the tutorial's, where --weight-decay is 0."""
    return optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)


def loss_of(args):
    """The criterion that --loss names."""
    return partial(combined_loss, **command_line.loss_weights(args))


def make_model(args, root, device, *, start=True):
    """The network of these flags, or with --test-only that of best_model.pth, on the device.

    start: whether --init counts; a run that is resumed has weights of its own.
    """
    torch.manual_seed(args.seed)
    if args.test_only:
        model = load_model(Path(args.out) / checkpoints.BEST)
    else:
        model = new_model(args, root)
        if args.init and start:
            same_classes = copy_weights(load_model(args.init), model)
            if not same_classes and dist.is_first():
                reports.print_new_head(model)
    model = dist.synchronize_batch_norm(model, device)
    model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()  # in place: the weights keep their names
    return model


def new_model(args, root):
    """The network of these flags with random weights."""
    names = None
    if args.classes == "each":
        names = list(coco.used_categories(coco.load_coco(root / "train", [])))
        if not 1 <= len(names) <= 255:
            raise ValueError(
                f"{root / 'train'}: {len(names)} categories have annotations, and --classes "
                "each takes 1 to 255"
            )
    model = UNet(
        count_channels(root, args.n_channels),
        len(names) if names else 1,
        args.n_filters,
        image_size=None if args.crop else args.image_size,
        class_names=names,
        trained_flips=inference.learned_flips(command_line.augmentations(args)),
        **coco.recorded_settings(root / "train"),
        **layers.architecture_of(args).as_dict(),
    )
    if args.prior:  # Lin et al.: "Focal Loss", ICCV 2017, section 4.1
        torch.nn.init.constant_(model.outc.bias, np.log(args.prior / (1 - args.prior)))
    return model


def draw(args, root, model, test_loader, device, history, tracker):
    """Pictures of a finished run, and the command to look at a prediction with."""
    out = Path(args.out)
    sides = (
        f"{model.info.image_size}x{model.info.image_size}" if model.info.image_size else "own size"
    )
    title = f"{sides}, {model.n_filters} filters"
    shown = drawing.describe_shown(model.info.channel_names, ", ")
    drawn = visualize_predictions(
        model,
        test_loader,
        device,
        num_samples=10,
        path=out / "predictions.png",
        title=f"{root / 'test'}: {title}, {model.info.inference or inference.PLAIN}{shown}",
        chosen=model.info.inference,
        names=test_loader.names_in_order(),
    )
    tracker.image("predictions", drawn)
    if history:
        curves = plots.plot_curves(history, out / checkpoints.CURVES, title=f"{root}: {title}")
        drawn = f"{drawn} and {curves}"
    print(f"drawn: {drawn}; next: {command_line.predict_command(args, root)}")


if __name__ == "__main__":
    # A stuck upload would hold up the exit for a minute; and a thread of gloo that lets go of its
    # last tensor while Python shuts down would make it an abort.
    cli.run_main(main, exit_at_once=True)
