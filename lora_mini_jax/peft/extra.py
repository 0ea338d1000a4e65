"""Tensors of a file that belong to no parameter here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_mini_jax.peft.advice import UNTIE
from lora_mini_jax.peft.names import ModelNames, Names, Place
from lora_mini_jax.peft.tensors import Tensors, is_copy
from lora_mini_jax.tree import float32

_HEAD = "lm_head.weight"


def extra(
    tensors: Tensors, found: Mapping[str, Place], names: Names, base: Mapping[str, Any]
) -> list[str]:
    """What is wrong with tensors that have no place. A copy of another tensor, as PEFT writes of
    parameters that its model holds under two names, is let be."""
    modules = {m for place in found.values() if place.target.kind != "array" for m in place.modules}
    owners = {name: place for place in found.values() for name in place.tensors}
    family = names.family if isinstance(names, ModelNames) else None
    copies = family.copies if family else {}

    def is_second(name: str) -> bool:
        original = copies.get(name, "")
        return original in owners and _is_same(name, original, tensors, owners[original], base)

    left = [f"{m}.{leaf}" for m, own in tensors.adapted.items() if m not in modules for leaf in own]
    left += [name for name in tensors.whole if name not in owners and not is_second(name)]
    # Other kinds of models tie more than the weights, or cannot be had with a head of its own.
    tied = family and family.kind == "decoder" and _HEAD in copies and _HEAD not in owners
    head = [name for name in left if tied and name.startswith("lm_head.")]
    said = [f"{name} is extra: no such kernel or parameter" for name in left if name not in head]
    return said + [f"{name}: {UNTIE}" for name in head[:1]]


def _is_same(
    name: str, original: str, tensors: Tensors, place: Place, base: Mapping[str, Any]
) -> bool:
    """Whether a tensor is the original again: the file's, or where it has none, the base's."""
    leaf = base[place.target.path]
    old = tensors.whole.get(original, place.split(float32(leaf))[original])
    return is_copy(tensors.whole[name], np.asarray(old, np.float32), leaf.dtype)
