"""Optimisers for the trained leaves, each an optax transformation that chains with any other.

The usual way here is to hand the optimiser `Adapter.trainable` and nothing else. For people who
keep one tree (`join`), `trainable_mask` and `freeze` give the masked optimiser that is right:
``optax.masked`` alone would pass raw gradients on to the frozen leaves. `scale_by_element_adam`
counts updates entry by entry, for methods that start parts of a factor afresh; `scale_leaves` is
LoRA+'s learning rate per factor.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_mini_jax.adapters.transform import SUFFIX
from lora_mini_jax.errors import UserError


def trainable_mask(tree: Any) -> Any:
    """A tree of booleans for a joined tree: True on the trained leaves.

    Raises:
        UserError: a tree with no adapter in it.

    Example:
        >>> trainable_mask({"kernel": 0, "kernel_adapter": {"trainable": {"A": 0}}})
        {'kernel': False, 'kernel_adapter': {'trainable': {'A': True}}}
    """

    def trained(path: tuple, leaf: Any) -> bool:
        *_, owner, group, _ = "", "", *(str(getattr(entry, "key", entry)) for entry in path)
        return owner.endswith(SUFFIX) and group == "trainable"

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


class ElementAdamState(NamedTuple):
    """First and second moments, and how many updates each entry has had (int32), all like the
    parameters."""

    count: Any
    mu: Any
    nu: Any


def scale_by_element_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    count_held: bool = False,
    kernels: Container[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with a step counter for every entry, in place of one for all.

    Equal to ``optax.scale_by_adam`` as long as nothing is reset. Where entries start afresh (see
    `forget`), the bias correction is theirs: with one counter for all, an entry reset after 200
    updates would make a first update 1.35 times too large, and in the limit 3.2 times.

    Args:
        b1, b2, eps: as for Adam.
        count_held: count on for entries that are held (SwitchLoRA's authors' code does), so that
            their first update is smaller; by default a held entry's counter waits.
        kernels: the kernels (first names in the tree) whose entries are counted one by one; a leaf
            of any other has one counter, so that it costs no memory. By default all.

    The update takes an extra argument ``hold``, a tree of masks or None; entries where it is True
    keep their moments, and their counter.

    Example:
        >>> tx = optax.chain(scale_by_element_adam(), optax.scale_by_learning_rate(1e-3))
    """

    def init(params: Any) -> ElementAdamState:
        def zero(path: tuple, leaf: Any) -> jax.Array:
            each = kernels is None or path[0].key in kernels
            return jnp.zeros(leaf.shape if each else (), jnp.int32)

        count = jax.tree_util.tree_map_with_path(zero, params)
        return ElementAdamState(count, optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(
        updates: Any, state: Any, params: Any = None, *, hold: Any = None, **extra_args: Any
    ) -> tuple[Any, ElementAdamState]:
        def kept(new: Any, old: Any, hold: Any) -> Any:
            return jnp.where(hold, old, new) if _by_entry(old, hold) else new

        def unless_held(new: Any, old: Any) -> Any:
            if hold is None:
                return new
            return jax.tree.map(kept, new, old, hold, is_leaf=_left_out)

        def moved(average: Any, power: int, decay: float) -> Any:
            new = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g**power, average, updates)
            return unless_held(new, average)

        def direction(count: Any, mu: Any, nu: Any) -> Any:
            # An entry that was held from the start has moments and count 0: its direction is 0.
            count = jnp.maximum(count, 1)
            return mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps)

        count = jax.tree.map(lambda c: c + 1, state.count)
        count = count if count_held else unless_held(count, state.count)
        state = ElementAdamState(count, moved(state.mu, 1, b1), moved(state.nu, 2, b2))
        return jax.tree.map(direction, *state), state

    return optax.GradientTransformationExtraArgs(init, update)


def forget(opt_state: Any, masks: Mapping[str, Any]) -> Any:
    """The optimiser's state with everything it keeps per entry set to zero where a mask is True.

    What is kept per entry is found by the kernels' paths: ``optax.tree.map_params`` would run the
    user's own functions of the parameters, labels and masks, on a placeholder without any.

    Args:
        opt_state: the state of any optax transformation or chain.
        masks: booleans by kernel, like `Adapter.trainable`.
    """

    def afresh(leaf: Any, mask: jax.Array) -> Any:
        return jnp.where(mask, 0, leaf) if _by_entry(leaf, mask) else leaf

    def of_kernels(node: Any) -> bool:
        return isinstance(node, Mapping) and node.keys() == masks.keys()

    def each(node: Any) -> Any:
        if not of_kernels(node):
            return node
        return jax.tree.map(afresh, node, masks, is_leaf=lambda leaf: not isinstance(leaf, Mapping))

    return jax.tree.map(each, opt_state, is_leaf=of_kernels)


def _left_out(leaf: Any) -> bool:
    """Whether ``optax.masked``, or ``optax.partition``, gives this leaf to another optimiser."""
    return isinstance(leaf, optax.MaskedNode)


def _by_entry(leaf: Any, mask: jax.Array) -> bool:
    """Whether a state's leaf has a number for every entry; a kernel that never starts afresh has
    one counter for all."""
    return not _left_out(leaf) and getattr(leaf, "shape", None) == mask.shape


def scale_leaves(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiply the updates of leaves by name; put it after the optimiser.

    ``scale_leaves({"B": 16.0})`` is LoRA+ (arXiv 2402.12354): a learning rate for ``B`` that is 16
    times that of ``A``.

    Raises:
        UserError: from the first update, a name that no leaf has.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        flat, structure = jax.tree_util.tree_flatten_with_path(updates)
        names = [str(getattr(path[-1], "key", path[-1])) for path, _ in flat]
        if missing := sorted(set(factors) - set(names)):
            raise UserError(f"no trained leaf is called {', '.join(missing)}: there are "
                            f"{', '.join(sorted(set(names)))}")  # fmt: skip
        scaled = [
            leaf * factors.get(name, 1.0) for name, (_, leaf) in zip(names, flat, strict=True)
        ]
        return structure.unflatten(scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
