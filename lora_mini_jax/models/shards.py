"""The safetensors files of a Hugging Face folder: one, or the shards that its index names."""

import os
import re
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object
from lora_mini_jax.models.tensors import Tensor, tensors_of


def read_downloaded(file: Path) -> dict[str, Any]:
    """The object in a JSON file that may come from anyone.

    Raises:
        UserError: no such file, no JSON, or JSON that Python cannot hold.
    """
    try:
        return read_object(file)
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, a number too long
        raise UserError(f"{file} is no JSON to be trusted ({type(error).__name__}): fetch it again"
                        ) from None  # fmt: skip


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        only = f"only {', '.join(pickled)}, which is pickle and never read" if pickled else "none"
        raise UserError(f"{folder} should hold model.safetensors or its index but has {only}: "
                        "convert the weights with transformers' save_pretrained")  # fmt: skip
    names = read_downloaded(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index} has no weight_map of tensor to file: fetch it again")
    files = sorted(set(names.values()))
    # A shard is a plain name: an index must not make us open files elsewhere on the disk.
    odd = [n for n in files if n in ("", ".", "..") or re.search(r"[/\\]", n)]
    if outside := odd + [n for n in files if not n.isprintable()]:
        raise UserError(f"{index} names files outside the folder: {outside!r}; do not use it")
    if missing := [n for n in files if not os.path.isfile(folder / n)]:
        raise UserError(f"{folder} lacks the shards {', '.join(missing)}: fetch them again")
    return [folder / n for n in files]


def open_tensors(folder: Path) -> dict[str, Tensor]:
    """Where each tensor of a folder lies, by name.

    Raises:
        UserError: no weights, a shard that is missing, damaged or outside the folder, or one
            tensor in two shards.
    """
    where: dict[str, Tensor] = {}
    for shard in shards(folder):
        found = tensors_of(shard)
        if twice := sorted(found.keys() & where.keys()):
            raise UserError(f"{shard} and {where[twice[0]].file} both hold {', '.join(twice)}: "
                            "fetch the model again")  # fmt: skip
        where |= found
    return where
