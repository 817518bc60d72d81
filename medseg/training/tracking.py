"""Trackers of a training: SwanLab (the tutorial's section 4), TensorBoard, W&B and MLflow."""

import importlib.util
import os
import re
import shlex
import threading
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

from medseg.cli import one_line
from medseg.dist import is_first
from medseg.images import read_image

# Seconds: for a run to start, for any other call, for a server to answer anything at all.
START, CALL, ANSWER = 30, 30, 5


class Run(NamedTuple):
    """A run that a library has begun."""

    id: str
    log: Callable  # log(key, float, step), the step an int or None
    image: Callable  # image(name, path of a PNG or JPEG file)
    finish: Callable  # finish(failed): write or upload what is left
    command: list  # to see or upload it
    local: bool = True  # else the command is needed only where the upload failed


class Tracker:
    """Records a training with one of the libraries; it never stops, blocks or crashes it.

    begin(mode) -> Run, in the first of the modes that works; without any, nothing is recorded.
    Each call of a library runs in a thread and is waited for some seconds. The first that fails is
    one line, and one that hangs is the last. Call `finish` on every way out, then leave with
    `os._exit`: a stuck thread, or what a library does at the exit, may never end.
    """

    def __init__(self, title="", begin=None, modes=()):
        self.title, self.run, self.hung, self.failures = title, None, False, set()
        for mode in modes:
            self.run = self.run or self._call(f"start {mode}", lambda m=mode: begin(m), START)

    def log(self, values, step=None):
        """Log a dict of numbers at `step`. What has no value, NaN, is left out."""
        # swanlab reads tensors later, on another thread, and drops a step that is no Python int.
        numbers = {key: float(value) for key, value in values.items() if value == value}
        step = None if step is None else int(step)
        self._call("log", lambda: [self.run.log(*one, step) for one in numbers.items()])

    def image(self, name, path):
        """Log a picture file (PNG, JPEG), read now."""
        self._call("log", lambda: self.run.image(name, str(path)))

    def finish(self, failed=False):
        """Upload what is left, and say how to see the run. failed: mark it as crashed."""
        self._call("finish", lambda: self.run.finish(failed))
        if self.run and (self.run.local or self.hung):
            print(f"{self.title}: to see this run: {shlex.join(self.run.command)}", flush=True)
        self.run = None

    def _call(self, doing, function, seconds=None):
        """What function() returns; None where it fails, an earlier call has hung, or no run is."""
        if self.hung or not (self.run or seconds):
            return None
        try:
            return _run_bounded(function, seconds or CALL)
        except Exception as error:
            # It may hold a lock that another call would wait for.
            self.hung, why = isinstance(error, futures.TimeoutError), one_line(error)[:200]
            if doing not in self.failures:
                print(f"{self.title}: could not {doing}: {why}", flush=True)
            self.failures.add(doing)


# ---- the libraries: begin(mode, project, name, config, out, run_id to continue or None) ------


def swanlab_modes(mode, project):
    """The modes of SwanLab to try, of --swanlab, with no network. Nothing prompts in any of them.

    "auto" is what the user's settings say (SWANLAB_MODE, swanlab.yaml, ...), else online with an
    API key, else offline. Raises ValueError for a project name that SwanLab refuses, and for
    "online" without a key.
    """
    if mode == "disabled":
        return []
    if not re.fullmatch(r"[0-9a-zA-Z_\-+.]{1,100}", project):
        raise ValueError(f"--project {project!r}: SwanLab takes letters, digits and _ - + . here")
    try:
        import swanlab

        settings = swanlab.Settings()
    except Exception as error:  # not installed, or settings it refuses
        print(f"SwanLab: going on without it: {one_line(error)[:200]}", flush=True)
        return []
    if mode == "online" and not settings.api_key:
        raise ValueError("--swanlab online: no API key: run `swanlab login`, or give offline")
    if mode == "auto":
        mode = settings.mode if "mode" in settings.model_fields_set else "online"
        if mode == "online" and not settings.api_key:
            mode = "offline"
    return {"online": ["online", "offline"], "disabled": []}.get(mode, [mode])


def begin_swanlab(mode, project, name, config, out, run_id):
    import requests  # as swanlab does: the same proxies and certificates
    import swanlab

    if mode == "online":  # swanlab itself tries for 16 to 76 seconds
        host = swanlab.Settings().api_host
        try:
            _run_bounded(lambda: requests.head(host, timeout=ANSWER), 2 * ANSWER)
        except Exception as error:
            raise ConnectionError(f"{host} does not answer ({type(error).__name__})") from error
    options = {"project": project, "name": name, "config": config, "id": run_id}
    resume = "allow" if run_id else "never"
    run = swanlab.init(mode=mode, log_dir=str(out / "swanlog"), resume=resume, **options)
    crashed = {"state": "crashed", "error": "training failed"}
    return Run(
        run.id,
        lambda key, value, step: run.log({key: value}, step=step),  # the first of a step is kept
        lambda name, path: run.log({name: swanlab.Image(path)}),
        lambda failed: run.finish(**crashed if failed else {}),
        ["swanlab", "sync", str(run.dir), "--id", run.id],
        local=mode == "offline",
    )


def begin_tensorboard(mode, project, name, config, out, run_id):
    """In OUT/tensorboard, a folder for each run."""
    from torch.utils.tensorboard import SummaryWriter

    run_id, folder = run_id or time.strftime("%Y%m%d-%H%M%S"), out / "tensorboard"
    writer = SummaryWriter(folder / run_id, flush_secs=5)
    writer.add_text("flags", str(config))
    return Run(
        run_id,
        writer.add_scalar,
        lambda name, path: writer.add_image(name, read_image(path).pixels, dataformats="HWC"),
        lambda failed: writer.close(),
        ["tensorboard", "--logdir", str(folder)],
    )


def begin_wandb(mode, project, name, config, out, run_id):
    """As WANDB_MODE says, else online with an API key, else offline in OUT/wandb."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.setup().settings
    if not (settings.api_key or get_netrc_auth(settings.base_url)):
        mode = "offline"  # it would ask for a key
    mode = os.environ.get("WANDB_MODE", mode)
    options = {"project": project, "name": name, "config": config, "id": run_id, "dir": out}
    quiet = wandb.Settings(silent=True, console="off", init_timeout=2 * START // 3)
    run = wandb.init(mode=mode, resume="allow", settings=quiet, **options)
    return Run(
        run.id,
        lambda key, value, step: run.log({key: value}, step=step),
        lambda name, path: run.log({name: wandb.Image(path)}),
        lambda failed: run.finish(exit_code=int(failed)),
        ["wandb", "sync", str(Path(run.dir).parent)],
        local=run.offline,
    )


def begin_mlflow(mode, project, name, config, out, run_id):
    """On the server of MLFLOW_TRACKING_URI, else in OUT/mlflow.db and OUT/mlruns."""
    from mlflow import MlflowClient

    server = os.environ.get("MLFLOW_TRACKING_URI")
    uri, files = server or f"sqlite:///{out}/mlflow.db", None if server else f"{out}/mlruns"
    client = MlflowClient(uri)
    if run_id:
        client.update_run(run_id, "RUNNING")
    else:
        known = client.get_experiment_by_name(project)
        number = known.experiment_id if known else client.create_experiment(project, files)
        run_id = client.create_run(number, run_name=name).info.run_id
        for key, value in config.items():
            client.log_param(run_id, key, str(value)[:500])

    def log(key, value, step):
        key = re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)  # other characters it refuses
        client.log_metric(run_id, key, value, step=step)

    return Run(
        run_id,
        log,
        lambda name, path: client.log_artifact(run_id, path),
        lambda failed: client.set_terminated(run_id, "FAILED" if failed else "FINISHED"),
        ["mlflow", "ui", "--backend-store-uri", uri],
    )


# {--tracker: (title, begin, modes to try)}; but for the last, each has the name of its package.
TRACKERS = {
    "swanlab": ("SwanLab", begin_swanlab, None),
    "tensorboard": ("TensorBoard", begin_tensorboard, ["local"]),
    "wandb": ("W&B", begin_wandb, ["online", "offline"]),
    "mlflow": ("MLflow", begin_mlflow, ["local"]),
    "none": ("", None, []),
}


def check_tracker(name):
    """ValueError where the package of --tracker is not installed; "auto" does without."""
    if name not in ("auto", "none") and importlib.util.find_spec(name) is None:
        raise ValueError(f"--tracker {name}: is not installed: run `pip install {name}`")


def start_tracker(args, flags, checkpoint):
    """The Tracker that --tracker and --swanlab ask for; in processes but the first, of nothing.

    `flags` get the ids of its run and of those of other trackers, by which a resumed run continues.
    """
    ids, config = checkpoint["flags"].get("tracker_runs", {}) if checkpoint else {}, {**flags}
    kind = "swanlab" if args.tracker == "auto" else args.tracker
    title, begin, modes = TRACKERS[kind]
    if args.test_only or not is_first():
        modes = []
    elif kind == "swanlab":
        modes = swanlab_modes(args.swanlab, args.project)
    name, out = args.experiment_name or experiment_name(args), Path(args.out).absolute()
    known = (args.project, name, config, out, ids.get(kind))
    tracker = Tracker(title, lambda mode: begin(mode, *known), modes)
    flags["tracker_runs"] = {**ids, kind: tracker.run.id} if tracker.run else ids
    return tracker


def experiment_name(args):
    """The tutorial's, bs32-epoch40, and the recipe where that is not the tutorial's."""
    recipe = "" if args.recipe == "tutorial" else f"-{args.recipe}"
    return f"bs{args.batch_size}-epoch{args.epochs}{recipe}"


def _run_bounded(function, seconds):
    """Return or raise what function() does in a daemon thread; TimeoutError if it takes longer."""
    future = futures.Future()

    def call():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if not futures.wait([future], seconds).done:
        raise futures.TimeoutError(f"no answer within {seconds} s")
    return future.result()
