"""Device and precision: what 'auto' chooses, what a run records of it, and what a GPU is told."""

import copy

import pytest
import torch
from helpers import SMALL, output_of, run_python

from medseg import device
from medseg.training.optim import AdamW, GuardedStep, TrainingOptions, make_schedule
from medseg.weights import load_weights, save_weights
from net import UNet

CPU = torch.device("cpu")


def test_what_auto_chooses(monkeypatch):
    for words, expected in (
        ({"amx_bf16", "avx512_bf16", "GenuineIntel"}, "bf16"),
        ({"avx512_bf16", "AuthenticAMD"}, "bf16"),
        ({"avx512_bf16", "GenuineIntel"}, "fp32"),  # Intel's vectors of bf16 are no faster
        ({"avx2", "AuthenticAMD"}, "fp32"),
    ):
        monkeypatch.setattr(device, "describe_cpu", lambda words=words: words)
        assert device.choose_precision("auto", CPU) == expected
    assert device.choose_precision("fp16", CPU) == "fp16"
    assert device.choose_precision("auto", torch.device("mps")) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert device.choose_precision("auto", torch.device("cuda")) == "fp16"


def test_devices(monkeypatch):
    assert device.pick_device("cpu") == CPU
    kinds = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
    assert device.pick_device("auto").type == (*kinds, "cpu")[0]
    for name, said in (("warp", "warp"), ("cuda:99", "cuda:99"), ("99", "cuda:99")):
        with pytest.raises(ValueError, match=f"--device {said}: ") as error:
            device.pick_device(name)
        assert "\n" not in str(error.value)
    asked, made = [], torch.empty(0)
    monkeypatch.setattr(torch, "empty", lambda *_, device: asked.append(device) or made)
    monkeypatch.setenv("LOCAL_RANK", "3")  # torchrun: a GPU for each process
    for name in ("cuda", "1", "cuda:2", "cpu"):
        device.pick_device(name)
    assert asked == ["cuda:3", "cuda:1", "cuda:2", "cpu"]


@pytest.mark.usefixtures("no_pictures")
def test_the_choice_is_printed_recorded_and_kept(dataset, tmp_path, monkeypatch, refused):
    def run(out, *flags):
        said = output_of("train.py", *SMALL, "--out", out, *flags, cwd=tmp_path)
        return said, load_weights(tmp_path / out / "last.pth")

    monkeypatch.setattr(device, "describe_cpu", lambda: {"amx_bf16"})
    said, straight = run("whole", "--epochs", 2)
    assert "cpu, bf16;" in said and straight["flags"]["computed_in"] == ["cpu", "bf16"]
    run("parts", "--epochs", 1)
    monkeypatch.setattr(device, "describe_cpu", set)  # another machine
    resume = ("--resume", "--precision", "auto", "--epochs")
    _, parts = run("parts", *resume, 2)
    for name, weight in straight["model"].items():
        assert torch.equal(weight, parts["model"][name])
    # A run that moves to another kind of device chooses anew.
    parts["flags"]["computed_in"] = ["cuda", "fp16"]
    save_weights(tmp_path / "parts" / "last.pth", parts)
    assert run("parts", *resume, 3)[1]["flags"]["computed_in"] == ["cpu", "fp32"]
    other = (*SMALL, "--out", "parts", "--resume", "--precision", "bf16")
    refused("train", *other, words=["--precision"])


@pytest.mark.slow
def test_threads_spin_briefly_and_the_compiler_stays_away(tmp_path, monkeypatch):
    program = """
import sys
import train
import torch
from medseg.training.optim import AdamW, GuardedStep, TrainingOptions
model = torch.nn.Linear(2, 1)
optimizer = AdamW(model.parameters(), fused=True)
step = GuardedStep(model, optimizer, torch.device("cpu"), TrainingOptions())
step.begin()
step.finish(model(torch.ones(3, 2)).sum())
assert "torch._dynamo" not in sys.modules, "the compiler takes a second, and only for --compile"
"""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # importing torch here has set it
    result = run_python("-c", program, cwd=tmp_path, OMP_DISPLAY_ENV="VERBOSE")
    assert result.returncode == 0, result.stderr
    if "GOMP_" not in result.stderr:
        pytest.skip("this PyTorch has no libgomp")
    assert "GOMP_SPINCOUNT = '10000'" in result.stderr


def test_the_optimizer_is_pytorchs_to_the_last_bit():
    torch.manual_seed(0)
    model = UNet(n_filters=2).eval()
    pairs, images, masks = [], torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    for kind in (AdamW, torch.optim.AdamW):
        own = copy.deepcopy(model)
        optimizer = kind(own.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        schedule = make_schedule(optimizer, "cosine", 1, 3)
        step = GuardedStep(own, optimizer, CPU, TrainingOptions(schedule=schedule))
        for _ in range(3):
            step.begin()
            step.finish(((own(images) - masks) ** 2).mean())
        pairs.append((list(own.parameters()), optimizer.state_dict()))
    torch.testing.assert_close(*pairs, rtol=0, atol=0)
    optimizer.load_state_dict(pairs[0][1])  # PyTorch's reads it


def test_cudnn_tries_its_algorithms_where_the_sizes_are_fixed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for kind, one_size in (("cpu", True), ("cuda", True), ("cuda", False)):
        device.tune_convolutions(torch.device(kind), one_size=one_size)
        assert torch.backends.cudnn.benchmark == (kind == "cuda" and one_size)
