"""What is made of predictions: files for each image, and one table of all."""

import numpy as np
from PIL import Image

from medseg.formats.medical import mask_name, result_name
from medseg.formats.nifti import write_mask, write_prediction
from medseg.formats.own_files import COCO, REPORT, SETTINGS, TABLE, check_outputs
from medseg.full_size import MAX_LEVEL, full_size_levels, sum_probabilities
from medseg.images import save_mask, save_overlay, save_png
from medseg.results.annotations import coco_record, coco_text, labelme_files, write_labelme
from medseg.results.table import (
    Parts,
    check_free,
    file_sha256,
    measure,
    program_version,
    settings_text,
    table_text,
    write_text,
)

MAX_LINES = 20  # images of which each gets a line on the screen
# What --write knows, and what to call several of each.
WRITTEN = {
    "mask": "masks",
    "overlay": "overlays",
    "probability": "probabilities",
    "labelme": "LabelMe files",
    "coco": "",  # one file of all
}
DEFAULT = ("mask", "overlay")


class Results:
    """The files of predictions in a folder, and the rows of its table.

    output: the folder; class_names: of the model; write: names of WRITTEN. `add` may be called from
    several threads.
    """

    def __init__(self, output, class_names, write=DEFAULT):
        self.output, self.class_names, self.write = output, class_names, write
        self.rows, self.records = {}, {}  # of the table, of the COCO file; {title: ...}

    def check(self, frames, volumes, *, figure=False, report=False):
        """ValueError where --write needs a folder, or would overwrite what may be a user's work.

        frames: [Frame]; volumes: [ImageFile], for which no annotations are written. figure: whether
        a frame gets the tutorial's figure in place of an overlay; report: whether there is one.
        """
        if not self.output.is_dir() and self.write != DEFAULT:
            raise ValueError(
                f"--output {self.output}: is one file, of the mask: --write needs a folder"
            )
        wanted = [name for name in ("labelme", "coco") if name in self.write]
        if wanted and volumes:
            raise ValueError(
                f"{volumes[0].path}: --write {','.join(wanted)} is of pictures; the mask of a "
                "volume can be corrected in 3D Slicer or ITK-SNAP"
            )
        if "coco" in self.write:
            check_free(self.output / COCO)
        for frame in frames if "labelme" in self.write else ():
            for path in filter(None, labelme_files(frame, self.output)):
                if path.exists():
                    raise ValueError(
                        f"{path}: is there, and may hold corrections: move it, or choose another "
                        "--output"
                    )

        check_outputs(self._planned(frames, volumes, "prediction.png" if figure else "overlay.jpg"))
        if report:
            check_outputs([self.output / REPORT, self.output / "report.png"])

    def _planned(self, frames, volumes, drawn):
        """Yield the path of each mask, picture and probability; drawn: how overlays end."""
        if not self.output.is_dir():
            yield self.output
            return
        endings = [(frame.name, f"{frame.name}_mask.png", drawn, ".png") for frame in frames]
        for path in (file.path for file in volumes):
            endings.append((result_name(path), mask_name(path), "montage.png", ".nii.gz"))
        for name, mask, drawing, suffix in endings:
            if "mask" in self.write:
                yield self.output / mask
            if "overlay" in self.write:
                yield self.output / f"{name}_{drawing}"
            if "probability" in self.write:
                yield from self._paths(name, suffix)

    def add(self, frame, image, labels, probabilities, *, masks=None, dice=None, **columns):
        """Write the files of one image, and keep what table and COCO file have of it.

        image: PIL RGB image; labels: class numbers, uint8 (height, width); probabilities: float32
        (C, S, S); masks: of classes that do not exclude one another, bool (C, height, width), which
        are measured instead; dice: of each class, where the image has annotations; columns: further
        ones of the table, with their values for this image.
        """
        self.save(frame, image, labels, probabilities)
        if "overlay" in self.write:
            path = self.output / f"{frame.name}_overlay.jpg"
            save_overlay(image, labels, path, self.class_names)
        sizes = {"spacing": frame.spacing, "depth": frame.depth}
        highest = probabilities.max((1, 2))
        sums = sum_probabilities(labels, probabilities, masks)
        rows = measure_classes(labels, masks, self.class_names, highest, sums, **sizes)
        for row, value in zip(rows, () if dice is None else dice, strict=False):
            row["dice"] = float(value)
        series = frame.place[0] if frame.place else None
        self._keep(frame.title, rows, series=series, **columns)

    def save(self, frame, image, labels, probabilities):
        """Write mask, probabilities and LabelMe file as wanted; returns their paths."""
        written = []
        if "mask" in self.write:
            written.append(self.output / f"{frame.name}_mask.png")
            save_mask(labels, written[-1], self.class_names)
        if "probability" in self.write:
            for channel, path in zip(probabilities, self._paths(frame.name, ".png"), strict=True):
                levels = full_size_levels(channel, image.size)
                save_png(Image.fromarray(levels), path)
                written.append(path)
        if "labelme" in self.write:
            write_labelme(frame, image, labels, self.output, self.class_names)
            written.append(labelme_files(frame, self.output)[0])
        if "coco" in self.write:
            self.records[frame.title] = coco_record(frame, labels)
        return written

    def _paths(self, name, suffix):
        """Where the probabilities of each class are written: by its number, where several are."""
        names = [name]
        if len(self.class_names) > 1:
            names = [f"{name}_{number}" for number in range(1, len(self.class_names) + 1)]
        return [self.output / f"{name}_probability{suffix}" for name in names]

    def add_volume(self, found, window, **columns):
        """Write the files of a `medseg.results.volume.VolumeMasks` and keep its rows.

        window: (center, width) of its pictures, or None; columns: as of `add`. Returns the paths of
        the files.
        """
        volume, spacing, names = found.volume, found.volume.stored_spacing, self.class_names
        pictures = volume.pictures(window)
        written = write_prediction(self.output, volume, pictures, found.masks, names, self.write)
        if found.levels is not None:
            paths = self._paths(result_name(volume.path), ".nii.gz")
            for path, levels in zip(paths, found.levels, strict=True):
                write_mask(path, volume, levels, np.uint16, 1 / MAX_LEVEL)
                written.append(path)
        voxels, own = volume.stored(found.masks), None
        if found.class_masks is not None:
            own = np.stack([volume.stored(mask, bool) for mask in found.class_masks])
        rows = measure_classes(voxels, own, names, found.highest, found.sums, spacing=spacing)
        self._keep(volume.path.name, rows, **columns)
        if spacing is None:
            print(f"{volume.path}: its header gives a voxel no size, so no mm or mL are measured")
        return written

    def _keep(self, title, rows, **columns):
        self.rows[title] = [{"image": title, **row, **columns} for row in rows]

    def what(self):
        """What is written of each image, in words."""
        words = [WRITTEN[name] for name in self.write if WRITTEN[name]]
        return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))

    def write_coco(self, titles, records):
        """Write the COCO file where it is wanted; records: {title: record}. Returns its path."""
        if "coco" not in self.write:
            return None
        found = [records[title] for title in titles if title in records]
        write_text(self.output / COCO, coco_text(found, self.class_names))
        return self.output / COCO


def measure_classes(labels, masks, names, highest, sums, **sizes):
    """`measure` of class numbers or, where they are not None, of the mask of each class.

    masks: bool (C, *shape of the labels); the others, and sizes, as of `measure`.
    """
    if masks is None:
        return measure(labels, names, highest, sums, **sizes)
    rows = []
    for index, mask in enumerate(masks.view(np.uint8)):
        one = slice(index, index + 1)
        rows += measure(mask, names[one], highest[one], sums[one], **sizes)
    return rows


class Table:
    """predictions.csv and predictions.json of a run, which may be of several processes.

    results: the Results of this process; rank, world: its number, and of all.
    Raises ValueError where they cannot be written: before hours of prediction, not after.
    """

    def __init__(self, results, rank=0, world=1):
        self._results, self._folder = results, results.output
        for name in (TABLE, SETTINGS):
            check_free(self._folder / name)
        self._parts = Parts(self._folder, rank, world)

    def finish(self, titles, settings, model_paths, left_out):
        """Write both files and print a summary, in the last process alone.

        titles: of all images of the run, in the order of the table; settings: plain values for
        predictions.json; model_paths: files of the models; left_out: [(path, why)].
        """
        left_out = [[str(path), why] for path, why in left_out]
        own = {"rows": self._results.rows, "records": self._results.records}
        parts, found, records = self._parts.put({**own, "left_out": left_out}), {}, {}
        for part in parts:
            found |= part["rows"]
            records |= part["records"]
        if not found:
            return
        rows = [row for title in titles for row in found.get(title, ())]
        models = [{"file": str(path), "sha256": file_sha256(path)} for path in model_paths]
        pairs = dict.fromkeys(tuple(pair) for part in parts for pair in part["left_out"])
        left_out = [{"file": path, "why": why} for path, why in pairs]
        content = {"models": models, **settings, "version": program_version()}
        content |= {"images": len(found), "left_out": left_out}
        write_text(self._folder / SETTINGS, settings_text(content))
        write_text(self._folder / TABLE, table_text(rows))
        for line in summarize(rows):
            print(line)
        print(f"measured: {self._folder / TABLE}")
        if path := self._results.write_coco(titles, records):
            print(f"annotated: {path}")


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
        "class_names": list(model.class_names),
        **model.inference.as_dict(),
        "image_size": model.image_size,
        "n_channels": model.n_channels,
        "precision": model.precision,
        "window": window or model.window,
        "orientation": model.orientation,
        "pixel_size_mm": args.pixel_size,
    }
