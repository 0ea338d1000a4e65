"""What logits think of labels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """Of each label: its cross entropy in nats, float32, and whether it is the likeliest; both
    (rows, time)."""

    losses: jax.Array
    right: jax.Array


def score(logits: jax.Array, labels: jax.Array) -> Scores:
    """Scores of labels (rows, time) by logits (rows, time, vocab), which are taken to float32.

    Example:
        >>> found = score(jnp.zeros((1, 1, 4)), jnp.array([[2]]))
        >>> round(float(found.losses[0, 0]), 4), bool(found.right[0, 0])  # log(4); 0 is as likely
        (1.3863, False)
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return Scores(jax.nn.logsumexp(logits, axis=-1) - picked, logits.argmax(-1) == labels)
