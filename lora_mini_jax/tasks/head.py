"""The head that an encoder gets for a task: drawn, trained with the adapter, and found again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn

from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object
from lora_mini_jax.models import load
from lora_mini_jax.models.families import FAMILIES, family_of
from lora_mini_jax.models.fresh import asked
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import BASE
from lora_mini_jax.quantized import quantizer
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks.task import all_targets

HEADS = {"classification": "sequence-classification", "regression": "regression"}
"""What a model's head is called, by task."""
PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
"""What ``config.json`` calls it, as ``problem_type``."""


@dataclass(frozen=True)
class Head:
    """What a model was, or will be, trained to tell, and what it reads. Saved with the adapter.

    Attributes:
        task: ``"classification"`` or ``"regression"``.
        labels: the names of the classes, in order; none for a regression.
        text_fields: the fields of a record that it reads.
        max_length: the most tokens of a row.
        seed: of what is drawn where the base lacks the head.
    """

    task: str
    labels: tuple[str, ...]
    text_fields: tuple[str, ...]
    max_length: int
    seed: int

    def module(self, folder: Path) -> nn.Module:
        """The model with this head, from ``config.json`` alone.

        Raises:
            UserError: a model that has no such head.
        """
        hf = read_object(folder / "config.json")
        family = family_of(hf, any_head=True)
        if not family.trunk:
            known = (f.module.__name__ for f in FAMILIES if f.trunk)
            raise UserError(f"{folder} holds a {family.module.__name__}, which has no head for "
                            f"{self.task}: give an encoder, one of {', '.join(known)}")  # fmt: skip
        return family.module(family.config.from_hf(asked(family, hf, *self._asked)))

    def load(self, folder: Path, **how: Any) -> Any:
        """The model with this head, and its parameters, read as ``how`` says; it and errors as in
        ``models.load``."""
        task, _, labels = self._asked
        model, params = load(folder, task=task, labels=labels, seed=self.seed, **how)
        config = replace(model.config, problem_type=PROBLEMS[self.task])
        return model.clone(config=config), params

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], folder: str | Path) -> "Head":
        """The inverse of `to_dict`; ``folder`` is for error messages."""
        try:
            known: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v
                                     for n, v in record.items()}  # fmt: skip
            if record["task"] not in HEADS:
                raise ValueError(f"task is {record['task']!r}")
            return cls(**known)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{folder}/adapter.json: its task is damaged: {error}") from None

    @property
    def _asked(self) -> tuple[str, None, list[str] | None]:
        """Task, number of labels and labels, as models know them."""
        return HEADS[self.task], None, list(self.labels) or None


def head_of(adapter: str | Path) -> Head | None:
    """The head that an adapter's folder says its model has; None where it keeps its own."""
    record = storage.record_of(adapter).task
    return None if record is None else Head.from_dict(record, adapter)


def base_of(model: str | None, adapter: str | None) -> str:
    """The base model: the one that is named, or the adapter's own; without either the package's.

    Raises:
        UserError: an adapter that does not say its own, as one that was saved in Python may not.
    """
    if model is not None or adapter is None:
        return BASE if model is None else model
    own = storage.record_of(adapter).base
    if not own:
        raise UserError(f"{adapter} does not say which model it was trained on: give --model")
    return own


def load_for(adapter: str | Path, folder: Path) -> tuple[Any, Any]:
    """The base in ``folder`` as the adapter was trained on it, before any training: with its head,
    its layers stacked and its kernels quantised if they were; the model and its parameters."""
    head, record = head_of(adapter), storage.record_of(adapter)
    stacked = any(site.target.stack for site in record.sites)
    how: dict[str, Any] = {"scan_layers": stacked}
    if record.quantized:
        module = load_module(folder) if head is None else head.module(folder)
        kernels, _ = all_targets(module.clone(scan_layers=stacked))
        how["convert"] = quantizer(kernels, record.quantized, record.dtype)
    return load(folder, **how) if head is None else head.load(folder, **how)
