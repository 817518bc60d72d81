"""The documents say what the scripts do: commands and notebook run, flags and links exist."""

import ast
import importlib
import re
import shlex
import shutil

import pytest
from helpers import ROOT, SMALL, assert_done, script, script_here

README = ROOT / "README.md"
DOCUMENTS = [*ROOT.glob("*.md"), ROOT / "dataset" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = ("train.py", "predict.py", "data.py", "download.py")
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
OTHERS = {"--system-site-packages", "--max-restarts", "--id", "--check"}  # venv, torchrun, ruff
OTHERS |= {"--build-arg", "--gpus", "--rm", "--ipc"}  # docker


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


def test_flags_exist(tmp_path):
    helps = {name: script_here(name, "--help", cwd=tmp_path).stdout for name in SCRIPTS}
    helps |= {path.name: text(path) for path in ROOT.glob("tools/*.py")}
    known = {name: set(re.findall(FLAG, said)) for name, said in helps.items()}
    known["quality.py"] |= known["train.py"]  # hands on what it does not know
    for path in DOCUMENTS:
        inline = re.findall(r"`([^`]+)`", without_blocks(path))
        for command in [*commands(path), *(" ".join(code.split()) for code in inline)]:
            for name, flags in known.items():
                after = command.partition(f"{name} ")[2]
                assert set(re.findall(FLAG, after)) <= flags, command
            if "torchrun" not in command:
                assert set(re.findall(FLAG, command)) <= set().union(*known.values(), OTHERS)


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


def links(path):
    return re.findall(r"\]\(([^)\s]+)\)", text(path))


def test_links_resolve():
    for path in DOCUMENTS:
        for link in (link for link in links(path) if not link.startswith("https://")):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_relative_to(ROOT) and target.is_file(), (path, link)
            if anchor:  # as GitHub makes them of the headings
                headings = re.findall(r"^#+ (.*)$", without_blocks(target).lower(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", own).replace(" ", "-") for own in headings]
                assert anchor in anchors, (path, link)


@pytest.mark.parametrize("page", ["README", "docs/own-data"])
def test_the_chinese_page_says_the_same(page):
    """A page in either language is one target, a mirror is for readers in China."""
    english, chinese = (ROOT / f"{page}{suffix}.md" for suffix in ("", ".zh-CN"))
    assert commands(chinese) == commands(english)
    assert blocks(chinese, "text") == blocks(english, "text")
    targets, decimals = [], []
    for path in (english, chinese):
        targets.append({link.replace(".zh-CN.md", ".md") for link in links(path) if link[0] != "#"})
        decimals.append(sorted(re.findall(r"\d+\.\d+", without_blocks(path))))
    assert targets[0] == targets[1] and decimals[0] == decimals[1]
