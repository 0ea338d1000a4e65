"""The shape of a Llama, to and from Hugging Face's ``config.json`` of transformers 4 and 5."""

from dataclasses import dataclass, fields
from math import pi
from typing import Any

import numpy as np

from lora_mini_jax.errors import UserError

SUPPORTED = ("LlamaForCausalLM",)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_REQUIRED = (*_SIZES, "num_attention_heads")


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the slow rotary frequencies; names and units as in Hugging Face."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __call__(self, inv_freq: np.ndarray) -> np.ndarray:
        """Scale inverse frequencies (radians a token): slow ones by 1/factor, fast ones not."""
        turns = self.original_max_position_embeddings * inv_freq / (2 * pi)
        span = self.high_freq_factor - self.low_freq_factor
        fast = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return (1 - fast) * inv_freq / self.factor + fast * inv_freq


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, under Hugging Face's names and with its defaults.

    ``num_key_value_heads=0`` and ``head_dim=0`` mean "as in Hugging Face": one key-value head a
    query head, and ``hidden_size // num_attention_heads``; the instance holds the numbers.

    Raises:
        UserError: sizes that are not whole numbers from 1, or heads that do not divide.
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
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in (*_REQUIRED, "max_position_embeddings")}
        sizes |= {n: getattr(self, n) or 1 for n in ("num_key_value_heads", "head_dim")}
        bad = [f"{n}={v!r} is not a whole number from 1" for n, v in sizes.items()
               if type(v) is not int or v < 1]  # fmt: skip
        reals = {n: getattr(self, n) for n in ("rms_norm_eps", "rope_theta", "initializer_range")}
        bad += [f"{n}={v!r} is not a positive number" for n, v in reals.items()
                if not isinstance(v, int | float) or v <= 0]  # fmt: skip
        if not bad:
            heads = self.num_attention_heads
            # The dataclass is frozen so that a model is hashable; this is its one moment to settle.
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
        if bad:
            raise UserError(f"Llama config: {'; '.join(bad)}; correct config.json")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """Read the dict of a ``config.json``, written by transformers 4 or 5.

        Raises:
            UserError: another architecture or activation, a rotary scaling other than default or
                llama3, and missing or senseless values, all in one line.
        """
        unnamed = SUPPORTED if hf.get("model_type") == "llama" else ()
        given = hf.get("architectures") or unnamed
        bad = []
        if list(given) != list(SUPPORTED):
            name = ", ".join(map(str, given)) or hf.get("model_type")
            bad.append(f"architecture {name!r} is not supported, only {', '.join(SUPPORTED)}")
        if hf.get("hidden_act", "silu") != "silu":
            bad.append(f"hidden_act {hf['hidden_act']!r} is not supported, only 'silu'")
        if missing := [name for name in _REQUIRED if hf.get(name) is None]:
            bad.append(f"missing {', '.join(missing)}")
        theta, scaling, problem = _read_rope(hf)
        if bad := bad + problem:
            raise UserError(f"Llama config: {'; '.join(bad)}; use another model or its config.json")
        # A null in config.json means the default, except for the ids, where it means "none".
        known: dict[str, Any] = {f.name: hf[f.name] for f in fields(cls) if f.name in hf}
        known = {k: v for k, v in known.items() if v is not None or k.endswith("token_id")}
        if isinstance(eos := known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(eos)
        known |= {"rope_theta": theta, "rope_scaling": scaling}
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` dict, with the rotary settings where transformers 4 and 5 look."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.eos_token_id, tuple):
            out["eos_token_id"] = list(self.eos_token_id)
        scaling = self.rope_scaling
        rope = {"rope_type": "llama3", **vars(scaling)} if scaling else {"rope_type": "default"}
        return out | {
            "architectures": list(SUPPORTED), "model_type": "llama", "hidden_act": "silu",
            "rope_scaling": rope if scaling else None,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
        }  # fmt: skip


def _read_rope(hf: dict[str, Any]) -> tuple[float, Llama3Rope | None, list[str]]:
    """(theta, scaling, problems) from either generation of ``config.json``."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        return 0.0, None, [f"rope_parameters {rope!r} is not an object"]
    theta = rope.get("rope_theta", hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return theta, None, ["partial_rotary_factor other than 1 is not supported"]
    if kind == "default":
        return theta, None, []
    if kind != "llama3":
        return theta, None, [f"rope_type {kind!r} is not supported, only 'default' and 'llama3'"]
    names = [f.name for f in fields(Llama3Rope)]
    values: dict[str, Any] = {name: rope.get(name) for name in names}
    wrong = [n for n, v in values.items() if not isinstance(v, int | float) or v <= 0]
    if wrong:
        return theta, None, [f"llama3 rope needs positive numbers for {', '.join(wrong)}"]
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        return theta, None, ["llama3 rope needs high_freq_factor above low_freq_factor"]
    return theta, Llama3Rope(**values), []
