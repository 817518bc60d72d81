"""Give the scripts damaged input: each case ends in success, or in status 2 and one line.

    python tools/fuzz.py --cases 400                    # 2400 cases: 400 of each of six readers
    python tools/fuzz.py images --cases 40 --seed 3

Good annotation files, images, archives, checkpoints, command lines and files of other tools are
mutated by hypothesis. The scripts' main functions run in this process. It fails on a traceback, on
a case that takes more than SECONDS, on MEMORY more address space than it started with, and on a
change to a file outside the output folder.
"""

import base64
import copy
import faulthandler
import functools
import gzip
import io
import json
import random
import resource
import shutil
import tempfile
import zipfile
from pathlib import Path

import harness  # noqa: F401  from where the scripts and the helpers are found
import numpy as np
import torch
from helpers import SMALL, assert_done, make_dataset, script_here
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from medseg.cli import ArgumentParser
from medseg.coco import ANNOTATIONS
from net import UNet

SECONDS = 20
MEMORY = 3 << 30
SPECIAL = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30),
    *(0.5, -1e300, 1e308, float("nan"), float("inf")),
    *("", "0", "../../escaped", "/etc/passwd", "C:\\escaped", "a\0b", "\ud800", "é" * 300),
    *([], {}, [[]], [None], {"size": [10**9, 10**9], "counts": "1"}, {"counts": [10**18]}),
    [[0, 0, 1e9, 0, 1e9, 1e9]],
]

integers = st.integers(0, 2**31)
special = st.sampled_from(SPECIAL)


# ---- mutations -------------------------------------------------------------------------------

CHANGES = ["cut", "flip", "overwrite", "repeat", "insert", "shorten"]
FILLERS = [b"\0", b"\xff", b"\x7f", b"\x80"]


def mutate_bytes(content, draw):
    """Cut, flip, overwrite, repeat or insert at a few random places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        place, length = draw(integers) % (len(content) + 1), draw(st.integers(1, 64))
        change = draw(st.sampled_from(CHANGES))
        if change == "cut":
            del content[place:]
        elif change == "flip" and content:
            content[place % len(content)] ^= 1 << draw(st.integers(0, 7))
        elif change == "overwrite":
            content[place : place + length] = draw(st.sampled_from(FILLERS)) * length
        elif change == "repeat":
            part = content[place : place + length]
            content[place:place] = part * draw(st.integers(1, 50))
        elif change == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=32))
        else:
            del content[place : place + length]
    return bytes(content)


def mutate_tree(value, draw, depth=0):
    """Replace, remove or repeat something somewhere in nested lists and dicts."""
    if depth < 6 and isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[draw(integers) % len(keys)]
        change = draw(st.integers(0, 9))
        if change == 0:
            del value[key]
        elif change == 1 and isinstance(value, list):
            value.extend([value[key]] * draw(st.integers(1, 20)))
        else:
            value[key] = mutate_tree(value[key], draw, depth + 1)
        return value
    return copy.deepcopy(draw(special))  # the case may change what it is given


def mutate_tree_often(value, draw):
    for _ in range(draw(st.integers(1, 3))):
        value = mutate_tree(value, draw)
    return value


# ---- running a case --------------------------------------------------------------------------


class Ground:
    """The folder in which the cases run; a case may change nothing but its folder out/."""

    def __init__(self, place):
        self.place, self.out = place, place / "out"
        self.dataset = make_dataset(place / "dataset")
        torch.manual_seed(0)
        torch.save(UNet(n_filters=2, image_size=32).state_dict(), place / "best_model.pth")
        trained = ("--data", self.dataset, "--epochs", 1, "--out", place / "trained")
        assert_done(script_here("train.py", *SMALL, *trained, cwd=place))
        self.picture = next((self.dataset / "test").glob("*.png"))
        self.cases, self.refused = 0, 0

    def files(self):
        """{path: size} of every file that a case must leave alone."""
        return {
            str(path): path.stat().st_size
            for path in self.place.rglob("*")
            if path.is_file() and self.out not in path.parents and ".cache" not in path.parts
        }

    def check(self, name, *arguments, prepare=lambda: None):
        """Run the script `name` with an empty out/, after prepare(), and check how it ends."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        prepare()
        before = self.files()
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # a hang ends the whole campaign
        try:
            result = script_here(f"{name}.py", *arguments, cwd=self.place)
        finally:
            faulthandler.cancel_dump_traceback_later()
        status, said = result.returncode, result.stderr
        lines = [line for line in said.splitlines() if is_message(line)]
        assert status in (0, 2), (status, said)
        assert status == 0 or len(lines) == 1, said
        assert self.files() == before, "files outside the output folder"
        self.cases += 1
        self.refused += status == 2


def is_message(line):
    """Whether a line on stderr is more than a progress bar or a warning."""
    return line.strip() and "it/s" not in line and not line.startswith("WARNING")


# ---- the readers -----------------------------------------------------------------------------


def annotations(ground, draw):
    """train.py and data.py on a data set with a mutated annotation file."""
    path = ground.dataset / "train" / ANNOTATIONS
    good = path.read_bytes()
    try:
        if draw(st.booleans()):
            path.write_text(json.dumps(mutate_tree_often(json.loads(good), draw)))
        else:
            path.write_bytes(mutate_bytes(good, draw))
        if draw(st.booleans()):
            more = ["--skip-bad"] if draw(st.booleans()) else []
            command = (*SMALL, "--data", ground.dataset, "--epochs", 1, "--out", ground.out)
            ground.check("train", *command, *more)
        else:
            ground.check("data", ground.dataset, "--out", ground.out)
    finally:
        path.write_bytes(good)


FORMATS = """png PNG RGB, jpg JPEG L, tif TIFF I;16, bmp BMP RGB, png PNG P, png PNG RGBA
tif TIFF F, png PNG I;16, jpg JPEG CMYK, ppm PPM RGB, pgm PPM I, webp WEBP RGB, gif GIF P"""
FORMATS = [line.split() for line in FORMATS.replace("\n", ", ").split(", ")]
DTYPES = {"I;16": np.uint16, "F": np.float32}  # of the modes that are not 8 bits


def images(ground, draw):
    """predict.py on a mutated image of each kind, alone and in a folder with a good one."""
    suffix, file_format, mode = draw(st.sampled_from(FORMATS))
    size, name = (draw(st.integers(1, 90)), draw(st.integers(1, 90))), f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    image = Image.fromarray(pixels.astype(DTYPES.get(mode, np.uint8)))
    if mode not in DTYPES:
        image = image.convert(mode)
    content = io.BytesIO()
    image.save(content, file_format)
    folder = ground.place / "images"
    folder.mkdir()
    try:
        (folder / name).write_bytes(mutate_bytes(content.getvalue(), draw))
        many = draw(st.booleans())
        if many:
            shutil.copy(ground.picture, folder / "good.png")
        given = folder if many else folder / name
        ground.check("predict", given, "--output", ground.out, "--device", "cpu")
        assert not many or (ground.out / "good_mask.png").exists()
    finally:
        shutil.rmtree(folder)


BAD_ENTRIES = [
    *("../escaped.png", "/escaped.png", "train/../../escaped.png", "..\\escaped", "train/CON"),
    *("train/" + "d/" * 40 + "x.png", "train/\u202e.png", "train/Train.png", "valid"),
    *("x" * 250 + ".png", "test/_annotations.coco.json"),
]
COMPRESSIONS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


def write_archive(path, entries, draw):
    with zipfile.ZipFile(path, "w", draw(st.sampled_from(COMPRESSIONS))) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(name)
            if not draw(st.integers(0, 200)):
                entry.external_attr = 0o120777 << 16  # a link
            archive.writestr(entry, content)


def archives(ground, draw):
    """download.py --zip on a mutated archive: its bytes, or its entries."""
    path = ground.place / "data.zip"
    files = sorted(ground.dataset.glob("t*/*")) + sorted(ground.dataset.glob("valid/*"))
    entries = {str(file.relative_to(ground.dataset)): file.read_bytes() for file in files}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(BAD_ENTRIES))
        entries[name] = draw(st.sampled_from([b"", b"x", bytes(5_000_000), b"{}"]))
    if draw(st.booleans()):
        entries.pop(draw(st.sampled_from(sorted(entries))))
    try:
        write_archive(path, entries, draw)
        if draw(st.booleans()):
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        before = path.read_bytes()
        ground.check("download", "--zip", path, "--data", ground.out / "dataset")
        assert path.read_bytes() == before
    finally:
        path.unlink()


def checkpoints(ground, draw):
    """predict.py on mutated weights, train.py --resume on a mutated last.pth.

    Either their bytes are mutated, or what they hold.
    """
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
            torch.save(mutate_tree_often(content, draw), path)
        before = path.read_bytes()
        if resume:
            command = ("--resume", "--epochs", 2, "--data", ground.dataset, "--out", ground.out)
            prepare = functools.partial(shutil.copy, path, ground.out / "last.pth")
            ground.check("train", *command, "--swanlab", "disabled", prepare=prepare)
        else:
            command = (ground.picture, "--model", path, "--output", ground.out)
            ground.check("predict", *command, "--device", "cpu")
        assert path.read_bytes() == before
    finally:
        shutil.rmtree(changed)


WORDS = [
    *("", "-", "--", "0", "-1", "1", "32", "1e400", "nan", "inf", "99999999999999999999", "x"),
    *("../..", "/", "/dev/null", "/dev/full", "cuda", "cuda:99", "cpu:1", "mps", "meta"),
    *("é", "a b", "%s", "\ud800", "disabled", "offline", "fp32", "fp64"),
    *("dataset", "dataset/test", "best_model.pth", "_mask.png", "1.5", "x" * 5000),
    *("study", "vessels", "none", "flip,rotate=30,elastic,noise", "dice=0,focal", "bce=,", "=,="),
]
FLAGS = {
    "train": [
        *("--image-size", "--batch-size", "--lr", "--patience", "--n-filters", "--seed"),
        *("--device", "--precision", "--save-every", "--project", "--resume", "--test-only"),
        *("--skip-bad", "--overwrite", "--recipe", "--schedule", "--prior", "--nonsense"),
        *("--arch", "--depth", "--dropout", "--loss", "--augment", "--crop", "--init"),
    ],
    "predict": ["--model", "--threshold", "--device", "--nonsense"],
    "data": ["--nonsense"],
    "download": ["--source", "--force", "--seed", "--phantoms", "--nonsense"],
}
# One of these is given to the script besides.
INPUTS = {
    "train": ["dataset", "dataset", "nowhere", "best_model.pth", "dataset/test"],
    "data": ["dataset", "dataset/test", "best_model.pth", "nowhere", "/dev/null"],
    "download": ["best_model.pth", "nowhere.zip", "dataset", "/dev/null"],
}


def commands(ground, draw):
    """The scripts with wrong words in their command lines.

    What would train for long, or load from the network, is left out.
    """
    name = draw(st.sampled_from(["train", "predict", "data", "download"]))
    words = []
    for _ in range(draw(st.integers(0, 3))):
        words += [draw(st.sampled_from(FLAGS[name])), draw(st.sampled_from(WORDS))]
    if name == "predict":
        possible = [*WORDS[:20], str(ground.picture), "dataset/test", "dataset/train"]
        inputs = draw(st.lists(st.sampled_from(possible), max_size=2)) or [ground.picture]
        ground.check("predict", *words, "--output", ground.out, "--", *inputs)
        return
    given = draw(st.sampled_from(INPUTS[name]))
    if name == "train":
        fixed = ("--data", given, "--out", ground.out, "--image-size", 32, "--swanlab", "disabled")
        ground.check("train", *SMALL, "--epochs", 1, *words, *fixed)
    elif name == "data":
        ground.check("data", *words, given, "--out", ground.out)
    else:
        ground.check("download", *words, "--zip", given, "--data", ground.out / "dataset")


def imports(ground, draw):
    """download.py --labelme, --coco and --masks on files of which one is mutated."""
    folder = ground.place / "imports"
    folder.mkdir()
    try:
        source = draw(st.sampled_from(sorted(SOURCES)))
        flags, path = SOURCES[source](folder)
        if path.suffix == ".json" and draw(st.booleans()):
            path.write_text(json.dumps(mutate_tree_often(json.loads(path.read_text()), draw)))
        else:
            path.write_bytes(mutate_bytes(path.read_bytes(), draw))
        choices = [(), ("--skip-unpaired",), ("--prefix", "a"), ("--into", "test")]
        more = draw(st.sampled_from(choices))
        share = () if "--into" in more else ("--split", 100, 0, 0)
        ground.check("download", *flags, *more, *share, "--data", ground.out / "dataset")
    finally:
        shutil.rmtree(folder)


def labelme_files(folder):
    """(flags, the file to mutate) of a LabelMe file beside its image."""
    Image.new("L", (20, 16)).save(folder / "a.png")
    bitmap = base64.b64encode(mask_bytes("PNG", size=(4, 4))).decode()
    shapes = [
        {"label": "x", "points": [[1, 1], [9, 2], [5, 8]], "shape_type": "polygon"},
        {"label": "x", "points": [[3, 3], [7, 9]], "shape_type": "rectangle"},
        {"label": "y", "points": [[10, 9], [12, 9]], "shape_type": "circle"},
        {"label": "y", "points": [[1, 2], [4, 5]], "shape_type": "mask", "mask": bitmap},
    ]
    size = {"imageWidth": 20, "imageHeight": 16}
    content = {"version": "5.5.0", "imagePath": "a.png", "imageData": None, "shapes": shapes}
    (folder / "a.json").write_text(json.dumps(content | size))
    return ("--labelme", folder), folder / "a.json"


def coco_files(folder):
    """(flags, the file to mutate) of a COCO file with a polygon, a box and run lengths."""
    Image.new("L", (20, 16)).save(folder / "a.png")
    runs = {"size": [16, 20], "counts": [100, 20, 200]}
    outlines = [
        {"segmentation": [[1, 1, 9, 2, 5, 8]]},
        {"bbox": [1, 2, 3, 4]},
        {"segmentation": runs, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 16}],
        "categories": [{"id": 3, "name": "x"}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 3, **outline}
            for number, outline in enumerate(outlines)
        ],
    }
    (folder / "c.json").write_text(json.dumps(content))
    return ("--coco", folder / "c.json", folder, "--boxes"), folder / "c.json"


def pair_of(folder, image, mask):
    """(flags, path of the mask) of folders with two pairs a and b; the mutated one is of a."""
    for place, content, name in (("images", *image), ("masks", *mask)):
        (folder / place).mkdir()
        for stem in "ab":
            (folder / place / f"{stem}{name}").write_bytes(content)
    return ("--masks", folder / "images", folder / "masks"), folder / "masks" / f"a{mask[1]}"


def mask_bytes(file_format, mode="L", size=(20, 16)):
    """A file of a mask of 0 and 255."""
    pixels = np.zeros(size[::-1], np.uint8)
    pixels[size[1] // 4 : size[1] // 2, size[0] // 4 :] = 255
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, file_format)
    return content.getvalue()


def mask_files(folder, suffix, file_format, mode):
    mask = mask_bytes(file_format, mode)
    return pair_of(folder, (mask_bytes("PNG"), ".png"), (mask, suffix))


def array_files(folder):
    """(flags, the file to mutate) of masks that NumPy saved."""
    content = io.BytesIO()
    np.save(content, np.eye(16, 20, dtype=np.int16))
    return pair_of(folder, (mask_bytes("PNG"), ".png"), (content.getvalue(), ".npy"))


def names_file(folder):
    """(flags, the file to mutate) of masks with a JSON of label numbers."""
    flags, _ = mask_files(folder, ".png", "PNG", "L")
    labels = {"background": 0, "cell": [1, 255], "nucleus": 255, "ignore": 7}
    (folder / "names.json").write_text(json.dumps({"labels": labels}))
    return (*flags, "--classes", folder / "names.json"), folder / "names.json"


def volume_files(folder, mutated, suffix=".nii"):
    """(flags, the file to mutate) of NIfTI volumes; mutated: "images" or "masks"."""
    import nibabel

    voxels = np.arange(8 * 6 * 4, dtype=np.int16).reshape(8, 6, 4)
    contents = []
    for values in (voxels, (voxels % 3).astype(np.uint8)):
        content = nibabel.Nifti1Image(values, np.diag([1.0, 1, 2, 1])).to_bytes()
        contents.append(gzip.compress(content) if suffix == ".nii.gz" else content)
    flags, mask = pair_of(folder, (contents[0], suffix), (contents[1], suffix))
    return flags, folder / mutated / mask.name


def dicom_files(folder):
    """(flags, the file to mutate) of DICOM files with pictures as masks."""
    from pydicom.data import get_testdata_file

    content = Path(get_testdata_file("MR_small_RLE.dcm", download=False)).read_bytes()
    flags, _ = pair_of(folder, (content, ".dcm"), (mask_bytes("PNG", size=(64, 64)), ".png"))
    return (*flags, "--window", 600, 1200), folder / "images" / "a.dcm"


SOURCES = {
    "labelme": labelme_files,
    "coco": coco_files,
    "png": functools.partial(mask_files, suffix=".png", file_format="PNG", mode="P"),
    "gif": functools.partial(mask_files, suffix=".gif", file_format="GIF", mode="L"),
    "tiff": functools.partial(mask_files, suffix=".tif", file_format="TIFF", mode="1"),
    "array": array_files,
    "names": names_file,
    "jpeg": functools.partial(mask_files, suffix=".jpg", file_format="JPEG", mode="RGB"),
    "volume": functools.partial(volume_files, mutated="images"),
    "mask volume": functools.partial(volume_files, mutated="masks"),
    "zipped volume": functools.partial(volume_files, mutated="images", suffix=".nii.gz"),
    "dicom": dicom_files,
}

READERS = (annotations, images, archives, checkpoints, commands, imports)
READERS = {reader.__name__: reader for reader in READERS}


def limit_memory():
    """Allow MEMORY more address space than this process uses now (on Linux)."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)


def run_campaign(ground, name, cases, random_seed):
    """Run cases of one reader; what to report of it."""

    limits = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @seed(random_seed)
    @settings(max_examples=cases, print_blob=False, **limits)
    @given(st.data())
    def campaign(choices):
        READERS[name](ground, choices.draw)

    ground.cases = ground.refused = 0
    campaign()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"reader": name, "cases": ground.cases, "refused": ground.refused, "peak_mib": peak}


def main():
    parser = ArgumentParser("tools/fuzz.py", __doc__)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help="default: all")
    parser.add_argument("--cases", type=int, default=40, help="of each reader")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        ground = Ground(Path(place).resolve())
        limit_memory()
        for name in args.readers or READERS:
            print(json.dumps(run_campaign(ground, name, args.cases, args.seed)), flush=True)


if __name__ == "__main__":
    main()
