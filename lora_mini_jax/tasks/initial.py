"""The adapter that a run begins from, where its options name one (``--init-adapter``).

What it adapts, and how, is its own; the run adds data and a schedule, which begins anew. It may be
of this package or of PEFT, and its files tell which.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_mini_jax import peft, sharding
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site, methods_of
from lora_mini_jax.data.records import digest
from lora_mini_jax.errors import UserError
from lora_mini_jax.options import Finetune
from lora_mini_jax.peft import config, tensors
from lora_mini_jax.saved import storage
from lora_mini_jax.saved.record import Record
from lora_mini_jax.saved.same_base import difference
from lora_mini_jax.search.choice import gated
from lora_mini_jax.settings.spec import to_pairs
from lora_mini_jax.tasks.devices import Devices
from lora_mini_jax.tasks.head import Head
from lora_mini_jax.tasks.sites import all_targets


class Beginning(NamedTuple):
    """Where training starts.

    Its ``adapter``; a ``fingerprint`` that tells it from others; and whether an adapter that is
    saved needs its frozen leaves too, for no key draws them (``store_outer`` of `storage.save`).
    """

    adapter: Adapter
    fingerprint: str
    store_outer: bool


@dataclass(frozen=True)
class Initial:
    """What is known of the adapter before any weights are read.

    Attributes:
        folder: the adapter's.
        record: what ``adapter.json`` says; None for one of PEFT's.
        head: what its task put on the base; None where the base keeps its own, or PEFT's says it.
    """

    folder: Path
    record: Record | None
    head: Head | None

    @classmethod
    def of(cls, options: Finetune) -> "Initial | None":
        """The adapter that the options name; None where they name none.

        Raises:
            UserError: no adapter, or one that was trained for another task or another way.
        """
        if not options.init_adapter:
            return None
        folder = Path(options.init_adapter).expanduser()
        theirs = (folder / config.FILE).exists() and not (folder / "adapter.json").exists()
        if theirs:
            labelled = config.read_config(folder).get("task_type") == "SEQ_CLS"
            _check_task(options, "classification or regression" if labelled else "language")
            return cls(folder, None, None)
        record = storage.record_of(folder)
        head = None if record.task is None else Head.from_dict(record.task, folder)
        _check_task(options, head.task if head else "language")
        _check_way(options, record)
        if head and options.labels not in ((), head.labels):
            raise UserError(f"--init-adapter {folder} tells the classes {', '.join(head.labels)}, "
                            f"not {', '.join(options.labels)}: leave out --labels, or name those "
                            "in their order")  # fmt: skip
        return cls(folder, record, head)

    @property
    def sites(self) -> tuple[Site, ...]:
        """What it adapts.

        Raises:
            UserError: an adapter of PEFT's, which says it in its tensors, and of a model's weights.
        """
        if self.record is None:
            raise UserError(f"{self.folder} is PEFT's, whose kernels show when the model is read, "
                            "and here none is: plan with --method and --target-modules instead of "
                            "--init-adapter")  # fmt: skip
        return self.record.sites

    def load(self, model: Any, params: Any, devices: Devices) -> Beginning:
        """Its leaves on the devices, for the base that it was trained on.

        Raises:
            UserError: files that are damaged, or of another base; gates that no search has closed.
        """
        if self.record is None:
            kernels, _ = all_targets(model)
            adapter = peft.load(self.folder, params, kernels, names=peft.names_of(model))
            told = self._fingerprint(config.FILE, tensors.FILE)
            return Beginning(devices.adapter(adapter), told, True)
        if differs := difference(self.record, params):
            raise UserError(f"--init-adapter {self.folder} {differs}. Give that one as --model, "
                            "with the --dtype it had")  # fmt: skip
        if gated(self.record.sites):
            raise UserError(f"--init-adapter {self.folder} has gates of diffora, whose search has "
                            "not ended: give an adapter that finetune wrote")  # fmt: skip
        where = partial(sharding.of_adapter, devices.mesh) if devices.mesh else None
        adapter = storage.load(self.folder, params, allow_different_base=True, sharding=where)
        drawn_again = any(self.record.digests.values())
        told = self._fingerprint("adapter.json", "adapter.safetensors")
        return Beginning(adapter, told, not drawn_again)

    def _fingerprint(self, *files: str) -> str:
        return "-".join(digest(self.folder / file) for file in files)


def kept_head(options: Finetune) -> Head | None:
    """The head that comes with the adapter that a run begins from; None where none does."""
    initial = Initial.of(options)
    return initial.head if initial else None


def trained_by(options: Finetune, sites: Sequence[Site]) -> Finetune:
    """The options with the method of these sites in the place of the adapter's folder: the first
    that does not train a parameter whole, if any."""
    methods = methods_of(sites)
    method = next((m for m in methods if not m.adapts_any_array), methods[0]).to_dict()
    given = {n: v for n, v in method.items() if n != "method" and v is not None}
    return replace(options, init_adapter="", method=method["method"], settings=to_pairs(given))


def _check_task(options: Finetune, task: str) -> None:
    """The adapter was trained for the task of the run."""
    if options.task not in task:
        raise UserError(f"--init-adapter {options.init_adapter} was trained for {task}, and this "
                        f"run is for {options.task}: give another adapter, or another "
                        "--task")  # fmt: skip


def _check_way(options: Finetune, record: Record) -> None:
    """The base will be as it was in the adapter's training: its layers stacked, or not, and its
    kernels in as many bits."""
    stacked = any(site.target.stack for site in record.sites)
    if stacked != options.scan_layers:
        raise UserError(f"--init-adapter {options.init_adapter} was trained "
                        f"{'with' if stacked else 'without'} --scan-layers: "
                        f"{'give' if stacked else 'leave out'} --scan-layers")  # fmt: skip
    if record.quantized != options.quantize:
        base = f"base in {record.quantized}" if record.quantized else "dense base"
        how = f"give --quantize {record.quantized}" if record.quantized else "leave out --quantize"
        raise UserError(f"--init-adapter {options.init_adapter} was trained on a {base}: {how}")
