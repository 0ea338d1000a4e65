"""What the parts of a step cost on a GPU, each alone: attention, and adapters beside a kernel.

    python -m benchmarks.parts [--json PATH]

Every part is compiled by itself, run some times under JAX's profiler, and measured by the time that
the GPU spent in its kernels: no launches, no host. Attention is forward and backward, by our plain
form and by cuDNN's. Products are ``x @ W`` alone, with ``h @ B`` added by XLA, and with it in one
kernel of ours (Hopper GPUs), each also as the gradient in ``x``. A part that this device cannot run
is named with its error. Some three minutes on an H200.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks.machine import about
from benchmarks.profile import recorded
from benchmarks.row import failure
from lora_mini_jax import hardware
from lora_mini_jax.algebra.hopper import product_plus_thin
from lora_mini_jax.files import write_json
from lora_mini_jax.models.attention import attend
from lora_mini_jax.models.cudnn_attention import by_cudnn
from lora_mini_jax.models.masks import Seen

ROUNDS = 5
Part = tuple[str, Callable[..., Any], tuple[Any, ...]]
"""Its name, what it computes, and of what."""


@dataclass(frozen=True)
class Options:
    """Which parts, in bfloat16."""

    json: Path | None = None
    """Where to write them; its folder is made."""
    attention: tuple[tuple[int, int, int, int], ...] = ((8, 512, 16, 64), (8, 2048, 32, 64))
    """Rows, length, heads and their width."""
    products: tuple[tuple[int, int, int], ...] = (
        (4096, 1024, 1024), (4096, 1024, 4096), (16384, 2048, 512), (16384, 2048, 2048),
        (16384, 2048, 8192), (16384, 8192, 2048), (8192, 4096, 4096),
    )  # fmt: skip
    """Tokens, inputs and outputs of a kernel."""
    ranks: tuple[int, ...] = (16, 64)
    """Of the adapters."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write the JSON."""
    options = tyro.cli(Options, args=argv)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for shape in options.attention:
        rows += [measured("attention", shape, part) for part in attentions(*shape)]
    for shape in options.products:
        rows += [measured("product", shape, part) for part in products(*shape, options.ranks)]
    if options.json:
        write_json(options.json, {**about(), "rounds": ROUNDS, "rows": rows})


def measured(kind: str, shape: Sequence[int], part: Part) -> dict[str, Any]:
    """A part's row, printed too."""
    name, function, given = part
    row: dict[str, Any] = {"kind": kind, "shape": list(shape), "name": name}
    try:
        row |= {"us": round(microseconds(jax.jit(function), given), 1)}
    except Exception as error:  # the others go on
        row["error"] = failure(error)
    print(row)
    return row


def microseconds(call: Callable[..., Any], given: tuple[Any, ...]) -> float:
    """Of the GPU's kernels in one call, the mean of some."""
    jax.block_until_ready(call(*given))
    data = recorded(lambda: jax.block_until_ready([call(*given) for _ in range(ROUNDS)]))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    streams = (line for plane in planes for line in plane.lines if "Stream" in line.name)
    spent = sum(event.duration_ns for line in streams for event in line.events)
    if not planes:
        raise RuntimeError("the profiler saw no GPU")
    return spent / 1e3 / ROUNDS


def drawn(*shape: int, seed: int, scale: float = 1.0) -> jax.Array:
    """Random bfloat16 numbers."""
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(jnp.bfloat16)


def attentions(rows: int, length: int, heads: int, width: int) -> Iterator[Part]:
    """Plain and cuDNN's, causal and with a mask of four texts a row."""
    q, k, v, g = (drawn(rows, length, heads, width, seed=seed) for seed in range(4))
    starts = jax.random.bernoulli(jax.random.key(4), 3 / length, (rows, length))
    segments = 1 + jnp.cumsum(starts, 1, dtype=jnp.int32)

    def both(way: Callable[..., Any]) -> Callable[..., Any]:
        def run(q: Any, k: Any, v: Any, g: Any, segments: Any = None) -> Any:
            seen = Seen(segments, segments)
            out, back = jax.vjp(lambda *given: way(*given, seen), q, k, v)
            return out, back(g)

        return run

    def plain(*given: Any) -> Any:
        with hardware.without_kernels():
            return attend(*given)

    def cudnn(*given: Any) -> Any:
        return by_cudnn(*given, scale=width**-0.5)

    for name, way in {"plain": plain, "cuDNN": cudnn}.items():
        yield name, both(way), (q, k, v, g)
        yield f"{name}, masked", both(way), (q, k, v, g, segments)


def products(rows: int, depth: int, columns: int, ranks: Sequence[int]) -> Iterator[Part]:
    """Forward, and backward in the inputs, without and with an adapter of each rank."""
    x, g = drawn(rows, depth, seed=0), drawn(rows, columns, seed=1)
    w = drawn(depth, columns, seed=2, scale=depth**-0.5)
    yield "x W", lambda x, w: x @ w, (x, w)
    yield "g W^T", lambda g, w: g @ w.T, (g, w)
    for rank in ranks:
        h = drawn(rows, rank, seed=3)
        b, a = drawn(rank, columns, seed=4, scale=0.1), drawn(depth, rank, seed=5, scale=0.1)
        yield f"x A, rank {rank}", lambda x, a: x @ a, (x, a)
        yield f"x W + h B, rank {rank}", lambda x, w, h, b: x @ w + h @ b, (x, w, h, b)
        for name, turned, given in (("x W + h B", False, (x, w, h, b)),
                                    ("g W^T + h A^T", True, (g, w, h, a))):  # fmt: skip
            yield f"{name}, rank {rank}, one kernel", partial(in_one, turned=turned), given


def in_one(*given: jax.Array, turned: bool) -> jax.Array:
    """By the kernel, on this device."""
    return product_plus_thin(*given, turned=turned, blocks=hardware.multiprocessors())


if __name__ == "__main__":
    main()
