"""Sets of several modalities and patients in their own layouts, from download.py to the report."""

import json
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from helpers import assert_done, assert_refused, script, script_here

AFFINE = np.array([[-1.0, 0, 0, 12], [0, -1, 0, 9], [0, 0, 3, -5], [0, 0, 0, 1]])
MODALITIES = ("flair", "t1", "t1ce", "t2")
REGIONS = {"background": 0, "whole tumor": [1, 2, 4], "tumor core": [1, 4], "enhancing": 4}
NETWORK = "--n-filters 8 --depth 2 --image-size 24 --batch-size 8 --norm batch --prior 0.1"
TRAIN = f"{NETWORK} --schedule cosine --lr 0.01 --epochs 12 --repeat 4 --device cpu".split()

pytestmark = pytest.mark.usefixtures("here")


in_a_process, run = partial(script, cwd="."), partial(script_here, cwd=".")


def learn(data, *flags, run=run):
    """Import with these flags, and train as the import says."""
    printed = assert_done(run("download.py", "--data", data, *flags))
    classes = ["--classes", "each"] if "--classes each" in printed else []
    assert_done(run("train.py", "--data", data, *TRAIN, "--out", f"runs/{data}", *classes))


def predict(data, *arguments, run=run):
    """{file name: Path} of what predict.py writes with the weights of a data set."""
    model = ["--model", f"runs/{data}/best_model.pth", "--output", f"out/{data}"]
    assert_done(run("predict.py", *arguments, *model))
    return {path.name: path for path in Path(f"out/{data}").iterdir()}


def report(data, run=run):
    """report.json of the test split."""
    return json.loads(predict(data, f"{data}/test", run=run)["report.json"].read_text())


def records(data):
    """{split: what its annotation file holds}."""
    paths = Path(data).glob("*/_annotations.coco.json")
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def groups(data):
    """{split: its groups}; no group is in two splits."""
    found = {split: {one["group"] for one in own["images"]} for split, own in records(data).items()}
    assert sum(map(len, found.values())) == len(set.union(*found.values()))
    return found


def tumour(seed):
    """({modality: voxels}, labels 1, 2 and 4): 4 is bright in t1ce alone, 2 in flair alone."""
    generator = np.random.default_rng(seed)
    center = generator.uniform((9, 9, 2), (14, 14, 3))
    labels = np.zeros((24, 24, 6), np.uint8)
    x, y, z = np.indices(labels.shape) - np.reshape(center, (3, 1, 1, 1))
    for radius, value in ((8, 2), (6, 1), (4.5, 4)):
        labels[x * x + y * y + 2 * z * z < radius**2] = value
    voxels = {name: generator.normal(100, 8, labels.shape) for name in MODALITIES}
    voxels["flair"] += 150 * (labels > 0)
    voxels["t2"] += 150 * np.isin(labels, (1, 4))
    voxels["t1ce"] += 150 * (labels == 4)
    return {name: own.astype(np.int16) for name, own in voxels.items()}, labels


def write(path, voxels):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), path)


def read(path):
    """A mask, after a look at its geometry."""
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, AFFINE)
    return np.asarray(image.dataobj)


def dice(one, other):
    return 2 * (one & other).sum() / max(one.sum() + other.sum(), 1)


def write_case(folder, voxels, suffix=".nii"):
    for name, own in voxels.items():
        write(f"{folder}/{Path(folder).name}_{name}{suffix}", own)


def test_brats():
    """Four modalities a case, nested regions, a mask that is called otherwise."""
    for number in (1, 2, 3, 4, 5, 355):
        case, (voxels, labels) = f"BraTS20_Training_{number:03}", tumour(number)
        write_case(f"D/{case}", voxels)
        mask = f"{case}_seg" if number < 355 else "W39_1998.09.19_Segm"
        write(f"D/{case}/{mask}.nii", labels)
    Path("regions.json").write_text(json.dumps({"labels": REGIONS}))
    images, flags = "D/{id}/{id}_{channel}.nii", ["--channels", ",".join(MODALITIES)]
    flags += ["--classes", "regions.json"]
    refused = run("download.py", "--masks", images, "D/{id}/{id}_seg.nii", *flags)
    assert_refused(refused, "BraTS20_Training_355", "--skip-unpaired")
    learn("brats", "--masks", images, "D/{id}/*_{seg,Segm}.nii", *flags, run=in_a_process)
    info = records("brats")["train"]["info"]
    assert info["channels"] == [*MODALITIES] and sum(map(len, groups("brats").values())) == 6
    scores = report("brats", run=in_a_process)
    assert scores["channels"] == [*MODALITIES]
    assert set(scores["per_group"]) == groups("brats")["test"]
    assert all(scores["scores"][f"group_dice/{name}"] > 0.8 for name in [*REGIONS][1:])

    voxels, labels = tumour(9)
    write_case("new/BraTS20_9", voxels, ".nii.gz")
    truth = {name: np.isin(labels, values) for name, values in [*REGIONS.items()][1:]}
    written = predict("brats", "new/BraTS20_9", "--write", "mask,classes")
    for name, mask in truth.items():
        own = read(written[f"BraTS20_9_{name.replace(' ', '_')}_mask.nii.gz"])
        assert dice(own == 1, mask) > 0.8, name
    drawn = read(written["BraTS20_9_mask.nii.gz"])
    assert dice(drawn == 3, truth["enhancing"]) > 0.8 < dice(drawn > 0, truth["whole tumor"])
    write("four.nii", np.stack([voxels[name] for name in MODALITIES], -1))
    np.testing.assert_array_equal(read(predict("brats", "four.nii")["four_mask.nii.gz"]), drawn)

    voxels["t1ce"] = np.roll(voxels["t1ce"], 12, 0)  # which alone shows what is called enhancing
    write_case("new/BraTS20_9", voxels, ".nii.gz")
    drawn = read(predict("brats", "new")["BraTS20_9_mask.nii.gz"])
    assert dice(drawn == 3, truth["enhancing"]) < 0.2 < dice(drawn > 0, truth["whole tumor"])
    Path("new/BraTS20_9/BraTS20_9_t1.nii.gz").unlink()
    lacking = run("predict.py", "new/BraTS20_9", "--model", "runs/brats/best_model.pth")
    assert_refused(lacking, "BraTS20_9_t1.nii.gz")


def test_msd():
    """Files of four axes beside those of macOS, the names of labels in dataset.json."""
    for number in range(1, 6):
        voxels, labels = tumour(number)
        name = f"BRATS_{number:03}.nii.gz"
        write(f"imagesT{'rs'[number == 5]}/{name}", np.stack([*voxels.values()], -1))
        if number < 5:
            write(f"labelsTr/{name}", (labels > 0).astype(np.uint8))
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            Path(folder).mkdir(exist_ok=True)
            Path(folder, f"._{name}").write_bytes(b"\0\5\x16\7" * 30)
    Path("dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "tumour"}}))
    flags = ["--masks", "imagesTr", "labelsTr", "--classes", "dataset.json"]
    assert_refused(run("download.py", *flags), "BRATS_001.nii.gz", "--channels", "--time")
    learn("msd", *flags, "--channels", "FLAIR,T1w,t1gd,T2w", "--split", 50, 25, 25)
    assert report("msd")["scores"]["dice"] > 0.8
    assert dice(read(predict("msd", "imagesTs")["BRATS_005_mask.nii.gz"]) > 0, labels > 0) > 0.8


def test_lgg():
    """Three modalities as the colours of a TIFF file, several slices of a patient."""
    for patient in range(4):
        case = f"TCGA_CS_494{patient}_19960909"
        Path("kaggle_3m", case).mkdir(parents=True)
        voxels, labels = tumour(patient)
        pixels = np.stack([voxels[name] for name in ("t1", "flair", "t1ce")], -1)
        for index in range(6):
            stem = f"kaggle_3m/{case}/{case}_{index}"
            tifffile.imwrite(f"{stem}.tif", pixels[:, :, index].clip(0, 255).astype(np.uint8))
            mask = (labels[:, :, index] > 0).astype(np.uint8) * 255
            tifffile.imwrite(f"{stem}_mask.tif", mask)
    Path("kaggle_3m/data.csv").write_text("Patient\n")
    patterns = "kaggle_3m/{group}/{id}.tif", "kaggle_3m/{group}/{id}_mask.tif"
    learn("lgg", "--masks", *patterns, "--split", 50, 25, 25, "--channels", "pre,flair,post")
    assert sorted(map(len, groups("lgg").values())) == [1, 1, 2]
    scores = report("lgg")
    assert [*scores["per_group"]] == [*groups("lgg")["test"]]
    assert scores["scores"]["group_dice"] > 0.8 and scores["channels"] == ["pre", "flair", "post"]
