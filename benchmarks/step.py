"""What one training step costs, by method: time, memory and arithmetic, next to a floor.

    python -m benchmarks.step [--quick] [--json PATH]

Every row trains the same random Llama on the same tokens, in one process. Each round takes one step
of every row, so that noise from elsewhere hits all alike; trust ``floor_ratio`` (a row's time over
the floor's in the same round) before milliseconds. ``--quick`` takes under a minute on two cores;
the default, eight layers of width 1024, a quarter of an hour or more there, and 6 GB of memory.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

import lora_mini_jax as lmj
from lora_mini_jax.files import write_json
from lora_mini_jax.flops import dot_flops
from lora_mini_jax.methods import from_spec

FIRST = tuple(("layers_0", "self_attn", name) for name in ("q_proj", "k_proj", "v_proj"))
COLUMNS: dict[str, tuple[str, float, str]] = {
    "step_ms": ("step ms", 1, ".1f"), "step_ms_q1": ("q1", 1, ".1f"),
    "step_ms_q3": ("q3", 1, ".1f"), "floor_ratio": ("x floor", 1, ".2f"),
    "dot_gflop": ("dot GFLOP", 1, ".2f"), "temp_bytes": ("temp MB", 1e-6, ".1f"),
    "trainable": ("trained", 1, ",.0f"), "optimiser_bytes": ("optimiser MB", 1e-6, ".2f"),
    "compile_s": ("compile s", 1, ".1f"),
}  # fmt: skip
"""The printed columns: ``{key: (heading, factor, format)}``."""


@dataclass(frozen=True)
class Options:
    """The model, the batch and the adapters' sizes; ``--quick`` lowers the defaults."""

    quick: bool = False
    json: Path | None = None
    """Where to write the rows; its folder is made."""
    layers: int = 8
    width: int = 1024
    """Of the activations; heads are 64 wide."""
    ff: int = 4096
    vocab: int = 4096
    length: int = 512
    batch: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation and the frozen weights; what is trained stays float32."""
    rounds: int = 20
    rank: int = 8
    inner: int = 64
    """LoRA-Mini's a and b."""
    methods: tuple[str, ...] = ()
    """More rows, each a method and its settings: miss:rank=64 lora:rank=36 dora."""


QUICK = Options(quick=True, layers=3, width=256, ff=1024, vocab=1024, length=128, rounds=5)


@dataclass
class Row:
    """One way to train, compiled: ``program(state, params, tokens) -> (state, out)``."""

    name: str
    program: Any
    state: Any
    facts: dict[str, float]
    times: list[float] = field(default_factory=list)
    """Milliseconds, one a round."""

    def step(self, params: Any, tokens: jax.Array) -> None:
        """Take one step, and note the time until the last of its results is there."""
        started = time.perf_counter()
        self.state, out = self.program(self.state, params, tokens)
        jax.block_until_ready((self.state, out))
        self.times.append(1e3 * (time.perf_counter() - started))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    options = tyro.cli(Options, args=argv, default=QUICK if "--quick" in argv else Options())
    for spec in options.methods:
        from_spec(spec)
    if options.json:  # before the work, so that a bad path costs nothing
        options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = measure(options)
    device, versions = jax.devices()[0].device_kind, {"python": platform.python_version()}
    versions |= {module.__name__: module.__version__ for module in (lmj, jax, flax, optax)}
    print(f"{device}, jax {jax.__version__}, {options.dtype}, medians of {options.rounds} rounds")
    print(table(rows))
    if options.json:
        config, command = asdict(replace(options, json=None)), ["python", "-m", "benchmarks.step"]
        record = {"rows": rows, "config": config, "device": device, "versions": versions}
        write_json(options.json, {**record, "command": shlex.join([*command, *argv])})


def measure(options: Options) -> list[dict[str, Any]]:
    """All rows: compiled and warmed up one after the other, then timed in turns."""
    config = lmj.models.LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.ff,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
    )
    model = lmj.models.Llama(config, dtype=options.dtype, param_dtype=options.dtype)
    shape = (options.batch, options.length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, options.vocab)
    params = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])["params"]
    rows = []
    total = 5 + len(options.methods)
    for row in tqdm(build(options, model, params, tokens), "compile", total=total, unit="row"):
        row.step(params, tokens)
        row.times.clear()
        rows.append(row)
    for turn in tqdm(range(options.rounds), "measure", unit="round"):
        # Another order each round, so that no row always finds the cache that the same one left.
        for row in Random(turn).sample(rows, len(rows)):
            row.step(params, tokens)
    return [summary(row, rows[0].times) for row in rows]


def build(options: Options, model: Any, params: Any, tokens: jax.Array) -> Iterator[Row]:
    """The rows, each compiled when its turn comes."""
    tx, targets = optax.adam(1e-4), lmj.linen.targets(model, params, tokens[:, :-1])
    targets, adapt = lmj.select(targets), lmj.linen.adapt(model)
    mini = lmj.LoRAMini(options.rank, a=options.inner, b=options.inner)

    def adapted(name: str, method: lmj.Method, apply: Callable) -> Row:
        def loss_fn(params: Any, adapter: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
            return loss(apply(params, adapter, tokens[:, :-1]), tokens)

        state = lmj.TrainState.create(lmj.init(params, method, targets), tx)
        step, trained = lmj.make_train_step(loss_fn, tx), state.adapter.trainable
        return compiled(name, step, (state, params, tokens), trained, state.opt_state)

    def merged(params: Any, adapter: lmj.Adapter, tokens: jax.Array) -> Any:
        return model.apply({"params": lmj.merge(params, adapter)}, tokens)

    yield floor(options, model, params, tokens)
    yield adapted("lora-mini", mini, adapt)
    yield adapted("lora", lmj.LoRA(options.rank), adapt)
    yield adapted("lora-mini merged", mini, merged)
    yield full(tx, model, params, tokens)
    for spec in options.methods:
        yield adapted(spec, from_spec(spec), adapt)


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


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def compiled(name: str, step: Any, args: tuple, trained: Any = (), moments: Any = ()) -> Row:
    """The row of a jitted step: compiled ahead, with what can be known before it runs."""
    started = time.perf_counter()
    traced = step.trace(*args)
    program = traced.lower().compile()
    facts = {
        "dot_gflop": dot_flops(traced.jaxpr) / 1e9,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "optimiser_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(moments)),
        "compile_s": time.perf_counter() - started,
    }
    return Row(name, program, args[0], facts)


def summary(row: Row, floor_times: Sequence[float]) -> dict[str, Any]:
    """Medians and quartiles; the ratio is taken round by round, where the noise was the same."""
    low, mid, high = np.quantile(row.times, (0.25, 0.5, 0.75)).tolist()
    ratio = float(np.median(np.divide(row.times, floor_times)))
    times = {"step_ms": mid, "step_ms_q1": low, "step_ms_q3": high, "floor_ratio": ratio}
    return {"name": row.name, **times, **row.facts}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = [["", *(heading for heading, _, _ in COLUMNS.values())]]
    for row in rows:
        cells = (f"{row[key] * factor:{style}}" for key, (_, factor, style) in COLUMNS.items())
        lines.append([row["name"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line) for line in padded)


if __name__ == "__main__":
    main()
