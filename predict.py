"""Outline the tumour in an image, or in many (the tutorial's section 7).

    python predict.py                                  # the tutorial's example image, or the first one there is
    python predict.py scan.png                         # predictions.png and scan_mask.png
    python predict.py scans/ more/7.tif --output masks   # masks/<name>_mask.png and masks/<name>_overlay.png each

Masks are 0 and 255, of the size of the image. The architecture and the size the model was trained at are
read from the weights. `torchrun --standalone --nproc_per_node=N predict.py scans/` shares a folder among N GPUs.
"""
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import net
from data import SUFFIXES, ArgumentParser, each, normalize, number, output_folder, preprocess, read_image, resize_nearest, run, whole
from net import IMAGE_SIZE, keep_freed_memory, pick_device

EXAMPLE = Path("dataset/test/27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg")  # the tutorial's


def load_model(model_path="best_model.pth", device="cuda"):
    """The trained UNet on `device` (the CPU where 'cuda' is not there), ready to predict.

    Raises FileNotFoundError; ValueError where the file does not hold the weights of a UNet.
    """
    return net.load_model(model_path).to(_or_cpu(device), memory_format=torch.channels_last).eval()


def preprocess_image(image_path, *, image_size=IMAGE_SIZE):
    """Image file -> (normalised float32 tensor (1, 3, S, S), the resized PIL image S x S), S = image_size.

    Raises FileNotFoundError or ValueError as `data.read_image` does.
    """
    pixels = preprocess(read_image(image_path), image_size)
    return normalize(torch.from_numpy(pixels)[None]), Image.fromarray(pixels)


def predict_mask(model, image_tensor, device="cuda", threshold=0.5):
    """(B, 3, H, W) normalised -> float32 mask (B, 1, H, W) on the device, 1 where the probability exceeds threshold."""
    return (predict_probabilities(model, image_tensor, device) > threshold).float()


def predict_probabilities(model, image_tensor, device="cuda"):
    """(B, 3, H, W) normalised -> float32 probabilities (B, 1, H, W) on the device."""
    with torch.inference_mode():
        return model(image_tensor.to(_or_cpu(device)))


def visualize_result(original_image, predicted_mask, *, path="predictions.png"):
    """Draw image, mask and overlay side by side to `path`.

    original_image: PIL image or array (H, W, 3); predicted_mask: array or tensor of 0 and 1 that squeezes to (H, W).
    """
    # With Pillow: importing matplotlib and drawing with it would take as long as the prediction itself.
    picture = original_image if isinstance(original_image, Image.Image) else Image.fromarray(np.asarray(original_image))
    scale = 400 / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    mask = resize_nearest(np.squeeze(np.asarray(predicted_mask)) > 0.5, height, width)
    figure = Image.new("RGB", (3 * max(width, 150) + 40, height + 50), (240, 240, 240))
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    panels = {"Original Image": picture, "Predicted Mask": Image.fromarray(mask), "Overlay": overlay(picture, mask)}
    for index, (title, panel) in enumerate(panels.items()):
        left = 10 + index * (max(width, 150) + 10)
        draw.text((left + max(width, 150) / 2, 32), title, fill="black", font=font, anchor="ms")
        figure.paste(panel, (left + (max(width, 150) - width) // 2, 40))
    save_image(figure, Path(path))


def full_size_mask(probabilities, size, threshold):
    """float32 probabilities (S, S) on the CPU -> bool array (height, width) for size = (width, height)."""
    # By Pillow, as in preprocessing: a thread that calls PyTorch would start threads of its own, against the network's.
    return np.asarray(Image.fromarray(probabilities.numpy()).resize(size, Image.Resampling.BILINEAR)) > threshold


def overlay(image, mask):
    """PIL RGB image and bool array of its size -> PIL image with the foreground tinted red."""
    pixels = np.array(image)
    pixels[mask] = pixels[mask] * 0.6 + np.array([102, 0, 0])
    return Image.fromarray(pixels)


def save_image(image, path, **options):
    """Write a PIL image as a PNG file that is whole or absent."""
    with whole(path, sync=False) as file:
        image.save(file, "PNG", **options)


def describe(path, mask, highest):
    """One line for a prediction; the highest probability tells an unsure model from a blind one."""
    return f"{path}: foreground {100 * mask.mean():.2f} %, highest probability {highest:.3f}"


# ---- the two ways of the command line --------------------------------------------------------

def predict_one(model, path, output, threshold, device):
    """Predict one image; write the tutorial's figure and the mask."""
    image = read_image(path)
    tensor = normalize(torch.from_numpy(preprocess(image, model.image_size))[None])
    probabilities = predict_probabilities(model, tensor, device)[0, 0].cpu()
    mask = full_size_mask(probabilities, image.size, threshold)
    save_image(Image.fromarray(mask).convert("L"), output / f"{path.stem}_mask.png")
    visualize_result(image, mask, path=output / "predictions.png")
    print(describe(path, mask, probabilities.max()))
    print(f"saved {output / 'predictions.png'} and {output / f'{path.stem}_mask.png'}")


def predict_many(model, paths, output, threshold, device):
    """Predict images in batches; write a mask and an overlay for each. Returns what went wrong, a line each.

    Decoding runs ahead and writing behind in threads, a few batches of each at most.
    """
    def read(path):
        image = read_image(path)
        return path, image, torch.from_numpy(preprocess(image, model.image_size))

    def write(path, image, probabilities):
        mask = full_size_mask(probabilities, image.size, threshold)
        save_image(Image.fromarray(mask).convert("L"), output / f"{path.stem}_mask.png")
        save_image(overlay(image, mask), output / f"{path.stem}_overlay.png", compress_level=1)  # size matters less than time
        return describe(path, mask, probabilities.max())

    batch_size = 4 if torch.device(device).type == "cpu" else 16  # more would not fit a CPU's caches, and is slower there
    problems, batch, writing = [], [], deque()
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit=" images", disable=None) as bar:
        def flush(limit):
            while len(writing) > limit:
                tqdm.write(writing.popleft().result())
                bar.update()

        for number_read, found in enumerate(each(read, paths), 1):
            if isinstance(found, Exception):
                problems.append(str(found))
                bar.update()
            else:
                batch.append(found)
            if batch and (len(batch) == batch_size or number_read == len(paths)):
                tensor = normalize(torch.stack([pixels for _, _, pixels in batch]))
                for (path, image, _), probabilities in zip(batch, predict_probabilities(model, tensor, device)[:, 0].cpu()):
                    writing.append(pool.submit(write, path, image, probabilities))
                batch = []
                flush(2 * batch_size)
        flush(0)
    return problems


def expand(inputs):
    """Files and folders -> list of image files. FileNotFoundError, ValueError where there are none or two would share a name."""
    paths = []
    for given in map(Path, inputs):
        if given.is_dir():
            inside = sorted(path for path in given.iterdir() if path.suffix.lower() in SUFFIXES
                            and not path.stem.endswith(("_mask", "_overlay")))  # ours, from an earlier call
            if not inside:
                raise ValueError(f"{given}: no images ({', '.join(SUFFIXES)}) in this folder")
            paths += inside
        elif given.exists():
            paths.append(given)
        else:
            raise FileNotFoundError(f"{given}: no such image or folder")
    stems = {}
    for path in paths:
        if stems.setdefault(path.stem, path) != path:
            raise ValueError(f"{path} and {stems[path.stem]} would both become {path.stem}_mask.png: predict them apart, with another --output")
    return list(stems.values())


def example():
    """The image to show when none is named. FileNotFoundError if there is no data set either."""
    for folder in (Path("dataset/test"), Path("dataset/synthetic/test")):
        candidates = [EXAMPLE] if folder == EXAMPLE.parent and EXAMPLE.exists() else \
            sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if candidates:
            print(f"no image named: taking {candidates[0]}")
            return candidates[0]
    raise FileNotFoundError("no image named, and none in dataset/test: name one, or run `python download.py` first")


def _or_cpu(device):
    return "cpu" if torch.device(device).type == "cuda" and not torch.cuda.is_available() else device


def main(argv=None):
    parser = ArgumentParser(prog="predict.py", description="Outline the tumour in one image or in many.")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE|FOLDER", help="JPEG, PNG, TIFF or BMP; default: the tutorial's example")
    parser.add_argument("--model", default="best_model.pth", help="weights, ours or the tutorial's")
    parser.add_argument("--output", help="folder to write to; default: here for one image, predictions/ for several")
    parser.add_argument("--threshold", type=number(0.0, 1.0, float), default=0.5, help="foreground is above this probability")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    paths = expand(args.inputs) if args.inputs else [example()]
    single = len(paths) == 1 and not any(Path(given).is_dir() for given in args.inputs)
    model = load_model(args.model, device)
    output = output_folder(args.output or ("." if single else "predictions"), "--output")
    if single:
        predict_one(model, paths[0], output, args.threshold, device)
        return
    if "LOCAL_RANK" in os.environ:  # torchrun: to each process its share
        paths = paths[int(os.environ["RANK"])::int(os.environ["WORLD_SIZE"])]
    problems = predict_many(model, paths, output, args.threshold, device)
    print(f"saved {len(paths) - len(problems)} masks and overlays in {output}")
    if problems:
        raise ValueError(f"{len(problems)} of {len(paths)} images left out: {'; '.join(problems)}")


if __name__ == "__main__":
    run(main)
