"""What sets the architectures of Llama's family apart, beyond what their ``config.json`` says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GEMMA = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": True,
          "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}  # fmt: skip
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None,
         "eos_token_id": None, "sliding_window": 4096}  # fmt: skip
_WINDOWS = ("sliding_window", "layer_types")


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        model_type: its name in ``config.json``.
        options: the fields of `LlamaConfig` that only some architectures have, of which it does.
        defaults: what transformers takes for a key that ``config.json`` lacks, where that is not
            `LlamaConfig`'s default.
        qkv_bias: queries, keys and values have biases, always, and the output never.
        qk_norm: each head's queries and keys are normalised.
        plus_one: norms multiply by ``1 + scale``, and embeddings by the root of their width.
        sandwich: attention and feed-forward are normalised after as well as before.
        period: where there is a window, every ``period``-th layer sees all, unless
            ``layer_types`` says otherwise; 0: none does.
        may_switch_off: ``use_sliding_window`` says whether there is a window.
        rule: the key that says where the windows are in a file without ``layer_types``, and what
            is taken for it where it is missing: how many layers come before those with a window,
            or every which layer sees all. Without a key the file has no say.
        activation: the key of the activation.
    """

    model_type: str
    options: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_norm: bool = False
    plus_one: bool = False
    sandwich: bool = False
    period: int = 0
    may_switch_off: bool = False
    rule: tuple[str, int] = ("", 0)
    activation: str = "hidden_act"


KINDS = {
    "LlamaForCausalLM": Kind("llama", ("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Kind(
        "mistral", ("sliding_window",),
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Kind("qwen2", _WINDOWS, _QWEN, qkv_bias=True, may_switch_off=True,
                             rule=("max_window_layers", 28)),
    "Qwen3ForCausalLM": Kind(
        "qwen3", ("attention_bias", *_WINDOWS), _QWEN | {"head_dim": 128}, qk_norm=True,
        may_switch_off=True, rule=("max_window_layers", 28),
    ),
    "GemmaForCausalLM": Kind(
        "gemma", ("attention_bias",),
        _GEMMA | {"num_key_value_heads": 16, "max_position_embeddings": 8192}, plus_one=True,
    ),
    "Gemma2ForCausalLM": Kind(
        "gemma2",
        ("attention_bias", *_WINDOWS, "query_pre_attn_scalar", "attn_logit_softcapping",
         "final_logit_softcapping"),
        _GEMMA | {"num_key_value_heads": 4, "max_position_embeddings": 8192,
                  "sliding_window": 4096, "query_pre_attn_scalar": 256,
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        plus_one=True, sandwich=True, period=2, activation="hidden_activation",
    ),
    "Gemma3ForCausalLM": Kind(
        "gemma3_text",
        ("attention_bias", *_WINDOWS, "query_pre_attn_scalar", "final_logit_softcapping",
         "rope_local_base_freq"),
        _GEMMA | {"num_key_value_heads": 4, "max_position_embeddings": 131072,
                  "sliding_window": 4096, "query_pre_attn_scalar": 256, "rope_theta": 1e6,
                  "rope_local_base_freq": 1e4},
        qk_norm=True, plus_one=True, sandwich=True, period=6,
        rule=("sliding_window_pattern", 6), activation="hidden_activation",
    ),
}  # fmt: skip
"""The architectures, by their names in ``config.json``."""
