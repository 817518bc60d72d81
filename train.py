"""Train the U-Net and test its best weights (the tutorial's sections 4 to 6).

examples:
  python train.py                             # 40 epochs on dataset/, on a GPU if there is one
  python train.py --synthetic --device cpu    # on drawn phantoms: no account, no network
  python train.py --recipe strong --out runs/strong
  python train.py --resume                    # go on where the last run stopped
  python train.py --folds 5 --out runs/folds  # cross-validation on train and valid
  python train.py --test-only                 # test best_model.pth again
  torchrun --standalone --nproc_per_node=4 train.py   # four GPUs, which share each batch

Writes to --out: best_model.pth (the weights with the lowest validation loss), last.pth (everything
that --resume needs), metrics.csv (a line for each epoch), curves.png and predictions.png.
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

import data
import net
from medseg import cli, dist, drawing, inference, metrics, plots, predictor
from medseg import device as devices
from medseg.planning.plan import planned_flags
from medseg.signals import Signals
from medseg.training import checkpoint as checkpoints
from medseg.training import cross_validation, feature_statistics, optim, run, tracking, tuning
from medseg.training import flags as command_line
from medseg.training import history as reports

# ---- loss (tutorial, section 5) --------------------------------------------------------------


def dice_loss(pred, target, smooth=1e-6):
    """1 - Dice of the whole batch, 0..1; pred: probabilities, target: 0 and 1, of one shape.

    Milletari, Navab, Ahmadi: "V-Net", 3DV 2016, equation 3, without the squares.
    """
    pred, target = pred.reshape(-1), target.reshape(-1)
    sums = torch.stack([(pred * target).sum(), pred.sum() + target.sum()])
    intersection, total = dist.all_reduce_sum(sums)
    return 1 - (2 * intersection + smooth) / (total + smooth)


def bce_loss(pred, target):
    """The binary cross-entropy of each pixel; NaN where pred is."""
    # On a GPU, binary_cross_entropy of NaN ends the process.
    loss = F.binary_cross_entropy(pred.nan_to_num(0.5), target, reduction="none")
    return loss.where(pred == pred, pred)


def focal_loss(pred, target, alpha=0.25, gamma=2.0):
    """Cross-entropy of each pixel that counts sure ones less; pred: probabilities, target: 0 and 1.

    -a (1 - p)^gamma log(p), with p the probability of the right answer and a = alpha where that is
    foreground, else 1 - alpha. Lin et al.: "Focal Loss for Dense Object Detection", ICCV 2017,
    equation 5.
    """
    right = pred * target + (1 - pred) * (1 - target)
    weight = alpha * target + (1 - alpha) * (1 - target)
    return weight * (1 - right) ** gamma * bce_loss(pred, target)


# What --loss takes. A loss is a number for the batch of all processes, or one for each pixel.
LOSSES = {"dice": dice_loss, "bce": bce_loss, "focal": focal_loss}
WEIGHTS = {"dice": 0.6, "bce": 0.4}  # the tutorial's


def combined_loss(pred, target, weights=WEIGHTS):
    """The sum of LOSSES by {name: weight}; NaN where pred is.

    pred: float32 probabilities, target: 0 and 1, of one shape, and -1 for pixels to be ignored.
    Losses of pixels count by their mean over the other pixels of all processes.
    """
    known, total = target >= 0, pred.new_zeros(())
    pred, target = torch.where(known, pred, 0.0), target.clamp(min=0)  # their loss is 0
    for name, weight in weights.items():
        loss = LOSSES[name](pred, target)
        if loss.dim():
            sums = torch.stack([weight * loss.sum(), known.sum().to(loss.dtype)])
            loss_sum, pixels = dist.all_reduce_sum(sums)
            total = total + loss_sum / pixels.clamp(min=1)
        else:
            total = total + weight * loss
    return total


# ---- training (tutorial, section 5) ----------------------------------------------------------


def evaluate(model, loader, criterion, device, *, autocast=nullcontext(), inference=None):
    """Scores of `model` over every batch of `loader`, see RunningScores.result.

    inference: score the masks that predict.py makes with it, at the size of each image, `loader`
    being Batches; else those above 0.5 at the network's size.
    """
    model.eval()
    info, way = net.info_of(model), inference or predictor.PLAIN
    # Large images by tiles.
    predict = predictor.Predictor([model], device, info=info, inference=way, autocast=autocast)
    scores = metrics.RunningScores(device, info.class_names)
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
    return scores.result()


def train_one_epoch(model, loader, criterion, state, title, poll):
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
            images, masks = images.to(step.device), masks.to(step.device)
            step.begin()
            with step.autocast:
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
    options=None,  # optim.TrainingOptions, where not as in the tutorial
    out=".",
    checkpoint=None,  # what last.pth held, to go on from
    log=lambda values, step: None,  # called after each epoch
):
    """Train for num_epochs, or until the validation loss has not fallen for 8 epochs.

    train_loader, val_loader: iterables of (images (B, C, H, W), masks (B, 1, H, W));
    criterion(probabilities, masks): scalar tensor. Leaves the best weights in `model` and in
    out/best_model.pth, everything needed to go on in out/last.pth, and a line for each epoch in
    out/metrics.csv. Under torchrun every process calls this, with its part of the batches.
    A step whose loss or gradient is not finite changes nothing and is counted ("skipped" in the
    history). Returns the history, a dict for each epoch. Raises Stopped with last.pth written;
    ValueError after 20 such steps in a row, where no validation loss was a number,
    and where the last checkpoint cannot be written (an earlier one is only a warning).
    """
    out, device, options = Path(out), torch.device(device), options or optim.TrainingOptions()
    state = SimpleNamespace(  # what last.pth keeps: objects with state_dict and load_state_dict
        model=model,
        running_mean=optim.RunningMean(model, options.ema),
        guarded_step=optim.GuardedStep(model, optimizer, device, options),
        scores=metrics.RunningScores(device, net.info_of(model).class_names),
        progress=checkpoints.Progress(),
        rng=checkpoints.RandomState(device),
    )
    checkpointer = checkpoints.Checkpointer(out, vars(state), options)
    if checkpoint:
        checkpointer.restore(checkpoint)
    progress, averaged = state.progress, state.running_mean.model  # the model itself without ema
    wrapped = dist.distribute(model)  # likewise in a single process

    with options.signals.defer():
        if wrapped is not model and not checkpoint:
            checkpointer.save()  # what a restart by torchrun goes on from, not an older run's
        while progress.epoch < num_epochs and progress.waited < options.patience:
            started, title = time.perf_counter(), f"epoch {progress.epoch + 1}/{num_epochs}"
            train_scores, speed = train_one_epoch(
                wrapped, train_loader, criterion, state, title, checkpointer.poll
            )
            polling = checkpointer.polling(val_loader)
            val_scores = evaluate(averaged, polling, criterion, device, autocast=options.autocast)
            free = state.guarded_step.steps <= options.grace
            better = progress.end_epoch(val_scores["loss"], averaged, free=free)
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
            reports.print_early_stop(progress, options.patience)
        checkpointer.save(last_chance=True)
    if progress.best_weights is None:
        raise ValueError("the loss on valid never was a number: lower --lr or try --precision fp32")
    model.load_state_dict(progress.best_weights)
    return progress.history


def visualize_predictions(
    model, test_loader, device, num_samples=5, threshold=0.5, *, path="predictions.png"
):
    """Draw samples of the first batches with their true and predicted masks; returns path.

    The samples are spread evenly over as many batches as hold num_samples images. Those of
    `data.Batches` with a data set are drawn in their own size, with the masks that predict.py
    writes, and named; others as the network takes them. threshold: or an `Inference`, which makes
    the masks.
    """
    model.eval()
    chosen, info, samples, cases = threshold, net.info_of(model), [], []
    if not isinstance(threshold, inference.Inference):
        chosen = inference.Inference(threshold)
    predict = predictor.Predictor([model], device, info=info, inference=chosen)
    for images, masks in test_loader:
        samples += zip(images, masks, strict=True)
        if len(samples) >= num_samples:
            break
    shown = np.linspace(0, len(samples) - 1, min(num_samples, len(samples))).astype(int)
    known = isinstance(test_loader, data.Batches) and test_loader.knows_images
    for index in shown:
        image, mask = samples[index]  # their sizes may differ
        picture, target = plots.denormalize(image[None])[0], mask.cpu().numpy() > 0.5
        if known:
            picture, target = test_loader.original(index)
        with torch.inference_mode():
            outputs = predict(image[None])[0].cpu().numpy()
        masks = chosen.masks(outputs, target.shape[:0:-1], exclusive=info.exclusive)
        pred = np.stack(list(masks))
        dice = metrics.image_dice(metrics.count_masks(target, pred))
        cases.append((*plots.reduce_case(picture, target, pred), f"Dice {dice.mean():.2f}"))
    names, where = (), "predictions"
    if known:
        names, where = test_loader.names_in_order(), test_loader.dataset.image_dir
    return plots.plot_predictions(
        cases,
        path,
        title=f"{where}: {chosen}{drawing.describe_shown(info.channel_names, ', ')}",
        class_names=info.class_names,
        captions=[names[index] for index in shown] if known else (),
    )


# ---- the command line ------------------------------------------------------------------------


def main(argv=None):
    parser, signals = command_line.make_parser(__doc__, LOSSES, WEIGHTS), Signals()
    args, checkpoint, kept = command_line.parse_arguments(parser, argv)
    stopping = signals.exit_when_stopped(run.command("train.py", "--resume", out=Path(args.out)))
    with signals.installed(), stopping, run.open_folder(args, checkpoint):
        if args.recipe == "auto" and not (checkpoint or args.test_only):
            args = command_line.add_plan(args, planned_flags(kept))
        if args.folds:
            one_run = partial(train_and_test, signals=signals)
            cross_validation.cross_validate(args, checkpoint, one_run)
        else:
            train_and_test(args, checkpoint, signals)


def train_and_test(args, checkpoint, signals):
    """One run, in each process of torchrun; returns its network, `valid` and the autocast."""
    # 1. Device
    device, out = devices.pick_device(args.device), Path(args.out)
    if device.type == "cpu":
        devices.keep_freed_memory()
    with dist.process_group(device), run.memory_advice(args):
        precision = run.settle_precision(args.precision, device, checkpoint)
        autocast = devices.make_autocast(precision, device)
        # 2. Model and data
        root, skipped = run.data_root(args), [] if args.skip_bad else None
        model = run.make_network(args, root, device, start=not checkpoint)
        loaders = data.make_loaders(args, root, model, device, skipped)
        flags = run.recorded_flags(args, root, [device.type, precision], checkpoint)
        if dist.is_first():
            note = f"{devices.describe_device(device)}, {precision}"
            reports.print_run(args, root, model, loaders, note)
            reports.list_skipped(skipped, out)
        tracker, history = tracking.start_tracker(args, flags, checkpoint), None
        criterion = partial(combined_loss, weights=args.loss)
        try:
            if not args.test_only:
                # 3. Optimizer and learning rate
                optimizer = optim.AdamW(  # with a weight decay of 0, Adam as the tutorial's
                    model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
                )
                options = run.training_options(args, optimizer, len(loaders["train"]))
                options.autocast, options.scaler = autocast, devices.make_scaler(precision, device)
                options.flags, options.signals = flags, signals
                # 4. Training
                if dist.is_first():
                    checkpoints.prepare_folder(out, checkpoint)
                history = train_model(
                    model,
                    loaders["train"],
                    loaders["valid"],
                    criterion,
                    optimizer,
                    args.epochs,
                    device,
                    options=options,
                    out=out,
                    checkpoint=checkpoint,
                    log=tracker.log,
                )
                feature_statistics.record_statistics(model, loaders, out, autocast)
                if args.tune_prediction:
                    tuning.tune_prediction(model, loaders, out, autocast)
            # 5. Test
            test(model, loaders["test"], criterion, device, autocast, tracker)
            # 6. Visualization
            if dist.is_first():
                chosen, path = model.info.inference or inference.PLAIN, out / "predictions.png"
                visualize_predictions(model, loaders["test"], device, 10, chosen, path=path)
                run.finish(args, root, device, history, tracker)
        finally:
            tracker.finish(failed=sys.exc_info()[0] is not None)
        return model, loaders.get("valid"), autocast


def test(model, loader, criterion, device, autocast, tracker):
    """Print and log the scores of the best weights, at 0.5 and as was chosen on valid.

    Those of the masks that predict.py writes, at the size of each image.
    """
    ways = {"": inference.PLAIN}
    if model.info.inference not in (None, inference.PLAIN):
        ways["chosen_"] = model.info.inference
    for prefix, way in ways.items():
        scores = evaluate(model, loader, criterion, device, autocast=autocast, inference=way)
        if prefix:
            del scores["loss"]  # of the first alone
        tracker.log({f"test/{prefix}{name}": value for name, value in scores.items()})
        if dist.is_first():
            reports.print_test(scores, model.info.class_names, way)


if __name__ == "__main__":
    # A stuck upload would hold up the exit for a minute; and a thread of gloo that lets go of its
    # last tensor while Python shuts down would make it an abort.
    cli.run_main(main, exit_at_once=True)
