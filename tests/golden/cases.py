"""What the scripts make of small inputs, end to end, held to the values in expected.json.

    python -m pytest tests/golden -k import_coco   # compare
    python tests/golden/cases.py import_coco       # write the values of this case

A case is the inputs that it makes, the commands that it runs and what is measured of their files.
The values are those of the code before anything was rebuilt: a change of one is either a mistake or
is recorded again, by the name of its case, with the reason in the message of the commit. Numbers
agree to 1e-4 (of 1, or of the value where that is larger), those after a training to 2e-3: by other
instructions (ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41) they differ by a quarter of it.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import nibabel
import numpy as np
import torch
from helpers import (
    assert_done,
    box,
    brightness_model,
    grey,
    labelme,
    polygon,
    save,
    script_here,
    shape,
    write_dicom,
    write_nifti,
)
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from medseg.phantoms import make_phantoms
from net import UNet

EXPECTED = Path(__file__).with_name("expected.json")
TUMOR = Path(__file__).parents[2] / "dataset" / "tumor.pth"

# ---- inputs ----------------------------------------------------------------------------------


def picture(seed):
    """Colours that differ from pixel to pixel, and from corner to corner."""
    x, y = np.meshgrid(np.arange(40), np.arange(30))
    pixels = np.stack([x * 5, y * 7, (x + 2 * y + 30 * seed) % 200], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def label_map(seed, classes=2):
    """Class numbers: a rectangle of each class, without symmetry."""
    labels = np.zeros((30, 40), np.uint8)
    for number in range(1, classes + 1):
        labels[3 + seed % 5 : 9 + 3 * number, 9 * number : 9 * number + 6 + seed % 4] = number
    return labels


def pairs(count=10, values=(0, 255), images="images", first=0):
    """images/p0.png and masks/p0_mask.png, and so on; values: those of background and classes."""
    for seed in range(first, first + count):
        labels = label_map(seed, len(values) - 1)
        save(picture(seed), f"{images}/p{seed}.png")
        masks = images.replace("image", "mask")
        save(grey(values)(labels), f"{masks}/p{seed}_mask.png")


def class_files():
    """A mask file for each class, and of one class several for each image."""
    names = ("axon/p{}_1", "myelin/p{}_1", "cell/p{}_1", "cell/p{}_2")
    for seed in range(3):
        save(picture(seed), f"images/p{seed}.png")
        for number, name in enumerate(names, 1):
            mask = Image.fromarray(np.uint8(255) * (label_map(seed, 4) == number))
            save(mask, f"masks/{name.format(seed)}.png")


def outlines():
    """LabelMe files of every kind of shape."""
    labelme("a", [shape("cat", box(3, 4, 9)), shape("dog", [[20, 5], [38, 9], [25, 27]])])
    labelme("b", [shape("dog", [[5, 6], [17, 15]], "rectangle"), shape("ear", [[2, 2]], "point")])
    circle = shape("cat", [[20, 15], [26, 15]], "circle")
    labelme("c", [circle, shape("dog", [[1, 1], [30, 25]], "line")])
    labelme("d", [])


def coco():
    counts = np.diff(np.flatnonzero(np.diff(label_map(2, 1).ravel("F"), prepend=2, append=2)))
    outlines = {  # image, category: fields
        (1, 1): polygon(3, 4, 9),
        (1, 3): {"segmentation": [[20, 5, 38, 9, 25, 27]]},
        (2, 3): {"segmentation": {"size": [30, 40], "counts": counts.tolist()}, "iscrowd": 1},
        (2, 1): {"segmentation": [], "bbox": [10, 20, 7, 6]},
    }
    images = [{"id": n, "file_name": f"p{n}.png", "width": 40, "height": 30} for n in (1, 2, 3)]
    for image in images:
        save(picture(image["id"]), f"images/{image['file_name']}")
    annotations = [
        {"id": number, "image_id": image, "category_id": category, **fields}
        for number, ((image, category), fields) in enumerate(outlines.items())
    ]
    categories = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    Path("c.json").write_text(json.dumps(content))


def voxels(seed=0):
    """A volume (12, 10, 5), and class numbers in it."""
    x, y, z = np.meshgrid(*map(np.arange, (12, 10, 5)), indexing="ij")
    labels = np.zeros(x.shape, np.uint8)
    labels[2 : 5 + seed, 3:9, 1:4], labels[7:11, 1:4, 2:5] = 1, 2
    return (x * 40 + y * 11 + z * 97 + 300 * labels.astype(int)).astype(np.int16), labels


def volumes():
    """Two volumes, stored in different orders of their axes, with masks of two classes."""
    turned = np.array([[0, 0, 2, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    affines = np.diag([-0.5, 0.5, 2, 1]), turned
    for folder in ("scans", "labels"):
        Path(folder).mkdir()
    for seed, affine in enumerate(affines):
        values, labels = voxels(seed)
        write_nifti(f"scans/v{seed}.nii.gz", values, affine)
        write_nifti(f"labels/v{seed}.nii.gz", labels, affine)


def dicom_series():
    """Slices 2, 2 and 4 mm apart, in no order, and a mask picture of each."""
    Path("ct").mkdir()
    for name, z in {"a": 4, "b": 0, "c": 8, "d": 2}.items():
        pixels = np.zeros((64, 64), np.uint16)
        pixels[10 : 20 + z, 30:50] = 900
        fields = {"ImagePositionPatient": [5, 70, z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        fields |= {"WindowCenter": 500, "WindowWidth": 1000, "PixelSpacing": [0.5, 0.8]}
        write_dicom(f"ct/{name}.dcm", pixels, SeriesInstanceUID="1.2.9", **fields)
        save(Image.fromarray(np.uint8(255) * (pixels > 0)), f"masks/{name}.png")


def phantoms(size=64, counts=(8, 4, 4), two_classes=False):
    make_phantoms("data", counts, size, two_classes=two_classes)


def large_phantoms():
    phantoms(128)


def scans():
    """Phantoms without annotations, one of them not square."""
    make_phantoms("data", (1, 1, 3), 128, seed=5)
    for number, path in enumerate(sorted(Path("data/test").glob("*.jpg"))):
        save(Image.open(path).crop((0, 0, 128, 128 - 20 * number)), f"scans/s{number}.png")


def mosaic():
    """A phantom many times in one picture, and weights that take it at its own size, by tiles."""
    scans()
    model = UNet.from_state_dict(torch.load(TUMOR, weights_only=True))
    model.info.image_size = None
    torch.save(model.state_dict(), "model.pth")
    tiled = np.tile(np.asarray(Image.open("scans/s0.png").convert("RGB")), (13, 16, 1))
    Image.fromarray(tiled).save("mosaic.png")


def squares(size=None, classes=1, names=None):
    """bright.png, squares on black with a speck and a hole, and weights that mark what is bright.

    The weights are set by hand: what they mark can be told, and no value is near the threshold.
    size: that of the weights; None takes images at their own size.
    """
    model = brightness_model(size, n_classes=classes, class_names=names)
    with torch.no_grad():
        model.outc.weight[:, 0, 0, 0] = torch.tensor([8.0, 6.0])[:classes]
        model.outc.bias[:] = torch.tensor([-8.0, -4.0])[:classes]
    torch.save(model.state_dict(), "model.pth")
    pixels = np.zeros((64, 96, 3), np.uint8)
    drawn = (10, 8, 30, 255), (50, 30, 20, 255), (80, 5, 3, 255), (72, 50, 12, 190)
    for x, y, side, value in drawn:
        pixels[y : y + side, x : x + side] = value
    pixels[15:20, 20:24] = 0  # the hole
    Image.fromarray(pixels).save("bright.png")


# ---- measures --------------------------------------------------------------------------------


def digest(array):
    return hashlib.sha1(np.ascontiguousarray(array)).hexdigest()[:8]


def place(weights):
    """Sum of an array as a share of its elements, and its centre as a share of each axis."""
    total, shares = float(weights.sum()), []
    for axis, side in enumerate(weights.shape):
        along = weights.sum(axis=tuple(other for other in range(weights.ndim) if other != axis))
        shares.append(float(along @ (np.arange(side) + 0.5)) / side / total if total else 0.0)
    return [total / weights.size, *shares]


def read_array(path):
    """The stored array of a picture or volume."""
    if path.endswith(".nii.gz"):
        return np.asarray(nibabel.load(path).dataobj)
    return np.asarray(Image.open(path))


def exact(path):
    """Shape, pixels of each value and digest of a mask: no number of it may change."""
    array = read_array(path)
    values, counts = np.unique(array, return_counts=True)
    pixels = " ".join(f"{value}:{count}" for value, count in zip(values, counts, strict=True))
    return {"": f"{'x'.join(map(str, array.shape))} {pixels} {digest(array)}"}


def near(path):
    """Shape of a mask or picture, and where its values lie."""
    array = read_array(path)
    result, values = {"shape": list(array.shape)}, np.unique(array)
    if array.dtype.itemsize > 1 or len(values) > 9:
        return {**result, "light": place(array / np.float64(np.iinfo(array.dtype).max))}
    return result | {f"{value}": place(array == value) for value in values if value}


def geometry(path):
    """The affine of a volume."""
    return {"affine": nibabel.load(path).affine.ravel().tolist()}


def dataset(root):
    """Splits of a data set, as pycocotools reads them: names, classes, masks and light."""
    result = {}
    for file in sorted(Path(root).glob("*/_annotations.coco.json")):
        with contextlib.redirect_stdout(io.StringIO()):
            split, read = file.parent.name, COCO(file)
        result[f"{split}.classes"] = " ".join(cat["name"] for cat in read.cats.values())
        for image in read.imgs.values():
            key, masks = f"{split}/{Path(image['file_name']).stem}", {}
            for entry in read.imgToAnns[image["id"]]:
                name, mask = read.cats[entry["category_id"]]["name"], read.annToMask(entry)
                masks[name] = masks.get(name, 0) | mask
            parts = [f"{name} {mask.sum()} {digest(mask)}" for name, mask in sorted(masks.items())]
            result[key] = ", ".join([f"{image['width']}x{image['height']}", *parts])
            pixels = np.asarray(Image.open(file.parent / image["file_name"]).convert("RGB"))
            result[f"{key}.light"] = place(pixels / 255)
    return result


def table(path):
    """The numbers of predictions.csv, by image and class."""
    result = {}
    for row in csv.DictReader(Path(path).read_text("utf-8-sig").splitlines()):
        key = f"{row.pop('image')} {row.pop('class')}"
        del row["share"], row["largest_pixels"]
        result |= {f"{key}.{name}": number(text) for name, text in row.items() if text}
    return result


def number(text):
    try:
        return float(text) if "." in text or "e" in text else int(text)
    except ValueError:
        return text


def metrics(path):
    """The last row of metrics.csv, but for what the machine decides."""
    *_, last = csv.DictReader(Path(path).read_text().splitlines())
    kept = re.compile(r"(train|val)_(loss|acc|dice|image_dice)(/.*)?|lr|epoch")
    return {name: number(text) for name, text in last.items() if kept.fullmatch(name)}


def flat(value, key=""):
    """{key.key: number or text} of nested dicts and lists."""
    if not isinstance(value, dict | list):
        return {key: value}
    result = {}
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        result |= flat(part, f"{key}.{name}" if key else str(name))
    return result


LEFT_OUT = "confidence|valid.(dice|thr)|lesion|calib|counts|miou|acc|flags|folder|scores_with"


def report(path):
    """The scores of a report.json or folds.json, but for intervals, curves and counts."""
    values = flat(json.loads(Path(path).read_text()))
    return {key: value for key, value in values.items() if not re.search(LEFT_OUT, key)}


def labelme_file(path):
    """Shapes of a LabelMe file: of each the label, and pixels and centre of what it covers."""
    content = json.loads(Path(path).read_text())
    size = content["imageWidth"], content["imageHeight"]
    result = {"size": list(size)}
    for index, one in enumerate(sorted(content["shapes"], key=lambda one: one["label"])):
        drawn = Image.new("1", size)
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in one["points"]], fill=1)
        result[f"{index}.{one['label']}"] = place(np.asarray(drawn))
    return result


def onnx(path):
    """Inputs and outputs of an exported file, and what onnxruntime makes of a ramp."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    first = session.get_inputs()[0]
    shape = [side if isinstance(side, int) else 64 for side in first.shape[1:]]
    ramp = np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(1, *shape)
    answer = session.run(None, {first.name: ramp})[0]
    return {"shape": list(answer.shape), "light": place(answer.astype(np.float64))}


def scores(out):
    """The scores of the test split that train.py prints."""
    lines = [line for line in out.splitlines() if line.startswith("test ")]
    return {
        f"{row}.{name}": float(value)
        for row, line in enumerate(lines)
        for name, value in re.findall(r"((?:per-image )?[A-Za-z]+) (\d\.\d{4})\b", line)
    }


def flags(out):
    """The flags of the command that a plan prints."""
    command = next(line for line in out.splitlines() if "train.py --" in line).split("train.py ")[1]
    words = shlex.split(command)
    return {
        word: "" if after.startswith("--") else after
        for word, after in zip(words, [*words[1:], ""], strict=True)
        if word.startswith("--") and word not in ("--init", "--data")  # folders of this machine
    }


# ---- cases -----------------------------------------------------------------------------------

CPU = "--precision fp32 --device cpu"
TRAIN = f"train.py --data data --out run --batch-size 4 --swanlab disabled {CPU}"
PREDICT = f"predict.py {CPU}"
# Weights that know the phantoms already: no step decides by its last bits what is learned after it.
START = f"{TRAIN} --init {TUMOR} --image-size 128 --lr 1e-4 --epochs 2"
TRAINED = "metrics run/metrics.csv; scores -"
IMPORT = "download.py --data own"
MASKS, BRIGHT = f"{IMPORT} --masks images masks", f"{PREDICT} bright.png --model model.pth"
SCANS, TABLE = f"{PREDICT} scans --output out", "table out/predictions.csv"
REPORT = f"report out/report.json; {TABLE}"
# of cases whose name begins so
MEASURES = {"import": "dataset own", "train": TRAINED, "predict": TABLE}

# name: inputs; commands, one a line; measures, each a function and the file that it measures, or
# those of MEASURES.
CASES = {
    "import_mask_folders": (pairs, MASKS),
    "import_mask_values": (
        lambda: pairs(3, (0, 128, 255)),
        f"{MASKS} --classes 255=nucleus,128=cytoplasm --split 100 0 0",
    ),
    "import_class_files": (
        class_files,
        f"{IMPORT} --masks 'images/{{id}}.png' 'masks/{{class}}/{{id}}_{{part}}.png' "
        "--classes axon,myelin,cell --into test",
    ),
    "import_invert": (lambda: pairs(2), f"{MASKS} --invert --into valid"),
    "import_labelme": (outlines, f"{IMPORT} --labelme lm --split 50 25 25"),
    "import_coco": (coco, f"{IMPORT} --coco c.json images --boxes --into train"),
    "import_volumes": (volumes, f"{IMPORT} --masks scans labels --split 50 50 0"),
    "import_window": (
        volumes,
        f"{IMPORT} --masks scans/v0.nii.gz labels/v0.nii.gz --window 400 300 --classes 1=a "
        "--into test",
    ),
    "import_dicom": (dicom_series, f"{IMPORT} --masks ct masks --into train"),
    "import_add": (
        lambda: (pairs(4), pairs(3, images="more_images", first=3)),
        f"{MASKS} --split 50 25 25\n"
        f"{IMPORT} --masks more_images more_masks --into train --add --duplicates skip "
        "--prefix new_",
    ),
    "plan": (phantoms, "data.py data --plan", "flags -"),
    "train_tutorial": (phantoms, f"{TRAIN} --image-size 32 --n-filters 4 --epochs 2"),
    "train_strong": (lambda: phantoms(100), f"{START} --recipe strong --warmup 2 --ema 0.5"),
    "train_vessels": (
        phantoms,
        f"{TRAIN} --recipe vessels --init {TUMOR} --crop 64 --lr 2e-4 --ema 0.5 --epochs 2",
    ),
    "train_auto": (large_phantoms, f"{START} --recipe auto --warmup 2 --ema 0.5 --repeat 2"),
    "train_classes": (lambda: phantoms(128, two_classes=True), f"{START} --classes each"),
    "train_resume": (
        phantoms,
        f"{START} --image-size 64 --epochs 4\ntrain.py --resume --out run --epochs 9",
    ),
    "train_folds": (
        lambda: phantoms(128, counts=(4, 2, 1)),
        f"{START} --epochs 1 --folds 3",
        "report run/folds.json",
    ),
    "train_augment": (
        large_phantoms,
        f"{START} --augment rotate=30,scale=0.1,shift=0.05,contrast=0.1,brightness=0.1,flip=1,"
        "turn=1,elastic=0.05,gamma=0.2,noise=0.05 --schedule cosine --loss focal=1",
    ),
    "predict_image": (scans, f"{PREDICT} scans/s1.png", "near s1_mask.png"),
    "predict_folder": (
        scans,
        f"{SCANS} --write mask,probability --pixel-size 0.5x0.7",
        f"{TABLE}; near out/s2_mask.png; near out/s2_probability.png",
    ),
    "predict_flips": (scans, f"{SCANS} --tta", f"{TABLE}; near out/s2_mask.png"),
    "predict_threshold": (scans, f"{SCANS} --threshold 0.2 --clean largest,fill"),
    "predict_annotated": (large_phantoms, f"{PREDICT} data/test --output out", REPORT),
    "predict_annotated_classes": (
        lambda: (phantoms(two_classes=True), squares(64, 2, ("bright", "dark"))),
        f"{PREDICT} data/test --model model.pth --output out",
        REPORT,
    ),
    "predict_tiles": (mosaic, f"{PREDICT} mosaic.png --model model.pth", "near mosaic_mask.png"),
    "predict_exact": (squares, BRIGHT, "exact bright_mask.png"),
    "predict_clean": (squares, f"{BRIGHT} --clean min-area=20,fill", "exact bright_mask.png"),
    "predict_largest": (squares, f"{BRIGHT} --clean largest --output m.png", "exact m.png"),
    "predict_classes": (lambda: squares(classes=2), BRIGHT, "exact bright_mask.png"),
    "predict_resized": (lambda: squares(size=32), BRIGHT, "near bright_mask.png"),
    "predict_volume": (
        lambda: (volumes(), squares(classes=2)),
        f"{SCANS} --model model.pth",
        f"exact out/v0_mask.nii.gz; exact out/v1_mask.nii.gz; geometry out/v1_mask.nii.gz; {TABLE}",
    ),
    "predict_dicom": (
        lambda: (dicom_series(), squares()),
        f"{PREDICT} ct --model model.pth --output out",
        f"{TABLE}; exact out/a_mask.png",
    ),
    "predict_ensemble": (lambda: (scans(), squares(128)), f"{SCANS} --model {TUMOR} model.pth"),
    "labelme_there_and_back": (
        lambda: squares(classes=2),
        f"{BRIGHT} --write labelme --output .\n{IMPORT} --labelme . --into test",
        "labelme_file bright.json; dataset own",
    ),
    "coco_there_and_back": (
        lambda: (scans(), squares(size=64)),
        f"{SCANS} --model model.pth --write coco\n"
        f"{IMPORT} --coco out/predictions.coco.json scans --into test",
        "dataset own",
    ),
    "export_onnx": (scans, f"predict.py --model {TUMOR} --export model.onnx", "onnx model.onnx"),
}


def run_case(name):
    """Run a case in the current folder, which is empty; returns {key: value}."""
    make, commands, measures = (*CASES[name], MEASURES.get(name.split("_")[0]))[:3]
    make()
    for line in commands.splitlines():
        out = assert_done(script_here(*shlex.split(line), cwd=Path.cwd()))
    result = {}
    for measure in measures.split("; "):
        kind, path = measure.split(" ")
        values = globals()[kind](out if path == "-" else path)  # -: what was printed last
        where = "printed" if path == "-" else path
        result |= {f"{where} {key}".rstrip(): value for key, value in values.items()}
    return json.loads(json.dumps(result))


def differences(name, values):
    """Lines that say what is not as expected."""
    expected, values = flat(json.loads(EXPECTED.read_text())[name]), flat(values)
    tolerance, lines = 2e-3 if name.startswith("train_") else 1e-4, []
    for key in sorted({*expected, *values}):
        one, other = expected.get(key), values.get(key)
        equal = type(one) is type(other) and one == other
        if isinstance(one, float) and isinstance(other, float | int):
            equal = abs(one - other) <= tolerance * max(1, abs(one))
        if not equal:
            lines.append(f"{name}: {key}: expected {one}, got {other}")
    return lines


def record(names):
    """Write the values of these cases: one a line, so that a change is a line of the difference."""
    content, cases = json.loads(EXPECTED.read_text()), []
    for name in names:
        os.chdir(tempfile.mkdtemp())
        text = json.dumps(run_case(name))
        content[name] = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    for name, values in sorted(content.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(values[key])}" for key in sorted(values)]
        cases.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    EXPECTED.write_text("{\n" + ",\n".join(cases) + "\n}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
