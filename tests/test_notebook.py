"""The notebook runs from its first cell to its last, in a copy of the repository."""

import re
import shutil

import pytest
from helpers import ROOT, SMALL

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "notebooks" / "first_hour.ipynb"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path):
    for pattern in ("*.py", "requirements.txt", "notebooks", "medseg", "dataset/tumor.pth"):
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    notebook = nbformat.read(NOTEBOOK, 4)
    small = " ".join(map(str, (*SMALL, "--epochs", 1, "--overwrite")))
    for cell in notebook.cells:  # trainings are shorter, and a command that fails ends it
        source = cell.source.replace("--overwrite", small)
        cell.source = re.sub(r"^( *)(!.*)", r"\1\2\n\1assert not _exit_code", source, flags=re.M)
    folder = {"metadata": {"path": tmp_path / "notebooks"}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
    shown = {path.name for path in (tmp_path / "runs" / "notebook").rglob("*.*g")}
    assert {"curves.png", "predictions.png", "report.png", "contact_sheet.jpg"} <= shown
