"""The table of runs side by side, for a terminal and for a page."""

import html
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from lora_mini_jax.runs.folder import Row
from lora_mini_jax.runs.outcome import Outcome, diverged_at, finished

MEASURES = {
    "right": "examples right",
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}
"""What a table shows beside the loss, where a run has it: the held-out ``valid_right_before`` and
``valid_right_after``."""
FORMS = dict.fromkeys(MEASURES, ".3f") | {"right": ".1%", "accuracy": ".1%"}
"""How they are written."""

COLUMNS = {
    "method": "method",
    "trainable": "trained parameters",
    "share": "share of the model",
    "before": "held-out loss before",
    "after": "held-out loss after",
    **{f"{m}_{when}": f"{title} {when}" for m, title in MEASURES.items()
       for when in ("before", "after")},
    "step_seconds": "seconds a step",
    "step_bytes": "bytes of a step",
    "adapter_bytes": "adapter bytes",
    "seconds": "seconds",
}  # fmt: skip


def label(spec: str) -> str:
    """A run's spec as people read it: ``lora:rank=8,alpha=4`` is ``lora rank=8 alpha=4``."""
    return spec.replace(":", " ").replace(",", " ")


def table_row(name: str, seeds: Sequence[Row]) -> dict[str, str]:
    """One line of the table, means over the seeds; the spread is their standard deviation."""
    one = seeds[0]
    measures = {}
    for measure, form in FORMS.items():
        if f"valid_{measure}_after" in one:
            before = mean(s[f"valid_{measure}_before"] for s in seeds)
            after = mean_text([s[f"valid_{measure}_after"] for s in seeds], form)
            measures |= {f"{measure}_before": f"{before:{form}}", f"{measure}_after": after}
    return {
        "method": name,
        "trainable": f"{one['trainable']:,}",
        "share": f"{one['trainable_share']:.2%}",
        "before": f"{mean(s['valid_loss_before'] for s in seeds):.3f}",
        "after": mean_text([s["valid_loss_after"] for s in seeds], ".3f"),
        **measures,
        "step_seconds": f"{mean(s['step_seconds'] for s in seeds):.3f}",
        "step_bytes": f"{one['step_bytes']:,}" if one["step_bytes"] else "unknown",
        "adapter_bytes": f"{one['adapter_bytes']:,}",
        "seconds": f"{mean(s['seconds'] for s in seeds):.0f}",
    }


def outcomes_row(name: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """`table_row` of one method in a comparison. Where a run diverged there is no result: a mean
    over the others alone would make the method look better than it is."""
    done = [each.summary for each in finished(outcomes)]
    lost = [each.diverged for each in outcomes if each.diverged is not None]
    row = table_row(name, done) if done else {"method": name}
    if lost:
        said = f"diverged ({len(lost)} of {len(outcomes)})"
        after = diverged_at(lost[0]) if len(outcomes) == 1 else said
        row |= {**{c: "" for c in row if c.endswith("_after")}, "after": after}
    return row


def mean_text(values: Sequence[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def table_text(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table for a terminal, with those columns that any row has."""
    columns = {c: title for c, title in columns.items() if any(c in row for row in rows)}
    lines = [list(columns.values()), *([row.get(c, "") for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def table_html(rows: Sequence[Mapping[str, str]], columns: Mapping[str, str] = COLUMNS) -> str:
    """The table for a page, with those columns that any row has."""
    columns = {c: title for c, title in columns.items() if any(c in row for row in rows)}
    head = "".join(f"<th>{name}</th>" for name in columns.values())
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(c, ''))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
