"""Records to token sequences, each with a mask of the tokens whose prediction is trained.

Three forms, told apart by ``fields.Fields``:

- **text**: ``bos text eos``; loss on every token.
- **prompt and completion**: ``bos prompt separator completion eos``; loss on the completion and
  eos only. The prompt (with its separator) and the completion are tokenised apart and joined, so
  that no token straddles the border and a prompt at generation gives the very same tokens.
- **messages**: a list of ``{"role": ..., "content": ...}``, written by the tokenizer's chat
  template and by nothing else: the template has its own bos and end-of-turn tokens, and is given
  the record's ``tools``, if any. Loss on the assistant's turns and what closes them (see
  ``chat.assistant_spans``); where prompt and completion are lists of messages, on those of the
  completion only.

bos and eos are those of the tokenizer, where it has them. The first token of a sequence is
predicted from nothing, so it never counts in the loss.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lora_mini_jax.data.conversations import conversations
from lora_mini_jax.data.encoded import Encoded, Limits, Overlong, in_parts, joined
from lora_mini_jax.data.fields import Fields, strings
from lora_mini_jax.data.files import Record, place
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError


class Example(NamedTuple):
    """One sequence: ``tokens`` (n,) int32, and ``loss_mask`` (n,) bool.

    ``loss_mask[i]`` says whether the prediction *of* token ``i`` (from those before it) counts.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)

    def cut(self, max_length: int) -> "Example | None":
        """Its first tokens; None where none of them has a loss."""
        example = Example(self.tokens[:max_length], self.loss_mask[:max_length])
        return example if example.loss_mask.any() else None


def encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    max_length: int,
    overlong: Overlong = "skip",
    source: str = "records",
) -> Encoded:
    """The records as examples of at most ``max_length`` tokens.

    Args:
        records: as from ``read_records``; all of one form.
        tokenizer: as from ``load_tokenizer``.
        fields: where the text is.
        max_length: the most tokens an example may have, at least 2.
        overlong: what to do with a longer one: ``"skip"`` it, ``"truncate"`` it at its end, or
            raise an ``"error"``. An example that has no token with loss (any more) is skipped.
        source: what error messages call the records, such as their file.

    Raises:
        UserError: no records, a field that is missing or holds no text (the message names the
            record, counted from 1), an overlong example if so asked, or nothing left at all.

    Example:
        >>> import tokenizers
        >>> words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
        >>> tokenizer = Tokenizer(tokenizers.Tokenizer(words), None, None, 2, None, {})
        >>> fields = Fields(prompt_field="q", completion_field="r", separator="")
        >>> encode_records([{"q": "a", "r": "b"}], tokenizer, fields, max_length=8).examples
        [Example(tokens=array([0, 1], dtype=int32), loss_mask=array([False,  True]))]
    """
    stream = encode_stream(
        records, tokenizer, fields, max_length=max_length, overlong=overlong, source=source
    )
    return joined(stream)


def encode_stream(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    fields: Fields,
    *,
    max_length: int,
    overlong: Overlong = "skip",
    source: str = "records",
) -> Iterator[Encoded]:
    """`encode_records` in parts, of a hundred records or so, so that none is held for long.

    Raises:
        UserError: as there; that nothing is left shows at the end.
    """

    def encode(chunk: Sequence[Record], fields: Fields, first: int) -> list[Example]:
        return _sequences(chunk, tokenizer, fields, source, first)

    limits = Limits(max_length, overlong)
    return in_parts(records, fields, encode, Example.cut, limits, source)


def _sequences(
    records: Sequence[Record], tokenizer: Tokenizer, fields: Fields, source: str, first: int
) -> list[Example]:
    """The records as sequences of any length; ``first`` is the number of the first of them."""
    if names := fields.chats(records[0]):
        return _chats(records, tokenizer, names, source, first)
    if fields.prompt_field is not None and fields.completion_field is not None:
        prompts = strings(records, fields.prompt_field, source, first)
        completions = strings(records, fields.completion_field, source, first)
        prompts = [prompt + fields.separator for prompt in prompts]
        return _completions(prompts, completions, tokenizer)
    texts = strings(records, fields.text_field or "text", source, first)
    return _completions(None, texts, tokenizer)


def _completions(
    prompts: list[str] | None, completions: list[str], tokenizer: Tokenizer
) -> list[Example]:
    """Examples of the first two forms: a text is a completion that has no prompt."""
    before = [[]] * len(completions) if prompts is None else tokenizer.encode_batch(prompts)
    examples = []
    for prompt, completion in zip(before, tokenizer.encode_batch(completions), strict=True):
        given = tokenizer.opening + prompt
        answer = completion + tokenizer.closing
        examples.append(_example(given + answer, [False] * len(given) + [True] * len(answer)))
    return examples


def _chats(
    records: Sequence[Record], tokenizer: Tokenizer, names: Sequence[str], source: str, first: int
) -> list[Example]:
    examples = []
    for number, (messages, tools, since) in enumerate(
        conversations(records, names, source, first), first
    ):
        try:
            encoded = tokenizer.encode_chat(messages, tools=tools, since=since)
            examples.append(_example(*encoded))
        except UserError as error:
            where = place(records[number - first], number)
            raise UserError(f"{source}, {where}: {error}") from error
    return examples


def _example(ids: list[int], mask: list[bool]) -> Example:
    loss_mask = np.array(mask, bool)
    loss_mask[:1] = False
    return Example(np.array(ids, np.int32), loss_mask)
