"""What Hugging Face calls a parameter: the tensors it is made of there, and their layout."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import first
from lora_mini_jax.selection import OUTPUT_HEADS
from lora_mini_jax.tree import Target, flatten, parameters

Names = Callable[[str], Sequence[str]]
"""From a parameter's path to the names of its tensors: one, or one a layer where layers are
stacked. ``"layers_3/mlp/up_proj/kernel"`` is ``["model.layers.3.mlp.up_proj.weight"]``."""


@dataclass(frozen=True)
class ModelNames:
    """The names of a model that is read from Hugging Face's files; a `Names`.

    Attributes:
        family: what is known of its kind, a `models.family.Family`.
        depth: how many layers are in the stack of a parameter, by its path.
    """

    family: Any
    depth: Callable[[str], int]

    def __call__(self, path: str) -> list[str]:
        """The tensors of a parameter."""
        return self.family.names(path, self.depth(path))

    @property
    def keeps_layout(self) -> bool:
        """Whether linear kernels are stored (in, out) there, PEFT's ``fan_in_fan_out``."""
        return self.family.keeps_layout


def names_of(model: Any) -> ModelNames:
    """The names of a model that `models.load` gave, as Hugging Face's class for it has them: the
    bare encoder there lacks the prefix that files give its tensors.

    Raises:
        UserError: a model of another kind, whose names only its author knows.

    Example:
        >>> from lora_mini_jax.models.llama import Llama, LlamaConfig
        >>> model = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                           num_hidden_layers=2, num_attention_heads=4))
        >>> names_of(model)("layers_1/self_attn/q_proj/kernel")
        ['model.layers.1.self_attn.q_proj.weight']
    """
    from lora_mini_jax.models.families import family_of_module

    try:
        family = family_of_module(model)
    except UserError as error:
        raise UserError(
            f"{error}; give names, a function from a parameter's path to its names"
        ) from None
    if family.kind == "encoder" and model.config.task is None:
        family = replace(family, prefix="", copies={})
    return ModelNames(family, lambda path: family.depth(model.config, path))


def llama_names(params: Mapping[str, Any]) -> ModelNames:
    """The names for the parameters of a Llama, stacked or not; for where no others are given.

    Raises:
        UserError: parameters that are not a Llama's.
    """
    from lora_mini_jax.models.family import STACK
    from lora_mini_jax.models.llama import FAMILY

    if "embed_tokens" not in params:
        raise UserError(
            f"parameters {', '.join(params)} are not a Llama's: give names, such as "
            "peft.names_of(model), or a function from a parameter's path to its names"
        )
    stacked = flatten(params.get(STACK, {}))
    layers = len(next(iter(stacked.values()))) if stacked else 0
    return ModelNames(FAMILY, lambda path: layers)


@dataclass(frozen=True)
class Place:
    """One parameter and the tensors it is there, in the order in which they are stacked here."""

    target: Target
    tensors: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold the tensors."""
        return tuple(name.rpartition(".")[0] for name in self.tensors)

    @property
    def is_head(self) -> bool:
        """Whether this belongs to the model's output head."""
        return first(self.target.path) in OUTPUT_HEADS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one tensor: ``(in, out)`` for a kernel or a table."""
        if self.target.kind != "array":
            return self.target.n_in, self.target.n_out
        return self.target.shape[1:] if len(self.tensors) > 1 else self.target.shape

    def split(self, value: Any) -> dict[str, np.ndarray]:
        """The parameter's value as tensors of `shape`."""
        each = np.asarray(value if self.target.kind == "array" else self.target.matrix(value))
        return dict(zip(self.tensors, each.reshape(-1, *self.shape), strict=True))

    def join(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `split`, as `Target.matrix` has it: ``(*lead, in, out)``."""
        stacked = np.stack([tensors[name] for name in self.tensors])
        return stacked.reshape(*self.target.lead, self.target.n_in, self.target.n_out)

    def to_torch(self, tensor: np.ndarray, keeps_layout: bool) -> np.ndarray:
        """A tensor of `shape` as torch stores it: linear kernels as ``(out, in)``, unless the
        model keeps ``(in, out)``, which its output head never does."""
        keeps = keeps_layout and not self.is_head
        return tensor.T if self.target.kind == "linear" and not keeps else tensor

    def from_torch(self, tensor: np.ndarray, keeps_layout: bool) -> np.ndarray | None:
        """The inverse of `to_torch`; None for a shape that does not fit.

        A model that keeps ``(in, out)`` may have kernels that are not, so the shape decides where
        it can.
        """
        keeps = keeps_layout and not self.is_head
        if self.target.kind == "linear" and tensor.shape == self.shape[::-1]:
            return tensor if keeps and tensor.shape == self.shape else tensor.T
        return tensor if tensor.shape == self.shape else None


def places(params: Mapping[str, Any], targets: Iterable[Target], names: Names) -> dict[str, Place]:
    """Every parameter's place, by path.

    Raises:
        UserError: names that do not fit: two parameters of one name, or as many names as a
            parameter has no tensors.
    """
    found = {t.path: Place(t, tuple(names(t.path))) for t in parameters(params, targets)}
    wrong, owners = [], {}
    for path, place in found.items():
        lead = place.target.lead
        fits = place.target.kind == "array" or int(np.prod(lead)) == len(place.tensors)
        if not fits or not place.tensors:
            wrong.append(f"{path} is {lead or 'one'} matrices but has names {place.tensors}")
        for name in place.tensors:
            if (other := owners.setdefault(name, path)) != path:
                wrong.append(f"{path} and {other} are both named {name}")
    if wrong:
        raise UserError(f"the names do not fit the parameters: {'; '.join(wrong)}")
    return found
