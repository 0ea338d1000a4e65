"""An adapter as a folder that PEFT reads."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_mini_jax.adapters.adapter import Adapter, check_calibrated
from lora_mini_jax.adapters.folding import fold, padded
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import new_folder, write_json, writing
from lora_mini_jax.method import Factors, Method
from lora_mini_jax.methods import LoRA
from lora_mini_jax.methods.full import Full
from lora_mini_jax.peft import config, tensors
from lora_mini_jax.peft.kinds import KINDS, kind_of
from lora_mini_jax.peft.kinds.kind import Kind
from lora_mini_jax.peft.names import Names, Place, llama_names, places
from lora_mini_jax.peft.tables import obstacle
from lora_mini_jax.peft.targeting import family_tree, target_modules
from lora_mini_jax.peft.whole import kept_whole
from lora_mini_jax.processes import together


class _Piece(NamedTuple):
    """One adapted kernel: its leaves, of a method that PEFT has."""

    place: Place
    method: Method
    factors: Factors


def save(
    folder: str | Path,
    adapter: Adapter,
    params: Mapping[str, Any],
    *,
    names: Names | None = None,
    base: str = "",
    as_lora: bool = False,
    fan_in_fan_out: bool | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not at all.

    PEFT's model with this adapter computes what ours does, on the same base. LoRA, LoRA-FA, DoRA,
    AdaLoRA, MiSS and VeRA go out as they are; every other method whose update is a product of thin
    matrices (LoRA-Mini, LoRA-XS, PiSSA, OLoRA at twice their rank) as a plain LoRA with
    ``lora_alpha = r``. Kernels that share leaves (`Site.owner`) get a copy each. Full fine-tuning
    beside the method becomes PEFT's ``modules_to_save``, or its ``bias`` where it is of all biases
    of the adapted modules or of the model. Tensors are float32.

    Args:
        folder: where to; what was there before is replaced.
        adapter: what to write.
        params: the base's parameters.
        names: what Hugging Face calls the parameters: `names_of` a model, or a function from a path
            to one name, or to one a layer where layers are stacked. By default a Llama's.
        base: name or path of the base model, for ``base_model_name_or_path``.
        as_lora: everything as plain LoRA without dropout, of one rank (smaller ones filled up with
            zeros) and with its scale in the factors: for servers, which read ``r`` and
            ``lora_alpha`` and nothing else.
        fan_in_fan_out: whether the base stores linear kernels as (in, out), as GPT-2 does; None is
            what `names_of` the model says, and False for other names.
        task_type: PEFT's, such as ``"CAUSAL_LM"``, for its ``AutoPeftModel`` classes.

    Raises:
        UserError: a method that has no such form (SwitchLoRA, ReLoRA, full fine-tuning alone;
            as LoRA also DoRA and MiSS in mode bat): merge it instead. MiSS for kernels that
            are stored (in, out). Kernels that differ in what a PEFT config has one of. The biases
            of some adapted modules and not of others. A table that the output head or both halves
            of a T5 share, or that is read without a call of its module (DeBERTa's
            ``rel_embeddings``, but for full fine-tuning). Factors that come from data and have not
            been made yet. A disk that is full.
    """
    from safetensors.numpy import save_file

    arrays, settings = convert(
        adapter, params, names=names, as_lora=as_lora, fan_in_fan_out=fan_in_fan_out
    )
    about = {
        "base_model_name_or_path": base or None,
        "task_type": task_type,
        "inference_mode": True,
    }
    with new_folder(folder) as temporary:
        with writing(folder):
            save_file(arrays, temporary / tensors.FILE, metadata={"format": "pt"})
        write_json(temporary / config.FILE, {**about, **settings})
    together("adapter exported")


def convert(
    adapter: Adapter,
    params: Mapping[str, Any],
    *,
    names: Names | None = None,
    as_lora: bool = False,
    fan_in_fan_out: bool | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the config that `save` writes; arguments and errors as there."""
    check_calibrated(adapter)
    names = names or llama_names(params)
    found = places(params, [site.target for site in adapter.sites], names)
    if fan_in_fan_out is None:
        fan_in_fan_out = bool(getattr(names, "keeps_layout", False))
    whole = [site for site in adapter.sites if isinstance(site.method, Full)]
    if len(whole) == len(adapter.sites):
        raise UserError("full fine-tuning alone is no adapter, and PEFT has no file for it: merge "
                        "it into the model (merge, then models.save)")  # fmt: skip
    for site in adapter.sites:
        path, is_whole = site.target.path, isinstance(site.method, Full)
        if why := obstacle(found[path], names, params, is_whole):
            raise UserError(f"{path} {why}: merge the adapter into the model (merge, then "
                            "models.save)")  # fmt: skip
    pieces = _pieces(adapter, found, as_lora)
    by_module = {module: config.settings(piece.method) for piece in pieces
                 for module in piece.place.modules}  # fmt: skip
    settings = config.merge_configs(by_module)
    kind = KINDS[settings["peft_type"]]
    arrays = _arrays(pieces, kind)
    everything = family_tree(name for place in found.values() for name in place.tensors)
    settings["target_modules"] = target_modules(list(by_module), everything)
    if "fan_in_fan_out" in kind.settings:
        settings["fan_in_fan_out"] = fan_in_fan_out
    elif fan_in_fan_out:
        name = type(pieces[0].method).__name__
        raise UserError(f"PEFT has no {name} for kernels that are stored (in, out), as GPT-2's "
                        "are: export it as plain LoRA, as_lora=True, or merge it")  # fmt: skip
    beside = replace(adapter, sites=tuple(whole))
    more, saved = kept_whole(beside, params, found, by_module, kind.only_bias, bool(fan_in_fan_out))
    arrays |= more
    settings |= saved
    return {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()}, settings


def _pieces(adapter: Adapter, found: Mapping[str, Place], as_lora: bool) -> list[_Piece]:
    """The adapted kernels, folded into plain LoRA where PEFT has no such method."""
    factors, pieces = adapter.factors(), []
    for site in adapter.sites:
        path, method = site.target.path, site.method
        if isinstance(method, Full):
            continue
        kind = kind_of(method)
        native = kind is not None and (site.target.kind == "linear" or kind.adapts_tables)
        own = (method, factors[path])
        pieces.append(_Piece(found[path], *own if native and not as_lora else
                             fold(*own, site.target)))  # fmt: skip
    if as_lora:
        rank = max(piece.factors["A"].shape[-1] for piece in pieces)
        plain = LoRA(rank, alpha=float(rank))
        pieces = [_Piece(p.place, plain, padded(p.factors, rank)) for p in pieces]
    return pieces


def _arrays(pieces: list[_Piece], kind: Kind) -> dict[str, np.ndarray]:
    """PEFT's tensors, one by one of stacked layers."""
    shared, own = kind.gather({piece.place.target.path: piece.factors for piece in pieces})
    arrays = {f"base_model.{name}": array for name, array in shared.items()}
    for place, method, _ in pieces:
        target, n = place.target, len(place.target.lead)
        for name, leaf in kind.leaves[type(method)].items():
            each = np.asarray(leaf.there(own[target.path][name]))
            for module, one in zip(place.modules, each.reshape(-1, *each.shape[n:]), strict=True):
                arrays[f"{tensors.PREFIX}{module}.{leaf.key(target.kind)}"] = one
    return arrays
