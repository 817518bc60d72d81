"""The layout of the code: which file imports which, how long functions and lines are."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT

# Ground -> net -> data -> wings -> commands: who may import what. `net` and `data` are libraries.
SCRIPTS = {
    "net": {"ground"},
    "data": {"ground", "net"},
    "train": {"ground", "net", "data", "training", "planning"},
    "predict": {"ground", "net", "data", "predicting", "results"},
    "download": {"ground", "importing"},
    "hubconf": {"ground", "net"},
}
WING = {"ground", "net", "data"}
WINGS = {  # which never import one another, but those that stand on results
    "ground": {"ground"},
    "importing": {*WING, "importing"},
    "planning": {*WING, "planning"},
    "training": {*WING, "training"},
    "results": {*WING, "results"},
    "predicting": {*WING, "results", "predicting"},
}
MAX_HEAD = 25  # lines of imports at the head of a script
PACKAGE = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.glob("medseg/**/*.py")
    if path.stem != "__init__"
}
CODE = [*(ROOT / f"{name}.py" for name in SCRIPTS), *PACKAGE.values()]
MAX_FUNCTION_LINES, MAX_COLUMNS = 60, 100
LONG_FUNCTIONS = {"train_model"}  # whose docstring and parameters take most of the lines
HEAVY = ("matplotlib", "torchvision", "swanlab", "kaggle", "pycocotools.coco")


def imported_modules(path):
    """Every module that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(module):
    """'medseg.results.table' -> 'results', 'medseg.cli' -> 'ground', 'net' -> 'net'"""
    parts = module.split(".")
    return parts[0] if parts[0] != "medseg" else parts[1] if len(parts) == 3 else "ground"


def places(path):
    """Where the files that a file imports are; the command line of data.py stands on data.py."""
    known = PACKAGE.keys() | SCRIPTS.keys()
    modules = known & set(imported_modules(path)) - {"medseg.planning.command"}
    return {place(module) for module in modules}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_in_one_direction(script):
    assert places(ROOT / f"{script}.py") <= SCRIPTS[script]


@pytest.mark.parametrize("module", PACKAGE)
def test_wings_stand_on_the_ground_net_and_data(module):
    assert places(PACKAGE[module]) <= WINGS[place(module)]


def test_there_is_no_import_cycle():
    files = {**PACKAGE, **{name: ROOT / f"{name}.py" for name in SCRIPTS}}
    known = files.keys() - {"medseg.planning.command"}
    graph = {module: known & set(imported_modules(path)) for module, path in files.items()}
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


@pytest.mark.parametrize("script", ["net", "data", "train", "predict", "download"])
def test_the_head_of_a_script_is_short(script):
    body = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[-1].end_lineno - imports[0].lineno < MAX_HEAD


def test_no_program_is_handed_down():
    """What a file may import is not a parameter."""
    handed = {"open_split", "load_model", "read_network", "train_and_test"}
    for path in PACKAGE.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
                assert not names & handed, f"{path}: {names & handed}"


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
