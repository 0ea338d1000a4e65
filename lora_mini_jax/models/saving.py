"""A model as a Hugging Face folder: ``config.json``, safetensors, and the tokenizer beside them."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import new_folder, writes, writing
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import COMPANIONS, resolve
from lora_mini_jax.processes import on_host, together
from lora_mini_jax.tree import dense, flatten


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: dict,
    *,
    dtype: Any = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Write a folder that transformers' ``AutoModelFor...`` and :func:`load` read.

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
    # All processes take part in gathering a tensor, and only the one that writes keeps it.
    tensors = {name: tensor for name, tensor in _hf_tensors(model, params, dtype) if writes()}
    kept = next(iter(flatten(params).values())).dtype if dtype is None else jnp.dtype(dtype)
    together("model may be saved")  # or one process finds what another has written
    with new_folder(path) as folder:
        config = model.config.to_hf() | {"dtype": kept.name}
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with writing(path):
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if source:
            _copy_companions(source, folder)
    together("model saved")


def _copy_companions(source: Path, folder: Path) -> None:
    for file in (found for pattern in COMPANIONS for found in source.glob(pattern)):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _hf_tensors(model: Any, params: dict, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, checked against the model first."""
    family = family_of_module(model)
    flat, shapes = flatten(params), flatten(family.shapes(model))
    bad = [f"missing {p}" for p in shapes if p not in flat]
    bad += [f"extra {p}" for p in flat if p not in shapes]
    bad += [f"{p} is {flat[p].shape}, not {s.shape}" for p, s in shapes.items()
            if p in flat and flat[p].shape != s.shape]  # fmt: skip
    if bad:
        raise UserError(f"params do not fit the model: {'; '.join(bad)}; give load's or init's")
    for path, leaf in flat.items():
        names = family.names(path, family.depth(model.config, path))
        leaf = dense(leaf)
        value = on_host(leaf if dtype is None else leaf.astype(dtype))
        for name, one in zip(names, value if family.stacked(path) else [value], strict=True):
            yield name, np.ascontiguousarray(family.swapped(path, one))
