"""A head that a file does not have: which one is asked for, what it lacks, and drawing that."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import first
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.tasks import with_head
from lora_mini_jax.models.tensors import Tensor
from lora_mini_jax.tree import flatten

OF_LABELS = "classifier"
"""The module whose weights mean a task's labels, and nothing in another task's model."""


def asked(
    family: Family,
    hf: dict[str, Any],
    task: str | None,
    num_labels: int | None,
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """The ``config.json`` of the model that is asked for: that of the file, or with another head.

    Raises:
        UserError: labels without a task, a task of a family with one head, or as `with_head`.
    """
    if task is None:
        if num_labels is not None or labels is not None:
            raise UserError("num_labels and labels describe a new head: give task too")
        return hf
    if family.kind != "encoder":
        name = ", ".join(family.architectures)
        raise UserError(f"{name} has but one head: leave task={task!r} out")
    return with_head(hf, family.config.hf_name, task, num_labels, labels)


def lacking(
    family: Family,
    slots: Mapping[str, dict[str, tuple[int, ...]]],
    where: Mapping[str, Tensor],
    same_task: bool,
) -> list[str]:
    """The head's parameters that a file does not have, or in another shape.

    Args:
        slots: the tensors of every parameter, by its path and their name, with their shapes.
        where: the tensors of the file.
        same_task: whether the file is of the task that is asked for; if not, its classifier is
            not taken, though it may fit.
    """

    def has(path: str) -> bool:
        if first(path) == OF_LABELS and not same_task:
            return False
        return all(n in where and where[n].shape == shape for n, shape in slots[path].items())

    return [path for path in slots if first(path) not in family.trunk and not has(path)]


def draw(
    model: Any, family: Family, paths: Sequence[str], seed: int
) -> tuple[Any, dict[str, jax.Array]]:
    """The model that knows which parameters were drawn, and those, as its ``init`` draws them in
    float32: in other numbers it is the same head, rounded."""
    if not paths:
        return model, {}

    def some(key: jax.Array) -> list[jax.Array]:
        inputs = [jnp.zeros(x.shape, x.dtype) for x in family.inputs()]
        flat = flatten(model.clone(param_dtype=jnp.float32).init(key, *inputs)["params"])
        return [flat[path].astype(model.param_dtype) for path in paths]

    # Compiled, so that the trunk, which nobody asks for here, is not drawn as well.
    values = jax.jit(some)(jax.random.key(seed))
    return model.clone(drawn=tuple(paths)), dict(zip(paths, values, strict=True))
