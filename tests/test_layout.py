"""The layout of the code: which file imports which, how long functions and lines are."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

SCRIPTS = {
    "net": {"medseg"},
    "data": {"net", "medseg"},
    "train": {"data", "net", "medseg"},
    "predict": {"data", "net", "medseg"},
    "download": {"medseg"},
    "hubconf": {"net", "medseg"},
}
# What the files of a folder of medseg may import besides their own: the ground floor, "", is open
# to all, and the wings in the middle never import one another.
MAY_IMPORT = {
    "": set(),
    "formats": {""},
    "sources": {"", "formats"},
    "importing": {"", "formats", "sources"},
    "planning": {""},
    "training": {"", "formats"},
    "results": {"", "formats"},
    "predicting": {"", "formats", "results"},
    "page": {"", "formats", "results", "predicting"},
}
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.glob("medseg/**/*.py")
    if path.stem != "__init__"
}
CODE = [*(ROOT / f"{name}.py" for name in SCRIPTS), *PACKAGE.values()]
MAX_FUNCTION_LINES, MAX_COLUMNS = 60, 100
LONG_FUNCTIONS = {"train_model"}  # whose docstring and parameters take most of the lines
HEAVY = ("matplotlib", "torchvision", "swanlab", "kaggle", "pycocotools")


def imported_modules(path):
    """Every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path):
    """Of these, the scripts and medseg."""
    names = {module.partition(".")[0] for module in imported_modules(path)}
    return names & {*SCRIPTS, "medseg"}


def floor(module):
    """'medseg.page.app' -> 'page', 'medseg.cli' -> ''"""
    return module.split(".")[1] if module.count(".") == 2 else ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_in_one_direction(script):
    assert own_imports(ROOT / f"{script}.py") <= SCRIPTS[script]


@pytest.mark.parametrize("module", PACKAGE)
def test_medseg_imports_no_script_and_no_floor_above(module):
    assert own_imports(PACKAGE[module]) <= {"medseg"}
    floors = {floor(other) for other in PACKAGE.keys() & set(imported_modules(PACKAGE[module]))}
    assert floors <= {floor(module), *MAY_IMPORT[floor(module)]}


def test_medseg_has_no_import_cycle():
    graph = {
        module: PACKAGE.keys() & set(imported_modules(path)) for module, path in PACKAGE.items()
    }
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


def test_importing_does_nothing(tmp_path):
    code = (
        f"import sys, {', '.join(SCRIPTS)}\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            fits = lines <= MAX_FUNCTION_LINES or node.name in LONG_FUNCTIONS
            assert fits, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_lines_end_by_column_100():
    too_long = []
    for path in [*CODE, *ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                too_long.append(f"{path}:{number}")
    assert not too_long
