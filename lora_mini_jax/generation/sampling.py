"""How a generated row comes about: choose a token, write it down, until every row has ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Sampling(NamedTuple):
    """How tokens are chosen. Arrays, not Python numbers: another temperature must not be another
    program."""

    temperature: Array
    """float32; 0 takes the likeliest token; above, logits are divided by it and sampled."""
    top_p: Array
    """float32; sample from the smallest set of likeliest tokens whose probability reaches this."""
    key: Array


def sampling(temperature: float, top_p: float, seed: int) -> Sampling:
    """Settings as a program takes them."""
    return Sampling(jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed))


def wrong_settings(temperature: float, top_p: float) -> list[str]:
    """What is wrong with settings."""
    bad = []
    if not 0 <= temperature < float("inf"):
        bad.append(f"temperature={temperature} is not a finite number from 0")
    if not 0 < top_p <= 1:
        bad.append(f"top_p={top_p} is not above 0 and at most 1")
    return bad


def write(
    how: Sampling,
    logits: Array,
    carry: Any,
    follow: Callable[[Array, Any], tuple[Array, Any]],
    new: int,
    ends: Array,
) -> Array:
    """Rows of new tokens, (rows, new) int32, -1 from a row's end on.

    Args:
        how: how tokens are chosen.
        logits: (rows, vocab) float32, of the first token.
        carry: what ``follow`` needs and keeps up: a cache, say.
        follow: ``(tokens (rows, 1), carry) -> (logits (rows, vocab), carry)``.
        new: how many tokens at most.
        ends: (n,) int32, the tokens that end a row.
    """

    def body(state):
        """Record token i and ask for the next: the sampler is compiled once, in here alone."""
        i, logits, carry, out, done = state
        token = pick(logits, how._replace(key=jax.random.fold_in(how.key, i)))
        # A finished row records -1, and what it is fed from then on no longer matters.
        done |= jnp.any(token[:, None] == ends, axis=-1)
        out = out.at[:, i].set(jnp.where(done, -1, token))
        return i + 1, *follow(token[:, None], carry), out, done

    rows = logits.shape[0]
    out, done = jnp.full((rows, new), -1, jnp.int32), jnp.zeros(rows, bool)
    state = (jnp.int32(0), logits, carry, out, done)
    return jax.lax.while_loop(lambda s: (s[0] < new) & ~jnp.all(s[4]), body, state)[3]


def pick(logits: Array, how: Sampling) -> Array:
    """One token of each row, (rows,) int32, from logits (rows, vocab) float32."""

    def sample():
        # The maximum is taken off first: a tiny temperature then gives -inf, never inf - inf.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / how.temperature
        order = jnp.argsort(-scaled, axis=-1)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # At 1 everything stays, though a rounded sum may pass 1 before the tail.
        kept = jnp.where((before < how.top_p) | (how.top_p >= 1), ranked, -jnp.inf)
        rank = jax.random.categorical(how.key, kept, axis=-1)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def greedy():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(how.temperature > 0, sample, greedy)
