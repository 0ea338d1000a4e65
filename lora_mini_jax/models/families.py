"""Every kind of model that can be read, and which of them a ``config.json`` or a module is."""

import re
from typing import Any

import flax.linen as nn

from lora_mini_jax.errors import UserError
from lora_mini_jax.models import bert, deberta, gpt2, llama, roberta, t5
from lora_mini_jax.models.family import Family

FAMILIES = (
    llama.FAMILY, gpt2.FAMILY, t5.FAMILY, bert.FAMILY, *roberta.FAMILIES, deberta.FAMILY,
)  # fmt: skip
"""A new kind of model is a file and a place here."""
DECODERS = tuple(family for family in FAMILIES if family.kind == "decoder")
"""Those that continue text: called with tokens, positions, segments and a cache."""


def family_of(hf: dict[str, Any], any_head: bool = False) -> Family:
    """The family that a ``config.json`` belongs to; with ``any_head`` whatever head it names.

    Raises:
        UserError: an architecture that is in none of `FAMILIES`, with the list of all that are.
    """
    known = {name: family for family in FAMILIES for name in family.architectures}
    given = hf.get("architectures") or [_by_type(hf, known)]
    if not isinstance(given, list) or not all(isinstance(name, str | None) for name in given):
        raise UserError(f"architectures {given!r} is no list of names: correct config.json")
    if any_head and not (len(given) == 1 and given[0] in known):
        given = [_by_type(hf, known) or given[0]]
    if len(given) == 1 and given[0] in known:
        return known[given[0]]
    name = ", ".join(map(str, given if given[0] else [hf.get("model_type")]))
    raise UserError(
        f"architecture {name!r} is not supported, only {', '.join(sorted(known))}: use another "
        "model or correct config.json"
    )


def _by_type(hf: dict[str, Any], known: dict[str, Family]) -> str | None:
    """The architecture of a ``config.json`` that names only its ``model_type``."""
    kind = re.sub("_text$|[-_]", "", str(hf.get("model_type", ""))).lower()
    heads = ("forcausallm", "lmheadmodel", "forconditionalgeneration", "model")
    wanted = [kind + head for head in heads]
    return next((name for name in known if name.lower() in wanted), None)


def family_of_module(model: nn.Module) -> Family:
    """The family of a module that `load` gave.

    Raises:
        UserError: a module of another kind.
    """
    for family in FAMILIES:
        if type(model) is family.module:
            return family
    known = ", ".join(sorted({family.module.__name__ for family in FAMILIES}))
    raise UserError(f"{type(model).__name__} is none of the models that can be read: {known}")
