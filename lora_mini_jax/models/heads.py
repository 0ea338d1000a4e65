"""What stands on an encoder: poolers, classifiers and masked language models."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.part import Part

Attend = Callable[[jax.Array], jax.Array]
"""(..., width) to (..., vocab): the products with every word's embedding."""


class Pooler(Part):
    """The first token's state, through a layer of its own; the activation is the family's."""

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh

    @nn.compact
    def __call__(self, x):
        return self.activation(self.linear("dense", self.config.hidden_size)(x[:, 0]))


class RobertaClassifier(Part):
    """RoBERTa's head for sequences: a pooler of its own and the labels."""

    @nn.compact
    def __call__(self, x):
        first = jnp.tanh(self.linear("dense", self.config.hidden_size)(x[:, 0]))
        return self.linear("out_proj", len(self.config.labels))(first)


class RobertaWords(Part):
    """RoBERTa's masked language model: a layer, then the products with all words, and a bias."""

    @nn.compact
    def __call__(self, x, attend: Attend):
        # GELU whatever the config says, as in Hugging Face.
        x = jax.nn.gelu(self.linear("dense", self.config.hidden_size)(x), approximate=False)
        return _words(self, self.norm("layer_norm")(x), attend)


class Transform(Part):
    """A layer with the config's activation, normalised."""

    @nn.compact
    def __call__(self, x):
        x = self.activate(self.linear("dense", self.config.hidden_size)(x))
        return self.norm("LayerNorm")(x)


class Predictions(Part):
    """The products of the transformed states with all words, and a bias."""

    @nn.compact
    def __call__(self, x, attend: Attend):
        return _words(self, Transform(*self.args, name="transform")(x), attend)


class BertWords(Part):
    """BERT's and DeBERTa's masked language model, under the names it has in files."""

    @nn.compact
    def __call__(self, x, attend: Attend):
        return Predictions(*self.args, name="predictions")(x, attend)


def _words(part: Part, x: jax.Array, attend: Attend) -> jax.Array:
    """Logits (..., vocab) float32 through the tied table, with a bias of ``part``'s own."""
    shape = (part.config.vocab_size,)
    bias = part.param("bias", nn.initializers.zeros, shape, part.param_dtype)
    return attend(x).astype(jnp.float32) + bias.astype(jnp.float32)
