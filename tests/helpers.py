"""Tiny data sets, made here, and ways to run the scripts."""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

# Before torch is imported: networks this small are faster on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pydicom.data import get_testdata_file

from medseg.cli import run_main
from medseg.coco import read_segmentation
from medseg.images import read_image
from medseg.weights import load_weights
from net import UNet

ROOT = Path(__file__).resolve().parent.parent
HOME = tempfile.mkdtemp(prefix="home-")  # one for all, so that matplotlib looks for fonts once
SIZE = 48  # pixels a side of the images made here


def start_python(*arguments, cwd, log=None, **environment):
    """Start Python without the user's SwanLab account; with -c it finds our modules.

    Returns a Popen; its output is text in two pipes, or goes to the file `log`.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SWANLAB")}
    if "-c" in arguments:
        clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with open(log or os.devnull, "w") as file:
        output = file if log else subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env={**clean, "HOME": HOME, **environment},
            stdout=output,
            stderr=output,
            text=True,
        )


def run_python(*arguments, cwd, timeout=120, **environment):
    """As `start_python`, to the end; returns a CompletedProcess."""
    with start_python(*arguments, cwd=cwd, **environment) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def script(name, *arguments, cwd, timeout=120, **environment):
    """Run a script, or a tool, in a process of its own."""
    return run_python(ROOT / name, *arguments, cwd=cwd, timeout=timeout, **environment)


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


def output_of(name, *arguments, cwd):
    """What a script prints to stdout that is to succeed; it runs in this process."""
    return assert_done(script_here(name, *arguments, cwd=cwd))


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


def assert_done(result):
    """Status 0; returns what was printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def wait_until(condition, seconds=60):
    """Wait for a condition, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def skip_pictures(monkeypatch=None):
    """Trainings in this process draw nothing: that would take longer than they do.

    monkeypatch: undoes it; not needed in a fork.
    """
    import train

    replace = monkeypatch.setattr if monkeypatch else setattr
    replace(train, "visualize_predictions", lambda *_, path, **__: path)
    replace(train.plots, "plot_curves", lambda history, path, **__: path)


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
    outlines = []
    for number, (index, segmentation) in enumerate(annotations):
        ids = {"id": number, "image_id": index, "category_id": 1}
        outlines.append({**ids, "iscrowd": 0, "segmentation": segmentation})
    categories = [{"id": 1, "name": "tumour"}]
    content = {"images": records, "categories": categories, "annotations": outlines}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def rasterize(segmentation, height, width):
    """One COCO segmentation -> uint8 array (height, width) of 0 and 1."""
    return read_segmentation(segmentation, height, width).draw()


def edit_annotations(folder, change):
    """Apply change(content) to the annotation file of a split."""
    path = folder / "_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_classes(folder, names, category_of):
    """Give a split these categories; category_of(annotation number) -> category id from 1."""

    def change(content):
        content["categories"] = [{"id": n, "name": name} for n, name in enumerate(names, 1)]
        for number, annotation in enumerate(content["annotations"]):
            annotation["category_id"] = category_of(number)

    edit_annotations(folder, change)


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


# The flags of the smallest training there is.
SMALL = (
    *("--image-size", 32, "--n-filters", 2, "--batch-size", 2),
    *("--swanlab", "disabled", "--device", "cpu"),
)


def without_times(row):
    """A row of the history but for what differs between any two runs."""
    times = ("seconds", "images_per_second")
    return {key: value for key, value in row.items() if key not in times}


def read_metrics(folder):
    """metrics.csv of a run but for its times, a dict of texts for each epoch."""
    with open(folder / "metrics.csv") as file:
        return [without_times(row) for row in csv.DictReader(file)]


def outcome(folder):
    """What is the same where one run ends as another: its metrics, and the bits of its weights."""
    last = load_weights(folder / "last.pth")
    weights = last["model"], last["running_mean"], load_weights(folder / "best_model.pth")
    bits = [{key: value.numpy().tobytes() for key, value in one.items()} for one in weights]
    return read_metrics(folder), bits


def tree(root):
    """{path: (hash, modification time), or "folder"} of everything below `root`."""
    states = {}
    for path in Path(root).rglob("*"):
        state = "folder"
        if path.is_file():
            state = hashlib.sha1(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
        states[str(path.relative_to(root))] = state
    return states


def probabilities_of(model, pixels):
    """float32 (B, C, H, W) of a UNet or a Predictor; pixels: uint8 (B, H, W, n_channels)."""
    from medseg.predictor import Predictor

    predictor = model if isinstance(model, Predictor) else Predictor([model], "cpu")
    return predictor(torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)).numpy()


def brightness_model(image_size=32, **options):
    """A UNet with weights set by hand: the probability is over 0.5 where a pixel is bright.

    What it should predict can be told without running it.
    """
    model = UNet(n_filters=2, image_size=image_size, **options)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.down1.conv1.weight[0, :, 1, 1] = 1 / 3  # channel 0: mean of red, green, blue
        model.down1.conv2.weight[0, 0, 1, 1] = 1
        model.up5.conv1.weight[0, 2, 1, 1] = 1  # 0 and 1 come from below, 2 from the skip
        model.up5.conv2.weight[0, 0, 1, 1] = 1
        model.outc.weight[0, 0] = 8
        model.outc.bias[0] = -4  # sigmoid(8 x - 4) > 0.5 where x > 0.5, some way above mid-grey
    return model


def scan(width, height, x, y, side):
    """A dark picture with a bright square."""
    pixels = np.full((height, width), 20, np.uint8)
    pixels[y : y + side, x : x + side] = 235
    return Image.fromarray(pixels)


STORED_TURNED = {  # EXIF orientation -> how an array (H, W, ...) is stored that is to be shown
    1: lambda shown: shown,
    2: lambda shown: np.flip(shown, 1),
    3: lambda shown: np.rot90(shown, 2),
    4: lambda shown: np.flip(shown, 0),
    5: lambda shown: np.swapaxes(shown, 0, 1),
    6: lambda shown: np.rot90(shown),  # which a quarter clockwise undoes
    7: lambda shown: np.swapaxes(np.rot90(shown, 2), 0, 1),
    8: lambda shown: np.rot90(shown, -1),
}


def save_turned(shown, path, orientation, **options):
    """Save the array of a picture so that its EXIF orientation turns it to what is `shown`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_TURNED[orientation](np.asarray(shown)))
    Image.fromarray(stored).save(path, exif=exif, **options)


def png_bytes(values, size=None):
    """The bytes of a PNG of uint8 or uint16 (H, W, C): grey, grey and alpha, RGB, RGB and alpha.

    size: another (width, height) that its header claims.
    """
    height, width, channels = values.shape
    order, bits = values.dtype.newbyteorder(">"), 8 * values.itemsize
    rows = b"".join(b"\0" + row.astype(order).tobytes() for row in values)
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">2I5B", *(size or (width, height)), bits, colour_type, 0, 0, 0)
    written = b"\x89PNG\r\n\x1a\n"
    for name, content in {b"IHDR": head, b"IDAT": zlib.compress(rows), b"IEND": b""}.items():
        written += struct.pack(">I", len(content)) + name + content
        written += struct.pack(">I", zlib.crc32(name + content))
    return written


STORED = np.array([[0, 100, 150], [200, 300, 1000]], np.uint16)  # 2 rows, 3 columns


def sample(name):
    return get_testdata_file(name, download=False)


def write_dicom(path, pixels=STORED, **values):
    """A DICOM file of one frame (H, W) or of several (N, H, W)."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = 8 * pixels.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    for name, value in values.items():
        if isinstance(value, pydicom.DataElement):
            dataset[name] = value
        else:
            setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, voxels, *, axes=(1, 0, 0, 0, 1, 0), **values):
    """A DICOM file of each of the slices (N, H, W), 2 mm apart; names are not in their order.

    values: of every file, or functions of the number of its slice.
    """
    folder.mkdir()
    for number, pixels in enumerate(voxels):
        position = np.array([5, 70, -10]) + 2 * number * np.cross(axes[:3], axes[3:])
        fields = {"ImagePositionPatient": position, "ImageOrientationPatient": axes}
        fields = {key: [f"{one:.10g}" for one in value] for key, value in fields.items()}
        fields |= {"PixelSpacing": [0.5, 0.8], "SeriesInstanceUID": "1.2.9", **values}
        fields = {key: one(number) if callable(one) else one for key, one in fields.items()}
        write_dicom(folder / f"{number * 5 % 7}_{number}.dcm", pixels, **fields)
    return folder


def write_nifti(path, voxels, affine=None, *, version=1, slope=None, intercept=None, zooms=None):
    make = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = make(voxels, np.eye(4) if affine is None else affine)
    image.header.set_slope_inter(slope, intercept)  # the voxels are stored as given
    if zooms:
        image.header.set_zooms(zooms)
        image.set_sform(np.diag([*zooms[:3], 1]), 1)
    image.to_filename(path)
    return path


def stored_as(image, orientation):
    """A copy of a nibabel image whose array lies in another orientation, at the same place."""
    ornt = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(orientation)
    )
    return image.as_reoriented(ornt)


def write_itk(path, voxels, affine=None, *, vector=False):
    """An NRRD or MetaImage file of voxels (X, Y, Z, ...), with an affine as NIfTI has it."""
    array = voxels.transpose(2, 1, 0, 3) if vector else voxels.T
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array), isVector=vector)
    if affine is not None:
        lps = np.diag([-1, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path))
    return path


def refuse(read, path, *words):
    """read(path) is refused in one line that begins with the file's name and holds the words."""
    with pytest.raises(ValueError) as refusal:
        read(path)
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and text.count(str(path)) == 1 and "\n" not in text, text
    for word in words:
        assert word in text, text


def slices_of(volume, channel=0):
    """The slices of a Volume, float32 (N, H, W)."""
    assert all(one.dtype == np.float32 and one.ndim == 3 for one in volume)
    return np.stack([one[..., channel] for one in volume])


def voxels_of(volume):
    """The voxels of a grey Volume as it was turned, (X, Y, Z)."""
    return np.moveaxis(slices_of(volume), 0, volume.axis)


# ---- imports by download.py ------------------------------------------------------------------

ALL = ("--split", 100, 0, 0)
MASKS = ("--masks", "images", "masks", *ALL)
PHOTO = (40, 30)  # width, height


def run_download(*flags):
    """download.py in this process, which has to succeed; returns what it printed."""
    result = script_here("download.py", *flags, cwd=Path.cwd())
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refuse_download(*flags, words=()):
    """download.py in this process, refused with nothing changed; returns its one line."""
    before = tree(Path())
    result = script_here("download.py", *flags, cwd=Path.cwd())
    assert_refused(result, *words)
    assert tree(Path()) == before
    return result.stderr


def annotations(split, root="dataset"):
    return json.loads(Path(root, split, "_annotations.coco.json").read_text())


def class_names(split="train", root="dataset"):
    return [category["name"] for category in annotations(split, root)["categories"]]


def read_rgb(path):
    """The image of a file as it is shown: uint8 (H, W, 3)."""
    return np.asarray(read_image(path).rgb())


def stored(split="train", root="dataset"):
    """{file stem: {class: bool array}} of a split; what pycocotools decodes has to be the same."""
    coco, masks = annotations(split, root), {}
    names = {category["id"]: category["name"] for category in coco["categories"]}
    records = {record["id"]: record for record in coco["images"]}
    for record in records.values():
        image = read_image(Path(root, split, record["file_name"]))
        assert image.size == (record["width"], record["height"])
        masks[Path(record["file_name"]).stem] = {}
    for annotation in coco["annotations"]:
        record, outline = records[annotation["image_id"]], annotation["segmentation"]
        mask = rasterize(outline, record["height"], record["width"]).astype(bool)
        decoded = coco_mask.decode([{**outline, "counts": outline["counts"].encode()}])[..., 0]
        np.testing.assert_array_equal(mask, decoded)
        assert mask.sum() == annotation["area"]
        of_image = masks[Path(record["file_name"]).stem]
        assert names[annotation["category_id"]] not in of_image
        of_image[names[annotation["category_id"]]] = mask
    return masks


def save(image, path, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def photo(seed=0, size=PHOTO):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def labels(seed=0, classes=1, size=PHOTO):
    """A label map (H, W) with every number from 0 to `classes`, most of it 0."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2 * classes + 2, (size[1], size[0]))
    values[values > classes] = 0
    values.flat[: classes + 1] = range(classes + 1)
    return values


def grey(values, dtype=np.uint8):
    """Label map -> PIL image of these grey values."""
    return lambda label_map: Image.fromarray(np.array(values, dtype)[label_map])


def palette(indices, colours=range(256 * 3)):
    """Label map -> PIL image of these indices of a palette, of colours in one row."""

    def make(label_map):
        image = Image.fromarray(np.array(indices, np.uint8)[label_map])
        image.putpalette(np.array(colours).astype(np.uint8).tobytes())
        return image

    return make


def save_pair(stem, mask=None, suffix=".png", seed=0, **options):
    """Write images/STEM.png and a mask of its size, without one a mask of 0 and 1."""
    mask = grey([0, 1])(labels(seed)) if mask is None else mask
    save(photo(seed, mask.size), f"images/{stem}.png")
    save(mask, f"masks/{stem}{suffix}", **options)


def shape(label, points, shape_type="polygon", **more):
    """A shape of a LabelMe file."""
    fields = {"points": points, "shape_type": shape_type, "group_id": None, "flags": {}}
    return {"label": label, **fields, **more}


def box(x, y, side):
    """A polygon of LabelMe, whose border is part of it: side x side pixels."""
    far_x, far_y = x + side - 1, y + side - 1
    return [[x, y], [far_x, y], [far_x, far_y], [x, far_y]]


PICTURE = photo()


def labelme(stem, shapes, folder="lm", image=PICTURE, **more):
    """Write FOLDER/STEM.json and its picture, if any."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    if image:
        image.save(f"{folder}/{stem}.png")
    record = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{stem}.png"}
    record |= {"imageData": None, "imageHeight": PHOTO[1], "imageWidth": PHOTO[0], **more}
    Path(folder, f"{stem}.json").write_text(json.dumps(record))


def polygon(x, y, side):
    return {"segmentation": square(x, y, side)}


def coco_file(outlines, names=("a.png",)):
    """Write c.json and the pictures in images/.

    outlines: (index of the image, category id, fields of the annotation).
    """
    images, entries = [], []
    for number, name in enumerate(names):
        size = {"width": PHOTO[0], "height": PHOTO[1]}
        images.append({"id": 10 + number, "file_name": name, **size})
        save(photo(number), Path("images", Path(name.replace("\\", "/")).name))
    for number, (index, category, fields) in enumerate(outlines):
        ids = {"id": number, "image_id": 10 + index, "category_id": category}
        entries.append({**ids, **fields})
    categories = [{"id": n, "name": f"k{n}", "supercategory": "none"} for n in (0, 3, 2)]
    content = {"images": images, "annotations": entries, "categories": categories}
    Path("c.json").write_text(json.dumps(content))
