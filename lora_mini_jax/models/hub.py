"""Where models come from, a folder or the hub, and what their ``config.json`` says."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn

from lora_mini_jax.errors import UserError, first_line
from lora_mini_jax.models.checks import is_ids
from lora_mini_jax.models.families import DECODERS, family_of
from lora_mini_jax.models.family import Family
from lora_mini_jax.models.shards import read_downloaded

GENERATION = "generation_config.json"
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    GENERATION, "chat_template.jinja", "additional_chat_templates/*.jinja", "added_tokens.json",
    # Of folders without a tokenizer.json: DeBERTa-v3's has spm.model, BERT's older ones vocab.txt,
    # XLM-R's older ones sentencepiece.bpe.model.
    "tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model",
    "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
_DOWNLOADS = ["config.json", "model*.safetensors", "model.safetensors.index.json", *COMPANIONS]


def resolve(
    path_or_id: str | os.PathLike[str], revision: str | None = None, *, named_by: str = ""
) -> Path:
    """The local folder of a model: the one given, or the hub's, downloaded to the usual cache.

    ``named_by`` is the folder of the adapter that names the model, where the user does not; it is
    for the error message.

    Raises:
        UserError: neither a folder nor reachable on the hub, or a revision of a local folder.
    """
    path = Path(path_or_id)
    if path.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} is for hub models, but {path} is a local "
                            "folder: leave revision out")  # fmt: skip
        return path
    try:
        return _downloaded(os.fspath(path_or_id), revision)
    except Exception as error:  # the hub client raises many kinds, and all mean the same here
        who = f", which {named_by} was trained on," if named_by else ""
        how = "give its folder as --model," if named_by else "give a folder with config.json"
        raise UserError(
            f"{str(path_or_id)!r}{who} is neither a local folder nor reachable on the hub "
            f"({type(error).__name__}: {first_line(error, 200 if named_by else 1000)}): {how} "
            "or a hub id"
        ) from error


@cache  # a command asks for the same model several times, and the hub is asked each time
def _downloaded(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADS))


def load_config(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """Read ``config.json`` of a folder or hub model; errors as in `load`."""
    return _read_config(resolve(path_or_id, revision))[1]


def load_decoder_config(path_or_id: str | os.PathLike[str]) -> Any:
    """The same for a model that continues text.

    Raises:
        UserError: as `load_config`, and for an encoder or a model that has one.
    """
    folder = resolve(path_or_id)
    family, config = _read_config(folder)
    if family.kind != "decoder":
        known = (name for decoder in DECODERS for name in decoder.architectures)
        raise UserError(
            f"{folder} holds a {family.module.__name__}, which does not continue text: give one of "
            f"{', '.join(known)}; an encoder takes --task classification or regression"
        )
    return config


def load_module(path_or_id: str | os.PathLike[str], *, scan_layers: bool = False) -> nn.Module:
    """The module that ``config.json`` alone describes; errors as in `load`."""
    family, config = _read_config(resolve(path_or_id))
    return family.module(config, scan_layers=scan_layers)


def _read_config(folder: Path) -> tuple[Family, Any]:
    hf = read_hf(folder)
    family = family_of(hf)
    return family, family.config.from_hf(hf)


def read_hf(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says, with the end tokens of ``generation_config.json`` where it has
    any: a model that was taught to chat may end its turns by one that only this file names."""
    file, further = folder / "config.json", folder / GENERATION
    if not file.is_file():
        raise UserError(f"{file} does not exist: give a Hugging Face model folder")
    hf = read_downloaded(file)
    ends = read_downloaded(further).get("eos_token_id") if further.is_file() else None
    if not _are_ids(ends):
        raise UserError(f"{further}: eos_token_id={ends!r} is no token id; correct it")
    # What is wrong in config.json stays there, for its reader to say.
    known = ends is not None and _are_ids(hf.get("eos_token_id"))
    return hf | {"eos_token_id": ends} if known else hf


def _are_ids(value: Any) -> bool:
    return is_ids(tuple(value) if isinstance(value, list) else value)
