"""How far to rely on a prediction: members that agree, images unlike those of the training."""

import base64
import csv
import itertools
import shutil

import numpy as np
import pytest
import torch
from helpers import SIZE, SMALL, output_of, skip_pictures, square, write_split
from PIL import Image, ImageChops
from scipy.spatial.distance import mahalanobis

import predict
from data import Batches, load_split
from medseg.cache import RaggedRows
from medseg.inference import PLAIN, VIEWS
from medseg.ood import FeatureRecorder, count_features, fit, fit_with_threshold, read_statistics
from medseg.predicting.assessment import (
    Agreement,
    Assessment,
    assess,
    assess_volume,
    print_assessments,
)
from medseg.predicting.ensemble import Ensemble
from medseg.predicting.page import Session
from medseg.weights import load_weights
from net import UNet, load_model

# ---- agreement -------------------------------------------------------------------------------


def agreement_of(*members, threshold=0.5):
    """That of masks, each (B, C, H, W)."""
    agreement = Agreement(threshold, len(members))
    for member in members:
        agreement.add(np.asarray(member, np.float32))
    return agreement.result()


def test_agreement_by_hand():
    """Three masks of 2, 2 and 3 pixels, of which pairs share 1, 2 and 2."""
    a, b, c = ([[[[1, 1, 0, 0]]]], [[[[0, 1, 1, 0]]]], [[[[1, 1, 1, 0]]]])
    assert agreement_of(a, b, c) == pytest.approx([(2 / 4 + 4 / 5 + 4 / 5) / 3])
    # The mean over the classes, each image by itself.
    two = [[[[1, 1, 0, 0]], [[0, 0, 0, 0]]], [[[1, 1, 1, 1]], [[1, 0, 0, 0]]]]
    other = [[[[1, 1, 0, 0]], [[0, 0, 0, 0]]], [[[1, 1, 0, 0]], [[0, 0, 0, 0]]]]
    assert agreement_of(two, other) == pytest.approx([1, (2 * 2 / 6 + 0) / 2])
    # Above the threshold, not at it.
    assert agreement_of([[[[0.4, 0.2]]]], [[[[0.3, 0.3]]]], threshold=0.3) == [0]
    assert agreement_of(a) is None


def test_agreement_of_many_pixels_and_of_parts(monkeypatch):
    masks = np.random.default_rng(0).random((5, 2, 3, 37, 41)) > 0.6
    monkeypatch.setattr("medseg.predicting.assessment.CHUNK", 64)
    expected = np.zeros((2, 3))
    for one, other in itertools.combinations(masks, 2):
        expected += 2 * (one & other).sum((2, 3)) / (one.sum((2, 3)) + other.sum((2, 3))) / 10
    np.testing.assert_allclose(agreement_of(*masks), expected.mean(1), atol=1e-12)
    parts = Agreement(0.5, 5)
    for part in np.split(masks, [20], axis=-1):
        for member in part:
            parts.add(member)
    np.testing.assert_allclose(parts.result(), expected.mean(1), atol=1e-12)


# ---- distance --------------------------------------------------------------------------------


def test_the_distance_is_scipys():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 9)) @ rng.normal(size=(9, 9)) + 3
    found = fit(features)  # of 60 images: all directions but one
    assert found.components.shape == (8, 9)
    standard = (features - found.mean) / found.scale
    np.testing.assert_allclose(standard.std(0), 1, atol=1e-4)
    covariance = np.cov(standard.T, bias=True)
    for image in rng.normal(size=(5, 9)) * 10:
        own = (image - found.mean) / found.scale
        expected = mahalanobis(own, np.zeros(9), np.linalg.inv(covariance))
        assert found.distances(image[None])[0] == pytest.approx(expected, rel=1e-3)


def test_few_images_have_a_covariance_of_few_directions():
    """The others share the variance that is left: Tipping and Bishop, equation 8."""
    rng = np.random.default_rng(2)
    features = rng.normal(size=(16, 30)) * np.arange(1, 31)
    found = fit(features)
    assert found.components.shape == (4, 30)
    standard = (features - features.mean(0)) / features.std(0)
    values, vectors = np.linalg.eigh(np.cov(standard.T, bias=True))
    rest = values[:-4].mean()
    covariance = vectors[:, -4:] @ np.diag(values[-4:] - rest) @ vectors[:, -4:].T
    inverse = np.linalg.inv(covariance + rest * np.eye(30))
    image = rng.normal(size=30) * 40
    own = (image - features.mean(0)) / features.std(0)
    expected = mahalanobis(own, np.zeros(30), inverse)
    assert found.distances(image[None])[0] == pytest.approx(expected, rel=1e-3)


def test_the_threshold_leaves_new_images_of_the_same_kind_alone():
    rng, mix = np.random.default_rng(3), np.random.default_rng(4).normal(size=(20, 20))
    train, valid, test = (rng.normal(size=(count, 20)) @ mix for count in (30, 8, 500))
    found = fit_with_threshold(train, valid)
    assert (found.ratios(test) > 1).mean() < 0.02
    distances = [*found.distances(valid)]  # 38 images, none of which the statistics have seen
    for fold in range(5):
        others = fit(np.delete(train, np.arange(fold, 30, 5), 0))
        distances += [*others.distances(train[fold::5])]
    expected = np.quantile(distances, 0.99) * (1 + 38**-0.5)
    assert found.threshold == pytest.approx(expected)
    assert (found.ratios(test + 16 * mix.std(0)) > 1).all()
    assert fit_with_threshold(train[:9], valid) is None
    assert fit_with_threshold(train * np.inf, valid) is None
    same = fit_with_threshold(np.ones((12, 20)), np.ones((2, 20)))
    assert same.ratios(np.ones((1, 20)))[0] <= 1 < same.ratios(np.zeros((1, 20)))[0]


# ---- features --------------------------------------------------------------------------------


@pytest.fixture
def network():
    """A UNet of random weights whose features differ from image to image."""
    torch.manual_seed(5)
    model = UNet(n_filters=4, image_size=32, depth=3).eval()
    for weight in model.parameters():
        if weight.dim() == 4:
            torch.nn.init.kaiming_normal_(weight)
    return model


def pooled_by_hand(network, images):
    """Mean and deviation of what the first two blocks pass to the decoder."""
    with torch.inference_mode():
        x, first = network.down1(images)
        _, second = network.down2(x)
    parts = []
    for skip in (first, second):
        parts += [skip.mean((2, 3)), skip.std((2, 3), correction=0)]
    return torch.cat(parts, 1).numpy()


def test_features_are_pooled_of_the_passes_that_are_looked_at(network):
    images, others = torch.randn(3, 3, 32, 64), torch.randn(3, 3, 32, 64)
    recorder = FeatureRecorder(network)

    def run(*batches):
        with torch.inference_mode():
            for batch in batches:
                network(batch)

    run(others)
    assert recorder.take() is None
    recorder.look()
    run(images, others)
    found = recorder.take()
    assert found.shape == (3, count_features(4, 3))
    np.testing.assert_allclose(found, pooled_by_hand(network, images), atol=1e-4)
    # Parts of an image count by their pixels.
    for part in images.split([16, 48], 3):
        recorder.look()
        run(part)
    apart = recorder.take()
    whole = [pooled_by_hand(network, part) for part in images.split([16, 48], 3)]
    means = slice(0, 4)
    expected = 0.25 * whole[0][:, means] + 0.75 * whole[1][:, means]
    np.testing.assert_allclose(apart[:, means], expected, atol=1e-4)
    recorder.remove()
    recorder.look()
    run(images)
    assert recorder.take() is None


def test_whole_images_are_as_prediction_takes_them():
    """Whatever is cropped, repeated and changed for the training."""
    own = [np.full((20 + number, 30, 4), number, np.uint8) for number in range(7)]
    sizes = np.array([one.shape[:2] for one in own])
    rows = RaggedRows(np.concatenate([one.reshape(-1, 4) for one in own]), sizes)
    changes = {"crop": 8, "repeat": 3, "strengths": {"flip": 1.0}, "world": 2, "rank": 1}
    batches = Batches(rows, 4, shuffle=True, **changes)
    for most, count in ((9, 7), (3, 3)):
        shapes = [images.shape[2:] for images, _ in batches.whole_images(most)]
        assert len({*shapes}) == len(shapes) == count and {*shapes} <= {*map(tuple, sizes)}
    pixels = np.zeros((40, 4, 4, 4), np.uint8)
    pixels[20:, ..., :3] = 255  # of many images, some from all of the split
    seen = torch.cat([images for images, _ in Batches(pixels, 4).whole_images(16)])
    assert len(seen) == 16 and 0 < (seen > 0).float().mean() < 1


# ---- in the weights --------------------------------------------------------------------------


@pytest.fixture
def statistics(network):
    return fit_with_threshold(
        *(pooled_by_hand(network, torch.randn(count, 3, 32, 32)) for count in (40, 9))
    )


def test_it_is_read_as_it_was_written(network, statistics, tmp_path):
    plain = network.state_dict()._metadata[""]
    assert not {"feature_statistics", "trained_flips"} & plain.keys()
    network.feature_statistics, network.trained_flips = statistics, VIEWS
    torch.save(network.state_dict(), tmp_path / "model.pth")
    loaded = load_model(tmp_path / "model.pth")
    assert loaded.trained_flips == VIEWS
    for one, other in zip(statistics, loaded.feature_statistics, strict=True):
        np.testing.assert_array_equal(one, other)
    again = UNet.from_state_dict(loaded.state_dict()).feature_statistics
    images = torch.randn(4, 3, 32, 32) * 2
    pooled = pooled_by_hand(network, images)
    np.testing.assert_array_equal(again.ratios(pooled), statistics.ratios(pooled))
    # 32 filters: tens of kB.
    large = fit_with_threshold(*(np.random.default_rng(6).normal(size=(n, 192)) for n in (99, 9)))
    assert len(str(large.as_dict())) < 40_000
    # A network of other filters has other features.
    with pytest.raises(ValueError, match="feature"):
        read_statistics(large.as_dict(), count_features(4, 3))


def damaged(values):
    return {"values": base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()}


NUMBERS = 2 * 24 + 1 + 9 * 25  # numbers, of the network above and nine directions
WRONG = (
    *(0.5, [], {}, {"threshold": 1.0}, "AAAA"),
    *({"threshold": value} for value in (None, "1", True, 0, -1.0, float("nan"), 10**400)),
    *({"levels": value} for value in (None, 3, 2.0, "2")),
    *({"values": value} for value in (None, 7, "", "AAA", "?" * 80, "A" * 10**6, b"AAAA")),
    *(
        damaged(value)
        for value in ([1.0] * 5, [np.nan] * NUMBERS, [0.0] * NUMBERS, [-1.0] * NUMBERS)
    ),
    *(damaged([1.0] * (2 * 24 + 1 + count * 25)) for count in (0, 33)),
    {"more": 1},
)


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_damaged_statistics_are_refused(value, network, statistics):
    if isinstance(value, dict) and value and value != {"threshold": 1.0}:
        value = {**statistics.as_dict(), **value}
    state = network.state_dict()
    state._metadata[""]["feature_statistics"] = value
    with pytest.raises(ValueError, match="not the weights of a UNet.* feature statistics") as error:
        UNet.from_state_dict(state)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "both", ["up"], ["both", "horizontal"], [1], 3, {}])
def test_damaged_flips_are_refused(value, network):
    state = network.state_dict()
    state._metadata[""]["trained_flips"] = value
    with pytest.raises(ValueError, match="not the weights of a UNet.* trained flips"):
        UNet.from_state_dict(state)


# ---- predict.py ------------------------------------------------------------------------------


def test_a_batch_is_assessed_in_the_passes_that_predict_it(network, statistics):
    network.feature_statistics = statistics
    pixels = np.random.default_rng(7).integers(0, 256, (3, 32, 32, 3), np.uint8)
    model = predict.TorchModel(network, "cpu", "fp32")
    pooled, seen = pooled_by_hand(network, model.normalize(pixels).contiguous()), []
    threshold = float(np.median(model.probabilities(pixels)))
    network.register_forward_hook(lambda *call: seen.append(call[2].numpy()))
    for flips in ((), VIEWS):
        model.inference = PLAIN._replace(threshold=threshold, flips=flips)
        seen.clear()
        probabilities, assessed = model.assess(pixels)
        assert len(seen) == 1 + len(flips)
        np.testing.assert_array_equal(probabilities, model.probabilities(pixels))
        unlike = [one.unlike for one in assessed]
        np.testing.assert_allclose(unlike, statistics.ratios(pooled), rtol=1e-3)
    shown = {"horizontal": lambda x: x[..., ::-1], "turn90": lambda x: np.rot90(x, -1, (2, 3))}
    for name, back in shown.items():
        model.inference = PLAIN._replace(threshold=threshold, flips=(name,))
        seen.clear()
        _, assessed = model.assess(pixels)
        expected = agreement_of(seen[0], back(seen[1]), threshold=threshold)
        assert [one.agreement for one in assessed] == expected.tolist() and expected.max() < 1


def test_parts_of_an_image_are_assessed_together(network, statistics):
    """As tiles would be: each with all its flips, before the next."""
    network.feature_statistics = statistics
    model, images = predict.TorchModel(network, "cpu", "fp32"), torch.randn(1, 3, 32, 96)
    threshold = float(np.median(model.run(images)))
    model.inference = PLAIN._replace(threshold=threshold, flips=("both",))
    agreement = Agreement(threshold, 2)
    model.agreement = agreement
    parts = [part.contiguous() for part in images.split([32, 64], 3)]
    for part in parts:
        model.average(part)
    (unlike,) = model.end()
    pooled = [pooled_by_hand(network, part)[0] for part in parts]
    kinds = np.repeat(["mean", "std", "mean", "std"], [4, 4, 8, 8])
    means = [one[kinds == "mean"] for one in pooled]
    squares = [one[kinds == "std"] ** 2 + mean**2 for one, mean in zip(pooled, means, strict=True)]
    together = pooled[0].copy()
    together[kinds == "mean"] = mean = (means[0] + 2 * means[1]) / 3
    together[kinds == "std"] = np.sqrt((squares[0] + 2 * squares[1]) / 3 - mean**2)
    assert unlike == pytest.approx(statistics.ratios(together[None])[0], rel=1e-3)
    preds = [[model.run(part), model.run(part.flip((2, 3)))[..., ::-1, ::-1]] for part in parts]
    whole = [np.concatenate(member, 3) for member in zip(*preds, strict=True)]
    assert agreement.result() == agreement_of(*whole, threshold=threshold) < 1


def test_an_ensemble_counts_every_pair(network, statistics):
    other = UNet(n_filters=4, image_size=32, depth=3).eval()
    network.feature_statistics = statistics
    models = [predict.TorchModel(one, "cpu", "fp32") for one in (network, other)]
    pixels = np.random.default_rng(8).integers(0, 256, (2, 32, 32, 3), np.uint8)
    apart = [model.probabilities(pixels) for model in models]
    threshold = float(np.median(apart[0]))
    both = Ensemble(models, ["a.pth", "b.pth"])
    both.inference = PLAIN._replace(threshold=threshold)
    _, assessed = both.assess(pixels)
    expected = agreement_of(*apart, threshold=threshold)
    assert [one.agreement for one in assessed] == expected.tolist()
    alone = models[0].assess(pixels)[1]
    assert [one.unlike for one in assessed] == [one.unlike for one in alone]
    assert alone[0].agreement is None


def test_what_is_said(capsys):
    images = [(f"{number}.png", Assessment(0.9 - number / 10, 0.5)) for number in range(7)]
    print_assessments(images)
    (line,) = capsys.readouterr().out.splitlines()
    assert "6.png 0.30, 5.png 0.40" in line and "1.png" not in line
    print_assessments([("a.png", Assessment(1.0, 1.0)), ("b.png", Assessment(1.0, 2.34))])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("b.png: unlike") and "distance 2.3" in line
    print_assessments(
        [(f"{number}.png", Assessment(None, number)) for number in range(9)], "slices"
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("7 of 9 slices are unlike") and "8.png, 7.png" in line
    print_assessments([("a.png", Assessment())])
    assert not capsys.readouterr().out
    assert assess(None, [None], 2) == [Assessment(), Assessment()]


def test_a_volume_from_its_slices():
    slices = [Assessment(0.5, 0.1), Assessment(0.9, 9.0), Assessment(1.0, 0.2)]
    assert assess_volume(slices) == (pytest.approx(0.8), 0.2)
    assert assess_volume([Assessment(), Assessment()]) == Assessment()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a data set of 14 + 5 + 3 images, and weights trained on it with flips."""
    place, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    for split, count in {"train": 14, "valid": 5, "test": 3}.items():
        images = {}
        for number in range(count):
            pixels = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
            pixels[9:25, 9:25] = rng.integers(200, 240)
            images[f"{number}.png"] = Image.fromarray(pixels)
        annotations = [(number, square(9, 9, 16)) for number in range(count)]
        write_split(place / "dataset" / split, images, annotations)
    with pytest.MonkeyPatch.context() as patch:
        skip_pictures(patch)
        flags = (*SMALL, "--epochs", 1, "--augment", "mirror", "--out", "run")
        output_of("train.py", *flags, cwd=place)
    return place


def test_a_training_records_what_its_images_look_like(trained):
    model = load_model(trained / "run" / "best_model.pth").eval()
    assert model.trained_flips == ("horizontal",)
    pooled = []
    for split in ("train", "valid"):
        rows = torch.from_numpy(np.array(load_split(trained / "dataset", split, 32)))
        order = Batches(rows.numpy(), 2, shuffle=True).whole_images(99)
        images = torch.cat([images for images, _ in order])
        images[1::2] = images[1::2].flip(3)
        pooled.append(pooled_by_hand(model, images.contiguous()))
    expected = fit_with_threshold(*pooled)
    found = model.feature_statistics
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-3, atol=1e-4)
    assert found.threshold == pytest.approx(expected.threshold, rel=0.01)


def test_predict_py_tells_unlike_images_and_what_to_check_first(trained):
    images = [Image.open(path) for path in sorted((trained / "dataset" / "test").glob("*.png"))]
    folder = trained / "scans"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"like{number}.png")
    ImageChops.invert(images[0]).save(folder / "inverted.png")
    Image.new("RGB", (50, 40)).save(folder / "blank.png")
    model = ("--model", "run/best_model.pth", "--device", "cpu", "--threshold", 0.49)
    said = output_of("predict.py", "scans", *model, cwd=trained)
    unlike = [line.split(":")[0] for line in said.splitlines() if "unlike the training" in line]
    assert sorted(unlike) == ["blank.png", "inverted.png"] and "check first" not in said
    alone = output_of("predict.py", "scans/blank.png", *model, "--tta", cwd=trained)
    assert "scans/blank.png: unlike the training" in alone and "agreement " in alone
    weights = load_weights(trained / "run" / "best_model.pth")
    del weights._metadata[""]["feature_statistics"]
    torch.save(weights, trained / "before.pth")
    said = output_of("predict.py", "scans", "--model", "before.pth", "--device", "cpu", cwd=trained)
    assert "unlike" not in said


def read_table(folder):
    """The rows of its predictions.csv."""
    with open(folder / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_both(trained):
    """A blank image beside one of the test split."""
    (trained / "table").mkdir()
    shutil.copy2(trained / "dataset" / "test" / "0.png", trained / "table" / "a.png")
    Image.new("RGB", (50, 40)).save(trained / "table" / "b.png")
    flags = ("--model", "run/best_model.pth", "--device", "cpu", "--output", "rows")
    output_of("predict.py", "table", *flags, "--tta", cwd=trained)
    like, unlike = read_table(trained / "rows")
    assert float(like["unlike"]) < 1 < float(unlike["unlike"])
    assert all(0 <= float(row["agreement"]) <= 1 for row in (like, unlike))
    output_of("predict.py", "table", *flags, cwd=trained)
    assert [row["agreement"] for row in read_table(trained / "rows")] == ["", ""]


def test_the_page_warns_of_unlike_images(trained):
    (trained / "page").mkdir()
    model = predict.open_model(trained / "run" / "best_model.pth", "cpu")
    session = Session(trained / "page", model)
    Image.new("RGB", (50, 40)).save(trained / "page" / "blank.png")
    session.predict([trained / "dataset" / "test" / "0.png", trained / "page" / "blank.png"], 0.5)
    _, (line, unlike), _ = session.view(0, 0.5)
    assert line.startswith("0.png: ")
    assert unlike.startswith("blank.png: unlike the training images")
