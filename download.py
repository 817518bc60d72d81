"""Get the brain-tumour MRI data set, draw phantoms that stand in for it, or import your own data.

    python download.py                      # Kaggle; if that fails, the tutorial's mirror
    python download.py --zip archive.zip    # the zip that a browser saved from the Kaggle page
    python download.py --synthetic          # no network: MRI-like phantoms

    python download.py FOLDER --data mine   # your own data, where their layout is known; else asks
    python download.py --masks images masks --data mine     # a folder of images, one of masks
    python download.py --masks 'm/{id}.jpg' 'm/{id}_mask.png' --data mine       # patterns, quoted
    python download.py --masks 'm/{id}.png' 'm/{id}_{class}.png' --data mine    # a file a class
    python download.py --masks 'm/{group}/{id}.tif' 'm/{group}/{id}_mask.tif'   # a folder a patient
    python download.py --masks scan.nii.gz mask.nii.gz --data mine --into test  # NIfTI, or DICOM
    python download.py --masks images masks --data mine --classes 128=cytoplasm,255=nucleus
    python download.py --labelme folder --data mine         # what LabelMe saved
    python download.py --coco instances.json images --data mine
    python download.py --yolo folder --data mine            # or --via via.json images
    python download.py --masks test/images test/masks --into test --data mine  # one split more
    python download.py --labelme more --into train --add --data mine            # more images in it

Afterwards dataset/ has train/, valid/ and test/, each with its images and one
_annotations.coco.json. Splits that are already there are replaced only with --force, and
extended only with --add.
"""

import contextlib
import io
import shlex
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from medseg.archive import is_intact, unpack
from medseg.cli import ArgumentParser, add_pixel_limit, number, run_main
from medseg.dataset_folder import finish_import, install
from medseg.importing.flags import add_arguments, check_arguments, chosen_importer
from medseg.importing.layouts import find_layout
from medseg.importing.own_data import import_data, print_next
from medseg.importing.writing import OWN
from medseg.phantoms import COUNTS, PHANTOM, is_phantom, make_phantoms
from medseg.samples import set_pixel_limit
from medseg.splits import check_disk_space, present_splits, read_splits

SLUG = "pkdarabi/brain-tumor-image-dataset-semantic-segmentation"
PAGE = f"https://www.kaggle.com/datasets/{SLUG}"
MIRROR = (
    "https://github.com/Zeyi-Lin/UNet-Medical/releases/download/data/Brain.Tumor.Image.DataSet.zip"
)
ORIGIN = f'Roboflow export "TumorSeg", CC BY 4.0, from {PAGE}'

TIMEOUT = (10, 60)  # seconds to connect, seconds between two reads
DOWNLOAD_BYTES = 300 * 2**20  # free disk space needed: the zip has 90 MB and unpacks to as much
ADVICE = f"try another --source, or download the zip in a browser from {PAGE} and give --zip FILE"


# ---------------------------------------------------------------- Kaggle and the mirror


@contextlib.contextmanager
def timeouts():
    """Within, every request has TIMEOUT: Kaggle's client sets none and would wait forever."""
    from requests.adapters import HTTPAdapter

    def send_with_timeout(self, request, **options):
        return send(self, request, **{**options, "timeout": TIMEOUT})

    send, HTTPAdapter.send = HTTPAdapter.send, send_with_timeout
    try:
        yield
    finally:
        HTTPAdapter.send = send


def fetch_from_kaggle(folder):
    """Download the zip into `folder` with Kaggle's client, which resumes; returns its path.

    Kaggle serves public data sets without an account too. The client takes a zip of the right
    length for a whole one. Raises requests.RequestException, or ValueError where it gives up.
    """
    archive = folder / f"{SLUG.partition('/')[2]}.zip"
    unwanted = io.StringIO()  # without credentials, importing it prints eighteen lines of help
    with timeouts(), contextlib.redirect_stdout(unwanted):
        try:
            import kaggle
        except ImportError:
            raise ValueError("Kaggle's client is missing: run `pip install kaggle`") from None
        except (SystemExit, OSError) as error:  # the latter: its old versions without an account
            ways = "set KAGGLE_API_TOKEN, or KAGGLE_CONFIG_DIR to a folder that it may write to"
            raise ValueError(f"Kaggle's client gave up ({error}): {ways}") from None
        quiet = not sys.stderr.isatty()
        with contextlib.suppress(ValueError):  # another length than was announced
            kaggle.api.dataset_download_files(SLUG, path=str(folder), quiet=quiet)
    return archive


def fetch_from_mirror(folder):
    """Download the tutorial's own copy of the zip into `folder`; returns its path.

    What an earlier run left there is resumed. Raises requests.RequestException.
    """
    import requests

    partial = folder / "mirror.zip"
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(MIRROR, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # range not satisfiable: `partial` is as long, or longer
            return partial
        response.raise_for_status()
        if response.status_code != 206:  # not partial content: the whole file comes
            start = 0
        total = start + int(response.headers.get("Content-Length", 0)) or None
        progress = {"total": total, "initial": start, "unit": "B", "unit_scale": True}
        with (
            tqdm(desc="downloading", disable=None, **progress) as bar,
            open(partial, "ab" if start else "wb") as out,
        ):
            for chunk in response.iter_content(2**16):
                out.write(chunk)
                bar.update(len(chunk))
    return partial


SOURCES = {"kaggle": fetch_from_kaggle, "mirror": fetch_from_mirror}


def fetch_zip(source, folder):
    """Download the zip from one of SOURCES into `folder` and return its path.

    A download that was cut off resumes. Raises ValueError.
    """
    import requests

    for _ in range(2):  # after resuming, the damage may be in the older part, which is deleted
        try:
            archive = SOURCES[source](folder)
        except requests.RequestException as error:
            if error.response is not None:
                failure = f"answered with status {error.response.status_code}"
                raise ValueError(f"{source} {failure}") from None
            raise ValueError(
                f"{source} cannot be reached, or was cut off: check the connection and the proxy; "
                "the same command resumes the download"
            ) from None
        if is_intact(archive):
            return archive
        for left in folder.glob(f"{archive.name}*"):  # the client's notes on it too
            left.unlink()
    raise ValueError(f"{source} sent a damaged zip twice")


def install_download(root, sources):
    """Put the data set into `root` from the first of `sources`, names of SOURCES, that works."""
    folder = root / ".download"  # the same each time, so that the next run can resume
    folder.mkdir(parents=True, exist_ok=True)
    check_disk_space(root, DOWNLOAD_BYTES)
    for source in sources:
        print(f"downloading {SLUG} ({source})")
        try:
            archive = fetch_zip(source, folder)
            try:
                install_zip(archive, root)
            except ValueError:
                archive.unlink()  # intact but of no use: the next run must not take it
                raise
        except ValueError as error:
            if source == sources[-1]:
                raise ValueError(f"{error}; {ADVICE}") from None
            print(f"{error}; trying the next source")
        else:
            shutil.rmtree(folder)
            return


def install_zip(archive, root, seed=0):
    """Put the splits of a zip into `root`; see `unpack`."""
    try:
        install(root, lambda folder: unpack(archive, folder, seed))
    except ValueError as error:
        raise ValueError(f"{archive}: {error}") from None


# ---------------------------------------------------------------- the command line


def get_args(argv):
    parser = ArgumentParser("download.py", __doc__)

    data = parser.add_argument_group("where the data come from, and where they go")
    data.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="your own data: of a folder whose layout is known, what it holds and the command that "
        "says so are printed, and it is imported; where that is not sure, what it may be is listed",
    )
    data.add_argument("--dry-run", action="store_true", help="of a FOLDER: print, import nothing")
    data.add_argument(
        "--source",
        choices=["auto", *SOURCES],
        default="auto",
        help="where to download from; auto: Kaggle, then the tutorial's mirror",
    )
    instead = data.add_mutually_exclusive_group()
    instead.add_argument("--zip", metavar="FILE", help="unpack this zip instead of downloading")
    instead.add_argument("--synthetic", action="store_true", help="draw phantoms instead")
    folder_help = "folder of train, valid and test"
    data.add_argument("--data", default="dataset", metavar="FOLDER", help=folder_help)
    data.add_argument("--force", action="store_true", help="replace splits that are there already")

    data.add_argument(
        "--phantoms",
        type=number(1, 10_000),
        nargs=3,
        default=COUNTS,
        metavar=("TRAIN", "VALID", "TEST"),
        help="of --synthetic: number of images in each split",
    )
    classes_help = "of --synthetic: two classes of lesions, bright and dark"
    data.add_argument("--two-classes", action="store_true", help=classes_help)
    seed_help = "random seed of the phantoms, and of --split"
    data.add_argument("--seed", type=number(0), default=0, help=seed_help)
    add_arguments(parser)
    add_pixel_limit(data.add_argument)
    argv = sys.argv[1:] if argv is None else [*map(str, argv)]
    args = parser.parse_args(argv)
    set_pixel_limit(args.max_megapixels)
    if args.folder is not None:
        args = _with_layout(parser, args, argv)
    elif args.dry_run:
        parser.error("--dry-run: goes with a FOLDER")
    check_arguments(parser, args)
    return args


def _with_layout(parser, args, argv):
    """The arguments with those that `find_layout` finds for a FOLDER."""
    if args.zip or args.synthetic or chosen_importer(args):
        parser.error(f"{args.folder}: a FOLDER goes without --zip, --synthetic and --masks")
    places = [place for place, word in enumerate(argv) if word == args.folder]
    del argv[next(place for place in places if argv[place - 1 : place] != ["--data"])]
    flags = find_layout(args.folder, [word for word in argv if word != "--dry-run"])
    return parser.parse_args([*argv, *flags])


def get_data(root, args):
    """Do what the flags ask for.

    Raises ValueError or OSError; no split has changed then.
    """
    if chosen_importer(args):
        return import_data(root, args)
    keep = present_splits(root) and not args.force
    try:
        if args.synthetic:
            options = {"seed": args.seed, "force": args.force, "two_classes": args.two_classes}
            make_phantoms(root, args.phantoms, **options)
        elif keep:
            infos = str([coco.get("info") for coco in read_splits(root, damaged=[]).values()])
            if OWN in infos or PHANTOM in infos:
                raise ValueError(f"{root} holds other data: name another folder with --data")
    except ValueError as error:
        raise ValueError(f"{error}; --force replaces what is there") from None
    if keep:
        print(f"already there: {root}")
    elif args.zip:
        install_zip(args.zip, root, args.seed)
    elif not args.synthetic:
        install_download(root, list(SOURCES) if args.source == "auto" else [args.source])


def print_summary(root):
    """Print what the splits in `root` hold, where they come from and the command to run next."""
    damaged = []
    splits = read_splits(root, damaged)
    for split, coco in splits.items():
        images, annotations = len(coco["images"]), len(coco["annotations"])
        print(f"{split:5} {images:5} images, {annotations} annotations")
    if damaged:
        print(f"{len(damaged)} damaged records: python data.py {shlex.quote(str(root))} lists them")
    print(PHANTOM if is_phantom(splits) else ORIGIN)
    data_flag = "" if root == Path("dataset") else f" --data {shlex.quote(str(root))}"
    print(f"next: python train.py{data_flag}")


def main(argv=None):
    """Get the data set. Raises ValueError or OSError for what the user can mend."""
    args = get_args(argv)
    if args.dry_run:
        return
    root = Path(args.data)
    existed = root.exists()
    finish_import(root)
    try:
        get_data(root, args)
    except OSError as error:
        if error.errno and not error.filename:  # writing to a full disk
            error.filename = args.data
        raise
    finally:
        for folder in [root / ".download"] + [root] * (not existed):
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only where the folder is empty
    if chosen_importer(args):
        print_next(root)
    else:
        print_summary(root)


if __name__ == "__main__":
    run_main(main)
