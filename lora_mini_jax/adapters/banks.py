"""Many adapters on one base, side by side: switched by name or number, or mixed within a batch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_mini_jax.adapters.adapter import Adapter, check_adapter, kernels_text
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.errors import UserError
from lora_mini_jax.method import Factors

Leaves = dict[str, Factors]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("trainable", "frozen", "common", "keys"),
    meta_fields=("sites", "names"),
)
@dataclass(frozen=True)
class Bank:
    """Adapters of the same kernels and methods, stacked. Make one with `bank`.

    Frozen leaves that are the same in all adapters are kept once: LoRA-Mini adapters trained from
    one seed share their outer factors, and a thousand of them are a thousand pairs of small
    matrices.

    Attributes:
        trainable: ``{path: {name: (adapters, ...)}}``.
        frozen: the same for the frozen leaves that differ.
        common: the frozen leaves that do not, without the first axis.
        keys: the data of the adapters' random keys ``(adapters, 2)``, uint32.
        sites: the adapted kernels and their methods.
        names: what the adapters are called, in their order.
    """

    trainable: Leaves
    frozen: Leaves
    common: Leaves
    keys: jax.Array
    sites: tuple[Site, ...]
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Bank({len(self)} adapters: {', '.join(self.names)}; {kernels_text(self.sites)})"

    def __getitem__(self, which: str | int | jax.Array) -> Adapter:
        """One adapter, by its name or number. A number may be traced: a compiled function that
        takes it as an argument serves every adapter.

        Raises:
            UserError: a name that is not in the bank, or a number that is known and not in it.
        """
        if isinstance(which, str):
            if which not in self.names:
                raise UserError(f"no adapter {which!r}: choose from {', '.join(self.names)}")
            which = self.names.index(which)
        self._check(which)
        return self._adapter(*self._own(which))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        """The names, as of a mapping."""
        return iter(self.names)

    def _check(self, numbers: Any) -> None:
        """JAX would take another adapter for a number that is out of range."""
        if isinstance(numbers, Tracer):
            return
        if wrong := [int(i) for i in np.ravel(numbers) if not 0 <= i < len(self)]:
            raise UserError(f"no adapter {wrong[0]}: this bank has 0 to {len(self) - 1}")

    def _own(self, which: int | jax.Array) -> tuple[Leaves, Leaves, jax.Array]:
        """The leaves and keys that adapters do not share, of one adapter or of several."""
        stacked = (self.trainable, self.frozen, self.keys)
        return jax.tree.map(lambda leaf: leaf[which], stacked)

    def _adapter(self, trainable: Leaves, frozen: Leaves, key: jax.Array) -> Adapter:
        both = {path: {**leaves, **frozen[path]} for path, leaves in self.common.items()}
        return Adapter(trainable, both, key, self.sites)


def bank(adapters: Mapping[str, Adapter]) -> Bank:
    """Adapters by name as a `Bank`.

    Raises:
        UserError: none given, or adapters that differ in their kernels or methods; `combine` makes
            LoRA adapters of one rank of such ones.

    Example:
        >>> from lora_mini_jax import LoRAMini, Target, init
        >>> params, targets = {"up": {"kernel": jnp.ones((8, 8))}}, [Target("up/kernel", (8, 8))]
        >>> method = LoRAMini(rank=1, a=2, b=2)
        >>> many = bank({name: init(params, method, targets) for name in ("french", "german")})
        >>> many["german"].trainable["up/kernel"]["A"].shape
        (2, 1)
    """
    if not isinstance(adapters, Mapping) or not adapters:
        raise UserError("a bank needs at least one adapter, and a name for each: bank({'french': "
                        "adapter})")  # fmt: skip
    for adapter in adapters.values():
        check_adapter(adapter)
    first, *others = adapters.values()
    for name, other in adapters.items():
        if other.sites != first.sites:
            raise UserError(
                f"adapter {name!r} has other kernels or methods than {next(iter(adapters))!r}: a "
                "bank holds adapters of one kind"
            )
    frozen: Leaves = {}
    common: Leaves = {}
    for path, leaves in first.frozen.items():
        frozen[path], common[path] = {}, {}
        for name, leaf in leaves.items():
            theirs = [other.frozen[path][name] for other in others]
            if all(jnp.array_equal(leaf, each) for each in theirs):
                common[path][name] = leaf
            else:
                frozen[path][name] = jnp.stack([leaf, *theirs])
    each = (adapter.trainable for adapter in adapters.values())
    trainable = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    keys = jnp.stack([adapter.key for adapter in adapters.values()])
    return Bank(trainable, frozen, common, keys, first.sites, tuple(adapters))


def _has_rows(tree: Any, count: int) -> bool:
    """Whether all arrays of a tree, one at least, have so many rows."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(jnp.shape(leaf)[:1] == (count,) for leaf in leaves)


def mixed(apply: Callable[..., Any]) -> Callable[..., Any]:
    """An adapted call in which every row of the batch has an adapter of its own.

    The frozen kernels are multiplied once with the whole batch; each row's factors are gathered.
    A method with a dense part (SwitchLoRA) or that reads the kernel (DoRA) works too, at the cost
    of a kernel a row.

    Args:
        apply: from `linen.adapt` or `nnx.adapt`.

    Returns:
        ``call(params, bank, ids, *inputs, **kwargs)``: ``ids`` ``(batch,)`` int32 says which
        adapter of the `Bank` each row gets; every input has the batch as its first axis, and so
        have those arrays in ``kwargs`` whose first axis is as long; the other ``kwargs`` are the
        same for all rows.

    Raises:
        UserError: from the call, ids that are known and not in the bank, and inputs of another
            number of rows than there are ids.

    Example:
        >>> import flax.linen as nn
        >>> from lora_mini_jax import LoRA, init, linen
        >>> model, x = nn.Dense(4), jnp.ones((3, 8))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> targets = linen.targets(model, params, x)
        >>> many = bank({str(i): init(params, LoRA(rank=2), targets, i) for i in range(2)})
        >>> mixed(linen.adapt(model))(params, many, jnp.array([0, 1, 0]), x).shape
        (3, 4)
    """

    def call(params: Any, bank: Bank, ids: jax.Array, *inputs: Any, **kwargs: Any) -> Any:
        ids = jnp.asarray(ids)
        if ids.ndim != 1:
            raise UserError(f"ids have the shape {ids.shape}: give one for each row of the batch")
        bank._check(ids)
        rows = [jnp.shape(x)[:1] for x in jax.tree.leaves(inputs)]
        if wrong := [of for of in rows if of != ids.shape]:
            raise UserError(f"{len(ids)} ids, and an input of {wrong[0][0] if wrong[0] else 'no'} "
                            "rows: give every row of the batch the id of its adapter")  # fmt: skip
        own = {name: x for name, x in kwargs.items() if _has_rows(x, len(ids))}
        rest = {name: x for name, x in kwargs.items() if name not in own}

        def row(leaves: Any, inputs: Any, own: Any) -> Any:
            inputs, own = jax.tree.map(lambda x: x[None], (inputs, own))
            y = apply(params, bank._adapter(*leaves), *inputs, **own, **rest)
            if any(jnp.shape(leaf)[:1] != (1,) for leaf in jax.tree.leaves(y)):
                raise UserError(f"one row gave several: of {', '.join(rest) or 'what is given'} by "
                                f"keyword there are not {len(ids)} rows, as there are "
                                "ids")  # fmt: skip
            return jax.tree.map(lambda leaf: leaf[0], y)

        return jax.vmap(row)(bank._own(ids), inputs, own)

    return call
