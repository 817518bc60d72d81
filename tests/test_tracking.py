"""Trackers: the real libraries, with files and with local servers that misbehave."""

import json
import os
import pty
import re
import shlex
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, output_of, run_python, wait_until
from PIL import Image

from medseg.training import tracking
from medseg.training.flags import make_parser
from medseg.training.tracking import Run, Tracker, start_tracker

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens there
LIMIT = 60  # seconds before a subprocess counts as hanging


@pytest.fixture(autouse=True)
def no_account(here, monkeypatch):
    """A user without settings, keys or proxy, in an empty folder with a picture, p.png."""
    for name in list(os.environ):
        if name.startswith(("SWANLAB_", "WANDB_", "MLFLOW_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(here))
    Image.new("RGB", (8, 8), "red").save("p.png")


def start(*flags, runs=None):
    """(a tracker as train.py starts it, the runs that last.pth would hold); runs: of a last.pth."""
    args = make_parser("").parse_args([*flags, "--project", "Brain"])
    recorded = {"lr": args.lr, "augment": "none", "data_fingerprints": ["x" * 2000]}
    tracker = start_tracker(args, recorded, {"flags": {"tracker_runs": runs}} if runs else None)
    return tracker, recorded["tracker_runs"]


def stub(function):
    """begin(mode) of a tracker whose calls are all function(...)."""
    return lambda mode: Run("id", function, function, function, ["see", "it"], local=False)


def test_errors_are_told_once_and_stop_nothing(capsys):
    def fail(*_):
        raise RuntimeError("two\nlines")

    tracker = Tracker("Stub", stub(fail), ["local"])
    tracker.image("predictions", "missing.png")
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.finish()
    tracker.finish()  # a second time does nothing
    lines = ["Stub: could not log: two lines", "Stub: could not finish: two lines"]
    assert capsys.readouterr().out.splitlines() == lines


def test_what_hangs_is_waited_for_once(monkeypatch, capsys):
    calls, never = [], threading.Event()
    for limit in ("CALL", "START"):
        monkeypatch.setattr(tracking, limit, 0.2)

    def hang(*given):
        calls.append(given)
        never.wait(10)

    tracker = Tracker("Stub", stub(hang), ["local"])
    for step in (1, 2):
        tracker.log({"train/loss": 0.5, "val/iou": float("nan")}, step=step)
    tracker.finish()
    assert "see it" in capsys.readouterr().out  # for not all was uploaded
    Tracker("Stub", hang, ["online", "offline"])  # which may wait for a lock of the first
    assert calls == [("train/loss", 0.5, 1), ("online",)]
    never.set()


def test_flags_that_cannot_be_served_are_refused_and_settings_followed(monkeypatch, refused):
    for project in ("two words", "a/b", "", "é", "x" * 101, "a\n"):
        with pytest.raises(ValueError, match="^--project .*$"):
            tracking.swanlab_modes("offline", project)
    with pytest.raises(ValueError, match="--swanlab online"):  # without a key
        start("--swanlab", "online")
    assert tracking.swanlab_modes("auto", "Brain") == ["offline"]
    monkeypatch.setenv("SWANLAB_API_KEY", "x")
    assert tracking.swanlab_modes("auto", "Brain") == ["online", "offline"]
    for mode, modes in {"offline": ["offline"], "disabled": [], "no such mode": []}.items():
        monkeypatch.setenv("SWANLAB_MODE", mode)
        assert tracking.swanlab_modes("auto", "Brain") == modes
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    for name in ("swanlab", "tensorboard", "wandb", "mlflow"):
        refused("train", "--tracker", name, words=["--tracker", f"pip install {name}"])


def test_the_experiment_is_named_after_its_flags_and_nothing_recorded_unasked(monkeypatch):
    begun = []
    for name, (title, _, modes) in tracking.TRACKERS.items():
        stub = (title, lambda *given: begun.append(given[1:3]), modes)
        monkeypatch.setitem(tracking.TRACKERS, name, stub)
    for flags in ("", "--batch-size 8 --epochs 20 --recipe strong", "--experiment-name mine"):
        start("--tracker", "mlflow", *flags.split())
    names = ["bs32-epoch40", "bs8-epoch20-strong", "mine"]
    assert begun == [("Brain", name) for name in names]
    for flags in ("--swanlab disabled", "--tracker none", "--test-only"):
        tracker, runs = start(*flags.split(), runs={"swanlab": "kept"})
        tracker.log({"train/loss": 0.5}, step=1)
        tracker.finish(failed=True)
        assert runs == {"swanlab": "kept"} and len(begun) == 3


def read_tensorboard(run_id):
    """({key: [(step, value)]}, how many pictures), like the other two."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"a run/tensorboard/{run_id}").Reload()
    tags = events.Tags()
    values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    pictures = [event for tag in tags["images"] for event in events.Images(tag)]
    return values, sum((event.width, event.height) == (8, 8) for event in pictures)


def read_wandb(run_id):
    """W&B's messages hold keys and numbers as text; the step of the run that is first is 1."""

    def read():
        values = {}
        for step, path in enumerate(sorted(Path("a run/wandb").glob("offline-run-*/*.wandb")), 1):
            pattern = rb"\x12.([a-z]+/[^\x00-\x1f\x82]+)\x82\x01.([\d.]+)"
            for key, text in re.findall(pattern, path.read_bytes(), re.DOTALL):
                values.setdefault(key.decode(), set()).add((step, float(text)))
        return {key: sorted(own) for key, own in values.items()}

    wait_until(lambda: "test/dice" in read())  # another process writes them
    return read(), len(list(Path("a run/wandb").rglob("media/images/predictions*.png")))


def read_mlflow(run_id):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Path('a run').absolute()}/mlflow.db")
    run, values = client.get_run(run_id), {}
    assert run.info.status == "FINISHED" and run.info.run_name == "bs32-epoch40"
    assert client.get_experiment(run.info.experiment_id).name == "Brain"
    assert run.data.params["augment"] == "none"
    for key in run.data.metrics:
        values[key] = [(one.step, one.value) for one in client.get_metric_history(run_id, key)]
    (artifact,) = client.list_artifacts(run_id)
    picture = Path(client.download_artifacts(run_id, artifact.path))
    return values, int(picture.read_bytes() == Path("p.png").read_bytes())


@pytest.mark.parametrize(
    "name, read, command",
    [
        ("tensorboard", read_tensorboard, "tensorboard --logdir"),
        pytest.param("wandb", read_wandb, "wandb sync", marks=pytest.mark.slow),
        pytest.param("mlflow", read_mlflow, "mlflow ui", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_and_is_read_back_with_its_own_library(name, read, command, capsys):
    Path("a run").mkdir()
    flags = ("--tracker", name, "--out", "a run")
    tracker, runs = start(*flags)
    tracker.log({"train/loss": 0.5, "val/dice/Tümor (1)": 0.25, "val/iou": float("nan")}, step=1)
    tracker.finish(failed=True)
    tracker, after = start(*flags, runs=runs)
    tracker.log({"train/loss": 0.125}, step=2)
    tracker.log({"test/dice": 0.75})
    tracker.image("predictions", Path("p.png"))
    tracker.finish()
    assert after == runs and list(runs) == [name] and command in capsys.readouterr().out
    values, pictures = read(runs[name])
    assert values.pop("train/loss") == [(1, 0.5), (2, 0.125)]
    ((_, dice),) = values.pop("test/dice")
    assert dice == 0.75 and pictures == 1
    assert list(values.values()) == [[(1, 0.25)]]  # the class in a spelling of the library's own


def test_train_py_writes_its_keys_to_tensorboard_and_goes_on_there(dataset, no_pictures):
    flags = (*SMALL[:6], "--device", "cpu", "--tracker", "tensorboard", "--out", "a run")
    output_of("train.py", *flags, "--epochs", 1, "--data", dataset, cwd=Path.cwd())
    output_of("train.py", "--resume", "--epochs", 2, "--out", "a run", cwd=Path.cwd())
    (folder,) = Path("a run/tensorboard").iterdir()
    scalars = read_tensorboard(folder.name)[0]
    rows = [row.split(",") for row in Path("a run/metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("train_loss")]) for row in rows[1:]]
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses, rel=1e-5)
    assert [step for step, _ in scalars["val/dice"]] == [1, 2] and "test/dice" in scalars


# ---- SwanLab: a stand-in for the service -----------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Just enough of the SwanLab API. `server.requests` keeps (method, path, body)."""

    protocol_version = "HTTP/1.1"

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, status = self.path.split("?")[0], 200
        self.server.requests.append((self.command, path, body))
        if self.server.answer == b"":
            time.sleep(LIMIT)
        user, project = {"username": "u", "name": "u"}, {"cuid": "p", "name": "Brain"}
        project |= {"path": "/u/Brain", "group": user, "_count": {"experiments": 0}, "version": 1}
        urls = [f"http://127.0.0.1:{self.server.server_port}/picture"]
        reply = {
            "/api/login/api_key": {"sid": "s", "expiredAt": f"2099-{DAY}", "userInfo": user},
            "/api/project/u/Brain": project,
            "/api/resources/presigned/put": {"urls": urls},
        }.get(path, {})
        if path.endswith("/experiment"):  # 201: a new experiment; 200: one to continue
            run_id = json.loads(body)["cuid"]
            status = 200 if run_id == "earlier" else 201
            reply = {"cuid": run_id, "slug": run_id, "name": "bs32", "createdAt": f"2026-{DAY}"}
        data = self.server.answer or json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_GET = do_POST = do_PUT = do_PATCH = respond

    def log_message(self, *_):
        pass


DAY = "01-01T00:00:00.000Z"


@contextmanager
def service(answer=None):
    """A server that runs within the context; its `account` are variables for a user of it.

    answer: bytes to respond with whatever is asked; if there are none, nothing gets a response.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.requests, server.answer = [], answer
        host = f"http://127.0.0.1:{server.server_port}"
        server.account = {"SWANLAB_API_HOST": host, "SWANLAB_API_KEY": "x"}
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def uploaded(server, run_id):
    """({(key, step): value}, [picture], final state) of what was sent for a run."""
    values, pictures, state = {}, [], None
    for method, path, body in server.requests:
        if (method, path) == ("POST", "/api/house/metrics"):
            post = json.loads(body)
            rows = post["metrics"] if post["experimentId"] == run_id else []
            if post["type"] == "scalar":
                values |= {(row["key"], row["index"]): row["data"] for row in rows}
            if post["type"] == "media":
                pictures += [row["key"] for row in rows]
        if method == "PUT" and path.endswith(f"/runs/{run_id}/state"):
            state = json.loads(body)["state"]
    return values, pictures, state


def program(text):
    """Arguments of Python for a process of its own: SwanLab remembers where it has logged in."""
    head = "import signal, sys\nfrom test_tracking import start, tracking\n"
    return "-c", head + textwrap.dedent(text)


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--swanlab auto", "--tracker wandb"])
def test_without_key_and_network_nothing_prompts_and_a_command_is_told(flags, monkeypatch):
    """At a terminal."""
    text = """
        tracker, runs = start(*%s, "--out", "it's a folder")
        print("run", *runs.values())
        tracker.log({"train/loss": 0.5, "val/iou": float("nan")}, step=1)
        tracker.image("predictions", "p.png")
        tracker.finish()
        raise SystemExit(7)
    """
    said = []

    def read(descriptor):
        said.append(os.read(descriptor, 4096))
        return said[-1]

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    arguments = program(text % flags.split())
    status = pty.spawn(["timeout", str(LIMIT), sys.executable, *arguments], read)
    printed = b"".join(said).decode().replace("\r", "")
    assert os.waitstatus_to_exitcode(status) == 7 and "Traceback" not in printed, printed
    assert "Enter your choice" not in printed
    # It can be pasted, whatever the name of the folder.
    command = shlex.split(re.findall(": to see this run: (.*)", printed)[-1])
    assert command[1] == "sync" and "it's a folder" in command[2] and Path(command[2]).is_dir()
    if flags == "--swanlab auto":
        assert command[3:] == ["--id", *re.findall("^run (.*)$", printed, re.MULTILINE)]


@pytest.mark.slow
def test_online_uploads_continues_a_run_and_leaves_signals_and_exit_status_to_us(here):
    text = """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, print)
        for step, runs in [(1, None), (2, {"swanlab": "earlier"})]:
            tracker, runs = start(runs=runs)  # with an API key, that is online
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is print
            print("run", runs["swanlab"])
            tracker.log({"train/loss": 0.5, "train/epoch": step}, step=step)
            tracker.image("predictions", "p.png")
            tracker.finish(failed=step == 2)
        sys.exit(7)
    """
    with service() as server:
        result = run_python(*program(text), cwd=here, **server.account)
        assert result.returncode == 7 and "swanlab sync" not in result.stdout, result.stderr
        runs = re.findall("^run (.*)$", result.stdout, re.MULTILINE)
        assert runs[1] == "earlier" != runs[0]
        for step, run, state in ((1, runs[0], "FINISHED"), (2, runs[1], "CRASHED")):
            values = {("train/loss", step): 0.5, ("train/epoch", step): step}
            assert uploaded(server, run) == (values, ["predictions"], state)
        assert sum(path == "/picture" for _, path, _ in server.requests) == 2


@pytest.mark.slow
@pytest.mark.parametrize("answer", [None, b"", b"<html>hotel wifi</html>"])
def test_without_a_service_it_is_offline_soon(answer, monkeypatch, capsys):
    """There is no network, or a server that never answers or is another one."""
    monkeypatch.setattr(tracking, "ANSWER", 1)
    with service(answer) as server:
        host = NOWHERE if answer is None else server.account["SWANLAB_API_HOST"]
        monkeypatch.setenv("SWANLAB_API_KEY", "x")
        monkeypatch.setenv("SWANLAB_API_HOST", host)
        began = time.monotonic()
        tracker, _ = start("--swanlab", "online" if answer is None else "auto")
        assert time.monotonic() - began < 6 and tracker.run.local
        tracker.finish()
    assert not tracker.hung
    assert capsys.readouterr().out.count("SwanLab: could not start online: ") == 1
