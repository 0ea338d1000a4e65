"""A chat template: a small program in Jinja, from a model's folder, that writes a conversation.

It runs as ``transformers`` runs it: in Jinja's sandbox, with ``trim_blocks``, ``lstrip_blocks``,
loop controls, ``raise_exception``, ``strftime_now``, a plain ``tojson``, and ``{% generation %}``
blocks. What it writes in such a block stands between the marks `OPEN` and `CLOSE`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_mini_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]] | None
"""JSON Schemas of what the assistant may call."""

# Two of Unicode's noncharacters, which it keeps for a program's own marks: no text has them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def render(
    template: str,
    messages: Sequence[Message],
    tools: Tools,
    special_tokens: Mapping[str, str],
    prompt: bool,
) -> str:
    """The conversation as text, marks included; ``prompt`` opens an assistant's turn at its end.

    Raises:
        UserError: the template is not valid Jinja, refuses this conversation, or knows nothing of
            the tools in it.
    """
    from jinja2 import TemplateError

    _check_known(template, messages, tools)
    # A template is a small program from a model's folder: it can fail as any program can.
    try:
        given = {"messages": _as_read(template, messages), "tools": tools, "documents": None}
        text = _compiled(template).render(special_tokens, **given, add_generation_prompt=prompt)
        text.encode()  # JSON can spell half a surrogate pair, in a tool's name say
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"the chat template does not take these messages ({one_line(error)}): "
            "change their roles and order, or the template"
        ) from error
    return text


def _check_known(template: str, messages: Sequence[Message], tools: Tools) -> None:
    """Raise `UserError` for what a template has no word for, and so would leave out in silence."""
    calls = any(message.get("tool_calls") for message in messages)
    for name, given in {"tools": tools, "tool_calls": calls}.items():
        if given and not _has(template, rf"\b{name}\b"):
            raise UserError(
                f"this conversation has {name}, and the chat template writes none: take a model or "
                f"a template that knows {name}, or leave them out of the data"
            )


def _as_read(template: str, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with parts of text joined, unless the template takes the text out of them."""
    if _has(template, r"""(\.|\[\s*['"])text\b"""):
        return messages
    return [_joined(message) for message in messages]


@lru_cache(maxsize=32)
def _has(template: str, pattern: str) -> bool:
    """Whether a template has this somewhere, comments apart, which write nothing. It is asked for
    every turn of every conversation."""
    return re.search(pattern, re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)) is not None


def _joined(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


@lru_cache(maxsize=8)
def _compiled(template: str) -> "Template":
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: the assistant's text, kept between two marks."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = (nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE))
            start, end = (mark.set_lineno(line) for mark in marks)
            return [start, *body, end]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        how: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template, globals=functions)
