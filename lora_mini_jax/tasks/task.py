"""What a training run works on: model, data and loss, read and checked up front.

`Task` is what all kinds have in common; a class for each kind reads and measures it:
`LanguageTask` for text that is continued, `Seq2SeqTask` for sources that are answered, and
`LabelTask` for texts that have a class or a number. `kinds` knows which is whose.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_mini_jax import linen, sharding
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.data import Batches
from lora_mini_jax.options import Finetune
from lora_mini_jax.tree import flatten


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """A model with its data, and the kernels that are to be adapted."""

    model: Any
    params: Any
    sites: tuple[Site, ...]
    train: Batches
    valid: Batches
    notes: list[str]
    """What was left out of the data, and the like, in words."""

    @classmethod
    @abstractmethod
    def read(cls, options: Finetune) -> Self:
        """See `kinds.prepare`."""

    @classmethod
    @abstractmethod
    def planned(cls, options: Finetune) -> tuple[Site, ...]:
        """See `kinds.planned`."""

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """What the loss is, for those who read it."""

    @cached_property
    def apply(self) -> Any:
        """The adapted call of the model."""
        return linen.adapt(self.model, rows=sharding.of_rows(self.params))

    @property
    def n_parameters(self) -> int:
        """How many the model has; a quantised kernel counts as the one it stands for."""
        return sum(leaf.size for leaf in flatten(self.params).values())

    def loss(self, params: Any, adapter: Adapter, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        """Mean loss over what counts in the batch (0 where nothing does), and how much does."""
        total, number = self.summed_loss(params, adapter, batch, key)
        return total / jnp.maximum(number, 1), number

    @abstractmethod
    def summed_loss(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """The summed loss of a batch, and how many tokens or rows count in it; float32."""

    @abstractmethod
    def score(self, params: Any, adapter: Adapter, batch: Any) -> Any:
        """What `measures` needs of one held-out batch: a tree of arrays. Pure, to be compiled."""

    @abstractmethod
    def measures(self, scores: Sequence[Any]) -> dict[str, float]:
        """The scores of all held-out batches as named numbers, ``valid_loss`` first."""

    def samples(self, adapter: Adapter | None) -> list[tuple[str, str]]:
        """Held-out prompts and what the model writes after them; by default there are none."""
        return []

    @property
    def eval_every(self) -> int | None:
        """Steps between two evaluations where nobody says; None for only before and after."""
        return None

    @property
    def record(self) -> dict[str, Any] | None:
        """What is saved with an adapter so that the model can be put together again; None for a
        model that is used as it is."""
        return None
