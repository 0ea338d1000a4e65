"""What a model with an encoder writes when it has read its sources; see `generate`.

The encoder reads once; what the decoder's layers see of it, and of what is written, is cached.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lora_mini_jax.generation.sampling import write
from lora_mini_jax.linen import adapt
from lora_mini_jax.models.t5 import T5, init_cache


@partial(jax.jit, static_argnums=(0, 1))
def decode(model: T5, new: int, params, adapter, tokens, mask, ends, how) -> jax.Array:
    """New tokens (batch, new) int32, -1 from a row's end on."""
    batch = tokens.shape[0]

    def call(tokens, written, cache, mask=None):
        if adapter is None:
            return model.apply({"params": params}, tokens, written, mask, cache=cache)
        # A call that goes on uses neither the encoder nor what projects its output.
        apply = adapt(model, whole=tokens is not None)
        return apply(params, adapter, tokens, written, mask, cache=cache)

    def follow(token, cache):
        logits, cache = call(None, token, cache)
        return logits[:, -1], cache

    first = jnp.full((batch, 1), model.config.decoder_start_token_id, jnp.int32)
    cache = init_cache(model.config, batch, 1 + new, model.dtype)
    logits, cache = call(tokens, first, cache, mask)
    return write(how, logits[:, -1], cache, follow, new, ends)
