"""The shape of a DeBERTa-v2 or v3, to and from Hugging Face's ``config.json``."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lora_mini_jax.models.encoder_config import EncoderConfig
from lora_mini_jax.settings.checks import Joint, Rule, flag, is_, is_size, whole

_KINDS = ("c2p", "p2c")


def _strangers(kinds: tuple[str, ...]) -> list[str]:
    """What is none of `_KINDS`."""
    return [kind for kind in kinds if kind not in _KINDS]


def _says_strangers(name: str, kinds: tuple[str, ...]) -> str:
    """`Rule.says` for kinds of which some are none of `_KINDS`."""
    others, allowed = (", ".join(map(repr, each)) for each in (_strangers(kinds), _KINDS))
    return f"{name} {others} is not supported, only {allowed}"


def _buckets_fit(config: "DebertaV2Config") -> bool:
    """Whether there are distances for every bucket."""
    count, longest = config.position_buckets, config.longest
    return count < 1 or not is_size(longest) or 1 <= count // 2 < longest - 1


@dataclass(frozen=True)
class DebertaV2Config(EncoderConfig):
    """The shape of a DeBERTa; see `EncoderConfig` for what it shares with BERT.

    Attributes:
        pos_att_type: which products with relative positions there are: ``"c2p"``, of the content's
            queries with the distances' keys, and ``"p2c"``, of the distances' queries with the
            content's keys.
        position_buckets: how many distances each way have a row of their own, far ones sharing
            theirs on a logarithmic scale; below 1 every distance has.
        max_relative_positions: the longest distance told apart; below 1 as many as
            ``max_position_embeddings``.
        share_att_key: whether distances go through the content's projections.
        norm_rel_ebd: ``"layer_norm"`` where the distances' table is normalised, or ``"none"``.
        position_biased_input: whether absolute positions are added to the words too.
    """

    hf_name: ClassVar[str] = "DebertaV2"
    model_type: ClassVar[str] = "deberta-v2"
    rules = (
        *EncoderConfig.rules,
        whole("type_vocab_size", low=0),
        Rule(("pos_att_type",), lambda kinds: not _strangers(kinds), _says_strangers),
        flag("share_att_key", "position_biased_input"),
        Rule(("norm_rel_ebd",), lambda value: value in ("none", "layer_norm"),
             lambda name, v: f"{name} {v!r} is not supported, only 'none' and 'layer_norm'"),
        Rule(("position_buckets", "max_relative_positions"), lambda value: type(value) is int,
             is_("not a whole number")),
        Joint(("position_buckets", "max_relative_positions"), _buckets_fit,
              "position_buckets={c.position_buckets} does not fit "
              "max_relative_positions={c.longest}"),
    )  # fmt: skip

    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    pos_att_type: tuple[str, ...] = ()
    position_buckets: int = -1
    max_relative_positions: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    position_biased_input: bool = True

    @property
    def has_positions(self) -> bool:
        """Whether absolute positions are added to the words."""
        return self.position_biased_input

    @property
    def longest(self) -> int:
        """The longest distance that is told apart."""
        most = self.max_relative_positions
        return most if most > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """How many rows of the distances' table there are each way."""
        return self.position_buckets if self.position_buckets > 0 else self.longest

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> Any:
        """As `EncoderConfig.from_hf`; ``pos_att_type`` may also be written ``"c2p|p2c"``."""
        kinds = hf.get("pos_att_type") or ()
        if isinstance(kinds, str):
            kinds = [kind.strip() for kind in kinds.lower().split("|")]
        kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
        return super().from_hf(hf | {"pos_att_type": tuple(kinds)})

    @classmethod
    def _unsupported(cls, hf: dict[str, Any]) -> list[str]:
        bad = super()._unsupported(hf)
        width = hf.get("hidden_size")
        if hf.get("conv_kernel_size"):
            bad.append(f"conv_kernel_size {hf['conv_kernel_size']!r} is not supported, only 0")
        if not hf.get("relative_attention"):
            bad.append("relative_attention false is not supported")
        if hf.get("legacy") is False:
            bad.append("legacy false is not supported")
        for name in ("embedding_size", "pooler_hidden_size"):
            if name in hf and hf[name] != width:
                bad.append(f"{name} {hf[name]!r} is not supported, only hidden_size {width!r}")
        size, heads = hf.get("attention_head_size"), hf.get("num_attention_heads")
        if size is not None and not (is_size(size) and is_size(heads) and size * heads == width):
            bad.append(f"attention_head_size {size!r} is not hidden_size over heads")
        if hf.get("pooler_hidden_act", "gelu") != "gelu":
            bad.append(f"pooler_hidden_act {hf['pooler_hidden_act']!r} is not supported, only "
                       "'gelu'")  # fmt: skip
        return bad

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict."""
        return super().to_hf() | {
            "pos_att_type": list(self.pos_att_type), "relative_attention": True,
            "pooler_hidden_size": self.hidden_size, "pooler_hidden_act": "gelu",
        }  # fmt: skip
