"""Losses by hand and against torchvision's, and what --loss takes of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from medseg.training.flags import make_parser
from train import LOSSES, WEIGHTS, bce_loss, combined_loss, dice_loss, focal_loss


def make_pair():
    torch.manual_seed(1)
    return torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.7).float()


def test_the_tutorials_loss_by_hand():
    pred = torch.tensor([[0.9, 0.2], [0.6, 0.1]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # intersection 0.9 + 0.6 = 1.5; sums 1.8 and 2
    assert dice_loss(pred, target).item() == pytest.approx(1 - 3.0 / 3.8, abs=1e-6)
    bce = -(math.log(0.9) + math.log(0.8) + math.log(0.6) + math.log(0.9)) / 4
    expected = 0.6 * (1 - 3.0 / 3.8) + 0.4 * bce
    assert combined_loss(pred, target).item() == pytest.approx(expected, abs=1e-6)


def test_losses_at_the_ends():
    ones, zeros = torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    assert combined_loss(ones, ones).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(zeros, zeros).item() == pytest.approx(0, abs=1e-6)  # smooth / smooth
    assert dice_loss(zeros, ones).item() == pytest.approx(1, abs=1e-6)
    assert math.isfinite(combined_loss(zeros, ones).item())  # torch bounds the logarithm at -100


def test_dice_is_of_the_whole_batch_in_any_memory_order():
    pred, target = torch.rand(3, 2, 5, 7), (torch.rand(3, 2, 5, 7) > 0.5).float()
    expected = 1 - 2 * (pred * target).sum() / (pred.sum() + target.sum())
    for other in (pred, pred.contiguous(memory_format=torch.channels_last)):
        assert dice_loss(other, target).item() == pytest.approx(expected.item(), abs=1e-6)


def test_focal_loss_by_hand():
    pred, target = torch.tensor([0.9, 0.2, 0.6]), torch.tensor([1.0, 1.0, 0.0])
    by_hand = [
        -0.25 * 0.1**2 * math.log(0.9),  # foreground, sure and right
        -0.25 * 0.8**2 * math.log(0.2),  # foreground, missed
        -0.75 * 0.6**2 * math.log(0.4),  # background, taken for foreground
    ]
    assert focal_loss(pred, target).tolist() == pytest.approx(by_hand, abs=1e-7)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.0), (0.5, 3.5)])
def test_focal_loss_is_torchvisions(alpha, gamma):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    target = (torch.rand(2, 3, 16, 16) > 0.8).float()
    expected = sigmoid_focal_loss(logits, target, alpha, gamma, reduction="mean")
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = focal_loss(logits.sigmoid(), target, alpha, gamma).mean()
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


def parse(text):
    parser = make_parser("", LOSSES, WEIGHTS)
    return parser.parse_args(["--loss", text] if text else []).loss


def test_weights_of_the_losses():
    pred, target = make_pair()
    values = {
        "dice": dice_loss(pred, target).item(),
        "focal": focal_loss(pred, target).mean().item(),
    }
    values["bce"] = F.binary_cross_entropy(pred, target).item()
    for text, expected in (
        ("", {"dice": 0.6, "bce": 0.4}),  # the tutorial's
        ("bce=0.5, dice", {"dice": 1, "bce": 0.5}),
        ("focal", {"focal": 1}),
        ("focal=2,dice=0.5,bce=0", {"dice": 0.5, "bce": 0, "focal": 2}),
    ):
        assert parse(text) == expected
        total = sum(weight * values[name] for name, weight in expected.items())
        assert combined_loss(pred, target, parse(text)).item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("text", ["dice", "bce", "focal", "dice,bce,focal"])
def test_a_loss_that_is_not_a_number_is_passed_on(text):
    pred, target = make_pair()
    pred[0, 0, 0, 0] = math.nan
    assert math.isnan(combined_loss(pred, target, parse(text)).item())
    assert bce_loss(pred, target).isnan().sum() == 1


@pytest.mark.parametrize(
    "text, word",
    [
        ("dise=1", "did you mean dice?"),
        ("mse", "known are dice, bce, focal"),
        ("dice=-1", "from 0 to 100"),
        ("bce=nan", "from 0 to 100"),
        ("dice=1=2", "from 0 to 100"),
        ("none", "every weight is 0"),
        ("dice=0,focal=0", "every weight is 0"),
    ],
)
def test_names_and_weights_that_are_refused(text, word, refused):
    refused("train", "--loss", text, words=["--loss", word])
