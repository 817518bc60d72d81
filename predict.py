"""Outline the tumour in an image, or in many (the tutorial's section 7).

    python predict.py                                  # the tutorial's example image, or the first one there is
    python predict.py scan.png                         # predictions.png and scan_mask.png
    python predict.py scans/ more/7.tif --output masks   # masks/<name>_mask.png and masks/<name>_overlay.png each
    python predict.py dataset/test                     # a folder with annotations: also report.json and report.png

Masks are 0 and 255, of the size of the image. The architecture and the size the model was trained at are
read from the weights. `torchrun --standalone --nproc_per_node=N predict.py scans/` shares a folder among N GPUs.
"""
import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import net
from data import (ANNOTATIONS, MEAN, STD, SUFFIXES, ArgumentParser, Batches, COCOSegmentationDataset, each, load_coco, load_split, normalize,
                  number, outline, output_folder, preprocess, read_image, resize_nearest, run, whole)
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


# ---- scores of a folder with annotations -----------------------------------------------------

def hausdorff95(one, other):
    """95th percentile Hausdorff distance of two bool arrays (H, W) in pixels; NaN where one is empty.

    The larger of the two directed ones, between the pixels of the outlines: Taha, Hanbury, BMC Medical Imaging 2015.
    """
    if not one.any() or not other.any():
        return math.nan
    distances = torch.cdist(*(torch.from_numpy(np.argwhere(outline(mask))).double() for mask in (one, other)))
    return max(np.percentile(distances.amin(side).numpy(), 95) for side in (0, 1))


def count_pixels(model, rows, thresholds, device):
    """Pixels of each image at each threshold, int array (N, T, 4) of tp, fp, fn, tn, and HD95 at the first, (N,).

    rows: as of `data.load_split`; scored at that size, as train.py does.
    """
    counts, distances = [], []
    for images, masks in Batches(rows, 4 if torch.device(device).type == "cpu" else 16, device):
        probabilities, truth = predict_probabilities(model, images, device).cpu().numpy(), masks.cpu().numpy() > 0.5
        found = np.stack([probabilities > threshold for threshold in thresholds], 1)[:, :, 0]  # (B, T, H, W)
        tp, fp, fn = ((one & other).sum((2, 3)) for one, other in ((found, truth), (found, ~truth), (~found, truth)))
        counts.append(np.stack([tp, fp, fn, truth[0].size - tp - fp - fn], 2))
        distances += [hausdorff95(answer, mask) for answer, mask in zip(found[:, 0], truth[:, 0])]
    return np.concatenate(counts), np.array(distances)


def image_dice(counts):
    """(N, 4) of tp, fp, fn, tn -> (N,) Dice; 1 where truth and answer are both empty."""
    tp, fp, fn, _ = counts.T
    return np.divide(2 * tp, 2 * tp + fp + fn, out=np.ones(len(counts)), where=tp + fp + fn > 0)


def scores(counts):
    """(N, 4) -> dict of train.py's metrics of the summed pixels, and image_dice, the mean of the images'."""
    from train import metrics
    return {**metrics(*counts.sum(0).tolist()), "image_dice": image_dice(counts).mean()}


def confidence(counts, draws=1000, seed=0):
    """For each score the 2.5th and 97.5th percentile over bootstrap samples of the images (Efron's percentile method).

    It says how much the score owes to the choice of images; not what another training, or another hospital, would give.
    """
    rng = np.random.default_rng(seed)
    samples = [scores(counts[rng.integers(0, len(counts), len(counts))]) for _ in range(draws)]
    return {name: np.percentile([sample[name] for sample in samples], [2.5, 97.5]).tolist() for name in samples[0]}


def report(model, folder, output, threshold, device):
    """Score a folder that has annotations; write report.json and report.png. Returns what report.json holds.

    The threshold that suits the model best is sought in the split `valid` beside the folder, never in the folder itself.
    """
    given, folder = folder, folder.resolve()  # `dataset/test/` and `.` have a parent too
    dataset = COCOSegmentationDataset(load_coco(folder), folder)
    names = [dataset.path(index).name for index in range(len(dataset))]
    rows = load_split(folder.parent, folder.name, model.image_size)
    curve, thresholds, valid = None, [threshold], folder.parent / "valid"
    if (valid / ANNOTATIONS).exists() and not valid.samefile(folder):
        tried = [step / 20 for step in range(1, 20)]
        pixels, _ = count_pixels(model, load_split(valid.parent, valid.name, model.image_size), tried, device)
        curve = {"thresholds": tried, "dice": [scores(pixels[:, index])["dice"] for index in range(len(tried))]}
        thresholds.append(tried[int(np.argmax(curve["dice"]))])
    counts, distances = count_pixels(model, rows, thresholds, device)
    dice, area = image_dice(counts[:, 0]), counts[:, 0, 0] + counts[:, 0, 2]
    found = {
        "folder": str(given), "images": len(rows), "image_size": model.image_size, "threshold": threshold,
        "scores": scores(counts[:, 0]), "confidence_95": confidence(counts[:, 0]),
    }
    measured = distances[~np.isnan(distances)]
    found["hd95"] = {"mean": float(measured.mean()) if len(measured) else None, "median": float(np.median(measured)) if len(measured) else None,
                     "left_out": int(np.isnan(distances).sum())}
    found["valid"] = curve and {**curve, "chosen_threshold": thresholds[1], "scores_with_it": scores(counts[:, 1])}
    found["by_lesion_size"] = []  # thirds
    groups = np.searchsorted(np.unique(np.quantile(area[area > 0], [1 / 3, 2 / 3])), area, side="right") if area.any() else area
    for group in np.unique(groups[area > 0]):
        inside = (area > 0) & (groups == group)
        own = scores(counts[inside, 0])
        found["by_lesion_size"].append({"pixels": [int(area[inside].min()), int(area[inside].max())], "images": int(inside.sum()),
                                        "dice": own["dice"], "image_dice": own["image_dice"]})
    found["no_lesion"] = {"images": int((area == 0).sum()), "with_false_alarm": int(((area == 0) & (counts[:, 0, 1] > 0)).sum())}
    found["per_image"] = {name: round(float(value), 4) for name, value in zip(names, dice)}
    with whole(output / "report.json") as file:
        file.write(json.dumps(found, indent=1).encode())
    draw_report(model, rows, names, dice, area > 0, found, output / "report.png", device)
    return found


def draw_report(model, rows, names, dice, lesion, found, path, device):
    """Draw what `report` found to one picture: scores, histogram, threshold curve, sizes, and the best (with a lesion), median and worst images."""
    from matplotlib.figure import Figure

    from train import save_figure

    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.subplots(3, 4)
    (table, histogram, curve, sizes), cases = axes[0], axes[1:].flat
    table.axis("off")
    lines = [f"{name:<14} {value:.3f}  [{found['confidence_95'][name][0]:.3f}, {found['confidence_95'][name][1]:.3f}]" for name, value in found["scores"].items()]
    distance = found["hd95"]["median"]
    lines += ["", f"threshold {found['threshold']:g}, {found['images']} images of {found['image_size']}x{found['image_size']}", "95 % intervals: bootstrap over images",
              f"HD95 median {distance:.1f} px, {found['hd95']['left_out']} left out" if distance is not None else "HD95: no image has both masks"]
    table.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=9, transform=table.transAxes)
    histogram.hist(dice, bins=20, range=(0, 1))
    histogram.set(title="Dice of each image", xlabel="Dice", ylabel="images")
    if found["valid"]:
        curve.plot(found["valid"]["thresholds"], found["valid"]["dice"], marker=".")
        chosen = found["valid"]["chosen_threshold"]
        curve.axvline(chosen, color="gray", linestyle="--")
        curve.set(title=f"on valid: best at {chosen:g}; with it here Dice {found['valid']['scores_with_it']['dice']:.3f}", xlabel="threshold", ylabel="Dice", ylim=(0, 1))
    else:
        curve.axis("off")
        curve.text(0.5, 0.5, "no other split valid:\nthreshold as given", ha="center")
    sizes.bar([f"{group['pixels'][0]} to {group['pixels'][1]}\n({group['images']})" for group in found["by_lesion_size"]],
              [group["image_dice"] for group in found["by_lesion_size"]])
    sizes.set(title="mean Dice by lesion size", xlabel="pixels (images)", ylim=(0, 1))

    order = np.argsort(-dice, kind="stable")
    middle = max(len(order) // 2 - 1, 0)
    chosen = {"best": order[np.argsort(~lesion[order], kind="stable")][:2], "median": order[middle:middle + 3], "worst": order[-3:]}
    for axis in axes[1:].flat:
        axis.axis("off")
    for axis, (kind, index) in zip(cases, [(kind, index) for kind, indices in chosen.items() for index in indices]):
        images, masks = next(iter(Batches(rows[index:index + 1], 1, device)))
        answer = predict_mask(model, images, device, found["threshold"]).cpu().numpy()[0, 0] > 0
        picture = np.clip(images[0].permute(1, 2, 0).cpu().numpy() * STD + MEAN, 0, 1)
        picture[answer] = picture[answer] * 0.6 + np.array([0.4, 0, 0])
        picture[outline(masks[0, 0].cpu().numpy())] = (0, 1, 0)
        axis.imshow(picture)
        axis.set_title(f"{kind}: {names[index].split('_')[0]}, Dice {dice[index]:.2f}", fontsize=9)
    figure.suptitle(f"{found['folder']}: answer red, true outline green", fontsize=11)
    save_figure(figure, path)


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
    annotated = [folder for folder in map(Path, args.inputs) if (folder / ANNOTATIONS).exists()]
    if len(annotated) > 1:
        raise ValueError(f"{annotated[0]} and {annotated[1]} both have annotations, and a report is of one folder: score them apart, with another --output")
    for folder in annotated if os.environ.get("RANK", "0") == "0" else []:
        found = report(model, folder, output, args.threshold, device)
        say = {name: f"{value:.4f} [{found['confidence_95'][name][0]:.4f}, {found['confidence_95'][name][1]:.4f}]" for name, value in found["scores"].items()}
        print(f"{folder}: Dice {say['dice']}, per-image Dice {say['image_dice']}, IoU {say['iou']}, accuracy {say['acc']} "
              f"(background everywhere: {found['scores']['background_acc']:.4f}); saved {output / 'report.json'} and {output / 'report.png'}")
    if problems:
        raise ValueError(f"{len(problems)} of {len(paths)} images left out: {'; '.join(problems)}")


if __name__ == "__main__":
    run(main)
