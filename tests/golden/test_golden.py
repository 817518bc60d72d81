"""The golden set: what the scripts make of small inputs has not changed. See cases.py."""

import pytest
from cases import CASES, differences, run_case

SLOW = {"export_onnx", "plan", "train_auto", "train_folds", "predict_tiles"}  # seconds each
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]


@pytest.mark.parametrize("name", MARKED)
def test_golden(name, no_pictures, here):
    lines = differences(name, run_case(name))
    assert not lines, "\n".join(lines)
