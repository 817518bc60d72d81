"""The page: what it shows, refuses and hands back, in a headless Chromium and without one.

Servers are forks of this process that count the images which the network gets, and note every
connection that they make.
"""

import contextlib
import csv
import http.client
import io
import itertools
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
import requests
import torch
from helpers import (
    ROOT,
    assert_done,
    assert_refused,
    brightness_model,
    fork_script,
    save,
    scan,
    script_here,
    wait_until,
    write_dicom,
    write_nifti,
)
from PIL import Image

from medseg.drawing import overlay
from medseg.predicting import page
from medseg.predicting.inputs import EXAMPLE, learned_images
from medseg.predictor import Predictor
from medseg.weights import pretrained_path
from predict import open_models

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
        yield SimpleNamespace(address=addresses[0], process=process, log=log)
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def address(place):
    with served(place) as server:
        yield server.address


def speckled():
    """A square with a hole, and a speck beside it."""
    pixels = np.asarray(scan(96, 64, 40, 20, 30)).copy()
    pixels[2:11, 2:11], pixels[30:36, 50:56] = 255, 20
    return Image.fromarray(pixels)


def runs(place):
    return (place / "runs").stat().st_size if (place / "runs").exists() else 0


# ---- in a browser ----------------------------------------------------------------------------


def wait_for_text(tab, words):
    """The lines below the pictures, once the words are among them."""
    lines = tab.locator("#text textarea")
    wait_until(lambda: words in lines.input_value())
    return lines.input_value()


def overlay_of(tab):
    """The address of the picture that lies on the image."""
    return tab.locator("#overlay img").nth(1).get_attribute("src")


def change(tab, name, value):
    """Move a slider, type into a field or tick a box; wait until the overlay changes."""
    before, control = overlay_of(tab), tab.locator(f"#{name} input").first
    if control.get_attribute("type") == "checkbox":
        control.set_checked(value)
    else:
        control.fill(str(value))
        control.press("Enter")
    wait_until(lambda: overlay_of(tab) != before)


def measured(tab):
    """{name of a column: its text} of the first class of the picture that is shown."""
    heads, cells = (tab.locator(f"#rows {tag}").all_text_contents() for tag in ("th", "td"))
    return dict(zip([head.split()[0] for head in heads], map(str.strip, cells), strict=False))


@pytest.mark.slow
def test_every_switch_changes_what_it_names(address, place):
    """Flips alone run the network again; nothing is asked for but what the page's server has."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    path, hosts = next(filter(None, map(shutil.which, BROWSERS)), None), set()
    if path is None:
        pytest.skip("a browser test: apt-get install chromium")
    with (
        playwright.sync_playwright() as running,
        running.chromium.launch(executable_path=path, args=SANDBOX) as browser,
    ):
        tab = browser.new_page()
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        tab.goto(address)
        tab.wait_for_selector("#examples img")
        assert "best_model.pth" in tab.title() and "Not for clinical use" in tab.inner_text("#head")
        assert tab.locator("#examples button img").count() == 3
        tab.locator("#examples button").nth(1).click()
        assert wait_for_text(tab, "highest probability").startswith("3.png: foreground ")
        before = runs(place)
        tab.locator("#tta input").check()
        wait_until(lambda: runs(place) == before + 1 and "agreement" in measured(tab))
        change(tab, "threshold", 0.6)  # which is not that of the masks that agree
        wait_until(lambda: "agreement" not in measured(tab))
        tab.locator("#files button[aria-label='Clear']").click()
        wait_for_text(tab, "Drop an image")
        speckled().save(place / "one.png")
        (place / "bad.png").write_text("no picture")
        paths = place / "one.png", place / "own/test/8.png", place / "bad.png"
        tab.set_input_files("#files input[type=file]", list(map(str, paths)))
        assert "\nbad.png: " in wait_for_text(tab, "one.png: foreground ")
        before = runs(place)
        for button, name in (("next", "8.png"), ("previous", "one.png")):
            tab.click(f"#{button}")
            wait_for_text(tab, f"{name}: foreground ")
        wait_until(lambda: measured(tab)["pieces"] == "2")
        change(tab, "largest", True)
        wait_until(lambda: measured(tab)["pieces"] == "1")
        change(tab, "opacity", 0)
        below = tab.locator("#overlay img").first
        assert overlay_of(tab) == below.get_attribute("src")  # nothing is seen on the image
        change(tab, "outline", True)
        change(tab, "min-area", 100000)
        wait_until(lambda: measured(tab)["pixels"] == "0")
        with tab.expect_download() as started:
            tab.click("#table")
        assert started.value.suggested_filename == "predictions.csv"
        assert Path(started.value.path()).read_bytes().count(b"\n") == 3
        pictures = overlay_of(tab)
        tab.locator("#min-mm2 input").fill("5")  # the file does not say how large a pixel is
        tab.wait_for_selector("text=does not tell the size of its pixels")
        assert overlay_of(tab) == pictures and runs(place) == before
    assert hosts <= {"127.0.0.1", None, ""}, hosts  # data: and blob: have none


# ---- the server ------------------------------------------------------------------------------


def ask(address, path, method="GET", body=None, **headers):
    """(status, body) of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)
    with contextlib.closing(connection), contextlib.suppress(http.client.IncompleteRead):
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    return response.status, b""  # an answer that breaks off


def upload(address, name, content, session=requests, **headers):
    """(status, the paths on the server or why not)"""
    files, where = {"files": (name, content)}, f"{address}/gradio_api/upload"
    answer = session.post(where, files=files, headers=headers, timeout=SECONDS)
    return answer.status_code, answer.json() if answer.ok else answer.text


def file_data(path):
    return {"path": str(path), "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}


class Visitor:
    """Requests from outside of a browser."""

    def __init__(self, address, session=requests):
        self.queue, self.session = f"{address}/gradio_api/queue", session
        config = session.get(f"{address}/config").json()
        types = {part["id"]: part["type"] for part in config["components"]}
        self.handlers = {  # {its id: types of its inputs}
            event["id"]: [types[part] for part in event["inputs"]]
            for event in config["dependencies"]
            if event["backend_fn"]
        }
        self.takers = [number for number, own in self.handlers.items() if "file" in own]

    def start(self, handler, event_data=None, **values):
        """Make an event; values: of inputs, by type."""
        usual = {"slider": 1, "state": None, "file": None, "checkbox": False, "number": 0}
        data = [{**usual, **values}[name] for name in self.handlers[handler]]
        event = {"data": data, "fn_index": handler, "session_hash": "forged"}
        event["event_data"] = event_data
        assert self.session.post(f"{self.queue}/join", json=event).status_code == 200

    def event(self, *given, **values):
        """What the page answers to an event."""
        self.start(*given, **values)
        lines = self.session.get(f"{self.queue}/data?session_hash=forged").text.splitlines()
        messages = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        return next(one for one in messages if one["msg"] == "process_completed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_stopped_while_it_predicts_it_leaves_nothing_and_told_nobody(tmp_path, name):
    """Behind a password, and on another address."""
    torch.save(brightness_model().state_dict(), tmp_path / "best_model.pth")
    (tmp_path / "slow").touch()
    scan(50, 50, 10, 10, 20).save(tmp_path / "scan.png")
    with served(tmp_path, "--auth", "me:a secret", "--host", "127.0.0.2") as server:
        address, session = server.address, requests.Session()
        with pytest.raises(ConnectionRefusedError):  # --host 127.0.0.2 is that address alone
            ask(address.replace("127.0.0.2", "127.0.0.1"), "/config")
        for path in ("/config", "/gradio_api/file=/etc/hosts", "/gradio_api/queue/data"):
            assert ask(address, path)[0] == upload(address, "x.png", b"x")[0] == 401
        session.post(f"{address}/login", {"username": "me", "password": "a secret"})
        visitor = Visitor(address, session)
        _, (own,) = upload(address, "scan.png", (tmp_path / "scan.png").read_bytes(), session)
        visitor.start(visitor.takers[0], file=[file_data(own)])
        wait_until(lambda: runs(tmp_path))
        assert list((tmp_path / "tmp").rglob("scan.png"))
        os.kill(server.process.pid, signal.Signals[name])
        server.process.join(20)
        assert server.process.exitcode == 128 + signal.Signals[name], server.log.read_text()
        assert server.log.read_text().splitlines()[1:] == [f"stopped by {name}"]
    assert list((tmp_path / "tmp").iterdir()) == []
    told = (tmp_path / "connections").read_text().splitlines()
    assert [line for line in told if "'127.0.0.2'" not in line] == []  # it asks itself at its start


def test_refusals(place, tmp_path, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_NUM_WORKERS", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(word, *arguments):
        assert_refused(script_here("predict.py", "--page", *arguments, cwd=place), word)

    refuse("nothing.pth", "--model", "nothing.pth")
    for flags in (("--output", "masks"), ("--auth", "me"), ("--port", "70000")):
        refuse(*flags[:1], *flags)
    for module in (None, SimpleNamespace(__version__="6.0.2")):  # missing, too old
        monkeypatch.setitem(sys.modules, "gradio", module)
        refuse("`pip install -U gradio`")
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.31.0"))
    monkeypatch.setattr(page, "layout", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refuse("--port", "--port", taken.getsockname()[1])
        refuse("--host", "--host", "192.0.2.1")
    assert not list(tmp_path.iterdir())


ROUTES = """GET file=PATH|GET file/PATH|GET proxy=PATH|GET /static/PATH|GET /static/../PATH
GET /assets/%2e%2e/%2e%2e/PATH|GET custom_component/1/client/component/PATH|GET /svelte/PATH
GET runs|GET /monitoring/summary|POST run/predict|POST component_server|POST process_recording"""


def test_no_request_gives_a_file_of_the_server_away(address, place):
    """Neither pictures in any spelling nor a dotfile nor code; what was uploaded is read."""
    for name in ("secret.png", ".secret.png"):
        scan(50, 50, 10, 10, 20).save(place / name)
    content = (place / "secret.png").read_bytes()
    _, (own,) = upload(address, "own.png", content)
    up = "/".join([".."] * (len(Path(own).parent.parts) - len(place.parts)))
    paths = (
        *(f"{place}/secret.png", f"{place}/.secret.png", f"file://{place}/secret.png"),
        *("secret.png", f"{Path(own).parent}/{up}/secret.png", f"{ROOT}/predict.py"),
    )
    visitor = Visitor(address)
    takers, others = visitor.takers, visitor.handlers.keys() - set(visitor.takers)
    types = {name for handler in visitor.handlers.values() for name in handler}
    assert types == {"slider", "state", "file", "checkbox", "number"}  # no Image, no Gallery
    before = runs(place)
    for number in takers:
        assert visitor.event(number, file=[file_data(own)])["success"]
    assert runs(place) == before + len(takers) > before
    for path in (*paths, "http://127.0.0.1:9/x.png"):  # of a service that others cannot reach
        for number in takers:
            assert not visitor.event(number, file=[file_data(path)])["success"], path
            assert not visitor.event(number, file=[{"path": path}])["success"], path
    assert runs(place) == before + len(takers)
    assert "('127.0.0.1', 9)" not in (place / "connections").read_text()
    forged = file_data(place / "secret.png")
    for number in others:
        values = dict.fromkeys(("slider", "checkbox", "number"), forged)
        answer = visitor.event(number, {"index": 0, "value": forged}, **values)
        assert "secret" not in json.dumps(answer).replace(forged["path"], "")
    (choose,) = (number for number, types in visitor.handlers.items() if not types)
    for index in (99, 0.5, "0", None, [0]):
        assert not visitor.event(choose, {"index": index, "value": None})["success"], index
    assert ask(address, f"/gradio_api/file={own}") == (200, content)
    for route, path in itertools.product(ROUTES.replace("\n", "|").split("|"), paths):
        method, where = route.replace("PATH", quote(path)).split(" ")
        where = where if where.startswith("/") else f"/gradio_api/{where}"
        event = {"data": [[file_data(path)], 0.5, False], "fn_index": 0, "session_hash": "tab"}
        body = json.dumps({**event, "component_id": 1, "fn_name": "x"}) * (method == "POST")
        headers = {"Content-Type": "application/json"}
        status, answer = ask(address, where, method, body, **headers)
        assert b"\x89PNG" not in answer and b"def predict_mask" not in answer, (route, path)
        assert status != 200 or "file" not in route, (route, path)


def test_what_comes_from_elsewhere_is_refused(address, place):
    """Requests of other sites, large uploads, and names that lead out of their folder."""
    port = urlsplit(address).port
    origins = "http://other.example", "null", "http://127.0.0.1", "http://[x"
    others = [{"Host": f"other.example:{port}"}, {"Host": "[x"}]
    others += [{"Origin": origin} for origin in origins]
    for headers, expected in ({}, 200), ({"Origin": address}, 200), *((one, 403) for one in others):
        assert ask(address, "/config", **headers)[0] == expected, headers
        assert upload(address, "x.png", b"x", **headers)[0] == expected, headers
    assert ask(address, "/config", Host=f"localhost:{port}")[0] == 200
    assert 2e9 < page.MAX_UPLOAD < 3e9
    assert upload(address, "large.png", bytes(LONGEST + 1))[0] == 413
    (folder,) = (place / "tmp").glob("medseg-page-*")
    for name in ("../../../x.png", "..", "/etc/x.png", "n" * 300 + ".png", "a\u0000b.png"):
        status, paths = upload(address, name, b"content")
        assert status != 200 or folder in Path(paths[0]).resolve().parents, name


# ---- predictions that are kept ---------------------------------------------------------------


def predicted(place, *paths, folder, tta=False):
    model = open_models([place / "best_model.pth"], "cpu")
    session = page.Session(folder, model, pixel_size=(0.5, 0.4))
    session.predict(paths, 0.5, tta)
    return session


def unzip(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


def test_downloads_are_what_the_command_line_writes(place, tmp_path):
    """Of pictures, frames and a volume; cleaned up and averaged over flips."""
    folder, out = tmp_path / "scans", tmp_path / "out"
    folder.mkdir()
    speckled().save(folder / "one.png")
    pixels = np.asarray(speckled())
    write_dicom(folder / "frames.dcm", np.stack([pixels, pixels[:, ::-1]]))
    write_nifti(folder / "v.nii.gz", np.stack([pixels.T, pixels.T], 2), zooms=(1, 1, 5))
    command = ("predict.py", folder, "--tta", "--clean=min-mm2=100,fill", "--output")
    flags = ("--model", "best_model.pth", "--device", "cpu", "--pixel-size", "0.4x0.5")
    clean = {"min-mm2": 100.0, "fill": 1.0}
    session = predicted(place, *sorted(folder.iterdir()), folder=tmp_path, tta=True)
    assert_done(script_here(*command, out, *flags, cwd=place))
    given = unzip(session.download("all", 0.5, clean))
    tables = []
    for path in (out / "predictions.csv", session.download("table", 0.5, clean)):
        tables.append(list(csv.DictReader(path.read_text("utf-8-sig").splitlines())))
        for row in tables[-1]:  # probabilities differ where images are batches
            del row["mean_probability"], row["highest_probability"]
            assert row["pieces"] == "1"
    assert tables[0] == tables[1]
    written = {path.name: path.read_bytes() for path in out.glob("[!p]*")}
    assert written == {name: given[name] for name in written} and len(written) == 8
    masks = unzip(session.download("masks", 0.5, clean))
    assert masks.keys() == {name for name in written if "_mask" in name}
    (folder / "v.nii.gz").unlink()
    assert_done(script_here(*command, folder, "--write=labelme", *flags, cwd=place))
    for name in ("one.json", "frames_f001.json", "frames_f001.png", "one.png"):
        assert given[name] == (folder / name).read_bytes()
    assert json.loads(given["one.json"])["imagePath"] == "one.png"


def test_the_outline_is_drawn_in_full_colour_and_the_inside_with_the_opacity():
    image, labels = scan(64, 40, 10, 10, 20).convert("RGB"), np.zeros((40, 64), np.uint8)
    labels[10:30, 10:30] = 1
    drawn = np.asarray(overlay(image, labels, opacity=0.25, outlined=True))
    assert drawn[15, 10].tolist() == drawn[29, 29].tolist() == [255, 0, 0]
    assert drawn[20, 20].tolist() == [240, 176, 176]  # three quarters of 235, one of red
    assert (drawn[15, 9] == image.getpixel((9, 15))).all()


def test_uploads_of_one_name_are_told_apart(place, tmp_path, monkeypatch):
    """Three squares of different sides; they are measured at the size of the image."""
    sides = {"0/scan.png": 16, "1/scan.png": 20, "2/scan.jpg": 24}
    for name, side in sides.items():
        save(scan(64, 40, 3, 5, side), tmp_path / name)
    monkeypatch.setattr(page, "VIEW_SIDE", 16)
    session = predicted(place, *map(tmp_path.joinpath, sides), folder=tmp_path)
    files = unzip(session.download("all", 0.5))
    masks = [Image.open(io.BytesIO(files[name])) for name in files if "_mask" in name]
    areas = sorted(np.count_nonzero(mask) for mask in masks)
    assert areas == pytest.approx([side**2 for side in sides.values()], rel=0.15)
    views = [session.view(index, 0.5) for index in range(3)]
    assert sorted(row["pixels"] for _, _, (row,) in views) == areas
    assert all(image.size == (384, 240) for (image, *_), *_ in views)  # enlarged, to be seen


def test_examples_are_of_the_data_that_the_weights_have_learned_from(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "own" / "test", tmp_path / "dataset" / "test")
    other = shutil.copy(place / "best_model.pth", tmp_path)
    (tmp_path / "last.pth").write_bytes(b"of another program")
    assert learned_images(other, 4) == learned_images(pretrained_path(), 4) == []
    (tmp_path / "dataset" / "test" / "0.png").rename(EXAMPLE)
    assert len(learned_images(pretrained_path(), 4)) == 3 and learned_images(other, 4) == []
