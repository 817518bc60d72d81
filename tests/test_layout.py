"""The layout of the code: which file imports which."""

import ast
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, run_python

# Ground -> net -> data -> wings -> commands: who may import what. `net` and `data` are libraries.
LIBRARIES = {"ground", "net", "data"}
MAY_IMPORT = {
    "ground": {"ground"},
    "net": {"ground"},
    "data": {"ground", "net"},
    "hubconf": {"ground", "net"},
    "importing": {*LIBRARIES, "importing"},  # wings, which never import one another,
    "planning": {*LIBRARIES, "planning"},
    "training": {*LIBRARIES, "training"},
    "results": {*LIBRARIES, "results"},
    "predicting": {*LIBRARIES, "results", "predicting"},  # but those that stand on results
    "train": {*LIBRARIES, "training", "planning"},
    "predict": {*LIBRARIES, "predicting", "results"},
    "download": {"ground", "importing"},
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("medseg/**/*.py")]
    if path.stem != "__init__"
}
COMMAND = "medseg.planning.command"  # the command line of data.py, which stands on data.py
HEAVY = ("matplotlib", "torchvision", "swanlab", "wandb", "mlflow", "pycocotools.coco")


def imported_files(path):
    """The files of the repository that a file imports, at its top or within a function."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported & FILES.keys() - {COMMAND}


def room(module):
    """'medseg.results.table' -> 'results', 'medseg.cli' -> 'ground', 'net' -> 'net'"""
    parts = module.split(".")
    return parts[0] if parts[0] != "medseg" else parts[1] if len(parts) == 3 else "ground"


@pytest.mark.parametrize("module", FILES)
def test_imports_go_in_one_direction(module):
    assert set(map(room, imported_files(FILES[module]))) <= MAY_IMPORT[room(module)]


def test_there_is_no_import_cycle():
    graph = {module: imported_files(path) for module, path in FILES.items()}
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_importing_does_nothing(tmp_path):
    scripts = ", ".join(module for module in FILES if "." not in module)
    code = f"import sys, {scripts}; print([name for name in {HEAVY} if name in sys.modules])"
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []
