"""Adding a method takes the five places CONTRIBUTING.md names: nothing else knows a method."""

import ast
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_mini_jax
from lora_mini_jax import methods, storage
from lora_mini_jax.cli import main
from lora_mini_jax.low_rank import Product
from lora_mini_jax.method import Factors
from lora_mini_jax.models import load
from lora_mini_jax.runs import RunFolder
from tests.runs import options

PACKAGE = Path(lora_mini_jax.__file__).parent
# `Full` is what modules_to_save means, and what pre-training and calibration use; a search belongs
# to DiffoRA as its step does to SwitchLoRA, but has a training set of its own.
MAY_NAME = {
    "Full": {"plan.py", "calibration.py", "scratch.py", "combination.py"},
    "LoRA": {"folding.py", "combination.py"},  # what others are folded into
    "DiffoRA": {"choice.py", "search.py", "search_run.py"},
}


@dataclass(frozen=True)
class Scaled(Product):
    """A method of the test's own: ``W' = W + strength A @ diag(v) @ B``, ``v`` trained."""

    name = "scaled"

    strength: float = 1.0

    def init(self, key: jax.Array, kernel: jax.Array) -> tuple[Factors, Factors]:
        (n_in, n_out), (left, right) = kernel.shape, jax.random.split(key)
        a = jax.random.normal(left, (n_in, self.rank)) * n_in**-0.5
        b = jax.random.normal(right, (self.rank, n_out)) * self.rank**-0.5
        return {"v": jnp.zeros(self.rank)}, {"A": a, "B": b}

    def chain(self, factors: Factors) -> tuple[jax.Array, ...]:
        return factors["A"], self.strength * factors["v"][:, None] * factors["B"]

    def n_trainable(self, n_in: int, n_out: int) -> int:
        return self.rank


def test_a_new_method_works_from_the_command_line_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, "scaled", Scaled)
    given = options(tmp_path, method="scaled", settings=("rank=4",), max_steps=2)
    words = ["--model", given.model, "--data", given.data, "--prompt-field", "q",
             "--completion-field", "a", "--max-length", "64", "--max-steps", "2",
             "--samples", "0"]  # fmt: skip
    run = str(tmp_path / "run")
    main(["finetune", *words, "--method", "scaled", "--strength", "2.5", "--rank", "4",
          "--dropout", "0.1", "--modules-to-save", "norm", "--output-dir", run])  # fmt: skip
    adapter = storage.load(tmp_path / "run" / "adapter", load(given.model)[1])
    assert adapter.sites[0].method == Scaled(rank=4, strength=2.5, dropout=0.1)
    main(["compare", *words, "--methods", "scaled:rank=2,strength=3", "lora:rank=1", "--seeds",
          "0", "--output-dir", str(tmp_path / "both")])  # fmt: skip
    main(["inspect", "--model", given.model, "--method", "scaled", "--budget", "40", "--json"])
    main(["methods"])
    said = capsys.readouterr().out
    assert "--strength 1.0" in said
    assert '"trainable": 35' in said
    other = options(tmp_path, method="scaled", settings=("rank=3",), output_dir=run)
    with pytest.raises(lora_mini_jax.UserError, match="another config"):
        RunFolder(other)


def test_nothing_outside_the_methods_names_one():
    classes = {cls.__name__ for cls in methods.METHODS.values()}
    for path in PACKAGE.rglob("*.py"):
        # What PEFT has too is known to it by name, and so to what reads and writes its files.
        if path.parent.name in ("methods", "peft") or path.name == "__init__.py":
            continue
        used = {node.id for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Name)}  # fmt: skip
        named = {name for name in classes & used if path.name not in MAY_NAME.get(name, set())}
        assert not named, f"{path.name} knows {named}"
