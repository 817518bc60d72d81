"""Get the brain-tumour MRI data set, draw phantoms that stand in for it, or import your own data.

    python download.py                      # Kaggle; if that fails, the tutorial's mirror
    python download.py --zip archive.zip    # the zip that a browser saved from the Kaggle page
    python download.py --synthetic          # no account, no network: MRI-like phantoms

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
import errno
import io
import shlex
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from medseg.archive import is_intact, unpack
from medseg.cli import ArgumentParser, add_pixel_limit, number, one_line, run_main
from medseg.dataset_folder import finish_import
from medseg.files import check_regular
from medseg.importing.flags import add_arguments, check_arguments, chosen_importer
from medseg.importing.layouts import find_layout
from medseg.importing.own_data import import_data, print_next
from medseg.importing.writing import holds_own_data
from medseg.phantoms import COUNTS, PHANTOM, is_phantom, make_phantoms
from medseg.samples import set_pixel_limit
from medseg.splits import check_disk_space, install, present_splits, read_splits

SLUG = "pkdarabi/brain-tumor-image-dataset-semantic-segmentation"
PAGE = f"https://www.kaggle.com/datasets/{SLUG}"
MIRROR = (
    "https://github.com/Zeyi-Lin/UNet-Medical/releases/download/data/Brain.Tumor.Image.DataSet.zip"
)
ORIGIN = f'Roboflow export "TumorSeg", CC BY 4.0, from {PAGE}'

TIMEOUT = (10, 60)  # seconds to connect, seconds between two reads
DOWNLOAD_BYTES = 300 * 2**20  # free disk space needed: the zip has 90 MB and unpacks to as much

COMMAND = "python download.py"  # in messages; `main` adds --data where it was given
TRY_MIRROR = f"run {COMMAND} --source mirror"
BY_HAND = f"download the zip in a browser from {PAGE} and run {COMMAND} --zip FILE"


class DownloadError(ValueError):
    """Something the user can mend: `problem` says what is wrong, `advice` what to do next."""

    def __init__(self, problem, advice):
        super().__init__(problem, advice)
        self.problem, self.advice = problem, advice

    def __str__(self):
        return f"{self.problem}; {self.advice}"


# ---------------------------------------------------------------- Kaggle and the mirror


@contextlib.contextmanager
def timeouts():
    """Within, every request has TIMEOUT. The Kaggle client sets none and would wait forever."""
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def send_with_timeout(self, request, **options):
        return send(self, request, **{**options, "timeout": TIMEOUT})

    HTTPAdapter.send = send_with_timeout
    try:
        yield
    finally:
        HTTPAdapter.send = send


def network_error(error, site, signed_in=False):
    """The DownloadError for a requests exception; `site` is 'Kaggle' or 'the mirror'.

    signed_in: whether the request was made with credentials.
    """
    import requests

    alternative = TRY_MIRROR if site == "Kaggle" else BY_HAND
    status = error.response.status_code if isinstance(error, requests.HTTPError) else None
    timed_out = isinstance(error, requests.Timeout) or "timed out" in str(error)
    no_connection = isinstance(error, requests.ConnectionError)
    if status in (401, 403) and signed_in:
        problem = f"{site} refused your credentials ({status})"
        advice = "make a new token at https://www.kaggle.com/settings"
    elif status in (401, 403) and site == "Kaggle":
        problem = f"{site} refused the download ({status}) and no valid credentials were found"
        advice = "run kaggle auth login or set KAGGLE_API_TOKEN"
    elif status == 404:
        problem, advice = f"{site} no longer has the data set (404)", "choose another source"
    elif status:
        problem, advice = f"{site} answered with an error ({status})", "try again later"
    elif timed_out:
        problem, advice = f"{site} did not answer in time", f"run {COMMAND} again"
    elif no_connection and "Max retries exceeded" in str(error):
        problem = f"{site} cannot be reached: no network?"
        advice, alternative = "check the connection and the proxy", BY_HAND
    else:
        problem = f"the download from {site} was cut off"
        advice = f"run {COMMAND} again (it resumes)"
    return DownloadError(problem, f"{advice}, or {alternative}")


def from_kaggle(folder):
    """Download the zip into `folder` with the Kaggle client and return its path.

    A download that was cut off resumes. Without credentials Kaggle usually serves public data
    sets too. Raises DownloadError; ImportError where kaggle is not installed.
    """
    import requests

    archive = folder / f"{SLUG.split('/')[1]}.zip"
    partial = Path(f"{archive}.kaggle-partial")
    quiet = not sys.stderr.isatty()
    unwanted = io.StringIO()  # importing kaggle without credentials prints eighteen lines of help
    with timeouts(), contextlib.redirect_stdout(unwanted):
        try:
            import kaggle  # authenticates if it can

            # The client verifies no checksum and takes a damaged file for a finished one: the
            # second attempt starts from the beginning.
            for force in (False, True):
                with contextlib.suppress(ValueError):  # what it raises for a wrong length
                    kaggle.api.dataset_download_files(
                        SLUG, path=str(folder), force=force, quiet=quiet, unzip=False
                    )
                    if is_intact(archive):
                        return archive
                archive.unlink(missing_ok=True)
                partial.unlink(missing_ok=True)
        except requests.RequestException as error:
            signed_in = "auth_method" in kaggle.api.config_values
            raise network_error(error, "Kaggle", signed_in) from None
        except SystemExit as error:
            raise DownloadError(f"the Kaggle client gave up ({error})", TRY_MIRROR) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise DownloadError(
                f"the Kaggle client cannot use its folder ({error})",
                f"set KAGGLE_CONFIG_DIR to a folder it may write to, or {TRY_MIRROR}",
            ) from None
    raise DownloadError("Kaggle sent a damaged zip twice", f"try again later, or {TRY_MIRROR}")


def from_mirror(folder):
    """Download the tutorial's own copy of the zip into `folder` and return its path.

    A download that was cut off resumes. Raises DownloadError.
    """
    import requests

    partial = folder / "mirror.zip.part"
    # Twice: after resuming, the damage may be in the older part, and that is deleted.
    for _ in range(2):
        try:
            received = fetch(MIRROR, partial)
        except requests.RequestException as error:
            raise network_error(error, "the mirror") from None
        if received and is_intact(partial):
            return partial.replace(folder / "mirror.zip")
        partial.unlink(missing_ok=True)
    raise DownloadError("the mirror sent a damaged zip twice", f"try again later, or {BY_HAND}")


def fetch(url, partial):
    """Download `url` to the file `partial`, resuming after the bytes that it already has.

    Returns whether the server sent the rest: False where `partial` is longer than the file.
    Raises requests.RequestException.
    """
    import requests

    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:  # range not satisfiable
            return False
        response.raise_for_status()
        if response.status_code != 206:  # not partial content: the whole file comes
            start = 0
        total = start + int(response.headers.get("Content-Length", 0)) or None
        progress = {"total": total, "initial": start, "unit": "B", "unit_scale": True}
        with (
            tqdm(desc="mirror", disable=None, **progress) as bar,
            open(partial, "ab" if start else "wb") as out,
        ):
            for chunk in response.iter_content(2**16):
                out.write(chunk)
                bar.update(len(chunk))
    return True


SOURCES = {"kaggle": from_kaggle, "mirror": from_mirror}


def install_download(root, sources):
    """Put the data set into `root` from the first of `sources` that works.

    sources: names from SOURCES. Raises DownloadError with the reasons of all in one line.
    """
    folder = root / ".download"  # the same each time, so that the next run can resume
    folder.mkdir(parents=True, exist_ok=True)
    check_disk_space(root, DOWNLOAD_BYTES)
    failures = []
    for source in sources:
        print(f"downloading {SLUG} ({source})")
        try:
            archive = SOURCES[source](folder)
            try:
                install_zip(archive, root)
            except DownloadError:
                archive.unlink()  # intact but of no use: the next run must not take it for finished
                raise
            shutil.rmtree(folder)
            return
        except ImportError as error:
            failures.append(DownloadError(str(error), "run pip install -r requirements.txt"))
        except DownloadError as error:
            failures.append(error)
        if source != sources[-1]:
            print(f"{source} failed ({failures[-1].problem}): trying the next source")
    if len(failures) == 1:
        raise failures[0]
    raise DownloadError(" and ".join(failure.problem for failure in failures), BY_HAND)


def install_zip(archive, root, seed=0):
    """Put the splits of a zip into `root`; see `unpack`. Raises DownloadError."""
    check_regular(archive)
    try:
        install(root, lambda folder: unpack(archive, folder, seed))
    except FileNotFoundError as error:
        raise DownloadError(f"there is no file {error.filename}", BY_HAND) from None
    except ValueError as error:
        raise DownloadError(f"{archive}: {error}", BY_HAND) from None


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
    instead.add_argument(
        "--synthetic", action="store_true", help="draw phantoms instead of downloading"
    )
    data.add_argument(
        "--data", default="dataset", metavar="FOLDER", help="folder of train, valid and test"
    )
    data.add_argument("--force", action="store_true", help="replace splits that are there already")

    phantoms = parser.add_argument_group("phantoms")
    phantoms.add_argument(
        "--phantoms",
        type=number(1, 10_000),
        nargs=3,
        default=COUNTS,
        metavar=("TRAIN", "VALID", "TEST"),
        help="number of images in each split",
    )
    phantoms.add_argument(
        "--two-classes", action="store_true", help="two classes of lesions, bright and dark"
    )
    seed_help = "random seed of the phantoms, and of --split"
    data.add_argument("--seed", type=number(0), default=0, help=seed_help)
    add_arguments(parser)
    add_pixel_limit(data.add_argument)
    argv = sys.argv[1:] if argv is None else [*map(str, argv)]
    args = parser.parse_args(argv)
    set_pixel_limit(args.max_megapixels)
    args = _with_layout(parser, args, argv)
    if args.two_classes and not args.synthetic:
        parser.error("--two-classes: goes with --synthetic")
    check_arguments(parser, args)
    return args


def _with_layout(parser, args, argv):
    """The arguments with those that `find_layout` finds for a FOLDER."""
    if args.folder is None:
        if args.dry_run:
            parser.error("--dry-run: goes with a FOLDER")
        return args
    if args.zip or args.synthetic or chosen_importer(args):
        parser.error(f"{args.folder}: a FOLDER goes without --zip, --synthetic and --masks")
    places = [place for place, word in enumerate(argv) if word == args.folder]
    place = next(place for place in places if argv[place - 1 : place] != ["--data"])
    typed = [word for word in argv[:place] + argv[place + 1 :] if word != "--dry-run"]
    flags = find_layout(args.folder, typed)
    return parser.parse_args([*typed, *flags, *["--dry-run"] * args.dry_run])


def get_data(root, args):
    """Do what the flags ask for.

    Raises DownloadError, ValueError or OSError; no split has changed then.
    """
    if chosen_importer(args):
        import_data(root, args)
        return
    keep = present_splits(root) and not args.force
    try:
        if args.synthetic:
            options = {"seed": args.seed, "force": args.force, "two_classes": args.two_classes}
            make_phantoms(root, args.phantoms, **options)
        elif keep and holds_own_data(root):
            raise ValueError(f"{root} holds own data: name another folder with --data")
        elif keep and is_phantom(read_splits(root, damaged=[])):
            raise ValueError(f"{root} holds phantoms, not the real data")
    except ValueError as error:
        advice = "run the same command with --force to replace what is there"
        raise DownloadError(str(error), advice) from None
    if keep:
        print(f"already there: {root}")
    elif args.zip:
        install_zip(args.zip, root, args.seed)
    elif not args.synthetic:
        install_download(root, list(SOURCES) if args.source == "auto" else [args.source])


def print_summary(root, data_flag):
    """Print what the splits in `root` hold, where they come from and the command to run next."""
    damaged = []
    splits = read_splits(root, damaged)
    for split, coco in splits.items():
        images, annotations = len(coco["images"]), len(coco["annotations"])
        print(f"{split:5} {images:5} images, {annotations} annotations")
    if damaged:
        print(f"{len(damaged)} damaged records: python data.py {shlex.quote(str(root))} lists them")
    print(PHANTOM if is_phantom(splits) else ORIGIN)
    print(f"next: python train.py{data_flag}")


def main(argv=None):
    """Get the data set. Raises ValueError or OSError for what the user can mend."""
    args = get_args(argv)
    if args.dry_run:
        return
    root = Path(args.data)
    data_flag = "" if args.data == "dataset" else f" --data {shlex.quote(args.data)}"
    existed = root.exists()
    finish_import(root)
    try:
        get_data(root, args)
    except DownloadError as error:
        raise ValueError(str(error).replace(COMMAND, COMMAND + data_flag)) from None
    except OSError as error:
        problem, advice = one_line(error), "mend that and run the same command again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"the disk of {root} is full"
            advice = "make room there, or name a folder of another disk with --data"
        raise DownloadError(problem, advice) from None
    finally:
        for folder in [root / ".download"] + [root] * (not existed):
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only where the folder is empty
    if chosen_importer(args):
        print_next(root)
    else:
        print_summary(root, data_flag)


if __name__ == "__main__":
    run_main(main)
