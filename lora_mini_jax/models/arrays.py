"""From tensors in files to arrays on devices, one at a time and each only where it belongs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from lora_mini_jax.errors import UserError, first_line
from lora_mini_jax.models.tensors import Tensor

Index = tuple[slice, ...]
_ALIGNED = 64  # where JAX on a CPU takes a NumPy array over instead of copying it


def read_array(
    tensors: Sequence[Tensor],
    leaf: jax.ShapeDtypeStruct,
    *,
    stacked: bool = False,
    flipped: bool = False,
    sharding: Sharding | None = None,
    name: str = "array",
) -> jax.Array:
    """One parameter from its tensors, straight to the devices it is for.

    The host holds no more than one device's part of it.

    Args:
        tensors: the one that it is, or one a layer where they are stacked along axis 0.
        leaf: its shape and dtype; what the file holds is cast.
        stacked: whether ``tensors`` are stacked.
        flipped: whether the file has the last two axes the other way round.
        sharding: where it goes; None is the default device.
        name: what to call it in an error.

    Raises:
        UserError: a damaged file, or a sharding that does not divide the shape.
    """

    def part(index: Index) -> np.ndarray:
        # In the file's layout, so that rows are read in their order; the device swaps axes.
        inner = index[stacked:][::-1] if flipped else index[stacked:]
        chosen = tensors[index[0]] if stacked else tensors
        sizes = [len(range(*s.indices(n))) for s, n in
                 zip(inner, chosen[0].shape, strict=True)]  # fmt: skip
        out = _empty((len(chosen), *sizes), leaf.dtype)
        for i, tensor in enumerate(chosen):
            tensor.read(out[i, ...], inner)
        out = out if stacked else out[0, ...]
        return out.swapaxes(-1, -2) if flipped else out

    if sharding is None:
        return _put(part((slice(None),) * len(leaf.shape)))
    return _place(leaf.shape, sharding, part, name)


def _place(
    shape: tuple[int, ...], sharding: Sharding, part: Callable[[Index], np.ndarray], name: str
) -> jax.Array:
    """Every device of this process gets its part; neighbours with the same one share the read."""
    try:
        places = sharding.addressable_devices_indices_map(shape)
    except ValueError as error:
        raise UserError(f"{name} {shape} cannot be sharded so: {first_line(error, 1000)}: give "
                        "another sharding") from None  # fmt: skip
    pieces, last, value = [], None, None
    for device, index in places.items():
        if value is None or index != last:
            last, value = index, part(index or ())
        where = SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
        pieces.append(_put(value, where))
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _put(value: Any, where: Sharding | None = None) -> jax.Array:
    # Waited for: arrays on their way would keep all their copies on the host.
    return jax.device_put(value, where).block_until_ready()


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory to read into, that JAX can take over as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    first = -raw.ctypes.data % _ALIGNED
    return raw[first : first + size].view(dtype).reshape(shape)
