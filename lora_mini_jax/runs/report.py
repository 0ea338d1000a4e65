"""Reports of runs: one HTML page that opens without a network, pictures and table in it."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_mini_jax.files import read_json, write_text
from lora_mini_jax.runs.folder import Row
from lora_mini_jax.runs.plots import Points, heat_map, loss_against, loss_curves
from lora_mini_jax.runs.tables import MEASURES, label, table_html, table_row

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
    name, metric = summary["method"], summary["metric"]
    return write_page(
        folder / "report.html",
        f"Fine-tuning with {name}",
        table_html([table_row(name, [summary])]),
        loss_curves(
            {name: points(metrics, "loss")}, {name: points(metrics, "valid_loss")}, summary["loss"]
        ),
        metric_curves({name: points(metrics, f"valid_{metric}")}, metric),
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
    one = next(iter(first.values()))[0]
    metric, loss = one["metric"], one["loss"]
    before, quality = one[f"valid_{metric}_before"], MEASURES.get(metric, loss)
    return write_page(
        folder / "report.html",
        title,
        table_html([table_row(name, each) for name, each in summaries.items()]),
        loss_curves(
            {name: points(metrics, "loss") for name, (_, metrics) in first.items()},
            {name: points(metrics, "valid_loss") for name, (_, metrics) in first.items()},
            loss,
        ),
        metric_curves(
            {name: points(metrics, f"valid_{metric}") for name, (_, metrics) in first.items()},
            metric,
        ),
        *(
            loss_against(what, costs(summaries, cost, metric), before, f"held-out {quality}")
            for cost, what in COSTS.items()
        ),
        samples_html({name: summary["samples"] for name, (summary, _) in first.items()}),
        settings_html({name: summary for name, (summary, _) in first.items()}),
    )


def metric_curves(curves: Mapping[str, Points], metric: str) -> str:
    """What selects, by step; nothing where that is the loss, which has a picture."""
    return loss_curves(curves, {}, f"held-out {MEASURES[metric]}") if metric in MEASURES else ""


def costs(summaries: Mapping[str, Sequence[Row]], cost: str, metric: str) -> dict[str, Points]:
    """A cost and the quality it bought, by run and seed, where the cost is known."""
    found: dict[str, Points] = {}
    for name, each in summaries.items():
        known = [s for s in each if s.get(cost) is not None]
        found[name] = [s[cost] for s in known], [s[f"valid_{metric}_after"] for s in known]
    return found


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
        + html.escape(kept_text(s))
        + "".join(f" {html.escape(note)}." for note in s["notes"])
        + "</p>"
        for name, s in summaries.items()
    ]
    return "<h2>Settings</h2>" + "".join(lines)


def kept_text(summary: Row) -> str:
    """Which step's adapter was saved, where that is not simply the last's."""
    if summary.get("kept") != "best":
        return ""
    name = MEASURES.get(summary["metric"], summary["metric"])
    return f" Kept is the adapter of step {summary['kept_step']}, the best by held-out {name}."


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
