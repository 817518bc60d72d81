"""download.py --masks with patterns of placeholders: groups, classes, parts, channels."""

from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALL,
    annotations,
    class_names,
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


def groups(split):
    return {record["group"] for record in annotations(split)["images"]}


def test_parts_are_united(here):
    image("s/a/images/a.png")
    drawn = [mask(f"s/a/masks/{seed}.png", seed) for seed in range(3)]
    out = run_download("--masks", "s/{id}/images/*.png", "s/{id}/masks/{part}.png", *ALL)
    assert_array_equal(stored()["a"]["foreground"], np.any(drawn, axis=0))
    assert "1 images with 3 masks" in out and "united" in out


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
    refuse_download("--masks", *patterns, *ALL, "--force", "--group", "p", words=["--group"])


def test_classes_of_volumes_are_named_by_their_files(here):
    liver, spleen = {}, {}
    for number, case in enumerate(("s0", "s1")):
        volume(f"S/{case}/ct.nii.gz", number)
        liver[case] = volume(f"S/{case}/seg/liver.nii.gz", number, 2)
        spleen[case] = volume(f"S/{case}/seg/spleen.nii.gz", number + 9, 2)
    patterns = "S/{id}/ct.nii.gz", "S/{id}/seg/{class}.nii.gz"
    run_download("--masks", *patterns, *ALL)
    assert class_names() == ["liver", "spleen"]
    masks = stored()
    assert len(masks) == 2 * VOXELS[2]
    for case in ("s0", "s1"):
        for index in range(VOXELS[2]):
            own = masks[f"{case}_z{index:03}"]
            assert_array_equal(own["liver"], liver[case][..., index] > 0)
            assert_array_equal(own["spleen"], spleen[case][..., index] > 0)
    assert groups("train") == {"s0", "s1"}
    run_download("--masks", *patterns, *ALL, "--force", "--classes", "spleen,liver")
    assert class_names() == ["spleen", "liver"]
    run_download("--masks", *patterns, *ALL, "--force", "--classes", "spleen")
    assert class_names() == ["spleen"]
    refuse_download("--masks", *patterns, *ALL, "--force", "--classes", "lung", words=["lung"])
    refuse_download("--masks", *patterns, *ALL, "--force", "--classes", "1=a", words=["{class}"])


def test_unpaired_images_are_left_out(here):
    for stem in "ab":
        image(f"i/{stem}.png")
    drawn = mask("m/a_x.png")
    patterns = ("--masks", "i/{id}.png", "m/{id}_x.png", *ALL)
    refuse_download(*patterns, words=["i/b.png", "--skip-unpaired"])
    run_download(*patterns, "--skip-unpaired")
    assert_array_equal(stored()["a"]["foreground"], drawn)


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
        (["i/{id}.png", "a=m/{id}_x.png"], ["a=", "{class}"]),
        (["i/{id}.png", "m/{id}_x.png", "--channels", "a"], ["--channels", "{channel}"]),
        (["i", "m", "--channels", "a"], ["--channels", "{channel}"]),
    ],
)
def test_wrong_patterns_are_refused(here, arguments, words):
    image("i/a.png")
    mask("m/a_x.png")
    refuse_download("--masks", *arguments, *ALL, words=words)
