"""Conversations as text, and which stretches of that text the assistant wrote.

Positions are characters of the rendered text, ends exclusive; how it is rendered, see `template`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

from lora_mini_jax.data.template import CLOSE, OPEN, Message, Tools, render
from lora_mini_jax.errors import UserError


def render_chat(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    tools: Tools = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text.

    Args:
        template: the Jinja source, as a tokenizer's ``chat_template``.
        messages: ``{"role": ..., "content": ...}`` each, in order.
        special_tokens: names a template may use, as ``{"bos_token": "<s>"}``.
        tools: JSON Schemas of what the assistant may call.
        add_generation_prompt: end with the opening of an assistant turn, to be written on.

    Raises:
        UserError: the template is not valid Jinja, it refuses these messages, or it knows nothing
            of tools and there are some.

    Example:
        >>> render_chat("{{ messages[0].content }}{{ eos_token }}",
        ...             [{"role": "user", "content": "Hi"}], {"eos_token": "</s>"})
        'Hi</s>'
    """
    text = render(template, messages, tools, special_tokens, add_generation_prompt)
    return text.replace(OPEN, "").replace(CLOSE, "")


def assistant_spans(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str],
    *,
    tools: Tools = None,
    since: int = 0,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it the assistant's turns stand, from message
    ``since`` on: those before it are given, as a prompt is.

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
        return render(template, messages[:count], tools, special_tokens, prompt)

    full = rendered(len(messages))
    if OPEN in full:
        text, marked = _marked_spans(full)
        return text, marked[rendered(since).count(OPEN) if since else 0 :]
    if re.search(r"{%-?\s*generation\b", template):
        return full, []
    spans = [
        _turn_span(rendered, turn, full)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and turn >= since
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
    head, *blocks = text.split(OPEN)
    plain += head
    for block in blocks:
        inside, _, after = block.partition(CLOSE)
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    return plain, spans
