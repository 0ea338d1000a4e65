"""The pre-training run: a Llama from scratch, by any method, with what an update costs.

In data-parallel training the devices exchange the gradients of the trained leaves alone, 4 bytes a
parameter. SwitchLoRA's pools and dense part, and ReLoRA's, are not exchanged: every device draws
the same switches and restarts from the run's key, and makes the same changes to equal leaves.
"""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from lora_mini_jax.adapters.adapter import count
from lora_mini_jax.adapters.sites import methods_of
from lora_mini_jax.adapters.transform import merge
from lora_mini_jax.files import writes
from lora_mini_jax.models import save
from lora_mini_jax.options import Pretrain
from lora_mini_jax.runs.folder import Row, RunFolder
from lora_mini_jax.runs.loop import fit
from lora_mini_jax.runs.meter import typical
from lora_mini_jax.runs.outcome import Outcome
from lora_mini_jax.runs.plots import loss_curves
from lora_mini_jax.runs.report import points, write_page
from lora_mini_jax.runs.run import Log, Run
from lora_mini_jax.runs.schedule import optimizer
from lora_mini_jax.runs.scratch import begin, prepare
from lora_mini_jax.runs.settings_page import settings_html
from lora_mini_jax.runs.tables import table_html, table_text
from lora_mini_jax.tasks.task import Task
from lora_mini_jax.training.train import TrainState

COLUMNS = {
    "method": "method",
    "trainable": "trained parameters",
    "exchanged_bytes": "bytes exchanged a step",
    "optimizer_bytes": "optimiser bytes",
    "frozen_bytes": "bytes the method carries",
    "before": "held-out perplexity before",
    "after": "held-out perplexity after",
    "tokens_per_second": "tokens a second",
}


def pretrain(options: Pretrain, say: Log = print) -> Row:
    """Run, or go on with, one pre-training run; returns its summary.

    A run that was killed goes on from its newest checkpoint and ends with the same model. A run
    that is finished is not run again: its summary is returned. The finished model is written in
    Hugging Face layout, with its tokenizer, so that ``finetune --model`` takes it.

    Args:
        options: see `Pretrain`.
        say: what to do with a line of text for the user.

    Returns:
        Among others ``trainable`` (parameters), ``exchanged_bytes`` (see above), those of the
        optimiser's arrays (``optimizer_bytes``), of the frozen leaves of the method
        (``frozen_bytes``) and of the parameters under it (``base_bytes``, the same for every
        method), held-out ``perplexity`` by step, and ``tokens_per_second``, a median
        over the steps.

    Raises:
        UserError: anything wrong with the options, the shape, the tokenizer, the text or the run
            folder; a loss that is not finite; a full disk.
    """
    run = Run(options, say)
    if done := run.finished():
        return done
    run.check()
    task = prepare(options)
    with run.folder.alone():
        return train(run, task)


def train(run: Run[Pretrain], task: Task) -> Row:
    """All of `pretrain` that writes: the run whose task is prepared; returns its summary."""
    options, folder, devices, say = run.options, run.folder, run.devices, run.say
    folder.create(train=task.train, valid=task.valid)
    for note in task.notes:
        say(note)
    say(f"{task.train.packed.loss_mask.sum():,} tokens to train on, "
        f"{task.valid.packed.loss_mask.sum():,} held out")  # fmt: skip

    params, adapter = begin(task.params, devices.draw(task.params, task.sites, options.seed))
    task, tx = replace(task, params=params), optimizer(options, options.steps, task.sites)
    state = fit(run, task, adapter, tx, options.steps)

    if writes():  # what a run that was killed right after it has left
        shutil.rmtree(folder.model, ignore_errors=True)
    merged = merge(task.params, state.adapter)
    save(folder.model, task.model, merged, tokenizer_from=options.tokenizer)
    summary = summarize(options, task, state, folder)
    report(folder, options, summary)
    folder.finish(summary)
    say(table_text([table_row(summary)], COLUMNS))
    say(f"model:  {folder.model}\nreport: {folder.path / 'report.html'}")
    return summary


def summarize(options: Pretrain, task: Task, state: TrainState, folder: RunFolder) -> Row:
    """What a finished run found."""
    rows, config = folder.metrics.rows(), task.model.config
    losses = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    size = sum(leaf.size for leaf in jax.tree.leaves(task.params))
    trainable = count(state.adapter)
    return {
        "model": f"a Llama of {size:,} parameters, {config.hidden_size} wide and "
        f"{config.num_hidden_layers} layers deep",
        "method": options.method,
        "settings": [m.to_dict() for m in methods_of(task.sites)],
        "seed": options.seed,
        "steps": int(state.step),
        "parameters": size,
        "trainable": trainable,
        "exchanged_bytes": 4 * trainable,
        "optimizer_bytes": n_bytes(state.opt_state),
        "frozen_bytes": n_bytes(state.adapter.frozen),
        "base_bytes": n_bytes(task.params),
        "train_tokens": int(task.train.packed.loss_mask.sum()),
        "valid_tokens": int(task.valid.packed.loss_mask.sum()),
        "valid_loss_before": losses[0],
        "valid_loss_after": losses[options.steps],
        "perplexity": {str(step): perplexity(loss) for step, loss in losses.items()},
        "tokens_per_second": typical(rows, "tokens_per_second"),
        "seconds": round(max(row["seconds"] for row in rows), 1),
        "notes": task.notes,
    }


def n_bytes(tree: Any) -> int:
    """Bytes of all the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def perplexity(loss: float) -> float:
    """``exp(loss)``, kept finite so that it is JSON."""
    return math.exp(min(loss, 700.0))


def table_row(summary: Row) -> dict[str, str]:
    """The summary as a line of the table."""
    counts = ("trainable", "exchanged_bytes", "optimizer_bytes", "frozen_bytes")
    return {
        "method": summary["method"],
        **{name: f"{summary[name]:,}" for name in counts},
        "before": f"{perplexity(summary['valid_loss_before']):.1f}",
        "after": f"{perplexity(summary['valid_loss_after']):.2f}",
        "tokens_per_second": f"{summary['tokens_per_second']:,.0f}",
    }


def report(folder: RunFolder, options: Pretrain, summary: Row) -> Path:
    """Write ``report.html``; returns its path."""
    name, metrics = summary["method"], folder.metrics.rows()
    return write_page(
        folder.path / "report.html",
        f"Pre-training with {name}",
        table_html([table_row(summary)], COLUMNS),
        loss_curves({name: points(metrics, "loss")}, {name: points(metrics, "valid_loss")}),
        settings_html({name: [Outcome(options, summary)]}),
    )
