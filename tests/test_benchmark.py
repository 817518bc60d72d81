"""The benchmark runs, and memory does not grow with the data: what of it is not a timing."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow


def test_quick_benchmark(tmp_path):
    figures = tmp_path / "figures.json"
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmark.py", "--quick", "--json", figures],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(figures.read_text())
    names = [row["name"] for row in figures["rows"]]
    assert len(names) == len(set(names)) >= 3
    scale = [figures["facts"][f"scale_{factor}x"] for factor in (1, 4, 16)]
    assert [fact["images"] for fact in scale] == [8, 32, 128]
    assert scale[2]["peak_mib"] < 1.1 * scale[0]["peak_mib"]
