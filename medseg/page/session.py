"""What one browser has predicted: probabilities, kept so that the threshold can move. No torch."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import weakref
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from medseg.cli import one_line
from medseg.drawing import draw_labels, overlay
from medseg.formats.medical import result_name
from medseg.formats.own_files import TABLE
from medseg.full_size import sum_probabilities
from medseg.images import describe, resize_nearest, save_jpeg, save_png
from medseg.inference import Inference
from medseg.pieces import check_clean
from medseg.predicting.assessment import Assessment, assess_volume, describe_unlike
from medseg.predicting.inputs import Frame, add_depths, expand, open_file
from medseg.results.annotations import write_labelme
from medseg.results.folder import Results
from medseg.results.table import measure, table_text, write_text
from medseg.results.volume import VolumeMasks

VIEW_SIDE = 2048  # pixels, at most, of the longer side of what the browser shows and zooms into
EXACT_SIDE = 640  # up to here as PNG; a larger one would take a second at every move of the slider


class Prediction(NamedTuple):
    """One image that the network has seen."""

    frame: Frame
    size: tuple  # (width, height) of the picture
    file: Path  # .npz with `view`, the picture as it is shown, and `probabilities` (C, S, S)
    assessment: Assessment

    def read(self):
        """(picture as it is shown, uint8 (H, W, 3); probabilities, float32 (C, S, S))."""
        with np.load(self.file) as file:
            return file["view"], file["probabilities"]


class View(NamedTuple):
    """One prediction at one threshold: PIL images of at most VIEW_SIDE, and what is said of it."""

    image: Image.Image
    mask: Image.Image
    overlay: Image.Image
    line: str
    rows: list  # of measurements, one for each class, as `medseg.results.table.measure` has them


class Session:
    """The predictions of one browser, in a folder that is removed when nothing refers to them.

    The probabilities are on disk, so that a volume of many slices takes no memory.
    window: (center, width) of DICOM and NIfTI values, or None. orientation: to turn volumes to, or
    None. pixel_size: as of `medseg.predicting.inputs.open_file`.
    draw_order: of the model, see `net.UNet`; classes that overlap are measured each by itself.
    paths: of the files given; predictions: [Prediction]; problems: a line on each file that could
    not be predicted.

    clean, of the methods: what is done to the masks, see `medseg.pieces.clean_labels`.
    """

    def __init__(
        self,
        folder,
        class_names,
        window=None,
        orientation=None,
        pixel_size=None,
        *,
        draw_order=(),
    ):
        self.class_names, self.predictions, self.problems = class_names, [], []
        self.paths, self.threshold, self._order = [], None, draw_order
        self._settings = window, orientation, pixel_size
        self._volumes = {}  # path -> ImageFile
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def predict(self, paths, assess, progress=lambda done, title: None, threshold=None):
        """Add the images in image, DICOM and NIfTI files.

        assess(PIL image) -> (float32 array (C, S, S) of 0..1, its Assessment).
        progress(done, title): called before each image; done is 0..1. threshold: that of which the
        agreement is.
        """
        self.paths, self.threshold = list(paths), threshold
        with self._noting_problems(paths):
            paths = self._named_apart(paths)
            files = expand(paths)
            for number, file in enumerate(files):
                with self._noting_problems(paths):
                    frames, volume = open_file(file, *self._settings)
                    if volume:
                        self._volumes[file.path] = file
                    for index, frame in enumerate(frames):
                        progress((number + index / len(frames)) / len(files), frame.title)
                        with self._noting_problems(paths):
                            self._add(frame, assess)

    def _named_apart(self, paths):
        """The paths; the second upload of a name is linked to under another: 2_scan.png."""
        folders, apart = {}, []  # {name of results: the folder of the files that have it}
        for path in map(Path, paths):
            own, number = path, 1
            while folders.setdefault(result_name(own), path.parent) != path.parent:
                number += 1
                own = self._folder / f"{number}_{path.name}"
            if own != path:
                os.link(path, own)
            apart.append(own)
        return apart

    def _add(self, frame, assess):
        image = frame.read()
        file = self._folder / f"{len(self.predictions)}.npz"
        view = image.copy()
        view.thumbnail((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
        probabilities, assessment = assess(image)
        np.savez(file, view=np.asarray(view), probabilities=probabilities)
        if frame.path in self._volumes:
            frame = frame._replace(read=None)  # which keeps the whole volume in memory
        self.predictions.append(Prediction(frame, image.size, file, assessment))

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

    def unlike(self):
        """Lines on the pictures that are unlike the training images."""
        assessed = [(one.frame.title, one.assessment) for one in self.predictions]
        return describe_unlike(assessed, "pictures")

    def view(self, index, threshold, clean="none"):
        """The `View` of one prediction at a threshold. ValueError where it cannot be cleaned up."""
        prediction, names = self.predictions[index], self.class_names
        view, probabilities = prediction.read()
        inference, marked = Inference(threshold, clean=clean), np.zeros(256, np.int64)
        labels = self._labels(prediction, probabilities, inference, marked=marked)
        highest, frame = probabilities.max((1, 2)), prediction.frame
        masks = self._masks(prediction, probabilities, inference)
        masks = labels if masks is None else masks
        line = describe(frame.title, masks, highest, names, inference, marked)
        sums = sum_probabilities(masks, probabilities)
        rows = measure(masks, names, highest, sums, spacing=frame.spacing)
        rows = [{**row, **self._assessed(prediction, threshold)._asdict()} for row in rows]
        labels = resize_nearest(labels, *view.shape[:2])
        image, mask = Image.fromarray(view), draw_labels(labels, len(names))
        return View(image, mask, overlay(image, labels, len(names)), line, rows)

    def _labels(self, prediction, probabilities, inference, *, marked=None):
        frame = prediction.frame
        check_clean(inference.clean, frame.spacing, frame.path.name)
        options = {"marked": marked, "draw_order": self._order}
        return inference.labels(probabilities, prediction.size, frame.spacing, **options)

    def _masks(self, prediction, probabilities, inference):
        options = {"spacing": prediction.frame.spacing, "exclusive": not self._order}
        return inference.overlapping(probabilities, prediction.size, **options)

    def _assessed(self, prediction, threshold):
        """Its Assessment. The agreement is that of masks at the threshold of the prediction."""
        if threshold == self.threshold:
            return prediction.assessment
        return prediction.assessment._replace(agreement=None)

    def save(self, image):
        """Write a PIL image of a `View`; return its path, which is the same every time."""
        pixels = f"{image.mode} {image.size} ".encode() + image.tobytes()
        exact = max(image.size) <= EXACT_SIDE or image.getcolors() is not None  # as masks have few
        name = hashlib.sha256(pixels).hexdigest()
        path = self._folder / f"{name}.{'png' if exact else 'jpg'}"
        if not path.exists() and exact:
            save_png(image, path, compress_level=1)
        elif not path.exists():
            save_jpeg(image, path)
        return str(path)

    # ---- downloads: the bytes are those that predict.py writes --------------------------------

    def write(self, threshold, clean="none"):
        """Write the mask of the one image, or several in a zip; return the path.

        The zip also holds the overlays and, of a volume, the montage of its slices.
        """
        folder = self._new_folder()
        self._results(folder, threshold, clean, drawn=len(self.predictions) > 1 or self._volumes)
        return self._pack(folder, "masks.zip")

    def table(self, threshold, clean="none"):
        """Write predictions.csv: a row for each image or volume, and class; return the path."""
        folder = self._new_folder()
        found = self._results(folder, threshold, clean, masks=False).rows.values()
        write_text(folder / TABLE, table_text([row for rows in found for row in rows]))
        return folder / TABLE

    def has_pictures(self):
        """Whether there are images that LabelMe can show, which are those of no volume."""
        return any(one.frame.path not in self._volumes for one in self.predictions)

    def labelme(self, threshold, clean="none"):
        """Write the LabelMe file of the one image, or several in a zip; return the path.

        DICOM frames come with the pictures that LabelMe opens. Volumes are left out.
        """
        folder, inference = self._new_folder(), Inference(threshold, clean=clean)
        for prediction in self.predictions:
            if (frame := prediction.frame).path not in self._volumes:
                labels = self._labels(prediction, prediction.read()[1], inference)
                write_labelme(frame, frame.read(), labels, folder, self.class_names, beside=True)
        return self._pack(folder, "labelme.zip")

    def _results(self, folder, threshold, clean, *, masks=True, drawn=False):
        """The Results of all predictions, which have written masks, and overlays if `drawn`."""
        wanted = ("mask", *(("overlay",) if drawn else ())) if masks else ()
        results, volumes = Results(folder, self.class_names, wanted), defaultdict(list)
        inference = Inference(threshold, clean=clean)
        frames = add_depths([prediction.frame for prediction in self.predictions])
        for prediction, frame in zip(self.predictions, frames, strict=True):
            if frame.path in self._volumes:
                volumes[frame.path].append(prediction)
                continue
            probabilities = prediction.read()[1]
            labels = self._labels(prediction, probabilities, inference)
            image, columns = frame.read() if drawn else None, self._assessed(prediction, threshold)
            masks = self._masks(prediction, probabilities, inference)
            results.add(frame, image, labels, probabilities, masks=masks, **columns._asdict())
        for path, slices in volumes.items():
            _, volume = open_file(self._volumes[path], *self._settings)
            found = VolumeMasks(volume, len(self.class_names))
            for prediction in slices:
                probabilities = prediction.read()[1]
                labels = self._labels(prediction, probabilities, inference)
                masks = self._masks(prediction, probabilities, inference)
                found.add(labels, probabilities, masks)
            columns = assess_volume([self._assessed(one, threshold) for one in slices])
            results.add_volume(found, self._settings[0], **columns._asdict())
        return results

    def _new_folder(self):
        return Path(tempfile.mkdtemp(dir=self._folder))

    def _pack(self, folder, name):
        """The one file in a folder, or a zip of several."""
        written = sorted(folder.iterdir())
        if len(written) == 1:
            return written[0]
        archive = folder / name
        with zipfile.ZipFile(archive, "w") as file:  # not compressed: its files are
            for path in written:
                file.write(path, path.name)
                path.unlink()
        return archive
