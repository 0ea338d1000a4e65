"""What a training run works on: model, data and loss, read and checked up front.

`Task` is what all kinds have in common; a file for each kind makes and measures it:
`language_task` for text that is continued, `seq2seq_task` for sources that are answered, and
`label_task` for texts that have a class or a number.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_mini_jax import linen, sharding
from lora_mini_jax.adapter import Adapter
from lora_mini_jax.budget import within
from lora_mini_jax.data import Batches, Tokenizer, read_glue
from lora_mini_jax.data.cache import cache_folder, prepared
from lora_mini_jax.data.files import Record
from lora_mini_jax.data.recipe import Part, Recipe
from lora_mini_jax.data.records import Records, held_out, open_records
from lora_mini_jax.errors import UserError
from lora_mini_jax.models.families import family_of_module
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.models.t5 import T5
from lora_mini_jax.options import AdapterOptions, Finetune, one_or_names
from lora_mini_jax.plan import Site, check, plan
from lora_mini_jax.selection import select
from lora_mini_jax.tree import Target, parameters

HELD_OUT_SHARE = 0.05


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
    from lora_mini_jax import label_task, language_task, seq2seq_task  # which build on this file

    if options.task != "language":
        return label_task
    return seq2seq_task if type(load_module(options.model)) is T5 else language_task


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


def read_rows(options: Finetune, recipe: Recipe) -> tuple[Part, Part]:
    """Training and held-out rows, from the cache where they are in it.

    Raises:
        UserError: data that cannot be used; a cache that cannot be written.
    """
    cache = cache_folder(options.cache_dir)
    train, valid = (
        prepared(records, recipe, source=source, cache=cache, examples=bool(number))
        for number, (records, source) in enumerate(
            zip(_streams(options), sources(options), strict=True)
        )
    )
    return train, valid


def read_data(options: Finetune) -> tuple[list[Record], list[Record]]:
    """Training and held-out records, in memory."""
    glue, valid = options.glue, options.valid or options.data
    if glue is None or (not options.valid and Path(options.data).is_file()):
        streams = _streams(options)
        return list(streams[0]), list(streams[1])

    def records(source: str, split: str, limit: int | None) -> list[Record]:
        if Path(source).is_file():
            return list(open_records(source, limit=limit))
        return read_glue(glue, source, split, limit)

    train = records(options.data, "train", options.max_train_examples)
    return train, records(valid, "validation", options.max_valid_examples)


def _streams(options: Finetune) -> tuple[Records, Records]:
    """Training and held-out records. Without held-out data, the end of the training data."""
    if not options.data:
        raise UserError("no training data: give --data, a file, folder or hub id")
    train = open_records(options.data, limit=options.max_train_examples)
    limit = options.max_valid_examples
    if options.valid:
        return train, open_records(options.valid, split="validation", limit=limit)
    return held_out(train, HELD_OUT_SHARE, limit, options.data)


def sources(options: Finetune) -> tuple[str, str]:
    """What error messages call the training and the held-out data."""
    train = options.data or f"GLUE's {options.glue}"
    return train, options.valid or train


def check_ids(tokenizer: Tokenizer, vocab_size: int, top: int) -> None:
    """Raise `UserError` unless the model knows the largest id of the data."""
    if top >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {top} (it has {tokenizer.vocab_size}), but the model's "
            f"vocabulary has {vocab_size}: use the tokenizer that belongs to the model"
        )
