"""An NNX model taken apart: its parameters by path, and all other state."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lora_mini_jax.call.watched import name_of
from lora_mini_jax.errors import UserError
from lora_mini_jax.tree import flatten


def split(model: Any) -> Any:
    """The model's graph, its parameters, and all other state."""
    if not isinstance(model, nnx.Module):
        raise UserError(f"a {type(model).__name__} is no NNX module: give one; for a Linen module "
                        "take lora_mini_jax.linen")  # fmt: skip
    return nnx.split(model, nnx.Param, ...)


def named(state: nnx.State) -> list[tuple[str, Any]]:
    """Paths and variables, in the order of the paths."""
    return [(name_of(path), variable) for path, variable in nnx.to_flat_state(state)]


def copied(state: nnx.State) -> nnx.State:
    """The same in variables of their own: a call may write into them, and these belong to it."""
    return jax.tree.map(lambda leaf: leaf, state)


def filled(state: nnx.State, params: Mapping[str, Any]) -> nnx.State:
    """The state with these parameters in it; errors where they are not the model's own."""
    flat = flatten(params)
    shapes = {name: tuple(variable.shape) for name, variable in named(state)}
    wrong = [f"{name} is missing" for name in shapes if name not in flat]
    wrong += [f"{name} is none of the model's" for name in flat if name not in shapes]
    wrong += [f"{name} is {flat[name].shape}, not {shape}" for name, shape in shapes.items()
              if name in flat and flat[name].shape != shape]  # fmt: skip
    if wrong:
        raise UserError(f"these parameters do not fit the model: {'; '.join(wrong)}. Give what "
                        "`parameters` makes, or what `merge` makes of it")  # fmt: skip
    filled = [(path, variable.replace(flat[name_of(path)]))
              for path, variable in nnx.to_flat_state(state)]  # fmt: skip
    return nnx.from_flat_state(filled)
