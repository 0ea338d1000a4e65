"""What BERT, RoBERTa and DeBERTa have in common: embeddings, layers, and a head that differs."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.encoder_layers import Embeddings, Stack
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.part import Part


class Encoder(Part):
    """An encoder with the head that its config names; the base of every family's class.

    Attributes:
        config: the shape and the head.
        dtype: of the computation; layer norms, softmax and the output stay float32.
        param_dtype: of the parameters made by ``init``.
        scan_layers: one compiled layer run by ``nn.scan``; parameters then sit under
            ``encoder/layer`` with a leading layer axis, in place of ``encoder/layer_0``, ...
        remat: what of a layer is recomputed in the backward pass, for memory: a name of
            `remat.POLICIES`. Parameters are unchanged.
        drawn: the paths of the parameters that the file did not have, so that
            :func:`lora_mini_jax.models.load` drew them: those to train besides an adapter.
    """

    scan_layers: bool = False
    remat: str = "none"
    drawn: tuple[str, ...] = ()
    stack: ClassVar[Any] = Stack
    blanks_padding: ClassVar[bool] = False
    """Whether padding is zeroed behind the embeddings and sees nothing, as in DeBERTa."""

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        """What the head says, float32: logits (batch, labels) of a sequence's classification or
        regression, (batch, time, labels) of the tokens', (batch, time, vocab) of a masked language
        model; with no head ``(hidden (batch, time, width), pooled (batch, width) or None)``.

        Args:
            input_ids: (batch, time) int32.
            attention_mask: (batch, time), 0 where there is padding; by default there is none. The
                output at padding is finite, to be ignored.
            token_type_ids: (batch, time) int32; by default 0. No use where there are no types.
            position_ids: (batch, time) int32; by default as the family counts.

        Raises:
            UserError: more tokens than the model has positions for, where it counts them itself.
        """
        kept = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask > 0
        mask = kept[:, None, None, :]
        if position_ids is None and self.config.has_positions:
            position_ids = self.positions(input_ids)
        embeddings = Embeddings(*self.args, name="embeddings")
        x = embeddings(input_ids, token_type_ids, position_ids)
        if self.blanks_padding:
            x, mask = x * kept[..., None], mask & kept[:, None, :, None]
        x = self.stack(*self.args, self.scan_layers, self.remat, name="encoder")(x, mask)
        out = self.head(x, embeddings.word_embeddings.attend)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), out)

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """The tokens' positions where the caller gives none: counted from 0."""
        check_length(input_ids, self.config.max_position_embeddings)
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)

    def head(self, x: jax.Array, attend: Any) -> Any:
        """The output for hidden states (batch, time, width); ``attend`` compares with all words."""
        raise NotImplementedError


def check_length(input_ids: jax.Array, most: int) -> None:
    """Raise `UserError` where there are more tokens than positions: rows past a table are NaN."""
    if input_ids.shape[1] > most:
        raise UserError(f"{input_ids.shape[1]} tokens are too many for a model of {most} "
                        "positions: truncate the input")  # fmt: skip


def encoder_family(config: Any, module: type[Encoder], base: str, words: str, *more: str) -> Family:
    """How Hugging Face's files call the parameters of one kind of encoder.

    Args:
        config, module: its classes.
        base: what files call the encoder under its head.
        words: the masked language model's place in files.
        more: further top modules that are outside of ``base``.
    """
    table = f"{base}.embeddings.word_embeddings.weight"
    return Family(
        config=config, module=module, architectures=config.architectures(), kind="encoder",
        prefix=f"{base}.", may_lack_prefix=True,
        bare=("classifier", words.split(".")[0], *more),
        copies={f"{words}.decoder.weight": table, f"{words}.decoder.bias": f"{words}.bias"},
        # Buffers of old files, positions that a DeBERTa never adds, and BERT's next sentence.
        ignored=r"position_ids$|position_embeddings\.weight$|seq_relationship",
        stack="layer", trunk=("embeddings", "encoder"),
    )  # fmt: skip
