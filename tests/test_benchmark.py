"""The benchmark runs, and what of it is no timing holds: memory does not grow with the data."""
import json
import subprocess
import sys

from conftest import ROOT


def test_quick_benchmark(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "tests" / "benchmark.py", "--quick", "--json", tmp_path / "figures.json"],
                            cwd=tmp_path, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = [row["name"] for row in figures["rows"]]
    assert len(names) == len(set(names)) >= 3
    scale = [figures["facts"][f"scale_{factor}x"] for factor in (1, 4, 16)]
    assert [found["images"] for found in scale] == [8, 32, 128]
    assert scale[2]["peak_mib"] < 1.1 * scale[0]["peak_mib"]
