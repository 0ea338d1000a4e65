"""How each Flax layer uses its kernel: one rule a layer, from a call to a matrix product."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class View:
    """How one call of a layer uses its kernel, as a matrix product.

    Attributes:
        inputs: the input with its contracted axes flattened into the last, ``(*batch, ..., in)``;
            for ``use="rows"`` the integer ids.
        outputs: puts ``(*batch, ..., out)`` into the shape of the layer's own output.
        batch, ins, outs: the kernel's axes, as in `Target`.
        leaf: the parameter's name.
        use: ``"product"`` for ``x @ W``, ``"transposed"`` for ``x @ W.T``, ``"rows"`` for ``W[x]``.
        kind: what `Target.kind` becomes.
        plain: whether the output is known to be ``inputs @ kernel + bias``; no rule need say so.
        bias: what the layer adds, in the shape of its output's last axes; None where nothing.
    """

    inputs: jax.Array
    outputs: Callable[[jax.Array], jax.Array] = lambda y: y
    batch: tuple[int, ...] = ()
    ins: tuple[int, ...] = (0,)
    outs: tuple[int, ...] = (1,)
    leaf: str = "kernel"
    use: str = "product"
    kind: str = "linear"
    plain: bool = False
    bias: jax.Array | None = None


Rule = Callable[[nn.Module, str, tuple], View | None]
"""``rule(module, method_name, args)``: the view of this call, or None to leave it alone."""


def dense(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Dense``: kernel ``(in, out)``.

    Example:
        >>> dense(nn.Dense(4), "__call__", (jnp.ones((2, 8)),)).ins
        (0,)
    """
    return View(args[0]) if method == "__call__" else None


def transposed_dense(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of a layer that stores ``(out, in)``, as GPT-2's Conv1D in transformers does.

    Example:
        >>> transposed_dense(nn.Dense(4), "__call__", (jnp.ones((2, 8)),)).ins
        (1,)
    """
    return View(args[0], ins=(1,), outs=(0,)) if method == "__call__" else None


def dense_general(module: Any, method: str, args: tuple) -> View | None:
    """The rule of ``nn.DenseGeneral``: kernel ``(*batch, *in, *features)``.

    Example:
        >>> dense_general(nn.DenseGeneral((4, 2)), "__call__", (jnp.ones((3, 8)),)).outs
        (1, 2)
    """
    if method != "__call__":
        return None
    x = args[0]
    features, axis, batch = map(_tuple, (module.features, module.axis, module.batch_dims))
    n, m = len(batch), len(axis)
    axis = sorted(a % x.ndim for a in axis)  # as Flax does, whatever order they are given in
    x = jnp.moveaxis(x, axis, range(x.ndim - m, x.ndim))
    x = x.reshape(*x.shape[: x.ndim - m], math.prod(x.shape[x.ndim - m :]))
    return View(
        x,
        lambda y: y.reshape(*y.shape[:-1], *features),
        batch=tuple(range(n)),
        ins=tuple(range(n, n + m)),
        outs=tuple(range(n + m, n + m + len(features))),
    )


def einsum(module: Any, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Einsum``: which axes contract is read off the string.

    ``"btd,dnh->btnh"``: d contracts, n and h are the output. ``"btnh,nhk->btnk"``: n is in all
    three, so each n has a matrix of its own (a batch axis).

    Example:
        >>> einsum(nn.Einsum((8, 4), "bd,dk->bk"), "__call__", (jnp.ones((3, 8)), None)).outs
        (1,)
    """
    if method != "__call__":
        return None
    x, spec = args[0], (args[1] if len(args) > 1 and args[1] else module.einsum_str)
    left, right = spec.replace(" ", "").split("->")
    xs, ks = left.split(",")
    batch = "".join(c for c in ks if c in xs and c in right)
    ins = "".join(c for c in ks if c in xs and c not in right)
    outs = "".join(c for c in ks if c not in xs and c in right)
    free = "".join(c for c in xs.replace("...", "") if c not in ks)
    if len(batch + ins + outs) != len(ks) or any(c not in right for c in free):
        return None  # a sum over one operand alone: not a matrix product
    free = ("..." if "..." in xs else "") + free
    shape = module.shape
    moved = jnp.einsum(f"{xs}->{batch}{free}{ins}", x)
    lead = moved.ndim - len(ins)
    return View(
        moved.reshape(*moved.shape[:lead], math.prod(moved.shape[lead:])),
        lambda y: jnp.einsum(
            f"{batch}{free}{outs}->{right}",
            y.reshape(*y.shape[:-1], *(shape[ks.index(c)] for c in outs)),
        ),
        batch=tuple(map(ks.index, batch)),
        ins=tuple(map(ks.index, ins)),
        outs=tuple(map(ks.index, outs)),
    )


def embed(module: nn.Module, method: str, args: tuple) -> View | None:
    """The rule of ``nn.Embed``: rows when looking up, the transpose in ``attend``.

    Example:
        >>> embed(nn.Embed(7, 4), "attend", (jnp.ones((3, 4)),)).use
        'transposed'
    """
    use = {"__call__": "rows", "attend": "transposed"}.get(method)
    return View(args[0], leaf="embedding", use=use, kind="embed") if use else None


Rules = Mapping[Any, Rule]
"""Rules by layer: a class, or its full name as a string."""

RULES: Rules = {
    nn.Dense: dense,
    nn.DenseGeneral: dense_general,
    nn.Einsum: einsum,
    nn.Embed: embed,
    # By name, so that transformers need not be imported.
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": transposed_dense,
}


def _tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
