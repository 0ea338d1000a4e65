"""The safetensors files of a Hugging Face folder: one, or the shards that its index names."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object


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
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise UserError(f"{index} has no weight_map of tensor to file: fetch it again")
    files = sorted(set(names.values()))
    # A shard is a plain name: an index must not make us open files elsewhere on the disk.
    if outside := [n for n in files if n in ("", ".", "..") or re.search(r"[/\\\0]", n)]:
        raise UserError(f"{index} names files outside the folder: {outside!r}; do not use it")
    if missing := [n for n in files if not (folder / n).is_file()]:
        raise UserError(f"{folder} lacks the shards {', '.join(missing)}: fetch them again")
    return [folder / n for n in files]


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name to the open file that holds it."""
    from safetensors import SafetensorError, safe_open

    where = {}
    for shard in shards(folder):
        try:
            handle = stack.enter_context(safe_open(shard, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard} is damaged ({error}): fetch it again") from error
        where |= dict.fromkeys(handle.keys(), handle)
    return where
