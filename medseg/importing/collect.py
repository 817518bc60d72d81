"""Reading other people's files: finding them, naming them, grouping them, turning them upright."""

import csv
import os
import re
from collections import Counter
from pathlib import Path, PurePath
from typing import NamedTuple

from medseg.coco import listed
from medseg.files import base_name, name_file
from medseg.images import read_image
from medseg.patterns import same_form, walk
from medseg.samples import Page, count_pages, stored_orientation, turn
from medseg.splits import augmented_groups

SUBJECT = re.compile(r"(?:^|/)(sub-[a-zA-Z0-9]+)(?=[_./]|$)")  # of BIDS: sub-01_T1w, sub-01/...


def list_files(folder, suffixes):
    """The files below `folder` whose names end with one of `suffixes`, sorted.

    Hidden files and folders are left out. Raises FileNotFoundError without a folder.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    names = (name for name in walk(folder, ("**", "*")) if name.lower().endswith(tuple(suffixes)))
    return sorted(Path(folder, name) for name in names)


def is_text(text):
    """Whether text can be written as UTF-8: JSON may hold half a character, '\\ud800'."""
    return text == text.encode("utf-8", "ignore").decode()


def check_known(classes, known, problem):
    """ValueError that begins with the problem where --classes has a name that is not `known`."""
    if unknown := [name for name in classes or () if name not in known]:
        others = listed(known, 20)
        raise ValueError(f"--classes: {problem} {unknown[0]!r:.60}, but {others}")


def unique_names(paths, prefix=""):
    """A file stem for each relative path, unique whatever the case and safe in a file system.

    After the prefix comes the path's `base_name` where all differ, else its folders and that name
    joined by `_`, else that after a number.
    """
    paths = [PurePath(path) for path in paths]
    short = [base_name(path) for path in paths]
    joined = ["_".join((*path.parent.parts, base_name(path))) for path in paths]
    for names in (short, joined):
        names = [_safe_name(prefix + name) for name in names]
        if len({name.casefold() for name in names}) == len(names):
            return names
    return [_safe_name(f"{prefix}{number:05}_{name}") for number, name in enumerate(joined)]


def _safe_name(name):
    name = same_form(name)  # in which a letter and its accent are one
    name = re.sub(r"[^\w.() -]", "_", name).lstrip(".")  # \w: letters of any alphabet
    return name.encode("utf-8", "ignore")[:200].decode("utf-8", "ignore").strip() or "_"


def find_groups(paths, table=None):
    """The group of each relative path, as a table with the columns image and group has it.

    The table names an image by its path or the end of that, with or without suffix. Without one the
    group is the subject that a name in the manner of BIDS begins with (sub-01_T1w), or the picture
    that Roboflow has augmented (x_jpg.rf.0a1b.jpg), and how many there are is printed; a path
    without one is a group of its own, "". Raises FileNotFoundError without the table, ValueError
    for an image that it lacks or has in two groups.
    """
    if table is not None:
        groups = _read_groups(table)
        found = [_find_group(path, groups) for path in paths]
        if missing := [str(path) for path, own in zip(paths, found, strict=True) if not own]:
            raise ValueError(f"{table}: lacks {len(missing)} of {len(paths)} images ({missing[0]})")
        print(f"groups: {len(set(groups.values()))} of {table}: each stays in one split")
        return [group for (group,) in found]
    matches = [SUBJECT.search(PurePath(path).as_posix()) for path in paths]
    groups = [match[1] if match else "" for match in matches]
    what = "subjects" if any(groups) else "augmented pictures"
    if not any(groups):
        groups = augmented_groups([PurePath(path).name for path in paths])
    subjects = Counter(filter(None, groups))
    if subjects:
        print(
            f"groups: {len(subjects)} {what} in the names of {subjects.total()} images, such as "
            f"{min(subjects)}: each stays in one split (--groups table.csv groups in another way)"
        )
    return groups


def _read_groups(table):
    """{name of an image, as it is compared, with and without its suffix: group} of a CSV file."""
    with name_file(table), open(table, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    groups = {}
    for row in rows:
        image, group = row.get("image"), row.get("group")
        if not image or group is None:
            raise ValueError(f"{table}: needs the columns image and group, filled in each line")
        key = _comparable(image.replace("\\", "/").removeprefix("./"))
        if groups.setdefault(key, group) != group:
            raise ValueError(f"{table}: has {image} in two groups, {groups[key]} and {group}")
    return {re.sub(r"\.[^./]+$", "", key): group for key, group in groups.items()} | groups


def _comparable(path):
    return same_form(PurePath(path).as_posix()).casefold()


def _find_group(path, groups):
    """[The group of a path], by its longest end that the table has, with or without its suffix."""
    parts = _comparable(path).split("/")
    for number in range(len(parts)):
        for name in (parts[-1], base_name(parts[-1])):
            end = "/".join([*parts[number:-1], name])
            if end in groups:
                return [groups[end]]
    return []


def split_pages(pairs, names, groups):
    """The pages of TIFF files with several as pairs of their own: (pairs, names, groups).

    pairs: [(image, [(class name or None, mask), ...])], paths, with a name and a group each; the
    names of pages end with their numbers, and a file without a group is one. Prints how many pages
    there are. Raises ValueError where a mask has other than its image's number of pages, or they
    are too many.
    """
    paged, files = [], 0
    for (image, masks), name, group in zip(pairs, names, groups, strict=True):
        n_pages = count_pages(image)
        for _, mask in masks:
            if (n_of_mask := count_pages(mask)) != n_pages:
                raise ValueError(f"{mask}: has {n_of_mask} pages, its image {image} {n_pages}")
        if n_pages == 1:
            paged.append(((image, masks), name, group))
            continue
        files += 1
        for number in range(n_pages):
            own_masks = [(class_name, Page(mask, number)) for class_name, mask in masks]
            paged.append(((Page(image, number), own_masks), f"{name}_p{number:03d}", group or name))
    if files:
        print(f"pages: {len(paged) - len(pairs) + files} of {files} TIFF files, an image each")
    return zip(*paged, strict=True)


class Upright(NamedTuple):
    """An image that was read and is upright: see `Example` for `image`."""

    image: object  # Path or Picture
    size: tuple  # (width, height)
    orientation: int  # EXIF's, 1 to 8; how the stored pixels were turned


def read_upright(file, window=None):
    """Read an image as `read_image` does, into an Upright.

    file: a Path, which is the `image` where it is upright once Pillow has loaded it; or a binary
    file, which becomes a Picture, as training reads it; so does what is turned.
    Raises as `read_image` does.
    """
    picture = read_image(file, window)
    stays = isinstance(file, Path)
    if stays and picture.orientation != 1:
        _, stays = stored_orientation(file)  # a TIFF
    return Upright(file if stays else picture, picture.size, picture.orientation)


def fit_mask(mask, upright):
    """A mask (H, W) as it lies on an `Upright` image, or None where it has another size.

    A mask of the image's size was drawn on the image as it is shown, as annotation tools do.
    One of the size before turning, if that is another, is turned along.
    """
    width, height = upright.size
    if mask.shape == (height, width):
        return mask
    if mask.shape == (width, height) and upright.orientation >= 5:
        return turn(mask, upright.orientation)
    return None
