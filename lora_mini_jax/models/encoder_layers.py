"""The pieces of BERT, RoBERTa and DeBERTa: embeddings, attention, layers and their stack.

Every piece carries Hugging Face's module name, so that a path here is a name there. There is no
dropout anywhere: a frozen base has no use for it, and an adapter's own is the method's setting.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.cudnn_attention import by_cudnn
from lora_mini_jax.models.part import Part
from lora_mini_jax.models.stack import run_stack


class Embeddings(Part):
    """Words, token types and positions, summed and normalised; the last two not in every model."""

    def setup(self) -> None:
        self.word_embeddings = self.table(None, self.config.vocab_size)
        if self.config.has_positions:
            self.position_embeddings = self.table(None, self.config.max_position_embeddings)
        if self.config.type_vocab_size:
            self.token_type_embeddings = self.table(None, self.config.type_vocab_size)
        self.LayerNorm = self.norm(None)

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
        return self.norm("LayerNorm")(self.linear("dense", self.config.hidden_size)(x) + before)


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
