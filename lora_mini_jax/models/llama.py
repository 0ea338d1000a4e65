"""Llama and its relatives in Flax Linen: Mistral, Qwen 2 and 3, Gemma 1 to 3, in one module.

With packing, left padding and a cache; equal to transformers' torch models to float32 rounding.
Parameters carry Hugging Face's module names (``layers_0/self_attn/q_proj/kernel``), so an
adapter's targets read the same here and there. :func:`lora_mini_jax.models.load` fills them from
safetensors.

Example:
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                      num_hidden_layers=2, num_attention_heads=4)
    >>> model, tokens = Llama(config), jnp.array([[1, 5, 7]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 32)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.models.attention import next_cache, read_cache
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.llama_config import LlamaConfig
from lora_mini_jax.models.llama_families import KINDS
from lora_mini_jax.models.llama_layers import Block, LlamaPart
from lora_mini_jax.models.masks import look_back
from lora_mini_jax.models.rotary import Rope, angles
from lora_mini_jax.models.scoring import answer
from lora_mini_jax.models.stack import run_stack


class Llama(LlamaPart):
    """The language model: token ids to logits of the next token.

    Attributes:
        config: the architecture and its shape.
        dtype: of the computation; normalisation, softmax, rotation and logits stay float32.
        param_dtype: of the parameters made by ``init``.
        scan_layers: one compiled layer run by ``nn.scan``; parameters then sit under ``layers``
            with a leading layer axis, in place of ``layers_0``, ``layers_1``, ...
        remat: what of a layer is recomputed in the backward pass, for memory: a name of
            `remat.POLICIES`. Parameters are unchanged.
    """

    scan_layers: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens, positions=None, segment_ids=None, cache=None, *, labels=None):
        """Logits (batch, time, vocab) float32, or ``(logits, cache)`` where a cache is given.

        Args:
            tokens: (batch, time) int32.
            positions: (batch, time) int32; by default from 0, or from where the cache ends.
            segment_ids: (batch, time) int32; a token sees the earlier ones of its own segment.
                0 is padding: no other segment sees it; its own logits are finite, to be ignored.
            cache: from `attention.init_cache` or an earlier call; ``tokens`` are written after it.
            labels: (batch, time) int32, what is to come at each place: then `Scores` of them are
                returned in place of logits, which are never in memory as a whole.
        """
        c, (kv, start) = self.config, read_cache(cache)
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        words = self.table("embed_tokens", c.vocab_size)
        x = words(tokens)
        if c.kind.plus_one:
            x = x * jnp.asarray(c.hidden_size**0.5, self.dtype)
        kinds = sorted(set(c.sliding))
        windows = tuple(c.sliding_window if slides else None for slides in kinds)
        seen = look_back(tokens, segment_ids, cache, windows)
        ropes = tuple(_rope(c, slides, positions) for slides in kinds)
        which = np.array([kinds.index(slides) for slides in c.sliding]) if len(kinds) > 1 else None
        x, kv = run_stack(
            Block, self.args, x, (ropes, seen, start), (which, kv),
            name="layers", depth=c.num_hidden_layers, scan=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        cache = next_cache(cache, kv, seen.slots, tokens.shape[1])
        return answer(self, words, self.norm("norm")(x), labels, cache, c.final_logit_softcapping)


def _rope(config: LlamaConfig, slides: bool, positions: jax.Array) -> Rope:
    """The rotation of a kind of layer."""
    own = config.rope_local_base_freq if slides else None
    if own is not None:
        return angles(positions, config.head_dim, own)
    return angles(positions, config.head_dim, config.rope_theta, config.rope_scaling)


FAMILY = Family(
    config=LlamaConfig,
    module=Llama,
    architectures=tuple(KINDS),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)
