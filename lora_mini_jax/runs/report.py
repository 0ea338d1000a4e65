"""Reports of runs: one HTML page that opens without a network, pictures and table in it."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_mini_jax.files import read_json, write_text
from lora_mini_jax.runs.folder import Row
from lora_mini_jax.runs.outcome import Outcome, diverged_runs, finished
from lora_mini_jax.runs.plots import Points, heat_map, loss_against, loss_curves
from lora_mini_jax.runs.settings_page import settings_html
from lora_mini_jax.runs.tables import MEASURES, label, outcomes_row, table_html, table_row

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
.options table { width: auto; margin-bottom: 1em } .options p { overflow-wrap: anywhere }
.options th, .options td { text-align: left; white-space: normal; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #d8dee6 }
  svg { background: #fff; border-radius: 4px } pre { background: #1f262e }
  th, td { border-color: #333c46 } }
"""


def run_report(folder: Path, run: Outcome) -> Path:
    """Write ``report.html`` of one finished run; returns its path."""
    summary, metrics = run.summary, run.metrics
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
        settings_html({name: [run]}),
    )


def compare_report(folder: Path, title: str, runs: Mapping[str, Sequence[Outcome]]) -> Path:
    """Write ``report.html`` of several runs, ``{spec: an outcome for each seed}``, one of which at
    least is finished; returns its path."""
    runs = {label(spec): outcomes for spec, outcomes in runs.items()}
    ended = {name: done for name, outcomes in runs.items() if (done := finished(outcomes))}
    first = {name: done[0] for name, done in ended.items()}
    summaries = {name: [each.summary for each in done] for name, done in ended.items()}
    one = next(iter(first.values())).summary
    metric, loss = one["metric"], one["loss"]
    before, quality = one[f"valid_{metric}_before"], MEASURES.get(metric, loss)
    return write_page(
        folder / "report.html",
        title,
        table_html([outcomes_row(name, outcomes) for name, outcomes in runs.items()]),
        left_out_html(diverged_runs(runs)),
        loss_curves(
            {name: points(run.metrics, "loss") for name, run in first.items()},
            {name: points(run.metrics, "valid_loss") for name, run in first.items()},
            loss,
        ),
        metric_curves(
            {name: points(run.metrics, f"valid_{metric}") for name, run in first.items()}, metric
        ),
        *(
            loss_against(what, costs(summaries, cost, metric), before, f"held-out {quality}")
            for cost, what in COSTS.items()
        ),
        samples_html({name: run.summary["samples"] for name, run in first.items()}),
        settings_html(runs),
    )


def left_out_html(lost: Sequence[str]) -> str:
    """Which runs the pictures are without; nothing where that is none."""
    said = f"Not in the pictures: {'; '.join(lost)}."
    return f"<p>{html.escape(said)}</p>" if lost else ""


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
