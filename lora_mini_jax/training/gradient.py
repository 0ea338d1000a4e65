"""The loss and its gradient in the trained leaves: of a batch at once, or of its parts in turn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.training import moves

LossFn = Callable[..., Any]
"""``loss_fn(params, adapter, batch, key) -> loss`` or ``(loss, aux)``."""


def gradient(
    loss_fn: LossFn, adapter: Adapter, params: Any, batch: Any, key: jax.Array, has_aux: bool
) -> tuple[jax.Array, Any, Any]:
    """``(loss, aux, gradient in adapter.trainable)``; the methods' penalties are in the gradient
    but not in the loss that is reported. Without ``has_aux``, ``aux`` is None."""

    def loss_of(trainable: Any) -> tuple[jax.Array, Any]:
        now = adapter.with_trainable(trainable)
        loss, aux = parted(loss_fn(params, now, batch, key), has_aux)
        return loss + moves.penalty(now), (loss, aux)

    (_, (loss, aux)), grads = jax.value_and_grad(loss_of, has_aux=True)(adapter.trainable)
    return loss, aux, grads


def parted(out: Any, has_aux: bool) -> tuple[jax.Array, Any]:
    """The loss and ``aux`` of what a loss function gave.

    Raises:
        UserError: a loss that is no number, or a pair where ``has_aux`` says that there is none.
    """
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise UserError("loss_fn gave no pair (loss, aux): leave has_aux out, or return both")
    loss, aux = out if has_aux else (out, None)
    if isinstance(loss, tuple):
        raise UserError("loss_fn gave several values: return the loss alone, or say has_aux=True "
                        "and return (loss, aux)")  # fmt: skip
    if jnp.ndim(loss):
        raise UserError(f"loss_fn gave an array {jnp.shape(loss)}: return one number, such as its "
                        "mean")  # fmt: skip
    return loss, aux


def accumulated(
    loss_fn: LossFn,
    adapter: Adapter,
    params: Any,
    batch: Any,
    key: jax.Array,
    has_aux: bool,
    parts: int,
) -> tuple[jax.Array, Any, Any]:
    """`gradient` with the activations of one part of the batch in memory at a time.

    Only the gradients of trained leaves add up. ``aux`` is each part's weight in the mean, such as
    the number of tokens that count, and their sum is returned; without it parts weigh the same.

    Raises:
        UserError: a batch whose rows are no multiple of ``parts``.
    """

    def divided(leaf: jax.Array) -> jax.Array:
        if not jnp.ndim(leaf):
            raise UserError(f"a batch with a number, {leaf}, cannot be taken in parts: give arrays "
                            "with a row for every example")  # fmt: skip
        if len(leaf) % parts:
            raise UserError(f"a batch of {len(leaf)} rows cannot be taken in {parts} parts: give a "
                            f"multiple of {parts}")  # fmt: skip
        # Every parts-th row, not neighbours: rows that are split over devices stay where they are.
        return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

    def add(total: Any, part: tuple[jax.Array, Any]) -> tuple[Any, None]:
        i, rows = part
        found = gradient(loss_fn, adapter, params, rows, jax.random.fold_in(key, i), has_aux)
        loss, weight, grads = found if has_aux else (found[0], jnp.ones(()), found[2])
        weight = jnp.float32(weight)
        weighted = jax.tree.map(lambda x: jnp.float32(x * weight), (loss, grads))
        return jax.tree.map(jnp.add, total, (*weighted, weight)), None

    zero = jnp.zeros((), jnp.float32)
    start = zero, optax.tree.zeros_like(adapter.trainable, dtype=jnp.float32), zero
    turns = jnp.arange(parts), jax.tree.map(divided, batch)
    (loss, grads, weight), _ = jax.lax.scan(add, start, turns)
    share = 1 / jnp.where(weight > 0, weight, 1)
    own = jax.tree.map(lambda x, leaf: (x * share).astype(leaf.dtype), grads, adapter.trainable)
    return loss * share, weight if has_aux else None, own
