"""The shape of a decoder of Llama's family."""

from dataclasses import dataclass
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.activations import ACTIVATIONS
from lora_mini_jax.models.checks import depth, token_id, token_ids
from lora_mini_jax.models.llama_families import KINDS, Kind
from lora_mini_jax.models.rotary import Scaling
from lora_mini_jax.models.rotary_config import GLOBAL, LOCAL
from lora_mini_jax.settings.checks import (
    Rule,
    choice,
    flag,
    is_,
    optional,
    positive,
    problems,
    whole,
)

_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
REQUIRED = (*_WIDTHS, "num_hidden_layers")
OPTIONS: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "layer_types": (),
    "query_pre_attn_scalar": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_local_base_freq": None,
}  # fmt: skip
"""The fields that only some architectures have, and what they are in the others."""
_RULES = (
    whole(*_WIDTHS, "max_position_embeddings"),
    depth("num_hidden_layers"),
    optional(whole("num_key_value_heads", "head_dim"), 0),
    optional(whole("sliding_window")),
    positive("rms_norm_eps", "rope_theta", "initializer_range"),
    optional(positive("query_pre_attn_scalar", "attn_logit_softcapping",
                      "final_logit_softcapping", "rope_local_base_freq")),
    flag("attention_bias", "mlp_bias", "tie_word_embeddings"),
    optional(token_id("bos_token_id", "pad_token_id")),
    token_ids("eos_token_id"),
    choice("hidden_act", ACTIVATIONS),
    Rule(("rope_scaling",), lambda value: isinstance(value, Scaling | None),
         is_("no stretch of positions")),
)  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder of Llama's family, under Hugging Face's names and with Llama's
    defaults.

    ``num_key_value_heads=0`` and ``head_dim=0`` mean "as in Hugging Face": one key-value head a
    query head, and ``hidden_size // num_attention_heads``; the instance holds the numbers.

    Attributes:
        architecture: a key of ``llama_families.KINDS``, which says what has no field here.
        sliding_window: how many tokens back a layer sees, itself counted; None: all.
        layer_types: ``"full_attention"`` or ``"sliding_attention"`` for each layer; ``()`` is the
            architecture's usual pattern.
        query_pre_attn_scalar: logits are divided by its root; None is ``head_dim``.
        attn_logit_softcapping, final_logit_softcapping: bounds on logits, or None.
        rope_local_base_freq: ``rope_theta`` of the layers with a window, which are then not
            stretched by ``rope_scaling``; None: all layers are alike.

    Raises:
        UserError: an unknown architecture or activation, a field that it does not have, sizes
            that are not whole numbers from 1, heads that do not divide; all in one line.
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
    rope_scaling: Scaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    architecture: str = "LlamaForCausalLM"
    hidden_act: str = "silu"
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rope_local_base_freq: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or self.architecture not in KINDS:
            raise UserError(f"architecture {self.architecture!r} is not supported, only "
                            f"{', '.join(KINDS)}: name one of these")  # fmt: skip
        bad = self._wrong_values() or self._settle() or self._wrong_layers()
        if bad:
            raise UserError(f"Llama config: {'; '.join(bad)}; correct config.json")

    def _wrong_values(self) -> list[str]:
        """The values that could be right in no model, or not in this one."""
        bad = problems(self, _RULES)
        others = [name for name in OPTIONS if name not in self.kind.options]
        return bad + [f"{name}={getattr(self, name)!r} is not an option of {self.architecture}"
                      for name in others if getattr(self, name) != OPTIONS[name]]  # fmt: skip

    def _settle(self) -> list[str]:
        """Fill in the heads; what does not divide."""
        # The dataclass is frozen so that a model is hashable; this is its one moment to settle.
        heads, bad = self.num_attention_heads, []
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
        return bad

    def _wrong_layers(self) -> list[str]:
        """What is wrong with the kinds of layers; the usual ones become ``()``."""
        types, depth = self.layer_types, self.num_hidden_layers
        if not isinstance(types, tuple) or any(t not in (GLOBAL, LOCAL) for t in types):
            return [f"layer_types {types!r} are not all {GLOBAL!r} or {LOCAL!r}"]
        if types and len(types) != depth:
            return [f"layer_types has {len(types)} entries for num_hidden_layers={depth}"]
        if LOCAL in types and self.sliding_window is None:
            return [f"layer_types has {LOCAL!r} but there is no sliding_window"]
        if types and self.sliding == self._usual():
            # So that a config of another depth can be made of this one.
            object.__setattr__(self, "layer_types", ())
        return []

    @property
    def kind(self) -> Kind:
        """What the architecture computes that no field says."""
        return KINDS[self.architecture]

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For each layer, whether it has a window."""
        return tuple(name == LOCAL for name in self.layer_types) or self._usual()

    def _usual(self) -> tuple[bool, ...]:
        """`sliding`, where ``layer_types`` says nothing."""
        period = self.kind.period
        return tuple(self.sliding_window is not None and not (period and (i + 1) % period == 0)
                     for i in range(self.num_hidden_layers))  # fmt: skip

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Read the dict of a ``config.json``, written by transformers 4 or 5.

        Raises:
            UserError: an architecture or a setting that is not supported, and missing or
                senseless values, all in one line.
        """
        from lora_mini_jax.models.llama_hf import read

        return cls(**read(hf))

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict, with everything where transformers 4 and 5 look for it."""
        from lora_mini_jax.models.llama_hf import write

        return write(self)
