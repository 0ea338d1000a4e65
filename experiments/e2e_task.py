"""E2E as a task for the sweeps: data, and training one adapter on it at one learning rate."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_mini_jax import TrainState, linen, make_train_step
from lora_mini_jax.adapters.adapter import Adapter, draw
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.data import (
    Batches,
    Fields,
    Packed,
    encode_records,
    load_tokenizer,
    pack,
    read_records,
    token_loss,
)
from lora_mini_jax.models import load
from lora_mini_jax.selection import select
from lora_mini_jax.training.calibration import calibrate

CALIBRATION_BATCHES = 8

Losses = tuple[float, float]
"""On the held-out lines for tuning, then on those for reporting."""


@dataclass(frozen=True)
class TaskOptions:
    """The task and the training; the defaults made the committed results."""

    model: Path
    """Folder of the base model."""
    data: Path
    """E2E training lines (jsonl)."""
    valid: Path
    """E2E validation lines (jsonl)."""
    lines: int = 2000
    """Training lines, of those of at most ``length`` tokens."""
    held_out: int = 250
    """At most this many held-out lines for tuning, and as many others for reporting."""
    length: int = 112
    batch: int = 4
    epochs: int = 1


class Task:
    """Base models, data and the compiled programs, one set for all configurations."""

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        self.model, params = load(options.model)
        example = jnp.zeros((1, 8), jnp.int32)
        self.bases = {
            "pretrained": params,
            "random": self.model.init(jax.random.key(7), example)["params"],
        }
        self.targets = select(linen.targets(self.model, params, example))
        self.train, self.tuning, self.reporting = read(options)
        self.apply = linen.adapt(self.model)
        self.summed = jax.jit(self.summed_loss)
        self._started: dict[Any, Adapter] = {}

    def summed_loss(self, params: Any, adapter: Adapter | None, batch: dict) -> tuple[Any, Any]:
        """Sum of the loss over completion tokens, and their number. No mask is needed: rows hold
        one example each, padded at the end."""
        if adapter is None:
            logits: Any = self.model.apply({"params": params}, batch["tokens"])
        else:
            logits = self.apply(params, adapter, batch["tokens"])
        return token_loss(logits, batch)

    def loss(self, params: Any, adapter: Adapter, batch: dict, key: Any) -> jax.Array:
        """Mean loss over completion tokens."""
        total, number = self.summed_loss(params, adapter, batch)
        return total / number

    @property
    def steps(self) -> int:
        """Updates in a run."""
        return self.options.epochs * len(Batches(self.train, self.options.batch, 0))

    @functools.cached_property
    def optimiser(self) -> optax.GradientTransformation:
        """Adam whose learning rate rises for a twentieth of the steps and falls to 0; the peak is
        part of its state, so that one compiled step serves all of them."""

        def with_peak(peak: Any) -> optax.GradientTransformation:
            warm = max(1, self.steps // 20)
            rise = optax.linear_schedule(1 / warm, 1.0, warm - 1)
            fall = optax.linear_schedule(1.0, 0.0, self.steps - warm)
            shape = optax.join_schedules([rise, fall], [warm])
            return optax.chain(
                optax.scale_by_adam(), optax.scale_by_schedule(shape), optax.scale(-peak)
            )

        return optax.inject_hyperparams(with_peak)(peak=1.0)

    @functools.cached_property
    def step(self) -> Any:
        """The compiled training step."""
        return make_train_step(self.loss, self.optimiser)

    def run(self, params: Any, sites: tuple[Site, ...], peak: float, seed: int) -> Losses:
        """Train one adapter; its held-out losses, infinite if it diverged."""
        batches = Batches(self.train, self.options.batch, seed)
        if (sites, seed) not in self._started:
            some = [batches.batch(i) for i in range(CALIBRATION_BATCHES)]
            drawn = draw(params, sites, seed)
            self._started = {(sites, seed): calibrate(drawn, params, self.loss, some)}
        state = TrainState.create(self._started[sites, seed], self.optimiser)
        state.opt_state.hyperparams["peak"] = jnp.asarray(peak, jnp.float32)
        for i in range(self.steps):
            state, _ = self.step(state, params, batches.batch(i))
        losses = (
            self.evaluate(params, state.adapter, self.tuning),
            self.evaluate(params, state.adapter, self.reporting),
        )
        print(f"  lr {peak:g}, seed {seed}: {losses}", flush=True)
        return losses if np.isfinite(sum(losses)) else (np.inf, np.inf)

    def evaluate(self, params: Any, adapter: Adapter | None, rows: Packed) -> float:
        """Mean nats per completion token."""
        batches = Batches(rows, 16, 0).eval_batches()
        parts = [self.summed(params, adapter, batch) for batch in batches]
        total, number = np.sum(np.asarray(parts, np.float64), axis=0)
        return float(total / number)


def read(options: TaskOptions) -> tuple[Packed, Packed, Packed]:
    """Rows to train on, to tune on and to report: the last two share no meaning representation."""
    tokenizer = load_tokenizer(options.model)
    fields = Fields(prompt_field="meaning_representation", completion_field="reference")

    def rows(records: list, most: int) -> Packed:
        found = encode_records(records, tokenizer, fields, max_length=options.length).examples
        at = np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)
        return pack([found[i] for i in at], options.length, packing=False)

    valid = read_records(options.valid)
    half = set(sorted({record["meaning_representation"] for record in valid})[::2])
    first = [record for record in valid if record["meaning_representation"] in half]
    second = [record for record in valid if record["meaning_representation"] not in half]
    train = rows(read_records(options.data), options.lines)
    return train, rows(first, options.held_out), rows(second, options.held_out)
