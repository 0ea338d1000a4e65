"""The head that an encoder gets for a task: drawn, trained with the adapter, and found again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import flax.linen as nn

from lora_mini_jax.errors import UserError
from lora_mini_jax.models import load
from lora_mini_jax.models.families import FAMILIES, family_of
from lora_mini_jax.models.fresh import asked
from lora_mini_jax.models.hub import read_hf

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
        hf = read_hf(folder)
        family = family_of(hf, any_head=True)
        if family.kind != "encoder":
            known = (f.module.__name__ for f in FAMILIES if f.kind == "encoder")
            raise UserError(f"{folder} holds a {family.module.__name__}, which has no head for "
                            f"{self.task}: give an encoder, one of {', '.join(known)}")  # fmt: skip
        return family.module(
            family.config.from_hf(asked(family, hf, HEADS[self.task], None, self._named))
        )

    def load(self, folder: Path, **how: Any) -> Any:
        """The model with this head, and its parameters, read as ``how`` says; it and errors as in
        ``models.load``."""
        task = HEADS[self.task]
        model, params = load(folder, task=task, labels=self._named, seed=self.seed, **how)
        config = replace(model.config, problem_type=PROBLEMS[self.task])
        return model.clone(config=config), params

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], folder: str | Path) -> Self:
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
    def _named(self) -> list[str] | None:
        """The names of the classes, as models take them."""
        return list(self.labels) or None
