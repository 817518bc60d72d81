"""Images of several channels, modalities among them: from their files to masks and reports."""

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
    refuse_download,
    run_download,
    save,
    script_here,
    square,
    write_split,
)
from PIL import Image

import net
from data import Batches, Order, Transform, count_channels, load_split
from medseg.augment import augment, count_draws
from medseg.images import measure_window
from medseg.normalization import normalize

pytestmark = pytest.mark.usefixtures("here")

run = partial(script_here, cwd=".")
SIDE = 48
LAYOUT = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}


class Channels(NamedTuple):
    """Pixels (H, W, C) that are saved as a TIFF file."""

    pixels: np.ndarray

    @property
    def size(self):
        return self.pixels.shape[1::-1]

    def save(self, path):
        tifffile.imwrite(path, self.pixels, **LAYOUT)


def channel_image(seed):
    """(Channels of seven, corner of the square): channel 5 shows it, the others noise."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (SIDE, SIDE, 7), np.uint8)
    pixels[..., 5] = generator.integers(60, 100, (SIDE, SIDE))
    x, y = generator.integers(4, SIDE - 20, 2).tolist()
    pixels[y : y + 16, x : x + 16, 5] += 90
    return Channels(pixels), (x, y)


def channel_set(train=24):
    """set/: seven channels as it would be anybody's, for nothing records how many."""
    for number, (split, count) in enumerate({"train": train, "valid": 6, "test": 8}.items()):
        made = [channel_image(1000 * number + index) for index in range(count)]
        images = {f"{index}.tif": image for index, (image, _) in enumerate(made)}
        outlines = [(index, square(*corner, 16)) for index, (_, corner) in enumerate(made)]
        write_split(Path("set", split), images, outlines)


def test_a_data_set_has_as_many_channels_as_its_images():
    channel_set(2)
    assert count_channels("set", 3) == count_channels("set", 7) == 7
    with pytest.raises(ValueError, match="--n-channels 5"):
        count_channels("set", 5)
    rows, pixels = load_split("set", "test", SIDE, n_channels=7), channel_image(2002)[0].pixels
    np.testing.assert_array_equal(rows[2, ..., :7], pixels)
    images, masks = next(iter(Batches(rows, Order(8), transform=Transform(7))))
    assert images.shape == (8, 7, SIDE, SIDE) and masks.sum() == 8 * 16 * 16
    expected = (pixels / 255 - 0.449) / 0.226
    np.testing.assert_allclose(images[2].permute(1, 2, 0), expected, atol=1e-5)


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
    noise = torch.ones(4, 5, 6, 6)
    noisy, _ = augment(images, masks, draws, {"noise": 0.3}, noise=noise)
    torch.testing.assert_close(noisy[:, :, 0, 0], 1 + 0.3 * draws[:, :5])
    pixels = torch.full((1, 2, 2, 4), 100, dtype=torch.uint8)
    half = torch.tensor([[0.0, 1.0, 0.5, 0.25]])  # exponents 1 / 2, 2, 1, 1 / sqrt(2)
    darker, _ = augment(normalize(pixels), masks[:1, :, :2, :2], half, {"gamma": 1.0})
    shown = darker[0, :, 0, 0] * 0.226 + 0.449
    expected = [(100 / 255) ** power for power in (0.5, 2, 1, 0.5**0.5)]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_grey_values_of_a_set_are_shown_alike():
    """A hot pixel in every second image of 12 bits does not darken it, here and in predict.py."""

    def write(left, right, dtype):
        for number in range(6):
            values = np.full((40, 40), left, dtype)
            values[:, 20:] = right
            if dtype == np.uint16 and number % 2:
                values[3, 3] = 65000
            save(Image.fromarray(values), f"images/{number}.png")
            save(Image.fromarray(np.uint8(255 * (values == right))), f"masks/{number}.png")

    write(400, 1200, np.uint16)
    assert "400 to 1200" in run_download("--masks", "images", "masks", "--split", 50, 50, 0)
    for split in ("train", "valid"):
        assert annotations(split)["info"]["window"] == [800, 800]
        rows = load_split("dataset", split, None)
        assert all(row[8, 8, 0] == 0 and row[8, 30, 0] == 255 for row in rows)
    into = ("--masks", "images", "masks", "--into", "test")
    refuse_download(*into, "--window", "800", "1600", words=["--window 800 800"])
    run_download(*into, "--window", "800", "1600", "--data", "wide")
    assert [row[8, 8, 0] for row in load_split("wide", "test", None)] == [64] * 6
    torch.save(brightness_model(window=(800, 800)).state_dict(), "model.pth")
    for number in (0, 1):
        options = f"--model model.pth --device cpu --output {number}.png"
        assert_done(run("predict.py", f"images/{number}.png", *options.split()))
        mask = np.asarray(Image.open(f"{number}.png"))
        assert mask[8, 8] == 0 and mask[8, 30] == 255
    write(600, 1800, np.uint16)  # brighter ones are shown as those that are there
    run_download(*into)
    assert [row[8, 8, 0] for row in load_split("dataset", "test", None)] == [64] * 6
    write(7, 9, np.uint8)  # 8 bits stay as they are
    assert "grey values" not in run_download("--masks", "images", "masks", "--force", *ALL)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ([0, 3000], (2047.5, 4095)),  # of 12 bits
        ([700, 40000], (32767.5, 65535)),  # of 16
        ([0, 200], (127.5, 255)),  # 8 bits, stored as 16
        ([31000, 33000], (32000, 2000)),  # CT values with an offset: little of their range
    ],
)
def test_the_window_of_a_set_is_a_range_that_it_fills(values, window):
    paths = [Path(f"{number}.png") for number in range(4)]
    for number, path in enumerate(paths):
        pixels = np.kron(np.uint16([values]), np.ones((30, 15), np.uint16))
        pixels[:number, 0] = 65000  # up to three hot pixels
        save(Image.fromarray(pixels), path)
    assert measure_window(paths) == pytest.approx(window)


# ---------------------------------------------------------------- modalities, patients

AFFINE = np.array([[-1.0, 0, 0, 12], [0, -1, 0, 9], [0, 0, 3, -5], [0, 0, 0, 1]])
MODALITIES = ("flair", "t1", "t1ce", "t2")
REGIONS = {"background": 0, "whole tumor": [1, 2, 4], "tumor core": [1, 4], "enhancing": 4}
NETWORK = "--n-filters 8 --depth 2 --image-size 24 --batch-size 8 --norm batch --prior 0.1"
TRAIN = f"{NETWORK} --schedule cosine --lr 0.01 --epochs 12 --repeat 4 --device cpu".split()


def learn(data, *flags):
    """Import with these flags, and train as the import says."""
    printed = run_download("--data", data, *flags)
    classes = ["--classes", "each"] if "--classes each" in printed else []
    assert_done(run("train.py", "--data", data, *TRAIN, "--out", f"runs/{data}", *classes))


def predict(data, *arguments):
    """{file name: Path} of what predict.py writes with the weights of a data set."""
    model = ["--model", f"runs/{data}/best_model.pth", "--output", f"out/{data}"]
    assert_done(run("predict.py", *arguments, *model))
    return {path.name: path for path in Path(f"out/{data}").iterdir()}


def report(data):
    """report.json of the test split."""
    return json.loads(predict(data, f"{data}/test")["report.json"].read_text())


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


@pytest.mark.slow  # half a minute of training
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
    words = ["BraTS20_Training_355", "--skip-unpaired"]
    refuse_download("--masks", images, "D/{id}/{id}_seg.nii", *flags, words=words)
    learn("brats", "--masks", images, "D/{id}/*_{seg,Segm}.nii", *flags)
    splits = [annotations(split, "brats") for split in ("train", "valid", "test")]
    groups = [{image["group"] for image in split["images"]} for split in splits]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 6  # none is in two splits
    assert splits[0]["info"]["channels"] == [*MODALITIES]
    scores = report("brats")
    assert scores["channels"] == [*MODALITIES]
    assert set(scores["per_group"]) == groups[2]
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
    refuse_download(*flags, words=["BRATS_001.nii.gz", "--channels", "--time"])
    learn("msd", *flags, "--channels", "FLAIR,T1w,t1gd,T2w", "--split", 50, 25, 25)
    assert report("msd")["scores"]["dice"] > 0.8
    assert dice(read(predict("msd", "imagesTs")["BRATS_005_mask.nii.gz"]) > 0, labels > 0) > 0.8
