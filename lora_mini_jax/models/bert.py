"""BERT in Flax Linen, with each of its usual heads.

Equal to transformers' torch models in evaluation, to float32 rounding; there is no dropout. The
architectures are BertModel, BertForSequenceClassification, BertForTokenClassification and
BertForMaskedLM, and the config's ``task`` says which.

Paper: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding" (2019).

Example:
    >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
    ...                     num_hidden_layers=2, num_attention_heads=4,
    ...                     task="sequence-classification", labels=("bad", "good"))
    >>> model, tokens = Bert(config), jax.numpy.array([[1, 5, 7]])
    >>> logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    >>> logits.shape
    (1, 2)
"""

from typing import Any

import jax

from lora_mini_jax.models.encoder import Encoder, encoder_family
from lora_mini_jax.models.encoder_config import BertConfig
from lora_mini_jax.models.heads import BertWords, Pooler


class Bert(Encoder):
    """A BERT with the head that ``config.task`` names; see `Encoder` for the rest."""

    def head(self, x: jax.Array, attend: Any) -> Any:
        c = self.config
        if c.task == "masked-lm":
            return BertWords(*self.args, name="cls")(x, attend)
        if c.task == "token-classification":
            return self.linear("classifier", len(c.labels))(x)
        pooled = Pooler(*self.args, name="pooler")(x)
        return (x, pooled) if c.task is None else self.linear("classifier", len(c.labels))(pooled)


FAMILY = encoder_family(BertConfig, Bert, "bert", "cls.predictions")
