"""The oldest versions that are promised are those that are tested."""

import re

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text()


def read_requirements(*names):
    """{package: Requirement} of files of requirements, without what they include."""
    requirements = {}
    for name in names:
        for line in (ROOT / name).read_text().splitlines():
            text = line.partition("#")[0].strip()
            if text and not text.startswith("-r"):
                requirement = Requirement(text)
                assert requirement.name not in requirements, f"{name}: {text} is there twice"
                requirements[requirement.name] = requirement
    return requirements


def oldest(requirement):
    """The version that a requirement begins with: of its only clause, >= or ==."""
    (clause,) = requirement.specifier
    assert clause.operator in (">=", "=="), requirement
    return Version(clause.version)


def test_the_oldest_versions_are_the_lower_bounds():
    promised = read_requirements("requirements.txt", "tests/requirements.txt")
    tested = read_requirements("tests/oldest.txt")
    assert all(str(requirement.specifier).startswith("==") for requirement in tested.values())
    assert {name: oldest(one) for name, one in tested.items()} == {
        name: oldest(one) for name, one in promised.items()
    }


def test_the_workflow_runs_both_ends():
    """Python's oldest with the oldest packages, and newer ones without constraints."""
    runs = re.findall(r'python-version: "([\d.]+)".*(?:\n +constraints: (\S+))?', WORKFLOW)
    constraints = dict(runs)
    (python,) = (version for version, file in constraints.items() if file)
    assert constraints[python] == "tests/oldest.txt"
    assert len(constraints) >= 2 and "PIP_CONSTRAINT" in WORKFLOW
    assert min(map(Version, constraints)) == Version(python)
    assert (
        f'target-version = "py{python.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_the_oldest_python(name):
    (python,) = re.findall(r'python-version: "([\d.]+)".*\n +constraints:', WORKFLOW)
    assert f"Python {python}" in (ROOT / name).read_text(encoding="utf-8")
