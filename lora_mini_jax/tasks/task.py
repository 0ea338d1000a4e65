"""What a training run works on: model, data and loss, read and checked up front.

`Task` is what all kinds have in common; a file for each kind makes and measures it:
`language` for text that is continued, `seq2seq` for sources that are answered, and `label` for
texts that have a class or a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax import linen, sharding
from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.budget import within
from lora_mini_jax.adapters.sites import Site, check, plan
from lora_mini_jax.data import Batches
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.models.t5 import T5
from lora_mini_jax.options import AdapterOptions, Finetune, one_or_names
from lora_mini_jax.selection import select
from lora_mini_jax.tree import Target, flatten, parameters


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


def prepare(options: Finetune) -> Task:
    """Read everything a run needs; whatever is wrong with it shows here, before any training.

    Raises:
        UserError: a model, tokenizer or data file that cannot be used, or kernels that the method
            cannot adapt.
    """
    return _kind(options).prepare(options)


def planned(options: Finetune) -> tuple[Site, ...]:
    """What `prepare` would adapt, from the model's ``config.json`` alone; errors as there."""
    return _kind(options).planned(options)


def _kind(options: Finetune) -> ModuleType:
    from lora_mini_jax.tasks import label, language, seq2seq  # which build on this file

    if options.task != "language":
        return label
    return seq2seq if type(load_module(options.model)) is T5 else language


def all_targets(model: nn.Module) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    """The kernels of a model that `load` reads, and all its parameters; no weights are needed."""
    family = family_of_module(model)
    shapes = family.shapes(model)
    kernels = linen.targets(model, shapes, *family.inputs())
    return kernels, parameters(shapes, kernels)


def planned_sites(
    options: AdapterOptions, model: nn.Module, trunk: Sequence[str] = ()
) -> tuple[Site, ...]:
    """Which method adapts which kernel of a model; no weights are needed.

    ``trunk`` are the top modules beside which a head is trained whole, unless ``modules_to_save``
    says what is. A kernel of that head is the method's only where ``target_modules`` names it.
    """
    kernels, everything = all_targets(model)
    head = [t for t in everything if trunk and t.path.split("/")[0] not in trunk]
    return sites_among(options, kernels, everything, head)


def sites_among(
    options: AdapterOptions,
    kernels: Sequence[Target],
    everything: Sequence[Target],
    head: Sequence[Target] = (),
) -> tuple[Site, ...]:
    """The same where it is known what there is: the kernels, all parameters, those of the head."""
    method = options.adapter_method()
    from_these = everything if method.adapts_any_array else kernels
    chosen = select(from_these, options.include(), options.exclude_modules)
    if save := options.modules_to_save:
        whole = select(everything, one_or_names(save))
    else:
        named = chosen if options.target_modules else ()
        whole = tuple(target for target in head if target not in named)
        chosen = tuple(target for target in chosen if target not in whole)
    if options.budget is None:
        return plan(method, chosen, options.parsed_overrides(), whole)
    sites = (*within(method, chosen, options.budget), *plan(method, (), {}, whole))
    check(sites)
    return sites
