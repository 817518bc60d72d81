"""Tiny data sets, made here, and ways to run the scripts."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

# Before torch is imported: networks this small are faster on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from medseg.cli import run_main

ROOT = Path(__file__).resolve().parent.parent
HOME = tempfile.mkdtemp(prefix="home-")  # one for all, so that matplotlib looks for fonts once
SIZE = 48  # pixels a side of the images made here


def script(name, *arguments, cwd, timeout=120, **environment):
    """Run a script in a process of its own, without the user's SwanLab and Kaggle accounts."""
    accounts = ("SWANLAB", "KAGGLE")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(accounts)}
    return subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, arguments)],
        cwd=cwd,
        timeout=timeout,
        text=True,
        capture_output=True,
        env={**clean, "HOME": HOME, **environment},
    )


def script_here(name, *arguments, cwd):
    """As `script`, but in this process, which saves the seconds that importing PyTorch takes."""
    module = importlib.import_module(name.removesuffix(".py"))
    command, status, before = [name, *map(str, arguments)], 0, Path.cwd()
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "argv", command),
    ):
        os.chdir(cwd)
        try:
            run_main(module.main)
        except SystemExit as leaving:
            status = leaving.code
        finally:
            os.chdir(before)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def fork_script(name, *arguments, log, prepare=lambda: None):
    """Start a script in a fork of this process, which has imported PyTorch already.

    Its output goes to the file `log`. prepare() is called in the new process. Returns a
    multiprocessing.Process.
    """

    def target():
        with open(log, "w") as sys.stdout, mock.patch.object(sys, "argv", command):
            sys.stderr = sys.stdout
            prepare()
            run_main(module.main)

    module = importlib.import_module(name.removesuffix(".py"))
    command = [name, *map(str, arguments)]
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def assert_refused(result, *words):
    """Status 2 and one line on stderr with the words: how errors that users can mend look."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert str(word) in result.stderr, result.stderr


@pytest.fixture
def refused(tmp_path):
    """refused("train", *arguments, words=[...]): runs a script here, asserts that it is refused.

    Returns the line on stderr.
    """

    def check(name, *arguments, words):
        result = script_here(f"{name}.py", *arguments, cwd=tmp_path)
        assert_refused(result, *words)
        return result.stderr

    return check


def skip_pictures(monkeypatch):
    """Trainings in this process draw nothing: that would take longer than they do."""
    import train

    monkeypatch.setattr(train, "visualize_predictions", lambda *_, path, **__: path)
    monkeypatch.setattr(train, "plot_curves", lambda history, path, **__: path)


@pytest.fixture
def no_pictures(monkeypatch):
    skip_pictures(monkeypatch)


def square(x, y, side):
    """A COCO segmentation: one square polygon; it covers side * side pixels."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def write_split(folder, images, annotations=()):
    """images: {file name: PIL image}; annotations: (index of the image, segmentation) pairs."""
    folder.mkdir(parents=True)
    records = []
    for number, (name, image) in enumerate(images.items()):
        image.save(folder / name)
        width, height = image.size
        records.append({"id": number, "file_name": name, "width": width, "height": height})
    outlines = [
        {
            "id": number,
            "image_id": index,
            "category_id": 1,
            "iscrowd": 0,
            "segmentation": segmentation,
        }
        for number, (index, segmentation) in enumerate(annotations)
    ]
    categories = [{"id": 1, "name": "tumour"}]
    content = {"images": records, "categories": categories, "annotations": outlines}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def edit_annotations(folder, change):
    """Apply change(content) to the annotation file of a split."""
    path = folder / "_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_dataset(root):
    """Write root/{train,valid,test} and return root.

    6 + 4 + 4 images of noise with a bright square each, annotated as a polygon.
    """
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "valid": 4, "test": 4}.items():
        images, annotations = {}, []
        for number in range(count):
            pixels = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
            x, y = (int(value) for value in rng.integers(2, SIZE - 20, 2))
            pixels[y : y + 16, x : x + 16] = 230
            images[f"{number}_{split}.png"] = Image.fromarray(pixels)
            annotations.append((number, square(x, y, 16)))
        write_split(root / split, images, annotations)
    return root


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset")


# The flags of the smallest training there is.
SMALL = (
    *("--image-size", 32, "--n-filters", 2, "--batch-size", 2),
    *("--swanlab", "disabled", "--device", "cpu"),
)
