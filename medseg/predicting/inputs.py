"""What predict.py is to predict, and where it writes: files, folders, frames, volumes."""

from collections import Counter, defaultdict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medseg.cli import output_folder
from medseg.coco import ANNOTATIONS, read_annotations, recorded_spacing
from medseg.dataset_folder import finish_import
from medseg.dicom import SAME_PLACE, read_dicom
from medseg.files import VOLUME_SUFFIXES, base_name, file_format, name_file, shorten
from medseg.images import SUFFIXES, as_picture, read_image
from medseg.modalities import Modalities, open_channels, read_channels
from medseg.own_files import is_own
from medseg.predicting.cases import find_cases
from medseg.samples import KINDS
from medseg.volumes import SINGLE_SUFFIXES
from medseg.weights import load_weights, pretrained_path

EXAMPLE = Path("dataset/test/27_jpg.rf.b2a2b9811786cc32a23c46c560f04d07.jpg")  # the tutorial's
MAX_NAMED = 3  # of the files that could not be predicted, in the line on them


class ImageFile(NamedTuple):
    """A file with an image, with frames (DICOM) or with a volume (NIfTI, NRRD, MetaImage)."""

    path: Path
    name: str  # what its masks are called, without the ending
    title: str  # what it is called in tables: the file's name, or that of its case
    format: str | None  # as `medseg.files.file_format` has it
    modalities: Modalities | None = None  # its files, where they are one for each channel


class Frame(NamedTuple):
    """One image to predict: that of a file, a frame of a DICOM file, a slice of a volume."""

    path: Path
    name: str  # what its mask is called, without the ending; of a slice, the volume's
    title: str  # the file's name, with the number of the frame or slice
    read: object  # read() -> `medseg.images.Picture`, or ValueError naming the file
    spacing: tuple | None = None  # mm from row to row and from column to column, where known
    place: tuple | None = None  # (series, mm along the axis of its slices) of DICOM, where known
    depth: float | None = None  # mm that a slice of a DICOM series stands for, where known


def open_file(file, window=None, info=None, pixel_size=None):
    """([Frame], volume) in an ImageFile; volume: a `medseg.volumes.Volume`, or None.

    window: (center, width) of grey values of more than 8 bits, or None for the file's own limits;
    info: the `net.ModelInfo` of what will see it; pixel_size: (height, width) in mm of the pixels
    of files that do not tell it, or None. Here alone a file is opened by its format.
    Raises FileNotFoundError; ValueError where the file cannot be read.
    """
    path = file.path
    if file.format is None:
        read = partial(read_image, path, window)
        if file.modalities:
            read = partial(read_channels, file.modalities, window)
        return [Frame(path, file.name, file.title, read, pixel_size)], None
    if file.format == "volume":
        in_time = not (info and info.channels)  # what four axes mean to these weights
        volume = open_channels(file.modalities or path, info and info.orientation, in_time)
        arrays, what = volume.pictures(window, info.context if info else 0), "slice"
    else:
        volume, arrays, what = None, read_dicom(path, window), "frame"
    frames = []
    with name_file(path):  # some elements are read only when they are asked for
        several = len(arrays) > 1
        for number in range(len(arrays)):
            title = f"{file.title}, {what} {number}" if several else file.title
            read = partial(lambda at: as_picture(arrays[at]), number)
            if volume:
                frames.append(Frame(path, file.name, title, read, volume.slice_spacing))
                continue
            name = f"{file.name}_f{number:03d}" if several else file.name
            spacing, place = arrays.spacing(number) or pixel_size, arrays.place(number)
            frames.append(Frame(path, name, title, read, spacing, place))
    return frames, volume


def as_frame(image, window=None):
    """The Frame of a path, or of whatever `medseg.images.as_picture` takes; window: of a file."""
    if not isinstance(image, (str, Path)):
        return Frame(Path("image"), "image", "image", partial(as_picture, image))
    path = Path(image)
    return Frame(path, shorten(base_name(path)), path.name, partial(read_image, path, window))


def check_channels(picture, info):
    """ValueError where a `Picture` lacks channels that the import of the training set named.

    info: the `net.ModelInfo`. What is grey or colour alone is turned into each other elsewhere.
    """
    count, own = len(info.channel_names), picture.n_channels
    if count not in (0, own):
        around = f", and of {info.context} slices on either side" if info.context else ""
        names = ", ".join(info.channels) or "grey"
        names += f", files called {info.pattern}" if info.pattern else ""
        raise ValueError(f"has {own} channels, and the weights take {count}: {names}{around}")


def sort_files(files, window, pixel_size=None):
    """[ImageFile] -> ([Frame], [ImageFile of a volume], [(path, why it cannot be read)]).

    Volumes are left to be opened one at a time, for one may fill the memory.
    Raises ValueError where two files would share a name.
    """
    frames, volumes, problems, owners = [], [], [], {}
    for file in files:
        if file.format == "volume":
            volumes.append(file)
            continue
        try:
            frames += open_file(file, window, pixel_size=pixel_size)[0]
        except (FileNotFoundError, ValueError) as error:
            problems.append((file.path, str(error)))
    for one in (*frames, *volumes):
        other = owners.setdefault(one.name, one.path)
        if other != one.path:
            raise ValueError(
                f"{one.path} and {other} would both become {one.name}_mask: "
                "predict them apart, with another --output"
            )
    return add_depths(frames), volumes, problems


def add_spacings(frames, folder):
    """The [Frame] with what the import recorded in the annotations of a folder, where it did."""
    records = read_annotations(folder, skipped=[])["images"]
    places = [Path(folder, str(record["file_name"])).resolve() for record in records]
    recorded = dict(zip(places, map(recorded_spacing, records), strict=True))
    spacings = [frame.spacing or recorded.get(frame.path.resolve()) for frame in frames]
    return [frame._replace(spacing=mm) for frame, mm in zip(frames, spacings, strict=True)]


def add_depths(frames):
    """The [Frame] with the depth of those that are slices of a DICOM series.

    A slice reaches halfway to its neighbours; the first and the last as far outwards as inwards.
    Of a single slice, and where two lie in one place, no depth is known.
    """
    series, depths = defaultdict(list), {}
    for frame in frames:
        if frame.place:
            series[frame.place[0]].append(frame.place[1])
    for name, places in series.items():
        places.sort()
        if len(places) > 1 and np.diff(places).min() >= SAME_PLACE:
            for place, depth in zip(places, np.gradient(places).tolist(), strict=True):
                depths[name, place] = depth
    return [frame._replace(depth=depths.get(frame.place)) for frame in frames]


def expand(inputs, info=None, *, series=False):
    """Files and folders -> [ImageFile] of what is in them.

    info: a `net.ModelInfo`; where it names channels, the files of a case are one image: see
    `find_cases`. Where it has an orientation, or with series, a folder with a DICOM series is one
    volume, named or in a folder that is. Masks are named as the file is, without its suffix; of
    images in one folder that differ in nothing else, with it: a.png and a.jpg become a_png and
    a_jpg. A long name is shortened.
    Raises FileNotFoundError, and ValueError where there are none.
    """
    paths, cases, series = [], {}, series or bool(info and info.orientation)
    for given in inputs:
        if info and (found := find_cases(given, info)):
            cases |= {case: shorten(name) for name, case in found if not is_own(Path(str(case)))}
            continue
        given = Path(given)
        if not given.is_file():  # a split, maybe, that a killed import has moved aside
            finish_import(given.absolute().parent)
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such image or folder")
        if not given.is_dir() or (series and file_format(given)):
            paths.append(given)
            continue
        folders = sorted(filter(Path.is_dir, given.iterdir())) if series else []
        if not (images := images_in(given) + [one for one in folders if file_format(one)]):
            but = f", but {aside}" if (aside := left_aside(given)) else ""
            raise ValueError(f"{given}: no images ({KINDS}) in this folder{but}")
        paths += images
    files = []
    for case, name in cases.items():
        modalities = case if isinstance(case, Modalities) else None
        files.append(ImageFile(Path(str(case)), name, name, file_format(case), modalities))
    paths = dict.fromkeys(paths)  # a file that is named twice is one
    count = Counter((path.parent, base_name(path)) for path in paths)
    for path in paths:
        name, file_type = base_name(path), file_format(path)
        if count[path.parent, name] > 1 and file_type != "volume":
            name += path.name[len(name) :].replace(".", "_")
        files.append(ImageFile(path, shorten(name), path.name, file_type))
    return files


def left_aside(folder):
    """What in a folder is not predicted, counted: '.txt (3), folders (2)', or ''.

    Hidden files and the annotations of a data set are not counted.
    """
    counts = Counter()
    for path in folder.iterdir():
        if path.is_dir():
            counts["folders"] += 1
        elif is_own(path):
            counts["files of these scripts"] += 1
        elif path.name[0] != "." and path.name != ANNOTATIONS and not is_input(path):
            counts[path.suffix.lower() or "no suffix"] += 1
    return ", ".join(f"{what} ({count})" for what, count in sorted(counts.items()))


def print_left_aside(inputs, files):
    """A line on each folder among the inputs that holds more than is predicted.

    files: [ImageFile] in them. Folders of cases are passed over.
    """
    plain = {file.path.parent for file in files if not file.modalities}
    for folder in map(Path, inputs):
        if folder in plain and (aside := left_aside(folder)):
            print(f"left aside in {folder}: {aside}")


def describe_left_out(problems, total):
    """A line on the images of `total` that could not be predicted; predictions.json has them all.

    problems: [(file, why)].
    """
    reasons = [why for _, why in problems]
    more = f"; and {len(reasons) - MAX_NAMED} more" if len(reasons) > MAX_NAMED else ""
    return f"{len(reasons)} of {total} left out: {'; '.join(reasons[:MAX_NAMED])}{more}"


def images_in(folder):
    """The images and volumes in a folder, sorted; [] where there is none."""
    return sorted(path for path in Path(folder).glob("*") if is_input(path))


def learned_images(model_path, count):
    """Up to `count` test images of the data set that the weights have learned from, spread over it.

    It is named in last.pth beside them; of the weights that come with the repository, it is the
    tutorial's. [] where it is not known, or not here.
    """
    last, folder = Path(model_path).with_name("last.pth"), None
    if pretrained_path() and Path(model_path).samefile(pretrained_path()):
        folder = EXAMPLE.parent if EXAMPLE.exists() else None
    elif last.exists():
        with suppress(ValueError, LookupError, TypeError):  # of another program
            flags = load_weights(last)["flags"]
            folder = Path(flags["data"], "synthetic" if flags["synthetic"] else "", "test")
    found = images_in(folder) if folder else []
    return found[:: -(-len(found) // count) or 1]


def example_image():
    """The image to show when none is named. FileNotFoundError where there is no data set."""
    images = images_in(EXAMPLE.parent) or images_in("dataset/synthetic/test")
    if not images:
        raise FileNotFoundError(
            "no image named, and none in dataset/test: name one, or run `python download.py` first"
        )
    chosen = EXAMPLE if EXAMPLE in images else images[0]
    print(f"no image named: taking {chosen}")
    return chosen


def annotated_folder(inputs):
    """The one folder among the inputs that has annotations, or None. ValueError where two have."""
    folders = [folder for folder in map(Path, inputs) if (folder / ANNOTATIONS).exists()]
    if len(folders) > 1:
        raise ValueError(
            f"{folders[0]} and {folders[1]} both have annotations, and a report is of one "
            "folder: score them apart, with another --output"
        )
    return folders[0] if folders else None


def is_input(path):
    """Whether a file in a folder is an image or volume, not hidden, and not one of our results."""
    if path.name.startswith(".") or is_own(path) or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or file_format(path) is not None


def choose_output(given, single, files):
    """The folder to write to, made if need be, or for a single input the file that was named."""
    path = Path(given or ("." if single else "predictions"))
    if not given or path.is_dir() or not path.name.lower().endswith((*SUFFIXES, *VOLUME_SUFFIXES)):
        return output_folder(path, "--output")
    if not single:
        raise ValueError(f"--output {given}: several images need a folder, not one file")
    endings = SINGLE_SUFFIXES if files[0].format == "volume" else (".png",)
    if not path.name.lower().endswith(endings):
        raise ValueError(f"--output {given}: this mask is written as {' or '.join(endings)}")
    if path.exists() and any(path.samefile(file.path) for file in files):
        raise ValueError(f"--output {given}: that is the image itself; name another file")
    output_folder(path.parent, "--output")
    return path
