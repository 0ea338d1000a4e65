"""The training loop of every run: from the newest checkpoint to the last step."""

from collections.abc import Callable

import jax
import numpy as np
import optax

from lora_mini_jax.adapter import Adapter
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.meter import Meter
from lora_mini_jax.options import Training
from lora_mini_jax.runs import Row, RunFolder
from lora_mini_jax.schedule import learning_rate
from lora_mini_jax.task import Task
from lora_mini_jax.train import TrainState, make_train_step

Log = Callable[[str], None]


def fit(
    options: Training,
    folder: RunFolder,
    task: Task,
    adapter: Adapter,
    tx: optax.GradientTransformation,
    steps: int,
    say: Log,
) -> TrainState:
    """Train up to ``steps`` updates, from the newest checkpoint on; returns the last state.

    The folder gets metrics and checkpoints; the held-out loss is taken before, every so often and
    after. A run that was killed, and goes on, ends with the same state.

    Args:
        options: how often to log, evaluate and save, and the seed.
        folder: the run's.
        task: model, data and loss.
        adapter: where training starts.
        tx: the optimiser.
        steps: how many updates in all.
        say: what to do with a line of text for the user.

    Raises:
        UserError: a loss that is not finite; a damaged checkpoint; a full disk.
    """
    state = TrainState.create(adapter, tx, options.seed)
    evaluate, step = make_evaluate(task), make_train_step(task.loss, tx, has_aux=True)
    with Checkpoints(folder.checkpoints) as checkpoints:
        state = checkpoints.restore(state) or state
        start = int(state.step)
        if start:
            say(f"going on from step {start} of {steps}")
        folder.rewind(start if start else -1)
        with Meter(options, folder, start, steps, learning_rate(options, steps)) as meter:
            if start == 0:
                meter.evaluated(evaluate(state.adapter))
            if start < steps:
                step = step.lower(state, task.params, task.train.batch(start)).compile()
                meter.compiled(step)
            for i in range(start, steps):
                batch = task.train.batch(i)
                state, metrics = step(state, task.params, batch)
                meter.add(metrics, int(np.count_nonzero(batch["segment_ids"])))
                done = i + 1
                if _due(done, options.eval_every, steps) and done < steps:
                    meter.flush()
                    meter.evaluated(evaluate(state.adapter))
                if _due(done, options.save_every, steps):
                    meter.flush()  # also refuses to save after a loss that is not finite
                    checkpoints.save(state)
            meter.evaluated(evaluate(state.adapter))
    return state


def make_evaluate(task: Task) -> Callable[[Adapter], Row]:
    """Compile ``evaluate(adapter)``: on the held-out data, ``valid_loss``, the mean in nats per
    token that counts, and ``valid_right``, the share of examples predicted without a mistake."""
    compiled = jax.jit(task.score)

    def evaluate(adapter: Adapter) -> Row:
        parts = [compiled(task.params, adapter, b) for b in task.valid.eval_batches()]
        total, tokens, right, examples = np.sum(np.asarray(parts, np.float64), axis=0)
        return {
            "valid_loss": float(total / max(tokens, 1)),
            "valid_right": float(right / max(examples, 1)),
        }

    return evaluate


def _due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == last or (every is not None and step % every == 0)
