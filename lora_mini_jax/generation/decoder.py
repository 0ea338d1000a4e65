"""Text from a decoder, plain or adapted: prompts of different lengths, a cache, greedy or nucleus.

For a model with an encoder see `seq2seq`.

Example:
    >>> from lora_mini_jax.models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                           num_hidden_layers=1, num_attention_heads=2))
    >>> params = model.init(jax.random.key(0), jnp.array([[1]]))["params"]
    >>> texts = generate(model, params, [[1, 5], [1, 9, 4]], max_new_tokens=3, eos_id=())
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
from lora_mini_jax.generation.sampling import sampling, write, wrong_settings
from lora_mini_jax.linen import adapt
from lora_mini_jax.models.attention import init_cache
from lora_mini_jax.models.families import DECODERS
from lora_mini_jax.processes import on_host

_BUCKET = 32  # prompts are padded to a multiple, so that a few programs serve every length


def generate(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    adapter: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt; compiled once for a model, batch size, length bucket and token count.

    Args:
        model, params: a decoder, as :func:`lora_mini_jax.models.load` returns it.
        prompts: token ids, one list a row, of any lengths.
        adapter: an adapter of ``params``, or None for the plain model.
        max_new_tokens: the most tokens a row may gain.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_p: sample from the smallest set of likeliest tokens whose probability reaches this.
        seed: of the sampling; equal calls give equal text.
        eos_id: id or ids that end a row; None takes the config's, ``()`` never ends one.

    Returns:
        The new tokens of each row, without the prompt and without the end token.

    Raises:
        UserError: a model that is no decoder, an empty prompt, ids outside the vocabulary, too
            many tokens for the model's positions, or sampling settings out of range; all of them
            in one line.
    """
    known = [family.module for family in DECODERS]
    if type(model) not in known:
        raise UserError(f"cannot generate with a {type(model).__name__}: give a decoder that load "
                        f"reads, {' or '.join(each.__name__ for each in known)}; a T5 answers with "
                        "lora_mini_jax.generation.seq2seq")  # fmt: skip
    config: Any = model.config
    rows = [np.asarray(prompt) for prompt in prompts]
    _check(config, rows, max_new_tokens, temperature, top_p)
    if not rows:
        return []
    tokens, valid = padded(rows)
    ends = end_ids(config, eos_id)
    how = sampling(temperature, top_p, seed)
    out = _run(model, max_new_tokens, params, adapter, tokens, valid, ends, how)
    return rows_of(out)


def padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, padded on the left to one width: the tokens, and 1 where there is one;
    (rows, width) int32 both."""
    width = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        valid[i, width - len(row) :] = 1
    return tokens, valid


def end_ids(config: Any, eos_id: int | Sequence[int] | None) -> np.ndarray:
    """The ids that end a row, (n,) int32: those given, or the config's."""
    ends = config.eos_token_id if eos_id is None else eos_id
    return np.atleast_1d(np.asarray(() if ends is None else ends, np.int32))


def rows_of(out: jax.Array) -> list[list[int]]:
    """The new tokens of each row, (rows, new) with -1 where there is none, as lists."""
    return [[int(t) for t in row if t >= 0] for row in on_host(out)]


def wrong_rows(config: Any, rows: list[np.ndarray], new: int) -> list[str]:
    """What is wrong with prompts, and with how many tokens are to follow them."""
    bad = []
    for i, row in enumerate(rows):
        if not row.size:
            bad.append(f"prompt {i} is empty")
        elif row.ndim != 1 or row.dtype.kind not in "iu":
            bad.append(f"prompt {i} is not a list of token ids")
        elif (wrong := row[(row < 0) | (row >= config.vocab_size)]).size:
            bad.append(f"prompt {i} has ids {wrong.tolist()} outside 0..{config.vocab_size - 1}")
    if new < 1:
        bad.append(f"max_new_tokens={new} is below 1")
    return bad


def _check(config: Any, rows: list, new: int, temperature: float, top_p: float) -> None:
    bad = wrong_rows(config, rows, new)
    longest = max((row.size for row in rows), default=0)
    if longest + new > (limit := config.max_position_embeddings):
        bad.append(f"{longest} prompt tokens and max_new_tokens={new} exceed the model's {limit}")
    if bad := bad + wrong_settings(temperature, top_p):
        raise UserError(f"cannot generate: {'; '.join(bad)}; correct these arguments")


@partial(jax.jit, static_argnums=(0, 1))
def _run(model: Any, new: int, params, adapter, tokens, valid, ends, how) -> jax.Array:
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
