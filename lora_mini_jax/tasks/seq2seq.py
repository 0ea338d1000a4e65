"""Sources that are answered with targets: the task of a model with an encoder and a decoder.

The decoder's rows are those of text that is continued, one example each; so are loss and measures.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_mini_jax.data import Tokenizer
from lora_mini_jax.data.pair_rows import PairRows, pair_chunks
from lora_mini_jax.data.pairs import Pair, pair_stream
from lora_mini_jax.data.recipe import Part, Recipe
from lora_mini_jax.errors import UserError
from lora_mini_jax.models.hub import load_config, resolve
from lora_mini_jax.options import Finetune
from lora_mini_jax.tasks.language import LanguageTask, read, spread
from lora_mini_jax.tasks.language import planned as planned


@dataclass(frozen=True, eq=False)
class Seq2SeqTask(LanguageTask):
    """A T5 with its tokenizer; ``prompts`` are sources. What else there is, see `LanguageTask`."""

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What the encoder reads, and the decoder."""
        return batch["source"], batch["tokens"], batch["source_mask"]

    def text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """An answer, which is a text of its own."""
        return self.tokenizer.decode(ids)


def prepare(options: Finetune) -> Seq2SeqTask:
    """See `task.prepare`."""
    if options.separator != Finetune.separator:
        raise UserError(f"--separator {options.separator!r} goes between prompt and completion in "
                        "one text, and a T5 reads them apart: leave it out")  # fmt: skip
    folder = resolve(options.model)
    config = load_config(folder)
    return read(
        Seq2SeqTask,
        options,
        folder,
        config.vocab_size,
        lambda tokenizer: recipe(options, config, tokenizer, folder),
        lambda valid: _sources(valid, options.samples),
    )


def recipe(options: Finetune, config: Any, tokenizer: Tokenizer, folder: Path) -> Recipe:
    """How records become rows."""
    fields, start, pad = options.record_fields(), config.decoder_start_token_id, config.pad_token_id
    fit = {"max_length": options.max_length, "overlong": options.overlong}
    return Recipe(
        partial(pair_stream, tokenizer=tokenizer, fields=fields, start_id=start, **fit),
        partial(pair_chunks, max_length=options.max_length, pad_id=pad),
        Pair,
        PairRows,
        {"rows": "pairs", "start_id": start, "pad_id": pad, "fields": asdict(fields), **fit},
        folder,
    )


def _sources(valid: Part, samples: int) -> list[list[int]]:
    """A few held-out sources."""
    return [pair.source.tolist() for pair in spread(valid.examples, samples)[:samples]]
