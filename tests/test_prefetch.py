"""What is made ahead: in order, no further than asked, with errors where they belong."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import lora_mini_jax.runs.meter as meter_module
from lora_mini_jax import UserError
from lora_mini_jax.data import Batches, Example, pack
from lora_mini_jax.data.prefetch import prefetched
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Meter, typical, waited
from lora_mini_jax.sharding import make_mesh
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.training.train import Metrics
from tests.runs import options


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def eventually(holds: Any) -> bool:
    until = time.monotonic() + 10
    while not holds() and time.monotonic() < until:
        time.sleep(0.001)
    return holds()


@pytest.mark.parametrize(("start", "stop", "ahead"), [(0, 7, 2), (3, 4, 2), (5, 5, 2), (2, 9, 1)])
def test_all_in_order(start: int, stop: int, ahead: int) -> None:
    with prefetched(lambda i: (i, threading.current_thread()), start, stop, ahead) as items:
        found = list(items)
    assert [i for i, _ in found] == list(range(start, stop))
    assert threading.current_thread() not in [thread for _, thread in found]
    assert alive() == []


def test_so_many_are_made_ahead_and_no_more() -> None:
    made: list[int] = []
    with prefetched(made.append, 0, 9, ahead=2) as items:
        next(items)
        assert eventually(lambda: made == [0, 1, 2])
        next(items)
        assert eventually(lambda: made == [0, 1, 2, 3])
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_where_its_item_is_asked_for(kind: type[BaseException]) -> None:
    def make(i: int) -> int:
        if i == 2:
            raise kind("at two")
        return i

    with prefetched(make, 0, 9) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(kind, match="at two"):
            next(items)
    assert alive() == []


def test_what_ends_the_block_ends_the_thread() -> None:
    made, slow = [], threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if i:
            slow.wait(0.5)
        return i

    with pytest.raises(RuntimeError, match="stop"), prefetched(make, 0, 99) as items:  # noqa: PT012
        next(items)
        raise RuntimeError("stop")
    assert alive() == []
    assert 2 not in made, "it was not begun, and is not wanted any more"


def test_a_run_reads_each_batch_once_and_says_how_long_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, batch = [], Batches.batch

    def slowly(self: Batches, step: int, *part: slice) -> Any:
        if self.shuffle:
            asked.append(step)
            time.sleep(0.3)
        return batch(self, step, *part)

    monkeypatch.setattr(Batches, "batch", slowly)
    # LoRA asks for no batch before the first step.
    given = options(
        tmp_path, method="lora", settings=("rank=2",), max_steps=4, log_every=1, samples=0
    )
    found = finetune(given, say=lambda line: None)
    assert asked == [0, 1, 2, 3]
    rows = [row for row in RunFolder(given).metrics.rows() if "data_wait_share" in row]
    assert len(rows) == 4
    assert 0.2 < found["data_wait_share"] <= 1


def test_the_share_is_of_the_time_in_steps() -> None:
    lines = [{"step": 0, "valid_loss": 1.0},
             {"step": 10, "step_seconds": 1.0, "data_wait_share": 0.0},
             {"step": 15, "step_seconds": 2.0, "data_wait_share": 0.5}]  # fmt: skip
    assert waited(lines) == 0.25
    assert waited(lines[:1]) is None


def test_what_is_typical_is_so_of_most_steps() -> None:
    steps = {30: 9.0, 51: 1.0, 52: 3.0, 53: 3.0}  # the first line is that of warming up
    lines = [{"step": 0, "valid_loss": 1.0}]
    lines += [{"step": step, "step_seconds": seconds} for step, seconds in steps.items()]
    assert typical(lines, "step_seconds") == 1.0
    assert typical(lines[:2], "step_seconds") == 9.0


def test_a_line_of_metrics_is_of_the_steps_and_the_seconds_since_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(meter_module, "time", clock)

    def passes(seconds: float) -> float:
        clock.now += seconds
        return clock.now

    def step(loss: float, norm: float) -> None:
        next(batches)  # after a second
        passes(3)
        meter.add(Metrics(jax.numpy.float32(loss), jax.numpy.float32(norm), None), np.int32(8))

    given = options(tmp_path, log_every=2)
    folder = RunFolder(given)
    folder.create()
    folder.metrics.log([{"step": 3, "seconds": 50.0}])
    memory = SimpleNamespace(argument_size_in_bytes=10, output_size_in_bytes=5,
                             alias_size_in_bytes=3, temp_size_in_bytes=2)  # fmt: skip
    compiled: Any = SimpleNamespace(memory_analysis=lambda: memory)
    with Meter(given, folder, 3, 9, lambda t: 10 * t) as meter:
        batches = meter.waits(iter(lambda: passes(1), None))
        next(batches)
        passes(20)
        meter.compiled(compiled)
        step(1, 5)
        passes(7)
        meter.evaluated({"valid_loss": 2.0})
        step(2, 6)
        step(4, 8)
        passes(9)
        meter.saved()
        step(3, 3)
        step(3, 3)
        step(3, 3)
        with pytest.raises(UserError, match=r"loss 3\.0 with gradient norm inf at step 10"):
            step(3, np.inf)
    same = {"tokens_per_second": 2.0, "step_seconds": 4.0, "data_wait_share": 0.25}
    assert folder.metrics.rows() == [
        {"step": 3, "seconds": 50.0},
        {"step": 3, "step_bytes": 14, "seconds": 71.0},
        {"step": 4, "loss": 1.0, "grad_norm": 5.0, **same, "learning_rate": 30.0, "seconds": 75.0},
        {"step": 4, "valid_loss": 2.0, "seconds": 82.0},
        {"step": 6, "loss": 3.0, "grad_norm": 7.0, **same, "learning_rate": 50.0, "seconds": 90.0},
        {"step": 8, "loss": 3.0, "grad_norm": 3.0, **same, "learning_rate": 70.0, "seconds": 107.0},
    ]


def test_each_process_reads_the_rows_of_its_own_devices_once() -> None:
    examples = [Example(np.full(3, i, np.int32), np.arange(3) > 0) for i in range(20)]
    batches, asked = Batches(pack(examples, 4), 8, seed=1), []

    class Noting(Batches):
        def batch(self, step: int, part: slice = slice(None)) -> Any:
            asked.append((part.start or 0, part.stop or 8))
            return super().batch(step, part)

    noting = Noting(batches.packed, 8, seed=1)
    placed = Devices(make_mesh("data=2,fsdp=2,tensor=2")).batch(noting, 2)
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for name, array in batches.batch(2).items():
        assert isinstance(placed[name], jax.Array)
        np.testing.assert_array_equal(np.asarray(placed[name]), array)
