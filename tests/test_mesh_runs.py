"""Whole runs on several devices, and in several processes, end as those on one do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_mini_jax import UserError
from lora_mini_jax.options import to_json
from lora_mini_jax.runs.finetune import finetune
from tests.conftest import CHEAPLY
from tests.runs import options, stopped_at

HEARTBEAT_SECONDS = 10
PROGRAM = f"""
import signal
from lora_mini_jax import cli, processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has not
processes.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}  # sooner than a user would want it
cli.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def given(place: Path, name: str, **changes: Any) -> Any:
    settings = ("rank=2", "a=8", "b=8", "outer_init=gradient")
    return options(place, output_dir=str(place / name), batch_size=8, settings=settings,
                   save_every=2, eval_every=3, log_every=1, **changes)  # fmt: skip


def leaves(place: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(place / name / "adapter" / "adapter.safetensors")


def same(place: Path, name: str, other: str) -> None:
    """The trained leaves and the metrics of two runs agree, but for rounding."""
    a, b = leaves(place, name), leaves(place, other)
    assert a.keys() == b.keys()
    for leaf in (leaf for leaf in a if leaf.startswith("trainable")):
        np.testing.assert_allclose(a[leaf], b[leaf], atol=2e-4, err_msg=leaf)

    def rows(name: str) -> list[dict[str, float]]:
        lines = (place / name / "metrics.jsonl").read_text().splitlines()
        # A run that is taken up says anew how much memory its step needs.
        return [row for row in map(json.loads, lines) if "step_bytes" not in row]

    for x, y in zip(rows(name), rows(other), strict=True):
        assert x["step"] == y["step"]
        for key in {"loss", "grad_norm", "valid_loss", "valid_right"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-3), (x["step"], key)


@pytest.fixture(scope="module")
def alone(place):
    finetune(given(place, "alone"), say=lambda line: None)
    return place


def test_a_run_on_a_mesh_that_is_stopped_goes_on_on_another(alone):
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        finetune(given(alone, "meshed", mesh="data=2,fsdp=2,tensor=2"), say=lambda line: None)
    finetune(given(alone, "meshed", mesh="fsdp=4,data=2", remat="full"), say=lambda line: None)
    same(alone, "meshed", "alone")


def test_accumulated_batches_train_the_same(alone):
    finetune(given(alone, "parts", accumulate=4), say=lambda line: None)
    same(alone, "parts", "alone")


def test_a_quantised_base_trains(alone):
    summary = finetune(given(alone, "nf4", quantize="nf4", remat="full"), say=lambda line: None)
    assert summary["valid_loss_after"] < summary["valid_loss_before"]
    before = json.loads((alone / "alone" / "summary.json").read_text())["valid_loss_before"]
    assert 0 < abs(summary["valid_loss_before"] - before) < 0.3


def test_a_quantised_base_trains_the_same_on_a_mesh(alone):
    how: dict[str, Any] = {"quantize": "nf4", "remat": "full", "scan_layers": True}
    for name, mesh in (("one", ""), ("split", "data=2,fsdp=2,tensor=2")):
        finetune(given(alone, name, **how, mesh=mesh), say=lambda line: None)
    same(alone, "split", "one")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": "data=3"}, "number of devices, 8"),
        ({"mesh": "data=8", "accumulate": 2}, "multiple of 8"),
        ({"accumulate": 3}, "--accumulate 3 does not divide --batch-size 8"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_is_written(alone, changes, words):
    with pytest.raises(UserError, match=words):
        finetune(given(alone, "never", **changes), say=lambda line: None)
    assert not (alone / "never").exists()


def started(
    place: Path, name: str, count: int, devices: int, first: tuple[str, ...] = (), **changes: Any
) -> list[Any]:
    """``lora-mini finetune`` in ``count`` processes of so many devices each; ``first`` are options
    of process 0 alone."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    config = place / f"{name}.json"
    config.write_text(json.dumps(to_json(given(place, name, **changes))))
    command = [sys.executable, "-c", PROGRAM, "finetune", "--config", str(config),
               "--coordinator", address, "--processes", str(count)]  # fmt: skip
    flags = f"{CHEAPLY} --xla_force_host_platform_device_count={devices}"
    return [
        subprocess.Popen(
            [*command, "--process", str(i), *(() if i else first)],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


@pytest.mark.slow
def test_processes_train_as_one_and_those_left_by_another_end_and_go_on(alone):
    # Killed in the middle, the other says so and ends; started again in another number, they go on.
    first, second = started(alone, "several", 2, 2, mesh="data=2,fsdp=2")
    checkpoints = alone / "several" / "checkpoints"
    while not (checkpoints / "2").exists():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    second.kill()
    _, error = first.communicate(timeout=6 * HEARTBEAT_SECONDS)
    # An exchange that fails ends it at once, in our words; where it waits for another, JAX ends it
    # when the heartbeats have stopped for too long, in its own.
    assert first.returncode in (75, -signal.SIGABRT), error
    assert "lost the others" in error or "another task died" in error
    assert "Traceback" not in error
    again = started(alone, "several", 4, 1, mesh="data=4")
    said = [process.communicate(timeout=300) for process in again]
    assert [process.returncode for process in again] == [0] * 4, said[0][1]
    assert "going on from step" in said[0][0]
    assert not any("going on" in out or "adapter" in out for out, _ in said[1:])
    same(alone, "several", "alone")


@pytest.mark.slow
def test_an_interruption_of_one_ends_them_all(alone):
    name = "stopped"
    processes = started(alone, name, 2, 1, mesh="data=2", epochs=1000.0, max_steps=None)
    while not (alone / name / "checkpoints" / "2").exists():
        assert processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=6 * HEARTBEAT_SECONDS)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes[0] == 130, errors
    assert codes[1] in (75, -signal.SIGABRT), errors
    assert "process 0 of 2 stopped: start all of them again" in errors[0]
    assert "Traceback" not in "".join(errors)


def test_a_mistake_of_one_process_ends_them_all(alone):
    first, second = started(
        alone, "apart", 2, 1, mesh="data=2", first=("--data", "elsewhere.jsonl")
    )
    said, error = first.communicate(timeout=6 * HEARTBEAT_SECONDS)
    assert first.returncode == 2, (said, error)
    assert "elsewhere.jsonl" in error
    assert error.count("\n") == 1
    second.communicate(timeout=6 * HEARTBEAT_SECONDS)
    assert second.returncode in (75, -signal.SIGABRT)


@pytest.mark.slow
def test_when_one_process_is_asked_to_end_all_save_the_same_step(alone):
    both = started(alone, "asked", 2, 1, mesh="data=2")
    while not (alone / "asked" / "metrics.jsonl").exists():
        assert both[0].poll() is None, both[0].communicate()[1]
        time.sleep(0.05)
    both[1].terminate()
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [143] * 2, said
    assert "asked to end: step" in said[0][0]
    again = started(alone, "asked", 1, 2, mesh="data=2")
    assert "going on from step" in again[0].communicate(timeout=120)[0]
    same(alone, "asked", "alone")
