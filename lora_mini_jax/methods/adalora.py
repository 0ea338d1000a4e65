"""AdaLoRA (Zhang et al., arXiv 2303.10512): a budget of ranks, shared out among the kernels."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax

from lora_mini_jax.algebra.low_rank import LowRank
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors, Kernels, Method, Stepped
from lora_mini_jax.settings.checks import require_number, require_whole

AVERAGES = {name: (f"{name}_sensitivity", f"{name}_uncertainty") for name in ("A", "E", "B")}


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """AdaLoRA: ``W' = W + s A @ diag(E) @ B``; the least important entries of ``E`` are pruned.

    ``A (in, rank)``, ``E (rank,)`` and ``B (rank, out)`` are trained: ``rank (in + out + 1)``
    float32 parameters per kernel; ``s = alpha / (rank + 1e-5)``. ``A, B ~ N(0, 0.02^2)`` and
    ``E = 0``, so training starts at the unchanged model; a loss term keeps ``A, B`` orthonormal.

    A triplet (column of ``A``, entry of ``E``, row of ``B``) is scored by running averages of
    ``|parameter * gradient|`` and of its deviation. After update ``tinit`` the number that may stay
    falls along a cubic from ``rank`` a kernel to ``target_rank``, over all kernels with these
    settings. Every ``delta_t`` updates the lowest scores' ``E`` become 0, and may grow back until
    the next time; the pattern after update ``total_steps - tfinal`` (from 0), or the last, stays.

    Args:
        rank, alpha, dropout: as for `LoRA`; the rank is the one at the start.
        total_steps: how many updates the run has; the commands fill it in.
        target_rank: the mean rank in the end, at most ``rank``; by default two thirds of it.
        tinit, tfinal, delta_t: updates before pruning, with the final pattern, between prunings.
        beta1, beta2: of the running averages; orth_reg_weight: of the loss term.

    Raises:
        UserError: a number out of its range, or ``total_steps`` not above ``tinit + tfinal``.

    Example:
        >>> AdaLoRA(rank=4, target_rank=2).n_trainable(64, 32)
        388
    """

    name = "adalora"
    any_rank = True
    rank: int = 12
    total_steps: int = 1000
    target_rank: int | None = None
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("target_rank", self.goal)
        for name, low in {"total_steps": 1, "delta_t": 1, "tinit": 0, "tfinal": 0}.items():
            require_whole(name, getattr(self, name), low=low)
        require_number("orth_reg_weight", self.orth_reg_weight, low=0)
        require_number("beta1", self.beta1, below=1)
        require_number("beta2", self.beta2, below=1)
        if self.goal > self.rank:
            raise UserError(f"target_rank {self.goal} exceeds rank {self.rank}: lower it")
        if self.total_steps <= (both := self.tinit + self.tfinal):
            raise UserError(f"total_steps {self.total_steps} is not above tinit + tfinal = {both}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    @property
    def goal(self) -> int:
        return -(-2 * self.rank // 3) if self.target_rank is None else self.target_rank

    @property
    def stored(self) -> frozenset[str]:
        return frozenset({"kept", *(name for pair in AVERAGES.values() for name in pair)})

    scratch = stored

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        (n_in, n_out), r, (left, right) = kernel.shape, self.rank, jax.random.split(key)
        a = 0.02 * jax.random.normal(left, (n_in, r), jnp.float32)
        b = 0.02 * jax.random.normal(right, (r, n_out), jnp.float32)
        leaves = {"A": a, "E": jnp.zeros((r,), jnp.float32), "B": b}
        zeros = {new: jnp.zeros_like(leaves[n]) for n, pair in AVERAGES.items() for new in pair}
        return leaves, {**zeros, "kept": jnp.ones((r,), bool)}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.scale * factors["E"], factors["B"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank * (n_in + n_out + 1)

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        rank = min(size, n_in, n_out)
        return replace(self, rank=rank, target_rank=-(-rank * self.goal // self.rank))

    def penalty(self, factors: Factors) -> jax.Array | float:
        with jax.default_matmul_precision("highest"):
            errors = [m.T @ m - jnp.eye(self.rank) for m in (factors["A"], factors["B"].T)]
        # A plain norm has no gradient where the factor is orthonormal.
        return self.orth_reg_weight * sum(optax.safe_norm(error, 0.0) for error in errors) / 2

    def budget(self, t: int, n_kernels: int) -> int:
        """How many triplets of ``n_kernels`` kernels may stay after update ``t``."""
        goal, extra = self.goal * n_kernels, (self.rank - self.goal) * n_kernels
        left = 1 - (t - self.tinit) / (self.total_steps - self.tfinal - self.tinit)
        return int(extra * min(max(left, 0.0), 1.0) ** 3 + goal)

    def step(self, key: jax.Array, t: jax.Array, kernels: Kernels, grads: Kernels) -> Stepped:
        end, trainable = self.total_steps - self.tfinal, {}
        frozen = {path: self._averages(t, own, grads[path]) for path, own in kernels.items()}
        scores = {path: _scores(averages) for path, averages in frozen.items()}
        bar = self._bar(t, jnp.concatenate([jnp.ravel(s) for s in scores.values()]))
        last = min(end, self.total_steps - 1)
        decide = (t == last) | (t < end) & (t % self.delta_t == 0)
        for path, own in kernels.items():
            kept = jnp.where(decide, scores[path] > bar, own["kept"])
            trainable[path] = {"E": jnp.where((decide | (t > end)) & ~kept, 0.0, own["E"])}
            frozen[path]["kept"] = kept
        return Stepped(trainable, frozen, {})

    def _averages(self, t: jax.Array, own: Factors, grads: Factors) -> Factors:
        """One kernel's averages after update ``t``; from the last pruning on they stand still."""
        new, b1, b2, end = {}, self.beta1, self.beta2, self.total_steps - self.tfinal
        for name, (mean, deviation) in AVERAGES.items():
            now = jnp.abs(own[name] * grads[name])
            new[mean] = b1 * own[mean] + (1 - b1) * now
            new[deviation] = b2 * own[deviation] + (1 - b2) * jnp.abs(now - new[mean])
        return {name: jnp.where(t < end, leaf, own[name]) for name, leaf in new.items()}

    def _bar(self, t: jax.Array, scores: jax.Array) -> jax.Array:
        """The score that a triplet must exceed to stay, of all kernels' scores."""
        n, end = scores.size // self.rank, self.total_steps - self.tfinal
        # Tabulated in Python: float32 would round some budgets to the next whole number.
        budgets = jnp.asarray([self.budget(i, n) for i in range(end + 1)])
        out = scores.size - budgets[jnp.minimum(t, end)]
        return jnp.where(out > 0, jnp.sort(scores)[out - 1], -jnp.inf)


def _scores(averages: Factors) -> jax.Array:
    """Every triplet's score ``(*lead, rank)``: E's, plus the means over A's column, B's row."""
    a, e, b = (averages[AVERAGES[n][0]] * averages[AVERAGES[n][1]] for n in ("A", "E", "B"))
    return a.mean(-2) + e + b.mean(-1)
