"""The search as the first phase of a fine-tuning run: done once, written down, gone on from."""

import time

import numpy as np
import optax
from tqdm import tqdm

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.files import write_json, writes
from lora_mini_jax.methods.diffora import DiffoRA
from lora_mini_jax.options import Finetune
from lora_mini_jax.processes import on_host
from lora_mini_jax.runs.loop import make_evaluate
from lora_mini_jax.runs.meter import Diverged
from lora_mini_jax.runs.run import Run
from lora_mini_jax.runs.schedule import optimizer
from lora_mini_jax.saved.storage import load, save
from lora_mini_jax.search.choice import common_method, discretise
from lora_mini_jax.search.search import check_halves, halves, make_search_step, search_state
from lora_mini_jax.tasks.task import Task

LEAST_STEPS = 20


def searched(
    run: Run[Finetune],
    task: Task,
    adapter: Adapter,
    steps: int,
) -> Adapter:
    """Where training starts: an ordinary adapter of the kernels that DiffoRA's search chose.

    Adapters of other methods come back as they are. The matrix goes to ``matrix.json`` in the run's
    folder, the adapter to ``searched/``; once that is there, a run that starts again reads it.
    Before that the search starts again, and chooses the same.

    Args:
        run: its options are for the optimiser, whose whole schedule the search goes through in its
            own steps, for the seed, and for how often to log.
        task: model, data and loss; the search halves the training data.
        adapter: freshly drawn.
        steps: how many updates there will be after the search.

    Raises:
        UserError: settings that one search cannot have, too little data, a loss that is not finite.
    """
    method = common_method(adapter.sites)
    if method is None:
        return adapter
    folder = run.folder
    place = folder.path / "searched"
    if not place.exists():
        n = method.search_steps or max(LEAST_STEPS, steps // 10)
        found = search(run, task, adapter, method, n)
        matrix, chosen = discretise(found, method.rho, method.sharing)
        write_json(folder.path / "matrix.json", {**matrix, "method": method.to_dict(), "steps": n})
        save(place, chosen, task.params, base=run.options.model)
        run.say(f"searched for {n} steps: {len(chosen.trainable)} adapters for "
                f"{len(chosen.sites)} of {len(adapter.sites)} kernels")  # fmt: skip
    # Read back even when just written: a run that was killed goes on from the same bits.
    return load(place, task.params)


def check_search(task: Task) -> None:
    """Raise `UserError` where the task's sites need a search that could not begin."""
    if common_method(task.sites) is not None:
        check_halves(task.train)


def search(
    run: Run[Finetune],
    task: Task,
    adapter: Adapter,
    method: DiffoRA,
    steps: int,
) -> Adapter:
    """The adapter after ``steps`` steps of gates and weights; in the metrics these count from
    ``-steps``, and begin with the held-out loss before anything is trained."""
    options, folder, devices = run.options, run.folder, run.devices
    train, valid = halves(task.train, options.seed)
    tx = optimizer(options, steps, adapter.sites, options.lora_plus_ratio)
    tx_gate = optax.adam(method.gate_learning_rate)
    state = devices.state(search_state(devices.adapter(adapter), tx, tx_gate, options.seed))
    like = state if devices.mesh else None
    step = make_search_step(
        task.loss, tx, tx_gate, has_aux=True, parts=options.accumulate, like=like
    )
    pending, began = [], time.monotonic()
    before = {"step": -steps, **make_evaluate(task, devices)(adapter), "seconds": 0.0}
    folder.metrics.rewind(-steps - 1)
    folder.metrics.log([before])
    for i in tqdm(range(steps), unit="step", desc="search", disable=not writes()):
        batches = devices.batch(train, i), devices.batch(valid, i)
        state, metrics = step(state, task.params, *batches)
        pending.append(on_host(metrics))
        if (i + 1) % options.log_every == 0 or i + 1 == steps:
            loss, gate_loss = np.asarray(pending, np.float64).T.mean(1).tolist()
            if not np.isfinite(loss + gate_loss):
                raise Diverged(
                    f"the search's loss is not finite by its step {i + 1}: lower --learning-rate "
                    "or --gate-learning-rate, or look at the data",
                    step=i - steps,
                )
            seconds = round(time.monotonic() - began, 3)
            row = {"loss": loss, "gate_loss": gate_loss, "seconds": seconds}
            folder.metrics.log([{"step": i - steps, **row}])
            pending = []
    return state.adapter
