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

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import new_folder, read_object, writing
from lora_mini_jax.models.llama import Llama
from lora_mini_jax.models.llama_config import LlamaConfig
from lora_mini_jax.models.shards import open_tensors

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_DOWNLOADS = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]
_FLOATS = ("F64", "F32", "F16", "BF16")
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}

Path_ = tuple[str, ...]


def hf_names(path: Path_, layers: int) -> list[str]:
    """The Hugging Face tensors that make one parameter: one, or one a layer where it is stacked.

    Example:
        >>> hf_names(("layers_3", "self_attn", "q_proj", "kernel"), layers=8)
        ['model.layers.3.self_attn.q_proj.weight']
        >>> hf_names(("layers", "input_layernorm", "scale"), layers=2)
        ['model.layers.0.input_layernorm.weight', 'model.layers.1.input_layernorm.weight']
    """
    name = ".".join((*path[:-1], _LEAVES[path[-1]]))
    if path[0] == "lm_head":
        return [name]
    if path[0] == "layers":
        return [f"model.layers.{i}{name.removeprefix('layers')}" for i in range(layers)]
    return ["model." + re.sub(r"^layers_(\d+)", r"layers.\1", name)]


def _to_hf(path: Path_, value: np.ndarray) -> np.ndarray:
    """Flax keeps a kernel as (in, out), torch as (out, in); its own inverse."""
    return value.T if path[-1] == "kernel" else value


def _shapes(model: Llama) -> dict[Path_, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of the model, by path; nothing is computed."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _slots(path: Path_, shape: tuple[int, ...], layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one parameter with the shape each has in the file."""
    one = shape[1:] if path[0] == "layers" else shape
    return dict.fromkeys(hf_names(path, layers), one[::-1] if path[-1] == "kernel" else one)


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


def load_config(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> LlamaConfig:
    """Read ``config.json`` of a folder or hub model; errors as in :func:`load`."""
    file = resolve(path_or_id, revision) / "config.json"
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a Hugging Face model folder")
    return LlamaConfig.from_hf(read_object(file))


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: bool = False,
    revision: str | None = None,
) -> tuple[Llama, dict]:
    """Read a Llama from a local folder or the hub.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors, or a hub id.
        dtype, scan_layers, remat: as in :class:`Llama`.
        param_dtype: what the weights are cast to, whatever the file holds.
        revision: branch, tag or commit of a hub id.

    Returns:
        The module and its ``params`` tree of jax arrays.

    Raises:
        UserError: no such model, an unsupported architecture, a damaged file, or tensors that do
            not fit the config (missing, extra and misshaped ones are all listed).
    """
    folder = resolve(path_or_id, revision)
    model = Llama(load_config(folder), dtype, param_dtype, scan_layers, remat)
    shapes = _shapes(model)
    layers = model.config.num_hidden_layers
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        expected |= _slots(path, leaf.shape, layers)
    with ExitStack() as stack:
        where = open_tensors(folder, stack)
        _check(folder, where, expected, model.config.tie_word_embeddings)
        flat = {}
        for path, leaf in shapes.items():
            # One tensor at a time: a model is never held twice in its file's dtype.
            values = [
                _to_hf(path, where[name].get_tensor(name).astype(leaf.dtype))
                for name in hf_names(path, layers)
            ]
            flat[path] = jnp.asarray(np.stack(values) if path[0] == "layers" else values[0])
    return model, unflatten_dict(flat)


def save(
    path: str | os.PathLike[str],
    model: Llama,
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
    kept = tensors["model.norm.weight"].dtype.name
    with new_folder(path) as folder:
        config = model.config.to_hf() | {"dtype": kept}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with writing(path):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name in COMPANIONS:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _hf_tensors(model: Llama, params: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, checked against the model first."""
    flat, shapes = flatten_dict(params), _shapes(model)
    bad = [f"missing {'/'.join(p)}" for p in shapes if p not in flat]
    bad += [f"extra {'/'.join(p)}" for p in flat if p not in shapes]
    bad += [f"{'/'.join(p)} is {flat[p].shape}, not {s.shape}" for p, s in shapes.items()
            if p in flat and flat[p].shape != s.shape]  # fmt: skip
    if bad:
        raise UserError(f"params do not fit the model: {'; '.join(bad)}; give load's or init's")
    for path, leaf in flat.items():
        names = hf_names(path, model.config.num_hidden_layers)
        value = np.asarray(leaf if dtype is None else leaf.astype(dtype))
        for name, one in zip(names, value if path[0] == "layers" else [value], strict=True):
            yield name, np.ascontiguousarray(_to_hf(path, one))


def _check(folder: Path, where: dict, expected: dict[str, tuple[int, ...]], tied: bool) -> None:
    """One error for all the tensors that do not fit the config."""
    bad = [f"missing {name}" for name in expected if name not in where]
    for name, handle in where.items():
        part = handle.get_slice(name)
        shape, kind = tuple(part.get_shape()), part.get_dtype()
        if name not in expected:
            copy = tied and name == "lm_head.weight" and _equals_embedding(where)
            if not copy and not name.endswith("rotary_emb.inv_freq"):
                why = " (tied, yet not equal to embed_tokens)" if name == "lm_head.weight" else ""
                bad.append(f"extra {name}{why}")
        elif shape != expected[name]:
            bad.append(f"{name} is {shape}, not {expected[name]}")
        elif kind not in _FLOATS:
            bad.append(f"{name} is {kind}, not one of {', '.join(_FLOATS)}")
    if bad:
        raise UserError(f"{folder}: tensors do not fit config.json: {'; '.join(bad)}; "
                        "correct config.json or fetch the model again")  # fmt: skip


def _equals_embedding(where: dict) -> bool:
    """Whether a tied model's stored head is the embedding that it should be."""
    pair = ("lm_head.weight", "model.embed_tokens.weight")
    return pair[1] in where and np.array_equal(*(where[n].get_tensor(n) for n in pair))
