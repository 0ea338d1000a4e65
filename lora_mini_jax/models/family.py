"""What reading and writing a Hugging Face folder has to know of one kind of model."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PathTuple = tuple[str, ...]
STACK = "layers"
"""The module under which ``nn.scan`` stacks the layers that are ``layers_0``, ... without it."""
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def token_inputs() -> tuple[jax.ShapeDtypeStruct, ...]:
    """The inputs of a call that shows all parameters: one token."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


@dataclass(frozen=True)
class Family:
    """One kind of model: its config, its module, and how Hugging Face's files call its parameters.

    Parameters carry Hugging Face's own module names, with ``layers_3`` for ``layers.3``, so a name
    in a file is ``prefix`` and the path with dots; what departs from that is said here.

    Attributes:
        config: a frozen dataclass with ``from_hf(dict)``, ``to_hf()`` and ``num_hidden_layers``.
        module: the Linen module, ``module(config, dtype, param_dtype, scan_layers, remat)``.
        architectures: the names in ``config.json`` that it serves.
        prefix: what the names in files begin with.
        bare: the top modules whose names have no prefix: heads.
        renamed: names of leaves that are not the usual ones, by the end of their path.
        keeps_layout: whether linear kernels are stored (in, out), as GPT-2's are; torch's
            own way is (out, in).
        copies: tensors that a file may hold though the model ties them, with what they must equal.
        ignored: a regular expression for tensors of no use here: tables made from the config.
        inputs: the abstract inputs of a call that shows every parameter.
    """

    config: Any
    module: Any
    architectures: tuple[str, ...]
    prefix: str = "model."
    bare: tuple[str, ...] = ("lm_head",)
    renamed: Mapping[str, str] = field(default_factory=dict)
    keeps_layout: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"rotary_emb\.inv_freq$"
    inputs: Callable[[], tuple[jax.ShapeDtypeStruct, ...]] = token_inputs

    def names(self, path: PathTuple, layers: int) -> list[str]:
        """The tensors that make one parameter: one, or one a layer where it is stacked.

        Example:
            >>> from lora_mini_jax.models.llama import FAMILY
            >>> FAMILY.names(("layers_3", "self_attn", "q_proj", "kernel"), layers=8)
            ['model.layers.3.self_attn.q_proj.weight']
            >>> FAMILY.names(("layers", "input_layernorm", "scale"), layers=2)
            ['model.layers.0.input_layernorm.weight', 'model.layers.1.input_layernorm.weight']
        """
        ending = "/".join(path[-2:])
        leaf = self.renamed.get(ending, _LEAVES.get(path[-1], path[-1]))
        prefix = "" if path[0] in self.bare else self.prefix
        parts = [re.sub(r"_(\d+)$", r".\1", part) for part in path[:-1]]
        if STACK not in path:
            return [prefix + ".".join((*parts, leaf))]
        at = path.index(STACK)
        return [prefix + ".".join((*parts[: at + 1], str(i), *parts[at + 1 :], leaf))
                for i in range(layers)]  # fmt: skip

    def swapped(self, path: PathTuple, value: np.ndarray) -> np.ndarray:
        """A parameter in the file's layout, or the other way round: its own inverse."""
        return value if self.keeps_layout or path[-1] != "kernel" else value.swapaxes(-1, -2)

    def shapes(self, model: nn.Module) -> dict[str, Any]:
        """Shape and dtype of every parameter, as a tree; nothing is computed."""
        return jax.eval_shape(model.init, jax.random.key(0), *self.inputs())["params"]
