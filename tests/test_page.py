"""The page: what it shows, refuses and hands back in a headless Chromium; what it leaves behind.

Two servers run for all tests. One is a fork of this process, which counts the runs of the network;
the other is a process of its own, which notes every connection it makes.
"""

import asyncio
import contextlib
import csv
import functools
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import helpers
import nibabel
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_done,
    assert_refused,
    brightness_model,
    fork_script,
    run_python,
    save_turned,
    scan,
    script_here,
    start_python,
    wait_until,
    write_dicom,
    write_nifti,
)
from PIL import Image

from medseg.full_size import full_size_labels
from medseg.images import save_mask
from medseg.page import gate, server
from medseg.page.app import Page, example_images, import_gradio, layout, make_app, text_html
from medseg.page.session import VIEW_SIDE, Session
from medseg.predicting import models
from medseg.predicting.assessment import Assessment

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SANDBOX = ("--no-sandbox", "--disable-dev-shm-usage")  # as root and in a container there is none
SECONDS = 60  # at most, for anything, on a busy machine
LONGEST = 20_000_000  # bytes of an upload, in the first of the servers
# A process of its own that runs a script and notes the addresses it looks up or connects to.
RUN_AND_NOTE = """
import runpy, sys
script, log, *arguments = sys.argv[1:]
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(log, "a") as file:
            file.write(f"{event} {args[-1] if event == 'socket.connect' else args}\\n")
sys.addaudithook(note)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with best_model.pth, what to upload, and folders for temporary files."""
    folder = tmp_path_factory.mktemp("page")
    torch.save(brightness_model().state_dict(), folder / "best_model.pth")
    for name in ("tmp", "tmp-killed"):
        (folder / name).mkdir()
    return folder


def count_runs(place):
    """In the server: a byte in the file `runs` for every run of the network; a proxy is set."""

    def counted(*arguments, **options):
        with open(place / "runs", "ab") as file:
            file.write(b".")
        while (place / "slow").exists():
            time.sleep(0.1)
        return run(*arguments, **options)

    run, models.predict_probabilities = models.predict_probabilities, counted
    os.chdir(place)
    os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    tempfile.tempdir = str(place / "tmp")
    gate.MAX_UPLOAD = LONGEST
    helpers.run_main = functools.partial(helpers.run_main, exit_at_once=True)


def wait_for_address(log, alive):
    """The address that a server writes to the file `log` once it listens."""
    said = []

    def listens():
        assert alive(), log.read_text()
        said[:] = re.findall(r"http://\S+", log.read_text() if log.exists() else "")
        return said

    wait_until(listens)
    return said[0]


def fork_server(place):
    log = place / "log"
    log.unlink(missing_ok=True)
    arguments = ("--page", "--port", 0, "--model", place / "best_model.pth", "--device", "cpu")
    process = fork_script("predict.py", *arguments, log=log, prepare=lambda: count_runs(place))
    return process, log


@pytest.fixture(scope="module")
def servers(place):
    """The addresses of the two, and the second's process. It listens on --host 127.0.0.2."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the page needs gradio: pip install gradio")
    log, connections = place / "killed.log", place / "connections"
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    command = ("-c", RUN_AND_NOTE, ROOT / "predict.py", connections, "--page", "--device", "cpu")
    command += ("--host", "127.0.0.2", "--port", port, "--model", "best_model.pth")
    killed = start_python(*command, cwd=place, log=log, TMPDIR="tmp-killed")
    import gradio  # noqa: F401  here, while the other process does it too: forks need not

    process, first_log = fork_server(place)
    try:
        address = wait_for_address(first_log, process.is_alive)
        yield SimpleNamespace(
            address=address,
            killed=killed,
            wait_for_killed=lambda: wait_for_address(log, lambda: killed.poll() is None),
            killed_address=f"http://127.0.0.2:{port}",
        )
    finally:
        process.kill()
        killed.kill()
        process.join()
        killed.wait()


@pytest.fixture(scope="module")
def browser(servers):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="a browser test: pip install playwright"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("a browser test: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=SANDBOX)
        yield chromium
        chromium.close()


class Tab:
    """A page in a browser context of its own."""

    def __init__(self, browser, address):
        self.hosts = set()
        self.page = browser.new_context(accept_downloads=True).new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.open(address)

    def open(self, address):
        self.page.goto(address)
        self.page.wait_for_selector("#examples img")

    def clear(self):
        self.page.locator("#files button[aria-label='Clear']").click()
        self.wait_for_text("Drop an image")

    def text(self):
        """The lines below the pictures, without the seconds that gradio shows meanwhile."""
        return "\n".join(self.page.locator("#text p").all_inner_texts())

    def upload(self, *paths):
        self.page.set_input_files("#files input[type=file]", [str(path) for path in paths])

    def wait_for_text(self, words):
        self._wait(lambda text: words in text)
        return self.text()

    def _wait(self, condition):
        self.wait_for(lambda: condition(self.text()))

    def predict(self, *paths, words=None):
        """Upload files; return the text once it has the words, by default the first's name."""
        self.upload(*paths)
        return self.wait_for_text(words or paths[0].name)

    def move_threshold(self, value):
        before = self.text()
        self.page.locator("#threshold input[type=range]").fill(str(value))
        self._wait(lambda text: text != before)

    def clean(self, text):
        """Type a clean-up."""
        before = self.table()
        self.page.locator("#clean textarea, #clean input").fill(text)
        self.page.keyboard.press("Enter")
        self.wait_for(lambda: self.table() != before)

    def table(self):
        """{name of a column: its text} of the first class of the picture that is shown."""
        cells = [self.page.locator(f"#table {kind}").all_inner_texts() for kind in ("th", "td")]
        return dict(zip(*cells, strict=False))

    def widths(self):
        """Pixels of the image, the mask and the two of the overlay, as the browser has them."""
        drawn = self.page.locator("#image img, #mask img, #overlay img")
        return drawn.evaluate_all("images => images.map(image => image.naturalWidth)")

    def wait_for(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.text()
            self.page.wait_for_timeout(20)

    def download(self, button="download"):
        """(name, bytes)"""
        with self.page.expect_download() as started:
            self.page.click(f"#{button}")
        return started.value.suggested_filename, Path(started.value.path()).read_bytes()


@pytest.fixture(scope="module")
def first_tab(browser, servers):
    return Tab(browser, servers.address)


@pytest.fixture
def tab(first_tab, servers):
    """The page as it is when it opens, which has to ask for nothing but what its own server has."""
    first_tab.open(servers.address)
    yield first_tab
    assert first_tab.hosts <= {"127.0.0.1", None, ""}, first_tab.hosts  # data: and blob: have none


def command_line(place, *arguments):
    """What predict.py prints."""
    flags = ("--model", place / "best_model.pth", "--device", "cpu")
    return assert_done(script_here("predict.py", *arguments, *flags, cwd=place))


def expected_mask(place, path, threshold=0.5):
    """(the line of predict.py, the bytes of the mask it writes) for one image."""
    written = place / "expected.png"
    said = command_line(place, path, "--output", written, "--threshold", threshold)
    line = next(line for line in said.splitlines() if path.name in line)
    return line.replace(f"{path.parent}{os.sep}", ""), written.read_bytes()


def runs(place):
    return (place / "runs").stat().st_size if (place / "runs").exists() else 0


# ---- in a browser ----------------------------------------------------------------------------


def test_an_image_gets_its_mask_and_the_threshold_moves_without_the_network(tab, place):
    path = place / "scan.png"
    scan(100, 80, 20, 15, 30).save(path)
    before = runs(place)
    assert "best_model.pth" in tab.page.title()
    assert "best_model.pth" in tab.page.inner_text("h1")
    assert "Not for clinical use" in tab.page.inner_text("#head")
    shares = []
    said = tab.predict(path)
    for threshold in (0.5, 0.9, 0.1):
        if threshold != 0.5:
            tab.move_threshold(threshold)
            said = tab.text()
        line, mask = expected_mask(place, path, threshold)
        assert said == line
        name, content = tab.download()
        assert (name, content) == ("scan_mask.png", mask)
        shares.append(np.asarray(Image.open(io.BytesIO(content))).mean())
    assert Image.open(io.BytesIO(content)).size == (100, 80)
    assert shares[1] < shares[0] < shares[2]
    assert runs(place) == before + 1
    assert tab.widths() == [100, 100, 100, 100]


def test_the_overlay_lies_on_the_image_and_the_wheel_zooms_into_both(tab, place):
    path = place / "zoomed.png"
    scan(100, 80, 20, 15, 30).save(path)
    tab.predict(path)
    below, above = tab.page.locator("#overlay img").all()
    image = tab.page.locator("#image img").get_attribute("src")
    assert below.get_attribute("src") == image != above.get_attribute("src")
    whole = below.bounding_box()
    above.hover()
    tab.page.mouse.wheel(0, -500)
    tab.wait_for(lambda: below.bounding_box()["width"] > 1.04 * whole["width"])
    tab.wait_for(lambda: below.bounding_box() == pytest.approx(above.bounding_box(), abs=0.5))


def test_an_example_is_one_click(tab, place):
    tab.page.locator("#examples button").first.click()
    said = tab.wait_for_text("highest probability")
    assert said.startswith("phantom_1.png: foreground ")
    assert tab.download()[0] == "phantom_1_mask.png"


def test_16_bits_and_a_photograph_of_12_megapixels(tab, place):
    rows = np.linspace(0, 40000, 60).astype(np.uint16)
    deep = place / "deep.png"
    Image.fromarray(np.repeat(rows[:, None], 50, axis=1)).save(deep)
    photograph = place / "photograph (1).jpg"
    scan(4000, 3000, 1000, 500, 1500).save(photograph, quality=90)
    for path in (deep, photograph):
        line, mask = expected_mask(place, path)
        assert tab.predict(path) == line
        assert tab.download() == (f"{path.stem}_mask.png", mask)
        assert tab.widths() == 4 * [min(Image.open(path).width, VIEW_SIDE)]
        tab.clear()


def test_what_is_no_image_gets_one_line_at_once(tab, place):
    before = runs(place)
    text, cut, bomb = place / "text.png", place / "cut.png", place / "bomb.png"
    text.write_text("This is not a picture.\n")
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (12000, 12000)).save(bomb)
    assert bomb.stat().st_size < 200_000
    for path, word in {text: "PNG", cut: "truncated", bomb: "144000000"}.items():
        started = time.monotonic()
        said = tab.predict(path)
        assert time.monotonic() - started < 15
        assert said.startswith(f"{path.name}: ") and word in said and "\n" not in said, said
        assert tab.page.locator("#download").is_disabled()
        assert tab.page.locator("#overlay img").count() == 0
        tab.clear()
    assert runs(place) == before
    assert "Traceback" not in (place / "log").read_text()


def test_two_browsers_at_once_get_their_own(tab, browser, servers, place):
    other, paths = Tab(browser, servers.address), (place / "browser0.png", place / "browser1.png")
    for path, side in zip(paths, (20, 50), strict=True):
        scan(90, 70, 10, 10, side).save(path)
    (line, mask), (other_line, other_mask) = (expected_mask(place, path) for path in paths)
    tab.upload(paths[0])
    other.upload(paths[1])
    assert (tab.wait_for_text("highest"), other.wait_for_text("highest")) == (line, other_line)
    assert tab.download() == ("browser0_mask.png", mask)
    tab.move_threshold(0.9)
    assert tab.download()[1] == expected_mask(place, paths[0], 0.9)[1]
    assert other.download() == ("browser1_mask.png", other_mask)
    other.page.context.close()


def unzip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written_files(folder):
    """{name: content} of a folder, but for the table."""
    paths = (path for path in folder.iterdir() if path.stem != "predictions")
    return {path.name: path.read_bytes() for path in paths}


def test_several_files_come_back_as_a_zip(tab, place):
    folder, bad = place / "scans", place / "bad.png"
    folder.mkdir()
    bad.write_text("no picture")
    for number, suffix in enumerate(("png", "jpg", "tif")):
        scan(60 + number, 50, 5 + 9 * number, 5, 25).save(folder / f"{number}.{suffix}")
    said = tab.predict(*sorted(folder.iterdir()), bad)
    assert said.splitlines()[0].startswith("0.png: foreground ")
    assert said.splitlines()[-1].startswith("bad.png: ")
    assert tab.page.inner_text("#download") == "Download 3 masks"
    tab.page.locator("#number input[type=range]").fill("3")
    tab.wait_for_text("2.tif: foreground ")
    name, content = tab.download()
    command_line(place, folder, "--output", place / "masks")
    assert name == "masks.zip" and unzip(content) == written_files(place / "masks")
    before = runs(place)
    tab.page.locator("#files button[aria-label='Remove this file']").last.click()
    assert tab.wait_for_text("0.png: foreground ").count("\n") == 0
    assert runs(place) == before + 3


def test_volumes_and_frames(tab, place):
    voxels = np.full((40, 30, 6), 20, np.int16)
    voxels[5:25, 5:20, 3] = 235
    inputs = place / "volumes"
    inputs.mkdir()
    paths = inputs / "brain.nii.gz", inputs / "frames.dcm"
    write_nifti(paths[0], voxels, zooms=(1, 1, 5))
    frames = np.stack([np.asarray(scan(40, 40, 5, 5, side)) for side in (10, 30)])
    write_dicom(paths[1], frames)
    said = tab.predict(paths[0])
    assert said.startswith("brain.nii.gz, slice 3: foreground ")  # the one with something in it
    command_line(place, paths[0], "--output", place / "volume-masks")
    assert unzip(tab.download()[1]) == written_files(place / "volume-masks")
    tab.clear()
    tab.predict(*paths, words="slice 0")
    assert tab.page.inner_text("#download") == "Download 8 masks"
    command_line(place, inputs, "--output", place / "volume-masks")
    assert unzip(tab.download()[1]) == written_files(place / "volume-masks")
    table = (place / "volume-masks" / "predictions.csv").read_bytes()
    assert_same_table(tab.download("csv")[1], table)


def assert_same_table(content, expected):
    """The bytes of two CSV files; a network rounds in another way where images come in batches."""
    rows, others = (
        list(csv.DictReader(text.decode().splitlines())) for text in (content, expected)
    )
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        for key in ("mean_probability", "highest_probability"):
            assert float(row.pop(key)) == pytest.approx(float(other.pop(key)), rel=1e-6)
        assert row == other


def test_table_switches_and_labelme_are_those_of_the_command_line(tab, place, tmp_path):
    folder, pixels = tmp_path / "scans", np.asarray(scan(96, 64, 40, 20, 30)).copy()
    folder.mkdir()
    pixels[2:11, 2:11] = 255  # a speck beside the square
    pixels[30:36, 50:56] = 20  # a hole in it
    Image.fromarray(pixels).save(folder / "one.png")
    Image.fromarray(pixels[:, ::-1].copy()).save(folder / "two.png")
    before = runs(place)
    tab.predict(*sorted(folder.iterdir()))
    assert tab.table()["pieces"] == "2"

    def expect(*flags):
        command_line(place, folder, "--output", tmp_path / "out", *flags)
        expected = written_files(tmp_path / "out")
        name, content = tab.download("csv")
        assert name == "predictions.csv"
        assert_same_table(content, (tmp_path / "out" / name).read_bytes())
        masks = unzip(tab.download()[1])
        assert masks == {name: expected[name] for name in masks} and len(masks) == 4

    expect("--no-tta")
    tab.clean("largest,fill")
    assert tab.table()["pieces"] == "1" and "agreement" not in tab.table()
    expect("--no-tta", "--clean", "largest,fill")
    assert runs(place) == before + 2
    tab.page.locator("#tta input").check()
    tab.wait_for(lambda: "agreement" in tab.table())
    assert runs(place) == before + 2 + 2 * 4  # each image as it is and three flips
    expect("--tta", "--clean", "largest,fill")
    command_line(
        place, folder, "--tta", "--clean=largest,fill", "--write=labelme", "--output", folder
    )
    name, content = tab.download("labelme")
    expected = {path.name: path.read_bytes() for path in folder.glob("o*.json")}
    expected |= {path.name: path.read_bytes() for path in folder.glob("t*.json")}
    assert (name, unzip(content)) == ("labelme.zip", expected)
    assert json.loads(expected["one.json"])["imagePath"] == "one.png"
    tab.clean("largst")
    assert "Clean-up" in tab.text() and "did you mean largest" in tab.text()
    assert tab.page.locator("#overlay img").count() == 0


# ---- the server ------------------------------------------------------------------------------


def connect(address):
    parts = urlsplit(address)
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)


def ask(address, method, path, body=None, **headers):
    """(status, body, the response)"""
    with contextlib.closing(connect(address)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response


def request(address, **headers):
    return ask(address, "GET", "/config", **headers)[0]


def test_other_hosts_and_origins_are_refused(servers):
    address = servers.address
    port = urlsplit(address).port
    assert request(address) == request(address, Origin=address) == 200
    assert request(address, Host=f"localhost:{port}") == 200
    assert request(address, Host=f"other.example:{port}") == 403
    for origin in ("http://other.example", f"http://127.0.0.1:{port + 1}", "null", "http://[x"):
        assert request(address, Origin=origin) == 403, origin


def medseg_folders(place, name):
    return list((place / name).glob("medseg-page-*"))


def test_sigterm_leaves_nothing_behind_and_nobody_was_told(browser, servers, place):
    assert servers.wait_for_killed() == servers.killed_address
    with pytest.raises(ConnectionRefusedError):  # --host 127.0.0.2 is that address alone
        request(servers.killed_address.replace("127.0.0.2", "127.0.0.1"))
    tab, path = Tab(browser, servers.killed_address), place / "last.png"
    scan(50, 50, 10, 10, 20).save(path)
    tab.predict(path)
    assert list(medseg_folders(place, "tmp-killed")[0].rglob("last.png"))
    servers.killed.send_signal(signal.SIGTERM)
    assert servers.killed.wait(20) == 128 + signal.SIGTERM
    assert list((place / "tmp-killed").iterdir()) == []
    assert (place / "killed.log").read_text().splitlines()[1:] == ["stopped by SIGTERM"]
    connections = place / "connections"
    assert not connections.exists() or not connections.read_text()
    assert tab.hosts <= {"127.0.0.2", None, ""}
    tab.page.context.close()


def test_ctrl_c_while_an_image_is_predicted(browser, servers, place, tmp_path):
    shutil.copy(place / "best_model.pth", tmp_path)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "slow").touch()
    scan(50, 50, 10, 10, 20).save(tmp_path / "scan.png")
    process, log = fork_server(tmp_path)
    try:
        tab = Tab(browser, wait_for_address(log, process.is_alive))
        tab.upload(tmp_path / "scan.png")
        wait_until(lambda: runs(tmp_path))
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == 128 + signal.SIGINT, log.read_text()
        assert list((tmp_path / "tmp").iterdir()) == []
        tab.page.context.close()
    finally:
        process.kill()


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    with server.open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "PORT", port)
        with server.open_socket("127.0.0.1") as following:
            assert port < following.getsockname()[1] < port + server.PORTS
        with pytest.raises(ValueError, match=f"--port {port}"):
            server.open_socket("127.0.0.1", port)


# ---- requests that no page makes ---------------------------------------------------------------


JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=edge"}


class Visitor:
    """Requests from outside of a browser, with the cookie that the page gives to one."""

    def __init__(self, address):
        self.address, self.headers = address, {}
        _, _, response = self.ask("GET", "/")
        self.headers["Cookie"] = response.getheader("set-cookie").partition(";")[0]
        self.config = json.loads(self.ask("GET", "/config")[1])
        self.types = {part["id"]: part["type"] for part in self.config["components"]}

    def ask(self, method, path, body=None, **headers):
        return ask(self.address, method, path, body, **{**self.headers, **headers})

    def post(self, path, value):
        return self.ask("POST", path, json.dumps(value), **JSON)

    def upload(self, name, content):
        """(status, the paths on the server or the line of a refusal)"""
        body = multipart(name, content)
        status, answer, _ = self.ask("POST", "/gradio_api/upload", body, **MULTIPART)
        return status, json.loads(answer) if status == 200 else answer.decode()

    def handlers(self):
        """{its id: (types of its inputs, name of what triggers it)} of all events of the page."""
        return {
            event["id"]: ([self.types[part] for part in event["inputs"]], event["targets"][0][1])
            for event in self.config["dependencies"]
            if event["backend_fn"]
        }

    def handler(self, trigger):
        """The first that is triggered so: the click is that on the masks."""
        return next(number for number, (_, name) in self.handlers().items() if name == trigger)

    def event(self, number, session="tab", event_data=None, **values):
        """Send one. values: of inputs, by type. Returns (status, answer)."""
        usual = {"slider": 0.5, "state": None, "file": None, "checkbox": False, "textbox": "none"}
        usual |= values
        data = [usual[name] for name in self.handlers()[number][0]]
        event = {"data": data, "fn_index": number, "session_hash": session}
        return self.post("/gradio_api/queue/join", {**event, "event_data": event_data})[:2]

    def result(self, session="tab"):
        """What the page answers to the last event, {"success": ..., "output": ...}."""
        path = f"/gradio_api/queue/data?session_hash={session}"
        with contextlib.closing(connect(self.address)) as connection:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            while line := response.readline():
                message = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if message.get("msg") in ("process_completed", "unexpected_error"):
                    return message
        pytest.fail(f"no answer: {response.status}")

    def predict(self, path):
        """Upload an image and predict it; return (its path on the server, what the page says)."""
        status, (there,) = self.upload(path.name, path.read_bytes())
        number = self.handler("upload")
        assert status == 200 and self.event(number, file=[file_data(there)])[0] == 200
        return there, self.result()["output"]["data"]


def multipart(name, content):
    head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--edge--\r\n"


def file_data(path):
    return {"path": str(path), "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def visitor(servers, place):
    yield Visitor(servers.address)
    assert "Traceback" not in (place / "log").read_text()


def secret_paths(place, visitor):
    """Names of a picture on the server, and of one that is not there, in every spelling."""
    secret = place / "secret.png"
    scan(50, 50, 10, 10, 20).save(secret)
    (folder,) = medseg_folders(place, "tmp")
    own = Path(visitor.upload("own.png", secret.read_bytes())[1][0]).parent
    for name in ("secret.png", "missing.png"):
        yield from (str(place / name), name, f"file://{place / name}", f"{own}/../../../{name}")
        up = "/".join([".."] * (len(own.parts) - len(place.parts)))
        yield from (f"{own}/{up}/{name}", f"{folder}/uploads/../../../{name}")
    yield from (str(folder / "phantom_1.png"), "http://127.0.0.1:9/x.png", "https://a.example/x")


def test_no_handler_reads_a_file_of_the_server(visitor, place):
    (own,) = visitor.upload("own.png", (place / "best_model.pth").read_bytes())[1]
    handlers = visitor.handlers()
    assert len(handlers) == 7
    answers = set()
    for path in secret_paths(place, visitor):
        for number, (inputs, _) in handlers.items():
            for name in inputs:
                for value in ([file_data(path)], file_data(path), {"x": [{"path": path}]}):
                    answers.add(visitor.event(number, **{name: value}))
            answers.add(visitor.event(number, event_data={"index": 0, "value": file_data(path)}))
    ((status, _),) = answers  # the same for what is there and what is not
    assert status == 403
    # What was uploaded is read, by the same request: it is no image.
    number = visitor.handler("upload")
    assert visitor.event(number, file=[file_data(own)])[0] == 200
    assert "own.png: " in str(visitor.result()["output"]["data"])


ROUTES = """GET file=PATH|GET file/PATH|HEAD file=PATH|GET proxy=PATH|GET proxy=http://127.0.0.1:9/
GET file=http://127.0.0.1:9/|GET /config?deep_link=PATH|GET stream/tab/0/1/playlist-file
GET /static/PATH|GET /assets/PATH|GET /static/../PATH|GET /assets/%2e%2e/%2e%2e/PATH
GET custom_component/1/client/component/PATH|GET deep_link?session_hash=tab|GET /svelte/PATH
GET info|GET openapi.json|GET /openapi.json|GET /docs|GET /monitoring|GET /monitoring/summary
GET runs|GET run-history/records|GET vibe-code|GET queue/status|GET app_id|GET token|GET user
GET dev/reload|GET profiling/summary|GET /pwa_icon|GET /manifest.json|GET call/predict/1
POST run/predict|POST run/predict/|POST api/predict|POST call/predict|POST call/v2/predict
POST component_server|POST stream/1|POST reset|POST cancel|POST process_recording|POST /login
POST vibe-edit|POST vibe-code|POST undo-vibe-edit|POST vibe-starter-queries|PUT queue/join"""


def test_no_other_address_gives_a_file_away(visitor, place):
    number = visitor.handler("upload")
    scan(50, 50, 10, 10, 20).save(place / "secret.png")
    for route in ROUTES.replace("\n", "|").split("|"):
        answers = []
        for path in (place / "secret.png", place / "missing.png"):
            method, address = route.replace("PATH", str(path)).split(" ")
            address = address if address.startswith("/") else f"/gradio_api/{address}"
            given = [[file_data(path)], 0.5, False, "none"]
            event = {"data": given, "fn_index": number, "session_hash": "tab"}
            event.update(component_id=1, fn_name="x", api_name="predict")
            body = None if method in ("GET", "HEAD") else json.dumps(event)
            status, content, _ = visitor.ask(method, address, body, **JSON)
            answers.append((status, content.replace(path.name.encode(), b"")))
        assert answers[0] == answers[1], route  # nor whether it is there
        if not route.startswith("GET /config"):
            assert answers[0][0] in (403, 404, 405), route


def test_without_the_cookie_there_is_nothing(visitor, place):
    there, _ = visitor.predict(place / "secret.png")
    visitor.headers = {}
    for cookie in (None, "medseg-browser=shared", "medseg-browser=../x", "medseg-browser="):
        headers = {"Cookie": cookie} if cookie else {}
        for route in (f"GET file={there}", "POST queue/join", "POST upload"):
            method, address = route.split(" ")
            assert visitor.ask(method, f"/gradio_api/{address}", None, **headers)[0] == 403


def test_a_browser_gets_nothing_of_another(visitor, servers, place):
    scan(50, 50, 10, 10, 20).save(place / "secret.png")
    there, said = visitor.predict(place / "secret.png")
    files = list(set(re.findall(r'"path": ?"([^"]+)"', json.dumps(said))))
    assert visitor.event(visitor.handler("click"))[0] == 200
    files.append(visitor.result()["output"]["data"][0]["path"])
    other = Visitor(servers.address)
    for path in (there, *files):
        assert visitor.ask("GET", f"/gradio_api/file={path}")[0] == 200, path
        assert other.ask("GET", f"/gradio_api/file={path}")[0] == 403, path
        assert other.event(other.handler("upload"), file=[file_data(path)])[0] == 403
    assert len(files) == 4
    examples = re.findall(r'"path": ?"([^"]+/shared/[^"]+)"', json.dumps(other.config))
    assert len(examples) == 4
    assert all(other.ask("GET", f"/gradio_api/file={path}")[0] == 200 for path in examples)
    # The other's tab may have the same name: it is another session, which has predicted nothing.
    assert other.event(other.handler("click"))[0] == 200
    assert other.result()["output"]["data"] == [None]
    mine = visitor.headers["Cookie"].partition("=")[2]
    assert other.event(other.handler("click"), session=f"{mine}tab")[0] == 200
    assert other.result(f"{mine}tab")["output"]["data"] == [None]
    for session in ("", "tab/..", None, ["tab"], "x" * 100):
        assert other.event(other.handler("click"), session=session)[0] == 400
    for session in ("", "tab/..", "x" * 100):
        for address in (f"queue/data?session_hash={session}", f"heartbeat/{session}"):
            assert other.ask("GET", f"/gradio_api/{address}")[0] == 400


def test_events_with_values_that_no_page_sends(visitor, place):
    """Not one of them is a picture, an end of the page, or a traceback."""
    select, change = visitor.handler("select"), visitor.handler("change")
    for index in (-1, 4, 99, 0.0, True, "0", None, [0], {"x": 1}):
        assert visitor.event(select, event_data={"index": index, "value": None})[0] == 200
        assert not visitor.result()["success"], index
    assert visitor.event(select, event_data={"index": 1, "value": None})[0] == 200
    assert "phantom_2.png: foreground" in str(visitor.result()["output"]["data"])
    assert len(visitor.config["dependencies"][change]["inputs"]) == 4
    for picture in (1, 2):  # the slider of the pictures goes to 2 where there is one
        given = ["forged", picture, 0.5, "none"]
        event = {"data": given, "fn_index": change, "session_hash": "tab"}
        assert visitor.post("/gradio_api/queue/join", event)[0] == 200
        assert "phantom_2.png: foreground" in str(visitor.result()["output"]["data"])
    for body in (b"", b"[]", b"{", b"[" * 100_000, b'{"data": []}', b"\xff"):
        assert visitor.ask("POST", "/gradio_api/queue/join", body, **JSON)[0] == 400, body[:20]


# ---- uploads ---------------------------------------------------------------------------------


def begin_upload(visitor, *headers, name="upload"):
    """A socket that has sent the head of an upload."""
    address = urlsplit(visitor.address)
    opened = socket.create_connection((address.hostname, address.port), SECONDS)
    lines = [f"POST /gradio_api/{name} HTTP/1.1", f"Host: {address.netloc}"]
    lines += [f"Cookie: {visitor.headers['Cookie']}", *headers]
    lines.append("Content-Type: multipart/form-data; boundary=edge")
    opened.sendall("\r\n".join([*lines, "", ""]).encode())
    return opened


def uploaded_files(place):
    (folder,) = medseg_folders(place, "tmp")
    return {
        os.path.join(root, name)
        for root, _, names in os.walk(folder / "uploads")  # which may lose folders meanwhile
        for name in names
    }


@pytest.mark.parametrize("head", ["Content-Length: 5000000", "Transfer-Encoding: chunked"])
def test_an_aborted_upload_leaves_no_file(visitor, place, head):
    body = multipart("aborted.png", bytes(3_000_000))[:2_000_000]
    if "chunked" in head:
        body = b"200000\r\n" + body
    visitor.upload("whole.png", b"x")  # which stays
    before = uploaded_files(place)
    with begin_upload(visitor, head) as opened:
        opened.sendall(body)
        wait_until(lambda: uploaded_files(place) != before)
    wait_until(lambda: uploaded_files(place) == before)
    with begin_upload(visitor, head, name="queue/join") as opened:
        opened.sendall(body[:1000])
    time.sleep(0.2)  # the fixture looks for a traceback
    assert visitor.upload("next.png", b"x")[0] == 200


def test_an_upload_of_3_gb_is_refused_at_once(visitor, place):
    assert 2e9 < gate.MAX_UPLOAD < 3e9
    before, started = uploaded_files(place), time.monotonic()
    for claim in ("3000000000", str(LONGEST + 1), "9" * 30):
        with begin_upload(visitor, f"Content-Length: {claim}") as opened:
            assert re.match(rb"HTTP/1.1 4(13|00) ", opened.recv(1000)), claim  # with no body sent
    with begin_upload(visitor, "Content-Length: 3000000000", name="queue/join") as opened:
        assert b" 413 " in opened.recv(1000)
    assert time.monotonic() - started < 10
    with begin_upload(visitor, "Transfer-Encoding: chunked") as opened:
        opened.sendall(b"%x\r\n" % (2 * LONGEST) + multipart("endless.png", b""))
        with contextlib.suppress(ConnectionError):  # the server stops to listen
            for _ in range(2 * LONGEST // 100_000):
                opened.sendall(bytes(100_000))
            assert b" 413 " in opened.recv(1000)
    wait_until(lambda: uploaded_files(place) == before)
    status, (path,) = visitor.upload("large.png", bytes(LONGEST - 1000))
    assert status == 200 and Path(path).stat().st_size == LONGEST - 1000


def test_what_is_no_upload_is_refused(visitor, place):
    before, whole = uploaded_files(place), multipart("x.png", b"content")
    field = b'--edge\r\nContent-Disposition: form-data; name="files"\r\n\r\n'
    many = b"".join(multipart(f"{number}.png", b"")[:-10] for number in range(1001)) + b"--edge--"
    for body in (b"", b"x", whole[:-12], whole[:40], field + b"x\r\n--edge--\r\n", many):
        assert visitor.ask("POST", "/gradio_api/upload", body, **MULTIPART)[0] == 400, body[:60]
    plain, boundary = "multipart/form-data", "multipart/form-data; boundary=" + "x" * 999
    for content_type in ("", "text/plain", plain, boundary):
        headers = {"Content-Type": content_type}
        assert visitor.ask("POST", "/gradio_api/upload", whole, **headers)[0] == 400, content_type
    wait_until(lambda: uploaded_files(place) == before)


def test_names_of_uploads_stay_in_their_folder(visitor):
    names = {
        **{"../../../x.png": "x.png", "C:\\\\scans\\\\a.png": "a.png", "scans\\\\b.png": "b.png"},
        **{"..": "file", "": "file", ".png": "png", "a\u0000b.png": "ab.png"},
        "brain (1) \u00e4.nii.gz": "brain (1) \u00e4.nii.gz",
        **{"n" * 300 + ".dcm": "n" * 196 + ".dcm", "x" * 300: "x" * 200},
    }
    for given, kept in names.items():
        status, (path,) = visitor.upload(given, b"content")
        assert status == 200 and Path(path).name == kept, given
        assert Path(path).read_bytes() == b"content"


def test_an_upload_is_deleted_when_it_was_kept_long_enough(tmp_path, monkeypatch):
    pytest.importorskip("python_multipart", reason="it comes with gradio: pip install gradio")
    monkeypatch.setattr(gate, "KEPT", 0.2)
    messages = [{"type": "http.request", "body": multipart("x.png", b"content")}]
    headers = [(b"content-type", b"multipart/form-data; boundary=edge")]
    headers.append((b"cookie", b"medseg-browser=" + b"a" * 32))
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}
    sent, contents = [], []

    async def upload():
        async def receive():
            return messages.pop()

        async def send(message):
            sent.append(message)

        await gate.Gate(None, tmp_path)({**scope, "query_string": b""}, receive, send)
        for _ in range(2):
            contents.append([path.read_bytes() for path in tmp_path.rglob("x.png")])
            await asyncio.sleep(0.4)

    with ThreadPoolExecutor() as threads:  # playwright has an event loop in this one
        threads.submit(asyncio.run, upload()).result()
    assert sent[0]["status"] == 200 and contents == [[b"content"], []]


def test_progress_of_an_upload_is_told_to_its_browser_alone(visitor, servers):
    body, other = multipart("slow.png", bytes(5_000_000)), Visitor(servers.address)
    path = "/gradio_api/upload_progress?upload_id=one"
    head = f"Content-Length: {len(body)}"
    with begin_upload(visitor, head, name="upload?upload_id=one") as opened:
        opened.sendall(body[:3_000_000])
        connection = connect(visitor.address)
        connection.request("GET", path, headers=visitor.headers)
        response, sizes = connection.getresponse(), []
        while not sizes:
            line = response.readline()
            sizes += re.findall(rb'"orig_name": "slow.png", "chunk_size": (\d+)', line)
        assert other.ask("GET", path)[0] == 404
        opened.sendall(body[3_000_000:])
        rest = response.read()
        connection.close()
    sizes += re.findall(rb'"chunk_size": (\d+)', rest)
    assert sum(map(int, sizes)) == 5_000_000 and len(sizes) > 1
    assert rest.strip().endswith(b'{"msg": "done"}')


# ---- refusals, and what needs no browser -----------------------------------------------------


@pytest.fixture
def gradio_settings(monkeypatch):
    """What a test sets of them is undone."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")


def refused_page(place, *arguments, words):
    result = script_here("predict.py", "--page", "--device", "cpu", *arguments, cwd=place)
    assert_refused(result, *words)


@pytest.mark.usefixtures("gradio_settings")
def test_refusals(place, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    before = medseg_folders(place, "tmp")
    refused_page(place, "scan.png", words=["--page"])
    refused_page(place, "--output", "masks", words=["--output"])
    refused_page(place, "--model", "nothing.pth", words=["nothing.pth"])
    refused_page(place, "--host", "192.0.2.1", words=["--host 192.0.2.1"])
    refused_page(place, "--port", "70000", words=["--port"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused_page(place, "--port", 0, words=["`pip install gradio`"])
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0.2"))
    refused_page(place, "--port", 0, words=["6.0.2", "`pip install -U gradio`"])
    assert medseg_folders(place, "tmp") == before


def test_importing_the_page_imports_neither_gradio_nor_torch():
    code = "import sys, medseg.page.app; print({'torch', 'gradio', 'uvicorn'} & set(sys.modules))"
    assert assert_done(run_python("-c", code, cwd=ROOT)) == "set()\n"


class TwoClasses(models.Model):
    """A predictor whose probabilities are the red and the green of the image."""

    image_size, n_channels, orientation = None, 3, None
    class_names, trained_flips = ("red <b>", "green"), ()

    def __init__(self):
        pass

    def probabilities(self, pixels):
        assert pixels.dtype == np.uint8
        return np.moveaxis(pixels[..., :2] / np.float32(255), 3, 1)


def test_several_classes_have_a_legend_and_an_image_may_keep_its_size(tmp_path):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, 10:30, 0], pixels[:, 20:40, 1] = 180, 200
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    gradio = SimpleNamespace(Slider=lambda **given: given, Button=lambda *label, **given: given)
    page = Page(gradio, TwoClasses(), tmp_path, 0.5, None)
    session, number, *buttons, image, mask, pair, text, table = page.predict(
        [tmp_path / "rgb.png"], 0.5, False, "none", lambda done, title: None
    )
    probabilities = np.moveaxis(pixels[..., :2] / np.float32(255), 2, 0)
    labels = full_size_labels(probabilities, (50, 30), 0.5)
    assert [(labels == number).sum() for number in (1, 2)] == [300, 600]
    save_mask(labels, tmp_path / "expected.png", TwoClasses.class_names)
    assert session.write(0.5).read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert [one.size for one in (image, mask, *pair)] == 4 * [(50, 30)] and pair[0] is image
    assert "red &lt;b&gt; 20.00 % above 0.5, highest probability 0.706" in text
    assert text.count("<i style=") == 2 and "rgb(230, 159, 0)" in text
    assert np.asarray(mask)[0, 15].tolist() == [230, 159, 0]  # as in the legend
    assert "red &lt;b&gt;</td><td>300</td><td>0.2</td>" in table
    assert not number["visible"] and all(button["interactive"] for button in buttons)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_session_shows_and_writes_photographs_as_they_are_shown(tmp_path, orientation):
    shown = np.array(scan(64, 40, 3, 5, 12))
    save_turned(shown, tmp_path / "a.jpg", orientation, quality=100)
    session = Session(tmp_path, ("foreground",))
    session.predict(
        [tmp_path / "a.jpg"],
        lambda image: (np.asarray(image.convert("L"), np.float32)[None] / 255, Assessment()),
    )
    view, mask = session.view(0, 0.5), np.asarray(Image.open(session.write(0.5)))
    for picture in (view.image.convert("L"), view.mask.convert("L"), mask):
        np.testing.assert_array_equal(np.asarray(picture) > 100, shown > 100)
    labelme = json.loads(session.labelme(0.5).read_text())
    assert (labelme["imageWidth"], labelme["imageHeight"]) == (64, 40)
    points = np.array(labelme["shapes"][0]["points"]).round()
    assert (abs(points - (9, 11)) <= 6).all() and session.problems == []


def test_uploads_of_one_name_are_told_apart(tmp_path):
    """scan.png three times, once as a JPEG: the masks are of squares of different sides."""
    sides = {"0/scan.png": 8, "1/scan.png": 12, "2/scan.jpg": 16, "3/other.png": 20}
    for name, side in sides.items():
        (tmp_path / name).parent.mkdir()
        scan(64, 40, 3, 5, side).save(tmp_path / name)
    session = Session(tmp_path, ("foreground",))
    session.predict(
        [tmp_path / name for name in sides],
        lambda image: (np.asarray(image.convert("L"), np.float32)[None] / 255, Assessment()),
    )
    assert session.problems == [] and len(session.predictions) == 4
    assert len({one.frame.title for one in session.predictions}) == 4
    with zipfile.ZipFile(session.write(0.5)) as archive:
        masks = [name for name in archive.namelist() if name.endswith("_mask.png")]
        areas = [np.count_nonzero(Image.open(archive.open(name))) for name in masks]
    assert sorted(areas) == [64, 144, 256, 400]
    with zipfile.ZipFile(session.labelme(0.5)) as archive:
        assert len([name for name in archive.namelist() if name.endswith(".json")]) == 4
    assert len(session.table(0.5).read_text().splitlines()) == 5


@pytest.mark.parametrize("threshold, first", [(0.2, 1), (0.5, 1), (0.8, 2)])
def test_what_a_session_writes_is_cut_at_the_threshold(tmp_path, threshold, first):
    """The probability of a voxel or pixel is its value / 255, and each value is counted by hand."""
    counts = {100: 6, 160: 24, 240: 12}
    voxels = np.full((8, 6, 4), 10, np.int16)
    voxels[:6, :1, 0], voxels[:6, :4, 1], voxels[:6, :2, 2] = 100, 160, 240
    write_nifti(tmp_path / "v.nii.gz", voxels, zooms=(1, 1, 5))
    pixels = np.full((1500, 2400), 10, np.uint8)
    for row, (value, count) in enumerate(counts.items()):
        pixels[100 * row, :count] = value
    Image.fromarray(pixels).save(tmp_path / "large.png")
    expected = sum(count for value, count in counts.items() if value / 255 > threshold)

    def assess(image):
        return np.asarray(image.convert("L"), np.float32)[None] / 255, Assessment()

    def predict(*names):
        session = Session(tmp_path, ("foreground",), (127.5, 255))
        session.predict([tmp_path / name for name in names], assess)
        assert session.problems == []
        return session

    session = predict("v.nii.gz")
    assert session.first(threshold) == first
    for index, (value, count) in enumerate(counts.items()):
        above = (count if value / 255 > threshold else 0) / 48
        assert f"foreground {100 * above:.2f} %" in session.view(index, threshold).line
        assert np.asarray(session.view(index, threshold).mask).mean() == 255 * above
    both = predict("v.nii.gz", "large.png")
    assert both.first(threshold) == 0
    assert both.view(4, threshold).image.size == (VIEW_SIDE, 1280)
    for one in (session, both):
        with zipfile.ZipFile(one.write(threshold)) as archive:
            archive.extractall(tmp_path / "written")
        mask = np.asarray(nibabel.load(tmp_path / "written" / "v_mask.nii.gz").dataobj)
        assert mask.shape == (8, 6, 4) and np.count_nonzero(mask) == expected
    mask = np.asarray(Image.open(tmp_path / "written" / "large_mask.png"))
    assert mask.shape == (1500, 2400) and np.count_nonzero(mask) == expected
    drawn = np.asarray(Image.open(tmp_path / "written" / "large_overlay.jpg")).astype(int)
    assert np.count_nonzero(np.ptp(drawn, 2) > 40) == expected  # the rest stays grey


@pytest.mark.usefixtures("gradio_settings")
def test_behind_the_gate_gradio_reads_uploads_only(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    from starlette.testclient import TestClient

    monkeypatch.chdir(tmp_path)
    gradio, uploads = import_gradio(tmp_path), tmp_path / "uploads"
    page = Page(gradio, TwoClasses(), uploads, 0.5, None)
    app, answers = make_app(gradio, layout(page, "", example_images(tmp_path))), []
    (uploads / "x").mkdir()
    with TestClient(app) as client:
        for number, path in enumerate((uploads / "x" / "own.png", tmp_path / "secret.png")):
            scan(50, 50, 10, 10, 20).save(path)
            session = f"{number:032x}tab"
            given = [[file_data(path)], 0.5, False, "none"]
            event = {"data": given, "fn_index": 0, "session_hash": session}
            assert client.post("/gradio_api/queue/join", json=event).status_code == 200
            answers.append(client.get(f"/gradio_api/queue/data?session_hash={session}").text)
    share = "red &lt;b&gt; 16.00 %"
    assert share in answers[0]
    assert share not in answers[1] and '"success":false' in answers[1]


def test_a_session_takes_its_folder_with_it(tmp_path):
    session = Session(tmp_path, ("foreground",))
    assert len(list(tmp_path.iterdir())) == 1
    del session
    assert list(tmp_path.iterdir()) == []


def test_many_problems_are_few_lines_of_safe_text():
    text = text_html(["{{x}} ${y} <b>"], [f"{number}.png: bad" for number in range(8)])
    assert text.count('class="problem"') == 6 and "and 3 more" in text
    assert "{" not in text and "$" not in text and "<b>" not in text


def test_examples_are_of_the_data_set_or_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in example_images(tmp_path)][0] == "phantom_1.png"
    folder = tmp_path / "dataset" / "test"
    folder.mkdir(parents=True)
    for number in range(9):
        Image.new("L", (9, 9)).save(folder / f"{number}.png")
    assert [path.name for path in example_images(tmp_path)] == ["0.png", "3.png", "6.png"]
