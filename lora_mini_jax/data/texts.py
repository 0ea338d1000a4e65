"""Text files for pre-training: found in folders, held out by file, cut into rows' lengths."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_mini_jax.data.examples import Example, encode_records
from lora_mini_jax.data.fields import Fields
from lora_mini_jax.data.tokenizer import Tokenizer
from lora_mini_jax.errors import UserError


class Text(NamedTuple):
    """A text file: its name within the folder it was found in, and its absolute path."""

    name: str
    path: Path


def find_texts(sources: Iterable[str | Path], suffixes: Sequence[str]) -> list[Text]:
    """The files of ``sources``, by name: files as they are, folders searched to the bottom.

    Args:
        sources: files and folders.
        suffixes: the endings of text files in folders, like ``".txt"``; a file that is named
            itself may have any.

    Raises:
        UserError: a source that does not exist, or no files at all.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("b.py", "a.py", "c.png"):
        ...     _ = (folder / name).write_text("x = 1")
        >>> [text.name for text in find_texts([folder], [".py"])]
        ['a.py', 'b.py']
    """
    sources, found = [Path(source).expanduser() for source in sources], {}
    for source in sources:
        if not source.exists():
            raise UserError(f"no such file or folder: {source}; give text files, or folders")
        inside = source.rglob("*") if source.is_dir() else [source]
        for path in inside:
            if path == source or (path.suffix in suffixes and path.is_file()):
                name = path.name if path == source else path.relative_to(source).as_posix()
                found.setdefault(path.resolve(), Text(name, path.resolve()))
    if not found:
        raise UserError(
            f"{', '.join(map(str, sources))}: no file ends in {' or '.join(suffixes)}; "
            "give other folders, or --suffixes"
        )
    return sorted(found.values())


def hold_out(texts: Sequence[Text], share: float) -> tuple[list[Text], list[Text]]:
    """``(training, held out)``: about ``share`` of the files, one at least, is held out.

    Which ones is a function of their names, so that more files hardly change it.

    Raises:
        UserError: fewer than two files, or a share that leaves none to train on or to hold out.

    Example:
        >>> texts = [Text(f"{i}.py", Path(f"{i}.py")) for i in range(10)]
        >>> train, held_out = hold_out(texts, 0.2)
        >>> len(train), len(held_out)
        (8, 2)
    """
    if not share > 0:
        raise UserError(
            f"--held-out {share:g} holds out no file, and a run needs one: "
            "give a share above 0, or --valid"
        )
    n = max(1, round(share * len(texts)))
    if n >= len(texts):
        raise UserError(
            f"{n} of {len(texts)} text files would be held out: give more files, "
            "a smaller --held-out, or --valid"
        )
    chosen = set(sorted(texts, key=lambda text: (zlib.crc32(text.name.encode()), text))[:n])
    return [text for text in texts if text not in chosen], sorted(chosen)


def encode_texts(texts: Sequence[Text], tokenizer: Tokenizer, length: int) -> list[Example]:
    """The files as pieces of at most ``length`` tokens, files without any text left out.

    A file is ``bos text eos``. A piece begins with the token that ends the one before it, so that
    every token of a file but the first is predicted exactly once.

    Raises:
        UserError: a length below 2, a file that cannot be read or is not UTF-8, or no text at all.

    Example:
        >>> import tempfile, tokenizers
        >>> words = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a")
        >>> tokenizer = Tokenizer(tokenizers.Tokenizer(words), None, 0, 2, None, {})
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     _ = file.write("b"), file.flush()
        ...     encode_texts([Text("b.txt", Path(file.name))], tokenizer, 8)
        [Example(tokens=array([1, 0], dtype=int32), loss_mask=array([False,  True]))]
    """
    if length < 2:
        raise UserError(f"max_length {length} is not allowed: give a whole number from 2")
    records = [{"text": text} for text in map(_read, texts) if text.strip()]
    if not records:
        raise UserError(f"none of {len(texts)} files holds any text, the first is {texts[0].path}")
    whole = encode_records(records, tokenizer, Fields("text"), max_length=2**31)
    return [piece for example in whole.examples for piece in _pieces(example, length)]


def thinned(examples: Sequence[Example], tokens: int | None) -> list[Example]:
    """About ``tokens`` tokens of the examples, evenly spread over them; all where it is None.

    Example:
        >>> ten = [Example([i, i], [False, True]) for i in range(10)]
        >>> [example.tokens[0] for example in thinned(ten, 4)]
        [0, 5]
    """
    total = sum(len(example.tokens) for example in examples)
    if tokens is None or tokens >= total:
        return list(examples)
    n = max(1, round(len(examples) * tokens / total))
    return [examples[i * len(examples) // n] for i in range(n)]


def _pieces(example: Example, length: int) -> Iterator[Example]:
    for start in range(0, len(example.tokens) - 1, length - 1):
        tokens, mask = (part[start : start + length].copy() for part in example)
        mask[0] = False
        yield Example(tokens, mask)


def _read(text: Text) -> str:
    try:
        return text.path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{text.path} is not UTF-8 (byte {error.object[error.start]:#04x} at "
            f"{error.start}): save it as UTF-8, or take it away"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {text.path}: {error.strerror}") from None
