"""What a training run works on: model, tokenizer and packed data, read and checked up front."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax import linen
from lora_mini_jax.adapter import Adapter
from lora_mini_jax.budget import within
from lora_mini_jax.data import (
    Batches,
    Encoded,
    Packed,
    Tokenizer,
    encode_records,
    examples_right,
    load_tokenizer,
    pack,
    read_records,
    token_loss,
)
from lora_mini_jax.errors import UserError
from lora_mini_jax.models import Llama, LlamaConfig, load
from lora_mini_jax.models.hub import load_decoder_config, resolve
from lora_mini_jax.options import AdapterOptions, Finetune, one_or_names
from lora_mini_jax.plan import Site, check, plan
from lora_mini_jax.selection import select
from lora_mini_jax.tree import Target, parameters

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Task:
    """A model with its tokenizer, its data, and the kernels that are to be adapted."""

    model: Llama
    params: Any
    tokenizer: Tokenizer
    sites: tuple[Site, ...]
    train: Batches
    valid: Batches
    prompts: list[list[int]]
    """Token ids of the first held-out prompts, for samples."""
    notes: list[str]
    """What was left out of the data, in words."""

    @cached_property
    def apply(self) -> Any:
        """The adapted call of the model."""
        return linen.adapt(self.model)

    def loss(self, params: Any, adapter: Adapter, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        """Mean loss over the batch's tokens that count (0 where none does), and their number."""
        total, number = self.summed_loss(params, adapter, batch, key)
        return total / jnp.maximum(number, 1), number

    def summed_loss(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """The summed loss of a batch and the number of tokens that count, float32."""
        return token_loss(self.logits(params, adapter, batch, dropout_key), batch)

    def score(self, params: Any, adapter: Adapter, batch: Any) -> tuple[Any, ...]:
        """Summed loss, tokens that count, examples that are right, examples; float32."""
        logits = self.logits(params, adapter, batch)
        return *token_loss(logits, batch), *examples_right(logits, batch)

    def logits(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """(rows, length, vocabulary) float32."""
        inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
        return self.apply(params, adapter, *inputs, dropout_key=dropout_key)


def prepare(options: Finetune) -> Task:
    """Read everything a run needs; whatever is wrong with it shows here, before any training.

    Raises:
        UserError: a model, tokenizer or data file that cannot be used, or kernels that the method
            cannot adapt.
    """
    if not options.data:
        raise UserError("no training data: give --data, a file, folder or hub id")
    folder = resolve(options.model)
    config = load_decoder_config(folder)
    check_length(options.max_length, config)
    sites = planned_sites(options, Llama(config))
    tokenizer = load_tokenizer(folder)
    train, valid = _encode(options, tokenizer)
    _check_ids(tokenizer, config.vocab_size, train, valid)
    dtype = jnp.dtype(options.dtype)
    model, params = load(folder, dtype=dtype, remat=options.remat)
    batches = [
        Batches(_pack(encoded, options), options.batch_size, options.seed)
        for encoded in (train, valid)
    ]
    notes = [*_notes(train, "training", options), *_notes(valid, "held-out", options)]
    prompts = _prompts(valid, options)
    return Task(model, params, tokenizer, sites, batches[0], batches[1], prompts, notes)


def check_length(max_length: int, config: LlamaConfig) -> None:
    """Raise `UserError` unless rows of this length fit the model."""
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {max_length} exceeds the {config.max_position_embeddings} "
            "positions of the model"
        )


def all_targets(model: nn.Module) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    """The kernels of a model, and all its parameters; no weights are needed."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    kernels = linen.targets(model, shapes, tokens)
    return kernels, parameters(shapes, kernels)


def planned_sites(options: AdapterOptions, model: nn.Module) -> tuple[Site, ...]:
    """Which method adapts which kernel of a model; no weights are needed."""
    kernels, everything = all_targets(model)
    method = options.adapter_method()
    from_these = everything if method.adapts_any_array else kernels
    chosen = select(from_these, options.include(), options.exclude_modules)
    save = options.modules_to_save
    whole = select(everything, one_or_names(save)) if save else ()
    if options.budget is None:
        return plan(method, chosen, options.parsed_overrides(), whole)
    sites = (*within(method, chosen, options.budget), *plan(method, (), {}, whole))
    check(sites)
    return sites


def _encode(options: Finetune, tokenizer: Tokenizer) -> tuple[Encoded, Encoded]:
    """Training and held-out examples. Without held-out data, the end of the training data."""
    records = read_records(options.data, split="train", limit=options.max_train_examples)
    if options.valid:
        held_out = read_records(options.valid, split="validation", limit=options.max_valid_examples)
    else:
        n = max(1, round(len(records) * HELD_OUT_SHARE))
        if len(records) < 2:
            raise UserError(f"{options.data} has one record: give --valid, or more data")
        records, held_out = records[:-n], records[-n:][: options.max_valid_examples]
    encoded = [
        encode_records(
            rows,
            tokenizer,
            options.record_fields(),
            max_length=options.max_length,
            overlong=options.overlong,
            source=source,
        )
        for rows, source in ((records, options.data), (held_out, options.valid or options.data))
    ]
    return encoded[0], encoded[1]


def _check_ids(tokenizer: Tokenizer, vocab_size: int, *encoded: Encoded) -> None:
    top = max(int(e.tokens.max()) for part in encoded for e in part.examples)
    if top >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {top} (it has {tokenizer.vocab_size}), but the model's "
            f"vocabulary has {vocab_size}: use the tokenizer that belongs to the model"
        )


def _pack(encoded: Encoded, options: Finetune) -> Packed:
    return pack(encoded.examples, options.max_length, packing=options.packing)


def _notes(encoded: Encoded, name: str, options: Finetune) -> list[str]:
    counts = {"skipped": encoded.skipped, "cut": encoded.truncated}
    return [
        f"{count} {name} examples were {what}: longer than {options.max_length} tokens, or with "
        "nothing to learn in them"
        for what, count in counts.items()
        if count
    ]


def _prompts(encoded: Encoded, options: Finetune) -> list[list[int]]:
    """The start of a few held-out examples: what comes before the first token with a loss; of a
    text, which has loss everywhere, the first few tokens."""
    room = options.max_length - options.max_new_tokens
    prompts = []
    for example in encoded.examples[:: max(1, len(encoded.examples) // max(1, options.samples))]:
        first = int(np.argmax(example.loss_mask))
        cut = first if first > 2 else min(12, len(example.tokens) - 1)
        if 0 < cut <= room:
            prompts.append(example.tokens[:cut].tolist())
    return prompts[: options.samples]
