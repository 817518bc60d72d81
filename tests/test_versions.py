"""The oldest versions that are promised are those that are tested."""

import re

from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def versions(*names):
    """{package: (operator, version)} of files of requirements, without what they include."""
    found = {}
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if text and not text.startswith("-r"):
                requirement = Requirement(text)
                (clause,) = requirement.specifier
                found[requirement.name] = clause.operator, Version(clause.version)
    return found


def test_the_oldest_versions_are_the_lower_bounds():
    promised = versions("requirements.txt", "tests/requirements.txt")
    assert {operator for operator, _ in promised.values()} <= {">=", "=="}
    assert versions("tests/oldest.txt") == {
        name: ("==", version) for name, (_, version) in promised.items()
    }


def test_the_oldest_python_is_tested_and_named():
    runs = dict(re.findall(r'python-version: "([\d.]+)".*(?:\n +constraints: (\S+))?', WORKFLOW))
    (python,) = (version for version, file in runs.items() if file == "tests/oldest.txt")
    assert min(map(Version, runs)) == Version(python) and len(runs) > 1
    for name in ("README.md", "README.zh-CN.md"):
        assert f"Python {python}" in (ROOT / name).read_text(encoding="utf-8")
    assert f'"py{python.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
