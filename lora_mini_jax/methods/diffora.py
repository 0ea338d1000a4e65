"""DiffoRA (arXiv 2502.08905), reconstructed: a gate per kernel learns which kernels get an adapter.

The paper has a matrix of layers by modules, relaxed to (0, 1) and learned by bi-level optimisation,
a selection ratio, and sharing after the choice; how it is relaxed, how the data are split and who
shares is our reading, for there is no public code. Its search is in ``search/``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import softmax
from lora_mini_jax.method import Factors, Kernels, Method
from lora_mini_jax.settings.checks import require_choice, require_number, require_whole
from lora_mini_jax.tree import float32

Relaxation = Literal["sigmoid", "softmax"]
Sharing = Literal["none", "layer", "column"]
GATE, OPENING = "gate", "opening"
HOOKS = ("shift", "relate", "penalty", "held", "step")


def _inner(name: str) -> Any:
    return property(lambda self: getattr(self.inner, name))  # the inner method's own


@dataclass(frozen=True)
class DiffoRA(Method):
    """DiffoRA: ``W' = W + g (inner(W) - W)``, with ``g = sigmoid(gate)`` trained beside the rest.

    Trains the inner method's leaves and ``gate``, a float32 scalar per matrix, 0 at the start;
    `search.make_search_step` trains the gates on data that the rest does not see, and
    `choice.discretise` keeps the kernels with the widest gates. The command ``finetune`` does both
    and goes on with an ordinary adapter of the inner method.

    Args:
        inner: what adapts the chosen kernels: LoRA, LoRA-Mini, MiSS, or another whose update does
            not depend on the kernel and that takes no steps of its own. Overrides reach it.
        rho: share of a layer's kernels that are chosen, above 0, at most 1; one at least.
        relaxation: ``"sigmoid"``, or ``"softmax"``: ``g_j = N softmax(gate)_j`` over the ``N``
            matrices of a layer, which then compete; a matrix seen alone has ``g = 1``.
        sharing: what the other kernels get. ``"none"``: no adapter. ``"layer"``: one for all in
            the same layer and of the same shape. ``"column"``: one for all of the same name and
            shape, in all layers.
        search_steps: steps of the search; by default a tenth of the training, at least 20.
        gate_learning_rate: of the gates' Adam.
        dropout: the inner method's; give it there.

    Raises:
        UserError: no inner method, or one that cannot be gated; a setting out of its range.

    Example:
        >>> from lora_mini_jax.methods import from_spec
        >>> from_spec("diffora:inner=lora(rank=4),rho=0.5").n_trainable(64, 32)
        385
    """

    name = "diffora"
    takes_dropout = False

    inner: Method = None  # ty: ignore[invalid-assignment]  # `_check_inner` says what to give
    rho: float = 0.5
    relaxation: Relaxation = "sigmoid"
    sharing: Sharing = "none"
    search_steps: int | None = None
    gate_learning_rate: float = 0.05

    def __post_init__(self) -> None:
        self._check_inner()
        for name in ("dropout", "shares_draw", "redrawn_within"):
            object.__setattr__(self, name, getattr(self.inner, name))
        require_number("rho", self.rho)
        if self.rho > 1:
            raise UserError(f"rho is {self.rho}: give a number above 0, at most 1")
        require_choice("relaxation", self.relaxation, Relaxation)
        require_choice("sharing", self.sharing, Sharing)
        if self.search_steps is not None:
            require_whole("search_steps", self.search_steps)
        require_number("gate_learning_rate", self.gate_learning_rate)

    def _check_inner(self) -> None:
        if not isinstance(self.inner, Method):
            raise UserError(f"{self.name} needs an inner method for the chosen kernels, not "
                            f"{self.inner!r}: --inner lora-mini, or 'lora(rank=4)'")  # fmt: skip
        name, mine = self.inner.name, type(self.inner)
        if own := [hook for hook in HOOKS if getattr(mine, hook) is not getattr(Method, hook)]:
            raise UserError(f"{self.name} cannot gate {name}, which has a {', '.join(own)} of its "
                            "own: choose --inner lora-mini, lora, lora-fa or miss")  # fmt: skip
        if self.dropout not in (0, self.inner.dropout):
            raise UserError(f"dropout is the inner method's: --inner '{name}(dropout=...)'")

    stored, scratch, needs_data = _inner("stored"), _inner("scratch"), _inner("needs_data")
    gradient_rank, from_data, sizes = _inner("gradient_rank"), _inner("from_data"), _inner("sizes")

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        trainable, frozen = self.inner.init(key, kernel)
        return {**trainable, GATE: jnp.zeros((), jnp.float32)}, frozen

    def opening(self, factors: Factors) -> jax.Array:
        """``g``: float32, in the gate's shape."""
        if self.relaxation == "sigmoid":
            return jax.nn.sigmoid(factors[GATE])
        return factors.get(OPENING, jnp.ones_like(factors[GATE]))

    def relate(self, kernels: Kernels, stacked: Collection[str]) -> Kernels:
        if self.relaxation == "sigmoid":
            return kernels
        opened = softmax({path: own[GATE] for path, own in kernels.items()}, stacked)
        return {path: {**own, OPENING: opened[path]} for path, own in kernels.items()}

    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        y = self.inner.delta(x, kernel, factors)
        return self.opening(factors).astype(y.dtype) * y

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        return self.opening(factors) * self.inner.rows(ids, kernel, factors)

    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        return float32(kernel) + self._update(kernel, factors)

    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        return float32(merged) - self._update(merged, factors)

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.inner.n_trainable(n_in, n_out) + 1

    def thin(self, factors: Factors, n_in: int, n_out: int) -> tuple[jax.Array, jax.Array] | None:
        inner = self.inner.thin(factors, n_in, n_out)
        return inner and (inner[0], self.opening(factors) * inner[1])

    def sized(self, size: int, n_in: int, n_out: int) -> Method:
        return replace(self, inner=self.inner.sized(size, n_in, n_out))

    def problems(self, n_in: int, n_out: int) -> list[str]:
        why = f"the update of {self.inner.name} depends on the kernel: no gate for it"
        return self.inner.problems(n_in, n_out) + [why] * self.inner.reads_kernel

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        own = {n: v for n, v in settings.items() if n in self.field_names() and n != "dropout"}
        inner = self.inner.with_settings({n: v for n, v in settings.items() if n not in own})
        return replace(self, **{"inner": inner, **self.checked(own)}, dropout=0.0)

    def _update(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        """``g (inner(W) - W)``; as it does not depend on ``W``, no small difference is lost."""
        return self.opening(factors) * self.inner.merge(jnp.zeros_like(float32(kernel)), factors)
