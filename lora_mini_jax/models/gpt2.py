"""GPT-2 in Flax Linen, with packing, left padding and a cache, as the Llama has them.

Parameters carry Hugging Face's module names (``h_0/attn/c_attn/kernel``); queries, keys and values
are one kernel, as in the file, where kernels are (in, out) too.
Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

Example:
    >>> config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4)
    >>> model, tokens = GPT2(config), jnp.array([[1, 5, 7]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 32)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.attention import attend, next_cache, read_cache, update_cache
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.gpt2_config import GPT2Config
from lora_mini_jax.models.masks import look_back
from lora_mini_jax.models.part import Part
from lora_mini_jax.models.scoring import answer
from lora_mini_jax.models.stack import run_stack


class Attention(Part):
    """Every token to the earlier ones of its segment; ``kv`` is this layer's slice of the cache."""

    @nn.compact
    def __call__(self, x, seen, start, number, kv):
        c = self.config
        joined = self.linear("c_attn", 3 * c.n_embd)(x)
        q, k, v = map(self.heads, jnp.split(joined, 3, axis=-1))
        if c.scale_attn_by_inverse_layer_idx:
            q = q / number.astype(q.dtype)
        if kv is not None:
            kv = update_cache(kv, k, v, start)
            k, v = (stored.astype(q.dtype) for stored in kv)
        scale = None if c.scale_attn_weights else 1.0
        out = attend(q, k, v, seen, scale=scale)
        return self.linear("c_proj", c.n_embd)(out.reshape(x.shape)), kv


class MLP(Part):
    """The feed-forward: ``c_proj(act(c_fc(x)))``."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.activate(self.linear("c_fc", self.config.intermediate_size)(x))
        return self.linear("c_proj", self.config.n_embd)(wide)


class Block(Part):
    """One layer, as `run_stack` wants it; ``own`` is its number, from 1, and its cache."""

    @nn.compact
    def __call__(self, x, seen, start, own):
        number, kv = own
        y = self.norm("ln_1")(x)
        y, kv = Attention(*self.args, name="attn")(y, seen, start, number, kv)
        x = x + y
        return x + MLP(*self.args, name="mlp")(self.norm("ln_2")(x)), kv


class GPT2(Part):
    """The language model: token ids to logits of the next token.

    Attributes:
        config: its shape, a `GPT2Config`.
        dtype: of the computation; normalisation, softmax and logits stay float32.
        param_dtype: of the parameters made by ``init``.
        scan_layers: one compiled layer run by ``nn.scan``; parameters then sit under ``h`` with a
            leading layer axis, in place of ``h_0``, ``h_1``, ...
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
            positions: (batch, time) int32, below ``n_positions``; by default from 0, or from where
                the cache ends.
            segment_ids: (batch, time) int32; a token sees the earlier ones of its own segment.
                0 is padding: no other segment sees it; its own logits are finite, to be ignored.
            cache: from `attention.init_cache` or an earlier call; ``tokens`` are written after it.
            labels: (batch, time) int32, what is to come at each place: then `Scores` of them are
                returned in place of logits, which are never in memory as a whole.

        Raises:
            UserError: more tokens than positions, where ``positions`` are not given.
        """
        c, (kv, start) = self.config, read_cache(cache)
        if positions is None:
            if tokens.shape[1] > c.n_positions:
                raise UserError(f"{tokens.shape[1]} tokens are too many for a model of "
                                f"{c.n_positions} positions: give fewer")  # fmt: skip
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        words = self.table("wte", c.vocab_size)
        x = words(tokens) + self.table("wpe", c.n_positions)(positions)
        seen = look_back(tokens, segment_ids, cache)
        x, kv = run_stack(
            Block, self.args, x, (seen, start), (1 + jnp.arange(c.n_layer), kv),
            name="h", depth=c.n_layer, scan=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        cache = next_cache(cache, kv, seen.slots, tokens.shape[1])
        return answer(self, words, self.norm("ln_f")(x), labels, cache)


FAMILY = Family(
    config=GPT2Config,
    module=GPT2,
    architectures=("GPT2LMHeadModel",),
    prefix="transformer.",
    may_lack_prefix=True,
    keeps_layout=True,
    stack="h",
    copies={"lm_head.weight": "transformer.wte.weight"},
    ignored=r"\.attn\.(masked_)?bias$",
)
