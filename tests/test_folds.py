"""Cross-validation: images dealt into folds, a run for each, and the scores of all of them."""

import argparse
import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    MASKS,
    SMALL,
    annotations,
    assert_refused,
    brightness_model,
    edit_annotations,
    fork_script,
    make_dataset,
    output_of,
    run_download,
    save_pair,
    script_here,
    set_classes,
    skip_pictures,
    tree,
    wait_until,
)

import predict
import train
from data import open_split
from medseg.files import file_lock
from medseg.inference import full_size_masks
from medseg.metrics import bootstrap
from medseg.predictor import Predictor
from medseg.signals import Stopped
from medseg.training import cross_validation
from medseg.training.folds import deal_groups, deal_images, write_folds
from net import ModelInfo

# ---- the deal --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_groups_stay_whole_and_folds_are_even(seed):
    groups = [*"aaaaa", *"bb", *"cc", "d", *[""] * 5]
    fold_of = deal_groups(groups, 3, seed)
    assert sorted(Counter(fold_of).values()) == [5, 5, 5]
    for name in "abc":
        assert (
            len({fold for group, fold in zip(groups, fold_of, strict=True) if group == name}) == 1
        )
    assert fold_of == deal_groups(groups, 3, seed)


def test_the_seed_deals():
    deals = {tuple(deal_groups([""] * 20, 4, seed)) for seed in range(5)}
    assert len(deals) == 5 and all(sorted(Counter(deal).values()) == [5] * 4 for deal in deals)


def files(folder):
    return {path.name for path in folder.iterdir()} - {"_annotations.coco.json"}


def test_each_image_is_in_the_valid_of_one_fold_and_in_the_train_of_the_others(dataset, tmp_path):
    before = tree(dataset)
    write_folds(deal_images(dataset, 3), tmp_path / "folds")
    everything, seen = files(dataset / "train") | files(dataset / "valid"), Counter()
    for fold in (tmp_path / "folds").iterdir():
        assert files(fold / "test") == files(dataset / "test")
        assert files(fold / "train") == everything - files(fold / "valid")
        seen.update(files(fold / "valid"))
        for split in ("train", "valid", "test"):  # the same pixels and masks as in the data set
            copy = open_split(fold, split, 32)
            for index in range(len(copy)):
                name = copy.path(index).name
                original = open_split(dataset, name[2:-4], 32)  # as in 0_train.png
                image, masks = original.load(int(name[0]))
                np.testing.assert_array_equal(copy.load(index)[0].pixels, image.pixels)
                np.testing.assert_array_equal(copy.load(index)[1], masks)
    assert seen == Counter(everything) and tree(dataset) == before


def test_files_are_linked_or_where_that_fails_copied(dataset, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no such links here")

    def image(target):
        write_folds(deal_images(dataset, 2), tmp_path / target)
        return next((tmp_path / target / "fold1" / "test").glob("*.png"))

    assert image("hard").stat().st_nlink == 3  # with the data set's own and the other fold's
    monkeypatch.setattr(os, "link", fail)
    assert image("soft").is_symlink()
    monkeypatch.setattr(os, "symlink", fail)
    copy = image("copied")
    assert not copy.is_symlink() and copy.stat().st_nlink == 1
    assert copy.read_bytes() == (dataset / "test" / copy.name).read_bytes()


def test_images_of_one_name_and_links_are_told_apart(dataset, tmp_path):
    os.rename(dataset / "valid" / "0_valid.png", dataset / "valid" / "0_TRAIN.png")
    path = dataset / "train" / "1_train.png"
    os.rename(path, dataset / "elsewhere.png")
    os.symlink("../elsewhere.png", path)
    edit_annotations(dataset / "valid", lambda content: rename(content["images"][0], "0_TRAIN.png"))
    write_folds(deal_images(dataset, 2), tmp_path / "folds")
    for fold in (tmp_path / "folds").iterdir():
        names = files(fold / "train") | files(fold / "valid")
        assert len(names) == 10 and {"train_0_train.png", "valid_0_TRAIN.png"} < names
        for split in ("train", "valid"):
            copy = open_split(fold, split, 32)
            for index in range(len(copy)):
                split_of, _, name = copy.path(index).name.partition("_")
                original = (dataset / split_of / name).read_bytes()
                assert copy.path(index).read_bytes() == original


def rename(record, name):
    record["file_name"] = name


def test_categories_are_one_where_their_names_are(dataset):
    """valid numbers them in another way, and has one that train lacks."""
    set_classes(dataset / "train", ["a", "b"], lambda number: 1 + number % 2)
    set_classes(dataset / "valid", ["c", "b", "a"], lambda number: 1 + number % 3)
    deal = deal_images(dataset, 2)
    names = {category["id"]: category["name"] for category in deal.categories}
    found = Counter()
    for parts in deal.folds:
        for image in parts["valid"]:
            split = image.path.parent.name
            found.update((split, names[own["category_id"]]) for own in image.annotations)
    expected = {("train", "a"): 3, ("train", "b"): 3, ("valid", "a"): 1}
    assert found == expected | {("valid", "b"): 1, ("valid", "c"): 2}


# ---- groups, from the import on --------------------------------------------------------------


def test_folds_keep_the_groups_of_the_import(here):
    for patient in range(4):
        for number in range(1 + patient):
            save_pair(f"p{patient}_{number}", seed=patient)
    sides = ("--masks", "images/{group}_{id}.png", "masks/{group}_{id}.png")
    run_download(*sides, *MASKS[3:])
    groups = {image["file_name"]: image["group"] for image in annotations("train")["images"]}
    assert groups == {name: name[:2] for name in groups} and len(groups) == 10
    deal = deal_images("dataset", 3)
    assert deal.groups == 4
    for parts in deal.folds:
        train, valid = ({image.name[:2] for image in parts[name]} for name in ("train", "valid"))
        assert train and valid and not train & valid
    with pytest.raises(ValueError, match="4 groups of images"):
        deal_images("dataset", 5)


# ---- the runs --------------------------------------------------------------------------------

FLAGS = (*SMALL, "--precision", "fp32", "--init", "bright.pth", "--lr", 0.1, "--epochs", 2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(a folder with a data set and, in run/, its cross-validation of three folds; stdout)."""
    place = tmp_path_factory.mktemp("folds")
    make_dataset(place / "dataset")
    torch.save(brightness_model().state_dict(), place / "bright.pth")
    with pytest.MonkeyPatch.context() as patch:
        skip_pictures(patch)
        return place, output_of("train.py", *FLAGS, "--folds", 3, "--out", "run", cwd=place)


@pytest.fixture
def copied(done, here, no_pictures):
    """A copy of that folder, which is the current one."""
    for path in done[0].iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, here / path.name)
    return here


def read(path):
    return json.loads(Path(path, "folds.json").read_text())


def weights(path):
    return torch.load(path, weights_only=True)


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_image_is_scored_by_the_network_that_has_not_seen_it(done):
    """With the tutorial's functions, image by image, over the data set that was dealt."""
    place, _ = done
    counts, names = [], []
    for number in (1, 2, 3):
        model = predict.load_model(place / "run" / f"fold{number}" / "best_model.pth", "cpu")
        for name in sorted(files(place / "run" / "folds" / f"fold{number}" / "valid")):
            original = open_split(place / "dataset", name[2:-4], 32)
            path = original.path(int(name[0]))
            tensor, _ = predict.preprocess_image(path, image_size=32)
            probabilities = Predictor([model], "cpu")(tensor)[0].numpy()
            image, (target,) = original.load(int(name[0]))
            pred, target = full_size_masks(probabilities, image.size, 0.5) > 0, target > 0
            tp, fp, fn = (pred & target).sum(), (pred & ~target).sum(), (~pred & target).sum()
            counts.append((tp, fp, fn, pred.size - tp - fp - fn))
            names.append((number, name, 2 * tp / (2 * tp + fp + fn)))
    counts, result = np.array(counts), read(place / "run")
    tp, fp, fn, _ = counts.sum(0)
    assert result["images"] == len(names) == 10
    assert result["scores"]["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    of_folds = [fold["scores"]["dice"] for fold in result["folds"]]
    assert min(of_folds) < 0.9 * max(of_folds)  # the networks differ, and so would what they score
    assert result["scores"]["precision"] == pytest.approx(tp / (tp + fp))
    dice = {name: value for _, name, value in names}
    assert result["scores"]["image_dice"] == pytest.approx(np.mean(list(dice.values())))
    assert result["confidence_95"]["dice"] == pytest.approx(bootstrap(counts)["dice"], abs=0.02)
    for fold in result["folds"]:
        own = {name: value for number, name, value in names if number == fold["fold"]}
        assert fold["per_image"] == pytest.approx(own, abs=1e-4) and fold["images"] == len(own)


def test_the_intervals_of_all_folds_are_of_groups():
    """Each image of a group is like the others: of two groups, one or both are drawn."""
    low, high = [[1, 3, 0, 9]], [[4, 0, 0, 9]]
    fold = {"class_names": ["foreground"], "threshold": 0.5}
    folds = [
        {**fold, "counts": [low] * 5, "groups": ["a"] * 5},
        {**fold, "counts": [high] * 5, "groups": ["b"] * 5},
    ]
    pooled = cross_validation._pool(folds)
    assert pooled["scores"]["group_dice"] == pytest.approx((0.4 + 1) / 2)
    assert pooled["confidence_95"]["image_dice"] == pytest.approx([0.4, 1])
    without = cross_validation._pool([{**one, "groups": [""] * 5} for one in folds])
    assert "group_dice" not in without["scores"]
    assert without["confidence_95"]["image_dice"][0] > 0.45


def test_the_table_has_the_scores(done):
    place, said = done
    result = read(place / "run")
    rows = [line.split() for line in said.splitlines()[-8:-1]]
    scores = [f"{result['scores'][name]:.4f}" for name in ("dice", "image_dice", "iou")]
    assert rows[0][:3] == ["fold", "images", "Dice"] and rows[-3][:5] == ["pooled", "10", *scores]
    for fold, row in zip(result["folds"], rows[1:], strict=False):
        head = [str(fold["fold"]), str(fold["images"]), f"{fold['scores']['dice']:.4f}"]
        assert row[:3] == head
    assert said.splitlines()[-1].endswith("dataset/test --model run/fold*/best_model.pth")


def test_a_fold_is_the_run_that_train_py_makes_of_its_data(copied):
    fold = Path("run", "folds", "fold2")
    output_of("train.py", *FLAGS, "--data", fold, "--out", "alone", cwd=copied)
    assert same_weights("alone/best_model.pth", "run/fold2/best_model.pth")
    assert not same_weights("run/fold1/best_model.pth", "run/fold2/best_model.pth")
    # And it can be tested and gone on with by itself.
    assert "Dice" in output_of("train.py", "--test-only", "--out", "run/fold2", cwd=copied)
    output_of("train.py", "--resume", "--epochs", 3, "--out", "run/fold2", cwd=copied)


def test_gone_on_with_it_trains_what_is_missing_and_no_more(copied, done):
    expected, before = read("run"), tree("run/fold1")
    record = read("run")
    for key in ("scores", "confidence_95", "images", "class_names", "threshold"):
        del record[key]
    del record["folds"][1:]
    Path("run/folds.json").write_text(json.dumps(record))
    shutil.rmtree("run/fold3")  # not begun; fold2 was stopped in its test
    said = output_of("train.py", "--resume", "--out", "run", cwd=copied)
    assert read("run") == expected and tree("run/fold1") == before
    assert "fold 1 of 3" not in said and "epoch 1/2" in said.partition("fold 3 of 3")[2]
    assert "epoch 1/2" not in said.partition("fold 3 of 3")[0]
    # Of a cross-validation that is done, the table.
    again = output_of("train.py", "--resume", "--out", "run", cwd=copied)
    assert again.splitlines() == done[1].splitlines()[-8:]


def hold(epochs_done):
    """Make the second fold wait where it has done so many epochs, for a signal."""
    train_model = train.train_model

    def wait(*arguments, out, log, signals, **options):
        def log_and_wait(values, step):
            log(values, step)
            if Path(out).name == "fold2" and step == epochs_done:
                Path(out, "waits").touch()
                wait_until(lambda: signals.received)

        return train_model(*arguments, out=out, log=log_and_wait, signals=signals, **options)

    skip_pictures()
    train.train_model = wait


@pytest.mark.parametrize(
    "signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_stopped_in_a_fold_it_names_the_command_that_goes_on(copied, done, signum, status):
    shutil.rmtree("run")
    command = ("train.py", *FLAGS, "--folds", 3, "--out", "run")
    process = fork_script(*command, log="log", prepare=lambda: hold(1))
    wait_until(Path("run/fold2/waits").exists)
    os.kill(process.pid, signum)
    process.join(60)
    name = signal.Signals(signum).name
    *_, last = Path("log").read_text().splitlines()
    assert process.exitcode == status
    assert last == f"stopped by {name}; to go on: python train.py --resume --out run"
    said = output_of("train.py", "--resume", "--out", "run", cwd=copied)
    assert "epoch 1/2" not in said.partition("fold 3 of 3")[0]  # of fold2, that is done
    assert read("run") == read(done[0] / "run")


def test_stopped_where_no_step_is_done_it_names_that_command_too(copied, monkeypatch):
    def stop(*_, **__):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(train, "train_and_test", stop)
    command = ("train.py", *FLAGS, "--folds", 2, "--out")
    result = script_here(*command, "new", cwd=copied)
    line = "stopped by SIGTERM; to go on: python train.py --resume --out new\n"
    assert (result.returncode, result.stderr) == (143, line)
    # But not where nothing is written yet.
    monkeypatch.setattr("medseg.training.cross_validation.deal_images", stop)
    result = script_here(*command, "none", cwd=copied)
    assert (result.returncode, result.stderr) == (143, "stopped by SIGTERM\n")
    assert not list(Path("none").iterdir())


def test_stopped_before_its_folds_are_written_it_goes_on_too(copied, done):
    """Only the flags are recorded then, and no fold is done."""
    flags = read("run")["flags"]
    shutil.rmtree("run")
    Path("run/.folds.1.tmp").mkdir(parents=True)
    Path("run/folds.json").write_text(json.dumps({"flags": flags, "folds": []}))
    output_of("train.py", "--resume", "--out", "run", cwd=copied)
    assert read("run") == read(done[0] / "run")


def test_overwrite_leaves_no_weights_of_an_earlier_one(copied):
    Path("run/.folds.1.tmp").mkdir()  # of a process that was killed
    output_of("train.py", *FLAGS, "--folds", 2, "--out", "run", "--overwrite", cwd=copied)
    left = sorted(map(str, Path("run").glob("fold*/best_model.pth")))
    assert left == ["run/fold1/best_model.pth", "run/fold2/best_model.pth"]
    assert {path.name for path in Path("run/folds").iterdir()} == {"fold1", "fold2"}
    assert len(read("run")["folds"]) == 2 and not Path("run/.folds.1.tmp").exists()
    # A single run takes the place of both.
    output_of("train.py", *FLAGS, "--out", "run", "--overwrite", cwd=copied)
    assert not Path("run/folds.json").exists()
    assert "Dice" in output_of("train.py", "--test-only", "--out", "run", cwd=copied)


def test_a_data_set_without_valid_and_test(copied):
    for split in ("valid", "test"):
        shutil.rmtree(f"dataset/{split}")
    said = output_of("train.py", *FLAGS, "--folds", 2, "--out", "two", cwd=copied)
    assert read("two")["images"] == 6 and "predict.py IMAGE --model" in said
    for fold in ("fold1", "fold2"):
        place = Path("two/folds", fold)
        assert files(place / "test") == files(place / "valid") and len(files(place / "train")) == 3


def test_each_class_is_scored(copied):
    for split in ("train", "valid", "test"):
        set_classes(copied / "dataset" / split, ["a", "b"], lambda number: 1 + number % 2)
    flags = (*SMALL, "--classes", "each", "--epochs", 1, "--folds", 2)
    said = output_of("train.py", *flags, "--out", "two", cwd=copied)
    result = read("two")
    assert result["class_names"] == ["a", "b"] and "dice/b" in result["confidence_95"]
    assert "  b: pooled Dice" in said
    # A class of one image is in no train but those of the other folds.
    set_classes(copied / "dataset/train", ["a", "b"], lambda number: 2 if number == 1 else 1)
    set_classes(copied / "dataset/valid", ["a", "b"], lambda number: 1)
    assert_refused(script_here("train.py", *flags, "--out", "one", cwd=copied), "class b", "--seed")
    assert not Path("one/folds.json").exists()


def test_damaged_images_are_left_out(copied):
    Path("dataset/train/0_train.png").unlink()
    Path("dataset/valid/0_valid.png").write_bytes(b"damaged")
    flags = (*FLAGS, "--folds", 2, "--out", "two")
    assert_refused(script_here("train.py", *flags, cwd=copied), "0_train.png")
    assert not Path("two/folds.json").exists()
    output_of("train.py", *flags, "--skip-bad", cwd=copied)
    assert read("two")["images"] == 8
    assert "0_train.png" in Path("two/skipped.txt").read_text()


# ---- wrong use -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "x", -1, 1e308, [1], {"a": None}])
@pytest.mark.parametrize(
    "path",
    [
        ("flags",),
        ("flags", "folds"),
        ("folds",),
        ("folds", 0),
        ("folds", 0, "class_names"),
        ("folds", 0, "counts"),
        ("folds", 0, "counts", 0, 0, 0),
    ],
)
def test_a_damaged_record_is_one_line(path, wrong, copied, refused):
    content = json.loads(Path("run/folds.json").read_text())
    *keys, last = path
    part = content
    for key in keys:
        part = part[key]
    part[last] = wrong
    Path("run/folds.json").write_text(json.dumps(content))
    refused("train", "--resume", "--out", "run", words=["run/folds.json"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--folds", 1, "--out", "new"), ["--folds 1"]),
        (("--folds", -2, "--out", "new"), ["--folds"]),
        (("--folds", 11, "--out", "new"), ["dataset", "10 images", "11"]),
        (("--folds", 2, "--out", "new", "--test-only"), ["--test-only", "new/fold1"]),
        (("--test-only", "--out", "run"), ["--test-only", "run/fold1"]),
        (("--folds", 2, "--out", "run"), ["run/folds.json", "--resume", "--overwrite"]),
        (("--out", "run"), ["run/folds.json", "--resume", "--overwrite"]),
        (("--folds", 2, "--out", "other"), ["other/best_model.pth", "--overwrite"]),
        (("--folds", 2, "--out", "one"), ["one/fold1/best_model.pth"]),
        (("--folds", 2, "--out", "taken"), ["taken/folds"]),
        (("--folds", 2, "--out", "new", "--data", "empty"), ["empty/valid", "no images"]),
        (("--folds", 2, "--out", "new", "--data", "nothing"), ["nothing"]),
        (("--resume", "--out", "run", "--epochs", 9), ["run/folds.json", "--epochs"]),
        (("--resume", "--out", "run", "--folds", 4), ["run/folds.json", "--folds 3"]),
        (("--resume", "--out", "run", "--data", "empty"), ["run/folds.json", "--data"]),
        (("--resume", "--out", "run/fold1", "--folds", 3), ["run/fold1/last.pth", "--folds"]),
        (("--resume", "--out", "damaged"), ["damaged/folds.json"]),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(flags, words, copied):
    for folder in ("other", "one/fold1", "taken/folds", "damaged", "new"):
        Path(folder).mkdir(parents=True)
    for folder in ("other", "one/fold1"):
        shutil.copy2("run/fold1/best_model.pth", folder)
    Path("damaged/folds.json").write_text('{"flags": {}, "folds": [{}]}')
    shutil.copytree("dataset", "empty")
    edit_annotations(Path("empty/valid"), lambda content: content.update(images=[], annotations=[]))
    before = tree(".")
    if "--folds" in flags and "--resume" not in flags:
        flags = (*FLAGS, *flags)
    assert_refused(script_here("train.py", *flags, cwd=copied), *words)
    assert tree(".") == before


def test_several_processes_are_refused(dataset, refused, monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused("train", "--data", dataset, "--folds", 2, words=["--folds", "torchrun"])


def test_a_run_that_is_gone_on_with_keeps_the_precision_that_was_found(copied, monkeypatch):
    """Whatever this processor would be given now."""
    checkpoint = torch.load("run/fold1/last.pth", weights_only=True)
    checkpoint["flags"] |= {"precision": "bf16", "precision_chosen_for": "cpu"}
    torch.save(checkpoint, "run/fold1/last.pth")
    recorded = {**read("run")["flags"], "precision": "auto"}
    Path("run/folds.json").write_text(json.dumps({"flags": recorded, "folds": []}))
    seen = []

    def stop(args, *_):
        seen.append(argparse.Namespace(**vars(args)))
        raise ValueError("enough")

    monkeypatch.setattr(train, "train_and_test", stop)
    assert_refused(script_here("train.py", "--resume", "--out", "run", cwd=copied), "enough")
    assert (seen[0].precision, seen[0].out, seen[0].folds) == ("bf16", "run/fold1", 0)
    assert seen[0].experiment_name == "bs2-epoch2-fold1"  # on SwanLab


def test_a_fold_that_is_gone_on_with_elsewhere_is_left_alone(copied):
    record = read("run")
    Path("run/folds.json").write_text(json.dumps({"flags": record["flags"], "folds": []}))
    with file_lock(Path("run/fold1/.lock"), busy=""):
        result = script_here("train.py", "--resume", "--out", "run", cwd=copied)
    assert_refused(result, "run/fold1", "another training")


@pytest.mark.parametrize("exclusive, second", [(True, (0, 0, 64, 0)), (False, (64, 0, 0, 0))])
def test_a_fold_scores_classes_as_their_masks_are_written(monkeypatch, exclusive, second):
    probabilities = np.stack([np.full((8, 8), 0.9), np.full((8, 8), 0.8)]).astype(np.float32)
    pairs = [(np.ones((2, 8, 8), bool), probabilities)]
    monkeypatch.setattr(cross_validation, "predict", lambda *arguments: pairs)
    images = {"per_image": {}, "groups": []}
    monkeypatch.setattr(cross_validation, "_describe_images", lambda *arguments: images)
    names, order = ("core", "cyst"), () if exclusive else (1, 2)
    model = SimpleNamespace(info=ModelInfo(class_names=names, draw_order=order))
    fold = cross_validation.Fold(1, SimpleNamespace(data="own"), None)
    fold.score(model, SimpleNamespace(device=None), None)
    assert [tuple(own) for own in fold.result["counts"][0]] == [(64, 0, 0, 0), second]
