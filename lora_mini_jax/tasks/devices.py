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
from lora_mini_jax.settings.choices import Bits
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
        return cls.on(sizes, options.batch_size // options.accumulate)

    @classmethod
    def on(cls, sizes: str, rows: int | None = None) -> "Devices":
        """A mesh of these sizes, for batches of so many rows; without sizes, one device. Errors as
        in `of`."""
        if not sizes:
            return cls()
        mesh = sharding.make_mesh(sizes)
        if rows is not None:
            sharding.check_rows(mesh, rows)
        return cls(mesh)

    def batch_size(self, asked: int, rows: int, parts: int = 1) -> int:
        """How many rows a batch has of so many ``rows``: as many as are asked for, or as there are
        where that is less. The devices, and ``parts``, divide it all the same."""
        split = (sharding.row_parts(self.mesh) if self.mesh else 1) * parts
        return min(asked, -(-rows // split) * split)

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

    def reading(
        self,
        module: nn.Module,
        dtype: str,
        *,
        scan_layers: bool = False,
        remat: str = "none",
        bits: Bits | None = None,
        rounded: str | None = None,
    ) -> dict[str, Any]:
        """What ``models.load`` is told so that every parameter of the module goes where it belongs,
        and is quantised if it is to be, as soon as it is read.

        Args:
            module: the model, from its config alone.
            dtype: numbers of the parameters and of the computation.
            scan_layers, remat: as in ``models.load``.
            bits: of quantised kernels; None for dense ones.
            rounded: what kernels are rounded to before they are quantised, if not to ``dtype``.
        """
        numbers = jnp.dtype(dtype)
        how = {"dtype": numbers, "param_dtype": numbers, "scan_layers": scan_layers, "remat": remat}
        if self.mesh is None and bits is None:
            return how
        family, module = family_of_module(module), module.clone(scan_layers=scan_layers)
        shapes = family.shapes(module)
        kernels = linen.targets(module, shapes, *family.inputs())
        places = flatten(self.params(shapes, kernels) or {})
        convert = quantizer(kernels, bits, rounded) if bits else None
        return how | {"sharding": places.get, "convert": convert}


ONE = Devices()
"""JAX's default device."""


def reading(options: Finetune, module: nn.Module) -> dict[str, Any]:
    """`Devices.reading` as a run's options say."""
    return Devices.of(options).reading(
        module,
        options.dtype,
        scan_layers=options.scan_layers,
        remat=options.remat,
        bits=options.quantize,
    )
