"""The table and the picture of ``experiments.switchlora``."""

import math
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from lora_mini_jax.runs.plots import loss_curves

Row = dict[str, Any]
COUNTS = {
    "trainable": "trained",
    "exchanged_bytes": "bytes exchanged a step",
    "optimizer_bytes": "optimiser bytes",
    "frozen_bytes": "bytes the method carries",
}

NAMES = {
    "full": "full rank",
    "lora": "LoRA",
    "relora": "ReLoRA",
    "switchlora": "SwitchLoRA",
    "switchlora-often": "SwitchLoRA, switching often",
    "switchlora-still": "SwitchLoRA, never switching",
}
"""The arms as people call them."""


def table(heading: str, found: Mapping[str, Row]) -> str:
    """A markdown table, one line a method; ``found`` has each method's ``runs``, ``lr`` and whether
    that is at the ``edge`` of the rates tried."""
    names = ["method", *COUNTS.values(), "held-out perplexity", "learning rate"]
    lines = [f"{heading}; * the best learning rate is at the edge of those tried.", ""]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in found.items():
        whole = [run for run in row["runs"] if run["loss"] is not None]
        values = [math.exp(run["loss"]) for run in whole]
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        lost = len(row["runs"]) - len(whole)
        after = f"{mean(values):.2f}{spread}" + (f" ({lost} diverged)" if lost else "")
        counts = [f"{whole[0][count]:,}" for count in COUNTS]
        rate = f"{row['lr']:g}{'*' if row['edge'] else ''}"
        lines.append(f"| {' | '.join([name, *counts, after, rate])} |")
    return "\n".join(lines) + "\n"


def picture(found: Mapping[str, Row], seed: int) -> str:
    """Training and held-out loss by step, of each method the first seed; SVG. A method whose first
    run diverged is left out."""
    first = {NAMES.get(name, name): row["runs"][0] for name, row in found.items()}
    first = {name: run for name, run in first.items() if run["loss"] is not None}
    return loss_curves(
        {name: _points(run, "loss") for name, run in first.items()},
        {name: _points(run, "valid_loss") for name, run in first.items()},
        f"training loss, nats, seed {seed}",
    )


def _points(run: Row, name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run["curve"] if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]
