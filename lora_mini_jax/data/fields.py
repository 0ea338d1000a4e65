"""Which fields of a record hold what, and taking them out, checked, with errors by record.

``source`` is what an error calls the records (their file); it names the line, or counts from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_mini_jax.data.files import Record, place
from lora_mini_jax.errors import UserError


@dataclass(frozen=True)
class Fields:
    """Which fields of a record hold what, and so which form it has. All ``None``: look and see.

    Attributes:
        text_field: the text. With no field named it is ``"text"``, unless records have
            ``"messages"``, or have no such field but ``"conversations"``, or ``"prompt"`` and
            ``"completion"``.
        prompt_field: the prompt, text or a list of messages; goes with ``completion_field``.
        completion_field: the completion, of the same form; goes with ``prompt_field``.
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
        elif "text" not in record and "conversations" in record:
            found = replace(self, messages_field="conversations")
        elif "text" not in record and {"prompt", "completion"} <= record.keys():
            found = replace(self, prompt_field="prompt", completion_field="completion")
        else:
            found = replace(self, text_field="text")
        separate = found.prompt_field and not found.chats(record)
        if not separate and self.separator != Fields.separator:
            raise UserError(f"separator {self.separator!r} goes between prompt and completion, and "
                            "these records have none that are text: leave it out")  # fmt: skip
        return found

    def chats(self, record: Record) -> tuple[str, ...]:
        """The fields of a record's messages, in their order; none where it has text.

        Example:
            >>> Fields(messages_field="talk").chats({"talk": []})
            ('talk',)
        """
        if self.messages_field is not None:
            return (self.messages_field,)
        if self.prompt_field is None or self.completion_field is None:
            return ()
        told = isinstance(record.get(self.prompt_field), list)
        return (self.prompt_field, self.completion_field) if told else ()


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
        if not is_text(value):
            where = f"{source}, {place(records[number - first], number)}"
            raise UserError(
                f"{where}: field {field!r} holds {'null' if value is None else repr(value):.60}, "
                "which is no text: write a string of valid Unicode, or leave the record out"
            )
    return values


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


def is_text(value: object) -> bool:
    """Whether it is a string that a tokenizer takes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes.
        return False
    return True
