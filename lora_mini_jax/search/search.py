"""DiffoRA's search (see `methods.diffora`): a step of the gates, a step of the weights, in turn.

Gates and weights learn from different halves of the training data: a gate that saw what the weights
just fitted would open for whatever fits best, not for what helps elsewhere. What is chosen in the
end is in ``choice.py``.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.algebra.draws import as_key
from lora_mini_jax.data import Batches
from lora_mini_jax.errors import UserError
from lora_mini_jax.methods.diffora import GATE
from lora_mini_jax.training.gradient import LossFn, accumulated, gradient
from lora_mini_jax.training.train import TrainState, jitted, where


class SearchMetrics(NamedTuple):
    """The losses of a step, float32 ``()``: on the weights' batch, and before that the gates'."""

    loss: jax.Array
    gate_loss: jax.Array


def halves(batches: Batches, seed: int = 0) -> tuple[Batches, Batches]:
    """Two halves of the rows, drawn by ``seed``, with no row in both.

    Returns:
        Batches for the weights (one row more where the number is odd), and for the gates.

    Raises:
        UserError: fewer than two rows.
    """
    check_halves(batches)
    rows = len(batches.packed.tokens)
    order = np.random.default_rng(seed).permutation(rows)
    parts = np.sort(order[rows // 2 :]), np.sort(order[: rows // 2])
    one, other = (
        replace(batches.packed, **{n: array[part] for n, array in vars(batches.packed).items()})
        for part in parts
    )
    return replace(batches, packed=one), replace(batches, packed=other)


def check_halves(batches: Batches) -> None:
    """Raise `UserError` unless there are two rows."""
    if len(batches.packed.tokens) < 2:
        raise UserError(
            "a search needs two rows of training data at least, there is one: give more data, or a "
            "lower --max-length"
        )


def search_state(
    adapter: Adapter,
    tx_inner: optax.GradientTransformation,
    tx_gate: optax.GradientTransformation,
    key: jax.Array | int = 0,
) -> TrainState:
    """The state at step 0, made of copies as by `TrainState.create`, for `make_search_step`."""

    def init(params: Any) -> Any:
        gates, inner = _apart(params)
        return tx_gate.init(gates), tx_inner.init(inner)

    both = optax.GradientTransformation(init, optax.identity().update)
    return TrainState.create(adapter, both, key)


def make_search_step(
    loss_fn: LossFn,
    tx_inner: optax.GradientTransformation,
    tx_gate: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    parts: int = 1,
    like: TrainState | None = None,
) -> jax.stages.Wrapped:
    """A jitted ``step(state, params, train_batch, valid_batch) -> (state, metrics)``, traced once.

    The gates take a step on ``valid_batch`` with the weights as they are (first order: no gradient
    goes through the weights' own step), then the weights take one on ``train_batch``. The batches
    come from the two `halves`. ``state`` is donated: use the one returned. A loss or gradient that
    is not finite leaves what it would have moved as it was.

    Args:
        loss_fn: ``loss_fn(params, adapter, batch, key)``, a scalar, or with ``has_aux`` a pair.
        tx_inner: optimiser of all that is not a gate.
        tx_gate: optimiser of the gates.
        has_aux, parts, like: as for `make_train_step`.

    Example:
        >>> import flax.linen as nn
        >>> from lora_mini_jax import LoRA, init, linen
        >>> from lora_mini_jax.methods import DiffoRA
        >>> model, x = nn.Dense(1), jax.numpy.ones((4, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> apply = linen.adapt(model)
        >>> adapter = init(params, DiffoRA(LoRA(rank=1)), linen.targets(model, params, x))
        >>> tx = optax.adam(1e-2)
        >>> step = make_search_step(lambda p, a, b, key: (apply(p, a, b) ** 2).mean(), tx, tx)
        >>> state, metrics = step(search_state(adapter, tx, tx), params, x, x)
    """

    def step(
        state: TrainState, params: Any, train_batch: Any, valid_batch: Any
    ) -> tuple[TrainState, SearchMetrics]:
        key = jax.random.fold_in(as_key(state.key), state.step)
        gate_key, inner_key = jax.random.split(key)
        gates, inner = _apart(state.adapter.trainable)
        gate_state, inner_state = state.opt_state

        def gradients(batch: Any, key: jax.Array) -> tuple[jax.Array, Any, Any]:
            adapter = state.adapter.with_trainable(_joined(gates, inner))
            given = loss_fn, adapter, params, batch, key, has_aux
            loss, _, grads = gradient(*given) if parts == 1 else accumulated(*given, parts)
            return loss, *_apart(grads)  # what is not used is not computed

        def moved(tx: Any, loss: Any, grads: Any, *before: Any) -> Any:
            """The leaves and the optimiser's state, as they were where the loss is not finite."""
            leaves, opt_state = before
            update = optax.with_extra_args_support(tx).update
            updates, opt_state = update(grads, opt_state, leaves, value=loss)
            fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            return where(fine, (optax.apply_updates(leaves, updates), opt_state), before)

        gate_loss, grads, _ = gradients(valid_batch, gate_key)
        gates, gate_state = moved(tx_gate, gate_loss, grads, gates, gate_state)
        loss, _, grads = gradients(train_batch, inner_key)
        inner, inner_state = moved(tx_inner, loss, grads, inner, inner_state)
        after = state.adapter.with_trainable(_joined(gates, inner))
        opt_state = gate_state, inner_state
        metrics = SearchMetrics(loss, gate_loss)
        return TrainState(state.step + 1, after, opt_state, state.key), metrics

    return jitted(step, like)


def _apart(trainable: Any) -> tuple[Any, Any]:
    """The gates, and the other leaves."""
    gates = {path: {GATE: leaves[GATE]} for path, leaves in trainable.items() if GATE in leaves}
    inner = {
        path: {name: leaf for name, leaf in leaves.items() if name != GATE}
        for path, leaves in trainable.items()
    }
    return gates, inner


def _joined(gates: Any, inner: Any) -> Any:
    """The inverse of `_apart`."""
    return {path: {**leaves, **gates.get(path, {})} for path, leaves in inner.items()}
