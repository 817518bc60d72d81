"""Cross-validation: images dealt into folds, an ordinary run for each, and all their scores."""

import argparse
import gc
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch

from medseg.cli import output_folder
from medseg.coco import load_coco, recorded_group, require_data_set
from medseg.dist import started_by_torchrun
from medseg.files import atomic_write, read_json
from medseg.inference import PLAIN
from medseg.metrics import bootstrap, class_scores, mean_image_dice, without_nan
from medseg.splits import given_settings, link_split, list_images, present_splits, whole_folder
from medseg.training import checkpoint as checkpoints
from medseg.training.checkpoint import BEST, FOLDS
from medseg.training.history import list_skipped
from medseg.training.run import data_root
from medseg.training.tracking import experiment_name
from medseg.training.tuning import count_split

DATA = "folds"  # in --out: the data sets fold1, fold2, ...
COLUMNS = ("dice", "image_dice", "iou", "precision", "recall", "acc")  # of the table

# ---- images dealt into data sets ---------------------------------------------------------------


def deal_images(root, args, damaged=None):
    """Deal the images of train and valid of `root` into args.folds folds.

    Returns ([{"train": [LinkedImage], "valid": [...], "test": [...]} of each fold], the categories
    of all, how many groups there are, each in one fold). valid of the K-th fold holds the K-th
    part, its train all others; test is that of `root`, or where there is none, the fold's valid.
    damaged: a list, to which damaged records and missing files add a line each and are left out;
    without it they are an error. Raises FileNotFoundError; ValueError for fewer images, or groups,
    than folds, and with --classes each for a class that the train of a fold would lack.
    """
    require_data_set(root)
    images, categories = {}, {}
    for split in present_splits(root):
        images[split] = _read_images(root / split, categories, damaged)
    test = images.pop("test", None)
    pool = _rename([image for own in images.values() for image in own])
    groups = [recorded_group(image.record) for image in pool]
    fold_of, folds = deal_groups(groups, args.folds, args.seed), []
    for fold in range(args.folds):
        parts = {"train": [], "valid": []}
        for image, own in zip(pool, fold_of, strict=True):
            parts["valid" if own == fold else "train"].append(image)
        folds.append({**parts, "test": _rename(test) if test else parts["valid"]})
    trained = [
        {one["category_id"] for image in parts["train"] for one in image.annotations}
        for parts in folds
    ]
    lost = set.union(*trained) - set.intersection(*trained)
    if lost and args.classes == "each":
        names = [name for name, category in categories.items() if category["id"] in lost]
        raise ValueError(
            f"{root}: a fold would train without any image of class {', '.join(names)}: try "
            "another --seed, or --classes union"
        )
    return folds, [*categories.values()], len({*groups} - {""})


def deal_groups(groups, count, seed=0):
    """The fold of each image, from 0 to count - 1; groups: a name each, "" is a group of its own.

    Groups are dealt whole, the largest first, those of one size in random order, each to the fold
    that has fewest images. ValueError unless there is a group for each.
    """
    members = {}
    for index, group in enumerate(groups):
        members.setdefault(group or index, []).append(index)
    if count > len(members):
        most = f"{len(members)}, the images, or groups of them, in train and valid"
        raise ValueError(f"--folds {count}: it takes at most {most}")
    members = list(members.values())
    order = np.random.default_rng(seed).permutation(len(members))
    folds = [[] for _ in range(count)]
    for index in sorted(order, key=lambda index: -len(members[index])):
        min(folds, key=len).extend(members[index])
    fold_of = {index: number for number, fold in enumerate(folds) for index in fold}
    return [fold_of[index] for index in range(len(groups))]


def _read_images(folder, categories, damaged):
    """[LinkedImage] of a split; categories: {name: category}, to which its own are added.

    Splits may number their categories in different ways: those of one name become one.
    """
    coco, renumbered = load_coco(folder, damaged), {}
    for category in coco.dataset["categories"]:
        new = {**category, "id": len(categories) + 1}
        renumbered[category["id"]] = categories.setdefault(str(category.get("name")), new)["id"]
    images = []
    for image in list_images(coco, folder):
        if image.path.is_file():
            images.append(image)
        elif damaged is None:
            raise FileNotFoundError(f"{image.path}: no such file")
        else:
            damaged.append(f"{image.path}: no such file")
        for annotation in image.annotations:
            annotation["category_id"] = renumbered.get(annotation["category_id"])
    return images


def _rename(images):
    """The same images; where names are there twice, whatever the case, each with a number."""
    if len({image.name.casefold() for image in images}) == len(images):
        return images
    return [image._replace(name=f"{n:05}_{image.name}") for n, image in enumerate(images)]


# ---- the runs ----------------------------------------------------------------------------------


def check_folds(args):
    """ValueError where --folds goes with other flags, or with what is in --out, in no way."""
    out = Path(args.out)
    if args.folds == 1:
        raise ValueError("--folds 1: cross-validation takes 2 folds or more")
    if args.folds and args.test_only:
        raise ValueError(f"--test-only tests one run, as --out {out / 'fold1'}, not --folds")
    if args.folds and started_by_torchrun():
        raise ValueError("--folds trains in one process: start it without torchrun")
    if args.folds and (out / DATA).exists() and not (out / FOLDS).exists():
        raise ValueError(f"{out / DATA}: is there already: remove it, or give another --out")


def read_folds(args):
    """What OUT/folds.json holds where --resume goes on with a cross-validation, else None.

    "flags" of the run, "folds" that are done, and the file's "path".
    """
    path = Path(args.out) / FOLDS
    if not (args.resume or args.test_only) or not path.exists():
        return None
    return {**read_json(path), "path": path}


def cross_validate(args, record, train):
    """--folds: train and score each fold that is not done, then score all images together.

    record: of `read_folds`, to go on with; train(args, checkpoint): one run, which returns its
    network, the `data.Batches` of valid and the autocast. The runs are in OUT/fold1, OUT/fold2,
    ..., the scores in folds.json. Raises what `deal_images` raises.
    """
    out, root = Path(args.out), data_root(args)
    if record is None:
        _write_data(root, args)
        record = {"flags": dict(vars(args)), "folds": []}
    flags, folds = record["flags"], record["folds"]
    _write_scores(out, flags, folds)
    for number in range(len(folds) + 1, args.folds + 1):
        print(f"fold {number} of {args.folds}", flush=True)
        own = _flags_of_fold(args, f"fold{number}")
        folder = output_folder(own.out)
        with checkpoints.run_lock(folder):
            begun = (folder / checkpoints.LAST).exists()
            checkpoint = checkpoints.read_checkpoint(folder) if begun else None
            folds.append({"fold": number, **score_fold(*train(own, checkpoint))})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next fold moves its images to what is free there
        # Each fold has all the images: their caches would take that many times the disk.
        shutil.rmtree(Path(own.data) / ".cache", ignore_errors=True)
        _write_scores(out, flags, folds)
    _print_table(folds, pool_scores(folds))
    images = shlex.quote(str(root / "test")) if (root / "test").is_dir() else "IMAGE"
    weights = f"{shlex.quote(str(out))}/fold*/{BEST}"
    print(f"saved {out / FOLDS}; next: python predict.py {images} --model {weights}")


def _flags_of_fold(args, name):
    """The flags of the run of a fold."""
    changed = {"folds": 0, "synthetic": False, "resume": False, "overwrite": False}
    changed |= {"data": str(Path(args.out) / DATA / name), "out": str(Path(args.out) / name)}
    changed["experiment_name"] = f"{args.experiment_name or experiment_name(args)}-{name}"
    return argparse.Namespace(**{**vars(args), **changed})


def score_fold(model, batches, autocast):
    """The scores of a fold's valid split by its network, as folds.json has them."""
    inference, names = model.info.inference or PLAIN, model.info.class_names
    counts = count_split(model, batches, autocast, inference, [inference.threshold])[:, 0]
    dataset, dice = batches.dataset, mean_image_dice(counts).round(4).tolist()
    groups = [recorded_group(dataset.coco.imgs[number]) for number in dataset.image_ids]
    return {
        "images": len(counts),
        "class_names": list(names),
        **inference.as_dict(),
        "scores": without_nan(class_scores(counts, names)),
        "per_image": dict(zip(dataset.names(), dice, strict=True)),  # the mean over the classes
        "groups": groups if any(groups) else [],
        "counts": counts.tolist(),  # of each image and class: tp, fp, fn, tn
    }


def _write_data(root, args):
    """Deal the images and write OUT/folds, in place of the runs that `refuse_other_run` let pass.

    Files are linked where the file system can, else copied.
    """
    out, damaged = Path(args.out), [] if args.skip_bad else None
    folds, categories, groups = deal_images(root, args, damaged)
    list_skipped(damaged, out)
    sizes = ", ".join(str(len(parts["valid"])) for parts in folds)
    known = f"{groups} groups are" if groups else "no groups (download.py --groups) are"
    print(f"{root}: dealt into folds of {sizes} images; {known} kept together", flush=True)
    for folder in (out, *checkpoints.fold_runs(out)):
        checkpoints.prepare_folder(folder, None)
    shutil.rmtree(out / DATA, ignore_errors=True)
    with whole_folder(out / DATA) as building:
        for number, parts in enumerate(folds, 1):
            for split, images in parts.items():
                folder, ways = building / f"fold{number}" / split, (os.link, os.symlink)
                settings = given_settings(root / "train")
                link_split(folder, images, categories, settings, (*ways, shutil.copy2))


def pool_scores(folds):
    """The scores of the images of all folds together, as report.json of predict.py has them.

    Where groups are recorded, an image without one is a group of its own.
    """
    names, numbers = folds[0]["class_names"], None
    thresholds = {fold["threshold"] for fold in folds}
    counts = np.concatenate([np.array(fold["counts"], np.int64) for fold in folds])
    groups = [group for fold in folds for group in fold["groups"] or [""] * fold["images"]]
    if any(groups):
        groups = [group or f"image {index}" for index, group in enumerate(groups)]
        numbers = np.unique(groups, return_inverse=True)[1]
    return {
        "class_names": names,
        "images": len(counts),
        "threshold": thresholds.pop() if len(thresholds) == 1 else None,  # each fold's own
        "scores": without_nan(class_scores(counts, names, numbers)),
        "confidence_95": without_nan(bootstrap(counts, names, groups=numbers)),
    }


def _write_scores(out, flags, folds):
    """Write folds.json, which has the scores of all images once all folds are done."""
    pooled = pool_scores(folds) if len(folds) == flags["folds"] else {}
    with atomic_write(out / FOLDS) as file:
        file.write(json.dumps({"flags": flags, **pooled, "folds": folds}, indent=1).encode())


def _print_table(folds, pooled):
    """A row for each fold, those of all with their interval, and a line for each class."""
    names, intervals = pooled["class_names"], pooled["confidence_95"]
    rows = [(fold["fold"], fold["images"], fold["scores"]) for fold in folds]
    rows.append(("pooled", pooled["images"], pooled["scores"]))
    for end, title in enumerate(("95 % from", "95 % to")):
        limits = {name: interval and interval[end] for name, interval in intervals.items()}
        rows.append((title, "", limits))
    print(f"{'fold':>9}{'images':>8}" + "".join(f"{name:>12}" for name in COLUMNS))
    for title, images, scores in rows:
        values = ["none" if scores[key] is None else f"{scores[key]:.4f}" for key in COLUMNS]
        print(f"{title:>9}{images:>8}" + "".join(f"{value:>12}" for value in values))
    for name in names if len(names) > 1 else ():
        dice, interval = pooled["scores"][f"dice/{name}"], intervals[f"dice/{name}"]
        limits = "no image has it" if dice is None else "{:.4f} [{:.4f}, {:.4f}]"
        print(f"  {name}: pooled dice " + limits.format(dice, *interval or ()))
