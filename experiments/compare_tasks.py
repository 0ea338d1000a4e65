"""Every method on two tasks at a matched number of trained parameters.

    python -m experiments.compare_tasks --task e2e  --model MODEL_DIR --data E2E_DIR
    python -m experiments.compare_tasks --task trec --model MODEL_DIR --data TREC_DIR

E2E is text from meaning representations; TREC is the type of a question, a letter that is one token
(written out as words, nothing but full fine-tuning learned to spell them). Every method's learning
rate is one of two about a centre of its own, chosen with one seed on one half of the held-out
examples; ``lora-mini compare`` then runs it with all seeds, and
the other half is what is reported. The control is the same on a base whose weights are random.

A run that is finished is not run again, so an interrupted experiment goes on. Writes
``results/compare_TASK.json``, and by ``experiments.compare_plot`` ``.md`` and ``.svg`` beside it.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from experiments.compare_plot import write
from lora_mini_jax.files import read_json, write_json, write_text
from lora_mini_jax.models import load, save
from lora_mini_jax.options import Compare
from lora_mini_jax.runs.compare import compare
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.meter import Diverged

Row = dict[str, Any]
TYPES = "ABCDEF"
"""Of questions: description, entity, abbreviation, human, location, number."""
KEPT = ("trainable", "valid_loss_before", "valid_loss_after", "valid_right_before",
        "valid_right_after", "step_seconds", "step_bytes", "adapter_bytes", "settings",
        "seed")  # fmt: skip

ARMS = {
    "lora": 1e-2, "lora:rslora=true": 1e-2, "lora:lora_plus_ratio=4": 5e-3, "lora-fa": 2e-2,
    "dora": 1e-2, "pissa": 5e-3, "olora": 5e-3, "adalora": 2e-2, "lora-xs": 5e-3, "vera": 2e-2,
    "miss": 5e-3, "miss:mode=mini,mini_rank=4": 5e-3, "lora-mini:outer_init=orthogonal": 2e-2,
    "lora-mini:outer_init=gradient": 1e-2, "lora-mini-diag": 1e-2,
    "diffora:inner=lora,rho=0.5,budget=24000": 1e-2,
    "relora": 1e-2, "switchlora": 1e-2, "full:target_modules=norm,budget=none": 1e-2,
    "full:target_modules=all,budget=none": 2e-3,
}  # fmt: skip
"""Methods, and the middle of the learning rates that each may choose from."""
CONTROL = ("lora", "lora-mini:outer_init=orthogonal", "full:target_modules=all,budget=none")
"""What the random base gets too."""


@dataclass(frozen=True)
class Options:
    """The task and what is run on it."""

    task: Literal["e2e", "trec"]
    model: Path
    """Folder of the base model."""
    data: Path
    """Folder of the task's files."""
    out: Path = Path(__file__).parent / "results"
    work: Path = Path("runs/compare_tasks")
    """The prepared data, the random base, and the folder of every run."""
    budget: int = 12000
    """Trained parameters of every method, at most; DiffoRA's is twice that before it has chosen
    half of the kernels, and ``full`` is beside the budget."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first does the choosing."""
    grid: tuple[float, ...] = (0.5, 1.5)
    """Learning rates to choose from, as multiples of the centre."""
    only: str = ""
    """A regular expression: methods that it does not match stay as they were found before. Wants a
    ``work`` folder of its own, for a comparison goes on with the same methods only."""


def main(options: Options) -> None:
    """Tune, compare, and write what was found; the random base last."""
    # What runs share is compiled once.
    jax.config.update("jax_compilation_cache_dir", str((options.work / "compiled").absolute()))
    prepare = {"e2e": prepare_e2e, "trec": prepare_trec}[options.task]
    files = prepare(options.data, options.work / options.task)
    found: dict[str, Row] = read_json(result(options))["bases"] if options.only else {}
    for name, arms in (("pretrained", tuple(ARMS)), ("random", CONTROL)):
        base = str(options.model) if name == "pretrained" else random_base(options)
        chosen = tuple(arm for arm in arms if re.search(options.only, arm))
        if chosen:
            found[name] = found.get(name, {}) | measure(options, base, files, chosen)
            record(options, found)


def result(options: Options) -> Path:
    """Where the results are."""
    return options.out / f"compare_{options.task}.json"


def measure(options: Options, base: str, files: dict[str, str], arms: tuple[str, ...]) -> Row:
    """``{arm: {lr, tuning, runs}}`` on one base."""
    tuning = {arm: tune(options, base, files, arm) for arm in arms}
    chosen = {arm: min(losses, key=lambda lr: losses[lr]) for arm, losses in tuning.items()}
    specs = {at(arm, chosen[arm]): arm for arm in arms}
    rows = compare(given(options, base, files, "reporting", tuple(specs), options.seeds))
    runs: dict[str, list[Row]] = {arm: [] for arm in arms}
    for row in rows:
        if "diverged_at" in row:
            raise SystemExit(f"{row['spec']}, seed {row['seed']} diverged: lower its ARMS")
        runs[specs[row["spec"]]].append({name: row[name] for name in KEPT})
    return {
        arm: {"lr": chosen[arm], "tuning": {f"{k:g}": v for k, v in tuning[arm].items()},
              "runs": runs[arm]}
        for arm in arms
    }  # fmt: skip


def tune(options: Options, base: str, files: dict[str, str], arm: str) -> dict[float, float]:
    """Learning rates and the losses they led to on the tuning half; diverged ones are left out."""
    losses: dict[float, float] = {}
    seed = options.seeds[0]
    for factor in options.grid:
        lr = float(f"{ARMS[arm] * factor:.3g}")
        spec = at(arm, lr)
        run = given(options, base, files, "tuning", (spec,), (seed,)).run_options(spec, seed)
        with suppress(Diverged):
            losses[lr] = finetune(run, say=lambda line: None)["valid_loss_after"]
        print(spec, losses.get(lr), flush=True)
    return losses


def given(
    options: Options,
    base: str,
    files: dict[str, str],
    half: str,
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
) -> Compare:
    """The comparison's options, the same for all but base, half and methods."""
    return Compare(
        model=base,
        data=files["train"],
        prompt_field="prompt",
        completion_field="completion",
        valid=files[half],
        output_dir=str(options.work / options.task / f"{Path(base).name}-{half}"),
        methods=methods,
        seeds=seeds,
        budget=options.budget,
        max_length=256,
        batch_size=4,
        epochs=1,
        samples=0,
        save_every=100_000,
        log_every=20,
    )


def at(arm: str, lr: float) -> str:
    """The spec of an arm at a learning rate."""
    return f"{arm}{',' if ':' in arm else ':'}learning_rate={lr:g}"


def random_base(options: Options) -> str:
    """A folder with the base's shape, config and tokenizer, and weights as ``init`` draws them."""
    folder = options.work / "random"
    if not folder.exists():
        model, _ = load(options.model)
        params = model.init(jax.random.key(7), jax.numpy.zeros((1, 8), int))["params"]
        save(folder, model, params, tokenizer_from=options.model)
    return str(folder)


def prepare_e2e(data: Path, work: Path) -> dict[str, str]:
    """400 lines to train on; 100 to tune and 100 to report, of different representations."""
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    valid = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()]
    meanings = sorted({line["meaning_representation"] for line in valid})
    halves = [
        [line for line in valid if line["meaning_representation"] in set(meanings[i::2])]
        for i in (0, 1)
    ]

    def rows(lines: list[Row], most: int) -> list[Row]:
        chosen = np.linspace(0, len(lines) - 1, most).astype(int)
        return [{"prompt": lines[i]["meaning_representation"], "completion": lines[i]["reference"]}
                for i in chosen]  # fmt: skip

    return written(work, rows(train, 400), rows(halves[0], 100), rows(halves[1], 100))


def prepare_trec(data: Path, work: Path) -> dict[str, str]:
    """1,500 training questions; the test questions in two halves."""

    def rows(file: str) -> list[Row]:
        lines = [line.split(" ", 1) for line in (data / file).read_text("latin-1").splitlines()]
        return [{"prompt": text, "completion": TYPES[int(label)]} for label, text in lines]

    train, test = rows("train.txt"), rows("test.txt")
    chosen = np.linspace(0, len(train) - 1, 1500).astype(int)
    return written(work, [train[i] for i in chosen], test[::2], test[1::2])


def written(work: Path, *parts: list[Row]) -> dict[str, str]:
    """The three parts as files."""
    files = {}
    for name, rows in zip(("train", "tuning", "reporting"), parts, strict=True):
        files[name] = str(work / f"{name}.jsonl")
        Path(files[name]).parent.mkdir(parents=True, exist_ok=True)
        write_text(files[name], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def record(options: Options, found: dict[str, Row]) -> None:
    """The results as JSON, and beside it as a table and a picture."""
    path = result(options)
    shared = {"task": options.task, "model": options.model.name, "budget": options.budget}
    write_json(path, {**shared, "seeds": options.seeds, "grid": options.grid, "bases": found})
    write(path)


if __name__ == "__main__":
    main(tyro.cli(Options))
