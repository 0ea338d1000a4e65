"""Which NVIDIA GPU programs are made for, and so whether kernels of its own may be asked for."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import jax
from jax.sharding import NamedSharding

JOINT = "LORA_MINI_JOINT"
"""The environment variable that asks for `joint` products, with "1"."""
_asked = ContextVar("asked", default=True)
_ways = ContextVar("ways", default=1)


def capability() -> float:
    """The compute capability of JAX's first device: 9.0 for a Hopper GPU; 0.0 where that is no
    NVIDIA GPU, and inside of `without_kernels`."""
    return _capability() if _asked.get() else 0.0


def multiprocessors() -> int:
    """How many the GPU has."""
    return jax.devices()[0].core_count


def takes_joint_products() -> bool:
    """Whether the kernel of `hopper` is asked for, and programs are made for one device that can
    run it: XLA could not split it."""
    return os.environ.get(JOINT) == "1" and capability() == 9.0 and jax.device_count() == 1


@contextmanager
def without_kernels() -> Generator[None]:
    """Trace programs as for any other device: to count their products, or to differentiate them in
    forward mode. What was traced before stays as it was."""
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
        names = first if isinstance(first, tuple) else (first,)
        sizes = dict(rows.mesh.shape)
        every = rows.mesh.size
        for name in names:
            every //= sizes.get(name, 1)
    token = _ways.set(every)
    try:
        yield
    finally:
        _ways.reset(token)


def ways() -> int:
    """Over how many devices what is in a row is split, inside of `on_mesh`; else 1."""
    return _ways.get()


@cache
def _capability() -> float:
    device = jax.devices()[0]
    nvidia = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return float(device.compute_capability) if nvidia else 0.0
