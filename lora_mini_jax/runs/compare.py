"""Several methods and seeds on one task, side by side."""

from lora_mini_jax.errors import UserError, told_of_memory
from lora_mini_jax.options import Compare, Finetune, to_json
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.folder import ComparisonFolder, Row, RunFolder
from lora_mini_jax.runs.meter import Diverged
from lora_mini_jax.runs.outcome import Outcome, diverged_at, diverged_runs, finished
from lora_mini_jax.runs.report import compare_report
from lora_mini_jax.runs.run import Log
from lora_mini_jax.runs.tables import label, outcomes_row, table_text
from lora_mini_jax.tasks.kinds import planned

ROW = ("method", "settings", "trainable", "trainable_share", "step_seconds", "step_bytes",
       "adapter_bytes", "seconds")  # fmt: skip


def compare(options: Compare, say: Log = print, title: str = "Comparison") -> list[Row]:
    """Run every method with every seed, then write table, ``summary.json`` and report.

    Runs that are finished are not run again, so an interrupted comparison goes on. Nor is one whose
    loss diverged: that is noted in its folder, and the others are run. The folder's
    ``comparison.json`` tells what is compared in it.

    Returns:
        One row a run, with its ``spec`` and ``seed``: ``ROW``'s entries and the task's measures
        (``valid_loss_after``), or ``diverged_at``, the step at which the loss was not finite.

    Raises:
        UserError: as `finetune`, with the run's spec and seed; a folder of another comparison, or
            of none; every run diverged.
    """
    folder = ComparisonFolder(options)
    check_plans(options)
    folder.create()
    runs = {
        spec: [run(options.run_options(spec, seed), spec, say) for seed in options.seeds]
        for spec in options.methods
    }
    lost = diverged_runs(runs)
    rows = [compared(spec, one) for spec, outcomes in runs.items() for one in outcomes]
    if len(lost) == len(rows):
        raise UserError(f"every run diverged ({'; '.join(lost)}): give a lower --learning-rate and "
                        "another --output-dir, or correct the data and take this folder "
                        "away")  # fmt: skip
    folder.finish({"model": options.model, "rows": rows, "options": to_json(options)})
    page = compare_report(folder.path, title, runs)
    say(table_text([outcomes_row(label(spec), outcomes) for spec, outcomes in runs.items()]))
    say_samples(runs, say)
    for line in lost:
        say(line)
    say(f"report: {page}")
    return rows


def run(options: Finetune, spec: str, say: Log) -> Outcome:
    """One run, or what is known of it from before; errors as `compare`."""
    name = f"{spec}, seed {options.seed}"
    say(name)
    try:
        folder = RunFolder(options)
        step = None if folder.summary() else folder.diverged()
        if step is None:
            with told_of_memory():
                summary = finetune(options, say)
            return Outcome(options, summary, folder.metrics.rows())
    except Diverged as error:
        step = error.step
        folder.set_diverged(step)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    say(f"{diverged_at(step)}, and not run again unless {folder.path} is taken away")
    return Outcome(options, {}, folder.metrics.rows(), step)


def compared(spec: str, one: Outcome) -> Row:
    """A run's row in the comparison's summary."""
    kept = {n: v for n, v in one.summary.items() if n in ROW or n.startswith("valid_")}
    if one.diverged is not None:
        kept = {"method": one.options.method, "diverged_at": one.diverged}
    return {**kept, "spec": spec, "seed": one.options.seed}


def check_plans(options: Compare) -> None:
    """Whether every method can adapt the model as it is told to, before the first is trained."""
    for spec in options.methods:
        try:
            planned(options.run_options(spec, options.seeds[0]))
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None


def say_samples(runs: dict[str, list[Outcome]], say: Log) -> None:
    """One sample of text, before and after."""
    first = {spec: done[0] for spec, outcomes in runs.items() if (done := finished(outcomes))}
    for i, (spec, one) in enumerate(first.items()):
        for sample in one.summary["samples"][:1]:
            if i == 0:
                say(f"\nprompt: {sample['prompt']!r}\n  before: {sample['before']!r}")
            say(f"  after {label(spec)}: {sample['after']!r}")
