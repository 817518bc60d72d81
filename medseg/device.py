"""Which device, which precision, and how a CPU's memory is kept."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch


def pick_device(name="auto"):
    """torch.device for 'auto' (cuda, else mps, else cpu), a name, or the number of a GPU.

    Raises ValueError where there is no such device.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    elif name.isascii() and name.isdecimal():
        name = f"cuda:{name}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no such device as {name!r}: use auto, cuda, mps or cpu") from None
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        # torchrun: a GPU for each process of this machine
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    exists = available.get(device.type)
    if exists and device.type == "cuda":
        exists = (device.index or 0) < torch.cuda.device_count()
    if not exists:
        raise ValueError(f"device {name} is not available here: use --device auto (or cpu)")
    return device


def available_device(device):
    """`device`, or the CPU where it is 'cuda' and there is none."""
    wants_cuda = torch.device(device).type == "cuda"
    return torch.device("cpu" if wants_cuda and not torch.cuda.is_available() else device)


def choose_precision(name, device):
    """'bf16', 'fp16' or 'fp32' for --precision `name` on `device`.

    'auto' is bf16 on a GPU or a CPU that computes in it (`computes_bf16`), fp16 on any other GPU,
    and fp32 elsewhere.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and computes_bf16() else "fp32"


def computes_bf16():
    """Whether the CPU is faster in bf16: one with Intel AMX, or an AMD one with avx512_bf16.

    Intel's vectors of bf16 without AMX are no faster than those of fp32.
    """
    flags = cpu_flags()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and is_amd())


def is_amd():
    """Whether the processor is AMD's."""
    with suppress(OSError):  # not Linux
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in platform.processor()


def cpu_flags():
    """The names of the instructions that the CPU has, amx_bf16 and avx512_bf16 among them."""
    if hasattr(torch.cpu, "get_capabilities"):  # from PyTorch 2.11 on
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


def tune_convolutions(device, *, one_size):
    """Have cuDNN try its ways to convolve on the first batch of each size, and keep the fastest.

    one_size: whether the batches are of one size; else it would try them all the time. Nothing on
    a CPU. The choice may differ from run to run, and with it the last bits of the results.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = one_size


def describe_device(device):
    """'cpu', or 'cuda (NVIDIA H200)'."""
    if device.type != "cuda":
        return device.type
    return f"{device.type} ({torch.cuda.get_device_name(device)})"


def peak_memory(device):
    """GiB that tensors have taken on a GPU at most, so far; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def make_autocast(precision, device):
    """The context in which the network runs; in 'fp32' it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def make_scaler(precision, device):
    """A GradScaler where gradients in fp16 need one, else None."""
    return torch.amp.GradScaler("cuda") if (precision, device.type) == ("fp16", "cuda") else None


def keep_freed_memory():
    """Have the C library keep the memory of freed tensors for the next ones (glibc only).

    By default it hands every large block back to the system, and a network on a CPU spends a
    third of its time on having each page of the next one mapped and cleared again.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def out_of_memory(error):
    """'GPU memory' or 'memory' where `error` says that it ran out, else None."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU memory"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "memory"
    return None
