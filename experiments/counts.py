"""How many parameters LoRA and LoRA-Mini train on real models, and how many bytes they save.

    python -m experiments.counts

Reads the ``config.json`` of the folders in ``experiments/configs``, but for `LEFT_OUT`, and no
weights. The figures are those of ``lora-mini inspect --config-only --json``. Writes
``experiments/results/counts.json`` and ``counts.md``, in a minute.
"""

from pathlib import Path
from typing import Any

from lora_mini_jax.commands.inspect import inspect
from lora_mini_jax.files import write_json, write_text
from lora_mini_jax.options import Inspect

HERE = Path(__file__).parent
LEFT_OUT = ("llama-3-70b",)
MINI = ("rank=16", "a=32", "b=32")
METHODS = {"lora": ("rank=16",), "lora-mini": (*MINI, "outer_init=orthogonal")}
TARGETS = {
    "q, k, v": r"(^|/)(q|k|v|query|key|value)(_proj)?/kernel$",
    "all-linear": "all-linear",
}
"""Kernels by what the table calls them. A T5's q, k and v are of all its attentions."""
HEAD = (
    "| model | kernels | LoRA r=16 | bytes | LoRA-Mini r=16 a=32 b=32 | bytes | fewer |"
    " bytes with factors from gradients |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|\n"
)

Row = dict[str, Any]


def main() -> None:
    """Count, and write both files."""
    models = [p for p in sorted((HERE / "configs").iterdir()) if p.name not in LEFT_OUT]
    found = {name: {folder.name: counts(folder, pattern) for folder in models}
             for name, pattern in TARGETS.items()}  # fmt: skip
    write_json(HERE / "results" / "counts.json", found)
    write_text(HERE / "results" / "counts.md", tables(found))


def counts(folder: Path, pattern: str) -> Row:
    """What each method trains and saves on these kernels of one model."""
    row: Row = {}
    for method, settings in METHODS.items():
        report = counted(folder, pattern, method, settings)
        row["model_parameters"] = report["model_parameters"]
        row["kernels"] = len(report["kernels"])
        row[method] = {name: report[name] for name in ("trainable", "adapter_bytes")}
    row["ratio"] = row["lora"]["trainable"] / row["lora-mini"]["trainable"]
    stored = counted(folder, pattern, "lora-mini", (*MINI, "outer_init=gradient"))
    row["gradient_adapter_bytes"] = stored["adapter_bytes"]
    return row


def counted(folder: Path, pattern: str, method: str, settings: tuple[str, ...]) -> Row:
    """What ``inspect`` says of one method on these kernels."""
    return inspect(Inspect(
        model=str(folder), method=method, settings=settings, target_modules=(pattern,),
        config_only=True,
    ))  # fmt: skip


def tables(found: dict[str, dict[str, Row]]) -> str:
    """A markdown table for each choice of kernels."""
    parts = []
    for name, rows in found.items():
        lines = "".join(line(model, row) for model, row in rows.items())
        parts.append(f"On {name}:\n\n{HEAD}{lines}")
    return "\n".join(parts)


def line(model: str, row: Row) -> str:
    """One model's row of a table."""
    cells = [f"{row[method][name]:,}" for method in METHODS
             for name in ("trainable", "adapter_bytes")]  # fmt: skip
    cells += [f"{row['ratio']:.1f}x", f"{row['gradient_adapter_bytes']:,}"]
    return f"| {model} | {row['kernels']} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
