"""Draw and tabulate what ``experiments.sweep_e2e`` found.

    python -m experiments.sweep_plot
    python -m experiments.sweep_plot --results experiments/results/sweep_wide.json \\
        --base "a 2.3M-parameter Llama of width 256"

Reads ``experiments/results/sweep_e2e.json``, or another; writes ``sweep_e2e.png`` (held-out loss
against trained parameters) and ``sweep_e2e.md`` (all configurations) beside it, in two seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from experiments.compare_plot import limits
from lora_mini_jax.files import read_json, write_text

Result = dict[str, Any]
COLOURS = {"orthogonal": "#0072B2", "svd": "#009E73", "gradient": "#E41A1C",
           "activation": "#984EA3", "fan_in": "#D55E00", "normal": "#CC79A7"}  # fmt: skip
OTHERS = {"lora-mini-diag": ("LoRA-Mini-diag, gradient", "#8C510A", "*"),
          "lora-xs": ("LoRA-XS", "#00B4C8", "x"), "vera": ("VeRA", "#9A9A00", "v"),
          "miss": ("MiSS mini", "#1B2A6B", "D")}  # fmt: skip
KERNELS = {"self_attn": ("attention", 1), "mlp": ("mlp", -1), "down_proj": ("down", 1)}
"""Which kernels LoRA adapts where it does not adapt all, in words; and on which side of the point
there is room for them, right or left."""
BUDGETS = (10, 20)


@dataclass(frozen=True)
class Options:
    """Where the results are; the picture and the table go beside them."""

    results: Path = Path(__file__).parent / "results" / "sweep_e2e.json"
    base: str = "a 260K-parameter Llama"
    """What the picture says it was."""


def main(options: Options) -> None:
    """Write the picture and the table."""
    found: dict[str, Result] = read_json(options.results)
    write_text(options.results.with_suffix(".md"), table(found))
    title = f"E2E on {options.base}: three seeds, learning rate tuned for each point"
    figure = draw([r for r in found.values() if r["base"] == "pretrained"], title)
    figure.savefig(options.results.with_suffix(".png"), dpi=150)


def table(found: dict[str, Result]) -> str:
    """A markdown table, the fewest trained parameters first."""
    whole = found["LoRA r=8"]["trained"]
    lines = [
        "| configuration | trained | fewer than LoRA r=8 | held-out loss | best lr |",
        "|---|---:|---:|---:|---:|",
    ]
    order = sorted(found.items(), key=lambda item: (item[1]["trained"], item[1]["mean"]))
    for name, r in order:
        lines.append(
            f"| {name} | {r['trained']:,} | {whole / r['trained']:.1f}x | "
            f"{r['mean']:.3f} ± {r['std']:.3f} | {r['lr']:g} |"
        )
    return "\n".join(lines) + "\n"


def draw(found: list[Result], title: str) -> plt.Figure:
    """Held-out loss against trained parameters, a line along the best of each kind."""
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    _, top = limits([(r["mean"], r["std"]) for r in found])
    above, found = ([r for r in found if (r["mean"] > top) == far] for far in (True, False))
    loras = of(found, "lora")
    whole = [r for r in loras if r["include"] == "all-linear"]
    series(axes, whole, "LoRA, all linear kernels", "black", "o")
    some_kernels(axes, [r for r in loras if r not in whole])
    for outer_init, colour in COLOURS.items():
        own = [r for r in found if r["method"].get("outer_init") == outer_init]
        series(axes, own, f"LoRA-Mini, {outer_init}", colour, "^")
    for name, (label, colour, marker) in OTHERS.items():
        series(axes, of(found, name), label, colour, marker)
    mark(axes, above, top)
    most = max(r["trained"] for r in whole)
    for factor in BUDGETS:
        axes.axvline(most / factor, color="0.8", linewidth=1, zorder=0)
        label = f"{factor}x fewer\nthan LoRA r=8"
        axes.annotate(
            label, (most / factor, 0.01), xycoords=("data", "axes fraction"), va="bottom",
            xytext=(3, 0), textcoords="offset points", fontsize=8, color="0.4",
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="trained parameters",
        ylabel="held-out loss (nats a completion token)", title=title,
    )  # fmt: skip
    low, high = (f(r["trained"] for r in found) for f in (min, max))
    ticks = [n * 10**power for power in range(2, 7) for n in (1, 2, 5)]
    ticks = [tick for tick in ticks if low * 0.7 < tick < high * 1.4]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def mark(axes: plt.Axes, above: list[Result], top: float) -> None:
    """End the axis at ``top``, and write at that edge what lies above it."""
    for r in above:
        kind = r["method"].get("outer_init") or r["method"]["method"]
        axes.annotate(
            f"↑ {kind}: {r['mean']:.2f}", (r["trained"], top), va="top", fontsize=9,
            xytext=(-4, -2), textcoords="offset points", color=COLOURS.get(kind, "0.2"),
        )  # fmt: skip
    if above:
        axes.set_ylim(top=top)


def some_kernels(axes: plt.Axes, found: list[Result]) -> None:
    """LoRA on some of the kernels: points, each with its kernels' name, for they are no series."""
    for r in found:
        name, side = KERNELS[r["include"]]
        axes.annotate(
            name, (r["trained"], r["mean"]), va="center", ha="left" if side > 0 else "right",
            xytext=(7 * side, 0), textcoords="offset points", fontsize=9, color="0.35",
        )  # fmt: skip
    series(axes, found, "LoRA, some kernels", "0.45", "s", line=False)


def of(found: list[Result], method: str) -> list[Result]:
    """The results of one method."""
    return [r for r in found if r["method"]["method"] == method]


def series(
    axes: plt.Axes, found: list[Result], label: str, colour: str, marker: str, line: bool = True
) -> None:
    """Every point with its error bar, and a line along those that no smaller one beats."""
    if not found:
        return
    found = sorted(found, key=lambda r: (r["trained"], r["mean"]))
    best = [
        r for i, r in enumerate(found) if r["mean"] < min([s["mean"] for s in found[:i]] + [99])
    ]
    if line:
        along = [r["trained"] for r in best], [r["mean"] for r in best]
        axes.plot(*along, color=colour, linewidth=1.4)
    axes.errorbar(
        [r["trained"] for r in found], [r["mean"] for r in found], [r["std"] for r in found],
        color=colour, marker=marker, markersize=5, linestyle="none", capsize=2, linewidth=1,
        label=label,
    )  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
