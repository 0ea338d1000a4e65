"""A trained adapter as a folder, with the model that it was trained on."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from lora_mini_jax import sharding
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.models import load
from lora_mini_jax.models.hub import load_module, resolve
from lora_mini_jax.saved import storage
from lora_mini_jax.saved.record import Record
from lora_mini_jax.tasks.devices import ONE, Devices
from lora_mini_jax.tasks.head import Head


@dataclass(frozen=True)
class Trained:
    """What is known of an adapter's folder before any weights are read.

    Attributes:
        folder: the adapter's.
        base: the model it is for, as it is named: a folder or a hub id.
        record: what ``adapter.json`` says.
        head: what the adapter's task put on the base; None where the base keeps its own.
    """

    folder: str
    base: str
    record: Record
    head: Head | None

    @classmethod
    def read(cls, folder: str, base: str | None = None) -> Self:
        """What ``adapter.json`` says, on the ``base`` that is named or else on its own.

        Raises:
            UserError: a folder that holds no adapter.
        """
        record = storage.record_of(folder)
        head = None if record.task is None else Head.from_dict(record.task, folder)
        return cls(folder, base or record.base, record, head)

    @cached_property
    def base_folder(self) -> Path:
        """The folder of the base, fetched if need be.

        Raises:
            UserError: nobody names the base: an adapter that was saved in Python may not say it.
        """
        if not self.base:
            raise UserError(f"{self.folder} does not say which model it was trained on: give "
                            "--model")  # fmt: skip
        own = self.base == self.record.base
        return resolve(self.base, named_by=self.folder if own else "")

    def load_base(self, dtype: str | None = None, devices: Devices = ONE) -> tuple[Any, Any]:
        """The model and its parameters as they were before training: with the head, the layers
        stacked and the kernels quantised if they were.

        Args:
            dtype: numbers of the parameters and of the computation; None for those it was trained
                in.
            devices: where the parameters go.
        """
        record, head, folder = self.record, self.head, self.base_folder
        module = load_module(folder) if head is None else head.module(folder)
        how = devices.reading(
            module,
            dtype or record.dtype,
            scan_layers=any(site.target.stack for site in record.sites),
            bits=record.quantized,
            rounded=record.dtype,
        )
        return load(folder, **how) if head is None else head.load(folder, **how)

    def load(
        self,
        allow_different_base: bool = False,
        dtype: str | None = None,
        devices: Devices = ONE,
    ) -> tuple[Any, Any, Adapter]:
        """The model, its parameters and the adapter, each on its devices; arguments as for
        `load_base`, errors as in `saved.storage.load`."""
        model, params = self.load_base(dtype, devices)
        adapter = storage.load(
            self.folder,
            params,
            allow_different_base=allow_different_base,
            sharding=partial(sharding.of_adapter, devices.mesh) if devices.mesh else None,
        )
        return model, params, adapter
