"""What the devices of a mesh tell each other, read off a compiled program."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
_EXCHANGE = re.compile(rf"= (?P<shapes>[^=]*?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=\d+")


@dataclass(frozen=True)
class Collective:
    """One exchange among devices.

    Attributes:
        kind: ``"all-reduce"``, ``"all-gather"``, ``"reduce-scatter"``, ...
        shapes: of the arrays that each device has after it; XLA puts several in one exchange.
        bytes: of these arrays.
        times: how often it happens in one run of the program: more than once in a loop.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int = 1


def collectives(compiled: Any) -> list[Collective]:
    """The exchanges of ``jax.jit(...).lower(...).compile()``, in the program's order.

    A loop whose turns are not in the program, which no scan is, counts as one turn. What is said of
    an exchange more than once, where it starts and where it is waited for, counts once.

    Example:
        >>> import jax
        >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile())
        []
    """
    parts = _computations(re.sub(r"/\*.*?\*/", "", compiled.as_text()))
    times, known, exchanges = _times(parts), set(), []
    for name, line in ((name, line) for name, lines in parts.items() for line in lines):
        found, channel = _EXCHANGE.search(line), _CHANNEL.search(line)
        if not found or (channel and (found["kind"], channel[0]) in known):
            continue
        if channel:
            known.add((found["kind"], channel[0]))
        exchanges.append(_collective(found, times[name]))
    return exchanges


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of every computation of a program, by name; callees come before their callers."""
    parts: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line.strip()):
            lines = parts.setdefault(found[2], [])
        lines.append(line)
    return parts


def _times(parts: dict[str, list[str]]) -> Counter:
    """How often each computation runs, the last being the program's own."""
    times: Counter = Counter()
    names = list(parts)
    times[names[-1]] = 1
    for name in reversed(names):
        for line in parts[name]:
            turns = _turns(line, parts) if " while(" in line else 1
            for how, called in _CALLED.findall(line):
                each = turns if how == "body" else 1
                for callee in called.replace("%", "").split(", "):
                    times[callee] += each * times[name]
    return times


def _turns(loop: str, parts: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA says, or up to the one number that its condition compares with,
    as XLA for TPUs leaves it."""
    if known := _TURNS.search(loop):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = parts.get(condition[1], []) if condition else []
    limits = [limit[1] for line in lines if (limit := _LIMIT.search(line))]
    counts = any("direction=LT" in line for line in lines)
    return int(limits[0]) if counts and len(limits) == 1 else 1


def _collective(found: re.Match, times: int) -> Collective:
    arrays = [(kind, tuple(map(int, sizes.split(","))) if sizes else ())
              for kind, sizes in _SHAPE.findall(found["shapes"])]  # fmt: skip
    if found["start"] and found["kind"] != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # an asynchronous one names what went in first
    size = sum(_bytes(*array) for array in arrays)
    return Collective(found["kind"], tuple(shape for _, shape in arrays), size, times)


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    """The size of an array of an HLO type: ``bf16``, ``s32``, ``f8e4m3fn`` or ``pred``."""
    bits = re.search(r"\d+", kind)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8
