"""The devices of a run: one, or a mesh of them, in one process or in several."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_mini_jax import linen, processes, sharding
from lora_mini_jax.adapters.adapter import Adapter, draw
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.data import Batches
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.options import Finetune, Training
from lora_mini_jax.quantized import quantizer
from lora_mini_jax.training.train import TrainState
from lora_mini_jax.tree import Target, flatten


@dataclass(frozen=True)
class Devices:
    """Where a run puts its arrays; without a mesh, on JAX's default device as they come."""

    mesh: Mesh | None = None

    @classmethod
    def of(cls, options: Training) -> "Devices":
        """The devices that the options name; of several processes, all there are.

        Raises:
            UserError: a mesh that is not for these devices, or a batch that it cannot split.
        """
        sizes = options.mesh or (sharding.ROWS_ALONE if jax.process_count() > 1 else "")
        if not sizes:
            return cls()
        mesh = sharding.make_mesh(sizes)
        sharding.check_rows(mesh, options.batch_size // options.accumulate)
        return cls(mesh)

    def params(self, shapes: Mapping[str, Any], targets: Iterable[Target]) -> Any:
        """The sharding of each parameter, as a tree; None without a mesh."""
        return sharding.of_params(self.mesh, shapes, targets) if self.mesh else None

    def draw(self, params: Any, sites: tuple[Site, ...], seed: int) -> Adapter:
        """An adapter drawn on the devices; no leaf is ever whole on one of them."""
        if self.mesh is None:
            return draw(params, sites, seed)
        shapes = jax.eval_shape(lambda p: draw(p, sites, seed), params)
        return draw(params, sites, seed, sharding.of_adapter(self.mesh, shapes))

    def adapter(self, adapter: Adapter) -> Adapter:
        """The adapter on the devices."""
        if self.mesh is None:
            return adapter
        return jax.device_put(adapter, sharding.of_adapter(self.mesh, adapter))

    def state(self, state: TrainState) -> TrainState:
        """The state on the devices; its adapter is there already."""
        return state if self.mesh is None else sharding.put_on_mesh(self.mesh, state)

    def batch(self, batches: Batches, step: int) -> dict[str, jax.Array]:
        """The batch of a step on the devices; every process reads the rows of its own."""
        if self.mesh is None:
            return jax.device_put(batches.batch(step))
        read = partial(batches.batch, step)
        return processes.shard_rows(batches.shapes, sharding.of_batch(self.mesh), read)


def reading(options: Finetune, module: nn.Module) -> dict[str, Any]:
    """What ``models.load`` is told so that every parameter of the module goes where it belongs,
    and is quantised if it is to be, as soon as it is read."""
    dtype, scan = jnp.dtype(options.dtype), options.scan_layers
    how = {"dtype": dtype, "param_dtype": dtype, "scan_layers": scan, "remat": options.remat}
    family, devices, bits = family_of_module(module), Devices.of(options), options.quantize
    if devices.mesh is None and bits is None:
        return how
    module = module.clone(scan_layers=scan)
    shapes = family.shapes(module)
    kernels = linen.targets(module, shapes, *family.inputs())
    places = flatten(devices.params(shapes, kernels) or {})
    return how | {"sharding": places.get, "convert": quantizer(kernels, bits) if bits else None}
