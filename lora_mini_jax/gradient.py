"""The loss and its gradient in the trained leaves: of a batch at once, or of its parts in turn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax import moves
from lora_mini_jax.adapter import Adapter
from lora_mini_jax.errors import UserError

LossFn = Callable[..., Any]
"""``loss_fn(params, adapter, batch, key) -> loss`` or ``(loss, aux)``."""


def gradient(
    loss_fn: LossFn, adapter: Adapter, params: Any, batch: Any, key: jax.Array, has_aux: bool
) -> tuple[jax.Array, Any, Any]:
    """``(loss, aux, gradient in adapter.trainable)``; the methods' penalties are in the gradient
    but not in the loss that is reported. Without ``has_aux``, ``aux`` is None."""

    def loss_of(trainable: Any) -> tuple[jax.Array, Any]:
        now = adapter.with_trainable(trainable)
        out = loss_fn(params, now, batch, key)
        loss, aux = out if has_aux else (out, None)
        return loss + moves.penalty(now), (loss, aux)

    (_, (loss, aux)), grads = jax.value_and_grad(loss_of, has_aux=True)(adapter.trainable)
    return loss, aux, grads


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
    start = zero, jax.tree.map(jnp.zeros_like, adapter.trainable), zero
    turns = jnp.arange(parts), jax.tree.map(divided, batch)
    (loss, grads, weight), _ = jax.lax.scan(add, start, turns)
    share = 1 / jnp.where(weight > 0, weight, 1)
    loss, grads = jax.tree.map(lambda x: x * share, (loss, grads))
    return loss, weight if has_aux else None, grads
