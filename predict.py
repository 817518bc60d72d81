"""Outline the tumour in an image, or in many (the tutorial's section 7).

examples:
  python predict.py                                  # the tutorial's example image
  python predict.py scan.png                         # scan_mask.png and scan_prediction.png
  python predict.py scan.png --output mask.png       # only the mask, in that file
  python predict.py scans/ more/7.tif --output masks # NAME_mask.png and NAME_overlay.jpg of each
  python predict.py dataset/test                     # annotated: also report.json, report.png
  python predict.py scans/ --pixel-size 0.5          # areas in predictions.csv in mm2 too
  python predict.py scans/ --write labelme --output scans   # to be corrected in LabelMe
  python predict.py scan.dcm --window 40 80          # DICOM; several frames: a mask of each
  python predict.py brain.nii.gz                     # a volume: brain_mask.nii.gz and a montage
  python predict.py --export model.onnx              # the model for other programs
  python predict.py scan.png --model model.onnx      # and here, without PyTorch
  python predict.py scan.png --model runs/own/fold*/best_model.pth   # the mean of several models
  python predict.py --page                           # a page in the browser; needs gradio

Masks are 0 and 255, of the size of the image, or with several classes a palette image of class
numbers. The architecture and the size the model was trained at are read from the weights; a model
trained on crops takes each image at its own size.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import medseg.threads  # noqa: F401, sets what torch reads when it is loaded

import numpy as np
from PIL import Image
from tqdm import tqdm

from medseg import cli, coco, drawing, pieces
from medseg import images as pictures
from medseg.files import available_cores
from medseg.predicting import ensemble, inputs
from medseg.predicting.assessment import assess_volume, print_assessments
from medseg.predicting.flags import choose_inference, parse_arguments
from medseg.predicting.models import OnnxModel, TorchModel, default_model, predict_probabilities
from medseg.predicting.reading import AHEAD_PIXELS, read_ahead, take_batch
from medseg.results.folder import MAX_LINES, Results, describe_run
from medseg.results.volume import VolumeMasks
from medseg.settings import choose_window

# ---- the tutorial's functions ----------------------------------------------------------------


def load_model(model_path="best_model.pth", device="cuda"):
    """The trained UNet on `device` (the CPU where 'cuda' is not there), ready to predict.

    Raises FileNotFoundError; ValueError where the file does not hold the weights of a UNet.
    """
    import torch

    import net
    from medseg.device import available_device, keep_freed_memory

    device = available_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return net.load_model(model_path).to(device, memory_format=torch.channels_last).eval()


def preprocess_image(image_path, *, image_size=pictures.IMAGE_SIZE, n_channels=3):
    """Image file -> (normalised float32 tensor (1, n_channels, S, S), the resized PIL image).

    image_path: a path, or a PIL image read already. S = image_size; None keeps the image's own
    height and width. n_channels is 3, or 1 for grey. Raises FileNotFoundError or ValueError as
    `medseg.images.read_image` does.
    """
    import torch

    from data import normalize

    image = image_path if isinstance(image_path, Image.Image) else pictures.read_image(image_path)
    pixels = pictures.preprocess(image, image_size, n_channels)
    shown = pixels[..., 0] if n_channels == 1 else pixels
    return normalize(torch.from_numpy(pixels)[None]), Image.fromarray(shown)


def predict_mask(model, image_tensor, device="cuda", threshold=0.5):
    """Normalised image (B, 3, H, W) -> float32 mask (B, C, H, W), 1 above the threshold."""
    return (predict_probabilities(model, image_tensor, device) > threshold).float()


def visualize_result(
    original_image,
    predicted_mask,
    *,
    path="predictions.png",
    class_names=("foreground",),
    name=None,
):
    """Draw image, mask and overlay side by side to `path`.

    original_image: PIL image or uint8 array (H, W, 3); predicted_mask: array or tensor that
    squeezes to (H, W), of 0 and 1 or of class numbers. name: of the image's file, which then stands
    above, with a legend of a single class too.
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
    labels = pictures.resize_nearest(labels, height, width)
    panels = {
        "Original Image": picture,
        "Predicted Mask": drawing.draw_labels(labels, len(class_names)),
        "Overlay": drawing.overlay(picture, labels, len(class_names)),
    }
    figure = drawing.draw_panels(panels, name)
    pictures.save_png(drawing.with_legend(figure, class_names, single=name is not None), path)


# ---- one image, many, the slices of a volume -------------------------------------------------
# All go through `predict_images`, which does to each what preprocess_image and predict_mask do.


def open_model(path, device="auto", precision="auto", *, images=0):
    """The TorchModel or OnnxModel in a file, by its suffix.

    device, precision: as the flags; images: how many are to be predicted, see TorchModel.
    Raises FileNotFoundError; ValueError where it holds no model that can be run here.
    """
    suffix = Path(path).suffix.lower()
    if suffix in (".pt2", ".torchscript"):
        raise ValueError(
            f"{path}: made for other programs; give --model the weights (.pth) it was exported "
            "from, or an export to .onnx"
        )
    if suffix == ".onnx":
        return OnnxModel(path, device, precision)
    from medseg.device import pick_device

    device = pick_device(device)
    return TorchModel(load_model(path, device), device, precision, images)


def open_models(paths, device="auto", precision="auto", images=0):
    """The model in a file, or the `Ensemble` of those in several; ValueError where they differ."""
    models, settled = [], precision
    for path in paths:
        is_onnx = Path(path).suffix.lower() == ".onnx"
        models.append(open_model(path, device, precision if is_onnx else settled, images=images))
        if not is_onnx:
            settled = models[-1].precision  # found once: all weights compute in the same one
    if len(models) == 1:
        return models[0]
    print(f"taking the mean of {len(models)} models")
    return ensemble.Ensemble(models, paths)


def predict_images(model, frames, problems=None):
    """Yield (frame, PIL image, float32 probabilities (C, S, S), `Assessment`) of each `Frame`.

    model, here and below: a TorchModel, OnnxModel or Ensemble.
    problems: a list; those that cannot be predicted are left out and each adds (path, why).
    Without it, the first of them is raised as a FileNotFoundError or ValueError.
    """

    def leave_out(frame, error):
        if problems is None:
            raise error
        problems.append((frame.path, str(error)))

    readable = read_ahead(model, frames, leave_out)
    while batch := take_batch(readable, model.batch_size):
        frames, images, pixels = zip(*batch, strict=True)
        try:
            found = model.assess(np.stack(pixels) if len(batch) > 1 else pixels[0][None])
        except ValueError as error:  # out of memory
            for frame in frames:
                leave_out(frame, ValueError(f"{frame.path}: {error}"))
            continue
        ready = list(zip(frames, images, *found, strict=True))
        batch = images = pixels = found = None  # large ones are gone when the next come
        while ready:
            yield ready.pop(0)


def predict_one(model, frame, output, threshold, *, results=None):
    """Write the mask of an image and, where `output` is a folder, the tutorial's figure.

    results: a Results of this folder that says what is written besides.
    """
    ((_, image, probabilities, assessment),) = predict_images(model, [frame])
    marked = np.zeros(256, np.int64)
    labels = model.labels(probabilities, image.size, threshold, frame.spacing, marked=marked)
    masks = model.masks(probabilities, image.size, threshold, frame.spacing)
    written, names = [output], model.class_names
    if output.is_dir():
        results, columns = results or Results(output, names), assessment._asdict()
        written = results.add(frame, image, labels, probabilities, masks=masks, **columns)
        if "overlay" in results.write:
            written.append(output / f"{frame.name}_prediction.png")
            shown = {"class_names": names, "name": frame.title}
            visualize_result(image, labels, path=written[-1], **shown)
    else:
        pictures.save_mask(labels, output, names)
    measured = labels if masks is None else masks
    print(model.describe(frame.path, measured, probabilities.max((1, 2)), threshold, marked))
    print_assessments([(frame.path, assessment)])
    print(f"saved {' and '.join(map(str, written)) or 'nothing'}")


def predict_many(model, frames, output, threshold, scores=None, *, results=None, lines=True):
    """Write a mask and an overlay for each image, in threads, a few batches behind at most.

    scores: a FolderScores to tell of each, or None. results: a Results of this folder that is to
    have their rows. lines: print one on each.
    Returns [(path, why)] of those that could not be predicted.
    """

    def write(frame, image, probabilities, assessment):
        marked = np.zeros(256, np.int64)
        labels = model.labels(probabilities, image.size, threshold, frame.spacing, marked=marked)
        masks = model.masks(probabilities, image.size, threshold, frame.spacing)
        dice = scores.add(frame.path, image.size, probabilities) if scores else None
        columns = assessment._asdict()
        results.add(frame, image, labels, probabilities, masks=masks, dice=dice, **columns)
        measured = labels if masks is None else masks
        return model.describe(frame.path, measured, probabilities.max((1, 2)), threshold, marked)

    def tell(line):
        if lines:
            tqdm.write(line)

    problems, writing, assessed = [], deque(), []
    results = results or Results(output, model.class_names)
    predicted = predict_images(model, frames, problems)
    bar = tqdm(total=len(frames), unit=" images", disable=None)  # which would keep what it is given
    with bar, ThreadPoolExecutor(available_cores()) as pool:
        for frame, image, probabilities, assessment in predicted:
            bar.update()
            assessed.append((frame.title, assessment))
            writing.append(pool.submit(write, frame, image, probabilities, assessment))
            large = image.width * image.height > AHEAD_PIXELS // (2 * model.batch_size)
            image = probabilities = None  # as large
            while len(writing) > (0 if large else 2 * model.batch_size):
                tell(writing.popleft().result())
        for line in writing:
            tell(line.result())
    print_assessments(assessed)
    if frames:
        count = len(frames) - len(problems)
        print(f"saved {count} {results.what()} in {output}" if results.what() else f"{count} done")
    return problems


def predict_volume(model, file, output, threshold, window, *, results=None, lines=True):
    """Write a mask volume and, where `output` is a folder, a montage of slices.

    results: a Results of this folder that is to have the rows of the volume. lines: print some.
    """
    from medseg.formats.nifti import write_mask

    frames, volume = inputs.open_file(file, window, model.orientation)
    pieces.check_clean(model.inference.clean, volume.slice_spacing, file.path)
    found = VolumeMasks(volume, model.n_classes, results.write if results else ())
    predicted, assessed, written = predict_images(model, frames), [], [output]
    marked = np.zeros(256, np.int64)
    bar = tqdm(predicted, file.path.name, len(frames), unit=" slices", disable=None)
    for frame, image, probabilities, assessment in bar:
        labels = model.labels(probabilities, image.size, threshold, frame.spacing, marked=marked)
        masks = model.masks(probabilities, image.size, threshold, frame.spacing)
        found.add(labels, probabilities, masks)
        assessed.append((frame.title, assessment))
    if results:
        columns = assess_volume([one for _, one in assessed])._asdict()
        written = results.add_volume(found, window, **columns)
    else:
        write_mask(output, volume, found.masks)
    if lines:
        measured = found.masks if found.class_masks is None else found.class_masks
        print(model.describe(file.path, measured, found.highest, threshold, marked))
        print_assessments(assessed, "slices")
        print(f"saved {' and '.join(map(str, written)) or 'nothing'}")


# ---- a folder with annotations: scores -------------------------------------------------------


def open_folder(model, folder, threshold, **inference):
    """The FolderScores of a folder with annotations, for the predictions of this model.

    inference: flips and clean-up of these, and the spacing, as FolderScores takes them.
    Raises ValueError where the annotations are damaged or of other classes.
    """
    from data import open_split
    from medseg.predicting.report import FolderScores

    place = folder.resolve()  # `dataset/test/` and `.` have a parent too
    content = {"classes": None, "n_channels": model.n_channels}
    if model.n_classes > 1:
        content["classes"] = list(model.class_names)
    dataset = open_split(place.parent, place.name, model.image_size, **content)
    coco.check_classes(dataset.coco, dataset.classes, folder)
    return FolderScores(dataset, threshold, exclusive=model.exclusive, **inference)


def report(model, folder, scores, output):
    """Write report.json and report.png of an annotated folder to `output`.

    scores: its FolderScores after `predict_many`; images that it has not met are predicted here.
    Returns what report.json holds. The threshold that suits the model best is sought in the split
    `valid` beside the folder, never in the folder itself.
    Raises FileNotFoundError or ValueError where an annotated image cannot be read or predicted.
    """
    from data import Batches, load_split, open_split
    from medseg.predicting.report import threshold_sweep, write_report

    scores.complete(model)
    valid, sweep = folder.resolve().parent / "valid", None
    if (valid / coco.ANNOTATIONS).exists() and not valid.samefile(folder):
        content = {"classes": scores.dataset.classes, "n_channels": model.n_channels}
        rows = load_split(valid.parent, valid.name, model.image_size, **content)
        sizes = {"n_channels": model.n_channels, "n_classes": model.n_classes}
        batches = Batches(rows, model.batch_size, model.device, **sizes)
        dataset = open_split(valid.parent, valid.name, model.image_size, **content)
        sweep = threshold_sweep(model, batches, dataset, scores.spacing)
    return write_report(output, str(folder), scores, sweep, model.class_names)


def predict_annotated(model, folder, frames, output, threshold, problems, **options):
    """`predict_many`, and a report on the folder; what it had to leave out is added to `problems`.

    options: its own. Returns whether there is a report: not where an image could not be predicted.
    """
    from medseg.predicting.report import print_report

    inference = {"flips": model.inference.flips, "clean": model.inference.clean}
    spacing = frames[0].spacing if frames else None  # pictures have that of --pixel-size
    scores = open_folder(model, folder, threshold, spacing=spacing, **inference)
    problems += predict_many(model, frames, output, threshold, scores, **options)
    if problems and scores.missing():
        return False
    print_report(folder, output, report(model, folder, scores, output))
    return True


# ---- the command line ------------------------------------------------------------------------


def main(argv=None):
    args = parse_arguments(argv, __doc__)
    pictures.set_pixel_limit(args.max_megapixels)
    args.model = paths = args.model or [default_model()]
    if args.export:
        from medseg.predicting.export import export_model

        return export_model(args.export, paths, args.inputs)
    if args.page and (args.inputs or args.output):
        raise ValueError("--page takes no images and no --output: drop images on the page")
    model = open_models(paths, args.device, args.precision, inputs.count_files(args.inputs))
    if model.precision_note:
        print(f"precision: {model.precision}{model.precision_note}")
    window = choose_window(args.window, model.window)
    model.inference, note = choose_inference(args, model.recorded, model.trained_flips)
    if note:
        print(note)
    args.threshold = model.inference.threshold
    if args.page:
        from medseg.predicting.page import serve

        address = args.host, args.port, args.auth
        serve(model, paths, address, window=window, pixel_size=args.pixel_size)
    else:
        predict_inputs(args, model, window)


def predict_inputs(args, model, window):
    """Predict the files and folders of the command line; ValueError on those that failed."""
    paths = args.inputs or [inputs.example_image()]
    files = inputs.expand(paths)
    inputs.print_left_aside(paths)
    frames, volumes, problems = inputs.sort_files(files, window, args.pixel_size)
    total = len(frames) + len(volumes) + len(problems)
    named = len(files) == 1 and not Path(paths[0]).is_dir()
    if named and problems:
        raise ValueError(problems[0][1])
    for frame in frames:
        pieces.check_clean(model.inference.clean, frame.spacing, frame.path)
    single = named and total == 1
    output = inputs.choose_output(args.output, single, files)
    folder, scored = inputs.annotated_folder(paths), True
    results = Results(output, model.class_names, args.write, args.simplify)
    results.check(frames, volumes, figure=single, report=folder is not None)
    if single and not output.is_dir():  # the mask alone, in this file
        if volumes:
            return predict_volume(model, volumes[0], output, args.threshold, window)
        return predict_one(model, frames[0], output, args.threshold)
    options = {"results": results, "lines": total <= MAX_LINES}
    titles = [*(frame.title for frame in frames), *(file.path.name for file in volumes)]
    try:
        for file in volumes:
            try:
                predict_volume(model, file, output, args.threshold, window, **options)
            except (FileNotFoundError, ValueError) as error:
                problems.append((file.path, str(error)))
        shared = (output, args.threshold)
        if single and frames:
            predict_one(model, frames[0], *shared, results=results)
        elif folder is None:
            problems += predict_many(model, frames, *shared, **options)
        else:
            scored = predict_annotated(model, folder, frames, *shared, problems, **options)
    finally:  # what was measured is kept, also where a report fails
        results.finish(titles, describe_run(args, model, window), args.model, problems)
    if single and problems:
        raise ValueError(problems[0][1])
    if problems:
        unscored = "" if scored else f"; {folder} has no report without them"
        raise ValueError(inputs.describe_left_out(problems, len(files), total) + unscored)


if __name__ == "__main__":
    # With --page, Python would wait for a prediction that a browser has asked for.
    cli.run_main(main, exit_at_once=True)
