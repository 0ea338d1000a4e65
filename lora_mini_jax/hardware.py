"""The device that programs are made for, and which kernels of its own may be asked for."""

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding

JOINT = "LORA_MINI_JOINT"
"""The environment variable that asks for `joint` products, with "1"."""
_absent: ContextVar[jax.Device | None] = ContextVar("absent", default=None)
_asked = ContextVar("asked", default=True)
_rows: ContextVar[NamedSharding | None] = ContextVar("rows", default=None)


def device() -> jax.Device:
    """JAX's default, or the one that `compiling_for` names."""
    chosen = _absent.get() or getattr(jax.config, "jax_default_device")  # noqa: B009, no stub has it
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    return chosen or jax.local_devices()[0]


def capability() -> float:
    """Of an NVIDIA GPU its compute capability, 9.0 for Hopper; 0.0 for any other device, and inside
    of `without_kernels`."""
    made_for = device()
    nvidia = made_for.platform == "gpu" and "cuda" in made_for.client.platform_version.lower()
    return float(made_for.compute_capability) if nvidia and _asked.get() else 0.0


def multiprocessors() -> int:
    """How many the GPU has."""
    return device().core_count


def takes_joint_products() -> bool:
    """Whether the kernel of `hopper` is asked for, and programs are made for one device that can
    run it: XLA could not split it."""
    asked = os.environ.get(JOINT) == "1" and _absent.get() is None
    return asked and jax.device_count() == 1 and capability() == 9.0


def has_kernels() -> bool:
    """Whether programs for the device may have kernels of its own, that `without_kernels` leaves
    out."""
    return capability() >= 8 or takes_tpu_kernels()


def takes_tpu_kernels() -> bool:
    """Whether programs are made for a TPU, or for a mesh of them that is known (`on_mesh`): XLA
    cannot split a kernel in Pallas."""
    known = rows() is not None or _absent.get() is not None or jax.device_count() == 1
    return device().platform == "tpu" and _asked.get() and known


@contextmanager
def compiling_for(absent: jax.Device) -> Generator[None]:
    """Trace programs for such devices, which need not be there."""
    token = _absent.set(absent)
    try:
        yield
    finally:
        _absent.reset(token)


@contextmanager
def without_kernels() -> Generator[None]:
    """Trace programs without a device's own kernels: to count their products, or to differentiate
    them in forward mode. What was traced before stays as it was."""
    token = _asked.set(False)
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def on_mesh(rows: NamedSharding | None) -> Generator[None]:
    """Trace a program for this mesh: a batch's rows are split as ``rows`` says; features and heads
    may be split over the axes of the mesh that are left."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def rows() -> NamedSharding | None:
    """How rows are split, inside of `on_mesh`; else None."""
    return _rows.get()


def batch_axes() -> tuple[str, ...]:
    """The axes of the mesh over which a batch's rows are split."""
    split = rows()
    first = split.spec[0] if split is not None and len(split.spec) else ()
    return first if isinstance(first, tuple) else (first,) if first else ()


def model_axes() -> tuple[str, ...]:
    """The other axes of the mesh, over which features and heads may be split."""
    split = rows()
    names = () if split is None else split.mesh.axis_names
    return tuple(name for name in names if name not in batch_axes())


def model_parallel() -> int:
    """How many devices share the work on one row: the size of the `model_axes`; 1 if no mesh."""
    split = rows()
    return math.prod(split.mesh.shape[name] for name in model_axes()) if split else 1
