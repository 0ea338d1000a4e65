"""What it saves, and costs, to keep LoRA-Mini's frozen factors in bfloat16 or not at all.

    python -m benchmarks.outer

Every row trains the same random Llama, four scanned layers of width 512, on the same tokens in one
process. Each round takes one step of every row; a row's time is over that, in the same round, of
the row that keeps the same factors in float32. Bytes are those of `footprint`. Writes
``results/outer_cpu.json``; a few minutes on one core.
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.llama import drawn, llama
from benchmarks.row import Options, in_turn
from lora_mini_jax import LoRAMini, TrainState, linen, make_train_step, select, sharding
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.adapters.sites import plan_sites
from lora_mini_jax.files import write_json
from lora_mini_jax.forecast.footprint import footprint

HERE = Path(__file__).parent
SIZE, ROUNDS = Options(layers=4, width=512, ff=1408, length=256), 21
KINDS = [("float32", "fan_in"), ("bfloat16", "fan_in"), ("recompute", "fan_in"),
         ("float32", "orthogonal"), ("recompute", "orthogonal")]  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    """Every way of keeping the factors, and the file."""
    (_, params, tokens), rows, turns = drawn(SIZE, scan_layers=True), [], []
    tokens = tokens[:, :-1]
    for outer, outer_init in KINDS:
        method: Any = LoRAMini(rank=8, a=64, b=64, outer_init=outer_init, outer=outer)  # ty: ignore[invalid-argument-type]
        rows.append({"outer": outer, "outer_init": outer_init})
        for dtype in ("float32", "bfloat16"):
            rows[-1][f"bytes_{dtype}"] = taken(method, dtype, tokens)
        turns.append(turn(method, params, tokens))
    times = [{i: turns[i]() for i in in_turn(range(len(turns)), n)} for n in range(ROUNDS)]
    for i, row in enumerate(rows):
        kept = KINDS.index(("float32", row["outer_init"]))
        row["step_ms"] = round(1e3 * median(each[i] for each in times), 1)
        row["step_ratio"] = round(median(each[i] / each[kept] for each in times), 3)
        print(row)
    about = {"layers": SIZE.layers, "width": SIZE.width, "rows": SIZE.batch, "length": SIZE.length,
             "rank": 8, "a": 64, "b": 64}  # fmt: skip
    write_json(HERE / "results" / "outer_cpu.json", {**about, "rounds": ROUNDS, "results": rows})


def parts(method: Any, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """The model, all its kernels, the sites and the loss."""
    model = llama(replace(SIZE, dtype=dtype), scan_layers=True)
    apply, tokens = linen.adapt(model), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    kernels = linen.targets(model, shapes, tokens)

    def loss(params: Any, adapter: Any, batch: Any, key: Any) -> Any:
        return apply(params, adapter, batch, labels=jnp.roll(batch, -1, 1)).losses.mean()

    return shapes, kernels, plan_sites(method, select(kernels, "all-linear")), loss


def taken(method: Any, dtype: Any, tokens: jax.Array) -> Row:
    """Bytes of a step on one device."""
    shapes, kernels, sites, loss = parts(method, dtype)
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)
    found = footprint(loss, optax.adamw(1e-3), sites, kernels, shapes, batch, mesh)
    return {"adapter": found.adapter, "temporaries": found.temporaries, "total": found.total}


def turn(method: Any, params: Any, tokens: jax.Array) -> Any:
    """What takes a step and says how many seconds it took."""
    _, _, sites, loss = parts(method, "float32")
    tx = optax.adamw(1e-3)
    state = TrainState.create(draw(params, sites, 0), tx)
    step = make_train_step(loss, tx).lower(state, params, tokens).compile()

    def one() -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = step(state, params, tokens)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    one()
    return one


if __name__ == "__main__":
    main()
