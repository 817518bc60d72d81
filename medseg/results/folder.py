"""What is made of predictions: files for each image, and one table of all."""

import hashlib
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from medseg.device import choose_precision
from medseg.drawing import montage, overlay, with_legend
from medseg.files import shorten
from medseg.formats.medical import mask_name, result_name
from medseg.formats.nifti import write_mask
from medseg.formats.own_files import COCO, REPORT, SETTINGS, TABLE, check_outputs
from medseg.full_size import MAX_LEVEL, full_size_levels, sum_probabilities
from medseg.images import save_mask, save_overlay, save_png
from medseg.pieces import class_masks, number_pieces
from medseg.results.annotations import coco_record, coco_text, labelme_files, write_labelme
from medseg.results.table import measure, program_version, settings_text, table_text, write_text

MAX_LINES = 20  # images of which each gets a line on the screen
MAX_OBJECTS = 65535  # which 16 bits count
# What --write knows, and what to call several of each.
WRITTEN = {
    "mask": "masks",
    "overlay": "overlays",
    "classes": "masks of each class",
    "objects": "numbered objects",
    "probability": "probabilities",
    "labelme": "LabelMe files",
    "coco": "",  # one file of all
}
DEFAULT = ("mask", "overlay")


class Results:
    """The files of predictions in a folder, and the rows of its table.

    output: the folder; class_names: of the model; write: names of WRITTEN; simplify: of LabelMe's
    outlines, see `trace_labels`. `add` may be called from several threads.
    """

    def __init__(self, output, class_names, write=DEFAULT, simplify=0):
        self.output, self.class_names, self.write = output, class_names, write
        self.simplify = simplify
        self.rows, self.records = {}, {}  # of the table, of the COCO file; {title: ...}

    def check(self, frames, volumes, *, figure=False, report=False):
        """ValueError where --write needs a folder, or would overwrite what may be a user's work.

        frames: [Frame]; volumes: [ImageFile], for which no annotations are written. figure: whether
        a frame gets the tutorial's figure too; report: whether there is one.
        """
        if not self.output.is_dir():
            if self.write != DEFAULT:
                raise ValueError(
                    f"--output {self.output}: is one file, of the mask: --write needs a folder"
                )
            return check_outputs([self.output])
        if volumes and {"labelme", "coco"} & set(self.write):
            raise ValueError(
                f"{volumes[0].path}: --write labelme and --write coco are for pictures; the mask "
                "of a volume can be corrected in 3D Slicer or ITK-SNAP"
            )
        for frame in frames if "labelme" in self.write else ():
            for path in labelme_files(frame, self.output):
                if path.exists():
                    raise ValueError(
                        f"{path}: is there, and may hold corrections: move it, or choose another "
                        "--output"
                    )
        planned = [self._picture_paths(frame) for frame in frames]
        planned += [self._volume_paths(file.path) for file in volumes]
        paths = [path for places in planned for own in places.values() for path in own]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise ValueError(f"{twice[0]}: two files would be called so: predict them apart")
        names = [TABLE, SETTINGS, *((COCO,) if "coco" in self.write else ())]
        names += [f"{frame.name}_prediction.png" for frame in frames] if figure else []
        names += [REPORT, "report.png"] if report else []
        return check_outputs([*paths, *(self.output / name for name in names)])

    def _paths(self, name, mask, drawn, suffix):
        """{name of WRITTEN: paths} of what is written of an image or a volume."""
        safe, endings = [re.sub(r"[^\w.-]+", "_", one) for one in self.class_names], []
        for number, one in enumerate(safe, 1):
            endings.append(f"{one}_{number}" if safe.count(one) > 1 else one)
        numbered = [f"{name}_{number}" for number in range(1, len(safe) + 1)]
        paths = {
            "mask": [mask],
            "overlay": [f"{name}_{drawn}"],
            "classes": [f"{shorten(f'{name}_{one}')}_mask{suffix}" for one in endings],
            "objects": [f"{name}_objects{suffix}"],
            "probability": [
                f"{one}_probability{suffix}" for one in (numbered if len(safe) > 1 else [name])
            ],
        }
        wanted = {kind: own for kind, own in paths.items() if kind in self.write}
        return {kind: [self.output / path for path in own] for kind, own in wanted.items()}

    def _picture_paths(self, frame):
        return self._paths(frame.name, f"{frame.name}_mask.png", "overlay.jpg", ".png")

    def _volume_paths(self, path):
        return self._paths(result_name(path), mask_name(path), "montage.png", ".nii.gz")

    def add(self, frame, image, labels, probabilities, *, masks=None, dice=None, **columns):
        """Write the files of one image, and keep what table and COCO file have of it.

        image: PIL RGB image; labels: class numbers, uint8 (height, width); probabilities: float32
        (C, S, S); masks: of classes that overlap, bool (C, height, width), which count instead of
        the labels but for what is drawn; dice: of each class, where the image has annotations;
        columns: further ones of the table, with their values for this image.
        Returns the paths of the files.
        """
        paths, names = self._picture_paths(frame), self.class_names
        masks = labels if masks is None else masks
        for path in paths.get("mask", ()):
            save_mask(labels, path, names)
        for path in paths.get("overlay", ()):
            save_overlay(image, labels, path, names)
        for number, path in enumerate(paths.get("classes", ()), 1):
            save_mask(_own_mask(masks, number), path)
        for path in paths.get("objects", ()):
            save_png(Image.fromarray(number_objects(masks, labels, frame.path)), path)
        for channel, path in zip(probabilities, paths.get("probability", ()), strict=False):
            save_png(Image.fromarray(full_size_levels(channel, image.size)), path)
        written = [path for own in paths.values() for path in own]
        if "labelme" in self.write:
            options = {"simplify": self.simplify}
            write_labelme(frame, image, labels, self.output, names, **options)
            written += labelme_files(frame, self.output)
        if "coco" in self.write:
            self.records[frame.title] = coco_record(frame, masks)
        highest, sums = probabilities.max((1, 2)), sum_probabilities(masks, probabilities)
        sizes = {"spacing": frame.spacing, "depth": frame.depth}
        rows = measure(masks, names, highest, sums, **sizes)
        for row, value in zip(rows, () if dice is None else dice, strict=False):
            row["dice"] = float(value)
        series = frame.place[0] if frame.place else None
        self._keep(frame.title, rows, series=series, **columns)
        return written

    def add_volume(self, found, window, **columns):
        """Write the files of a `medseg.results.volume.VolumeMasks` and keep its rows.

        window: (center, width) of its pictures, or None; columns: as of `add`. Returns the paths of
        the files.
        """
        volume, spacing, names = found.volume, found.volume.stored_spacing, self.class_names
        paths, masks = self._volume_paths(volume.path), found.class_masks
        masks = found.masks if masks is None else masks
        for path in paths.get("mask", ()):
            write_mask(path, volume, found.masks)
        for path in paths.get("overlay", ()):
            draw = partial(overlay, n_classes=len(names))
            drawn = montage(volume.pictures(window), found.masks, draw=draw)
            save_png(with_legend(drawn, names), path)
        for number, path in enumerate(paths.get("classes", ()), 1):
            write_mask(path, volume, _own_mask(masks, number))
        for path in paths.get("objects", ()):
            write_mask(path, volume, number_objects(masks, found.masks, volume.path), np.uint16)
        for levels, path in zip(found.levels, paths.get("probability", ()), strict=False):
            write_mask(path, volume, levels, np.uint16, 1 / MAX_LEVEL)
        if masks.dtype == bool:
            voxels = np.stack([volume.stored(mask, bool) for mask in masks])
        else:
            voxels = volume.stored(masks)
        rows = measure(voxels, names, found.highest, found.sums, spacing=spacing)
        self._keep(volume.path.name, rows, **columns)
        if spacing is None:
            print(f"{volume.path}: its header gives a voxel no size, so no mm or mL are measured")
        return [path for own in paths.values() for path in own]

    def _keep(self, title, rows, **columns):
        self.rows[title] = [{**row, "image": title, **columns} for row in rows]

    def what(self):
        """What is written of each image, in words."""
        words = [WRITTEN[name] for name in self.write if WRITTEN[name]]
        return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))

    def finish(self, titles, settings, model_paths, left_out):
        """Write predictions.csv and predictions.json, the COCO file if wanted, print a summary.

        titles: of all images of the run, in the order of the table; settings: plain values for
        predictions.json; model_paths: files of the models; left_out: [(path, why)].
        """
        titles = [title for title in titles if title in self.rows]
        if not titles:
            return
        rows = [row for title in titles for row in self.rows[title]]
        models = [
            {"file": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            for path in model_paths
        ]
        left_out = [{"file": str(path), "why": why} for path, why in dict.fromkeys(left_out)]
        content = {"models": models, **settings, "version": program_version()}
        content |= {"images": len(self.rows), "left_out": left_out}
        write_text(self.output / SETTINGS, settings_text(content))
        write_text(self.output / TABLE, table_text(rows))
        for line in summarize(rows):
            print(line)
        print(f"measured: {self.output / TABLE}")
        if "coco" in self.write:
            records = [self.records[title] for title in titles]
            write_text(self.output / COCO, coco_text(records, self.class_names))
            print(f"annotated: {self.output / COCO}")


def _own_mask(masks, number):
    """The mask of a class; masks: as of `medseg.pieces.class_masks`."""
    return masks[number - 1] if masks.dtype == bool else masks == number


def number_objects(masks, labels, path):
    """Numbers of all connected pieces, uint16 of the shape of labels, from 1 on class by class.

    masks: as of `medseg.pieces.class_masks`; where they overlap, a pixel is of the class that the
    labels show. ValueError, which names the image at `path`, where there are too many.
    """
    numbers, count = np.zeros(labels.shape, np.uint16), 0
    for number, box, mask in class_masks(masks):
        pieces, sizes, _ = number_pieces(mask)
        if count + len(sizes) > MAX_OBJECTS:
            raise ValueError(
                f"{path}: more than {MAX_OBJECTS} objects, which 16 bits cannot number: remove "
                "specks with --clean min-area=9"
            )
        visible = labels[box] == number
        numbers[box][visible] = pieces[visible] + count
        count += len(sizes)
    return numbers


def summarize(rows):
    """Lines on the rows of a table: how much there is of each class, and the volume of series."""
    lines, classes, series = [], {}, {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
        if row["volume_ml"] is not None and row.get("series"):
            volumes = series.setdefault(row["series"], {})
            volumes[row["class"]] = volumes.get(row["class"], 0) + row["volume_ml"]
    if len(rows) == len(classes):  # one image, which has its own lines
        return []
    for name, of_class in classes.items():
        share = 100 * np.mean([row["share"] for row in of_class])
        found = sum(row["pixels"] > 0 for row in of_class)
        count = f"in {found} of {len(of_class)} images"
        lines.append(f"  {name:12} {share:5.2f} % of an image on average, {count}")
    for name, volumes in list(series.items())[:MAX_LINES]:
        told = ", ".join(f"{of} {volume:.4g} mL" for of, volume in volumes.items())
        lines.append(f"series {name}: {told}")
    return lines


def describe_run(args, model, window):
    """What the masks depend on beside the weights, as plain values for predictions.json.

    args: the command line; model: as predict.py has it; window: (center, width) or None.
    """
    return {
        "class_names": list(model.info.class_names),
        **model.inference.as_dict(),
        "image_size": model.info.image_size,
        "n_channels": model.n_channels,
        "precision": choose_precision(args.precision, model.device),
        "window": window or model.info.window,
        "orientation": model.info.orientation,
        "pixel_size_mm": args.pixel_size,
    }
