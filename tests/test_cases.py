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
        for name in CHANNELS:
            noise = rng.integers(0, 900, (8, 6, 5)).astype(np.int16)
            save_scan(case, name, masks[case] * np.int16(700) if name == SHOWING else noise)
        save_scan(case, "seg", masks[case].astype(np.int16))
    return masks


def save_model(pattern, channels=CHANNELS):
    model = brightness_model(None, n_channels=len(channels), channels=channels, pattern=pattern)
    with torch.no_grad():
        model.down1.conv1.weight[0, :, 1, 1] = torch.tensor([name == SHOWING for name in channels])
    torch.save(model.state_dict(), "best_model.pth")
    return model


def save_scan(case, name, voxels):
    Path("B", case).mkdir(parents=True, exist_ok=True)
    write_nifti(f"B/{case}/{case}_{name}.nii", voxels, AFFINE)


def predict(*inputs):
    result = script_here("predict.py", *inputs, "--output", "out", cwd=Path())
    assert_done(result)
    return {path.name: nibabel.load(path) for path in Path("out").glob("*.nii.gz")}


@pytest.mark.parametrize(
    "inputs",
    [
        ["B/B_1"],
        ["B/B_1/B_1_t1ce.nii"],
        ["B/B_1/B_1_t1.nii", "B/B_1/B_1_t1ce.nii"],
        ["B/B_1/{id}_{channel}.nii"],
        ["B/B_1/{id}_{channel}.nii", "B/B_1"],
    ],
)
def test_a_case_is_found_by_its_folder_a_file_or_a_pattern(cases, inputs):
    (name, mask), *others = predict(*inputs).items()
    assert not others and name == "B_1_mask.nii.gz"
    assert_array_equal(np.asarray(mask.dataobj), cases["B_1"])
    assert_array_equal(mask.affine, AFFINE)


@pytest.mark.parametrize("inputs", [["B"], ["B/B_1", "B/B_2"], ["B/{id}/{id}_{channel}.nii"]])
def test_a_folder_of_cases(cases, inputs):
    masks = predict(*inputs)
    assert masks.keys() == {"B_1_mask.nii.gz", "B_2_mask.nii.gz"}
    for case, drawn in cases.items():
        assert_array_equal(np.asarray(masks[f"{case}_mask.nii.gz"].dataobj), drawn)


def test_all_channels_in_one_file(cases):
    volumes = [nibabel.load(f"B/B_1/B_1_{name}.nii").get_fdata() for name in CHANNELS]
    write_nifti("four.nii.gz", np.stack(volumes, -1).astype(np.int16), AFFINE)
    masks = predict("four.nii.gz")
    assert_array_equal(np.asarray(masks["four_mask.nii.gz"].dataobj), cases["B_1"])
    write_nifti("two.nii.gz", np.stack(volumes[:2], -1).astype(np.int16), AFFINE)
    result = script_here("predict.py", "two.nii.gz", cwd=Path())
    assert_refused(result, "two.nii.gz", "2 channels", ", ".join(CHANNELS), "{id}_{channel}.nii")


@pytest.mark.parametrize("given", ["B/B_2", "B/B_2/B_2_t1.nii", "B/B_2/{id}_{channel}.nii", "B"])
def test_a_missing_channel_is_named(cases, given):
    Path("B/B_2/B_2_flair.nii").unlink()
    assert_refused(script_here("predict.py", given, cwd=Path()), "B/B_2/B_2_flair.nii")
    assert predict("B/B_1/B_1_t1.nii").keys() == {"B_1_mask.nii.gz"}  # another case is whole


def test_channels_that_lie_apart_are_refused(cases):
    moved = AFFINE.copy()
    moved[1, 3] = 12.5
    write_nifti("B/B_1/B_1_t1.nii", np.ones((8, 6, 5), np.int16), moved)
    assert_refused(script_here("predict.py", "B/B_1", cwd=Path()), "B_1_t1.nii", "12.5 mm")


def test_one_case_of_a_folder_of_files(cases):
    Path("flat").mkdir()
    for path in Path("B").glob("*/*.nii"):
        path.rename(Path("flat", path.name))
    assert predict("flat/B_2_t1.nii").keys() == {"B_2_mask.nii.gz"}
    Path("flat/B_1_t2.nii").unlink()
    assert predict("flat/B_2_t1.nii").keys() == {"B_2_mask.nii.gz"}
    assert_refused(script_here("predict.py", "flat", cwd=Path()), "flat/B_1_t2.nii")


def test_what_the_pattern_does_not_say_names_the_case(cases):
    model = save_model("{channel}.nii")
    for name in CHANNELS:
        Path(f"B/B_1/B_1_{name}.nii").rename(f"B/B_1/{name}.nii")
    (file,) = expand(["B/B_1"], model.info)
    assert file.name == "B_1" and file.modalities.names == CHANNELS
    assert [path.name for path in file.modalities.paths] == [f"{name}.nii" for name in CHANNELS]
    assert [file.name for file in expand(["B"], model.info)] == ["B_1"]


def test_the_table_tells_cases_of_equal_files_apart(cases):
    for path in Path("B").glob("*/*.nii"):
        path.rename(path.with_name(path.name.rpartition("_")[2]))
    masks = predict("B/{id}/{channel}.nii")
    rows = Path("out/predictions.csv").read_text("utf-8-sig").splitlines()[1:]
    pixels = {row.split(",")[0]: int(row.split(",")[2]) for row in rows}
    assert len(rows) == 2 and pixels == {name: own.sum() for name, own in cases.items()}
    assert masks.keys() == {"B_1_mask.nii.gz", "B_2_mask.nii.gz"}


def test_a_pattern_without_channels_tells_files_of_equal_names_apart(here):
    torch.save(brightness_model(None, n_channels=1).state_dict(), "best_model.pth")
    for number, folder in enumerate(("s1", "s2"), 1):
        Path("S", folder).mkdir(parents=True)
        voxels = np.zeros((8, 6, 5), np.int16)
        voxels[:number, :2, 1:3] = 700
        write_nifti(f"S/{folder}/ct.nii.gz", voxels, AFFINE)
    masks = predict("S/{id}/ct.nii.gz")
    assert masks.keys() == {"s1_mask.nii.gz", "s2_mask.nii.gz"}
    for number, folder in enumerate(("s1", "s2"), 1):
        assert np.asarray(masks[f"{folder}_mask.nii.gz"].dataobj).sum() == number * 4
    rows = Path("out/predictions.csv").read_text("utf-8-sig").splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["s1", "s2"]
    pattern = "S/{id}/{channel}.nii.gz"  # of weights that know none
    assert_refused(script_here("predict.py", pattern, cwd=Path()), pattern)


def test_pictures_of_a_case(here):
    save_model("{channel}/{id}.png", ("dapi", SHOWING))
    drawn = np.zeros((20, 30), bool)
    drawn[5:12, 6:20] = True
    pixels = {"dapi": np.full((20, 30), 200, np.uint8), SHOWING: np.where(drawn, 255, 0)}
    for name, one in pixels.items():
        Path("i", name).mkdir(parents=True)
        Image.fromarray(one.astype(np.uint8)).save(f"i/{name}/a.png")
    for given in ("i", "i/dapi/a.png"):
        result = script_here("predict.py", given, "--output", "out", cwd=Path())
        assert_done(result)
        assert_array_equal(np.asarray(Image.open("out/a_mask.png")) > 0, drawn)


def test_the_page_takes_the_files_of_a_case(cases):
    from medseg.predicting.page import Session

    files = sorted(Path("B/B_1").glob("B_1_t*.nii")) + [Path("B/B_1/B_1_flair.nii")]
    session = Session(Path(), open_models(["best_model.pth"], "cpu"))
    session.predict(files, 0.5)
    assert not session.problems and len(session.predictions) == 5
    mask = nibabel.load(session.download("masks", 0.5))
    assert_array_equal(np.asarray(mask.dataobj), cases["B_1"])
    Image.new("RGB", (8, 6)).save("rgb.png")
    session.predict(["rgb.png"], 0.5)
    assert "rgb.png" in session.problems[0] and ", ".join(CHANNELS) in session.problems[0]
    named = "shown: red t2, green flair, blue t1ce"
    assert named in session.view(0, 0.5)[1]
