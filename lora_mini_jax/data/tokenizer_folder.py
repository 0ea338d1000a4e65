"""A tokenizer from a model's folder, in Hugging Face layout.

``tokenizer.json`` is read by ``tokenizers`` alone, for importing ``transformers`` takes seconds;
a folder without one (an older ``vocab.txt``, say) goes through ``transformers.AutoTokenizer``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError, one_line
from lora_mini_jax.files import read_object

if TYPE_CHECKING:
    import tokenizers

# What a tokenizer may be made of where there is no tokenizer.json.
OTHER_FILES = (
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
TEMPLATES = "additional_chat_templates"
"""The folder within it of the chat templates beside the default one."""


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
    return _wrapped(backend, bos, special.get("eos_token"), _chat_templates(path, config), special)


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
    templates: dict[str, str],
    special_tokens: dict[str, str],
) -> Tokenizer:
    # Many saved tokenizers still carry the cutting and padding of their last run.
    backend.no_truncation()
    backend.no_padding()
    bos_id = None if bos is None else backend.token_to_id(bos)
    eos_id = None if eos is None else backend.token_to_id(eos)
    size = max(backend.get_vocab().values(), default=-1) + 1
    template, with_tools = templates.get("default"), templates.get("tool_use")
    return Tokenizer(backend, bos_id, eos_id, size, template, special_tokens, with_tools)


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
    given = loaded.chat_template
    templates = given if isinstance(given, dict) else {"default": given}
    special = {k: v for k, v in loaded.special_tokens_map.items() if isinstance(v, str)}
    bos, eos = special.get("bos_token"), special.get("eos_token")
    return _wrapped(backend, bos, eos, templates, special)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name: ``default``, and of some models ``tool_use`` among others."""
    if (path / "chat_template.jinja").is_file():
        others = {file.stem: file for file in (path / TEMPLATES).glob("*.jinja")}
        files = {"default": path / "chat_template.jinja"} | others
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    given = config.get("chat_template")
    if isinstance(given, list):
        return {item["name"]: item["template"] for item in given}
    return {"default": given} if isinstance(given, str) else {}
