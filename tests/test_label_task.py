"""Texts with classes or numbers: whole runs, what they keep, and what stops them."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from lora_mini_jax import UserError
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.cli import main
from lora_mini_jax.commands.predict import run_predict
from lora_mini_jax.data import class_names, class_numbers
from lora_mini_jax.options import Predict
from lora_mini_jax.runs.best import Best
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.loop import make_evaluate
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks.kinds import planned, prepare
from tests.encoder_runs import options, rows, write_encoder, write_rows
from tests.runs import options as language_options
from tests.runs import stopped_at


def quiet(given):
    return finetune(given, say=lambda line: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


@pytest.fixture(scope="module")
def finished(place):
    given = options(place)
    return given, quiet(given)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_easy_rule_is_learned_and_the_first_best_is_kept(finished, place):
    given, summary = finished
    found = {r["step"]: r for r in RunFolder(given).metrics.rows() if "valid_accuracy" in r}
    assert sorted(found) == [0, 4, 8, 12, 16, 20, 24], "once an epoch"
    assert summary["valid_accuracy_after"] == summary["valid_f1_after"] == 1.0
    assert summary["valid_accuracy_before"] < 1.0
    best = min(step for step, row in found.items() if row["valid_accuracy"] == 1.0)
    assert summary["kept_step"] == best < 24 == summary["steps"]
    task = prepare(given)
    adapter = storage.load(place / "run" / "adapter", task.params)
    measured = make_evaluate(task)(adapter)
    assert measured["valid_loss"] == pytest.approx(found[best]["valid_loss"], rel=1e-5)
    assert measured["valid_loss"] != pytest.approx(found[24]["valid_loss"], rel=1e-2)
    page = (place / "run" / "report.html").read_text()
    assert f"Kept is the adapter of step {best}, the best by held-out accuracy" in page
    assert "F1 is binary, that of the class &#x27;yes&#x27;" in page


def test_the_head_is_trained_whole_and_the_rest_by_the_method(finished):
    given, summary = finished
    by_name = {}
    for site in planned(given):
        by_name.setdefault(site.method.name, set()).add(site.target.path)
    assert by_name["full"] == {f"{m}/{leaf}" for m in ("pooler/dense", "classifier")
                               for leaf in ("kernel", "bias")}  # fmt: skip
    assert len(by_name["lora"]) == 6
    assert summary["trainable"] == 16 * 17 + 17 * 2 + 2 * (4 * 32 + 2 * 40)
    named = dataclasses.replace(given, target_modules=("query", "pooler"))
    lora = {s.target.path for s in planned(named) if s.method.name == "lora"}
    assert lora == {"encoder/layer_0/attention/self/query/kernel", "pooler/dense/kernel"}
    alone = dataclasses.replace(given, modules_to_save=("classifier",))
    full = {s.target.path for s in planned(alone) if s.method.name == "full"}
    assert full == {"classifier/kernel", "classifier/bias"}


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def at_step(step, function):
    """``function``, or an interruption where its state is of this step."""
    return lambda self, state: (interrupt if int(state.step) == step else function)(self, state)


KILLED = {
    "later": lambda best: stopped_at(best + 2),
    "before its checkpoint": lambda best: mock.patch.object(
        Checkpoints, "save", at_step(best, Checkpoints.save)
    ),
    "before it is written": lambda best: mock.patch.object(
        Best, "update", at_step(best, Best.update)
    ),
    "at the end": lambda best: mock.patch.object(Best, "load", interrupt),
}
"""Moments, from the step of the best evaluation."""


@pytest.mark.parametrize("moment", KILLED, ids=lambda name: name.replace(" ", "-"))
def test_a_killed_run_ends_with_the_same_best(finished, place, moment):
    given, summary = finished
    best, folder = summary["kept_step"], place / f"killed {moment}"
    given = dataclasses.replace(given, output_dir=str(folder))
    with KILLED[moment](best), pytest.raises(KeyboardInterrupt):
        quiet(given)
    again = quiet(given)
    for name in ("adapter.json", "adapter.safetensors"):
        ours, whole = (p / "adapter" / name for p in (folder, place / "run"))
        assert ours.read_bytes() == whole.read_bytes()
    assert again["kept_step"] == best
    assert again["valid_loss_after"] == summary["valid_loss_after"]


def test_a_worse_state_after_the_best_is_not_kept(place):
    """Language, by loss, at a learning rate that is far too high."""
    given = language_options(
        place,
        output_dir=str(place / "high"),
        max_steps=4,
        eval_every=1,
        learning_rate=3.0,
        warmup_ratio=0.0,
        keep="best",
        samples=0,
    )
    summary = quiet(given)
    loss = {
        r["step"]: r["valid_loss"] for r in RunFolder(given).metrics.rows() if "valid_loss" in r
    }
    after = {step: value for step, value in loss.items() if step}
    assert summary["valid_loss_after"] == min(after.values())
    assert summary["kept_step"] == min(after, key=lambda step: after[step]) < 4


def torch_logits(model, task):
    """Of the held-out rows, by a torch model."""
    batch, n = task.valid.packed, len(task.valid.packed.labels)
    names = {"input_ids": batch.tokens, "attention_mask": batch.segment_ids,
             "token_type_ids": batch.type_ids}  # fmt: skip
    with torch.no_grad():
        return model.eval()(**{k: torch.tensor(v) for k, v in names.items()}).logits.numpy()[:n]


def test_predictions_are_those_of_the_merged_and_the_exported_model(finished, place):
    given, _ = finished
    adapter = ["--adapter", str(place / "run" / "adapter")]
    unlabelled = [{k: v for k, v in row.items() if k != "label"} for row in rows(61)[50:]]
    data = write_rows(place / "unlabelled.jsonl", unlabelled)
    main(["predict", *adapter, "--data", str(data), "--output", str(place / "out.jsonl"),
          "--batch-size", "4"])  # fmt: skip
    told = lines(place / "out.jsonl")
    assert [one["index"] for one in told] == list(range(11))
    assert [one["label"] for one in told] == [row["label"] for row in rows(61)[50:]]
    chances = np.array([[one["probabilities"][n] for n in ("no", "yes")] for one in told])
    np.testing.assert_allclose(chances.sum(1), 1)

    task = prepare(given)
    main(["merge", *adapter, "--model", given.model, "--output-dir", str(place / "merged")])
    hf = AutoModelForSequenceClassification.from_pretrained(place / "merged")
    np.testing.assert_allclose(
        jax.nn.softmax(torch_logits(hf, task)), chances, rtol=1e-4, atol=1e-6
    )
    assert hf.config.id2label == {0: "no", 1: "yes"}
    assert hf.config.label2id == {"no": 0, "yes": 1}
    assert hf.config.num_labels == 2
    assert hf.config.problem_type == "single_label_classification"

    main(["export", *adapter, "--model", given.model, "--output-dir", str(place / "peft")])
    assert (
        json.loads((place / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    )
    base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    theirs = torch_logits(PeftModel.from_pretrained(base, place / "peft"), task)
    np.testing.assert_allclose(theirs, torch_logits(hf, task), rtol=1e-4, atol=1e-5)


def test_a_number_is_learned_and_told(place):
    write_encoder(place / "roberta", "roberta")
    for name, records in (("n-train", rows(28, True)), ("n-valid", rows(61, True)[50:])):
        write_rows(place / f"{name}.jsonl", records)
    given = options(place, task="regression", model=str(place / "roberta"), epochs=8.0,
                    data=str(place / "n-train.jsonl"), valid=str(place / "n-valid.jsonl"),
                    output_dir=str(place / "numbers"), max_steps=32)  # fmt: skip
    summary = quiet(given)
    assert summary["valid_pearson_after"] > 0.95 > summary["valid_pearson_before"]
    assert summary["valid_mse_after"] == pytest.approx(summary["valid_loss_after"], rel=1e-5)
    adapter = ["--adapter", str(place / "numbers" / "adapter")]
    main(["predict", *adapter, "--data", given.valid, "--output", str(place / "numbers.jsonl")])
    main(["merge", *adapter, "--model", given.model, "--output-dir", str(place / "merged-n")])
    hf = AutoModelForSequenceClassification.from_pretrained(place / "merged-n")
    values = [one["value"] for one in lines(place / "numbers.jsonl")]
    assert all(set(one) == {"index", "value"} for one in lines(place / "numbers.jsonl"))
    theirs = torch_logits(hf, prepare(given))[:, 0]
    np.testing.assert_allclose(theirs, values, rtol=1e-4, atol=1e-5)
    assert hf.config.problem_type == "regression"
    main(["export", *adapter, "--model", given.model, "--output-dir", str(place / "peft-n")])
    base = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=1)
    exported = torch_logits(PeftModel.from_pretrained(base, place / "peft-n"), prepare(given))
    np.testing.assert_allclose(exported[:, 0], values, rtol=1e-4, atol=1e-5)


def test_rows_of_padding_do_not_count(finished):
    task = prepare(finished[0])
    adapter = storage.load(RunFolder(finished[0]).adapter, task.params)
    assert len(task.valid.packed.tokens) == 11, "which leaves padding in the last batch of 8"
    one = dataclasses.replace(task.valid, batch_size=11)
    loss = jax.jit(lambda batch: task.loss(task.params, adapter, batch, jax.random.key(0)))
    value, number = loss(one.batch(0))
    assert number == 11
    assert make_evaluate(task)(adapter)["valid_loss"] == pytest.approx(float(value), rel=1e-5)


def test_compare_shows_the_metric(place, capsys):
    given = options(place)
    flags = ["--task", "classification", "--text-fields", "a", "b", "--model", given.model,
             "--data", given.data, "--valid", given.valid, "--max-steps", "1"]  # fmt: skip
    both = ["--output-dir", str(place / "both")]
    main(["compare", *flags, *both, "--rank", "1", "--max-length", "24", "--methods", "lora",
           "full:target_modules=head-only", "--seeds", "0"])  # fmt: skip
    said = capsys.readouterr().out
    before = summary_of(place / "both")["rows"][0]["valid_accuracy_before"]
    head, _, first, _ = said[said.index("method  ") :].splitlines()[:4]
    assert "accuracy before  accuracy after" in head
    start = head.index("accuracy before")
    assert first[start : start + len("accuracy before")].strip() == f"{before:.1%}"
    assert "Matthews" in said
    assert "examples right" not in said
    assert "held-out accuracy" in (place / "both" / "report.html").read_text()
    summary = summary_of(place / "both")
    assert all("valid_matthews_after" in row for row in summary["rows"])
    assert summary["rows"][1]["trainable"] == 16 * 17 + 17 * 2


GOOD = rows(12)
WRONG = {
    "an unknown label": ({}, [{"label": "maybe"}], "valid.jsonl, line 3: field 'label' holds "
                         "'maybe', which is none of the classes no, yes"),
    "none": ({}, [{"label": None}], "line 3: field 'label' holds None, which stands for no label"),
    "the test split": ({"labels": ("no", "yes")}, [{"label": -1}], "line 3: .* -1, which stands"),
    "a fraction": ({}, [{"label": 0.5}], "line 3: field 'label' holds 0.5, which is no class"),
    "a gap": ({}, [{"label": float("nan")}], "line 3: field 'label' holds nan, which stands for"),
    "several classes": ({}, [{"label": ["yes"]}], r"line 3: field 'label' holds \['yes'\], and one "
                        "class for each text is supported"),
    "no number": ({"task": "regression", "data": "numbers"}, [{"label": "high"}],
                  "line 3: field 'label' holds 'high', which is no number"),
    "not finite": ({"task": "regression", "data": "numbers"}, [{"label": float("nan")}],
                   "holds nan, which is no number"),
    "no label": ({"label_field": "class"}, [], "no field 'class' .its fields: a, b, label"),
    "no text": ({}, [{"b": 3}], "line 3: field 'b' holds 3, which is no text"),
    "one class": ({"data": "same"}, [], "every record has the class 'no'"),
    "a decoder": ({"model": "decoder"}, [], "Llama, which has no head for classification: .* Bert"),
    "long rows": ({"max_length": 64}, [{"a": "the sun " * 40}], "--max-length is too large: 64"),
    "no room": ({"max_length": 3}, [], "max_length 3 is not allowed: 3 special tokens"),
    "a bare tokenizer": ({"model": "plain"}, [], "lacks a post_processor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_wrong_data_are_one_clear_line(place, tmp_path, case):
    changes, changed, said = WRONG[case]
    given = options(place)
    records = [*GOOD[:2], *({**GOOD[2], **change} for change in changed), *GOOD[3:]]
    if changes.get("task") == "regression":
        records = [row | {"label": 1.5} for row in GOOD[:2]] + records[2:3]
    label = {"numbers": {"label": "1.5"}, "same": {"label": "no"}}.get(changes.get("data", ""), {})
    data = [row | label for row in GOOD]
    paths = {"data": str(write_rows(tmp_path / "train.jsonl", data)),
             "valid": str(write_rows(tmp_path / "valid.jsonl", records))}  # fmt: skip
    if changes.get("model") == "decoder":
        paths["model"] = language_options(place).model
    if changes.get("model") == "plain":
        path = write_encoder(tmp_path / "plain") / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
        paths["model"] = str(path.parent)
    given = dataclasses.replace(given, **{**changes, **paths}, output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=said) as error:
        quiet(given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_whole_floats_are_whole_numbers():
    gaps = [{"y": 1.0}, {"y": 0.0}, {"y": 10}]
    names = class_names(gaps, "y", "x")
    assert names == ("0", "1", "10")
    assert class_numbers(gaps, "y", names, "x").tolist() == [1, 0, 2]
    assert class_numbers(gaps[:2], "y", ("no", "yes"), "x", given=True).tolist() == [1, 0]
    assert class_numbers(gaps[:1], "y", ("0.5", "1.0"), "x", given=True).tolist() == [1]
    with pytest.raises(UserError, match=r"-1, which stands for no label"):
        class_numbers([{"y": -1.0}], "y", names, "x")


@pytest.mark.parametrize(("changes", "said"), [
    ({"text_fields": ()}, "--task classification needs --text-fields"),
    ({"text_fields": ("a", "b", "c")}, "3 were given"),
    ({"metric": "pearson"}, "choose one of accuracy, f1, matthews, loss"),
    ({"packing": False}, "--packing goes with --task language"),
    ({"task": "language"}, "--text-fields goes with --task classification or regression"),
    ({"task": "regression", "labels": ("a", "b")}, "a regression has none"),
    ({"labels": ("a", "a")}, "two or more distinct names"),
    ({"task": "language", "text_fields": (), "keep": "best"}, "give --eval-every too"),
    ({"glue": "stsb"}, "--glue stsb is a regression: leave --task classification out"),
])  # fmt: skip
def test_options_that_do_not_go_together(place, changes, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(options(place), **changes)


def test_an_adapter_of_language_does_not_predict(finished, place, tmp_path):
    given, params = finished[0], prepare(finished[0]).params
    adapter = storage.load(place / "run" / "adapter", params)
    storage.save(tmp_path / "plain", adapter, params)
    with pytest.raises(UserError, match="was trained for language"):
        run_predict(Predict(str(tmp_path / "plain"), given.data, str(tmp_path / "out.jsonl")))
    storage.save(tmp_path / "damaged", adapter, params, task={"task": "poetry"})
    with pytest.raises(UserError, match=r"damaged/adapter.json: its task is damaged: .*'poetry'"):
        run_predict(Predict(str(tmp_path / "damaged"), given.data, str(tmp_path / "out.jsonl")))


def test_predictions_replace_predictions_and_nothing_else(finished, place, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    write_rows(data, [{"a": "word " * 200, "b": "word"}])
    argv = ["predict", "--adapter", str(place / "run" / "adapter"), "--data", str(data), "--output"]
    adapter = place / "run" / "adapter"
    for taken in (adapter / "adapter.json", adapter / "adapter.safetensors", data):
        before = taken.read_bytes()
        with pytest.raises(SystemExit):
            main([*argv, str(taken)])
        assert taken.read_bytes() == before
    for _ in range(2):
        main([*argv, str(tmp_path / "out.jsonl")])
    assert len(lines(tmp_path / "out.jsonl")) == 1
    assert "1 texts were cut at" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*argv, str(tmp_path / "out.jsonl"), "--split", "valid"])
    write_rows(data, [{"question": "a"}])
    with pytest.raises(SystemExit):
        main([*argv, str(tmp_path / "out.jsonl")])
    said = capsys.readouterr().err
    assert "is for data that has splits" in said
    assert "has no field a, b, only question: name the fields as in the adapter's training" in said
    saved = tmp_path / "saved"
    Dataset.from_list([{"a": "word", "b": "word"}]).save_to_disk(saved)
    argv[argv.index("--data") + 1] = str(saved)
    main([*argv, str(tmp_path / "out.jsonl")])
    assert len(lines(tmp_path / "out.jsonl")) == 1
    with pytest.raises(SystemExit):
        main([*argv, str(tmp_path / "out.jsonl"), "--split", "train"])
    assert f"has splits, and {saved} was saved as one: leave" in capsys.readouterr().err


def test_the_validation_split_of_a_folder_is_held_out(place, tmp_path):
    for name, records in {"train": rows(20), "validation": rows(7), "test": rows(3)}.items():
        write_rows(tmp_path / f"{name}.jsonl", records)
    task = prepare(options(place, data=str(tmp_path), valid=""))
    assert [len(part.packed.labels) for part in (task.train, task.valid)] == [20, 7]
    assert f"held out: the validation split of {tmp_path}" in task.notes
    write_rows(tmp_path / "validation.jsonl", [{"a": "sun", "b": "sea", "label": "maybe"}])
    with pytest.raises(UserError, match=r"the validation split of .*record 1.*'maybe'"):
        prepare(options(place, data=str(tmp_path), valid=""))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("texts.jsonl", "is a file of --data"),
        (".", "is a folder: name a file"),
        ("none/out.jsonl", "there is no folder .*none: make it first"),
        ("x" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("data", ["texts.jsonl", "."])
def test_where_predictions_cannot_go_is_said_at_once(tmp_path, output, said, data):
    (tmp_path / "texts.jsonl").write_text("mine")
    given = Predict("adapter", str(tmp_path / data), str(tmp_path / output))
    with pytest.raises(UserError, match=said):
        run_predict(given)
    assert (tmp_path / "texts.jsonl").read_text() == "mine"


def test_a_run_from_before_these_options_goes_on(finished, place):
    given = dataclasses.replace(language_options(place), output_dir=str(place / "older"))
    RunFolder(given).create()
    saved = place / "older" / "config.json"
    config = json.loads(saved.read_text())
    saved.write_text(json.dumps({k: v for k, v in config.items() if k not in ("task", "keep")}))
    RunFolder(given).finish({})
    with pytest.raises(UserError, match="seed: 0 -> 5"):
        RunFolder(dataclasses.replace(given, seed=5))
