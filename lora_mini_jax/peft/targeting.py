"""Which modules PEFT touches: a config that says exactly which, and what a given config says."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_mini_jax.errors import UserError


def family_tree(tensors: Iterable[str]) -> set[str]:
    """All modules that hold the tensors, and the modules that hold those."""
    found = set()
    for name in tensors:
        parts = name.split(".")[:-1]
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return found


def target_modules(adapted: Sequence[str], everything: set[str]) -> list[str] | str:
    """PEFT's ``target_modules`` for the adapted modules and no others.

    A list of full names, which every reader understands; PEFT looks for them at the end of a name,
    so where that would catch another module it is one regular expression instead.
    """
    chosen = set(adapted)
    if any(_ends(other, name) for other in everything - chosen for name in adapted):
        return f"(?:{'|'.join(re.escape(name) for name in adapted)})"
    return list(adapted)


def modules_to_save(trained: set[str], adapted: Iterable[str], tensors: Iterable[str]) -> list[str]:
    """PEFT's ``modules_to_save`` for the modules that hold something trained whole: a module in
    place of all its parts, as PEFT names a classifier.

    Raises:
        UserError: adapted modules among them, or a name that PEFT would take for others too: it
            looks for it at the end of a name, be it in the middle of a word.
    """
    if both := sorted(trained & set(adapted)):
        raise UserError(
            f"{', '.join(both)}: PEFT saves whole modules, and of adapted ones the bias alone; "
            "leave them out of modules_to_save, or merge the adapter into the model"
        )
    everything = family_tree(tensors)
    holding = {name.rpartition(".")[0] for name in tensors}
    parts = {m: {h for h in holding if h == m or h.startswith(f"{m}.")} for m in everything}
    whole = {m for m in everything if parts[m] <= trained}
    chosen = [m for m in sorted(whole) if m.rpartition(".")[0] not in whole]
    caught = {m for m in everything - whole if any(m.endswith(name) for name in chosen)}
    if caught:
        raise UserError(
            f"modules_to_save {', '.join(chosen)}: PEFT would take {', '.join(sorted(caught))} for "
            "one of them too; merge the adapter into the model instead"
        )
    return chosen


def adapts(config: Mapping[str, Any], module: str) -> bool:
    """Whether a config says that PEFT adapts this module. False where it leaves that to the kind
    of model (no ``target_modules``, or ``"all-linear"``): then the tensors alone tell."""
    wanted = config.get("target_modules")
    if wanted in (None, "all-linear") or not _listed(wanted, module):
        return False
    saved = config.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    if _listed(config.get("exclude_modules") or (), module):
        return False
    return _in_layers(config.get("layers_to_transform"), config.get("layers_pattern"), module)


def saves(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether a config says that PEFT saves this tensor with a whole module."""
    wanted = config.get("modules_to_save") or ()
    return any(module.endswith(name) for module in family_tree([tensor]) for name in wanted)


def _listed(wanted: str | Sequence[str], module: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or _ends(module, name) for name in wanted)


def _ends(module: str, name: str) -> bool:
    return module.endswith(f".{name}")


def _in_layers(layers: Any, patterns: Any, module: str) -> bool:
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or ["[^.]*"]
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", module) for pattern in patterns)
    match = next((m for m in found if m), None)
    chosen = [layers] if isinstance(layers, int) else layers
    return match is not None and int(match["layer"]) in chosen
