"""Several processes against one: the same curve, every image once, one set of files, and a killed worker made good."""
import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import HOME, ROOT, SMALL, script

from data import MEAN, STD, Batches


def torchrun(*arguments, cwd, processes=2, restarts=0):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
         f"--max_restarts={restarts}", "--monitor_interval=0.1", str(ROOT / "train.py"), *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "HOME": HOME, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def finish(process, timeout=180):
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


def curve(folder):
    with open(folder / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]


@pytest.mark.parametrize("world", [2, 3])
def test_every_image_once_whatever_the_number_of_processes(world):
    rows = np.zeros((11, 8, 8, 4), np.uint8)
    rows[..., 0] = np.arange(11)[:, None, None]
    seen = []
    for rank in range(world):
        batches = Batches(rows, 5, shuffle=True, rank=rank, world=world)
        batches.set_epoch(3)
        shares = [[round((float(image[0, 0, 0]) * STD[0] + MEAN[0]) * 255) for image in images] for images, _ in batches]
        assert len(shares) == len(batches) == 3 and batches.whole == 1
        seen += sum(shares, [])
    assert sorted(seen) == list(range(11))


# Batches of 5 of 6 images: the last one has a single image, and so nothing for the second process.
@pytest.mark.parametrize("batch_size", [4, 5])
def test_two_processes_learn_as_one(dataset, tmp_path, batch_size):
    flags = (*SMALL, "--batch-size", batch_size, "--epochs", 4, "--lr", 1e-2)
    one = script("train.py", *flags, "--out", "one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = torchrun(*flags, "--out", "two", cwd=tmp_path)
    said = finish(two)
    assert two.returncode == 0, said
    assert "2 x cpu" in said and said.count("epoch 1/4") == 1 and said.count("test with the best weights") == 1
    files = {path.name for path in (tmp_path / "two").iterdir()}
    assert files - {"last.previous.pth"} == {path.name for path in (tmp_path / "one").iterdir()}  # two save before they begin
    for row, other in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert other["train_loss"] == pytest.approx(row["train_loss"], abs=1e-4)
        assert other["val_loss"] == pytest.approx(row["val_loss"], abs=1e-4)
    # and what one process wrote, two go on with
    more = torchrun("--resume", "--epochs", 5, "--out", "one", cwd=tmp_path)
    assert finish(more) and more.returncode == 0 and len(curve(tmp_path / "one")) == 5


def workers(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_a_killed_worker_is_restarted_and_the_result_is_the_same(dataset, tmp_path):
    flags = (*SMALL, "--epochs", 12, "--save-every", 0)
    calm = torchrun(*flags, "--out", "calm", cwd=tmp_path)
    assert finish(calm) and calm.returncode == 0
    hit = torchrun(*flags, "--out", "hit", cwd=tmp_path, restarts=2)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "hit" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(max(workers(hit)), signal.SIGKILL)
    finally:
        said = finish(hit)
    assert hit.returncode == 0, said
    assert said.count("images at 32x32") == 2, said  # it began twice
    assert curve(tmp_path / "hit") == curve(tmp_path / "calm")


def test_stopping_reaches_all_processes(dataset, tmp_path):
    process = torchrun(*SMALL, "--epochs", 5000, "--patience", 5000, "--out", "run", cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(workers(process)[0], signal.SIGTERM)  # to one of them
    finally:
        said = finish(process, 60)
    assert said.count("stopped by SIGTERM") == 2
    epochs = len(curve(tmp_path / "run"))
    result = script("train.py", "--resume", "--epochs", epochs + 1, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0 and len(curve(tmp_path / "run")) == epochs + 1
