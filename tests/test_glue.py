"""GLUE's tasks by name: their files in both layouts, the hub, labels and what they select by."""

import dataclasses

import datasets
import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from lora_mini_jax import UserError
from lora_mini_jax.cli import parse
from lora_mini_jax.data import (
    Tokenizer,
    class_names,
    class_numbers,
    encode_labelled,
    read_glue,
    read_records,
)
from lora_mini_jax.glue import HUB, TASKS
from lora_mini_jax.tasks.kinds import prepare
from tests.encoder_runs import options

FILES = {
    "MRPC": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
            '1\t7\t8\tthe "sun was good\tthe sun\n0\t7\t8\train\tthe day was bad\n',
    "CoLA": "gj04\t1\t\tthe day was good .\ngj04\t0\t*\tday the was\n",
    "STS-B": "index\tgenre\tsentence1\tsentence2\tscore\n0\tx\tthe sun\tthe sea\t2.500\n"
             "1\tx\train\train\t5.000\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n0\tthe sun\train\tnot_entailment\n"
           "1\tthe sun\tsun\tentailment\n",
    "MNLI": "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
            "0\tthe sun\tthe sea\tneutral\tcontradiction\n1\ta\tb\tneutral\tneutral\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for name, text in FILES.items():
        (folder / name).mkdir()
        held_out = "dev_matched.tsv" if name == "MNLI" else "dev.tsv"
        for file in ("train.tsv", held_out):
            (folder / name / file).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "labels"), [
    ("mrpc", [1, 0]), ("cola", [1, 0]), ("rte", [1, 0]), ("mnli", [2, 1]),
])  # fmt: skip
def test_the_authors_files_have_the_hubs_fields(place, name, labels):
    task = TASKS[name]
    for split in ("train", "validation"):
        records = read_glue(name, str(place), split)
        assert set(task.texts) < set(records[0])
        found = class_numbers(records, "label", task.labels, "x", given=True)
        assert found.tolist() == labels
    assert read_glue(name, str(place / task.folder), "train") == records
    assert len(read_glue(name, str(place), "train", limit=1)) == 1


def test_the_hubs_files_are_read_in_parts(tmp_path):
    (tmp_path / "sst2").mkdir()
    for part, sentence in enumerate(("good", "bad")):
        data = datasets.Dataset.from_dict({"sentence": [sentence], "label": [1 - part]})
        data.to_parquet(tmp_path / "sst2" / f"train-0000{part}-of-00002.parquet")
    records = read_glue("sst2", str(tmp_path), "train")
    assert [(r["sentence"], r["label"]) for r in records] == [("good", 1), ("bad", 0)]
    with pytest.raises(UserError, match=r"no file validation or dev .* of GLUE's sst2 in"):
        read_glue("sst2", str(tmp_path), "validation")
    with pytest.raises(UserError, match="no such folder"):
        read_glue("sst2", str(tmp_path / "nowhere"), "train")


def test_the_hub_is_asked_for_the_task_and_the_split(monkeypatch):
    asked = []
    names = list(TASKS["mnli"].labels)
    features = datasets.Features({"premise": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=names)})  # fmt: skip
    data = {"premise": ["a", "b", "c"], "label": [2, 0, -1]}

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_dict(data, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = read_glue("mnli", "", "validation")
    assert asked == [(HUB, "mnli", "validation_matched")]
    assert [r["label"] for r in records] == ["contradiction", "entailment", None]
    # The order is the data set's, not the alphabet's, and classes that do not occur count.
    given = read_records("some/set", limit=2)
    assert asked[1:] == [("some/set", "train")]
    assert class_names(given, "label", "x") == tuple(names)
    with pytest.raises(UserError, match=r"record 3: .*None, which stands for no label"):
        class_numbers(records, "label", names, "x")


def test_labels_in_data_become_names_in_order():
    def found(*values):
        return class_names([{"label": value} for value in values], "label", "x")

    assert found(2, 10, 1, 2) == found("10", "2", "1") == ("1", "2", "10")
    assert found("yes", "no") == ("no", "yes")
    with pytest.raises(UserError, match=r"record 2: .*-1, which stands for no label"):
        found(1, -1)
    # A number is a place among names that were given, and among them only.
    rows = [{"label": value} for value in (0, "1", "no")]
    assert class_numbers(rows, "label", ("yes", "no"), "x", given=True).tolist() == [0, 1, 1]
    with pytest.raises(UserError, match=r"record 1: .* holds 0, which is none of the classes yes"):
        class_numbers(rows, "label", ("yes", "no"), "x")
    with pytest.raises(UserError, match=r"record 1: .* holds 0, which is none of the classes 1, 2"):
        class_numbers(rows, "label", ("1", "2"), "x")


def test_a_name_sets_everything_and_what_is_given_wins():
    given = parse(["finetune", "--glue", "mrpc", "--data", "here"])
    assert (given.task, given.text_fields) == ("classification", ("sentence1", "sentence2"))
    assert given.labels == ("not_equivalent", "equivalent")
    assert given.label_field == "label"
    assert given.keeps_best
    assert parse(["finetune", "--glue", "mrpc", "--metric", "accuracy"]).selects_by == "accuracy"
    metrics = {name: parse(["finetune", "--glue", name]).selects_by for name in TASKS}
    assert metrics == dict.fromkeys(TASKS, "accuracy") | {
        "cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "pearson"}  # fmt: skip


def test_a_task_by_name_is_prepared_from_a_folder(place, tmp_path):
    given = dataclasses.replace(
        options(tmp_path), task="language", text_fields=(), glue="mrpc", data=str(place), valid=""
    )
    task = prepare(given)
    assert task.model.config.labels == TASKS["mrpc"].labels
    assert task.train.packed.labels.tolist() == task.valid.packed.labels.tolist() == [1, 0]
    assert task.eval_every == 1
    with pytest.raises(UserError, match=r"no file validation or dev .* of GLUE.s mrpc"):
        prepare(dataclasses.replace(given, data=str(tmp_path)))


def words(pair: str) -> Tokenizer:
    """A tokenizer of the digits, with a template."""
    vocab = {word: i for i, word in enumerate(["[P]", "[C]", "[S]", *"0123456789"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[P]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[C] $A [S]", pair=pair, special_tokens=[("[C]", 1), ("[S]", 2)]
    )
    return Tokenizer(backend, None, None, 13, None, {})


def test_pairs_are_cut_at_the_longer_text_and_padded_with_the_models_id():
    tokenizer = words("[C]:0 $A:0 [S]:0 $B:1 [S]:1")
    records = [{"a": "0 1 2 3 4 5 6 7", "b": "8 9"}, {"a": "0", "b": "1"}]
    labels = np.array([1, 0], np.int32)
    made, cut = encode_labelled(
        records, tokenizer, ("a", "b"), labels, max_length=9, pad_id=12, source="x"
    )
    assert cut == 1
    np.testing.assert_array_equal(made.tokens, [[1, 3, 4, 5, 6, 2, 11, 12, 2],
                                                [1, 3, 2, 4, 2, 12, 12, 12, 12]])  # fmt: skip
    np.testing.assert_array_equal(made.segment_ids, [[1] * 9, [1] * 5 + [0] * 4])
    np.testing.assert_array_equal(made.type_ids, [[0] * 6 + [1] * 3, [0, 0, 0, 1, 1] + [0] * 4])
    one, cut = encode_labelled(records[1:], tokenizer, ("a",), labels[:1], max_length=64, types=1)
    assert (one.tokens.tolist(), cut) == ([[1, 3, 2, 0, 0, 0, 0, 0]], 0)
    assert tokenizer.encode("0 1 2") == [3, 4, 5], "it itself cuts nothing"
