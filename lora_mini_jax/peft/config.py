"""``adapter_config.json``: what PEFT calls a method's settings, and back."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object
from lora_mini_jax.method import Method
from lora_mini_jax.methods import LoRA, MiSS, VeRA
from lora_mini_jax.methods.adalora import AdaLoRA
from lora_mini_jax.methods.dora import DoRA
from lora_mini_jax.peft.checks import misfits

FILE = "adapter_config.json"
Config = Mapping[str, Any]

ADALORA = {
    "init_r": "rank", "target_r": "target_rank", "tinit": "tinit", "tfinal": "tfinal",
    "deltaT": "delta_t", "beta1": "beta1", "beta2": "beta2", "total_step": "total_steps",
    "orth_reg_weight": "orth_reg_weight", "lora_alpha": "alpha", "lora_dropout": "dropout",
}  # fmt: skip
"""PEFT's names of our settings."""

SETTINGS = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
             "alpha_pattern", "init_lora_weights", "fan_in_fan_out"),
    "ADALORA": (*ADALORA, "init_lora_weights", "fan_in_fan_out"),
    "MISS": ("r", "mini_r", "init_weights", "miss_dropout"),
    "VERA": ("r", "d_initial", "vera_dropout", "save_projection", "init_weights", "fan_in_fan_out"),
}  # fmt: skip
"""What is understood, by ``peft_type``."""
_GENERAL = ("peft_type", "target_modules", "exclude_modules", "modules_to_save",
            "layers_to_transform", "layers_pattern")  # fmt: skip
# They change nothing of a trained adapter: notes, and the settings of what is off.
_HARMLESS = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
             "inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "eva_config",
             "projection_prng_key", "ensure_weight_tying")  # fmt: skip
_REQUIRED = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha", "total_step"),
             "MISS": ("r",), "VERA": ("r",)}  # fmt: skip
_OFF = (None, False, "none", "", {}, [])
_DRAWN = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base as it is; others (pissa, olora, loftq) take a part out."""


def settings(method: Method) -> dict[str, Any]:
    """The part of PEFT's config that describes a method which PEFT has."""
    if isinstance(method, AdaLoRA):
        return {
            "peft_type": "ADALORA",
            **{p: plain(getattr(method, n)) for p, n in ADALORA.items()},
        }
    if isinstance(method, MiSS):
        mode = True if method.mode == "miss" else method.mode
        own = {"mini_r": method.mini_rank, "init_weights": mode, "miss_dropout": method.dropout}
        return {"peft_type": "MISS", "r": method.rank, **own}
    if isinstance(method, VeRA):
        own = {"d_initial": method.d_initial, "vera_dropout": method.dropout}
        return {"peft_type": "VERA", "r": method.rank, **own, "save_projection": True}
    assert isinstance(method, LoRA | DoRA)
    own = {"r": method.rank, "lora_alpha": plain(method.alpha), "lora_dropout": method.dropout}
    kind = {"use_rslora": getattr(method, "rslora", False), "use_dora": isinstance(method, DoRA)}
    return {"peft_type": "LORA", **own, **kind}


def method_of(config: Config, module: str, folder: Path) -> Method:
    """The method that a checked config gives a module: the inverse of `settings`.

    Raises:
        UserError: a setting that is not of its type, or that the method does not allow.
    """
    try:
        return _method_of(config, module)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise UserError(f"{folder / FILE}, for {module}: {error}") from None


def _method_of(config: Config, module: str) -> Method:
    kind = config["peft_type"]
    if kind == "ADALORA":
        given = {ours: config[theirs] for theirs, ours in ADALORA.items() if theirs in config}
        return AdaLoRA(**AdaLoRA.checked(given))
    if kind == "MISS":
        mode = config.get("init_weights", True)
        mode, mini = "miss" if isinstance(mode, bool) else mode, config.get("mini_r", 1)
        return MiSS(config["r"], mode, mini, dropout=config.get("miss_dropout", 0.0))
    if kind == "VERA":
        start, dropout = config.get("d_initial", 0.1), config.get("vera_dropout", 0.0)
        return VeRA(config["r"], start, dropout=dropout)
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    rslora, dropout = config.get("use_rslora", False), config.get("lora_dropout", 0.0)
    if config.get("use_dora"):
        # Our DoRA has no rslora: a larger alpha is the same.
        return DoRA(rank, float(alpha * rank**0.5 if rslora else alpha), dropout=dropout)
    return LoRA(rank, float(alpha), rslora, dropout=dropout)


def agreed(by_module: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One config for all modules; for LoRA, those of another rank or alpha are named in patterns.

    Raises:
        UserError: modules that differ in what a config has one of.
    """
    first, clashes = next(iter(by_module.values())), []
    found = dict(first)
    for name in first:
        counts = Counter(own.get(name, "none") for own in by_module.values())
        found[name] = counts.most_common(1)[0][0]
        if name in ("r", "lora_alpha") and first["peft_type"] == "LORA":
            pattern = "rank_pattern" if name == "r" else "alpha_pattern"
            found[pattern] = {f"^{re.escape(module)}": own[name] for module, own
                              in by_module.items() if own.get(name) != found[name]}  # fmt: skip
        elif len(counts) > 1:
            clashes.append(f"{name} is {', '.join(sorted(map(str, counts)))}")
            break  # of another peft_type all else differs too
    if clashes:
        raise UserError(
            f"a PEFT config holds one method for all kernels, but here {clashes[0]}: export it as "
            "plain LoRA, as_lora=True, or merge it into the model"
        )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The config in a folder, checked.

    Raises:
        UserError: a file that is missing or damaged, and settings that are not supported, all in
            one message with those that are.
    """
    named = sorted(str(file.parent) for file in folder.glob(f"*/{FILE}"))
    if named and not (folder / FILE).exists():
        raise UserError(f"no such file: {folder / FILE}: PEFT keeps adapters by name in folders of "
                        f"their own: give {' or '.join(named)}")  # fmt: skip
    config = read_object(folder / FILE)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in SETTINGS:
        raise UserError(f"{folder / FILE} has peft_type {kind!r}: supported are {supported()}")
    known = {*SETTINGS[kind], *_GENERAL, *_HARMLESS}
    if kind == "ADALORA":
        known.add("r")  # PEFT's own AdaLoRA passes it over
    bad = {n: v for n, v in config.items() if n not in known and v not in _OFF}
    bad |= {n: v for n in ("init_lora_weights",) if (v := config.get(n, True)) not in _DRAWN}
    bad |= {n: v for n in ("save_projection",) if (v := config.get(n, True)) is not True}
    if bad:
        raise UserError(
            f"{folder / FILE} has {', '.join(f'{n}={v!r}' for n, v in bad.items())}, which is not "
            f"supported: supported are {supported()}"
        )
    if lacking := [name for name in _REQUIRED[kind] if name not in config]:
        raise UserError(f"{folder / FILE} lacks {', '.join(lacking)}: fetch it again")
    if wrong := misfits(config):
        raise UserError(f"{folder / FILE}: {'; '.join(wrong)}: correct it or fetch it again")
    return config


def supported() -> str:
    """The end of an error message."""
    kinds = "; ".join(f"{kind} with {', '.join(names)}" for kind, names in SETTINGS.items())
    return f"{kinds}; and for all of them {', '.join(_GENERAL[1:])}"


def plain(number: Any) -> Any:
    """A whole number without its point: some readers insist on ``"lora_alpha": 16``."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What a pattern says of a module, as PEFT reads it: the first expression that fits its end."""
    fits = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)
