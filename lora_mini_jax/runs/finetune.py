"""The fine-tuning run: read, resume, train, evaluate, save."""

import math
from dataclasses import replace
from typing import Any

from lora_mini_jax.adapters.adapter import Adapter, count, kernels_text
from lora_mini_jax.adapters.sites import methods_of
from lora_mini_jax.options import Finetune
from lora_mini_jax.runs.best import Best
from lora_mini_jax.runs.folder import Row, RunFolder, Told
from lora_mini_jax.runs.loop import fit
from lora_mini_jax.runs.meter import typical, waited
from lora_mini_jax.runs.outcome import Outcome
from lora_mini_jax.runs.report import run_report
from lora_mini_jax.runs.run import Log, Run
from lora_mini_jax.runs.schedule import length_notes, of_length, optimizer
from lora_mini_jax.runs.search import check_search, searched
from lora_mini_jax.saved.storage import save
from lora_mini_jax.tasks.initial import Beginning, Initial, trained_by
from lora_mini_jax.tasks.kinds import prepare
from lora_mini_jax.tasks.task import Task
from lora_mini_jax.training.calibration import calibrate

CALIBRATION_BATCHES = 8
"""Batches of training data for factors that come from data."""


def finetune(options: Finetune, say: Log = print) -> Row:
    """Run, or go on with, one fine-tuning run; returns its summary.

    A run that was killed goes on from its newest checkpoint and ends with the same adapter. A run
    that is finished is not run again: its summary is returned.

    Args:
        options: see `Finetune`.
        say: what to do with a line of text for the user.

    Raises:
        UserError: anything wrong with the options, the model, the data or the run folder; a loss
            that is not finite; a full disk.
    """
    run = Run(options, say)
    if done := run.finished():
        return done
    run.check()
    initial, task, first = Initial.of(options), prepare(options), None
    if initial:
        first = initial.load(task.model, task.params, run.devices)
        sites = first.adapter.sites
        notes = [f"begins from {initial.folder} ({kernels_text(sites)})", *task.notes]
        task = replace(task, sites=sites, notes=notes)
        run = replace(run, options=trained_by(options, sites), given=options)
    check_search(task)
    steps = total_steps(options, len(task.train))
    # An adapter's own schedule has ended: this one is of this run, whatever its settings say.
    own = () if first else options.parsed_settings()
    sites = of_length(task.sites, steps, own)
    task = replace(task, sites=sites, notes=[*task.notes, *length_notes(sites, steps)])
    with run.folder.alone():
        return train(run, task, steps, first)


def train(run: Run[Finetune], task: Task, steps: int, first: Beginning | None = None) -> Row:
    """All of `finetune` that writes: the run whose task is prepared; returns its summary.

    It begins from ``first``, or else from an adapter that it draws."""
    options, folder = run.options, run.folder
    data: dict[str, Told] = {"train": task.train, "valid": task.valid}
    folder.create(**data, **({"init_adapter": first} if first else {}))
    for note in task.notes:
        run.say(note)
    run.say(f"{steps} steps of {task.train.batch_size} rows, {len(task.train)} in an epoch")

    # Training, with the held-out loss before and after.
    given = first and replace(first.adapter, sites=task.sites)
    before = task.samples(given)
    adapter = given or made(run, task, steps)
    how: dict[str, Any] = {"base": options.model, "store_outer": bool(first and first.store_outer)}
    tx = optimizer(options, steps, adapter.sites, options.lora_plus_ratio)
    best = None
    if options.keeps_best:
        best = Best(folder, task, options.selects_by, **how, begins_trained=bool(first))
    state = fit(run, task, adapter, tx, steps, best)

    # After.
    kept = state.adapter
    if best:
        kept = best.load()
    else:
        save(folder.adapter, kept, task.params, task=task.record, **how)
    samples = [{"prompt": prompt, "before": text, "after": after} for (prompt, text), (_, after)
               in zip(before, task.samples(kept), strict=True)]  # fmt: skip
    step = best.step if best else steps
    summary = summarize(options, task, kept, folder, step) | {"samples": samples}
    run_report(folder.path, Outcome(options, summary, folder.metrics.rows()))
    folder.finish(summary)
    return summary


def made(run: Run[Finetune], task: Task, steps: int) -> Adapter:
    """An adapter to begin from: drawn, then what it takes from data, then what a search chooses."""
    devices, n = run.devices, min(CALIBRATION_BATCHES, steps)
    adapter = devices.draw(task.params, task.sites, run.options.seed)
    batches = (devices.batch(task.train, i) for i in range(n))
    adapter = calibrate(adapter, task.params, task.loss, batches, has_aux=True)
    return searched(run, task, adapter, steps)


def summarize(
    options: Finetune, task: Task, adapter: Adapter, folder: RunFolder, step: int | None
) -> Row:
    """What a finished run found; ``adapter`` is the one that was saved, that of ``step``."""
    rows = folder.metrics.rows()
    held_out = [row for row in rows if "valid_loss" in row]
    after = next(row for row in reversed(held_out) if row["step"] == step)
    measures = [name for name in after if name.startswith("valid_")]
    trainable = count(adapter)
    return {
        "model": options.model,
        "method": options.method,
        "settings": [m.to_dict() for m in methods_of(adapter.sites)],
        "seed": options.seed,
        "steps": max(row["step"] for row in rows),
        "task": options.glue or options.task,
        "loss": task.loss_name,
        "metric": options.selects_by,
        "kept": "best" if options.keeps_best else "last",
        "kept_step": step,
        "trainable": trainable,
        "trainable_share": trainable / task.n_parameters,
        **{f"{name}_before": held_out[0][name] for name in measures},
        **{f"{name}_after": after[name] for name in measures},
        "step_seconds": typical(rows, "step_seconds"),
        "data_wait_share": waited(rows),
        "step_bytes": next((row["step_bytes"] for row in rows if "step_bytes" in row), None),
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.iterdir()),
        "seconds": round(max(row["seconds"] for row in rows), 1),
        "notes": task.notes,
    }


def total_steps(options: Finetune, steps_per_epoch: int) -> int:
    """How many updates the options ask for."""
    return options.max_steps or max(1, math.ceil(options.epochs * steps_per_epoch))
