"""A tokenizer behind a small frozen face; see `tokenizer_folder` for where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from lora_mini_jax.data.chat import assistant_spans, render_chat
from lora_mini_jax.data.template import Message, Tools
from lora_mini_jax.errors import UserError

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. Made by ``load_tokenizer``.

    Attributes:
        backend: the ``tokenizers.Tokenizer`` that does the work.
        bos_id: the id that opens a document, ``None`` where the folder names none.
        eos_id: the id that closes a document, ``None`` where the folder names none.
        vocab_size: the largest id plus one. A model with a smaller embedding cannot be used;
            whoever has the model must check that.
        chat_template: the Jinja source, ``None`` where the folder has none.
        special_tokens: the special tokens by the names a chat template knows them by.
        tool_template: the template for conversations with tools, where the folder has one apart.
    """

    backend: "tokenizers.Tokenizer"
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    chat_template: str | None
    special_tokens: dict[str, str]
    tool_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no bos or eos is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def prompt(self, text: str) -> list[int]:
        """The ids that a decoder continues after ``text``: as in training, bos comes first where
        the tokenizer has it."""
        return [*self.opening, *self.encode(text)]

    def chat_prompt(self, messages: Sequence[Message], *, tools: Tools = None) -> list[int]:
        """The ids of a conversation, up to where the assistant begins to answer.

        Raises:
            UserError: as `apply_chat_template`.
        """
        given = {"tools": tools, "add_generation_prompt": True}
        return self.encode(self.apply_chat_template(messages, **given))

    @property
    def opening(self) -> list[int]:
        """What opens a document: bos, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    @property
    def closing(self) -> list[int]:
        """What ends one: eos, or nothing."""
        return [] if self.eos_id is None else [self.eos_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are left out."""
        return self.backend.decode(list(ids))

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """What ``ids`` add to the text of ``prompt``: decoded alone they would lack the space that
        many tokenizers leave out where a text begins."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        # The prompt's last character may be whole only now.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
        return whole[len(list(same)) :]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as the model's text, ready for ``encode`` (special tokens included).

        Raises:
            UserError: the folder has no chat template, or it refuses these messages.
        """
        return render_chat(
            self._template(tools),
            messages,
            self.special_tokens,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Tools = None, since: int = 0
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each whether the assistant wrote any part of it, in
        message ``since`` or later.

        Raises:
            UserError: as ``apply_chat_template``, or the assistant's text cannot be told apart
                (see ``chat.assistant_spans``).
        """
        template = self._template(tools)
        text, spans = assistant_spans(
            template, messages, self.special_tokens, tools=tools, since=since
        )
        encoding = self.backend.encode(text, add_special_tokens=False)
        # Some tokens stand for no character (an inserted space): they count as one wide.
        mask = [
            any(start < to and max(end, start + 1) > since for since, to in spans)
            for start, end in encoding.offsets
        ]
        return encoding.ids, mask

    def _template(self, tools: Tools) -> str:
        template = self.chat_template
        if tools is not None and self.tool_template is not None:
            template = self.tool_template
        if template is None:
            raise UserError(
                "this tokenizer has no chat template: add chat_template.jinja to its folder, "
                "or train on prompt and completion fields"
            )
        return template
