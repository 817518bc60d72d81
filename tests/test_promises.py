"""What the README promises of breakdowns, by breaking things: processes killed, disks full, folders gone, data damaged."""
import ast
import contextlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HOME, ROOT, SMALL, assert_refused, edit_annotations, make_dataset, script
from filelock import FileLock
from PIL import Image

import train
from data import load_coco, load_split
from net import load_weights


def flags(place, out, *more):
    return (*SMALL, "--data", place / "dataset", "--out", place / out, *more)


def start(place, out, *more):
    """A training in a process of its own that goes on until it is stopped, a checkpoint after every step."""
    arguments = ["train.py", *map(str, flags(place, out, "--epochs", 100_000, "--patience", 100_000, "--save-every", 0, *more))]
    process = subprocess.Popen([sys.executable, ROOT / arguments[0], *arguments[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HOME": HOME})
    until(lambda: (place / out / "metrics.csv").exists() or process.poll() is not None)
    return process


def stop(process):
    process.terminate()
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- resuming --------------------------------------------------------------------------------

def test_killed_at_random_moments_it_ends_with_the_same_bits():
    """20 kills here; `python tests/kill.py --kills 200` is the campaign."""
    result = subprocess.run([sys.executable, ROOT / "tests" / "kill.py"], text=True, capture_output=True, timeout=300, env={**os.environ, "HOME": HOME})
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)
    assert "20 kills" in result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("trained")
    make_dataset(place / "dataset")
    train.main(list(map(str, flags(place, "run", "--epochs", 2, "--save-every", 0))))
    return place


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)  # with the times of the images, so that the cache is good
    return tmp_path


@pytest.mark.parametrize("harm", ["cut", "empty", "flipped", "gone"])
def test_the_checkpoint_before_the_last_is_used_with_a_loud_line(copy, harm, capsys):
    last = copy / "run" / "last.pth"
    content = last.read_bytes()
    if harm == "gone":
        last.unlink()  # as between the two renamings of a new one
    else:
        middle = content.index(load_weights(last)["model"]["outc.weight"].numpy().tobytes())  # bits of a weight: still a readable file
        last.write_bytes({"cut": content[:middle], "empty": b"", "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]}[harm])
    train.main(list(map(str, flags(copy, "run", "--resume"))))
    said = capsys.readouterr().err
    assert "WARNING" in said and "last.previous.pth" in said
    assert torch.equal(load_weights(last)["model"]["outc.weight"], torch.load(copy / "run" / "last.pth", weights_only=True)["model"]["outc.weight"])
    assert len(load_weights(last)["progress"]["history"]) == 2


def test_resuming_wants_the_same_data(copy, refused):
    edit_annotations(copy / "dataset" / "valid", lambda content: content["annotations"].pop())
    refused("train", *flags(copy, "run", "--resume"), words=["other data", "--resume"])


def test_resuming_wants_the_same_flags_but_takes_more_epochs(copy, refused):
    for flag, value in (("--lr", 1), ("--seed", 5), ("--batch-size", 3), ("--patience", 2), ("--image-size", 64), ("--precision", "bf16")):
        refused("train", *flags(copy, "run", "--resume", flag, value), words=[flag])
    refused("train", *flags(copy, "run", "--resume", "--skip-bad"), words=["--skip-bad"])
    train.main(list(map(str, flags(copy, "run", "--resume", "--epochs", 3))))
    assert len((copy / "run" / "metrics.csv").read_text().splitlines()) == 4


# ---- stopping --------------------------------------------------------------------------------

def test_a_second_signal_ends_at_once(trained):
    """The first is held up in the middle of a step; the second must not wait for it."""
    code = ("import signal, sys, threading, time, os\n"
            "import train\n"
            "signals = train.Signals()\n"
            "with signals.installed(), signals.defer():\n"
            "    print('ready', flush=True)\n"
            "    while True: time.sleep(0.01)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    finally:
        process.kill()


# ---- files -----------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path):
    """small_disk(megabytes): a folder on a file system of its own."""
    places = []

    def mount(megabytes):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", place], capture_output=True).returncode:
            pytest.skip("mounting a small disk takes root")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk, leave):
    """A file that leaves so many bytes free."""
    space = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        file.write(bytes(max(space.f_bavail * space.f_frsize - leave, 0)))


@pytest.mark.parametrize("share", [0, 0.5, 1.5, 2.5, 3.6])
def test_a_full_disk_costs_no_checkpoint(trained, small_disk, share, capsys):
    """Room for so many last.pth: none, half of one, ... Then room is made, and the end is the calm run's."""
    disk = small_disk(16)
    shutil.copytree(trained / "run", disk / "run")
    size = (disk / "run" / "last.pth").stat().st_size
    shutil.copy(disk / "run" / "last.previous.pth", disk / "run" / "last.pth")  # a step before the end
    before = load_weights(disk / "run" / "last.pth")
    fill(disk, int(share * size))
    arguments = ["--out", disk / "run", "--resume", "--epochs", 3, "--data", trained / "dataset"]
    result = script("train.py", *arguments, cwd=trained)
    assert result.returncode in (0, 2) and "Traceback" not in result.stderr, result.stderr
    for path in (disk / "run").glob("*.pth"):
        load_weights(path)
    if result.returncode == 2:
        assert str(disk) in result.stderr and "No space left" in result.stderr and not list((disk / "run").glob(".*.tmp"))
    if share == 0:
        assert result.returncode == 2 and "WARNING" in result.stderr and "--resume" in result.stderr.splitlines()[-1]
        assert same_step(load_weights(disk / "run" / "last.pth"), before)
    (disk / "filler").unlink()
    train.main(list(map(str, arguments)))
    if not (trained / "three").exists():
        train.main(list(map(str, flags(trained, "three", "--epochs", 3))))
    wanted, found = (load_weights(out / "last.pth")["model"] for out in (trained / "three", disk / "run"))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def same_step(one, other):
    return all(one["progress"][key] == other["progress"][key] for key in ("epoch", "step"))


def test_a_folder_that_becomes_read_only_while_it_runs(copy):
    process = start(copy, "out")
    if subprocess.run(["mount", "--bind", copy / "out", copy / "out"], capture_output=True).returncode:
        stop(process)
        pytest.skip("mounting takes root")
    try:
        until(lambda: not subprocess.run(["mount", "-o", "remount,bind,ro", copy / "out"], capture_output=True).returncode)  # not while a file is open
        time.sleep(0.5)
        said = stop(process)
    finally:
        subprocess.run(["umount", "--lazy", copy / "out"], check=True)
    assert process.returncode == 2 and "WARNING" in said and "Read-only" in said.splitlines()[-1]
    done = load_weights(copy / "out" / "last.pth")["progress"]["epoch"]
    train.main(list(map(str, flags(copy, "out", "--resume", "--epochs", done + 1, "--patience", 100_000))))


def test_a_folder_that_is_removed_while_it_runs_is_written_again(copy):
    process = start(copy, "gone")
    with contextlib.suppress(OSError):  # it is written to meanwhile
        shutil.rmtree(copy / "gone")
    until(lambda: (copy / "gone" / "last.pth").exists())
    stop(process)
    assert process.returncode == 143
    load_weights(copy / "gone" / "last.pth")


# ---- a run that has gone wrong ---------------------------------------------------------------

class Line(torch.nn.Module):
    """The smallest network: no dropout, so that a skipped step draws nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        return torch.sigmoid(self.conv(x))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, 8, generator=generator), (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()


def spoiled(value):
    images, masks = batch(9)
    images[0, 0, 0, 0] = value
    return images, masks


@pytest.mark.parametrize("optimizer", [lambda weights: torch.optim.Adam(weights, lr=0.1, fused=True), lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(value, optimizer, tmp_path):
    """Three good steps with a bad one between them end with the bits of three good ones."""
    good, bad = Line(), Line()
    history = [train.train_model(model, batches, [batch(5)], train.combined_loss, optimizer(model.parameters()), 2, "cpu", out=tmp_path)
               for model, batches in ((good, [batch(0), batch(1), batch(2)]), (bad, [batch(0), spoiled(value), batch(1), batch(2)]))]
    assert [row["skipped"] for row in history[0]] == [0, 0] and [row["skipped"] for row in history[1]] == [1, 1]
    assert history[0][1]["train_loss"] == history[1][1]["train_loss"] and history[0][1]["train_dice"] == history[1][1]["train_dice"]
    assert torch.equal(good.conv.weight, bad.conv.weight) and torch.equal(good.conv.bias, bad.conv.bias)


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient(tmp_path):
    model = Line()
    before = model.conv.weight.clone()
    with pytest.raises(ValueError, match="never was a number"):
        train.train_model(model, [batch(0)], [batch(1)], lambda pred, target: pred.mean() + math.nan, torch.optim.SGD(model.parameters(), lr=1), 1, "cpu", out=tmp_path)
    assert torch.equal(model.conv.weight, before)


def test_it_stops_after_too_many_in_a_row_and_says_where(tmp_path):
    model = Line()
    good, bad = [batch(0)] * 3, [spoiled(math.nan)] * 30
    train.train_model(model, good, [batch(1)], train.combined_loss, torch.optim.Adam(model.parameters(), fused=True), 1, "cpu", out=tmp_path)
    best = load_weights(tmp_path / "best_model.pth")
    before = model.conv.weight.clone()
    with pytest.raises(ValueError, match=r"epoch 1, step 23: .*not finite.* 20 steps in a row.*--lr"):
        train.train_model(model, good + bad, [batch(1)], train.combined_loss, torch.optim.Adam(model.parameters(), lr=0, fused=True), 1, "cpu", out=tmp_path)
    assert torch.equal(model.conv.weight, before)
    assert torch.equal(load_weights(tmp_path / "last.pth")["model"]["conv.weight"], before)
    assert torch.equal(load_weights(tmp_path / "best_model.pth")["conv.weight"], best["conv.weight"])


@pytest.mark.parametrize("lr", [1e3, 1e20, 1e38])
def test_a_learning_rate_out_of_this_world_leaves_finite_best_weights(trained, tmp_path, lr):
    with contextlib.suppress(ValueError):  # whether it ends in numbers or in none depends on the draw
        train.main(list(map(str, flags(trained, tmp_path / "run", "--lr", lr, "--epochs", 4))))
    for path in (tmp_path / "run").glob("best_model.pth"):
        assert all(torch.isfinite(weight).all() for weight in load_weights(path).values())


def test_background_everywhere_is_warned_of_once(tmp_path, capsys):
    model = Line()
    torch.nn.init.constant_(model.conv.bias, -50)
    train.train_model(model, [batch(0)], [batch(1)], train.combined_loss, torch.optim.SGD(model.parameters(), lr=0), 6, "cpu", out=tmp_path, patience=9)
    said = capsys.readouterr().err
    background = 100 * (1 - batch(1)[1].mean().item())
    assert said.count("WARNING") == 1 and f"{background:.2f} %" in said and "finds nothing" in said


def test_out_of_memory_is_one_line(trained, tmp_path):
    """Truly out of memory on the CPU: 16 filters on 4 images of 4096x4096 in 12 GiB of address space."""
    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    result = subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags(trained, tmp_path / "run", "--image-size", 4096, "--n-filters", 32, "--batch-size", 6))],
                            preexec_fn=limited, text=True, capture_output=True, timeout=120, env={**os.environ, "HOME": HOME})
    shutil.rmtree(trained / "dataset" / ".cache")  # of these huge images
    assert_refused(result, "out of memory", "--batch-size 6")


def test_out_of_gpu_memory_is_one_line(refused, monkeypatch, tmp_path):
    """The error is raised by hand: there may be no GPU here."""
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(train, "train_and_test", full)
    refused("train", "--batch-size", 48, "--out", tmp_path, words=["out of GPU memory", "--batch-size 48", "halve it"])


# ---- damaged data ----------------------------------------------------------------------------

@pytest.fixture
def damaged(dataset):
    """Five images of train are bad, each in a way of its own; one of valid; the rest is good. Returns (root, their names)."""
    (dataset / "train" / "0_train.png").write_bytes((dataset / "train" / "0_train.png").read_bytes()[:500])
    (dataset / "train" / "1_train.png").unlink()
    Image.new("RGB", (20, 30)).save(dataset / "train" / "2_train.png")

    def change(content):
        content["annotations"][3]["segmentation"] = [[1, 2, 3]]
        content["images"][4]["width"] = "wide"
    edit_annotations(dataset / "train", change)
    (dataset / "valid" / "0_valid.png").write_bytes(b"not an image")
    return dataset


def test_damage_is_found_in_one_pass_and_training_refuses(damaged, refused, capsys):
    refused("train", *SMALL, "--data", damaged, "--out", damaged / "run", words=["images[4]", "width"])
    edit_annotations(damaged / "train", lambda content: content["images"][4].update(width=48))
    refused("train", *SMALL, "--data", damaged, "--out", damaged / "run", words=["0_train.png", "4 of 6 images in train", "data.py"])
    edit_annotations(damaged / "train", lambda content: content["images"][4].update(width=0))
    result = script("data.py", damaged, cwd=damaged)
    assert result.returncode == 2 and "6 problem(s)" in result.stderr
    problems = [line for line in result.stdout.splitlines() if line.startswith("problem")]
    for word in ("0_train.png", "1_train.png", "2_train.png", "3_train.png", "images[4]", "0_valid.png"):
        assert sum(word in line for line in problems) == 1, word


def test_skip_bad_trains_on_the_rest_and_lists_what_it_left_out(damaged, capsys):
    good = Image.open(damaged / "train" / "5_train.png")
    for _ in range(2):  # the second time from the cache
        out = damaged / "run"
        train.main(list(map(str, (*SMALL, "--data", damaged, "--out", out, "--epochs", 1, "--skip-bad"))))
        said = capsys.readouterr().out
        assert "1 train, 3 valid, 4 test" in said and "6 damaged images left out" in said
        listed = (out / "skipped.txt").read_text().splitlines()
        assert len(listed) == 6
        for word in ("0_train.png", "1_train.png", "2_train.png", "3_train.png", "images[4]", "0_valid.png"):
            assert sum(word in line for line in listed) == 1, word
    rows = load_split(damaged, "train", 48, skipped=[])
    np.testing.assert_array_equal(rows[0, ..., :3], np.asarray(good))
    with pytest.raises(ValueError, match="damaged|images\\[4\\]"):
        load_split(damaged, "train", 48)  # the cache of the good ones is not taken for the whole
    edit_annotations(damaged / "train", lambda content: content["images"][4].update(width=48))
    skipped = []
    assert len(load_split(damaged, "train", 48, skipped=skipped)) == 2 and len(skipped) == 4


def test_nothing_good_left_is_an_error(dataset, refused):
    for path in (dataset / "test").glob("*.png"):
        path.write_bytes(b"damaged")
    refused("train", *SMALL, "--data", dataset, "--out", dataset / "run", "--skip-bad", words=["all 4 images in test"])


def test_records_that_are_no_records_are_all_named(dataset):
    def change(content):
        content["images"] += [5, {"id": [1]}, {"id": 0, "file_name": "again.png", "width": 3, "height": 3}, {"id": 77, "width": 3, "height": 3}]
        content["annotations"] += [None, {"image_id": 99}, {"image_id": 3, "id": {}, "segmentation": []}]
    edit_annotations(dataset / "train", change)
    bad = []
    left = load_coco(dataset / "train", bad)
    assert [line.split("annotations: ")[1].split()[0] for line in bad] == \
        ["images[6]", "images[7]", "images[8]", "images[9]", "annotations[6]", "annotations[7]", "annotations[8]"]
    assert sorted(left.imgs) == [1, 2, 4, 5]  # 0 is ambiguous, 3 has an annotation that cannot be read
    with pytest.raises(ValueError, match=r"images\[6\].*7 such"):
        load_coco(dataset / "train")


# ---- two at once -----------------------------------------------------------------------------

def test_a_second_training_in_the_same_folder_is_refused(copy):
    process = start(copy, "busy")
    try:
        second = script("train.py", *flags(copy, "busy"), cwd=copy)
        assert_refused(second, "another training", "--out")
        assert script("train.py", "--test-only", *flags(copy, "busy"), cwd=copy).returncode == 0  # that may look at it
    finally:
        stop(process)
    assert process.returncode == 143
    load_weights(copy / "busy" / "last.pth")


def test_one_waits_while_another_makes_the_cache(dataset):
    lock = FileLock(dataset / ".cache" / "lock")
    (dataset / ".cache").mkdir()
    code = f"from data import load_split; print(load_split({str(dataset)!r}, 'train', 32).shape)"
    with lock:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            assert "waiting" in process.stderr.readline()
            assert not list((dataset / ".cache").glob("*.npy"))
        except BaseException:
            process.kill()
            raise
    assert process.communicate(timeout=60)[0].strip() == "(6, 32, 32, 4)"


# ---- nothing from outside is trusted -----------------------------------------------------------

def test_every_load_is_of_weights_only():
    loads = 0
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads", "np.load", "numpy.load", "torch.jit.load"):
                loads += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True" or ast.unparse(node.func) == "np.load" and "allow_pickle" not in given, f"{path}:{node.lineno}"
    assert loads >= 2


@pytest.mark.parametrize("reader", ["annotations", "images", "archives", "checkpoints", "commands"])
def test_rubbish_ends_in_one_line(reader):
    """40 cases of each here; `python tests/fuzz.py --cases 400` is the campaign of 2000."""
    result = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", reader, "--cases", "40"], text=True, capture_output=True, timeout=300, env={**os.environ, "HOME": HOME})
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert json.loads(result.stdout.splitlines()[-1])["cases"] >= 40
