"""Losses by hand and against torchvision's, and what --loss takes of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from medseg.training.flags import make_parser
from train import LOSSES, WEIGHTS, combined_loss, dice_loss, focal_loss


def make_pair(channels=1):
    torch.manual_seed(1)
    shape = 3, channels, 5, 7
    return torch.rand(shape), (torch.rand(shape) > 0.7).float()


def parse(text):
    parser = make_parser("", LOSSES, WEIGHTS)
    return parser.parse_args(["--loss", text] if text else []).loss


def test_the_tutorials_loss_by_hand():
    pred = torch.tensor([[0.9, 0.2], [0.6, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # intersection 0.9 + 0.6 = 1.5; sums 1.8 and 2
    assert dice_loss(pred, target).item() == pytest.approx(1 - 3.0 / 3.8, abs=1e-6)
    bce = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.9)) / 4
    expected = 0.6 * (1 - 3.0 / 3.8) + 0.4 * bce
    assert combined_loss(pred, target).item() == pytest.approx(expected, abs=1e-6)
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert combined_loss(ones, ones).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(zeros, zeros).item() == pytest.approx(0, abs=1e-6)  # smooth / smooth
    assert math.isfinite(combined_loss(zeros, ones).item())  # torch bounds the logarithm at -100


def test_dice_is_of_the_whole_batch_in_any_memory_order():
    pred, target = make_pair(channels=2)
    expected = 1 - 2 * (pred * target).sum() / (pred.sum() + target.sum())
    for other in (pred, pred.contiguous(memory_format=torch.channels_last)):
        assert dice_loss(other, target).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.0), (0.5, 3.5)])
def test_focal_loss_is_torchvisions(alpha, gamma):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    target = (torch.rand(2, 3, 16, 16) > 0.8).float()
    expected = sigmoid_focal_loss(logits, target, alpha, gamma, reduction="mean")
    loss = focal_loss(logits.sigmoid(), target, alpha, gamma).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
    if (alpha, gamma) == (0.25, 2.0):  # those of --loss
        torch.testing.assert_close(focal_loss(logits.sigmoid(), target).mean(), expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {"dice": 0.6, "bce": 0.4}),  # the tutorial's
        ("bce=0.5, dice", {"dice": 1, "bce": 0.5}),
        ("focal=2,dice=0.5,bce=0", {"dice": 0.5, "bce": 0, "focal": 2}),
    ],
)
def test_weights_of_the_losses(text, expected):
    pred, target = make_pair()
    values = {"dice": dice_loss(pred, target), "focal": focal_loss(pred, target).mean()}
    values["bce"] = F.binary_cross_entropy(pred, target)
    weights = parse(text)
    assert weights == expected
    total = sum(weight * values[name].item() for name, weight in expected.items())
    assert combined_loss(pred, target, weights).item() == pytest.approx(total, abs=1e-6)
    pred[0, 0, 0, 0] = math.nan  # which has to be seen
    assert math.isnan(combined_loss(pred, target, weights).item())


@pytest.mark.parametrize("text", ["dise=1", "mse", "dice=-1", "bce=nan", "dice=1=2", "none"])
def test_names_and_weights_that_are_refused(text, refused):
    refused("train", "--loss", text, words=["--loss"])
