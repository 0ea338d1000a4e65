"""Llama in Flax Linen: the decoder of LlamaForCausalLM, with packing, left padding and a cache.

Equal to transformers' torch model to float32 rounding. Parameters carry Hugging Face's module
names (``layers_0/self_attn/q_proj/kernel``), so an adapter's targets read the same here and there.
:func:`lora_mini_jax.models.load` fills them from safetensors.

Example:
    >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                      num_hidden_layers=2, num_attention_heads=4)
    >>> model, tokens = Llama(config), jnp.array([[1, 5, 7]])
    >>> params = model.init(jax.random.key(0), tokens)["params"]
    >>> model.apply({"params": params}, tokens).shape
    (1, 3, 32)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.models.family import Family
from lora_mini_jax.models.llama_config import SUPPORTED, LlamaConfig


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: Any = jnp.float32) -> dict:
    """An empty key-value cache for ``length`` tokens a row; writing past its end is not checked.

    Returns:
        ``k`` and ``v`` (layers, batch, length, kv_heads, head_dim) of ``dtype``; ``segment_ids``
        (batch, length) int32, 0 where a slot holds padding; ``length`` () int32, slots in use.
    """
    heads = (config.num_key_value_heads, config.head_dim)
    empty = jnp.zeros((config.num_hidden_layers, batch, length, *heads), dtype)
    slots = jnp.zeros((batch, length), jnp.int32)
    return {"k": empty, "v": empty, "segment_ids": slots, "length": jnp.zeros((), jnp.int32)}


def rope_angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (batch, time, 1, head_dim) float32 for int positions (batch, time)."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
    inv_freq = 1.0 / config.rope_theta**pairs
    if config.rope_scaling:
        inv_freq = config.rope_scaling(inv_freq)
    angles = positions[..., None].astype(jnp.float32) * inv_freq.astype(np.float32)
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = rope
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    # Halves, not neighbours: Hugging Face permutes Meta's weights for this layout.
    half = jnp.concatenate([-high, low], axis=-1)
    return (jnp.concatenate([low, high], axis=-1) * cos + half * sin).astype(x.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last axis, computed in float32, returned in ``dtype``."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Grouped-query attention; ``kv`` is this layer's slice of the cache, or None."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rope, mask, start, kv):
        c = self.config

        def project(name: str, features: int) -> nn.Dense:
            return _dense(self, name, features, bias=c.attention_bias)

        def heads(name: str, count: int) -> jax.Array:
            return project(name, count * c.head_dim)(x).reshape(*x.shape[:2], count, c.head_dim)

        q = _rotate(heads("q_proj", c.num_attention_heads), rope)
        k = _rotate(heads("k_proj", c.num_key_value_heads), rope)
        v = heads("v_proj", c.num_key_value_heads)
        if kv is not None:
            at = (0, start, 0, 0)
            kv = tuple(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip(kv, (k, v), strict=True)
            )
            k, v = (stored.astype(q.dtype) for stored in kv)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)
        return project("o_proj", c.hidden_size)(out.reshape(*x.shape[:2], -1)), kv


class MLP(nn.Module):
    """The gated feed-forward: ``down(silu(gate(x)) * up(x))``."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        wide, bias = self.config.intermediate_size, self.config.mlp_bias
        gate = nn.silu(_dense(self, "gate_proj", wide, bias)(x))
        gated = gate * _dense(self, "up_proj", wide, bias)(x)
        return _dense(self, "down_proj", self.config.hidden_size, bias)(gated)


class Block(nn.Module):
    """One decoder layer, in the (carry, per-layer) form that ``nn.scan`` wants."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, rope, mask, start, kv):
        args = (self.config, self.dtype, self.param_dtype)
        norm_args = (self.config.rms_norm_eps, self.dtype, self.param_dtype)
        y = RMSNorm(*norm_args, name="input_layernorm")(x)
        y, kv = Attention(*args, name="self_attn")(y, rope, mask, start, kv)
        x = x + y
        y = RMSNorm(*norm_args, name="post_attention_layernorm")(x)
        return x + MLP(*args, name="mlp")(y), kv


class Llama(nn.Module):
    """The language model: token ids to logits of the next token.

    Attributes:
        config: the shape.
        dtype: of the computation; normalisation, softmax, rotation and logits stay float32.
        param_dtype: of the parameters made by ``init``.
        scan_layers: one compiled layer run by ``nn.scan``; parameters then sit under ``layers``
            with a leading layer axis, in place of ``layers_0``, ``layers_1``, ...
        remat: recompute each layer in the backward pass, for memory; parameters are unchanged.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, tokens, positions=None, segment_ids=None, cache=None):
        """Logits (batch, time, vocab) float32, or ``(logits, cache)`` where a cache is given.

        Args:
            tokens: (batch, time) int32.
            positions: (batch, time) int32; by default from 0, or from where the cache ends.
            segment_ids: (batch, time) int32; a token sees the earlier ones of its own segment.
                0 is padding: no other segment sees it; its own logits are finite, to be ignored.
            cache: from :func:`init_cache` or an earlier call; ``tokens`` are written after it.
        """
        c, start = self.config, 0 if cache is None else cache["length"]
        if positions is None:
            positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        mask, slots = _mask(tokens, segment_ids, cache)
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(c.initializer_range), name="embed_tokens",
        )  # fmt: skip
        kv = None if cache is None else (cache["k"], cache["v"])
        x, kv = self._layers(embed(tokens), rope_angles(c, positions), mask, start, kv)
        x = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        if c.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = _dense(self, "lm_head", c.vocab_size, bias=False)(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits
        length = start + tokens.shape[1]
        return logits, {"k": kv[0], "v": kv[1], "segment_ids": slots, "length": length}

    def _layers(self, x, rope, mask, start, kv):
        """Run the blocks, each with its slice of the cache; the slices come back stacked."""
        # Inside a scan XLA cannot merge the recomputation away, so the costly barrier can go.
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        args, depth = (self.config, self.dtype, self.param_dtype), self.config.num_hidden_layers
        if self.scan_layers:
            scanned = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth,
                in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            )  # fmt: skip
            return scanned(*args, name="layers")(x, rope, mask, start, kv)
        after = []
        for i in range(depth):
            layer_kv = jax.tree.map(lambda leaf, i=i: leaf[i], kv)
            x, layer_kv = block(*args, name=f"layers_{i}")(x, rope, mask, start, layer_kv)
            after.append(layer_kv)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *after)


def _dense(module: Any, name: str, features: int, bias: bool) -> nn.Dense:
    """A projection of ``module`` with its dtypes and the config's initialiser."""
    init = nn.initializers.normal(module.config.initializer_range)
    return nn.Dense(
        features, use_bias=bias, dtype=module.dtype, param_dtype=module.param_dtype,
        kernel_init=init, name=name,
    )  # fmt: skip


def _mask(tokens, segment_ids, cache):
    """(mask, slots): (batch, 1, time, keys) bool or None for plain causal; segments of the keys."""
    if segment_ids is None and cache is None:
        return None, None
    segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    start, slots = 0, segments
    if cache is not None:
        start = cache["length"]
        stored = cache["segment_ids"]
        slots = jax.lax.dynamic_update_slice(stored, segments.astype(stored.dtype), (0, start))
    queries = start + jnp.arange(tokens.shape[1])
    causal = queries[:, None] >= jnp.arange(slots.shape[1])
    # Padding sees padding: no query row is ever fully masked, so no softmax can be 0/0.
    mask = causal & (segments[:, :, None] == slots[:, None, :])
    return mask[:, None], slots


FAMILY = Family(
    config=LlamaConfig,
    module=Llama,
    architectures=SUPPORTED,
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)
