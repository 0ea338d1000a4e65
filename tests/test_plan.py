"""A plan is of the run itself, whatever the model; and the run holds nothing beside it."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from experiments.plan_check import held
from lora_mini_jax import UserError
from lora_mini_jax.commands.forecast import plan_step
from lora_mini_jax.models import GPT2, GPT2Config, load, save
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import Finetune, PlanStep
from lora_mini_jax.runs.finetune import finetune, fit
from lora_mini_jax.runs.folder import Row
from lora_mini_jax.runs.meter import Meter
from lora_mini_jax.tasks.devices import reading
from lora_mini_jax.tree import flatten
from tests import encoder_runs, runs, seq2seq_runs

STEPS = 2
SMALL = {"max_steps": STEPS, "batch_size": 2, "eval_every": None, "save_every": 9}
Made = Callable[[Path], Finetune]


def llama(folder: Path) -> Finetune:
    settings = ("rank=2", "a=8", "b=8", "outer_init=gradient")  # which checkpoints have to hold
    return runs.options(folder, **{**SMALL, "max_length": 32}, settings=settings, samples=0)


def gpt2(folder: Path) -> Finetune:
    sizes: dict[str, Any] = {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 2,
                             "n_positions": 32}  # fmt: skip
    model = GPT2(GPT2Config(**sizes))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    options = llama(folder)
    save(folder / "gpt2", model, params, tokenizer_from=options.model)
    return replace(options, model=str(folder / "gpt2"), method="full", settings=())


def t5(folder: Path) -> Finetune:
    return seq2seq_runs.options(folder, **{**SMALL, "max_length": 8}, samples=0)


def bert(folder: Path) -> Finetune:
    given: dict[str, Any] = {**SMALL, "max_length": 16, "labels": ("no", "yes"), "keep": "last"}
    return encoder_runs.options(folder, **given)


KINDS: tuple[Made, ...] = (gpt2, t5, bert)


@dataclass
class Seen:
    """What a run was found with."""

    task: Any
    state: Any
    batch: Any
    alive: int
    """Bytes of the arrays that the run held in its last step."""
    summary: Row


def of_plan(options: Finetune, **changes: Any) -> PlanStep:
    given = {field.name: getattr(options, field.name) for field in fields(Finetune)}
    return PlanStep(**{**given, **changes})


def seen(options: Finetune) -> Seen:
    """Run ``finetune``, and look at it from inside."""
    found: dict[str, Any] = {}
    gc.collect()  # what an earlier test left in a cycle would be freed while this one counts
    before, add = held(), Meter.add

    def noting(self: Meter, metrics: Any, tokens: Any) -> None:
        add(self, metrics, tokens)
        jax.block_until_ready((metrics, tokens))
        found["alive"] = held() - before

    def fitting(run: Any, task: Any, *rest: Any) -> Any:
        found["task"], found["batch"] = task, run.devices.batch(task.train, 0)
        found["state"] = fit(run, task, *rest)
        found["alive"] -= n_bytes(found["batch"])  # which the run has itself
        return found["state"]

    with (
        mock.patch.object(Meter, "add", noting),
        mock.patch("lora_mini_jax.runs.finetune.fit", fitting),
    ):
        summary = finetune(options, say=lambda line: None)
    return Seen(summary=summary, **found)


def n_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def check(options: Finetune) -> None:
    """The plan against the run: exact, temporaries apart, which are compiled with other flags; and
    the run holds base, adapter, optimiser and a batch once, and a few numbers of its steps."""
    plan, run = plan_step(of_plan(options)), seen(options)
    memory = plan["bytes_per_device"]
    assert plan["trainable"] == run.summary["trainable"] > 0
    assert plan["model_parameters"] == sum(x.size for x in jax.tree.leaves(run.task.params))
    assert memory["params"] == n_bytes(run.task.params)
    assert memory["adapter"] == n_bytes(run.state.adapter)
    assert memory["optimizer"] == n_bytes(run.state.opt_state)
    assert memory["batch"] == n_bytes(run.batch)
    assert memory["total"] == pytest.approx(run.summary["step_bytes"], rel=0.03)
    wanted = n_bytes((run.task.params, run.state, run.batch))
    assert wanted <= run.alive < wanted + 256


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_plan_is_what_the_run_then_takes(kind: Made, tmp_path: Path):
    check(kind(tmp_path))


def test_a_plan_is_what_a_run_that_is_taken_up_takes(tmp_path: Path):
    options = replace(llama(tmp_path), save_every=8, max_steps=10)
    with runs.stopped_at(9), pytest.raises(KeyboardInterrupt):
        finetune(options, say=lambda line: None)
    assert [folder.name for folder in (tmp_path / "run/checkpoints").iterdir()] == ["8"]
    check(options)


def test_the_loss_is_that_of_training_dropout_included(tmp_path: Path):
    options = of_plan(t5(tmp_path))
    plain, dropping = (
        plan_step(replace(options, settings=("rank=4", f"dropout={share}")))["bytes_per_device"]
        for share in (0, 0.5)
    )
    assert dropping["temporaries"] > plain["temporaries"]
    assert dropping["adapter"] == plain["adapter"]


@pytest.mark.parametrize(("bits", "mesh"), [("nf4", ""), ("nf4", "fsdp=2,tensor=4"),
                                            ("int8", "data=2,fsdp=4")])  # fmt: skip
def test_a_quantised_base_is_planned_as_it_is_read(tmp_path: Path, bits: Any, mesh: str):
    pytest.importorskip("qwix")
    how: dict[str, Any] = {"quantize": bits, "scan_layers": True, "remat": "full", "mesh": mesh}
    options = replace(runs.options(tmp_path), batch_size=8, **how)
    _, params = load(options.model, **reading(options, load_module(options.model)))
    plan = plan_step(of_plan(options))
    holding: Any = jax.jit(lambda params: 0, keep_unused=True).lower(params).compile()
    size = holding.memory_analysis().argument_size_in_bytes
    assert plan["bytes_per_device"]["params"] == size < 4 * plan["model_parameters"]
    assert plan["model_parameters"] == sum(leaf.size for leaf in flatten(params).values())


def test_what_cannot_be_planned_is_refused_in_a_line(tmp_path: Path):
    encoder = of_plan(bert(tmp_path))
    decoder = of_plan(runs.options(tmp_path))
    for options, line in (
        (PlanStep(model=encoder.model), "does not continue text"),
        (replace(encoder, max_length=25), "--max-length is too large"),
        (replace(encoder, model=decoder.model), "has no head for classification"),
        (replace(decoder, max_length=129), "--max-length 129 exceeds"),
        (replace(decoder, mesh="data=4096", batch_size=4096), "at most 2048 CPU devices"),
    ):
        with pytest.raises(UserError, match=line):
            plan_step(options)
