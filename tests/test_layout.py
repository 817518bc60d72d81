"""The layout of the code: which file imports which, and what packages it needs."""

import ast
import re
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, run_python
from packaging.version import Version

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
# Packages that are imported under another name, and those that no script imports.
IMPORTED_AS = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml"}
# Imported when used; the error names the pip command.
OPTIONAL = {"pydicom", "nibabel", "h5py", "gradio", "onnx", "onnxscript", "onnxruntime"}
OPTIONAL |= {"tensorboard", "wandb", "mlflow"}
WITH_GRADIO = {"fastapi", "uvicorn", "python_multipart"}
NOT_IMPORTED = {"torchvision", "six"}  # the tutorial's transforms, and what kaggle does not declare


def imports(path):
    """The names that a file imports, at its top or within a function."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return imported


def room(module):
    """'medseg.results.table' -> 'results', 'medseg.cli' -> 'ground', 'net' -> 'net'"""
    parts = module.split(".")
    return parts[0] if parts[0] != "medseg" else parts[1] if len(parts) == 3 else "ground"


def test_imports_go_in_one_direction():
    graph = {name: imports(path) & FILES.keys() - {COMMAND} for name, path in FILES.items()}
    for name, imported in graph.items():
        assert set(map(room, imported)) <= MAY_IMPORT[room(name)], name
    list(TopologicalSorter(graph).static_order())  # CycleError names the cycle


@pytest.mark.slow
def test_importing_does_nothing(tmp_path):
    scripts = ", ".join(module for module in FILES if "." not in module)
    code = f"import sys, {scripts}; print([name for name in {HEAVY} if name in sys.modules])"
    result = run_python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[]\n", "")
    assert list(tmp_path.iterdir()) == []


def requirements(name):
    """{package: version} of a file of requirements, without what it includes."""
    lines = re.findall(r"^([\w-]+)[=>]=([\d.]+)", (ROOT / name).read_text("utf-8"), re.MULTILINE)
    return {package: Version(version) for package, version in lines}


def test_requirements_list_what_is_imported_and_the_oldest_versions_are_tested():
    bounds = requirements("requirements.txt")
    assert requirements("tests/oldest.txt") == bounds | requirements("tests/requirements.txt")
    imported = {name.split(".")[0] for path in FILES.values() for name in imports(path)}
    imported -= {"medseg", *FILES} | sys.stdlib_module_names | OPTIONAL | WITH_GRADIO
    assert imported == {IMPORTED_AS.get(name, name) for name in bounds.keys() - NOT_IMPORTED}
