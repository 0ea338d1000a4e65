"""``adapter_config.json``: one for all kernels, and what a given one says of each."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object
from lora_mini_jax.method import Method
from lora_mini_jax.peft.advice import MERGE, way_out
from lora_mini_jax.peft.checks import misfits
from lora_mini_jax.peft.kinds import KINDS, kind_of

FILE = "adapter_config.json"
Config = Mapping[str, Any]

_GENERAL = ("peft_type", "target_modules", "exclude_modules", "modules_to_save", "bias",
            "layers_to_transform", "layers_pattern")  # fmt: skip
# They change nothing of a trained adapter: notes, and the settings of what is off.
_HARMLESS = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
             "inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "eva_config",
             "projection_prng_key", "ensure_weight_tying")  # fmt: skip
_OFF = (None, False, "none", "", {}, [])
_DRAWN = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base as it is; others (pissa, olora, loftq) take a part out."""


def settings(method: Method) -> dict[str, Any]:
    """The part of PEFT's config that describes a method which PEFT has."""
    kind = kind_of(method)
    assert kind is not None
    return {"peft_type": kind.peft_type, **kind.to_config(method)}


def method_of(config: Config, module: str, folder: Path) -> Method:
    """The method that a checked config gives a module: the inverse of `settings`.

    Raises:
        UserError: a setting that is not of its type, or that the method does not allow.
    """
    try:
        return KINDS[config["peft_type"]].of_config(config, module)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as error:
        raise UserError(f"{folder / FILE}, for {module}: {error}") from None


def merge_configs(by_module: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One config for all modules; what may differ from one to the next is named in patterns.

    Raises:
        UserError: modules that differ in what a config has one of.
    """
    first, clashes = next(iter(by_module.values())), []
    found, patterns = dict(first), KINDS[first["peft_type"]].patterns
    for name in first:
        counts = Counter(own.get(name, "none") for own in by_module.values())
        found[name] = counts.most_common(1)[0][0]
        if name in patterns:
            found[patterns[name]] = {f"^{re.escape(module)}": own[name] for module, own
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
            one message with what to do about them.
    """
    named = sorted(str(file.parent) for file in folder.glob(f"*/{FILE}"))
    if named and not (folder / FILE).exists():
        raise UserError(f"no such file: {folder / FILE}: PEFT keeps adapters by name in folders of "
                        f"their own: give {' or '.join(named)}")  # fmt: skip
    config = read_object(folder / FILE)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise UserError(f"{folder / FILE} has peft_type {peft_type!r:.60}: supported are "
                        f"{', '.join(KINDS)}; of another kind, {MERGE}")  # fmt: skip
    kind = KINDS[peft_type]
    known = {*kind.settings, *kind.ignored, *_GENERAL, *_HARMLESS}
    bad = {n: v for n, v in config.items() if n not in known and v not in _OFF}
    bad |= {n: v for n in ("init_lora_weights",) if (v := config.get(n, True)) not in _DRAWN}
    bad |= {n: v for n in ("save_projection",) if (v := config.get(n, True)) is not True}
    if bad:
        ways = dict.fromkeys(way_out(name, value) for name, value in bad.items())
        raise UserError(
            f"{folder / FILE} has {', '.join(f'{n}={v!r:.60}' for n, v in bad.items())}, which is "
            f"not supported: {MERGE if MERGE in ways else '; '.join(ways)}"
        )
    if lacking := [name for name in kind.required if name not in config]:
        raise UserError(f"{folder / FILE} lacks {', '.join(lacking)}: fetch it again")
    if wrong := misfits(config):
        raise UserError(f"{folder / FILE}: {'; '.join(wrong)}: correct it or fetch it again")
    return config
