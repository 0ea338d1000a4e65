"""The layers of a T5's encoder and decoder, and the distances that attention knows there.

There is no dropout: a frozen base has no use for it, and an adapter's own is the method's setting.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.models.attention import attend, update_cache
from lora_mini_jax.models.norms import RMSNorm
from lora_mini_jax.models.part import Part
from lora_mini_jax.models.t5_config import T5Config


class T5Part(Part):
    """A `Part` with T5's norms and initialisers."""

    @nn.nowrap
    def initializer(self, std: float | None) -> Any:
        """Normal, with a standard deviation that is the config's factor unless one is given, which
        it multiplies."""
        return nn.initializers.normal(self.config.initializer_factor * (std or 1.0))

    @nn.nowrap
    def norm(self, name: str | None) -> RMSNorm:
        """A norm without a mean."""
        return RMSNorm(self.config.layer_norm_epsilon, self.dtype, self.param_dtype, name=name)


def buckets(distances: int, count: int, longest: int) -> np.ndarray:
    """The bucket of each distance 0, 1, ... ``distances - 1`` to one side, int32 below ``count``.

    Half of the buckets are a distance each, the others grow like powers up to ``longest``.
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
    Transformer" (2020), section 2.1.

    Example:
        >>> buckets(10, 6, 9)
        array([0, 1, 2, 3, 3, 4, 4, 5, 5, 5], dtype=int32)
    """
    exact = count // 2
    # In float32, as where the weights were trained: powers of two lie on the edge of a bucket.
    at = np.maximum(np.arange(distances), 1).astype(np.float32)
    powers = np.log(at / np.float32(exact)) / np.float32(math.log(longest / exact))
    far = exact + (powers * np.float32(count - exact)).astype(np.int32)
    near = np.arange(distances, dtype=np.int32)
    return np.where(near < exact, near, np.minimum(far, count - 1)).astype(np.int32)


def distance_rows(config: T5Config, both_ways: bool, start: Any, time: int, keys: int) -> jax.Array:
    """Which row of the table of distances each pair has, (time, keys) int32.

    Args:
        config: says how many rows there are.
        both_ways: whether tokens see what follows them, to which half of the rows then belongs.
        start: the position of the first query; keys begin at 0.
        time, keys: how many of each.
    """
    count = config.relative_attention_num_buckets // (2 if both_ways else 1)
    near = buckets(max(time, keys), count, config.relative_attention_max_distance)
    ahead = jnp.arange(keys) - (start + jnp.arange(time))[:, None]
    # Where tokens do not see what follows, it does not matter which row that has.
    row = jnp.asarray(near)[jnp.abs(ahead)]
    return row + count * (ahead > 0) if both_ways else row


class Attention(T5Part):
    """Attention without a scale: of ``x`` to ``source``, or to ``kv``, what it was projected to."""

    @nn.compact
    def __call__(self, x, source, mask, bias, start, kv):
        c = self.config
        inner = c.num_heads * c.d_kv

        def heads(name: str, of: jax.Array, std: float) -> jax.Array:
            return self.heads(self.linear(name, inner, bias=False, std=std)(of))

        q = heads("q", x, (c.d_model * c.d_kv) ** -0.5)
        if source is not None:
            new = (heads("k", source, c.d_model**-0.5), heads("v", source, c.d_model**-0.5))
            kv = new if kv is None else update_cache(kv, *new, start)
        k, v = (stored.astype(q.dtype) for stored in kv)
        out = attend(q, k, v, mask, scale=1.0, bias=bias).reshape(*x.shape[:2], inner)
        return self.linear("o", c.d_model, bias=False, std=inner**-0.5)(out), kv


class SelfLayer(T5Part):
    """A norm, attention of the tokens to each other, and what it adds."""

    @nn.compact
    def __call__(self, x, mask, bias, start, kv):
        y = self.norm("layer_norm")(x)
        y, kv = Attention(*self.args, name="SelfAttention")(y, y, mask, bias, start, kv)
        return x + y, kv


class CrossLayer(T5Part):
    """The same to what the encoder gave; ``kv`` is that in an earlier call."""

    @nn.compact
    def __call__(self, x, memory, mask, kv):
        y = self.norm("layer_norm")(x)
        y, kv = Attention(*self.args, name="EncDecAttention")(y, memory, mask, None, 0, kv)
        return x + y, kv


class FeedForward(T5Part):
    """``wo(act(wi(x)))``, or gated ``wo(act(wi_0(x)) * wi_1(x))``."""

    @nn.compact
    def __call__(self, x):
        c = self.config

        def wide(name: str) -> jax.Array:
            return self.linear(name, c.d_ff, bias=False, std=c.d_model**-0.5)(x)

        y = self.activate(wide("wi_0" if c.gated else "wi"))
        y = y * wide("wi_1") if c.gated else y
        return self.linear("wo", c.d_model, bias=False, std=c.d_ff**-0.5)(y)


class ForwardLayer(T5Part):
    """A norm, the feed-forward, and what it adds."""

    @nn.compact
    def __call__(self, x):
        y = self.norm("layer_norm")(x)
        return x + FeedForward(*self.args, name="DenseReluDense")(y)


class Block(T5Part):
    """One layer of either half, as `run_stack` wants it; ``own`` is what it has in the cache."""

    decoder: bool = False

    @nn.compact
    def __call__(self, x, mask, bias, start, memory, memory_mask, own):
        kv, cross = own
        x, new = SelfLayer(*self.args, name="layer_0")(x, mask, bias, start, kv)
        if self.decoder:
            layer = CrossLayer(*self.args, name="layer_1")
            x, cross = layer(x, memory, memory_mask, cross)
        x = ForwardLayer(*self.args, name="layer_2" if self.decoder else "layer_1")(x)
        return x, None if kv is None else (new, cross)
