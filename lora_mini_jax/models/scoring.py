"""What a decoder thinks of given tokens, without its logits ever being in memory as a whole.

With a vocabulary of 128k and 8k tokens the logits of one row are 4 GiB in float32, and as much
again in the backward pass: more than all else. Here they are made for a few hundred tokens at a
time, and made again for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.part import Part
from lora_mini_jax.scores import Scores, score

CHUNK = 256
"""Tokens of a row whose logits are in memory at a time."""


def answer(
    model: Part,
    words: nn.Embed,
    x: jax.Array,
    labels: jax.Array | None,
    cache: Any,
    softcap: float | None = None,
) -> Any:
    """What a decoder returns; to be called at the end of its compact method.

    Args:
        model: the decoder, whose config says whether ``words``, its table, is its head too; else
            it gets one, ``lm_head``.
        x: (batch, time, width), the last hidden states.
        labels: (batch, time) int32, or None.
        cache: as it is after these tokens, or None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None is no cap.

    Returns:
        `Scores` where there are labels, else logits (batch, time, vocab) float32, with the cache
        where there is one.
    """
    c = model.config
    tied = c.tie_word_embeddings
    head = words if tied else model.linear("lm_head", c.vocab_size, bias=False)

    def logits_of(head: Any, x: jax.Array) -> jax.Array:
        logits = (head.attend(x) if tied else head(x)).astype(jnp.float32)
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    if labels is not None:
        return _scored(head, logits_of, x, labels)
    logits = logits_of(head, x)
    return logits if cache is None else (logits, cache)


def _scored(
    head: nn.Module,
    logits_of: Callable[[Any, jax.Array], jax.Array],
    x: jax.Array,
    labels: jax.Array,
) -> Scores:
    """`score` of a head's logits, a chunk of the tokens at a time; in a module's compact method.

    Args:
        head: the module that holds the head's parameters, its table or its projection.
        logits_of: ``logits_of(head, x)``.
        x: (batch, time, width), what the head reads.
        labels: (batch, time) int32.
    """
    rows, time = labels.shape
    chunks = -(-time // CHUNK)
    if chunks == 1:
        return score(logits_of(head, x), labels)

    def parts(array: jax.Array) -> jax.Array:
        short = [(0, 0), (0, chunks * CHUNK - time)] + [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, short).reshape(rows, chunks, CHUNK, *array.shape[2:])
        return jnp.moveaxis(array, 1, 0)

    def turn(head: nn.Module, _: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, Scores]:
        return None, score(logits_of(head, part[0]), part[1])

    scan = nn.scan(nn.remat(turn, prevent_cse=False), variable_broadcast="params",
                   split_rngs={"params": False})  # fmt: skip
    _, found = scan(head, None, (parts(x), parts(labels)))
    return Scores(*(jnp.moveaxis(each, 0, 1).reshape(rows, -1)[:, :time] for each in found))
