"""Which device, which precision, and how a CPU's memory is kept."""

import copy
import ctypes
import math
import os
import time
from pathlib import Path

import torch

from medseg import dist

PRECISIONS = ("fp32", "fp16", "bf16")
# bf16 is timed on a CPU whose flags leave open whether it is faster there (`find_precision`).
MIN_SPEEDUP = 1.3  # what it must gain, for its eight bits of mantissa
# Floating-point operations of all forward passes from which on a timing is repaid: on two cores,
# five seconds of prediction or twenty of training.
WORTH_TIMING = 1e12
TIMING_SECONDS, TIMING_ROUNDS = 0.3, 5  # at most, but for two rounds
TIMED_OPERATIONS = 4e8  # of a block's forward pass: some milliseconds, as in fewer bf16 looks slow
# Of this thread, which a busy machine hardly changes; on Windows it ticks too slowly.
timing_clock = time.thread_time if os.name == "posix" else time.perf_counter


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
    """'bf16', 'fp16' or 'fp32' for --precision `name` on `device`, without a timing.

    'auto' is bf16 on a GPU or a CPU that computes in it (`has_amx`), fp16 on any other GPU, and
    fp32 elsewhere.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and has_amx() else "fp32"


def find_precision(name, device, model, *, images, size, batch_size, training=False):
    """(precision, a note for the user) for --precision `name` and a run of the UNet `model`.

    As `choose_precision`, but where the CPU has instructions for bf16 that need not be faster
    (avx512_bf16), and the run is long enough to repay it, 'auto' is decided by a timing. `images`
    of `size` pixels a side, in batches of `batch_size`: what the run is going to compute; 0
    images: no timing. Of several processes, the first one decides.
    """
    precision, speedup = choose_precision(name, device), 0.0
    undecided = images and name == "auto" and device.type == "cpu" and precision == "fp32"
    if dist.is_first() and undecided and has_avx512_bf16():
        if images * forward_operations(model, size) >= WORTH_TIMING:
            speedup = bf16_speedup(model, size, batch_size, training=training)
            precision = "bf16" if speedup >= MIN_SPEEDUP else "fp32"
    rank = PRECISIONS.index(precision) if dist.is_first() else 0
    rank, speedup = dist.all_reduce_max(rank, speedup)
    precision, note = PRECISIONS[int(rank)], ""
    if speedup:
        bf16 = "" if precision == "bf16" else "bf16 "
        note = f" ({bf16}measured {speedup:.1f}x as fast as fp32)"
    return precision, note


def forward_operations(model, size):
    """Floating-point operations of a UNet for an image of size x size pixels, nearly.

    A level with c channels and n pixels multiplies and adds some 43 c^2 n times: c doubles and n
    falls to a quarter from level to level, so that all levels take the same. The bottleneck takes a
    third of that.
    """
    return 2 * 43 * (model.n_filters * size) ** 2 * (model.architecture.depth + 1 / 3)


def bf16_speedup(model, size, batch_size, *, training):
    """How many times as fast as in fp32 this CPU computes the blocks of a UNet in bf16.

    Two of its blocks, the finest and a middle one, run on random numbers as they will in the run,
    forward and, with `training`, backward, on as many rows of as many images as take some
    milliseconds. The fastest of a few rounds on one thread counts: several would wait for one
    another where other programs use the machine. Neither the model nor PyTorch's random numbers
    change.
    """
    steps = [
        _block_step(model, level, size, batch_size, precision, training)
        for level in sorted({0, model.architecture.depth // 2})
        for precision in ("fp32", "bf16")
    ]
    threads, fastest = torch.get_num_threads(), [math.inf] * len(steps)
    until = time.perf_counter() + TIMING_SECONDS
    torch.set_num_threads(1)
    try:
        for count in range(TIMING_ROUNDS):  # the first one warms up
            if count >= 2 and time.perf_counter() > until:
                break
            for index, step in enumerate(steps):
                started = timing_clock()
                step()
                fastest[index] = min(fastest[index], timing_clock() - started)
    finally:
        torch.set_num_threads(threads)
    return sum(fastest[0::2]) / sum(fastest[1::2])


def _block_step(model, level, size, batch_size, precision, training):
    """A function that runs the decoder's block of a level (0 is the finest) once."""
    block = copy.deepcopy(model.get_submodule(f"up{model.architecture.depth - level}")).eval()
    channels, side = model.n_filters * 2**level, max(size // 2**level // 2 * 2, 2)
    pixels = TIMED_OPERATIONS / (2 * 29 * channels**2)
    count = min(max(int(pixels / side**2), 1), batch_size)
    rows = min(max(int(pixels / side) // 2 * 2, 2), side)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(channels, height, width):
        values = torch.randn(count, channels, height, width, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last).requires_grad_(training)

    inputs = draw(2 * channels, rows // 2, side // 2), draw(channels, rows, side)
    autocast = make_autocast(precision, torch.device("cpu"))

    def step():
        with torch.set_grad_enabled(training):
            with autocast:
                outputs = block(*inputs)
            if training:
                torch.autograd.grad(outputs.sum(), [*inputs, *block.parameters()])

    return step


def has_amx():
    """Whether the CPU multiplies matrices of bf16 (Intel AMX): bf16 is then the faster one."""
    return "amx_bf16" in cpu_flags()


def has_avx512_bf16():
    """Whether the CPU multiplies vectors of bf16: on some, no faster than vectors of fp32."""
    return "avx512_bf16" in cpu_flags()


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
