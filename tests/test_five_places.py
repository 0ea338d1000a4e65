"""Adding a method takes the five places CONTRIBUTING.md names: nothing else knows a method."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import lora_mini_jax
from lora_mini_jax import methods
from lora_mini_jax.algebra.low_rank import Product
from lora_mini_jax.cli import main
from lora_mini_jax.method import Factors
from lora_mini_jax.models import load
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.saved import storage
from tests.runs import options

PACKAGE = Path(lora_mini_jax.__file__).parent
SPEC = re.compile(r"[\w-]+(?=$|:\w)")
# Who may name a method, by its class, its file or its name on the command line. `Full` is what
# modules_to_save means, and what pre-training and calibration use; "full" is also how much a remat
# recomputes. A search belongs to DiffoRA as its step does to SwitchLoRA, but has a training set of
# its own. Options have defaults, pre-training offers four methods by name, the demo shows two.
MAY_NAME = {
    "Full": {"adapters/sites.py", "adapters/combination.py", "training/calibration.py",
             "models/remat.py", "settings/choices.py", "options/training.py", "options/pretrain.py",
             "runs/scratch.py"},
    "LoRA": {"adapters/folding.py", "adapters/combination.py",  # what others are folded into
             "options/compare.py", "options/pretrain.py", "runs/demo.py"},
    "LoRAMini": {"options/adapter.py", "options/compare.py", "runs/demo.py",
                 "cli.py"},  # its name too
    "ReLoRA": {"options/pretrain.py"},
    "SwitchLoRA": {"options/pretrain.py"},
    "DiffoRA": {"search/choice.py", "search/search.py", "runs/search.py"},
}  # fmt: skip


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


def words(source: str) -> set[str]:
    """Everything by which a file could name a method: names, attributes, imports; and in quotes its
    strings, or of a spec the beginning."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word):
                found.add(word)
            case ast.ImportFrom(module=str(word)):
                found.add(word)
            case ast.Constant(value=str(text)) if spec := SPEC.match(text):
                found.add(repr(spec[0]))
    return found


def known(source: str) -> set[str]:
    """The classes of the methods that a file names."""
    found = words(source)
    return {
        cls.__name__
        for cls in methods.METHODS.values()
        if found & {cls.__name__, cls.__module__, repr(cls.__name__), repr(cls.name)}
    }


def test_nothing_outside_the_methods_names_one():
    for path in PACKAGE.rglob("*.py"):
        # What PEFT has too is known to it by name, and so to what reads and writes its files; and
        # the package offers some of the methods by name.
        if path.parent.name in ("methods", "peft", "kinds") or path == PACKAGE / "__init__.py":
            continue
        file = path.relative_to(PACKAGE).as_posix()
        named = {name for name in known(path.read_text()) if file not in MAY_NAME.get(name, set())}
        assert not named, f"{file} knows {named}"


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(method, VeRA)",
        "methods.VeRA(rank=2)",
        "from lora_mini_jax.methods import VeRA as shared",
        "from lora_mini_jax.methods.vera import drawn",
        "import lora_mini_jax.methods.vera",
        "method.name == 'vera'",
        "type(method).__name__ in ('VeRA',)",
        "from_spec('vera:rank=2')",
    ],
)
def test_naming_a_method_in_any_of_these_ways_is_seen(source: str):
    assert known(source) == {"VeRA"}
