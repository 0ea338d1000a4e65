"""The shape of a T5 or Flan-T5, to and from Hugging Face's ``config.json``."""

from dataclasses import asdict, dataclass
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.checks import depth, read_fields, token_id, token_ids
from lora_mini_jax.settings.checks import Joint, choice, flag, optional, positive, problems, whole

GATED = "gated-"
REQUIRED = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_FORWARD = tuple(prefix + name for prefix in ("", GATED) for name in ACTIVATIONS)
_RULES = (
    whole("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "relative_attention_max_distance"),
    whole("relative_attention_num_buckets", low=4),
    depth("num_layers"),
    optional(depth("num_decoder_layers"), 0),
    positive("layer_norm_epsilon", "initializer_factor"),
    flag("tie_word_embeddings"),
    token_id("pad_token_id", "decoder_start_token_id"),
    token_ids("eos_token_id"),
    choice("feed_forward_proj", _FORWARD, "="),
    Joint(("relative_attention_max_distance", "relative_attention_num_buckets"),
          lambda c: c.relative_attention_max_distance > c.buckets_of_one_side,
          "relative_attention_max_distance={c.relative_attention_max_distance} is too small for "
          "relative_attention_num_buckets={c.relative_attention_num_buckets}"),
    Joint(("decoder_start_token_id", "vocab_size"),
          lambda c: c.decoder_start_token_id < c.vocab_size,
          "decoder_start_token_id={c.decoder_start_token_id} is not below "
          "vocab_size={c.vocab_size}"),
)  # fmt: skip
_PLAIN = {"model_type": "t5", "is_encoder_decoder": True}
"""What is written beside the fields."""


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5, under Hugging Face's names and with its defaults.

    ``num_decoder_layers=0`` means "as in Hugging Face", as many as the encoder has; the instance
    holds the number.

    Attributes:
        d_kv: the width of one attention head; ``num_heads`` of them need not make ``d_model``.
        relative_attention_num_buckets, relative_attention_max_distance: how many kinds of distance
            there are between tokens, and from where on all are alike.
        feed_forward_proj: an activation, or ``"gated-"`` and one; ``"gated-gelu"`` is the
            approximate one, as everywhere.
        tie_word_embeddings: whether the table of words is the head too, whose inputs are then
            scaled by ``d_model ** -0.5``: so in T5, not in T5 1.1 and Flan-T5.
        decoder_start_token_id: what the decoder reads first.

    Raises:
        UserError: values that are not of their kind, buckets that do not fit the distance; all in
            one line.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_decoder_layers: int = 0
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        if bad := problems(self, _RULES):
            raise UserError(f"T5 config: {'; '.join(bad)}; correct config.json")
        # The dataclass is frozen so that a model is hashable; this is its one moment to settle.
        object.__setattr__(self, "num_decoder_layers", self.num_decoder_layers or self.num_layers)

    @property
    def buckets_of_one_side(self) -> int:
        """How many distances at most have a bucket of their own: the decoder's, which looks back
        only."""
        return self.relative_attention_num_buckets // 2

    # What other models' parts and the decoding call these things.

    @property
    def hidden_size(self) -> int:
        """The width of the model."""
        return self.d_model

    @property
    def num_hidden_layers(self) -> int:
        """The layers of both halves."""
        return self.num_layers + self.num_decoder_layers

    @property
    def num_key_value_heads(self) -> int:
        """The heads of the cache: every one."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.d_kv

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward_proj.startswith(GATED)

    @property
    def hidden_act(self) -> str:
        """The activation of the feed-forward, a key of `ACTIVATIONS`."""
        name = self.feed_forward_proj.removeprefix(GATED)
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "T5Config":
        """Read the dict of a ``config.json``, written by transformers 4 or 5.

        Raises:
            UserError: a variant that is not supported, and missing or senseless values, all in one
                line.
        """
        given = read_fields(cls, hf, "T5", REQUIRED, {**_PLAIN, "is_causal": True})
        if given.get("tie_word_embeddings") is True and hf.get("scale_decoder_outputs") is not None:
            # Transformers 5 says here what tie_word_embeddings, always true there, used to say.
            given["tie_word_embeddings"] = hf["scale_decoder_outputs"]
        if "pad_token_id" in given:
            given.setdefault("decoder_start_token_id", given["pad_token_id"])
        config = cls(**given)
        # Transformers writes these two as well, and where they are there goes by them.
        says = {"dense_act_fn": config.hidden_act, "is_gated_act": config.gated}
        bad = [f"{name} {hf[name]!r}" for name, v in says.items() if hf.get(name) not in (None, v)]
        if bad:
            raise UserError(f"T5 config: {', '.join(bad)} contradicts feed_forward_proj "
                            f"{config.feed_forward_proj!r}; correct config.json")  # fmt: skip
        return config

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict."""
        out = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}
        return out | _PLAIN | {"architectures": ["T5ForConditionalGeneration"]}
