"""What reading and writing a Hugging Face folder has to know of one kind of model."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax.layers import first
from lora_mini_jax.tree import flatten, unflatten

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
        kind: whether it continues text, reads one text and writes another, or reads and has a head
            for what it tells. Only encoders have several heads: other heads in a file are ignored,
            and what a head that is asked for lacks can be drawn.
        prefix: what the names in files begin with.
        bare: the top modules whose names have no prefix: heads.
        keeps_layout: whether linear kernels, those of ``bare`` modules apart, are stored
            (in, out), as GPT-2's are; torch's own way is (out, in).
        copies: tensors that a file may hold though the model ties them, with what they must equal.
        ignored: a regular expression for tensors of no use here: tables made from the config.
        stack: the module under which the layers are, as `STACK`.
        lists: the other modules that are lists in the file: ``layer_0`` is ``layer.0`` there.
        depths: by top module, the field of the config that counts its layers, where that is not
            ``num_hidden_layers``.
        moved: modules that stand elsewhere in the file, by their path.
        may_lack_prefix: whether a file may have its tensors without ``prefix``.
        trunk: an encoder's top modules that are in no head.
        inputs: the abstract inputs of a call that shows every parameter.
    """

    config: Any
    module: Any
    architectures: tuple[str, ...]
    kind: Literal["decoder", "seq2seq", "encoder"] = "decoder"
    prefix: str = "model."
    bare: tuple[str, ...] = ("lm_head",)
    keeps_layout: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"rotary_emb\.inv_freq$"
    stack: str = STACK
    lists: tuple[str, ...] = ()
    depths: Mapping[str, str] = field(default_factory=dict)
    moved: Mapping[str, str] = field(default_factory=dict)
    may_lack_prefix: bool = False
    trunk: tuple[str, ...] = ()
    inputs: Callable[[], tuple[jax.ShapeDtypeStruct, ...]] = token_inputs

    def depth(self, config: Any, path: str) -> int:
        """How many layers are in the stack that a parameter belongs to."""
        return getattr(config, self.depths.get(first(path), "num_hidden_layers"))

    def stacked(self, path: str) -> bool:
        """Whether a parameter is that of all layers, along its first axis."""
        return self.stack in path.split("/")

    def names(self, path: str, layers: int) -> list[str]:
        """The tensors that make one parameter: one, or one a layer where it is stacked.

        Example:
            >>> from lora_mini_jax.models.llama import FAMILY
            >>> FAMILY.names("layers_3/self_attn/q_proj/kernel", layers=8)
            ['model.layers.3.self_attn.q_proj.weight']
            >>> FAMILY.names("layers/input_layernorm/scale", layers=2)
            ['model.layers.0.input_layernorm.weight', 'model.layers.1.input_layernorm.weight']
        """
        module, _, leaf = path.rpartition("/")
        prefix = "" if first(path) in self.bare else self.prefix
        lists = "|".join((self.stack, *self.lists))
        parts = [re.sub(rf"^({lists})_(\d+)$", r"\1.\2", part)
                 for part in self.moved.get(module, module).split("/")]  # fmt: skip
        parts.append(_LEAVES.get(leaf, leaf))
        if self.stack not in parts:
            return [prefix + ".".join(parts)]
        at = 1 + parts.index(self.stack)
        return [prefix + ".".join((*parts[:at], str(i), *parts[at:])) for i in range(layers)]

    def canonical(self, name: str) -> str:
        """What a tensor of a file is called here: older files had other names.

        Example:
            >>> from lora_mini_jax.models.bert import FAMILY
            >>> FAMILY.canonical("embeddings.LayerNorm.gamma")
            'bert.embeddings.LayerNorm.weight'
        """
        if not self.may_lack_prefix:
            return name
        name = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", name)
        name = re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name).removeprefix(self.prefix)
        return name if name.split(".")[0] in self.bare else self.prefix + name

    def top(self, name: str) -> str:
        """The top module of a tensor's name: ``"encoder"`` or ``"classifier"``."""
        return name.removeprefix(self.prefix).split(".")[0]

    def swapped(self, path: str, value: np.ndarray) -> np.ndarray:
        """A parameter in the file's layout, or the other way round: its own inverse."""
        return value.swapaxes(-1, -2) if self.flips(path) else value

    def flips(self, path: str) -> bool:
        """Whether the file has the axes of a parameter the other way round."""
        kept = self.keeps_layout and first(path) not in self.bare
        return path.endswith("/kernel") and not kept

    def shapes(self, model: nn.Module) -> dict[str, Any]:
        """Shape and dtype of every parameter, as a tree; nothing is computed."""
        own = cast(Any, model)
        # Traced with one layer of a kind, be it stacked or not: many take seconds.
        stacked = flatten(_shapes(own.clone(scan_layers=True), self.inputs))
        found = {}
        for path, leaf in stacked.items():
            if own.scan_layers or not self.stacked(path):
                found[path] = leaf
                continue
            one = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            for i in range(leaf.shape[0]):
                found[re.sub(rf"(^|/){self.stack}/", rf"\1{self.stack}_{i}/", path, count=1)] = one
        return jax.tree.map(lambda leaf: leaf, unflatten(found))  # in the order of its names


@lru_cache(maxsize=16)
def _shapes(model: nn.Module, inputs: Callable[[], tuple[Any, ...]]) -> dict[str, Any]:
    # Kept because to trace a small model takes longer than to read it.
    return jax.eval_shape(model.init, jax.random.key(0), *inputs())["params"]
