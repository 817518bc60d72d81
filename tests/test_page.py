"""The page: what it shows, refuses and hands back in a headless Chromium; what it leaves behind.

Servers are forks of this process that count the images which the network gets, and note every
connection that they make.
"""

import contextlib
import csv
import http.client
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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import helpers
import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    assert_done,
    assert_refused,
    brightness_model,
    fork_script,
    scan,
    script_here,
    wait_until,
    write_dicom,
    write_nifti,
)
from PIL import Image

from medseg.drawing import overlay
from medseg.images import save_mask
from medseg.predicting import page
from medseg.predicting.inputs import EXAMPLE, learned_images
from medseg.predictor import Prediction, Predictor
from medseg.weights import pretrained_path
from net import ModelInfo

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SANDBOX = ("--no-sandbox", "--disable-dev-shm-usage")  # as root and in a container there is none
SECONDS = 60  # at most, for anything, on a busy machine
LONGEST = 20_000_000  # bytes of an upload, in the servers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run's best_model.pth and last.pth, its data, and one for temporary files."""
    folder = tmp_path_factory.mktemp("page")
    torch.save(brightness_model().state_dict(), folder / "best_model.pth")
    torch.save({"flags": {"data": str(folder / "own"), "synthetic": False}}, folder / "last.pth")
    (folder / "own" / "test").mkdir(parents=True)
    for number in range(9):
        scan(60, 50, 5, 5, 10 + number).save(folder / "own" / "test" / f"{number}.png")
    return folder


def prepare(place):
    """In a server: what the tests look at; a proxy is set."""

    def counted(*arguments):
        with open(place / "runs", "ab") as file:
            file.write(b".")
        while (place / "slow").exists():
            time.sleep(0.1)
        return predict(*arguments)

    def note(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            with open(place / "connections", "a") as file:
                file.write(f"{args}\n")

    predict, Predictor.predict = Predictor.predict, counted
    os.chdir(place)
    os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    os.environ["GRADIO_NUM_WORKERS"] = "1"  # of another page
    (place / "tmp").mkdir()
    tempfile.tempdir = str(place / "tmp")
    page.MAX_UPLOAD = LONGEST
    helpers.run_main = partial(helpers.run_main, exit_at_once=True)
    sys.addaudithook(note)


@contextlib.contextmanager
def served(place, *arguments):
    """The address of a server with the weights in `place`, its process and its log."""
    # Imported here, so that the forks need not.
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    log, addresses = place / "log", []
    arguments = ("--page", "--model", place / "best_model.pth", "--device", "cpu", *arguments)
    process = fork_script("predict.py", *arguments, log=log, prepare=lambda: prepare(place))

    def listens():
        assert process.is_alive(), log.read_text()
        addresses[:] = re.findall(r"http://\S+", log.read_text() if log.exists() else "")
        return addresses

    try:
        wait_until(listens)
        assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        yield SimpleNamespace(address=addresses[0], process=process, log=log)
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def address(place):
    with served(place) as server:
        yield server.address


@pytest.fixture(scope="module")
def browser():
    reason = "a browser test: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("a browser test: apt-get install chromium")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=SANDBOX)
        yield chromium
        chromium.close()


class Tab:
    """A page in a browser context of its own."""

    def __init__(self, browser, address, **looks):
        self.hosts = set()
        self.page = browser.new_context(accept_downloads=True, **looks).new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname))
        self.open(address)

    def open(self, address):
        self.page.goto(address)
        self.page.wait_for_selector("#examples img")

    def text(self):
        return self.page.locator("#text textarea").input_value()

    def wait_for_text(self, words):
        self.wait_for(lambda: words in self.text())
        return self.text()

    def predict(self, *paths):
        """Upload files; return the text once it names the first."""
        self.page.set_input_files("#files input[type=file]", [str(path) for path in paths])
        return self.wait_for_text(paths[0].name)

    def change(self, name, value):
        """Move a slider, type into a field or tick a box; wait until the overlay changes."""
        before, control = self.overlay(), self.page.locator(f"#{name} input").first
        if control.get_attribute("type") == "checkbox":
            control.set_checked(value)
        else:
            control.fill(str(value))
            control.press("Enter")
        self.wait_for(lambda: self.overlay() != before)

    def overlay(self):
        """The address of the picture that lies on the image."""
        return self.page.locator("#overlay img").nth(1).get_attribute("src")

    def table(self):
        """{name of a column: its text} of the first class of the picture that is shown."""
        heads, cells = (
            self.page.locator(f"#rows {tag}").all_text_contents() for tag in ("th", "td")
        )
        return dict(zip([head.split()[0] for head in heads], map(str.strip, cells), strict=False))

    def wait_for(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.text(), self.table())
            self.page.wait_for_timeout(20)

    def download(self, button="masks"):
        """(name, bytes)"""
        with self.page.expect_download() as started:
            self.page.click(f"#{button}")
        return started.value.suggested_filename, Path(started.value.path()).read_bytes()


@pytest.fixture(scope="module")
def first_tab(browser, address):
    return Tab(browser, address)


@pytest.fixture
def tab(first_tab, address):
    """The page as it is when it opens, which has to ask for nothing but what its own server has."""
    first_tab.open(address)
    yield first_tab
    assert first_tab.hosts <= {"127.0.0.1", None, ""}, first_tab.hosts  # data: and blob: have none


def command_line(place, *arguments):
    """What predict.py prints."""
    flags = ("--model", place / "best_model.pth", "--device", "cpu")
    return assert_done(script_here("predict.py", *arguments, *flags, cwd=place))


def runs(place):
    return (place / "runs").stat().st_size if (place / "runs").exists() else 0


# ---- in a browser ----------------------------------------------------------------------------


def test_an_image_gets_its_mask_and_what_is_moved_runs_no_network(tab, place):
    path, written, before, shares = place / "scan.png", place / "expected.png", runs(place), []
    scan(100, 80, 20, 15, 30).save(path)
    assert "best_model.pth" in tab.page.title()
    assert "Not for clinical use" in tab.page.inner_text("#head")
    tab.predict(path)
    for threshold in (0.5, 0.9, 0.1):
        if threshold != 0.5:
            tab.change("threshold", threshold)
        said = command_line(place, path, "--output", written, "--threshold", threshold)
        assert f"{place}{os.sep}{tab.wait_for_text(f'above {threshold:g}')}" in said.splitlines()
        mask = written.read_bytes()
        assert tab.download() == ("scan_mask.png", mask)
        shares.append(np.asarray(Image.open(written)).mean())
    assert shares[1] < shares[0] < shares[2]
    tab.change("opacity", 0)
    below, above = tab.page.locator("#overlay img").all()
    assert tab.overlay() == below.get_attribute("src")  # nothing is seen on the image
    tab.change("outline", True)
    whole = below.bounding_box()
    above.hover()
    tab.page.mouse.wheel(0, -500)
    tab.wait_for(lambda: below.bounding_box()["width"] > 1.04 * whole["width"])
    tab.wait_for(lambda: below.bounding_box() == pytest.approx(above.bounding_box(), abs=0.5))
    assert tab.download()[1] == mask
    assert runs(place) == before + 1


def test_an_example_of_the_data_of_the_run_is_one_click(tab, place):
    assert tab.page.locator("#examples button img").count() == 3
    tab.page.locator("#examples button").nth(1).click()
    assert tab.wait_for_text("highest probability").startswith("3.png: foreground ")
    before = runs(place)
    tab.page.locator("#tta input").check()
    tab.wait_for(lambda: runs(place) == before + 1 and "agreement" in tab.table())
    tab.change("threshold", 0.6)  # which is not that of the masks that agree
    tab.wait_for(lambda: "agreement" not in tab.table())


def test_what_is_no_image_gets_one_line_at_once(tab, place):
    before, cut, bomb = runs(place), place / "cut.png", place / "bomb.png"
    Image.effect_noise((64, 64), 90).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    Image.new("1", (12000, 12000)).save(bomb)
    for path, word in {cut: "truncated", bomb: "144000000"}.items():
        said = tab.predict(path)
        assert said.startswith(f"{path.name}: ") and word in said and "\n" not in said, said
        assert tab.page.locator("#masks").is_disabled()
        assert tab.page.locator("#overlay img").count() == 0
        tab.page.locator("#files button[aria-label='Clear']").click()
        tab.wait_for_text("Drop an image")
    assert runs(place) == before
    assert "Traceback" not in (place / "log").read_text()


def unzip(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


def written_files(folder):
    """{name: content} of a folder, but for the table."""
    paths = (path for path in folder.iterdir() if path.stem != "predictions")
    return {path.name: path.read_bytes() for path in paths}


def table_of(content, number=float):
    """The rows of a CSV file; number: of a probability, which differs where images are batches."""
    names = ("mean_probability", "highest_probability")
    rows = csv.DictReader(content.decode().splitlines())
    return [{**row, **{name: number(float(row[name])) for name in names}} for row in rows]


def test_many_files_and_what_is_switched_are_as_on_the_command_line(tab, place, tmp_path):
    folder, bad = tmp_path / "scans", tmp_path / "bad.png"
    folder.mkdir()
    bad.write_text("no picture")
    pixels = np.asarray(scan(96, 64, 40, 20, 30)).copy()
    pixels[2:11, 2:11], pixels[30:36, 50:56] = 255, 20  # a speck beside the square, a hole in it
    Image.fromarray(pixels).save(folder / "one.png")
    Image.fromarray(pixels[:, ::-1].copy()).save(folder / "two.tif")
    write_dicom(folder / "frames.dcm", np.stack([pixels, pixels]))
    write_nifti(folder / "v.nii.gz", np.stack([pixels.T, pixels.T], 2), zooms=(1, 1, 5))
    before = runs(place)
    said = tab.predict(*sorted(folder.iterdir()), bad)
    assert said.startswith("frames.dcm, frame 0: ") and "\nbad.png: " in said
    for button, name in (("next", "frame 1"), ("next", "one.png"), ("previous", "frame 1")):
        tab.page.click(f"#{button}")
        tab.wait_for_text(f"{name}: foreground ")
    tab.page.locator("#number input[type=range]").fill("3")
    tab.wait_for_text("one.png: foreground ")
    tab.wait_for(lambda: tab.table().get("pieces") == "2")

    def expect(*flags):
        command_line(place, folder, "--output", tmp_path / "out", *flags)
        table = tab.download("table")
        expected = (tmp_path / "out" / "predictions.csv").read_bytes()
        assert table_of(table[1]) == table_of(expected, partial(pytest.approx, rel=1e-6)) != []
        written, given = written_files(tmp_path / "out"), unzip(tab.download("all")[1])
        assert written == {name: given[name] for name in written} and len(written) == 10
        masks = {name for name in written if "_mask" in name}
        assert (table[0], unzip(tab.download()[1]).keys()) == ("predictions.csv", masks)
        return given

    expect("--no-tta")
    tab.change("largest", True)
    tab.change("fill", True)
    tab.change("min-area", 100000)
    tab.wait_for(lambda: tab.table()["pixels"] == "0")
    tab.change("min-area", 50)
    tab.wait_for(lambda: tab.table()["pieces"] == "1")
    assert "agreement" not in tab.table()
    expect("--no-tta", "--clean=min-area=50,largest,fill")
    pictures = tab.overlay()
    tab.page.locator("#min-mm2 input").fill("5")  # the file does not say how large a pixel is
    tab.page.wait_for_selector("text=does not tell the size of its pixels")
    assert tab.overlay() == pictures and runs(place) == before + 6
    tab.page.locator("#min-mm2 input").fill("0")
    tab.page.locator("#tta input").check()
    tab.wait_for(lambda: runs(place) == before + 12 and "agreement" in tab.table())
    flags = ("--tta", "--clean=min-area=50,largest,fill")
    given = expect(*flags)
    (folder / "v.nii.gz").unlink()
    command_line(place, folder, *flags, "--write=labelme", "--output", folder)
    for name in ("one.json", "two.json", "frames_f001.json"):
        assert given[name] == (folder / name).read_bytes()
    assert json.loads(given["one.json"])["imagePath"] == "one.png" and "one.png" in given


def test_a_phone_shows_every_switch_with_its_label_and_the_whole_table(browser, address, place):
    phone = Tab(browser, address, viewport={"width": 390, "height": 844})
    box = phone.page.locator("#examples img").last.bounding_box()
    assert box["x"] + box["width"] <= 390 and not phone.page.locator("#rows").is_visible()
    path = place / "phone.png"
    scan(100, 80, 20, 15, 30).save(path)
    phone.predict(path)
    phone.wait_for(lambda: "pixels" in phone.table())
    wide = "element => element.scrollWidth > element.clientWidth + 1"
    for name in ("outline", "tta", "largest", "fill", "min-area", "min-mm2"):
        part = phone.page.locator(f"#{name}")
        box, label = part.bounding_box(), part.locator("span").first
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
        assert not part.evaluate(wide) and not label.evaluate(wide), name
        assert label.bounding_box()["width"] > 60, name
    assert phone.page.evaluate("document.documentElement.scrollWidth") == 390
    last = phone.page.locator("#rows th", has_text="mean_probability").last
    last.scroll_into_view_if_needed()
    box = last.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    phone.page.context.close()


# ---- the server ------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=edge"}


def ask(address, method, path, body=None, **headers):
    """(status, body)"""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)
    with contextlib.closing(connection), contextlib.suppress(http.client.IncompleteRead):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    return response.status, b""  # an answer that breaks off


def upload(address, name, content, **headers):
    """(status, the paths on the server or why not)"""
    head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + b"\r\n--edge--\r\n"
    status, answer = ask(address, "POST", "/gradio_api/upload", body, **MULTIPART, **headers)
    return status, json.loads(answer) if status == 200 else answer


def medseg_folders(place):
    return list((place / "tmp").glob("medseg-page-*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_stopped_while_it_predicts_it_leaves_nothing_and_told_nobody(browser, tmp_path, name):
    """Behind a password, and on another address."""
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    (tmp_path / "slow").touch()
    scan(50, 50, 10, 10, 20).save(tmp_path / "scan.png")
    with served(tmp_path, "--auth", "me:a secret", "--host", "127.0.0.2") as server:
        address, login = server.address, {"username": "me", "password": "a secret"}
        with pytest.raises(ConnectionRefusedError):  # --host 127.0.0.2 is that address alone
            ask(address.replace("127.0.0.2", "127.0.0.1"), "GET", "/config")
        for path in ("/config", "/gradio_api/file=/etc/hosts", "/gradio_api/queue/data"):
            assert ask(address, "GET", path)[0] == 401
        assert ask(address, "POST", "/gradio_api/queue/join", b"{}", **JSON)[0] == 401
        assert upload(address, "x.png", b"x")[0] == 401
        context = browser.new_context()
        wrong = {**login, "password": "secret"}
        assert not context.request.post(f"{address}/login", form=wrong).ok
        assert context.request.post(f"{address}/login", form=login).ok
        tab = context.new_page()
        tab.goto(address)
        assert tab.locator("#examples").count() == 0  # whose data are they?
        tab.set_input_files("#files input[type=file]", str(tmp_path / "scan.png"))
        wait_until(lambda: runs(tmp_path))
        assert list((tmp_path / "tmp").rglob("scan.png"))
        os.kill(server.process.pid, signal.Signals[name])
        server.process.join(20)
        assert server.process.exitcode == 128 + signal.Signals[name], server.log.read_text()
        assert server.log.read_text().splitlines()[1:] == [f"stopped by {name}"]
        context.close()
    assert list((tmp_path / "tmp").iterdir()) == []
    told = (tmp_path / "connections").read_text().splitlines()
    assert [line for line in told if "'127.0.0.2'" not in line] == []  # it asks itself at its start


def test_refusals(place, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_NUM_WORKERS", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", str(place / "tmp"))
    before = medseg_folders(place)

    def refuse(word, *arguments):
        assert_refused(script_here("predict.py", "--page", *arguments, cwd=place), word)

    refuse("nothing.pth", "--model", "nothing.pth")
    pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [("--port", "70000"), ("--port", taken.getsockname()[1])]
        for flags in (("--output", "masks"), ("--auth", "me"), ("--host", "192.0.2.1"), *ports):
            refuse(*flags[:1], *flags)
    for module in (None, SimpleNamespace(__version__="6.0.2")):  # missing, too old
        monkeypatch.setitem(sys.modules, "gradio", module)
        refuse("`pip install -U gradio`")
    assert medseg_folders(place) == before


# ---- requests that no page makes ---------------------------------------------------------------


class Visitor:
    """Requests from outside of a browser."""

    def __init__(self, address):
        self.address = address
        config = json.loads(ask(address, "GET", "/config")[1])
        types = {part["id"]: part["type"] for part in config["components"]}
        self.handlers = {  # {its id: types of its inputs}
            event["id"]: [types[part] for part in event["inputs"]]
            for event in config["dependencies"]
            if event["backend_fn"]
        }

    def event(self, handler, event_data=None, **values):
        """What the page answers to an event; values: of inputs, by type."""
        usual = {"slider": 1, "state": None, "file": None, "checkbox": False, "number": 0}
        data = [{**usual, **values}[name] for name in self.handlers[handler]]
        event = {"data": data, "fn_index": handler, "session_hash": "forged"}
        body = json.dumps({**event, "event_data": event_data})
        assert ask(self.address, "POST", "/gradio_api/queue/join", body, **JSON)[0] == 200
        said = ask(self.address, "GET", "/gradio_api/queue/data?session_hash=forged")[1].decode()
        messages = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
        return next(one for one in messages if one["msg"] == "process_completed")


def file_data(path):
    return {"path": str(path), "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


@pytest.fixture
def secrets(place, address):
    """Pictures of the server in every spelling, a dotfile and code; the path of an upload."""
    for name in ("secret.png", ".secret.png"):
        scan(50, 50, 10, 10, 20).save(place / name)
    _, (own,) = upload(address, "own.png", (place / "secret.png").read_bytes())
    up = "/".join([".."] * (len(Path(own).parent.parts) - len(place.parts)))
    paths = [place / "secret.png", place / ".secret.png", f"file://{place / 'secret.png'}"]
    paths += ["secret.png", f"{Path(own).parent}/{up}/secret.png", ROOT / "predict.py"]
    return own, list(map(str, paths))


def test_no_handler_reads_a_file_of_the_server(address, secrets, place):
    visitor, (own, paths) = Visitor(address), secrets
    takers = [number for number, types in visitor.handlers.items() if "file" in types]
    assert 0 < len(takers) < len(visitor.handlers)
    types = {name for handler in visitor.handlers.values() for name in handler}
    assert types == {"slider", "state", "file", "checkbox", "number"}  # no Image, no Gallery
    for number in takers:
        before = runs(place)
        assert visitor.event(number, file=[file_data(own)])["success"]  # an upload is read
        assert runs(place) == before + 1
    with socket.create_server(("127.0.0.1", 0)) as inner:  # a service that others cannot reach
        port, before = inner.getsockname()[1], runs(place)
        for path in (*paths, f"http://127.0.0.1:{port}/x.png"):
            for number in takers:
                assert not visitor.event(number, file=[file_data(path)])["success"], path
                without = {key: value for key, value in file_data(path).items() if key != "meta"}
                assert not visitor.event(number, file=[without])["success"], path
            for number in visitor.handlers.keys() - set(takers):
                values = dict.fromkeys(("slider", "checkbox", "number"), file_data(path))
                answer = visitor.event(number, {"index": 0, "value": file_data(path)}, **values)
                assert "secret" not in json.dumps(answer).replace(json.dumps(path)[1:-1], "")
        inner.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has connected
            inner.accept()
        assert runs(place) == before
    for index in (99, 0.5, "0", None, [0]):
        (choose,) = (number for number, types in visitor.handlers.items() if not types)
        assert not visitor.event(choose, {"index": index, "value": None})["success"], index


ROUTES = """GET file=PATH|GET file/PATH|HEAD file=PATH|GET proxy=PATH|GET /config?deep_link=PATH
GET stream/tab/0/1/playlist-file|GET /static/PATH|GET /assets/PATH|GET /static/../PATH
GET /assets/%2e%2e/%2e%2e/PATH|GET custom_component/1/client/component/PATH|GET /svelte/PATH
GET runs|GET run-history/records|GET vibe-code|GET /monitoring/summary|POST run/predict
POST api/predict|POST call/predict|POST call/v2/predict|POST component_server|POST stream/1
POST process_recording|POST vibe-edit|POST vibe-code|POST undo-vibe-edit|PUT queue/join"""


def test_no_other_address_gives_a_file_away(address, secrets, place):
    own, paths = secrets
    content = (place / "secret.png").read_bytes()
    assert ask(address, "GET", f"/gradio_api/file={own}") == (200, content)
    for route in ROUTES.replace("\n", "|").split("|"):
        for path in paths:
            method, where = route.replace("PATH", quote(path)).split(" ")
            where = where if where.startswith("/") else f"/gradio_api/{where}"
            event = {"data": [[file_data(path)], 0.5, False], "fn_index": 0, "session_hash": "tab"}
            event.update(component_id=1, fn_name="x", api_name="predict")
            body = None if method in ("GET", "HEAD") else json.dumps(event)
            status, answer = ask(address, method, where, body, **JSON)
            assert b"\x89PNG" not in answer and b"def predict_mask" not in answer, (route, path)
            assert status != 200 or "file" not in route, (route, path)


def test_other_hosts_and_origins_are_refused(address):
    port = urlsplit(address).port
    origins = "http://other.example", "null", "http://127.0.0.1", "http://[x"
    others = [
        {"Host": f"other.example:{port}"},
        {"Host": "[x"},
        *({"Origin": of} for of in origins),
    ]
    for headers, expected in ({}, 200), ({"Origin": address}, 200), *((one, 403) for one in others):
        assert ask(address, "GET", "/config", **headers)[0] == expected, headers
        assert upload(address, "x.png", b"x", **headers)[0] == expected, headers
    assert ask(address, "GET", "/config", Host=f"localhost:{port}")[0] == 200


def test_an_upload_that_is_too_large_is_refused_and_names_stay_in_their_folder(address, place):
    assert 2e9 < page.MAX_UPLOAD < 3e9
    assert upload(address, "large.png", bytes(LONGEST + 1))[0] == 413
    (folder,) = medseg_folders(place)
    for name in ("../../../x.png", "..", "/etc/x.png", "n" * 300 + ".png", "a\u0000b.png"):
        status, paths = upload(address, name, b"content")
        assert status != 200 or folder in Path(paths[0]).resolve().parents, name


# ---- what needs no browser -------------------------------------------------------------------


def colour_model(*names):
    """A model whose probabilities are the first channels of the image, one a class."""

    def predict(images):
        return [Prediction(one[: len(names)].numpy() / np.float32(255)) for one in images]

    info = ModelInfo.of(len(names), image_size=None, class_names=names)
    return SimpleNamespace(info=info, inference=page.Inference(), n_channels=3, predict=predict)


TWO_CLASSES, GREY = colour_model("red <b>", "green"), colour_model("foreground")


def predicted(model, *paths, folder, **settings):
    session = page.Session(folder, model, **settings)
    session.predict(paths, 0.5)
    assert session.problems == []
    return session


def test_several_classes_have_a_legend_and_an_image_may_keep_its_size(tmp_path):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, 10:30, 0], pixels[:, 20:40, 1] = 180, 200
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    session = predicted(TWO_CLASSES, tmp_path / "rgb.png", folder=tmp_path)
    labels = np.zeros((30, 50), np.uint8)
    labels[:, 10:30], labels[:, 20:40] = 1, 2  # of both, the more probable one
    save_mask(labels, tmp_path / "expected.png", TWO_CLASSES.info.class_names)
    assert session.download("masks", 0.5).read_bytes() == (tmp_path / "expected.png").read_bytes()
    (image, mask, overlay), (line,), rows = session.view(0, 0.5, opacity=1, outlined=True)
    assert image.size == overlay.size == (400, 240)  # enlarged, to be seen
    assert "red <b> 20.00 % above 0.5, highest probability 0.706" in line
    assert mask.getpixel((120, 0)) == overlay.getpixel((120, 0)) == (230, 159, 0)
    below = np.asarray(mask)[240:].reshape(-1, 3).tolist()  # the legend
    assert [230, 159, 0] in below and [86, 180, 233] in below
    assert [(row["class"], row["pixels"]) for row in rows] == [("red <b>", 300), ("green", 600)]


def test_the_outline_is_drawn_in_full_colour_and_the_inside_with_the_opacity():
    image, labels = scan(64, 40, 10, 10, 20).convert("RGB"), np.zeros((40, 64), np.uint8)
    labels[10:30, 10:30] = 1
    drawn = overlay(image, labels, opacity=0.25, outlined=True)
    inside = 0.75 * np.array(image.getpixel((20, 20))) + 0.25 * np.array([255, 0, 0])
    assert drawn.getpixel((10, 15)) == drawn.getpixel((29, 29)) == (255, 0, 0)
    assert drawn.getpixel((20, 20)) == tuple(inside.astype(int))
    assert drawn.getpixel((9, 15)) == image.getpixel((9, 15))


def test_uploads_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """scan.png three times, once as a JPEG: the masks are of squares of different sides."""
    sides = {"0/scan.png": 8, "1/scan.png": 12, "2/scan.jpg": 16, "3/other.png": 20}
    for name, side in sides.items():
        (tmp_path / name).parent.mkdir()
        scan(64, 40, 3, 5, side).save(tmp_path / name)
    monkeypatch.setattr(page, "VIEW_SIDE", 16)
    session = predicted(GREY, *(tmp_path / name for name in sides), folder=tmp_path)
    files = unzip(session.download("all", 0.5).read_bytes())
    masks = [Image.open(io.BytesIO(files[name])) for name in files if "_mask" in name]
    areas = [side**2 for side in sides.values()]
    assert sorted(np.count_nonzero(mask) for mask in masks) == areas
    assert sum(name.endswith(".json") for name in files) == 4
    for (image, _, _), _, (row,) in (session.view(index, 0.5) for index in range(4)):
        assert image.size == (384, 240) and row["pixels"] in areas  # at the image's own size


def test_examples_are_of_the_data_that_the_weights_have_learned_from(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = place / "best_model.pth"
    assert [path.name for path in learned_images(own, 4)] == ["0.png", "3.png", "6.png"]
    shutil.copytree(place / "own" / "test", tmp_path / "dataset" / "test")  # whose are these?
    other = shutil.copy(own, tmp_path)
    (tmp_path / "last.pth").write_bytes(b"of another program")
    assert learned_images(other, 4) == learned_images(pretrained_path(), 4) == []
    (tmp_path / "dataset" / "test" / "0.png").rename(EXAMPLE)  # the tutorial's
    assert len(learned_images(pretrained_path(), 4)) == 3 and learned_images(other, 4) == []
