"""What a checkpoint of a row takes: what is trained and the optimiser's state, as users save it."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rivals import TorchRow
from lora_mini_jax import TrainState
from lora_mini_jax.checkpoint import Checkpoints


def saving(row: Any) -> dict[str, float]:
    """Bytes on disk, and milliseconds that training would stand still; the floor trains nothing."""
    if not row.facts["trainable"]:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        blocked = (_torch if isinstance(row, TorchRow) else _jax)(row, Path(folder))
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {"checkpoint_bytes": sum(path.stat().st_size for path in files), "save_ms": blocked}


def _jax(row: Any, folder: Path) -> float:
    """Ours for our state, else Orbax as it is; both write while training goes on."""
    if isinstance(row.state, TrainState):
        with Checkpoints(folder) as checkpoints:
            return _timed(partial(checkpoints.save, row.state))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return _timed(partial(checkpointer.save, folder / "state", row.state))


def _torch(row: TorchRow, folder: Path) -> float:
    """One file, as transformers' Trainer writes its optimiser; training waits for it."""
    import torch

    weights = {name: p for name, p in row.model.named_parameters() if p.requires_grad}
    state = weights, row.optimiser.state_dict()
    return _timed(partial(torch.save, state, folder / "state.pt"))


def _timed(save: Callable[[], Any]) -> float:
    started = time.perf_counter()
    save()
    return 1e3 * (time.perf_counter() - started)
