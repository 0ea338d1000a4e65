"""Several methods and seeds on one task, side by side."""

from lora_mini_jax.errors import UserError
from lora_mini_jax.options import Compare, to_json
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.folder import ComparisonFolder, Row, RunFolder
from lora_mini_jax.runs.report import compare_report
from lora_mini_jax.runs.run import Log
from lora_mini_jax.runs.tables import label, table_row, table_text
from lora_mini_jax.tasks.kinds import planned

ROW = ("method", "settings", "trainable", "trainable_share", "step_seconds", "step_bytes",
       "adapter_bytes", "seconds")  # fmt: skip


def compare(options: Compare, say: Log = print, title: str = "Comparison") -> list[Row]:
    """Run every method with every seed, then write table, ``summary.json`` and report.

    Runs that are finished are not run again, so an interrupted comparison goes on. The folder's
    ``comparison.json`` tells what is compared in it.

    Returns:
        One row a run: ``ROW``'s entries and the task's measures (``valid_loss_after``), with the
        seed and the method's settings as given.

    Raises:
        UserError: as `finetune`; a folder of another comparison, or of none.
    """
    folder = ComparisonFolder(options)
    check_plans(options)
    folder.create()
    runs: dict[str, list[tuple[Row, list]]] = {}
    rows = []
    for spec in options.methods:
        for seed in options.seeds:
            one = options.run_options(spec, seed)
            say(f"{spec}, seed {seed}")
            summary = finetune(one, say)
            runs.setdefault(spec, []).append((summary, RunFolder(one).metrics()))
            kept = {n: v for n, v in summary.items() if n in ROW or n.startswith("valid_")}
            rows.append({**kept, "spec": spec, "seed": seed})
    record = {"model": options.model, "rows": rows, "options": to_json(options)}
    folder.finish(record)
    page = compare_report(folder.path, title, runs)
    table = [table_row(label(spec), [s for s, _ in seeds]) for spec, seeds in runs.items()]
    say(table_text(table))
    say_samples(runs, say)
    say(f"report: {page}")
    return rows


def check_plans(options: Compare) -> None:
    """Whether every method can adapt the model as it is told to, before the first is trained."""
    for spec in options.methods:
        try:
            planned(options.run_options(spec, options.seeds[0]))
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None


def say_samples(runs: dict[str, list[tuple[Row, list]]], say: Log) -> None:
    """One sample of text, before and after."""
    for i, (spec, seeds) in enumerate(runs.items()):
        for sample in seeds[0][0]["samples"][:1]:
            if i == 0:
                say(f"\nprompt: {sample['prompt']!r}\n  before: {sample['before']!r}")
            say(f"  after {label(spec)}: {sample['after']!r}")
