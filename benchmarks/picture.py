"""The rows of a benchmark as a picture: every row's time over the floor's, a panel a shape."""

import io
from collections.abc import Sequence
from typing import Any

COLOURS = {"lora-mini": "C0", "peft": "C1", "torch": "C1", "qwix": "C1"}
"""By the beginning of a row's name: LoRA-Mini, and what is others'; the rest is grey."""


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """An SVG: bars for the medians, lines from the first quartile to the third, and the floor."""
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    shapes = list(dict.fromkeys((r["width"], r["length"], r["batch"]) for r in rows))
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "frozen floor"))
    size = (2.2 + 2.6 * len(shapes), 1.2 + 0.28 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        own = {r["name"]: r for r in rows if (r["width"], r["length"], r["batch"]) == shape}
        _panel(axes, names, own)
        axes.set_title("width {}, {} x {} tokens".format(*(shape[i] for i in (0, 2, 1))), size=9)
    panels[0].set_yticks(range(len(names)), names, size=8)
    panels[0].invert_yaxis()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axes: Any, names: Sequence[str], rows: dict[str, dict[str, Any]]) -> None:
    floor = rows["frozen floor"]["step_ms"]
    for y, name in enumerate(names):
        row = rows.get(name, {"error": "not run"})
        if "error" in row:
            axes.text(0.05, y, row["error"].partition(":")[0], va="center", size=7, color="0.4")
            continue
        colour = next((c for start, c in COLOURS.items() if name.startswith(start)), "0.6")
        axes.barh(y, row["floor_ratio"], color=colour, height=0.7)
        axes.plot([row["floor_ratio_q1"], row["floor_ratio_q3"]], [y, y], "k", lw=0.8)
        axes.text(row["floor_ratio_q3"], y, f" {row['floor_ratio']:.2f}", va="center", size=7)
    axes.axvline(1, color="k", lw=0.8, ls=":")
    axes.set_xlabel(f"time of a step, x floor ({floor:,.0f} ms)", size=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.15)
