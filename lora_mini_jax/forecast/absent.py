"""Devices that are not there, to compile programs for: CPUs that JAX simulates, and TPU slices."""

import math
import os
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import jax

from lora_mini_jax.errors import UserError, first_line

ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_ACCELERATOR_TYPE": "v5litepod-4", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
"""Else libtpu looks for the TPU that it is on, complains, and lets one process in at a time."""


MOST = 2048
"""CPU devices in one process: XLA numbers no more of them."""


def simulated(mesh: str) -> list[jax.Device]:
    """As many CPU devices as the mesh has places.

    Raises:
        UserError: a size that is left open, or JAX has started with fewer.
    """
    sizes = _sizes(mesh)
    if any(size < 1 for size in sizes):
        raise UserError(f"mesh {mesh!r}: for a plan give every size, for there are no devices")
    wanted = math.prod(sizes)
    if wanted > MOST:
        raise UserError(f"mesh {mesh!r} has {wanted} places, and at most {MOST} CPU devices can be "
                        "simulated: plan a part of it, or give --tpu, the slice")  # fmt: skip
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={wanted}"
    devices = jax.devices("cpu")
    if len(devices) < wanted:
        raise UserError(
            f"mesh {mesh!r} has {wanted} places, but JAX has started with {len(devices)} CPU "
            "devices: plan before anything else uses JAX, or set XLA_FLAGS="
            f"--xla_force_host_platform_device_count={wanted}"
        )
    return devices[:wanted]


def slice_of(topology: str, mesh: str) -> Sequence[jax.Device]:
    """The chips of a TPU slice, or one where the mesh has one place. Programs for them can be
    compiled, by libtpu, and not be run.

    Args:
        topology: a generation and the slice's shape, as libtpu has them: ``"v5e:4x4"``.
        mesh: as for `sharding.make_mesh`; empty has one place. A part of a slice has no mesh.

    Raises:
        UserError: no libtpu, or a topology that it does not know.
    """
    if not find_spec("libtpu"):
        raise UserError(
            "to compile for a TPU its compiler is needed, though no TPU: pip install libtpu, of "
            'the version that pip install "jax[tpu]" would take'
        )
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = first_line(error).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"TPU {topology!r}: {reason.rstrip('.')}. Give a generation and a shape of whole "
            "hosts, such as v5e:2x2, v5e:4x4, v6e:4x4, v5p:2x2x1"
        ) from None
    return devices[:1] if math.prod(_sizes(mesh)) == 1 else devices


@contextmanager
def uncached() -> Generator[None]:
    """Compile without JAX's cache on disk: what is for an absent device cannot be read back."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    reset_cache()  # JAX asks the setting once
    try:
        yield
    finally:
        jax.config.update(name, before)
        reset_cache()


def _sizes(mesh: str) -> list[int]:
    return [int(size) for size in re.findall(r"=\s*(-?\d+)", mesh)]
