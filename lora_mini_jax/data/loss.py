"""The next-token loss of a batch as ``Batches`` makes it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.scores import score

Batch = Mapping[str, jax.Array | np.ndarray]
"""Arrays by name, of NumPy or of JAX."""


def token_loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The summed cross entropy of the tokens that count, in nats, and how many they are.

    ``logits[:, i]`` predict ``tokens[:, i + 1]``, which counts where ``loss_mask[:, i + 1]``. What
    the logits are elsewhere has no influence, not even as NaN. The two results are sums, so those
    of many batches or devices add up; the mean is the one over the other (mind a count of 0).

    Args:
        logits: (rows, length, vocabulary), any float dtype; taken to float32 first.
        batch: ``tokens`` (rows, length) integer and ``loss_mask`` (rows, length) bool; more
            entries are allowed.

    Returns:
        Two float32 scalars, the sum and the count.

    Raises:
        UserError: ``logits`` and ``tokens`` are not of the same rows and length.

    Example:
        >>> batch = {"tokens": np.array([[0, 1]]), "loss_mask": np.array([[False, True]])}
        >>> total, number = token_loss(jnp.zeros((1, 2, 4)), batch)
        >>> round(float(total), 4), float(number)  # log(4), once
        (1.3863, 1.0)
    """
    tokens, mask = jnp.asarray(batch["tokens"]), jnp.asarray(batch["loss_mask"])
    if logits.ndim != 3 or not logits.shape[:2] == tokens.shape == mask.shape:
        raise UserError(
            f"logits {logits.shape}, tokens {tokens.shape} and loss_mask {mask.shape} do not go "
            "together: give (rows, length, vocabulary) and twice (rows, length)"
        )
    return summed(score(logits, next_tokens(batch)).losses, batch)


def next_tokens(batch: Batch) -> jax.Array:
    """The token after each, (rows, length) int32; 0 after the last, which never counts.

    Example:
        >>> next_tokens({"tokens": np.array([[5, 6, 7]])}).tolist()
        [[6, 7, 0]]
    """
    return jnp.pad(jnp.asarray(batch["tokens"])[:, 1:], ((0, 0), (0, 1)))


def summed(losses: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses (rows, length) of `next_tokens` that count, and how many do.

    Example:
        >>> batch = {"loss_mask": np.array([[False, True, False]])}
        >>> [float(n) for n in summed(jnp.array([[2.0, 3.0, 4.0]]), batch)]
        [2.0, 1.0]
    """
    counted = jnp.asarray(batch["loss_mask"])[:, 1:]
    # A choice and not a product: 0 * NaN is NaN.
    total = jnp.where(counted, losses[:, :-1], 0.0).sum()
    return total, counted.sum(dtype=jnp.float32)


def examples_right(right: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """How many examples have every token that counts as the likeliest one, and how many there are.

    Each token is predicted from the true ones before it. Where the completion is a label, this
    counts the right classifications.

    Args:
        right: (rows, length) bool, whether `next_tokens` were the likeliest.
        batch: ``loss_mask`` and ``segment_ids``, each (rows, length).

    Returns:
        Two float32 scalars.

    Example:
        >>> batch = {"loss_mask": np.array([[False, True, True]]),
        ...          "segment_ids": np.array([[1, 1, 1]])}
        >>> [float(n) for n in examples_right(np.array([[True, False, False]]), batch)]
        [0.0, 1.0]
    """
    counted = jnp.asarray(batch["loss_mask"])[:, 1:]
    wrong = counted & ~jnp.asarray(right)[:, :-1]
    rows, length = wrong.shape
    # An example is a segment of a row; ids of padding, 0, never count.
    example = jnp.arange(rows)[:, None] * (length + 2) + jnp.asarray(batch["segment_ids"])[:, 1:]

    def any_in_example(flags: jax.Array) -> jax.Array:
        flat = flags.reshape(-1).astype(jnp.int32)
        return jax.ops.segment_max(flat, example.reshape(-1), rows * (length + 2)) > 0

    there, failed = any_in_example(counted), any_in_example(wrong)
    return (there & ~failed).sum(dtype=jnp.float32), there.sum(dtype=jnp.float32)
