"""The layout of the code: which file imports which, how long functions are."""

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
MAX_HEAD = 25  # lines of imports at the head of a script
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {"train_model"}  # whose docstring and parameters take most of the lines
HEAVY = ("matplotlib", "torchvision", "swanlab", "wandb", "mlflow", "pycocotools.coco")


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_files(path):
    """The files of the repository that a file imports, at its top or within a function."""
    imported = set()
    for node in ast.walk(tree(path)):
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


@pytest.mark.parametrize("script", ["net", "data", "train", "predict", "download"])
def test_the_head_of_a_script_is_short(script):
    body = tree(FILES[script]).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[-1].end_lineno - imports[0].lineno < MAX_HEAD


@pytest.mark.parametrize("module", FILES)
def test_functions_fit_on_a_screen(module):
    for node in ast.walk(tree(FILES[module])):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            fits = lines <= MAX_FUNCTION_LINES or node.name in LONG_FUNCTIONS
            assert fits, f"line {node.lineno}: {node.name} has {lines} lines"


def test_importing_does_nothing(tmp_path):
    scripts = ", ".join(module for module in FILES if "." not in module)
    code = f"import sys, {scripts}; print([name for name in {HEAVY} if name in sys.modules])"
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []
