"""A decoder's shape to and from Hugging Face's ``config.json``, of transformers 4 and 5."""

from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.checks import DEEPEST, missing, unsupported
from lora_mini_jax.models.llama_config import REQUIRED, LlamaConfig
from lora_mini_jax.models.llama_families import KINDS, Kind
from lora_mini_jax.models.rotary_config import GLOBAL, LOCAL, read_ropes, write_ropes
from lora_mini_jax.settings.checks import is_size

_COMMON = (
    *REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
_NULLS: dict[str, Any] = {
    "num_key_value_heads": 0, "head_dim": 0, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "sliding_window": None, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}  # fmt: skip
"""What a null means; with any other field it means the default."""


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `LlamaConfig`.

    Raises:
        UserError: see `LlamaConfig.from_hf`.
    """
    architecture = _architecture(hf)
    kind = KINDS[architecture]
    ropes, problems = read_ropes(hf, kind.defaults.get("rope_theta", 10000.0),
                                 kind.defaults.get("rope_local_base_freq"))  # fmt: skip
    bad = unsupported(hf, _plain(kind), "not supported here") + missing(hf, REQUIRED) + problems
    if bad:
        raise UserError(f"Llama config: {'; '.join(bad)}; use another model or its config.json")
    given = {name: hf[name] for name in (*_COMMON, *kind.options) if name in hf}
    given["hidden_act"] = hf.get(kind.activation)
    given = {name: _NULLS[name] if value is None else value for name, value in given.items()
             if value is not None or name in _NULLS}  # fmt: skip
    out = {**kind.defaults, "architecture": architecture, **given, **ropes}
    if kind.may_switch_off and not hf.get("use_sliding_window"):
        out["sliding_window"] = None
    if "layer_types" in kind.options and "layer_types" not in given:
        out["layer_types"] = _by_rule(hf, kind, out)
    return {n: tuple(v) if isinstance(v, list) else v for n, v in out.items()}


def _architecture(hf: dict[str, Any]) -> str:
    """The one architecture of a ``config.json``."""
    by_type = [name for name, kind in KINDS.items() if kind.model_type == hf.get("model_type")]
    given = hf.get("architectures") or by_type or [hf.get("model_type")]
    if not isinstance(given, list) or len(given) != 1 or given[0] not in list(KINDS):
        raise UserError(f"architecture {given!r} is not supported, only {', '.join(KINDS)}: use "
                        "another model or correct config.json")  # fmt: skip
    return given[0]


def _plain(kind: Kind) -> dict[str, Any]:
    """What other keys must be; anything else would make another model than the one here."""
    plain: dict[str, Any] = {"model_type": kind.model_type, "is_causal": True,
                             "use_bidirectional_attention": False}  # fmt: skip
    capped = kind.model_type != "gemma3_text"
    return plain if capped else plain | {"attn_logit_softcapping": None}


def _by_rule(hf: dict[str, Any], kind: Kind, out: dict[str, Any]) -> tuple[str, ...]:
    """``layer_types`` as older files say them: by a number."""
    name, usual = kind.rule
    number, depth = hf.get(name, usual), hf["num_hidden_layers"]
    known = number is not None and is_size(depth, high=DEEPEST)
    if out["sliding_window"] is None or not name or not known:
        return ()
    if not is_size(number, 0 if kind.may_switch_off else 1):
        raise UserError(f"Llama config: {name}={number!r} is no number of layers; correct "
                        "config.json")  # fmt: skip
    slides = (i >= number if kind.may_switch_off else (i + 1) % number for i in range(depth))
    return tuple(LOCAL if slide else GLOBAL for slide in slides)


def write(config: LlamaConfig) -> dict[str, Any]:
    """The ``config.json`` dict of a `LlamaConfig`; the inverse of `read`."""
    kind, theta = config.kind, config.rope_theta
    out = {name: getattr(config, name) for name in (*_COMMON, *kind.options)}
    out |= {"architectures": [config.architecture], "model_type": kind.model_type,
            kind.activation: config.hidden_act}  # fmt: skip
    if "layer_types" in out:
        out["layer_types"] = [LOCAL if slides else GLOBAL for slides in config.sliding]
    if kind.may_switch_off:
        out["use_sliding_window"] = config.sliding_window is not None
    if "query_pre_attn_scalar" in out:
        out["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.head_dim
    local = None
    if "rope_local_base_freq" in out:
        local = config.rope_local_base_freq or theta
    out = {n: list(v) if isinstance(v, tuple) else v for n, v in out.items()}
    return out | write_ropes(theta, config.rope_scaling, local)
