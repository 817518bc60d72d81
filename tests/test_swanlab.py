"""SwanLab tracking: the real client, with files and with local servers that misbehave."""

import inspect
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from medseg.training.tracking import SwanLab

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
LIMIT = 60  # seconds before a subprocess counts as hanging


# ---- a stand-in for the service --------------------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Just enough of the SwanLab API. `server.requests` keeps (method, path, body)."""

    protocol_version = "HTTP/1.1"

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, body))
        if self.server.hangs(self.command, path):
            self.server.stop.wait(LIMIT)
        status, reply = 200, {}
        if path == "/api/login/api_key":
            user = {"username": "u", "name": "u"}
            reply = {"sid": "s", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": user}
        elif path == "/api/project/u/Brain":
            reply = {"cuid": "p", "name": "Brain", "path": "/u/Brain", "group": {"username": "u"}}
            reply |= {"_count": {"experiments": 0}, "version": 1}
        elif path.endswith("/experiment"):  # 201: a new experiment; 200: one to continue
            run_id = json.loads(body)["cuid"]
            status = 200 if run_id in self.server.known else 201
            reply = {"cuid": run_id, "slug": run_id, "name": "bs32"}
            reply["createdAt"] = "2026-01-01T00:00:00.000Z"
        elif path == "/api/resources/presigned/put":
            reply = {"urls": [f"http://127.0.0.1:{self.server.server_port}/picture"]}
        data = self.server.nonsense or json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET = do_POST = do_PUT = do_PATCH = respond

    def log_message(self, *_):
        pass


@contextmanager
def service(hangs=lambda method, path: False, nonsense=None, known=()):
    """A server that runs within the context.

    hangs(method, path): whether a request gets no response. nonsense: bytes to respond with
    instead. known: ids of the runs it has already.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads, server.block_on_close = True, False
    server.requests, server.stop = [], threading.Event()
    server.hangs, server.nonsense, server.known = hangs, nonsense, known
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def uploaded(server, kind, run_id):
    """{(key, step): value} of what was posted for a run, kind "scalar" or "media"."""
    values = {}
    for method, path, body in server.requests:
        if (method, path) != ("POST", "/api/house/metrics"):
            continue
        post = json.loads(body)
        if (post["type"], post["experimentId"]) == (kind, run_id):
            values |= {(row["key"], row["index"]): row["data"] for row in post["metrics"]}
    return values


def uploaded_pictures(server, run_id):
    return [key for key, _ in uploaded(server, "media", run_id)]


def final_states(server, run_id):
    return [
        json.loads(body)["state"]
        for method, path, body in server.requests
        if method == "PUT" and path.endswith(f"/runs/{run_id}/state")
    ]


# ---- runs, in this process and in others -----------------------------------------------------


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    """A user without settings, key or proxy, in an empty folder."""
    for name in list(os.environ):
        if name.startswith("SWANLAB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def start(mode, **options):
    """A run with these options, and defaults for those that are not given."""
    defaults = {"project": "Brain", "experiment_name": "bs32", "config": {"lr": 1e-4}}
    return SwanLab(mode, **{**defaults, "log_dir": "swanlog", **options})


def python(program, server=None):
    """Start `program` in a process of its own, where it can call `start`.

    server: the service that it has an API key for.
    """
    prelude = (
        f"import os, sys\nfrom medseg.training.tracking import SwanLab\n{inspect.getsource(start)}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if server:
        environment |= {"SWANLAB_API_HOST": address(server), "SWANLAB_API_KEY": "x"}
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(program)],
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


@pytest.fixture
def log_in(monkeypatch):
    """log_in(host): from here on, this process has an API key for the service at `host`."""

    def set_variables(host):
        monkeypatch.setenv("SWANLAB_API_HOST", host)
        monkeypatch.setenv("SWANLAB_API_KEY", "x")

    return set_variables


def wait(process):
    """Wait for a process of `python`; returns what it printed to stdout."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert "Traceback" not in err, err
    return out


# ---- what is recorded ------------------------------------------------------------------------


def test_disabled_imports_nothing_and_does_nothing(tmp_path):
    process = python("""
        tracker = start("disabled", project="any name", run_id="kept")
        tracker.log({"train/loss": 0.5}, step=1)
        tracker.image("predictions", "missing.png")
        tracker.finish(failed=True)
        assert "swanlab" not in sys.modules and "requests" not in sys.modules
        assert tracker.run_id == "kept" and not tracker.hung
        print("done")
    """)
    assert wait(process) == "done\n" and process.returncode == 0
    assert not (tmp_path / "swanlog").exists()


PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def test_offline_needs_no_network_and_its_sync_command_uploads_everything(
    tmp_path, monkeypatch, capsys, log_in
):
    for name in PROXIES:
        monkeypatch.setenv(name, NOWHERE)
    Image.new("RGB", (8, 8), "red").save("p.png")
    began = time.monotonic()
    tracker = start("offline", log_dir="it's a folder/swanlog")
    tracker.log({"train/loss": 0.5, "val/dice": 0.25}, step=1)
    tracker.log({"train/loss": 0.125}, step=2)
    tracker.image("predictions", Path("p.png"))
    tracker.finish()
    assert time.monotonic() - began < 10 and not tracker.hung
    advice = "SwanLab: to upload this run: "
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(advice)]
    assert list((tmp_path / "it's a folder/swanlog").glob("run-*"))

    for name in PROXIES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    command = line.removeprefix(advice)
    with service() as server:  # the command goes to a shell, as when a person pastes it
        log_in(address(server))
        subprocess.run(command, shell=True, check=True, timeout=LIMIT, capture_output=True)
        assert uploaded(server, "scalar", tracker.run_id) == {
            ("train/loss", 1): 0.5,
            ("val/dice", 1): 0.25,
            ("train/loss", 2): 0.125,
        }
        assert uploaded_pictures(server, tracker.run_id) == ["predictions"]
        assert final_states(server, tracker.run_id) == ["FINISHED"]


def test_an_offline_run_prints_its_sync_command_once():
    # In another process: what swanlab prints as it exits counts too.
    process = python("""
        tracker = start("offline")
        tracker.log({"train/loss": 0.5}, step=1)
        tracker.finish()
    """)
    out = wait(process)
    assert out.count("swanlab sync") == 1 and process.returncode == 0, out


def test_online_uploads_continues_a_run_and_leaves_signals_and_exit_status_to_us():
    # In another process: swanlab remembers the server it has logged in to.
    program = """
        import signal
        from PIL import Image
        Image.new("RGB", (8, 8), "red").save("p.png")

        def leave(number, frame):
            sys.exit(128 + number)

        signal.signal(signal.SIGINT, leave)
        signal.signal(signal.SIGTERM, leave)
        for step, run_id in [(1, None), (2, "earlier"), (3, None)]:
            tracker = start("auto", run_id=run_id)  # with an API key, that is online
            assert signal.getsignal(signal.SIGINT) is leave
            assert signal.getsignal(signal.SIGTERM) is leave
            print("run", tracker.run_id)
            tracker.log({"train/loss": 0.5, "train/epoch": step}, step=step)
            tracker.image("predictions", "p.png")
            if step < 3:
                tracker.finish()
                tracker.finish()  # a second time does nothing
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            tracker.finish(failed=True)
    """
    with service(known=["earlier"]) as server:
        process = python(program, server)
        runs = re.findall("^run (.*)$", wait(process), re.MULTILINE)
        assert process.returncode == 143
        assert runs[1] == "earlier" and len(set(runs)) == 3
        states = ["FINISHED", "FINISHED", "CRASHED"]
        for step, (run, state) in enumerate(zip(runs, states, strict=True), start=1):
            values = {("train/loss", step): 0.5, ("train/epoch", step): step}
            assert uploaded(server, "scalar", run) == values
            assert uploaded_pictures(server, run) == ["predictions"]
            assert final_states(server, run) == [state]
        assert sum(path == "/picture" for _, path, _ in server.requests) == 3


# ---- what must not happen --------------------------------------------------------------------


def test_without_a_key_nothing_prompts_at_a_terminal(tmp_path):
    controller, terminal = pty.openpty()
    command = """if True:
        from medseg.training.tracking import SwanLab
        options = dict(project="Brain", experiment_name="bs32", config={}, log_dir="swanlog")
        try:
            SwanLab("online", **options)
        except ValueError as error:
            print(error)
        tracker = SwanLab("auto", **options)
        print("auto is", tracker.run.mode)
        tracker.finish()
        raise SystemExit(2)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    out = []

    def read():
        try:
            while data := os.read(controller, 4096):
                out.append(data)
        except OSError:  # Linux: the other end is closed
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert process.wait(timeout=LIMIT) == 2
    finally:
        process.kill()
    reader.join(5)
    os.close(controller)
    text = b"".join(out).decode()
    assert "swanlab login" in text and "--swanlab offline" in text and "auto is offline" in text
    assert "Enter your choice" not in text and "Traceback" not in text


@pytest.mark.parametrize(
    "harm, mode",
    [
        (None, "online"),  # no network
        ({"hangs": lambda method, path: True}, "auto"),  # a server that never answers
        ({"nonsense": b"<html>hotel wifi</html>"}, "auto"),
        ({"nonsense": b"[]"}, "auto"),
    ],
)
def test_without_a_service_it_is_offline_soon(harm, mode, monkeypatch, capsys, log_in):
    monkeypatch.setattr(SwanLab, "ANSWER_TIMEOUT", 1)
    with service(**harm or {}) as server:
        log_in(address(server) if harm else NOWHERE)
        began = time.monotonic()
        tracker = start(mode)
        assert time.monotonic() - began < 6
        assert tracker.run.mode == "offline"
        tracker.finish()
    assert not tracker.hung
    assert capsys.readouterr().out.count("SwanLab: no online run: ") == 1


def test_servers_that_hang_later_delay_neither_training_nor_exit():
    # Three programs at once, each leaving as train.py does when a SwanLab thread is stuck.
    program = """
        import time
        from PIL import Image
        SwanLab.START_TIMEOUT, SwanLab.FINISH_TIMEOUT = {start_timeout}, 2
        tracker = start("auto")
        tracker.log({{"train/loss": 0.5}}, step=1)
        Image.new("RGB", (8, 8)).save("{name}.png")
        tracker.image("predictions", "{name}.png")
        {before_finish}
        tracker.finish()
        assert tracker.hung
        sys.stdout.flush()
        os._exit(2)
    """
    pause = "print('ready'); sys.stdout.flush(); time.sleep(1.5)"
    with (
        service(hangs=lambda method, path: path.startswith("/api/login")) as login,
        service(hangs=lambda method, path: path == "/picture") as picture,
        service() as dies,
    ):
        began = time.monotonic()
        processes = []
        for name, start_timeout, before_finish, server in [
            ("login", 1, "", login),
            ("picture", 20, "", picture),
            ("dies", 20, pause, dies),
        ]:
            values = {"name": name, "start_timeout": start_timeout, "before_finish": before_finish}
            processes.append(python(program.format(**values), server))
        for line in processes[2].stdout:
            if line == "ready\n":
                break
        dies.shutdown()
        dies.server_close()  # from here on a connection is refused, or never accepted
        outputs = [wait(process) for process in processes]
        # Without os._exit, the upload of the picture would delay the exit for 60 seconds.
        assert time.monotonic() - began < 40
    assert [process.returncode for process in processes] == [2, 2, 2]
    assert "SwanLab: no online run: no answer within 1 s" in outputs[0]
    for out in outputs[1:]:
        assert "SwanLab: the run did not finish: no answer within 2 s" in out
        assert "SwanLab: to upload this run: swanlab sync " in out


def test_errors_of_swanlab_are_reported_once_and_stop_nothing(monkeypatch, capsys):
    tracker = start("offline")

    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(tracker.run, "log", fail)
    tracker.image("predictions", "missing.png")
    tracker.log({"train/loss": 0.5}, step=1)
    finish = tracker.run.finish
    monkeypatch.setattr(tracker.run, "finish", fail)
    tracker.finish()
    finish()
    out = capsys.readouterr().out
    assert out.count("SwanLab: could not log: ") == 1
    assert "SwanLab: the run did not finish: two lines\n" in out


@pytest.mark.parametrize("log_dir", ["file", "file/swanlog"])
def test_a_folder_that_cannot_be_made_leaves_training_without_swanlab(tmp_path, capsys, log_dir):
    (tmp_path / "file").write_text("not a folder")
    tracker = start("offline", log_dir=log_dir)
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.finish()
    assert tracker.run is None
    assert re.fullmatch(r"SwanLab: no offline run: .+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "setting, mode, message",
    [
        ("offline", "offline", ""),
        ("local", "offline", "local mode is not supported"),
        ("disabled", None, ""),
        ("cloud", "offline", "no online run: "),
        ("no such mode", None, "going on without it: "),
    ],
)
def test_auto_follows_the_users_settings(monkeypatch, capsys, log_in, setting, mode, message):
    log_in(NOWHERE)
    monkeypatch.setenv("SWANLAB_MODE", setting)
    tracker = start("auto")
    assert (tracker.run.mode if tracker.run else None) == mode
    out = capsys.readouterr().out
    assert out.count("SwanLab: ") == bool(message) and message in out
    tracker.finish()


@pytest.mark.parametrize("project", ["two words", "a/b", "", "é", "x" * 101, "a\n"])
def test_a_project_name_that_swanlab_refuses(project):
    with pytest.raises(ValueError, match="--project") as raised:
        start("offline", project=project)
    assert "\n" not in str(raised.value)
