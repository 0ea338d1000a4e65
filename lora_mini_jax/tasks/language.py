"""Text that is continued: the task of a decoder, with packed rows and a loss token by token."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from lora_mini_jax.adapters.adapter import Adapter
from lora_mini_jax.adapters.sites import Site
from lora_mini_jax.data import (
    Example,
    Packed,
    Tokenizer,
    examples_right,
    load_tokenizer,
    next_tokens,
    summed,
)
from lora_mini_jax.data.examples import encode_stream
from lora_mini_jax.data.packing import packed_chunks
from lora_mini_jax.data.recipe import Part, Recipe
from lora_mini_jax.errors import UserError
from lora_mini_jax.generation.generate import generate
from lora_mini_jax.models import load
from lora_mini_jax.models.hub import load_decoder_config, load_module, resolve
from lora_mini_jax.options import Finetune
from lora_mini_jax.scores import Scores
from lora_mini_jax.tasks.data import (
    batch_notes,
    check_ids,
    held_out_notes,
    in_batches,
    own_split,
    read_rows,
)
from lora_mini_jax.tasks.devices import reading
from lora_mini_jax.tasks.sites import planned_sites
from lora_mini_jax.tasks.task import Task

TEXT_PROMPT = 12
"""How many tokens of a text are a prompt."""


@dataclass(frozen=True, eq=False)
class LanguageTask(Task):
    """A decoder with its tokenizer; what else there is, see `Task`."""

    tokenizer: Tokenizer
    prompts: list[list[int]]
    """Token ids of the first held-out prompts, for samples."""
    max_new_tokens: int = 0
    """Tokens in a sample."""

    @classmethod
    def read(cls, options: Finetune) -> Self:
        """See `kinds.prepare`."""
        folder = resolve(options.model)
        config = cls.config(options, folder)
        sites = cls.planned(options)
        tokenizer = load_tokenizer(folder)
        split = own_split(options)
        train, valid = read_rows(options, cls.recipe(options, config, tokenizer, folder), split)
        check_ids(tokenizer, config.vocab_size, max(train.top, valid.top))
        model, params = load(folder, **reading(options, load_module(folder)))
        prompts = cls.prompts_of(valid, options, config)
        batches = in_batches(options, train.rows, valid.rows)
        notes = [*held_out_notes(options, split), *batch_notes(options, batches[0])]
        return cls(
            model,
            params,
            sites,
            *batches,
            notes=notes + notes_of(train, valid, prompts, options),
            tokenizer=tokenizer,
            prompts=prompts,
            max_new_tokens=options.max_new_tokens,
        )

    @classmethod
    def planned(cls, options: Finetune) -> tuple[Site, ...]:
        """See `kinds.planned`."""
        return planned_sites(options, load_module(options.model, scan_layers=options.scan_layers))

    @classmethod
    def config(cls, options: Finetune, folder: Path) -> Any:
        """The model's config; `UserError` where it is not for these options."""
        config = load_decoder_config(folder)
        check_length(options.max_length, config)
        return config

    @classmethod
    def recipe(cls, options: Finetune, config: Any, tokenizer: Tokenizer, folder: Path) -> Recipe:
        """How records become rows."""
        fields, packing = options.record_fields(), options.packing
        fit = {"max_length": options.max_length, "overlong": options.overlong}
        return Recipe(
            partial(encode_stream, tokenizer=tokenizer, fields=fields, **fit),
            partial(packed_chunks, length=options.max_length, packing=packing),
            Example,
            Packed,
            {"rows": "packed", "packing": packing, "fields": asdict(fields), **fit},
            folder,
        )

    @classmethod
    def prompts_of(cls, valid: Part, options: Finetune, config: Any) -> list[list[int]]:
        """The start of a few held-out examples: what comes before the first token with a loss; of a
        text, which has loss everywhere, the first few tokens. Each leaves room for the new ones."""
        room = config.max_position_embeddings - options.max_new_tokens
        prompts = []
        for example in spread(valid.examples, options.samples):
            first = int(np.argmax(example.loss_mask))
            cut = first if first > 2 else min(TEXT_PROMPT, len(example.tokens) - 1)
            if 0 < cut <= room:
                prompts.append(example.tokens[:cut].tolist())
        return prompts[: options.samples]

    @property
    def loss_name(self) -> str:
        """What the loss is, for those who read it."""
        return "loss, nats per token"

    def summed_loss(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """The summed loss of a batch and the number of tokens that count, float32."""
        return summed(self.scores(params, adapter, batch, dropout_key).losses, batch)

    def score(self, params: Any, adapter: Adapter, batch: Any) -> tuple[Any, ...]:
        """Summed loss, tokens that count, examples that are right, examples; float32."""
        found = self.scores(params, adapter, batch)
        return *summed(found.losses, batch), *examples_right(found.right, batch)

    def measures(self, scores: Sequence[Any]) -> dict[str, float]:
        """``valid_loss``, the mean in nats per token that counts, and ``valid_right``, the share
        of examples predicted without a mistake."""
        total, tokens, right, examples = np.sum(np.asarray(scores, np.float64), axis=0)
        return {
            "valid_loss": float(total / max(tokens, 1)),
            "valid_right": float(right / max(examples, 1)),
        }

    def samples(self, adapter: Adapter | None) -> list[tuple[str, str]]:
        """The held-out prompts, and what the model writes after them."""
        pairs = zip(self.prompts, self.complete(adapter), strict=True)
        return [(self.tokenizer.decode(prompt), self.text(prompt, ids)) for prompt, ids in pairs]

    def text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What the ids written after a prompt say."""
        return self.tokenizer.continuation(prompt, ids)

    def complete(self, adapter: Adapter | None) -> list[list[int]]:
        """The token ids that the model writes after each of the prompts, greedily."""
        if not self.prompts:
            return []
        return generate(
            self.model,
            self.params,
            self.prompts,
            adapter=adapter,
            max_new_tokens=self.max_new_tokens,
        )

    def scores(
        self, params: Any, adapter: Adapter, batch: Any, dropout_key: jax.Array | None = None
    ) -> Scores:
        """What the model thinks of every token that follows another; (rows, length)."""
        following = {"labels": next_tokens(batch), "dropout_key": dropout_key}
        return self.apply(params, adapter, *self.inputs(batch), **following)

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What the model reads of a batch."""
        return batch["tokens"], batch["positions"], batch["segment_ids"]


def check_length(max_length: int, config: Any) -> None:
    """Raise `UserError` unless rows of this length fit the model."""
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length {max_length} exceeds the {config.max_position_embeddings} "
            "positions of the model"
        )


def notes_of(train: Part, valid: Part, prompts: Sequence[Any], options: Finetune) -> list[str]:
    """What was left out of the data, or cut, and of the samples, in words."""
    notes, length = [], options.max_length
    for name, part in (("training", train), ("held-out", valid)):
        if part.skipped:
            why = "" if options.overlong == "truncate" else f"longer than {length} tokens, or "
            notes.append(f"{part.skipped} {name} examples were skipped: {why}with nothing to learn "
                         "in them")  # fmt: skip
        if part.truncated:
            notes.append(f"{part.truncated} {name} examples were cut at {length} tokens")
    if len(prompts) < options.samples:
        notes.append(f"{len(prompts)} of {options.samples} samples: of {len(valid.examples)} "
                     "held-out examples, no more have a prompt that leaves room for "
                     f"{options.max_new_tokens} new tokens")  # fmt: skip
    return notes


def spread(examples: Sequence[Any], number: int) -> Sequence[Any]:
    """Examples at equal distances: so many or some more, all where there are fewer."""
    return examples[:: max(1, len(examples) // max(1, number))]
