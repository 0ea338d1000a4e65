"""The pictures of the reports, as SVG text that goes straight into a page."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

Points = tuple[Sequence[float], Sequence[float]]


def loss_curves(
    curves: Mapping[str, Points],
    held_out: Mapping[str, Points],
    name: str = "loss, nats per token",
) -> str:
    """Training loss by step as lines, held-out loss as dots joined by dashes; one colour a run.
    Steps below 0 are those of a search before the training, and shaded.

    Args:
        curves: ``{run: (steps, losses)}``.
        held_out: the same for the held-out loss.
        name: of what is drawn.
    """
    figure, axes = _figure(7.5, 4)
    for i, (run, (steps, losses)) in enumerate(curves.items()):
        axes.plot(steps, losses, color=f"C{i}", lw=1.3, label=run)
    for i, (steps, losses) in enumerate(held_out.values()):
        axes.plot(steps, losses, "o--", color=f"C{i}", ms=4, lw=0.8)
    drawn = (*curves.values(), *held_out.values())
    start = min((min(steps) for steps, _ in drawn if steps), default=0)
    if start < 0:
        axes.axvspan(start, 0, color="0.93", zorder=0)
    axes.set_xlabel("step; below 0, shaded: of the search" if start < 0 else "step")
    axes.set_ylabel(f"{name}; dots: held out" if held_out else name)
    _legend(axes)
    return _svg(figure)


def loss_against(
    cost: str,
    points: Mapping[str, Points],
    before: float,
    name: str = "held-out loss, nats per token",
) -> str:
    """Held-out loss after training against what it cost (``"trained parameters"``), a dot a seed.

    Args:
        cost: what the first of each pair of numbers is.
        points: ``{run: (costs, losses)}``, a number for each seed.
        before: the loss before training.
        name: of the second of each pair of numbers, where that is not the loss.
    """
    figure, axes = _figure(7.5, 4)
    for i, (run, (costs, losses)) in enumerate(points.items()):
        axes.plot(costs, losses, "os^v"[i // 10 % 4], color=f"C{i}", label=run, alpha=0.8)
    axes.axhline(before, color="0.6", lw=0.8, ls=":", label="before training")
    _log_axis(axes.xaxis)
    axes.set_xlabel(cost)
    axes.set_ylabel(name)
    _legend(axes)
    return _svg(figure)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    marked: Sequence[Sequence[bool | None]],
) -> str:
    """Numbers by row and column as shades, a dot on those that are marked, nothing where None."""
    figure, axes = _figure(2.5 + 0.6 * len(columns), 1.6 + 0.35 * len(rows))
    axes.grid(False)
    shades = [[float("nan") if value is None else value for value in row] for row in values]
    mesh = axes.pcolormesh(shades, cmap="Blues", edgecolors="w", linewidth=1)
    dots = [(x + 0.5, y + 0.5) for y, row in enumerate(marked) for x, on in enumerate(row) if on]
    axes.plot(*zip(*dots, strict=True), "o", color="C1", ms=6)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, rotation=30, ha="right")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows)
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes)
    return _svg(figure)


def _legend(axes: Any) -> None:
    """Beside the picture: with many runs there is no room in it."""
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _log_axis(axis: Any) -> None:
    """Logarithmic, with numbers people read: 2k, 5k, 10k."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis.axes.set_xscale("log")
    low, high = axis.get_data_interval()
    # Within a decade 1, 2 and 5 may be no number at all.
    subs = (1, 2, 5) if high > 8 * low > 0 else range(1, 10)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = "<svg" + buffer.getvalue().partition("<svg")[2]
    # Every picture names its parts alike, and on a page a name may be there once.
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'((?:\bid="|href="#|url\(#)[^")]+)', rf"\1-{own}", svg)
