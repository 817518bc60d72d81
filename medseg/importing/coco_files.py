"""One COCO file and a folder of images, as CVAT, Label Studio and Roboflow export them.

Polygons and run lengths become masks at the size of their image, exactly as training would draw
them; annotations of one class are united.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path, PureWindowsPath

from medseg.coco import (
    MAX_CLASSES,
    listed,
    read_coco,
    read_segmentation,
)
from medseg.coco_dialects import name_forms, print_forgiven
from medseg.files import check_regular
from medseg.images import SUFFIXES
from medseg.importing.collect import (
    check_known,
    find_groups,
    fit_mask,
    is_text,
    list_files,
    read_upright,
    unique_names,
)
from medseg.importing.writing import Example
from medseg.patterns import same_form
from medseg.run_lengths import encode, unite


def coco_examples(annotations, images, *, boxes=False, **options):
    """(examples, class names, late) of the images that a COCO file lists, below a folder.

    late: {what to print once the examples are read: paths that it is about}. boxes and options: as
    of `examples_of`. Raises ValueError or FileNotFoundError that names the file.
    """
    path, forgiven = Path(annotations), Counter()
    check_regular(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = read_coco(path, forgiven=forgiven, boxes=boxes)
    print_forgiven(forgiven)
    return examples_of(content, path, images, boxes=boxes, **options)


def examples_of(
    content, path, images, *, classes=None, group=None, prefix="", skip_unpaired=False, boxes=False
):
    """What `coco_examples` returns, of the content of a COCO file, or what says the same.

    path: of the file, for messages. images: the folder of images. The record of an image may have
    its "split". Prints what is left out. classes: categories to use, in their order; without it all
    that have an annotation, in the file's. group: a table as `find_groups` reads it.
    prefix: of names. skip_unpaired: leave out listed images that are not there,
    else a ValueError. boxes: annotations that have only a box become rectangles, else a ValueError.
    """
    images, no_pixel = Path(images), []
    of_image = _by_image(path, content, boxes)
    names, chosen = _choose_classes(path, content, classes)
    pairs = _find_images(path, content["images"], images, skip_unpaired)
    wanted = set(chosen)
    relative = [image_path.relative_to(images) for _, image_path in pairs]
    stems, groups = unique_names(relative, prefix), find_groups(relative, group)
    examples = []
    for stem, own_group, (record, image_path) in zip(stems, groups, pairs, strict=True):
        named = [(names[a["category_id"]], a) for a in of_image.get(record["id"], ())]
        outlines = [(name, annotation) for name, annotation in named if name in wanted]
        read = partial(_read_example, path, image_path, record, outlines, no_pixel)
        examples.append(Example(stem, own_group, read, record.get("split", "")))
    return examples, chosen, {"annotations whose outline covers no pixel": no_pixel}


def _read_example(path, image_path, record, outlines, no_pixel):
    """What `Example.read` returns, of a record of an image in the COCO file at `path`.

    outlines: [(class name, annotation)] of the image. no_pixel: a list to which it is added for
    each of them that covers no pixel.
    """
    upright = read_upright(image_path)
    width, height = record["width"], record["height"]
    if not width:
        width, height = upright.size
    sizes = [upright.size] + [upright.size[::-1]] * (upright.orientation >= 5)
    if (width, height) not in sizes:
        actual = "x".join(map(str, upright.size))
        raise ValueError(
            f"{image_path}: is {actual}, but its record in {path} says {width}x{height}"
        )
    runs_of = {}
    for name, annotation in outlines:
        try:
            segmentation = annotation.get("segmentation") or [_rectangle(annotation)]
            runs = read_segmentation(segmentation, height, width)
        except ValueError as error:
            label = f"annotation {annotation['id']!r:.40} of {image_path.name}"
            raise ValueError(f"{path}: {label}: {error}") from None
        if not runs.area:
            no_pixel.append(image_path)
        runs_of.setdefault(name, []).append(runs)
    masks = {name: unite(parts) for name, parts in runs_of.items()}
    if upright.size != (width, height):  # the annotations are of the picture before turning
        turned = ((name, fit_mask(runs.draw() > 0, upright)) for name, runs in masks.items())
        masks = {name: encode(mask) for name, mask in turned}
    return upright.image, masks


def _rectangle(annotation):
    """The box of an annotation as a polygon [x1, y1, x2, y2, ...]."""
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and len(box) == 4
    if not numbers or not all(type(value) in (int, float) for value in box):
        raise ValueError("its bbox is not four numbers")
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def _by_image(path, content, boxes):
    """{image id: annotations}; ValueError for one without an outline, or with only a box."""
    of_image, only_boxes = {}, []
    for annotation in content["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
        if not annotation.get("segmentation"):
            only_boxes.append(annotation)
    if only_boxes and not boxes:
        raise ValueError(
            f"{path}: {len(only_boxes)} of {len(content['annotations'])} annotations have no "
            f"segmentation, at most a box (annotation {only_boxes[0]['id']!r:.40}): --boxes takes "
            "boxes as rectangles"
        )
    if only_boxes:
        print(f"boxes: {len(only_boxes)} annotations without a segmentation become rectangles")
    return of_image


def _choose_classes(path, content, classes):
    """({category id: class name}, class names), with what is left out printed."""
    names = {c["id"]: same_form(str(c.get("name") or c["id"])) for c in content["categories"]}
    for name in names.values():
        if not is_text(name):
            raise ValueError(f"{path}: a category has the name {name!r:.40}: no text")
    counts = Counter()
    for annotation in content["annotations"]:
        if annotation["category_id"] not in names:
            raise ValueError(
                f"{path}: annotation {annotation['id']!r:.40} has category_id "
                f"{annotation['category_id']!r:.40}, which categories does not list"
            )
        counts[names[annotation["category_id"]]] += 1
    known = dict.fromkeys(names.values())
    check_known(classes, list(known), f"{path} has no category")
    chosen = list(classes or [name for name in known if counts[name]])
    used = [f"{name} ({counts[name]} annotations)" for name in chosen]
    print(f"categories: {listed(used, MAX_CLASSES) or 'none with annotations'}")
    wanted = set(chosen)
    if unused := [f"{name} ({counts[name]})" for name in known if name not in wanted]:
        print(f"left out: categories: {listed(unused, MAX_CLASSES)}")
    return names, chosen


# ---------------------------------------------------------------- images


def _find_images(path, records, images, skip_missing):
    """[(record, Path)] of the records whose image is there; ValueError for others."""
    named = by_name(list_files(images, SUFFIXES))
    pairs, missing, taken, decoded = [], [], set(), 0
    for record in records:
        for number, form in enumerate(name_forms(record["file_name"])):
            if candidates := find_image(images, form, named):
                decoded += number > 0
                break
        if len(candidates) > 1:
            several = " and ".join(map(str, candidates[:2]))
            raise ValueError(f"{path}: {record['file_name']!r:.120} may be {several}")
        if candidates and candidates[0] in taken:
            raise ValueError(f"{path}: two records of images mean {candidates[0]}")
        if candidates:
            pairs.append((record, candidates[0]))
            taken.add(candidates[0])
        else:
            missing.append(record["file_name"])
    if decoded:
        print(f"note: {decoded} file names are addresses of the web, such as 'a%20b.png': decoded")
    if missing:
        first = ", ".join(f"{name!r:.120}" for name in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        problem = f"{len(missing)} of {len(records)} images are not below {images}: {first}{more}"
        if not (skip_missing and pairs):
            raise ValueError(f"{path}: {problem}; --skip-unpaired goes on without them")
        print(f"left out: {problem}")
    if not pairs:
        raise ValueError(f"{path}: lists no images")
    return pairs


def by_name(pictures):
    """{name in one form: paths} of image files."""
    named = {}
    for picture in pictures:
        named.setdefault(same_form(picture.name), []).append(picture)
    return named


def find_image(images, name, named):
    """The files below `images` that a file_name may mean: by its path, else by its last part.

    Windows separators are understood; a path that leads out of the folder counts by its last
    part. named: `by_name` of all image files.
    """
    name = PureWindowsPath(name)
    candidates = named.get(same_form(name.name), [])
    if not name.anchor and ".." not in name.parts:
        meant = os.path.normpath(images / name.as_posix())
        for form in (str, same_form):
            exact = [path for path in candidates if form(os.path.normpath(path)) == form(meant)]
            if exact:
                return exact
    return candidates
