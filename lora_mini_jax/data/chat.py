"""Chat templates: Jinja in, text out, and which stretches of that text the assistant wrote.

Templates are rendered as ``transformers`` renders them: in Jinja's sandbox, with ``trim_blocks``,
``lstrip_blocks``, loop controls, ``raise_exception``, ``strftime_now``, a plain ``tojson``, and
``{% generation %}`` blocks. Positions are characters of the rendered text, ends exclusive.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lora_mini_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

# Two of Unicode's noncharacters, which it keeps for a program's own marks: no text has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


def render_chat(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text.

    Args:
        template: the Jinja source, as a tokenizer's ``chat_template``.
        messages: ``{"role": ..., "content": ...}`` each, in order.
        special_tokens: names a template may use, as ``{"bos_token": "<s>"}``.
        add_generation_prompt: end with the opening of an assistant turn, to be written on.

    Raises:
        UserError: the template is not valid Jinja, or it refuses these messages.

    Example:
        >>> render_chat("{{ messages[0].content }}{{ eos_token }}",
        ...             [{"role": "user", "content": "Hi"}], {"eos_token": "</s>"})
        'Hi</s>'
    """
    text = _render(template, messages, special_tokens, add_generation_prompt)
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def assistant_spans(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str]
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it the assistant's turns stand.

    A template with ``{% generation %}`` blocks says so itself. For any other, turn ``i`` is what
    the text of ``messages[:i + 1]`` adds to that of ``messages[:i]`` with the generation prompt:
    the answer and what closes it (``</s>``, ``<|im_end|>``), but not the header before it. This
    holds only where a conversation's text begins with the text of its own beginning; where a
    template rewrites earlier turns (some drop old reasoning) the error below is raised, for a
    guess would train on the wrong tokens in silence.

    Raises:
        UserError: as ``render_chat``, or the template rewrites earlier turns.

    Example:
        >>> assistant_spans("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}",
        ...                 [{"role": "user", "content": "1+1"},
        ...                  {"role": "assistant", "content": "2"}], {})
        ('user:1+1;assistant:2;', [(9, 21)])
    """

    def rendered(count: int, prompt: bool = False) -> str:
        return _render(template, messages[:count], special_tokens, prompt)

    full = rendered(len(messages))
    if _OPEN in full:
        return _marked_spans(full)
    if re.search(r"{%-?\s*generation\b", template):
        return full, []
    spans = [
        _turn_span(rendered, turn, full)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return full, spans


def _turn_span(rendered: Callable[..., str], turn: int, full: str) -> tuple[int, int]:
    # Most templates look at messages[0], so an empty conversation cannot be rendered.
    before = rendered(turn) if turn else ""
    through = rendered(turn + 1)
    if not (full.startswith(through) and through.startswith(before)):
        raise UserError(
            f"the chat template writes message {turn + 1} differently when more messages follow, "
            "so the assistant's tokens cannot be told: put {% generation %} and "
            "{% endgeneration %} around the assistant's text in the template"
        )
    # A prompt may go on beyond the common header (an opened <think>, say): take what is shared.
    header = rendered(turn, True) if turn else ""
    pairs = zip(header, through, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(len(before), shared), len(through)


def _marked_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    plain, spans = "", []
    head, *blocks = text.split(_OPEN)
    plain += head
    for block in blocks:
        inside, _, after = block.partition(_CLOSE)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return plain, spans


def _render(
    template: str, messages: Sequence[Message], special_tokens: Mapping[str, str], prompt: bool
) -> str:
    from jinja2 import TemplateError

    # A template is a small program from a model's folder: it can fail as any program can.
    try:
        return _compiled(template).render(
            special_tokens, messages=messages, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"the chat template does not take these messages ({one_line(error)}): "
            "change their roles and order, or the template"
        ) from error


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
            marks = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
            start, end = (mark.set_lineno(line) for mark in marks)
            return [start, *body, end]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    functions = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template, globals=functions)
