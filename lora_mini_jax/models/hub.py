"""Hugging Face folders in and out: ``config.json`` and safetensors, without torch or pickle.

Example:
    >>> model, params = load("path/to/llama")                        # doctest: +SKIP
    >>> save("path/to/copy", model, params, tokenizer_from="path/to/llama")  # doctest: +SKIP
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import new_folder, read_object, writing
from lora_mini_jax.models import llama
from lora_mini_jax.models.family import STACK, Family, PathTuple
from lora_mini_jax.models.shards import open_tensors

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_DOWNLOADS = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]
FAMILIES = (llama.FAMILY,)
"""Every kind of model that can be read; a new one is a file and a place here."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def family_of(hf: dict[str, Any]) -> Family:
    """The family that a ``config.json`` belongs to.

    Raises:
        UserError: an architecture that is in none of `FAMILIES`, with the list of all that are.
    """
    known = {name: family for family in FAMILIES for name in family.architectures}
    given = hf.get("architectures") or [_by_type(hf, known)]
    if len(given) == 1 and given[0] in known:
        return known[given[0]]
    name = ", ".join(map(str, given if given[0] else [hf.get("model_type")]))
    raise UserError(
        f"architecture {name!r} is not supported, only {', '.join(sorted(known))}: use another "
        "model or correct config.json"
    )


def _by_type(hf: dict[str, Any], known: dict[str, Family]) -> str | None:
    """The architecture of a ``config.json`` that names only its ``model_type``."""
    wanted = str(hf.get("model_type", "")).replace("_", "").lower() + "forcausallm"
    return next((name for name in known if name.lower() == wanted), None)


def resolve(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a model: the one given, or the hub's, downloaded to the usual cache.

    Raises:
        UserError: neither a folder nor reachable on the hub, or a revision of a local folder.
    """
    path = Path(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} is for hub models, but {path} is a local "
                            "folder: leave revision out")  # fmt: skip
        return path
    try:
        from huggingface_hub import snapshot_download

        name = os.fspath(path_or_id)
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADS))
    except Exception as error:  # the hub client raises many kinds, and all mean the same here
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"{str(path_or_id)!r} is neither a local folder nor reachable on the hub "
            f"({type(error).__name__}: {why}): give a folder with config.json or a hub id"
        ) from error


def load_config(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Read ``config.json`` of a folder or hub model; errors as in :func:`load`."""
    return _read_config(resolve(path_or_id, revision))[1]


def load_abstract(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None
) -> tuple[nn.Module, dict]:
    """The module and the shapes of its parameters, from ``config.json`` alone."""
    family, config = _read_config(resolve(path_or_id, revision))
    model = family.module(config)
    return model, family.shapes(model)


def _read_config(folder: Path) -> tuple[Family, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a Hugging Face model folder")
    hf = read_object(file)
    family = family_of(hf)
    return family, family.config.from_hf(hf)


def _family(model: nn.Module) -> Family:
    """The family of a module."""
    return next(family for family in FAMILIES if type(model) is family.module)


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
    revision: str | None = None,
) -> tuple[Any, dict]:
    """Read a model from a local folder or the hub; ``config.json`` says of which kind.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors, or a hub id.
        dtype, scan_layers, remat: as in the model's class, :class:`Llama` for one.
        param_dtype: what the weights are cast to, whatever the file holds.
        revision: branch, tag or commit of a hub id.

    Returns:
        The module and its ``params`` tree of jax arrays.

    Raises:
        UserError: no such model, an unsupported architecture, a damaged file, or tensors that do
            not fit the config (missing, extra and misshaped ones are all listed).
    """
    folder = resolve(path_or_id, revision)
    family, config = _read_config(folder)
    model = family.module(config, dtype, param_dtype, scan_layers, remat)
    shapes = flatten_dict(family.shapes(model))
    layers = config.num_hidden_layers
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        expected |= _slots(family, path, leaf.shape, layers)
    with ExitStack() as stack:
        where = open_tensors(folder, stack)
        _check(folder, where, expected, family)
        flat = {}
        for path, leaf in shapes.items():
            # One tensor at a time: a model is never held twice in its file's dtype.
            values = [
                family.swapped(path, where[name].get_tensor(name).astype(leaf.dtype))
                for name in family.names(path, layers)
            ]
            flat[path] = jnp.asarray(np.stack(values) if STACK in path else values[0])
    return model, unflatten_dict(flat)


def _slots(
    family: Family, path: PathTuple, shape: tuple[int, ...], layers: int
) -> dict[str, tuple[int, ...]]:
    """The tensors of one parameter with the shape each has in the file."""
    one = shape[1:] if STACK in path else shape
    flipped = path[-1] == "kernel" and not family.keeps_layout
    return dict.fromkeys(family.names(path, layers), one[::-1] if flipped else one)


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: dict,
    *,
    dtype: Any = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write a folder that transformers' ``AutoModelForCausalLM`` and :func:`load` read.

    It is written beside its place and renamed, so a crash leaves no half-written model.

    Args:
        path: a new or empty folder.
        model, params: as :func:`load` returns them, stacked or not.
        dtype: of the tensors in the file; None keeps that of ``params``.
        tokenizer_from: folder or hub id whose tokenizer and generation files are copied.

    Raises:
        UserError: ``path`` is taken, or ``params`` do not fit the model (all listed).
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is not an empty folder: give a new path or remove it")
    source = None if tokenizer_from is None else resolve(tokenizer_from)
    tensors = dict(_hf_tensors(model, params, dtype))
    kept = next(iter(tensors.values())).dtype.name
    with new_folder(path) as folder:
        config = model.config.to_hf() | {"dtype": kept}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with writing(path):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name in COMPANIONS:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _hf_tensors(model: Any, params: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, checked against the model first."""
    family = _family(model)
    flat, shapes = flatten_dict(params), flatten_dict(family.shapes(model))
    bad = [f"missing {'/'.join(p)}" for p in shapes if p not in flat]
    bad += [f"extra {'/'.join(p)}" for p in flat if p not in shapes]
    bad += [f"{'/'.join(p)} is {flat[p].shape}, not {s.shape}" for p, s in shapes.items()
            if p in flat and flat[p].shape != s.shape]  # fmt: skip
    if bad:
        raise UserError(f"params do not fit the model: {'; '.join(bad)}; give load's or init's")
    for path, leaf in flat.items():
        names = family.names(path, model.config.num_hidden_layers)
        value = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for name, one in zip(names, value if STACK in path else [value], strict=True):
            yield name, np.ascontiguousarray(family.swapped(path, one))


def _check(folder: Path, where: dict, expected: dict[str, tuple[int, ...]], family: Family) -> None:
    """One error for all the tensors that do not fit the config."""
    bad = [f"missing {name}" for name in expected if name not in where]
    for name, handle in where.items():
        part = handle.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if name not in expected:
            original = family.copies.get(name)
            copy = original and original in where and _equal(where, name, original)
            if not copy and not re.search(family.ignored, name):
                why = f" (tied, yet not equal to {original})" if original else ""
                bad.append(f"extra {name}{why}")
        elif shape != expected[name]:
            bad.append(f"{name} is {shape}, not {expected[name]}")
        elif kind not in _FLOATS:
            bad.append(f"{name} is {kind}, not one of {', '.join(_FLOATS)}")
    if bad:
        raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(bad)}; "
                        "correct config.json or fetch the model again")  # fmt: skip


def _equal(where: dict, copy: str, original: str) -> bool:
    """Whether a tied model's stored copy is the tensor that it should be."""
    return np.array_equal(where[copy].get_tensor(copy), where[original].get_tensor(original))
