"""A tokenizer from a model's folder, in Hugging Face layout, behind a small frozen face.

``tokenizer.json`` is read by ``tokenizers`` alone, for importing ``transformers`` takes seconds;
a folder without one (an older ``vocab.txt``, say) goes through ``transformers.AutoTokenizer``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_mini_jax.data.chat import Message, assistant_spans, render_chat
from lora_mini_jax.data.files import one_line
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object

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
    """

    backend: "tokenizers.Tokenizer"
    bos_id: int | None
    eos_id: int | None
    vocab_size: int
    chat_template: str | None
    special_tokens: dict[str, str]

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no bos or eos is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens are left out."""
        return self.backend.decode(list(ids))

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as the model's text, ready for ``encode`` (special tokens included).

        Raises:
            UserError: the folder has no chat template, or it refuses these messages.
        """
        return render_chat(
            self._template(),
            messages,
            self.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and for each whether the assistant wrote any part of it.

        Raises:
            UserError: as ``apply_chat_template``, or the assistant's text cannot be told apart
                (see ``chat.assistant_spans``).
        """
        text, spans = assistant_spans(self._template(), messages, self.special_tokens)
        encoding = self.backend.encode(text, add_special_tokens=False)
        # Some tokens stand for no character (an inserted space): they count as one wide.
        mask = [
            any(start < to and max(end, start + 1) > since for since, to in spans)
            for start, end in encoding.offsets
        ]
        return encoding.ids, mask

    def _template(self) -> str:
        if self.chat_template is None:
            raise UserError(
                "this tokenizer has no chat template: add chat_template.jinja to its folder, "
                "or train on prompt and completion fields"
            )
        return self.chat_template


# What a tokenizer may be made of where there is no tokenizer.json.
OTHER_FILES = (
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    The bos and eos tokens are those that ``tokenizer_config.json`` names (a ``null`` there means
    none, and so does ``"add_bos_token": false`` for bos), else those of
    ``special_tokens_map.json``, else the ids in the model's ``config.json``.

    Raises:
        UserError: no such folder, no tokenizer in it, a file in it that cannot be read, or a bos
            or eos token that is not in the vocabulary.

    Example:
        >>> import tempfile, tokenizers
        >>> folder = tempfile.mkdtemp()
        >>> words = tokenizers.models.WordLevel({"[U]": 0, "hi": 1}, unk_token="[U]")
        >>> tokenizers.Tokenizer(words).save(folder + "/tokenizer.json")
        >>> load_tokenizer(folder).encode("hi")
        [1]
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"no such folder: {folder}; give a folder that holds tokenizer.json")
    if not (path / "tokenizer.json").is_file():
        if not any((path / name).is_file() for name in OTHER_FILES):
            raise UserError(f"no tokenizer in {path}: give a folder that holds tokenizer.json")
        return _from_transformers(path)
    import tokenizers

    # The library raises a bare Exception for whatever is wrong with the file.
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:
        raise UserError(
            f"cannot read {path / 'tokenizer.json'} ({one_line(error)}): download it again"
        ) from error
    config = _optional(path / "tokenizer_config.json")
    named = {**_optional(path / "special_tokens_map.json"), **config}
    special = _special_tokens(path, backend, named)
    for name, token in special.items():
        if name in ("bos_token", "eos_token") and backend.token_to_id(token) is None:
            raise UserError(
                f"{path}: its {name} {token!r} is not in tokenizer.json: "
                "correct tokenizer_config.json"
            )
    bos = special.get("bos_token") if named.get("add_bos_token") is not False else None
    return _wrapped(backend, bos, special.get("eos_token"), _chat_template(path, config), special)


def _special_tokens(
    path: Path, backend: "tokenizers.Tokenizer", named: dict[str, Any]
) -> dict[str, str]:
    special = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token") and isinstance(token, dict | str)
    }
    model = _optional(path / "config.json")
    for name in ("bos_token", "eos_token"):
        if name not in named and isinstance(model_id := model.get(f"{name}_id"), int):
            special[name] = backend.id_to_token(model_id) or f"id {model_id}"
    return special


def _wrapped(
    backend: "tokenizers.Tokenizer",
    bos: str | None,
    eos: str | None,
    template: str | None,
    special_tokens: dict[str, str],
) -> Tokenizer:
    # Many saved tokenizers still carry the cutting and padding of their last run.
    backend.no_truncation()
    backend.no_padding()
    bos_id = None if bos is None else backend.token_to_id(bos)
    eos_id = None if eos is None else backend.token_to_id(eos)
    size = max(backend.get_vocab().values(), default=-1) + 1
    return Tokenizer(backend, bos_id, eos_id, size, template, special_tokens)


def _from_transformers(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    # What AutoTokenizer raises depends on the class it picks, and all of it is about the folder.
    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        backend = loaded.backend_tokenizer
    except Exception as error:
        raise UserError(
            f"no tokenizer in {path} ({one_line(error)}): give a folder that holds tokenizer.json"
        ) from error
    template = loaded.chat_template if isinstance(loaded.chat_template, str) else None
    special = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    bos, eos = special.get("bos_token"), special.get("eos_token")
    return _wrapped(backend, bos, eos, template, special)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {item["name"]: item["template"] for item in given}
        return named.get("default")
    return given if isinstance(given, str) else None
