"""Files: their kinds and names, written whole or not at all, marked as ours; JSON, locks, a map."""

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medseg.cli import one_line

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
NIFTI_SUFFIXES = (".nii.gz", ".nii")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")  # of NRRD and MetaImage
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES)
NAME_BYTES = 200  # of a file name, so that endings fit too: file systems take 255


def file_format(path):
    """'dicom', 'volume' or None: by the suffix; without one, or with a number, by the content.

    A folder is a volume where a file directly in it is DICOM: see `medseg.dicom.open_series`.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith(DICOM_SUFFIXES):
        return "dicom"
    if name.endswith(VOLUME_SUFFIXES):
        return "volume"
    if path.is_dir():
        return "volume" if any(map(is_dicom, path.iterdir())) else None
    if path.suffix and not path.suffix[1:].isdecimal():
        return None
    head = _read_head(path)
    if head[128:132] == b"DICM":
        return "dicom"
    return "volume" if nifti_version(head) else None


def is_dicom(path):
    """Whether a Path is a DICOM file by its content."""
    return _read_head(path)[128:132] == b"DICM"


def _read_head(path):
    try:
        if not path.is_file():  # reading a FIFO may never end
            return b""
        with open(path, "rb") as file:
            return file.read(348)
    except OSError:
        return b""


def nifti_version(head):
    """1 or 2 by the first 348 bytes of a file that holds header and voxels, else None."""
    if head[344:348] == b"n+1\0":
        return 1
    return 2 if head[4:8] == b"n+2\0" else None


def base_name(path):
    """The name of an image file without its suffix: 'a.nii.gz' -> 'a', '1.2.840' -> '1.2.840'."""
    path = Path(path)
    if path.name.lower().endswith(".nii.gz"):
        return path.name[:-7]
    return path.name if path.suffix[1:].isdecimal() else path.stem


@contextlib.contextmanager
def name_file(path):
    """Turn whatever a reader raises into one line that begins with the file's name."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not a file") from None
    except PermissionError:
        raise
    except Exception as error:  # pydicom, nibabel, zlib and decoders raise many kinds
        line = one_line(error)
        raise ValueError(line if line.startswith(f"{path}: ") else f"{path}: {line}") from None


def import_reader(name, format_name):
    """Import an optional library, with its warnings off. ValueError where it is missing."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"reading {format_name} needs {name}: run `pip install {name}`") from None
    # They warn of odd metadata and mend it; pixels they cannot read are errors.
    warnings.filterwarnings("ignore", module=rf"{name}\.")
    return module


def shorten(name):
    """A file name of at most NAME_BYTES bytes: a longer one keeps its beginning and gets a hash."""
    encoded = os.fsencode(name)
    if len(encoded) <= NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: NAME_BYTES - 9].decode('utf-8', 'ignore')}~{digest}"


def escape(text, is_shown=str.isprintable):
    """Text in one line, characters that are not shown as escapes: '\\n', '\\u4e2d', '\\udcff'."""
    shown = (c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


@contextlib.contextmanager
def atomic_write(path, *, sync=True):
    """A binary file to write that appears at `path` (a Path) once complete, or not at all.

    sync: wait until the disk has it, so that this holds even where the power fails.
    Raises OSError that names `path`.
    """
    temporary = path.with_name(f".{shorten(path.name)}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # someone may have removed it since
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # of `write` it has no name
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial_writes(folder):
    """Remove what `atomic_write` left in `folder` where its process was killed."""
    for partial in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", partial.name) and not partial.is_dir():
            partial.unlink(missing_ok=True)


# ---- what may be replaced --------------------------------------------------------------------

JPEG = b"\xff\xd8"  # its first bytes
SEAL = b"medseg\0"  # before the digest in a picture; 32 hexadecimal digits follow


def check_replaceable(path, is_ours, flag):
    """ValueError where `path` (a Path) holds anything but what an earlier run of ours wrote.

    is_ours(path): whether we wrote it, and nobody has changed it since; it may raise OSError and
    ValueError for a file that cannot be read. flag: that names the place. An empty file is free.
    """
    if not os.path.lexists(path) or (path.is_file() and path.stat().st_size == 0):
        return
    try:
        ours = path.is_file() and is_ours(path)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(
            f"{path}: is there, and was not written by this program, or was changed since: remove "
            f"it, or choose another {flag}"
        )


def write_picture(path, save):
    """Write the PNG or JPEG file that save(file) gives, sealed, whole or not at all."""
    content = io.BytesIO()
    save(content)
    with atomic_write(Path(path), sync=False) as file:
        file.write(seal(content.getvalue()))


def seal(picture):
    """The bytes of a PNG or JPEG file with a digest of them, as a text or a comment in it."""
    mark = SEAL + hashlib.blake2b(picture, digest_size=16).hexdigest().encode()
    if picture.startswith(JPEG):  # after the first segment, which has to stay there
        place, chunk = 4 + int.from_bytes(picture[4:6], "big"), b"\xff\xfe\0\x29" + mark
    else:  # PNG: before the last chunk
        place, chunk = len(picture) - 12, b"tEXt" + mark
        chunk = len(mark).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return picture[:place] + chunk + picture[place:]


def is_sealed(path):
    """Whether a PNG or JPEG file is as `write_picture` wrote it, to the byte."""
    picture = Path(path).read_bytes()
    head, tail = (4, 0) if picture.startswith(JPEG) else (8, 4)  # bytes around the mark
    begin = picture.rfind(SEAL) - head
    end = begin + head + len(SEAL) + 32 + tail
    return begin >= 0 and seal(picture[:begin] + picture[end:]) == picture


def read_json(path, forgiven=None):
    """The content of a JSON file (a Path). ValueError for what is not JSON in Unicode.

    forgiven: a Counter; a file in GB18030 (GBK), as far as its characters tell, is read and added
    to it, in words.
    """
    content = path.read_bytes()
    if forgiven is not None and (text := _decode_chinese(content)):
        forgiven["files are read as GB18030 (GBK), for they are not UTF-8: look at the names"] += 1
        content = text
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from None


def _decode_chinese(content):
    """Bytes of GB18030 as text; None of Unicode, or where its characters are mostly rare ones.

    That is what letters with accents become that are in another encoding.
    """
    try:
        content.decode(json.detect_encoding(content), "surrogatepass")
        return None
    except ValueError:
        text = content.decode("gb18030", "replace")
    beyond = re.sub(r"[\0-\x7f]", "", text)
    common = beyond.encode("gb2312", "ignore").decode("gb2312")
    return text if 2 * len(common) >= len(beyond) else None


@contextlib.contextmanager
def file_lock(path, *, busy, wait=False):
    """Hold a lock that ends with the process. Yields False where the file system has no locks.

    busy: what to say where another process holds it; printed before waiting, with wait, else
    raised as a ValueError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise ValueError(busy) from None
        print(busy, file=sys.stderr, flush=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        pass  # a file system without locks, or one that cannot be written
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(path)  # before the release: then it is nobody else's
        lock.release()


def available_cores():
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel_map(
    function, items, *, catch=(FileNotFoundError, ValueError), cost=lambda item: 0, limit=0
):
    """Yield function(item), or the error of the classes `catch` that it raised, in order.

    On all cores, a few items ahead and no more, so that memory does not grow with their number.
    cost(item): such that those ahead may cost `limit` together; one that costs more is alone.
    Threads, not processes: decoding and resizing release the interpreter's lock, and nothing is
    copied.
    """

    def attempt(item):
        try:
            return function(item)
        except catch as error:
            return error

    cores = available_cores()
    ahead = deque()  # (future, cost)
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                own = cost(item)
                while ahead and (
                    sum(cost for _, cost in ahead) + own > limit or len(ahead) > 4 * cores
                ):
                    yield ahead.popleft()[0].result()
                ahead.append((pool.submit(attempt, item), own))
            while ahead:
                yield ahead.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)
