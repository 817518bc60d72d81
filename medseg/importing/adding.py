"""More images into a split that is there, of which nothing changes."""

import json
import os
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from medseg.coco import ANNOTATIONS, image_path, listed, read_annotations
from medseg.dataset_folder import install
from medseg.duplicates import NEAR_DUPLICATE, correlate, is_flat, shrink, thumbnail
from medseg.files import parallel_map, read_json
from medseg.images import read_image
from medseg.importing.writing import as_coco, check_classes, print_counts, write_split
from medseg.patterns import same_form
from medseg.splits import link_or_copy, present_splits

SAME = 0.9999  # correlation of the thumbnails of an image and its copy


def add_images(root, examples, classes, *, into, duplicates=None, any_order=False):
    """Add `examples` to the split `into` of `root`, whole or not at all, and print what was added.

    What the split holds stays: images, records, ids, groups, categories and info. classes: those
    of the splits, or some of them, in their order unless any_order; none, where no example has a
    mask. duplicates: as of `leave_out_known`.
    Raises ValueError where classes, groups or names disagree with those of any split, or images
    are there already; and what an example's read() raises.
    """
    root, there = Path(root), present_splits(root)
    check_classes(root, there, classes, any_order)
    contents = {split: read_annotations(root / split, skipped=[]) for split in there}
    records = {split: content["images"] for split, content in contents.items()}
    check_groups(root, into, records, {example.group for example in examples} - {""})
    ids = {}
    for category in contents[into]["categories"]:
        ids.setdefault(str(category.get("name")), category["id"])  # of several the first

    def write_whole(folder):
        new = folder / into
        with tqdm(desc="importing", total=len(examples), unit="image", disable=None) as bar:
            written = write_split(new, examples, ids, bar)
        names = [record["file_name"] for record, _ in written]
        kept = leave_out_known(root, into, records, [new / name for name in names], duplicates)
        check_names(root, records, kept)
        for name in set(names).difference(kept):
            (new / name).unlink()
        written = [own for own in written if own[0]["file_name"] in kept]
        content = {"categories": [], **read_json(root / into / ANNOTATIONS)}
        _append(content, written)
        (new / ANNOTATIONS).write_text(json.dumps(content))
        _link_all(root / into, new)
        return written, len(content["images"])

    added, total = install(root, write_whole)
    print_counts(into, added, list(ids), total)


def _append(content, written):
    """Append what `write_split` returned to the content of an annotation file, whose ids stay."""
    first, number = _free_id(content["images"]), _free_id(content["annotations"])
    for record, annotations in written:
        record["id"] += first
        for annotation in annotations.values():
            annotation |= {"id": annotation["id"] + number, "image_id": record["id"]}
    for key, more in as_coco(written).items():
        content[key] += more


def _free_id(records):
    """A number above every id of the records, and above their places: what missing ids are."""
    ids = [record["id"] for record in records if type(record.get("id")) is int]
    return max([*ids, len(records) - 1]) + 1


def _link_all(folder, new):
    """Link or copy to `new` all that a split has, but for the annotations."""
    for path in folder.iterdir():
        target = new / path.name
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True, copy_function=link_or_copy)
        elif not os.path.lexists(target):
            link_or_copy(path, target)
        elif path.name != ANNOTATIONS:
            raise ValueError(
                f"{path}: is there, though {ANNOTATIONS} does not list it: move it elsewhere"
            )


# ---- what the data set has already ----------------------------------------------------------


def check_groups(root, into, records, groups):
    """ValueError where another split than `into` has images of the groups.

    records: {split: records of its images}.
    """
    for split, images in records.items():
        both = sorted(groups & {str(record["group"]) for record in images if record.get("group")})
        if split != into and both:
            raise ValueError(
                f"{root / split} has images of {len(both)} of the {len(groups)} groups to be added "
                f"to {into} ({listed(both, 3)}): add these with --into {split}, or leave them out, "
                "for a group stays in one split"
            )


def check_names(root, records, names):
    """ValueError where an image of any split is called as one of the new files `names`.

    records: as of `check_groups`. Suffix and case do not count: masks are called after images.
    """
    new = {_comparable(name): name for name in sorted(names)}
    for split, images in records.items():
        there = {_comparable(record["file_name"]) for record in images}
        if both := [name for key, name in new.items() if key in there]:
            raise ValueError(
                f"{root / split} has images of the names of {len(both)} of the {len(new)} new ones "
                f"({listed(both, 3)}): --prefix new_ begins the new names with that"
            )


def _comparable(name):
    return same_form(same_form(PurePosixPath(name).stem).casefold())


def leave_out_known(root, into, records, new, duplicates=None):
    """A set of the file names of those of the images `new` that are to be added to a split.

    records: as of `check_groups`. duplicates: what becomes of images that are in any split already,
    or are nearly in another one: "skip" leaves them out, which is printed, "keep" adds them, None
    is a ValueError. Raises ValueError where none are left.
    """
    there = [
        (split, image_path(root / split, record["file_name"]))
        for split, images in records.items()
        for record in images
    ]
    names, known = {path.name for path in new}, find_known(there, into, new)
    if not known or duplicates == "keep":
        return names
    left = names - known.keys()
    splits = " and ".join(dict.fromkeys(str(root / split) for split, _ in known.values()))
    pairs = listed([f"{name} as {like}" for name, (_, like) in known.items()], 3)
    what = f"{len(known)} of the {len(names)} new images are in {splits}, or nearly ({pairs})"
    if duplicates is None or not left:
        ways = "--duplicates skip leaves these out" if left else "nothing to add"
        raise ValueError(f"{what}: {ways}, --duplicates keep adds them all the same")
    print(f"left out: {what}")
    return left


def find_known(there, into, new):
    """{name: (split, file name of the image there)} of new images that a data set has already.

    there: [(split, Path)] of its images; new: paths of those that are to go into the split `into`.
    The same image in any split counts, and near-duplicates in others, which are named first.
    Images that show nothing and damaged ones do not count.
    """
    looks = parallel_map(_look, [path for _, path in there])
    bar = tqdm(looks, "comparing", len(there), unit=" images", disable=None)
    old = [(*own, look) for own, look in zip(there, bar, strict=True) if _shows_some(look)]
    looks = parallel_map(_look, new, catch=())
    seen = [(path.name, look) for path, look in zip(new, looks, strict=True) if _shows_some(look)]
    if not old or not seen:
        return {}
    elsewhere, known = np.array([split != into for split, *_ in old]), {}
    alike = correlate([look for _, look in seen], [look for *_, look in old])
    for (name, _), row in zip(seen, alike, strict=True):
        near = np.flatnonzero(row >= np.where(elsewhere, NEAR_DUPLICATE, SAME))
        if len(near):
            split, path, _ = old[max(near, key=lambda index: (elsewhere[index], row[index]))]
            known[name] = split, path.name
    return known


def _look(path):
    return thumbnail(shrink(read_image(path)))


def _shows_some(look):
    """Whether a thumbnail, or the error of a damaged image, is one of an image that shows some."""
    return not isinstance(look, Exception) and not is_flat(look)
