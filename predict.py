"""Outline the tumour in an image, or in many (the tutorial's section 7).

examples:
  python predict.py                                  # the tutorial's example image
  python predict.py scan.png                         # predictions.png and scan_mask.png
  python predict.py scan.png --output mask.png       # only the mask, in that file
  python predict.py scans/ more/7.tif --output masks # NAME_mask.png and NAME_overlay.png of each
  python predict.py dataset/test                     # annotated: also report.json, report.png
  torchrun --standalone --nproc_per_node=4 predict.py scans/   # a folder on four GPUs

Masks are 0 and 255, of the size of the image. The architecture and the size the model was trained
at are read from the weights.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import net
from data import Batches, load_split, normalize, open_split
from medseg.cli import ArgumentParser, number, output_folder, run_main
from medseg.coco import ANNOTATIONS
from medseg.device import available_device, inference_batch_size, keep_freed_memory, pick_device
from medseg.files import parallel_map
from medseg.images import (
    IMAGE_SIZE,
    SUFFIXES,
    full_size_mask,
    overlay,
    preprocess,
    read_image,
    resize_nearest,
    save_mask,
    save_png,
)

OWN_PICTURES = ("predictions.png", "curves.png", "report.png", "contact_sheet.jpg")
EXAMPLE = Path("dataset/test/27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg")  # the tutorial's


def load_model(model_path="best_model.pth", device="cuda"):
    """The trained UNet on `device` (the CPU where 'cuda' is not there), ready to predict.

    Raises FileNotFoundError; ValueError where the file does not hold the weights of a UNet.
    """
    model = net.load_model(model_path)
    return model.to(available_device(device), memory_format=torch.channels_last).eval()


def preprocess_image(image_path, *, image_size=IMAGE_SIZE):
    """Image file -> (normalised float32 tensor (1, 3, S, S), the resized PIL image S x S).

    image_path: a path, or a PIL image read already. S = image_size.
    Raises FileNotFoundError or ValueError as `medseg.images.read_image` does.
    """
    image = image_path if isinstance(image_path, Image.Image) else read_image(image_path)
    pixels = preprocess(image, image_size)
    return normalize(torch.from_numpy(pixels)[None]), Image.fromarray(pixels)


def predict_mask(
    model, image_tensor, device="cuda", threshold=0.5, *, size=None, return_highest=False
):
    """Normalised image (B, 3, H, W) -> float32 mask (B, 1, H, W), 1 above the threshold.

    size: (width, height) of the one image of the batch as it was: the probabilities are resized
    to it first, and the mask is (1, 1, height, width), on the CPU.
    return_highest: return (mask, highest probability of the batch).
    """
    probabilities = predict_probabilities(model, image_tensor, device)
    if size is None:
        mask = (probabilities > threshold).float()
    else:
        resized = full_size_mask(probabilities[0, 0].cpu().numpy(), size, threshold)
        mask = torch.from_numpy(resized)[None, None].float()
    return (mask, probabilities.max().item()) if return_highest else mask


def predict_probabilities(model, image_tensor, device="cuda"):
    """Normalised image (B, 3, H, W) -> float32 probabilities (B, 1, H, W) on the device."""
    with torch.inference_mode():
        return model(image_tensor.to(available_device(device)))


def visualize_result(original_image, predicted_mask, *, path="predictions.png"):
    """Draw image, mask and overlay side by side to `path`.

    original_image: PIL image or uint8 array (H, W, 3); predicted_mask: array or tensor of 0 and 1
    that squeezes to (H, W).
    """
    # With Pillow: importing matplotlib would take as long as the prediction itself.
    picture = original_image
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    scale = 400 / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    mask = resize_nearest(np.squeeze(np.asarray(predicted_mask)) > 0.5, height, width)
    panels = {
        "Original Image": picture,
        "Predicted Mask": Image.fromarray(mask),
        "Overlay": overlay(picture, mask),
    }
    column = max(width, 150)
    figure = Image.new("RGB", (3 * column + 40, height + 50), (240, 240, 240))
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    for index, (title, panel) in enumerate(panels.items()):
        left = 10 + index * (column + 10)
        draw.text((left + column / 2, 32), title, fill="black", font=font, anchor="ms")
        figure.paste(panel, (left + (column - width) // 2, 40))
    save_png(figure, path)


def describe(path, mask, highest):
    """One line on a prediction; the highest probability tells why a mask is empty."""
    share = 100 * mask.mean()
    return f"{path}: foreground {share:.2f} %, highest probability {highest:.3f}"


# ---- one image, many images, a folder with annotations ---------------------------------------


def predict_one(model, path, output, threshold, device):
    """Predict one image; write the mask and, where `output` is a folder, the tutorial's figure."""
    image = read_image(path)
    image_tensor, _ = preprocess_image(image, image_size=model.image_size)
    mask, highest = predict_mask(
        model, image_tensor, device, threshold, size=image.size, return_highest=True
    )
    mask = mask[0, 0].numpy() > 0
    written = [output]
    if output.is_dir():
        written = [output / f"{path.stem}_mask.png", output / "predictions.png"]
        visualize_result(image, mask, path=written[1])
    save_mask(mask, written[0])
    print(describe(path, mask, highest))
    print(f"saved {' and '.join(map(str, written))}")


def predict_many(model, paths, output, threshold, device):
    """Predict images in batches; write a mask and an overlay for each.

    Decoding runs ahead and writing behind in threads, a few batches of each at most; the threads
    leave PyTorch alone, whose own threads would compete with the network's.
    Returns what went wrong, a line each.
    """

    def read(path):
        image = read_image(path)
        return path, image, preprocess(image, model.image_size)

    def write(path, image, probabilities):
        mask = full_size_mask(probabilities, image.size, threshold)
        save_mask(mask, output / f"{path.stem}_mask.png")
        # Size matters less than time here.
        save_png(overlay(image, mask), output / f"{path.stem}_overlay.png", compress_level=1)
        return describe(path, mask, probabilities.max())

    batch_size = inference_batch_size(device)
    problems, batch, writing = [], [], deque()
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit=" images", disable=None) as bar:

        def finish_writing(limit):
            while len(writing) > limit:
                tqdm.write(writing.popleft().result())
                bar.update()

        for count, item in enumerate(parallel_map(read, paths), 1):
            if isinstance(item, Exception):
                problems.append(str(item))
                bar.update()
            else:
                batch.append(item)
            if batch and (len(batch) == batch_size or count == len(paths)):
                images = normalize(torch.from_numpy(np.stack([pixels for *_, pixels in batch])))
                probabilities = predict_probabilities(model, images, device)[:, 0].cpu().numpy()
                for (path, image, _), own in zip(batch, probabilities, strict=True):
                    writing.append(pool.submit(write, path, image, own))
                batch = []
                finish_writing(2 * batch_size)
        finish_writing(0)
    return problems


def predict_rows(model, rows, *, device):
    """Yield (target bool (B, S, S), probabilities float32 (B, S, S)), arrays, for all `rows`."""
    for images, masks in Batches(rows, inference_batch_size(device), device):
        probabilities = predict_probabilities(model, images, device)
        yield masks[:, 0].cpu().numpy() > 0.5, probabilities[:, 0].cpu().numpy()


def report(model, folder, output, threshold, device):
    """Score a folder that has annotations; write report.json and report.png to `output`.

    Returns what report.json holds. The threshold that suits the model best is sought in the split
    `valid` beside the folder, never in the folder itself.
    """
    from medseg.report import write_report

    place = folder.resolve()  # `dataset/test/` and `.` have a parent too
    dataset, valid = open_split(place.parent, place.name), place.parent / "valid"
    names = [dataset.path(index).name for index in range(len(dataset))]
    rows, valid_rows = load_split(place.parent, place.name, model.image_size), None
    if (valid / ANNOTATIONS).exists() and not valid.samefile(place):
        valid_rows = load_split(valid.parent, valid.name, model.image_size)
    predict = partial(predict_rows, model, device=device)
    return write_report(output, str(folder), names, rows, valid_rows, predict, threshold)


def print_report(folder, output, scores, intervals):
    said = {}
    for name, value in scores.items():
        low, high = intervals[name]
        said[name] = f"{value:.4f} [{low:.4f}, {high:.4f}]"
    print(
        f"{folder}: Dice {said['dice']}, per-image Dice {said['image_dice']}, IoU {said['iou']}, "
        f"accuracy {said['acc']} (background everywhere: {scores['background_acc']:.4f}); "
        f"saved {output / 'report.json'} and {output / 'report.png'}"
    )


# ---- the command line ------------------------------------------------------------------------


def expand(inputs):
    """Files and folders -> list of image files.

    Raises FileNotFoundError, and ValueError where there are none or two would share a name.
    """
    paths = []
    for given in map(Path, inputs):
        if given.is_dir():
            images = [path for path in sorted(given.iterdir()) if is_input(path)]
            if not images:
                raise ValueError(f"{given}: no images ({', '.join(SUFFIXES)}) in this folder")
            paths += images
        elif given.exists():
            paths.append(given)
        else:
            raise FileNotFoundError(f"{given}: no such image or folder")
    stems = {}
    for path in paths:
        other = stems.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"{path} and {other} would both become {path.stem}_mask.png: "
                "predict them apart, with another --output"
            )
    return list(stems.values())


def is_input(path):
    """Whether a file in a folder is an image, and not one that these scripts wrote."""
    ours = path.name in OWN_PICTURES or path.stem.endswith(("_mask", "_overlay"))
    return path.suffix.lower() in SUFFIXES and not ours


def example():
    """The image to show when none is named. FileNotFoundError where there is no data set."""
    for folder in (Path("dataset/test"), Path("dataset/synthetic/test")):
        images = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if images:
            chosen = EXAMPLE if EXAMPLE in images else images[0]
            print(f"no image named: taking {chosen}")
            return chosen
    raise FileNotFoundError(
        "no image named, and none in dataset/test: name one, or run `python download.py` first"
    )


def choose_output(given, single, inputs):
    """The folder to write to, made if need be, or for a single image the file that was named."""
    path = Path(given or ("." if single else "predictions"))
    other_pictures = (".gif", ".webp", ".jp2", ".tga", ".ppm")
    if not given or path.is_dir() or path.suffix.lower() not in (*SUFFIXES, *other_pictures):
        return output_folder(path, "--output")
    if not single:
        raise ValueError(f"--output {given}: several images need a folder, not one file")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {given}: a mask is written as .png, which loses nothing")
    if path.exists() and any(path.samefile(other) for other in inputs):
        raise ValueError(f"--output {given}: that is the image itself; name another file")
    output_folder(path.parent, "--output")
    return path


def main(argv=None):
    parser = ArgumentParser("predict.py", __doc__)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE|FOLDER",
        help="JPEG, PNG, TIFF or BMP; without one, the tutorial's example image",
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default="best_model.pth", metavar="FILE", help="weights, ours or the tutorial's")
    add(
        "--threshold",
        type=number(0.0, 1.0, float),
        default=0.5,
        help="foreground is above this probability",
    )
    add("--device", default="auto", help="auto, cuda, mps, cpu, or the number of a GPU")
    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        metavar="FOLDER|FILE.png",
        help="where to write; default: here for one image, predictions/ for several",
    )
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    paths = expand(args.inputs) if args.inputs else [example()]
    single = len(paths) == 1 and not any(Path(given).is_dir() for given in args.inputs)
    model = load_model(args.model, device)
    output = choose_output(args.output, single, paths)
    if single:
        predict_one(model, paths[0], output, args.threshold, device)
        return
    rank = int(os.environ.get("RANK", 0))
    if "LOCAL_RANK" in os.environ:  # torchrun: to each process its share
        paths = paths[rank :: int(os.environ["WORLD_SIZE"])]
    problems = predict_many(model, paths, output, args.threshold, device)
    print(f"saved {len(paths) - len(problems)} masks and overlays in {output}")
    annotated = [folder for folder in map(Path, args.inputs) if (folder / ANNOTATIONS).exists()]
    if len(annotated) > 1:
        raise ValueError(
            f"{annotated[0]} and {annotated[1]} both have annotations, and a report is of one "
            "folder: score them apart, with another --output"
        )
    if annotated and rank == 0:
        result = report(model, annotated[0], output, args.threshold, device)
        print_report(annotated[0], output, result["scores"], result["confidence_95"])
    if problems:
        raise ValueError(f"{len(problems)} of {len(paths)} left out: {'; '.join(problems)}")


if __name__ == "__main__":
    run_main(main)
