"""ReLoRA (Lialin et al., arXiv 2307.05695): LoRA that is merged and begun again, many times."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.algebra.draws import fold_path, split_key, uniform
from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.method import Factors, Kernels, Schedule, Stepped
from lora_mini_jax.settings.checks import require_whole
from lora_mini_jax.tree import over_lead


@dataclass(frozen=True)
class ReLoRA(LowRank):
    """ReLoRA: ``W' = W + dense + (alpha / rank) A @ B``; a sum of products, so of higher rank.

    ``A (in, rank)`` and ``B (rank, out)`` are trained, ``rank (in + out)`` float32 parameters per
    kernel, with ``A ~ U(-1/sqrt(in), 1/sqrt(in))`` and ``B = 0`` as in LoRA. ``dense (in, out)`` is
    zero at first. After every ``reset_every`` updates it takes up the product, ``A`` is drawn anew
    and ``B`` set to zero, so that the function stays as it is; and the optimiser begins both
    afresh. There the paper keeps a small share of Adam's states (it prunes up to 99 % of them by
    magnitude, or at random); we keep none. Its learning rate warms up again each time: `jagged`.
    Use it with `optim.scale_by_element_adam`, whose counters begin afresh too, and keep the kernels
    in float32.

    Args:
        rank: the inner width, at most ``min(in, out)``.
        alpha: the product is scaled by ``alpha / rank``.
        reset_every: how many updates each product is trained for.
        dropout: share of the layer's input that ``A`` and ``B`` do not see in training.

    Raises:
        UserError: a value that is not allowed.

    Example:
        >>> ReLoRA(rank=4, reset_every=500).n_trainable(64, 32)
        384
    """

    name = "relora"
    restarts = True

    reset_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("reset_every", self.reset_every)

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        n_in, n_out = kernel.shape
        b = jnp.zeros((self.rank, n_out), jnp.float32)
        dense = jnp.zeros((n_in, n_out), jnp.float32)
        return {"A": self._draw(key, n_in), "B": b}, {"dense": dense}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["B"]

    def shift(self, factors: Factors) -> jax.Array:
        return factors["dense"]

    def update(self, factors: Factors) -> jax.Array:
        return factors["dense"] + super().update(factors)

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out)

    @property
    def stored(self) -> frozenset[str]:
        return frozenset({"dense"})

    def notes(self, steps: int) -> list[str]:
        if steps > self.reset_every:
            return []
        return [f"no restart within {steps} steps, for reset_every is {self.reset_every}: give a "
                "lower --reset-every"]  # fmt: skip

    def rate(self, schedule: Schedule, warmup_ratio: float) -> Schedule:
        """Warms up again after every restart, over the same share of the steps to the next."""
        return jagged(schedule, self.reset_every, max(1, round(warmup_ratio * self.reset_every)))

    def step(self, key: jax.Array, t: jax.Array, kernels: Kernels, grads: Kernels) -> Stepped:
        due, stepped = (t + 1) % self.reset_every == 0, Stepped({}, {}, {})
        for path, factors in kernels.items():
            own = fold_path(key, path)
            lead = factors["A"].shape[:-2]
            keys = split_key(own, lead)
            restart = over_lead(self._restart, len(lead))
            after = jax.lax.cond(due, restart, lambda _, factors: factors, keys, factors)
            stepped.trainable[path] = {"A": after["A"], "B": after["B"]}
            stepped.frozen[path] = {"dense": after["dense"]}
            stepped.reset[path] = {"A": due, "B": due}
        return stepped

    def _restart(self, key: jax.Array, factors: Factors) -> Factors:
        """One matrix with its product moved into ``dense``."""
        return {
            "dense": self.update(factors),
            "A": self._draw(key, len(factors["A"])),
            "B": jnp.zeros_like(factors["B"]),
        }

    def _draw(self, key: jax.Array, n_in: int) -> jax.Array:
        return uniform(key, (n_in, self.rank), n_in**-0.5)


def jagged(schedule: Schedule, reset_every: int, warmup: int) -> Schedule:
    """A learning-rate schedule that warms up again after every reset (the paper's jagged cosine).

    Args:
        schedule: any optax schedule, its own warm-up included: the first ``reset_every`` updates
            follow it unchanged.
        reset_every: as for the method.
        warmup: over how many updates the rate rises, linearly, back to the schedule's.

    Raises:
        UserError: numbers that are not whole, or below 1.

    Example:
        >>> rate = jagged(lambda t: 1.0, reset_every=100, warmup=4)
        >>> [float(rate(t)) for t in (0, 99, 100, 101, 103, 199, 200)]
        [1.0, 1.0, 0.25, 0.5, 1.0, 1.0, 0.25]
    """
    require_whole("reset_every", reset_every)
    require_whole("warmup", warmup)

    def rate(t: Any) -> jax.Array:
        risen = jnp.minimum(1.0, (t % reset_every + 1) / warmup)
        return schedule(t) * jnp.where(t < reset_every, 1.0, risen)

    return rate
