"""The documents say what the scripts do: commands run, flags and links exist, CI is theirs."""

import ast
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT, assert_done, script, script_here

README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCUMENTS = [README, CHINESE, ROOT / "dataset" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)
LAYOUT, CODE = ROOT / "docs" / "layout.md", [*ROOT.glob("*.py"), *ROOT.glob("medseg/**/*.py")]
SCRIPTS = ("train.py", "predict.py", "data.py", "download.py")
TOOLS = ("kill.py", "fuzz.py", "quality.py", "benchmark.py", "compare.py")  # in tools/
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
REMOVED = {"--dice"}  # docs/results.md says so beside the row that was measured with it
OTHERS = {"--system-site-packages", "--max-restarts", "--id"}  # venv, torchrun, swanlab sync

# Packages that are imported under another name, and those that no script imports.
IMPORTED_AS = {"pillow": "PIL", "opencv-python-headless": "cv2", "pyyaml": "yaml"}
# Imported when used; the error names the pip command.
OPTIONAL = {"pydicom", "nibabel", "h5py", "gradio", "onnx", "onnxscript", "onnxruntime"}
WITH_GRADIO = {"fastapi", "uvicorn", "python_multipart"}
NOT_IMPORTED = {"six", "torchvision"}  # for kaggle; for the tutorial's transforms


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


def arguments(command, name):
    """What follows a script's name in a command, as a list of words; None without the name."""
    _, found, after = command.partition(f"{name} ")
    return shlex.split(after) if found else None


def first_command(name):
    return next(line for line in commands(README) if name in line)


# ---- flags -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known_flags(tmp_path_factory):
    """{script: its flags}."""
    place = tmp_path_factory.mktemp("help")
    helps = {name: script_here(name, "--help", cwd=place).stdout for name in SCRIPTS}
    flags = {name: set(re.findall(FLAG, said)) for name, said in helps.items()}
    for name in TOOLS:
        flags[name] = set(re.findall(FLAG, text(ROOT / "tools" / name)))
    flags["quality.py"] |= flags["train.py"]  # hands on what it does not know
    return flags


@each_document
def test_flags_exist(path, known_flags):
    for command in commands(path) + inline_code(path):
        for name in known_flags:
            used = set(re.findall(FLAG, " ".join(arguments(command, name) or [])))
            assert used <= known_flags[name], command
    anywhere = set().union(*known_flags.values(), REMOVED, OTHERS)
    for code in inline_code(path):
        if "torchrun" not in code:
            assert set(re.findall(FLAG, code)) <= anywhere, code


@pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
def test_the_readme_lists_the_flags_of_strong(path):
    from medseg.cli import spell_flags
    from medseg.training.recipes import RECIPES

    assert spell_flags(RECIPES["strong"]) in inline_code(path)


# ---- commands --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_commands_train_on_phantoms_and_predict(tmp_path):
    training = arguments(first_command("train.py --synthetic"), "train.py")
    command = ("train.py", *training, "--epochs", 1)
    printed = assert_done(script(*command, cwd=tmp_path, timeout=300)).splitlines()
    out = tmp_path / training[training.index("--out") + 1]
    written = {path.name for path in out.iterdir()}
    assert {"best_model.pth", "last.pth", "metrics.csv", "curves.png", "predictions.png"} <= written

    command = arguments(first_command("predict.py"), "predict.py")
    assert "dataset/synthetic/test" in assert_done(script("predict.py", *command, cwd=tmp_path))
    assert list(tmp_path.glob("*_prediction.png")) and list(tmp_path.glob("*_mask.png"))

    excerpt = re.search(r"<!-- excerpt -->\n```text\n(.*?)```", text(README), re.DOTALL)[1]
    for line in excerpt.splitlines():  # up to its first number
        start = re.split(r"\d|\.\.\.", line)[0].strip()
        assert any(said.startswith(start) for said in printed), line


def test_the_first_commands_make_the_environment_first():
    words = [line.split() for line in commands(README)]
    install = words.index(["pip", "install", "-r", "requirements.txt"])
    before = ["python3 -m venv .venv", "source .venv/bin/activate"]
    assert words[install - 2 : install] == [line.split() for line in before]
    assert "--synthetic" in words[install + 1]


def test_ci_runs_the_test_command():
    install, run = "pip install -r tests/requirements.txt", "python -m pytest"
    listed = commands(README)
    assert listed.index(run) == listed.index(install) + 1
    ci = text(ROOT / ".ci" / "run")
    assert re.search(r"pip\S* install .*tests/requirements\.txt", ci)
    assert re.search(r"python\S* -m pytest$", ci, re.MULTILINE)
    workflow = text(ROOT / ".github" / "workflows" / "tests.yml")
    assert "run: bash .ci/run" in workflow and "timeout-minutes" in workflow


def test_python_examples_name_what_exists():
    examples = [block for path in DOCUMENTS for block in blocks(path, "python")]
    assert examples
    for node in (node for block in examples for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


# ---- requirements ----------------------------------------------------------------------------


def test_requirements_list_what_is_imported():
    imported, local = set(), {"medseg", *(path.stem for path in ROOT.glob("*.py"))}
    for path in CODE:
        for node in ast.walk(ast.parse(text(path))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    lines = text(ROOT / "requirements.txt").splitlines()
    listed = {re.split(r"[>=<\s]", line)[0] for line in lines} - {""}
    names = {IMPORTED_AS.get(name, name) for name in listed - NOT_IMPORTED}
    assert imported - local - sys.stdlib_module_names - OPTIONAL - WITH_GRADIO == names


# ---- links, pictures, tables -----------------------------------------------------------------


def links(path):
    return re.findall(r"\]\(([^)\s]+)\)", text(path))


def anchors(path):
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_resolve(path):
    for link in links(path):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT) and target.is_file(), link
        if anchor:
            assert anchor in anchors(target), link


@each_document
def test_pictures_are_small_and_tables_full(path):
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text(path)):
        assert 5_000 < (path.parent / picture).stat().st_size < 300_000, picture
    for line in text(path).splitlines():
        assert not re.search(r"^\s*\|.*\|\s*\|", f" {line}"), line


def test_the_layout_is_complete():
    linked = re.findall(r"\]\(\.\./((?:medseg/)?(?:\w+/)?\w+\.py)\)", text(LAYOUT))
    names = {path.relative_to(ROOT).as_posix() for path in CODE if path.stem != "__init__"}
    assert {path for path in linked if not path.startswith(("tests/", "tools/"))} == names


def test_citation():
    content = text(ROOT / "CITATION.cff")
    keys = {"cff-version", "message", "title", "authors", "references"}
    assert keys <= set(re.findall(r"^([a-z-]+):", content, re.MULTILINE))
    assert f"title: {text(README).splitlines()[0].removeprefix('# ')}\n" in content
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load(content)
    assert citation["cff-version"] == "1.2.0" and "license" not in citation
    assert all(
        {"type", "title", "authors"} <= reference.keys() for reference in citation["references"]
    )


# ---- the Chinese pages -----------------------------------------------------------------------

PAIRS = [(path, path.with_suffix(".zh-CN.md")) for path in (README, ROOT / "docs" / "own-data.md")]
both_pages = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS, ids=[english.name for english, _ in PAIRS]
)


def table_numbers(path):
    """The numbers of each table, as a list of lists."""
    tables = re.findall(r"(?:^\|.*\n)+", text(path), re.MULTILINE)
    return [re.findall(r"\d[\d.]*", table) for table in tables]


@both_pages
def test_the_chinese_page_has_the_same_commands_flags_and_output(english, chinese):
    assert commands(chinese) == commands(english)
    assert blocks(chinese, "text") == blocks(english, "text")
    named, own = (re.findall(FLAG, " ".join(inline_code(path))) for path in (english, chinese))
    assert set(named) == set(own)


@both_pages
def test_the_chinese_page_has_the_same_links(english, chinese):
    def elsewhere(path):  # a page in either language is one target
        targets = [link for link in links(path) if not link.startswith("#")]
        return sorted(link.replace(".zh-CN.md", ".md") for link in targets)

    assert elsewhere(chinese) == elsewhere(english)


@both_pages
def test_the_chinese_page_has_the_same_numbers(english, chinese):
    assert table_numbers(chinese) == table_numbers(english)
    decimals, own = (sorted(re.findall(r"\d+\.\d+", text(path))) for path in (english, chinese))
    assert decimals == own


@both_pages
def test_each_page_links_the_chinese_or_english_one(english, chinese):
    assert f"[中文]({chinese.name})" in text(english).splitlines()[:4]
    assert f"[English]({english.name})" in text(chinese).splitlines()[:4]
