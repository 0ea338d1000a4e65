"""What one training step costs, by method: time, memory and arithmetic, next to a floor.

    python -m benchmarks.step [--quick] [--rivals] [--shapes 1024x512x2 2048x2048x1] [--json PATH]

Every row trains the same random Llama on the same tokens, in one process. Each round takes one step
of every row, so that noise from elsewhere hits all alike; trust ``floor_ratio`` (a row's time over
the floor's in the same round) before milliseconds. ``--quick`` takes under a minute on two cores;
the default, two layers of width 1024, some minutes. With ``--json`` the tables in Markdown and a
picture are written beside it, all anew after every shape. On a Hopper GPU LoRA-Mini and LoRA have a
second row, by joint products. A row that there is no memory for, or a
rival that fails, is named with its error, and the others go on.
"""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from tqdm import tqdm

import lora_mini_jax as lmj
from benchmarks.llama import drawn
from benchmarks.machine import about, device, page_faults
from benchmarks.picture import picture
from benchmarks.rivals import Make, rivals
from benchmarks.row import Options, Row, compiled, failure, in_turn, loss, markdown, summary, table
from benchmarks.saving import saving
from lora_mini_jax import hardware
from lora_mini_jax.files import write_json, write_text
from lora_mini_jax.methods import from_spec

FIRST = tuple(("layers_0", "self_attn", name) for name in ("q_proj", "k_proj", "v_proj"))
QUICK = Options(quick=True, width=256, vocab=1024, length=128, rounds=5)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, write the JSON and the picture."""
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, default=QUICK if "--quick" in argv else Options())
    for spec in options.methods:
        from_spec(spec)
    shapes = options.each()
    if options.json:  # before the work, so that a bad path costs nothing
        options.json.parent.mkdir(parents=True, exist_ok=True)
    if options.rivals:  # JAX would take three quarters of a GPU, and PyTorch is to have its share
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(f"{device()}, jax {jax.__version__}, {options.dtype}, medians of {options.rounds} rounds")
    command = shlex.join(["python", "-m", "benchmarks.step", *argv])
    record = {"rows": [], "config": asdict(replace(options, json=None)), **about(),
              "command": command}  # fmt: skip
    tables = []
    for shape in shapes:
        rows = measure(shape)
        where = {"width": shape.width, "length": shape.length, "batch": shape.batch}
        record["rows"] += [{**where, **row} for row in rows]
        heading = f"width {shape.width}, {shape.batch} x {shape.length} tokens"
        print(f"\n{heading}\n{table(rows)}")
        tables += [f"{heading}\n\n{markdown(rows)}"]
        for row in (row for row in rows if "error" in row):
            print(f"{row['name']}: {row['error']}")
        if options.json:
            write_json(options.json, record)
            write_text(options.json.with_suffix(".md"), "\n".join(tables))
            write_text(options.json.with_suffix(".svg"), picture(record["rows"]))
        jax.clear_caches()


def measure(options: Options) -> list[dict[str, Any]]:
    """All rows: compiled and warmed up one after the other, then timed in turns."""
    model, params, tokens = drawn(options)
    given = options, model, params, tokens
    ours, others = build(*given), rivals(*given) if options.rivals else {}
    rows, failed = [], []
    for name, make in tqdm({**ours, **others}.items(), "compile", unit="row"):
        try:
            row = make()
            row.step(params, tokens)
            row.times.clear()
            row.facts |= saving(row)
            rows.append(row)
        except Exception as error:
            if name in ours and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failed.append({"name": name, "error": failure(error)})
    faults: dict[str, list[int]] = {row.name: [] for row in rows}
    for turn in tqdm(range(options.rounds), "measure", unit="round"):
        for row in in_turn(rows, turn):
            before = page_faults()
            row.step(params, tokens)
            faults[row.name].append(page_faults() - before)
    for row in rows:
        row.facts["page_faults"] = int(median(faults[row.name]))
    tokens_a_step = options.batch * options.length
    return [summary(row, rows[0].times, tokens_a_step) for row in rows] + failed


def build(options: Options, model: Any, params: Any, tokens: jax.Array) -> dict[str, Make]:
    """What makes each of our rows, by name; the floor first."""
    tx, targets = optax.adam(1e-4), lmj.linen.targets(model, params, tokens[:, :-1])
    targets, adapt = lmj.select(targets), lmj.linen.adapt(model)
    mini = lmj.LoRAMini(options.rank, a=options.inner, b=options.inner, outer=options.dtype)

    def adapted(name: str, method: lmj.Method, apply: Callable = adapt) -> Row:
        def loss_fn(params: Any, adapter: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
            return loss(apply(params, adapter, tokens[:, :-1]), tokens)

        state = lmj.TrainState.create(lmj.init(params, method, targets), tx)
        step, trained = lmj.make_train_step(loss_fn, tx), state.adapter.trainable
        return compiled(name, step, (state, params, tokens), trained, state.opt_state)

    def merged(params: Any, adapter: lmj.Adapter, tokens: jax.Array) -> Any:
        return model.apply({"params": lmj.merge(params, adapter)}, tokens)

    methods: dict[str, lmj.Method] = {"lora-mini": mini, "lora": lmj.LoRA(options.rank)}
    methods |= {spec: from_spec(spec) for spec in options.methods}
    found: dict[str, Make] = {n: partial(adapted, n, method) for n, method in methods.items()}
    if hardware.capability() == 9.0:
        for name in ("lora-mini", "lora"):
            again = partial(adapted, f"{name} joint", methods[name])
            found[f"{name} joint"] = partial(joined, again)
    return {
        "frozen floor": partial(floor, options, model, params, tokens),
        **found,
        "lora-mini merged": partial(adapted, "lora-mini merged", mini, merged),
        "full": partial(full, tx, model, params, tokens),
    }


def joined(make: Make) -> Any:
    """A row that multiplies by every kernel and its adapter in one product."""
    with mock.patch.dict(os.environ, {hardware.JOINT: "1"}):
        return make()


def floor(options: Options, model: Any, params: Any, tokens: jax.Array) -> Row:
    """Forward, and backward through the activations alone: what any adapter must pay.

    The gradient is taken in zeros added to the outputs of the first layer's query, key and value.
    To reach all three it passes back through every later frozen kernel (one product each) and
    every attention (four), and stops where the first adapters sit. No kernel is differentiated, so
    no weight gradient is formed. The zeros are whole activations: the gradient in a bias or a
    scalar is a sum, which XLA could fold into the product before it.
    """

    def loss_of(zeros: Any, params: Any, tokens: jax.Array) -> jax.Array:
        def nudge(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            y, path = call(*args, **kwargs), context.module.path
            return y + zeros[path[-1]] if path in FIRST else y

        with nn.intercept_methods(nudge):
            return loss(model.apply({"params": params}, tokens[:, :-1]), tokens)

    def step(zeros: Any, params: Any, tokens: jax.Array) -> tuple[Any, Any]:
        return zeros, jax.value_and_grad(loss_of)(zeros, params, tokens)

    shape = (options.batch, options.length, options.width)
    zeros = {path[-1]: jnp.zeros(shape, options.dtype) for path in FIRST}
    return compiled("frozen floor", jax.jit(step), (zeros, params, tokens))


def full(tx: Any, model: Any, params: Any, tokens: jax.Array) -> Row:
    """Full fine-tuning; weights and moments are donated, so updated in place."""

    def loss_of(weights: Any, tokens: jax.Array) -> jax.Array:
        return loss(model.apply({"params": weights}, tokens[:, :-1]), tokens)

    def step(state: Any, _: Any, tokens: jax.Array) -> tuple[Any, Any]:
        weights, moments = state
        value, grads = jax.value_and_grad(loss_of)(weights, tokens)
        updates, moments = tx.update(grads, moments, weights)
        return (optax.apply_updates(weights, updates), moments), value

    weights = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)  # a copy: donated
    state = (weights, tx.init(weights))
    return compiled("full", jax.jit(step, donate_argnums=0), (state, params, tokens), *state)


if __name__ == "__main__":
    main()
