"""Optimisers that touch only the trained leaves.

The usual way here is to hand the optimiser `Adapter.trainable` and nothing else. For people who
keep one tree (`adapter.join`), `trainable_mask` and `freeze` give the masked optimiser that is
right: ``optax.masked`` alone would pass raw gradients on to the frozen leaves.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import optax

from lora_mini_jax.errors import UserError
from lora_mini_jax.transform import SUFFIX


def trainable_mask(tree: Any) -> Any:
    """A tree of booleans for a joined tree: True on the trained leaves.

    Raises:
        UserError: a tree with no adapter in it.

    Example:
        >>> trainable_mask({"kernel": 0, "kernel_adapter": {"trainable": {"A": 0}}})
        {'kernel': False, 'kernel_adapter': {'trainable': {'A': True}}}
    """

    def trained(path: tuple, leaf: Any) -> bool:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        return any(a.endswith(SUFFIX) and b == "trainable" for a, b in pairwise(names))

    mask = jax.tree_util.tree_map_with_path(trained, tree)
    if not any(jax.tree.leaves(mask)):
        raise UserError("this tree holds no adapter: pass lora_mini_jax.join(params, adapter)")
    return mask


def freeze(
    tx: optax.GradientTransformation, mask: Any = trainable_mask
) -> optax.GradientTransformation:
    """``tx`` on the leaves where ``mask`` is True; no update and no state for the rest.

    Clipping belongs inside ``tx``: outside, it would see the norm of every dense gradient, and make
    XLA compute them.

    Args:
        tx: any optax transformation, with its clipping and schedule.
        mask: a tree of booleans, or a function that gives one from the parameters.

    Example:
        >>> tx = freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    """

    def labels(params: Any) -> Any:
        flags = mask(params) if isinstance(mask, Callable) else mask
        return jax.tree.map(lambda flag: "train" if flag else "freeze", flags)

    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)
