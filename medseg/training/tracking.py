"""SwanLab (the tutorial's section 4): experiment tracking that can fail without consequences."""

import re
import shlex
import threading
from contextlib import suppress
from pathlib import Path

from medseg.cli import one_line
from medseg.dist import is_first


class SwanLab:
    """A run on SwanLab that never stops, blocks or crashes the training.

    mode: "online"; "offline" (files to upload later); "disabled" (imports nothing); or "auto":
        what the user's SwanLab settings say (SWANLAB_MODE, swanlab.yaml, ...), else online with
        an API key, else offline.
    config: the hyperparameters, recorded with the run. log_dir: where SwanLab keeps its files.
    run_id: the run to continue, or None for a new one; pass `self.run_id` when resuming.

    Nothing prompts. A run that cannot start online is recorded offline; if that fails too,
    training goes on without SwanLab. One line says so. Call `finish` on every way out: without it
    SwanLab's own exit hook uploads what is left, and with the network gone that never ends. If
    `hung` is true afterwards, one of its threads is stuck and may delay the exit by a minute or
    more: leave with `os._exit(status)`.

    Raises ValueError for a project name SwanLab refuses, and for "online" without an API key.
    """

    ANSWER_TIMEOUT = 5  # seconds for the API host to answer anything at all
    START_TIMEOUT = 30
    FINISH_TIMEOUT = 30

    def __init__(self, mode, *, project, experiment_name, config, log_dir, run_id=None):
        self.run = None  # the swanlab.Run, while there is one
        self.run_id, self.hung = run_id, False
        self._failed_before = False
        if mode == "disabled":
            return
        if not re.fullmatch(r"[0-9a-zA-Z_\-+.]{1,100}", project):
            raise ValueError(
                f"--project {project!r}: SwanLab takes 1 to 100 letters, digits and _ - + . here"
            )
        try:
            import swanlab

            settings = swanlab.Settings()  # environment, .env, swanlab.yaml, .netrc; no network
        except Exception as error:  # not installed, or settings it refuses
            self._print(f"going on without it: {_short(error)}")
            return
        mode = self._choose_mode(mode, settings)
        options = {
            "project": project,
            "name": experiment_name,
            "config": config,
            "log_dir": str(Path(log_dir).absolute()),
            "id": run_id,
            "resume": "allow" if run_id else "never",
        }
        if mode == "online" and not self._start(mode, options, settings.api_host):
            mode = "none" if self.hung else "offline"
        if mode == "offline":
            self._start(mode, options)

    def _choose_mode(self, mode, settings):
        if mode == "online" and not settings.api_key:
            raise ValueError(
                "--swanlab online: no API key; run `swanlab login` first, or use --swanlab offline"
            )
        if mode != "auto":
            return mode
        mode = settings.mode if "mode" in settings.model_fields_set else "online"
        if mode == "local":
            self._print("its local mode is not supported; recording offline")
        if mode == "local" or (mode == "online" and not settings.api_key):
            return "offline"
        return mode

    def _start(self, mode, options, api_host=None):
        """Start a run and return True, or say why there is none."""
        import swanlab

        if mode == "offline":
            _silence_sync_tip()
        try:
            if api_host:
                _check_reachable(api_host, self.ANSWER_TIMEOUT)
            # Off the main thread, where swanlab also leaves our SIGINT handler alone.
            self.run = _run_bounded(lambda: swanlab.init(mode=mode, **options), self.START_TIMEOUT)
            self.run_id = self.run.id
        except Exception as error:
            # If it hangs, it holds a lock that another init would wait for.
            self.hung = isinstance(error, TimeoutError)
            self._print(f"no {mode} run: {_short(error)}")
        return self.run is not None

    def log(self, values, step=None):
        """Log a dict of numbers at `step`; SwanLab keeps the first value of a key at a step.

        What has no value, NaN, is left out.
        """
        # swanlab reads tensors later, on another thread, and drops a step that is no Python int.
        numbers = {key: float(value) for key, value in values.items() if value == value}
        self._try(lambda: self.run.log(numbers, step=None if step is None else int(step)))

    def image(self, key, path):
        """Log a picture file (PNG, JPEG), read now."""

        def log_image():
            from swanlab import Image

            self.run.log({key: Image(str(path))})

        self._try(log_image)

    def _try(self, function):
        try:
            if self.run:
                function()
        except Exception as error:
            if not self._failed_before:
                self._print(f"could not log: {_short(error)} (further errors are not shown)")
            self._failed_before = True

    def finish(self, failed=False):
        """Upload what is left, for FINISH_TIMEOUT seconds at most.

        failed: mark the run as crashed.
        """
        run, self.run = self.run, None
        if run is None:
            return
        outcome = {"state": "crashed", "error": "training failed"} if failed else {}
        try:
            _run_bounded(lambda: run.finish(**outcome), self.FINISH_TIMEOUT)
        except Exception as error:
            self.hung = isinstance(error, TimeoutError)
            self._print(f"the run did not finish: {_short(error)}")
        if self.hung or run.mode == "offline":
            command = shlex.join(["swanlab", "sync", str(run.dir), "--id", run.id])
            self._print(f"to upload this run: {command}")

    @staticmethod
    def _print(text):
        print(f"SwanLab: {text}", flush=True)


def start_tracker(args, flags, checkpoint):
    """The SwanLab run of these flags; in all processes but the first, one that does nothing."""
    return SwanLab(
        args.swanlab if is_first() and not args.test_only else "disabled",
        project=args.project,
        experiment_name=args.experiment_name or experiment_name(args),
        config=flags,
        log_dir=Path(args.out) / "swanlog",
        run_id=checkpoint and checkpoint["flags"].get("swanlab_run"),
    )


def experiment_name(args):
    """The tutorial's, bs32-epoch40, and the recipe where that is not the tutorial's."""
    recipe = "" if args.recipe == "tutorial" else f"-{args.recipe}"
    return f"bs{args.batch_size}-epoch{args.epochs}{recipe}"


def _silence_sync_tip():
    """Keep swanlab from printing its sync command, twice and folded: `finish` prints it once."""
    with suppress(ImportError):  # it is private, and may move
        from swanlab.sdk.internal.run import greeting

        greeting._print_offline_tip = lambda ctx: None


def _check_reachable(host, seconds):
    """ConnectionError unless `host` answers at all; swanlab itself tries for 16 to 76 seconds."""
    import requests  # as swanlab does: the same proxies and certificates

    try:
        _run_bounded(lambda: requests.head(host, timeout=seconds), 2 * seconds)
    except Exception as error:
        raise ConnectionError(f"{host} does not answer ({type(error).__name__})") from error


def _run_bounded(function, seconds):
    """Return or raise what function() does in a daemon thread; TimeoutError if it takes longer."""
    outcome = []

    def call():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds} s")
    result, error = outcome[0]
    if error:
        raise error
    return result


def _short(error):
    return one_line(error)[:200]
