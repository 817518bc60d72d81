"""Predict with a file of `python predict.py --export model.onnx`, without PyTorch.

    pip install onnxruntime numpy pillow
    python docs/predict_onnx.py model.onnx scan.png more/*.jpg --output masks

Writes NAME_mask.png of each picture, at its own size: 0 and 255, or a palette image of several
classes. The masks are those of predict.py, but for clean-up, tiles and colours of 16 bits.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # else onnxruntime reports to its maker
import onnxruntime

BILINEAR = Image.Resampling.BILINEAR
COLORS = ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178))
# What a flip does to (..., H, W): exchange height and width, then reverse axes.
FLIPS = {
    **{"horizontal": (0, (-1,)), "vertical": (0, (-2,)), "both": (0, (-2, -1))},
    **{"transpose": (1, ()), "turn90": (1, (-2,)), "turn270": (1, (-1,))},
    "antitranspose": (1, (-2, -1)),
}


def read_picture(path, window):
    """The picture as it is shown, turned by its EXIF, as a PIL image of mode RGB."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # 16 bits a pixel, of a window where the training images had one
        values = np.asarray(image, np.float64)
        white = next(top for top in (255, 1023, 4095, 65535) if values.max() <= top)
        center, width = window if isinstance(window, list) else (white / 2, white)
        shown = ((values - center + width / 2) * (255 / width)).clip(0, 255)
        image = Image.fromarray(shown.round().astype(np.uint8))
    return image.convert("RGB")


def predict(session, about, image):
    """PIL RGB image -> probabilities, float32 (classes, size, size)."""
    size = (about["image_size"],) * 2 if about["image_size"] else image.size
    image = image.convert("L" if about["n_channels"] == 1 else "RGB").resize(size, BILINEAR)
    mean, std = (np.float32(about[key]) * np.float32(255) for key in ("mean", "std"))
    pixels = (np.asarray(image).reshape(*size[::-1], -1) - mean) / std
    images, total = pixels.transpose(2, 0, 1)[None], 0
    flips = about.get("inference", {}).get("flips", [])
    for exchange, axes in ((0, ()), *(FLIPS[name] for name in flips)):
        flipped = np.flip(images.swapaxes(2, 3) if exchange else images, axes)
        one = np.flip(session.run(None, {"images": np.ascontiguousarray(flipped)})[0], axes)
        total = total + (one.swapaxes(2, 3) if exchange else one)
    return (total / np.float32(1 + len(flips)))[0]


def label(probabilities, size, threshold, order):
    """uint8 (height, width): the most probable class, or of classes with an order the last one."""
    labels = np.zeros(size[::-1], np.uint8)
    highest = np.full(labels.shape, threshold, np.float32)
    for number in order or range(1, len(probabilities) + 1):
        resized = np.asarray(Image.fromarray(probabilities[number - 1]).resize(size, BILINEAR))
        labels[resized > (threshold if order else highest)] = number
        highest = np.maximum(highest, resized)
    return labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the .onnx file")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the masks")
    parser.add_argument("--threshold", type=float, help="default: that of the model, else 0.5")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(texts[key]) for key in texts}
    if about["n_channels"] not in (1, 3):
        parser.error(f"{args.model} takes {', '.join(about.get('channels', ()))}, not pictures")
    threshold = args.threshold or about.get("inference", {}).get("threshold", 0.5)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = read_picture(path, about.get("window"))
        found = predict(session, about, image)
        labels = label(found, image.size, threshold, about["draw_order"])
        mask = Image.fromarray(labels * np.uint8(255 if len(found) == 1 else 1))
        if len(found) > 1:
            mask.putpalette(np.ravel(COLORS).tolist())
        mask.save(args.output / f"{path.stem}_mask.png")
