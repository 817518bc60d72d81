"""The benchmark runs, and memory does not grow with the data: what of it is not a timing."""

import json

import pytest
from helpers import assert_done, script

pytestmark = pytest.mark.slow


def test_quick_benchmark(tmp_path):
    command = ("tools/benchmark.py", "--quick", "--json", "figures.json")
    assert_done(script(*command, cwd=tmp_path, timeout=300))
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = [row["name"] for row in figures["rows"]]
    assert len(names) == len(set(names)) >= 7
    for name in ("data", "train", "predict", "download"):
        (row,) = (row for row in figures["rows"] if row["name"].startswith(f"import {name},"))
        assert 0 < row["ours"] < 60
    scale = [figures["facts"][f"scale_{factor}x"] for factor in (1, 4, 16)]
    assert [fact["images"] for fact in scale] == [8, 32, 128]
    assert scale[2]["peak_mib"] < 1.1 * scale[0]["peak_mib"]
