"""What the tools share: this repository on sys.path, a process and its cost, the machine, a table.

Not a tool: the others import it first, so that they can import the scripts, medseg and the tests'
helpers.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def run(command, cwd=None):
    """Run a command, SwanLab off. Returns what `wait_for` does."""
    environment = {**os.environ, "SWANLAB_MODE": "disabled"}
    with tempfile.NamedTemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        result = wait_for(process.pid, started, log.name)
        process.returncode = 0
    return result


def wait_for(pid, started, log):
    """Wait for a child whose output is in the file `log`; RuntimeError where it fails.

    Returns a dict: its last line of JSON, its output as `text`, `wall` seconds since `started` and
    its `peak_mib` of memory.
    """
    _, status, usage = os.wait4(pid, 0)
    wall, text = time.perf_counter() - started, Path(log).read_text()
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise RuntimeError(f"process {pid} ended with {code}:\n{text[-3000:]}")
    results = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    last = results[-1] if results else {}
    return {**last, "wall": wall, "peak_mib": usage.ru_maxrss / 1024, "text": text}


def prepare_forks():
    """Make this process, which has imported PyTorch, one that forks can start from."""
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork


def describe_machine():
    """Processor, cores, GPU and versions, as a dict for JSON."""
    import torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table_row(*cells):
    """A row of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"
