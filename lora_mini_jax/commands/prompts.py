"""What `generate` is asked: words of the command line, or records with a prompt in each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_mini_jax.data import Tokenizer, read_records
from lora_mini_jax.data.conversations import Conversation, conversations
from lora_mini_jax.data.fields import strings
from lora_mini_jax.data.files import Record, place
from lora_mini_jax.data.pairs import source_ids
from lora_mini_jax.errors import UserError
from lora_mini_jax.options import Generate

TEXTS, CHATS = ("prompt", "text"), ("messages", "conversations")
"""The fields of a record in which a prompt is looked for, in this order."""


class Prompt(NamedTuple):
    """What the model reads, and the text that is shown before what it writes: of answers none."""

    ids: list[int]
    before: str = ""


def read_prompts(options: Generate, tokenizer: Tokenizer, answers: bool) -> list[Prompt]:
    """The prompts, in their order; ``answers`` says that the model is a T5, which reads sources.

    Raises:
        UserError: data that cannot be read, a record without a prompt, or one that the chat
            template does not take.
    """
    if options.chat:
        return [Prompt(ids) for ids in _chats(options, tokenizer)]
    texts = _texts(options.prompts) if options.prompts else options.prompt
    if answers:
        return [Prompt(ids) for ids in source_ids(tokenizer, texts)]
    return [Prompt(tokenizer.prompt(text), text) for text in texts]


def _texts(source: str) -> list[str]:
    records = read_records(source)
    return [
        strings([record], _field(record, TEXTS, source, number), source, number)[0]
        for number, record in enumerate(records, 1)
    ]


def _chats(options: Generate, tokenizer: Tokenizer) -> Iterator[list[int]]:
    source = options.prompts
    if source is None:
        for text in options.prompt:
            yield _asked(_said(text), options.system, tokenizer)
        return
    for number, record in enumerate(read_records(source), 1):
        talk = _talk(record, _field(record, (*CHATS, *TEXTS), source, number), source, number)
        try:
            yield _asked(talk, options.system, tokenizer)
        except UserError as error:
            raise UserError(f"{source}, {place(record, number)}: {error}") from error


def _talk(record: Record, field: str, source: str, number: int) -> Conversation:
    """A record's messages, or its text as what the user says."""
    if field in CHATS or isinstance(record[field], list):
        return conversations([record], [field], source, number)[0]
    return _said(*strings([record], field, source, number))


def _said(text: str) -> Conversation:
    return Conversation([{"role": "user", "content": text}])


def _asked(talk: Conversation, system: str | None, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation that the assistant is to go on with."""
    if talk.messages[-1]["role"] == "assistant":
        raise UserError("the last message is the assistant's, and it is to write the next one: end "
                        "with what it is asked")  # fmt: skip
    if system is None:
        return tokenizer.chat_prompt(talk.messages, tools=talk.tools)
    if talk.messages[0]["role"] == "system":
        raise UserError("it has a system's message of its own: leave --system out")
    first = {"role": "system", "content": system}
    return tokenizer.chat_prompt([first, *talk.messages], tools=talk.tools)


def _field(record: Record, names: Sequence[str], source: str, number: int) -> str:
    found = next((name for name in names if name in record), None)
    if found is None:
        there = ", ".join(map(str, record)) or "none"
        raise UserError(f"{source}, {place(record, number)}: no field {' or '.join(names)} (its "
                        f"fields: {there}): call the one with the prompt so")  # fmt: skip
    return found
