"""A model's layers in their order, one by one or compiled once for all."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax.models.remat import rematted


def run_stack(
    block: Any,
    args: Sequence[Any],
    x: Any,
    shared: Sequence[Any],
    each: Any,
    *,
    name: str,
    depth: int,
    scan: bool,
    remat: str,
) -> tuple[Any, Any]:
    """Run ``depth`` blocks; to be called in a module's compact method, whose children they become.

    Args:
        block: the class of a layer, ``block(*args)(x, *shared, own) -> (x, out)``.
        args: what each is made with.
        x: what goes from layer to layer.
        shared: what all see.
        each: what differs: a tree with a leading layer axis in every leaf.
        name: parameters are under ``name_0``, ``name_1``, ...; scanned, under ``name``, stacked.
        depth: how many layers.
        scan: one compiled layer run by ``nn.scan``.
        remat: what is recomputed in the backward pass, see `remat.rematted`.

    Returns:
        The last ``x``, and every layer's ``out`` stacked.
    """
    block = rematted(block, remat, scan=scan)
    if scan:
        scanned = nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth,
            in_axes=(*(nn.broadcast for _ in shared), 0),
        )  # fmt: skip
        return scanned(*args, name=name)(x, *shared, each)
    outs = []
    for i in range(depth):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], each)
        x, out = block(*args, name=f"{name}_{i}")(x, *shared, own)
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
