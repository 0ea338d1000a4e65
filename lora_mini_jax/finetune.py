"""The fine-tuning run: read, resume, train, evaluate, save. One function, in chapters."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from lora_mini_jax.adapter import Adapter, count, draw
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.decode import generate
from lora_mini_jax.errors import UserError
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

        # Before.
        evaluate = make_evaluate(task)
        if start == 0:
            before = evaluate(state.adapter)
            folder.log([{"step": 0, "valid_loss": before, "seconds": 0.0}])
        texts_before = samples(task, options, None)

        # Training.
        step = make_train_step(task.loss, tx, has_aux=True)
        with Meter(options, folder, start, steps, task) as meter:
            for i in range(start, steps):
                state, metrics = step(state, task.params, task.train.batch(i))
                meter.add(metrics)
                done_steps = i + 1
                if due(done_steps, options.eval_every, steps) and done_steps < steps:
                    meter.flush()
                    meter.evaluated(evaluate(state.adapter))
                if due(done_steps, options.save_every, steps):
                    meter.flush()  # also refuses to save after a loss that is not finite
                    checkpoints.save(state)

    # After.
    after = evaluate(state.adapter)
    meter.evaluated(after)
    save(folder.adapter, state.adapter, task.params, base=options.model)
    rows = folder.metrics()
    summary = {
        "model": options.model,
        "method": options.method,
        "settings": [m.to_dict() for m in dict.fromkeys(s.method for s in task.sites)],
        "seed": options.seed,
        "steps": steps,
        "trainable": count(state.adapter),
        "trainable_share": count(state.adapter) / sum(x.size for x in jax.tree.leaves(task.params)),
        "valid_loss_before": next(r["valid_loss"] for r in rows if "valid_loss" in r),
        "valid_loss_after": after,
        "adapter_bytes": sum(f.stat().st_size for f in folder.adapter.iterdir()),
        "seconds": round(max(r["seconds"] for r in rows), 1),
        "notes": task.notes,
        "samples": [
            {"prompt": task.tokenizer.decode(p), "before": b, "after": a}
            for p, b, a in zip(
                task.prompts, texts_before, samples(task, options, state.adapter), strict=True
            )
        ],
    }
    run_report(folder.path, summary, rows)
    folder.finish(summary)
    return summary


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


class Meter:
    """Progress bar, metrics.jsonl and TensorBoard, without waiting for the device at every step."""

    def __init__(
        self, options: Finetune, folder: RunFolder, start: int, steps: int, task: Task
    ) -> None:
        self._options, self._folder, self._step = options, folder, start
        self._rate = learning_rate(options, steps)
        rows = folder.metrics()
        self._before = max((row["seconds"] for row in rows), default=0.0)
        self._began, self._last, self._pending = time.monotonic(), time.monotonic(), []
        self._tokens = options.batch_size * options.max_length
        self._bar = tqdm(total=steps, initial=start, unit="step", desc=options.method)
        self._board = _board(folder) if options.tensorboard else None

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.close()

    def add(self, metrics: Any) -> None:
        """Note one step; every ``log_every`` steps they are written."""
        self._pending.append(metrics)
        self._step += 1
        self._bar.update()
        if self._step % self._options.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Fetch and write what is pending.

        Raises:
            UserError: a loss or gradient that is not finite, with its step.
        """
        if not self._pending:
            return
        losses, norms = np.asarray([(m.loss, m.grad_norm) for m in self._pending], np.float64).T
        first = self._step - len(self._pending)
        bad = np.flatnonzero(~np.isfinite(losses) | ~np.isfinite(norms))
        if bad.size:
            raise UserError(
                f"loss {losses[bad[0]]} with gradient norm {norms[bad[0]]} at step "
                f"{first + bad[0] + 1}: stopped; the checkpoints from before are kept in "
                f"{self._folder.checkpoints}. Lower --learning-rate, or look at the data"
            )
        now = time.monotonic()
        speed = len(losses) * self._tokens / max(now - self._last, 1e-9)
        self._last, self._pending = now, []
        row = {"loss": losses.mean(), "grad_norm": norms.mean(), "tokens_per_second": speed}
        row["learning_rate"] = np.asarray(self._rate(self._step - 1)).item()
        self._bar.set_postfix({"loss": f"{losses.mean():.3f}", "tok/s": f"{speed:.0f}"})
        self._write({name: float(value) for name, value in row.items()})

    def evaluated(self, valid_loss: float) -> None:
        """Write a held-out loss; the time it took is not counted as training speed."""
        self._last = time.monotonic()
        self._write({"valid_loss": valid_loss})

    def _write(self, row: Row) -> None:
        seconds = round(self._before + time.monotonic() - self._began, 3)
        self._folder.log([{"step": self._step, **row, "seconds": seconds}])
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, self._step)
            self._board.flush()


def _board(folder: RunFolder) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboardX: pip install tensorboardX") from None
    return SummaryWriter(str(folder.path / "tensorboard"))
