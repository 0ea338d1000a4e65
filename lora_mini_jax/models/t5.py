"""T5 and Flan-T5 in Flax Linen: an encoder that reads and a decoder that writes.

Parameters carry Hugging Face's module names (``encoder/block_0/layer_0/SelfAttention/q/kernel``),
but that the tables of distances, which the first layers have there, belong to the halves here.
Text is made by `lora_mini_jax.generate`.
Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(2020); Chung et al., "Scaling Instruction-Finetuned Language Models" (2022).

Example:
    >>> config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)
    >>> model, tokens, answer = T5(config), jnp.array([[7, 5, 1]]), jnp.array([[0, 9]])
    >>> params = model.init(jax.random.key(0), tokens, answer)["params"]
    >>> model.apply({"params": params}, tokens, answer).shape
    (1, 2, 32)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models import attention
from lora_mini_jax.models.family import Family, token_inputs
from lora_mini_jax.models.masks import look_back
from lora_mini_jax.models.scoring import answer
from lora_mini_jax.models.stack import run_stack
from lora_mini_jax.models.t5_config import T5Config
from lora_mini_jax.models.t5_layers import Block, T5Part, distance_rows


def init_cache(config: T5Config, batch: int, length: int, dtype: Any = jnp.float32) -> dict:
    """An empty cache of the decoder for ``length`` tokens a row; see `attention.init_cache`."""
    return attention.init_cache(config, batch, length, dtype, config.num_decoder_layers)


class Stack(T5Part):
    """The layers of one half and the norm after them."""

    decoder: bool = False
    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x, mask, memory=None, memory_mask=None, start=0, own=(None, None)):
        c, (kv, _) = self.config, own
        time = x.shape[1]
        keys = time if kv is None else kv[0].shape[2]
        table = self.table("relative_attention_bias", c.relative_attention_num_buckets,
                           c.num_heads, std=c.d_model**-0.5, dtype=jnp.float32)  # fmt: skip
        rows = distance_rows(c, not self.decoder, start, time, keys)
        bias = table(rows).transpose(2, 0, 1)[None]
        x, own = run_stack(
            Block, (*self.args, self.decoder), x, (mask, bias, start, memory, memory_mask), own,
            name="block", depth=c.num_decoder_layers if self.decoder else c.num_layers,
            scan=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        return self.norm("final_layer_norm")(x), own


class T5(T5Part):
    """The model: tokens that are read and tokens that were written to logits of the next one.

    Attributes:
        config: its shape, a `T5Config`.
        dtype: of the computation; normalisation, distances, softmax and logits stay float32.
        param_dtype: of the parameters made by ``init``.
        scan_layers: one compiled layer of each half run by ``nn.scan``; parameters then sit under
            ``block`` with a leading layer axis, in place of ``block_0``, ``block_1``, ...
        remat: what of a layer is recomputed in the backward pass, for memory: a name of
            `remat.POLICIES`. Parameters are unchanged.
    """

    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens, decoder_tokens, mask=None, decoder_mask=None, cache=None, *, labels=None
    ):
        """Logits (batch, time, vocab) float32, or ``(logits, cache)`` where a cache is given.

        Args:
            tokens: (batch, source) int32, what is read. In a call that goes on with a cache None:
                the cache has what the encoder made of it.
            decoder_tokens: (batch, time) int32, what is written, after a first token
                ``config.decoder_start_token_id``.
            mask: (batch, source), 0 where ``tokens`` are padding, on either side; None: nowhere.
            decoder_mask: (batch, time) int32, 0 where ``decoder_tokens`` are padding; None:
                nowhere. The logits of padding are finite, to be ignored.
            cache: from `init_cache` or an earlier call; ``decoder_tokens`` are written after it.
            labels: (batch, time) int32, what is to come at each place: then `Scores` of them are
                returned in place of logits, which are never in memory as a whole.
        """
        c, (kv, start) = self.config, attention.read_cache(cache)
        words = self.table("shared", c.vocab_size)
        halves = self.scan_layers, self.remat
        said = (cache or {}).get("memory")
        if said is None:
            seen = jnp.ones_like(tokens, bool) if mask is None else mask > 0
            seen = seen[:, None, None]
            memory, _ = Stack(*self.args, False, *halves, name="encoder")(words(tokens), seen)
            cross = None
        else:
            memory, seen, cross = None, said["mask"], (said["k"], said["v"])
        before = look_back(decoder_tokens, decoder_mask, cache)
        decoder = Stack(*self.args, True, *halves, name="decoder")
        x, kept = decoder(words(decoder_tokens), before, memory, seen, start, (kv, cross))
        if c.tie_word_embeddings:
            x = x * c.d_model**-0.5
        if cache is not None:
            kv, (k, v) = kept
            cache = attention.next_cache(cache, kv, before.slots, decoder_tokens.shape[1])
            cache |= {"memory": {"k": k, "v": v, "mask": seen}}
        return answer(self, words, x, labels, cache)


def _inputs() -> tuple[jax.ShapeDtypeStruct, ...]:
    """One token for each half."""
    return (*token_inputs(), *token_inputs())


FAMILY = Family(
    config=T5Config,
    module=T5,
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    kind="seq2seq",
    prefix="",
    stack="block",
    lists=("layer",),
    depths={"encoder": "num_layers", "decoder": "num_decoder_layers"},
    moved={f"{half}/relative_attention_bias":
           f"{half}/block_0/layer_0/SelfAttention/relative_attention_bias"
           for half in ("encoder", "decoder")},
    copies=dict.fromkeys(
        ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        "shared.weight",
    ),
    ignored=r"\.EncDecAttention\.relative_attention_bias\.weight$",
    inputs=_inputs,
)  # fmt: skip
