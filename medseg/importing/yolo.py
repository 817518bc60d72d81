"""A folder as YOLO has it, images/ and labels/, read as the content of a COCO file."""

from pathlib import Path

from medseg.archive import ALIASES
from medseg.coco import shown_size
from medseg.files import parallel_map
from medseg.images import SUFFIXES
from medseg.importing.coco_files import examples_of
from medseg.importing.collect import list_files

MAX_FRACTION = 1.5  # outlines may leave the image a little


def yolo_examples(folder, **options):
    """What `coco_examples` returns, of the images in folders images/ and their labels/*.txt.

    A line of labels is the number of a class and the outline in fractions of the image's size; of
    four numbers, a box. An image without labels has no foreground. Folders train, val (valid) and
    test are splits. Raises ValueError or FileNotFoundError that names the file.
    """
    folder = Path(folder)
    paths = [p for p in list_files(folder, SUFFIXES) if "images" in p.relative_to(folder).parts]
    if not paths:
        raise ValueError(f"{folder}: holds no images in a folder called images")
    names, split_of = _read_names(folder), {a: s for s, own in ALIASES.items() for a in own}
    images, annotations, unlabelled = [], [], []
    for path, size in zip(paths, parallel_map(shown_size, paths), strict=True):
        *places, name = path.relative_to(folder).parts
        split = next((split_of[place] for place in places if place in split_of), "")
        record = {"id": len(images), "file_name": "/".join([*places, name]), "split": split}
        images.append(record | {"width": size[0], "height": size[1]})
        places[len(places) - 1 - places[::-1].index("images")] = "labels"
        labels = folder.joinpath(*places, name).with_suffix(".txt")
        if not labels.is_file():
            unlabelled.append(labels)
            continue
        for own in _read_labels(labels, names, size):
            annotations.append({"id": len(annotations), "image_id": record["id"], **own})
    if len(unlabelled) == len(paths):
        raise ValueError(f"{unlabelled[0]}: no such file, nor are there labels of other images")
    if unlabelled:
        what = "images have no labels: they have no foreground"
        print(f"note: {len(unlabelled)} of {len(paths)} {what}")
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return examples_of(content, folder, folder, **options)


def _read_names(folder):
    """{number: name of the class} of data.yaml, or of the only .yaml file, else of classes.txt."""
    import yaml

    files = list_files(folder, (".yaml", ".yml"))
    files = [path for path in files if path.name == "data.yaml"] or files
    listed = folder / "classes.txt"  # Label Studio's
    if not files and listed.is_file():
        return dict(enumerate(listed.read_text(encoding="utf-8").splitlines()))
    if len(files) != 1:
        raise ValueError(f"{folder}: has {len(files)} files .yaml: one, data.yaml, has the names")
    try:
        names = yaml.safe_load(files[0].read_text(encoding="utf-8"))["names"]
        names = names if isinstance(names, dict) else dict(enumerate(names))
        return {int(number): str(name) for number, name in names.items()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{files[0]}: has no list of names of classes ({problem:.80})") from None


def _read_labels(path, names, size):
    """Yield category_id and segmentation, or bbox, of each line; size: (width, height)."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            own, *values = map(float, line.split())
        except ValueError:
            raise ValueError(f"{path}: line {number} holds something that is no number") from None
        if own not in names:
            raise ValueError(f"{path}: line {number} has the class {own:g}, which has no name")
        if len(values) % 2 or len(values) < 4 or not max(map(abs, values)) <= MAX_FRACTION:
            raise ValueError(f"{path}: line {number} is no outline in fractions of the size")
        scaled = [value * size[place % 2] for place, value in enumerate(values)]
        if len(values) == 4:  # the centre of a box, and its size
            x, y, width, height = scaled
            yield {"category_id": int(own), "bbox": [x - width / 2, y - height / 2, width, height]}
        else:
            yield {"category_id": int(own), "segmentation": [scaled]}
