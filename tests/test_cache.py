"""Rows on disk: the same as in memory, made once, found by their content, never half."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lora_mini_jax import UserError
from lora_mini_jax.data import (
    Batches,
    Example,
    Fields,
    Tokenizer,
    arrow,
    cache,
    encode_records,
    files,
    load_tokenizer,
    pack,
    packing,
)
from lora_mini_jax.data.cache import cache_folder
from lora_mini_jax.data.encoded import joined
from lora_mini_jax.data.pair_rows import pair_rows
from lora_mini_jax.data.pairs import pair_stream
from lora_mini_jax.data.records import open_records, read_records
from lora_mini_jax.options import Finetune
from lora_mini_jax.tasks import language, seq2seq
from lora_mini_jax.tasks.data import read_rows
from lora_mini_jax.tasks.kinds import prepare
from tests.runs import options

SETTINGS = {
    "max_length": 40,
    "overlong": "truncate",
    "packing": False,
    "separator": ": ",
    "completion_field": "q",
    "max_train_examples": 31,
    "max_valid_examples": 1,
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and data of 50 records, in chunks so small that there are several of each kind."""
    monkeypatch.setattr(files, "CHUNK", 7)
    monkeypatch.setattr(arrow, "AT_ONCE", 5)
    for module in ("packing", "pair_rows"):
        monkeypatch.setattr(f"lora_mini_jax.data.{module}.TOKENS", 200)
    given(tmp_path)
    return tmp_path


def given(folder: Path, **changes: Any) -> Finetune:
    made = options(folder, **{"cache_dir": str(folder / "cache"), **changes})
    rng = np.random.default_rng(0)
    rows = [{"q": "ab " * n, "a": "c" * n} for n in rng.integers(1, 18, 50).tolist()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").glob("*"))


class Bytes:
    """A tokenizer of bytes; ``fails`` is the text at which it raises."""

    opening, closing, vocab_size, fails = [257], [256], 258, "-"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if any(self.fails in text for text in texts):
            raise KeyboardInterrupt
        return [list(text.encode()) for text in texts]


def recipe(options: Finetune, tokenizer: Any = None) -> cache.Recipe:
    folder = Path(options.model)
    tokenizer = tokenizer or load_tokenizer(folder)
    return language.LanguageTask.recipe(options, None, tokenizer, folder)


def pairs_recipe(options: Finetune) -> cache.Recipe:
    config: Any = SimpleNamespace(decoder_start_token_id=3, pad_token_id=1)
    tokenizer: Any = Bytes()
    return seq2seq.Seq2SeqTask.recipe(options, config, tokenizer, Path(options.model))


def same(one: Any, other: Any) -> None:
    for name, array in vars(other).items():
        found = getattr(one, name)
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(np.asarray(found), array, err_msg=name)


def halves(options: Finetune) -> list[list[Any]]:
    """The records as all the data in memory would be split."""
    records = read_records(options.data)
    n = max(1, round(len(records) * 0.05))
    return [records[:-n], records[-n:]]


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"overlong": "truncate"}])
def test_rows_on_disk_are_those_in_memory(place: Path, changes: dict[str, Any]) -> None:
    options = given(place, max_length=48, **changes)
    tokenizer = load_tokenizer(options.model)
    for _ in range(2):  # made, and found
        for part, records in zip(read_rows(options, recipe(options)), halves(options), strict=True):
            encoded = encode_records(
                records, tokenizer, options.record_fields(), max_length=48,
                overlong=options.overlong,
            )  # fmt: skip
            same(part.rows, pack(encoded.examples, 48, packing=options.packing))
            assert (part.skipped, part.truncated) == encoded[1:]
            assert part.top == max(e.tokens.max() for e in encoded.examples)
    assert encoded.skipped or options.overlong == "truncate" or len(records) == 2
    for kept, example in zip(part.examples, encoded.examples, strict=True):
        np.testing.assert_equal(tuple(kept), tuple(example))


def test_pairs_on_disk_are_those_in_memory(place: Path) -> None:
    options = given(place, max_length=40)
    for _ in range(2):
        parts = read_rows(options, pairs_recipe(options))
        for part, records in zip(parts, halves(options), strict=True):
            tokenizer: Any = Bytes()
            how: dict[str, Any] = {"start_id": 3, "max_length": 40}
            encoded = joined(pair_stream(records, tokenizer, options.record_fields(), **how))
            same(part.rows, pair_rows(encoded.examples, max_length=40, pad_id=1))
            assert part.skipped == encoded.skipped


def test_where_rows_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"HOME": "/home/ada", "XDG_CACHE_HOME": "/caches", "LORA_MINI_CACHE": "/rows"}
    found = []
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
        found.append(str(cache.cache_folder("auto")))
    assert found == ["/home/ada/.cache/lora_mini_jax", "/caches/lora_mini_jax", "/rows"]
    assert str(cache.cache_folder("~/mine")) == "/home/ada/mine"


def test_without_a_cache_nothing_is_written(place: Path) -> None:
    one, other = given(place, cache_dir="none"), given(place)
    for a, b in zip(read_rows(one, recipe(one)), read_rows(other, recipe(other)), strict=True):
        same(b.rows, a.rows)
    assert len(entries(place)) == 2
    # Twice the room for nothing: of the training data only rows are kept.
    assert len(list((place / "cache").glob("*/examples.arrow"))) == 1
    assert isinstance(a.rows.tokens, np.ndarray)
    assert not isinstance(b.rows.tokens, np.ndarray)


def test_packing_has_not_changed() -> None:
    """Rows that earlier versions made: a run of theirs goes on with the same batches."""
    lengths = np.array([3, 5, 2, 7, 1, 4, 6, 2, 3, 1])
    order, ends = packing._grouped(packing._best_fit(lengths, 8))
    rows = [row.tolist() for row in np.split(order, ends[:-1])]
    assert rows == [[0, 1], [2, 6], [3, 9], [4, 5, 8], [7]]


def test_rows_of_more_tokens_than_a_chunk_are_made_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "TOKENS", 7)
    examples = [Example(np.full(n, n, np.int32), np.ones(n, bool)) for n in (8, 3, 5)]
    lengths = np.array([[8], [3], [5]])
    chunks = list(packing.packed_chunks(examples, lengths, 8, packing=True, at_once=None))
    assert [chunk.tokens.tolist() for chunk in chunks] == [[[8] * 8], [[3] * 3 + [5] * 5]]


def test_a_second_run_tokenises_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = given(place, max_length=48)
    first = prepare(options)

    def encode_batch(self: Tokenizer, texts: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    second = prepare(replace(options, samples=2, batch_size=3))
    same(second.train.packed, Batches(first.train.packed, 3, 0).packed)
    assert isinstance(first, language.LanguageTask)
    assert isinstance(second, language.LanguageTask)
    assert second.notes == first.notes
    assert first.prompts == second.prompts[:1]
    assert len(second.prompts) == 2
    with pytest.raises(AssertionError):
        prepare(replace(options, max_length=47))


@pytest.mark.parametrize(("name", "value"), SETTINGS.items(), ids=SETTINGS)
def test_another_setting_is_another_entry(place: Path, name: str, value: Any) -> None:
    before, after = given(place), given(place, **{name: value})
    for each in (before, after, before, after):
        read_rows(each, recipe(each))
    # Training and held-out data of each; what changes the held-out alone leaves the other.
    assert len(entries(place)) == (3 if name == "max_valid_examples" else 4)


@pytest.mark.parametrize(
    "file",
    ["data.jsonl", "model/tokenizer.json", "model/config.json", "model/chat_template.jinja",
     "model/tokenizer.model", "model/merges.txt"],
)  # fmt: skip
def test_another_byte_is_another_entry(place: Path, file: str) -> None:
    options = given(place)
    (place / "model" / "folder.json").mkdir()  # is none of the tokenizer's files
    read_rows(options, recipe(options))
    path = place / file
    before = path.read_text().rstrip() if path.exists() else ""
    path.write_text(before + "\n\n")
    read_rows(options, recipe(options))
    assert len(entries(place)) == 4


def test_another_version_is_another_entry(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, names = given(place), set()
    read_rows(options, recipe(options))
    names.update(entries(place))
    for name, value in (("FORMAT", 0), ("version", lambda package: f"{package} 0")):
        monkeypatch.setattr(cache, name, value)
        read_rows(options, recipe(options))
        assert len(names) + 2 == len(entries(place))
        names.update(entries(place))


def test_a_folder_of_a_data_set_is_kept_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "datasets")
    (place / "set").mkdir()
    options = given(place, data=str(place / "set"))
    for times, expected in ((2, 2), (3, 4)):
        (place / "set" / "train.jsonl").write_text((place / "data.jsonl").read_text() * times)
        for _ in range(2):
            train, _ = read_rows(options, recipe(options))
        assert len(entries(place)) == expected
    same(train.rows, read_rows(replace(options, cache_dir="none"), recipe(options))[0].rows)


def test_a_build_that_ends_early_leaves_nothing(place: Path) -> None:
    options = given(place)
    tokenizer = Bytes()
    tokenizer.fails = "c" * 16
    with pytest.raises(KeyboardInterrupt):
        read_rows(options, recipe(options, tokenizer))
    assert entries(place) == []
    read_rows(options, recipe(options))
    (one, other) = entries(place)
    # Killed outright, it leaves a folder that no run takes for an entry.
    (place / "cache" / one).rename(place / "cache" / f".{one}.abcd.tmp")
    (place / "cache" / f".{one}.abcd.tmp" / "rows.arrow").write_bytes(b"half")
    read_rows(options, recipe(options))
    assert entries(place) == [f".{one}.abcd.tmp", one, other]


def test_of_two_that_build_at_once_the_first_wins(place: Path) -> None:
    options = given(place, cache_dir=str(place / "cache"))
    records, made = open_records(options.data), recipe(options)
    folder = place / "cache"

    def slowly(records: Any, source: str) -> Any:
        parts = list(made.encode(records, source=source))
        cache.prepared(records, made, source=source, cache=folder)  # another, all of it meanwhile
        (before,) = (path for path in folder.glob("*") if path.suffix != ".tmp")
        (before / "mine").touch()
        yield from parts

    part = cache.prepared(records, replace(made, encode=slowly), source="x", cache=folder)
    (entry,) = folder.glob("*")
    assert (entry / "mine").exists()
    same(part.rows, cache.prepared(records, made, source="x", cache=None).rows)


def test_memory_stays_small_however_large_the_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "AT_ONCE", 64)
    monkeypatch.setattr(files, "CHUNK", 16)
    monkeypatch.setattr(packing, "TOKENS", 2**14)
    line = json.dumps({"text": "all work and no play makes " * 20}) + "\n"
    path = place / "large.jsonl"
    path.write_text(line * 8000)
    options = given(place, data=str(path), prompt_field=None, completion_field=None,
                    max_length=1200)  # fmt: skip
    made = recipe(options, Bytes())
    records = open_records(path)
    list(made.encode(iter([{"text": "x"}]), source="x"))
    tracemalloc.start()
    try:
        part = cache.prepared(records, made, source="x", cache=place / "cache")
        batches = Batches(part.rows, 4, 0)
        held = sum(np.count_nonzero(batches.batch(i)["segment_ids"]) for i in range(len(batches)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    size = path.stat().st_size
    assert held == 8000 * (540 + 2)
    assert peak < size / 4, (peak, size)


def test_only_the_rows_of_a_part_are_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = given(place)
    train, _ = read_rows(options, recipe(options))
    batches, asked = Batches(train.rows, 6, seed=0), []
    whole, take = batches.batch(1), arrow.Column.__getitem__

    def noting(self: arrow.Column, rows: Any) -> Any:
        asked.append(len(rows))
        return take(self, rows)

    monkeypatch.setattr(arrow.Column, "__getitem__", noting)
    part = batches.batch(1, slice(2, 4))
    assert asked == [2] * 4
    for name, array in part.items():
        np.testing.assert_array_equal(array, whole[name][2:4])
    last = batches.batch(len(batches) - 1, slice(4, 6))  # of a batch that is filled up
    np.testing.assert_array_equal(last["tokens"], batches.batch(len(batches) - 1)["tokens"][4:6])


def test_without_a_home_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LORA_MINI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.raises(UserError, match="set HOME, or give --cache-dir"):
        cache_folder("auto")


def test_what_is_wrong_is_said(place: Path) -> None:
    (place / "file").write_text("")
    options = given(place, cache_dir=str(place / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot keep rows in .*--cache-dir .* none"):
        read_rows(options, recipe(options))
    options = given(place)
    read_rows(options, recipe(options))
    for entry in entries(place):
        (place / "cache" / entry / "rows.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(UserError, match=r"rows.arrow is damaged .* delete"):
        read_rows(options, recipe(options))
    (place / "one.jsonl").write_text('{"q": "a", "a": "b"}\n')
    options = given(place, data=str(place / "one.jsonl"))
    with pytest.raises(UserError, match=r"one record of .*one.jsonl is read, .*: give --valid"):
        read_rows(options, recipe(options))


def test_a_record_is_named_by_its_number_in_all_chunks(place: Path) -> None:
    rows = [{"talk": "x"}] * 9 + [{"talk": 3}]
    tokenizer: Any = Bytes()
    with pytest.raises(UserError, match="record 10: field 'talk' holds 3"):
        encode_records(rows, tokenizer, Fields(text_field="talk"), max_length=9)
