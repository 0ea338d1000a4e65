"""The device that programs are made for, and which kernels of its own may be asked for."""

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
_ways = ContextVar("ways", default=1)


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
    one = _absent.get() is None and jax.device_count() == 1
    return os.environ.get(JOINT) == "1" and one and capability() == 9.0


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
    """Trace a program whose rows are split so, and what is in a row over the mesh's other axes."""
    every = 1
    if rows is not None:
        first = rows.spec[0] if len(rows.spec) else None
        sizes, every = dict(rows.mesh.shape), rows.mesh.size
        for name in first if isinstance(first, tuple) else (first,):
            every //= sizes.get(name, 1)
    token = _ways.set(every)
    try:
        yield
    finally:
        _ways.reset(token)


def ways() -> int:
    """Over how many devices what is in a row is split, inside of `on_mesh`; else 1."""
    return _ways.get()
