"""Where does LoRA-Mini beat LoRA at an equal number of trained parameters?

    python -m experiments.sweep_e2e --model MODEL_DIR --data TRAIN.jsonl --valid VALID.jsonl

The base is a small pre-trained Llama, the data E2E, the loss that of the completions. Every
configuration has its learning rate tuned with one seed on one half of the held-out lines, and is
reported on the other half with three. A sweep that was stopped goes on; ``--part`` and ``--parts``
share it among processes. ``--widest`` runs the configurations for a base of width 256, where
LoRA-Mini reaches budgets that LoRA of rank 1 on all kernels does not.
"""

import fcntl
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments.e2e_task import Losses, Task, TaskOptions
from lora_mini_jax.adapters.sites import Site, plan_sites
from lora_mini_jax.files import read_json, write_json
from lora_mini_jax.methods import from_dict
from lora_mini_jax.selection import select

GRID = [float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5)]
SEEDS = (0, 1, 2)
PARTS = {"all-linear": "all-linear", "attention": "self_attn", "mlp": "mlp", "q,v": "q_proj|v_proj",
         "v": "v_proj", "down": "down_proj", "up,down": "up_proj|down_proj"}  # fmt: skip


@dataclass(frozen=True)
class Options(TaskOptions):
    """The task, and which configurations to run."""

    out: Path = Path(__file__).parent / "results" / "sweep_e2e.json"
    """Results are added to it; configurations that it holds are not run again."""
    widest: bool = False
    """The configurations for a base of width 256."""
    only: str = ""
    """A regular expression: which configurations to run."""
    part: int = 0
    """With ``parts``: every parts-th configuration from this one, for a process a core."""
    parts: int = 1


@dataclass(frozen=True)
class Configuration:
    """One method on some kernels of one base; ``alpha`` is twice the rank everywhere."""

    name: str
    method: dict[str, Any]
    include: str = "all-linear"
    base: str = "pretrained"
    start: float = 2e-2
    """The learning rate about which tuning starts."""

    def sites(self, targets: Any) -> tuple[Site, ...]:
        """Outer factors that are wider than a kernel allows are narrowed there."""
        found = []
        for target in select(targets, self.include):
            n_in, n_out = target.n_in, target.n_out
            limits = {"a": n_in, "b": n_out}
            if self.method.get("outer_init") in ("svd", "gradient"):
                limits = dict.fromkeys("ab", min(n_in, n_out))
            if self.method["method"] == "lora-mini-diag":
                limits = {"rank": min(n_in, n_out)}
            sides = {s: min(n, self.method[s]) for s, n in limits.items() if s in self.method}
            found += plan_sites(from_dict({**self.method, **sides}), [target])
        return tuple(found)


def configurations(widest: bool) -> list[Configuration]:
    """All of them, the most telling first."""
    every = ("orthogonal", "svd", "gradient", "activation", "fan_in", "normal")
    if widest:
        return [
            lora(8), lora(1), lora(1, "attention"), mini(1, 128, 128, "orthogonal"),
            *(mini(4, 32, 32, init) for init in every[:4]), mini(2, 64, 64, "orthogonal"),
            *(mini(1, 128, 128, init) for init in every[1:4]), mini(2, 64, 64, "gradient"),
            diag(256), diag(64), xs(16), miss(64, 4), lora(2, "down"), lora(1, "up,down"),
            lora(1, "mlp"),
            mini(8, 16, 16, "orthogonal"), mini(8, 16, 16, "gradient"), vera(256), miss(16, 16),
            mini(2, 32, 32, "orthogonal"), mini(2, 32, 32, "gradient"), lora(1, "q,v"),
            mini(1, 64, 64, "orthogonal"), mini(1, 64, 64, "gradient"), lora(1, "down"), xs(11),
            lora(2), mini(8, 32, 32, "gradient"), mini(8, 32, 32, "orthogonal"),
            *(mini(4, 32, 32, init) for init in every[4:]),
            lora(8, base="random"), mini(4, 32, 32, "orthogonal", "random"),
            mini(1, 32, 32, "gradient"), mini(4, 64, 64, "gradient"), mini(8, 64, 64, "gradient"),
            lora(4),
        ]  # fmt: skip
    shapes = [(2, 32, 32), (1, 32, 32), (1, 64, 64), (4, 16, 16)]
    own = [mini(*shape, init) for shape in shapes for init in every[:5]]
    fewer = [(1, "attention"), (2, "attention"), (1, "mlp"), (2, "q,v"), (4, "q,v"), (2, "down")]
    others = [diag(64), diag(16), xs(11), xs(8), miss(32, 4), miss(16, 4), vera(64)]
    control = [lora(8, base="random"), mini(2, 32, 32, "orthogonal", "random")]
    return [lora(8), lora(1), *(lora(*each) for each in fewer), *own, *others, *control,
            mini(2, 32, 32, "normal"), lora(2), lora(4), mini(4, 32, 32, "orthogonal"),
            mini(8, 32, 32, "orthogonal")]  # fmt: skip


def named(name: str, base: str) -> str:
    """A configuration's name, the base in it where it is not the pre-trained one."""
    return name + (" (random base)" if base == "random" else "")


def lora(rank: int, where: str = "all-linear", base: str = "pretrained") -> Configuration:
    """LoRA of a rank on some kernels."""
    name = f"LoRA r={rank}" + ("" if where == "all-linear" else f" on {where}")
    method = {"method": "lora", "rank": rank, "alpha": 2.0 * rank}
    return Configuration(named(name, base), method, PARTS[where], base)


def mini(rank: int, a: int, b: int, outer_init: str, base: str = "pretrained") -> Configuration:
    """LoRA-Mini on all linear kernels."""
    name = f"LoRA-Mini r={rank} a={a} b={b} {outer_init}"
    sizes = {"rank": rank, "alpha": 2.0 * rank, "a": a, "b": b}
    method = {"method": "lora-mini", **sizes, "outer_init": outer_init}
    return Configuration(named(name, base), method, base=base)


def diag(rank: int) -> Configuration:
    """LoRA-Mini-diag on all linear kernels."""
    method = {"method": "lora-mini-diag", "rank": rank}
    return Configuration(f"LoRA-Mini-diag r={rank}", method, start=1e-2)


def xs(rank: int) -> Configuration:
    """LoRA-XS on all linear kernels."""
    return Configuration(f"LoRA-XS r={rank}", {"method": "lora-xs", "rank": rank,
                                               "alpha": 2.0 * rank}, start=5e-3)  # fmt: skip


def vera(rank: int) -> Configuration:
    """VeRA on all linear kernels."""
    return Configuration(f"VeRA r={rank}", {"method": "vera", "rank": rank}, start=5e-2)


def miss(rank: int, mini_rank: int) -> Configuration:
    """MiSS mini on all linear kernels."""
    method = {"method": "miss", "mode": "mini", "rank": rank, "mini_rank": mini_rank}
    return Configuration(f"MiSS mini r={rank} mini_r={mini_rank}", method, start=5e-3)


def main(options: Options) -> None:
    """Tune and report every configuration that the results do not hold yet."""
    task = Task(options)
    own = [c for c in configurations(options.widest) if re.search(options.only, c.name)]
    for configuration in own[options.part :: options.parts]:
        if configuration.name in results(options.out):
            continue
        found = measure(task, configuration)
        print(configuration.name, found, flush=True)
        with options.out.with_suffix(".tmp").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(options.out, {**results(options.out), configuration.name: found})


def results(path: Path) -> dict[str, Any]:
    """What was found so far, by configuration."""
    return read_json(path) if path.exists() else {}


def measure(task: Task, configuration: Configuration) -> dict[str, Any]:
    """Tune the learning rate on one half of the held-out lines, report on the other half.

    The first seed does the tuning; all of them are reported at the rate that it chose.
    """
    started = time.time()
    sites = configuration.sites(task.targets)
    params = task.bases[configuration.base]
    runs = tune(lambda lr: task.run(params, sites, lr, SEEDS[0]), GRID.index(configuration.start))
    lr = min(runs, key=lambda lr: runs[lr])
    losses = [runs[lr][1], *(task.run(params, sites, lr, seed)[1] for seed in SEEDS[1:])]
    return {
        "trained": sum(site.n_trainable for site in sites),
        "method": configuration.method,
        "include": configuration.include,
        "base": configuration.base,
        "tuning": {f"{lr:g}": runs[lr][0] for lr in sorted(runs)},
        "lr": lr,
        "losses": losses,
        "mean": float(np.mean(losses)),
        "std": float(np.std(losses, ddof=1)),
        "before": task.evaluate(params, None, task.reporting),
        "steps": task.steps,
        "seconds": round(time.time() - started),
    }


def tune(run_at: Callable[[float], Losses], start: int) -> dict[float, Losses]:
    """Learning rates and losses: three about the start, then on until the best is not an edge."""
    found = {lr: run_at(lr) for lr in GRID[start - 1 : start + 2]}
    while True:
        best = min(found, key=lambda lr: found[lr])
        step = (best == max(found)) - (best == min(found))
        at = GRID.index(best) + step
        if step == 0 or not 0 <= at < len(GRID):
            return found
        found[GRID[at]] = run_at(GRID[at])


if __name__ == "__main__":
    main(tyro.cli(Options))
