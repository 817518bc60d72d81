"""How long a training step and a prediction take on this machine: a few of them, timed."""

import statistics
import time
from collections import namedtuple

import torch
import torch.nn.functional as F

from medseg.device import choose_precision, make_autocast

SECONDS = 2.0  # for each of both, but for the first call
# Larger images are timed at this size on a CPU, where each of their pixels takes longer: 1.26 times
# at 384x384, 1.46 times at 512x512.
TIMED_SIDE, GROWTH = 256, 2.5
OVERHEAD = 1.15  # of a step in a training: loading, augmentation, update, scores

Times = namedtuple("Times", ["step", "image"])  # seconds: of a training step, to predict an image


def time_network(network, device, *, side, batch_size, precision="auto"):
    """The Times of a UNet on a device.

    side: of its square images, in pixels; precision: as the flag of train.py has it.
    A step is the passes forward and backward; no optimizer, whose first use imports a compiler.
    """
    precision = choose_precision(precision, device)
    network = network.to(device, memory_format=torch.channels_last).train()
    timed = min(side, TIMED_SIDE) if device.type == "cpu" else side
    shape = (batch_size, network.n_channels, timed, timed)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
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
    step_seconds, image_seconds = _seconds(step, device), _seconds(predict, device) / batch_size
    return Times(OVERHEAD * larger * step_seconds, larger * image_seconds)


def _seconds(function, device):
    """The median time of a call, of those that SECONDS hold but at least three, after a first.

    On a shared machine the shortest promised a run of 20 minutes that took 24.8.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function()
    wait()
    times, until = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)
