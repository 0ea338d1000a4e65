"""What saving a checkpoint costs: how long training waits for it, and how long until it is there.

    python -m benchmarks.checkpoint [--json PATH]

LoRA-Mini and LoRA train the Llama of `benchmarks.step`, and full fine-tuning a smaller one, whose
checkpoints are the largest. For each: a step's time, the time that ``save`` blocks, the time until
the checkpoint is complete where nothing else runs, a step's time while one is written, and the
bytes on the disk. Five minutes on two quiet cores, and 6 GB of memory.
"""

import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint
import tyro

import lora_mini_jax as lmj
from benchmarks.llama import drawn
from benchmarks.row import Options as Size
from benchmarks.row import loss
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.files import write_json
from lora_mini_jax.methods import from_spec

LARGE, SMALL = Size(), Size(layers=4, width=512, length=256)
ROWS = {"lora-mini:rank=8,a=64,b=64": LARGE, "lora:rank=8": LARGE, "full": SMALL}
"""The size of the model for each method."""


@dataclass(frozen=True)
class Options:
    """How often, and where the numbers go."""

    rounds: int = 5
    """Saves of each sort."""
    layers: int | None = None
    """For a quick look: of every model."""
    json: Path | None = None


def main(options: Options) -> None:
    """Measure, print, write."""
    rows = []
    for spec, size in ROWS.items():
        size = replace(size, layers=options.layers or size.layers)
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"method": spec, **measure(spec, size, options.rounds, Path(folder))})
        print(rows[-1], flush=True)
    if options.json:
        modules = (lmj, jax, optax, orbax.checkpoint)
        versions = {module.__name__: module.__version__ for module in modules}
        versions["python"] = platform.python_version()
        device = jax.devices()[0].device_kind
        write_json(options.json, {"rows": rows, "rounds": options.rounds, "device": device,
                                  "versions": versions})  # fmt: skip


def measure(spec: str, size: Size, rounds: int, folder: Path) -> dict[str, Any]:
    """Medians of a method, in milliseconds."""
    step, state = training(spec, size)
    state = step(state)  # the first compiles
    times: dict[str, list[float]] = {
        name: [] for name in ("step_ms", "save_blocks_ms", "committed_ms", "step_while_saving_ms")
    }

    def timed(name: str, run: Callable[[Any], Any], state: Any) -> Any:
        began = time.perf_counter()
        result = run(state)
        times[name].append(1e3 * (time.perf_counter() - began))
        return result

    with Checkpoints(folder) as checkpoints:
        for turn in range(rounds + 1):
            state = timed("step_ms", step, state)
            began = time.perf_counter()
            timed("save_blocks_ms", checkpoints.save, state)
            checkpoints.wait()
            times["committed_ms"].append(1e3 * (time.perf_counter() - began))
            state = step(state)
            timed("save_blocks_ms", checkpoints.save, state)
            state = timed("step_while_saving_ms", step, state)
            checkpoints.wait()
            if turn == 0:  # the first of all finds nothing prepared
                for values in times.values():
                    values.clear()
    files = [path for path in (folder / str(checkpoints.latest())).rglob("*") if path.is_file()]
    found = {name: round(float(np.median(values)), 2) for name, values in times.items()}
    return {
        **found,
        "save_blocks_ms_most": round(max(times["save_blocks_ms"]), 2),
        "save_blocks_steps": round(found["save_blocks_ms"] / found["step_ms"], 5),
        "bytes_on_disk": sum(path.stat().st_size for path in files),
        "bytes_of_state": sum(leaf.nbytes for leaf in jax.tree.leaves(state.adapter.trainable))
        + sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "leaves": len(jax.tree.leaves((state.adapter.trainable, state.opt_state))),
        "model": {name: value for name, value in asdict(size).items()
                  if name in ("layers", "width", "ff", "vocab", "length", "batch", "dtype")},
    }  # fmt: skip


def training(spec: str, size: Size) -> tuple[Callable[[Any], Any], lmj.TrainState]:
    """A step that waits for its result, and the state it starts with."""
    (model, params, tokens), tx = drawn(size), optax.adam(1e-4)
    targets, apply = lmj.linen.targets(model, params, tokens[:, :-1]), lmj.linen.adapt(model)

    def loss_fn(params: Any, adapter: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        return loss(apply(params, adapter, tokens[:, :-1]), tokens)

    update = lmj.make_train_step(loss_fn, tx)
    adapter = lmj.init(params, from_spec(spec), lmj.select(targets))

    def step(state: lmj.TrainState) -> lmj.TrainState:
        return jax.block_until_ready(update(state, params, tokens)[0])

    return step, lmj.TrainState.create(adapter, tx)


if __name__ == "__main__":
    main(tyro.cli(Options))
