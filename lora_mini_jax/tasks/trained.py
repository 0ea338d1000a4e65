"""A trained adapter as a folder, with the model that it was trained on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.errors import UserError
from lora_mini_jax.models import load
from lora_mini_jax.models.hub import load_module, resolve
from lora_mini_jax.quantized import quantizer
from lora_mini_jax.saved import storage
from lora_mini_jax.saved.record import Record
from lora_mini_jax.tasks.head import Head
from lora_mini_jax.tasks.sites import all_targets


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
        return resolve(self.base)

    def load_base(self) -> tuple[Any, Any]:
        """The model and its parameters as they were before training: with the head, the layers
        stacked and the kernels quantised if they were."""
        stacked = any(site.target.stack for site in self.record.sites)
        how: dict[str, Any] = {"scan_layers": stacked}
        folder, head, bits = self.base_folder, self.head, self.record.quantized
        if bits:
            module = load_module(folder) if head is None else head.module(folder)
            kernels, _ = all_targets(module.clone(scan_layers=stacked))
            how["convert"] = quantizer(kernels, bits, self.record.dtype)
        return load(folder, **how) if head is None else head.load(folder, **how)

    def load(self, allow_different_base: bool = False) -> tuple[Any, Any, Adapter]:
        """The model, its parameters and the adapter; errors as in `saved.storage.load`."""
        model, params = self.load_base()
        adapter = storage.load(self.folder, params, allow_different_base=allow_different_base)
        return model, params, adapter
