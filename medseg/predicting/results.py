"""What is made of predictions: files for each image, and one table of all."""

import numpy as np

from medseg.images import save_mask, save_overlay, sum_probabilities
from medseg.predicting.table import (
    SETTINGS,
    TABLE,
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


class Results:
    """The files of predictions in a folder, and the rows of its table.

    output: the folder; class_names: of the model. `add` may be called from several threads.
    """

    def __init__(self, output, class_names):
        self.output, self.class_names = output, class_names
        self.rows = {}  # title -> rows of the table

    def add(self, frame, image, labels, probabilities):
        """Write the files of one image and keep its rows.

        image: PIL RGB image; labels: class numbers, uint8 (height, width); probabilities: float32
        (C, S, S).
        """
        save_mask(labels, self.output / f"{frame.name}_mask.png", self.class_names)
        save_overlay(image, labels, self.output / f"{frame.name}_overlay.jpg", self.class_names)
        sums, highest = sum_probabilities(labels, probabilities), probabilities.max((1, 2))
        rows = measure(
            *(labels, self.class_names, highest, sums), spacing=frame.spacing, depth=frame.depth
        )
        self._keep(frame.title, rows, series=frame.place and frame.place[0])

    def add_volume(self, path, volume, masks, highest, sums):
        """Keep the rows of a `medseg.formats.nifti.Volume`.

        masks: class numbers, uint8 arrays (H, W) of its slices; highest, sums: as `measure` has
        them, over all slices.
        """
        voxels, spacing = volume.stored(masks), volume.stored_spacing
        self._keep(path.name, measure(voxels, self.class_names, highest, sums, spacing=spacing))

    def _keep(self, title, rows, series=None):
        self.rows[title] = [{"image": title, **row, "series": series} for row in rows]

    def what(self):
        """What is written of each image, in words."""
        return "masks and overlays"


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
        parts = self._parts.put({"rows": self._results.rows, "left_out": left_out})
        found = {}
        for part in parts:
            found |= part["rows"]
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


def summarize(rows):
    """Lines on the rows of a table: how much there is of each class, and the volume of series."""
    lines, classes, series = [], {}, {}
    for row in rows:
        classes.setdefault(row["class"], []).append(row)
        if row["volume_ml"] is not None and row["series"]:
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
