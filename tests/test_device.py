"""Device and precision: what 'auto' chooses, what a run records of it, and what a GPU is told."""

import importlib
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SMALL, make_dataset

import data
from medseg import device, threads
from medseg.training.optim import AdamW, GuardedStep
from medseg.weights import load_weights, save_weights
from net import UNet

CPU = torch.device("cpu")

# ---- what the processor has -------------------------------------------------------------------


@pytest.mark.parametrize("version", ["new", "old"])
def test_the_flags_are_those_of_the_kernel(version, monkeypatch):
    """From PyTorch 2.11 on it tells; before, the kernel does."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo here")
    if version == "old":
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    expected = {"amx_bf16", "avx512_bf16", "avx2"} & set(cpuinfo.read_text().split())
    assert {"amx_bf16", "avx512_bf16", "avx2"} & device.cpu_flags() == expected


@pytest.mark.parametrize(
    "flags, amd, expected",
    [
        ({"amx_bf16", "avx512_bf16"}, False, "bf16"),
        ({"avx512_bf16"}, True, "bf16"),
        ({"avx512_bf16"}, False, "fp32"),  # Intel's vectors of bf16 are no faster
        ({"avx2"}, True, "fp32"),
    ],
)
def test_what_auto_chooses(flags, amd, expected, monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", lambda: flags)
    monkeypatch.setattr(device, "is_amd", lambda: amd)
    assert device.choose_precision("auto", CPU) == expected
    assert device.choose_precision("fp16", CPU) == "fp16"
    assert device.choose_precision("auto", torch.device("mps")) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert device.choose_precision("auto", torch.device("cuda")) == "fp16"


def test_the_maker_of_the_processor_is_known():
    if platform.system() == "Linux":
        assert device.is_amd() == ("AuthenticAMD" in Path("/proc/cpuinfo").read_text())


# ---- what a run records ----------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch, no_pictures):
    """A folder with a data set; its processor computes in bf16."""
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"})
    make_dataset(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_here(out, *flags):
    train = importlib.import_module("train")
    train.main(list(map(str, (*SMALL, "--out", out, *flags))))
    return load_weights(Path(out) / "last.pth")


def test_the_choice_is_printed_recorded_and_kept(place, monkeypatch, capsys):
    whole = train_here("whole", "--epochs", 2)
    assert "cpu, bf16;" in capsys.readouterr().out
    assert whole["flags"]["precision"] == "bf16"
    train_here("parts", "--epochs", 1)
    monkeypatch.setattr(device, "cpu_flags", set)  # another machine
    again = train_here("parts", "--epochs", 2, "--resume", "--precision", "auto")
    assert again["flags"] == {**whole["flags"], "swanlab_run": again["flags"]["swanlab_run"]}
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name])
    capsys.readouterr()
    train_here("parts", "--test-only")
    assert "cpu, bf16;" in capsys.readouterr().out
    assert train_here("other", "--epochs", 1)["flags"]["precision"] == "fp32"


def test_a_run_that_moves_to_another_kind_of_device_chooses_anew(place, monkeypatch, refused):
    monkeypatch.setattr(device, "cpu_flags", set)
    state = train_here("run", "--epochs", 1)
    state["flags"].update({"precision": "fp16", "precision_chosen_for": "cuda"})
    save_weights(Path("run") / "last.pth", state)
    flags = train_here("run", "--epochs", 2, "--resume")["flags"]
    assert flags["precision"] == "fp32" and flags["precision_chosen_for"] == "cpu"
    # And then it is kept again.
    words = ("--out", "run", "--resume", "--epochs", 3, "--precision", "bf16", "--device", "cpu")
    refused("train", *words, words=["--precision"])
    save_weights(Path("run") / "last.pth", state)
    flags = train_here("run", "--epochs", 2, "--resume", "--precision", "bf16")["flags"]
    assert flags["precision"] == "bf16" and "precision_chosen_for" not in flags


# ---- the start of a process ------------------------------------------------------------------

START = """
import sys
import train
import torch
from medseg.training.optim import AdamW, GuardedStep

model = torch.nn.Linear(2, 1)
step = GuardedStep(model, AdamW(model.parameters(), lr=0.1, fused=True), torch.device("cpu"))
step.begin()
step.finish(model(torch.ones(3, 2)).sum())
step.load_state_dict(step.state_dict())
print("compiler imported:", "torch._dynamo" in sys.modules)
"""


@cache
def start(**environment):
    """A process that trained a step; on stderr, what libgomp has read."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))
    }
    given = {**clean, "OMP_NUM_THREADS": "1", "OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", START],
        env={**given, **environment},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),  # which is what libgomp makes of it
    ],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(environment, expected):
    said = start(**environment).stderr
    if "GOMP_" not in said:
        pytest.skip("this PyTorch has no libgomp")
    assert f"GOMP_SPINCOUNT = '{expected}'" in said


@pytest.mark.parametrize(
    "idle, own, expected",
    [
        (0.0, 10.0, "1.0 of 2 cores: OMP_NUM_THREADS=1 "),  # one other program
        (0.5, 6.5, "1.3 of 2 cores: OMP_NUM_THREADS=1 "),  # two of them
        (9.0, 10.0, ""),  # quiet: one core is this program's, the other idle
    ],
)
def test_other_programs_are_told(monkeypatch, idle, own, expected):
    """Ten seconds on two cores, of which some were idle and some this process's own."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_cores", lambda: 2)
    monkeypatch.setattr(threads, "STARTED", (100.0, 5.0, 1000.0))
    monkeypatch.setattr(threads.time, "monotonic", lambda: 110.0)
    monkeypatch.setattr(threads.time, "process_time", lambda: 5.0 + own)
    monkeypatch.setattr(threads, "idle_seconds", lambda: 1000.0 + idle)
    hint = threads.busy_hint()
    assert expected in hint and bool(hint) == bool(expected)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user has decided
    assert threads.busy_hint() == ""


def test_idle_time_lies_between_what_the_kernel_sums_up_and_all_there_was(monkeypatch):
    """/proc/uptime: seconds since the start, and those that all cores were idle in sum."""
    cores = range(os.cpu_count())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores), raising=False)
    up, idle = map(float, Path("/proc/uptime").read_text().split())
    assert idle - 5 < threads.idle_seconds() < up * len(cores) + 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert threads.idle_seconds() < up + 5


def test_training_does_not_import_the_compiler():
    """It takes a second or more, and only --compile needs it."""
    assert start().stdout.strip() == "compiler imported: False"


def test_the_optimizer_is_pytorchs_to_the_last_bit():
    torch.manual_seed(0)
    models = [UNet(n_filters=2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images, masks = torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    optimizers = []
    for kind, model in zip((AdamW, torch.optim.AdamW), models, strict=True):
        optimizer = kind(model.eval().parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        optimizers.append(optimizer)
        step = GuardedStep(model, optimizer, CPU, schedule=lambda number: 1 / (1 + number))
        for _ in range(3):
            step.begin()
            step.finish(((model(images) - masks) ** 2).mean())
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    assert ours["param_groups"] == theirs["param_groups"]
    for number, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][number][name]) for name, value in state.items())
    for optimizer, state in zip(optimizers, (theirs, ours), strict=True):
        optimizer.load_state_dict(state)


# ---- a GPU, which is not here ------------------------------------------------------------------


def test_cudnn_tries_its_algorithms_where_the_sizes_are_fixed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    device.tune_convolutions(CPU, one_size=True)
    assert not torch.backends.cudnn.benchmark
    device.tune_convolutions(torch.device("cuda"), one_size=True)
    assert torch.backends.cudnn.benchmark
    device.tune_convolutions(torch.device("cuda"), one_size=False)
    assert not torch.backends.cudnn.benchmark


def test_a_training_tells_whether_its_sizes_are_fixed(place, monkeypatch):
    train, told = importlib.import_module("train"), []
    monkeypatch.setattr(data, "tune_convolutions", lambda _, one_size: told.append(one_size))
    train_here("whole", "--epochs", 1)
    image_size = SMALL.index("--image-size")
    own_sizes = (*SMALL[:image_size], *SMALL[image_size + 2 :], "--crop", 16, "--depth", 2)
    train.main(list(map(str, (*own_sizes, "--out", "crops", "--epochs", 1))))
    assert told == [True, False]  # crops are tested on images of their own size


def test_a_gpu_is_named_and_its_memory_told(place, monkeypatch, capsys):
    train = importlib.import_module("train")
    cuda = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: f"Example {which.index}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda which: which.index << 30)
    assert device.describe_device(cuda) == "cuda (Example 3)"
    assert device.describe_device(CPU) == "cpu"
    assert device.peak_memory(cuda) == 3 and device.peak_memory(CPU) is None
    train_here("cpu", "--epochs", 1)
    assert "memory" not in capsys.readouterr().out
    named = SimpleNamespace(**vars(device))
    named.peak_memory = lambda _: device.peak_memory(cuda)
    named.describe_device = lambda _: device.describe_device(cuda)
    monkeypatch.setattr(train, "devices", named)
    train_here("gpu", "--epochs", 1)
    said = capsys.readouterr().out
    assert "cuda (Example 3), bf16" in said and "peak GPU memory 3.00 GiB" in said


def test_the_gpu_check_compares_two_trainings(place, monkeypatch, capsys):
    gpu_check = importlib.import_module("gpu_check")
    monkeypatch.setattr("train.phantoms.make_phantoms", lambda root: place / "dataset")
    assert gpu_check.main(["--device", "cpu"]) == 0
    assert "largest difference 0.0e+00" in capsys.readouterr().out
    rates = {"on-cpu": "1e-4", "on-other": "2e-4"}
    train_on = gpu_check.train_on

    def train_at_another_rate(name, folder):
        flags = gpu_check.FLAGS
        index = flags.index("--lr") + 1
        changed = (*flags[:index], rates[f"on-{name}"], *flags[index + 1 :])
        monkeypatch.setattr(gpu_check, "FLAGS", changed)
        return train_on("cpu", folder / name)

    monkeypatch.setattr(gpu_check, "train_on", train_at_another_rate)
    assert gpu_check.main(["--device", "other"]) == 1
    assert "DO NOT agree" in capsys.readouterr().out


def test_a_loss_that_is_no_number_does_not_agree():
    gpu_check = importlib.import_module("gpu_check")
    rows = [{"epoch": "1", "train_loss": "0.5", "val_loss": "0.5"}]
    for name in ("train_loss", "val_loss"):
        other = [{**rows[0], name: "nan"}]
        assert not gpu_check.compare(rows, other) <= gpu_check.TOLERANCE
