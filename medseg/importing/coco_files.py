"""One COCO file and a folder of images, as CVAT, Label Studio and Roboflow export them.

Polygons and run lengths become masks at the size of their image, exactly as training would draw
them; annotations of one class are united. What other formats say is handed over as the content of a
COCO file: see `examples_of`.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from medseg.coco import IGNORE, MAX_CLASSES, listed, read_coco, read_segmentation
from medseg.coco_dialects import name_forms, print_forgiven
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


class Options(NamedTuple):
    """What an import may choose.

    classes: categories to use, in their order; without it all that have an annotation, in the
    file's. group: a table as `find_groups` reads it. prefix: of names. skip_unpaired: leave out
    listed images that are not there, else a ValueError. boxes: annotations that have only a box
    become rectangles, else a ValueError.
    """

    classes: list | None = None
    group: str | None = None
    prefix: str = ""
    skip_unpaired: bool = False
    boxes: bool = False


def coco_examples(path, images, **options):
    """(examples, class names, late) of the images that a COCO file lists, below a folder.

    late: {what to print once the examples are read: paths that it is about}. options: as of
    `Options`. Raises ValueError or FileNotFoundError that names the file.
    """
    path, forgiven = Path(path), Counter()
    content = read_coco(path, forgiven=forgiven, boxes=options.get("boxes"))
    print_forgiven(forgiven)
    return examples_of(content, path, images, **options)


def examples_of(content, path, images, **options):
    """What `coco_examples` returns, of the content of a COCO file, or what says the same.

    path: of the file, for messages. images: the folder of images. The record of an image may have
    its "split". Prints what is left out.
    """
    images, options, no_pixel, outlines_of = Path(images), Options(**options), [], {}
    names = {c["id"]: same_form(str(c.get("name") or c["id"])) for c in content["categories"]}
    counts, only_boxes = Counter(dict.fromkeys(names.values(), 0)), []
    for annotation in content["annotations"]:
        own = annotation["category_id"]
        if own not in names or not is_text(names[own]):
            raise ValueError(
                f"{path}: annotation {annotation['id']!r:.40} has category_id {own!r:.40}, whose "
                f"name is {names.get(own)!r:.40}"
            )
        counts[names[own]] += 1
        outlines_of.setdefault(annotation["image_id"], []).append((names[own], annotation))
        if not annotation.get("segmentation"):
            only_boxes.append(annotation["id"])
    if only_boxes and not options.boxes:
        raise ValueError(
            f"{path}: {len(only_boxes)} of {len(content['annotations'])} annotations have no "
            f"segmentation, at most a box (annotation {only_boxes[0]!r:.40}): --boxes takes boxes "
            "as rectangles"
        )
    if only_boxes:
        print(f"boxes: {len(only_boxes)} annotations without a segmentation become rectangles")
    chosen = choose_classes(counts, options.classes, f"{path} has no category")
    wanted, examples = set(chosen), []
    pairs = _find_pairs(path, content["images"], images, options.skip_unpaired)
    relative = [image_path.relative_to(images) for image_path in pairs]
    stems, groups = unique_names(relative, options.prefix), find_groups(relative, options.group)
    for stem, group, (image_path, record) in zip(stems, groups, pairs.items(), strict=True):
        outlines = [own for own in outlines_of.get(record["id"], ()) if own[0] in wanted]
        read = partial(_read_example, path, image_path, record, outlines, no_pixel)
        examples.append(Example(stem, group, read, record.get("split", "")))
    return examples, chosen, {"annotations whose outline covers no pixel": no_pixel}


def choose_classes(counts, classes, problem):
    """The names of the classes to import; prints them and what is left out, with their outlines.

    counts: {name: number of its outlines}. classes: as for `Options`. problem: begins the message
    on one of them that is not there. What is to be ignored is chosen without being named.
    """
    check_known(classes, list(counts), problem)
    chosen = list(classes or filter(counts.get, counts))
    if counts.get(IGNORE) and IGNORE not in chosen:
        chosen.append(IGNORE)
    wanted = set(chosen)
    left = [name for name in counts if name not in wanted]
    for what, names in (("outlines", chosen), ("left out: outlines", left)):
        shown = [f"{name} ({counts[name]})" for name in names]
        if shown or names is chosen:
            print(f"{what}: {listed(shown, MAX_CLASSES) or 'none'}")
    return chosen


def _read_example(path, image_path, record, outlines, no_pixel):
    """What `Example.read` returns, of a record of an image in the COCO file at `path`.

    outlines: [(class name, annotation)] of the image. no_pixel: a list to which it is added for
    each of them that covers no pixel.
    """
    upright = read_upright(image_path)
    width, height = size = (record["width"], record["height"]) if record["width"] else upright.size
    if size != upright.size and (size[::-1] != upright.size or upright.orientation < 5):
        actual = "x".join(map(str, upright.size))
        raise ValueError(
            f"{image_path}: is {actual}, but its record in {path} says {width}x{height}"
        )
    parts = {}
    for name, annotation in outlines:
        try:
            segmentation = annotation.get("segmentation") or [corners(annotation.get("bbox") or ())]
            runs = read_segmentation(segmentation, height, width)
        except (TypeError, ValueError) as error:
            label = f"annotation {annotation['id']!r:.40} of {image_path.name}"
            raise ValueError(f"{path}: {label}: {error}") from None
        if not runs.area:
            no_pixel.append(image_path)
        parts.setdefault(name, []).append(runs)
    masks = {name: unite(own) for name, own in parts.items()}
    if upright.size != size:  # the annotations are of the picture before turning
        masks = {name: encode(fit_mask(runs.draw(), upright)) for name, runs in masks.items()}
    return upright.image, masks


def corners(box):
    """[x, y, width, height] as a polygon [x1, y1, x2, y2, ...]; ValueError or TypeError."""
    x, y, width, height = map(float, box)
    return [x, y, x + width, y, x + width, y + height, x, y + height]


# ---------------------------------------------------------------- images


def _find_pairs(path, records, images, skip_missing):
    """{Path: record} of the records whose image is there; ValueError for others."""
    named, pairs, missing, decoded = by_name(list_files(images, SUFFIXES)), {}, [], 0
    for record in records:
        name = record["file_name"]
        candidates = find_images(name, images, named)
        if len(candidates) > 1:
            raise ValueError(f"{path}: {name!r:.120} may be {candidates[0]} and {candidates[1]}")
        if not candidates:
            missing.append(f"{name!r:.120}")
        elif pairs.setdefault(candidates[0], record) is not record:
            raise ValueError(f"{path}: two records of images mean {candidates[0]}")
        else:
            decoded += same_form(PureWindowsPath(name).name) != same_form(candidates[0].name)
    if decoded:
        print(f"note: {decoded} file names are addresses of the web, such as 'a%20b.png': decoded")
    if missing:
        shown = listed(missing, 3)
        problem = f"{len(missing)} of {len(records)} images are not below {images}: {shown}"
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


def find_images(name, folder, named):
    """The image files that a name in an annotation file may mean: by its path, else by its end.

    folder: from which its path leads. named: `by_name` of all image files. Windows separators and
    addresses of the web are understood.
    """
    for form in map(PureWindowsPath, name_forms(name)):
        candidates = named.get(same_form(form.name), [])
        meant = same_form(os.path.normpath(folder / form.as_posix()))
        exact = [own for own in candidates if same_form(os.path.normpath(own)) == meant]
        if candidates:
            return exact or candidates
    return []
