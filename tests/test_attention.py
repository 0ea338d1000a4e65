"""Attention of long rows, a part of the queries at a time: the same values in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax.models import attention
from lora_mini_jax.models.attention import attend
from lora_mini_jax.models.masks import Seen

ROWS, TIME, HEADS, WIDTH = 2, 11, 4, 8


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compiled(time: int, **how: Any) -> Any:
    """Output and gradients of queries, keys and values, two heads to a key's."""
    given = (
        draw(ROWS, time, HEADS, WIDTH),
        *(draw(ROWS, time, HEADS // 2, WIDTH, seed=seed) for seed in (1, 2)),
    )

    def value(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v, **how)
        return jnp.sin(3 * out).sum(), out

    grad = jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True))
    return grad.lower(*given).compile(), given


def seen(time: int) -> Seen:
    """Two segments and padding, and a window of five."""
    segments = jnp.asarray([[1] * 6 + [2] * (time - 6), [1] * (time - 2) + [0] * 2])
    return Seen(segments, segments, windows=(5,))


HOW: dict[str, dict[str, Any]] = {
    "causal": {},
    "masked, capped": {"seen": seen(TIME), "softcap": 2.0, "scale": 0.7},
    "biased": {"seen": seen(TIME), "bias": draw(1, HEADS, TIME, TIME, seed=3)},
    "all see all": {"seen": jnp.ones((1, 1, TIME, TIME), bool)},
    "all see what is no padding": {"seen": (jnp.arange(TIME) < 9)[None, None, None]},
}


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
@pytest.mark.parametrize("at_once", [4, 5])  # five have a last turn of one query more
def test_in_turns_it_is_the_same(how: dict[str, Any], at_once: int, monkeypatch):
    program, given = compiled(TIME, **how)
    whole = program(*given)
    monkeypatch.setattr(attention, "AT_ONCE", at_once)
    program, given = compiled(TIME, **how)
    assert "while" in program.as_text()  # it does take turns
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), program(*given), whole
    )


def test_in_turns_it_takes_less_memory(monkeypatch):
    whole = compiled(256)[0].memory_analysis().temp_size_in_bytes
    monkeypatch.setattr(attention, "AT_ONCE", 16)
    assert compiled(256)[0].memory_analysis().temp_size_in_bytes < whole / 4
