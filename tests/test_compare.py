"""Comparisons in which a run diverges, or cannot go on."""

import dataclasses
import json

import pytest

import lora_mini_jax.runs.compare as module
import lora_mini_jax.runs.finetune as finetune_module
from lora_mini_jax import UserError
from lora_mini_jax.errors import told_of_memory
from lora_mini_jax.options import Compare
from lora_mini_jax.runs.compare import compare
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Diverged, Meter
from lora_mini_jax.runs.outcome import Outcome
from lora_mini_jax.runs.tables import outcomes_row, table_row
from tests.runs import options

HIGH = "lora:rank=1,learning_rate=1e30"


def given(place, name: str, *methods: str, seeds: tuple[int, ...] = (0,)) -> Compare:
    one = options(place)
    return Compare(
        model=one.model, data=one.data, prompt_field="q", completion_field="a", max_length=64,
        batch_size=4, max_steps=4, log_every=1, max_grad_norm=float("inf"), samples=0,
        output_dir=str(place / name), methods=methods, seeds=seeds,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def compared(place):
    asked, said = given(place, "three", "lora:rank=1", HIGH, "relora:rank=1"), []
    return asked, compare(asked, said.append), said


def test_the_others_go_on_when_one_diverges(compared, place):
    asked, rows, said = compared
    summary = json.loads((place / "three" / "summary.json").read_text())
    assert summary["rows"] == rows
    assert [row["spec"] for row in rows] == list(asked.methods)
    assert rows[1] == {"method": "lora", "diverged_at": 2, "spec": HIGH, "seed": 0}
    assert rows[0]["valid_loss_after"] < rows[0]["valid_loss_before"]
    assert f"{HIGH}, seed 0: diverged at step 2" in said
    table = next(line for line in said if line.startswith("method ")).splitlines()
    assert ["diverged at step" in line for line in table[2:]] == [False, True, False]
    page = (place / "three" / "report.html").read_text()
    assert "<td>diverged at step 2</td>" in page
    name = "lora rank=1 learning_rate=1e30"
    assert f"Not in the pictures: {name}, seed 0: diverged at step 2." in page
    assert f"<!-- {name} -->" not in page
    assert "<!-- lora rank=1 -->" in page


def test_one_that_diverged_is_not_run_again(compared, place, monkeypatch):
    asked, rows, _ = compared
    monkeypatch.setattr(finetune_module, "prepare", lambda options: pytest.fail("it was run again"))
    said: list[str] = []
    assert compare(asked, said.append) == rows
    assert any(line.startswith("diverged at step 2, and not run again") for line in said)


def test_what_diverged_with_other_options_is_forgotten(compared, place):
    one = compared[0].run_options(HIGH, 0)
    assert RunFolder(one).diverged() == 2
    other = RunFolder(dataclasses.replace(one, max_steps=2))
    assert other.diverged() is None
    copy = dataclasses.replace(one, output_dir=str(place / "copy"))
    RunFolder(copy).create()
    RunFolder(copy).set_diverged(2)
    RunFolder(dataclasses.replace(copy, max_steps=2)).create()
    assert {path.name for path in (place / "copy").iterdir()} == {"config.json"}


def test_nothing_is_compared_where_all_diverge(place):
    asked = given(place, "none", HIGH, seeds=(0, 1))
    said = rf"every run diverged \({HIGH}, seed 0: diverged at step 2; {HIGH}, seed 1"
    with pytest.raises(UserError, match=said):
        compare(asked, lambda line: None)
    assert not (place / "none" / "summary.json").exists()


def test_another_error_ends_it_and_says_whose(place):
    asked = given(place, "foreign", "lora:rank=1", seeds=(0, 3))
    folder = place / "foreign" / "lora_rank_1-seed3"
    folder.mkdir(parents=True)
    (place / "foreign" / "comparison.json").write_text("{}")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^lora:rank=1, seed 3: .* is not a run folder"):
        compare(asked, lambda line: None)


def test_a_device_without_room_is_said_once(place, monkeypatch):
    def full(options, say):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes")

    monkeypatch.setattr(module, "finetune", full)
    with pytest.raises(UserError) as raised, told_of_memory():  # as the command line does
        compare(given(place, "full", "lora:rank=1"), lambda line: None)
    assert str(raised.value).startswith("lora:rank=1, seed 0: a device has not enough memory (RES")
    assert str(raised.value).count("not enough memory") == 1


def test_of_a_method_with_a_diverged_seed_no_mean_is_shown(compared):
    asked, rows, _ = compared
    one = asked.run_options("lora:rank=1", 0)
    done, lost = Outcome(one, rows[0]), Outcome(one, {}, diverged=2)
    row = outcomes_row("lora", [done, lost, done])
    assert row["after"] == "diverged (1 of 3)"
    assert row["right_after"] == ""
    assert row["trainable"] == table_row("lora", [rows[0]])["trainable"]
    assert outcomes_row("lora", [lost]) == {"method": "lora", "after": "diverged at step 2"}
    assert "±" in outcomes_row("lora", [done, done])["after"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_held_out_loss_that_is_not_finite_stops_too(place, loss):
    one = options(place, output_dir=str(place / "held-out"))
    meter = Meter(one, RunFolder(one), 5, 6, lambda step: 0.0)
    with pytest.raises(Diverged, match=rf"held-out loss {loss} at step 5: stopped") as raised:
        meter.evaluated({"valid_loss": loss})
    assert raised.value.step == 5


def test_a_run_too_short_for_a_restart_notes_it(compared, place):
    note = "no restart within 4 steps, for reset_every is 200: give a lower --reset-every"
    summary = json.loads((place / "three" / "relora_rank_1-seed0" / "summary.json").read_text())
    assert summary["notes"] == [note]
    assert note in compared[2]
    assert note in (place / "three" / "report.html").read_text()
