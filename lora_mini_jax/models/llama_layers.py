"""The layers of a decoder of Llama's family; every difference within it is a field of the config
or of its kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.attention import attend, update_cache
from lora_mini_jax.models.norms import RMSNorm
from lora_mini_jax.models.part import Part
from lora_mini_jax.models.rotary import rotate


class LlamaPart(Part):
    """A `Part` with norms of the architecture's kind."""

    @nn.nowrap
    def norm(self, name: str | None) -> RMSNorm:
        """A norm without a mean."""
        offset = float(self.config.kind.plus_one)
        return RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, offset, name=name)


class Attention(LlamaPart):
    """Grouped-query attention; ``kv`` is this layer's slice of the cache, or None."""

    @nn.compact
    def __call__(self, x, rope, seen, start, kv):
        c = self.config

        def heads(name: str, count: int) -> jax.Array:
            bias = c.attention_bias or c.kind.qkv_bias
            return self.heads(self.linear(name, count * c.head_dim, bias=bias)(x))

        q, k = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads)
        v = heads("v_proj", c.num_key_value_heads)
        if c.kind.qk_norm:
            q, k = self.norm("q_norm")(q), self.norm("k_norm")(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if kv is not None:
            kv = update_cache(kv, k, v, start)
            k, v = (stored.astype(q.dtype) for stored in kv)
        scale = (c.query_pre_attn_scalar or c.head_dim) ** -0.5
        cap = c.attn_logit_softcapping
        out = attend(q, k, v, seen, scale=scale, softcap=cap)
        out = out.reshape(*x.shape[:2], -1)
        return self.linear("o_proj", c.hidden_size, bias=c.attention_bias)(out), kv


class MLP(LlamaPart):
    """The gated feed-forward: ``down(act(gate(x)) * up(x))``."""

    @nn.compact
    def __call__(self, x):
        wide, bias = self.config.intermediate_size, self.config.mlp_bias
        gate = self.activate(self.linear("gate_proj", wide, bias=bias)(x))
        gated = gate * self.linear("up_proj", wide, bias=bias)(x)
        return self.linear("down_proj", self.config.hidden_size, bias=bias)(gated)


class Block(LlamaPart):
    """One decoder layer, as `run_stack` wants it.

    ``ropes`` and ``seen`` are of every kind of layer. ``own`` are which of these is this layer's,
    None where there is one kind, and its slice of the cache.
    """

    @nn.compact
    def __call__(self, x, ropes, seen, start, own):
        (which, kv), rope = own, ropes[0]
        if which is not None:
            rope = jax.tree.map(lambda *leaves: jnp.stack(leaves)[which], *ropes)
        y = self.norm("input_layernorm")(x)
        y, kv = Attention(*self.args, name="self_attn")(y, rope, seen.by(which), start, kv)
        if not self.config.kind.sandwich:
            x = x + y
            y = self.norm("post_attention_layernorm")(x)
            return x + MLP(*self.args, name="mlp")(y), kv
        x = x + self.norm("post_attention_layernorm")(y)
        y = MLP(*self.args, name="mlp")(self.norm("pre_feedforward_layernorm")(x))
        return x + self.norm("post_feedforward_layernorm")(y), kv
