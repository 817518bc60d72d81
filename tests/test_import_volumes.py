"""download.py --masks of NIfTI volumes and DICOM files."""

import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ALL,
    NIBABEL_DATA,
    annotations,
    assert_refused,
    grey,
    labels,
    output_of,
    photo,
    refuse_download,
    run_download,
    sample,
    save,
    script,
    stored,
    write_dicom,
    write_nifti,
)
from numpy.testing import assert_array_equal
from PIL import Image

from medseg.dicom import read_dicom
from medseg.importing import volumes
from net import UNet

THIRDS = ("--split", 34, 33, 33)


def volume(number, classes=2, name="case_{:03}"):
    """(voxels, class numbers) of a pair of volumes that is written to vi/ and vm/.

    They are cut along axis 1, into 4 slices and `number` more.
    """
    rng = np.random.default_rng(number)
    voxels = rng.integers(0, 1000, (12, 4 + number, 10)).astype(np.int16)
    numbers = rng.integers(0, classes + 1, voxels.shape).astype(np.uint8)
    numbers[:, 0] = 0  # a slice with nothing
    name = name.format(number)
    for path in (Path("vi", f"{name}_0000.nii.gz"), Path("vm", f"{name}.nii.gz")):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_nifti(path, voxels if path.parts[0] == "vi" else numbers, zooms=(1, 3, 1))
    return voxels, numbers


VOLUMES = ("--masks", "vi", "vm")


def test_several_mask_volumes_are_refused(here):
    for number in range(3):
        volume(number)
    shutil.copy("vm/case_001.nii.gz", "vm/case_001_1.nii.gz")
    words = ["case_001_0000.nii.gz: case_001.nii.gz, case_001_1.nii.gz"]
    refuse_download(*VOLUMES, *ALL, words=words)
    run_download(*VOLUMES, *ALL, "--skip-unpaired")
    assert {stem[:8] for stem in stored()} == {"case_000", "case_002"}


def test_volumes_become_slices(here):
    made = {f"case_{number:03}_0000": volume(number) for number in range(3)}
    flags = (*VOLUMES, "--window", "500", "1000", "--classes", "core, edema")
    out = run_download(*flags, *THIRDS)
    assert "pairs: 3 by the part that their names share, such as case_000_0000.nii.gz" in out
    assert "slices: 15 of 3 volumes, across axis 1" in out
    everything = np.concatenate([numbers.ravel() for _, numbers in made.values()])
    for value, name in enumerate(("core", "edema"), start=1):
        percent = 100 * (everything == value).mean()
        assert f"class {name}: value {value}, {percent:.2f} % of the pixels" in out
    seen = set()
    for split in ("train", "valid", "test"):
        masks = stored(split)
        (name,) = {stem.rpartition("_")[0] for stem in masks}  # one volume in one split
        voxels, numbers = made[name]
        seen.add(name)
        assert set(masks) == {f"{name}_z{index:03}" for index in range(voxels.shape[1])}
        for index in range(voxels.shape[1]):
            own = masks[f"{name}_z{index:03}"]
            assert set(own) == (set() if index == 0 else {"core", "edema"})
            for value, mask in enumerate((own.get("core", False), own.get("edema", False)), 1):
                assert_array_equal(numbers[:, index] == value, mask)
            with Image.open(f"dataset/{split}/{name}_z{index:03}.png") as picture:
                assert picture.mode == "L"
                wanted = (voxels[:, index] * 0.255).round()
                assert_array_equal(np.asarray(picture), wanted)
    assert seen == set(made)


def test_one_value_in_volumes_is_foreground(here):
    _, numbers = volume(0, classes=1)
    pair = ("vi/case_000_0000.nii.gz", "vm/case_000.nii.gz")
    out = run_download("--masks", *pair, "--into", "test")  # two files
    assert "class foreground: value 1" in out
    assert {image["group"] for image in annotations("test")["images"]} == {"case_000_0000"}
    got = stored("test")
    for index in range(4):
        mask = got[f"case_000_0000_z{index:03}"].get("foreground", np.zeros((12, 10), bool))
        assert_array_equal(mask, numbers[:, index] == 1)
    refuse_download("--masks", *pair, "--data", "mine", words=["1 groups", "too few", "--into"])
    refuse_download("--masks", pair[0], "vm", *ALL, words=[pair[0], "vm a folder"])
    refuse_download("--masks", pair[0], "none.nii", *ALL, words=["none.nii", "no such"])


@pytest.mark.parametrize(
    "name, flags", [("p{}/{{}}", ("--group", r"^(p\d)/")), ("sub-{}_ses-{{}}", ())]
)
def test_volumes_of_a_group_stay_in_one_split(here, name, flags):
    for number in range(6):
        volume(number, name=name.format(number % 3))
    out = run_download(*VOLUMES, *THIRDS, *flags)
    assert ("3 subjects" in out) == (not flags)
    splits = [[stem.split("_0000")[0] for stem in stored(s)] for s in ("train", "valid", "test")]
    numbers = [sorted({int(stem[-1]) for stem in stems}) for stems in splits]
    assert sorted(numbers) == [[0, 3], [1, 4], [2, 5]]
    assert len({image["group"] for image in annotations("train")["images"]}) == 1
    refuse_download(*VOLUMES, "--force", "--group", "q", words=["--group"])


def test_each_pair_of_volumes_is_opened_twice(here, monkeypatch):
    opened, open_pair = [], volumes.open_pair

    def count(image, mask, *options):
        opened.append(image.name)
        return open_pair(image, mask, *options)

    monkeypatch.setattr(volumes, "open_pair", count)
    for number in range(5):
        volume(number)
    run_download(*VOLUMES, *ALL)
    names = [f"case_{number:03}_0000.nii.gz" for number in range(5)]
    # All are opened to count the values, and again to read the slices: two are kept.
    assert sorted(opened) == sorted(2 * names)


def test_volumes_cut_in_different_directions_are_noted(here):
    for number in range(3):
        volume(number)
    voxels = np.zeros((3, 4, 5), np.int16)
    write_nifti(Path("vi/other_0000.nii.gz"), voxels + np.arange(5, dtype=np.int16))
    write_nifti(Path("vm/other.nii.gz"), voxels.astype(np.uint8))
    out = run_download(*VOLUMES, *ALL)
    assert "warning: 1 of 4 volumes" in out and "another direction" in out


IMAGE, MASK = Path("vi/case_000_0000.nii.gz"), Path("vm/case_000.nii.gz")
ZEROS = np.zeros((12, 4, 10), np.uint8)
SHIFTED = np.diag([1.0, 3, 1, 1])
SHIFTED[0, 3] = 5


def numbers(value):
    return lambda: write_nifti(MASK, ZEROS + np.float32(value), zooms=(1, 3, 1))


BAD_VOLUMES = {  # what is changed, the file that the message names
    "shape": (lambda: write_nifti(MASK, ZEROS[1:]), MASK),
    "affine": (lambda: write_nifti(MASK, ZEROS, SHIFTED), MASK),
    "4-D": (lambda: shutil.copy(NIBABEL_DATA / "example4d.nii.gz", IMAGE), IMAGE),
    "fractions": (numbers(0.5), MASK),
    "negative": (numbers(-1), MASK),
    "large": (numbers(65536), MASK),
    "many values": (lambda: shutil.copy(IMAGE, MASK), MASK),
    "cut": (lambda: IMAGE.write_bytes(IMAGE.read_bytes()[:300]), IMAGE),
    "a picture among volumes": (lambda: save(photo(), "vi/a.png"), "vi/a.png"),
    "a mask that is a picture": (lambda: save(photo(), "vm/a.png"), "vm/a.png"),
    "DICOM among volumes": (lambda: shutil.copy(sample("CT_small.dcm"), "vi/a.dcm"), "vi/a.dcm"),
    "no mask": (lambda: volume(1) and Path("vm/case_001.nii.gz").unlink(), "case_001_0000.nii.gz"),
}


@pytest.mark.parametrize("case", BAD_VOLUMES)
def test_bad_volumes_are_one_line(here, case):
    volume(0)
    volume(2)
    change, name = BAD_VOLUMES[case]
    change()
    line = refuse_download(*VOLUMES, *ALL, words=[name])
    assert case not in ("shape", "affine") or str(IMAGE) in line


def dicom_pair():
    """The mask, bool (2, 3), of a DICOM file in di/ and a picture in dm/."""
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    save(Image.fromarray(mask), "dm/scan.png")
    Path("di").mkdir()
    write_dicom(Path("di/scan.dcm"))  # 0 100 150 / 200 300 1000
    return mask


DICOM = ("--masks", "di", "dm", *ALL)


def test_dicom_images_and_a_window(here):
    mask = dicom_pair()
    run_download(*DICOM, "--window", "150", "200")  # from 50 to 250
    with Image.open("dataset/train/scan.png") as picture:
        by_hand = [[0, 64, 128], [191, 255, 255]]
        assert_array_equal(np.asarray(picture.convert("L")), by_hand)
    assert_array_equal(stored()["scan"]["foreground"], mask)
    run_download(*DICOM, "--force")  # the range of all its values
    with Image.open("dataset/train/scan.png") as picture:
        assert picture.convert("L").getpixel((1, 0)) == round(25.5)


def test_dicom_files_without_a_suffix(here):
    shutil.copy(sample("CT_small.dcm"), "one")
    mask = labels(3, size=(128, 128))
    for name in ("IM7", "1.2.840.5", "1.2.840.12.dcm"):
        Path("di").mkdir(exist_ok=True)
        shutil.copy("one", f"di/{name}")
        save(grey([0, 1])(mask), f"dm/{name.removesuffix('.dcm')}.tif")
    Path("di/README").write_text("not an image")
    assert "pairs: 3 by name" in run_download(*DICOM)
    got = stored()
    assert set(got) == {"IM7", "1.2.840.5", "1.2.840.12"}
    for name, masks in got.items():
        assert_array_equal(masks["foreground"], mask == 1)
        with Image.open(f"dataset/train/{name}.png") as picture:
            assert_array_equal(np.asarray(picture.convert("L")), read_dicom("one")[0])
    shutil.copytree("dm", "di", dirs_exist_ok=True)  # images and masks in one folder
    run_download("--masks", "di", "di", "--into", "test")
    assert set(stored("test")) == set(got)


def test_bad_dicom_is_one_line(here):
    dicom_pair()
    save(Image.new("1", (9, 9), 1), "dm/scan.png")
    refuse_download(*DICOM, words=["scan.png", "9x9", "di/scan.dcm", "3x2"])
    shutil.copy(sample("SC_rgb_rle_2frame.dcm"), "di/scan.dcm")
    refuse_download(*DICOM, words=["di/scan.dcm", "2 frames"])
    Path("di/scan.dcm").write_bytes(Path(sample("CT_small.dcm")).read_bytes()[:9000])
    refuse_download(*DICOM, words=["di/scan.dcm", "cut short"])
    write_nifti(Path("dm/scan.nii"), np.zeros((3, 2, 1), np.uint8))
    refuse_download(*DICOM, words=["dm/scan.nii is a volume", "scan.dcm is not"])


def test_windows_that_are_refused(here):
    dicom_pair()
    save(photo(size=(3, 2)), "di/scan.png")
    Path("di/scan.dcm").unlink()
    refuse_download(*DICOM, "--window", "40", "80", words=["di", "no DICOM"])


@pytest.mark.parametrize("library, folder", [("pydicom", "di"), ("nibabel", "vi")])
def test_missing_libraries_are_one_line(here, monkeypatch, library, folder):
    dicom_pair()
    volume(0)
    volume(1)
    monkeypatch.setitem(sys.modules, library, None)
    flags = DICOM if library == "pydicom" else (*VOLUMES, *ALL)
    refuse_download(*flags, words=[f"{folder}/", f"install {library}`"])


def four(number, times=3):
    """(voxels, class numbers), written to vi/ and vm/ as volumes in time."""
    rng = np.random.default_rng(number)
    voxels = rng.integers(0, 1000, (12, 10, 4, times)).astype(np.int16)
    numbers = rng.integers(0, 2, voxels.shape).astype(np.uint8)
    for folder, array in (("vi", voxels), ("vm", numbers)):
        Path(folder).mkdir(exist_ok=True)
        write_nifti(Path(folder, f"c{number}.nii.gz"), array, zooms=(1, 1, 3, 1))
    return voxels, numbers


def test_four_axes_are_volumes_in_time_or_channels(here):
    made = [four(number) for number in range(2)]
    refuse_download(*VOLUMES, *ALL, words=["vi/c0.nii.gz", "--channels", "--time"])
    run_download(*VOLUMES, *ALL, "--time")
    masks = stored()
    assert len(masks) == 2 * 3 * 4
    for number, (voxels, numbers) in enumerate(made):
        low, high = np.percentile(voxels, [0.5, 99.5])
        for index in range(12):
            time, z = divmod(index, 4)
            mask = masks[f"c{number}_z{index:03}"]["foreground"]
            assert_array_equal(mask, numbers[..., z, time] == 1)
            shown = (voxels[..., z, time].clip(low, high) - low) * 255 / (high - low)
            with Image.open(f"dataset/train/c{number}_z{index:03}.png") as picture:
                assert_array_equal(np.asarray(picture), shown.round())
    for number, (_, numbers) in enumerate(made):
        write_nifti(Path(f"vm/c{number}.nii.gz"), numbers[..., 0], zooms=(1, 1, 3))
    refuse_download(*VOLUMES, *ALL, "--time", "--force", words=["vm/c0.nii.gz", "12 x 10 x 4 x 1"])
    run_download(*VOLUMES, *ALL, "--force", "--channels", "t1,t2,flair")
    assert annotations("train")["info"]["channels"] == ["t1", "t2", "flair"]
    for number, (_, numbers) in enumerate(made):
        for z in range(4):
            mask = stored()[f"c{number}_z{z:03}"]["foreground"]
            assert_array_equal(mask, numbers[..., z, 0] == 1)


@pytest.mark.parametrize("step, refused", [(1.0000153, False), (0.99, False), (1.3, True)])
def test_numbers_that_are_nearly_whole_are_rounded_with_a_warning(here, step, refused):
    _, numbers = volume(0)
    volume(1)
    write_nifti(MASK, numbers.astype(np.float32) * np.float32(step), zooms=(1, 3, 1))
    if refused:
        return refuse_download(*VOLUMES, *ALL, words=[MASK])
    out = run_download(*VOLUMES, *ALL)
    (line,) = (line for line in out.splitlines() if line.startswith("warning"))
    assert "1 of 2" in line and str(step)[:8] in line and MASK.name in line
    for index in range(1, 4):
        masks = stored()[f"case_000_0000_z{index:03}"]
        for value, name in ((1, "1"), (2, "2")):
            assert_array_equal(masks[name], numbers[:, index] == value)


def test_slices_around_a_slice_are_channels_at_import_and_prediction(here):
    """The written slices have those beside them, and predict.py puts them together alike."""
    for number in range(3):
        volume(number, classes=1)
    for folder in ("p", "q"):
        save(photo(1), f"{folder}/1.png")
    refuse_download("--masks", "p", "q", "--context", "1", words=["--context"])
    run_download(*VOLUMES, *THIRDS, "--context", "1", "--window", "500", "1000")
    split, name = "test", min(stored("test")).rpartition("_")[0]
    voxels = nibabel.load(f"vi/{name}.nii.gz").get_fdata()
    shown = [(voxels[:, index] * 0.255).round() for index in range(voxels.shape[1])]
    last = len(shown) - 1
    for index in range(len(shown)):
        pixels = np.asarray(Image.open(f"dataset/{split}/{name}_z{index:03}.png"))
        beside = [shown[place] for place in (max(index - 1, 0), index, min(index + 1, last))]
        assert_array_equal(pixels, np.stack(beside, 2))
    info = {"image_size": None, "window": (500, 1000), "context": 1}
    model = UNet(3, 1, 2, depth=1, **info)
    torch.nn.init.constant_(model.outc.bias, -0.1)
    torch.save(model.state_dict(), "three.pth")
    flags = "--model three.pth --precision fp32 --threshold 0.45 --write probability".split()
    output_of("predict.py", f"vi/{name}.nii.gz", *flags, "--output", "whole", cwd=here)
    output_of("predict.py", f"dataset/{split}", *flags, "--output", "slices", cwd=here)
    whole = nibabel.load(f"whole/{name}_probability.nii.gz").get_fdata()
    assert whole.std() > 0
    for index in range(len(shown)):
        alone = np.asarray(Image.open(f"slices/{name}_z{index:03}_probability.png")) / 65535
        assert np.abs(whole[:, index] - alone).max() < 1e-4
    Image.fromarray(pixels[..., 0]).save("grey.png")
    assert_refused(script("predict.py", "grey.png", *flags, cwd=here), "grey.png", "channels")
