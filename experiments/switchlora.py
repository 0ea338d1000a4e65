"""Can a Llama be trained from scratch at low rank? Full rank, LoRA, ReLoRA and SwitchLoRA.

    python -m experiments.switchlora

A Llama of 5.6 million parameters (width 256, six layers, tied head) learns the source of the
Python standard library: the files that ``experiments.pretrain_base`` trains and holds out, the
held-out ones in two halves. Each method's learning rate is chosen on the first half with one seed,
from the same grid about a centre of its own; the second half is what is reported, for all seeds.

One run at a time; a run that was stopped goes on where it was, and runs that the results hold are
not run again. ``--only`` picks runs by a regular expression on their names, of which ``'^$'`` picks
none and only draws; ``--grid 0.25 4`` adds learning rates later on. Writes
``results/switchlora.json``, ``.md`` and ``.svg``.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.stdlib_text import held_out_loss, texts
from experiments.switchlora_plot import picture, table
from lora_mini_jax.files import read_json, write_json, write_text
from lora_mini_jax.options import Pretrain
from lora_mini_jax.options.pretrain import FromScratch
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Diverged
from lora_mini_jax.runs.pretrain import pretrain

Row = dict[str, Any]
KEPT = ("trainable", "exchanged_bytes", "optimizer_bytes", "frozen_bytes", "base_bytes",
        "parameters", "settings", "tokens_per_second", "seconds")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is run; all that changes a result must be as in the results that are there."""

    out: Path = Path(__file__).parent / "results" / "switchlora.json"
    """Results are added to it."""
    work: Path = Path("runs/switchlora")
    """The text, and the folder of the run in hand."""
    only: str = ""
    """A regular expression: which runs, by names like ``lora lr=0.01 seed=0``."""
    grid: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Learning rates to choose from, as multiples of the method's centre."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The first does the choosing."""
    steps: int = 250
    tune_steps: int | None = None
    """Steps of the runs that choose the learning rate; by default all of them."""
    rank: int = 64
    """A quarter of the width, as in the paper's larger models."""
    batch: int = 4
    length: int = 128
    layers: int = 6

    def fixed(self) -> Row:
        """The options that results of one file must share."""
        loose = ("out", "work", "only", "grid", "seeds")
        return {name: value for name, value in asdict(self).items() if name not in loose}


@dataclass(frozen=True)
class Arm:
    """A method with its settings, and the centre of its learning rates."""

    name: str
    method: FromScratch
    centre: float
    settings: tuple[str, ...] = ()


def arms(options: Options) -> list[Arm]:
    """What is compared. A slot of SwitchLoRA has 83 turns in the paper's 40,000 steps, but less
    than one in a few hundred; so there is an arm beside the paper's setting in which it has more.
    In the last one nothing is ever switched: what its initial values do by themselves.
    """
    rank, cycle = f"rank={options.rank}", max(1, options.steps // 3)
    return [
        Arm("full", "full", 3e-3),
        Arm("lora", "lora", 1e-2, (rank,)),
        Arm("relora", "relora", 1e-2, (rank, f"reset_every={cycle}")),
        Arm("switchlora", "switchlora", 2e-2, (rank,)),
        Arm("switchlora-often", "switchlora", 2e-2, (rank, "interval0=8")),
        Arm("switchlora-still", "switchlora", 2e-2, (rank, "interval0=1e9")),
    ]


def main(options: Options) -> None:
    """Run what is missing, then tabulate and draw what there is."""
    if options.out.exists() and read_json(options.out)["options"] != options.fixed():
        raise SystemExit(f"{options.out} holds results of other options: give another --out")
    # What seeds share, and a run that goes on, is compiled once.
    jax.config.update("jax_compilation_cache_dir", str((options.work / "compiled").absolute()))
    folders = texts(options.work)
    for arm in arms(options):
        for factor in options.grid:
            lr = float(f"{arm.centre * factor:.3g}")
            once(options, folders, arm, lr, options.seeds[0], options.tune_steps or options.steps)
    for arm in arms(options):
        if lr := best(options, arm):
            for seed in options.seeds:
                once(options, folders, arm, lr, seed, options.steps)
    found = {arm.name: final(options, arm) for arm in arms(options)}
    found = {name: runs for name, runs in found.items() if runs}
    if found:
        heading = (
            f"{options.steps} steps of {options.batch} x {options.length} tokens, rank "
            f"{options.rank}, {len(options.seeds)} seeds"
        )
        write_text(options.out.with_suffix(".md"), table(heading, found))
        write_text(options.out.with_suffix(".svg"), picture(found, options.seeds[0]))


def once(
    options: Options, folders: dict[str, Path], arm: Arm, lr: float, seed: int, steps: int
) -> None:
    """One run, unless the results hold it or ``--only`` does not want it."""
    name = run_name(options, arm, lr, seed, steps)
    if name in results(options) or not re.search(options.only, name):
        return
    given = Pretrain(
        method=arm.method,
        settings=arm.settings,
        data=(str(folders["train"]),),
        valid=(str(folders["tuning"]),),
        max_valid_tokens=4096,
        output_dir=str(options.work / name),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=options.layers,
        num_key_value_heads=4,
        max_length=options.length,
        batch_size=options.batch,
        steps=steps,
        learning_rate=lr,
        warmup_ratio=0.1,
        seed=seed,
        eval_every=max(1, steps // 5),
        save_every=max(1, steps // 2),
        log_every=max(1, steps // 30),
    )
    found = measured(given, folders["reporting"])
    write_json(options.out, {"options": options.fixed(), "runs": {**results(options), name: found}})
    print(name, {key: found[key] for key in ("tuning_loss", "loss")}, flush=True)


def measured(given: Pretrain, reporting: Path) -> Row:
    """Train, and keep what is told of it; a run that diverged has no losses."""
    folder = RunFolder(given)
    try:
        summary = pretrain(given, say=lambda line: None)
    except Diverged as error:
        shutil.rmtree(folder.path)
        return {"tuning_loss": None, "loss": None, "diverged": str(error)}
    loss = held_out_loss(folder.model, reporting, given.max_length)
    curve = [
        {key: row[key] for key in ("step", "loss", "valid_loss", "seconds") if key in row}
        for row in folder.metrics.rows()
    ]
    shutil.rmtree(folder.path)
    found = {key: summary[key] for key in KEPT}
    return {**found, "tuning_loss": summary["valid_loss_after"], "loss": loss, "curve": curve}


def results(options: Options) -> dict[str, Row]:
    """What was found so far, by run."""
    return read_json(options.out)["runs"] if options.out.exists() else {}


def run_name(options: Options, arm: Arm, lr: float, seed: int, steps: int) -> str:
    """How results call a run."""
    shorter = f" steps={steps}" if steps != options.steps else ""
    return f"{arm.name} lr={lr:g} seed={seed}{shorter}"


def tuning(options: Options, arm: Arm) -> dict[float, float]:
    """Learning rates tried and their losses on the tuning half, infinite where one diverged."""
    found, steps = {}, options.tune_steps or options.steps
    for name, run in results(options).items():
        lr = float(name.split(" lr=")[1].split()[0])
        if name == run_name(options, arm, lr, options.seeds[0], steps):
            found[lr] = np.inf if run["tuning_loss"] is None else run["tuning_loss"]
    return dict(sorted(found.items()))


def best(options: Options, arm: Arm) -> float | None:
    """The learning rate chosen; None before the whole grid is there."""
    losses = tuning(options, arm)
    return min(losses, key=lambda lr: losses[lr]) if len(losses) >= len(options.grid) else None


def final(options: Options, arm: Arm) -> Row | None:
    """The runs of all seeds at the chosen rate; None before they are there."""
    if (lr := best(options, arm)) is None:
        return None
    names = [run_name(options, arm, lr, seed, options.steps) for seed in options.seeds]
    runs = [results(options).get(name) for name in names]
    edge = lr in (min(tuning(options, arm)), max(tuning(options, arm)))
    learned = any(run and run["loss"] is not None for run in runs)
    return {"lr": lr, "edge": edge, "runs": runs} if all(runs) and learned else None


if __name__ == "__main__":
    main(tyro.cli(Options))
