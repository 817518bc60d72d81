"""Images of several channels, in a file or a file each: from the import to masks and reports."""

import csv
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import tifffile
import torch
from helpers import (
    ALL,
    annotations,
    assert_done,
    assert_refused,
    brightness_model,
    run_download,
    save,
    script_here,
    square,
    write_nifti,
    write_split,
)
from numpy.testing import assert_array_equal
from PIL import Image

import net
from data import Batches, Order, Transform, count_channels, load_split
from medseg.augment import augment, count_draws
from medseg.images import measure_window
from medseg.predicting.page import Session
from predict import open_models

pytestmark = pytest.mark.usefixtures("here")

run = partial(script_here, cwd=".")
SIDE = 48
LAYOUT = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}


def channel_set(train=24):
    """set/: seven channels, of which 5 shows a square and the others noise; {split: pixels}.

    As anybody's would be, for nothing records how many channels it has.
    """
    generator, made = np.random.default_rng(0), {}
    for split, count in {"train": train, "valid": 6, "test": 8}.items():
        made[split] = generator.integers(0, 256, (count, SIDE, SIDE, 7), np.uint8)
        made[split][..., 5] = generator.integers(60, 100, (count, SIDE, SIDE))
        images, outlines = {}, []
        for index, pixels in enumerate(made[split]):
            x, y = generator.integers(4, SIDE - 20, 2).tolist()
            pixels[y : y + 16, x : x + 16, 5] += 90
            write = partial(tifffile.imwrite, data=pixels, **LAYOUT)
            images[f"{index}.tif"] = SimpleNamespace(size=(SIDE, SIDE), save=write)
            outlines.append((index, square(x, y, 16)))
        write_split(Path("set", split), images, outlines)
    return made


def test_a_data_set_has_as_many_channels_as_its_images():
    pixels = channel_set(2)["test"][2]
    assert count_channels("set", 3) == count_channels("set", 7) == 7
    with pytest.raises(ValueError, match="--n-channels 5"):
        count_channels("set", 5)
    rows = load_split("set", "test", SIDE, n_channels=7)
    assert_array_equal(rows[2, ..., :7], pixels)
    images, masks = next(iter(Batches(rows, Order(8), transform=Transform(7))))
    assert images.shape == (8, 7, SIDE, SIDE) and masks.sum() == 8 * 16 * 16
    expected = (pixels / 255 - 0.449) / 0.226
    np.testing.assert_allclose(images[2].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.slow  # a training of seconds
def test_what_one_of_seven_channels_shows_is_learned():
    channel_set()
    flags = f"--data set --device cpu --swanlab disabled --image-size {SIDE} --n-filters 8"
    flags += " --depth 3 --norm batch --lr 0.01 --batch-size 8 --epochs 12 --seed 1"
    assert_done(run("train.py", *flags.split()))
    assert net.load_model("best_model.pth").n_channels == 7
    assert_done(run("predict.py", "set/test", "--device", "cpu", "--output", "out"))
    assert json.loads(Path("out/report.json").read_text())["scores"]["dice"] >= 0.9


def test_other_channels_than_those_of_the_weights_are_refused():
    channel_set(2)
    model = net.UNet(3, 1, 2, depth=1, image_size=16)
    torch.save(model.state_dict(), "three.pth")
    tifffile.imwrite("two.tif", np.zeros((9, 9, 2), np.uint8), **LAYOUT)
    assert_refused(run("predict.py", "two.tif", "--model", "three.pth"), "two.tif", "2 channels")
    flags = "--data set --init three.pth --swanlab disabled --device cpu --out run"
    assert_refused(run("train.py", *flags.split()), "3 channels", "7 channels")
    named, other = (net.UNet(2, 1, 2, depth=1, channels=names) for names in ("ab", "ba"))
    with pytest.raises(ValueError, match="a, b.*b, a"):
        net.copy_weights(named, other)
    assert net.copy_weights(named, net.UNet(2, 1, 2, depth=1))


def test_grey_values_change_a_channel_at_a_time():
    """Of images that are 1 everywhere contrast leaves its factor, brightness what it adds."""
    images, masks = torch.ones(4, 5, 6, 6), torch.zeros(4, 1, 6, 6)
    draws = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    strengths = {"contrast": 0.5, "brightness": 0.2}
    assert count_draws(strengths, 5) == 10 and count_draws(strengths, 3) == 2
    changed, _ = augment(images, masks, draws, strengths)
    expected = 1.5 ** (2 * draws[:, :5] - 1) + 0.2 * (2 * draws[:, 5:10] - 1)
    torch.testing.assert_close(changed, expected[..., None, None].expand(4, 5, 6, 6))
    colours, _ = augment(images[:, :3], masks, draws, strengths)
    assert (colours == colours[:, :1]).all() and len(colours.unique()) == 4


def test_grey_values_of_a_set_are_shown_alike():
    """A hot pixel in every second image of 12 bits does not darken it, here and in predict.py."""

    def write(left, right, dtype=np.uint16):
        for number in range(6):
            values = np.full((40, 40), left, dtype)
            values[:, 20:] = right
            if dtype == np.uint16 and number % 2:
                values[3, 3] = 65000
            save(Image.fromarray(values), f"images/{number}.png")
            save(Image.fromarray(np.uint8(255) * (values == right)), f"masks/{number}.png")

    write(400, 1200)
    assert "400 to 1200" in run_download("--masks", "images", "masks", "--split", 50, 50, 0)
    for split in ("train", "valid"):
        assert annotations(split)["info"]["window"] == [800, 800]
        rows = load_split("dataset", split, None)
        assert all(row[8, 8, 0] == 0 and row[8, 30, 0] == 255 for row in rows)
    torch.save(brightness_model(window=(800, 800)).state_dict(), "best_model.pth")
    assert_done(run("predict.py", "images", "--device", "cpu", "--output", "out"))
    for number in range(6):
        mask = np.asarray(Image.open(f"out/{number}_mask.png"))
        assert mask[8, 8] == 0 and mask[8, 30] == 255
    write(600, 1800)  # brighter ones are shown as those that are there
    run_download("--masks", "images", "masks", "--into", "test")
    assert [row[8, 8, 0] for row in load_split("dataset", "test", None)] == [64] * 6
    write(7, 9, np.uint8)  # 8 bits stay as they are
    assert "grey values" not in run_download("--masks", "images", "masks", "--force", *ALL)


def test_the_window_of_a_set_is_a_range_that_it_fills():
    paths = [Path(f"{number}.tif") for number in range(4)]
    for values, window in (
        ([0, 3000], (2047.5, 4095)),  # of 12 bits
        ([31000, 33000], (32000, 2000)),  # CT values with an offset: little of their range
        ([-1000, 1000], (0, 2000)),
    ):
        for number, path in enumerate(paths):
            pixels = np.kron(np.int32([values]), np.ones((30, 15), np.int32))
            pixels[:number, 0] = 65000  # up to three hot pixels
            tifffile.imwrite(path, pixels)
        assert measure_window(paths) == pytest.approx(window)


# ---- predict.py finds the files of a case again ----------------------------------------------

AFFINE = np.diag([-1.0, -1, 3, 1])
MODALITIES = ("t2", "flair", "t1ce", "t1")
SHOWING = "t1ce"  # the only one that the network looks at


@pytest.fixture
def cases():
    """Two cases of BraTS and weights for them; {case: mask of what the channel shows}."""
    save_model("{id}_{channel}.nii")
    masks, rng = {}, np.random.default_rng(0)
    for number, case in enumerate(("B_1", "B_2")):
        masks[case] = np.zeros((8, 6, 5), bool)
        masks[case][1 + number : 4, 2:5, 1:3] = True
        Path("B", case).mkdir(parents=True)
        for name in (*MODALITIES, "seg"):
            voxels = rng.integers(0, 900, (8, 6, 5), np.int16)
            voxels = masks[case] * np.int16(700) if name == SHOWING else voxels
            write_nifti(f"B/{case}/{case}_{name}.nii", voxels, AFFINE)
    return masks


def predict_case(*inputs):
    """{case: its mask, bool} of what predict.py writes, where the volume lies."""
    shutil.rmtree("out", ignore_errors=True)
    assert_done(run("predict.py", *inputs, "--output", "out"))
    written = {path.name[:-12]: nibabel.load(path) for path in Path("out").glob("*_mask.nii.gz")}
    assert all((mask.affine == AFFINE).all() for mask in written.values())
    return {name: np.asarray(mask.dataobj) > 0 for name, mask in written.items()}


def save_model(pattern, channels=MODALITIES):
    model = brightness_model(None, n_channels=len(channels), channels=channels, pattern=pattern)
    with torch.no_grad():
        model.down1.conv1.weight[0, :, 1, 1] = torch.tensor([name == SHOWING for name in channels])
    torch.save(model.state_dict(), "best_model.pth")


def test_cases_are_found_by_a_folder_a_file_or_a_pattern(cases):
    for inputs, count in (
        (["B/B_1/B_1_t1.nii", "B/B_1/B_1_t1ce.nii"], 1),
        (["B/B_1/{id}_{channel}.nii", "B/B_1"], 1),
        (["B"], 2),
        (["B/{id}/{id}_{channel}.nii"], 2),
    ):
        masks = predict_case(*inputs)
        assert sorted(masks) == ["B_1", "B_2"][:count]
        for case, mask in masks.items():
            assert_array_equal(mask, cases[case])
    volumes = [nibabel.load(f"B/B_1/B_1_{name}.nii").dataobj for name in MODALITIES]
    write_nifti("four.nii.gz", np.stack(volumes, -1), AFFINE)  # all channels in one file
    assert_array_equal(predict_case("four.nii.gz")["four"], cases["B_1"])
    write_nifti("two.nii.gz", np.stack(volumes[:2], -1), AFFINE)
    words = ["two.nii.gz", "2 channels", ", ".join(MODALITIES), "{id}_{channel}.nii"]
    assert_refused(run("predict.py", "two.nii.gz"), *words)


def test_a_missing_channel_is_named(cases):
    Path("B/B_2/B_2_flair.nii").unlink()
    for given in ("B/B_2/B_2_t1.nii", "B"):
        assert_refused(run("predict.py", given), "B/B_2/B_2_flair.nii")
    Path("flat").mkdir()
    for path in Path("B").glob("*/*.nii"):
        path.rename(Path("flat", path.name))
    assert_refused(run("predict.py", "flat"), "flat/B_2_flair.nii")
    assert predict_case("flat/B_1_t1.nii").keys() == {"B_1"}  # another case is whole


def test_cases_of_equal_files_are_called_as_their_folders(cases):
    """In the table too, which counts what each of them has."""
    for path in Path("B").glob("*/*.nii"):
        path.rename(path.with_name(path.name.rpartition("_")[2]))
    one_channel, pattern = brightness_model(None, n_channels=1), "B/{id}/{channel}.nii"
    for given in (pattern, f"B/{{id}}/{SHOWING}.nii"):
        assert predict_case(given).keys() == cases.keys()
        rows = csv.DictReader(Path("out/predictions.csv").read_text("utf-8-sig").splitlines())
        counted = {row["image"]: int(row["pixels"]) for row in rows}
        assert counted == {name: mask.sum() for name, mask in cases.items()}
        torch.save(one_channel.state_dict(), "best_model.pth")
    assert_refused(run("predict.py", pattern), pattern)  # weights that know no channels
    save_model("{channel}.nii")
    assert predict_case("B/B_1").keys() == {"B_1"}


def test_pictures_of_a_case():
    save_model("{channel}/{id}.png", ("dapi", SHOWING))
    drawn = np.zeros((20, 30), bool)
    drawn[5:12, 6:20] = True
    for name, one in {"dapi": np.full((20, 30), 200), SHOWING: np.where(drawn, 255, 0)}.items():
        Path("i", name).mkdir(parents=True)
        Image.fromarray(one.astype(np.uint8)).save(f"i/{name}/a.png")
    for given in ("i", "i/dapi/a.png"):
        predict_case(given)
        assert_array_equal(np.asarray(Image.open("out/a_mask.png")) > 0, drawn)


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
    assert "rgb.png" in session.problems[0] and ", ".join(MODALITIES) in session.problems[0]
