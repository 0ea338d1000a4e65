"""Draw and tabulate what ``experiments.compare_tasks`` found; trains nothing.

    python -m experiments.compare_plot

Reads ``experiments/results/compare_e2e.json`` and ``compare_trec.json``, or others; writes beside
each a table (``.md``) and a picture (``.svg``): one row a method, the lowest loss first.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from lora_mini_jax.files import read_json, write_text

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
NAMES = {"e2e": "E2E", "trec": "TREC"}


@dataclass(frozen=True)
class Options:
    """Where the results are; the pictures and the tables go beside them."""

    results: tuple[Path, ...] = (RESULTS / "compare_e2e.json", RESULTS / "compare_trec.json")


def main(options: Options) -> None:
    """Write the picture and the table of each."""
    for path in options.results:
        write(path)


def write(path: Path) -> None:
    """The table and the picture beside a file of results."""
    found = read_json(path)
    write_text(path.with_suffix(".md"), table(found["bases"]))
    write_text(path.with_suffix(".svg"), picture(found))


def table(bases: dict[str, Row]) -> str:
    """A markdown table, the best first; the random base below."""
    lines = [
        "| method | base | trained | held-out loss | examples right | step, ms | step, MB | lr |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for base, arms in bases.items():
        for arm in by_loss(arms):
            runs, lr = arms[arm]["runs"], arms[arm]["lr"]
            loss, spread = mean(runs, "valid_loss_after")
            right, right_spread = mean(runs, "valid_right_after")
            lines.append(
                f"| {words(arm)} | {base} | "
                f"{runs[0]['trainable']:,} | {loss:.3f} ± {spread:.3f} | "
                f"{right:.1%} ± {right_spread:.1%} | "
                f"{1e3 * mean(runs, 'step_seconds')[0]:.0f} | "
                f"{runs[0]['step_bytes'] / 1e6:.1f} | {lr:g} |"
            )
    return "\n".join(lines) + "\n"


def picture(found: Row) -> str:
    """Mean loss and standard deviation of every method on the pre-trained base, as SVG."""
    arms = found["bases"]["pretrained"]
    order = by_loss(arms)
    losses = [mean(arms[arm]["runs"], "valid_loss_after") for arm in order]
    before = mean(arms[order[0]]["runs"], "valid_loss_before")[0]
    figure = Figure(figsize=(8.5, 1.3 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    low, high = limits(losses)
    for y, (loss, spread) in enumerate(losses):
        outside(axes, y, loss, spread, low, high)
        if low < loss < high:
            axes.errorbar(loss, y, xerr=spread, fmt="o", color="C0", ms=5, capsize=2.5, lw=1.2)
    axes.set(xlim=(low, high), ylim=(len(order) - 0.4, -0.6))
    axes.set_yticks(range(len(order)), [words(arm).replace(" budget=none", "") for arm in order])
    axes.set_xlabel(f"held-out loss, nats per completion token (before training {before:.3f})")
    axes.set_title(
        f"{NAMES[found['task']]}: mean and standard deviation of {len(found['seeds'])} seeds, "
        "the lowest loss first",
        size=10,
    )
    counts = axes.secondary_yaxis("right")
    counts.set_yticks(range(len(order)), [trained(arms[arm]["runs"]) for arm in order])
    axes.text(1.01, -0.01, "trained\nparameters", transform=axes.transAxes, va="top", size=8.5)
    for side in (axes, counts):
        side.tick_params(axis="y", length=0, labelsize=8.5)
    axes.grid(axis="both", alpha=0.25, lw=0.6)
    for edge in (axes.spines["top"], axes.spines["right"], counts.spines["right"]):
        edge.set_visible(False)
    return svg(figure)


def outside(axes: Any, y: int, loss: float, spread: float, low: float, high: float) -> None:
    """An outlier as text at the edge it lies beyond; nothing for a loss between the limits."""
    said = f"{loss:.3f} ± {spread:.3f}"
    if loss <= low:
        axes.text(low, y, f" ← {said}", va="center", size=8.5, color="C3")
    elif loss >= high:
        axes.text(high, y, f"{said} → ", va="center", ha="right", size=8.5, color="C3")


def limits(losses: list[tuple[float, float]]) -> tuple[float, float]:
    """Where the axis begins and ends: around all losses but those that lie far from the bulk, by
    more than one and a half times the distance of its quartiles (Tukey's fences)."""
    means = [loss for loss, _ in losses]
    first, third = np.percentile(means, (25, 75))
    far = 1.5 * (third - first)
    bulk = [(m, s) for m, s in losses if first - far <= m <= third + far]
    low, high = min(m - s for m, s in bulk), max(m + s for m, s in bulk)
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def trained(runs: list[Row]) -> str:
    """How many parameters were trained, by seed where that differs."""
    counts = sorted({run["trainable"] for run in runs})
    return f"{counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")


def by_loss(arms: Row) -> list[str]:
    """The arms, the lowest mean loss first."""
    return sorted(arms, key=lambda arm: mean(arms[arm]["runs"], "valid_loss_after")[0])


def words(arm: str) -> str:
    """An arm's spec as people read it."""
    return arm.replace(":", " ").replace(",", " ")


def mean(runs: list[Row], name: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [run[name] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def svg(figure: Figure) -> str:
    """A figure as SVG, the same from the same numbers."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "compare"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Options))
