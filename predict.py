"""Outline the tumour in an image, or in many (the tutorial's section 7).

examples:
  python predict.py                                  # the tutorial's example image
  python predict.py scan.png                         # scan_mask.png, _overlay.jpg, _prediction.png
  python predict.py scan.png --output mask.png       # only the mask, in that file
  python predict.py scans/ more/7.tif --output masks # NAME_mask.png and NAME_overlay.jpg of each
  python predict.py dataset/test                     # annotated: also report.json, report.png
  python predict.py scans/ --pixel-size 0.5          # areas in predictions.csv in mm2 too
  python predict.py scans/ --write labelme --output scans   # to be corrected in LabelMe
  python predict.py scan.dcm --window 40 80          # DICOM; several frames: a mask of each
  python predict.py brain.nii.gz                     # a volume: brain_mask.nii.gz and a montage
  python predict.py --export model.onnx              # the model for other programs
  python docs/predict_onnx.py model.onnx scan.png    # which predicts without PyTorch
  python predict.py scan.png --model runs/own/fold*/best_model.pth   # the mean of several models
  python predict.py --page                           # a page in the browser; needs gradio

Masks are 0 and 255, of the size of the image, or with several classes a palette image of class
numbers. The architecture and the size the model was trained at are read from the weights; a model
trained on crops takes each image at its own size.
"""

from functools import partial
from pathlib import Path

import medseg.threads  # noqa: F401, sets what torch reads when it is loaded

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import net
from medseg import cli, pieces, predictor
from medseg import device as devices
from medseg import images as pictures
from medseg.files import VOLUME_SUFFIXES
from medseg.normalization import normalize
from medseg.predicting import ahead, flags, inputs
from medseg.results.folder import MAX_LINES, Results, describe_run
from medseg.results.masks import make_masks
from medseg.samples import set_pixel_limit
from medseg.settings import choose_window
from medseg.weights import default_model

# ---- the tutorial's functions ----------------------------------------------------------------


def load_model(model_path="best_model.pth", device="cuda"):
    """The trained UNet on `device` (the CPU where 'cuda' is not there), ready to predict.

    Raises FileNotFoundError; ValueError where the file does not hold the weights of a UNet.
    """
    chosen = devices.available_device(device)
    if chosen.type == "cpu":
        devices.keep_freed_memory()
    return net.load_model(model_path).to(chosen, memory_format=torch.channels_last).eval()


def preprocess_image(image_path, *, image_size=pictures.IMAGE_SIZE, n_channels=3, normalized=True):
    """Image file -> (normalised float32 tensor (1, n_channels, S, S), the resized PIL image).

    image_path: a path, or a `medseg.images.Picture`, a PIL image, an array of uint8, (H, W) or
    (H, W, C). S = image_size; None keeps the image's own height and width. Without `normalized` the
    tensor is of uint8, for a `Predictor` normalises it on its device, and comes with the `Picture`
    as it was read. Raises FileNotFoundError or ValueError as `medseg.images.read_image` does.
    """
    image = pictures.as_picture(image_path)
    pixels = pictures.preprocess(image, image_size, n_channels)
    tensor = torch.from_numpy(pixels)[None]
    if not normalized:
        return tensor.permute(0, 3, 1, 2), image
    return normalize(tensor), pictures.Picture(pixels).rgb()


def predict_mask(model, image_tensor, device="cuda", threshold=0.5, *, return_predictions=False):
    """Preprocessed image (B, 3, H, W) -> float32 mask (B, C, H, W), 1 above the threshold.

    model: a UNet, any other network of these shapes, or a `medseg.predictor.Predictor`, which has
    a device of its own. return_predictions: return ([`medseg.predictor.Prediction`] of each image)
    besides, as a pair.
    """
    if not isinstance(model, predictor.Predictor):
        model = predictor.Predictor([model], device, info=net.info_of(model))
    predictions = model.predict(image_tensor)
    masks = np.stack([one.probabilities > threshold for one in predictions])
    masks = torch.from_numpy(masks).float()
    return (masks, predictions) if return_predictions else masks


def visualize_result(
    original_image,
    predicted_mask,
    *,
    path="predictions.png",
    class_names=("foreground",),
    name=None,
):
    """Draw image, mask and overlay side by side to `path`.

    original_image: PIL image or uint8 array (H, W, 3); predicted_mask: array or tensor (H, W) or
    (1, 1, H, W), of 0 and 1 or of class numbers. name: of the image's file, which then stands
    above, with a legend of a single class too.
    """
    # With Pillow: importing matplotlib would take as long as the prediction itself.
    picture = original_image
    if not isinstance(picture, Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    labels = np.rint(np.asarray(predicted_mask)).astype(np.uint8)
    pictures.save_figure(picture, labels.reshape(labels.shape[-2:]), path, class_names, name)


# ---- one image, many, the slices of a volume -------------------------------------------------


def open_models(paths, device="auto", precision="auto"):
    """The `Predictor` of the weights in these files; ValueError where they differ."""
    device = devices.pick_device(device)
    networks = [load_model(path, device) for path in paths]
    if len(networks) > 1:
        print(f"taking the mean of {len(networks)} models")
    autocast = devices.make_autocast(devices.choose_precision(precision, device), device)
    return predictor.Predictor(networks, device, autocast=autocast, names=paths)


def predict(model, image, *, threshold=None):
    """Class numbers, uint8 (height, width), 0 for background, of an image at its own size.

    model: a UNet, as of `load_model`, or a `Predictor`. image: as of `preprocess_image`.
    threshold: by default that in the weights, else 0.5; flips and clean-up are as recorded.
    """
    if not isinstance(model, predictor.Predictor):
        model = predictor.Predictor([model], next(model.parameters()).device)
    frame = inputs.as_frame(image, choose_window(None, model.info.window))
    ((_, image, prediction),) = predict_images(model, [frame])
    threshold = model.inference.threshold if threshold is None else threshold
    inference = model.inference._replace(threshold=threshold)
    return make_masks(model, prediction.probabilities, image.size, inference=inference).labels


def predict_image(model, image):
    """The `Prediction` of an image, as `predict` takes it."""
    ((_, _, prediction),) = predict_images(model, [inputs.as_frame(image)])
    return prediction


def predict_images(model, frames, problems=None):
    """Yield (`Frame`, `Picture`, `Prediction`) of each; model: a `Predictor`, here and below.

    problems: a list; those that cannot be predicted are left out and each adds (path, why).
    Without it, the first of them is raised as a FileNotFoundError or ValueError.
    """

    def leave_out(frame, error):
        if problems is None:
            raise error
        problems.append((frame.path, str(error)))

    sizes = {"image_size": model.info.image_size, "n_channels": model.n_channels}
    options = {"threshold": model.inference.threshold, "return_predictions": True}
    prepare = partial(preprocess_image, **sizes, normalized=False)
    readable = ahead.read_ahead(frames, model.info, prepare, leave_out)
    while batch := ahead.take_batch(readable, model.batch_size):
        frames, images, tensors = zip(*batch, strict=True)
        try:
            tensor = torch.cat(tensors) if len(batch) > 1 else tensors[0]
            _, predictions = predict_mask(model, tensor, **options)
        except ValueError as error:  # out of memory
            for frame in frames:
                leave_out(frame, ValueError(f"{frame.path}: {error}"))
            continue
        ready = list(zip(frames, images, predictions, strict=True))
        batch = images = tensors = tensor = predictions = None  # large ones go before the next come
        while ready:
            yield ready.pop(0)


def predict_many(model, frames, results, problems, folder=None, *, lines=True):
    """Write what `results` says for each image; those that cannot be predicted add to `problems`.

    folder: that of the images where it has annotations, for a report; there is none where one of
    them could not be predicted. lines: print one on each. Returns whether there is a report.
    """
    scores = None
    if folder is not None:
        from medseg.predicting import scoring

        spacings = {frame.spacing for frame in frames}
        scores = scoring.open_folder(model, folder, *(spacings if len(spacings) == 1 else ()))
    predicted = predict_images(model, frames, problems)
    ahead.save_images(predicted, len(frames), results, scores, lines=lines)
    if not scores or (problems and scores.missing()):
        return False
    scoring.report(model, folder, scores, results.output, partial(predict_image, model))
    return True


def predict_volume(model, file, results, window, *, lines=True):
    """Write a mask volume and, where `results` has a folder, what it says besides."""
    frames, volume = inputs.open_file(file, window, model.info)
    pieces.check_clean(model.inference.clean, volume.slice_spacing, file.path)
    bar = {"total": len(frames), "unit": " slices", "disable": None}
    predicted = tqdm(predict_images(model, frames), file.title, **bar)
    line, written = results.add_volume(file, volume, predicted, window)
    if lines:
        print(line)
        ahead.print_saved(written)


# ---- the command line ------------------------------------------------------------------------


def main(argv=None):
    args = flags.parse_arguments(argv, __doc__)
    set_pixel_limit(args.max_megapixels)
    args.model = paths = args.model or [default_model()]
    if args.export:
        from medseg.predicting.export import export_model

        return export_model(args.export, paths, args.inputs)
    if args.page and (args.inputs or args.output):
        raise ValueError("--page takes no images and no --output: drop images on the page")
    model = open_models(paths, args.device, args.precision)
    window, recorded = choose_window(args.window, model.info.window), model.info.inference
    model.inference, note = flags.choose_inference(args, recorded, model.info.trained_flips)
    if note:
        print(note)
    if args.page:
        from medseg.predicting.page import serve

        address = args.host, args.port, args.auth
        return serve(model, paths, address, window=window, pixel_size=args.pixel_size)
    predict_inputs(args, model, window)


def predict_inputs(args, model, window):
    """Predict the files and folders of the command line; ValueError on those that failed."""
    paths = args.inputs or [inputs.example_image()]
    to_volume = str(args.output).lower().endswith(VOLUME_SUFFIXES)
    files = inputs.expand(paths, model.info, series=to_volume)
    inputs.print_left_aside(paths, files)
    frames, volumes, problems = inputs.sort_files(files, window, args.pixel_size)
    total = len(frames) + len(volumes) + len(problems)
    first, lines = Path(paths[0]), total <= MAX_LINES
    single = len(files) == total == 1 and (files[0].path == first or not first.is_dir())
    folder, scored = inputs.annotated_folder(paths), False
    frames = inputs.add_spacings(frames, folder) if folder else frames
    for frame in frames:
        pieces.check_clean(model.inference.clean, frame.spacing, frame.path)
    output = inputs.choose_output(args.output, single, files)
    draw = visualize_result if single else None
    results = Results(output, model, args.write, args.simplify, draw=draw)
    results.check(frames, volumes, report=folder is not None)
    titles = [*(frame.title for frame in frames), *(file.title for file in volumes)]
    try:
        for file in volumes:
            try:
                predict_volume(model, file, results, window, lines=lines)
            except (FileNotFoundError, ValueError) as error:
                problems.append((file.path, str(error)))
        if folder is not None or frames:
            scored = predict_many(model, frames, results, problems, folder, lines=lines)
    finally:  # what was measured is kept, also where a report fails
        results.finish(titles, describe_run(args, model, window), args.model, problems)
    if problems:
        left_out = inputs.describe_left_out(problems, total)
        left_out += f"; {folder} has no report without them" if folder and not scored else ""
        raise ValueError(problems[0][1] if single else left_out)


if __name__ == "__main__":
    # With --page, Python would wait for a prediction that a browser has asked for.
    cli.run_main(main, exit_at_once=True)
