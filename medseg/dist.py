"""Several processes, started by torchrun. In one process each function here does nothing."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

# Process groups that were left. If Python freed one, it would wait for gloo's threads without
# letting go of its lock (the GIL), and a thread that is to free the last tensor needs that lock:
# in PyTorch 2.6 the process then never ends.
LEFT_GROUPS = []


def rank_and_world():
    """(number of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first():
    """Whether this is the process that prints and writes."""
    return rank_and_world()[0] == 0


def started_by_torchrun():
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def starts_first():
    """Whether this is, or will be, the first process: known before `process_group` too."""
    return os.environ.get("RANK", "0") == "0"


def restart_count():
    """How often torchrun has started this training again because a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


@contextmanager
def process_group(device):
    """Join the other processes of torchrun, within; with one process, nothing."""
    if started_by_torchrun():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world,
            timeout=timedelta(hours=1),
            # A prefix for each attempt: after a restart the store still has the addresses of the
            # dead processes.
            store=dist.PrefixStore(str(restart_count()), store),
        )
    yield
    if dist.is_initialized():
        LEFT_GROUPS.append(dist.group.WORLD)
        dist.destroy_process_group()


class SumOverRanks(torch.autograd.Function):
    """A tensor's sum over all processes.

    Its gradient is summed too: with DDP's mean over the processes, that is the right one.
    """

    @staticmethod
    def forward(ctx, part):
        total = part.clone()
        dist.all_reduce(total)
        return total

    backward = forward


def all_reduce_sum(part):
    """The sum of a tensor over all processes, differentiable."""
    return SumOverRanks.apply(part) if dist.is_initialized() else part


def all_gather(items):
    """The lists of all processes as one list, the same in each. items: what can be pickled."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def all_reduce_max(*numbers):
    """The largest of each number over all processes, which wait for each other here."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: the GPU is not waited for
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


@contextmanager
def first_on_each_machine():
    """Let one process of each machine do something (make a cache, say) before the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        all_reduce_max(0)
    yield
    if first:
        all_reduce_max(0)


class SharedDropout(torch.nn.Dropout):
    """Dropout that draws the noise of the whole batch in each process and takes its own part.

    The result is then the same for any number of processes, of which each has every n-th image of
    the batch. How many images that is they ask each other, on the CPU: the last batch of an epoch
    is smaller, and nobody but them has to know.
    """

    def __init__(self, p):
        super().__init__(p)
        # A number from other processes cannot be compiled. Not as a decorator, which would import
        # the compiler in every run.
        self.forward = torch.compiler.disable(self.forward)

    def forward(self, x):
        if not self.training:
            return x
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if channels_last else torch.contiguous_format
        global_batch_size = int(all_reduce_sum(torch.tensor(len(x))))
        shape, (rank, world) = (global_batch_size, *x.shape[1:]), rank_and_world()
        noise = torch.ones(shape, dtype=x.dtype, device=x.device).contiguous(memory_format=order)
        return x * F.dropout(noise, self.p)[rank::world]


def distribute(model):
    """`model` wrapped so that all processes train one; in a single process, the model itself.

    What is saved stays the model itself, whose weights keep their names.
    """
    if rank_and_world()[1] == 1:
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Dropout):
            model.set_submodule(name, SharedDropout(module.p))
    return DistributedDataParallel(model)


def synchronize_batch_norm(model, device):
    """Have batch normalisation see the whole batch, as in one process. ValueError on a CPU."""
    has_batch_norm = any(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules())
    if rank_and_world()[1] == 1 or not has_batch_norm:
        return model
    if device.type != "cuda":
        raise ValueError("--norm batch in several processes needs GPUs: use --norm group")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
