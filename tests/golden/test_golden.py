"""The golden set: what the scripts make of small inputs has not changed. See cases.py."""

import pytest
from cases import CASES, differences, run_case


@pytest.mark.parametrize("name", CASES)
def test_golden(name, no_pictures, here):
    lines = differences(name, run_case(name))
    assert not lines, "\n".join(lines)
