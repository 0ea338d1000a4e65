"""RoBERTa and XLM-R in Flax Linen, with each of their usual heads.

The layers are BERT's; positions count the tokens that are no padding, from behind the padding's
id, and the heads are of another make. The architectures are RobertaModel,
RobertaForSequenceClassification, RobertaForTokenClassification and RobertaForMaskedLM, and the same
of XLMRoberta.

Papers: Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach" (2019); Conneau et
al., "Unsupervised Cross-lingual Representation Learning at Scale" (2020).

Example:
    >>> config = RobertaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                        num_hidden_layers=2, num_attention_heads=4, task="masked-lm")
    >>> model, tokens = Roberta(config), jnp.array([[0, 5, 7, 1]])
    >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    >>> logits.shape
    (1, 4, 32)
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.models.encoder import Encoder, check_length, encoder_family
from lora_mini_jax.models.encoder_config import RobertaConfig, XLMRobertaConfig
from lora_mini_jax.models.heads import Pooler, RobertaClassifier, RobertaWords


class Roberta(Encoder):
    """A RoBERTa with the head that ``config.task`` names; see `Encoder` for the rest."""

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """The tokens' positions: those of padding are its id, the others count on from there."""
        padding = self.config.pad_token_id
        check_length(input_ids, self.config.max_position_embeddings - padding - 1)
        real = (input_ids != padding).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + padding

    def head(self, x: jax.Array, attend: Any) -> Any:
        c = self.config
        if c.task == "masked-lm":
            return RobertaWords(*self.args, name="lm_head")(x, attend)
        if c.task == "token-classification":
            return self.linear("classifier", len(c.labels))(x)
        if c.task == "sequence-classification":
            return RobertaClassifier(*self.args, name="classifier")(x)
        return x, Pooler(*self.args, name="pooler")(x)


class XLMRoberta(Roberta):
    """An XLM-R: a RoBERTa of another name and vocabulary."""


FAMILIES = (
    encoder_family(RobertaConfig, Roberta, "roberta", "lm_head"),
    encoder_family(XLMRobertaConfig, XLMRoberta, "roberta", "lm_head"),
)
