"""Cross-validation: images dealt into folds, a run for each, and the scores of all of them."""

import json
import os
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    MASKS,
    SIZE,
    SMALL,
    annotations,
    brightness_model,
    edit_annotations,
    make_dataset,
    output_of,
    run_download,
    save_pair,
    set_classes,
    skip_pictures,
    tree,
)

import predict
from data import Batches, Order, Transform, load_split, open_split
from medseg.files import file_lock
from medseg.inference import full_size_masks
from medseg.metrics import bootstrap
from medseg.predictor import Predictor
from medseg.splits import next_training
from medseg.training import cross_validation
from medseg.training.cross_validation import deal_groups, deal_images, pool_scores, score_fold
from net import UNet


def write_data(root, folds):
    """OUT/folds of a cross-validation of the data set, and nothing else."""
    args = SimpleNamespace(folds=folds, seed=0, classes="union", skip_bad=False, out="out")
    cross_validation._write_data(root, args)
    return sorted(Path("out/folds").iterdir())


def pool(root):
    """The images of train and valid."""
    return [*root.glob("train/*.png"), *root.glob("valid/*.png")]


def files(folder):
    """The names of the images in a folder."""
    return {path.name for path in folder.glob("*.png")}


def test_groups_stay_whole_and_folds_are_even():
    groups = [*"aaaaa", *"bb", *"cc", "d", *[""] * 5]
    for seed in range(3):
        fold_of = deal_groups(groups, 3, seed)
        assert sorted(Counter(fold_of).values()) == [5, 5, 5]
        assert len({*zip(groups[:10], fold_of, strict=False)}) == 4
        assert fold_of == deal_groups(groups, 3, seed) != deal_groups(groups, 3, seed + 1)


def test_each_image_is_in_the_valid_of_one_fold_and_in_the_train_of_the_others(dataset, here):
    names = ["a", "b", "c"]  # which the splits number in different ways; train lacks one
    set_classes(dataset / "train", names[:2], lambda number: 1 + number % 2)
    set_classes(dataset / "valid", names[::-1], lambda number: 1 + number % 3)
    set_classes(dataset / "test", names, lambda number: 1 + number % 3)
    before, seen = tree(dataset), Counter()
    everything = {path.name for path in pool(dataset)}
    for fold in write_data(dataset, 3):
        assert files(fold / "test") == files(dataset / "test")
        assert files(fold / "train") == everything - files(fold / "valid")
        seen.update(files(fold / "valid"))
        for split in ("train", "valid", "test"):  # the same pixels and masks as in the data set
            copy = open_split(fold, split, 32, classes=names)
            for index in range(len(copy)):
                name = copy.path(index).name
                original = open_split(dataset, name[2:-4], 32, classes=names)  # as in 0_train.png
                image, masks = original.load(int(name[0]))
                np.testing.assert_array_equal(copy.load(index)[0].pixels, image.pixels)
                np.testing.assert_array_equal(copy.load(index)[1], masks)
    assert seen == Counter(everything) and tree(dataset) == before


def test_files_are_linked_or_where_that_fails_copied(dataset, here, monkeypatch):
    def fail(*_):
        raise OSError("no such links here")

    def image():
        return next((write_data(dataset, 2)[0] / "test").glob("*.png"))

    assert image().stat().st_nlink == 3  # with the data set's own and the other fold's
    monkeypatch.setattr(os, "link", fail)
    assert image().is_symlink()
    monkeypatch.setattr(os, "symlink", fail)
    assert not image().is_symlink() and image().stat().st_nlink == 1
    assert image().read_bytes() == (dataset / "test" / image().name).read_bytes()


def test_images_of_one_name_and_links_are_told_apart(dataset, here):
    first, valid = dataset / "train" / "1_train.png", dataset / "valid"
    (valid / "0_valid.png").rename(valid / "0_TRAIN.png")
    edit_annotations(valid, lambda content: content["images"][0].update(file_name="0_TRAIN.png"))
    first.rename(dataset / "elsewhere.png")
    first.symlink_to("../elsewhere.png")
    originals = {path.read_bytes() for path in pool(dataset)}
    for fold in write_data(dataset, 2):
        copies = pool(fold)
        assert len({path.name.casefold() for path in copies}) == len(copies) == 10
        assert {path.read_bytes() for path in copies} == originals


def test_folds_keep_the_groups_of_the_import(here):
    for patient in range(4):
        for number in range(1 + patient):
            save_pair(f"p{patient}_{number}", seed=patient)
    sides = ("--masks", "images/{group}_{id}.png", "masks/{group}_{id}.png")
    run_download(*sides, *MASKS[3:])
    args = SimpleNamespace(folds=3, seed=0, classes="union")
    folds, _, count = deal_images(Path("dataset"), args)
    assert count == 4
    for parts in folds:
        patients, valid = ({image.name[:2] for image in parts[name]} for name in ("train", "valid"))
        assert patients and valid and not patients & valid
    with pytest.raises(ValueError, match="most 4.*groups"):
        write_data(Path("dataset"), 5)
    assert next_training(Path("dataset")).endswith("--folds 4")  # so few images are all scored
    two = {"images": annotations("train")["images"][:3], "annotations": []}  # of two patients
    edit_annotations(Path("dataset/train"), lambda content: content.update(two))
    assert next_training(Path("dataset")).endswith("--folds 2")


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


def run(*flags):
    return output_of("train.py", *flags, cwd=Path.cwd())


def read(path):
    return json.loads(Path(path, "folds.json").read_text())


def test_every_image_is_scored_by_the_network_that_has_not_seen_it(done):
    """With the tutorial's functions, image by image, over the data set that was dealt."""
    place, said = done
    counts, dice, result = [], [], read(place / "run")
    for fold in result["folds"]:
        number, own = fold["fold"], {}
        model = predict.load_model(place / "run" / f"fold{number}" / "best_model.pth", "cpu")
        for name in sorted(files(place / "run" / "folds" / f"fold{number}" / "valid")):
            original = open_split(place / "dataset", name[2:-4], 32)
            tensor, _ = predict.preprocess_image(original.path(int(name[0])), image_size=32)
            probabilities = Predictor([model], "cpu")(tensor)[0].numpy()
            image, (target,) = original.load(int(name[0]))
            pred, target = full_size_masks(probabilities, image.size, 0.5) > 0, target > 0
            tp, fp, fn = (pred & target).sum(), (pred & ~target).sum(), (~pred & target).sum()
            counts.append((tp, fp, fn, pred.size - tp - fp - fn))
            own[name] = 2 * tp / (2 * tp + fp + fn)
        assert fold["per_image"] == pytest.approx(own, abs=1e-4) and fold["images"] == len(own)
        dice += own.values()
    counts, scores = np.array(counts), result["scores"]
    tp, fp, fn, _ = counts.sum(0)
    of_folds = [fold["scores"]["dice"] for fold in result["folds"]]
    assert min(of_folds) < 0.9 * max(of_folds)  # the networks differ, and so would what they score
    assert result["images"] == 10 and scores["image_dice"] == pytest.approx(np.mean(dice))
    assert scores["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    interval = bootstrap(counts[:, None], ["tumour"])["dice"]
    assert result["confidence_95"]["dice"] == pytest.approx(interval, abs=0.02)
    pooled = ["pooled", "10", *(f"{scores[name]:.4f}" for name in ("dice", "image_dice", "iou"))]
    assert pooled in [line.split()[:5] for line in said.splitlines()]
    assert said.splitlines()[-1].endswith("dataset/test --model run/fold*/best_model.pth")


def test_the_intervals_of_all_folds_are_of_groups():
    """Each image of a group is like the others: of two groups, one or both are drawn."""
    low, high, fold = [[1, 3, 0, 9]], [[4, 0, 0, 9]], {"class_names": ["foreground"]}
    fold |= {"images": 5, "threshold": 0.5}
    folds = [
        {**fold, "counts": [low] * 5, "groups": ["a"] * 5},
        {**fold, "counts": [high] * 5, "groups": ["b"] * 5},
    ]
    pooled = pool_scores(folds)
    assert pooled["scores"]["group_dice"] == pytest.approx((0.4 + 1) / 2)
    assert pooled["confidence_95"]["image_dice"] == pytest.approx([0.4, 1])
    partly = pool_scores([folds[0], {**folds[1], "groups": []}])  # each of five by itself
    assert partly["scores"]["group_dice"] == pytest.approx((0.4 + 5 * 1) / 6)
    without = pool_scores([{**one, "groups": []} for one in folds])
    assert "group_dice" not in without["scores"]
    assert without["confidence_95"]["image_dice"][0] > 0.45


def test_resumed_it_trains_what_is_missing_and_no_more(copied, done, refused):
    expected, before, record = read("run"), tree("run/fold1"), read("run")
    for key in ("scores", "confidence_95", "images", "class_names"):
        del record[key]
    del record["folds"][1:]
    Path("run/folds.json").write_text(json.dumps(record))
    shutil.rmtree("run/fold3")  # not begun; fold2 was stopped in its test
    with file_lock(Path("run/fold2/.lock"), busy=""):  # by another process
        refused("train", "--resume", "--out", "run", words=["run/fold2", "another training"])
    said = run("--resume", "--out", "run")
    assert read("run") == expected and tree("run/fold1") == before
    before, _, after = said.partition("fold 3 of 3")
    assert "fold 1 of 3" not in said and "epoch 1/2" not in before and "epoch 1/2" in after
    assert "Dice" in run("--test-only", "--out", "run/fold2")  # a run as any other
    # Of a cross-validation that is done, the table.
    assert run("--resume", "--out", "run").splitlines() == done[1].splitlines()[-8:]


def test_classes_of_a_data_set_without_valid_and_test(copied, refused):
    for split in ("valid", "test"):
        shutil.rmtree(f"dataset/{split}")
    set_classes(copied / "dataset/train", ["a", "b"], lambda number: 1 + number % 2)
    flags = (*SMALL, "--classes", "each", "--epochs", 1, "--folds", 2)
    said, result = run(*flags, "--out", "two"), read("two")
    assert result["class_names"] == ["a", "b"] and "dice/b" in result["confidence_95"]
    assert result["images"] == 6 and "  b: pooled" in said and "predict.py IMAGE --model" in said
    for place in Path("two/folds").iterdir():
        assert files(place / "test") == files(place / "valid") and len(files(place / "train")) == 3
    # A class of one image is in no train but those of the other folds.
    set_classes(copied / "dataset/train", ["a", "b"], lambda number: 2 if number == 1 else 1)
    refused("train", *flags, "--out", "one", words=["class b", "--seed"])
    assert not Path("one/folds.json").exists()


def test_damaged_images_are_left_out_and_no_earlier_weights_stay(copied, refused):
    Path("dataset/train/0_train.png").unlink()
    Path("dataset/valid/0_valid.png").write_bytes(b"damaged")
    Path("run/.folds.new.tmp").mkdir()  # of a process that was killed
    flags, before = (*FLAGS, "--folds", 2, "--out", "run", "--overwrite"), read("run")
    refused("train", *flags, words=["0_train.png"])
    assert read("run") == before
    run(*flags, "--skip-bad")
    result, left = read("run"), Path("run").glob("fold*/best_model.pth")
    assert result["images"] == 8 == sum(len(fold["per_image"]) for fold in result["folds"])
    assert "0_train.png" in Path("run/skipped.txt").read_text()
    assert {path.parent.name for path in left} == {"fold1", "fold2"} == {*os.listdir("run/folds")}
    assert len(result["folds"]) == 2 and not Path("run/.folds.new.tmp").exists()


def test_a_fold_scores_classes_as_their_masks_are_written(dataset):
    """Both are probable everywhere: the second is more so, or the classes overlap."""
    names = ["core", "cyst"]
    set_classes(dataset / "valid", names, lambda number: 1 + number % 2)
    edit_annotations(dataset / "valid", lambda content: content["images"][0].update(group="p"))
    rows, split = (how(dataset, "valid", 32, classes=names) for how in (load_split, open_split))
    batches = Batches(rows, Order(2), transform=Transform(n_classes=2), dataset=split)
    for order, first in (((), 0), ((1, 2), 4 * SIZE**2)):
        model = UNet(n_classes=2, n_filters=2, class_names=names, draw_order=order)
        torch.nn.init.zeros_(model.outc.weight)
        model.outc.bias.data = torch.tensor([1.0, 2.0])
        result = score_fold(model, batches, nullcontext())
        tp, fp, _, _ = np.array(result["counts"]).sum(0).T
        assert (tp + fp).tolist() == [first, 4 * SIZE**2]
    assert result["groups"] == ["p", "", "", ""] and result["images"] == 4


def test_wrong_use_is_one_line_and_changes_nothing(copied, refused, monkeypatch):
    for folder in ("taken/folds", "damaged", "new"):
        Path(folder).mkdir(parents=True)
    Path("damaged/folds.json").write_text('{"flags": {}')
    before = tree(".")
    for flags, words in (
        ("--folds 11 --out new", ["--folds 11", "10"]),
        ("--folds 2 --out taken", ["taken/folds"]),
        ("--test-only --out run", ["--test-only", "run/fold1"]),
        ("--resume --out run --epochs 9", ["run/folds.json", "--epochs"]),
        ("--resume --out run/fold1 --folds 3", ["run/fold1/last.pth", "--folds"]),
        ("--resume --out damaged", ["damaged/folds.json"]),
    ):
        more = FLAGS if flags.startswith("--folds") else ()
        refused("train", *more, *flags.split(), words=words)
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused("train", *FLAGS, "--folds", 2, "--out", "new", words=["--folds", "torchrun"])
    assert tree(".") == before
