"""What an adapter method is: a frozen dataclass of pure functions over one kernel matrix.

The object is the configuration and the algorithm; it holds no arrays. Every function sees a single
matrix ``(in, out)`` in Flax layout (``y = x @ kernel``). Stacked layers, attention heads, einsum
axes and transposed kernels are dealt with once, in ``adapters/`` and ``call/``, so a method is a
page of formulas. What few methods need (a dense update, a step of their own, kernels that depend
on each other) are hooks with defaults that do nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.settings.checks import require_number
from lora_mini_jax.settings.settings import Settings

Factors = dict[str, jax.Array]
"""A kernel's adapter leaves by name, trainable and frozen ones together."""

Schedule = Callable[[Any], Any]
"""A number by update, as optax has them."""

Kernels = Mapping[str, Factors]
"""The leaves of several kernels, by path."""


class Stepped(NamedTuple):
    """What `Method.step` changed: only the leaves that did, by path and name.

    ``reset`` holds masks, of shapes that broadcast to the trainable leaves they are named after:
    where True, the optimiser forgets its moments and counts from zero.
    """

    trainable: dict[str, Factors]
    frozen: dict[str, Factors]
    reset: dict[str, Factors]


@dataclass(frozen=True)
class Method(Settings, ABC):
    """An adapter method. Subclass it, and give it one line in ``methods/__init__.py``.

    The laws it must obey are in ``tests/test_laws.py``: ``shift + delta(x) == x @ (merge(W) - W)``,
    merging and unmerging return the kernel, every trainable leaf gets a gradient, no frozen one
    does.

    Args:
        dropout: share of a layer's input that the adapter does not see, anew at every training
            step; the frozen kernel sees all of it, and so does the adapter in evaluation.

    Example:
        One trained vector between random factors. `low_rank.Product` gives what follows from the
        matrices; a method of another form gives the abstract functions below itself.

        >>> from lora_mini_jax.algebra.low_rank import Product
        >>> @dataclass(frozen=True)
        ... class Middle(Product):
        ...     name = "middle"
        ...     def init(self, key, kernel):
        ...         keys, (n_in, n_out) = jax.random.split(key), kernel.shape
        ...         A = jax.random.normal(keys[0], (n_in, self.rank)) / n_in**0.5
        ...         B = jax.random.normal(keys[1], (self.rank, n_out)) / self.rank**0.5
        ...         return {"d": jnp.zeros(self.rank)}, {"A": A, "B": B}
        ...     def chain(self, factors):
        ...         return factors["A"], factors["d"], factors["B"]
        ...     def n_trainable(self, n_in, n_out):
        ...         return self.rank
        >>> Middle(rank=4).n_trainable(64, 32)
        4
    """

    default_targets: ClassVar[str | tuple[str, ...]] = "all-linear"
    """What it adapts when nobody says, in the words of `selection.select`."""

    adapts_any_array: ClassVar[bool] = False
    """Whether it can train parameters that are not matrices: biases, norms, tables."""

    shares_draw: ClassVar[bool] = False
    """Whether all kernels are drawn from the same key, and so share what they draw."""

    redrawn_within: ClassVar[float] = 1e-2
    """How far a frozen leaf that is drawn again may be from the one trained with, relatively."""

    restarts: ClassVar[bool] = False
    """Whether `step` makes the optimiser start entries afresh, so that each needs a counter of its
    own: `optim.scale_by_element_adam`."""

    any_rank: ClassVar[bool] = False
    """Whether a rank above ``min(in, out)`` works too: no gain, so that new adapters have none,
    but files may."""

    takes_dropout: ClassVar[bool] = True
    """Whether its dropout may be anything but the default."""

    dropout: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        require_number("dropout", self.dropout, low=0, below=1)

    @abstractmethod
    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        """``(trainable, frozen)`` leaves for one kernel ``(in, out)``; trainable ones float32."""

    @abstractmethod
    def delta(self, x: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        """What is added to ``x @ kernel``: linear in ``x`` ``(..., in)``, gives ``(..., out)``."""

    def delta_beside(
        self,
        product: Callable[[], jax.Array],
        x: jax.Array,
        kernel: jax.Array,
        factors: Factors,
    ) -> jax.Array:
        """`delta` where the layer's own product is at hand: ``product()`` is ``x @ kernel``.
        Override it where the update is made of that, and `delta` would multiply once more."""
        return self.delta(x, kernel, factors)

    @abstractmethod
    def merge(self, kernel: jax.Array, factors: Factors) -> jax.Array:
        """The adapted kernel as one dense matrix; everything in float32."""

    @abstractmethod
    def unmerge(self, merged: jax.Array, factors: Factors) -> jax.Array:
        """The kernel that was merged: the inverse of `merge` in its first argument."""

    @abstractmethod
    def n_trainable(self, n_in: int, n_out: int) -> int:
        """How many parameters are trained for a kernel of this size."""

    @abstractmethod
    def problems(self, n_in: int, n_out: int) -> list[str]:
        """Why this method cannot adapt a kernel of this size; empty when it can."""

    def trained(self) -> frozenset[str]:
        """The names of the trained leaves."""
        kernel = jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32)
        return frozenset(jax.eval_shape(self.init, jax.random.key(0), kernel)[0])

    @property
    def reads_kernel(self) -> bool:
        """Whether the update depends on more of the kernel than its shape, as DoRA's does."""
        return False

    def sized(self, size: int, n_in: int, n_out: int) -> "Method":
        """The same method at another size for one kernel: what a parameter budget turns."""
        raise UserError(f"{self.name} has no size to fit a budget with")

    def sizes(self) -> frozenset[str]:
        """The settings that `sized` chooses."""
        small, large = (self.sized(size, 2**20, 2**20) for size in (8, 64))
        return frozenset(n for n in self.field_names() if getattr(small, n) != getattr(large, n))

    def rows(self, ids: jax.Array, kernel: jax.Array, factors: Factors) -> jax.Array:
        """What is added to ``kernel[ids]``, for an embedding table; ``ids`` are int32, from 0.
        Override it where the factors can be indexed: this default multiplies a one-hot matrix."""
        one_hot = jax.nn.one_hot(ids, kernel.shape[0], dtype=jnp.float32)
        return self.delta(one_hot, kernel, factors)

    def thin(self, factors: Factors, n_in: int, n_out: int) -> tuple[jax.Array, jax.Array] | None:
        """The whole update as ``(in, r) @ (r, out)``, float32; None where it is no such product."""
        return None

    def joint(self, factors: Factors, n_in: int, n_out: int) -> Sequence[jax.Array] | None:
        """The thin matrices by which `delta` multiplies in turn, where that is all it does: a
        device may then multiply by them and by the kernel at once. As in `products.through`."""
        return None

    def from_data(self, kernel: jax.Array, seen: Factors) -> Factors:
        """All frozen leaves, from the kernel and what `calibrate` saw of it; for methods that
        `needs_data`. ``seen`` holds the top singular vectors of the kernel's gradient, at least
        ``gradient_rank`` of them where it has as many: ``left (in, k)`` and ``right (k, out)``.
        Where ``gradient_rank`` is 0 it holds ``moment (in, in)``, the inputs' second moment."""
        raise NotImplementedError(f"{self.name} makes nothing from data")

    def shift(self, factors: Factors) -> jax.Array | None:
        """A dense update in the kernel's shape, added to the kernel before the layer uses it, so
        that it costs no product of its own; None where the method has none. `delta` then gives
        what is added beside it, and `merge` gives both."""
        return None

    def relate(self, kernels: Kernels, stacked: Collection[str]) -> Kernels:
        """The factors that a call uses, where kernels depend on each other; once per call. The
        first axis of ``stacked`` ones, by path, counts layers."""
        return kernels

    def penalty(self, factors: Factors) -> jax.Array | float:
        """What one kernel adds to the loss in training; the mean over the kernels is taken."""
        return 0.0

    def held(self, frozen: Factors) -> Factors:
        """Masks of the trainable entries that the next update leaves alone, by leaf; they
        broadcast. Those entries get no gradient and no weight decay either."""
        return {}

    def step(self, key: jax.Array, t: jax.Array, kernels: Kernels, grads: Kernels) -> Stepped:
        """What the method does of its own after update ``t`` (int32, from 0), under ``jit``.

        Args:
            key: randomness for this step.
            t: how many updates there were before this one.
            kernels: the leaves of all its kernels after the update, stacked axes included.
            grads: the gradients of the trainable leaves that led to it.
        """
        return Stepped({}, {}, {})

    @property
    def stored(self) -> frozenset[str]:
        """The frozen leaves that drawing again with the same key and kernel would not give: those
        that `step` moves, or that came from data. Checkpoints and saved adapters hold them."""
        return frozenset()

    @property
    def needs_data(self) -> bool:
        """Whether its frozen leaves are 0 until `calibrate` makes them from data."""
        return False

    @classmethod
    def with_data(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that a run which has data takes beside those given: what is better than the
        defaults, but cannot be had without data."""
        return {}

    @property
    def gradient_rank(self) -> int:
        """How many singular vectors of its kernel's gradient `from_data` uses."""
        return 0

    @property
    def scratch(self) -> frozenset[str]:
        """Those of `stored` that only training needs; a saved adapter does without."""
        return frozenset()

    def notes(self, steps: int) -> list[str]:
        """What a user should know of training with it for so many updates, such as a part of it
        that so short a run never comes to."""
        return []

    def rate(self, schedule: Schedule, warmup_ratio: float) -> Schedule:
        """The learning rate by update that training with this method takes, made of the one that
        was asked for; ``warmup_ratio`` is the share of the steps it rises in."""
        return schedule
