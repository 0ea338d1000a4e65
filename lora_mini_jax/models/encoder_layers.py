"""The pieces of BERT, RoBERTa and DeBERTa: embeddings, attention, layers and their stack.

GPT-2 is made of the same `Part`. Every piece carries Hugging Face's module name, so that a path
here is a name there. There is no dropout anywhere: a frozen base has no use for it, and an
adapter's own is the method's setting.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.cudnn_attention import by_cudnn
from lora_mini_jax.models.stack import run_stack


class Part(nn.Module):
    """A piece of a model: its config, its dtypes, and the layers that all pieces are made of."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def args(self) -> tuple[Any, Any, Any]:
        """What a piece of this piece is made with."""
        return self.config, self.dtype, self.param_dtype

    @nn.nowrap
    def linear(self, name: str, features: int, bias: bool = True) -> nn.Dense:
        """A projection with the config's initialiser."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Dense(
            features, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype,
            kernel_init=init, name=name,
        )  # fmt: skip

    @nn.nowrap
    def table(self, rows: int, name: str | None = None) -> nn.Embed:
        """A table of rows as wide as the model."""
        init = nn.initializers.normal(self.config.initializer_range)
        return nn.Embed(
            rows, self.config.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype,
            embedding_init=init, name=name,
        )  # fmt: skip

    @nn.nowrap
    def norm(self, name: str | None = "LayerNorm") -> nn.LayerNorm:
        """A layer norm: computed in float32, returned in ``dtype``."""
        # The fast variance, E[x^2] - E[x]^2, loses digits that torch keeps.
        return nn.LayerNorm(
            self.config.layer_norm_eps, dtype=self.dtype, param_dtype=self.param_dtype,
            use_fast_variance=False, name=name,
        )  # fmt: skip

    @nn.nowrap
    def heads(self, x: jax.Array) -> jax.Array:
        """(batch, time, width) as (batch, time, heads, head_dim)."""
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    @nn.nowrap
    def activate(self, x: jax.Array) -> jax.Array:
        """The config's activation."""
        return ACTIVATIONS[self.config.hidden_act](x)


class Embeddings(Part):
    """Words, token types and positions, summed and normalised; the last two not in every model."""

    def setup(self) -> None:
        self.word_embeddings = self.table(self.config.vocab_size)
        if self.config.has_positions:
            self.position_embeddings = self.table(self.config.max_position_embeddings)
        if self.config.type_vocab_size:
            self.token_type_embeddings = self.table(self.config.type_vocab_size)
        self.LayerNorm = self.norm(name=None)

    def __call__(self, input_ids, token_type_ids, positions):
        x = self.word_embeddings(input_ids)
        if self.config.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        if self.config.has_positions:
            x = x + self.position_embeddings(positions)
        return self.LayerNorm(x)


class SelfAttention(Part):
    """Every token to every token that is no padding."""

    @nn.compact
    def __call__(self, x, mask, relative):
        q, k, v = (self.heads(self.linear(name, self.config.hidden_size)(x))
                   for name in ("query", "key", "value"))  # fmt: skip
        out = by_cudnn(q, k, v, mask, q.shape[-1] ** -0.5)
        if out is None:
            out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return out.reshape(x.shape)


class Residual(Part):
    """``norm(dense(x) + before)``: Hugging Face's ``output``."""

    @nn.compact
    def __call__(self, x, before):
        return self.norm()(self.linear("dense", self.config.hidden_size)(x) + before)


class Attention(Part):
    """Attention of one kind, and what it adds to its input."""

    kind: Any = SelfAttention

    @nn.compact
    def __call__(self, x, mask, relative):
        y = self.kind(*self.args, name="self")(x, mask, relative)
        return Residual(*self.args, name="output")(y, x)


class Intermediate(Part):
    """The wide half of the feed-forward, activated."""

    @nn.compact
    def __call__(self, x):
        return self.activate(self.linear("dense", self.config.intermediate_size)(x))


class Layer(Part):
    """One encoder layer, as `run_stack` wants it."""

    kind: Any = SelfAttention

    @nn.compact
    def __call__(self, x, mask, relative, own):
        x = Attention(*self.args, self.kind, name="attention")(x, mask, relative)
        wide = Intermediate(*self.args, name="intermediate")(x)
        return Residual(*self.args, name="output")(wide, x), None


class Stack(Part):
    """The layers in their order; parameters under ``layer_0``, ... or, scanned, ``layer``."""

    scan_layers: bool = False
    remat: str = "none"
    kind: ClassVar[Any] = SelfAttention

    @nn.compact
    def __call__(self, x, mask):
        relative = self.relative(x.shape[1])
        x, _ = run_stack(
            Layer, (*self.args, self.kind), x, (mask, relative), None,
            name="layer", depth=self.config.num_hidden_layers,
            scan=self.scan_layers, remat=self.remat,
        )  # fmt: skip
        return x

    def relative(self, time: int) -> Any:
        """What every layer's attention knows of distances; most families: nothing."""
        return None
