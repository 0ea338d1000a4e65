"""Paths into a parameter tree, and the kernels in it seen as matrices.

A path is a string of names joined by ``/``: ``"layers_0/attn/q_proj/kernel"``. A `Target` says how
the array at a path is a matrix; `linen.targets` makes targets by tracing the model, so nothing is
guessed from shapes. `selection.select` picks among them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_mini_jax.errors import UserError
from lora_mini_jax.layers import brief

SLASH = "%2F"


@dataclass(frozen=True)
class Target:
    """One kernel and how it is a matrix ``(in, out)``, or a batch of such matrices.

    Attributes:
        path: where it is, ``"mlp/up/kernel"``.
        shape: its shape as stored, the stacked axes included.
        stack: how many leading axes ``nn.scan`` or ``nn.vmap`` put there (a matrix per entry).
        batch: the axes, counted after the stacked ones, that run over independent matrices.
        ins: the axes that contract with the input, counted in the same way.
        outs: the axes of the output, counted in the same way.
        kind: ``"linear"``; ``"embed"`` for a table whose rows are looked up; ``"array"`` for a
            parameter that is no kernel (a bias, a scale): one row, all its axes are outputs.
        read: whether the model uses it past the layer that is adapted too: what is added to the
            layer's output is then not in all that the model does with it.

    Example:
        >>> heads = Target("attn/query/kernel", (64, 4, 16), ins=(0,), outs=(1, 2))
        >>> heads.n_in, heads.n_out
        (64, 64)
    """

    path: str
    shape: tuple[int, ...]
    stack: int = 0
    batch: tuple[int, ...] = ()
    ins: tuple[int, ...] = (0,)
    outs: tuple[int, ...] = (1,)
    kind: str = "linear"
    read: bool = field(default=False, compare=False)

    @property
    def module(self) -> str:
        """The path of the module that holds the kernel: ``"mlp/up"`` (empty at the root)."""
        return self.path.rpartition("/")[0]

    @property
    def anywhere(self) -> "Target":
        """The same without its path, for what is compiled: alike kernels have one program."""
        return replace(self, path="")

    @property
    def lead(self) -> tuple[int, ...]:
        """The stacked and batched sizes: the shape of the batch of matrices, often ``()``."""
        return self.shape[: self.stack] + self._sizes(self.batch)

    @property
    def n_in(self) -> int:
        """Rows of one matrix: the size of the contracted axes."""
        return math.prod(self._sizes(self.ins))

    @property
    def n_out(self) -> int:
        """Columns of one matrix: the size of the output axes."""
        return math.prod(self._sizes(self.outs))

    def matrix(self, kernel: Any) -> jax.Array:
        """The stored kernel, dequantised if it is `quantized`, as ``(*lead, in, out)``."""
        return dense(kernel).transpose(self._order()).reshape(*self.lead, self.n_in, self.n_out)

    def unmatrix(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`: ``(*lead, in, out)`` back to the stored shape."""
        order = self._order()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([self.shape[axis] for axis in order]).transpose(inverse)

    def _sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[self.stack + axis] for axis in axes)

    def _order(self) -> tuple[int, ...]:
        inner = (*self.batch, *self.ins, *self.outs)
        return (*range(self.stack), *(self.stack + axis for axis in inner))


def parameters(params: Mapping[str, Any], kernels: Iterable[Target]) -> tuple[Target, ...]:
    """Every parameter as a target: the kernels as they are, all others as arrays.

    For methods that can train any array, `Full` above all; the order is that of ``params``.

    Raises:
        UserError: parameters that are no arrays, or boxed with their partitioning.

    Example:
        >>> up = Target("up/kernel", (8, 32))
        >>> params = {"up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}}
        >>> [(t.path, t.kind) for t in parameters(params, [up])]
        [('up/kernel', 'linear'), ('up/bias', 'array')]
    """
    known, flat = {target.path: target for target in kernels}, flatten(params)
    check_leaves(flat)
    return tuple(known.get(path) or _array(path, tuple(leaf.shape)) for path, leaf in flat.items())


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping as ``{path: leaf}``, in the tree's own order; a slash within a name, as
    `nn.WeightNorm` has, is written ``%2F``.

    >>> flatten({"up": {"kernel": 1, "bias": 2}})
    {'up/kernel': 1, 'up/bias': 2}
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"parameters are nested dicts of arrays, and this is a "
                        f"{type(tree).__name__}: give model.init(...)['params'] of a Linen model, "
                        "lora_mini_jax.nnx.parameters(model) of an NNX model")  # fmt: skip
    flat = {}
    for key, value in tree.items():
        name = str(key).replace("/", SLASH)
        if isinstance(value, Mapping):
            flat.update({f"{name}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def by_name(leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The leaves of an adapter, which are kept by the paths of kernels, by names of their own.

    >>> by_name({"up/kernel": {"A": 1, "B": 2}})
    {'up/kernel/A': 1, 'up/kernel/B': 2}
    """
    return {f"{path}/{name}": leaf for path, own in leaves.items() for name, leaf in own.items()}


def unflatten(flat: Mapping[str, Any], like: Any = None) -> Any:
    """The inverse of `flatten`: nested dicts, frozen where ``like``, the tree they are to be like,
    is Flax's ``FrozenDict``.

    >>> unflatten({"up/kernel": 1, "up/bias": 2})
    {'up': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = (part.replace(SLASH, "/") for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return type(like)(tree) if hasattr(like, "unfreeze") else tree


def kernels_of(params: Mapping[str, Any], targets: Iterable[Target]) -> dict[str, Any]:
    """Each target's kernel as it is stored, by path; errors as `check_fit`. `Target.matrix` makes a
    matrix of one, and who takes one after the other never has more than one quantised kernel dense.
    """
    targets = tuple(targets)
    check_fit(params, targets)
    flat = flatten(params)
    if any(isinstance(flat[target.path], jax.ShapeDtypeStruct) for target in targets):
        raise UserError(
            "these parameters are shapes without arrays: give arrays, or ask for shapes of the "
            "result, jax.eval_shape(lambda params: init(params, ...), params)"
        )
    return {target.path: flat[target.path] for target in targets}


def check_real(kernels: Mapping[str, Any]) -> None:
    """Raise one `UserError` listing every kernel that is not of real floating numbers."""
    wrong = [f"{path} is {kernel.dtype}" for path, kernel in kernels.items()
             if not jnp.issubdtype(kernel.dtype, jnp.floating)]  # fmt: skip
    if wrong:
        raise UserError(f"only real floating numbers are trained: {', '.join(wrong)}. Leave these "
                        "kernels out")  # fmt: skip


def check_fit(params: Mapping[str, Any], targets: Iterable[Target]) -> None:
    """Raise one `UserError` listing every target that is not in ``params``, or in another shape."""
    flat = flatten(params)
    check_leaves(flat)
    wrong = []
    for target in targets:
        if target.path not in flat:
            wrong.append(f"{target.path} is missing")
        elif tuple(flat[target.path].shape) != target.shape:
            wrong.append(f"{target.path} is {tuple(flat[target.path].shape)}, not {target.shape}")
    if wrong:
        raise UserError(
            f"the adapter does not fit these parameters: {brief(wrong, '; ')}. "
            "Use the model it was made for, or make a new adapter"
        )


def check_leaves(flat: Mapping[str, Any]) -> None:
    """Raise `UserError` for a parameter that is no array: boxed with its partitioning, or a list of
    several."""
    others = [path for path, leaf in flat.items() if isinstance(leaf, list | tuple)]
    if others:
        raise UserError(
            f"{others[0]} is a {type(flat[others[0]]).__name__}, not an array: parameters are "
            "nested dicts of arrays, so give each array a name of its own"
        )
    boxed = [path for path, leaf in flat.items()  # the box of a quantised kernel has a shape
             if hasattr(leaf, "unbox") and not hasattr(leaf, "shape")]  # fmt: skip
    if boxed:
        raise UserError(
            f"{boxed[0]} is a {type(flat[boxed[0]]).__name__}, not an array: unbox the parameters "
            "first, flax.linen.meta.unbox(params)"
        )


def dense(leaf: Any) -> jax.Array:
    """A parameter as a plain array: a `quantized` kernel dequantised, any other as it is."""
    return leaf.unbox() if hasattr(leaf, "unbox") else leaf


def over_lead(function: Any, lead: int) -> Any:
    """``function`` of one matrix, vectorised over ``lead`` leading axes of its arguments."""
    for _ in range(lead):
        function = jax.vmap(function)
    return function


def rounded(array: jax.Array, dtype: Any) -> jax.Array:
    """The array in a narrower dtype. Within one program XLA may leave a cast there and back out;
    here it is rounded all the same."""
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(array, kept.nexp, kept.nmant).astype(dtype)


def float32(array: jax.Array) -> jax.Array:
    """The array in float32, in which every merge and every initialisation is computed."""
    return jnp.asarray(dense(array), jnp.float32)


def _array(path: str, shape: tuple[int, ...]) -> Target:
    return Target(path, shape, ins=(), outs=tuple(range(len(shape))), kind="array")


def traced(
    function: Callable[..., Any], *args: Any, by: Callable[..., Any] = jax.eval_shape
) -> Any:
    """``jax.eval_shape``, or what else traces, ``by(call, arrays)``, in which arrays alone are
    abstract: a flag among ``args`` stays a flag.

    Example:
        >>> traced(lambda x, flag: x.T if flag else x, jnp.ones((2, 3)), True).shape
        (3, 2)
    """
    leaves, structure = jax.tree.flatten(args)

    def call(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        own = [next(rest) if hasattr(leaf, "shape") else leaf for leaf in leaves]
        return function(*structure.unflatten(own))

    return by(call, [leaf for leaf in leaves if hasattr(leaf, "shape")])
