"""Several processes against one.

They give the same curve, use every image once, write one set of files, and survive a killed worker.
"""

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import HOME, ROOT, SMALL, fork_script, output_of, wait_until

from data import Batches, Order
from medseg.dist import SharedDropout, all_reduce_max, process_group
from medseg.images import MEAN, STD
from net import load_model

pytestmark = pytest.mark.slow
TIMES = ("seconds", "images_per_second")  # these differ between any two runs


def torchrun(*arguments, cwd, restarts=0):
    """Start train.py in two processes."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", f"--max_restarts={restarts}"),
            *("--monitor_interval=0.1", str(ROOT / "train.py"), *map(str, arguments)),
        ],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "HOME": HOME, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def finish(process, timeout=180):
    """Wait for a torchrun to end; its output."""
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


def environments():
    """What torchrun tells each of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    both["GLOO_SOCKET_IFNAME"] = "lo"
    return [{**both, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def train_in_two(*arguments, cwd):
    """Run train.py in two processes forked from this one; what they print.

    They find the environment that torchrun makes. Forks need not import PyTorch.
    """

    def start(log, environment):
        def prepare():
            os.environ.update(environment)
            os.chdir(cwd)

        return fork_script("train.py", *arguments, log=log, prepare=prepare)

    logs = [cwd / "log0", cwd / "log1"]
    processes = list(map(start, logs, environments()))
    for process in processes:
        process.join(120)
        process.kill()
    said = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in processes] == [0, 0], said
    return said


def workers(process):
    """Process ids of the workers of a torchrun."""
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def curve(folder):
    """metrics.csv as a list of dicts of floats, without times."""
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(row[key]) for key in row if key not in TIMES} for row in rows]


@pytest.mark.parametrize("world", [2, 3])
def test_every_image_once_for_any_number_of_processes(world):
    rows = np.zeros((11, 8, 8, 4), np.uint8)
    rows[..., 0] = np.arange(11)[:, None, None]  # its number is the colour of an image

    def numbers(images):
        return [round((float(image[0, 0, 0]) * STD[0] + MEAN[0]) * 255) for image in images]

    seen = []
    for rank in range(world):
        batches = Batches(rows, Order(5, shuffle=True, rank=rank, world=world))
        batches.set_epoch(3)
        parts = [numbers(images) for images, _ in batches]
        assert len(parts) == len(batches) == 3
        seen += sum(parts, [])
    assert sorted(seen) == list(range(11))


# In batches of 5 of 6 images the last one has a single image: none for the second process.
@pytest.mark.parametrize("batch_size", [4, 5])
@pytest.mark.usefixtures("no_pictures")
def test_two_processes_learn_as_one(dataset, tmp_path, batch_size):
    flags = (*SMALL, "--batch-size", batch_size, "--epochs", 4, "--lr", 1e-2)
    output_of("train.py", *flags, "--out", "one", cwd=tmp_path)
    said = train_in_two(*flags, "--out", "two", cwd=tmp_path)
    assert "2 x cpu" in said and said.count("epoch 1/4") == 1
    assert said.count("test with the best weights") == 1
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files == {path.name for path in (tmp_path / "one").iterdir()}
    for row, other in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-4)
        assert other["val_loss"] == pytest.approx(row["val_loss"], abs=1e-4)
    # What one process wrote, two resume.
    train_in_two("--resume", "--epochs", 5, "--out", "one", cwd=tmp_path)
    assert len(curve(tmp_path / "one")) == 5


def run_pair(function):
    """function(rank) in two processes that make a process group, forked from this one."""

    def run(environment):
        os.environ.update(environment)
        sys.setswitchinterval(1000)  # nobody is given the GIL who does not wait for long
        with process_group(torch.device("cpu")):
            function(int(environment["RANK"]))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(own,)) for own in environments()]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("attempt", range(10))
def test_processes_that_have_just_spoken_leave_at_once(attempt):
    """In PyTorch 2.6 one pair in five hung where Python freed the process group."""
    run_pair(lambda rank: all_reduce_max(1.0))


@pytest.mark.usefixtures("no_pictures")
def test_two_processes_choose_on_valid_what_one_does(dataset, tmp_path):
    """With 4 images of valid in a batch of 3 and one of 1: none for the second process."""
    flags = (*SMALL, "--batch-size", 3, "--epochs", 2, "--lr", 1e-2, "--augment", "flip")
    flags = (*flags, "--tune-prediction")
    one = output_of("train.py", *flags, "--out", "one", cwd=tmp_path)
    two = train_in_two(*flags, "--out", "two", cwd=tmp_path)
    lines = [line for line in one.splitlines() if "on valid" in line]
    assert lines == [line for line in two.splitlines() if "on valid" in line]
    assert len(lines) > 2  # what was tried, what was chosen
    paths = [tmp_path / out / "best_model.pth" for out in ("one", "two")]
    chosen = [load_model(path).info.inference for path in paths]
    assert chosen[0] == chosen[1] is not None


def test_dropout_of_two_processes_is_that_of_one():
    batches = [torch.rand(count, 2, 3, 3) for count in (5, 1, 4)]  # of one, the second has none
    torch.manual_seed(0)
    expected = [torch.nn.functional.dropout(batch, 0.4) for batch in batches]

    def compare(rank):
        torch.manual_seed(0)
        dropout = SharedDropout(0.4)
        for batch, whole in zip(batches, expected, strict=True):
            torch.testing.assert_close(dropout(batch[rank::2]), whole[rank::2])

    run_pair(compare)


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_worker_is_restarted_and_the_result_is_the_same(dataset, tmp_path):
    flags = (*SMALL, "--epochs", 12, "--save-every", 0)
    train_in_two(*flags, "--out", "calm", cwd=tmp_path)
    hit = torchrun(*flags, "--out", "hit", cwd=tmp_path, restarts=2)
    try:
        wait_until((tmp_path / "hit" / "metrics.csv").exists)
        os.kill(max(workers(hit)), signal.SIGKILL)
    finally:
        said = finish(hit)
    assert hit.returncode == 0, said
    assert said.count("images at 32x32") == 2, said  # it began twice
    assert curve(tmp_path / "hit") == curve(tmp_path / "calm")


@pytest.mark.usefixtures("no_pictures")
def test_stopping_reaches_all_processes(dataset, tmp_path):
    endless = ("--epochs", 5000, "--patience", 5000, "--out", "run")
    process = torchrun(*SMALL, *endless, cwd=tmp_path)
    try:
        wait_until((tmp_path / "run" / "metrics.csv").exists)
        os.kill(workers(process)[0], signal.SIGTERM)  # to one of them
    finally:
        said = finish(process, 60)
    assert said.count("stopped by SIGTERM") == 2
    epochs = len(curve(tmp_path / "run"))
    output_of("train.py", "--resume", "--epochs", epochs + 1, "--out", "run", cwd=tmp_path)
    assert len(curve(tmp_path / "run")) == epochs + 1
