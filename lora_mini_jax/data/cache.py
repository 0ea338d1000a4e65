"""Rows that are made once: tokenised, packed and kept on disk, known by what they are made of.

An entry is a folder whose name is a hash: of the data's bytes, of the tokenizer's files, and of
every setting that has a say. It is written under a temporary name and renamed when it is complete,
so what has an entry's name is whole, and of several processes that make one the first wins. In it:

- ``rows.arrow``: the rows that `Batches` reads, each array a column (`arrow`);
- ``examples.arrow``: the examples, of held-out data only, for prompts are taken from them;
- ``meta.json``: how many were left out or cut, the largest token, and what the hash is of.

Nothing is ever read by halves or trusted by its date, so entries, and what a killed build left
behind (``.*.tmp``), may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_mini_jax.data.arrow import Examples, read_rows, write_examples, write_rows
from lora_mini_jax.data.recipe import Part, Recipe, Tally, in_memory
from lora_mini_jax.data.records import Records, digest
from lora_mini_jax.data.tokenizer_folder import TEMPLATES
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_object, writes, writing
from lora_mini_jax.processes import together

FORMAT = 2
"""Of the entries, and of everything that makes them: a change to either makes new ones."""
_READ_BY_TOKENIZERS = (".json", ".jinja", ".model", ".txt")


def cache_folder(option: str) -> Path | None:
    """Where entries are: a folder, nowhere for ``"none"``, and for ``"auto"`` ``$LORA_MINI_CACHE``,
    or else ``lora_mini_jax`` among the user's caches.

    Example:
        >>> cache_folder("none"), cache_folder("/data/rows").name
        (None, 'rows')

    Raises:
        UserError: no folder at all, or a home folder where none is known.
    """
    if option == "none":
        return None
    if not option:
        raise UserError("--cache-dir is empty: give a folder, auto, or none")
    if option == "auto":
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        option = os.environ.get("LORA_MINI_CACHE") or f"{home}/lora_mini_jax"
    try:
        return Path(option).expanduser()
    except RuntimeError:
        raise UserError(
            f"{option}, where rows are kept: no home folder is known; set HOME, or give "
            "--cache-dir a folder, or none to keep them in memory"
        ) from None


def prepared(
    records: Records, recipe: Recipe, *, source: str, cache: Path | None, examples: bool = False
) -> Part:
    """The rows of the records: from the cache where they are there, else made, and kept there.

    Making them needs no more memory than a hundred records or so and their rows, and a few bytes
    for each example. Of several processes the first makes them and the others wait for it; where
    they do not share its disk they then make their own.

    Args:
        records: what to read.
        recipe: what to do with them.
        source: what error messages call them.
        cache: a folder for entries; None keeps rows and examples in memory.
        examples: whether the examples are wanted too; without a cache they are there always.

    Raises:
        UserError: records that cannot be used; a folder that cannot be written; a full disk.
    """
    if cache is None:
        return in_memory(records, recipe, source)
    key = {
        "format": FORMAT,
        "data": records.content,
        "tokenizer": _tokenizer(recipe.tokenizer),
        "settings": recipe.settings,
        "examples": examples,
    }
    named = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    entry = cache / named[:40]
    try:
        if writes() and not entry.exists():
            _make(entry, key, records, recipe, source)
    finally:  # whatever happened, for the others wait
        together("rows made")
    if not entry.exists():
        _make(entry, key, records, recipe, source)
    return _opened(entry, recipe)


def _tokenizer(folder: Path) -> dict[str, str]:
    """What a tokenizer is made of: everything in its folder that it might read."""
    found = [*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]
    files = [file for file in found if file.suffix in _READ_BY_TOKENIZERS and file.is_file()]
    named = {str(file.relative_to(folder)): digest(file) for file in files}
    return {"tokenizers": version("tokenizers")} | named


def _make(entry: Path, key: dict[str, Any], records: Records, recipe: Recipe, source: str) -> None:
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(
            f"cannot keep rows in {entry.parent} ({error.strerror}): give --cache-dir a folder "
            "that can be written, or none to keep them in memory"
        ) from None
    folder = Path(temporary)
    try:
        with writing(entry):
            _fill(folder, key, records, recipe, source)
            try:
                folder.rename(entry)
            except OSError:  # another has made it in the meantime
                if not entry.exists():
                    raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, key: dict[str, Any], records: Records, recipe: Recipe, source: str) -> None:
    """Twice over the data: records to examples, and examples to rows, which need all lengths."""
    tally, path = Tally(), folder / "examples.arrow"
    write_examples(path, tally.examples(recipe.encode(records, source=source)))
    examples = Examples(path, recipe.example)
    lengths = tally.lengths(len(examples[0]))
    write_rows(folder / "rows.arrow", recipe.rows(examples, lengths, at_once=None))
    if not key["examples"]:
        path.unlink()
    (folder / "meta.json").write_text(json.dumps(tally.counts() | {"made_of": key}, indent=2))


def _opened(entry: Path, recipe: Recipe) -> Part:
    meta = read_object(entry / "meta.json")
    path = entry / "examples.arrow"
    return Part(
        read_rows(entry / "rows.arrow", recipe.row),
        Examples(path, recipe.example) if path.exists() else (),
        *(meta[name] for name in ("skipped", "truncated", "top")),
    )
