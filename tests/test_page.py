"""The page: what it shows, refuses and hands back in a headless Chromium; what it leaves behind.

Two servers run for all tests. One is a fork of this process, which counts the runs of the network;
the other is a process of its own, which notes every connection it makes.
"""

import functools
import http.client
import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, fork_script, script_here
from PIL import Image
from test_predict import brightness_model, scan

import predict
from medseg import local_server
from medseg.images import full_size_labels, save_mask
from medseg.page import Page, example_images, text_html
from medseg.session import Session

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SANDBOX = ("--no-sandbox", "--disable-dev-shm-usage")  # as root and in a container there is none
SECONDS = 60  # at most, for anything, on a busy machine
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

    run, predict.predict_probabilities = predict.predict_probabilities, counted
    os.chdir(place)
    os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    tempfile.tempdir = str(place / "tmp")
    conftest.run_main = functools.partial(conftest.run_main, exit_at_once=lambda: True)


def wait_for_address(log, alive):
    """The address that a server writes to the file `log` once it listens."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and alive():
        said = re.search(r"http://\S+", log.read_text() if log.exists() else "")
        if said:
            return said[0]
        time.sleep(0.05)
    pytest.fail(f"no page:\n{log.read_text()}")


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
    command = ["--page", "--host", "127.0.0.2", "--port", port, "--model", "best_model.pth"]
    with open(log, "w") as output:
        killed = subprocess.Popen(
            [sys.executable, "-c", RUN_AND_NOTE, ROOT / "predict.py", connections]
            + [*map(str, command), "--device", "cpu"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": "tmp-killed"},
            stdout=output,
            stderr=output,
        )
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
        deadline = time.monotonic() + SECONDS
        while not condition(self.text()):
            assert time.monotonic() < deadline, self.text()
            self.page.wait_for_timeout(20)

    def predict(self, *paths, words=None):
        """Upload files; return the text once it has the words, by default the first's name."""
        self.upload(*paths)
        return self.wait_for_text(words or f"{paths[0].name}")

    def move_threshold(self, value):
        before = self.text()
        self.page.locator("#threshold input[type=range]").fill(str(value))
        self._wait(lambda text: text != before)

    def download(self):
        """(name, bytes)"""
        with self.page.expect_download() as started:
            self.page.click("#download")
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
    result = script_here(
        "predict.py", *arguments, "--model", place / "best_model.pth", "--device", "cpu", cwd=place
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


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
    for name in ("image", "mask", "overlay"):
        assert tab.page.locator(f"#{name} img").evaluate("image => image.naturalWidth") == 100


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
        tab.clear()


def write_bad_files(place):
    """{path: words of its line}"""
    text, cut, bomb = place / "text.png", place / "cut.png", place / "bomb.png"
    text.write_text("This is not a picture.\n")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (12000, 12000)).save(bomb)
    assert bomb.stat().st_size < 200_000
    return {text: "not a JPEG, PNG", cut: "truncated", bomb: "144000000 pixels"}


def test_what_is_no_image_gets_one_line_at_once(tab, place):
    before = runs(place)
    for path, words in write_bad_files(place).items():
        started = time.monotonic()
        said = tab.predict(path)
        assert time.monotonic() - started < 15
        assert said.startswith(f"{path.name}: ") and words in said and "\n" not in said, said
        assert tab.page.locator("#download").is_disabled()
        assert tab.page.locator("#overlay img").count() == 0
        tab.clear()
    assert runs(place) == before
    assert "Traceback" not in (place / "log").read_text()


def test_two_browsers_at_once_get_their_own(tab, browser, servers, place):
    tabs, lines, masks, paths = [tab, Tab(browser, servers.address)], [], [], []
    for number, side in enumerate((20, 50)):
        paths.append(place / f"browser{number}.png")
        scan(90, 70, 10, 10, side).save(paths[-1])
        line, mask = expected_mask(place, paths[-1])
        lines.append(line)
        masks.append((f"browser{number}_mask.png", mask))
    for one, path in zip(tabs, paths, strict=True):
        one.upload(path)
    assert [one.wait_for_text("highest") for one in tabs] == lines
    assert [one.download() for one in tabs] == masks
    tabs[0].move_threshold(0.9)
    assert tabs[0].download()[1] == expected_mask(place, paths[0], 0.9)[1]
    assert tabs[1].download() == masks[1]
    tabs[1].page.context.close()


def unzip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_files_come_back_as_a_zip(tab, place):
    folder, bad = place / "scans", place / "bad.png"
    folder.mkdir()
    bad.write_text("no picture")
    for number, suffix in enumerate(("png", "jpg", "tif")):
        scan(60 + number, 50, 5 + 9 * number, 5, 25).save(folder / f"{number}.{suffix}")
    said = tab.predict(*sorted(folder.iterdir()), bad)
    assert said.splitlines()[0].startswith("0.png: foreground ")
    assert said.splitlines()[-1].startswith("bad.png: not a JPEG, PNG")
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
    volumes = pytest.importorskip("test_volumes")
    voxels = np.full((40, 30, 6), 20, np.int16)
    voxels[5:25, 5:20, 3] = 235
    inputs = place / "volumes"
    inputs.mkdir()
    paths = inputs / "brain.nii.gz", inputs / "frames.dcm"
    volumes.write_nifti(paths[0], voxels, zooms=(1, 1, 5))
    frames = np.stack([np.asarray(scan(40, 40, 5, 5, side)) for side in (10, 30)])
    volumes.write_dicom(paths[1], frames)
    said = tab.predict(paths[0])
    assert said.startswith("brain.nii.gz, slice 3: foreground ")  # the one with something in it
    command_line(place, paths[0], "--output", place / "volume-masks")
    assert unzip(tab.download()[1]) == written_files(place / "volume-masks")
    tab.clear()
    tab.predict(*paths, words="slice 0")
    assert tab.page.inner_text("#download") == "Download 8 masks"
    command_line(place, inputs, "--output", place / "volume-masks")
    assert unzip(tab.download()[1]) == written_files(place / "volume-masks")


# ---- the server ------------------------------------------------------------------------------


def request(address, **headers):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)
    connection.request("GET", "/config", headers=headers)
    status = connection.getresponse().status
    connection.close()
    return status


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
        deadline = time.monotonic() + SECONDS
        while not runs(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.join(20)
        assert process.exitcode == 128 + signal.SIGINT, log.read_text()
        assert list((tmp_path / "tmp").iterdir()) == []
        tab.page.context.close()
    finally:
        process.kill()


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    with local_server.open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(local_server, "PORT", port)
        with local_server.open_socket("127.0.0.1") as following:
            assert port < following.getsockname()[1] < port + local_server.PORTS
        with pytest.raises(ValueError, match=f"--port {port}: another program listens there"):
            local_server.open_socket("127.0.0.1", port)


# ---- refusals, and what needs no browser -----------------------------------------------------


def refused_page(place, *arguments, words):
    result = script_here("predict.py", "--page", "--device", "cpu", *arguments, cwd=place)
    assert_refused(result, *words)


def test_refusals(place, monkeypatch):
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set here is undone
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    before = medseg_folders(place, "tmp")
    refused_page(place, "scan.png", words=["--page takes no images"])
    refused_page(place, "--output", "masks", words=["--output"])
    refused_page(place, "--model", "nothing.pth", words=["nothing.pth"])
    refused_page(place, "--host", "192.0.2.1", words=["--host 192.0.2.1"])
    refused_page(place, "--port", "70000", words=["--port"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused_page(place, "--port", 0, words=["the page needs gradio: run `pip install gradio`"])
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0.2"))
    refused_page(place, "--port", 0, words=["6.0.2", "run `pip install -U gradio`"])
    assert medseg_folders(place, "tmp") == before


def test_importing_the_page_imports_neither_gradio_nor_torch():
    code = "import sys, medseg.page; print({'torch', 'gradio', 'uvicorn'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS
    )
    assert result.stdout == "set()\n", result.stderr


class TwoClasses:
    """A predictor whose probabilities are the red and the green of the image."""

    image_size, n_channels, class_names = None, 3, ("red <b>", "green")

    def probabilities(self, pixels):
        assert pixels.dtype == np.uint8
        return np.moveaxis(pixels[..., :2] / np.float32(255), 3, 1)


def test_several_classes_have_a_legend_and_an_image_may_keep_its_size(tmp_path):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, 10:30, 0], pixels[:, 20:40, 1] = 180, 200
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    gradio = SimpleNamespace(Slider=lambda **given: given, Button=lambda label, **given: given)
    page = Page(gradio, TwoClasses(), tmp_path, 0.5, None)
    session, number, button, image, mask, tinted, text = page.predict(
        [tmp_path / "rgb.png"], 0.5, lambda done: None
    )
    probabilities = np.moveaxis(pixels[..., :2] / np.float32(255), 2, 0)
    labels = full_size_labels(probabilities, (50, 30), 0.5)
    assert [(labels == number).sum() for number in (1, 2)] == [300, 600]
    save_mask(labels, tmp_path / "expected.png", TwoClasses.class_names)
    assert session.write(0.5).read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert image.size == mask.size == tinted.size == (50, 30)
    assert "red &lt;b&gt; 20.00 %, highest probability 0.706" in text
    assert text.count("<i style=") == 2 and "rgb(230, 159, 0)" in text
    assert np.asarray(mask)[0, 15].tolist() == [230, 159, 0]  # as in the legend
    assert not number["visible"] and button["interactive"]


def test_a_session_takes_its_folder_with_it(tmp_path):
    session = Session(tmp_path, ("foreground",))
    assert len(list(tmp_path.iterdir())) == 1
    del session
    assert list(tmp_path.iterdir()) == []


def test_names_are_told_apart_and_many_problems_are_few_lines(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("L", (9, 9)).save(tmp_path / folder / "scan.png")
    session = Session(tmp_path, ("foreground",))
    session.predict([tmp_path / "a" / "scan.png", tmp_path / "b" / "scan.png"], None)
    assert session.problems[0].startswith("scan.png and scan.png would both become scan_mask")
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
