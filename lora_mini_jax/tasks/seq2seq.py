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
from lora_mini_jax.models.hub import load_config
from lora_mini_jax.options import Finetune
from lora_mini_jax.tasks.language import LanguageTask, spread


@dataclass(frozen=True, eq=False)
class Seq2SeqTask(LanguageTask):
    """A T5 with its tokenizer; ``prompts`` are sources. What else there is, see `LanguageTask`."""

    @classmethod
    def config(cls, options: Finetune, folder: Path) -> Any:
        """The model's config; `UserError` where the options are not for it."""
        if options.separator != Finetune.separator:
            raise UserError(f"--separator {options.separator!r} goes between prompt and completion "
                            "in one text, and a T5 reads them apart: leave it out")  # fmt: skip
        return load_config(folder)

    @classmethod
    def recipe(cls, options: Finetune, config: Any, tokenizer: Tokenizer, folder: Path) -> Recipe:
        """How records become rows."""
        fields = options.record_fields()
        start, pad = config.decoder_start_token_id, config.pad_token_id
        fit = {"max_length": options.max_length, "overlong": options.overlong}
        return Recipe(
            partial(pair_stream, tokenizer=tokenizer, fields=fields, start_id=start, **fit),
            partial(pair_chunks, max_length=options.max_length, pad_id=pad),
            Pair,
            PairRows,
            {"rows": "pairs", "start_id": start, "pad_id": pad, "fields": asdict(fields), **fit},
            folder,
        )

    @classmethod
    def prompts_of(cls, valid: Part, options: Finetune, config: Any) -> list[list[int]]:
        """A few held-out sources."""
        pairs = spread(valid.examples, options.samples)[: options.samples]
        return [pair.source.tolist() for pair in pairs]

    def inputs(self, batch: Any) -> tuple[Any, ...]:
        """What the encoder reads, and the decoder."""
        return batch["source"], batch["tokens"], batch["source_mask"]

    def text(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """An answer, which is a text of its own."""
        return self.tokenizer.decode(ids)
