"""The names of tensors in ``adapter_model.safetensors``, written and read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_safetensors
from lora_mini_jax.peft.kinds import KINDS

FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_LEAVES = [leaf for kind in KINDS.values() for own in kind.leaves.values() for leaf in own.values()]
_NAMES = {name: leaf.name for leaf in _LEAVES for name in (leaf.name, leaf.embed) if name}
"""A leaf's name by what it is called in keys, of kernels and of tables."""
_TOGETHER = [name for kind in KINDS.values() for name in kind.shared]
# After the leaf comes the adapter's own name, or ``weight``, or both, or neither.
_TAIL = r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
_ADAPTER = re.compile(rf"(?:{re.escape(PREFIX)})?(.+)\.({'|'.join(_NAMES)}){_TAIL}")
_SHARED = re.compile(rf"(?:base_model\.)?({'|'.join(_TOGETHER)})(?:\.[^.]+)?")
# With ``bias="all"`` PEFT writes those of modules saved whole three times, these two of no use.
_UNUSED = re.compile(r".+\.(?:original_module(?:\.[^.]+)*|modules_to_save\.bias)")
_WRAPPED = re.compile(r"\.(?:modules_to_save\.[^.]+|base_layer)(?=\.[^.]+$)")


@dataclass
class Tensors:
    """A file's tensors, sorted.

    Attributes:
        adapted: by module and leaf; those of tables too are called ``lora_A`` and ``lora_B``.
        whole: parameters of the model itself, by their names there.
        shared: those of all modules together, `Kind.shared`.
        wrong: what is wrong with the keys.
    """

    adapted: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    whole: dict[str, np.ndarray] = field(default_factory=dict)
    shared: dict[str, np.ndarray] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def sort(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The tensors by module, with or without prefixes and an adapter's name in their keys."""
    found = Tensors()
    for name, tensor in tensors.items():
        if _UNUSED.fullmatch(name):
            continue
        if match := _SHARED.fullmatch(name):
            group, leaf = found.shared, match[1]
        elif match := _ADAPTER.fullmatch(name):
            group = found.adapted.setdefault(match[1], {})
            leaf = _NAMES[match[2]]
        else:
            group, leaf = found.whole, _WRAPPED.sub("", name.removeprefix(PREFIX))
        if leaf in group:
            found.wrong.append(f"{name} is there twice, or of a second adapter")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            found.wrong.append(f"{name} is {tensor.dtype}, not a float")
        group[leaf] = np.asarray(tensor)
    return found


def read(folder: Path) -> dict[str, np.ndarray]:
    """The tensors in a folder.

    Raises:
        UserError: no such file, a damaged one, or only a pickle, which could run anything.
    """
    if not (folder / FILE).is_file() and (folder / PICKLE).is_file():
        raise UserError(f"{folder} has only {PICKLE}, which is a pickle and never read: load "
                        "it with PEFT and save it again, as safetensors")  # fmt: skip
    return read_safetensors(folder / FILE, "fetch it again")


def is_copy(theirs: np.ndarray, ours: np.ndarray, kind: Any) -> bool:
    """Whether a file has the base's own numbers, whichever of the two was rounded.

    PEFT writes them in the dtype that it trained in, and here they are in the one asked for.

    Args:
        theirs: the file's tensor, as it is.
        ours: float32.
        kind: the dtype that ``ours`` have in the base.
    """
    rounded = ours.astype(theirs.dtype)
    return np.array_equal(theirs, rounded) or np.array_equal(theirs.astype(kind), ours)
