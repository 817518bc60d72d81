"""Volumes and DICOM files from download.py --masks through the weights to predict.py."""

import csv
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    MASKS,
    SMALL,
    STORED,
    annotations,
    assert_refused,
    brightness_model,
    output_of,
    photo,
    refuse_download,
    run_download,
    sample,
    save,
    save_pair,
    script_here,
    stored,
    stored_as,
    write_dicom,
    write_itk,
    write_nifti,
    write_series,
)
from numpy.testing import assert_array_equal
from PIL import Image

import predict
from medseg import volumes as medseg_volumes
from medseg.predicting.inputs import add_spacings, as_frame
from net import UNet, load_model

VOLUMES = ("--masks", "vi", "vm")
IMAGE, MASK = Path("vi/case_000_0000.nii.gz"), Path("vm/case_000.nii.gz")


def picture(name, split="train", root="dataset"):
    with Image.open(f"{root}/{split}/{name}.png") as image:
        return np.asarray(image)


def recorded(split="train", root="dataset"):
    """What the import did, as prediction has to do it."""
    info = annotations(split, root)["info"]
    return {key: info[key] for key in info if key != "description"}


def volume(number, classes=2, times=()):
    """(voxels, class numbers), cut along axis 1 into 4 slices and `number` more, the first empty.

    The files are vi/case_000_0000.nii.gz, vm/case_000.nii.gz.
    """
    rng, name = np.random.default_rng(number), f"case_{number:03}"
    voxels = rng.integers(0, 1000, (12, 4 + number, 10, *times)).astype(np.int16)
    numbers = rng.integers(0, classes + 1, voxels.shape).astype(np.uint8)
    numbers[:, 0] = 0
    for path, array in ((f"vi/{name}_0000.nii.gz", voxels), (f"vm/{name}.nii.gz", numbers)):
        Path(path).parent.mkdir(exist_ok=True)
        write_nifti(path, array, zooms=(1, 3, 1, 1)[: array.ndim])
    return voxels, numbers


def test_volumes_become_slices_with_those_beside_them(here):
    """predict.py puts the slices of a volume together as the import has written them."""
    made = {f"case_{number:03}": volume(number) for number in range(3)}
    flags = ("--window", "500", "1000", "--classes", "core, edema", "--context", 1)
    out = run_download(*VOLUMES, *flags, "--split", 34, 33, 33)
    assert "'vi/{id}_0000.nii.gz' 'vm/{id}.nii.gz'" in out and "pairs: 3 images" in out
    assert "slices: 15 of 3 volumes, across axis 1" in out
    names = []
    for split in ("train", "valid", "test"):
        masks = stored(split)
        names += {stem.rpartition("_")[0] for stem in masks}  # one volume in one split
        voxels, numbers = made[names[-1]]
        last = voxels.shape[1] - 1
        assert len(masks) == last + 1
        recipe = {"window": [500, 1000], "orientation": "RAS", "context": 1}
        assert recorded(split) == recipe
        for index in range(last + 1):
            name = f"{names[-1]}_z{index:03}"
            assert set(masks[name]) == (set() if index == 0 else {"core", "edema"})
            for value, class_name in enumerate(("core", "edema"), 1):
                assert_array_equal(numbers[:, index] == value, masks[name].get(class_name, False))
            places = [index, max(index - 1, 0), min(index + 1, last)]
            pixels = (voxels[:, places] * 0.255).round()
            assert_array_equal(picture(name, split), np.moveaxis(pixels, 1, 2))
    assert sorted(names) == [*made]
    torch.manual_seed(2)
    model = UNet(3, 1, 4, depth=1, image_size=None, window=(500, 1000), context=1)
    torch.nn.init.normal_(model.outc.weight, std=20)
    torch.save(model.state_dict(), "three.pth")
    flags = "--model three.pth --precision fp32 --threshold 0.45 --write probability".split()
    predict.main([f"vi/{names[-1]}_0000.nii.gz", *flags, "--output", "whole"])
    predict.main(["dataset/test", *flags, "--output", "slices"])
    whole = nibabel.load(f"whole/{names[-1]}_0000_probability.nii.gz").get_fdata()
    assert whole.std() > 1e-3
    for index in range(last + 1):
        with Image.open(f"slices/{names[-1]}_z{index:03}_probability.png") as alone:
            assert np.abs(whole[:, index] - np.asarray(alone) / 65535).max() < 1e-4
    save(Image.new("L", (9, 9)), "grey.png")
    assert_refused(script_here("predict.py", "grey.png", *flags, cwd=here), "grey.png", "channels")


def test_masks_of_other_numbers_than_classes(here):
    _, numbers = volume(0)
    volume(2)
    write_nifti(MASK, numbers * np.float32(0.99), zooms=(1, 3, 1))  # nearly whole
    out = run_download(*VOLUMES, *ALL)
    (line,) = (line for line in out.splitlines() if line.startswith("warning"))
    assert "1 of 2" in line and "0.99" in line and MASK.name in line
    masks = stored()["case_000_z002"]
    assert_array_equal(masks["1"] + 2 * masks["2"], numbers[:, 2])
    shutil.rmtree("dataset")
    for values in (numbers - 1.0, numbers + 65535.0, numbers * 1.3):
        write_nifti(MASK, values.astype(np.float32), zooms=(1, 3, 1))
        refuse_download(*VOLUMES, *ALL, words=[MASK])
    layers = np.ones((*numbers.shape, 2), np.uint8)  # two segments that overlap
    pair = ("--masks", IMAGE, write_itk("layers.nrrd", layers, vector=True))
    refuse_download(*pair, "--into", "test", words=["layers.nrrd", "2 channels"])
    shutil.copy(IMAGE, MASK)  # many values
    refuse_download(*VOLUMES, *ALL, words=[MASK])
    save(photo(), "vi/a.png")
    refuse_download(*VOLUMES, *ALL, words=["'vi/{id}_0000.*' 'vm/{id}.*'"])
    shutil.copy(sample("CT_small.dcm"), "vi/a.dcm")
    refuse_download(*VOLUMES, *ALL, words=["vi has a"])


# ---- DICOM files of one frame ----------------------------------------------------------------

DICOM = ("--masks", "di", "dm", *ALL)


def dicom_pair(name="scan.dcm", **values):
    """The mask, bool (2, 3), of a DICOM file in di/ and a picture in dm/."""
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    save(Image.fromarray(mask), f"dm/{name.removesuffix('.dcm')}.png")
    Path("di").mkdir(exist_ok=True)
    write_dicom(Path("di", name), **values)  # 0 100 150 / 200 300 1000
    return mask


def test_dicom_images_and_a_window(here):
    mask = dicom_pair()
    run_download(*DICOM, "--window", "150", "200")  # from 50 to 250
    assert_array_equal(picture("scan"), [[0, 64, 128], [191, 255, 255]])
    assert recorded() == {"window": [150, 200]}
    assert "spacing" not in annotations("train")["images"][0]
    Path("di/scan.dcm").unlink()
    for name in ("scan", "1.2.840.5", "1.2.840.12"):  # without a suffix
        dicom_pair(name, PixelSpacing=[0.5, 0.8])
    assert "'di/{id}'" in run_download(*DICOM, "--force")  # the range of all values
    assert recorded() == {"window": "file"}
    assert [image["spacing"] for image in annotations("train")["images"]] == [[0.5, 0.8]] * 3
    for name in ("scan", "1.2.840.5", "1.2.840.12"):
        assert_array_equal(stored()[name]["foreground"], mask)
        assert_array_equal(picture(name), (STORED * 0.255).round())


def test_bad_dicom_is_one_line(here):
    dicom_pair()
    save(Image.new("1", (9, 9), 1), "dm/scan.png")
    refuse_download(*DICOM, words=["scan.png", "9x9", "di/scan.dcm", "3x2"])
    shutil.copy(sample("SC_rgb_rle_2frame.dcm"), "di/scan.dcm")
    refuse_download(*DICOM, words=["di/scan.dcm", "2 frames"])
    write_nifti("dm/scan.nii", np.zeros((3, 2, 1), np.uint8))
    refuse_download("--masks", "di/{id}.dcm", "dm/{id}.nii", *ALL, words=["dm/scan.nii"])
    save(photo(size=(3, 2)), "di/scan.png")
    pictures = ("--masks", "di/{id}.png", "dm/{id}.png", *ALL)
    for flags in (["--window", "40", "80"], ["--context", "1"]):
        refuse_download(*pictures, *flags, words=[flags[0]])


# ---- predict.py ------------------------------------------------------------------------------


def save_weights(path="best_model.pth", **recorded):
    """Weights of one grey channel that mark what is bright."""
    torch.save(brightness_model(n_channels=1, **recorded).state_dict(), path)
    return path


def predicted(name, *flags, output=None):
    """The mask of a volume or DICOM file, an array, and what predict.py printed."""
    output = output or ("m.nii.gz" if name.endswith(".nii.gz") else "m.png")
    said = output_of("predict.py", name, "--output", output, *flags, cwd=Path.cwd())
    read = Image.open if output == "m.png" else lambda path: nibabel.load(path).dataobj
    return np.asarray(read(output)), said


def test_four_axes_are_volumes_in_time_or_channels(here):
    voxels, numbers = (np.moveaxis(own, 1, 2) for own in volume(0, 1, times=(3,)))
    pair = ("--masks", IMAGE, MASK, *ALL)

    def shown(voxels):  # by the percentiles of all of them
        low, high = np.percentile(voxels, [0.5, 99.5])
        return ((voxels.clip(low, high) - low) * 255 / (high - low)).round()

    refuse_download(*pair, words=[IMAGE, "--channels", "--time"])
    run_download(*pair, "--time", "--context", 1)  # slices beside it of the same time
    masks = stored()
    assert len(masks) == 3 * 4
    for index in range(12):
        time, z = divmod(index, 4)
        name = f"case_000_0000_z{index:03}"
        assert_array_equal(numbers[..., z, time] == 1, masks[name].get("foreground", False))
        beside = [z, max(z - 1, 0), min(z + 1, 3)]
        assert_array_equal(picture(name), shown(voxels)[..., beside, time])
    save_weights()
    predict.main([str(IMAGE), "--output", "all"])  # one by one
    pixels = (np.asarray(nibabel.load("all/case_000_0000_mask.nii.gz").dataobj) > 0).sum((0, 1, 2))
    with open("all/predictions.csv", encoding="utf-8-sig") as file:
        rows = [(row["image"], int(row["pixels"])) for row in csv.DictReader(file)]
    assert rows == [(f"{IMAGE.name}, time {time}", count) for time, count in enumerate(pixels)]
    write_nifti(MASK, np.moveaxis(numbers[..., 0], 2, 1), zooms=(1, 3, 1))
    refuse_download(*pair, "--time", "--force", words=[MASK, "12 x 4 x 10 x 3"])
    run_download(*pair, "--force", "--channels", "t1,t2,flair")
    assert annotations("train")["info"]["channels"] == ["t1", "t2", "flair"]
    assert_array_equal(stored()["case_000_0000_z002"]["foreground"], numbers[..., 2, 0] == 1)
    for channel in range(3):  # each has its own percentiles
        pixels = picture("case_000_0000_z002")[..., channel]
        assert_array_equal(pixels, shown(voxels[..., channel])[:, :, 2])


# ---- what travels from the import through the weights to the prediction ----------------------


def brain(shape=(8, 9, 10), spacing=(1, 1, 1)):
    """A nibabel image in RAS of blocks of noise, with values like CT's."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(-900, 900, [side // 2 + 1 for side in shape], np.int16)
    for axis, side in enumerate(shape):
        voxels = voxels.repeat(2, axis).take(range(side), axis)
    affine = np.diag([*map(float, spacing), 1])
    affine[:3, 3] = -10, 20, 5
    return nibabel.Nifti1Image(voxels, affine)


def positive(image, affine=None):
    voxels = (np.asarray(image.dataobj) > 0).astype("u1")
    return nibabel.Nifti1Image(voxels, image.affine if affine is None else affine)


def write_pairs(images, masks=None):
    """Write nibabel images to vi/NAME.nii.gz, and masks of their positive voxels to vm/."""
    for name, image in images.items():
        for folder, one in (("vi", image), ("vm", (masks or {}).get(name) or positive(image))):
            Path(folder).mkdir(exist_ok=True)
            one.to_filename(f"{folder}/{name}.nii.gz")


@pytest.mark.parametrize("name", ["v.nii.gz", "ct.dcm"])
def test_the_window_of_the_weights_counts_without_being_told(here, name):
    brain((20, 22, 18)).to_filename("v.nii.gz")
    shutil.copy(sample("CT_small.dcm"), "ct.dcm")
    plain = ("--model", save_weights("plain.pth"))
    save_weights(window=(300, 500))
    own, said = predicted(name)
    assert "--window" not in said and 0.02 < (own > 0).mean() < 0.98
    told, said = predicted(name, "--window", 300, 500, *plain)  # weights of pictures record none
    assert "--window" not in said
    assert_array_equal(own, told)
    other, said = predicted(name, "--window", 100, 200)
    (line,) = (line for line in said.splitlines() if "--window" in line)
    assert "--window 100 200" in line and "300 500" in line
    untold = predicted(name, *plain)[0]
    assert (other != own).any() and (untold != own).any()
    save_weights(window="percentiles")  # without a window of numbers each file counts
    assert_array_equal(predicted(name)[0], untold)


def test_window_and_orientation_pass_to_splits_that_are_added_and_to_weights(here, no_pictures):
    write_pairs({"a": stored_as(brain(), "LPS"), "b": stored_as(brain(), "SAR")})
    first, new = (("--masks", f"vi/{name}.nii.gz", f"vm/{name}.nii.gz") for name in "ab")
    window = ("--window", -600.25, 1500)
    run_download(*first, "--into", "train", "--data", "own")
    leave = ["own/train", "leave --window out"]
    refuse_download(*new, *window, "--into", "test", "--data", "own", words=leave)
    run_download(*new, *window, "--into", "train", "--data", "own", "--force")  # no other stays
    run_download(*first, *window, "--into", "train")
    give = ["dataset/train", "give --window -600.25 1500"]
    refuse_download(*new, "--into", "test", words=give)
    told = run_download(*new, *window, "--into", "test")
    assert "orientation: 1 of 1 volumes turned to LPS, that of dataset/train" in told
    assert recorded("test") == recorded("train")
    assert_same_images(("train",), ("test",), lambda name: name.replace("a", "b", 1))
    run_download(*new, *window, "--into", "valid")
    flags = ("--data", "dataset", *SMALL, "--depth", 1, "--epochs", 1)
    output_of("train.py", *flags, cwd=here)
    info = load_model("best_model.pth").info
    assert (info.window, info.orientation) == ((-600.25, 1500), "LPS")
    coco = ("--coco", "dataset/train/_annotations.coco.json", "dataset/train")
    save_pair("p")
    for flags in (coco, MASKS[:3]):  # pictures, of which no window is recorded
        warned = run_download(*flags, "--into", "test", "--data", "own", "--force")
        assert "warning: own/train" in warned and recorded("test", "own") == {}


# ---- orientation -----------------------------------------------------------------------------


def test_one_brain_has_one_mask_however_it_is_stored(here, monkeypatch):
    monkeypatch.setattr(medseg_volumes, "SAMPLE", 900)  # so that the percentiles come from a part
    save_weights(window="percentiles", orientation="RAS")
    image, masks = brain((20, 22, 18), (3, 1, 3)), []
    for orientation in ("RAS", "LAS", "IPR", "PSR"):
        given = stored_as(image, orientation)
        given.to_filename("a.nii.gz")
        own, _ = predicted("a.nii.gz")
        mask = nibabel.load("m.nii.gz")
        assert_array_equal(mask.affine, given.affine)
        assert mask.shape == given.shape
        masks.append(np.asarray(stored_as(mask, "RAS").dataobj))
        assert_array_equal(masks[-1], masks[0])
    assert 0.02 < masks[0].mean() < 0.98
    save_weights()  # these see the slices as they are stored
    assert (predicted("a.nii.gz")[0] != own).any()


def assert_same_images(one, other, rename=str):
    """Two splits (split, root) hold equal pixels and masks; rename: names of the one -> other's."""
    masks, other_masks = stored(*one), stored(*other)
    assert len(masks) == len(other_masks) > 0
    for name, classes in masks.items():
        assert_array_equal(picture(name, *one), picture(rename(name), *other))
        np.testing.assert_equal(other_masks[rename(name)], classes)


def test_volumes_of_several_orientations_become_those_of_the_first(here):
    image = brain(spacing=(1, 2, 4))
    write_pairs({name: stored_as(image, "LPS") for name in "abc"})
    assert "orientation" not in run_download(*VOLUMES, *ALL, "--data", "same")
    turned = {"b": stored_as(image, "PSR"), "c": stored_as(image, "RAS")}
    write_pairs(turned, {"b": positive(image)})  # stored as RAS
    said = run_download(*VOLUMES, *ALL, "--data", "mixed")
    assert "orientation: 2 of 3 volumes turned to LPS, that of a.nii.gz" in said
    assert_same_images(("train", "same"), ("train", "mixed"))
    spacings = {tuple(image["spacing"]) for image in annotations("train", "mixed")["images"]}
    assert spacings == {(1, 2)}
    assert recorded("train", "mixed") == {"window": "percentiles", "orientation": "LPS"}
    write_pairs({"d": brain(spacing=(4, 2, 1))})  # cut in another direction
    assert "warning: 1 of 4 volumes" in run_download(*VOLUMES, *ALL, "--data", "cut")


def test_an_affine_that_tells_no_orientation(here):
    image, mask = brain(), positive(brain())
    for one in (image, mask):
        one.set_sform(one.affine * [0, 1, 1, 1], 1)
    write_pairs({"a": image}, {"a": mask})
    assert "orientation" not in run_download(*VOLUMES, *ALL)  # alone: as stored
    assert recorded("train") == {"window": "percentiles"}
    write_pairs({"b": brain()})
    refuse_download(*VOLUMES, *ALL, "--data", "two", words=["vi/a.nii.gz: ", "RAS"])


def test_affines_that_differ_are_told_with_their_distance(here):
    image = brain(spacing=(4500, 900, 4500))  # in a file of micrometres
    image.header.set_xyzt_units("micron")

    def shift(micrometres):
        affine = image.affine.copy()
        affine[0, 3] += micrometres
        write_pairs(dict.fromkeys("ab", image), {"a": positive(image, affine)})

    shift(5)
    assert "warning" not in run_download(*VOLUMES, *ALL)
    shift(600)
    out = run_download(*VOLUMES, *ALL, "--force")
    assert "warning: 1 of 2 masks" in out and "0.6 mm (a.nii.gz)" in out
    shift(900)
    refuse_download(*VOLUMES, *ALL, "--force", words=["vm/a.nii.gz", "vi/a.nii.gz", "0.9 mm"])


# ---- a DICOM series, other formats -----------------------------------------------------------


def test_a_series_is_imported_and_predicted_as_the_same_nifti(here):
    affine = np.diag([-0.8, -0.5, 2, 1])  # DICOM's axes lead to the left and to the back
    affine[:3, 3] = -5, -70, -10
    Path("ct").mkdir()
    for seed, name in enumerate(("p1", "p2")):
        voxels = np.random.default_rng(seed).integers(0, 900, (5, 24, 20)).astype(np.int16)
        write_series(Path("ct", name), voxels)
        write_pairs({name: nibabel.Nifti1Image(voxels.T, affine)})
    run_download(*VOLUMES, *ALL, "--data", "nifti")
    assert "10 of 2 volumes" in run_download("--masks", "ct", "vm", *ALL)
    assert_same_images(("train", "nifti"), ("train",))
    assert recorded() == recorded("train", "nifti")
    frames = add_spacings([*map(as_frame, Path("dataset/train").glob("*.png"))], "dataset/train")
    mm = [frame.spacing for frame in frames]  # from row to row first
    np.testing.assert_allclose(mm, [(0.8, 0.5)] * 10, rtol=1e-6)
    save_weights(orientation="RAS")
    wanted, _ = predicted("vi/p1.nii.gz")
    assert_array_equal(predicted("ct/p1", output="m.nii.gz")[0], wanted)
    assert wanted.any()
    predict.main(["ct", "--device", "cpu", "--output", "all"])  # two series in a folder
    assert_array_equal(nibabel.load("all/p1_mask.nii.gz").dataobj, wanted)
    assert Path("all/p2_mask.nii.gz").exists()
    save_weights("pictures.pth")  # those of pictures take the files one by one
    predict.main(["ct/p1", "--device", "cpu", "--output", "loose", "--model", "pictures.pth"])
    assert len(list(Path("loose").glob("*_mask.png"))) == 5
