"""What ``lora-mini plan`` says is what a step takes."""

import json
import os
from pathlib import Path

import pytest

from experiments.plan_check import CHECKS, SHAPE, check

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a "
                    "process can only be forgotten on Linux")  # fmt: skip
def test_the_plan_of_full_fine_tuning_is_within_15_percent_of_the_peak():
    found = check(SHAPE | {"num_hidden_layers": 2}, CHECKS["full fine-tuning"])
    assert 250e6 < found["measured"] < 500e6
    assert 0.85 < found["planned_over_measured"] < 1.15


def test_the_committed_checks_are_within_15_percent():
    found = json.loads((ROOT / "experiments/results/plan_check.json").read_text())
    assert found.keys() == CHECKS.keys()
    assert all(0.85 < row["planned_over_measured"] < 1.15 for row in found.values())
