"""The quality runs go on where they stopped, and their table says what the reports say."""
import json
import os
import subprocess
import sys

from conftest import ROOT, make_dataset


def test_every_run_once_and_the_table_from_the_reports(tmp_path):
    make_dataset(tmp_path / "dataset")
    command = [sys.executable, ROOT / "tests" / "quality.py", "--splits", "official", "--seeds", "0", "--out", "quality", "--device", "cpu",
               "--image-size", "32", "--n-filters", "2", "--batch-size", "2", "--epochs", "1"]

    def quality():
        result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        return result.stdout, json.loads((tmp_path / "quality" / "recipes.json").read_text())["runs"]

    said, runs = quality()
    assert said.count("epoch 1/1") == 2 and [run["row"] for run in runs] == ["tutorial", "strong"]
    for run in runs:
        folder = tmp_path / "quality" / "official" / run["row"] / "seed0"
        report = json.loads((folder / "report.json").read_text())
        assert (run["dice"], run["dice_chosen"]) == (report["scores"]["dice"], report["valid"]["scores_with_it"]["dice"])
        assert f"| {run['dice']:.3f} |" in said and not list(folder.glob("last*"))
    (tmp_path / "quality" / "official" / "strong" / "seed0" / "report.json").unlink()  # stopped before the last was scored
    again, same = quality()
    assert "epoch 1/1" not in again and same == runs
