"""More images into a split that is there, of which nothing changes."""

import itertools
import json
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from medseg.coco import ANNOTATIONS, listed, read_annotations
from medseg.dataset_folder import import_lock
from medseg.duplicates import find_known
from medseg.files import atomic_write, read_json
from medseg.importing.writing import (
    SplitCounts,
    check_classes,
    check_examples,
    print_counts,
    write_split,
)
from medseg.patterns import same_form
from medseg.splits import extend_split, present_splits


def add_images(root, examples, classes, *, into, prefix="new_", duplicates=None, any_order=False):
    """Add `examples` to the split `into` of `root`, whole or not at all, and print what was added.

    What the split holds stays: images, records, ids, groups, categories and info. classes: those
    of the splits, or some of them, in their order unless any_order; none, where no example has a
    mask. prefix: to suggest where names clash. duplicates: as of `leave_out_known`.
    Raises ValueError where classes, groups or names disagree with those of any split, or images
    are there already; and what an example's read() raises.
    """
    root, folder, there = Path(root), Path(root) / into, present_splits(root)
    check_classes(root, there, classes, any_order)
    check_groups(root, into, examples)
    examples = check_examples(root, examples)

    def write_more(new):
        content = {"categories": [], **read_json(folder / ANNOTATIONS)}
        head = {"categories": _own_categories(content)}
        with tqdm(desc="importing", total=len(examples), unit="image", disable=None) as bar:
            write_split(new, examples, head, bar)
        more = read_json(new / ANNOTATIONS)
        names = [record["file_name"] for record in more["images"]]
        kept = leave_out_known(root, into, new, names, duplicates)
        check_names(root, kept, prefix)
        for name in set(names).difference(kept):
            (new / name).unlink()
        counts = _append(content, more, set(kept))
        with atomic_write(new / ANNOTATIONS) as file:
            file.write(json.dumps(content).encode("ascii"))
        written = [example for example, name in zip(examples, names, strict=True) if name in kept]
        shown = [category["name"] for category in head["categories"]]
        return into, written, counts, shown, len(content["images"])

    with import_lock(root):
        added = extend_split(folder, write_more)
    print_counts(*added)


def _own_categories(content):
    """The usable categories of an annotation file, of several of one name the first."""
    first = {}
    for category in content["categories"]:
        if isinstance(category, dict) and isinstance(category.get("id"), (int, str)):
            name = str(category.get("name"))
            first.setdefault(name, {"id": category["id"], "name": name})
    return list(first.values())


def _append(content, more, kept):
    """Append the images of `more` that are `kept`, with their annotations, to `content`.

    All are annotation files, kept is a set of file names. What is there keeps its ids. Returns the
    SplitCounts of what is appended.
    """
    of_image, counts = {}, SplitCounts()
    for annotation in more["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    class_of = {category["id"]: category["name"] for category in more["categories"]}
    image_ids, annotation_ids = (_free_ids(content[key]) for key in ("images", "annotations"))
    for record in more["images"]:
        if record["file_name"] in kept:
            own, image_id = of_image.get(record["id"], []), next(image_ids)
            counts.add(record, own, class_of)
            content["images"].append({**record, "id": image_id})
            for annotation in own:
                ids = {"id": next(annotation_ids), "image_id": image_id}
                content["annotations"].append({**annotation, **ids})
    return counts


def _free_ids(records):
    """Numbers above every id of the records, and above the places that stand in for missing ids."""
    ids = (record.get("id") for record in records if isinstance(record, dict))
    highest = max((own for own in ids if type(own) is int), default=-1)
    return itertools.count(max(highest + 1, len(records)))


# ---- what the data set has already ----------------------------------------------------------


def check_groups(root, split, examples):
    """ValueError where another split has images of a group of the Examples for `split`."""
    new = {example.group for example in examples if example.group}
    for other in present_splits(root):
        images = read_annotations(root / other, skipped=[])["images"]
        there = {str(record["group"]) for record in images if record.get("group")}
        if other != split and (both := sorted(new & there)):
            raise ValueError(
                f"{root / other} has images of {len(both)} of the {len(new)} groups to be added to "
                f"{split} ({listed(both, 3)}): add these with --into {other}, or leave them out, "
                "for a group stays in one split"
            )


def check_names(root, names, prefix):
    """ValueError where an image of any split is called as one of the new files `names`.

    prefix: to suggest. Names are compared without suffix and case: masks are called after them.
    """
    new = {_comparable(name): name for name in names}
    for split in present_splits(root):
        images = read_annotations(root / split, skipped=[])["images"]
        both = sorted(new.keys() & {_comparable(record["file_name"]) for record in images})
        if both:
            shown = listed([new[name] for name in both], 3)
            raise ValueError(
                f"{root / split} has images of the names of {len(both)} of the {len(new)} new ones "
                f"({shown}): --prefix {prefix} begins the new names with that"
            )


def _comparable(name):
    return same_form(same_form(PurePosixPath(name).stem).casefold())


def leave_out_known(root, split, folder, names, duplicates=None):
    """The names of those of the new images in `folder` that are to be added to a split.

    duplicates: what becomes of images that are in any split already, or are nearly in another one:
    "skip" leaves them out, which is printed, "keep" adds them, None is a ValueError. A line is
    printed where images are nearly in `split` itself. Raises ValueError where none are left.
    """
    known = find_known(root, split, folder, names)
    there = [entry for entry in known if entry.split == split and entry.same]
    leaks = [entry for entry in known if entry.split != split]
    near = [entry for entry in known if entry.split == split and not entry.same]
    parts = []
    if there:
        parts.append(f"{_count(there, names)} in {root / split} already ({_first(there)})")
    if leaks:
        others = " and ".join(str(root / own) for own in dict.fromkeys(e.split for e in leaks))
        same = {entry.same for entry in leaks}
        nearly = (
            "" if same == {True} else " nearly" if same == {False} else ", some of them nearly,"
        )
        parts.append(
            f"{_count(leaks, names)}{nearly} in {others} ({_first(leaks)}), which would make the "
            "scores too good"
        )
    problem = ", and ".join(parts)
    left = [name for name in names if name not in {entry.name for entry in there + leaks}]
    if problem and duplicates is None and len(there) < len(names):
        raise ValueError(
            f"{problem}: --duplicates skip leaves these out, --duplicates keep adds them all the "
            "same"
        )
    if not left and duplicates != "keep":
        raise ValueError(f"{problem}: nothing to add; masks of images that are there stay")
    if near:
        print(f"note: {_count(near, names)} nearly in {root / split} already ({_first(near)})")
    if not problem or duplicates == "keep":
        return list(names)
    print(f"left out: {problem}")
    return left


def _count(known, names):
    return f"{len(known)} of the {len(names)} new images {'is' if len(known) == 1 else 'are'}"


def _first(known):
    pairs = [f"{e.name} as {e.like}" if e.name != e.like else e.name for e in known[:3]]
    return ", ".join(pairs + ["..."] * (len(known) > 3))
