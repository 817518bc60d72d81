"""Several processes give what one does, and survive a killed worker."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, output_of, read_metrics, start_python, wait_until

from data import Batches, Order
from medseg.dist import SharedDropout, all_reduce_max, process_group
from medseg.images import MEAN, STD
from net import load_model

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def torchrun(*arguments, out, restarts=0):
    """Train in two processes; yields (torchrun, ids of its workers) once there is an epoch.

    At the end it has ended by itself; then its `said` is the output.
    """
    log = out.with_suffix(".log")
    process = start_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *(f"--max_restarts={restarts}", "--monitor_interval=0.1"),
        *(ROOT / "train.py", *arguments, "--out", out.name),
        cwd=out.parent,
        log=log,
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        wait_until((out / "metrics.csv").exists)
        command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
        listed = subprocess.run(command, capture_output=True, text=True).stdout
        yield process, list(map(int, listed.split()))
        process.wait(timeout=180)
        process.said = log.read_text()
    finally:
        process.terminate()  # and its workers with it


def train_in_two(*arguments, out):
    """What two processes print that end well."""
    with torchrun(*arguments, out=out) as (process, _):
        pass
    assert process.returncode == 0, process.said
    return process.said


def test_every_image_once_for_any_number_of_processes():
    rows, seen = np.zeros((11, 8, 8, 4), np.uint8), []
    rows[..., 0] = np.arange(11)[:, None, None]  # its number is the colour of an image
    for rank in range(3):
        batches = Batches(rows, Order(5, shuffle=True, rank=rank, world=3))
        batches.set_epoch(3)
        parts = [images[:, 0, 0, 0] * STD[0] + MEAN[0] for images, _ in batches]
        assert len(parts) == len(batches) == 3
        seen += (torch.cat(parts) * 255).round().tolist()
    assert sorted(seen) == list(range(11))


def curve(folder):
    """metrics.csv as lists of floats."""
    return [[float(value) for value in row.values()] for row in read_metrics(folder)]


# In batches of 5 of 6 images, and of 3 of 4, the last one has a single image: none for the second
# process.
@pytest.mark.parametrize("batch_size", [5, 3])
def test_two_processes_learn_as_one(dataset, tmp_path, batch_size):
    flags = (*SMALL, "--batch-size", batch_size, "--epochs", 4, "--lr", 1e-2)
    flags = (*flags, "--augment", "flip", "--tune-prediction")
    one = output_of("train.py", *flags, "--out", "one", cwd=tmp_path)
    two = train_in_two(*flags, out=tmp_path / "two")
    assert "2 x cpu" in two and two.count("epoch 1/4") == 1
    assert two.count("test with the best weights") == 1
    places = tmp_path / "one", tmp_path / "two"
    files, others = ({path.name for path in place.iterdir()} for place in places)
    assert files == others
    for row, other in zip(*map(curve, places), strict=True):
        assert other == pytest.approx(row, abs=1e-4)
    # They choose the same way to make masks, and say what they have tried.
    lines, others = ([one for one in said.splitlines() if "on valid" in one] for said in (one, two))
    assert lines == others and len(lines) > 2
    chosen = [load_model(place / "best_model.pth").info.inference for place in places]
    assert chosen[0] == chosen[1] is not None
    # What one process wrote, two resume.
    train_in_two("--resume", "--epochs", 5, out=tmp_path / "one")
    assert len(curve(tmp_path / "one")) == 5


def run_pair(function):
    """function(rank) in two forks, which find the environment that torchrun makes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])

    def run(rank):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **place)
        sys.setswitchinterval(1000)  # nobody is given the GIL who does not wait for long
        with process_group(torch.device("cpu")):
            function(rank)

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in (0, 1)]
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


def test_a_killed_worker_is_restarted_and_the_result_is_the_same(dataset, tmp_path):
    flags = (*SMALL, "--epochs", 12, "--save-every", 0)
    train_in_two(*flags, out=tmp_path / "calm")
    with torchrun(*flags, out=tmp_path / "hit", restarts=2) as (hit, workers):
        os.kill(max(workers), signal.SIGKILL)
    assert hit.returncode == 0, hit.said
    assert hit.said.count("images at 32x32") == 2, hit.said  # it began twice
    assert curve(tmp_path / "hit") == curve(tmp_path / "calm")


@pytest.mark.usefixtures("no_pictures")
def test_stopping_reaches_all_processes(dataset, tmp_path):
    endless = (*SMALL, "--epochs", 5000, "--patience", 5000)
    with torchrun(*endless, out=tmp_path / "run") as (process, workers):
        os.kill(workers[0], signal.SIGTERM)
    assert process.said.count("stopped by SIGTERM") == 2
    epochs = len(curve(tmp_path / "run"))
    output_of("train.py", "--resume", "--epochs", epochs + 1, "--out", "run", cwd=tmp_path)
    assert len(curve(tmp_path / "run")) == epochs + 1
