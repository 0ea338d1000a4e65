"""Checks against other people's model classes, each with packages that the main gate has not got.

``.ci/NAME`` makes the environment and runs one file; everywhere else that file is skipped before
it imports anything.
"""

import os

import pytest


def only_in(lane: str) -> None:
    """Skip the whole file that calls this, unless ``.ci/lane`` is what runs it."""
    if os.environ.get("LANE") != lane:
        pytest.skip(f"needs an environment of its own: run .ci/{lane}", allow_module_level=True)
