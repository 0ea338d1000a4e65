"""The data that a run's options name: training and held-out records, and rows made of them."""

from functools import partial
from pathlib import Path
from typing import Any

from lora_mini_jax.data import Batches, Tokenizer, read_glue
from lora_mini_jax.data.cache import cache_folder, prepared
from lora_mini_jax.data.files import Record
from lora_mini_jax.data.recipe import Part, Recipe
from lora_mini_jax.data.records import Records, held_out, open_records, validation_split
from lora_mini_jax.errors import UserError
from lora_mini_jax.options import Finetune, Training
from lora_mini_jax.tasks.devices import Devices

HELD_OUT_SHARE = 0.05


def own_split(options: Finetune) -> str:
    """The split of the training data that is held out: its own, where it has one for that and
    nothing else is given to hold out; else "".

    Raises:
        UserError: a data set that cannot be loaded.
    """
    chosen = options.valid or options.glue  # GLUE's tasks know their splits
    return "" if chosen or not options.data else validation_split(options.data)


def held_out_notes(options: Finetune, split: str) -> list[str]:
    """That a split of the data's own is held out, in words."""
    return [f"held out: {sources(options, split)[1]}"] if split else []


def read_rows(options: Finetune, recipe: Recipe, split: str = "") -> tuple[Part, Part]:
    """Training and held-out rows, from the cache where they are in it.

    ``split`` is what `own_split` says; without it, and without other held-out data, the end of the
    training data is held out.

    Raises:
        UserError: data that cannot be used; a cache that cannot be written.
    """
    cache = cache_folder(options.cache_dir)
    train, valid = (
        prepared(records, recipe, source=source, cache=cache, examples=bool(number))
        for number, (records, source) in enumerate(
            zip(_streams(options, split), sources(options, split), strict=True)
        )
    )
    return train, valid


def read_data(options: Finetune, split: str = "") -> tuple[list[Record], list[Record]]:
    """Training and held-out records, in memory; ``split`` as for `read_rows`."""
    glue, valid = options.glue, options.valid or options.data
    if glue is None or (not options.valid and Path(options.data).is_file()):
        streams = _streams(options, split)
        return list(streams[0]), list(streams[1])

    def records(source: str, split: str, limit: int | None) -> list[Record]:
        if Path(source).is_file():
            return list(open_records(source, limit=limit))
        return read_glue(glue, source, split, limit)

    train = records(options.data, "train", options.max_train_examples)
    return train, records(valid, "validation", options.max_valid_examples)


def _streams(options: Finetune, split: str) -> tuple[Records, Records]:
    """Training and held-out records."""
    if not options.data:
        raise UserError("no training data: give --data, a file, folder or hub id")
    train = open_records(options.data, limit=options.max_train_examples)
    limit = options.max_valid_examples
    if options.valid:
        named = validation_split(options.valid) or "validation"
        return train, open_records(options.valid, split=named, limit=limit)
    if split:
        return train, open_records(options.data, split=split, limit=limit)
    return held_out(train, HELD_OUT_SHARE, limit, options.data)


def sources(options: Finetune, split: str = "") -> tuple[str, str]:
    """What error messages call the training and the held-out data."""
    train = options.data or f"GLUE's {options.glue}"
    return train, options.valid or (f"the {split} split of {train}" if split else train)


def in_batches(options: Training, *parts: Any) -> tuple[Batches, ...]:
    """Rows of training and held-out data, each in batches, which are no larger than need be: rows
    of padding take as much memory and time as others."""
    sized = partial(Devices.of(options).batch_size, options.batch_size, parts=options.accumulate)
    return tuple(Batches(rows, sized(len(rows.tokens)), options.seed) for rows in parts)


def batch_notes(options: Training, train: Batches) -> list[str]:
    """That batches are smaller than was asked for, in words."""
    if train.batch_size == options.batch_size:
        return []
    return [f"batches have {train.batch_size} rows and not {options.batch_size}: there are "
            f"{len(train.packed.tokens)}"]  # fmt: skip


def check_ids(tokenizer: Tokenizer, vocab_size: int, top: int) -> None:
    """Raise `UserError` unless the model knows the largest id of the data."""
    if top >= vocab_size:
        raise UserError(
            f"the tokenizer gives id {top} (it has {tokenizer.vocab_size}), but the model's "
            f"vocabulary has {vocab_size}: use the tokenizer that belongs to the model"
        )
