"""Adapters that PEFT wrote, and tensors from elsewhere, as an `Adapter`."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.peft import config as configs
from lora_mini_jax.peft.biases import due
from lora_mini_jax.peft.fit import Plan, build
from lora_mini_jax.peft.kinds import KINDS
from lora_mini_jax.peft.kinds.lora import of_tensors
from lora_mini_jax.peft.names import Names, llama_names, places
from lora_mini_jax.peft.targeting import adapts, saves
from lora_mini_jax.peft.tensors import read, sort
from lora_mini_jax.tree import Target


def load(
    folder: str | Path,
    params: Mapping[str, Any],
    targets: Iterable[Target],
    *,
    names: Names | None = None,
) -> Adapter:
    """Read an adapter that PEFT wrote (``save_pretrained``), to use, merge or train on.

    The function is PEFT's: LoRA (with rsLoRA, DoRA, ranks and alphas by module), AdaLoRA, MiSS and
    VeRA. Modules saved whole and trained biases (``bias``) become full fine-tuning sites; what
    AdaLoRA has pruned is zero. Trained leaves are float32 whatever the file has. VeRA's random
    factors come from the file: keep such an adapter by `lora_mini_jax.save` with
    ``store_outer=True``.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        params: the base's parameters.
        targets: all kernels of the model, `linen.targets`; those in the file get adapters.
        names: as for `save`; by default a Llama's.

    Raises:
        UserError: a file that is missing, damaged or a pickle; settings that are not supported;
            tensors that are missing, extra or of another shape, all in one message; stacked layers
            that differ in rank or alpha. Most messages say how PEFT can save it otherwise.
    """
    folder = Path(folder)
    config = configs.read_config(folder)
    kind, tensors = KINDS[config["peft_type"]], sort(read(folder))
    names = names or llama_names(params)
    found = places(params, targets, names)
    everything = [name for place in found.values() for name in place.tensors]
    try:
        for module, own in tensors.adapted.items():
            tensors.adapted[module] = dict(kind.restored(config, module, own))
        biases = due(config, tensors.adapted, everything, tensors.whole)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    given = Plan(
        str(folder),
        kind,
        lambda module: configs.method_of(config, module, folder),
        lambda module: adapts(config, module),
        lambda tensor: tensor in biases or saves(config, tensor),
        # Where none of the modules it adapts keeps (in, out), PEFT says false of the whole model.
        bool(getattr(names, "keeps_layout", config.get("fan_in_fan_out"))),
    )
    return build(tensors, given, params, found, names)


def from_state_dict(
    tensors: Mapping[str, Any],
    params: Mapping[str, Any],
    targets: Iterable[Target],
    *,
    alpha: float,
    names: Names | None = None,
    key_map: Callable[[str], str | None] | None = None,
    rslora: bool = False,
) -> Adapter:
    """A LoRA (or DoRA) from its tensors alone, for files without PEFT's config.

    Args:
        tensors: arrays by key, ``lora_A (r, in)`` and ``lora_B (out, r)`` as torch has them; the
            rank of each kernel is read off.
        params, targets, names: as for `load`.
        alpha: what the update is scaled with, over the rank (with ``rslora``, its root).
        key_map: from a key of the file to ``module.lora_A``, ``module.lora_B`` or
            ``module.lora_magnitude_vector``, ``module`` by Hugging Face's name; None leaves a
            tensor out. By default keys are read as PEFT's.
        rslora: scale by ``alpha / sqrt(r)``.

    Raises:
        UserError: tensors that are missing, extra or of another shape, all in one message.

    Example:
        >>> params = {"up": {"kernel": np.ones((8, 6))}}
        >>> theirs = {"up.lora_A": np.ones((2, 8)), "up.lora_B": np.ones((6, 2)), "h": np.ones(3)}
        >>> adapter = from_state_dict(theirs, params, [Target("up/kernel", (8, 6))], alpha=4,
        ...     names=lambda path: [path.replace("/kernel", ".weight")],
        ...     key_map=lambda key: None if key == "h" else key)
        >>> adapter.sites[0].method
        LoRA(dropout=0.0, rank=2, alpha=4.0, rslora=False)
    """
    mapped = {key: key_map(key) if key_map else key for key in tensors}
    chosen = {new: np.asarray(tensors[key]) for key, new in mapped.items() if new is not None}
    if len(chosen) < sum(new is not None for new in mapped.values()):
        raise UserError("key_map gives two tensors the same key: map each to its own, or to None")
    own = sort(chosen)
    names = names or llama_names(params)
    given = Plan(
        "the state dict",
        KINDS["LORA"],
        lambda module: of_tensors(own.adapted[module], alpha, rslora),
        keeps_layout=getattr(names, "keeps_layout", False),
    )
    return build(own, given, params, places(params, targets, names), names)
