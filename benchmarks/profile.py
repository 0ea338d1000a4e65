"""Where a training step's time goes, by method: what the numbers of `benchmarks.step` are made of.

    python -m benchmarks.profile [--quick] [--rivals] [--shapes 1024x512x2] [--json PATH]

The same rows and options as there. In each round every row takes a step under its framework's own
profiler; the time of each operation goes to one of `SORTS`, by what the compiled program says of
it (JAX) or by the shapes that it was given (PyTorch). Products come with their arithmetic, so that
a slow one can be told from one that there is much of. On CPUs: elsewhere operations overlap.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from benchmarks.llama import drawn
from benchmarks.machine import about
from benchmarks.rivals import TorchRow, rivals
from benchmarks.row import Options, Row, in_turn
from benchmarks.step import QUICK, build
from lora_mini_jax.files import write_json

SORTS = ("wide", "thin", "attention", "copies", "rest")
"""Products with a kernel; products with a side of at most `THIN`; products of queries, keys and
values (in PyTorch with their softmax); copies and transpositions; all else."""
THIN = 128
_SHAPE = re.compile(r"%?([\w.\-]+) = \(?[a-z]+\d*\[([\d,]*)\]")
_DOT = re.compile(r" dot\(%?([\w.\-]+), %?([\w.\-]+)\)")
_SIDE = r"{side}_{what}_dims=\{{([\d,]*)\}}"
Found = tuple[str, float, float]
"""An operation: its sort, its milliseconds, and its billions of multiplications and additions."""


def main(argv: Sequence[str] | None = None) -> None:
    """Profile, print the tables, write the JSON."""
    argv = sys.argv[1:] if argv is None else argv
    default = replace(QUICK, rounds=3) if "--quick" in argv else Options(rounds=5)
    options = tyro.cli(Options, args=argv, default=default)
    record = {"rows": [], "config": asdict(replace(options, json=None)), **about()}
    for shape in options.each():
        rows = profiled(shape)
        where = {"width": shape.width, "length": shape.length, "batch": shape.batch}
        record["rows"] += [{**where, **row} for row in rows]
        print(f"\nwidth {shape.width}, {shape.batch} x {shape.length} tokens\n{table(rows)}")
        if options.json:
            write_json(options.json, record)


def profiled(options: Options) -> list[dict[str, Any]]:
    """Every row at a shape, of its least disturbed step: milliseconds of each sort, and the
    products' GFLOP."""
    model, params, tokens = drawn(options)
    given = options, model, params, tokens
    makes = {**build(*given), **(rivals(*given) if options.rivals else {})}
    rows = [make() for make in tqdm(makes.values(), "compile", unit="row")]
    turns: dict[str, list[list[Found]]] = {row.name: [] for row in rows}
    for row in rows:
        row.step(params, tokens)
    for turn in tqdm(range(options.rounds), "profile", unit="round"):
        for row in in_turn(rows, turn):
            profile = jax_profile if isinstance(row, Row) else torch_profile
            turns[row.name].append(list(profile(row, partial(row.step, params, tokens))))
    return [{"name": name, **_summary(found)} for name, found in turns.items()]


def _summary(turns: Sequence[Sequence[Found]]) -> dict[str, dict[str, float]]:
    """Of a row's steps, each the operations that ran."""
    step = min(turns, key=lambda turn: sum(ms for _, ms, _ in turn))
    ms = {s: sum(ms for sort, ms, _ in step if sort == s) for s in SORTS}
    gflop = {s: sum(gflop for sort, _, gflop in step if sort == s) for s in SORTS}
    return {"ms": {sort: round(value, 2) for sort, value in ms.items()},
            "gflop": {sort: round(value, 6) for sort, value in gflop.items() if value}}  # fmt: skip


def jax_profile(row: Row, step: Callable[[], None]) -> Iterator[Found]:
    """The operations of a compiled step."""
    known = operations(row.program.as_text())
    for event in (
        e for plane in recorded(step).planes for line in plane.lines for e in line.events
    ):
        sort, gflop = known.get(dict(event.stats).get("hlo_op"), ("", 0))
        if sort:
            yield sort, event.duration_ns / 1e6, gflop


def recorded(run: Callable[[], Any]) -> Any:
    """What JAX's profiler saw of a call, which has to wait for its results."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_file(str(file))


def operations(text: str) -> dict[str | None, tuple[str, float]]:
    """``{name: (sort, GFLOP)}`` of a compiled program's operations; those that only run others,
    such as loops, are left out."""
    dots: dict[str, tuple[str, float]] = {}
    found: dict[str | None, tuple[str, float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    computation = ""
    for line in (line.strip().partition(", metadata=")[0] for line in text.splitlines()):
        if line.endswith("{") and " (" in line:
            computation, shapes = line.removeprefix("ENTRY ").split()[0].lstrip("%"), {}
        if not (made := _SHAPE.match(line.removeprefix("ROOT "))):
            continue
        name, called = made[1], re.search(r"calls=%?([\w.\-]+)", line)
        shapes[name] = tuple(map(int, made[2].split(","))) if made[2] else ()
        if dot := _DOT.search(line):
            sort = found[name] = _product(line, shapes[dot[1]], shapes[name])
            dots[computation] = sort
        elif called and called[1] in dots:
            found[name] = dots[called[1]]
        elif re.match(r"(copy|transpose)", name) or re.search(r" (copy|transpose)\(", line):
            found[name] = "copies", 0
        elif not re.search(r" (while|conditional|call)\(", line):
            found[name] = "rest", 0
    return found


def _product(line: str, left: tuple[int, ...], out: tuple[int, ...]) -> tuple[str, float]:
    def sizes(what: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axes = re.search(_SIDE.format(side="lhs", what=what), line)
        return tuple(shape[int(axis)] for axis in axes[1].split(",") if axis) if axes else ()

    batch, depth = prod(sizes("batch", left)), prod(sizes("contracting", left))
    rows = prod(left) // (batch * depth)
    return _sort(batch, rows, depth, prod(out) // (batch * rows))


def _sort(batch: int, rows: int, depth: int, columns: int) -> tuple[str, float]:
    least = min(rows, depth, columns)
    sort = "attention" if batch > 1 else "thin" if least <= THIN else "wide"
    return sort, 2 * batch * rows * depth * columns / 1e9


def torch_profile(row: TorchRow, step: Callable[[], None]) -> Iterator[Found]:
    """The operations of PyTorch's step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    for event in found.events():
        sort, gflop, shapes = "rest", 0.0, event.input_shapes
        if event.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            left, right = [shape for shape in shapes if len(shape) > 1][-2:]
            sort, gflop = _sort(prod(left[:-2]), left[-2], left[-1], right[-1])
        elif "scaled_dot_product" in event.name:
            sort = "attention"
        elif event.name in ("aten::copy_", "aten::clone", "aten::contiguous"):
            sort = "copies"
        yield sort, event.self_cpu_time_total / 1e3, gflop


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as aligned text: milliseconds, and GFLOP a second where there are products."""
    lines = [f"{'ms a step (GFLOP/s)':>22}" + "".join(f"{sort:>16}" for sort in (*SORTS, "sum"))]
    for row in rows:
        cells = [f"{row['name']:>22}"]
        for sort in SORTS:
            taken, gflop = row["ms"][sort], row["gflop"].get(sort)
            speed = f" ({1e3 * gflop / taken:.0f})" if gflop and taken else ""
            cells.append(f"{taken:.1f}{speed}".rjust(16))
        lines.append("".join(cells) + f"{sum(row['ms'].values()):.1f}".rjust(16))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
