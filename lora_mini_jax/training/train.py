"""The training step: pure, traced once, with the gradient taken in the trained leaves alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from lora_mini_jax.adapters.adapter import Adapter, check_adapter, check_calibrated
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.settings.checks import require_whole
from lora_mini_jax.training import moves
from lora_mini_jax.training.gradient import LossFn, accumulated, gradient
from lora_mini_jax.training.optim import forget


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "adapter", "opt_state", "key"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """What training changes: a pytree, so it checkpoints, shards and jits like any other.

    Attributes:
        step: updates done so far, int32 ``()``.
        adapter: the adapter; its ``trainable`` leaves change, and frozen ones where the method
            moves them (SwitchLoRA).
        opt_state: the optimiser's state for those leaves.
        key: key data (uint32) from which each step's randomness is derived by folding in ``step``.

    Example:
        >>> from lora_mini_jax import LoRA, Target, init
        >>> params = {"up": {"kernel": jnp.ones((8, 32))}}
        >>> adapter = init(params, LoRA(rank=1), [Target("up/kernel", (8, 32))])
        >>> state = TrainState.create(adapter, optax.adam(1e-2))
        >>> int(state.step), sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
        (0, 81)
    """

    step: jax.Array
    adapter: Adapter
    opt_state: Any
    key: jax.Array

    def __repr__(self) -> str:
        # Without arrays, as of an adapter; under tracing the step is not known.
        step = "?" if isinstance(self.step, Tracer) else self.step
        return f"TrainState(step {step} of {self.adapter!r})"

    @classmethod
    def create(
        cls,
        adapter: Adapter,
        tx: optax.GradientTransformation,
        key: jax.Array | int = 0,
        *,
        copy: bool = True,
    ) -> "TrainState":
        """A state at step 0. Adapter and key are copied: the step donates the state's buffers, and
        those you hold stay yours.

        Args:
            adapter: where training starts.
            tx: the optimiser.
            key: what each step's randomness comes from.
            copy: False gives the adapter's own arrays away, and saves the memory for them a second
                time: the first step deletes them, so use the state's adapter from then on.

        Raises:
            UserError: an adapter whose frozen factors come from data and have not been made yet.
        """
        check_adapter(adapter)
        check_calibrated(adapter)
        key = jnp.copy(jax.random.key_data(as_key(key)))
        own = jax.tree.map(jnp.copy, adapter) if copy else adapter
        opt_state = _apart(tx.init(own.trainable), own)
        return cls(jnp.zeros((), jnp.int32), own, opt_state, key)


class Metrics(NamedTuple):
    """What a step reports: ``loss`` and the global gradient norm, float32 ``()``, and ``aux``."""

    loss: jax.Array
    grad_norm: jax.Array
    aux: Any


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    parts: int = 1,
    like: TrainState | None = None,
) -> jax.stages.Wrapped:
    """A jitted update: ``step(state, params, batch) -> (state, metrics)``, traced once.

    The frozen ``params`` are an argument, not a constant of the program, and no gradient is taken
    in them, so no dense weight gradient is ever formed. ``state`` is donated: use the one returned.
    A loss or gradient that is not finite leaves adapter and optimiser as they were (``step`` still
    counts on), so that the caller, who sees it in the metrics, can stop with a good state in hand.

    Args:
        loss_fn: ``loss_fn(params, adapter, batch, key)``, a scalar, or with ``has_aux`` a pair.
        tx: an optax optimiser; it sees ``adapter.trainable`` only, so clip by global norm freely.
        has_aux: whether ``loss_fn`` returns ``(loss, aux)``.
        parts: take the batch in so many turns, and so much less memory: gradients are accumulated.
            ``aux`` must then be a part's weight in the mean, such as its number of tokens.
        like: on a mesh, the state that training starts with; every later one is sharded as it is.

    Returns:
        The step; its metrics are `Metrics`. An optimiser that asks for the loss is given it, as
        ``value``.

    Raises:
        UserError: ``parts`` that are not a whole number from 1; from the step, a batch that cannot
            be taken in so many, or a loss that is no number.

    Example:
        >>> import flax.linen as nn
        >>> from lora_mini_jax import LoRA, init, linen
        >>> model, x = nn.Dense(1), jnp.ones((4, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> apply = linen.adapt(model)
        >>> adapter = init(params, LoRA(rank=1), linen.targets(model, params, x))
        >>> tx = optax.adam(1e-2)
        >>> step = make_train_step(lambda p, a, b, key: (apply(p, a, b) ** 2).mean(), tx)
        >>> state, metrics = step(TrainState.create(adapter, tx), params, x)
    """

    require_whole("parts", parts)

    def step(state: TrainState, params: Any, batch: Any) -> tuple[TrainState, Metrics]:
        adapter = state.adapter
        key = jax.random.fold_in(as_key(state.key), state.step)
        loss_key, step_key = jax.random.split(key)
        given = loss_fn, adapter, params, batch, loss_key, has_aux
        loss, aux, grads = gradient(*given) if parts == 1 else accumulated(*given, parts)
        norm = optax.tree.norm(grads)
        given = grads, loss, state.opt_state, state.step, step_key
        after, opt_state = _updated(tx, adapter, *given)
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)
        after, opt_state = where(fine, (after, opt_state), (adapter, state.opt_state))
        return TrainState(state.step + 1, after, opt_state, state.key), Metrics(loss, norm, aux)

    return jitted(step, like)


def where(fine: jax.Array, after: Any, before: Any) -> Any:
    """What an update made, or what was before where it was not ``fine``."""
    kept = lambda new, old: new if new is old else jnp.where(fine, new, old)  # noqa: E731
    return jax.tree.map(kept, after, before)


def jitted(step: Callable[..., Any], like: TrainState | None) -> jax.stages.Wrapped:
    """A step from states to states, donated; on a mesh every later state is sharded as ``like``."""
    if like is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _apart(opt_state: Any, adapter: Adapter) -> Any:
    """The state with copies of what it shares with the adapter (Prodigy keeps where it started):
    the step donates both, and can give an array away once."""
    taken = set(map(id, jax.tree.leaves(adapter)))

    def own(leaf: Any) -> Any:
        shared = id(leaf) in taken
        taken.add(id(leaf))
        return jnp.copy(leaf) if shared else leaf

    return jax.tree.map(own, opt_state)


def _updated(
    tx: optax.GradientTransformation,
    adapter: Adapter,
    grads: Any,
    loss: jax.Array,
    opt_state: Any,
    t: jax.Array,
    key: jax.Array,
) -> tuple[Adapter, Any]:
    """The adapter and the optimiser's state after the update, and after the methods' own step."""

    def zero(tree: Any) -> Any:
        return tree if hold is None else jax.tree.map(lambda h, x: jnp.where(h, 0, x), hold, tree)

    hold, update = moves.held(adapter), optax.with_extra_args_support(tx).update
    extra = {"value": loss} if hold is None else {"value": loss, "hold": hold}
    updates, opt_state = update(zero(grads), opt_state, adapter.trainable, **extra)
    trainable: Any = optax.apply_updates(adapter.trainable, zero(updates))
    after, reset = moves.step(adapter.with_trainable(trainable), grads, t, key)
    return after, opt_state if reset is None else forget(opt_state, reset)
