"""download.py: a loopback server for Kaggle and the mirror, zips that are wrong, and phantoms."""

import contextlib
import errno
import io
import json
import os
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from helpers import (
    assert_done,
    assert_refused,
    refuse_download,
    run_download,
    run_python,
    script,
    script_here,
    square,
    tree,
)
from PIL import Image
from pycocotools.coco import COCO

import download
from medseg import phantoms, splits
from medseg.splits import ANNOTATIONS, SPLITS


def split_files(split, number=2, pictures=99):
    """{name: bytes} of one tiny split, of variants of so many pictures."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 90, 90)).save(out, "JPEG")
    names = [f"{n % pictures}_jpg.rf.{split}{n}.jpg" for n in range(number)]
    size = {"width": 16, "height": 16}
    images = [{"id": n, "file_name": name, **size} for n, name in enumerate(names)]
    annotations = [{"id": 1, "image_id": 0, "category_id": 1, "segmentation": square(2, 2, 7)}]
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    files = dict.fromkeys([f"{split}/{name}" for name in names], out.getvalue())
    return files | {f"{split}/{ANNOTATIONS}": json.dumps(coco).encode()}


def good_files(number=2):
    return {name: data for split in SPLITS for name, data in split_files(split, number).items()}


def pack(files, padding=0):
    """The bytes of a zip of {name: bytes} and a README of `padding` random bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data)
        z.writestr("README.txt", np.random.default_rng(0).bytes(padding))
    return out.getvalue()


def read_coco(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(Path(folder, ANNOTATIONS))


# ---------------------------------------------------------------- Kaggle and the mirror


class Site(BaseHTTPRequestHandler):
    """Serves `server.body`, from a Range on, or the status of a path."""

    def log_message(self, *_):
        pass

    def do_POST(self):  # Kaggle's client asks where the file is
        site = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        site.asked.append((asked["ownerSlug"], None))
        self.send_response(302)
        self.send_header("Location", f"http://127.0.0.1:{site.server_port}/kaggle")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        site, span = self.server, self.headers.get("Range")
        path = f"/{self.path.rpartition('/')[2]}"  # a proxy is asked for the whole address
        site.asked.append((path, span))
        site.stop.wait(site.stall)
        start = int(span[len("bytes=") : -1]) if span and site.has_ranges else 0
        status = site.statuses.get(path, 206 if start else 200)
        status = 416 if start >= len(site.body) else status
        body = site.body[start:] if status < 300 else b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"one"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Sat, 19 Aug 2023 04:37:54 GMT")
        if status == 206:
            span = f"bytes {start}-{len(site.body) - 1}/{len(site.body)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(body[: site.cut])
        site.cut = None  # once: promise all, send a part, hang up


def fetch(url, folder):
    """Either source as the mirror is asked: Kaggle's client needs a process of its own."""
    with mock.patch.object(download, "MIRROR", url):
        return download.fetch_from_mirror(folder)


@pytest.fixture
def site(here, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads, server.handle_error = True, lambda *_: None
    server.body, server.asked, server.stop = pack(good_files(), 5000), [], threading.Event()
    server.statuses, server.cut, server.stall, server.has_ranges = {}, None, 0, True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    sources = {name: partial(fetch, f"{address}/{name}") for name in ("kaggle", "mirror")}
    monkeypatch.setattr(download, "SOURCES", sources)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_auto_goes_on_to_the_mirror_and_downloads_once(site, monkeypatch):
    site.statuses = {"/kaggle": 403}
    printed = run_download()
    assert sorted(path.name for path in Path("dataset").iterdir()) == sorted(SPLITS)
    assert all(len(read_coco(f"dataset/{split}").imgs) == 2 for split in SPLITS)
    assert "403" in printed and "CC BY 4.0" in printed and "next: python train.py\n" in printed
    before = tree("dataset")
    assert "already there" in run_download()
    assert tree("dataset") == before
    assert site.asked == [("/kaggle", None), ("/mirror", None)]
    flags = ("--data", "o'clock")
    refuse_download(*flags, "--source", "kaggle", words=["403", "--source", "--zip FILE"])
    download.SOURCES["kaggle"] = download.fetch_from_kaggle
    monkeypatch.setitem(sys.modules, "kaggle", None)
    assert "pip install kaggle" in run_download(*flags)


# Python 3.10 gets kaggle 1.7: another protocol, which wants an account for public data too.
@pytest.mark.skipif(sys.version_info < (3, 11), reason="kaggle 2.2 and newer need Python 3.11")
@pytest.mark.parametrize(
    "case", [pytest.param("cut", marks=pytest.mark.slow), "damaged before", "refused"]
)
def test_the_client_of_kaggle(site, case):
    site.body = pack(good_files(), 3 * 2**20)
    site.statuses = {"/kaggle": 403} if case == "refused" else {}
    if case == "cut":  # what was not a whole chunk is lost
        site.cut = 3 * 2**19
    if case == "damaged before":  # of the right size: the client keeps it
        left = Path("dataset/.download/brain-tumor-image-dataset-semantic-segmentation.zip")
        left.parent.mkdir(parents=True)
        left.write_bytes(b"<html>" + site.body[6:-400] + bytes(400))
    proxy = f"http://127.0.0.1:{site.server_port}"
    names = dict.fromkeys(("HTTP_PROXY", "http_proxy"), proxy)
    names |= {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "no_proxy": "", "NO_PROXY": ""}
    result = script("download.py", "--source", "kaggle", cwd=".", **names)
    asked = [span for path, span in site.asked if path == "/kaggle"]
    assert asked[-1] == (f"bytes={2**20}-" if case == "cut" else None)
    assert ("pkdarabi", None) in site.asked
    if case == "refused":
        return assert_refused(result, "403", "--source")
    assert result.stderr == "" and "Authentication" not in assert_done(result)
    assert sorted(path.name for path in Path("dataset").iterdir()) == sorted(SPLITS)


@pytest.mark.parametrize(
    ("setting", "word", "times"),
    [  # what the site answers with, what the message names, how often each source is asked
        ({"statuses": {"/kaggle": 404, "/mirror": 500}}, "500", 1),
        ({"body": b"<html>sorry</html>"}, "damaged", 2),
        ({"body": pack(split_files("valid"))}, f"train/{ANNOTATIONS}", 1),
        ({"stall": 9}, "proxy", 1),
    ],
)
def test_sources_that_fail(site, monkeypatch, setting, word, times):
    monkeypatch.setattr(download, "TIMEOUT", (1, 0.3))
    vars(site).update(setting)
    refuse_download(words=[word, "--zip FILE"])
    assert [path for path, _ in site.asked] == ["/kaggle"] * times + ["/mirror"] * times


def test_no_network(here, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    refuse_download(words=["mirror cannot be reached", "proxy", "--zip FILE"])


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_is_resumed(site, ranges):
    site.body = pack(good_files(), 3 * 2**20)
    site.cut = 3 * 2**19
    site.has_ranges = ranges  # without, a site sends the whole
    flags = ("--source", "mirror", "--data", "own")
    assert_refused(script_here("download.py", *flags, cwd="."), "cut off")
    assert [path.name for path in Path("own").rglob("*") if path.is_file()] == ["mirror.zip"]
    run_download(*flags)
    assert [span for _, span in site.asked] == [None, f"bytes={3 * 2**19}-"]
    assert sorted(path.name for path in Path("own").iterdir()) == sorted(SPLITS)


@pytest.mark.parametrize("more", [700, 10**6])
def test_what_an_earlier_run_left_may_be_wrong(site, more):
    Path("dataset/.download").mkdir(parents=True)
    Path("dataset/.download/mirror.zip").write_bytes(b"x" * more)
    run_download("--source", "mirror")
    assert [span for _, span in site.asked] == [f"bytes={more}-", None]


# ---------------------------------------------------------------- zips


def changed(name, data):
    """A zip in which a file has other bytes, or with None is missing."""
    files = good_files() | {name: data}
    return pack({name: own for name, own in files.items() if own is not None})


NOISE = np.random.default_rng(1).bytes(99)
BAD = {
    "climbs": (changed("train/../../evil", b"x"), "leads out"),
    "no split": (pack(split_files("valid") | split_files("test")), f"no train/{ANNOTATIONS}"),
    "too few": (pack(split_files("train")), "2 images are too few"),
    "no image": (changed("valid/1_jpg.rf.valid1.jpg", None), "1_jpg.rf.valid1.jpg is listed"),
    "not JSON": (changed(f"test/{ANNOTATIONS}", b"\xff{"), "not JSON"),
    "image outside": (pack(good_files()).replace(b"0_jpg", b"../.."), "leads out"),
    "damaged": (changed("train/x", NOISE).replace(NOISE[:9], NOISE[:9][::-1]), "damaged"),
    "no zip": (b"<html>", "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_zip_changes_nothing(here, name):
    body, word = BAD[name]
    Path("good.zip").write_bytes(pack(good_files()))
    Path("bad.zip").write_bytes(body)
    for flags in ((), ("--force",)):
        line = refuse_download("--zip", "bad.zip", *flags, words=["bad.zip", word])
        assert ".new-" not in line  # the temporary folder is gone
        run_download("--zip", "good.zip")


def test_a_zip_that_fills_the_disk_is_refused(here, monkeypatch):
    Path("good.zip").write_bytes(pack(good_files()))
    with monkeypatch.context() as patched:
        patched.setattr(splits.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        refuse_download("--source", "mirror", words=["dataset", "MiB"])
        refuse_download("--zip", "good.zip", words=["MiB"])
    error = OSError(errno.ENOSPC, "full")
    monkeypatch.setattr(zipfile.ZipFile, "read", mock.Mock(side_effect=error))
    refuse_download("--zip", "good.zip", words=["dataset: full"])


@pytest.mark.parametrize(
    "present, prefix, valid",
    [
        (("train",), "", ""),
        (("train", "valid"), "a/b/", "Val"),
        (SPLITS, "Brain Tumor/", "validation"),
    ],
)
def test_splits_of_a_zip_are_found_and_those_that_it_lacks_dealt(here, present, prefix, valid):
    """The four variants of each of five pictures stay together."""
    files, homes, n_missing = {f"{prefix}train/README.txt": b"x"}, {}, 3 - len(present)
    for split in present:
        for name, content in split_files(split, 20, 5).items():
            files[prefix + name.replace("valid/", f"{valid}/")] = content
    Path("archive.zip").write_bytes(pack(files))
    run_download("--zip", "archive.zip")
    for split in SPLITS:
        coco = read_coco(f"dataset/{split}")
        names = {record["file_name"] for record in coco.imgs.values()}
        assert {path.name for path in Path("dataset", split).glob("*.jpg")} == names
        dealt = 4 * n_missing if split == "train" else 0
        assert len(names) == (20 - dealt if split in present else 4)
        assert coco.imgToAnns.keys() == coco.imgs.keys() & {0}
        for name in names:
            picture = name.split("_")[0], name.split(".")[2].rstrip("0123456789")
            assert homes.setdefault(picture, split) == split
    assert len(homes) == 5 * len(present)


# ---------------------------------------------------------------- what is there already


@pytest.fixture
def there(here):
    """The tiny data set, and a zip to replace it by."""
    Path("good.zip").write_bytes(pack(good_files()))
    Path("more.zip").write_bytes(pack(good_files(3)))
    run_download("--zip", "good.zip")
    return here / "dataset"


def test_force_replaces_only_the_splits_by_others(there):
    (there / "notes.txt").write_text("mine")
    run_download("--zip", "more.zip", "--force")
    assert sorted(path.name for path in there.iterdir()) == ["notes.txt", *sorted(SPLITS)]
    assert all(len(list((there / split).iterdir())) == 4 for split in SPLITS)
    (there / "valid" / "1_jpg.rf.valid1.jpg").unlink()
    refuse_download("--zip", "good.zip", words=["valid/1_jpg.rf.valid1.jpg", "--force"])
    few = ("--synthetic", "--phantoms", 1, 1, 1)
    refuse_download(*few, words=["dataset", "--force"])
    run_download(*few, "--force")
    before = tree(there)
    assert "already there" in run_download(*few) and tree(there) == before
    for others in ((*few, "--seed", 1), (*few[:2], 2, 1, 1), ("--zip", "good.zip")):
        refuse_download(*others, words=["dataset", "--force"])
    run_download("--zip", "good.zip", "--force")
    assert len(read_coco("dataset/train").imgs) == 2


@pytest.mark.parametrize("fails_at", range(1, 7))
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_failed_replacement_is_rolled_back(there, monkeypatch, fails_at, error):
    before, replace = tree(there), os.replace
    results = [replace] * (fails_at - 1) + [mock.Mock(side_effect=error)] + [replace] * 20
    monkeypatch.setattr(os, "replace", lambda *paths: results.pop(0)(*paths))
    result = script_here("download.py", "--zip", "more.zip", "--force", cwd=there.parent)
    assert result.returncode == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(result.stderr.splitlines()) == 1 and tree(there) == before


def test_importing_needs_neither_torch_nor_requests():
    code = "import sys, download; print({'torch', 'requests'} & set(sys.modules))"
    assert assert_done(run_python("-c", code, cwd=".")) == "set()\n"


# ---------------------------------------------------------------- phantoms


def test_phantoms_are_laid_out_like_the_data_and_need_more_than_a_threshold(tmp_path):
    drawn, images, masks = tmp_path / "drawn", [], []
    phantoms.make_phantoms(drawn, (60, 3, 2), size=128)
    for split, count in zip(SPLITS, (60, 3, 2), strict=True):
        coco = read_coco(drawn / split)
        assert len(coco.imgs) == count and coco.cats[1]["name"] == "tumour"
        for annotation in coco.anns.values():
            x, y, w, h = annotation["bbox"]
            assert abs(coco.annToMask(annotation).sum() / annotation["area"] - 1) < 0.1
            assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128
        for image in coco.imgs.values():
            images.append(np.asarray(Image.open(drawn / split / image["file_name"]))[..., 0])
            lesions = [coco.annToMask(own) for own in coco.imgToAnns[image["id"]]]
            masks.append(np.any([np.zeros((128, 128)), *lesions], axis=0))
    images, masks = np.stack(images), np.stack(masks)
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


def test_interrupted_phantoms_leave_nothing(here, monkeypatch):
    monkeypatch.setattr(phantoms, "draw_phantom", mock.Mock(side_effect=KeyboardInterrupt))
    result = script_here("download.py", "--synthetic", cwd=here)
    assert (result.returncode, result.stderr) == (130, "download.py: interrupted\n")
    assert not list(here.iterdir())
