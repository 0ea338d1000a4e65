"""Records, tokens, packing, batches and the loss, with real files where they are at hand."""

import csv
import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_mini_jax.data import (
    Batches,
    Example,
    Fields,
    Packed,
    Tokenizer,
    encode_records,
    examples_right,
    load_tokenizer,
    pack,
    read_records,
    token_loss,
)
from lora_mini_jax.data.records import open_records, validation_split
from lora_mini_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LMJ_SHARED", ROOT / ".." / "shared"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "fg"},
]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the developers' data folder: set LMJ_SHARED")
    return path


def character_tokenizer(**changes: Any) -> Tokenizer:
    """One token for each byte, and four special tokens; bos 256, eos 257."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    given: dict[str, Any] = {
        "bos_id": 256,
        "eos_id": 257,
        "vocab_size": 260,
        "chat_template": CHATML,
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    return Tokenizer(backend, **{**given, **changes})


def one_line_error(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# Reading


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"q": 'say "hi",\nthen é', "a": "x"}, {"q": "y", "a": ""}]
    lines = "".join(json.dumps(record) + "\n\n" for record in records)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "a.json").write_text(json.dumps(records))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.PARQUET")
    for path in tmp_path.iterdir():
        assert read_records(path) == records, path
        assert read_records(str(path), limit=1) == records[:1], path
        assert read_records(path, limit=9) == records, path


def test_tsv_keeps_quotes_and_json_takes_strings(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'text\tlabel\r\n"open\t1\r\n\r\na "b"\t0\r\n')
    assert read_records(tmp_path / "a.tsv") == [
        {"text": '"open', "label": "1"},
        {"text": 'a "b"', "label": "0"},
    ]
    (tmp_path / "a.json").write_text('["one", "two"]')
    assert read_records(tmp_path / "a.json") == [{"text": "one"}, {"text": "two"}]


def test_txt_is_one_record_a_block(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n \nA:\r\nfirst\n\n  \n second \n")
    assert read_records(tmp_path / "a.txt") == [{"text": "A:\nfirst"}, {"text": " second "}]


def test_a_field_of_a_table_may_be_long(tmp_path: Path) -> None:
    long = "x " * 100_000
    (tmp_path / "a.csv").write_text(f"q,a\n{long},red\n")
    assert read_records(tmp_path / "a.csv") == [{"q": long, "a": "red"}]


def test_a_pipe_which_can_be_read_once_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="is no ordinary file"):
        read_records(tmp_path / "a.jsonl")


def test_limit_spares_what_lies_beyond(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nbroken')
    assert read_records(tmp_path / "a.jsonl", limit=1) == [{"text": "x"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", ["no records"]),
        ("a.txt", b" \n\n", ["no records"]),
        ("a.json", b"", ["no records"]),
        ("a.json", b"[]", ["no records"]),
        ("a.csv", b"q,a\n", ["no records"]),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', ["line 2", "not valid JSON"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "not valid JSON"]),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', ["line 3", "a list", "object"]),
        ("a.jsonl", b'"x"\n', ["line 1", "a string"]),
        ("a.jsonl", b"null\n", ["line 1", "null"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ["line 2", "0xff", "UTF-8"]),
        ("a.csv", b"q\n\n\xe9\n", ["line 3", "0xe9", "UTF-8"]),
        ("a.txt", "é".encode("utf-16"), ["line 1", "UTF-8"]),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', ["line 3", "not valid JSON"]),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ["line 2", ".jsonl"]),
        ("a.json", b'{"a": 1}', ["an object", "list of objects"]),
        ("a.json", b'[{"a": 1}, 2]', ["item 2", "a number"]),
        ("a.csv", b'q,a\n"1\n2",x\nonly\n', ["line 4", "fields: 1", "2 (q, a)"]),
        ("a.csv", b"q,a\n1,2,3\n", ["line 2", "fields: 3"]),
        ("a.tsv", b"q\ta\n1\t2\t3\n", ["line 2", "fields: 3"]),
        ("a.csv", b'q,a\nx,"never closed\n1,2\n', ["line 2", ".jsonl"]),
        ("a.csv", b"q,q\n1,2\n", ["line 1", "one name"]),
        ("a.parquet", b"PAR1 no, not really", ["parquet"]),
        ("a.pkl", b"cos\nsystem\n", [".jsonl", ".parquet"]),
        ("a", b"text", [".jsonl"]),
    ],
)
def test_malformed_files_are_named_with_the_line(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(tmp_path / name)
    one_line_error(error, str(tmp_path / name), *words)


@pytest.mark.parametrize(
    "name", ["nowhere.jsonl", "no/where.jsonl", "./no/where", "where", "inside/none"]
)
def test_no_such_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    with pytest.raises(UserError) as error:
        read_records(name)
    one_line_error(error, "no such file", ".jsonl", ".csv", "owner/name")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(limit: int) -> None:
    with pytest.raises(UserError) as error:
        read_records("a.jsonl", limit=limit)
    one_line_error(error, f"limit {limit}")


def test_folder_with_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    assert read_records(folder) == [{"text": "a"}, {"text": "b"}]
    assert read_records(folder, split="test", limit=5) == [{"text": "c"}]
    with pytest.raises(UserError) as error:
        read_records(folder, split="nonesuch")
    one_line_error(error, str(folder), "nonesuch")


def test_a_split_that_was_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    classes = datasets.Features(y=datasets.ClassLabel(names=["no", "yes"]))
    one = datasets.Dataset.from_list([{"y": 1}, {"y": 0}, {"y": 1}], classes)
    one.save_to_disk(tmp_path / "one")
    assert read_records(tmp_path / "one") == [{"y": "yes"}, {"y": "no"}, {"y": "yes"}]
    assert read_records(tmp_path / "one", split="test", limit=2) == [{"y": "yes"}, {"y": "no"}]
    assert validation_split(str(tmp_path / "one")) == ""
    told = {json.dumps(open_records(tmp_path / "one", limit=n).fingerprint()) for n in (1, 2, 2)}
    assert len(told) == 2
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"no")
    with pytest.raises(UserError) as error:
        read_records(tmp_path / "one")
    one_line_error(error, str(tmp_path / "one"))


@pytest.mark.parametrize(("files", "split"), [(("train", "validation", "test"), "validation"),
                                              (("train", "valid"), "validation"),
                                              (("train", "dev"), "validation"),
                                              (("train", "test"), "")])  # fmt: skip
def test_the_split_that_a_folder_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], split: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in files:
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert validation_split(str(tmp_path / "set")) == split
    assert validation_split(str(tmp_path / "set" / "train.jsonl")) == ""
    if split:
        assert read_records(tmp_path / "set", split=split) == [{"text": files[1]}]


def test_the_split_of_a_hub_data_set_may_be_called_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": [], "dev": [], "val": []})
    assert validation_split("some-one/some.thing") == "val"
    assert validation_split("no/such.jsonl") == ""


def test_hub_id_goes_to_datasets_and_its_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, split: str) -> None:
        asked.append((name, split))
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as error:
        read_records("some-one/some.thing", split="validation")
    assert asked == [("some-one/some.thing", "validation")]
    one_line_error(error, "some-one/some.thing", "validation", "the hub cannot be reached")


# Tokenizers


def saved(folder: Path, **config: Any) -> Path:
    backend = character_tokenizer().backend
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizer_reads_its_folder(tmp_path: Path) -> None:
    eos = {"content": "</s>", "special": True}
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    folder = saved(tmp_path, bos_token="<s>", eos_token=eos, chat_template=named)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 260)
    text = "Grüße, 世界 </s>"
    ids = tokenizer.encode(text)
    assert len(ids) > 9
    assert ids[-1] == 257
    assert tokenizer.decode(ids) == text.removesuffix("</s>")
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    assert load_tokenizer(folder).apply_chat_template(TALK) == "<s>"


@pytest.mark.parametrize(
    ("config", "model", "expected"),
    [
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 256}, (None, 257)),
        ({"bos_token": "<s>", "add_bos_token": False}, {}, (None, None)),
        ({}, {"bos_token_id": 256, "eos_token_id": 257}, (256, 257)),
        ({}, {"eos_token_id": [257, 1]}, (None, None)),
        ({}, {}, (None, None)),
    ],
)
def test_where_bos_and_eos_come_from(
    tmp_path: Path, config: dict[str, Any], model: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model))
    tokenizer = load_tokenizer(saved(tmp_path, **config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, ["no such folder"]),
        ({"tokenizer.json": "{"}, ["tokenizer.json"]),
        ({"tokenizer_config.json": "{"}, ["tokenizer_config.json"]),
        ({"tokenizer_config.json": '{"eos_token": "<zzz>"}'}, ["eos_token", "<zzz>"]),
        ({"tokenizer_config.json": "{}", "config.json": '{"bos_token_id": 999}'}, ["id 999"]),
    ],
)
def test_tokenizer_errors(tmp_path: Path, files: dict[str, str] | None, words: list[str]) -> None:
    folder = tmp_path / "gone" if files is None else saved(tmp_path)
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    one_line_error(error, str(folder), *words)


def test_transformers_reads_what_has_no_tokenizer_json(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    one_line_error(error, str(tmp_path), "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello world") == [5, 6]
    assert (tokenizer.bos_id, tokenizer.vocab_size) == (None, 7)


# Chat


@pytest.mark.parametrize("prompt", [False, True])
def test_templates_render_as_transformers_does(prompt: bool) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    template = """{{ bos_token }}
    {%- for m in messages %}
        {% if loop.index > 3 %}{% break %}{% endif %}
        {% if m.role == 'assistant' %}
{% generation %}{{ m.content | tojson }}{{ eos_token }}{% endgeneration %}
        {% else %}
[{{ m.role }}] {{ m['content'].strip() }} {{ strftime_now('%Y') }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}>{% endif %}"""
    tokenizer = character_tokenizer(chat_template=template)
    messages = [{"role": "user", "content": " <é> "}, *TALK]
    expected, _ = utils.render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens,
    )
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt) == expected[0]


def trained(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The runs of text that have loss."""
    example = encode_records([{"messages": messages}], tokenizer, Fields(), max_length=999)[0][0]
    assert example.tokens.tolist() == tokenizer.encode(tokenizer.apply_chat_template(messages))
    edges = np.flatnonzero(np.diff(np.r_[0, example.loss_mask, 0])).reshape(-1, 2)
    return [
        tokenizer.backend.decode(example.tokens[start:end].tolist(), skip_special_tokens=False)
        for start, end in edges
    ]


MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{{ '' if not loop.last else '<think>' }}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %};{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["cd<|im_end|>\n", "fg<|im_end|>\n"]),
        (
            CHATML.replace("assistant\n{%", "assistant\n<think>{%"),
            ["cd<|im_end|>\n", "fg<|im_end|>\n"],
        ),
        (INST, [" cd</s>", " fg</s>"]),
        (MARKED, ["cd", "<think>fg"]),
    ],
    ids=["chatml", "think", "inst", "marked"],
)
def test_chat_trains_the_assistant_only(template: str, expected: list[str]) -> None:
    assert trained(character_tokenizer(chat_template=template), TALK) == expected


def test_chat_spans_are_characters_not_bytes() -> None:
    talk = [{"role": "user", "content": "世界é"}, {"role": "assistant", "content": "é世"}]
    assert trained(character_tokenizer(), talk) == ["é世<|im_end|>\n"]
    # With nothing before it an answer's header cannot be told from it; only token 0 is left out.
    assert trained(character_tokenizer(), talk[1:]) == ["assistant\né世<|im_end|>\n"]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, TALK, ["no chat template", "chat_template.jinja"]),
        ("{{ raise_exception('roles\nmust alternate') }}", TALK, ["roles must alternate"]),
        ("{% for %}", TALK, ["chat template"]),
        ("{{ messages[0].content + 1 }}", TALK, ["chat template"]),
        ("{{ ''.__class__.__mro__ }}", TALK, ["chat template"]),
        (
            MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            TALK,
            ["message 2", "{% generation %}"],
        ),
        (CHATML, "hello", ["'messages'", "list of messages"]),
        (CHATML, [], ["'messages'", "list of messages"]),
        (CHATML, [{"role": "user"}], ["message 1", "content"]),
        (CHATML, [TALK[0], {"content": "x"}], ["message 2", "role"]),
        (CHATML, [{"role": "user", "content": None}], ["message 1", "content"]),
        (CHATML, ["x"], ["message 1", "role"]),
    ],
)
def test_chat_errors_name_the_record(template: str | None, messages: Any, words: list[str]) -> None:
    tokenizer = character_tokenizer(chat_template=template)
    with pytest.raises(UserError) as error:
        encode_records(
            [{"messages": messages}], tokenizer, Fields(), max_length=99, source="a.jsonl"
        )
    one_line_error(error, "a.jsonl", "record 1", *words)


def test_chat_without_an_assistant_is_skipped() -> None:
    records = [{"messages": TALK[:1]}, {"messages": TALK}]
    for template in (CHATML, MARKED):
        tokenizer = character_tokenizer(chat_template=template)
        encoded = encode_records(records, tokenizer, Fields(), max_length=99)
        assert (len(encoded.examples), encoded.skipped) == (1, 1)


# Examples


def test_records_of_prompt_and_completion_need_no_names() -> None:
    tokenizer = character_tokenizer()
    records = [{"prompt": "a", "completion": "b", "id": 3}]
    named = Fields(prompt_field="prompt", completion_field="completion")
    (found,), (wanted,) = (
        encode_records(records, tokenizer, fields, max_length=9).examples
        for fields in (Fields(), named)
    )
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.loss_mask, wanted.loss_mask)
    assert not found.loss_mask.all()


def test_text_and_completion_forms() -> None:
    tokenizer = character_tokenizer()
    a, b, newline = (tokenizer.encode(text)[0] for text in ("a", "b", "\n"))
    (text,), _, _ = encode_records([{"text": "ab"}], tokenizer, Fields(), max_length=9)
    assert text.tokens.tolist() == [256, a, b, 257]
    assert text.loss_mask.tolist() == [False, True, True, True]
    fields = Fields(prompt_field="q", completion_field="r")
    (pair,), _, _ = encode_records([{"q": "a", "r": "b"}], tokenizer, fields, max_length=9)
    assert pair.tokens.tolist() == [256, a, newline, b, 257]
    assert pair.loss_mask.tolist() == [False, False, False, True, True]
    assert (pair.tokens.dtype, pair.loss_mask.dtype) == (np.int32, np.bool_)
    bare = character_tokenizer(bos_id=None, eos_id=None)
    (text,), _, _ = encode_records([{"t": "ab"}], bare, Fields(text_field="t"), max_length=9)
    assert text.tokens.tolist() == [a, b]
    assert text.loss_mask.tolist() == [False, True]


def test_overlong_examples() -> None:
    tokenizer = character_tokenizer()
    fields = Fields(prompt_field="q", completion_field="r", separator="")
    records = [{"q": "a" * 7, "r": "b"}, {"q": "a", "r": "b" * 9}, {"q": "a", "r": "b"}]

    def encoded(overlong: Any, records: list[Any] = records) -> Any:
        return encode_records(
            records, tokenizer, fields, max_length=8, overlong=overlong, source="a.csv"
        )

    kept, skipped, truncated = encoded("skip")
    assert ([len(example.tokens) for example in kept], skipped, truncated) == ([4], 2, 0)
    kept, skipped, truncated = encoded("truncate")  # The first is cut down to its prompt.
    assert ([len(example.tokens) for example in kept], skipped, truncated) == ([8, 4], 1, 1)
    with pytest.raises(UserError) as error:
        encoded("error", records[1:])
    one_line_error(error, "a.csv", "record 1:", "12 tokens", "max_length 8")
    with pytest.raises(UserError) as error:
        encoded("skip", records[:2])
    one_line_error(error, "a.csv", "none of 2 records", "10 to 12", "max_length 8")
    with pytest.raises(UserError) as error:
        encoded("drop")
    one_line_error(error, "'drop'", "truncate")


@pytest.mark.parametrize(
    ("record", "fields", "words"),
    [
        ({"a": "x", "b": "y"}, Fields(), ["'text'", "a, b", "prompt_field"]),
        ({"a": "x"}, Fields(prompt_field="a", completion_field="c"), ["'c'", "its fields: a"]),
        ({"text": "x"}, Fields(messages_field="talk"), ["'talk'", "its fields: text"]),
        ({"text": 3.5}, Fields(), ["'text'", "3.5"]),
        ({"text": None}, Fields(), ["'text'", "null"]),
        ({"text": ["x\ny"]}, Fields(), ["'text'"]),
        ({"text": "half \ud800"}, Fields(), ["'text'", "Unicode"]),
    ],
)
def test_bad_fields_are_named_with_the_record(
    record: dict[str, Any], fields: Fields, words: list[str]
) -> None:
    good = {"text": "x", "a": "x", "c": "x", "talk": TALK}
    with pytest.raises(UserError) as error:
        encode_records(
            [good, record], character_tokenizer(), fields, max_length=99, source="a.jsonl"
        )
    one_line_error(error, "a.jsonl", "record 2", *words)


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_field": "a"},
        {"completion_field": "a"},
        {"text_field": "text", "prompt_field": "a", "completion_field": "b"},
        {"text_field": "text", "messages_field": "m"},
        {"prompt_field": "a", "completion_field": "b", "messages_field": "m"},
    ],
)
def test_contradicting_fields(given: dict[str, str]) -> None:
    with pytest.raises(UserError) as error:
        Fields(**given)
    one_line_error(error, *(name for name in given if name != "completion_field"))


def test_nothing_to_encode() -> None:
    for records, length, word in ([], 9, "no records"), ([{"text": "x"}], 1, "max_length is 1"):
        with pytest.raises(UserError) as error:
            encode_records(records, character_tokenizer(), Fields(), max_length=length)
        one_line_error(error, word)


def test_real_records_and_tokenizer() -> None:
    tokenizer = load_tokenizer(shared("models/stories260K-hf"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 512)
    assert tokenizer.chat_template is None
    fields = Fields(prompt_field="meaning_representation", completion_field="reference")
    for name in ("train", "valid"):
        records = read_records(shared(f"data/e2e/{name}.jsonl"), limit=200)
        examples, skipped, truncated = encode_records(
            records, tokenizer, fields, max_length=512, source=name
        )
        assert (len(examples), skipped, truncated) == (200, 0, 0)
        for record, example in zip(records, examples, strict=True):
            answer = example.tokens[example.loss_mask]
            assert example.tokens[0] == 1
            assert answer[-1] == 2
            assert tokenizer.decode(answer.tolist()) == record["reference"]
            prompt = example.tokens[~example.loss_mask].tolist()
            assert tokenizer.decode(prompt) == record["meaning_representation"] + "\n"
        packed = pack(examples, 512)
        assert len(packed.tokens) < 100
        assert (packed.segment_ids > 0).sum() == sum(len(example.tokens) for example in examples)


# Packing and batches


@st.composite
def example_lists(draw: st.DrawFn) -> tuple[list[Example], int]:
    length = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, length), min_size=1, max_size=20))
    starts = np.cumsum([1, *sizes])  # Every token is unlike all others and unlike padding.
    masks = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in sizes]
    return [
        Example(np.arange(start, start + len(mask), dtype=np.int32), np.array(mask))
        for start, mask in zip(starts, masks, strict=False)
    ], length


def unpacked(packed: Packed) -> list[tuple[list[int], list[bool], list[int]]]:
    rows = zip(*vars(packed).values(), strict=True)
    return [
        (tokens[here].tolist(), mask[here].tolist(), positions[here].tolist())
        for tokens, segments, positions, mask in rows
        for here in (segments == segment for segment in range(1, segments.max() + 1))
    ]


@settings(max_examples=100, deadline=None)
@given(example_lists(), st.booleans())
def test_packing_keeps_every_example_whole(drawn: tuple[list[Example], int], packing: bool) -> None:
    examples, length = drawn
    packed = pack(examples, length, packing=packing)
    found = unpacked(packed)
    expected = [
        (tokens.tolist(), [False, *mask[1:].tolist()], list(range(len(tokens))))
        for tokens, mask in examples
    ]
    assert sorted(found) == sorted(expected)
    assert [array.dtype for array in vars(packed).values()] == [np.int32] * 3 + [np.bool_]
    assert all(array.shape == packed.tokens.shape for array in vars(packed).values())
    padding = packed.segment_ids == 0
    assert not any(array[padding].any() for array in vars(packed).values())
    steps = np.diff(packed.segment_ids, axis=1)
    # Segments are contiguous and count up; padding comes last.
    assert (((steps == 0) | (steps == 1)) | (packed.segment_ids[:, 1:] == 0)).all()
    assert (packed.segment_ids[:, 0] == 1).all()
    firsts = [packed.tokens[row, 0] for row in range(len(packed.tokens))]
    assert firsts == sorted(firsts)
    if packing:  # Any two rows together hold more than one row can: else they would be one.
        filled = np.sort((~padding).sum(axis=1))
        assert len(filled) < 2 or filled[0] + filled[1] > length
    else:
        assert found == expected


def test_packing_errors() -> None:
    example = Example(np.arange(5, dtype=np.int32), np.ones(5, bool))
    empty = Example(np.zeros(0, np.int32), np.zeros(0, bool))
    for examples, words in (
        ([], ["no examples"]),
        ([example], ["5 to 5", "rows of 4"]),
        ([empty], ["0 to 0"]),
    ):
        with pytest.raises(UserError) as error:
            pack(examples, 4)
        one_line_error(error, *words)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    size=st.integers(1, 25),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_row_once_an_epoch(
    rows: int, size: int, seed: int, epoch: int, shuffle: bool
) -> None:
    examples = [
        Example(np.full(2, row + 1, np.int32), np.array([False, True])) for row in range(rows)
    ]
    batches = Batches(pack(examples, 3, packing=False), size, seed, shuffle)
    assert len(batches) == -(-rows // size)
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    seen = [batches.batch(step) for step in reversed(steps)][::-1]
    for batch in seen:
        assert all(array.shape == (size, 3) for array in batch.values())
    order = np.concatenate([batch["tokens"][:, 0] for batch in seen])
    kept, filled = order[:rows], order[rows:]
    assert sorted(kept) == list(range(1, rows + 1))
    assert not filled.any()
    assert sum(batch["loss_mask"].sum() for batch in seen) == rows
    if not shuffle:
        assert kept.tolist() == list(range(1, rows + 1))
    again = Batches(pack(examples, 3, packing=False), size, seed, shuffle)
    seen[0]["tokens"][:] = -1  # A batch is the caller's own.
    for step, batch in islice(zip(steps, seen, strict=True), 1, None):
        np.testing.assert_equal(again.batch(step), batch)
    assert (again.batch(steps[0])["tokens"] >= 0).all()


def test_order_is_of_seed_and_epoch() -> None:
    examples = [Example(np.full(1, row, np.int32), np.zeros(1, bool)) for row in range(50)]
    packed = pack(examples, 1)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(Batches(packed, 50, seed).batch(epoch)["tokens"][:, 0].tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(1, 2) == order(1, 2)
    evaluated = [batch["tokens"][:, 0].tolist() for batch in Batches(packed, 20, 0).eval_batches()]
    assert [row for rows in evaluated for row in rows][:50] == list(range(50))
    assert len(evaluated) == 3


def test_rows_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_mini_jax.data.batches.TOLD", 4)
    example = Example(np.full(2, 3, np.int32), np.ones(2, bool))
    packed = pack([example] * 9, 3, packing=False)
    told = Batches(packed, 2, 0).fingerprint
    assert Batches(packed, 4, 1, shuffle=False).fingerprint == told
    changed = [pack([example] * 8, 3, packing=False)]  # where those that are read are the same
    for name, array in vars(packed).items():
        for row in (0, -1):
            other = array.copy()
            other[row, -1] ^= True
            changed.append(replace(packed, **{name: other}))
    assert len({told, *(Batches(each, 2, 0).fingerprint for each in changed)}) == 10


def test_batches_errors() -> None:
    packed = pack([Example(np.zeros(1, np.int32), np.zeros(1, bool))], 1)
    for call, word in (
        (lambda: Batches(packed, 0, 0), "batch_size 0"),
        (lambda: Batches(packed, 1, -1), "seed -1"),
        (lambda: Batches(packed, 1, 0).batch(-1), "step -1"),
    ):
        with pytest.raises(UserError) as error:
            call()
        one_line_error(error, word)


# Loss


def random_batch(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    examples = [
        Example(rng.integers(0, 11, n, dtype=np.int32), rng.random(n) < 0.6)
        for n in rng.integers(1, 8, 9)
    ]
    batch = Batches(pack(examples, 8), 8, seed).batch(0)
    return rng.normal(size=(8, 8, 11)).astype(np.float32) * 3, batch


def test_loss_is_a_plain_loop() -> None:
    logits, batch = random_batch(0)
    total, number = jax.jit(token_loss)(logits, batch)
    expected, counted = 0.0, 0
    for row, column in np.argwhere(batch["loss_mask"]):
        scores = logits[row, column - 1].astype(np.float64)
        expected += np.log(np.exp(scores).sum()) - scores[batch["tokens"][row, column]]
        counted += 1
    assert counted > 5
    assert number == counted
    assert total.dtype == number.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    half, _ = token_loss(jnp.asarray(logits, jnp.bfloat16), batch)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=2e-2)


def test_loss_ignores_what_does_not_count() -> None:
    logits, batch = random_batch(1)
    total, number = token_loss(jnp.asarray(logits), batch)
    silent = np.ones((8, 8), bool)
    silent[:, :-1] = ~batch["loss_mask"][:, 1:]
    for value in (1e30, np.inf, np.nan):
        changed = np.where(silent[..., None], np.float32(value), logits)
        tokens = np.where(batch["segment_ids"] == 0, 7, batch["tokens"])
        again = token_loss(jnp.asarray(changed), {**batch, "tokens": tokens})
        assert (again[0], again[1]) == (total, number)
    gradient = jax.grad(lambda x: token_loss(x, batch)[0])(jnp.asarray(logits))
    assert not gradient[silent].any()
    assert gradient[~silent].any()


def test_loss_refuses_shapes_that_do_not_go_together() -> None:
    logits, batch = random_batch(2)
    short = {**batch, "loss_mask": batch["loss_mask"][:, 1:]}
    for wrong, other in ((logits[:, :-1], batch), (logits[..., 0], batch), (logits, short)):
        with pytest.raises(UserError) as error:
            token_loss(jnp.asarray(wrong), other)
        one_line_error(error, str(wrong.shape), "(8, 8)", str(other["loss_mask"].shape))


def test_examples_that_are_right_are_counted_as_by_a_plain_loop() -> None:
    _, batch = random_batch(3)
    right = np.random.default_rng(3).random((8, 8)) < 0.8
    found = jax.jit(examples_right)(right, batch)
    expected = []
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            counted = np.flatnonzero((segments == segment) & batch["loss_mask"][row])
            if counted.size:
                expected.append(right[row, counted - 1].all())
    assert [float(each) for each in found] == [sum(expected), len(expected)]
    assert 0 < sum(expected) < len(expected) < sum(batch["segment_ids"].max(1))
