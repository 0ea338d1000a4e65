"""The training loop of every run: from the newest checkpoint to the last step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.data.prefetch import prefetched
from lora_mini_jax.processes import on_host
from lora_mini_jax.runs.best import Best
from lora_mini_jax.runs.folder import Row
from lora_mini_jax.runs.meter import Meter
from lora_mini_jax.runs.preemption import EXIT_CODE, notices
from lora_mini_jax.runs.run import Run
from lora_mini_jax.runs.schedule import learning_rate
from lora_mini_jax.tasks.devices import ONE, Devices
from lora_mini_jax.tasks.task import Task
from lora_mini_jax.training.train import TrainState, make_train_step

tokens = jax.jit(jnp.count_nonzero)  # of all processes, each of which has only its rows at hand


def fit(
    run: Run[Any],
    task: Task,
    adapter: Adapter,
    tx: optax.GradientTransformation,
    steps: int,
    best: Best | None = None,
) -> TrainState:
    """Train up to ``steps`` updates, from the newest checkpoint on; returns the last state.

    The folder gets metrics and checkpoints; the held-out loss is taken before, every so often and
    after. A run that was killed, and goes on, ends with the same state. One that is asked to end
    (SIGTERM) saves a checkpoint, and exits.

    Args:
        run: how often to log, evaluate and save, where to, and the seed.
        task: model, data and loss.
        adapter: where training starts. Its arrays become the state's, so that nothing is held
            twice, and are gone after the first step.
        tx: the optimiser.
        steps: how many updates in all.
        best: where the best adapter is kept, if it is; every evaluation then has a checkpoint.

    Raises:
        UserError: a loss that is not finite; a damaged checkpoint; a full disk.
        SystemExit: it was asked to end.
    """
    options, folder, devices = run.options, run.folder, run.devices
    adapter = devices.adapter(adapter)
    state = devices.state(TrainState.create(adapter, tx, options.seed, copy=False))
    every = options.eval_every or task.eval_every
    evaluate = make_evaluate(task, devices)
    step = make_train_step(
        task.loss, tx, has_aux=True, parts=options.accumulate, like=state if devices.mesh else None
    )
    with Checkpoints(folder.checkpoints) as checkpoints:
        if checkpoints.latest() is not None:
            state = checkpoints.restore(emptied(state)) or state
        start = int(state.step)
        if start:
            run.say(f"going on from step {start} of {steps}")
        folder.metrics.rewind(start if start else -1)
        if best and start:
            best.update(state)
        with (
            Meter(options, folder, start, steps, learning_rate(options, steps)) as meter,
            notices() as asked,
            prefetched(partial(devices.batch, task.train), start, steps) as batches,
        ):
            if start == 0:
                meter.evaluated(evaluate(state.adapter))
                if best:
                    best.update(state)
            for done, batch in enumerate(meter.waits(batches), start + 1):
                if done == start + 1:
                    # JAX keeps the program, and the call takes it: the compiled object itself would
                    # refuse 4-bit arrays that are on a mesh, for it compares layouts.
                    meter.compiled(step.lower(state, task.params, batch).compile())
                state, metrics = step(state, task.params, batch)
                meter.add(metrics, tokens(batch["segment_ids"]))
                evaluated = done < steps and _due(done, every, steps)
                if evaluated:
                    meter.flush()
                    meter.evaluated(evaluate(state.adapter))
                ends = asked()
                if ends or _due(done, options.save_every, steps) or (best and evaluated):
                    meter.flush()  # also refuses to save after a loss that is not finite
                    checkpoints.save(state)
                    if best and evaluated:
                        checkpoints.wait()
                        best.update(state)
                    meter.saved()
                if ends and done < steps:
                    break
            else:
                meter.evaluated(evaluate(state.adapter))
                if best:
                    checkpoints.wait()
                    best.update(state)
                return state
    run.say(f"asked to end: step {done} of {steps} is saved; the same command goes on from there")
    raise SystemExit(EXIT_CODE)


def emptied(state: TrainState) -> TrainState:
    """The state with shapes for what a checkpoint brings, whose arrays are freed: fresh and read,
    all of it would be in memory twice."""

    def shape(leaf: jax.Array) -> Any:
        found = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        leaf.delete()
        return found

    adapter = state.adapter
    trainable, kept, opt_state = jax.tree.map(
        shape, (adapter.trainable, adapter.kept(), state.opt_state)
    )
    adapter = adapter.with_trainable(trainable).with_kept(kept)
    return replace(state, adapter=adapter, opt_state=opt_state)


def make_evaluate(task: Task, devices: Devices = ONE) -> Callable[[Adapter], Row]:
    """Compile ``evaluate(adapter)``, which gives the task's measures on the held-out data."""
    compiled = jax.jit(task.score)

    def evaluate(adapter: Adapter) -> Row:
        rows = task.valid.in_order
        with prefetched(partial(devices.batch, rows), 0, len(rows)) as batches:
            scores = [compiled(task.params, adapter, batch) for batch in batches]
        return task.measures(on_host(scores))

    return evaluate


def _due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == last or (every is not None and step % every == 0)
