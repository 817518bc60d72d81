"""Which device, which precision, and how a CPU's memory is kept."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch


def pick_device(name="auto"):
    """torch.device for 'auto' (cuda, else mps, else cpu), a name, or the number of a GPU.

    Under torchrun 'cuda' is the GPU of this process. Raises ValueError where there is none such.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    elif name.isdecimal():
        name = f"cuda:{name}"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter of a PyTorch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name}: {reason}; use --device auto (or cpu)") from None


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
    words = describe_cpu()
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def describe_cpu():
    """The set of the names of the CPU's maker and instructions: AuthenticAMD, amx_bf16, ..."""
    with suppress(OSError):
        return set(Path("/proc/cpuinfo").read_text().split())
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # from PyTorch 2.11 on
    return {*platform.processor().split(), *(name for name, value in flags.items() if value)}


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
