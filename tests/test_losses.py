"""Losses by name: focal loss against numbers by hand and torchvision's, weights, --loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from medseg.cli import parse_named_values
from medseg.training.recipes import LOSSES
from train import combined_loss, dice_loss, focal_loss, loss_of


def test_focal_loss_by_hand():
    pred = torch.tensor([0.9, 0.2, 0.6])
    target = torch.tensor([1.0, 1.0, 0.0])
    by_hand = [
        -0.25 * 0.1**2 * math.log(0.9),  # foreground, sure and right
        -0.25 * 0.8**2 * math.log(0.2),  # foreground, missed
        -0.75 * 0.6**2 * math.log(0.4),  # background, taken for foreground
    ]
    assert focal_loss(pred, target).item() == pytest.approx(sum(by_hand) / 3, abs=1e-7)
    assert focal_loss(pred, target, reduction="sum").item() == pytest.approx(sum(by_hand), abs=1e-6)
    # With gamma 0 and alpha 1/2, half the cross-entropy is left.
    entropy = torch.nn.functional.binary_cross_entropy(pred, target)
    assert focal_loss(pred, target, 0.5, 0.0).item() == pytest.approx(entropy.item() / 2, abs=1e-6)


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.6, 1.0), (0.5, 3.5)])
def test_focal_loss_is_torchvisions(alpha, gamma):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, requires_grad=True)
    target = (torch.rand(2, 3, 16, 16) > 0.8).float()
    expected = sigmoid_focal_loss(logits, target, alpha, gamma, reduction="mean")
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    loss = focal_loss(logits.sigmoid(), target, alpha, gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


def make_pair():
    torch.manual_seed(1)
    return torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8) > 0.7).float()


def test_weights_of_the_losses():
    pred, target = make_pair()
    dice = dice_loss(pred, target).item()
    entropy = torch.nn.functional.binary_cross_entropy(pred, target).item()
    focal = focal_loss(pred, target).item()

    def loss(text):
        return loss_of(SimpleNamespace(loss=text))(pred, target).item()

    assert loss("dice=0.6,bce=0.4") == combined_loss(pred, target).item()
    assert loss("bce=0.5,dice=1") == pytest.approx(dice + 0.5 * entropy, abs=1e-6)
    assert loss("bce") == pytest.approx(entropy, abs=1e-6)
    assert loss("dice") == pytest.approx(dice, abs=1e-6)
    assert loss("focal=2,dice=0.5,bce=0") == pytest.approx(2 * focal + 0.5 * dice, abs=1e-6)


@pytest.mark.parametrize("text", ["dice", "bce", "focal", "dice,bce,focal"])
def test_a_loss_that_is_not_a_number_is_passed_on(text):
    pred, target = make_pair()
    pred[0, 0, 0, 0] = math.nan
    assert math.isnan(loss_of(SimpleNamespace(loss=text))(pred, target).item())


def test_weights_by_name():
    assert parse_named_values("bce=0.5, dice", LOSSES) == {"dice": 1.0, "bce": 0.5}
    assert parse_named_values("none", LOSSES) == {}


@pytest.mark.parametrize(
    "text, word",
    [
        ("dise=1", "did you mean dice?"),
        ("mse", "known are dice, bce, focal"),
        ("dice,dice=2", "dice is there twice"),
        ("dice=", "from 0 to 100"),
        ("dice=-1", "from 0 to 100"),
        ("bce=nan", "from 0 to 100"),
        ("bce=inf", "from 0 to 100"),
        ("dice=one", "from 0 to 100"),
        ("", "known are dice, bce, focal"),
        ("dice=1=2", "from 0 to 100"),
    ],
)
def test_names_and_weights_that_are_refused(text, word, refused):
    with pytest.raises(ValueError, match=word.replace("?", r"\?")):
        parse_named_values(text, LOSSES)
    refused("train", "--loss", text, words=["--loss", word])


@pytest.mark.parametrize("text", ["none", "dice=0", "dice=0,focal=0"])
def test_a_loss_of_nothing_is_refused(text, refused):
    refused("train", "--loss", text, words=[f"--loss {text}", "every weight is 0"])
