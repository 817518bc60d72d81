"""predict.py finds the files of a case again, one for each channel of the training."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import assert_done, assert_refused, brightness_model, script_here, write_nifti
from numpy.testing import assert_array_equal
from PIL import Image

from medseg.predicting.inputs import expand
from medseg.predicting.page import Session
from predict import open_models

CHANNELS = ("t2", "flair", "t1ce", "t1")
SHOWING = "t1ce"  # the only channel that the network looks at
AFFINE = np.diag([1.0, 1, 3, 1])


@pytest.fixture
def cases(here):
    """Two cases of BraTS and weights for them; {case: mask of what the channel shows}."""
    save_model("{id}_{channel}.nii")
    masks, rng = {}, np.random.default_rng(0)
    for number, case in enumerate(("B_1", "B_2")):
        masks[case] = np.zeros((8, 6, 5), bool)
        masks[case][1 + number : 4, 2:5, 1:3] = True
        Path("B", case).mkdir(parents=True)
        for name in (*CHANNELS, "seg"):
            voxels = rng.integers(0, 900, (8, 6, 5)).astype(np.int16)
            voxels = masks[case] * np.int16(700) if name == SHOWING else voxels
            write_nifti(f"B/{case}/{case}_{name}.nii", voxels, AFFINE)
    return masks


def save_model(pattern, channels=CHANNELS):
    model = brightness_model(None, n_channels=len(channels), channels=channels, pattern=pattern)
    with torch.no_grad():
        model.down1.conv1.weight[0, :, 1, 1] = torch.tensor([name == SHOWING for name in channels])
    torch.save(model.state_dict(), "best_model.pth")
    return model


def predict(*inputs):
    """{case: its mask, bool} of what predict.py writes."""
    assert_done(script_here("predict.py", *inputs, "--output", "out", cwd=Path()))
    paths = Path("out").glob("*_mask.nii.gz")
    return {path.name[:-12]: np.asarray(nibabel.load(path).dataobj) > 0 for path in paths}


def refuse(given, *words):
    assert_refused(script_here("predict.py", given, cwd=Path()), *words)


def table_pixels():
    """{image: pixels} of the table."""
    rows = Path("out/predictions.csv").read_text("utf-8-sig").splitlines()[1:]
    return {row.split(",")[0]: int(row.split(",")[2]) for row in rows}


@pytest.mark.parametrize(
    "inputs, count",
    [
        (["B/B_1"], 1),
        (["B/B_1/B_1_t1.nii", "B/B_1/B_1_t1ce.nii"], 1),
        (["B/B_1/{id}_{channel}.nii", "B/B_1"], 1),
        (["B"], 2),
        (["B/B_1", "B/B_2"], 2),
        (["B/{id}/{id}_{channel}.nii"], 2),
    ],
)
def test_cases_are_found_by_a_folder_a_file_or_a_pattern(cases, inputs, count):
    masks = predict(*inputs)
    assert sorted(masks) == ["B_1", "B_2"][:count]
    for case, mask in masks.items():
        assert_array_equal(mask, cases[case])
        assert_array_equal(nibabel.load(f"out/{case}_mask.nii.gz").affine, AFFINE)


def test_all_channels_in_one_file(cases):
    volumes = [nibabel.load(f"B/B_1/B_1_{name}.nii").get_fdata() for name in CHANNELS]
    for name, count in {"four": 4, "two": 2}.items():
        write_nifti(f"{name}.nii.gz", np.stack(volumes[:count], -1).astype(np.int16), AFFINE)
    assert_array_equal(predict("four.nii.gz")["four"], cases["B_1"])
    refuse("two.nii.gz", "two.nii.gz", "2 channels", ", ".join(CHANNELS), "{id}_{channel}.nii")


@pytest.mark.parametrize("given", ["B/B_2/B_2_t1.nii", "B/B_2/{id}_{channel}.nii", "B"])
def test_a_missing_channel_is_named(cases, given):
    Path("B/B_2/B_2_flair.nii").unlink()
    refuse(given, "B/B_2/B_2_flair.nii")
    Path("flat").mkdir()
    for path in Path("B").glob("*/*.nii"):
        path.rename(Path("flat", path.name))
    refuse("flat", "flat/B_2_flair.nii")
    assert predict("flat/B_1_t1.nii").keys() == {"B_1"}  # another case is whole


def test_channels_that_lie_apart_are_refused(cases):
    moved = AFFINE.copy()
    moved[1, 3] = 12.5
    write_nifti("B/B_1/B_1_t1.nii", np.ones((8, 6, 5), np.int16), moved)
    refuse("B/B_1", "B_1_t1.nii", "12.5 mm")


def test_cases_of_equal_files_are_called_as_their_folders(cases):
    """In the table too, which counts what each of them has."""
    for path in Path("B").glob("*/*.nii"):
        path.rename(path.with_name(path.name.rpartition("_")[2]))
    assert predict("B/{id}/{channel}.nii").keys() == {"B_1", "B_2"}
    assert table_pixels() == {name: own.sum() for name, own in cases.items()}
    (file,) = expand(["B/B_1"], save_model("{channel}.nii").info)
    assert file.name == "B_1" and file.modalities.names == CHANNELS
    assert [path.name for path in file.modalities.paths] == [f"{name}.nii" for name in CHANNELS]


def test_a_pattern_without_channels_tells_files_of_equal_names_apart(here):
    torch.save(brightness_model(None, n_channels=1).state_dict(), "best_model.pth")
    for number, folder in enumerate(("s1", "s2"), 1):
        Path("S", folder).mkdir(parents=True)
        voxels = np.zeros((8, 6, 5), np.int16)
        voxels[:number, :2, 1:3] = 700
        write_nifti(f"S/{folder}/ct.nii.gz", voxels, AFFINE)
    masks = predict("S/{id}/ct.nii.gz")
    assert {name: mask.sum() for name, mask in masks.items()} == {"s1": 4, "s2": 8}
    assert table_pixels() == {"s1": 4, "s2": 8}
    pattern = "S/{id}/{channel}.nii.gz"  # of weights that know none
    refuse(pattern, pattern)


def test_pictures_of_a_case(here):
    save_model("{channel}/{id}.png", ("dapi", SHOWING))
    drawn = np.zeros((20, 30), bool)
    drawn[5:12, 6:20] = True
    for name, one in {"dapi": np.full((20, 30), 200), SHOWING: np.where(drawn, 255, 0)}.items():
        Path("i", name).mkdir(parents=True)
        Image.fromarray(one.astype(np.uint8)).save(f"i/{name}/a.png")
    for given in ("i", "i/dapi/a.png"):
        predict(given)
        assert_array_equal(np.asarray(Image.open("out/a_mask.png")) > 0, drawn)
        Path("out/a_mask.png").unlink()


def test_the_page_takes_the_files_of_a_case(cases):
    files = sorted(Path("B/B_1").glob("B_1_t*.nii")) + [Path("B/B_1/B_1_flair.nii")]
    session = Session(Path(), open_models(["best_model.pth"], "cpu"))
    session.predict(files, 0.5)
    assert not session.problems and len(session.predictions) == 5
    assert session.first == 1  # a slice with most of the foreground
    mask = nibabel.load(session.download("masks", 0.5))
    assert_array_equal(np.asarray(mask.dataobj), cases["B_1"])
    assert "shown: red t2, green flair, blue t1ce" in session.view(0, 0.5)[1]
    Image.new("RGB", (8, 6)).save("rgb.png")
    session.predict(["rgb.png"], 0.5)
    assert "rgb.png" in session.problems[0] and ", ".join(CHANNELS) in session.problems[0]
