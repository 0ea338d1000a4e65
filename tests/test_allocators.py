"""The benchmark of allocators runs the command line under each, and says what it counted."""

import json
import platform

import pytest

from benchmarks.allocators import KEPT, Options, main
from benchmarks.machine import allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is told")
def test_every_row_is_a_run_with_settings_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")  # the user's own, which no row is to have
    path = tmp_path / "allocators.json"
    main(Options(rounds=1, steps=2, layers=1, width=64, json=path))
    record = json.loads(path.read_text())
    assert record["allocator"] == allocator()
    plain, kept = record["rows"]
    assert (plain["environment"], kept["environment"]) == ({}, KEPT)
    assert plain["ratio"] == 1
    assert kept["ratio"] == pytest.approx(kept["step_ms"] / plain["step_ms"])
    for row in record["rows"]:
        assert row["resident_bytes"] > 1e8
        assert row["page_faults"] > 1e4
    assert kept["page_faults"] < plain["page_faults"]
