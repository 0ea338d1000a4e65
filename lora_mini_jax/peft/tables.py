"""Tables that PEFT's model would use otherwise than ours, were they adapted."""

from collections.abc import Mapping
from typing import Any

from lora_mini_jax.peft.names import ModelNames, Names, Place
from lora_mini_jax.selection import OUTPUT_HEADS
from lora_mini_jax.tree import flatten

_UNCALLED = ("rel_embeddings",)
"""Modules of which Hugging Face's models read the weight without a call."""


def obstacle(place: Place, names: Names, params: Mapping[str, Any], whole: bool) -> str:
    """Why PEFT's model would not compute what ours does with this parameter adapted, as the rest of
    a sentence; empty where it would.

    Args:
        place: the parameter.
        names: of the model's parameters.
        params: all of them.
        whole: whether it is trained whole, and not by an adapter beside it.
    """
    if place.modules == ("shared",):
        return "is held by both halves of a T5, and PEFT would adapt neither"
    if _is_tied(place, names, params):
        return "may be the output head too, which PEFT would leave as it was"
    if not whole and any(module.split(".")[-1] in _UNCALLED for module in place.modules):
        return "is read without a call of its module, so that PEFT's adapter beside it does nothing"
    return ""


def _is_tied(place: Place, names: Names, params: Mapping[str, Any]) -> bool:
    """Whether the output head may share this table: a table, in a model whose head has no words of
    its own. PEFT then adapts the lookup alone, whereas here the head follows its table. Of models
    that can be read it is known which table that would be."""
    rows = place.shape[0]
    if isinstance(names, ModelNames) and place.tensors[0] not in names.family.copies.values():
        return False

    def is_own_head(path: str, leaf: Any) -> bool:
        parts = path.split("/")
        words = leaf.ndim > 1 and rows in leaf.shape
        return any(head in parts for head in OUTPUT_HEADS) and (words or "lm_head" not in parts)

    heads = (is_own_head(path, leaf) for path, leaf in flatten(params).items())
    return place.target.kind == "embed" and not any(heads)
