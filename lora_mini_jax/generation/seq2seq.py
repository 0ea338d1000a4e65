"""Text from a model with an encoder, plain or adapted: sources of different lengths.

The encoder reads once; what the decoder's layers see of it, and of what is written, is cached.

Example:
    >>> from lora_mini_jax.models import T5, T5Config
    >>> model = T5(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2))
    >>> one = jnp.array([[1]])
    >>> params = model.init(jax.random.key(0), one, one)["params"]
    >>> texts = generate(model, params, [[5, 1], [9, 4, 1]], max_new_tokens=3, eos_id=())
    >>> [len(text) for text in texts]
    [3, 3]
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.decoder import end_ids, padded, rows_of, wrong_rows
from lora_mini_jax.generation.sampling import sampling, write, wrong_settings
from lora_mini_jax.linen import adapt
from lora_mini_jax.models.t5 import T5, init_cache


def generate(
    model: nn.Module,
    params: Any,
    sources: Sequence[Sequence[int]],
    *,
    adapter: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Answer each source; compiled once for a model, batch size, length bucket and token count.

    Args:
        model, params: a T5, as :func:`lora_mini_jax.models.load` returns it.
        sources: token ids, one list a row, of any lengths, as the model was trained to read them:
            usually with the end token at their end.
        adapter: an adapter of ``params``, or None for the plain model.
        max_new_tokens: the most tokens a row may gain.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_p: sample from the smallest set of likeliest tokens whose probability reaches this.
        seed: of the sampling; equal calls give equal text.
        eos_id: id or ids that end a row; None takes the config's, ``()`` never ends one.

    Returns:
        The tokens of each row, without the one that starts it and without the end token.

    Raises:
        UserError: a model without an encoder, an empty source, ids outside the vocabulary, no
            tokens to make, or sampling settings out of range; all of them in one line.
    """
    if type(model) is not T5:
        raise UserError(f"cannot answer with a {type(model).__name__}: give a T5; decoders "
                        "generate with lora_mini_jax.generation.decoder")  # fmt: skip
    rows = [np.asarray(source) for source in sources]
    bad = wrong_rows(model.config, rows, max_new_tokens) + wrong_settings(temperature, top_p)
    if bad:
        raise UserError(f"cannot generate: {'; '.join(bad)}; correct these arguments")
    if not rows:
        return []
    ends = end_ids(model.config, eos_id)
    how = sampling(temperature, top_p, seed)
    return rows_of(_run(model, max_new_tokens, params, adapter, *padded(rows), ends, how))


@partial(jax.jit, static_argnums=(0, 1))
def _run(model: T5, new: int, params, adapter, tokens, mask, ends, how) -> jax.Array:
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
