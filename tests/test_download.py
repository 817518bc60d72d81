"""download.py: a loopback server with the real Kaggle client, unsafe zips, and phantoms."""

import contextlib
import errno
import io
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, assert_refused, refuse_download, run_download, script_here, tree
from PIL import Image
from pycocotools.coco import COCO

import download
from medseg import archive, phantoms, splits

SCRIPT = ROOT / "download.py"
SPLITS = ("train", "valid", "test")
ZIP_NAME = "brain-tumor-image-dataset-semantic-segmentation.zip"

# Python 3.10 gets kaggle 1.7: another protocol, which wants an account for public data too.
new_client = pytest.mark.skipif(
    int(version("kaggle").split(".")[0]) < 2, reason="kaggle 2.2 and newer need Python 3.11"
)


# ---------------------------------------------------------------- archives


def split_files(split, number=2):
    """{name: bytes} of one tiny split."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 90, 90)).save(out, "JPEG")
    files = {f"{split}/{i}_jpg.rf.{split}.jpg": out.getvalue() for i in range(number)}
    images = [
        {"id": i, "file_name": Path(n).name, "width": 16, "height": 16} for i, n in enumerate(files)
    ]
    square = [[2, 2, 9, 2, 9, 9, 2, 9, 2, 2]]
    annotations = [{"id": 1, "image_id": 0, "category_id": 1, "segmentation": square}]
    coco = {"info": {"description": "tiny"}, "images": images}
    coco |= {"annotations": annotations, "categories": [{"id": 1}]}
    return files | {f"{split}/_annotations.coco.json": json.dumps(coco).encode()}


def good_files():
    return {name: data for split in SPLITS for name, data in split_files(split).items()}


def pack(files, padding=0):
    """The bytes of a zip of {name or ZipInfo: bytes} and a README of `padding` random bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("README.txt", np.random.default_rng(0).bytes(padding))
    return out.getvalue()


# ---------------------------------------------------------------- running the script


def environment(home, port=None):
    """The environment of a run without credentials that reaches only the loopback `port`."""
    names = ("KAGGLE", "NO_PROXY", "HTTP", "ALL_PROXY", "XDG")
    env = {k: v for k, v in os.environ.items() if not k.upper().startswith(names)}
    proxy = f"http://127.0.0.1:{port or 9}"  # nothing listens on 9
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")
    return {**env, **dict.fromkeys(names, proxy)} | {
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
    }


def run(folder, *flags, site=None, before="pass", **extra):
    """Run download.py --source kaggle, or with `flags`, in a process of its own in `folder`.

    site: the server that it reaches. before: code to run first in the same process.
    """
    home = folder / "home"
    home.mkdir(exist_ok=True)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import download; {before}; "
    start += "sys.argv[0] = 'download.py'; from medseg.cli import run_main; "
    flags = flags or ("--source", "kaggle")
    command = [sys.executable, "-c", start + "run_main(download.main)", *flags]
    env = environment(home, site and site.server_port) | extra
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def assert_done(result, root):
    assert result.returncode == 0, result
    assert result.stderr == ""
    assert sorted(p.name for p in root.iterdir()) == sorted(SPLITS)
    assert all(len(COCO_quietly(root / s / "_annotations.coco.json").imgs) == 2 for s in SPLITS)
    assert "CC BY 4.0" in result.stdout and "python train.py" in result.stdout
    assert "Authentication required" not in result.stdout


def COCO_quietly(path):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


# ---------------------------------------------------------------- the server


class Site(BaseHTTPRequestHandler):
    """Kaggle and the mirror: POST is redirected to GET, which serves `site.body` with Range."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        site = self.server
        request = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("IntrospectToken"):
            body = b'{"active": true, "username": "alice"}'
            return self.answer(200, body, Content_Type="application/json")
        site.asked.append(("POST", json.loads(request)))
        if site.status != 200:
            return self.answer(site.status, b"no")
        self.answer(302, Location=f"http://127.0.0.1:{site.server_port}/file.zip")

    def do_GET(self):
        site, spans = self.server, self.headers.get("Range")
        site.asked.append(("GET", spans))
        site.stop.wait(site.stall)
        if site.status != 200:
            return self.answer(site.status, b"no")
        headers = {"ETag": '"one"', "Accept_Ranges": "bytes"}
        headers["Last_Modified"] = "Sat, 19 Aug 2023 04:37:54 GMT"
        start = int(spans.removeprefix("bytes=").removesuffix("-")) if spans else 0
        if start >= len(site.body):
            return self.answer(416, **headers)
        body = site.body[start:]
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(site.body) - 1}/{len(site.body)}"
        if site.cut:  # once: promise all, send a part, hang up
            headers["Content_Length"], body, site.cut = len(body), body[: site.cut], 0
            self.close_connection = True
        self.answer(206 if start else 200, body, **headers)


@pytest.fixture
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    # A client that hung up must not print into the next test's stderr.
    server.handle_error = lambda *_: None
    server.body = pack(good_files(), 5000)
    server.status, server.cut, server.stall = 200, 0, 0
    server.asked, server.stop = [], threading.Event()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


def gets(site):
    return [span for method, span in site.asked if method == "GET"]


# ---------------------------------------------------------------- Kaggle, with its real client


@new_client
def test_kaggle_then_nothing_more(site, tmp_path):
    root = tmp_path / "dataset"
    result = run(tmp_path, site=site)
    assert_done(result, root)
    assert site.asked[0][1]["ownerSlug"] == "pkdarabi"
    before, asked = tree(root), len(site.asked)
    again = run(tmp_path, "--source", "auto", site=site)
    assert again.returncode == 0 and "already there" in again.stdout and "train" in again.stdout
    assert tree(root) == before and len(site.asked) == asked


@new_client
@pytest.mark.parametrize(
    "status, token, word",
    [
        (403, {}, "--source mirror"),
        (401, {}, "--source mirror"),
        (404, {}, "404"),
        (500, {}, "500"),
        (403, {"KAGGLE_API_TOKEN": "KGAT_x"}, "your credentials (403)"),
    ],
)
def test_kaggle_refuses(site, tmp_path, status, token, word):
    site.status = status
    assert_refused(run(tmp_path, site=site, **token), word)
    assert not (tmp_path / "dataset").exists()


@new_client
def test_kaggle_cut_then_resumed(site, tmp_path):
    site.body = pack(good_files(), 3 * 2**20)
    site.cut = 3 * 2**19  # in the middle of the second chunk, which is lost
    assert_done(run(tmp_path, site=site), tmp_path / "dataset")
    assert gets(site) == [None, f"bytes={2**20}-"]


@new_client
@pytest.mark.parametrize("poisoned", [False, True])
def test_kaggle_resumes_a_killed_run(site, tmp_path, poisoned):
    parts = tmp_path / "dataset" / ".download"
    parts.mkdir(parents=True)
    if poisoned:  # the right size: the Kaggle client would keep it
        (parts / ZIP_NAME).write_bytes(b"<html>" + site.body[6:-400] + bytes(400))
    else:
        (parts / ZIP_NAME).write_bytes(site.body[:2000])
        state = {"validator": '"one"', "size": len(site.body)}
        (parts / f"{ZIP_NAME}.kaggle-partial").write_text(json.dumps(state))
    assert_done(run(tmp_path, site=site), tmp_path / "dataset")
    assert len(gets(site)) == 2 and (poisoned or gets(site) == [None, "bytes=2000-"])


@new_client
@pytest.mark.parametrize(
    "body, word, times",
    [(b"<html>sorry</html>", "twice", 2), (pack(split_files("valid")), "train/_annotations", 1)],
)
def test_kaggle_sends_something_else(site, tmp_path, body, word, times):
    site.body = body
    assert_refused(run(tmp_path, site=site), word)
    assert len(gets(site)) == times and not (tmp_path / "dataset").exists()


@new_client
def test_kaggle_stalls(site, tmp_path):
    site.stall = 20
    quick = "download.TIMEOUT = (1, 0.3)"
    result = run(tmp_path, site=site, before=quick)
    assert_refused(result, "did not answer in time")


def test_kaggle_without_home(site, tmp_path):
    result = run(tmp_path, site=site, HOME="/dev/null")
    assert_refused(result, "KAGGLE_CONFIG_DIR")


def test_kaggle_not_installed(site, tmp_path):
    missing = "sys.modules['kaggle'] = None"
    assert_refused(run(tmp_path, before=missing), "pip install -r requirements.txt")


@new_client
def test_no_network_names_both_reasons(tmp_path):
    result = run(tmp_path, "--source", "auto")
    assert_refused(result, "Kaggle cannot be reached", "the mirror cannot be reached", "--zip FILE")
    assert "kaggle failed" in result.stdout
    assert not (tmp_path / "dataset").exists()


def test_timeouts_are_put_back():
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send
    with pytest.raises(ZeroDivisionError), download.timeouts():
        assert HTTPAdapter.send is not send
        raise ZeroDivisionError
    assert HTTPAdapter.send is send


# ---------------------------------------------------------------- the mirror


@pytest.fixture
def mirror(site, monkeypatch):
    monkeypatch.setattr(download, "MIRROR", f"http://127.0.0.1:{site.server_port}/file.zip")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return site


@new_client
def test_auto_goes_on_to_the_mirror(site, tmp_path):
    there = f"download.MIRROR = 'http://127.0.0.1:{site.server_port}/file.zip'"
    result = run(tmp_path, "--source", "auto", before=there, no_proxy="127.0.0.1")
    assert_done(result, tmp_path / "dataset")
    assert "Kaggle cannot be reached" in result.stdout


def test_mirror_resumes_a_cut_download(mirror, tmp_path):
    root = tmp_path / "data"
    mirror.body = pack(good_files(), 3 * 2**20)
    mirror.cut = 3 * 2**19
    flags = ("--source", "mirror", "--data", root)
    assert_refused(script_here("download.py", *flags, cwd=tmp_path), f"--data {root}")
    assert [p.name for p in root.rglob("*") if p.is_file()] == ["mirror.zip.part"]
    run_download(*flags)
    assert gets(mirror) == [None, f"bytes={3 * 2**19}-"]
    assert sorted(p.name for p in root.iterdir()) == sorted(SPLITS)


@pytest.mark.parametrize("part", [b"x" * 700, b"x" * 10**6], ids=["poisoned", "too long"])
def test_mirror_drops_a_wrong_part(mirror, tmp_path, part):
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download" / "mirror.zip.part").write_bytes(part)
    run_download("--source", "mirror", "--data", tmp_path)
    assert gets(mirror) == [f"bytes={len(part)}-", None]


@pytest.mark.parametrize(
    "setting, word",
    [({"status": 404}, "404"), ({"body": b"sorry"}, "damaged"), ({"stall": 9}, "time")],
)
def test_mirror_fails(mirror, here, monkeypatch, setting, word):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.3))
    for name, value in setting.items():
        setattr(mirror, name, value)
    refuse_download("--source", "mirror", words=[word, "--zip FILE"])


# ---------------------------------------------------------------- unsafe archives


def info(name, mode=stat.S_IFREG | 0o644):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    entry.create_system = 3
    return entry


def lying_bomb():
    """A zip whose headers, both of them, say that 3 MB of zeros are 50 bytes."""
    raw = bytearray(pack(good_files() | {"train/zeros": bytes(3_000_000)}))
    size = struct.pack("<I", 3_000_000)
    while (at := raw.find(size)) >= 0:
        raw[at : at + 4] = struct.pack("<I", 50)
    return bytes(raw)


def encrypted():
    raw = bytearray(pack(good_files()))
    raw[raw.find(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


def without(end):
    return pack({name: data for name, data in good_files().items() if not name.endswith(end)})


def renamed(old, new):
    """A zip with a name (same length) changed in the raw bytes: zipfile would not write it."""
    return pack(good_files() | {old: b"x"}).replace(old.encode(), new)


BAD = {
    "climbs": (pack(good_files() | {"train/../../evil": b"x"}), "leads out"),
    "absolute": (pack(good_files() | {"/tmp/evil": b"x"}), "leads out"),
    "backslash": (renamed("train/AA/evil", b"train\\..\\evil"), "leads out"),
    "drive": (pack(good_files() | {"C:/evil": b"x"}), "leads out"),
    "NUL": (renamed("train/evil", b"train/ev\0l"), "leads out"),
    "link": (pack(good_files() | {info("train/link", stat.S_IFLNK | 0o777): b"/etc"}), "is a link"),
    "device": (
        pack(good_files() | {info("train/pipe", stat.S_IFIFO | 0o666): b""}),
        "special file",
    ),
    "bomb": (pack(good_files() | {"train/zeros": bytes(3_000_000)}), "many bytes"),
    "lying bomb": (lying_bomb(), "damaged"),
    "encrypted": (encrypted(), "encrypted"),
    "no split": (pack(split_files("valid") | split_files("test")), "no train/_annotations"),
    "too few": (pack(split_files("train", 2)), "2 images are too few for 3 splits;"),
    "no image": (without("1_jpg.rf.valid.jpg"), "1_jpg.rf.valid.jpg is listed"),
    "not COCO": (pack(good_files() | {"test/_annotations.coco.json": b"[1, 2]"}), "not COCO"),
    "not JSON": (pack(good_files() | {"test/_annotations.coco.json": b"\xff{"}), "not JSON"),
    "image outside": (pack(good_files()).replace(b"0_jpg", b"../.."), "leads out"),
    "twice": (renamed("train/1_jpg.rf.trai_.jpg", b"train/1_jpg.rf.train.jpg"), "File exists"),
    "cut": (pack(good_files())[:-100], "damaged"),
    "no zip": (b"<html>", "damaged"),
    "empty": (b"", "damaged"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("flags", [(), ("--force",)], ids=["empty", "force"])
def test_bad_archive_changes_nothing(here, name, flags):
    body, word = BAD[name]
    Path("archive.zip").write_bytes(body)
    if flags:
        for file, data in good_files().items():
            Path("dataset", file).parent.mkdir(parents=True, exist_ok=True)
            Path("dataset", file).write_bytes(data)
    words = [word, "archive.zip", "--zip FILE"]
    line = refuse_download("--zip", "archive.zip", *flags, words=words)
    assert ".new-" not in line  # the temporary folder is gone


@pytest.mark.parametrize("name, value", [("MAX_ENTRIES", 5), ("MAX_BYTES", 1000)])
def test_caps(here, monkeypatch, name, value):
    Path("archive.zip").write_bytes(pack(good_files()))
    monkeypatch.setattr(archive, name, value)
    refuse_download("--zip", "archive.zip", words=["archive.zip"])


def test_missing_zip(here):
    refuse_download("--zip", "none.zip", words=["none.zip"])


@pytest.mark.parametrize(
    "prefix, valid", [("", "valid"), ("Brain Tumor/", "valid"), ("a/b/", "validation"), ("", "val")]
)
def test_wrapped_archive(tmp_path, prefix, valid):
    path, root = tmp_path / "archive.zip", tmp_path / "data"
    wrapped = {}
    for name, data in good_files().items():
        wrapped[prefix + name.replace("valid/", f"{valid}/")] = data
    path.write_bytes(pack(wrapped))
    run_download("--zip", path, "--data", root)
    got = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert got == good_files()


@pytest.mark.parametrize("present", [("train",), ("train", "valid"), ("train", "test")])
def test_splits_that_a_zip_lacks_are_dealt_from_train(here, present):
    files = {"train/README.txt": b"x"}
    for split in present:
        files |= split_files(split, 20)
    Path("archive.zip").write_bytes(pack(files))
    out = run_download("--zip", "archive.zip")
    missing = [split for split in ("valid", "test") if split not in present]
    assert f"no {' and no '.join(missing)} split" in out
    dealt, names = {"train": 20 - 3 * len(missing)} | dict.fromkeys(missing, 3), set()
    for split in ("train", "valid", "test"):
        coco = json.loads(Path("dataset", split, "_annotations.coco.json").read_text())
        assert len(coco["images"]) == dealt.get(split, 20)
        own_ids = {record["id"] for record in coco["images"]}
        assert {entry["image_id"] for entry in coco["annotations"]} == own_ids & {0}
        for record in coco["images"]:
            path = Path("dataset", split, record["file_name"])
            own = split if split in present else "train"
            assert path.read_bytes() == files[f"{own}/{path.name}"]
            names.add(path.name)
        assert len(list(Path("dataset", split).glob("*.jpg"))) == len(coco["images"])
    assert len(names) == 20 * len(present)


def test_variants_of_one_picture_are_dealt_together(here):
    files = split_files("train", 20)
    text = files.pop("train/_annotations.coco.json").decode()
    for number in range(20):  # four variants of five pictures
        old, new = f"{number}_jpg.rf.train.jpg", f"{number % 5}_jpg.rf.a{number}.jpg"
        files[f"train/{new}"], text = (
            files.pop(f"train/{old}"),
            text.replace(f'"{old}"', f'"{new}"'),
        )
    files["train/_annotations.coco.json"] = text.encode()
    Path("archive.zip").write_bytes(pack(files))
    run_download("--zip", "archive.zip", "--seed", 3)
    folders = {path: path.parent.name for path in Path("dataset").glob("*/*.jpg")}
    homes = {(path.name.split("_")[0], folder) for path, folder in folders.items()}
    assert len(folders) == 20 and len(homes) == 5 and set(folders.values()) == {*archive.SPLITS}


def test_damaged_records_are_counted(tmp_path):
    """An annotation of no image does not make a split incomplete: `train.py` can leave it out."""
    files = good_files()
    coco = json.loads(files["train/_annotations.coco.json"])
    coco["annotations"].append({"id": 2, "image_id": 99, "category_id": 1, "segmentation": []})
    files["train/_annotations.coco.json"] = json.dumps(coco).encode()
    (tmp_path / "archive.zip").write_bytes(pack(files))
    out = run_download("--zip", tmp_path / "archive.zip", "--data", tmp_path / "data")
    assert f"1 damaged records: python data.py {tmp_path / 'data'}" in out


# ---------------------------------------------------------------- existing data, full disks, Ctrl-C


@pytest.fixture
def there(here):
    """The tiny data set with a file of the user's own beside it, and a zip to replace it by."""
    Path("good.zip").write_bytes(pack(good_files()))
    more = split_files("train", 3) | split_files("valid", 3) | split_files("test", 3)
    Path("more.zip").write_bytes(pack(more))
    run_download("--zip", "good.zip")
    Path("dataset/notes.txt").write_text("mine")
    return here / "dataset"


def test_force_replaces_only_the_splits(there):
    run_download("--zip", "more.zip", "--force")
    assert sorted(p.name for p in there.iterdir()) == ["notes.txt", "test", "train", "valid"]
    assert all(len(list((there / split).iterdir())) == 4 for split in SPLITS)


@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_failed_replacement_is_rolled_back(there, monkeypatch, fails_at, error):
    before, rename, calls = tree(there), os.rename, []

    def failing(a, b):
        calls.append(a)
        if len(calls) == fails_at + 1:
            raise error
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    result = script_here("download.py", "--zip", "more.zip", "--force", cwd=there.parent)
    assert result.returncode == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(result.stderr.splitlines()) == 1 and tree(there) == before


def test_incomplete_data_is_said(there):
    (there / "valid" / "1_jpg.rf.valid.jpg").unlink()
    refuse_download("--zip", "good.zip", words=["valid/1_jpg.rf.valid.jpg", "--force"])


def test_real_and_phantoms_do_not_replace_each_other(there):
    few = ("--synthetic", "--phantoms", "1", "1", "1")
    refuse_download(*few, words=["dataset", "--force"])
    run_download(*few, "--force")
    before = tree(there)
    assert "already there" in run_download(*few) and tree(there) == before
    refuse_download("--zip", "good.zip", words=["phantoms", "--force"])
    run_download("--zip", "good.zip", "--force")


@pytest.mark.parametrize(
    "flags", [("--zip", "good.zip"), ("--source", "kaggle"), ("--source", "mirror")]
)
def test_too_little_disk(here, monkeypatch, flags):
    Path("good.zip").write_bytes(pack(good_files()))
    monkeypatch.setattr(splits.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    refuse_download(*flags, words=["dataset", "MiB"])


def test_disk_fills_while_unpacking(here, monkeypatch):
    def full(path, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("good.zip").write_bytes(pack(good_files()))
    monkeypatch.setattr(archive, "open", full, raising=False)
    refuse_download("--zip", "good.zip", words=["dataset is full", "--data"])


def test_interrupt_while_unpacking(tmp_path):
    files = good_files() | {f"train/extra/{i}": b"x" for i in range(20_000)}
    (tmp_path / "big.zip").write_bytes(pack(files))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--zip", "big.zip"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.time() + 20
    while not list(tmp_path.glob("dataset/.new-*/train/extra/1")):
        assert time.time() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "download.py: interrupted\n"
    assert not (tmp_path / "dataset").exists()


def test_importing_needs_neither_torch_nor_kaggle():
    code = "import sys, download; print({'torch', 'kaggle', 'requests'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("set()\n", "")


# ---------------------------------------------------------------- phantoms


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return phantoms.make_phantoms(tmp_path_factory.mktemp("phantoms") / "p", (60, 3, 2), size=128)


def read_pairs(folder):
    """Images and masks (N, H, W) of a split, masks drawn by pycocotools."""
    coco = COCO_quietly(folder / "_annotations.coco.json")
    images, masks = [], []
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = np.asarray(Image.open(folder / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        assert image["file_name"].split("_")[0].isdecimal()
        lesions = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(image["id"]))]
        assert all(mask.any() for mask in lesions)
        images.append(pixels[..., 0])
        masks.append(np.any(lesions, axis=0) if lesions else np.zeros(pixels.shape[:2], bool))
    return np.stack(images), np.stack(masks)


def test_phantoms_are_laid_out_like_the_data(drawn):
    assert sorted(p.name for p in drawn.iterdir()) == sorted(SPLITS)
    for split, count in zip(SPLITS, (60, 3, 2), strict=True):
        coco = COCO_quietly(drawn / split / "_annotations.coco.json")
        assert len(coco.imgs) == count
        assert [category["name"] for category in coco.cats.values()] == ["tumour"]
        for annotation in coco.anns.values():
            mask = coco.annToMask(annotation)
            x, y, w, h = annotation["bbox"]
            assert abs(mask.sum() / annotation["area"] - 1) < 0.1
            assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128
            assert 24 <= len(annotation["segmentation"][0]) / 2 <= 40


def test_phantoms_need_more_than_a_threshold(drawn):
    images, masks = read_pairs(drawn / "train")
    # All background is then right on 94 % of the pixels, with Dice 0.
    assert 0.03 < masks.mean() < 0.06
    assert 0.05 < (~masks.any(axis=(1, 2))).mean() < 0.3
    inside = np.bincount(images[masks], minlength=256)
    outside = np.bincount(images[~masks], minlength=256)
    hits, misses = np.r_[0, inside.cumsum()], np.r_[0, outside.cumsum()]
    # Every band of brightness low <= pixel < high, and so every threshold too.
    low, high = np.triu_indices(257, 1)
    hit = hits[high] - hits[low]
    dice = 2 * hit / (hit + misses[high] - misses[low] + inside.sum())
    assert dice.max() < 0.5
    # Yet the lesions can be seen: inside and just outside differ in most of them.
    assert np.abs(np.median(images[masks]) - np.median(images[~masks & (images > 40)])) > 20


def test_phantoms_depend_on_seed_and_index_alone(drawn, tmp_path):
    fewer = phantoms.make_phantoms(tmp_path / "fewer", (2, 1, 1), size=128)
    other = phantoms.make_phantoms(tmp_path / "other", (2, 1, 1), size=128, seed=1)
    images = set()
    for name in ("train/0_phantom.jpg", "train/1_phantom.jpg", "test/20000_phantom.jpg"):
        same, again, seed_1 = ((root / name).read_bytes() for root in (drawn, fewer, other))
        assert same == again != seed_1
        images.add(same)
    assert len(images) == 3


def test_phantoms_are_kept_or_refused(tmp_path):
    root = phantoms.make_phantoms(tmp_path / "p", (1, 1, 1), size=64)
    before = tree(root)
    assert phantoms.make_phantoms(root, (1, 1, 1), size=64) == root and tree(root) == before
    for other in ({"counts": (2, 1, 1)}, {"seed": 1}, {"size": 96}):
        with pytest.raises(ValueError, match="something else"):
            phantoms.make_phantoms(root, **{"counts": (1, 1, 1), "size": 64, **other})
    assert tree(root) == before


def test_interrupted_phantoms_leave_nothing(here, monkeypatch):
    def stop(rng, size, dark_share):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantoms, "draw_phantom", stop)
    result = script_here("download.py", "--synthetic", cwd=here)
    assert (result.returncode, result.stderr) == (130, "download.py: interrupted\n")
    assert not list(here.iterdir())
