"""The fine-tuning run: read, resume, train, evaluate, save. One function, in chapters."""

import math
from statistics import median

import jax

from lora_mini_jax.adapter import Adapter, count, draw
from lora_mini_jax.calibration import calibrate
from lora_mini_jax.choice import agreed
from lora_mini_jax.decode import generate
from lora_mini_jax.loop import Log, fit
from lora_mini_jax.options import Finetune
from lora_mini_jax.report import run_report
from lora_mini_jax.runs import Row, RunFolder
from lora_mini_jax.schedule import of_length, optimizer
from lora_mini_jax.search_run import searched
from lora_mini_jax.storage import save
from lora_mini_jax.task import Task, prepare
from lora_mini_jax.train import TrainState

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
    folder = RunFolder(options)
    if done := folder.summary():
        say(f"{folder.path} is finished already; nothing to do")
        return done
    task = prepare(options)
    agreed(task.sites)  # or a search could not begin
    folder.create()
    for note in task.notes:
        say(note)

    # Training, with the held-out loss before and after.
    steps = total_steps(options, len(task.train))
    texts_before = samples(task, options, None)
    sites = of_length(task.sites, steps, options.parsed_settings())
    adapter = draw(task.params, sites, options.seed)
    first = (task.train.batch(i) for i in range(min(CALIBRATION_BATCHES, steps)))
    adapter = calibrate(adapter, task.params, task.loss, first, has_aux=True)
    adapter = searched(options, folder, task, adapter, steps, say)
    tx = optimizer(options, steps, adapter.sites, options.lora_plus_ratio)
    state = fit(options, folder, task, adapter, tx, steps, say)

    # After.
    save(folder.adapter, state.adapter, task.params, base=options.model)
    texts = list(zip(texts_before, samples(task, options, state.adapter), strict=True))
    summary = summarize(options, task, state, folder, texts)
    run_report(folder.path, summary, folder.metrics())
    folder.finish(summary)
    return summary


def summarize(
    options: Finetune,
    task: Task,
    state: TrainState,
    folder: RunFolder,
    texts: list[tuple[str, str]],
) -> Row:
    """What a finished run found; ``texts`` are the samples before and after."""
    rows = folder.metrics()
    held_out = [row["valid_loss"] for row in rows if "valid_loss" in row]
    right = [row["valid_right"] for row in rows if "valid_right" in row]
    times = [row["step_seconds"] for row in rows if "step_seconds" in row]
    trainable = count(state.adapter)
    return {
        "model": options.model,
        "method": options.method,
        "settings": [m.to_dict() for m in dict.fromkeys(s.method for s in state.adapter.sites)],
        "seed": options.seed,
        "steps": int(state.step),
        "trainable": trainable,
        "trainable_share": trainable / sum(x.size for x in jax.tree.leaves(task.params)),
        "valid_loss_before": held_out[0],
        "valid_loss_after": held_out[-1],
        "valid_right_before": right[0],
        "valid_right_after": right[-1],
        "step_seconds": median(times[1:] or times),  # the first has the warming up in it
        "step_bytes": next((row["step_bytes"] for row in rows if "step_bytes" in row), None),
        "adapter_bytes": sum(file.stat().st_size for file in folder.adapter.iterdir()),
        "seconds": round(max(row["seconds"] for row in rows), 1),
        "notes": task.notes,
        "samples": [
            {"prompt": task.tokenizer.decode(prompt), "before": before, "after": after}
            for prompt, (before, after) in zip(task.prompts, texts, strict=True)
        ],
    }


def total_steps(options: Finetune, steps_per_epoch: int) -> int:
    """How many updates the options ask for."""
    steps = max(1, math.ceil(options.epochs * steps_per_epoch))
    return min(steps, options.max_steps) if options.max_steps else steps


def samples(task: Task, options: Finetune, adapter: Adapter | None) -> list[str]:
    """What the model writes after the held-out prompts, greedily."""
    written = generate(
        task.model,
        task.params,
        task.prompts,
        adapter=adapter,
        max_new_tokens=options.max_new_tokens,
    )
    return [task.tokenizer.decode(ids) for ids in written]
