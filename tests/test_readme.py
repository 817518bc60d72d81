"""The README says what the scripts do: its commands run, its flags exist, its numbers are of this code."""
import re

import pytest
from conftest import ROOT, script

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("name", ["train.py", "predict.py", "download.py", "data.py"])
def test_flags_exist(name, tmp_path):
    help_text = script(name, "--help", cwd=tmp_path).stdout
    used = {flag for line in COMMANDS if name in line for flag in re.findall(r"--[a-z-]+", line.split(name)[1])}
    used |= {flag for quoted in re.findall(rf"`python {re.escape(name)}([^`]*)`", README) for flag in re.findall(r"--[a-z-]+", quoted)}
    assert used <= set(re.findall(r"--[a-z-]+", help_text))


def test_the_first_command_trains_on_phantoms(tmp_path):
    command = next(line for line in COMMANDS if "--synthetic" in line and "venv" in line)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python train.py ")
    result = script("train.py", *command.split("train.py ")[1].split(), "--epochs", 1, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert {"best_model.pth", "curves.png", "predictions.png", "dataset"} <= {path.name for path in tmp_path.iterdir()}
    predicted = script("predict.py", cwd=tmp_path)
    assert predicted.returncode == 0 and "dataset/synthetic/test" in predicted.stdout


def test_ci_runs_the_test_command():
    command = next(line for line in COMMANDS if "pytest" in line)
    assert "tests/requirements.txt" in command
    assert "install --quiet --requirement tests/requirements.txt" in (ROOT / ".ci" / "run").read_text()
    listed = {re.split("[>= ]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    imported = {match for path in ROOT.glob("*.py") for match in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M)}
    names = {"PIL": "pillow"}
    for module in ("torch", "pycocotools", "swanlab", "matplotlib", "PIL", "numpy", "kaggle", "tqdm", "requests"):
        assert module in imported and names.get(module, module) in listed


def test_pictures_are_there_and_small():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert 5_000 < (ROOT / picture).stat().st_size < 300_000
