"""Conversations of every form that records have them in, as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_mini_jax.data import Fields, Tokenizer, encode_records, load_tokenizer, read_records
from lora_mini_jax.data.cache import _tokenizer
from lora_mini_jax.data.encoded import joined
from lora_mini_jax.data.pairs import pair_stream
from lora_mini_jax.errors import UserError
from lora_mini_jax.models.saving import _copy_companions
from tests.test_data import CHATML, TALK, character_tokenizer, one_line_error, saved
from tests.test_readme import blocks

SEEN = {"type": "object", "properties": {"é": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "sky", "parameters": SEEN}},
    {"type": "function", "function": {"name": "sea", "parameters": {"type": "object"}}},
]
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"é": "<b>"}}}
CALLED = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "blue", "name": "sky"},
    {"role": "assistant", "content": "cd"},
]
# As Qwen and others do it: tools first, calls as JSON, what a tool says as the user's turn.
CALLING = """{%- if tools is not none %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson(sort_keys=True) }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- set role = 'user' if m.role == 'tool' else m.role %}
<|im_start|>{{ role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}
{%- for call in m.tool_calls %}<call>{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endgeneration %}{% else %}{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PLAIN = CALLING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
PARTS = """{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}
{%- else %}{% for part in m['content'] %}({{ part['text'] | trim }}){% endfor %}{% endif %};
{%- endfor %}"""
FORMS = {
    "tools": {"messages": CALLED, "tools": TOOLS},
    "tools as JSON": {"messages": CALLED, "tools": json.dumps(TOOLS)},
    "no tools": {"messages": CALLED},
    "null": {"messages": CALLED, "tools": None},
    "none of them": {"messages": CALLED, "tools": []},
    "no content": {"messages": [TALK[0], {"role": "assistant", "tool_calls": [CALL]}]},
    "prompt and completion": {"prompt": CALLED[:1], "completion": CALLED[1:], "tools": TOOLS},
}


def encoded(record: dict[str, Any], template: str | None = CALLING, **how: Any) -> Any:
    tokenizer = character_tokenizer(chat_template=template)
    return encode_records([record], tokenizer, Fields(), max_length=999, **how).examples[0]


def of_transformers(record: dict[str, Any], template: str) -> tuple[list[int], list[int]]:
    """The tokens, and which of them are the assistant's."""
    transformers = pytest.importorskip("transformers")
    backend = character_tokenizer().backend
    given = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **given)
    tools = record.get("tools")
    found = theirs.apply_chat_template(
        record.get("messages") or record["prompt"] + record["completion"],
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], found["assistant_masks"]


def runs(example: Any) -> list[str]:
    """The stretches of text that have loss."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.loss_mask, 0])).reshape(-1, 2)
    decode = character_tokenizer().backend.decode
    parts = (example.tokens[start:end].tolist() for start, end in edges)
    return [decode(part, skip_special_tokens=False) for part in parts]


@pytest.mark.parametrize("template", [CALLING, PLAIN], ids=["marked", "plain"])
@pytest.mark.parametrize("form", FORMS)
def test_tools_and_calls_are_written_as_by_transformers(form: str, template: str) -> None:
    tokens, mask = of_transformers(FORMS[form], CALLING)
    ours = encoded(FORMS[form], template)
    assert ours.tokens.tolist() == tokens
    assert ours.loss_mask.tolist() == list(map(bool, mask))
    text = character_tokenizer().decode(tokens)
    assert text.count('"sea"') == (1 if FORMS[form].get("tools") else 0)
    assert '<call>{"name": "sky", "arguments": {"é": "<b>"}}' in text


@pytest.mark.parametrize("template", [CALLING, PLAIN], ids=["marked", "plain"])
def test_of_a_prompt_of_messages_nothing_is_learned(template: str) -> None:
    for since in (1, 2, 3):
        record = {"prompt": TALK[:since], "completion": TALK[since:], "tools": TOOLS}
        ours = encoded(record, template)
        whole = encoded({"messages": TALK, "tools": TOOLS}, template)
        assert ours.tokens.tolist() == whole.tokens.tolist()
        wanted = ["cd<|im_end|>\n", "fg<|im_end|>\n"]
        assert runs(whole) == wanted
        assert runs(ours) == wanted[since // 2 :]


def test_prompts_of_messages_may_have_fields_of_any_name() -> None:
    fields = Fields(prompt_field="q", completion_field="a")
    record = {"q": TALK[:1], "a": TALK[1:2]}
    tokenizer = character_tokenizer()
    ours = encode_records([record], tokenizer, fields, max_length=99).examples[0]
    assert runs(ours) == ["cd<|im_end|>\n"]
    wrong = Fields(prompt_field="q", completion_field="a", separator=": ")
    with pytest.raises(UserError, match="separator ': ' goes between prompt and"):
        encode_records([record], tokenizer, wrong, max_length=99)


def test_the_template_for_tools_is_taken_where_there_is_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": CALLING}]
    folder = saved(tmp_path, bos_token="<s>", eos_token="</s>", chat_template=named,
                   tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for tools in (None, TOOLS):
        wanted = theirs.apply_chat_template(TALK, tools=tools, tokenize=False)
        assert ours.apply_chat_template(TALK, tools=tools) == wanted
        assert ("sea" in wanted) == (tools is not None)
        assert ours.encode(wanted) == ours.encode_chat(TALK, tools=tools)[0]


def test_what_a_table_adds_to_objects_of_a_row_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record = {"id": None, "messages": CALLED, "tools": TOOLS}
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "train.parquet"
    table = pyarrow.Table.from_pylist([record])
    assert table.to_pylist() != [record]
    pyarrow.parquet.write_table(table, path)
    for source in (path, tmp_path / "set"):
        (found,) = read_records(source)
        assert found["id"] is None
        np.testing.assert_equal(tuple(encoded(found)), tuple(encoded(record)))


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_parts_of_text_go_to_a_template_that_reads_them_and_else_are_joined() -> None:
    pytest.importorskip("transformers")
    talk = [{"role": "user", "content": in_parts("a ", "b")}, TALK[1]]
    wanted, _ = of_transformers({"messages": talk}, PARTS)
    assert encoded({"messages": talk}, PARTS).tokens.tolist() == wanted
    assert character_tokenizer().decode(wanted) == "user: (a)(b);assistant: cd;"
    wanted, _ = of_transformers({"messages": [{**TALK[0], "content": "a b"}, TALK[1]]}, CHATML)
    assert encoded({"messages": talk}, CHATML).tokens.tolist() == wanted


def test_templates_in_a_folder_of_their_own_are_read_and_kept(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "a").mkdir()
    folder = saved(tmp_path / "a", bos_token="<s>", eos_token="</s>",
                   tokenizer_class="PreTrainedTokenizerFast")  # fmt: skip
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CALLING)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for tools in (None, TOOLS):
        wanted = theirs.apply_chat_template(TALK, tools=tools, tokenize=False)
        assert ours.apply_chat_template(TALK, tools=tools) == wanted
        assert ("sea" in wanted) == (tools is not None)
    copies = tmp_path / "b"
    copies.mkdir()
    _copy_companions(folder, copies)
    assert load_tokenizer(copies).apply_chat_template(TALK, tools=TOOLS) == wanted
    before = _tokenizer(folder)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CALLING + " ")
    assert before.keys() == _tokenizer(folder).keys()
    assert before != _tokenizer(folder)


def test_a_comment_in_a_template_writes_no_tools() -> None:
    with pytest.raises(UserError, match="has tools, and the chat template writes none"):
        encoded({"messages": TALK, "tools": TOOLS}, "{# tools and tool_calls #}" + CHATML)


def test_the_system_of_sharegpt_is_read() -> None:
    said = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}]
    ours = encoded({"conversations": said, "system": "s"})
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "cd"}]  # fmt: skip
    np.testing.assert_equal(tuple(ours), tuple(encoded({"messages": talk})))
    twice = {"conversations": [{"from": "system", "value": "t"}, *said], "system": "s"}
    with pytest.raises(UserError, match="so is the field 'system'"):
        encoded(twice)


def test_sharegpt_is_read_as_messages() -> None:
    say = [("system", "s"), ("human", "ab"), ("gpt", "cd"), ("function", "e"), ("gpt", "fg")]
    record = {"conversations": [{"from": role, "value": text} for role, text in say]}
    roles = ("system", "user", "assistant", "tool", "assistant")
    talk = [{"role": role, "content": text} for role, (_, text) in zip(roles, say, strict=True)]
    ours, wanted = encoded(record), encoded({"messages": talk})
    np.testing.assert_equal(tuple(ours), tuple(wanted))
    assert runs(ours) == ["cd<|im_end|>\n", "fg<|im_end|>\n"]
    np.testing.assert_equal(tuple(encoded({"conversations": talk})), tuple(wanted))


def with_content(content: Any, **others: Any) -> dict[str, Any]:
    return {"messages": [TALK[0], {"role": "assistant", "content": content, **others}]}


@pytest.mark.parametrize(
    ("record", "template", "words"),
    [
        ({"messages": TALK, "tools": TOOLS}, CHATML, ["has tools", "leave them out"]),
        ({"messages": CALLED}, CHATML, ["has tool_calls", "leave them out"]),
        ({"messages": TALK, "tools": "{"}, CALLING, ["'tools'", "not JSON"]),
        ({"messages": TALK, "tools": "3"}, CALLING, ["'tools'", "3 is no list of objects"]),
        ({"messages": TALK, "tools": ["sky"]}, CALLING, ["'tools'", "['sky'] is no list"]),
        ({"messages": TALK, "tools": [{"name": "\ud800"}]}, CALLING, ["UnicodeEncodeError"]),
        (with_content(None), CALLING, ["message 2", "content"]),
        (with_content(None, tool_calls=[]), CALLING, ["message 2", "content"]),
        (with_content(3, tool_calls=[CALL]), CALLING, ["message 2", "content"]),
        ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, CALLING, ["message 1", "content"]),
        (with_content([]), CALLING, ["message 2", "content"]),
        (with_content(["x"]), CALLING, ["message 2", "its part 'x' is no text"]),
        (with_content([{"type": "text"}]), CALLING, ["message 2", "is no text"]),
        (with_content([{"type": "image", "text": "x"}]), CALLING, ["message 2", "'image'"]),
        ({"prompt": TALK[:1], "completion": "cd"}, CALLING, ["'completion'", "list of messages"]),
        ({"prompt": TALK[:1], "completion": []}, CALLING, ["'completion'", "list of messages"]),
        ({"conversations": [{"from": "bing", "value": "x"}]}, CALLING, ["'bing'", "human, user"]),
        ({"conversations": [{"from": [], "value": "x"}]}, CALLING, ["from []", "human, user"]),
        ({"conversations": [{"from": "gpt", "value": None}]}, CALLING, ["message 1", "content"]),
    ],
)
def test_what_no_template_can_write_is_refused(
    record: dict[str, Any], template: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        encoded(record, template, source="a.jsonl")
    one_line_error(error, "a.jsonl", "record 1", *words)


def test_the_records_that_the_guide_shows_are_read() -> None:
    (shown,) = blocks("command-line.md", "json")
    *others, last = map(encoded, map(json.loads, shown.splitlines()))
    assert [len(runs(example)) for example in others] == [1, 1, 1]
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert runs(last) == [f"{call}<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_a_t5_learns_from_texts_alone() -> None:
    tokenizer: Tokenizer = character_tokenizer()
    record = {"prompt": TALK[:1], "completion": TALK[1:2]}
    how: dict[str, Any] = {"start_id": 3, "max_length": 40}
    with pytest.raises(UserError, match=r"record 1: field 'prompt' holds .* no text"):
        joined(pair_stream([record], tokenizer, Fields(), **how))
