"""A row of the benchmark: one compiled training step, what is known of it, and its times."""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import optax

from lora_mini_jax.errors import UserError
from lora_mini_jax.forecast.flops import step_flops

Thing = TypeVar("Thing")

COLUMNS: dict[str, tuple[str, float, str]] = {
    "step_ms": ("step ms", 1, ".1f"), "step_ms_q1": ("q1", 1, ".1f"),
    "step_ms_q3": ("q3", 1, ".1f"), "tokens_per_s": ("tokens/s", 1, ",.0f"),
    "floor_ratio": ("x floor", 1, ".2f"), "floor_ratio_q1": ("q1", 1, ".2f"),
    "floor_ratio_q3": ("q3", 1, ".2f"), "dot_gflop": ("dot GFLOP", 1, ".2f"),
    "temp_bytes": ("temp MB", 1e-6, ".1f"), "peak_bytes": ("peak MB", 1e-6, ".1f"),
    "trainable": ("trained", 1, ",.0f"),
    "optimiser_bytes": ("optimiser MB", 1e-6, ".2f"), "compile_s": ("compile s", 1, ".1f"),
    "checkpoint_bytes": ("checkpoint MB", 1e-6, ".2f"), "save_ms": ("save ms", 1, ".0f"),
    "page_faults": ("page faults", 1, ",.0f"),
}  # fmt: skip
"""The printed columns: ``{key: (heading, factor, format)}``; what a row does not know is blank."""
QUARTILES = 0.25, 0.5, 0.75


@dataclass(frozen=True)
class Options:
    """The model, the batch and the adapters' sizes; ``--quick`` lowers the defaults."""

    quick: bool = False
    json: Path | None = None
    """Where to write the rows; its folder is made."""
    layers: int = 2
    width: int = 1024
    """Of the activations; heads are 64 wide."""
    ff: int = 0
    """Of the MLPs; four times the width by default."""
    vocab: int = 4096
    length: int = 512
    batch: int = 2
    shapes: tuple[str, ...] = ()
    """More than one shape, each a width, a length and a batch: 1024x512x8 2048x2048x1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation and the frozen weights; what is trained stays float32."""
    rounds: int = 20
    rank: int = 8
    inner: int = 64
    """LoRA-Mini's a and b."""
    methods: tuple[str, ...] = ("miss:rank=64", "dora:rank=8", "switchlora:rank=8")
    """Rows beside LoRA-Mini, LoRA, merged and full, each a method and its settings."""
    rivals: bool = False
    """More rows: LoRA by qwix on the same model; LoRA, MiSS and full fine-tuning by PEFT and
    PyTorch on the same weights."""

    def each(self) -> list["Options"]:
        """One for every shape."""
        found = []
        for shape in self.shapes or (f"{self.width}x{self.length}x{self.batch}",):
            if not re.fullmatch(r"\d+x\d+x\d+", shape):
                raise UserError(f"shape {shape!r}: give a width, a length and a batch, 1024x512x2")
            width, length, batch = map(int, shape.split("x"))
            found.append(replace(self, width=width, length=length, batch=batch, shapes=()))
        return found


@dataclass
class Row:
    """One way to train, compiled: ``program(state, params, tokens) -> (state, out)``."""

    name: str
    program: Any
    state: Any
    facts: dict[str, Any]
    times: list[float] = field(default_factory=list)
    """Milliseconds, one a round."""

    def step(self, params: Any, tokens: jax.Array) -> None:
        """Take one step, and note the time until the last of its results is there."""
        started = time.perf_counter()
        self.state, out = self.program(self.state, params, tokens)
        jax.block_until_ready((self.state, out))
        self.times.append(1e3 * (time.perf_counter() - started))


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def compiled(name: str, step: Any, args: tuple, trained: Any = (), moments: Any = ()) -> Row:
    """The row of a jitted step: compiled ahead, with what can be known before it runs."""
    started = time.perf_counter()
    traced = step.trace(*args)
    program = traced.lower().compile()
    seconds = time.perf_counter() - started
    memory: Any = program.memory_analysis()
    outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
    facts = {
        "dot_gflop": step_flops(step, traced, *args) / 1e9,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.temp_size_in_bytes + outside - memory.alias_size_in_bytes,
        "trained_in": kinds(trained),
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "optimiser_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(moments)),
        "compile_s": seconds,
    }
    return Row(name, program, args[0], facts)


def failure(error: Exception) -> str:
    """An error in a line."""
    reason = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {reason[0][:200]}"


def kinds(tree: Any) -> str:
    """The dtypes of the leaves."""
    return " ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)}))


def summary(row: Any, floor_times: Sequence[float], tokens: int) -> dict[str, Any]:
    """Medians and quartiles, of ``tokens`` in a step; the ratio is taken round by round, where the
    noise was the same."""
    found = {"name": row.name}
    measured = {"step_ms": row.times, "floor_ratio": np.divide(row.times, floor_times)}
    for key, values in measured.items():
        found[f"{key}_q1"], found[key], found[f"{key}_q3"] = np.quantile(values, QUARTILES).tolist()
    return {**found, "tokens_per_s": 1e3 * tokens / found["step_ms"], **row.facts}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([c.rjust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line) for line in padded)


def in_turn(things: Iterable[Thing], turn: int) -> list[Thing]:
    """The things in another order each turn, so that no one always finds the cache that the same
    other left."""
    listed = list(things)
    return Random(turn).sample(listed, len(listed))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head, *lines = (f"| {' | '.join(line)} |" for line in _cells(rows))
    return "\n".join([head, "|---" * (len(COLUMNS) + 1) + "|", *lines]) + "\n"


def _cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    lines = [["", *(heading for heading, _, _ in COLUMNS.values())]]
    for row in (row for row in rows if "error" not in row):
        cells = (
            f"{row[key] * factor:{style}}" if key in row else ""
            for key, (_, factor, style) in COLUMNS.items()
        )
        lines.append([row["name"], *cells])
    return lines
