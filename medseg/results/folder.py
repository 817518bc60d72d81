"""What is made of predictions: files for each image, and one table of all."""

import hashlib
import math
import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medseg.device import choose_precision
from medseg.drawing import describe_shown, overlay, rgb_image, with_legend, with_note
from medseg.files import file_format, shorten
from medseg.images import save_mask, save_overlay, save_png
from medseg.inference import MAX_LEVEL
from medseg.own_files import COCO, REPORT, SETTINGS, TABLE, check_outputs
from medseg.results.annotations import coco_record, coco_text, write_labelme
from medseg.results.assessment import describe_assessments, reliability_columns
from medseg.results.masks import describe, make_masks, number_objects, stack_masks
from medseg.results.table import measure, program_version, settings_text, table_text, write_text
from medseg.volumes import write_mask

MAX_LINES = 20  # images of which each gets a line on the screen
# What --write knows; of all images, coco is one file.
WRITTEN = ("mask", "overlay", "classes", "objects", "probability", "labelme", "coco")
DEFAULT = ("mask", "overlay")


class Results:
    """The files of predictions, and the rows of their table.

    output: a folder, or the file for the mask of the only image or volume; model: a
    `medseg.predictor.Predictor`; write: names of WRITTEN; simplify: of LabelMe's outlines, see
    `trace_labels`; inference: by default the model's; draw: `predict.visualize_result`, to write
    the tutorial's figure of each image too, or None.
    """

    def __init__(self, output, model, write=DEFAULT, simplify=0, *, inference=None, draw=None):
        self.output, self.model, self.write = output, model, write
        self.class_names, self.inference = model.info.class_names, inference or model.inference
        self.simplify, self.draw = simplify, draw
        self._kinds = {*write, *(("figure",) if draw and "overlay" in write else ())}
        self.rows, self.records = {}, {}  # of the table, of the COCO file; {title: ...}
        self.assessed = []  # (title, its `Prediction` without probabilities) of images and slices

    def check(self, frames, volumes, *, report=False):
        """ValueError where --write needs a folder, or would overwrite what may be a user's work.

        frames: [Frame]; volumes: [ImageFile], for which no annotations are written. report: whether
        there is one.
        """
        names = []
        if self.output.is_dir():
            names += [TABLE, SETTINGS, *((COCO,) if "coco" in self.write else ())]
            names += [REPORT, "report.png"] if report else []
        elif self.write != DEFAULT:
            raise ValueError(
                f"--output {self.output}: is one file, of the mask: --write needs a folder"
            )
        if volumes and {"labelme", "coco"} & set(self.write):
            raise ValueError(
                f"{volumes[0].path}: --write labelme and --write coco are for pictures; the mask "
                "of a volume can be corrected in 3D Slicer or ITK-SNAP"
            )
        files = [one for file in (*frames, *volumes) for one in self._files(file.name, file.path)]
        paths = [path for *_, path in files]
        if twice := [path for path, count in Counter(paths).items() if count > 1]:
            raise ValueError(f"{twice[0]}: two files would be called so: predict them apart")
        check_outputs([*paths, *(self.output / name for name in names)])

    def _files(self, name, source):
        """[(kind, class number or 0, path)] of what is written of an image or a volume.

        kind: of WRITTEN, or figure; name: what its files are called; source: its path. LabelMe does
        not open DICOM, whose frames are written as pictures beside its files.
        """
        if not self.output.is_dir():
            return [("mask", 0, self.output)]
        source_format = file_format(source)
        volume = source_format == "volume"
        suffix, drawn = (".nii.gz", "montage.png") if volume else (".png", "overlay.jpg")
        files = [("mask", 0, f"{name}_mask{suffix}"), ("overlay", 0, f"{name}_{drawn}")]
        if not volume:
            files += [("figure", 0, f"{name}_prediction.png"), ("labelme", 0, f"{name}.json")]
        if source_format == "dicom":
            files.append(("labelme", 0, f"{name}.png"))
        files.append(("objects", 0, f"{name}_objects{suffix}"))
        classes = [re.sub(r"[^\w.-]+", "_", one) for one in self.class_names]
        for number, one in enumerate(classes, 1):
            which = f"_{number}" if len(classes) > 1 else ""
            one += which if classes.count(one) > 1 else ""
            files.append(("classes", number, f"{shorten(f'{name}_{one}')}_mask{suffix}"))
            files.append(("probability", number, f"{name}{which}_probability{suffix}"))
        files = [(kind, number, self.output / own) for kind, number, own in files]
        return [one for one in files if one[0] in self._kinds]

    def _arrays(self, files, masks, source):
        """Yield (kind, path, what it shows) of the `_files` of an image at `source`."""
        for kind, number, path in files:
            array = masks.labels
            if kind == "classes":
                array = masks.of_class(number)
            elif kind == "objects":
                array = number_objects(masks, source)
            elif kind == "probability":
                array = masks.levels[number - 1]
            yield kind, path, array

    def add(self, frame, image, prediction, **columns):
        """Write the files of one image, and keep what table and COCO file have of it.

        May be called from several threads. image: a `Picture`; prediction: its
        `medseg.predictor.Prediction`; columns: further ones of the table, with their value for this
        image, or an array of those of each class. Returns the line on it, and the paths of the
        files.
        """
        names, files = self.class_names, self._files(frame.name, frame.path)
        masks, channels = self._make_masks(frame, image, prediction), self.model.info.channel_names
        for kind, path, array in self._arrays(files, masks, frame.path):
            if kind == "overlay":
                save_overlay(image.rgb(), array, path, names, describe_shown(channels))
            elif kind == "figure":
                name = f"{frame.title}{describe_shown(channels, ', ')}"
                self.draw(image.rgb(), array, path=path, class_names=names, name=name)
            elif path.suffix == ".json":
                picture = path.with_suffix(".png") if file_format(frame.path) else frame.path
                write_labelme(path, picture, array, names, simplify=self.simplify)
            elif kind == "labelme":
                save_png(image.rgb(), path)
            elif array.dtype == np.uint16:
                save_png(Image.fromarray(array), path)
            else:
                save_mask(array, path, *((names,) if kind == "mask" else ()))
        if "coco" in self.write:
            self.records[frame.title] = coco_record(frame, masks.measured)
        columns["series"] = frame.place[0] if frame.place else None
        columns |= reliability_columns([prediction])
        self._keep(frame.title, masks, columns, frame.spacing, frame.depth)
        return describe(frame.path, masks, names, self.inference), [path for *_, path in files]

    def add_volume(self, file, volume, predicted, window=None):
        """As `add`, of a `medseg.volumes.Volume` in an `ImageFile`.

        predicted: (frame, `Picture`, `Prediction`) of each slice. window: (center, width) of the
        pictures, or None.
        """
        first, names = len(self.assessed), self.class_names
        slices = [self._make_masks(*one) for one in predicted]
        masks, files = stack_masks(slices), self._files(file.name, volume.path)
        for kind, path, array in self._arrays(files, masks, volume.path):
            if kind == "overlay":
                draw = partial(overlay, n_classes=len(names))
                drawn = montage(volume.pictures(window), array, draw=draw)
                note = describe_shown(self.model.info.channels)  # without those beside a slice
                save_png(with_note(with_legend(drawn, names), note), path)
                continue
            dtype = np.uint16 if array.dtype == np.uint16 else np.uint8
            write_mask(path, volume, array, dtype, 1 / MAX_LEVEL if kind == "probability" else 1)
        stored = masks.measured
        if stored.dtype == bool:
            stored = np.stack([volume.stored(mask, bool) for mask in stored])
        else:
            stored = volume.stored(stored)
        name, spacing = file.title, volume.stored_spacing
        count, predictions = len(slices) // volume.times, [one for _, one in self.assessed[first:]]
        for time in range(volume.times):  # each is measured by itself
            places, title = slice(time * count, (time + 1) * count), name
            own, measured = masks, stored
            if volume.times > 1:
                own, title = stack_masks(slices[places]), f"{name}, time {time}"
                measured = stored[..., time]
            columns = reliability_columns(predictions[places])
            self._keep(name, own._replace(measured=measured), columns, spacing, title=title)
        if spacing is None:
            print(f"{volume.path}: its header gives a voxel no size, so no mm or mL are measured")
        return describe(volume.path, masks, names, self.inference), [path for *_, path in files]

    def _make_masks(self, frame, image, prediction):
        options = {"inference": self.inference, "write": self.write}
        self.assessed.append((frame.title, prediction._replace(probabilities=None)))
        probabilities, spacing = prediction.probabilities, frame.spacing
        return make_masks(self.model, probabilities, image.size, spacing, **options)

    def _keep(self, name, masks, columns, *sizes, title=None):
        if not self.output.is_dir():
            return
        rows = measure(masks, self.class_names, *sizes)
        for index, row in enumerate(rows):
            own = {k: v[index] if isinstance(v, np.ndarray) else v for k, v in columns.items()}
            row |= {"image": title or name, **own}
        self.rows.setdefault(name, []).extend(rows)

    def finish(self, titles, settings, model_paths, left_out):
        """Write predictions.csv and predictions.json, the COCO file if wanted, print a summary.

        titles: of all images of the run, in the order of the table; settings: plain values for
        predictions.json; model_paths: files of the models; left_out: [(path, why)].
        """
        titles = [title for title in titles if title in self.rows]
        rows = [row for title in titles for row in self.rows[title]]
        for line in (*describe_assessments(self.assessed), *summarize(rows)):
            print(line)
        if not titles:
            return
        models = [
            {"file": str(path), "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            for path in model_paths
        ]
        left_out = [{"file": str(path), "why": why} for path, why in dict.fromkeys(left_out)]
        content = {"models": models, **settings, "version": program_version()}
        content |= {"images": len(self.rows), "left_out": left_out}
        write_text(self.output / SETTINGS, settings_text(content))
        write_text(self.output / TABLE, table_text(rows))
        print(f"measured: {self.output / TABLE}")
        if "coco" in self.write:
            records = [self.records[title] for title in titles]
            write_text(self.output / COCO, coco_text(records, self.class_names))
            print(f"annotated: {self.output / COCO}")


def summarize(rows):
    """Lines on the rows of a table: how much there is of each class, and the volume of series."""
    lines, classes, series = [], {}, {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
        if row["volume_ml"] is not None and row.get("series"):
            series.setdefault(row["series"], Counter())[row["class"]] += row["volume_ml"]
    if len(rows) == len(classes):  # one image, which has its own lines
        return []
    for name, own in classes.items():
        share = 100 * np.mean([row["share"] for row in own])
        count = f"in {sum(row['pixels'] > 0 for row in own)} of {len(own)} images"
        lines.append(f"  {name:12} {share:5.2f} % of an image on average, {count}")
    for name, volumes in list(series.items())[:MAX_LINES]:
        parts = ", ".join(f"{of} {volume:.4g} mL" for of, volume in volumes.items())
        lines.append(f"series {name}: {parts}")
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
        "channels": list(model.info.channel_names),
        "precision": choose_precision(args.precision, model.device),
        "window": window or model.info.window,
        "orientation": model.info.orientation,
        "pixel_size_mm": args.pixel_size,
    }


def montage(pictures, masks, *, draw, side=256, limit=20):
    """Up to `limit` slices with their masks drawn on them, numbered, as one PIL RGB image.

    pictures: sequence of uint8 arrays, as of `rgb_image`; masks: sequence of arrays (H, W). The
    slices are spread over those with foreground, or over all where there is none.
    draw(PIL RGB image, mask) -> PIL image.
    side: pixels of the longer side of a slice.
    """
    chosen = [index for index in range(len(pictures)) if np.any(masks[index])]
    chosen = chosen or list(range(len(pictures)))
    spread = np.linspace(0, len(chosen) - 1, min(limit, len(chosen))).round().astype(int)
    chosen = [chosen[position] for position in spread]
    height, width = np.shape(pictures[0])[:2]
    scale = side / max(height, width)
    width, height = max(round(width * scale), 1), max(round(height * scale), 1)
    columns = min(math.ceil(math.sqrt(len(chosen) * height / width)), len(chosen))
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * (width + 4) + 4, rows * (height + 24) + 4), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for place, index in enumerate(chosen):
        left, top = 4 + place % columns * (width + 4), 24 + place // columns * (height + 24)
        tile = draw(rgb_image(pictures[index]), np.asarray(masks[index]))
        sheet.paste(tile.resize((width, height), Image.Resampling.BILINEAR), (left, top))
        pen.text((left, top - 4), f"slice {index}", fill="black", font=font, anchor="ls")
    return sheet
