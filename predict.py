"""Outline the tumour in an image, or in many (the tutorial's section 7).

examples:
  python predict.py                                  # the tutorial's example image
  python predict.py scan.png                         # predictions.png and scan_mask.png
  python predict.py scan.png --output mask.png       # only the mask, in that file
  python predict.py scans/ more/7.tif --output masks # NAME_mask.png and NAME_overlay.png of each
  python predict.py dataset/test                     # annotated: also report.json, report.png
  python predict.py scan.dcm --window 40 80          # DICOM; several frames: a mask of each
  python predict.py brain.nii.gz                     # a volume: brain_mask.nii.gz and a montage
  python predict.py --export model.onnx              # the model for other programs
  python predict.py scan.png --model model.onnx      # and here, without PyTorch
  torchrun --standalone --nproc_per_node=4 predict.py scans/   # a folder on four GPUs
  python predict.py --page                           # a page in the browser; needs gradio

Masks are 0 and 255, of the size of the image, or with several classes a palette image of class
numbers. The architecture and the size the model was trained at are read from the weights; a model
trained on crops takes each image at its own size.
"""

import os
import shlex
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from medseg.cli import ArgumentParser, add_device_flags, number, run_main
from medseg.coco import ANNOTATIONS, check_classes
from medseg.drawing import draw_labels, overlay, with_legend
from medseg.files import parallel_map
from medseg.images import (
    FORMAT_NAMES,
    IMAGE_SIZE,
    describe,
    full_size_labels,
    preprocess,
    read_image,
    resize_nearest,
    save_mask,
    save_overlay,
    save_png,
)
from medseg.predicting.inputs import (
    choose_output,
    data_set_images,
    default_model,
    describe_left_out,
    expand,
    left_aside,
    sort_inputs,
)
from medseg.predicting.onnx_model import OnnxModel
from medseg.settings import choose_window, window_limits

EXAMPLE = Path("dataset/test/27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg")  # the tutorial's


def load_model(model_path="best_model.pth", device="cuda"):
    """The trained UNet on `device` (the CPU where 'cuda' is not there), ready to predict.

    Raises FileNotFoundError; ValueError where the file does not hold the weights of a UNet.
    """
    import torch

    from medseg.device import available_device
    from net import load_model

    model = load_model(model_path)
    return model.to(available_device(device), memory_format=torch.channels_last).eval()


def preprocess_image(image_path, *, image_size=IMAGE_SIZE, n_channels=3):
    """Image file -> (normalised float32 tensor (1, n_channels, S, S), the resized PIL image).

    image_path: a path, or a PIL image read already. S = image_size; None keeps the image's own
    height and width. n_channels is 3, or 1 for grey. Raises FileNotFoundError or ValueError as
    `medseg.images.read_image` does.
    """
    import torch

    from data import normalize

    image = image_path if isinstance(image_path, Image.Image) else read_image(image_path)
    pixels = preprocess(image, image_size, n_channels)
    shown = pixels[..., 0] if n_channels == 1 else pixels
    return normalize(torch.from_numpy(pixels)[None]), Image.fromarray(shown)


def predict_mask(model, image_tensor, device="cuda", threshold=0.5):
    """Normalised image (B, 3, H, W) -> float32 mask (B, C, H, W), 1 above the threshold."""
    return (predict_probabilities(model, image_tensor, device) > threshold).float()


def predict_probabilities(model, image_tensor, device="cuda", *, autocast=nullcontext()):
    """Normalised image (B, 3, H, W) -> float32 probabilities (B, C, H, W) on the device.

    autocast: a context for the network, see `medseg.device.make_autocast`.
    Raises ValueError where the memory does not suffice.
    """
    import torch

    from medseg.device import available_device, out_of_memory

    device, (count, _, height, width) = available_device(device), image_tensor.shape
    try:
        with torch.inference_mode(), autocast:
            return model(image_tensor.to(device))
    except (MemoryError, RuntimeError) as error:
        memory = out_of_memory(error)
        if memory is None:
            raise
        other = "" if torch.device(device).type == "cpu" else "try --device cpu, or "
        raise ValueError(
            f"out of {memory} with {count} x {width}x{height} pixels: {other}give smaller images"
        ) from None


def visualize_result(
    original_image, predicted_mask, *, path="predictions.png", class_names=("foreground",)
):
    """Draw image, mask and overlay side by side to `path`.

    original_image: PIL image or uint8 array (H, W, 3); predicted_mask: array or tensor that
    squeezes to (H, W), of 0 and 1 or of class numbers.
    """
    # With Pillow: importing matplotlib would take as long as the prediction itself.
    picture = original_image
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    scale = 400 / max(picture.size)
    width, height = (max(round(side * scale), 1) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    labels = np.rint(np.asarray(predicted_mask)).astype(np.uint8)
    while labels.ndim > 2:  # an image of 1 pixel in a side keeps that axis
        labels = labels.squeeze(labels.shape.index(1))
    labels = resize_nearest(labels, height, width)
    n_classes = len(class_names)
    panels = {
        "Original Image": picture,
        "Predicted Mask": draw_labels(labels, n_classes),
        "Overlay": overlay(picture, labels, n_classes),
    }
    column = max(width, 150)
    figure = Image.new("RGB", (3 * column + 40, height + 50), (240, 240, 240))
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(18)
    for index, (title, panel) in enumerate(panels.items()):
        left = 10 + index * (column + 10)
        draw.text((left + column / 2, 32), title, fill="black", font=font, anchor="ms")
        figure.paste(panel, (left + (column - width) // 2, 40))
    save_png(with_legend(figure, class_names), path)


# ---- the model: weights in PyTorch, or an ONNX file without it -------------------------------


class TorchModel:
    """A UNet on its device, with the attributes and the method of an `OnnxModel`.

    precision: as --precision has it.
    """

    def __init__(self, model, device, precision="auto"):
        import torch

        from medseg.device import choose_precision, inference_batch_size, make_autocast

        self.model, self.device = model, torch.device(device)
        precision = choose_precision(precision, self.device)
        self.autocast = make_autocast(precision, self.device)
        self.image_size, self.n_channels = model.image_size, model.n_channels
        self.class_names, self.n_classes = model.class_names, model.n_classes
        self.window, self.orientation = model.window, model.orientation
        # Images of their own size come one at a time.
        self.batch_size = inference_batch_size(device) if model.image_size else 1

    def probabilities(self, pixels):
        """uint8 (B, H, W, n_channels) -> float32 (B, n_classes, H, W), values 0..1."""
        import torch

        from data import normalize

        images = normalize(torch.from_numpy(pixels))
        probabilities = predict_probabilities(
            self.model, images, self.device, autocast=self.autocast
        )
        return probabilities.cpu().numpy()


def find_device(name, path, precision="auto"):
    """The device that --device `name` means for the model file `path`; of ONNX files, None.

    Raises ValueError where there is no such device, or the file cannot run on it, or in the
    `precision` that --precision names.
    """
    if is_onnx(path):
        if name not in ("auto", "cpu"):
            raise ValueError(f"--device {name}: {path} runs on the CPU; a GPU needs the .pth file")
        if precision not in ("auto", "fp32"):
            raise ValueError(f"--precision {precision}: {path} runs in fp32; give the .pth file")
        return None
    from medseg.device import pick_device

    return pick_device(name)


def open_model(path, device="cuda", precision="auto"):
    """The TorchModel or OnnxModel in a file, by its suffix.

    Raises FileNotFoundError; ValueError where it holds no model that can be run here.
    """
    if Path(path).suffix.lower() in (".pt2", ".torchscript"):
        raise ValueError(
            f"{path}: made for other programs; give --model the weights (.pth) it was exported "
            "from, or an export to .onnx"
        )
    if is_onnx(path):
        return OnnxModel(path)
    from medseg.device import available_device, keep_freed_memory

    device = available_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return TorchModel(load_model(path, device), device, precision)


def is_onnx(path):
    return Path(path).suffix.lower() == ".onnx"


# ---- one image, many, a volume, a folder with annotations ------------------------------------


def predict_one(model, picture, output, threshold):
    """Predict one image; write the mask and, where `output` is a folder, the tutorial's figure.

    model, here and below: a TorchModel or OnnxModel.
    """
    image = picture.load()
    pixels = preprocess(image, model.image_size, model.n_channels)
    try:
        (probabilities,) = model.probabilities(pixels[None])
    except ValueError as error:  # out of memory
        raise ValueError(f"{picture.path}: {error}") from None
    labels, written = full_size_labels(probabilities, image.size, threshold), [output]
    if output.is_dir():
        written = [output / f"{picture.name}_mask.png", output / "predictions.png"]
        visualize_result(image, labels, path=written[1], class_names=model.class_names)
    save_mask(labels, written[0], model.class_names)
    print(describe(picture.path, labels, probabilities.max((1, 2)), model.class_names))
    print(f"saved {' and '.join(map(str, written))}")


def predict_many(model, pictures, output, threshold, scores=None):
    """Predict images in batches; write a mask and an overlay for each.

    scores: a FolderScores to tell of each, or None.
    Decoding runs ahead and writing behind in threads, a few batches of each at most; the threads
    leave PyTorch alone, whose own threads would compete with the network's.
    Returns [(path, line)] of the pictures that could not be predicted.
    """

    def read(picture):
        image = picture.load()
        return picture, image, preprocess(image, model.image_size, model.n_channels)

    def write(picture, image, probabilities):
        labels = full_size_labels(probabilities, image.size, threshold)
        save_mask(labels, output / f"{picture.name}_mask.png", names)
        save_overlay(image, labels, output / f"{picture.name}_overlay.png", names)
        if scores:
            scores.add(picture.path, image.size, probabilities)
        return describe(picture.path, labels, probabilities.max((1, 2)), names)

    batch_size, names, total = model.batch_size, model.class_names, len(pictures)
    problems, batch, writing = [], [], deque()
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit=" images", disable=None) as bar:

        def finish_writing(limit):
            while len(writing) > limit:
                tqdm.write(writing.popleft().result())
                bar.update()

        for count, item in enumerate(parallel_map(read, pictures), 1):
            if isinstance(item, Exception):
                problems.append((pictures[count - 1].path, str(item)))
                bar.update()
            else:
                batch.append(item)
            if batch and (len(batch) == batch_size or count == total):
                try:
                    probabilities = model.probabilities(np.stack([pixels for *_, pixels in batch]))
                    for (picture, image, _), own in zip(batch, probabilities, strict=True):
                        writing.append(pool.submit(write, picture, image, own))
                except ValueError as error:  # out of memory
                    problems += [(item[0].path, f"{item[0].path}: {error}") for item in batch]
                    bar.update(len(batch))
                batch = []
                finish_writing(2 * batch_size)
        finish_writing(0)
    return problems


def predict_volume(model, path, output, threshold, window):
    """Predict every slice of a NIfTI volume; write a mask volume and a montage of slices."""
    from medseg.formats.nifti import open_nifti, write_prediction

    volume, names = open_nifti(path, model.orientation), model.class_names
    pictures, highest = volume.pictures(window), np.zeros(len(names))
    masks = np.zeros((len(pictures), *pictures[0].shape), np.uint8)
    batches = np.arange(0, len(pictures), model.batch_size)
    for start in tqdm(batches, path.name, unit=" batches", disable=None):
        indices = range(start, min(start + model.batch_size, len(pictures)))
        images = [Image.fromarray(pictures[index]) for index in indices]
        rows = [preprocess(image, model.image_size, model.n_channels) for image in images]
        probabilities = model.probabilities(np.stack(rows))
        highest = np.maximum(highest, probabilities.max((0, 2, 3)))
        for index, own in zip(indices, probabilities, strict=True):
            masks[index] = full_size_labels(own, images[0].size, threshold)
    written = write_prediction(output, volume, pictures, masks, names)
    print(describe(path, masks, highest, names))
    print(f"saved {' and '.join(map(str, written))}")


def open_folder(model, folder, threshold):
    """The FolderScores of a folder with annotations, for the predictions of this model.

    Raises ValueError where the annotations are damaged or of other classes.
    """
    from data import open_split
    from medseg.predicting.report import FolderScores

    place = folder.resolve()  # `dataset/test/` and `.` have a parent too
    content = {"classes": None, "n_channels": model.n_channels}
    if model.n_classes > 1:
        content["classes"] = list(model.class_names)
    dataset = open_split(place.parent, place.name, model.image_size, **content)
    check_classes(dataset.coco, dataset.classes, folder)
    return FolderScores(dataset, threshold)


def report(model, folder, output, threshold, scores=None):
    """Score a folder that has annotations; write report.json and report.png to `output`.

    scores: its FolderScores after `predict_many`; images that it has not met are predicted here.
    Returns what report.json holds. The threshold that suits the model best is sought in the split
    `valid` beside the folder, never in the folder itself.
    Raises FileNotFoundError or ValueError where an annotated image cannot be read or predicted.
    """
    from data import load_split
    from medseg.predicting.report import predict_rows, threshold_sweep, write_report

    scores = scores or open_folder(model, folder, threshold)
    dataset, valid, sweep = scores.dataset, folder.resolve().parent / "valid", None
    for index in scores.missing():
        image = read_image(dataset.path(index))
        dataset.run_lengths(index, image.size)  # raises where the annotations are damaged
        pixels = preprocess(image, model.image_size, model.n_channels)
        (probabilities,) = model.probabilities(pixels[None])
        scores.add(dataset.path(index), image.size, probabilities)
    if (valid / ANNOTATIONS).exists() and not valid.samefile(folder):
        content = {"classes": dataset.classes, "n_channels": dataset.n_channels}
        rows = load_split(valid.parent, valid.name, model.image_size, **content)
        sweep = threshold_sweep(predict_rows(model, rows), model.class_names)
    return write_report(output, str(folder), scores, sweep, model.class_names)


# ---- the command line ------------------------------------------------------------------------


def example():
    """The image to show when none is named. FileNotFoundError where there is no data set."""
    images = data_set_images()
    if not images:
        raise FileNotFoundError(
            "no image named, and none in dataset/test: name one, or run `python download.py` first"
        )
    chosen = EXAMPLE if EXAMPLE in images else images[0]
    print(f"no image named: taking {chosen}")
    return chosen


def annotated_folder(inputs):
    """The one folder among the inputs that has annotations, or None. ValueError where two have."""
    folders = [folder for folder in map(Path, inputs) if (folder / ANNOTATIONS).exists()]
    if len(folders) > 1:
        raise ValueError(
            f"{folders[0]} and {folders[1]} both have annotations, and a report is of one "
            "folder: score them apart, with another --output"
        )
    return folders[0] if folders else None


def export_model(target, path, inputs):
    """Write the weights in the file `path` to `target`, in the format of its suffix."""
    if inputs:
        raise ValueError(f"--export {target}: takes no image; predict afterwards, with --model")
    if Path(path).suffix.lower() in (".onnx", ".pt2", ".torchscript"):
        raise ValueError(f"{path}: an export already; give --model the weights (.pth)")
    if Path(target).suffix.lower() == ".pth" and Path(target).exists():
        raise ValueError(f"--export {target}: there already, maybe trained; name another file")
    from medseg.predicting.export import SHAPES, check_target, export
    from net import load_model

    check_target(target)
    difference = export(load_model(path), target)
    sizes = ", ".join("x".join(map(str, shape)) for shape in SHAPES)
    print(f"saved {target}; largest difference from PyTorch {difference:.1e} (BxHxW {sizes})")
    if target.lower().endswith(".onnx"):
        print(f"next: python predict.py IMAGE --model {shlex.quote(target)}")


def make_parser():
    parser = ArgumentParser("predict.py", __doc__)
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="IMAGE|FOLDER",
        help=f"DICOM, NIfTI, {FORMAT_NAMES}; without one, the tutorial's example image",
    )
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="FILE",
        help="weights or an ONNX file; default: best_model.pth, and where there is none "
        "dataset/tumor.pth, which comes with the repository",
    )
    add(
        "--threshold",
        type=number(0.0, 1.0, float),
        default=0.5,
        help="foreground is above this probability",
    )
    add_device_flags(add)
    add(
        "--export",
        metavar="FILE",
        help="write --model to FILE for other programs: .onnx, .pt2 (torch.export) or "
        ".torchscript (torch.jit, which PyTorch has deprecated); or its weights in half precision "
        "(float16) to FILE.pth",
    )
    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        metavar="FOLDER|FILE",
        help="where to write; default: here for one image, predictions/ for several",
    )
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("CENTER", "WIDTH"),
        help="of DICOM or NIfTI values; default: that of the weights, or the file's own, or 0.5 "
        "to 99.5 %% of a volume",
    )
    add = parser.add_argument_group("page").add_argument
    add("--page", action="store_true", help="open a page in the browser; needs gradio")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where the page listens")
    add("--port", type=number(0, 65535), metavar="N", help="default: 7860 or the next free one")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.model = args.model or default_model()
    if args.export:
        export_model(args.export, args.model, args.inputs)
        return
    device = find_device(args.device, args.model, args.precision)
    window = tuple(args.window) if args.window else None
    if window:
        try:
            window_limits(window)
        except ValueError as error:
            raise ValueError(f"--window: {error}") from None
    if args.page:
        from medseg.page.app import serve

        if args.inputs or args.output:
            raise ValueError("--page takes no images and no --output: drop images on the page")
        address = {"host": args.host, "port": args.port}
        model = open_model(args.model, device, args.precision)
        window = choose_window(window, model.window)
        serve(model, args.model, **address, threshold=args.threshold, window=window)
        return
    predict_inputs(args, device, window)


def predict_inputs(args, device, window):
    """Predict the files and folders of the command line; ValueError on those that failed."""
    rank, world = 0, 1
    if "LOCAL_RANK" in os.environ:  # torchrun: to each process its part
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    paths = expand(args.inputs or [example()])
    for folder in filter(Path.is_dir, map(Path, args.inputs)):
        if rank == 0 and (aside := left_aside(folder)):
            print(f"left aside in {folder}: {aside}")
    named_one = len(paths) == 1 and not any(Path(given).is_dir() for given in args.inputs)
    model = open_model(args.model, device, args.precision)
    window = choose_window(window, model.window)
    pictures, volumes, problems = sort_inputs(paths, window)
    if named_one and problems:
        raise ValueError(problems[0][1])
    total = len(pictures) + len(volumes) + len(problems)
    single = named_one and total == 1
    output = choose_output(args.output, single, list(paths))
    for path in volumes[rank::world]:
        try:
            predict_volume(model, path, output, args.threshold, window)
        except (FileNotFoundError, ValueError) as error:
            problems.append((path, str(error)))
            if single:
                raise
    if single:
        for picture in pictures:
            predict_one(model, picture, output, args.threshold)
        return
    folder, scores, unscored = annotated_folder(args.inputs), None, ""
    if folder:  # the report is made of the predictions of one process
        pictures = pictures if rank == 0 else []
        scores = open_folder(model, folder, args.threshold) if rank == 0 else None
    else:
        pictures = pictures[rank::world]
    if pictures:
        failed = predict_many(model, pictures, output, args.threshold, scores)
        problems += failed
        print(f"saved {len(pictures) - len(failed)} masks and overlays in {output}")
    if scores and problems and scores.missing():
        unscored = f"; {folder} has no report without them"
    elif scores:
        from medseg.predicting.report import print_report

        print_report(folder, output, report(model, folder, output, args.threshold, scores))
    if problems:
        raise ValueError(describe_left_out(problems, len(paths), total) + unscored)


if __name__ == "__main__":
    # With --page, Python would wait for a prediction that a browser has asked for.
    run_main(main, exit_at_once=True)
