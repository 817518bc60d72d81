"""From images to probabilities: tiles, several models as one, and how far to rely on them."""

import csv
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL, output_of, save
from PIL import Image, ImageChops
from scipy.spatial.distance import mahalanobis

from data import Batches, Order, load_split
from medseg import tiles
from medseg.images import save_overlay
from medseg.inference import PLAIN, VIEWS, Inference
from medseg.layers import ARCHITECTURES
from medseg.normalization import normalize
from medseg.ood import count_features, fit, fit_with_threshold
from medseg.phantoms import make_phantoms
from medseg.predicting.flags import parse_arguments
from medseg.predictor import Prediction, Predictor, common_info, pairwise_dice
from medseg.results.assessment import describe_assessments, reliability_columns
from net import UNet, load_model


def network(seed=0, image_size=None, **options):
    """A UNet of random weights, which knows the statistics of random features."""
    torch.manual_seed(seed)
    model = UNet(n_filters=2, image_size=image_size, **options).eval()
    for weight in model.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
    with torch.no_grad():  # logits of deviation 1
        model.outc.weight /= model(torch.randn(1, 3, 64, 64)).double().logit(1e-7).std()
    features = torch.randn(20, count_features(2, model.architecture.depth))
    model.info.feature_statistics = fit(features)._replace(threshold=1.0)
    return model


def predictor_of(*networks, **inference):
    return Predictor(networks, "cpu", inference=PLAIN._replace(**inference))


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    "members, flips, size",  # layers of each member; height, width
    [
        ([{"depth": 4}], (), (413, 111)),
        ([{**ARCHITECTURES["study"], "depth": 3}], (), (302, 101)),  # strides, nearest
        ([{"depth": 2, "n_classes": 3}], VIEWS, (107, 99)),
        ([{"depth": 1}, {"depth": 3, "norm": "batch"}], ("both",), (231, 57)),
    ],
)
def test_tiles_are_equal_to_the_whole_image(members, flips, size, monkeypatch, capsys):
    """Probabilities, agreement and distance, of floats and of bytes."""
    networks = [network(seed, **options) for seed, options in enumerate(members)]
    predictor, pixels, sides = predictor_of(*networks, flips=flips), noise(1, 3, *size), []
    pixels[..., :50, :] //= 8  # so that parts of the image differ
    networks[-1].register_forward_hook(lambda *call: sides.append(max(call[2].shape[2:])))
    (whole,) = predictor.predict(pixels)
    monkeypatch.setattr(tiles, "TILE_MEMORY", 1)
    (tiled,) = predictor.predict(pixels)
    assert max(sides) > sides[-1] and tiled.probabilities.dtype == np.float32
    for found in (tiled.probabilities, predictor(normalize(pixels.permute(0, 2, 3, 1)))[0]):
        np.testing.assert_allclose(found, whole.probabilities, rtol=0, atol=1e-5)
    assert whole.agreement is None or 0 < whole.agreement < 1
    assert tiled.agreement == pytest.approx(whole.agreement, abs=1e-3)
    assert tiled.unlike == pytest.approx(whole.unlike, rel=0.1)  # margins count twice
    assert capsys.readouterr().err == ""


def test_every_tile_has_its_margins():
    """Each pixel once, margins at borders that are none, multiples of the stride, few pixels."""
    draw = random.Random(0)
    for _ in range(60):
        stride = 2 ** draw.randint(1, 6)
        margin = stride * draw.randint(1, 8)
        pixels = draw.choice([1, 40 * margin**2])
        sides = [draw.randint(1, 12 * margin) for _ in range(2)]
        seen, most = np.zeros(sides, int), max(pixels, (3 * margin + stride) ** 2)
        for kept, shown in tiles.make_tiles(*sides, stride, margin, pixels):
            seen[kept] += 1
            assert math.prod(own.stop - own.start for own in shown) <= most
            for side, own, part in zip(sides, kept, shown, strict=True):
                first, last = part.start, part.stop
                assert first % stride == 0 and (first == 0 or own.start - first >= margin)
                assert last == side or (last % stride == 0 and last - own.stop >= margin)
        assert (seen == 1).all()


@pytest.mark.parametrize("option", [{"norm": "group"}, {"up": "bilinear"}], ids=str)
def test_what_sees_the_whole_image_keeps_it_where_it_fits(option, monkeypatch, capsys):
    """Images of one size, and networks of others, are never divided."""
    for model, divided in ((network(), 1), (network(image_size=64), 0), (torch.nn.ReLU(), 0)):
        assert tiles.must_divide(model, 1 << 60, "cpu") == divided
        assert not tiles.must_divide(model, 1 << 20, "cpu")
    predictor, pixels = predictor_of(network(depth=3, **option)), noise(1, 3, 231, 57)
    whole = predictor(pixels)
    monkeypatch.setattr(tiles, "TILE_MEMORY", 1)
    np.testing.assert_array_equal(predictor(pixels), whole)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tiles, "WHOLE_MEMORY", 1000)
    tiles.note_difference.cache_clear()
    for _ in range(2):  # it is said once
        assert (predictor(pixels) != whole).any()
    (line,) = capsys.readouterr().err.splitlines()
    assert "tiles" in line and next(iter(option.values())) in line


def test_an_overlay_fits_its_format(here):
    save_overlay(Image.new("RGB", (70_000, 4)), np.zeros((4, 70_000)), "o.jpg", ["one"])
    assert Image.open("o.jpg").size == (65_500, 4)


def test_models_and_images_are_told_apart_in_any_order():
    for words, models, names in (
        ("--model a.pth b.PTH scan.png", ["a.pth", "b.PTH"], ["scan.png"]),
        ("1.png --model a.pth b.pt 2.png --tta", ["a.pth", "b.pt"], ["1.png", "2.png"]),
        ("--model=weights -- scan.png", ["weights"], ["scan.png"]),  # whatever it is called
    ):
        args = parse_arguments(words.split(), "")
        assert (args.model, args.inputs) == (models, names)


def test_what_models_have_in_common():
    """The threshold is the mean; flips and clean-up are those that all have."""
    chosen = Inference(0.2, ("both",), {"largest": 1.0})
    one = UNet(n_filters=2, inference=chosen, trained_flips=("both",))
    plain, other = UNet(n_filters=2), UNet(n_filters=2, inference=Inference(0.8, ("both",)))
    for network, expected, flips in (
        (one, chosen, ("both",)),
        (plain, (0.35, (), {}), ()),
        (other, (0.5, ("both",), {}), ()),
    ):
        info = common_info([one, network])
        assert (info.inference, info.trained_flips) == (expected, flips)


def test_models_that_differ_are_refused_by_name(here, refused):
    for options, words in (
        ({"image_size": None}, ["None", "32"]),
        ({"n_channels": 1}, ["channels 1", "3"]),
        ({"n_classes": 2, "class_names": ("a", "b")}, ["'a', 'b'", "foreground"]),
        ({"window": (40.0, 80.0)}, ["window", "40", "None"]),
        ({"orientation": "LPS"}, ["LPS"]),
    ):
        model = UNet(n_filters=2, **{"image_size": 32} | options)
        with pytest.raises(ValueError) as error:
            common_info([network(image_size=32), model], ["often.pth", "other.pth"])
        assert all(word in str(error.value) for word in (*words, "often.pth", "other.pth"))
    torch.save(network(image_size=32).state_dict(), "often.pth")
    torch.save(model.state_dict(), "other.pth")
    names = ["often.pth", "other.pth"]
    refused("predict", "scan.png", "--model", *names, words=names)


def agreement_of(*masks):
    """`pairwise_dice` of bool (B, C, ...) of each member."""
    return pairwise_dice([np.packbits(mask.reshape(*mask.shape[:2], -1), -1) for mask in masks])


def test_agreement_by_hand():
    """Three masks of 2, 2 and 3 pixels, of which pairs share 1, 2 and 2."""
    a, b, c = (np.array([[mask]], bool) for mask in ([1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0]))
    assert agreement_of(a, b, c) == pytest.approx([(2 / 4 + 4 / 5 + 4 / 5) / 3])
    # The mean over the classes, each image by itself; two empty masks agree, one does not.
    two = np.array([[[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]], bool)
    other = np.array([[[1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 0, 0], [0, 0, 0, 0]]], bool)
    assert agreement_of(two, other) == pytest.approx([1, (2 * 2 / 6 + 0) / 2])
    assert agreement_of(a) is None


def test_the_distance_is_scipys():
    """Few directions have a variance of their own: Tipping and Bishop, equation 8."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(16, 30)) @ rng.normal(size=(30, 30)) + 3
    statistics, mean, deviation = fit(features), features.mean(0), features.std(0)
    assert statistics.components.shape == (4, 30)
    values, vectors = np.linalg.eigh(np.cov(((features - mean) / deviation).T, bias=True))
    values[:-4] = values[:-4].mean()
    inverse = np.linalg.inv(vectors @ np.diag(values) @ vectors.T)
    for image in rng.normal(size=(5, 30)) * 10:
        expected = mahalanobis((image - mean) / deviation, np.zeros(30), inverse)
        assert statistics.distances(image[None])[0] == pytest.approx(expected, rel=1e-3)


def test_the_threshold_leaves_new_images_of_the_same_kind_alone():
    rng, mix = np.random.default_rng(3), np.random.default_rng(4).normal(size=(20, 20))
    train, valid, test = (rng.normal(size=(count, 20)) @ mix for count in (30, 8, 500))
    statistics = fit_with_threshold(train, valid)
    assert (statistics.ratios(test) > 1).mean() < 0.02
    assert (statistics.ratios(test + 16 * mix.std(0)) > 1).all()
    distances = [*statistics.distances(valid)]  # 38 images, none of which the statistics have seen
    for fold in range(5):
        others = fit(np.delete(train, np.arange(fold, 30, 5), 0))
        distances += [*others.distances(train[fold::5])]
    expected = np.quantile(distances, 0.99) * (1 + 38**-0.5)
    assert statistics.threshold == pytest.approx(expected)
    assert fit_with_threshold(train[:9], valid) is None
    same = fit_with_threshold(np.ones((12, 20)), np.ones((2, 20)))
    assert same.ratios(np.ones((1, 20)))[0] <= 1 < same.ratios(np.zeros((1, 20)))[0]


def pooled_by_hand(model, images):
    """Mean and deviation of what the first two blocks pass to the decoder."""
    pooled = []
    with torch.inference_mode():
        for block in (model.down1, model.down2):
            images, skip = block(images)
            pooled += [skip.mean((2, 3)), skip.std((2, 3), correction=0)]
    return torch.cat(pooled, 1).numpy()


def test_a_batch_is_assessed_in_the_passes_that_predict_it():
    """Mean and agreement of views and of models by hand; the distance by those that know one."""
    known, other, pixels, seen = network(1), network(2), noise(3, 3, 32, 32), []
    other.info.feature_statistics = None
    pooled = pooled_by_hand(known, normalize(pixels.permute(0, 2, 3, 1)))
    ratios = known.info.feature_statistics.ratios(pooled)
    for model in (known, other):
        model.register_forward_hook(lambda *call: seen.append(call[2].numpy().copy()))
    predictor = predictor_of(known, other, threshold=0.4, flips=("horizontal", "turn90"))
    probabilities, agreement, unlike = zip(*predictor.predict(pixels), strict=True)
    assert len(seen) == 6
    for number in (0, 3):
        seen[number + 1] = seen[number + 1][..., ::-1]
        seen[number + 2] = np.rot90(seen[number + 2], -1, (2, 3))
    np.testing.assert_allclose(probabilities, np.mean(seen, 0), atol=1e-6)
    assert agreement == tuple(agreement_of(*(passed > 0.4 for passed in seen)))
    np.testing.assert_allclose(unlike, ratios, rtol=1e-3)
    assert predictor_of(known).predict(pixels)[0].agreement is None
    assert predictor_of(other).predict(pixels)[0].unlike is None


def test_weights_carry_what_they_know(here):
    """Of other versions, with more in their metadata and with less, too."""
    known = network(depth=3)
    state = known.state_dict()
    state._metadata[""] |= {"more": 1, "architecture": {"depth": 3, "attention": "gates"}}
    del state._metadata[""]["exclusive"]
    torch.save(state, "model.pth")
    loaded = load_model("model.pth")
    assert loaded.info.exclusive and loaded.architecture == known.architecture


def test_what_is_said():
    """The least sure images by name, the most unlike ones first."""
    least = [(f"{n}.png", Prediction(None, 0.9 - n / 10, 0.5)) for n in range(7)]
    (line,) = describe_assessments(least)
    assert "6.png 0.30, 5.png 0.40" in line and "1.png" not in line
    (line,) = describe_assessments([(f"{n}.png", Prediction(None, None, n)) for n in range(9)])
    assert "7 of 9" in line and "8.png, 7.png" in line
    slices = [Prediction(None, *one) for one in ((0.5, 0.1), (0.9, 9.0), (1.0, 0.2))]
    assert reliability_columns(slices) == {"agreement": pytest.approx(0.8), "unlike": 0.2}


def test_what_a_training_has_seen_is_recorded_and_other_images_are_told(here, no_pictures):
    """Pooled by hand over the views that it has shown; in the table and on the screen."""
    make_phantoms("dataset", (14, 5, 3), size=64)
    flags = (*SMALL, "--precision", "fp32", "--epochs", 1, "--augment", "mirror", "--out", "run")
    output_of("train.py", *flags, cwd=here)
    model, pooled = load_model("run/best_model.pth").eval(), []
    assert model.info.trained_flips == ("horizontal",)
    for split in ("train", "valid"):
        rows = np.array(load_split(Path("dataset"), split, 32))
        shown = torch.cat([some for some, _ in Batches(rows, Order(2, True)).whole_images(99)])
        shown[1::2] = shown[1::2].flip(3)
        pooled.append(pooled_by_hand(model, shown.contiguous()))
    expected, statistics = fit_with_threshold(*pooled), model.info.feature_statistics
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-3, atol=1e-4)
    assert statistics.threshold == pytest.approx(expected.threshold, rel=0.01)

    image = Image.open("dataset/test/20000_phantom.jpg")
    save(image, "scans/like.png")
    save(ImageChops.invert(image), "scans/inverted.png")
    flags = ("--device", "cpu", "--threshold", 0.49, "--model", "run/best_model.pth")
    said = output_of("predict.py", "scans", *flags, "--output", "rows", cwd=here)
    assert "inverted.png: unlike the training" in said and "like.png: unlike" not in said
    text = Path("rows/predictions.csv").read_text("utf-8-sig")
    like, inverted = sorted(csv.DictReader(text.splitlines()), key=lambda row: row["unlike"])
    assert inverted["image"] == "inverted.png" and like["agreement"] == ""
    assert float(like["unlike"]) < 1 < float(inverted["unlike"])
    alone = output_of("predict.py", "scans/inverted.png", *flags, "--tta", cwd=here)
    assert "inverted.png: unlike the training" in alone and "agreement " in alone
