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
from medseg.formats.medical import result_name
from medseg.formats.nifti import write_mask
from medseg.formats.own_files import COCO, REPORT, SETTINGS, TABLE, check_outputs
from medseg.full_size import MAX_LEVEL
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
        planned = [self._paths(frame.name) for frame in frames]
        planned += [self._paths(result_name(file.path), volume=True) for file in volumes]
        paths = [path for places in planned for own in places.values() for path in own]
        if "labelme" in self.write:
            paths += [path for frame in frames for path in labelme_files(frame, self.output)]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise ValueError(f"{twice[0]}: two files would be called so: predict them apart")
        names = [TABLE, SETTINGS, *((COCO,) if "coco" in self.write else ())]
        names += [f"{frame.name}_prediction.png" for frame in frames] if figure else []
        names += [REPORT, "report.png"] if report else []
        return check_outputs([*paths, *(self.output / name for name in names)])

    def _paths(self, name, *, volume=False):
        """{name of WRITTEN: paths} of what is written of an image, or a volume, called so."""
        safe = [re.sub(r"[^\w.-]+", "_", one) for one in self.class_names]
        numbers = [f"_{number}" for number in range(1, len(safe) + 1)]
        suffix, drawn = (".nii.gz", "montage.png") if volume else (".png", "overlay.jpg")
        classes = [one + n * (safe.count(one) > 1) for one, n in zip(safe, numbers, strict=True)]
        numbers = numbers if len(safe) > 1 else [""]
        names = {
            "mask": [f"{name}_mask{suffix}"],
            "overlay": [f"{name}_{drawn}"],
            "classes": [f"{shorten(f'{name}_{one}')}_mask{suffix}" for one in classes],
            "objects": [f"{name}_objects{suffix}"],
            "probability": [f"{name}{number}_probability{suffix}" for number in numbers],
        }
        wanted = {kind: own for kind, own in names.items() if kind in self.write}
        return {kind: [self.output / one for one in own] for kind, own in wanted.items()}

    def add(self, frame, image, masks, **columns):
        """Write the files of one image, and keep what table and COCO file have of it.

        image: PIL RGB image; masks: its `medseg.results.masks.Masks`; columns: further ones of the
        table, with their value for this image, or an array of those of each class.
        Returns the paths of the files.
        """
        names = self.class_names

        def save(kind, array, path):
            if kind == "overlay":
                save_overlay(image, array, path, names)
            elif array.dtype == np.uint16:
                save_png(Image.fromarray(array), path)
            else:
                save_mask(array, path, *((names,) if kind == "mask" else ()))

        written = _save(self._paths(frame.name), masks, frame.path, save)
        if "labelme" in self.write:
            options = {"simplify": self.simplify}
            write_labelme(frame, image, masks.labels, self.output, names, **options)
            written += labelme_files(frame, self.output)
        if "coco" in self.write:
            self.records[frame.title] = coco_record(frame, masks.measured)
        columns["series"] = frame.place[0] if frame.place else None
        self._keep(frame.title, masks, columns, frame.spacing, frame.depth)
        return written

    def add_volume(self, volume, masks, window, **columns):
        """Write the files of a `medseg.formats.nifti.Volume` and keep its rows.

        masks: of its slices, see `stack_masks`; window: (center, width) of its pictures, or None;
        columns: as of `add`. Returns the paths of the files.
        """
        names, measured = self.class_names, masks.measured

        def save(kind, array, path):
            if kind == "overlay":
                draw = partial(overlay, n_classes=len(names))
                drawn = montage(volume.pictures(window), array, draw=draw)
                return save_png(with_legend(drawn, names), path)
            dtype = np.uint16 if array.dtype == np.uint16 else np.uint8
            write_mask(path, volume, array, dtype, 1 / MAX_LEVEL if kind == "probability" else 1)

        paths = self._paths(result_name(volume.path), volume=True)
        written = _save(paths, masks, volume.path, save)
        if measured.dtype == bool:
            voxels = np.stack([volume.stored(mask, bool) for mask in measured])
        else:
            voxels = volume.stored(measured)
        spacing = volume.stored_spacing
        self._keep(volume.path.name, masks._replace(measured=voxels), columns, spacing)
        if spacing is None:
            print(f"{volume.path}: its header gives a voxel no size, so no mm or mL are measured")
        return written

    def _keep(self, title, masks, columns, *sizes):
        self.rows[title] = rows = measure(masks, self.class_names, *sizes)
        for index, row in enumerate(rows):
            own = {k: v[index] if isinstance(v, np.ndarray) else v for k, v in columns.items()}
            row |= {"image": title, **own}

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


def _save(paths, masks, path, save):
    """Write masks of the image at `path` by save(name of WRITTEN, array, path of the file).

    paths: as of `Results._paths`, of which all are returned.
    """
    made = {
        **dict.fromkeys(("mask", "overlay"), [masks.labels]),
        "classes": map(masks.of_class, range(1, len(masks.highest) + 1)),
        "objects": (number_objects(masks, path) for _ in range(1)),
        "probability": masks.levels,
    }
    for kind, own in paths.items():
        for array, target in zip(made[kind], own, strict=True):
            save(kind, array, target)
    return [target for own in paths.values() for target in own]


def number_objects(masks, path):
    """Numbers of all connected pieces, uint16 of the shape of labels, from 1 on class by class.

    Where classes overlap, a pixel is of the class that the labels show. ValueError, which names the
    image at `path`, where there are too many.
    """
    numbers, count = np.zeros(masks.labels.shape, np.uint16), 0
    for number, box, mask in class_masks(masks.measured):
        pieces, sizes, _ = number_pieces(mask)
        if count + len(sizes) > MAX_OBJECTS:
            raise ValueError(
                f"{path}: more than {MAX_OBJECTS} objects, which 16 bits cannot number: remove "
                "specks with --clean min-area=9"
            )
        visible = masks.labels[box] == number
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
