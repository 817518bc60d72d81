"""Trackers: the real libraries, with files and with local servers that misbehave."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT, SMALL, output_of, run_python, start_python, wait_until
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


# ---- what all share --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, name",
    [
        ((), "bs32-epoch40"),
        (("--batch-size", "8", "--epochs", "20"), "bs8-epoch20"),
        (("--batch-size", "8", "--recipe", "strong"), "bs8-epoch40-strong"),
        (("--experiment-name", "mine"), "mine"),
    ],
)
def test_the_experiment_is_named_after_batch_size_epochs_and_recipe(flags, name, monkeypatch):
    begun = []
    stub = ("", lambda *given: begun.append(given), ["local"])
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", stub)
    start("--tracker", "mlflow", *flags)
    assert begun[0][1:3] == ("Brain", name)


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
    monkeypatch.setattr(tracking, "CALL", 0.2)
    monkeypatch.setattr(tracking, "START", 0.2)

    def hang(*given):
        calls.append(given)
        never.wait(10)

    tracker = Tracker("Stub", stub(hang), ["local"])
    for step in (1, 2):
        tracker.log({"train/loss": 0.5, "val/iou": float("nan")}, step=step)
    tracker.finish()
    assert calls == [("train/loss", 0.5, 1)]
    assert "see it" in capsys.readouterr().out  # for not all was uploaded
    Tracker("Stub", hang, ["online", "offline"])  # which may wait for a lock of the first
    assert calls[1:] == [("online",)]
    never.set()


@pytest.mark.parametrize("name", ["swanlab", "tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_its_command(name, monkeypatch, refused):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    refused("train", "--tracker", name, words=["--tracker", f"pip install {name}"])


@pytest.mark.parametrize("flags", [("--swanlab", "disabled"), ("--tracker", "none")])
def test_nothing_is_recorded_where_that_is_asked_for(flags, monkeypatch):
    for name, (title, _, modes) in tracking.TRACKERS.items():
        monkeypatch.setitem(tracking.TRACKERS, name, (title, None, modes))
    tracker, runs = start(*flags, runs={"swanlab": "kept"})
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.image("predictions", "missing.png")
    tracker.finish(failed=True)
    assert runs == {"swanlab": "kept"}


# ---- TensorBoard, Weights & Biases, MLflow: read back with their own libraries ---------------


def record(name):
    """A run that is stopped after an epoch, and goes on; its id."""
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
    assert after == runs and list(runs) == [name]
    return runs[name]


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_tensorboard(capsys):
    run_id = record("tensorboard")
    events, scalars = read_tensorboard(f"a run/tensorboard/{run_id}")
    assert scalars.pop("train/loss") == [(1, 0.5), (2, 0.125)]
    assert scalars.pop("test/dice") == [(0, 0.75)]
    assert list(scalars.values()) == [[(1, 0.25)]]  # the tag of a class in its own spelling
    (image,) = events.Images("predictions")
    assert (image.width, image.height) == (8, 8)
    assert "tensorboard --logdir" in capsys.readouterr().out


def test_train_py_writes_its_keys_to_tensorboard_and_goes_on_there(dataset, no_pictures):
    flags = (*SMALL[:6], "--device", "cpu", "--tracker", "tensorboard", "--out", "run")
    output_of("train.py", *flags, "--epochs", 1, "--data", dataset, cwd=Path.cwd())
    output_of("train.py", "--resume", "--epochs", 2, "--out", "run", cwd=Path.cwd())
    (folder,) = Path("run/tensorboard").iterdir()
    _, scalars = read_tensorboard(folder)
    rows = Path("run/metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[rows[0].split(",").index("train_loss")]) for row in rows[1:]]
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(losses, rel=1e-5)
    assert [step for step, _ in scalars["val/dice"]] == [1, 2] and "test/dice" in scalars


def read_wandb(folder):
    """({key: [(step, value)]}, exit codes) of offline runs: LevelDB's logs of W&B's messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    values, codes = {}, []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        data, place, part = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if (left := 32768 - place % 32768) < 7:  # no header fits at the end of a block
                place += left
            _, size, kind = struct.unpack_from("<IHB", data, place)
            part += data[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or its last part
                (record := Record()).ParseFromString(part)
                part = b""
                items = {one.nested_key[0]: one.value_json for one in record.history.item}
                for key in items:
                    values.setdefault(key, []).append((int(items["_step"]), items[key]))
                codes += [record.exit.exit_code] if record.HasField("exit") else []
    return values, codes


@pytest.mark.slow
def test_wandb_offline(capsys):
    record("wandb")
    folder = Path("a run/wandb")
    wait_until(lambda: read_wandb(folder)[1] == [1, 0])  # another process writes it
    values, _ = read_wandb(folder)
    assert values["train/loss"] == [(1, "0.5"), (2, "0.125")]
    assert values["val/dice/Tümor (1)"] == [(1, "0.25")] and values["test/dice"][0][1] == "0.75"
    assert "val/iou" not in values and "predictions" in values
    assert list(folder.rglob("media/images/predictions*.png"))
    assert "wandb sync" in capsys.readouterr().out


@pytest.mark.slow
def test_mlflow_without_a_server(capsys):
    from mlflow import MlflowClient

    run_id = record("mlflow")
    client = MlflowClient(f"sqlite:///{Path('a run').absolute()}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "bs32-epoch40"
    assert client.get_experiment(run.info.experiment_id).name == "Brain"
    assert run.data.params["augment"] == "none"
    history = client.get_metric_history(run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 0.5), (2, 0.125)]
    assert run.data.metrics["test/dice"] == 0.75 and run.data.metrics["val/dice/T_mor _1_"] == 0.25
    assert "val/iou" not in run.data.metrics
    (artifact,) = client.list_artifacts(run_id)
    assert Path(client.download_artifacts(run_id, artifact.path)).read_bytes()[1:4] == b"PNG"
    assert "mlflow ui" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swanlab", "tensorboard", "mlflow"])  # W&B takes another
def test_a_folder_that_cannot_be_made_leaves_training_without_it(name, capsys):
    Path("file").write_text("not a folder")
    tracker, runs = start("--tracker", name, "--out", "file/run")
    tracker.log({"train/loss": 0.5}, step=1)
    tracker.finish()
    assert tracker.run is None and runs == {}
    assert ": could not start " in capsys.readouterr().out


# ---- SwanLab: a stand-in for the service -----------------------------------------------------


class Service(BaseHTTPRequestHandler):
    """Just enough of the SwanLab API. `server.requests` keeps (method, path, body)."""

    protocol_version = "HTTP/1.1"

    def respond(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        self.server.requests.append((self.command, path, body))
        if self.server.hangs(path):
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
            status = 200 if run_id == "earlier" else 201
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
def service(hangs=lambda path: False, nonsense=None):
    """A server that runs within the context; its `account` are variables for a user of it.

    hangs(path): whether a request gets no response. nonsense: bytes to respond with instead.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.daemon_threads, server.block_on_close = True, False
    server.requests, server.stop = [], threading.Event()
    server.hangs, server.nonsense = hangs, nonsense
    host = f"http://127.0.0.1:{server.server_port}"
    server.account = {"SWANLAB_API_HOST": host, "SWANLAB_API_KEY": "x"}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


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
    """Arguments of Python: a program that can call `start`, in a process of its own.

    SwanLab remembers the server it has logged in to, and some of it acts when the process exits.
    """
    head = "import os, signal, sys, time\nfrom test_tracking import start, tracking\n"
    return "-c", head + textwrap.dedent(text)


# ---- SwanLab: what is recorded ---------------------------------------------------------------


@pytest.mark.slow
def test_offline_needs_no_network_and_its_sync_command_uploads_everything(here):
    text = """
        tracker, runs = start("--swanlab", "offline", "--out", "it's a folder")
        print("run", runs["swanlab"])
        tracker.log({"train/loss": 0.5, "val/dice": 0.25, "val/iou": float("nan")}, step=1)
        tracker.log({"train/loss": 0.125}, step=2)
        tracker.image("predictions", "p.png")
        tracker.finish()
    """
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    result = run_python(*program(text), cwd=here, **proxies)
    assert result.returncode == 0 and result.stdout.count("swanlab sync") == 1, result.stderr
    run_id = re.search("^run (.*)$", result.stdout, re.MULTILINE)[1]
    command = re.search("swanlab sync .*", result.stdout)[0]
    with service() as server:  # the command goes to a shell, as when a person pastes it
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, **server.account, "PATH": path}
        subprocess.run(command, shell=True, check=True, env=environment, timeout=LIMIT)
        values, pictures, state = uploaded(server, run_id)
    expected = {("train/loss", 1): 0.5, ("val/dice", 1): 0.25, ("train/loss", 2): 0.125}
    assert (values, pictures, state) == (expected, ["predictions"], "FINISHED")


@pytest.mark.slow
def test_online_uploads_continues_a_run_and_leaves_signals_and_exit_status_to_us(here):
    text = """
        def leave(number, frame):
            sys.exit(128 + number)

        signal.signal(signal.SIGINT, leave)
        signal.signal(signal.SIGTERM, leave)
        for step, runs in [(1, None), (2, {"swanlab": "earlier"}), (3, None)]:
            tracker, runs = start(runs=runs)  # with an API key, that is online
            assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is leave
            print("run", runs["swanlab"])
            tracker.log({"train/loss": 0.5, "train/epoch": step}, step=step)
            tracker.image("predictions", "p.png")
            if step < 3:
                tracker.finish()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            tracker.finish(failed=True)
    """
    with service() as server:
        result = run_python(*program(text), cwd=here, **server.account)
        assert result.returncode == 143 and "swanlab sync" not in result.stdout, result.stderr
        runs = re.findall("^run (.*)$", result.stdout, re.MULTILINE)
        assert runs[1] == "earlier" and len(set(runs)) == 3
        states = ["FINISHED", "FINISHED", "CRASHED"]
        for step, (run, state) in enumerate(zip(runs, states, strict=True), start=1):
            values = {("train/loss", step): 0.5, ("train/epoch", step): step}
            assert uploaded(server, run) == (values, ["predictions"], state)
        assert sum(path == "/picture" for _, path, _ in server.requests) == 3


# ---- what must not happen --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--swanlab auto", "--tracker wandb"])
def test_without_a_key_nothing_prompts_at_a_terminal(flags, monkeypatch):
    text = f"""
        tracker, _ = start(*{flags.split()})
        print("offline is", tracker.run.local)
        tracker.finish()
        raise SystemExit(7)
    """
    said = []

    def read(descriptor):
        said.append(os.read(descriptor, 4096))
        return said[-1]

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    status = pty.spawn(["timeout", str(LIMIT), sys.executable, *program(text)], read)
    printed = b"".join(said).decode()
    assert os.waitstatus_to_exitcode(status) == 7 and "offline is True" in printed, printed
    assert "Enter your choice" not in printed and "Traceback" not in printed


def test_online_without_a_key_is_refused():
    with pytest.raises(ValueError, match="--swanlab online"):
        start("--swanlab", "online")


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm, mode",
    [
        (None, "online"),  # no network
        ({"hangs": lambda path: True}, "auto"),  # a server that never answers
        ({"nonsense": b"<html>hotel wifi</html>"}, "auto"),
        ({"nonsense": b"[]"}, "auto"),
    ],
)
def test_without_a_service_it_is_offline_soon(harm, mode, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "ANSWER", 1)
    with service(**harm or {}) as server:
        account = server.account if harm else {**server.account, "SWANLAB_API_HOST": NOWHERE}
        for name, value in account.items():
            monkeypatch.setenv(name, value)
        began = time.monotonic()
        tracker, _ = start("--swanlab", mode)
        assert time.monotonic() - began < 6 and tracker.run.local
        tracker.finish()
    assert not tracker.hung
    assert capsys.readouterr().out.count("SwanLab: could not start online: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True])
def test_servers_that_hang_delay_neither_training_nor_exit(dies, here):
    """At the login, or once the run has begun. The process leaves as train.py does."""
    text = f"""
        tracking.START, tracking.CALL = {20 if dies else 1}, 2
        tracker, _ = start()
        tracker.log({{"train/loss": 0.5}}, step=1)
        tracker.image("predictions", "p.png")
        print("ready", flush=True)
        time.sleep(1.5)  # so long the picture is uploaded
        tracker.finish()
        assert tracker.hung
        os._exit(2)
    """
    with service(hangs=lambda path: not dies and path.startswith("/api/login")) as server:
        began, said = time.monotonic(), ""
        with start_python(*program(text), cwd=here, **server.account) as process:
            while "ready" not in said:
                said += process.stdout.readline()
            if dies:
                server.shutdown()
                server.server_close()  # from here on a connection is refused, or never accepted
            said += process.communicate(timeout=LIMIT)[0]
    # Without os._exit, the upload of the picture would delay the exit for 60 seconds.
    assert process.returncode == 2 and time.monotonic() - began < 40
    assert ("could not start online: no answer within 1 s" in said) is not dies
    assert ("could not finish: no answer within 2 s" in said) is dies
    assert ("swanlab sync " in said) is dies


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting, offline, message",
    [
        ("offline", True, ""),
        ("local", True, ""),
        ("disabled", None, ""),
        ("cloud", True, "could not start online: "),
        ("no such mode", None, "going on without it: "),
    ],
)
def test_auto_follows_the_users_settings(monkeypatch, capsys, setting, offline, message):
    monkeypatch.setenv("SWANLAB_API_HOST", NOWHERE)
    monkeypatch.setenv("SWANLAB_API_KEY", "x")
    monkeypatch.setenv("SWANLAB_MODE", setting)
    tracker, _ = start()
    assert (tracker.run.local if tracker.run else None) == offline
    out = capsys.readouterr().out
    assert out.count("SwanLab: ") == bool(message) and message in out
    tracker.finish()


@pytest.mark.parametrize("project", ["two words", "a/b", "", "é", "x" * 101, "a\n"])
def test_a_project_name_that_swanlab_refuses(project):
    with pytest.raises(ValueError, match="--project") as raised:
        tracking.swanlab_modes("offline", project)
    assert "\n" not in str(raised.value)
