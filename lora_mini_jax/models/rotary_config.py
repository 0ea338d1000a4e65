"""The rotary settings in ``config.json``, where transformers 4 and 5 each look for them."""

from dataclasses import MISSING, fields
from typing import Any

from lora_mini_jax.models.rotary import LinearRope, Llama3Rope, Scaling, YarnRope, temperature
from lora_mini_jax.settings.checks import is_real

SCALINGS: dict[str, type[Scaling]] = {c.kind: c for c in (LinearRope, Llama3Rope, YarnRope)}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
"""The kinds of layers, by Hugging Face's names."""


def read_ropes(hf: dict[str, Any], theta: float, local: float | None) -> tuple[dict, list[str]]:
    """The rotary fields of `LlamaConfig` and what is wrong with them.

    Args:
        hf: a ``config.json``; one of transformers 5 has an object a kind of layer where these
            differ, one of transformers 4 ``rope_local_base_freq``.
        theta, local: for a file that does not say; ``local`` None: all layers have the same.
    """
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(given, dict):
        return {}, [f"rope_parameters {given!r} is not an object"]
    own = None
    if local is not None and GLOBAL in given:
        own, given = given.get(LOCAL) or {}, given[GLOBAL] or {}
        if not isinstance(own, dict) or not isinstance(given, dict):
            return {}, ["rope_parameters has kinds of layers that are no objects"]
        if (kind := _kind(own)) != "default":
            return {}, [f"rope_type {kind!r} of sliding layers is not supported"]
    for rope in (given, own or {}):
        if "type" in rope and rope["type"] != _kind(rope):
            return {}, [f"rope_type {_kind(rope)!r} contradicts type {rope['type']!r}"]
    if any((place.get("partial_rotary_factor") or 1.0) != 1.0 for place in (given, hf)):
        return {}, ["partial_rotary_factor other than 1 is not supported"]
    out: dict[str, Any] = {"rope_theta": given.get("rope_theta", hf.get("rope_theta") or theta)}
    if local is not None:
        of_file = hf.get("rope_local_base_freq") or local
        out["rope_local_base_freq"] = of_file if own is None else own.get("rope_theta", of_file)
    out["rope_scaling"], problems = _scaling(given, out["rope_theta"], hf)
    return out, problems


def _kind(rope: dict[str, Any]) -> Any:
    """What an object says of its kind; older files call it ``type``."""
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: dict[str, Any], theta: Any, hf: dict) -> tuple[Scaling | None, list[str]]:
    """The stretch that an object asks for, and what is wrong with it."""
    kind = _kind(rope)
    if kind == "default":
        return None, []
    if not isinstance(kind, str) or kind not in SCALINGS:
        names = ", ".join(map(repr, ("default", *SCALINGS)))
        return None, [f"rope_type {kind!r} is not supported, only {names}"]
    values = {f.name: rope.get(f.name) for f in fields(SCALINGS[kind])}
    if kind == "yarn":
        values["original_max_position_embeddings"] = values[
            "original_max_position_embeddings"
        ] or hf.get("max_position_embeddings")
        values |= _yarn_amplitude(rope)
    given = {n: v for n, v in values.items() if v is not None}
    needed = [f.name for f in fields(SCALINGS[kind]) if f.default is MISSING]
    wrong = [n for n in dict.fromkeys([*needed, *given])
             if n != "truncate" and not is_real(given.get(n))]  # fmt: skip
    if wrong:
        return None, [f"{kind} rope needs positive numbers for {', '.join(wrong)}"]
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        return None, ["llama3 rope needs high_freq_factor above low_freq_factor"]
    if kind == "yarn" and (not is_real(theta) or theta <= 1):
        return None, ["yarn rope needs a rope_theta above 1"]
    if not isinstance(given.get("truncate", True), bool):
        return None, [f"truncate {given['truncate']!r} is neither true nor false"]
    return SCALINGS[kind](**given), []


def _yarn_amplitude(rope: dict[str, Any]) -> dict[str, Any]:
    """``attention_factor`` where it is given in DeepSeek's way, by two weights."""
    weights: list[Any] = [rope.get(name) for name in ("mscale", "mscale_all_dim")]
    numbers = [*weights, rope.get("factor")]
    if rope.get("attention_factor") is not None or not all(map(is_real, numbers)):
        return {}
    over, under = (temperature(rope["factor"], weight) for weight in weights)
    return {"attention_factor": over / under}


def write_ropes(theta: float, scaling: Scaling | None, local: float | None) -> dict[str, Any]:
    """The keys of ``config.json`` for both generations; the inverse of `read_ropes`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        given = {n: v for n, v in vars(scaling).items() if v is not None}
        rope = {"rope_type": scaling.kind, **given}
    out = {"rope_theta": theta, "rope_scaling": rope if scaling else None}
    rope = rope | {"rope_theta": theta}
    if local is None:
        return out | {"rope_parameters": rope}
    own = {"rope_type": "default", "rope_theta": local}
    return out | {"rope_local_base_freq": local, "rope_parameters": {GLOBAL: rope, LOCAL: own}}
