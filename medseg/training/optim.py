"""Between gradient and weights: the learning rate, steps that are skipped, the running mean."""

import copy
import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LRScheduler

from medseg.signals import Signals


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, whose methods do not import torch._dynamo: a second or more at the start.

    PyTorch wraps these methods for `torch.compile`, which here compiles the network alone. Without
    the wrappers they are the same: the same steps, the same state. Where a version of PyTorch has
    no wrappers, `inspect.unwrap` gives back the methods themselves.
    Loshchilov, Hutter: "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def fit_to_run(warmup, decay, steps):
    """Both for a run of so many steps: steps of warm-up, and the decay of a running mean.

    Neither takes more than a fifth of the run, or a short one would end within its beginning; the
    mean spans 1 / (1 - decay) steps.
    """
    longest = steps // 5
    return min(warmup, longest), min(decay, 1 - 1 / longest) if longest else 0.0


def make_schedule(optimizer, name, warmup, steps):
    """A scheduler for a run of so many steps, stepped after each of them.

    It multiplies the learning rate by a factor that rises from 0 to 1 over `warmup` steps and then
    stays 1 ('constant'), or falls to 0 at `steps` ('cosine').
    Loshchilov, Hutter: "SGDR", ICLR 2017, equation 5, one cycle.
    """

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if name == "cosine":
            return (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
        return 1.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class TrainingOptions:
    """How `train_model` trains, where that is not as the tutorial does."""

    patience: int = 8
    grace: int = 0  # steps before whose end patience does not count
    schedule: LRScheduler | None = None  # stepped after each step of the optimizer
    ema: float = 0.0  # decay of a running mean of the weights, evaluated and kept; 0: none
    autocast: AbstractContextManager = field(default_factory=nullcontext)  # of the forward pass
    scaler: torch.amp.GradScaler | None = None  # for fp16
    save_every: float = 60.0  # seconds between two checkpoints, within an epoch too
    flags: dict | None = None  # recorded in last.pth
    signals: Signals = field(default_factory=Signals)  # to be stopped by


class GuardedStep:
    """Backward pass and optimizer step, skipped where the loss or a gradient is not finite.

    Nothing here waits for the GPU: a GradScaler skips such steps on the device, with fp16 as with
    a scale fixed at 1. Used as

        step.begin()
        with step.autocast:
            outputs = model(images)
        finite = step.finish(criterion(outputs, masks))  # bool tensor: whether weights changed

    options: `TrainingOptions`, of which schedule, autocast and scaler count.
    """

    def __init__(self, model, optimizer, device, options):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.schedule, self.autocast = options.schedule, options.autocast
        self.scaler, self.fixed_scale = options.scaler, None
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
            self.fixed_scale = 1.0
        # Running statistics of batch normalisation, which the forward pass already changes.
        self.buffers = [value for value in model.buffers() if value.is_floating_point()]
        self.steps = 0  # begun so far
        self.lr = None  # learning rate of the last step
        # Steps skipped in this epoch, and in a row up to now.
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)
        self.shown = torch.zeros(2, dtype=torch.int64, pin_memory=device.type == "cuda")

    def begin(self):
        self.steps += 1
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.buffers_before = [buffer.clone() for buffer in self.buffers]

    def finish(self, loss):
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        weights = self.model.parameters()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        # A loss that is not a number leaves no number in the gradient.
        gradients[0].add_(loss.detach() * 0)
        finite = torch.isfinite(get_total_norm(gradients, math.inf))
        self.scaler.step(self.optimizer)  # unless a gradient is not finite
        self.scaler.update(self.fixed_scale)
        if self.schedule:
            self.schedule.step()
        for buffer, before in zip(self.buffers, self.buffers_before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        in_epoch, in_a_row = self.skipped
        self.skipped = torch.stack([in_epoch + ~finite, (in_a_row + 1) * ~finite])
        self.shown.copy_(self.skipped, non_blocking=True)
        return finite

    def skipped_in_a_row(self):
        """As of a few steps ago: the GPU is not waited for."""
        return self.shown[1].item()

    def end_epoch(self):
        """Steps skipped in the epoch that ends; the next one counts from 0."""
        skipped = self.skipped[0].item()
        self.skipped[0] = 0
        return skipped

    def state_dict(self):
        return {
            "steps": self.steps,
            "lr": self.lr,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
        }

    def load_state_dict(self, state):
        self.steps, self.lr = state["steps"], state["lr"]
        self.skipped.copy_(state["skipped"])
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer.load_state_dict(state["optimizer"])  # with the learning rate of this step
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])


class RunningMean:
    """An exponential moving average of the weights; with decay 0, `model` is the model itself.

    Polyak, Juditsky: "Acceleration of stochastic approximation by averaging", 1992. After n steps
    the decay is at most n / (9 + n), so that the random weights of the start are soon forgotten.
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model) if decay else model
        self.means, self.values = (
            [value for value in network.state_dict().values() if value.is_floating_point()]
            for network in (self.model, model)
        )

    def update(self, steps):
        """Take in the weights after the steps-th step of the run."""
        if self.decay:
            decay = min(self.decay, steps / (9 + steps))
            torch._foreach_lerp_(self.means, self.values, 1 - decay)

    def state_dict(self):
        return self.model.state_dict() if self.decay else {}

    def load_state_dict(self, state):
        if self.decay:
            self.model.load_state_dict(state)
