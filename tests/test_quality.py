"""The quality runs go on where they stopped, and their table says what the reports say."""

import json

import pytest
import quality
from helpers import assert_done, make_dataset, script, script_here

pytestmark = pytest.mark.slow

COMMAND = (
    *("--splits", "official", "--seeds", "0", "--out", "quality", "--device", "cpu"),
    *("--image-size", "32", "--n-filters", "2", "--batch-size", "2", "--epochs", "1"),
)


def read_runs(place):
    return json.loads((place / "quality" / "recipes.json").read_text())["runs"]


def test_every_run_once_and_the_table_from_the_reports(tmp_path, monkeypatch, capsys):
    make_dataset(tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)
    trainings = []

    def call(path, *arguments):
        said = assert_done(script_here(path.name, *arguments, cwd=tmp_path))
        trainings.append(said.count("epoch 1/1"))

    monkeypatch.setattr(quality, "call", call)  # in this process, which saves many seconds
    half_written = tmp_path / "quality" / "official" / "strong" / "seed0" / "best_model.pth"
    half_written.parent.mkdir(parents=True)
    half_written.touch()  # what a run leaves that is killed before its first checkpoint
    quality.main(COMMAND)
    said, runs = capsys.readouterr().out, read_runs(tmp_path)
    assert sum(trainings) == 2 and [run["row"] for run in runs] == ["tutorial", "strong"]
    for run in runs:
        folder = tmp_path / "quality" / "official" / run["row"] / "seed0"
        report = json.loads((folder / "report.json").read_text())
        chosen = report["valid"]["scores_with_it"]["dice"]
        assert (run["dice"], run["dice_chosen"]) == (report["scores"]["dice"], chosen)
        assert f"| {run['dice']:.3f} |" in said and not list(folder.glob("last*"))

    # As if it had been stopped before the last run was scored; now in processes.
    (tmp_path / "quality" / "official" / "strong" / "seed0" / "report.json").unlink()
    said = assert_done(script("tools/quality.py", *COMMAND, cwd=tmp_path, timeout=200))
    assert "epoch 1/1" not in said and read_runs(tmp_path) == runs
