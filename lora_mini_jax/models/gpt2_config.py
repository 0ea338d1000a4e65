"""The shape of a GPT-2, to and from Hugging Face's ``config.json``."""

from dataclasses import asdict, dataclass
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.checks import depth, read_fields, token_id, token_ids
from lora_mini_jax.settings.checks import (
    choice,
    flag,
    multiple,
    optional,
    positive,
    problems,
    whole,
)

REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")
_RULES = (
    whole("vocab_size", "n_embd", "n_head", "n_positions"),
    depth("n_layer"),
    optional(whole("n_inner")),
    positive("layer_norm_epsilon", "initializer_range"),
    flag("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
         "tie_word_embeddings"),
    optional(token_id("bos_token_id", "pad_token_id")),
    token_ids("eos_token_id"),
    choice("activation_function", ACTIVATIONS, "="),
    multiple("n_embd", "n_head"),
)  # fmt: skip
_PLAIN = {"model_type": "gpt2", "is_causal": True, "add_cross_attention": False,
          "pruned_heads": {}}  # fmt: skip
"""What other keys of ``config.json`` must be."""


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2, under Hugging Face's names and with its defaults.

    Attributes:
        n_inner: the width of the feed-forward; None is ``4 * n_embd``.
        scale_attn_weights: whether logits are divided by the root of a head's width.
        scale_attn_by_inverse_layer_idx: whether they are divided by the layer's number, from 1,
            too.
        reorder_and_upcast_attn: whether logits are computed in float32, which they always are
            here: kept for the file.

    Raises:
        UserError: values that are not of their kind, an unknown activation, heads that do not
            divide the width; all in one line.
    """

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int = 1024
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if bad := problems(self, _RULES):
            raise UserError(f"GPT-2 config: {'; '.join(bad)}; correct config.json")

    # What other models' parts and the decoding call these things.

    @property
    def hidden_size(self) -> int:
        """The width of the model."""
        return self.n_embd

    @property
    def intermediate_size(self) -> int:
        """The width of the feed-forward."""
        return self.n_inner or 4 * self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return self.n_layer

    @property
    def num_key_value_heads(self) -> int:
        """The heads of the cache: every one."""
        return self.n_head

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def max_position_embeddings(self) -> int:
        """The number of positions."""
        return self.n_positions

    @property
    def layer_norm_eps(self) -> float:
        """What norms add to the variance."""
        return self.layer_norm_epsilon

    @property
    def hidden_act(self) -> str:
        """The activation of the feed-forward."""
        return self.activation_function

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "GPT2Config":
        """Read the dict of a ``config.json``.

        Raises:
            UserError: a variant that is not supported, and missing or senseless values, all in one
                line.
        """
        return cls(**read_fields(cls, hf, "GPT-2", REQUIRED, _PLAIN))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict."""
        out = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}
        return out | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
