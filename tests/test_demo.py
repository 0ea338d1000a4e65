"""The demo, as `make demo` runs it: what it writes, and the memory it takes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lora_mini_jax.runs.demo import topics


def test_no_paragraph_of_a_held_out_topic_is_trained_on():
    train, valid = topics()
    assert len(train) > 2 * len(valid)
    assert len(valid) > 30
    paragraphs = [
        {p.strip() for text in texts for p in text.split("\n\n")} for texts in (train, valid)
    ]
    assert not paragraphs[0] & paragraphs[1]


@pytest.mark.slow
def test_the_demo_runs_learns_and_stays_small(tmp_path):
    # A third of the steps: what it writes and takes is the same.
    demo = ["demo", "--output-dir", "runs/demo", "--steps", "27"]
    command = [sys.executable, "-m", "lora_mini_jax.cli", *demo]
    # As a user runs it: without the flags that trade speed for short compilation in these tests.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("XLA", "JAX"))}
    env = {**own, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "held-out loss after" in run.stdout
    assert "before:" in run.stdout
    assert "after lora-mini" in run.stdout
    folder = tmp_path / "runs" / "demo"
    assert str(Path("runs/demo/report.html")) in run.stdout
    summary = json.loads((folder / "summary.json").read_text())
    rows = {row["method"]: row for row in summary["rows"]}
    assert set(rows) == {"lora-mini", "lora"}
    for name, row in rows.items():
        assert row["valid_loss_after"] < row["valid_loss_before"] - 0.1
        files = [p for d in folder.glob(f"{name}_*") for p in (d / "adapter").iterdir()]
        assert row["adapter_bytes"] == sum(path.stat().st_size for path in files)
    assert rows["lora-mini"]["trainable"] * 10 < rows["lora"]["trainable"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 3e9, f"peak memory {peak / 1e9:.2f} GB"
