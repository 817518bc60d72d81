"""Feed the readers damaged input: each case has to end in success, or in status 2 and one line, soon, in little memory.

    python tests/fuzz.py --cases 400                    # 2000 cases: 400 of each of the five readers
    python tests/fuzz.py images --cases 40 --seed 3

Good annotation files, images, archives, checkpoints and command lines are mutated by hypothesis. The scripts'
own main functions run in this process, which fails on a traceback, on a case of more than SECONDS, beyond
MEMORY of address space above what it started with, and on a file outside the output folder.
"""
import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from conftest import SMALL, make_dataset
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import data
import download
import predict
import train
from net import UNet

SECONDS = 20
MEMORY = 3 << 30
SPECIAL = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1e300, 1e308, float("nan"), float("inf"), "", "0", "../../escaped", "/etc/passwd",
           "C:\\escaped", "a\0b", "\ud800", "é" * 300, [], {}, [[]], [None], {"size": [10**9, 10**9], "counts": "1"}, {"counts": [10**18]}, [[0, 0, 1e9, 0, 1e9, 1e9]]]

integers = st.integers(0, 2**31)
special = st.sampled_from(SPECIAL)


def mutate_bytes(content, draw):
    """Cut, flip, overwrite, repeat or insert at a few random places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        place, length = draw(integers) % (len(content) + 1), draw(st.integers(1, 64))
        how = draw(st.sampled_from(["cut", "flip", "overwrite", "repeat", "insert", "shorten"]))
        if how == "cut":
            del content[place:]
        elif how == "flip" and content:
            content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
        elif how == "overwrite":
            content[place:place + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
        elif how == "repeat":
            content[place:place] = content[place:place + length] * draw(st.integers(1, 50))
        elif how == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=32))
        else:
            del content[place:place + length]
    return bytes(content)


def mutate_tree(value, draw, depth=0):
    """Replace, remove or repeat something somewhere in nested lists and dicts."""
    if depth < 6 and isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[draw(integers) % len(keys)]
        how = draw(st.integers(0, 9))
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, list):
            value.extend([value[key]] * draw(st.integers(1, 20)))
        else:
            value[key] = mutate_tree(value[key], draw, depth + 1)
        return value
    return copy.deepcopy(draw(special))  # a case may change it


class Ground:
    """A folder to play in: what was there before a case has to be there after it, and nothing else."""

    def __init__(self, place):
        self.place, self.out = place, place / "out"
        self.dataset = make_dataset(place / "dataset")
        torch.manual_seed(0)
        torch.save(UNet(n_filters=2, image_size=32).state_dict(), place / "best_model.pth")
        os.chdir(place)
        self.run(lambda: train.main(list(map(str, (*SMALL, "--data", self.dataset, "--epochs", 1, "--out", place / "trained")))))
        self.picture = next((self.dataset / "test").glob("*.png"))
        self.cases, self.refused = 0, 0

    def files(self):
        return {str(path): path.stat().st_size for path in self.place.rglob("*") if path.is_file() and self.out not in path.parents and ".cache" not in path.parts}

    def run(self, call):
        """Status and stderr of call(), run as a script's main."""
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                data.run(lambda: sys.exit(call()))  # download.main returns its status
            except SystemExit as leaving:
                status = leaving.code or 0
        return status, said.getvalue()

    def check(self, call, bound=SECONDS):
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        before = self.files()
        faulthandler.dump_traceback_later(bound, exit=True)  # a hang ends the whole campaign
        try:
            status, said = self.run(call)
        finally:
            faulthandler.cancel_dump_traceback_later()
        lines = [line for line in said.splitlines() if line.strip() and "it/s" not in line and not line.startswith("WARNING")]
        assert status in (0, 2), (status, said)
        assert status == 0 or len(lines) == 1, said
        assert self.files() == before, "files outside the output folder"
        self.cases += 1
        self.refused += status == 2


def annotations(ground, draw):
    """train.py and data.py on a data set with a mutated annotation file."""
    path = ground.dataset / "train" / data.ANNOTATIONS
    good = path.read_bytes()
    try:
        if draw(st.booleans()):
            content = json.loads(good)
            for _ in range(draw(st.integers(1, 3))):
                content = mutate_tree(content, draw)
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(mutate_bytes(good, draw))
        if draw(st.booleans()):
            more = ["--skip-bad"] if draw(st.booleans()) else []
            ground.check(lambda: train.main(list(map(str, (*SMALL, "--data", ground.dataset, "--epochs", 1, "--out", ground.out, *more)))))
        else:
            ground.check(lambda: with_arguments("data.py", data.main, ground.dataset, "--out", ground.out))
    finally:
        path.write_bytes(good)


def with_arguments(name, call, *arguments):
    sys.argv = [name, *map(str, arguments)]
    call()


FORMATS = {"a.png": ("PNG", "RGB"), "b.jpg": ("JPEG", "L"), "c.tif": ("TIFF", "I;16"), "d.bmp": ("BMP", "RGB"), "e.png": ("PNG", "P"),
           "f.png": ("PNG", "RGBA"), "g.tif": ("TIFF", "F"), "h.png": ("PNG", "I;16"), "i.jpg": ("JPEG", "CMYK")}


def images(ground, draw):
    """predict.py on a mutated image of each kind, alone and in a folder with a good one."""
    name = draw(st.sampled_from(sorted(FORMATS)))
    kind, mode = FORMATS[name]
    size = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0]), dtype=np.uint8)
    image = Image.fromarray(pixels.astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)))
    content = io.BytesIO()
    (image if mode in ("I;16", "F") else image.convert(mode)).save(content, kind)
    folder = ground.place / "images"
    folder.mkdir()
    try:
        (folder / name).write_bytes(mutate_bytes(content.getvalue(), draw))
        many = draw(st.booleans())
        if many:
            shutil.copy(ground.picture, folder / "good.png")
        ground.check(lambda: predict.main(list(map(str, (folder if many else folder / name, "--output", ground.out, "--device", "cpu")))))
        assert not many or (ground.out / "good_mask.png").exists()
    finally:
        shutil.rmtree(folder)


def archives(ground, draw):
    """download.py --zip on a mutated archive: its bytes, or its entries."""
    path = ground.place / "data.zip"
    entries = {str(file.relative_to(ground.dataset)): file.read_bytes() for file in sorted(ground.dataset.glob("t*/*"))}
    entries |= {f"valid/{file.name}": file.read_bytes() for file in sorted((ground.dataset / "valid").glob("*"))}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["../escaped.png", "/escaped.png", "train/../../escaped.png", "train/CON", "..\\escaped", "train/" + "d/" * 40 + "x.png",
                                     "train/\u202e.png", "train/Train.png", "valid", "x" * 250 + ".png", "test/_annotations.coco.json"]))
        entries[name] = draw(st.sampled_from([b"", b"x", bytes(5_000_000), b"{}"]))
    if draw(st.booleans()):
        entries.pop(draw(st.sampled_from(sorted(entries))))
    try:
        with zipfile.ZipFile(path, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))) as archive:
            for name, content in entries.items():
                entry = zipfile.ZipInfo(name)
                if not draw(st.integers(0, 200)):
                    entry.external_attr = 0o120777 << 16  # a link
                archive.writestr(entry, content)
        if draw(st.booleans()):
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        before = path.read_bytes()
        ground.check(lambda: download.main(["--zip", str(path), "--data", str(ground.out / "dataset")]))
        assert path.read_bytes() == before
    finally:
        path.unlink()


def checkpoints(ground, draw):
    """predict.py on mutated weights, train.py --resume on a mutated last.pth: their bytes, or what they hold."""
    resume = draw(st.booleans())
    good = ground.place / ("trained/last.pth" if resume else "best_model.pth")
    changed = ground.place / "changed"
    changed.mkdir()
    path = changed / good.name
    try:
        if draw(st.booleans()):
            path.write_bytes(mutate_bytes(good.read_bytes(), draw))
        else:
            content = dict(torch.load(good, weights_only=True))
            for _ in range(draw(st.integers(1, 3))):
                content = mutate_tree(content, draw)
            torch.save(content, path)
        before = path.read_bytes()
        if resume:
            def call():
                shutil.copy(path, ground.out / "last.pth")
                train.main(["--resume", "--epochs", "2", "--data", str(ground.dataset), "--out", str(ground.out), "--swanlab", "disabled"])
            ground.check(call)
        else:
            ground.check(lambda: predict.main([str(ground.picture), "--model", str(path), "--output", str(ground.out), "--device", "cpu"]))
        assert path.read_bytes() == before
    finally:
        shutil.rmtree(changed)


WORDS = ["", "-", "--", "0", "-1", "1", "32", "1e400", "nan", "inf", "99999999999999999999", "x", "../..", "/", "/dev/null", "/dev/full", "cuda", "cuda:99", "cpu:1", "mps", "meta",
         "é", "a b", "%s", "\ud800", "disabled", "offline", "fp32", "fp64", "dataset", "dataset/test", "best_model.pth", "_mask.png", "1.5", "x" * 5000]


def commands(ground, draw):
    """The scripts with wrong words in their command lines; what would train for long or load from outside is left out."""
    name = draw(st.sampled_from(["train", "predict", "data", "download"]))
    flags = {"train": ["--image-size", "--batch-size", "--lr", "--patience", "--n-filters", "--seed", "--device", "--precision", "--save-every", "--project", "--resume",
                       "--test-only", "--skip-bad", "--nonsense"],
             "predict": ["--model", "--threshold", "--device", "--nonsense"], "data": ["--nonsense"], "download": ["--source", "--force", "--seed", "--nonsense"]}[name]
    words = [word for _ in range(draw(st.integers(0, 3))) for word in (draw(st.sampled_from(flags)), draw(st.sampled_from(WORDS)))]
    if name == "train":
        fixed = [*map(str, SMALL), "--epochs", "1", "--data", draw(st.sampled_from(["dataset", "dataset", "nowhere", "best_model.pth", "dataset/test"])), "--out", str(ground.out)]
        ground.check(lambda: train.main([*fixed[:fixed.index("--data")], *words, *fixed[fixed.index("--data"):], "--image-size", "32", "--swanlab", "disabled"][:]))
    elif name == "predict":
        inputs = draw(st.lists(st.sampled_from([*WORDS[:20], str(ground.picture), "dataset/test", "dataset/train"]), max_size=2))
        ground.check(lambda: predict.main([*words, "--output", str(ground.out), "--", *(inputs or [str(ground.picture)])]))
    elif name == "data":
        ground.check(lambda: with_arguments("data.py", data.main, *words, draw(st.sampled_from(["dataset", "dataset/test", "best_model.pth", "nowhere", "/dev/null"])), "--out", ground.out))
    else:
        ground.check(lambda: download.main([*words, "--zip", draw(st.sampled_from(["best_model.pth", "nowhere.zip", "dataset", "/dev/null"])), "--data", str(ground.out / "dataset")]))


READERS = {reader.__name__: reader for reader in (annotations, images, archives, checkpoints, commands)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help="which; all without a name")
    parser.add_argument("--cases", type=int, default=40, help="of each reader")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        ground = Ground(Path(place).resolve())
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
        for name in args.readers or READERS:
            ground.cases = ground.refused = 0

            @seed(args.seed)
            @settings(max_examples=args.cases, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
            @given(st.data())
            def campaign(choices):
                READERS[name](ground, choices.draw)

            campaign()
            print(json.dumps({"reader": name, "cases": ground.cases, "refused": ground.refused, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}), flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
