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

from dataclasses import dataclass, fields
from math import pi
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError

SUPPORTED = ("LlamaForCausalLM",)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_REQUIRED = (*_SIZES, "num_attention_heads")


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the slow rotary frequencies; names and units as in Hugging Face."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, inv_freq: np.ndarray) -> np.ndarray:
        """Scale inverse frequencies (radians a token): slow ones by 1/factor, fast ones not."""
        turns = self.original_max_position_embeddings * inv_freq / (2 * pi)
        span = self.high_freq_factor - self.low_freq_factor
        fast = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return (1 - fast) * inv_freq / self.factor + fast * inv_freq


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under Hugging Face's names and with its defaults.

    ``num_key_value_heads=0`` and ``head_dim=0`` mean "as in Hugging Face": one key-value head a
    query head, and ``hidden_size // num_attention_heads``; the instance holds the numbers.

    Raises:
        UserError: sizes that are not whole numbers from 1, or heads that do not divide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in (*_REQUIRED, "max_position_embeddings")}
        sizes |= {n: getattr(self, n) or 1 for n in ("num_key_value_heads", "head_dim")}
        bad = [f"{n}={v!r} is not a whole number from 1" for n, v in sizes.items()
               if type(v) is not int or v < 1]  # fmt: skip
        reals = {n: getattr(self, n) for n in ("rms_norm_eps", "rope_theta", "initializer_range")}
        bad += [f"{n}={v!r} is not a positive number" for n, v in reals.items()
                if not isinstance(v, int | float) or v <= 0]  # fmt: skip
        if not bad:
            heads = self.num_attention_heads
            # The dataclass is frozen so that a model is hashable; this is its one moment to settle.
            object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
            if heads % self.num_key_value_heads:
                bad.append(f"num_attention_heads={heads} is not a multiple of "
                           f"num_key_value_heads={self.num_key_value_heads}")  # fmt: skip
            if not self.head_dim and self.hidden_size % heads:
                bad.append(f"hidden_size={self.hidden_size} is not a multiple of "
                           f"num_attention_heads={heads}")  # fmt: skip
            object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
            if self.head_dim % 2:
                bad.append(f"head_dim={self.head_dim} is odd, and rotary positions need pairs")
        if bad:
            raise UserError(f"Llama config: {'; '.join(bad)}; correct config.json")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Read the dict of a ``config.json``, written by transformers 4 or 5.

        Raises:
            UserError: another architecture or activation, a rotary scaling other than default or
                llama3, and missing or senseless values, all in one line.
        """
        unnamed = SUPPORTED if hf.get("model_type") == "llama" else ()
        given = hf.get("architectures") or unnamed
        bad = []
        if list(given) != list(SUPPORTED):
            name = ", ".join(map(str, given)) or hf.get("model_type")
            bad.append(f"architecture {name!r} is not supported, only {', '.join(SUPPORTED)}")
        if hf.get("hidden_act", "silu") != "silu":
            bad.append(f"hidden_act {hf['hidden_act']!r} is not supported, only 'silu'")
        if missing := [name for name in _REQUIRED if hf.get(name) is None]:
            bad.append(f"missing {', '.join(missing)}")
        theta, scaling, problem = _read_rope(hf)
        if bad := bad + problem:
            raise UserError(f"Llama config: {'; '.join(bad)}; use another model or its config.json")
        # A null in config.json means the default, except for the ids, where it means "none".
        known: dict[str, Any] = {f.name: hf[f.name] for f in fields(cls) if f.name in hf}
        known = {k: v for k, v in known.items() if v is not None or k.endswith("token_id")}
        if isinstance(eos := known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(eos)
        known |= {"rope_theta": theta, "rope_scaling": scaling}
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict, with the rotary settings where transformers 4 and 5 look."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        scaling = self.rope_scaling
        rope = {"rope_type": "llama3", **vars(scaling)} if scaling else {"rope_type": "default"}
        return out | {
            "architectures": list(SUPPORTED), "model_type": "llama", "hidden_act": "silu",
            "rope_scaling": rope if scaling else None,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
        }  # fmt: skip


def _read_rope(hf: dict[str, Any]) -> tuple[float, Llama3Rope | None, list[str]]:
    """(theta, scaling, problems) from either generation of ``config.json``."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return 0.0, None, [f"rope_parameters {rope!r} is not an object"]
    theta = rope.get("rope_theta", hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return theta, None, ["partial_rotary_factor other than 1 is not supported"]
    if kind == "default":
        return theta, None, []
    if kind != "llama3":
        return theta, None, [f"rope_type {kind!r} is not supported, only 'default' and 'llama3'"]
    names = [f.name for f in fields(Llama3Rope)]
    values: dict[str, Any] = {name: rope.get(name) for name in names}
    wrong = [n for n, v in values.items() if not isinstance(v, int | float) or v <= 0]
    if wrong:
        return theta, None, [f"llama3 rope needs positive numbers for {', '.join(wrong)}"]
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        return theta, None, ["llama3 rope needs high_freq_factor above low_freq_factor"]
    return theta, Llama3Rope(**values), []


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
