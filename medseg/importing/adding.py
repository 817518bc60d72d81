"""More images into a split that is there, of which nothing changes."""

import hashlib
import itertools
import json
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from medseg.coco import ANNOTATIONS, image_path, listed, read_annotations
from medseg.dataset_folder import import_lock
from medseg.duplicates import NEAR_DUPLICATE, correlate, is_flat, thumbnail
from medseg.files import atomic_write, parallel_map, read_json
from medseg.images import read_image
from medseg.importing.writing import check_classes, print_counts, write_split
from medseg.patterns import same_form
from medseg.splits import extend_split, present_splits


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
    head = {"categories": [{"id": own, "name": name} for name, own in ids.items()]}

    def write_more(new):
        with tqdm(desc="importing", total=len(examples), unit="image", disable=None) as bar:
            written = write_split(new, examples, head, bar)
        names = [record["file_name"] for record, _ in written]
        kept = leave_out_known(root, into, records, [new / name for name in names], duplicates)
        check_names(root, records, kept)
        for name in set(names).difference(kept):
            (new / name).unlink()
        content = {"categories": [], **read_json(root / into / ANNOTATIONS)}
        _append(content, read_json(new / ANNOTATIONS), kept)
        with atomic_write(new / ANNOTATIONS) as file:
            file.write(json.dumps(content).encode("ascii"))
        written = [own for own in written if own[0]["file_name"] in kept]
        return into, written, list(ids), len(content["images"])

    with import_lock(root):
        added = extend_split(root / into, write_more)
    print_counts(*added)


def _append(content, more, kept):
    """Append the images of `more` that are `kept`, with their annotations, to `content`.

    Both are annotation files, kept is a set of file names. What is there keeps its ids.
    """
    images = [record for record in more["images"] if record["file_name"] in kept]
    numbers = _free_ids(content["images"])
    ids = {record["id"]: next(numbers) for record in images}
    outlines = [own for own in more["annotations"] if own["image_id"] in ids]
    numbers = _free_ids(content["annotations"])
    content["images"] += [{**record, "id": ids[record["id"]]} for record in images]
    content["annotations"] += [
        {**own, "id": next(numbers), "image_id": ids[own["image_id"]]} for own in outlines
    ]


def _free_ids(records):
    """Numbers above every id of the records, and above the places that stand in for missing ids."""
    ids = (record.get("id") for record in records if isinstance(record, dict))
    highest = max((own for own in ids if type(own) is int), default=-1)
    return itertools.count(max(highest + 1, len(records)))


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
    is a ValueError. A line is printed where images are nearly in the split itself. Raises
    ValueError where none are left.
    """
    there = [
        (split, image_path(root / split, record["file_name"]))
        for split, images in records.items()
        for record in images
    ]
    names, entries = {path.name for path in new}, find_known(there, into, new)
    known = [own for own in entries if own.same or own.split != into]
    near = [own for own in entries if not own.same and own.split == into]
    left = names - {own.name for own in known}

    def describe(entries):
        splits = " and ".join(dict.fromkeys(str(root / own.split) for own in entries))
        pairs = listed([f"{own.name} as {own.like}" for own in entries], 3)
        nearly = "" if all(own.same for own in entries) else ", or nearly"
        return f"{len(entries)} of the {len(names)} new images are in {splits}{nearly} ({pairs})"

    if near:
        print(f"note: {describe(near)}")
    if not known or duplicates == "keep":
        return names
    if duplicates is None or not left:
        ways = "--duplicates skip leaves these out" if left else "nothing to add"
        raise ValueError(f"{describe(known)}: {ways}, --duplicates keep adds them all the same")
    print(f"left out: {describe(known)}")
    return left


class Known(NamedTuple):
    """A new image that the data set has already, or one like it."""

    name: str  # of the file
    split: str
    like: str  # the file name of the image there
    same: bool  # every pixel, or nearly


def find_known(there, into, new):
    """[Known] of new images, which are to go into a split.

    there: [(split, Path)] of the images of a data set; new: paths. The same pixels in any split
    count, and near-duplicates. Of several images, one with the same pixels is named, in the split
    itself before others; else one of another split. Images that show nothing and damaged ones do
    not count.
    """
    looks = parallel_map(_look, [path for _, path in there])
    bar = tqdm(looks, "comparing", len(there), unit=" images", disable=None)
    old = [(*own, *look) for own, look in zip(there, bar, strict=True) if isinstance(look, tuple)]
    looks = parallel_map(_look, new, catch=())
    seen = [(path.name, *look) for path, look in zip(new, looks, strict=True) if look]
    if not old or not seen:
        return []
    digests, known = np.array([digest for _, _, digest, _ in old]), []
    alike = correlate([look for *_, look in seen], [look for *_, look in old])
    for (name, digest, _), row in zip(seen, alike, strict=True):
        same = np.flatnonzero(digests == digest)
        near = same if len(same) else np.flatnonzero(row >= NEAR_DUPLICATE)
        if len(near):
            index = max(near, key=lambda i: ((old[i][0] == into) == (len(same) > 0), row[i]))
            split, path, *_ = old[index]
            known.append(Known(name, split, path.name, len(same) > 0))
    return known


def _look(path):
    """(digest of size and pixels, thumbnail) of an image, or None where it shows nothing."""
    image = read_image(path)  # grey stored as colours is the same
    pixels = np.asarray(image.rgb() if image.n_channels == 1 else image.pixels)
    digest = hashlib.sha256(repr(image.size).encode() + pixels.tobytes()).hexdigest()
    small = thumbnail(image)
    return None if is_flat(small) else (digest, small)
