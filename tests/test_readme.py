"""The documents say what the scripts do: commands and notebook run, flags and links exist."""

import ast
import importlib
import re
import shlex
import shutil
import sys

import pytest
from helpers import ROOT, SMALL, assert_done, script, script_here
from packaging.version import Version

README, OWN = ROOT / "README.md", ROOT / "docs" / "own-data.md"
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "dataset" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = ("train.py", "predict.py", "data.py", "download.py")
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
OTHERS = {"--system-site-packages", "--max-restarts", "--id", "--check"}  # venv, torchrun, ruff
OTHERS |= {"--build-arg", "--gpus", "--rm", "--ipc"}  # docker

# Packages that are imported under another name, and those that no script imports.
IMPORTED_AS = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml"}
# Imported when used; the error names the pip command.
OPTIONAL = {"pydicom", "nibabel", "h5py", "gradio", "onnx", "onnxscript", "onnxruntime"}
OPTIONAL |= {"tensorboard", "wandb", "mlflow"}
WITH_GRADIO = {"fastapi", "uvicorn", "python_multipart"}
NOT_IMPORTED = {"torchvision", "six"}  # the tutorial's transforms, and what kaggle does not declare

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
both_pages = pytest.mark.parametrize("english", [README, OWN], ids=lambda path: path.name)


def text(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text(path), re.MULTILINE | re.DOTALL)


def commands(path):
    """The lines of the shell blocks, without their comments."""
    lines = "".join(blocks(path, "bash")).splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def without_blocks(path):
    return re.sub(r"^```.*?^```", "", text(path), flags=re.MULTILINE | re.DOTALL)


def inline_code(path):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_blocks(path))]


# ---- commands and flags ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_flags(tmp_path_factory):
    """{script: its flags}."""
    place = tmp_path_factory.mktemp("help")
    helps = {name: script_here(name, "--help", cwd=place).stdout for name in SCRIPTS}
    helps |= {path.name: text(path) for path in ROOT.glob("tools/*.py")}
    flags = {name: set(re.findall(FLAG, said)) for name, said in helps.items()}
    flags["quality.py"] |= flags["train.py"]  # hands on what it does not know
    return flags


@each_document
def test_flags_exist(path, known_flags):
    for command in commands(path) + inline_code(path):
        for name, flags in known_flags.items():
            _, named, after = command.partition(f"{name} ")
            assert not named or set(re.findall(FLAG, after)) <= flags, command
        if "torchrun" not in command:
            assert set(re.findall(FLAG, command)) <= set().union(*known_flags.values(), OTHERS)


@pytest.mark.slow
def test_the_first_commands_train_on_phantoms_and_predict(tmp_path):
    first = [shlex.split(line)[1:] for line in commands(README) if line.startswith("python ")][:2]
    assert [words[0] for words in first] == ["train.py", "predict.py"]
    printed = assert_done(script(*first[0], cwd=tmp_path, timeout=600)).splitlines()
    (excerpt, *_) = blocks(README, "text")
    for line in excerpt.splitlines():  # up to its first number
        start = re.split(r"\d", line)[0].strip()
        assert any(said.startswith(start) for said in printed), line
    assert_done(script(*first[1], cwd=tmp_path))
    assert list(tmp_path.glob("*_prediction.png")) and list(tmp_path.glob("*_mask.png"))


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path):
    """In a copy of the repository."""
    nbclient = pytest.importorskip("nbclient")  # of tests/requirements.txt, and what it needs
    import nbformat

    for pattern in ("*.py", "requirements.txt", "notebooks", "medseg", "dataset/tumor.pth"):
        for path in ROOT.glob(pattern):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    notebook = nbformat.read(ROOT / "notebooks" / "first_hour.ipynb", 4)
    small = " ".join(map(str, (*SMALL, "--epochs", 1, "--overwrite")))
    for cell in notebook.cells:  # trainings are shorter, and a command that fails ends it
        source = cell.source.replace("--overwrite", small)
        cell.source = re.sub(r"^( *)(!.*)", r"\1\2\n\1assert not _exit_code", source, flags=re.M)
    folder = {"metadata": {"path": tmp_path / "notebooks"}}
    nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
    shown = {path.name for path in (tmp_path / "runs" / "notebook").rglob("*.*g")}
    assert {"curves.png", "predictions.png", "report.png", "contact_sheet.jpg"} <= shown


def test_python_examples_name_what_exists():
    examples = [block for path in DOCUMENTS for block in blocks(path, "python")]
    assert examples
    for node in (node for block in examples for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def requirements(name):
    """{package: version} of a file of requirements, without what it includes."""
    lines = re.findall(r"^([\w-]+)[=>]=([\d.]+)", text(ROOT / name), re.MULTILINE)
    return {package: Version(version) for package, version in lines}


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    bounds = requirements("requirements.txt") | requirements("tests/requirements.txt")
    assert requirements("tests/oldest.txt") == bounds


def test_requirements_list_what_is_imported():
    imported, local = set(), {"medseg", *(path.stem for path in ROOT.glob("*.py"))}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("medseg/**/*.py")]:
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    listed = requirements("requirements.txt").keys() - NOT_IMPORTED
    names = {IMPORTED_AS.get(name, name) for name in listed}
    assert imported - local - sys.stdlib_module_names - OPTIONAL - WITH_GRADIO == names


# ---- links and tables ------------------------------------------------------------------------


def links(path):
    return re.findall(r"\]\(([^)\s]+)\)", text(path))


def anchors(path):
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_resolve(path):
    for link in links(path):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_relative_to(ROOT) and target.is_file(), link
            assert not anchor or anchor in anchors(target), link


# ---- the Chinese pages -----------------------------------------------------------------------


@both_pages
def test_the_chinese_page_says_the_same(english):
    chinese = english.with_suffix(".zh-CN.md")
    assert commands(chinese) == commands(english)
    assert blocks(chinese, "text") == blocks(english, "text")
    for find in (targets_of, decimals_of):
        assert find(chinese) == find(english), find.__name__


def targets_of(path):  # a page in either language is one target, a mirror is for readers in China
    return {link.replace(".zh-CN.md", ".md") for link in links(path) if link[0] != "#"}


def decimals_of(path):
    return sorted(re.findall(r"\d+\.\d+", without_blocks(path)))
