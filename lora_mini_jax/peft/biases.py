"""PEFT's ``bias``: which biases are trained whole beside the adapters, written and read."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief
from lora_mini_jax.peft.advice import BIASES


class Biases(NamedTuple):
    """A config's ``bias``, and the tensors that it adds to the file."""

    setting: str
    tensors: set[str]


def chosen(
    trained: Collection[str], adapted: Collection[str], everything: Collection[str], only: str
) -> Biases:
    """The ``bias`` for the tensors that are trained whole.

    A module that is not adapted can be saved whole instead, with its bias (`modules_to_save`); that
    is as good unless its other parameters are large, which `whole.kept_whole` refuses.

    Args:
        trained: the tensors that are trained whole.
        adapted: the modules with an adapter.
        everything: all tensors of the model.
        only: what the setting is called for the biases of adapted modules, `Kind.only_bias`.

    Raises:
        UserError: the biases of some adapted modules, but neither of all of them nor of the model.

    Example:
        >>> chosen(["up.bias"], ["up"], ["up.weight", "up.bias", "norm.bias"], "lora_only")
        Biases(setting='lora_only', tensors={'up.bias'})
    """
    every = {name for name in everything if name.endswith(".bias")}
    own = {name for name in every if _module(name) in adapted}
    open_modules = {_module(name) for name in everything if name not in trained}
    alone = {name for name in every.intersection(trained) if _module(name) in open_modules}
    if alone and alone != own and every.issubset(trained):
        return Biases("all", every)
    if not alone & own:
        return Biases("none", set())
    if own <= alone:
        return Biases(only, own)
    raise UserError(f"of adapted modules {brief(sorted(alone & own))} would be trained, but not "
                    f"{brief(sorted(own - alone))}: {BIASES}")  # fmt: skip


def due(
    config: Mapping[str, Any],
    adapted: Collection[str],
    everything: Collection[str],
    kept: Collection[str],
) -> set[str]:
    """The tensors of the model that a config says PEFT trained as biases.

    Args:
        config: checked.
        adapted, everything: as for `chosen`.
        kept: the tensors of the model that the file has.

    Raises:
        UserError: a file that has none of them.
    """
    setting = config.get("bias") or "none"
    every = {name for name in everything if name.endswith(".bias") and setting != "none"}
    found = every if setting == "all" else {name for name in every if _module(name) in adapted}
    if found and found.isdisjoint(kept):
        raise UserError(
            f"has none of the biases that bias={setting!r:.60} says were trained ({min(found)}, "
            "...), as some versions of PEFT lose them: save it again with a newer PEFT, or write "
            '"bias": "none" into the config to go on without them, as PEFT itself does'
        )
    return found


def is_setting(value: Any) -> bool:
    """Whether PEFT takes this for a ``bias``: of ``lora_only`` and the like it reads the end."""
    return isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
