"""Does DiffoRA's search choose better than chance, at as many trained parameters?

    python -m experiments.diffora_controls --model MODEL_DIR --data TRAIN.jsonl \
        --valid VALID.jsonl --prompt-field meaning_representation --completion-field reference \
        --learning-rate 1e-2

Five seeds of DiffoRA over LoRA against three controls: kernels chosen at random, those with the
largest gradient at the start, and all of them at a lower rank. The fifth row trains DiffoRA's
choice from a fresh start, and so tells the choice from the training that the search does on the
side. Every run has the trained parameters of that seed's DiffoRA, or a few less, and as many
gradients: a step of the search costs two, so the others train that much longer.

A run takes about a minute on a slow CPU with a model of width 64. Results are added to ``--out``; a
run that is in there is not done again. The table is written beside it.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

from experiments.controls import at_budget, by_gradient_norm, random_choice
from lora_mini_jax.adapters.adapter import Adapter, count, draw
from lora_mini_jax.adapters.sites import Site, plan_sites
from lora_mini_jax.errors import UserError
from lora_mini_jax.files import read_json, write_json, write_text
from lora_mini_jax.methods import DiffoRA, LoRA
from lora_mini_jax.methods.diffora import Relaxation
from lora_mini_jax.options import Finetune
from lora_mini_jax.runs.loop import make_evaluate
from lora_mini_jax.runs.schedule import optimizer
from lora_mini_jax.search.choice import discretise, openings
from lora_mini_jax.search.search import halves, make_search_step, search_state
from lora_mini_jax.tasks.kinds import prepare
from lora_mini_jax.tasks.task import Task
from lora_mini_jax.training.train import TrainState, make_train_step

SEARCHED = "DiffoRA"
CONTROLS = ("random choice", "gradient norm", "all at a lower rank", "DiffoRA's choice, fresh")
GRADIENT_BATCHES = 8


@dataclass(frozen=True)
class Options:
    """The task and the training."""

    model: str
    """Folder of a Llama."""
    data: str
    """Training records (jsonl)."""
    valid: str
    """Held-out records (jsonl)."""
    learning_rate: float
    """Peak, the same for all."""
    prompt_field: str | None = None
    completion_field: str | None = None
    out: Path = Path(__file__).parent / "results" / "diffora_controls.json"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rank: int = 8
    """Of LoRA on the kernels that DiffoRA chooses; alpha is twice the rank."""
    rho: float = 0.5
    relaxation: Relaxation = "sigmoid"
    gate_learning_rate: float = 0.05
    search_steps: int = 40
    steps: int = 120
    """Updates of DiffoRA after the search."""
    batch_size: int = 8
    max_length: int = 128
    max_train_examples: int = 2000
    max_valid_examples: int = 200

    @property
    def method(self) -> DiffoRA:
        """DiffoRA over LoRA."""
        inner = LoRA(rank=self.rank, alpha=2.0 * self.rank)
        return DiffoRA(inner, rho=self.rho, relaxation=self.relaxation)

    def run(self, seed: int) -> Finetune:
        """The same as options of a fine-tuning run, for what is read from them."""
        same = ("model", "data", "valid", "learning_rate", "prompt_field", "completion_field",
                "batch_size", "max_length", "max_train_examples", "max_valid_examples")  # fmt: skip
        return Finetune(**{name: getattr(self, name) for name in same}, seed=seed)


def main(options: Options) -> None:
    """Do what the results do not hold yet, seed by seed, and write the table."""
    settings = {n: v for n, v in asdict(options).items() if n not in ("out", "seeds")}
    settings |= {name: Path(settings[name]).name for name in ("model", "data", "valid")}
    record = read_json(options.out) if options.out.exists() else {"options": settings, "runs": {}}
    if record["options"] != settings:
        raise UserError(f"{options.out} holds results of other options: give another --out")
    runs = record["runs"]
    for seed in options.seeds:
        one = None
        for name in (SEARCHED, *CONTROLS):
            key = f"{name}, seed {seed}"
            if key not in runs:
                one = one or Seed(options, seed)
                runs[key] = one.measure(name, runs.get(f"{SEARCHED}, seed {seed}", {}))
                print(key, {n: v for n, v in runs[key].items() if n != "gates"}, flush=True)
                write_json(options.out, record)
    text = table(runs, options.seeds)
    write_text(options.out.with_suffix(".md"), text)
    print(text)


class Seed:
    """Model, data and order of one seed, for all of its runs."""

    def __init__(self, options: Options, seed: int) -> None:
        self.options, self.seed, self.given = options, seed, options.run(seed)
        self.task: Task = prepare(self.given)
        targets = [site.target for site in self.task.sites]
        self.gated = draw(self.task.params, plan_sites(options.method, targets), seed)
        self.evaluate = make_evaluate(self.task)

    def measure(self, name: str, searched: dict[str, Any]) -> dict[str, Any]:
        """One run; ``searched`` is what `measure` found for DiffoRA with this seed."""
        started, gates = time.time(), {}
        if name == SEARCHED:
            after = self.search()
            gates = {"gates": openings(after)}
            adapter, steps = discretise(after, self.options.rho)[1], self.options.steps
        else:
            sites = at_budget(self.control(name, searched), searched["trained"])
            adapter = draw(self.task.params, sites, self.seed)
            steps = self.options.steps + 2 * self.options.search_steps
        start = self.evaluate(adapter)["valid_loss"]
        loss = self.evaluate(self.train(adapter, steps))["valid_loss"]
        seconds = round(time.time() - started)
        found = {"trained": count(adapter), "steps": steps, "start": start, "loss": loss}
        return {**found, "seconds": seconds, **gates}

    def control(self, name: str, searched: dict[str, Any]) -> tuple[Site, ...]:
        """The kernels of a control, at LoRA's own rank."""
        if name == "all at a lower rank":
            return discretise(self.gated, 1.0)[1].sites
        if name == "random choice":
            scores = random_choice(self.gated, self.seed)
        elif name == "gradient norm":
            batches = [self.task.train.batch(i) for i in range(GRADIENT_BATCHES)]
            loss = self.task.loss
            scores = by_gradient_norm(lambda *a: loss(*a)[0], self.task.params, self.gated, batches)
        else:
            scores = searched["gates"]
        return discretise(self.gated, self.options.rho, scores=scores)[1].sites

    def search(self) -> Adapter:
        """The adapter after DiffoRA's search."""
        train, valid = halves(self.task.train, self.seed)
        tx = optimizer(self.given, self.options.search_steps, self.gated.sites)
        tx_gate = optax.adam(self.options.gate_learning_rate)
        step = make_search_step(self.task.loss, tx, tx_gate, has_aux=True)
        state = search_state(self.gated, tx, tx_gate, self.seed)
        for i in range(self.options.search_steps):
            state, _ = step(state, self.task.params, train.batch(i), valid.batch(i))
        return state.adapter

    def train(self, adapter: Adapter, steps: int) -> Adapter:
        """Ordinary training."""
        tx = optimizer(self.given, steps, adapter.sites)
        step = make_train_step(self.task.loss, tx, has_aux=True)
        state = TrainState.create(adapter, tx, self.seed)
        for i in range(steps):
            state, _ = step(state, self.task.params, self.task.train.batch(i))
        return jax.block_until_ready(state.adapter)


def table(runs: dict[str, Any], seeds: tuple[int, ...]) -> str:
    """Means and standard deviations over the seeds, and each control's distance from DiffoRA."""

    def values(name: str, field: str) -> np.ndarray:
        return np.array([runs[f"{name}, seed {seed}"][field] for seed in seeds], np.float64)

    def spread(numbers: np.ndarray) -> str:
        std = f" ± {numbers.std(ddof=1):.4f}" if len(numbers) > 1 else ""
        return f"{numbers.mean():.4f}{std}"

    lines = [
        "| | trained parameters | held-out loss, nats per token | above DiffoRA, seed by seed |",
        "|---|---|---|---|",
    ]
    for name in (SEARCHED, *CONTROLS):
        loss = values(name, "loss")
        gap = "" if name == SEARCHED else spread(loss - values(SEARCHED, "loss"))
        trained = f"{values(name, 'trained').mean():,.0f}"
        lines.append(f"| {name} | {trained} | {spread(loss)} | {gap} |")
    return "\n".join([*lines, f"\n{len(seeds)} seeds, mean ± standard deviation.\n"])


if __name__ == "__main__":
    main(tyro.cli(Options))
