"""Conversations out of records, checked, in the form that chat templates read.

A message is ``{"role": ..., "content": ...}``, its content text or a list of parts
``{"type": "text", "text": ...}``; an assistant's may have ``tool_calls`` and no content. ShareGPT's
``{"from": "human", "value": ...}`` is read as that. Whatever else a message has, templates get too.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_mini_jax.data.fields import is_text, values_of
from lora_mini_jax.data.files import Record, place
from lora_mini_jax.data.template import Message, Tools
from lora_mini_jax.errors import UserError

TOOLS = "tools"
"""The field of what the assistant may call, beside the messages."""
SYSTEM = "system"
"""The field of the system's message, which ShareGPT's form may have beside the others."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system", "tool": "tool", "function": "tool"}  # fmt: skip
_FORM = 'write {"role": "user", "content": "..."}'


class Conversation(NamedTuple):
    """What is said, and with it the tools that may be called."""

    messages: list[Message]
    tools: Tools = None
    since: int = 0
    """The first message that may have a loss: those before it are a prompt."""


def conversations(
    records: Sequence[Record], fields: Sequence[str], source: str, first: int = 1
) -> list[Conversation]:
    """The conversation in every record; ``first`` is the number of the first of them.

    Args:
        records: as from ``read_records``.
        fields: the field of the messages, or those of a prompt and of a completion, which go on
            from each other.
        source: what error messages call the records.
        first: the number of the first of the records.

    Raises:
        UserError: a record without a field, or with no list of messages in it, or with tools that
            are no list of objects.

    Example:
        >>> conversations([{"m": [{"role": "user", "content": "Hi"}]}], ["m"], "chats.jsonl")
        [Conversation(messages=[{'role': 'user', 'content': 'Hi'}], tools=None, since=0)]
    """
    found = []
    values = zip(*(values_of(records, field, source, first) for field in fields), strict=True)
    for number, (record, lists) in enumerate(zip(records, values, strict=True), first):
        where = f"{source}, {place(record, number)}"
        lists = [
            _messages(value, f"{where}, field {field!r}", record if field == fields[0] else {})
            for field, value in zip(fields, lists, strict=True)
        ]
        messages = [message for each in lists for message in each]
        tools = _tools(record.get(TOOLS), f"{where}, field {TOOLS!r}")
        found.append(Conversation(messages, tools, sum(map(len, lists[:-1]))))
    return found


def _messages(messages: Any, where: str, record: Record) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {messages!r:.60} is not a list of messages: give one or more")
    found = [_message(each, f"{where}, message {i}") for i, each in enumerate(messages, 1)]
    system = record.get(SYSTEM)
    beside = isinstance(messages[0], dict) and "from" in messages[0] and is_text(system) and system
    if beside and found[0]["role"] == "system":
        raise UserError(f"{where}: the first message is the system's, and so is the field "
                        f"{SYSTEM!r}: leave one of them out")  # fmt: skip
    return [{"role": "system", "content": system}, *found] if beside else found


def _message(message: Any, where: str) -> Message:
    if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
        message = _of_sharegpt(message, where)
    if not isinstance(message, dict) or not is_text(message.get("role")):
        raise UserError(f"{where}: {message!r:.60} has no role that is text: {_FORM}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    called = message["role"] == "assistant" and message.get("tool_calls") and content is None
    if not (is_text(content) or parts or called):
        raise UserError(f"{where}: {message!r:.60} has no content that is text: {_FORM}")
    for part in parts:
        told = isinstance(part, dict) and part.get("type") == "text" and is_text(part.get("text"))
        if not told:
            raise UserError(f"{where}: its part {part!r:.60} is no text, and only text is read: "
                            'write {"type": "text", "text": "..."}')  # fmt: skip
    return message


def _of_sharegpt(message: dict[str, Any], where: str) -> Message:
    """``{"from": "human", "value": ...}`` as templates know it."""
    if message["from"] not in [*_ROLES]:  # it may be anything, also what no dictionary can look up
        raise UserError(f"{where}: it is from {message['from']!r:.60}, and known are "
                        f"{', '.join(_ROLES)}: {_FORM}")  # fmt: skip
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _ROLES[message["from"]], "content": message["value"], **rest}


def _tools(tools: Any, where: str) -> Tools:
    """The tools of a record: a list of objects, or that as JSON, for tables cannot hold objects
    that differ."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UserError(
                f"{where}: {tools!r:.60} is not JSON: write a list of objects"
            ) from None
    if tools is None or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: {tools!r:.60} is no list of objects: write the JSON Schemas of "
                        "what may be called, or leave it out")  # fmt: skip
    return tools
