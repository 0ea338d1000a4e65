"""The next-token loss of a batch as ``Batches`` makes it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError


def token_loss(
    logits: jax.Array, batch: Mapping[str, jax.Array | np.ndarray]
) -> tuple[jax.Array, jax.Array]:
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
    scores = logits[:, :-1].astype(jnp.float32)
    targets, counted = tokens[:, 1:], mask[:, 1:]
    picked = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(scores, axis=-1) - picked
    # A choice and not a product: 0 * NaN is NaN.
    total = jnp.where(counted, losses, 0.0).sum()
    return total, counted.sum(dtype=jnp.float32)
