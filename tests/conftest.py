"""Fixtures that several test files use; what they are made of is in helpers.py."""

import pytest

pytest.register_assert_rewrite("helpers")  # so that an assertion there shows its values

from helpers import assert_refused, make_dataset, script_here, skip_pictures  # noqa: E402


@pytest.fixture
def refused(tmp_path):
    """refused("train", *arguments, words=[...]): runs a script here, asserts that it is refused.

    Returns the line on stderr.
    """

    def check(name, *arguments, words):
        result = script_here(f"{name}.py", *arguments, cwd=tmp_path)
        assert_refused(result, *words)
        return result.stderr

    return check


@pytest.fixture
def no_pictures(monkeypatch):
    skip_pictures(monkeypatch)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path
