"""Device and precision: what 'auto' chooses, what a run records of it, and what a GPU is told."""

import copy
import importlib
import math
import multiprocessing
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, SMALL, make_dataset
from torch.utils.flop_counter import FlopCounterMode

import data
from medseg import device, dist, threads
from medseg.device import find_precision
from medseg.layers import ARCHITECTURES
from medseg.training.optim import AdamW, GuardedStep
from medseg.weights import load_weights, save_weights
from net import UNet

CPU = torch.device("cpu")
LONG = 10**9  # images

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
    assert device.has_avx512_bf16() == ("avx512_bf16" in expected)


# ---- whether to time --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [{}, {"depth": 1}, {"depth": 3}, ARCHITECTURES["drive"], ARCHITECTURES["study"]]
)
def test_operations_are_those_that_pytorch_counts(words):
    model = UNet(n_filters=4, **words).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    assert device.forward_operations(model, 64) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.fixture
def timings(monkeypatch):
    """A CPU with avx512_bf16 and no AMX, whose timings answer timings.speedup and are counted."""

    def bf16_speedup(model, size, batch_size, *, training):
        timings.calls.append((size, batch_size, training))
        return timings.speedup

    timings = type("Timings", (), {"speedup": 2.0, "calls": []})
    monkeypatch.setattr(device, "cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.setattr(device, "bf16_speedup", bf16_speedup)
    return timings


def find(name="auto", place=CPU, images=LONG, **more):
    return find_precision(
        name, place, UNet(n_filters=2), images=images, size=32, batch_size=4, **more
    )


def test_a_timing_decides_where_the_flag_leaves_it_open(timings):
    for timings.speedup, expected in ((2.14, "bf16"), (1.3, "bf16"), (1.29, "fp32"), (0.1, "fp32")):
        precision, note = find(training=True)
        assert precision == expected and f"{timings.speedup:.1f}x" in note
    assert timings.calls == [(32, 4, True)] * 4


def test_a_timing_is_made_where_it_is_repaid(timings):
    image = device.forward_operations(UNet(n_filters=2), 32)
    enough = math.ceil(device.WORTH_TIMING / image)
    assert find(images=enough)[0] == "bf16" and len(timings.calls) == 1
    assert find(images=enough - 1) == find(images=0) == ("fp32", "")
    assert len(timings.calls) == 1


def test_nothing_is_timed_where_the_answer_is_known(timings, monkeypatch):
    assert find("fp32") == ("fp32", "") and find("bf16") == ("bf16", "")
    assert find(place=torch.device("mps")) == ("fp32", "")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert find(place=torch.device("cuda")) == ("fp16", "")
    for flags, expected in (({"avx2"}, "fp32"), ({"avx512_bf16", "amx_bf16"}, "bf16")):
        monkeypatch.setattr(device, "cpu_flags", lambda flags=flags: flags)
        assert find() == (expected, "")
    assert not timings.calls


def process_of_two(rank, port, flags, sender):
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    device.bf16_speedup = lambda *_, **__: 1.1 + rank  # alone, the second would take bf16
    if rank == 1:
        device.cpu_flags = lambda: flags
    with dist.process_group(CPU):
        sender.send((rank, find()))


@pytest.mark.parametrize("flags", [{"avx512_bf16"}, {"amx_bf16"}, set()])
def test_all_processes_choose_as_the_first_does(flags, timings):
    """flags: of the second's processor."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [fork.Process(target=process_of_two, args=(r, port, flags, sender)) for r in (0, 1)]
    for process in processes:
        process.start()
    answers = dict(receiver.recv() for _ in processes if receiver.poll(60))
    for process in processes:
        process.join(60)
    assert set(answers) == {0, 1} and answers[0] == answers[1]
    assert answers[0][0] == "fp32" and "1.1x" in answers[0][1]


# ---- the timing -------------------------------------------------------------------------------


def test_the_fastest_rounds_of_both_precisions_are_compared(monkeypatch):
    """On a clock of its own: two levels, and rounds that something else made slower."""
    seconds = {("fp32", 0): 30, ("bf16", 0): 10, ("fp32", 2): 12, ("bf16", 2): 8}
    now, rounds = [0.0], []

    def make_step(model, level, size, batch_size, precision, training):
        def step():
            rounds.append((level, precision))
            disturbed = rounds.count((level, precision)) != 2 and precision == "fp32"
            now[0] += seconds[precision, level] * (7 if disturbed else 1)

        return step

    monkeypatch.setattr(device, "_block_step", make_step)
    monkeypatch.setattr(device, "timing_clock", lambda: now[0])
    speedup = device.bf16_speedup(UNet(n_filters=2), 32, 4, training=True)
    assert speedup == pytest.approx((30 + 12) / (10 + 8))
    assert set(rounds) == {(level, precision) for precision, level in seconds}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("words", [{"norm": "batch"}, {"depth": 1}, ARCHITECTURES["study"]])
def test_a_timing_leaves_no_trace(words, training, monkeypatch):
    """Neither in the weights, their gradients and statistics, nor in PyTorch's random numbers."""
    monkeypatch.setattr(device, "TIMED_OPERATIONS", 1e6)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: counts.append(count))
    model, counts = UNet(n_filters=2, **words), []
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert device.bf16_speedup(model, 32, 4, training=training) > 0
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert counts == [1, torch.get_num_threads()]


@pytest.mark.parametrize("level, shape", [(0, (5, 16, 32, 32)), (2, (7, 64, 8, 8))])
def test_what_is_timed_is_what_a_training_computes(level, shape):
    """Channels and sides of that level, channels_last, in bf16, forward and backward."""
    model, inputs = UNet(n_filters=8), []
    conv = model.get_submodule(f"up{5 - level}.conv1")
    conv.register_forward_hook(lambda _, given, output: inputs.append((*given, output)))
    device._block_step(model, level, 32, 7, "bf16", True)()
    ((x, output),) = inputs
    assert tuple(x.shape)[1:] == shape[1:] and 1 <= len(x) <= 7
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype == torch.bfloat16 and output.grad_fn is not None


# ---- what a run records ----------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, timings, monkeypatch, no_pictures):
    """A folder with a data set, where even the smallest training is long enough for a timing."""
    monkeypatch.setattr(device, "WORTH_TIMING", 1)
    make_dataset(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_here(out, *flags):
    train = importlib.import_module("train")
    train.main(list(map(str, (*SMALL, "--out", out, *flags))))
    return load_weights(Path(out) / "last.pth")


def test_the_choice_is_printed_recorded_and_kept(place, timings, capsys):
    whole = train_here("whole", "--epochs", 2)
    assert "bf16 (measured 2.0x" in capsys.readouterr().out
    assert whole["flags"]["precision"] == "bf16" and timings.calls == [(32, 2, True)]
    train_here("parts", "--epochs", 1)
    timings.speedup = 0.5  # a busy machine
    again = train_here("parts", "--epochs", 2, "--resume", "--precision", "auto")
    assert again["flags"] == {**whole["flags"], "swanlab_run": again["flags"]["swanlab_run"]}
    assert len(timings.calls) == 2
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name])
    capsys.readouterr()
    train_here("parts", "--test-only")
    said = capsys.readouterr().out
    assert "cpu, bf16;" in said and len(timings.calls) == 2
    other = train_here("other", "--epochs", 2)
    assert other["flags"]["precision"] == "fp32"
    assert "fp32 (bf16 measured 0.5x" in capsys.readouterr().out


def test_a_run_of_before_goes_on_without_a_timing(place, timings):
    """Its checkpoint says auto: it was trained in fp32 here."""
    state = train_here("run", "--epochs", 1, "--precision", "fp32")
    state["flags"]["precision"] = "auto"
    save_weights(Path("run") / "last.pth", state)
    assert train_here("run", "--epochs", 2, "--resume")["flags"]["precision"] == "fp32"
    assert not timings.calls


def test_a_run_that_moves_to_another_kind_of_device_chooses_anew(place, timings, refused):
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
