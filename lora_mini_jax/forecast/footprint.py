"""What a training step takes on every device, before there is a weight or a device: memory,
arithmetic and what the devices tell each other."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_mini_jax import sharding
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.forecast.collectives import collectives
from lora_mini_jax.forecast.flops import step_flops
from lora_mini_jax.hardware import compiling_for
from lora_mini_jax.training.gradient import LossFn
from lora_mini_jax.training.train import TrainState, make_train_step
from lora_mini_jax.tree import Target

AS_ON_ACCELERATORS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,"
    "while-loop-expensive-invariant-code-motion,cse_barrier_expander"
}
"""What XLA does for CPUs and for no accelerator: it widens the kernels of all scanned layers, for a
CPU computes bfloat16 in float32, or gathers them from all devices, before the loop; and it drops
the barriers without which layers that are not scanned are kept and not recomputed."""


@dataclass(frozen=True)
class Footprint:
    """Of one training step; bytes are those of each device.

    Attributes:
        params, adapter, optimizer, batch: bytes of what goes into the step; its state is donated,
            so what comes out takes no more.
        temporaries: bytes of everything in between, activations above all, at their peak.
        flops: of the step's matrix products, on all devices together.
        exchanged: bytes that each device has from the others, by kind of exchange.
    """

    params: int
    adapter: int
    optimizer: int
    batch: int
    temporaries: int
    flops: int
    exchanged: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on each device at the peak."""
        return self.params + self.adapter + self.optimizer + self.batch + self.temporaries


def footprint(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    sites: tuple[Site, ...],
    targets: Iterable[Target],
    params: Any,
    batch: Any,
    mesh: Mesh,
    *,
    has_aux: bool = False,
    parts: int = 1,
) -> Footprint:
    """Compile a training step for a mesh from shapes alone, and read off what it takes.

    XLA compiles for the kind of device in the mesh, and another kind's compiler may do better or
    worse: for a TPU or a GPU, a mesh of CPU devices gives an estimate of the temporaries, and the
    other figures exactly.

    Args:
        loss_fn, tx, has_aux, parts: as for `make_train_step`.
        sites: which method adapts which kernel, as from `plan`.
        targets: all kernels, adapted or not, as from ``linen.targets``.
        params: the shapes and dtypes of the base parameters.
        batch: those of one batch, over all devices.
        mesh: as from `sharding.make_mesh`.
    """
    params = with_shardings(params, sharding.of_params(mesh, params, targets))
    state = jax.eval_shape(lambda p: TrainState.create(draw(p, sites, 0), tx), params)
    state = with_shardings(state, _of_state(mesh, state, tx))
    batch = with_shardings(batch, jax.tree.map(lambda _: sharding.of_batch(mesh), batch))
    step = make_train_step(loss_fn, tx, has_aux=has_aux, parts=parts, like=state)
    with compiling_for(mesh.devices.flat[0]):
        traced = step.trace(state, params, batch)
        flops = step_flops(step, traced, state, params, batch)
    compiled = traced.lower().compile(AS_ON_ACCELERATORS if _on_cpu(mesh) else None)
    exchanged: Counter = Counter()
    for each in collectives(compiled):
        exchanged[each.kind] += each.bytes * each.times
    return Footprint(
        params=_bytes(params),
        adapter=_bytes(state.adapter),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batch),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        flops=flops,
        exchanged=dict(exchanged),
    )


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes and dtypes of a tree with shardings."""

    def place(leaf: Any, of: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=of)

    return jax.tree.map(place, tree, shardings)


def _on_cpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _of_state(mesh: Mesh, state: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """Where a state that starts on the mesh has its leaves: the optimiser's are as the trained."""
    whole = NamedSharding(mesh, PartitionSpec())
    adapter = sharding.of_adapter(mesh, state.adapter)

    def like(leaf: Any, trained: Any, of: NamedSharding) -> NamedSharding:
        return of if leaf.shape == trained.shape else whole

    trained = state.adapter.trainable, adapter.trainable
    opt_state = optax.tree.map_params(
        tx, like, state.opt_state, *trained, transform_non_params=lambda leaf: whole
    )
    return TrainState(whole, adapter, opt_state, whole)  # ty: ignore[invalid-argument-type]


def _bytes(tree: Any) -> int:
    """What the leaves of a placed tree take on one device, where four bits are half a byte."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        bits = jnp.iinfo(leaf.dtype).bits if whole else 8 * leaf.dtype.itemsize
        total += math.ceil(math.prod(leaf.sharding.shard_shape(leaf.shape)) * bits / 8)
    return total
