"""What a decoder writes after its prompts, with a cache; see `generate`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.generation.sampling import write
from lora_mini_jax.linen import adapt
from lora_mini_jax.models.attention import init_cache


@partial(jax.jit, static_argnums=(0, 1))
def decode(model: Any, new: int, params, adapter, tokens, valid, ends, how) -> jax.Array:
    """New tokens (batch, new) int32, -1 from a row's end on; prompts are padded on the left."""
    batch, width = tokens.shape

    def call(tokens, positions, segments, cache):
        kw = {"positions": positions, "segment_ids": segments, "cache": cache}
        if adapter is None:
            return model.apply({"params": params}, tokens, **kw)
        return adapt(model)(params, adapter, tokens, **kw)

    def follow(token, carry):
        position, cache = carry
        one = jnp.ones((batch, 1), jnp.int32)
        logits, cache = call(token, position[:, None], one, cache)
        return logits[:, -1], (position + 1, cache)

    cache = init_cache(model.config, batch, width + new, model.dtype)
    # A row's first real token stands at position 0, wherever its padding ends.
    positions = jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)
    logits, cache = call(tokens, positions, valid, cache)
    return write(how, logits[:, -1], (positions[:, -1] + 1, cache), follow, new, ends)
