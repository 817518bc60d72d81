"""What a user has stays: files of theirs are not replaced, kills and damage cost nothing else.

A training that is killed at random ends as one that was left alone. A command that reads a file
damaged at random ends well, or in status 2 and one line, and changes no other file.
"""

import random
import shutil
import time
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    assert_done,
    box,
    brightness_model,
    fork_script,
    labelme,
    make_dataset,
    outcome,
    save,
    scan,
    script_here,
    shape,
    skip_pictures,
    tree,
    write_nifti,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medseg.weights import load_weights
from net import UNet

# ---- what a run may replace: what an earlier run of ours wrote -----------------------------------

FOLDER = ("dataset/test", "--output", "out")
OVERWRITE = ("--epochs", 1, *SMALL, "--skip-bad", "--overwrite", "--out", "run")
WRITTEN = {  # file: (the command that writes it)
    "x_mask.png": ("predict", "x.png"),
    "mask.png": ("predict", "x.png", "--output", "mask.png"),
    "out/0_test_overlay.jpg": ("predict", *FOLDER),
    "out/predictions.csv": ("predict", *FOLDER),
    "out/predictions.json": ("predict", *FOLDER),
    "out/predictions.coco.json": ("predict", *FOLDER, "--write", "coco"),
    "out/report.json": ("predict", *FOLDER),
    "brain_mask.nii.gz": ("predict", "brain.nii.gz"),
    "run/metrics.csv": ("train", *OVERWRITE),
    "run/predictions.png": ("train", *OVERWRITE),
    "run/skipped.txt": ("train", *OVERWRITE),
    "contact_sheet.jpg": ("data",),
    "model.onnx": ("predict", "--export", "model.onnx"),
}


@pytest.fixture
def users_place(here):
    """best_model.pth, x.png, brain.nii.gz, and dataset/ with a damaged image."""
    torch.save(brightness_model(32).state_dict(), "best_model.pth")
    scan(40, 36, 5, 5, 20).save("x.png")
    voxels = np.zeros((20, 18, 3), np.int16)
    voxels[2:15, 4:9, 1] = 900
    write_nifti("brain.nii.gz", voxels)
    make_dataset(here / "dataset")
    return here


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_what_we_write_replaces_ours_alone(users_place, refused, name):
    (command, *flags), path = WRITTEN[name], Path(name)
    if command == "train":
        Path("dataset/train/0_train.png").write_bytes(b"damaged")
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".gz":  # what some other program could have written
        write_nifti(path, np.ones((20, 20, 3), np.uint8))
    elif path.suffix in (".png", ".jpg"):
        Image.new("L", (40, 36), 255).save(path)
    else:
        path.write_text('{"folder": "mine"}')
    content, before = path.read_bytes(), set(users_place.rglob("*"))
    refused(command, *flags, words=[name])
    assert path.read_bytes() == content
    assert {own for own in users_place.rglob("*") if ".cache" not in own.parts} == before
    path.unlink()
    for _ in range(2):  # the second time over our own
        assert_done(script_here(f"{command}.py", *flags, cwd=users_place))
    assert path.read_bytes() != content


@pytest.mark.parametrize("name", ["x_mask.png", "x_prediction.png", "brain_mask.nii.gz"])
def test_a_prediction_that_was_corrected_is_the_users(users_place, refused, name):
    source = "x.png" if name.startswith("x") else "brain.nii.gz"
    assert_done(script_here("predict.py", source, cwd=users_place))
    if name.endswith(".png"):
        with Image.open(name) as image:
            pixels, text = np.array(image), PngInfo()
            text.add_text("medseg", image.text["medseg"])  # kept, as ImageMagick does
        pixels[0, 0] = 255 - pixels[0, 0]
        Image.fromarray(pixels).save(name, pnginfo=text)
    else:
        volume = nibabel.load(name)
        voxels = np.array(volume.dataobj)
        voxels[0, 0, 0] = 1
        nibabel.save(nibabel.Nifti1Image(voxels, None, volume.header), name)  # keeps its text
    refused("predict", source, words=[name, "--output"])


# ---- kills and damaged files ---------------------------------------------------------------------


def kill_after(process, seconds):
    """Kill a process after some seconds; returns whether it was still running."""
    process.join(seconds)
    running = process.exitcode is None
    process.kill()
    process.join()
    return running


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """Trainings in forks, which save after every step."""
    data = ("--data", make_dataset(tmp_path / "dataset"), *SMALL)
    more = "--dropout channels --epochs 15 --patience 15 --save-every 0"
    torch.set_num_threads(1)  # threads do not survive a fork

    def start(out, *again):
        command = ("train.py", *data, *more.split(), "--out", out, *again)
        return fork_script(*command, log=tmp_path / "log", prepare=skip_pictures)

    calm, runs, kills, again = tmp_path / "calm", [tmp_path / "run0"], 0, ()
    began, chance = time.monotonic(), random.Random()
    assert not kill_after(start(calm), 120)
    seconds = time.monotonic() - began
    while kills < 12:
        out = runs[-1]
        if kill_after(start(out, *again), chance.uniform(0, seconds)):
            kills += 1
            for path in out.glob("*.pth"):
                load_weights(path)  # complete, whenever the kill came
            again = ("--resume",) if (out / "last.pth").exists() else ("--overwrite",)
        else:
            runs.append(tmp_path / f"run{len(runs)}")
            again = ()
    assert not kill_after(start(runs[-1], *again), 120)
    assert all(outcome(out) == outcome(calm) for out in runs)
    assert not list(tmp_path.glob("run*/.*.tmp"))


MODES = "RGB.png P.png I;16.tif F.tif CMYK.jpg RGB.bmp RGB.webp P.gif".split()
PREDICT = ("predict.py", "--device", "cpu", "--output", "out", "--model", "good/best_model.pth")
TRAIN = ("train.py", *SMALL, "--epochs", 1, "--data", "good/dataset", "--out")
IMPORT = ("download.py", "--split", 100, 0, 0, "--data", "out/data")
KINDS = {  # the file that is damaged, and the command that reads it
    **{f"good/pictures/{mode}": (*PREDICT, "good/pictures") for mode in MODES},
    "good/scan.nii": (*PREDICT, "good/scan.nii"),
    "good/best_model.pth": (*PREDICT, "good/pictures/RGB.png"),
    "good/run/last.pth": ("train.py", "--resume", "--out", "out", "--epochs", 2),
    "good/dataset/train/_annotations.coco.json": (*TRAIN, "out"),
    "good/data.zip": ("download.py", "--zip", "good/data.zip", "--data", "out/data"),
    "good/lm/a.json": (*IMPORT, "--labelme", "good/lm"),
    "good/pairs/1_mask.png": (*IMPORT, "--masks", "good/pairs/{id}.png", "good/pairs/{id}_mask.*"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)
        make_dataset(Path("good/dataset"))
        torch.save(UNet(n_filters=2, image_size=32).state_dict(), "good/best_model.pth")
        pixels = np.random.default_rng(0).integers(0, 255, (40, 50), np.uint8)
        for name in MODES:
            picture = Image.fromarray(pixels).convert(name.partition(".")[0])
            save(picture, f"good/pictures/{name}")
        write_nifti(Path("good/scan.nii"), pixels[..., None].astype(np.int16))
        with zipfile.ZipFile("good/data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path("good/dataset").rglob("*.*")):
                archive.write(path, path.relative_to("good/dataset"))
        labelme("a", [shape("x", box(1, 2, 9))], folder="good/lm")
        for number in range(3):
            save(Image.fromarray(pixels), f"good/pairs/{number}.png")
            save(Image.fromarray(pixels // 200 * 255), f"good/pairs/{number}_mask.png")
        assert_done(script_here(*TRAIN, "good/run", cwd=place))
    return place


def damage(content, chance):
    """Cut off, as a broken download is, or with a few bytes changed, lost or repeated."""
    content = bytearray(content)
    if chance.random() < 0.3:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.randint(1, 6)):
        start, length = chance.randrange(len(content)), chance.randint(1, 40)
        part = content[start : start + length]
        changed = chance.randbytes(len(part)), bytes(len(part)), b"", part * chance.randint(2, 20)
        content[start : start + length] = chance.choice(changed)
    return bytes(content)


def good_files(place):
    return {name: state for name, state in tree(place / "good").items() if ".cache" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("file", KINDS)
def test_damaged_files_end_in_one_line(file, place, no_pictures):
    path, (name, *arguments) = place / file, KINDS[file]
    good, statuses = path.read_bytes(), set()
    try:
        for case in range(5 if "pictures" in file else 40):
            path.write_bytes(damage(good, random.Random(f"{file} {case}")))
            shutil.rmtree(place / "out", ignore_errors=True)
            (place / "out").mkdir()
            if path.name == "last.pth":
                shutil.copy(path, place / "out")
            before = good_files(place)
            result = script_here(name, *arguments, cwd=place)
            lines = [line for line in result.stderr.splitlines() if "WARNING" not in line]
            shown = f"case {case}: {result.returncode} {result.stderr}"
            assert result.returncode == 0 or (result.returncode, len(lines)) == (2, 1), shown
            assert good_files(place) == before, shown
            statuses.add(result.returncode)
    finally:
        path.write_bytes(good)
    assert 2 in statuses
