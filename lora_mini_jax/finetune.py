"""The fine-tuning run: read, resume, train, evaluate, save. One function, in chapters."""

import math
from collections.abc import Callable

import jax
import numpy as np
import optax

from lora_mini_jax.adapter import Adapter, count, draw
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.decode import generate
from lora_mini_jax.meter import Meter
from lora_mini_jax.options import Finetune
from lora_mini_jax.report import run_report
from lora_mini_jax.runs import Row, RunFolder
from lora_mini_jax.storage import save
from lora_mini_jax.task import Task, prepare
from lora_mini_jax.train import TrainState, make_train_step

Log = Callable[[str], None]


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
    for note in task.notes:
        say(note)

    # The state at step 0, or at the newest checkpoint.
    steps = total_steps(options, len(task.train))
    tx = optimizer(options, steps)
    adapter = draw(task.params, task.sites, options.seed)
    state = TrainState.create(adapter, tx, options.seed)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state = checkpoints.restore(state) or state
        start = int(state.step)
        if start:
            say(f"going on from step {start} of {steps}")
        folder.rewind(start if start else -1)

        # Training, with the held-out loss before and after.
        evaluate = make_evaluate(task)
        step = make_train_step(task.loss, tx, has_aux=True)
        texts_before = samples(task, options, None)
        with Meter(options, folder, start, steps, learning_rate(options, steps)) as meter:
            if start == 0:
                meter.evaluated(evaluate(state.adapter))
            for i in range(start, steps):
                batch = task.train.batch(i)
                state, metrics = step(state, task.params, batch)
                meter.add(metrics, int(np.count_nonzero(batch["segment_ids"])))
                done_steps = i + 1
                if due(done_steps, options.eval_every, steps) and done_steps < steps:
                    meter.flush()
                    meter.evaluated(evaluate(state.adapter))
                if due(done_steps, options.save_every, steps):
                    meter.flush()  # also refuses to save after a loss that is not finite
                    checkpoints.save(state)
            meter.evaluated(evaluate(state.adapter))

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
    trainable = count(state.adapter)
    return {
        "model": options.model,
        "method": options.method,
        "settings": [m.to_dict() for m in dict.fromkeys(s.method for s in task.sites)],
        "seed": options.seed,
        "steps": int(state.step),
        "trainable": trainable,
        "trainable_share": trainable / sum(x.size for x in jax.tree.leaves(task.params)),
        "valid_loss_before": held_out[0],
        "valid_loss_after": held_out[-1],
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


def learning_rate(options: Finetune, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then the schedule the options name."""
    warmup = round(options.warmup_ratio * steps)
    rest, peak = max(1, steps - warmup), options.learning_rate
    falls: dict[str, optax.Schedule] = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    rise = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([rise, falls[options.schedule]], [warmup])


def optimizer(options: Finetune, steps: int) -> optax.GradientTransformation:
    """AdamW with the schedule, after clipping by the norm of the trained leaves' gradients."""
    return optax.chain(
        optax.clip_by_global_norm(options.max_grad_norm),
        optax.adamw(learning_rate(options, steps), weight_decay=options.weight_decay),
    )


def make_evaluate(task: Task) -> Callable[[Adapter], float]:
    """Compile ``evaluate(adapter)``: mean held-out loss, nats per token that counts."""
    compiled = jax.jit(task.summed_loss)

    def evaluate(adapter: Adapter) -> float:
        parts = [compiled(task.params, adapter, b) for b in task.valid.eval_batches()]
        total, number = np.sum(np.asarray(parts, np.float64), axis=0)
        return float(total / max(number, 1))

    return evaluate


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


def due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == last or (every is not None and step % every == 0)
