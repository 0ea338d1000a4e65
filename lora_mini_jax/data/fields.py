"""Which fields of a record hold what, and taking them out, checked, with errors by record.

``source`` is what an error calls the records (their file); it names the line, or counts from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_mini_jax.data.chat import Message
from lora_mini_jax.data.files import Record, place
from lora_mini_jax.errors import UserError


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what, and so which form it has. All ``None``: look and see.

    Attributes:
        text_field: the text. With no field named, ``"text"``, unless records have ``"messages"``.
        prompt_field: the prompt; goes with ``completion_field``.
        completion_field: the completion; goes with ``prompt_field``.
        messages_field: the list of messages.
        separator: put between prompt and completion, as part of the prompt.

    Raises:
        UserError: fields of two forms, or a prompt without a completion, or the reverse.

    Example:
        >>> Fields(prompt_field="question", completion_field="answer").separator
        '\\n'
    """

    text_field: str | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    separator: str = "\n"

    def __post_init__(self) -> None:
        if (self.prompt_field is None) != (self.completion_field is None):
            given = "prompt_field" if self.completion_field is None else "completion_field"
            raise UserError(f"{given} alone is not allowed: name prompt_field and completion_field")
        named = [
            name
            for name in ("text_field", "prompt_field", "messages_field")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise UserError(
                f"{' and '.join(named)} contradict: name a text field, or a prompt and a "
                "completion field, or a messages field"
            )

    def resolved(self, record: Record) -> "Fields":
        """These fields, with the form that ``record`` shows where none was named.

        Raises:
            UserError: a separator for records that have nothing to separate.
        """
        if self.text_field or self.prompt_field or self.messages_field:
            found = self
        elif "messages" in record:
            found = replace(self, messages_field="messages")
        elif "text" not in record and {"prompt", "completion"} <= record.keys():
            found = replace(self, prompt_field="prompt", completion_field="completion")
        else:
            found = replace(self, text_field="text")
        if found.prompt_field is None and self.separator != Fields.separator:
            raise UserError(f"separator {self.separator!r} goes between prompt and completion, and "
                            "these records have none: leave it out")  # fmt: skip
        return found


def strings(records: Sequence[Record], field: str, source: str, first: int = 1) -> list[str]:
    """The field's text in every record; ``first`` is the number of the first of them.

    Raises:
        UserError: a record without the field, or with something else in it than text.

    Example:
        >>> strings([{"a": "x"}, {"a": "y"}], "a", "pets.csv")
        ['x', 'y']
    """
    values = values_of(records, field, source, first)
    for number, value in enumerate(values, first):
        if not _is_text(value):
            where = f"{source}, {place(records[number - first], number)}"
            raise UserError(
                f"{where}: field {field!r} holds {'null' if value is None else repr(value):.60}, "
                "which is no text: write a string of valid Unicode, or leave the record out"
            )
    return values


def conversations(
    records: Sequence[Record], field: str, source: str, first: int = 1
) -> list[list[Message]]:
    """The field's list of messages in every record; ``first`` is the number of the first of them.

    Raises:
        UserError: a record without the field, or with no list of messages in it that each have a
            ``role`` and a ``content`` of text.

    Example:
        >>> conversations([{"m": [{"role": "user", "content": "Hi"}]}], "m", "chats.jsonl")
        [[{'role': 'user', 'content': 'Hi'}]]
    """
    values = values_of(records, field, source, first)
    for number, messages in enumerate(values, first):
        where = f"{source}, {place(records[number - first], number)}"
        _check_messages(messages, f"{where}, field {field!r}")
    return values


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {messages!r:.60} is not a list of messages: give one or more")
    for number, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not _is_text(message.get(key)):
                raise UserError(
                    f"{where}, message {number}: {message!r:.60} has no {key} that is text: "
                    'write {"role": "user", "content": "..."}'
                )


def values_of(records: Sequence[Record], field: str, source: str, first: int = 1) -> list[Any]:
    """What the field holds in every record; one without it is a `UserError`."""
    for number, record in enumerate(records, first):
        if field not in record:
            there = ", ".join(map(str, record)) or "none"
            raise UserError(
                f"{source}, {place(record, number)}: no field {field!r} (its fields: {there}): "
                "name those to use as text_field, prompt_field and completion_field, or "
                "messages_field; for labels as text_fields and label_field"
            )
    return [record[field] for record in records]


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes.
        return False
    return True
