"""Saving while training goes on: what is saved, when it is there, and what a bad disk does."""

import errno
import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from lora_mini_jax import LoRA, LoRAMini, TrainState, UserError, init
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.tree import Target

TX = optax.adam(1e-2)


def fresh(n_in: int = 6) -> TrainState:
    target = Target("dense/kernel", (n_in, 4))
    params = {"dense": {"kernel": np.ones(target.shape, np.float32)}}
    return TrainState.create(init(params, LoRA(rank=2), [target]), TX)


@partial(jax.jit, donate_argnums=0)
def plus_one(state: Any) -> Any:
    """A step of training: it takes the buffers of the state that it is given."""
    more = jax.tree.map(lambda leaf: leaf + 1, state)
    return replace(more, adapter=replace(more.adapter, key=state.adapter.key))


class Gate:
    """Writing that waits until it is let through."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.open, self._save = threading.Event(), checkpoints._manager.save
        checkpoints._manager.save = self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        assert self.open.wait(60)
        self._save(*args, **kwargs)


def held(state: Any) -> list[np.ndarray]:
    """What a checkpoint holds, copied."""
    trained = state.step, state.key, state.adapter.trainable, state.opt_state
    return [np.array(leaf) for leaf in jax.tree.leaves(trained)]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def on_disk(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_training_goes_on_while_a_state_is_written(tmp_path):
    state = plus_one(fresh())
    with Checkpoints(tmp_path) as checkpoints:
        gate, then = Gate(checkpoints), held(state)
        checkpoints.save(state)
        state = plus_one(plus_one(state))
        assert on_disk(tmp_path) == set()
        assert checkpoints.latest() is None
        gate.open.set()
        same(held(checkpoints.restore(fresh())), then)  # which waits for what is being written
        checkpoints.save(state)
    assert on_disk(tmp_path) == {"1", "3"}
    with Checkpoints(tmp_path) as checkpoints:
        same(held(checkpoints.restore(fresh())), held(state))


def test_leaves_that_kernels_share_are_saved_with_their_owner(tmp_path):
    method = LoRAMini(rank=1, a=2, b=2, outer_init="gradient")
    own, other = (Site(Target(f"{n}/kernel", (6, 4)), method) for n in ("q", "v"))
    params = {name: {"kernel": np.ones((6, 4), np.float32)} for name in ("q", "v")}
    adapter = draw(params, (own, replace(other, owner="q/kernel")), 0)
    made = replace(adapter, frozen=jax.tree.map(lambda leaf: leaf + 1, adapter.frozen))
    state = TrainState.create(made, TX)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(plus_one(state))
        found: Any = checkpoints.restore(TrainState.create(made, TX))
    assert all((leaf == 2).all() for leaf in jax.tree.leaves(found.adapter.frozen))


KERNEL = Target("dense/kernel", (6, 4))
PARAMS = {"dense": {"kernel": np.ones(KERNEL.shape, np.float32)}}
LORA = LoRA(rank=2)
OTHERS = {
    "another key": (init(PARAMS, LORA, [KERNEL], key=1), TX, r"the key is \[0, 0\], not \[0, 1\]"),
    "another scale": (
        init(PARAMS, LoRA(rank=2, alpha=1.0), [KERNEL]),
        TX,
        "the methods are .*'alpha': 16.0.* not .*'alpha': 1.0",
    ),
    "another rank": (init(PARAMS, LoRA(rank=1), [KERNEL]), TX, "the methods are .*'rank': 2"),
    "another optimiser": (init(PARAMS, LORA, [KERNEL]), optax.sgd(1.0), "the optimiser"),
    "other kernels": (
        init({"a": PARAMS["dense"]}, LORA, [replace(KERNEL, path="a/kernel")]),
        TX,
        "other kernels are adapted",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_is_of_one_run(tmp_path, case, capfd):
    adapter, tx, said = OTHERS[case]
    other = TrainState.create(adapter, tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(plus_one(fresh()))
    for use in (Checkpoints.restore, Checkpoints.save):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(UserError, match=f"is of another run: .*{said}.* or another folder"),
        ):
            use(checkpoints, other)
    with Checkpoints(tmp_path) as checkpoints:
        same(held(checkpoints.restore(fresh())), held(plus_one(fresh())))
    assert on_disk(tmp_path) == {"1"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("keep", "kept"), [({}, {"2", "3"}), ({"keep": 1}, {"3"})])
def test_only_the_newest_are_kept(tmp_path, keep, kept):
    state = fresh()
    with Checkpoints(tmp_path, **keep) as checkpoints:
        for _ in range(3):
            state = plus_one(state)
            checkpoints.save(state)
    assert on_disk(tmp_path) == kept


def test_at_most_one_save_is_under_way(tmp_path):
    states = [plus_one(fresh()), plus_one(plus_one(fresh()))]
    with Checkpoints(tmp_path) as checkpoints:
        gate = Gate(checkpoints)
        checkpoints.save(states[0])
        threading.Timer(0.3, gate.open.set).start()
        checkpoints.save(states[1])
        assert on_disk(tmp_path) >= {"1"}


@pytest.fixture
def uncaught(monkeypatch) -> list[Any]:
    """What threads left to Python to print."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    return found


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_at_the_next_save(tmp_path, uncaught, capfd):
    state = plus_one(fresh())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        checkpoints._manager.save = full
        checkpoints.save(plus_one(state))
        with pytest.raises(UserError, match=r"the disk is full: .* unchanged"):
            checkpoints.save(state)
    assert on_disk(tmp_path) == {"1"}
    assert uncaught == []
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_is_gone_is_one_line_at_the_end(tmp_path, uncaught, capfd):
    folder = tmp_path / "checkpoints"

    def train() -> None:
        with Checkpoints(folder) as checkpoints:
            folder.rmdir()
            folder.write_text("in the way")
            checkpoints.save(plus_one(fresh()))

    with pytest.raises(UserError, match=r"cannot write .*checkpoints"):
        train()
    assert uncaught == []
    assert capfd.readouterr() == ("", "")


REFUSED = """
import resource, signal
from tests.test_checkpoint import Checkpoints, fresh, plus_one
with Checkpoints("checkpoints") as checkpoints:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    checkpoints.save(plus_one(fresh(20000)))
    try:
        checkpoints.wait()
    except Exception as error:
        print(error)
"""


def test_an_address_is_no_folder():
    with pytest.raises(UserError, match="gs://bucket/run is an address: keep checkpoints in"):
        Checkpoints("gs://bucket/run")


def test_what_the_disk_refuses_is_printed_by_no_thread(tmp_path):
    """A real refusal, deep in the threads of Orbax and TensorStore: files may have 20 kB."""
    home = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True,
                         cwd=tmp_path, env={**os.environ, "PYTHONPATH": home})  # fmt: skip
    assert "File too large" in run.stdout
    assert run.stderr == ""
    assert not any(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())


def quiet() -> tuple[Any, ...]:
    """What decides on what Orbax and TensorStore print."""
    return logging.getLogger("absl").level, sys.unraisablehook


def test_what_the_process_prints_is_its_own_before_and_after(tmp_path):
    own = quiet()
    checkpoints = Checkpoints(tmp_path / "one")
    assert quiet() == own
    with checkpoints:
        during = quiet()
        assert during[0] == logging.CRITICAL
        assert during[1] is not own[1]
        with Checkpoints(tmp_path / "other"):
            pass
        assert quiet() == during
    assert quiet() == own
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "one", lambda checkpoints: None)
    assert quiet() == own


def interrupted(folder: Path, save: Any) -> None:
    """Training that is stopped while ``save(checkpoints)`` has begun something."""
    with Checkpoints(folder) as checkpoints:
        save(checkpoints)
        raise KeyboardInterrupt


def test_what_went_wrong_before_a_save_did_is_what_is_said(tmp_path):
    def save(checkpoints: Checkpoints) -> None:
        checkpoints._manager.save = full
        checkpoints.save(plus_one(fresh()))

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, save)


def test_an_interrupted_run_keeps_what_it_was_saving(tmp_path):
    def save(checkpoints: Checkpoints) -> None:
        gate = Gate(checkpoints)
        checkpoints.save(plus_one(fresh()))
        threading.Timer(0.3, gate.open.set).start()

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, save)
    assert on_disk(tmp_path) == {"1"}
