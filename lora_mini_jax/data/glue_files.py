"""The records of a GLUE task, from the hub or from a folder, under the hub's names of fields."""

from itertools import islice
from pathlib import Path

from lora_mini_jax.data.data_sets import load_split, with_names
from lora_mini_jax.data.files import READERS, At, Record, tsv
from lora_mini_jax.errors import UserError
from lora_mini_jax.glue import HUB, LABEL, TASKS, Glue


def read_glue(name: str, source: str, split: str, limit: int | None = None) -> list[Record]:
    """The records of one split, in their order.

    Args:
        name: the task's, a key of `glue.TASKS`.
        source: a folder that holds the task's files, or its folder (``MRPC`` or ``mrpc``) with
            them: ``train`` and ``validation`` (or ``dev``) with one of the endings that
            `read_records` knows, in parts (``train-00000-of-00002.parquet``) or whole. A tsv file
            is read as GLUE's authors distribute it. Empty for the hub.
        split: ``"train"`` or ``"validation"``, which for MNLI is the matched one.
        limit: take only the first so many.

    Raises:
        UserError: no such folder, no such files in it, or a malformed one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "train.jsonl").write_text('{"sentence": "Yes.", "label": 1}')
        ...     read_glue("sst2", folder, "train")
        [{'sentence': 'Yes.', 'label': 1}]
    """
    task = TASKS[name]
    stems = ("train",) if split == "train" else task.held_out
    if not source:
        return [_labelled(r) for r in with_names(load_split(HUB, stems[0], limit, name))]
    if not Path(source).is_dir():
        raise UserError(f"no such folder: {source}; give --data a folder with the files of GLUE's "
                        f"{name}, or leave it out, for the hub")  # fmt: skip
    files = _files(Path(source), name, task, stems)
    records = (record for file in files for record in _read(file, task))
    found = list(islice(records, limit))
    if not found:
        raise UserError(f"{files[0]} holds no records: give a file with at least one")
    return found


def _files(source: Path, name: str, task: Glue, stems: tuple[str, ...]) -> list[Path]:
    """The files of a split, all of one kind."""
    for folder in (source / name, source / task.folder, source):
        there = sorted(folder.iterdir()) if folder.is_dir() else []
        for stem in stems:
            files = [f for f in there if f.suffix in READERS
                     and (f.stem == stem or f.stem.startswith(f"{stem}-"))]  # fmt: skip
            if files:
                return [file for file in files if file.suffix == files[0].suffix]
    raise UserError(
        f"no file {' or '.join(stems)} ({', '.join(READERS)}) of GLUE's {name} in {source}, nor in "
        f"{name} or {task.folder} within it: give the folder that holds them"
    )


def _read(file: Path, task: Glue) -> "list[Record]":
    if file.suffix != ".tsv":
        return [_labelled(record) for record in READERS[file.suffix](file)]
    return [
        _labelled(At({task.columns.get(n, n): value for n, value in row.items()}, row.line))
        for row in tsv(file, task.header)
        if isinstance(row, At)
    ]


def _labelled(record: Record) -> Record:
    """-1 is GLUE's way of saying that there is no label."""
    if record.get(LABEL) in (-1, "-1"):
        record[LABEL] = None
    return record
