"""Runs that begin from an adapter: what they keep of it, and what is refused."""

import dataclasses
import json
import shutil
from dataclasses import fields
from typing import Any

import numpy as np
import peft as theirs
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora_mini_jax.runs.finetune as module
from lora_mini_jax import UserError
from lora_mini_jax.commands.forecast import plan_step
from lora_mini_jax.models import load
from lora_mini_jax.options import Compare, Finetune, PlanStep, defaults_from, to_json
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.saved import storage
from tests import encoder_runs, seq2seq_runs
from tests.runs import options, stopped_at

MINI = ("rank=2", "a=8", "b=8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("initial")


@pytest.fixture(scope="module")
def finished(place):
    """A run of LoRA-Mini with factors from gradients, and norms trained whole."""
    given = options(place, output_dir=str(place / "first"), settings=MINI,
                    modules_to_save=("norm",))  # fmt: skip
    return given, quiet(given)


@pytest.fixture(scope="module")
def labelled(place):
    given = encoder_runs.options(place, output_dir=str(place / "labelled"), epochs=3.0)
    return given, quiet(given)


def quiet(given):
    return finetune(given, say=lambda line: None)


def after(first, name, **changes):
    """The options of a run with other data that begins from what another left."""
    kept = {f.name: f.default for f in fields(Finetune)
            if f.name in ("method", "settings", "modules_to_save")}  # fmt: skip
    folder = first.output_dir
    more = {"init_adapter": f"{folder}/adapter", "output_dir": f"{folder}-{name}", **kept}
    return dataclasses.replace(first, **{**more, **changes})


def leaves(given):
    return load_file(f"{given.output_dir}/adapter/adapter.safetensors")


def test_a_run_goes_on_where_another_has_ended(finished, monkeypatch):
    first, summary = finished
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("calibrated anew"))
    given, said = after(first, "more", learning_rate=3e-3), []
    found = finetune(given, say=said.append)
    kernels = "7 kernels: lora-mini, 3 kernels: full"
    assert f"begins from {first.output_dir}/adapter ({kernels})" in said
    assert found["valid_loss_before"] == pytest.approx(summary["valid_loss_after"], rel=1e-6)
    assert found["valid_loss_after"] < found["valid_loss_before"]
    assert [found[n] for n in ("method", "settings", "trainable")] == [
        summary[n] for n in ("method", "settings", "trainable")
    ]
    assert [each["before"] for each in found["samples"]] == [
        each["after"] for each in summary["samples"]
    ]
    old, new = leaves(first), leaves(given)
    assert old.keys() == new.keys()
    for name, leaf in old.items():
        assert np.array_equal(leaf, new[name]) == name.startswith("frozen"), name
    _, params = load(first.model)
    assert len(storage.load(f"{given.output_dir}/adapter", params).sites) > 7


def test_a_stopped_run_goes_on_and_only_with_the_same_adapter(finished, place):
    first, _ = finished
    whole = after(first, "whole", save_every=2)
    stopped = after(first, "stopped", save_every=2)
    quiet(whole)
    with stopped_at(4), pytest.raises(KeyboardInterrupt):
        quiet(stopped)
    file = place / "first" / "adapter" / "adapter.safetensors"
    before = file.read_bytes()
    bits = bytearray(before)
    bits[-1] ^= 1
    file.write_bytes(bits)
    with pytest.raises(UserError, match="what its options name, or the tokenizer, has changed"):
        quiet(stopped)
    file.write_bytes(before)
    with pytest.raises(UserError, match=r"another config .*init_adapter: "):
        quiet(dataclasses.replace(stopped, init_adapter=str(place / "other")))
    quiet(stopped)
    assert (place / "first-whole/adapter/adapter.safetensors").read_bytes() == (
        place / "first-stopped/adapter/adapter.safetensors"
    ).read_bytes()
    config = place / "first-whole" / "config.json"
    assert to_json(defaults_from(Finetune, str(config))) == to_json(whole)


def test_the_best_is_kept_and_a_mesh_trains_the_same(finished):
    first, _ = finished
    alone = after(first, "best", keep="best", eval_every=2, batch_size=8)
    meshed = after(first, "mesh", keep="best", eval_every=2, batch_size=8,
                   mesh="data=2,fsdp=2,tensor=2")  # fmt: skip
    found, other = quiet(alone), quiet(meshed)
    assert found["kept"] == "best"
    assert found["valid_loss_after"] == pytest.approx(other["valid_loss_after"], rel=1e-3)
    a, b = leaves(alone), leaves(meshed)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-4, err_msg=name)


def test_the_adapter_that_it_began_from_may_be_the_best(finished):
    first, _ = finished
    given = after(first, "worse", keep="best", eval_every=2, max_steps=4, learning_rate=3.0)
    found = quiet(given)
    assert found["kept_step"] == 0
    assert found["valid_loss_after"] == found["valid_loss_before"]
    np.testing.assert_equal(leaves(given), leaves(first))


@pytest.mark.parametrize("kind", ["lora", "vera"])
def test_an_adapter_of_peft_trains_on(place, finished, kind):
    first, _ = finished
    model = AutoModelForCausalLM.from_pretrained(first.model)
    common: Any = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = (theirs.LoraConfig(r=3, lora_alpha=5, **common) if kind == "lora" else
              theirs.VeraConfig(r=3, **common))  # fmt: skip
    torch.manual_seed(1)
    wrapped = theirs.get_peft_model(model, config)
    for name, leaf in wrapped.named_parameters():
        if "lora_B" in name or "vera_lambda_b" in name:
            torch.nn.init.normal_(leaf, std=0.3)
    wrapped.save_pretrained(place / kind)
    given = after(first, kind, init_adapter=str(place / kind), eval_every=3, keep="best")
    found = quiet(given)
    assert found["method"] == kind
    assert found["settings"][0]["rank"] == 3
    plain = options(place, output_dir=str(place / f"plain-{kind}"), max_steps=1, method="lora",
                    settings=("rank=3",), target_modules=("q_proj", "v_proj"))  # fmt: skip
    assert found["valid_loss_before"] != pytest.approx(quiet(plain)["valid_loss_before"], rel=1e-5)
    _, params = load(first.model)
    again = storage.load(f"{given.output_dir}/adapter", params)  # its random factors included
    assert {site.target.path.split("/")[-2] for site in again.sites} == {"q_proj", "v_proj"}
    if kind == "vera":
        a = load_file(place / kind / "adapter_model.safetensors")["base_model.vera_A"]
        drawn = [leaf for own in again.frozen.values() for leaf in own.values()]
        assert any(np.array_equal(np.sort(a.ravel())[:9], np.sort(np.ravel(leaf))[:9])
                   for leaf in drawn)  # fmt: skip


def test_a_head_trains_on_from_where_it_was(labelled, place):
    first, summary = labelled
    given = after(first, "more", seed=3, learning_rate=1e-3, epochs=2.0)
    found = quiet(given)
    assert found["valid_loss_before"] == pytest.approx(summary["valid_loss_after"], rel=1e-5)
    told = [json.loads((place / name / "adapter/adapter.json").read_text())["task"]
            for name in ("labelled", "labelled-more")]  # fmt: skip
    assert told[0] == told[1]
    fewer = [row for row in encoder_runs.rows(20) if row["label"] == "yes"]
    few = encoder_runs.write_rows(place / "few.jsonl", fewer)
    assert quiet(after(first, "few", data=str(few), epochs=1.0))["trainable"] == found["trainable"]
    places = [row | {"label": float(row["label"] == "yes")} for row in encoder_runs.rows(20)]
    numbered = encoder_runs.write_rows(place / "numbered.jsonl", places)
    assert quiet(after(first, "numbered", data=str(numbered), epochs=1.0))["steps"]


def test_a_head_of_peft_trains_on(labelled, place):
    first, _ = labelled
    model = AutoModelForSequenceClassification.from_pretrained(first.model, num_labels=2)
    config = theirs.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    theirs.get_peft_model(model, config).save_pretrained(place / "seq-cls")
    found = []
    for name, mesh in (("theirs", ""), ("theirs-mesh", "data=2,fsdp=2,tensor=2")):
        found.append(quiet(after(first, name, init_adapter=str(place / "seq-cls"), mesh=mesh)))
        assert found[-1]["trainable"] == 2 * (16 + 16) + 16 * 2 + 2
    assert found[0]["valid_loss_before"] == pytest.approx(found[1]["valid_loss_before"], rel=1e-3)
    with pytest.raises(UserError, match="was trained for classification or regression, and this"):
        quiet(options(place, settings=(), init_adapter=str(place / "seq-cls"),
                      output_dir=str(place / "never")))  # fmt: skip


def test_a_t5_trains_on(place):
    first = seq2seq_runs.options(place, output_dir=str(place / "t5-first"))
    summary = quiet(first)
    found = quiet(after(first, "more", max_steps=2))
    assert found["valid_loss_before"] == pytest.approx(summary["valid_loss_after"], rel=1e-6)
    assert found["method"] == "lora"


def test_a_schedule_of_its_own_begins_anew(place):
    settings = ("rank=2", "tinit=1", "tfinal=1", "delta_t=1")
    first = options(place, output_dir=str(place / "ada"), method="adalora", settings=settings)
    assert quiet(first)["settings"][0]["total_steps"] == 6
    found = quiet(after(first, "more", max_steps=4))
    assert found["settings"][0]["total_steps"] == 4
    assert found["settings"][0]["tinit"] == 1


def test_a_plan_is_of_the_adapter(finished, place):
    first, summary = finished
    given = after(first, "plan")
    plan = PlanStep(**{field.name: getattr(given, field.name) for field in fields(Finetune)})
    assert plan_step(plan)["trainable"] == summary["trainable"]
    (place / "theirs").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (place / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="plan with --method and --target-modules instead"):
        plan_step(dataclasses.replace(plan, init_adapter=str(place / "theirs")))


@pytest.mark.parametrize(("changes", "said"), [
    ({"method": "lora"}, "brings its own method, settings and kernels: leave out --method"),
    ({"settings": ("rank=4",), "target_modules": ("all",)}, "leave out --target-modules, --rank"),
    ({"budget": 900}, "leave out --budget"),
    ({"init_adapter": "nowhere"}, "nowhere is no adapter folder"),
    ({"scan_layers": True}, "was trained without --scan-layers: leave out"),
    ({"quantize": "int8"}, "was trained on a dense base: leave out --quantize"),
    ({"lora_plus_ratio": 2.0, "init_adapter": "full"}, "full trains dense"),
])  # fmt: skip
def test_what_does_not_go_with_an_adapter_is_one_line(finished, place, changes, said):
    first, _ = finished
    if changes.get("init_adapter") == "full":
        full = options(place, output_dir=str(place / "full"), method="full", settings=(),
                       target_modules=("q_proj",), max_steps=1)  # fmt: skip
        quiet(full)
        changes = changes | {"init_adapter": f"{full.output_dir}/adapter"}
    with pytest.raises(UserError, match=said):
        quiet(after(first, "never", **changes))
    assert not (place / "first-never").exists()


def test_an_adapter_of_another_base_or_task_is_one_line(finished, labelled, place):
    first, label = finished[0], labelled[0]
    record = place / "marked"
    shutil.copytree(place / "first" / "adapter", record)
    told = json.loads((record / "adapter.json").read_text())
    told["base_fingerprint"][0][0] += 1.0
    (record / "adapter.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"was trained on another base model .*Give that one as"):
        quiet(after(first, "never", init_adapter=str(record)))
    (record / "adapter.json").write_text(json.dumps({**told, "quantized": "nf4"}))
    with pytest.raises(UserError, match="on a base in nf4: give --quantize nf4"):
        quiet(after(first, "never", init_adapter=str(record)))
    mine = str(place / "labelled" / "adapter")
    with pytest.raises(UserError, match="trained for classification, and this run is for language"):
        quiet(after(first, "never", init_adapter=mine))
    with pytest.raises(UserError, match="trained for language, and this run is for classification"):
        quiet(after(label, "never", init_adapter=f"{first.output_dir}/adapter"))
    with pytest.raises(UserError, match="trained for classification, and this run is for regress"):
        quiet(after(label, "never", task="regression", init_adapter=mine))
    with pytest.raises(UserError, match="tells the classes no, yes, not yes, no: leave out"):
        quiet(after(label, "never", labels=("yes", "no")))
    assert not (place / "first-never").exists()


def test_a_comparison_begins_from_none(finished, place):
    with pytest.raises(UserError, match="lora-mini has no option init_adapter"):
        Compare(methods=("lora-mini:init_adapter=x",))
    path = place / "config.json"
    path.write_text(json.dumps(to_json(after(finished[0], "config"))))
    assert defaults_from(Compare, str(path)).data == finished[0].data
    assert "init_adapter" not in {field.name for field in fields(Compare)}
