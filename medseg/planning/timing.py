"""How long a training step and a prediction take on this machine: a few of them, timed."""

import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from medseg.device import choose_precision, make_autocast

SECONDS = 2.0  # for each of both, but for the first call
# Larger images are timed at this size on a CPU, where each of their pixels takes longer: 1.26 times
# at 384x384, 1.46 times at 512x512.
TIMED_SIDE, GROWTH = 256, 2.5
OVERHEAD = 1.15  # of a step in a training: loading, augmentation, update, scores


class Times(NamedTuple):
    """Seconds of a training step, and to predict an image."""

    step: float
    image: float


def time_network(network, device, side, batch_size, precision="auto"):
    """The Times of a UNet on a device, of square images; precision: as the flag of train.py.

    A step is the passes forward and backward; no optimizer, whose first use imports a compiler.
    """
    precision = choose_precision(precision, device)
    network = network.to(device, memory_format=torch.channels_last).train()
    timed = min(side, TIMED_SIDE) if device.type == "cpu" else side
    images = torch.randn(batch_size, network.n_channels, timed, timed, device=device)
    images = images.to(memory_format=torch.channels_last)
    masks = torch.zeros(batch_size, network.n_classes, timed, timed, device=device)
    autocast = make_autocast(precision, device)

    def step():
        with autocast:
            outputs = network(images)
        F.binary_cross_entropy(outputs, masks).backward()
        network.zero_grad()

    def predict():
        with torch.inference_mode(), autocast:
            network(images)

    larger = (side / timed) ** GROWTH
    of_step, of_batch = _seconds(step, device), _seconds(predict, device)
    return Times(OVERHEAD * larger * of_step, larger * of_batch / batch_size)


def _seconds(function, device):
    """The median time of a call, of those that SECONDS hold but at least three, after a first.

    On a shared machine the shortest promised a run of 20 minutes that took 24.8.
    """
    times, until = [], None
    while until is None or len(times) < 4 or time.perf_counter() < until:
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        times.append(ended - started)
        until = until or ended + SECONDS
    return statistics.median(times[1:])
