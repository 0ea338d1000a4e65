"""DeBERTa-v2 and v3 in Flax Linen, with each of their usual heads.

The layers are BERT's, but for attention: beside the products of contents it has products of each
content with the distance to the other token (disentangled attention). The architectures are
DebertaV2Model, DebertaV2ForSequenceClassification, DebertaV2ForTokenClassification and
DebertaV2ForMaskedLM.

Papers: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention" (2021), equation 4;
"DeBERTaV3: Improving DeBERTa using ELECTRA-Style Pre-Training" (2023).

Example:
    >>> config = DebertaV2Config(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                          num_hidden_layers=2, num_attention_heads=4,
    ...                          position_buckets=4, pos_att_type=("c2p", "p2c"))
    >>> model, tokens = DebertaV2(config), jnp.array([[1, 5, 7]])
    >>> out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    >>> hidden, pooled = out
    >>> hidden.shape, pooled
    ((1, 3, 16), None)
"""

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.models.deberta_config import DebertaV2Config
from lora_mini_jax.models.encoder import Encoder, encoder_family
from lora_mini_jax.models.encoder_layers import Stack
from lora_mini_jax.models.heads import BertWords, Pooler
from lora_mini_jax.models.part import Part


def buckets(distance: np.ndarray, count: int, longest: int) -> np.ndarray:
    """Distances (int) with far ones put together: exact below ``count / 2``, logarithmic beyond.

    Example:
        >>> buckets(np.array([-40, -9, 3, 4, 5, 6, 40]), count=8, longest=32).tolist()
        [-8, -6, 3, 4, 5, 5, 8]
    """
    middle = count // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32)
    # In float32 step by step, as in Hugging Face: a distance on an edge must fall on the same side.
    steps = np.log(far / np.float32(middle)) / np.log(np.float32((longest - 1) / middle))
    shared = np.ceil(steps * np.float32(middle - 1)).astype(np.int32) + middle
    return np.where(np.abs(distance) <= middle, distance, shared * np.sign(distance))


def rows(config: DebertaV2Config, time: int) -> jax.Array:
    """The row of the distances' table for each query and key: (time, time) int32."""
    distance = np.arange(1 - time, time)
    if config.position_buckets > 0:
        distance = buckets(distance, config.position_buckets, config.longest)
    row = np.clip(distance + config.span, 0, 2 * config.span - 1).astype(np.int32)
    # Looked up from a vector: a (time, time) constant would be compiled into the program.
    at = jnp.arange(time)
    return jnp.asarray(row)[at[:, None] - at[None, :] + time - 1]


class DisentangledAttention(Part):
    """Attention by content and by distance; ``relative`` is the distances' table and `rows`."""

    @nn.compact
    def __call__(self, x, mask, relative):
        c, (table, row) = self.config, relative

        def project(name: str) -> nn.Dense:
            return self.linear(name, c.hidden_size)

        query, key = project("query_proj"), project("key_proj")
        q, k, v = (self.heads(y) for y in (query(x), key(x), project("value_proj")(x)))
        # Every kind of product adds its variance.
        scale = (c.head_dim * (1 + len(set(c.pos_att_type)))) ** -0.5
        bias = []
        if "c2p" in c.pos_att_type:
            keys = self.heads((key if c.share_att_key else project("pos_key_proj"))(table))
            bias.append(_at(jnp.einsum("bqhd,rhd->bhqr", q, keys), row))
        if "p2c" in c.pos_att_type:
            queries = self.heads((query if c.share_att_key else project("pos_query_proj"))(table))
            by_key = _at(jnp.einsum("bkhd,rhd->bhkr", k, queries), row.T)
            bias.append(by_key.swapaxes(-1, -2))
        bias = scale * sum(bias) if bias else None
        out = jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale)
        return out.reshape(x.shape)


def _at(products: jax.Array, row: jax.Array) -> jax.Array:
    """Products with every row of the table, (..., time, rows), at those in ``row`` (time, time)."""
    return jnp.take_along_axis(products, row[None, None], axis=-1)


class DisentangledStack(Stack):
    """The layers, and the table of distances that all of them share."""

    kind: ClassVar[Any] = DisentangledAttention

    def relative(self, time: int) -> tuple[jax.Array, jax.Array]:
        c = self.config
        table = self.table("rel_embeddings", 2 * c.span)(jnp.arange(2 * c.span))
        if c.norm_rel_ebd == "layer_norm":
            table = self.norm("LayerNorm")(table)
        return table, rows(c, time)


class DebertaV2(Encoder):
    """A DeBERTa with the head that ``config.task`` names; see `Encoder` for the rest."""

    stack: ClassVar[Any] = DisentangledStack
    blanks_padding: ClassVar[bool] = True

    def head(self, x: jax.Array, attend: Any) -> Any:
        c = self.config
        if c.task == "masked-lm":
            return BertWords(*self.args, name="cls")(x, attend)
        if c.task is None:
            return x, None
        if c.task == "sequence-classification":
            gelu = partial(jax.nn.gelu, approximate=False)
            x = Pooler(*self.args, gelu, name="pooler")(x)
        return self.linear("classifier", len(c.labels))(x)


FAMILY = encoder_family(DebertaV2Config, DebertaV2, "deberta", "cls.predictions", "pooler")
