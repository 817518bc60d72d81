"""Get the brain-tumour MRI data set, or make phantoms that stand in for it.

    python download.py                      # Kaggle; if that fails, the tutorial's mirror
    python download.py --zip archive.zip    # the zip that a browser saved from the Kaggle page
    python download.py --synthetic          # no account, no network: MRI-like phantoms

Either way `dataset/` ends up with train/, valid/ and test/, each holding its images and one
`_annotations.coco.json`. What is already there is never replaced without --force.
"""

import argparse
import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

SLUG = "pkdarabi/brain-tumor-image-dataset-semantic-segmentation"
PAGE = f"https://www.kaggle.com/datasets/{SLUG}"
MIRROR = "https://github.com/Zeyi-Lin/UNet-Medical/releases/download/data/Brain.Tumor.Image.DataSet.zip"
ORIGIN = f'Roboflow export "TumorSeg", CC BY 4.0, from {PAGE}'
PHANTOM = "phantoms made by download.py"  # opens info.description of every phantom split

ANNOTATIONS = "_annotations.coco.json"
SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}  # names in an archive

TIMEOUT = (10, 60)  # seconds to connect, seconds between two reads
DOWNLOAD_NEEDS = 300 * 2**20  # bytes: the zip is 90 MB and unpacks to as much again
MAX_ENTRIES, MAX_BYTES, MAX_RATIO = 100_000, 4 * 2**30, 200  # of an archive; JPEGs have ratio 1, JSON about 20

TRY_MIRROR = "run python download.py --source mirror"
BY_HAND = f"download the zip in a browser from {PAGE} and run python download.py --zip FILE"


class DownloadError(Exception):
    """Something the user can mend: `what` is wrong, and `then`, the command to run next."""

    def __init__(self, what, then):
        super().__init__(what, then)
        self.what, self.then = what, then

    def __str__(self):
        return " ".join(f"{self.what}; {self.then}".split())  # one line, whatever a server put in it


# ---------------------------------------------------------------- what lies on the disk


def read_split(folder):
    """The COCO dict of one split, checked: it parses and every image it lists is there.

    Raises ValueError naming the file that is missing or wrong.
    """
    path = folder / ANNOTATIONS
    try:
        coco = json.loads(path.read_bytes())
        complete = isinstance(coco["images"], list) and isinstance(coco["annotations"], list)
        names = [PurePosixPath(image["file_name"]) for image in coco["images"]]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not a COCO annotation file")
    for name in names:
        if name.is_absolute() or ".." in name.parts or not (folder / name).is_file():
            raise ValueError(f"{folder / name} is listed in {ANNOTATIONS} but missing")
    return coco


def read_splits(root):
    """{'train': COCO dict, 'valid': ..., 'test': ...} of a complete data set. Raises ValueError otherwise."""
    return {split: read_split(Path(root) / split) for split in SPLITS}


def is_phantom(splits):
    return any(PHANTOM in str(coco.get("info")) for coco in splits.values())


def occupied(root):
    return any(os.path.lexists(Path(root) / split) for split in SPLITS)


def check_disk(folder, need):
    """Raise DownloadError unless the disk of `folder` has `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        what = f"the disk of {folder} has {free / 2**20:.0f} MiB free and {need / 2**20:.0f} are needed"
        raise DownloadError(what, "free some and run python download.py again")


def install(root, fill):
    """Let `fill(folder)` write the three splits beside their place, then rename them into it.

    Splits already in `root` are moved aside first, deleted only when the new ones are in, and
    moved back if anything fails. Raises what `fill` raises, and ValueError for an incomplete split.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as new:
        new = Path(new)
        fill(new)
        read_splits(new)
        old = Path(tempfile.mkdtemp(prefix=".old-", dir=root))
        try:
            for split in SPLITS:
                if os.path.lexists(root / split):
                    os.rename(root / split, old / split)
                os.rename(new / split, root / split)
        except BaseException:
            for split in SPLITS:
                if not (new / split).exists():
                    os.rename(root / split, new / split)
                if os.path.lexists(old / split):
                    os.rename(old / split, root / split)
            old.rmdir()
            raise
        shutil.rmtree(old)


# ---------------------------------------------------------------- the archive


def is_sound(archive):
    """Whether every byte of a zip agrees with its checksums."""
    try:
        with zipfile.ZipFile(archive) as z:
            return z.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        return False


def fault(entry):
    """Why a zip entry is refused, or None."""
    name = entry.orig_filename  # as stored: `filename` is already cut at a NUL
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name) or {"\\", "\0"} & set(name):
        return "has a name that leads out of its folder"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        return "unpacks to suspiciously many bytes"
    return None


def find_splits(names):
    """{folder in the archive: split}, whatever those folders are wrapped in. Raises ValueError if one is missing."""
    found = {}  # wrapping folder -> {split: its folder}
    for path in map(PurePosixPath, names):
        for split, aliases in SPLITS.items():
            if path.name == ANNOTATIONS and path.parent.name.lower() in aliases:
                found.setdefault(path.parent.parent, {})[split] = path.parent
    best = max(found.values(), key=len, default={})
    if missing := [split for split in SPLITS if split not in best]:
        raise ValueError(f"holds no {missing[0]}/{ANNOTATIONS}")
    return {folder: split for split, folder in best.items()}


def unpack(archive, folder):
    """Write the splits of the zip `archive` to folder/{train,valid,test}, trusting nothing in it.

    Raises ValueError if the archive is not this data set, is damaged, or could do harm.
    """
    with zipfile.ZipFile(archive) as z:
        entries = z.infolist()
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"holds more than {MAX_ENTRIES} entries")
        for entry in entries:
            if why := fault(entry):
                raise ValueError(f"holds {entry.filename!r}, which {why}")
        splits = find_splits([entry.filename for entry in entries])
        check_disk(folder, min(sum(entry.file_size for entry in entries), MAX_BYTES))
        written = 0  # counted, because sizes in the headers are only claims
        for entry in tqdm(entries, desc="unpacking", unit="file", disable=None):
            path = PurePosixPath(entry.filename)
            home = next((parent for parent in path.parents if parent in splits), None)
            if home is None or entry.is_dir():
                continue
            target = folder / splits[home] / path.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            with z.open(entry) as source, open(target, "xb") as out:
                while chunk := source.read(2**20):
                    written += len(chunk)
                    if written > MAX_BYTES:
                        raise ValueError(f"unpacks to more than {MAX_BYTES >> 30} GiB")
                    out.write(chunk)


def install_zip(archive, root):
    """Put the splits of a zip into `root`. Raises DownloadError for an archive that is not right."""
    try:
        install(root, lambda folder: unpack(archive, folder))
    except FileNotFoundError as error:
        raise DownloadError(f"there is no file {error.filename}", BY_HAND) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{archive} is damaged or not a zip ({error})", BY_HAND) from None
    except (ValueError, FileExistsError) as error:
        raise DownloadError(f"{archive}: {error}", BY_HAND) from None


# ---------------------------------------------------------------- where it comes from


@contextlib.contextmanager
def timeouts():
    """Give every request TIMEOUT for the duration: the Kaggle client sets none, and would wait for ever."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send
    HTTPAdapter.send = lambda self, request, **options: send(self, request, **{**options, "timeout": TIMEOUT})
    try:
        yield
    finally:
        HTTPAdapter.send = send


def network_error(error, site, signed_in=False):
    """The DownloadError that says what a requests exception means; `site` is 'Kaggle' or 'the mirror'."""
    import requests

    other = TRY_MIRROR if site == "Kaggle" else BY_HAND
    status = error.response.status_code if isinstance(error, requests.HTTPError) else None
    if status in (401, 403) and signed_in:
        what = f"{site} refused your credentials ({status})"
        then = "make a new token at https://www.kaggle.com/settings"
    elif status in (401, 403) and site == "Kaggle":
        what = f"{site} refused the download ({status}) and no valid credentials were found"
        then = "run kaggle auth login or set KAGGLE_API_TOKEN"
    elif status == 404:
        what, then = f"{site} no longer has the data set (404)", "choose another source"
    elif status:
        what, then = f"{site} answered with an error ({status})", "try again later"
    elif isinstance(error, requests.Timeout) or "timed out" in str(error):
        what, then = f"{site} did not answer in time", "run python download.py again"
    elif isinstance(error, requests.ConnectionError) and "Max retries exceeded" in str(error):
        what, then = f"{site} cannot be reached: no network?", "check the connection and the proxy"
        other = BY_HAND
    else:
        what, then = f"the download from {site} was cut off", "run python download.py again (it resumes)"
    return DownloadError(what, f"{then}, or {other}")


def from_kaggle(folder):
    """Download the zip into `folder` with the Kaggle client and return its path; a cut download resumes.

    Raises DownloadError. Without credentials Kaggle usually serves public data sets all the same.
    """
    import requests

    archive = folder / f"{SLUG.split('/')[1]}.zip"
    quiet = not sys.stderr.isatty()
    chatter = io.StringIO()  # importing kaggle without credentials prints eighteen lines of help
    with timeouts(), contextlib.redirect_stdout(chatter):
        try:
            import kaggle  # authenticates, if it can

            # The client checks no sums and takes a bad file for a finished one, so the second try starts afresh.
            for force in (False, True):
                with contextlib.suppress(ValueError):  # its complaint about a wrong length
                    kaggle.api.dataset_download_files(SLUG, path=str(folder), force=force, quiet=quiet, unzip=False)
                    if is_sound(archive):
                        return archive
                for leftover in (archive, Path(f"{archive}.kaggle-partial")):
                    leftover.unlink(missing_ok=True)
        except requests.RequestException as error:
            raise network_error(error, "Kaggle", "auth_method" in kaggle.api.config_values) from None
        except SystemExit as error:
            raise DownloadError(f"the Kaggle client gave up ({error})", TRY_MIRROR) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            what = f"the Kaggle client cannot use its folder ({error})"
            raise DownloadError(what, f"set KAGGLE_CONFIG_DIR to a folder it may write to, or {TRY_MIRROR}") from None
    raise DownloadError("Kaggle sent a damaged zip twice", f"try again later, or {TRY_MIRROR}")


def from_mirror(folder):
    """Download the tutorial's own copy of the zip into `folder` and return its path; a cut download resumes.

    Raises DownloadError.
    """
    import requests

    archive = folder / "mirror.zip"
    part = folder / "mirror.zip.part"
    for _ in range(2):  # a bad sum after resuming may be an old part's fault: once more from the start
        start = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with requests.get(MIRROR, headers=headers, stream=True, timeout=TIMEOUT) as response:
                if response.status_code == 416:  # the part is no part of what is there now
                    part.unlink()
                    continue
                response.raise_for_status()
                start = start if response.status_code == 206 else 0
                total = start + int(response.headers.get("Content-Length", 0)) or None
                bar = tqdm(desc="mirror", total=total, initial=start, unit="B", unit_scale=True, disable=None)
                with bar, open(part, "ab" if start else "wb") as out:
                    for chunk in response.iter_content(2**16):
                        out.write(chunk)
                        bar.update(len(chunk))
        except requests.RequestException as error:
            raise network_error(error, "the mirror") from None
        if is_sound(part):
            return part.replace(archive)
        part.unlink()
    raise DownloadError("the mirror sent a damaged zip twice", f"try again later, or {BY_HAND}")


SOURCES = {"kaggle": from_kaggle, "mirror": from_mirror}


def install_download(root, sources):
    """Put the data set into `root` from the first of `sources` that works.

    Raises DownloadError: the reason of the only source, or the reasons of all in one line.
    """
    folder = root / ".download"  # the same each time, so that a cut download resumes
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(root, DOWNLOAD_NEEDS)
    reasons = []
    for source in sources:
        print(f"downloading {SLUG} ({source})")
        try:
            archive = SOURCES[source](folder)
            try:
                install_zip(archive, root)
            except DownloadError:
                archive.unlink()  # sound but useless: the next run must not take it for finished
                raise
            shutil.rmtree(folder)
            return
        except ImportError as error:
            reasons.append(DownloadError(str(error), "run pip install -r requirements.txt"))
        except DownloadError as error:
            reasons.append(error)
        if source != sources[-1]:
            print(f"{source} failed ({reasons[-1].what}): going on")
    if len(reasons) == 1:
        raise reasons[0]
    raise DownloadError(" and ".join(reason.what for reason in reasons), BY_HAND)


# ---------------------------------------------------------------- phantoms


def smooth_noise(rng, cells, size):
    """(size, size) float32 noise of about unit deviation and `cells` bumps a side, from a bicubic resize."""
    grid = Image.fromarray(rng.standard_normal((cells + 3, cells + 3), dtype=np.float32))
    box = (1.5, 1.5, cells + 1.5, cells + 1.5)  # without the border, where cells repeat themselves
    return 1.4 * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box))


def step(x, width):
    """0 below -width/2, 1 above +width/2, a straight ramp between."""
    return np.clip(x / width + 0.5, 0, 1)


def draw_lesions(rng, size, frame):
    """Outlines [(K, 2) pixel coordinates] of 0 to 3 irregular, disjoint blobs inside the brain.

    `frame` maps brain coordinates, in which the skull is the unit circle, to [-1, 1]^2: (2, 2).
    """
    outlines, centres = [], []
    for _ in range(rng.choice(4, p=[0.15, 0.67, 0.13, 0.05])):
        for _ in range(20):  # tries
            radius = rng.uniform(0.15, 0.33) * (0.75 if centres else 1)  # half the image is 1
            distance, angle = rng.uniform(0.2, 0.88 - radius / 0.75), rng.uniform(0, 2 * np.pi)
            centre = frame @ [distance * np.cos(angle), distance * np.sin(angle)]
            if all(np.hypot(*(centre - c)) > 1.4 * (radius + r) for c, r in centres):
                break
        else:
            break
        centres.append((centre, radius))
        turn = np.linspace(0, 2 * np.pi, 32, endpoint=False)
        wave = sum(rng.normal(0, 0.22 / k) * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
        shape = radius * np.clip(1 + wave, 0.6, 1.4) * np.array([np.cos(turn), np.sin(turn)])
        outlines.append((centre[:, None] + shape).T * size / 2 + size / 2)
    return outlines


def draw_phantom(rng, size):
    """One MRI-like slice: (size, size) uint8 image, and the outlines of its lesions.

    A bright scalp, a dark skull, grey and white tissue with dark folds, paired ventricles, a bias
    field and Rician noise. Vessels, scalp and ventricles share the lesions' brightness.
    """
    # Coordinates (u, v) in which the head is about the unit circle, turned and stretched.
    turn = rng.normal(0, 0.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    frame = rotation * rng.uniform([0.68, 0.82], [0.84, 0.94])  # half-width, half-height
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    inverse = np.linalg.inv(frame).astype(np.float32)
    u = inverse[0, 0] * axis + inverse[0, 1] * axis[:, None]
    v = inverse[1, 0] * axis + inverse[1, 1] * axis[:, None]
    rho = np.hypot(u, v) * (1 + 0.02 * smooth_noise(rng, 3, size))

    # Every scalar below is a Python float: a numpy one would turn the float32 arrays into float64.
    # Tissue: white matter inside, grey matter towards the edge and along the folds.
    folds = np.abs(smooth_noise(rng, 14, size))
    white = step(0.62 - rho + 0.12 * smooth_noise(rng, 9, size), 0.15)
    base, contrast = rng.uniform(0.36, 0.5), rng.uniform(-0.1, 0.12)
    image = base + contrast * white + 0.02 * smooth_noise(rng, 40, size)
    image -= 0.24 * step(0.16 - folds, 0.2) * step(rho - rng.uniform(0.4, 0.6), 0.25)
    image -= 0.2 * step(0.018 - np.abs(u + 0.01 * smooth_noise(rng, 4, size)), 0.02) * step(np.abs(v) - 0.35, 0.1)

    # Ventricles: two mirrored crescents, as dark or as bright as a lesion.
    fluid = (0.1 if rng.random() < 0.65 else 0.78) + rng.normal(0, 0.04)
    apart, width, length = rng.uniform(0.08, 0.14), rng.uniform(0.035, 0.075), rng.uniform(0.2, 0.34)
    bend = apart + 0.25 * (v / length) ** 2 * apart
    ventricles = step(1 - np.hypot((np.abs(u) - bend) / width, (v + 0.02) / length), 0.3)
    image += (fluid - image) * ventricles

    # Lesions: bright, or dark with a bright rim; soft edge, own texture, a faint halo of swollen tissue.
    outlines = draw_lesions(rng, size, frame)
    for outline in outlines:
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in outline - 0.5], fill=255)  # PIL's pixel centres are whole
        soft = [np.asarray(mask.filter(ImageFilter.BoxBlur(size * s)), np.float32) / 255 for s in (0.007, 0.05)]
        dark = rng.random() < 0.12
        change = (-1 if dark else 1) * rng.uniform(0.26, 0.38)
        inside = base + change + 0.07 * smooth_noise(rng, 22, size)
        rim = 0.7 if dark else rng.uniform(-0.2, 0.2)  # a dark core has a bright rim, as under contrast agent
        inside += rim * step(0.8 - soft[1], 0.3)
        image += 0.15 * change * soft[1]
        image += (inside - image) * soft[0]

    # Vessels: small bright spots.
    nearest = np.float32(1)  # squared distance to one
    for _ in range(rng.integers(2, 7)):
        distance, angle = rng.uniform(0.15, 0.8), rng.uniform(0, 2 * np.pi)
        nearest = np.minimum(nearest, (u - distance * math.cos(angle)) ** 2 + (v - distance * math.sin(angle)) ** 2)
    image += (rng.uniform(0.65, 0.9) - image) * step(rng.uniform(0.02, 0.035) - np.sqrt(nearest), 0.03)

    # The head around the brain, outside in: air, bright scalp, dark bone, brain.
    scalp = rng.uniform(0.6, 0.95)
    image *= step(rng.uniform(0.84, 0.88) - rho, 0.03)
    image += (scalp + 0.08 * smooth_noise(rng, 20, size)) * step(rho - rng.uniform(0.91, 0.94), 0.03)
    image *= step(1 - rho, 0.02)

    # The scanner: uneven sensitivity, and noise on the two channels whose magnitude is shown.
    image *= rng.uniform(0.85, 1.1) * (1 + 0.08 * smooth_noise(rng, 2, size))
    real, imaginary = rng.uniform(0.012, 0.035) * rng.standard_normal((2, size, size), dtype=np.float32)
    image = np.hypot(image + real, imaginary)
    return (255 * np.clip(image, 0, 1)).astype(np.uint8), outlines


def make_phantoms(root, counts=(400, 100, 100), size=256, seed=0, *, force=False):
    """Write MRI-like phantoms as root/{train,valid,test}, JPEGs with COCO polygons, and return `root`.

    counts: images in each split; size: pixels a side. The n-th image of a split depends on `seed` and
    `size` alone. Raises ValueError if something else is there already, unless `force` says to replace it;
    the same phantoms are kept as they are.
    """
    root = Path(root)
    description = f"{PHANTOM}, size {size}, seed {seed}"
    if occupied(root) and not force:
        with contextlib.suppress(ValueError):
            splits = read_splits(root)
            found = [(len(coco["images"]), coco.get("info")) for coco in splits.values()]
            if found == [(count, {"description": description}) for count in counts]:
                return root
        wanted = f"{' + '.join(map(str, counts))} {description}"
        raise ValueError(f"{root} holds something else than the {wanted}")

    def fill(folder):
        bar = tqdm(desc="phantoms", total=sum(counts), unit="image", disable=None)
        for number, (split, count) in enumerate(zip(SPLITS, counts)):
            (folder / split).mkdir()
            images, annotations = [], []
            for index in range(count):
                pixels, outlines = draw_phantom(np.random.default_rng((seed, number, index)), size)
                name = f"{10_000 * number + index}_phantom.jpg"  # like the real names, opens with a slice number
                Image.fromarray(pixels).convert("RGB").save(folder / split / name, quality=92)
                images.append({"id": index, "file_name": name, "width": size, "height": size})
                annotations += [to_coco(outline, len(annotations) + k, index) for k, outline in enumerate(outlines, 1)]
                bar.update()
            category = {"id": 1, "name": "tumour", "supercategory": "none"}
            coco = {"info": {"description": description}, "categories": [category]}
            coco |= {"images": images, "annotations": annotations}
            (folder / split / ANNOTATIONS).write_text(json.dumps(coco))
        bar.close()

    install(root, fill)
    return root


def to_coco(outline, number, image_id):
    """The COCO annotation of one outline (K, 2) in pixels."""
    x, y = outline.round(2).T
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "segmentation": [np.stack([x, y], axis=1).ravel().tolist()],
        "bbox": [round(float(side), 2) for side in box],
        "area": round(float(area), 2),
        "iscrowd": 0,
    }


# ---------------------------------------------------------------- the command


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"download.py: {message}; run python download.py --help\n")


def positive(text):
    if not text.isdecimal() or not 0 < int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 10000")
    return int(text)


def get_args(argv):
    parser = Parser(description="Get the brain-tumour data set, or make phantoms.", allow_abbrev=False)
    add = parser.add_argument
    add("--source", choices=["auto", *SOURCES], default="auto", help="auto: Kaggle, then the tutorial's mirror")
    add("--zip", metavar="FILE", help="unpack this zip instead of downloading")
    add("--synthetic", action="store_true", help="make phantoms instead of downloading")
    add("--data", default="dataset", metavar="FOLDER", help="where train, valid and test go (default: %(default)s)")
    add("--force", action="store_true", help="replace what is there")
    # phantoms
    splits = ("TRAIN", "VALID", "TEST")
    add("--phantoms", type=positive, nargs=3, default=[400, 100, 100], metavar=splits, help="how many in each split")
    add("--seed", type=int, default=0, help="of the phantoms")
    args = parser.parse_args(argv)
    if args.zip and args.synthetic:
        parser.error("--zip and --synthetic exclude each other")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


def get_data(root, args):
    """Do what the flags ask for. Raises DownloadError or OSError with nothing in `root` changed."""
    keep = occupied(root) and not args.force
    then = "run the same command with --force to replace what is there"
    try:
        if args.synthetic:
            make_phantoms(root, args.phantoms, seed=args.seed, force=args.force)
        elif keep and is_phantom(read_splits(root)):
            raise ValueError(f"{root} holds phantoms, not the real data")
    except ValueError as error:
        raise DownloadError(error, then) from None
    if keep:
        print(f"already there: {root}")
    elif args.zip:
        install_zip(args.zip, root)
    elif not args.synthetic:
        install_download(root, list(SOURCES) if args.source == "auto" else [args.source])


def main(argv=None):
    args = get_args(argv)
    root = Path(args.data)
    flag = "" if args.data == "dataset" else f" --data {shlex.quote(args.data)}"
    existed = root.exists()
    try:
        get_data(root, args)
        splits = read_splits(root)
    except KeyboardInterrupt:
        print("download.py: stopped", file=sys.stderr)
        return 130
    except DownloadError as error:
        print(f"download.py: {error}".replace("python download.py", f"python download.py{flag}"), file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno == errno.ENOSPC
        what = f"the disk of {root} is full" if full else " ".join(str(error).split())
        print(f"download.py: {what}; mend that and run python download.py{flag} again", file=sys.stderr)
        return 2
    finally:
        for folder in [root / ".download"] + [root] * (not existed):
            with contextlib.suppress(OSError):
                folder.rmdir()  # does so only if it is empty
    for split, coco in splits.items():
        print(f"{split:5} {len(coco['images']):5} images, {len(coco['annotations'])} annotations")
    print(PHANTOM if is_phantom(splits) else ORIGIN)
    print(f"next: python train.py{flag}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
