"""Tiny data sets, made here, and the scripts run as a person runs them."""
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are faster on one core; before torch is imported

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
HOME = tempfile.mkdtemp(prefix="home-")  # one for all, so that matplotlib looks for fonts once
SIZE = 48  # pixels a side of the images made here


def script(name, *arguments, cwd, timeout=120, **environment):
    """Run a script of the project in a process of its own; SwanLab and Kaggle find no account there."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SWANLAB", "KAGGLE"))}
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], cwd=cwd, timeout=timeout, text=True,
                          capture_output=True, env={**clean, "HOME": HOME, **environment})


def assert_refused(result, *words):
    """Status 2 and one line on stderr that holds the words: what the README promises for what the user can mend."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert str(word) in result.stderr


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused("train", *arguments, words=[...]): as `assert_refused`, in this process, which takes a twentieth of the time."""
    def check(name, *arguments, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as leaving:
            importlib.import_module("data").run(module.main)
        said = capsys.readouterr()
        assert leaving.value.code == 2
        assert len(said.err.strip().splitlines()) == 1, said.err
        for word in words:
            assert str(word) in said.err, said.err
    return check


def square(x, y, side):
    """A COCO polygon, and the area it covers, `side` squared."""
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def write_split(folder, images, annotations=()):
    """images: {file name: PIL image}; annotations: (index of the image, segmentation) pairs."""
    folder.mkdir(parents=True)
    records = []
    for number, (name, image) in enumerate(images.items()):
        image.save(folder / name)
        records.append({"id": number, "file_name": name, "width": image.width, "height": image.height})
    content = {"images": records, "categories": [{"id": 1, "name": "tumour"}],
               "annotations": [{"id": number, "image_id": index, "category_id": 1, "iscrowd": 0, "segmentation": segmentation}
                               for number, (index, segmentation) in enumerate(annotations)]}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def edit_annotations(folder, change):
    """Apply change(content) to the annotation file of a split."""
    path = folder / "_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def make_dataset(root):
    """root/{train,valid,test}: 6 + 4 + 4 noisy images with a bright square each, annotated as a polygon; returns root."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "valid": 4, "test": 4}.items():
        images, annotations = {}, []
        for number in range(count):
            pixels = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
            x, y = (int(value) for value in rng.integers(2, SIZE - 20, 2))
            pixels[y:y + 16, x:x + 16] = 230
            images[f"{number}_{split}.png"] = Image.fromarray(pixels)
            annotations.append((number, square(x, y, 16)))
        write_split(root / split, images, annotations)
    return root


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset")


# The flags of the smallest training there is.
SMALL = ("--image-size", 32, "--n-filters", 2, "--batch-size", 2, "--swanlab", "disabled", "--device", "cpu")
