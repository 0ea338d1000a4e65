"""Text from models, plain or adapted: prompts of different lengths, greedy or sampled."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.generation import decoder, seq2seq
from lora_mini_jax.generation.sampling import sampling, wrong_settings
from lora_mini_jax.models.families import FAMILIES
from lora_mini_jax.processes import on_host

_BUCKET = 32  # prompts are padded to a multiple, so that a few programs serve every length
_DECODES = {"decoder": decoder.decode, "seq2seq": seq2seq.decode}
_WRITERS = {each.module: _DECODES[each.kind] for each in FAMILIES if each.kind in _DECODES}


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
    """Continue each prompt, or answer it with a model that has an encoder; compiled once for a
    model, batch size, length bucket and token count.

    Args:
        model, params: a decoder or a T5, as :func:`lora_mini_jax.models.load` returns it.
        prompts: token ids, one list a row, of any lengths. A T5 reads them as sources, usually with
            the end token at their end.
        adapter: an adapter of ``params``, or None for the plain model.
        max_new_tokens: the most tokens a row may gain.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        top_p: sample from the smallest set of likeliest tokens whose probability reaches this.
        seed: of the sampling; equal calls give equal text.
        eos_id: id or ids that end a row; None takes the config's, which `load` completes from
            ``generation_config.json``, ``()`` never ends one.

    Returns:
        The new tokens of each row, without the prompt and without the end token.

    Raises:
        UserError: a model that writes no text, an empty prompt, ids outside the vocabulary, too
            many tokens for the model's positions, or sampling settings out of range; all of them
            in one line.

    Example:
        >>> import jax
        >>> from lora_mini_jax.models import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                           num_hidden_layers=1, num_attention_heads=2))
        >>> params = model.init(jax.random.key(0), jax.numpy.array([[1]]))["params"]
        >>> texts = generate(model, params, [[1, 5], [1, 9, 4]], max_new_tokens=3, eos_id=())
        >>> [len(text) for text in texts]
        [3, 3]
    """
    if type(model) not in _WRITERS:
        raise UserError(f"cannot generate with a {type(model).__name__}: give a model that writes "
                        f"text, {' or '.join(each.__name__ for each in _WRITERS)}; for classes and "
                        "numbers of texts there is lora-mini predict")  # fmt: skip
    rows = [np.asarray(prompt) for prompt in prompts]
    bad = _wrong_rows(model.config, rows, max_new_tokens) + wrong_settings(temperature, top_p)
    if bad:
        raise UserError(f"cannot generate: {'; '.join(bad)}; correct these arguments")
    if not rows:
        return []
    ends, how = _end_ids(model.config, eos_id), sampling(temperature, top_p, seed)
    given = params, adapter, *_padded(rows), ends, how
    out = on_host(_WRITERS[type(model)](model, max_new_tokens, *given))
    return [[int(token) for token in row if token >= 0] for row in out]


def _padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, padded on the left to one width: the tokens, and 1 where there is one;
    (rows, width) int32 both."""
    width = -(-max(map(len, rows)) // _BUCKET) * _BUCKET
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
        valid[i, width - len(row) :] = 1
    return tokens, valid


def _end_ids(config: Any, eos_id: int | Sequence[int] | None) -> np.ndarray:
    """The ids that end a row, (n,) int32: those given, or the config's."""
    ends = config.eos_token_id if eos_id is None else eos_id
    return np.atleast_1d(np.asarray(() if ends is None else ends, np.int32))


def _wrong_rows(config: Any, rows: list[np.ndarray], new: int) -> list[str]:
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
    longest = max((row.size for row in rows), default=0)
    limit = getattr(config, "max_position_embeddings", None)  # a T5's positions have none
    # The last token may stand past the end: what would follow it is never read.
    if limit and longest + new - 1 > limit:
        bad.append(f"{longest} prompt tokens and max_new_tokens={new} exceed the model's {limit}")
    return bad
