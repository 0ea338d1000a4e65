"""A frozen base in 8 or 4 bits: kernels that are dequantised where a layer uses them.

The arithmetic is qwix's (``pip install qwix``). A quantised kernel is a box of
Flax's kind, which ``nn.Dense`` and all other layers open when they ask for their parameter, in a
scan one layer at a time: models, adapters and training step need not know. Merging and exporting
give dense kernels.

Without ``remat`` the backward pass keeps the opened kernels of the whole model; with it, those of
one layer.

Imported at the first use of ``lora_mini_jax.quantized``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_mini_jax.errors import UserError
from lora_mini_jax.selection import select
from lora_mini_jax.settings.checks import require_choice
from lora_mini_jax.settings.choices import Bits
from lora_mini_jax.tree import Target, check_fit, flatten, rounded, unflatten

_TILE = 64


@struct.dataclass
class Quantized(meta.AxisMetadata):
    """A quantised kernel; make one with `quantize`.

    Attributes:
        array: qwix's array of values and scales, in the kernel's shape.
        dtype: of the dense kernel.
        bits: see `Bits`.
    """

    array: Any
    dtype: Any = struct.field(pytree_node=False)
    bits: Bits = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """The kernel's."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Entries of the kernel."""
        return self.array.qvalue.size

    def unbox(self) -> jax.Array:
        """The kernel, dense."""
        import qwix

        return rounded(qwix.dequantize(self.array), self.dtype)

    def replace_boxed(self, val: Any) -> Any:
        """Flax asks for it where a layer changes a parameter; here it becomes a dense one."""
        return val

    def add_axis(self, index: int, params: Any) -> "Quantized":
        """Flax asks for it where a scan stacks; the arrays know their axes."""
        return self

    def remove_axis(self, index: int, params: Any) -> "Quantized":
        """As `add_axis`."""
        return self


def quantize(params: Mapping[str, Any], targets: Iterable[Target], bits: Bits) -> dict[str, Any]:
    """The parameters with the kernels of ``targets`` quantised; the others are the same arrays.

    Args:
        params: the base parameters.
        targets: which kernels, ``select(targets, "all-linear")`` for example.
        bits: see `Bits`.

    Raises:
        UserError: qwix is not installed, an unknown ``bits``, or targets of other parameters.

    Example:
        >>> params = {"up": {"kernel": jnp.ones((128, 32))}}
        >>> small = quantize(params, [Target("up/kernel", (128, 32))], "nf4")
        >>> small["up"]["kernel"].shape, small["up"]["kernel"].array.scale.shape
        ((128, 32), (2, 32))
    """
    targets = tuple(targets)
    check_fit(params, targets)
    flat = flatten(params)
    for target in targets:
        flat[target.path] = quantized(flat[target.path], target, bits)
    return unflatten(flat)


def quantizer(
    kernels: Iterable[Target], bits: Bits, dtype: Any = None
) -> Callable[[str, jax.Array], Any]:
    """What ``models.load`` takes as ``convert`` to quantise every linear kernel as it is read.

    Args:
        kernels: all of the model.
        bits: see `Bits`.
        dtype: what the kernels are rounded to before; None leaves them as they are.
    """
    small = {target.path: target for target in select(kernels, "all-linear")}

    def convert(path: str, array: jax.Array) -> Any:
        if path not in small:
            return array
        found = quantized(array if dtype is None else array.astype(dtype), small[path], bits)
        return replace(found, dtype=array.dtype)

    return convert


def quantized(kernel: jax.Array, target: Target, bits: Bits) -> Quantized:
    """One kernel quantised; errors as `quantize`."""
    try:
        import qwix  # noqa: F401
    except ImportError:
        raise UserError("quantised kernels need qwix: pip install qwix") from None
    require_choice("bits", bits, Bits)
    if isinstance(kernel, Quantized | jax.ShapeDtypeStruct) or not kernel.size:
        what = "quantised already" if isinstance(kernel, Quantized) else "no array with numbers"
        raise UserError(f"{target.path} is {what}: give arrays, each once")
    array = _quantized(kernel, target.anywhere, bits)
    return Quantized(_split_as(kernel, array), kernel.dtype, bits)


@partial(jax.jit, static_argnums=(1, 2))
def _quantized(kernel: jax.Array, target: Target, bits: Bits) -> Any:
    """qwix's array of values and scales, of stacked kernels one after the other. Compiled, for
    operation by operation nf4 takes 57 times the bytes of a bfloat16 kernel."""
    quantise = partial(_one_quantized, ins=target.ins, bits=bits)
    for _ in range(target.stack):
        quantise = partial(jax.lax.map, quantise)
    return quantise(kernel)


def _split_as(kernel: jax.Array, array: Any) -> Any:
    """The array's values and scales over the devices that the kernel is split over, each axis that
    can be: XLA would choose for itself."""
    where = None if isinstance(kernel, Tracer) else getattr(kernel, "sharding", None)
    if not isinstance(where, NamedSharding):
        return array
    mesh, spec = where.mesh, where.spec

    def divides(axes: Any, size: int) -> bool:
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    def place(leaf: jax.Array) -> jax.Array:
        own = (axes if divides(axes, size) else None
               for axes, size in zip(spec, leaf.shape, strict=False))  # fmt: skip
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*own)))

    return jax.tree.map(place, array)


def _one_quantized(kernel: jax.Array, *, ins: tuple[int, ...], bits: Bits) -> Any:
    import qwix

    channels, tiles = [axis for axis in range(kernel.ndim) if axis not in ins], {}
    if bits == "nf4":
        last = kernel.shape[ins[-1]]
        tiles = {ins[-1]: max(size for size in range(1, _TILE + 1) if last % size == 0)}
        channels += ins[:-1]
    return qwix.quantize(
        jnp.asarray(kernel, jnp.float32), bits if bits == "nf4" else jnp.int8,
        channelwise_axes=channels, tiled_axes=tiles,
    )  # fmt: skip
