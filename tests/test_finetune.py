"""Whole runs in this process: what they write, resuming them, and what stops them."""

import dataclasses
import json
import shutil
import signal
import time
import types
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

import lora_mini_jax.runs.finetune as module
from lora_mini_jax import LoRAMini, UserError
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.data import Batches, Tokenizer
from lora_mini_jax.models import load
from lora_mini_jax.runs import loop
from lora_mini_jax.runs.finetune import finetune, total_steps
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Meter
from lora_mini_jax.runs.schedule import learning_rate
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks import language
from lora_mini_jax.tasks.kinds import prepare
from tests.runs import options, stopped_at, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(place):
    given = options(place, output_dir=str(place / "finished"), eval_every=3, save_every=2)
    return given, finetune(given, say=lambda line: None)


def quiet(given):
    return finetune(given, say=lambda line: None)


def test_a_run_folder_holds_what_is_promised(finished, place):
    folder = place / "finished"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "data.json", "metrics.jsonl", "checkpoints", "adapter",
                     "summary.json", "report.html", ".lock"}  # fmt: skip
    assert {p.name for p in (folder / "adapter").iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
    }


def test_the_adapter_of_a_run_loads_and_holds_inner_matrices_only(finished, place):
    given, summary = finished
    _, params = load(given.model)
    adapter = storage.load(place / "finished" / "adapter", params)
    stored = load_file(place / "finished" / "adapter" / "adapter.safetensors")
    assert sum(tensor.size for tensor in stored.values()) == summary["trainable"] == 7 * 2 * 16
    assert all(name.startswith("trainable/") for name in stored)
    assert any(jnp.abs(f["B"]).max() > 0 for f in adapter.trainable.values())


def test_with_data_at_hand_outer_factors_come_from_gradients_and_are_saved(place):
    given = options(place, output_dir=str(place / "data"), settings=("rank=2", "a=8", "b=8"))
    assert quiet(given)["settings"][0]["outer_init"] == "gradient"
    stored = load_file(place / "data" / "adapter" / "adapter.safetensors")
    assert {name.split("/")[0] for name in stored} == {"trainable", "frozen"}
    assert given.adapter_method() == LoRAMini(2, a=8, b=8, outer_init="gradient")
    again = dataclasses.replace(given, settings=("rank=2", "outer=recompute"))
    assert again.adapter_method() == LoRAMini(2, outer="recompute")
    with pytest.raises(UserError, match=r"down.*a = 40 exceeds 32, all that outer_init gradient"):
        quiet(dataclasses.replace(given, output_dir=str(place / "wide"), settings=("a=40", "b=16")))


def test_the_loss_is_measured_before_and_after(finished, place):
    _, summary = finished
    rows = RunFolder(finished[0]).metrics.rows()
    held_out = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    assert sorted(held_out) == [0, 3, 6]
    assert held_out[0] == summary["valid_loss_before"] > held_out[6] == summary["valid_loss_after"]


def test_the_report_opens_without_a_network(finished, place):
    page = (place / "finished" / "report.html").read_text()
    assert "<svg" in page
    assert "held-out loss after" in page
    assert "src=" not in page
    assert "<link" not in page
    assert "@import" not in page


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    given, summary = finished
    monkeypatch.setattr(module, "prepare", lambda options: pytest.fail("it was run again"))
    assert quiet(given) == summary


def test_a_stopped_run_goes_on_and_ends_the_same(finished, place):
    given = dataclasses.replace(finished[0], output_dir=str(place / "stopped"))
    with stopped_at(5), pytest.raises(KeyboardInterrupt):
        quiet(given)
    quiet(given)
    for name in ("adapter.json", "adapter.safetensors"):
        ours, whole = (place / f / "adapter" / name for f in ("stopped", "finished"))
        assert ours.read_bytes() == whole.read_bytes()
    steps = [row["step"] for row in RunFolder(given).metrics.rows()]
    assert steps == sorted(steps), "the metrics of steps done twice are kept once"


def test_a_run_that_is_asked_to_end_saves_first(finished, place):
    given = dataclasses.replace(finished[0], output_dir=str(place / "asked"), save_every=100)
    said, before = [], signal.getsignal(signal.SIGTERM)
    ask = partial(signal.raise_signal, signal.SIGTERM)
    with stopped_at(3, ask), pytest.raises(SystemExit, match="143"):
        finetune(given, say=said.append)
    saved = Checkpoints(RunFolder(given).checkpoints).latest()
    assert saved in range(1, 6)
    assert f"step {saved} of 6 is saved" in said[-1]
    assert signal.getsignal(signal.SIGTERM) is before
    finetune(given, say=said.append)
    assert f"going on from step {saved} of 6" in said
    ours, whole = (place / name / "adapter/adapter.safetensors" for name in ("asked", "finished"))
    assert ours.read_bytes() == whole.read_bytes()


def test_another_config_in_the_same_folder_is_refused(finished):
    with pytest.raises(UserError, match=r"another config \(learning_rate: 0.01 -> 0.5\)"):
        quiet(dataclasses.replace(finished[0], learning_rate=0.5))


def test_another_config_replaces_one_that_came_to_nothing(place):
    given = options(place, output_dir=str(place / "nothing"), save_every=2, max_steps=3)
    with stopped_at(1), pytest.raises(KeyboardInterrupt):
        quiet(given)
    assert {row["step"] for row in RunFolder(given).metrics.rows()} == {0}
    given = dataclasses.replace(given, learning_rate=0.5)
    with stopped_at(2), pytest.raises(KeyboardInterrupt):
        quiet(given)
    config = json.loads((place / "nothing" / "config.json").read_text())
    assert config["learning_rate"] == 0.5
    with pytest.raises(UserError, match=r"another config \(learning_rate: 0.5 -> 0.01\)"):
        quiet(dataclasses.replace(given, learning_rate=0.01))
    quiet(given)


@pytest.mark.parametrize("changed", ["data", "valid"])
def test_a_run_does_not_go_on_with_other_data(place, changed):
    own = {name: str(write_data(place / f"{changed}-{name}.jsonl")) for name in ("data", "valid")}
    given = options(place, **own, output_dir=str(place / f"other-{changed}"), save_every=1)
    with stopped_at(3), pytest.raises(KeyboardInterrupt):
        quiet(given)
    file = Path(own[changed])
    before = file.read_text()
    file.write_text(before.replace("red", "rot"))
    with pytest.raises(UserError, match="holds a run on other data"):
        quiet(given)
    file.write_text(before)
    quiet(dataclasses.replace(given, cache_dir="none"))


def test_a_folder_in_which_a_run_is_at_work_takes_no_other(place):
    given = options(place, output_dir=str(place / "taken"), max_steps=1, samples=0)
    with RunFolder(given).alone():
        for one in (given, dataclasses.replace(given, max_steps=2)):
            with pytest.raises(UserError, match="another run is at work in"):
                quiet(one)
        assert [path.name for path in (place / "taken").iterdir()] == [".lock"]
    assert quiet(given)["steps"] == 1


def test_a_run_that_another_began_in_the_meantime_is_not_replaced(place, monkeypatch):
    given = options(place, output_dir=str(place / "meantime"), max_steps=2, samples=0)
    other = dataclasses.replace(given, max_steps=1)

    def slowly(one, prepare=module.prepare):
        if one is other:
            quiet(given)
        return prepare(one)

    monkeypatch.setattr(module, "prepare", slowly)
    with pytest.raises(UserError, match="holds a run of another config"):
        quiet(other)
    assert json.loads((place / "meantime" / "summary.json").read_text())["steps"] == 2


def test_a_folder_that_is_no_run_is_refused_and_kept(place):
    other = place / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run folder"):
        quiet(options(place, output_dir=str(other)))
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis.txt exists and is not a run folder"):
        quiet(options(place, output_dir=str(other / "thesis.txt")))


def test_of_a_run_that_came_to_nothing_nothing_stays(place):
    given = options(place, output_dir=str(place / "none"))
    one: Any = SimpleNamespace(fingerprint="one")
    other: Any = SimpleNamespace(fingerprint="other")
    folder = RunFolder(given)
    folder.create(train=one)
    folder.metrics.log([{"step": 0}])
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / "events").write_text("some")
    RunFolder(given).create(train=other)
    kept = {path.name for path in folder.path.iterdir()}
    assert kept == {"config.json", "data.json", "metrics.jsonl", "tensorboard"}
    RunFolder(dataclasses.replace(given, learning_rate=0.5)).create()
    assert {path.name for path in folder.path.iterdir()} == {"config.json"}


def test_lines_after_a_step_are_forgotten_and_one_that_is_cut_short_is_none(place):
    folder = RunFolder(options(place, output_dir=str(place / "lines")))
    folder.create()
    folder.metrics.log({"step": step} for step in (0, 2, 2, 4))
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in folder.metrics.rows()] == [0, 2, 2, 4]
    folder.metrics.rewind(2)
    folder.metrics.log([{"step": 3}])
    assert [row["step"] for row in folder.metrics.rows()] == [0, 2, 2, 3]


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(place):
    given = options(place, output_dir=str(place / "diverged"), save_every=1, log_every=1)
    step = loop.make_train_step

    def poisoned(loss, tx, **kwargs):
        def bad(params, adapter, batch, key):
            total, number = loss(params, adapter, batch, key)
            return jnp.where(batch["poison"], jnp.nan, total), number

        return step(bad, tx, **kwargs)

    batch = Batches.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", poisoned)
        poison = lambda self, i: {**batch(self, i), "poison": np.bool_(i == 3)}  # noqa: E731
        patch.setattr(Batches, "batch", poison)
        with pytest.raises(
            UserError, match=r"loss nan .* at step 4: stopped.* another --output-dir"
        ):
            quiet(given)
    kept = {p.name for p in (place / "diverged" / "checkpoints").iterdir()}
    assert "3" in kept
    assert "4" not in kept
    quiet(given)  # and the run goes on from there


def test_a_damaged_checkpoint_is_named(finished, place):
    given = dataclasses.replace(finished[0], output_dir=str(place / "damaged"))
    shutil.copytree(place / "finished", place / "damaged")
    (place / "damaged" / "summary.json").unlink()
    newest = place / "damaged" / "checkpoints" / "6"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UserError, match=r"checkpoints/6.* cannot be read"):
        quiet(given)
    shutil.rmtree(newest)
    quiet(given)  # goes on from the one before, as the message says
    ours, whole = (place / f / "adapter" / "adapter.safetensors" for f in ("damaged", "finished"))
    assert ours.read_bytes() == whole.read_bytes()


def test_the_validation_split_of_a_folder_is_held_out(place):
    folder = place / "splits"
    folder.mkdir()
    files = [write_data(folder / f"{name}.jsonl", n) for name, n in
             (("train", 40), ("validation", 9), ("test", 5))]  # fmt: skip
    given = options(place, data=str(folder), output_dir=str(place / "split"), max_steps=2)
    said = []
    summary = finetune(given, say=said.append)
    note = f"held out: the validation split of {folder}"
    assert note in said
    assert note in summary["notes"]
    one = dataclasses.replace(given, data=str(files[0]), valid=str(files[1]))
    own, named = prepare(given), prepare(one)
    assert own.train.fingerprint == named.train.fingerprint
    assert own.valid.fingerprint == named.valid.fingerprint
    assert not [note for note in named.notes if "held out" in note]
    limit, small = {"max_valid_examples": 4}, {"packing": False}
    assert len(prepare(dataclasses.replace(given, **limit, **small)).valid.packed.tokens) == 4
    given = dataclasses.replace(given, output_dir=str(place / "split2"), save_every=1)
    with stopped_at(2), pytest.raises(KeyboardInterrupt):
        quiet(dataclasses.replace(given, max_steps=3))
    write_data(files[1], 11)
    with pytest.raises(UserError, match="holds a run on other data"):
        quiet(dataclasses.replace(given, max_steps=3))


def test_batches_are_no_larger_than_the_data(place):
    given = options(place, packing=False, batch_size=500, max_steps=None, samples=0)
    task = prepare(given)
    assert [len(part) for part in (task.train, task.valid)] == [1, 1]
    assert [part.batch_size for part in (task.train, task.valid)] == [46, 2]
    assert "batches have 46 rows and not 500: there are 46" in task.notes
    mesh = dataclasses.replace(given, batch_size=512, accumulate=2, mesh="data=4,fsdp=2")
    task = prepare(mesh)
    assert [part.batch_size for part in (task.train, task.valid)] == [48, 16]
    assert "batches have 48 rows and not 512: there are 46" in task.notes
    said = []
    summary = finetune(dataclasses.replace(given, output_dir=str(place / "500")), say=said.append)
    assert summary["steps"] == 2
    assert "2 steps of 46 rows, 1 in an epoch" in said
    quiet(dataclasses.replace(given, output_dir=str(place / "46"), batch_size=46))
    ours, whole = (place / name / "adapter/adapter.safetensors" for name in ("500", "46"))
    assert ours.read_bytes() == whole.read_bytes()


def test_examples_that_are_too_long_are_counted_and_reported(place):
    data = place / "long.jsonl"
    rows = write_data(place / "short.jsonl", 24).read_text()
    data.write_text(rows + json.dumps({"q": "x" * 100, "a": "y"}) + "\n")
    base = options(place)
    given = dataclasses.replace(base, data=str(data), valid=base.data, max_steps=1,
                                output_dir=str(place / "long"))  # fmt: skip
    said = []
    summary = finetune(given, say=said.append)
    assert any("1 training examples were skipped" in line for line in said)
    assert any("1 training examples were skipped" in note for note in summary["notes"])
    with pytest.raises(UserError, match="104 tokens"):
        quiet(dataclasses.replace(given, overlong="error", output_dir=str(place / "long2")))


def test_examples_that_were_cut_are_called_so(place):
    given = options(place, max_length=8, overlong="truncate", separator="", samples=0)
    data = place / "cut.jsonl"
    rows = [{"q": "a", "a": "b" * n} for n in (2, 20, 20)] + [{"q": "x" * 30, "a": "y"}] * 3
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = prepare(dataclasses.replace(given, data=str(data), valid=str(data))).notes
    assert "2 training examples were cut at 8 tokens" in notes
    assert "3 training examples were skipped: with nothing to learn in them" in notes


@pytest.mark.parametrize("samples", [0, 1])
def test_a_model_without_room_for_samples_trains(place, samples):
    given = options(place, output_dir=str(place / f"cramped{samples}"), max_steps=1,
                    max_new_tokens=500, samples=samples)  # fmt: skip
    assert quiet(given)["samples"] == []


def test_samples_need_room_in_the_model_alone(place):
    given = options(place, max_length=64, max_new_tokens=100, samples=2, valid=options(place).data)
    task = language.LanguageTask.read(given)
    assert len(task.prompts) == 2
    assert task.notes == []
    task = language.LanguageTask.read(dataclasses.replace(given, max_new_tokens=120))
    assert task.prompts == []
    assert task.notes == ["0 of 2 samples: of 48 held-out examples, no more have a prompt that "
                          "leaves room for 120 new tokens"]  # fmt: skip


def test_a_continuation_keeps_the_space_before_its_first_word():
    words = tokenizers.models.WordLevel({"▁once": 0, "▁upon": 1, "n": 2}, unk_token="n")
    backend = tokenizers.Tokenizer(words)
    backend.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(backend, None, None, 3, None, {})
    assert tokenizer.decode([1]) == "upon"
    assert tokenizer.continuation([0], [1]) == " upon"
    assert tokenizer.continuation([0], [2, 1]) == "n upon"
    assert tokenizer.continuation([], [1]) == "upon"


def test_dropout_is_for_training_and_not_for_evaluation(finished, place):
    plain, summary = finished
    settings = (*plain.settings, "dropout=0.5")
    given = dataclasses.replace(plain, settings=settings, output_dir=str(place / "dropped"))
    dropped = quiet(given)
    assert dropped["valid_loss_before"] == summary["valid_loss_before"]
    losses = [[row["loss"] for row in RunFolder(of).metrics.rows() if "loss" in row]
              for of in (plain, given)]  # fmt: skip
    assert losses[0]
    assert all(one != other for one, other in zip(*losses, strict=True))
    # At the start there is nothing to drop, in the end there is: an adapter that knows no dropout
    # is measured to be the same.
    task = prepare(plain)
    adapter = storage.load(RunFolder(given).adapter, task.params)
    sites = [dataclasses.replace(s, method=plain.adapter_method()) for s in adapter.sites]
    without = dataclasses.replace(adapter, sites=tuple(sites))
    assert all(site.method.dropout == 0.5 for site in adapter.sites)
    found = loop.make_evaluate(task)(without)
    assert found["valid_loss"] == dropped["valid_loss_after"] != summary["valid_loss_after"]


def test_the_time_of_saving_is_no_training_time(place, monkeypatch):
    def slowly(self, state, save=loop.Checkpoints.save):
        time.sleep(0.5)
        save(self, state)

    monkeypatch.setattr(loop.Checkpoints, "save", slowly)
    common = {"save_every": 1, "log_every": 1, "samples": 0, "max_steps": 4}
    summary = quiet(options(place, output_dir=str(place / "slowly"), **common))
    assert summary["step_seconds"] < 0.4


def test_an_interruption_while_numbers_are_fetched_is_no_other_error(place, monkeypatch):
    def stopped(self):
        raise KeyboardInterrupt

    given, one = options(place, output_dir=str(place / "fetched")), jnp.float32(1)
    meter = Meter(given, RunFolder(given), 0, 6, lambda step: 0.0)
    meter.add(types.SimpleNamespace(loss=one, grad_norm=one), 1)
    monkeypatch.setattr(type(one), "sharding", property(stopped))  # which all ways to fetch ask for
    with pytest.raises(KeyboardInterrupt):
        meter.flush()


def test_lora_runs_through_the_same_door(place):
    given = dataclasses.replace(
        options(place, max_steps=2, tensorboard=True),
        method="lora",
        settings=("rank=2",),
        output_dir=str(place / "lora"),
    )
    assert quiet(given)["trainable"] == 2 * (4 * (32 + 32) + 3 * (32 + 48))
    (events,) = (place / "lora" / "tensorboard").iterdir()
    assert b"valid_loss" in events.read_bytes()


def test_steps_and_schedule(place):
    given = options(place, max_steps=None, epochs=1.5, warmup_ratio=0.2, learning_rate=1.0)
    assert total_steps(given, 10) == 15
    rates = [float(np.asarray(learning_rate(given, 10)(i))) for i in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[-1] > 0, "the last step still learns"
