"""What one browser has predicted: probabilities, kept so that the threshold can move. No torch."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from medseg.cli import one_line
from medseg.drawing import draw_labels, overlay
from medseg.formats.nifti import write_prediction
from medseg.full_size import full_size_labels
from medseg.images import describe, resize_nearest, save_mask, save_overlay, save_png
from medseg.pieces import check_clean, clean_labels, pixel_area
from medseg.predicting.inputs import Frame, expand, open_file

VIEW_SIDE = 640  # pixels, at most, of the longer side of what the browser shows


class Prediction(NamedTuple):
    """One image that the network has seen."""

    frame: Frame
    size: tuple  # (width, height) of the picture
    file: Path  # .npz with `view`, the picture as it is shown, and `probabilities` (C, S, S)

    def read(self):
        """(picture as it is shown, uint8 (H, W, 3); probabilities, float32 (C, S, S))."""
        with np.load(self.file) as file:
            return file["view"], file["probabilities"]


class View(NamedTuple):
    """One prediction at one threshold: PIL images of at most VIEW_SIDE, and the line on it."""

    image: Image.Image
    mask: Image.Image
    overlay: Image.Image
    line: str


class Session:
    """The predictions of one browser, in a folder that is removed when nothing refers to them.

    The probabilities are on disk, so that a volume of many slices takes no memory.
    window: (center, width) of DICOM and NIfTI values, or None. orientation: to turn volumes to, or
    None. clean: what is done to the masks, see `medseg.pieces.clean_masks`. pixel_size: as of
    `medseg.predicting.inputs.open_file`.
    predictions: [Prediction]; problems: a line on each file that could not be predicted.
    """

    def __init__(
        self, folder, class_names, window=None, orientation=None, clean="none", pixel_size=None
    ):
        self.class_names, self.predictions, self.problems = class_names, [], []
        self.clean = clean
        self._settings = window, orientation, pixel_size
        self._volumes = {}  # path -> ImageFile
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def predict(self, paths, probabilities, progress=lambda done: None):
        """Add the images in image, DICOM and NIfTI files.

        probabilities(PIL image) -> float32 array (C, S, S) of 0..1.
        progress(done): called with 0..1 before each image.
        """
        with self._noting_problems(paths):
            files = expand(paths)
            for number, file in enumerate(files):
                with self._noting_problems(paths):
                    frames, volume = open_file(file, *self._settings)
                    if volume:
                        self._volumes[file.path] = file
                    for index, frame in enumerate(frames):
                        progress((number + index / len(frames)) / len(files))
                        with self._noting_problems(paths):
                            self._add(frame, probabilities)

    def _add(self, frame, probabilities):
        check_clean(self.clean, frame.spacing, frame.path)
        image = frame.read()
        file = self._folder / f"{len(self.predictions)}.npz"
        view = image.copy()
        view.thumbnail((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
        np.savez(file, view=np.asarray(view), probabilities=probabilities(image))
        if frame.path in self._volumes:
            frame = frame._replace(read=None)  # which keeps the whole volume in memory
        self.predictions.append(Prediction(frame, image.size, file))

    @contextlib.contextmanager
    def _noting_problems(self, paths):
        try:
            yield
        except (FileNotFoundError, ValueError) as error:
            line = one_line(error)
            for path in paths:  # the user knows no more of it than its name
                line = line.replace(f"{Path(path).parent}{os.sep}", "")
            self.problems.append(line)

    def first(self, threshold):
        """The index of the prediction to show first: of slices, the one with most foreground."""
        paths = {prediction.frame.path for prediction in self.predictions}
        if len(paths) > 1:
            return 0
        sums = [(prediction.read()[1] > threshold).sum() for prediction in self.predictions]
        return int(np.argmax(sums))

    def view(self, index, threshold):
        """The `View` of one prediction at a threshold."""
        prediction, n_classes = self.predictions[index], len(self.class_names)
        view, probabilities = prediction.read()
        labels = self._labels(prediction, probabilities, threshold)
        highest = probabilities.max((1, 2))
        line = describe(prediction.frame.title, labels, highest, self.class_names)
        labels = resize_nearest(labels, *view.shape[:2])
        image, mask = Image.fromarray(view), draw_labels(labels, n_classes)
        return View(image, mask, overlay(image, labels, n_classes), line)

    def _labels(self, prediction, probabilities, threshold):
        labels = full_size_labels(probabilities, prediction.size, threshold)
        return clean_labels(labels, self.clean, pixel_area(prediction.frame.spacing))

    def save(self, image):
        """Write a PIL image of a `View` as PNG; return its path, which is the same every time."""
        pixels = f"{image.mode} {image.size} ".encode() + image.tobytes()
        path = self._folder / f"{hashlib.sha256(pixels).hexdigest()}.png"
        if not path.exists():
            save_png(image, path, compress_level=1)
        return str(path)

    def write(self, threshold):
        """Write the mask of the one image, or several in a zip; return the path.

        The bytes are those that predict.py writes. The zip also holds the overlays and, of a
        volume, the montage of its slices.
        """
        folder, volumes, written = Path(tempfile.mkdtemp(dir=self._folder)), {}, []
        for prediction in self.predictions:
            labels = self._labels(prediction, prediction.read()[1], threshold)
            if prediction.frame.path in self._volumes:
                volumes.setdefault(prediction.frame.path, []).append(labels)
                continue
            written.append(folder / f"{prediction.frame.name}_mask.png")
            save_mask(labels, written[-1], self.class_names)
            if len(self.predictions) > 1:
                written.append(folder / f"{prediction.frame.name}_overlay.jpg")
                image = prediction.frame.read()
                save_overlay(image, labels, written[-1], self.class_names)
        for path, masks in volumes.items():
            _, volume = open_file(self._volumes[path], *self._settings)
            pictures = volume.pictures(self._settings[0])
            written += write_prediction(folder, volume, pictures, masks, self.class_names)
        if len(written) == 1:
            return written[0]
        archive = folder / "masks.zip"
        with zipfile.ZipFile(archive, "w") as file:  # not compressed: its files are
            for path in written:
                file.write(path, path.name)
                path.unlink()
        return archive
