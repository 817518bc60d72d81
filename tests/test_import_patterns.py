"""download.py --masks with patterns of placeholders: groups, classes, parts, channels."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import (
    ALL,
    annotations,
    grey,
    labels,
    photo,
    refuse_download,
    run_download,
    save,
    stored,
    write_nifti,
)
from numpy.testing import assert_array_equal
from PIL import Image

VOXELS = (8, 6, 5)  # cut across the last axis


def image(path, seed=0):
    save(photo(seed), path)


def mask(path, seed=0):
    """Write a mask of one class; returns it."""
    drawn = labels(seed)
    save(grey((0, 255))(drawn), path)
    return drawn == 1


def volume(path, seed=0, values=900):
    """Write a volume of numbers below `values`; returns it."""
    voxels = np.random.default_rng(seed).integers(0, values, VOXELS).astype(np.int16)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, voxels, zooms=(1, 1, 3))
    return voxels


def brats(*cases, modalities=("flair", "t1", "t1ce", "t2"), odd=None):
    """Cases of BraTS 2020, `odd` with a mask of another name: {case: {channel or seg: voxels}}."""
    made = {}
    for number, case in enumerate(cases):
        own = made[case] = {}
        for seed, name in enumerate(modalities):
            own[name] = volume(f"B/{case}/{case}_{name}.nii", 10 * number + seed)
        seg = "W39_1998.09.19_Segm" if case == odd else f"{case}_seg"
        own["seg"] = np.array([0, 1, 2, 4], np.int16)[volume("x.nii", number, 4)]
        write_nifti(f"B/{case}/{seg}.nii", own["seg"], zooms=(1, 1, 3))
    return made


BRATS = "B/{id}/{id}_{channel}.nii", "B/{id}/*_{seg,Segm}.nii"


def shown(voxels, index):
    """A slice as it is stored: from the 0.5 to 99.5 percentiles of its volume."""
    low, high = np.percentile(voxels, (0.5, 99.5))
    return ((voxels[..., index].clip(low, high) - low) / (high - low) * 255).round()


def pixels(name, split="train"):
    return tifffile.imread(f"dataset/{split}/{name}.tif")


def groups(split):
    return {record["group"] for record in annotations(split)["images"]}


def test_groups_stay_together_and_images_have_the_names_of_their_ids(here):
    for patient in "pqr":
        for number in "12":
            image(f"k/{patient}/{number}.tif", ord(patient))
            mask(f"k/{patient}/{number}_mask.tif", ord(patient) + int(number))
    patterns = "k/{group}/{id}.tif", "k/{group}/{id}_mask.tif"
    out = run_download("--masks", *patterns, "--split", 34, 33, 33)
    assert "groups: 3" in out
    assert groups("train") | groups("valid") | groups("test") == set("pqr")
    assert all(len(groups(split)) == 1 for split in ("train", "valid", "test"))
    names = {name for split in ("train", "valid", "test") for name in stored(split)}
    assert names == {f"{patient}_{number}" for patient in "pqr" for number in "12"}
    refuse_download("--masks", *patterns, *ALL, "--force", "--groups", "p", words=["--groups"])


def test_a_split_is_not_read_into_itself(here):
    image("dataset/valid/a.png")
    mask("dataset/valid/a_mask.png")
    patterns = "dataset/valid/{id}.png", "dataset/valid/{id}_mask.png"
    refuse_download("--masks", *patterns, "--into", "valid", "--force", words=["dataset/valid"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["i/{ID}.png", "m/{id}_x.png"], ["{ID}"]),
        (["i", "m/{id}_x.png"], ["i:", "{id}"]),
        (["i/{id}.png", "m/{id}_x.png", "--channels", "a"], ["i/a.png", "colours"]),
        (["i", "m", "--channels", "a,b"], ["i/a.png", "3 channels", "a, b"]),
    ],
)
def test_wrong_patterns_are_refused(here, arguments, words):
    image("i/a.png")
    mask("m/a_x.png")
    refuse_download("--masks", *arguments, *ALL, words=words)


def test_modalities_become_the_channels_of_each_slice(here):
    made = brats("B_1", "B_2", "B_355", odd="B_355")
    out = run_download("--masks", *BRATS, *ALL, "--classes", "1=core,2=oedema,4=enhancing")
    assert "flair, t1, t1ce, t2" in out
    info = annotations("train")["info"]
    assert info["channels"] == ["flair", "t1", "t1ce", "t2"]
    assert info["pattern"] == "{id}_{channel}.nii"
    for case, own in made.items():
        for index in range(VOXELS[2]):
            name = f"{case}_z{index:03}"
            expected = np.stack([shown(own[channel], index) for channel in info["channels"]], -1)
            assert_array_equal(pixels(name), expected)
            assert pixels(name).dtype == np.uint8
            seg, masks = own["seg"][..., index], stored()[name]
            for number, class_name in {1: "core", 2: "oedema", 4: "enhancing"}.items():
                assert_array_equal(masks[class_name], seg == number)
    assert groups("train") == set(made)


def test_channels_are_chosen_in_their_order(here):
    made = brats("B_1")
    run_download("--masks", *BRATS, *ALL, "--channels", "t2,flair")
    assert annotations("train")["info"]["channels"] == ["t2", "flair"]
    expected = np.stack([shown(made["B_1"][name], 2) for name in ("t2", "flair")], -1)
    assert_array_equal(pixels("B_1_z002"), expected)
    into = ("--masks", *BRATS, "--into", "valid")
    refuse_download(*into, words=["t2, flair", "--channels"])
    run_download(*into, "--channels", "t2,flair")


def test_a_missing_modality_is_named(here):
    brats("B_1", "B_2")
    Path("B/B_2/B_2_t1ce.nii").unlink()
    refuse_download("--masks", *BRATS, *ALL, words=["B/B_2/B_2_t1ce.nii", "--skip-unpaired"])
    run_download("--masks", *BRATS, *ALL, "--skip-unpaired")
    assert groups("train") == {"B_1"}


def test_more_channels_than_an_image_may_have(here):
    brats("B_1", modalities=[f"c{number}" for number in range(17)])
    refuse_download("--masks", *BRATS, *ALL, words=[BRATS[0], "16 channels"])


def test_modalities_that_lie_apart_are_refused(here):
    made = brats("B_1")
    shifted = np.diag([1.0, 1, 3, 1])
    shifted[0, 3] = 7.5
    write_nifti("B/B_1/B_1_t2.nii", made["B_1"]["t2"], shifted)
    refuse_download("--masks", *BRATS, *ALL, words=["B_1_t2.nii", "7.5 mm"])


def test_pictures_are_channels_too(here):
    stains = np.random.default_rng(0).integers(0, 256, (2, 30, 40), np.uint8)
    for name, one in zip(("dapi", "gfp"), stains, strict=True):
        save(Image.fromarray(one), f"i/a_{name}.png")
    drawn = mask("m/a.png")
    patterns = ("--masks", "i/{id}_{channel}.png", "m/{id}.png", *ALL, "--force")
    run_download(*patterns)
    assert_array_equal(pixels("a"), np.moveaxis(stains, 0, -1))
    assert_array_equal(stored()["a"]["foreground"], drawn)
    image("i/a_gfp.png")
    refuse_download(*patterns, words=["i/a_gfp.png", "colours"])
    save(Image.fromarray(stains[1, 1:]), "i/a_gfp.png")
    refuse_download(*patterns, words=["i/a_gfp.png", "40x29"])


def test_the_channels_of_one_picture_are_named(here):
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 5), np.uint8)
    Path("i").mkdir()
    tifffile.imwrite("i/a.tif", values, photometric="minisblack", planarconfig="contig")
    mask("m/a.png")
    run_download("--masks", "i", "m", *ALL, "--channels", "a,b,c,d,e")
    assert annotations("train")["info"]["channels"] == list("abcde")
    assert_array_equal(pixels("a"), values)
    run_download("--masks", "i", "m", *ALL, "--force")
    assert annotations("train")["info"]["channels"] == list("12345")
    tifffile.imwrite("i/b.tif", values[..., :4], photometric="minisblack", planarconfig="contig")
    mask("m/b.png")
    refuse_download("--masks", "i", "m", *ALL, "--force", words=["i/b.tif", "4 channels"])
