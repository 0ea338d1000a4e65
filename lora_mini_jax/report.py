"""Reports of runs: one HTML page that opens without a network, pictures and table in it."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lora_mini_jax.files import read_json, write_text
from lora_mini_jax.plots import Points, heat_map, loss_against, loss_curves

Row = dict[str, Any]

COLUMNS = {
    "method": "method",
    "trainable": "trained parameters",
    "share": "share of the model",
    "before": "held-out loss before",
    "after": "held-out loss after",
    "right": "examples right",
    "step_seconds": "seconds a step",
    "step_bytes": "bytes of a step",
    "adapter_bytes": "adapter bytes",
    "seconds": "seconds",
}

COSTS = {
    "trainable": "trained parameters",
    "step_bytes": "bytes of a compiled step: arguments, results, temporaries",
    "step_seconds": "seconds a step",
}
"""What quality is drawn against."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 66em; margin: 2em auto;
       padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; width: 100% } svg { width: 100%; height: auto }
th, td { text-align: right; padding: .3em .6em; border-bottom: 1px solid #dde3ea }
td { white-space: nowrap } td:first-child { white-space: normal }
th:first-child, td:first-child { text-align: left }
th { font-size: .85em; vertical-align: bottom }
pre { background: #f4f6f8; padding: .8em; white-space: pre-wrap; border-radius: 4px }
.prompt { color: #6b7785 }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #d8dee6 }
  svg { background: #fff; border-radius: 4px } pre { background: #1f262e }
  th, td { border-color: #333c46 } }
"""


def run_report(folder: Path, summary: Row, metrics: Sequence[Row]) -> Path:
    """Write ``report.html`` of one run; returns its path."""
    name = summary["method"]
    return write_page(
        folder / "report.html",
        f"Fine-tuning with {name}",
        table_html([table_row(name, [summary])]),
        loss_curves({name: points(metrics, "loss")}, {name: points(metrics, "valid_loss")}),
        matrix_html(folder / "matrix.json"),
        samples_html({name: summary["samples"]}),
        settings_html({name: summary}),
    )


def compare_report(
    folder: Path, title: str, runs: Mapping[str, Sequence[tuple[Row, list]]]
) -> Path:
    """Write ``report.html`` of several runs: ``{spec: [(summary, metrics) for each seed]}``."""
    runs = {label(spec): seeds for spec, seeds in runs.items()}
    first = {name: seeds[0] for name, seeds in runs.items()}
    summaries = {name: [summary for summary, _ in seeds] for name, seeds in runs.items()}
    before = next(iter(first.values()))[0]["valid_loss_before"]
    return write_page(
        folder / "report.html",
        title,
        table_html([table_row(name, each) for name, each in summaries.items()]),
        loss_curves(
            {name: points(metrics, "loss") for name, (_, metrics) in first.items()},
            {name: points(metrics, "valid_loss") for name, (_, metrics) in first.items()},
        ),
        *(loss_against(name, costs(summaries, cost), before) for cost, name in COSTS.items()),
        samples_html({name: summary["samples"] for name, (summary, _) in first.items()}),
        settings_html({name: summary for name, (summary, _) in first.items()}),
    )


def costs(summaries: Mapping[str, Sequence[Row]], cost: str) -> dict[str, Points]:
    """A cost and the loss it bought, by run and seed, where the cost is known."""
    found: dict[str, Points] = {}
    for name, each in summaries.items():
        known = [s for s in each if s.get(cost) is not None]
        found[name] = [s[cost] for s in known], [s["valid_loss_after"] for s in known]
    return found


def label(spec: str) -> str:
    """A run's spec as people read it: ``lora:rank=8,alpha=4`` is ``lora rank=8 alpha=4``."""
    return spec.replace(":", " ").replace(",", " ")


def table_row(name: str, seeds: Sequence[Row]) -> dict[str, str]:
    """One line of the table, means over the seeds; the spread is their standard deviation."""
    one = seeds[0]
    after = [s["valid_loss_after"] for s in seeds]
    spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
    return {
        "method": name,
        "trainable": f"{one['trainable']:,}",
        "share": f"{one['trainable_share']:.2%}",
        "before": f"{mean(s['valid_loss_before'] for s in seeds):.3f}",
        "after": f"{mean(after):.3f}{spread}",
        "right": f"{mean(s['valid_right_after'] for s in seeds):.1%}",
        "step_seconds": f"{mean(s['step_seconds'] for s in seeds):.3f}",
        "step_bytes": f"{one['step_bytes']:,}" if one["step_bytes"] else "unknown",
        "adapter_bytes": f"{one['adapter_bytes']:,}",
        "seconds": f"{mean(s['seconds'] for s in seeds):.0f}",
    }


def table_text(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table for a terminal."""
    lines = [list(columns.values()), *([row[c] for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def table_html(rows: Iterable[Mapping[str, str]], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table for a page."""
    head = "".join(f"<th>{name}</th>" for name in columns.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row[c])}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def samples_html(samples: Mapping[str, Sequence[Row]]) -> str:
    """What the model wrote after each prompt: once before training, then after it by each run."""
    parts = []
    for versions in zip(*samples.values(), strict=True):
        prompt = f'<span class="prompt">{html.escape(versions[0]["prompt"])}</span>'
        texts = {"before": versions[0]["before"]}
        texts |= {f"{name}, after": v["after"] for name, v in zip(samples, versions, strict=True)}
        for when, text in texts.items():
            parts.append(f"<p>{html.escape(when)}</p><pre>{prompt}{html.escape(text)}</pre>")
    return "<h2>Samples</h2>" + "".join(parts) if parts else ""


def matrix_html(path: Path) -> str:
    """What DiffoRA's search found, layers by modules; nothing where there was no search."""
    if not path.exists():
        return ""
    matrix = read_json(path)
    names = [column.removesuffix("/kernel") for column in matrix["columns"]]
    return (
        f"<h2>Search</h2><p>How far each gate was open after {matrix['steps']} steps; the kernels "
        "with a dot were chosen.</p>"
        + heat_map(matrix["rows"], names, matrix["gates"], matrix["chosen"])
    )


def settings_html(summaries: Mapping[str, Row]) -> str:
    """Model, settings, seed, and what was left out of the data."""
    lines = [
        f"<p>{html.escape(name)}: {html.escape(str(s['settings']))}, seed {s['seed']}, "
        f"{s['steps']} steps on {html.escape(s['model'])}."
        + "".join(f" {html.escape(note)}." for note in s["notes"])
        + "</p>"
        for name, s in summaries.items()
    ]
    return "<h2>Settings</h2>" + "".join(lines)


def points(metrics: Iterable[Row], name: str) -> Points:
    """Steps and values of one metric."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def write_page(path: Path, title: str, *parts: str) -> Path:
    """A whole page; returns its path."""
    body = "\n".join(parts)
    write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>\n{body}\n</html>\n",
    )
    return path
