"""Reading Hugging Face folders: ``config.json`` and safetensors, without torch or pickle.

Example:
    >>> model, params = load("path/to/llama")                        # doctest: +SKIP
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from lora_mini_jax.errors import UserError
from lora_mini_jax.models.arrays import read_array
from lora_mini_jax.models.families import family_of
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.fresh import asked, draw, lacking
from lora_mini_jax.models.hub import read_hf, resolve
from lora_mini_jax.models.shards import open_tensors
from lora_mini_jax.models.tensors import DTYPES, Tensor, same
from lora_mini_jax.tree import flatten, unflatten


def load(
    path_or_id: str | os.PathLike[str],
    *,
    task: str | None = None,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: str = "none",
    revision: str | None = None,
    sharding: Sharding | Callable[[str], Sharding | None] | None = None,
    convert: Callable[[str, jax.Array], Any] | None = None,
) -> tuple[Any, dict]:
    """Read a model from a local folder or the hub; ``config.json`` says of which kind.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors, or a hub id.
        task: an encoder's head, where not the file's own is wanted: ``"sequence-classification"``,
            ``"regression"``, ``"token-classification"`` or ``"masked-lm"``. What the file lacks of
            it, or has for another task or in another shape, is drawn as ``init`` would, and
            ``model.drawn`` lists it. Without ``task`` all must be in the file.
        num_labels, labels: how many classes that head has, or their names; else as in the file.
        seed: of what is drawn.
        dtype, scan_layers: as in the model's class, :class:`Llama` for one.
        remat: what of each layer is recomputed in the backward pass: ``"none"``, ``"dots"``,
            ``"dots_no_batch"`` or ``"full"``, from the most memory to the least.
        param_dtype: what the weights are cast to, whatever the file holds.
        revision: branch, tag or commit of a hub id.
        sharding: where the parameters go: one sharding for all, or what gives one for a path such
            as ``"layers_0/mlp/up_proj/kernel"``; None is the default device. Tensors are read one
            at a time, and only those parts that this process' devices want.
        convert: what a parameter becomes as soon as it is read, ``convert(path, array)``: quantised
            for one, so that never more than one kernel is dense.

    Returns:
        The module and its ``params`` tree of jax arrays.

    Raises:
        UserError: no such model, an unsupported architecture, a damaged file, a head that the
            model cannot have, or tensors that do not fit the config (missing, extra and misshaped
            ones are all listed).
    """
    folder = resolve(path_or_id, revision)
    own = read_hf(folder)
    family = family_of(own, any_head=task is not None)
    hf = asked(family, own, task, num_labels, labels)
    config = family.config.from_hf(hf)
    where = {family.canonical(name): tensor for name, tensor in open_tensors(folder).items()}
    layers = config.num_hidden_layers
    if layers > len(where):
        raise UserError(f"{folder}: config.json says {layers} layers, but there are only "
                        f"{len(where)} tensors: correct it or fetch the model again")  # fmt: skip
    model = family.module(config, dtype, param_dtype, scan_layers, remat)
    shapes = flatten(family.shapes(model))
    slots = {path: _slots(family, path, leaf.shape, family.depth(config, path))
             for path, leaf in shapes.items()}  # fmt: skip
    drawn = []
    if task is not None:
        drawn = lacking(family, slots, where, own.get("architectures") == hf["architectures"])
    read = [path for path in shapes if path not in drawn]
    expected = {name: shape for path in read for name, shape in slots[path].items()}
    where |= _tied(family, where, expected, hf.get("tie_word_embeddings") is True)
    _check(folder, where, expected, family)

    place: Callable[[str], Any] = sharding if callable(sharding) else lambda name: sharding
    model, fresh = draw(model, family, drawn, seed)
    flat = {path: jax.device_put(x, place(path)) for path, x in fresh.items()}
    for path in read:
        flat[path] = read_array(
            [where[tensor] for tensor in slots[path]], shapes[path], name=path,
            stacked=family.stacked(path), flipped=family.flips(path), sharding=place(path),
        )  # fmt: skip
        if convert is not None:
            flat[path] = convert(path, flat[path])
    return model, unflatten(flat)


def _slots(
    family: Family, path: str, shape: tuple[int, ...], layers: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of one parameter with the shape each has in the file."""
    one = shape[1:] if family.stacked(path) else shape
    return dict.fromkeys(family.names(path, layers), one[::-1] if family.flips(path) else one)


def _tied(
    family: Family, where: dict[str, Tensor], expected: dict[str, tuple[int, ...]], tied: bool
) -> dict[str, Tensor]:
    """What the file has under another name alone: no file needs to hold a tied tensor twice.

    Which of the names stays is up to who wrote it. ``tied``: ``config.json`` says so; a copy that
    the model has no parameter for is tied whatever it says.
    """
    pairs = [pair for copy, original in family.copies.items() if tied or copy not in expected
             for pair in ((copy, original), (original, copy))]  # fmt: skip
    return {name: where[other] for name, other in pairs
            if name in expected and name not in where and other in where}  # fmt: skip


def _check(
    folder: Path, where: dict[str, Tensor], expected: dict[str, tuple[int, ...]], family: Family
) -> None:
    """One error for all the tensors that do not fit the config."""
    bad = [f"missing {name}" for name in expected if name not in where]
    tops = {family.top(name) for name in expected}
    for name, tensor in where.items():
        if family.kind == "encoder" and family.top(name) not in tops:
            continue  # another head's
        if name not in expected:
            original = family.copies.get(name)
            copy = original in where and same(tensor, where[original])
            if not copy and not re.search(family.ignored, name):
                why = f" (tied, yet not equal to {original})" if original in where else ""
                bad.append(f"extra {name}{why}")
        elif tensor.shape != expected[name]:
            bad.append(f"{name} is {tensor.shape}, not {expected[name]}")
        elif tensor.kind not in DTYPES:
            bad.append(f"{name} is {tensor.kind}, not one of {', '.join(DTYPES)}")
    if bad:
        raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(bad)}; "
                        "correct config.json or fetch the model again")  # fmt: skip
