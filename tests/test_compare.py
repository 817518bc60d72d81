"""tools/compare.py: runs on the same images, with paired bootstrap differences."""

import json

import compare
import numpy as np
import pytest
import torch
from helpers import assert_refused, brightness_model, make_dataset, script
from PIL import Image
from scipy import stats

import predict
from medseg.metrics import bootstrap, image_dice


def write_report(folder, per_image, **changes):
    folder.mkdir(parents=True)
    values = np.array(list(per_image.values()))
    scores = dict.fromkeys(("dice", "image_dice"), float(values.mean()))
    report = {
        **{"class_names": ["foreground"], "image_size": 64, "threshold": 0.5, "scores": scores},
        **{"confidence_95": dict.fromkeys(scores, [0.1, 0.9]), "per_image": per_image},
    }
    (folder / "report.json").write_text(json.dumps(report | changes))
    return folder


@pytest.fixture
def two(tmp_path):
    """Two reports of 40 images, in another order; the second is better by 0.02 on average."""
    rng = np.random.default_rng(0)
    first = rng.uniform(0.2, 0.9, 40)
    second = np.clip(first + rng.normal(0.02, 0.05, 40), 0, 1)
    names = [f"{n}.png" for n in range(40)]
    write_report(tmp_path / "a", dict(zip(names, first, strict=True)))
    shuffled = rng.permutation(40)
    write_report(tmp_path / "b", {names[n]: second[n] for n in shuffled})
    return tmp_path / "a", tmp_path / "b", second - first


def test_images_are_paired_by_their_names_and_the_interval_is_scipys(two):
    *paths, expected = two
    _, (first, second) = compare.read_runs(paths)
    found = compare.compare(second, first)
    np.testing.assert_allclose(found.of_units, expected)
    assert found.mean == pytest.approx(expected.mean())
    options = {"n_resamples": 20_000, "method": "percentile", "random_state": 1}
    interval = stats.bootstrap((expected,), np.mean, **options).confidence_interval
    little = 0.05 * (interval.high - interval.low)
    assert found.low == pytest.approx(interval.low, abs=little)
    assert found.high == pytest.approx(interval.high, abs=little)
    # Unpaired, the interval of two such runs is several times as wide.
    both = (second.dice, first.dice)
    alone = stats.bootstrap(both, lambda a, b, axis: a.mean(axis) - b.mean(axis), **options)
    low, high = alone.confidence_interval
    assert high - low > 3 * (found.high - found.low)


def test_images_are_drawn_as_for_the_intervals_of_a_report():
    counts = np.random.default_rng(0).integers(1, 99, (30, 1, 4))
    dice = image_dice(counts[:, 0])
    run, zero = compare.Run("a", {}, dice), compare.Run("b", {}, np.zeros(30))
    found = compare.compare(run, zero)
    assert [found.low, found.high] == pytest.approx(bootstrap(counts)["image_dice"])


def test_runs_are_paired_by_group_where_both_have_the_same(two, tmp_path, capsys):
    first, second, _ = two
    scores = dict.fromkeys(("dice", "image_dice", "group_dice"), 0.5)
    intervals = {"scores": scores, "confidence_95": dict.fromkeys(scores, [0.1, 0.9])}
    images = json.loads((first / "report.json").read_text())["per_image"]
    dice = {"p": [0.5, 0.6, 0.7], "q": [0.6, 0.55, 0.8]}
    paths = []
    for name, values in dice.items():
        groups = dict(zip("abc" if name == "p" else "cba", values, strict=True))
        paths.append(write_report(tmp_path / name, images, per_group=groups, **intervals))
    names, runs = compare.read_runs(paths)
    assert names == ["a", "b", "c"] and {run.unit for run in runs} == {"group"}
    found = compare.compare(runs[1], runs[0])
    np.testing.assert_allclose(found.of_units, [0.3, -0.05, -0.1])
    compare.main([*map(str, paths), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "3 groups" in said and "+0.0500 [" in said and "| 1, 0, 2 |" in said
    names, runs = compare.read_runs([paths[0], second])  # which has no groups
    assert len(names) == 40 and runs[0].unit == "image"


def test_table_and_picture(two, tmp_path, capsys):
    first, second, expected = two
    third = write_report(
        tmp_path / r"$\frac$ 病", {f"{n}.png": 0.5 for n in range(40)}, image_size=32
    )
    compare.main([str(first), str(second / "report.json"), str(third), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.startswith(f"| {second} |")]
    better, worse = (expected > 0).sum(), (expected < 0).sum()
    assert f"{expected.mean():+.4f} [" in row and f"| {better}, 0, {worse} |" in row
    best = int(expected.argmax())
    assert f"{second}, largest gains: {best}.png {expected[best]:+.2f}" in said
    assert f"note: image_size of {third} is 32" in said
    assert Image.open(tmp_path / "compare.png").width == 1280


def test_two_predictions_of_one_folder(tmp_path, monkeypatch):
    """A model that sees the squares, and one that is told to see nothing."""
    monkeypatch.chdir(tmp_path)
    test = make_dataset(tmp_path / "dataset") / "test"
    torch.save(brightness_model(48).state_dict(), "best_model.pth")
    for threshold in ("0.5", "1"):
        predict.main([str(test), "--threshold", threshold, "--output", f"at{threshold}"])
    _, (seen, blind) = compare.read_runs(["at0.5", "at1"])
    assert (seen.dice > 0.7).all() and (blind.dice == 0).all()
    found = compare.compare(blind, seen)
    assert found.high < -0.7 and found.low <= found.mean <= found.high


def test_reports_that_cannot_be_compared(two, tmp_path):
    first, second, _ = two
    fewer = write_report(tmp_path / "c", {f"{n}.png": 0.5 for n in (*range(38), 99)})
    (tmp_path / "folds.json").write_text('{"per_image": {"a": "b"}}')
    for arguments, words in (
        ((first, fewer), ["2 (38.png, 39.png)", "1 (99.png)", first, fewer]),
        ((first, tmp_path / "folds.json"), ["folds.json", "per_image"]),
        ((first, tmp_path / "nowhere"), ["nowhere", "predict.py"]),
        ((first,), [first]),
        ((first, second, "--out", first / "report.json"), ["--out"]),
    ):
        assert_refused(script("tools/compare.py", *arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.rglob("compare.png"))
