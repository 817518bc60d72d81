"""A folder with annotations: its predictions scored, and reported."""

from pathlib import Path

from data import Batches, load_split, open_split
from medseg import coco
from medseg.predicting.report import FolderScores, threshold_sweep, write_report


def open_folder(model, folder, spacing=None):
    """The FolderScores of a folder with annotations, for the predictions of a `Predictor`.

    spacing: mm of a pixel along each axis, or None.
    Raises ValueError where the annotations are damaged or of other classes.
    """
    place = folder.resolve()  # `dataset/test/` and `.` have a parent too
    dataset = open_split(place.parent, place.name, model.info.image_size, **_content(model))
    coco.check_classes(dataset.coco, dataset.classes, folder)
    inference, exclusive = model.inference, model.info.exclusive
    chosen = {"flips": inference.flips, "clean": inference.clean, "spacing": spacing}
    return FolderScores(dataset, inference.threshold, exclusive=exclusive, **chosen)


def report(model, folder, scores, output, predict_image):
    """Write report.json and report.png of an annotated folder to `output`.

    scores: its FolderScores after the predictions; images that it has not met are predicted here.
    predict_image(PIL image) -> `medseg.predictor.Prediction`. Returns what report.json holds.
    The threshold that suits the model best is sought in the split `valid` beside the folder, never
    in the folder itself.
    Raises FileNotFoundError or ValueError where an annotated image cannot be read or predicted.
    """
    scores.complete(predict_image)
    valid, sweep = Path(folder).resolve().parent / "valid", None
    if (valid / coco.ANNOTATIONS).exists() and not valid.samefile(folder):
        split, content = (valid.parent, valid.name, model.info.image_size), _content(model)
        sizes = {"n_channels": model.n_channels, "n_classes": len(model.info.class_names)}
        batches = Batches(load_split(*split, **content), model.batch_size, model.device, **sizes)
        sweep = threshold_sweep(model, batches, open_split(*split, **content), scores.spacing)
    return write_report(output, str(folder), scores, sweep, model.info.class_names)


def _content(model):
    names = list(model.info.class_names)
    return {"classes": names if len(names) > 1 else None, "n_channels": model.n_channels}
