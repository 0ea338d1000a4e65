"""Where does LoRA-Mini beat LoRA at an equal number of trained parameters?

    python -m experiments.sweep_e2e --model MODEL_DIR --data TRAIN.jsonl --valid VALID.jsonl

The base is a small pre-trained Llama, the data E2E, the loss that of the completions. Every
configuration has its learning rate tuned with one seed on one half of the held-out lines, and is
reported on the other half with three. One configuration takes three to five minutes on one core;
``--part`` and ``--parts`` share them among processes; a sweep that was stopped goes on.

Found (``results/sweep_e2e.md``): on a model of width 64 LoRA-Mini beats LoRA that was made as
small by adapting attention alone, loses to LoRA r=1 on the MLP kernels, and does not come near
LoRA r=8 at a tenth or a twentieth of its size.
"""

import fcntl
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from lora_mini_jax import linen, merge
from lora_mini_jax.adapter import Adapter, Site, draw, plan
from lora_mini_jax.data import (
    Batches,
    Fields,
    Packed,
    encode_records,
    load_tokenizer,
    pack,
    read_records,
    token_loss,
)
from lora_mini_jax.files import read_json, write_json
from lora_mini_jax.methods import from_dict
from lora_mini_jax.models import load
from lora_mini_jax.tree import flatten, select, unflatten

GRID = [float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5)]
START = GRID.index(2e-2)
SEEDS = (0, 1, 2)
ADAM = optax.scale_by_adam(b1=0.9, b2=0.999)

Kernels = dict[str, jax.Array]
Losses = tuple[float, float]
"""On the held-out lines for tuning, then on those for reporting."""


@dataclass(frozen=True)
class Options:
    """The task and the training; the defaults made the committed results."""

    model: Path
    """Folder of the base model."""
    data: Path
    """E2E training lines (jsonl)."""
    valid: Path
    """E2E validation lines (jsonl)."""
    out: Path = Path(__file__).parent / "results" / "sweep_e2e.json"
    """Results are added to it; configurations that it holds are not run again."""
    only: str = ""
    """A regular expression: which configurations to run."""
    part: int = 0
    """With ``parts``: every parts-th configuration from this one, for a process a core."""
    parts: int = 1
    lines: int = 2000
    """Training lines, of those of at most ``length`` tokens."""
    held_out: int = 250
    """At most this many held-out lines for tuning, and as many others for reporting."""
    length: int = 112
    batch: int = 4
    epochs: int = 1


@dataclass(frozen=True)
class Configuration:
    """One method on some kernels of one base; ``alpha`` is twice the rank everywhere."""

    name: str
    method: dict[str, Any]
    include: str = "all-linear"
    base: str = "pretrained"

    def sites(self, targets: Any) -> tuple[Site, ...]:
        """Mind that k_proj and v_proj have 32 outputs: wider outer factors are narrowed there."""
        narrow = {side: min(32, self.method[side]) for side in "ab" if side in self.method}
        overrides = {"k_proj|v_proj": narrow} if narrow else None
        method = from_dict({**self.method, "alpha": 2.0 * self.method["rank"]})
        return plan(method, select(targets, self.include), overrides)


def configurations() -> list[Configuration]:
    """All of them, the most telling first."""
    parts = {"attention": "self_attn", "mlp": "mlp", "q,v": "q_proj|v_proj", "v": "v_proj",
             "down": "down_proj"}  # fmt: skip
    some = [(1, "attention"), (2, "attention"), (1, "mlp"), (2, "q,v"), (4, "q,v"), (2, "down"),
            (1, "q,v"), (1, "down"), (1, "v")]  # fmt: skip
    fewer = [lora(rank, f"on {name}", parts[name]) for rank, name in some]
    good, other = ("orthogonal", "svd"), ("fan_in", "normal")
    shapes = [(1, 32, 32), (1, 64, 64), (4, 16, 16), (2, 64, 64), (1, 16, 16), (4, 32, 32),
              (2, 16, 16), (8, 32, 32), (4, 64, 64), (1, 8, 8), (2, 8, 8), (8, 16, 16)]  # fmt: skip
    best = [mini(*shape, init) for shape in shapes for init in good]
    first = [mini(2, 32, 32, init) for init in good + other]
    others = [mini(*shape, init) for shape in shapes[:3] for init in other]
    control = [lora(8, base="random"), mini(2, 32, 32, "orthogonal", base="random")]
    return [lora(8), lora(1), *first, *best[:2], *fewer[:2], *others[:2], *best[2:8], lora(2),
            *control, lora(4), *fewer[2:6], *others[2:], *best[8:], *fewer[6:]]  # fmt: skip


def lora(rank: int, where: str = "", include: str = "all-linear", base: str = "pretrained"):
    """LoRA of a rank on the kernels that ``include`` matches."""
    name = f"LoRA r={rank} {where}".strip() + (" (random base)" if base == "random" else "")
    return Configuration(name, {"method": "lora", "rank": rank}, include, base)


def mini(rank: int, a: int, b: int, outer_init: str, base: str = "pretrained"):
    """LoRA-Mini on all linear kernels."""
    method = {"method": "lora-mini", "rank": rank, "a": a, "b": b, "outer_init": outer_init}
    name = f"LoRA-Mini r={rank} a={a} b={b} {outer_init}"
    return Configuration(name + (" (random base)" if base == "random" else ""), method, base=base)


def main(options: Options) -> None:
    """Tune and report every configuration that the results do not hold yet."""
    task = Task(options)
    own = [c for c in configurations() if re.search(options.only, c.name)]
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


def measure(task: "Task", configuration: Configuration) -> dict[str, Any]:
    """Tune the learning rate on one half of the held-out lines, report on the other half.

    The first seed does the tuning; all of them are reported at the rate that it chose.
    """
    started = time.time()
    sites = configuration.sites(task.targets)
    params = task.bases[configuration.base]
    runs = tune(lambda lr: task.run(params, sites, lr, SEEDS[0]))
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
        "before": task.evaluate(task.kernels(params), params, task.reporting),
        "seconds": round(time.time() - started),
    }


def tune(run_at: Callable[[float], Losses]) -> dict[float, Losses]:
    """Learning rates and losses: three about the start, then on until the best is not an edge."""
    found = {lr: run_at(lr) for lr in GRID[START - 1 : START + 2]}
    while True:
        best = min(found, key=lambda lr: found[lr])
        step = (best == max(found)) - (best == min(found))
        at = GRID.index(best) + step
        if step == 0 or not 0 <= at < len(GRID):
            return found
        found[GRID[at]] = run_at(GRID[at])


class Task:
    """Base models, data and the compiled programs, one set for all configurations.

    The adapter is merged into the kernels at every step, and the gradient in the kernels is pulled
    back to the factors: exact, dearer than thin products on large models, but at width 64 no
    slower, and it lets every configuration use the same compiled model.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model, params = load(options.model)
        example = jnp.zeros((1, 8), jnp.int32)
        self.bases = {
            "pretrained": params,
            "random": self.model.init(jax.random.key(7), example)["params"],
        }
        self.targets = select(linen.targets(self.model, params, example))
        self.train, self.tuning, self.reporting = read(options)
        self.loss = jax.jit(self.loss_of)
        self.grad = jax.jit(
            jax.value_and_grad(lambda *given: (p := self.loss_of(*given))[0] / p[1])
        )

    def loss_of(self, kernels: Kernels, params: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
        """Sum of the loss over completion tokens, and their number."""
        params = unflatten({**flatten(params), **kernels})
        # No mask is needed: rows hold one example each, padded at the end.
        with mock.patch.object(jax.nn, "dot_product_attention", attention):
            logits: Any = self.model.apply({"params": params}, batch["tokens"])
        return token_loss(logits, batch)

    def kernels(self, params: Any) -> Kernels:
        """All linear kernels by path."""
        flat = flatten(params)
        return {target.path: flat[target.path] for target in self.targets}

    def run(self, params: Any, sites: Any, peak: float, seed: int) -> Losses:
        """Train one adapter; its held-out losses, infinite if it diverged."""
        adapter, kernels = draw(params, sites, seed), self.kernels(params)
        moments = ADAM.init(adapter.trainable)
        batches = Batches(self.train, self.options.batch, seed)
        steps = self.options.epochs * len(batches)
        warm = steps // 20
        for step in range(steps):
            lr = peak * min((step + 1) / warm, (steps - step) / (steps - warm))
            _, slopes = self.grad(kernels, params, batches.batch(step))
            adapter, moments, changed = update(params, adapter, moments, slopes, lr)
            kernels = {**kernels, **changed}
        losses = (
            self.evaluate(kernels, params, self.tuning),
            self.evaluate(kernels, params, self.reporting),
        )
        print(f"  lr {peak:g}, seed {seed}: {losses}", flush=True)
        return losses if np.isfinite(sum(losses)) else (np.inf, np.inf)

    def evaluate(self, kernels: Kernels, params: Any, rows: Packed) -> float:
        """Mean nats per completion token."""
        parts = [self.loss(kernels, params, batch) for batch in Batches(rows, 16, 0).eval_batches()]
        total, number = np.sum(np.asarray(parts, np.float64), axis=0)
        return float(total / number)


@jax.jit
def update(params: Any, adapter: Adapter, moments: Any, slopes: Kernels, lr: jax.Array):
    """One step of Adam on the factors, given the gradient in the kernels."""

    def kernels(trainable: Any) -> Kernels:
        flat = flatten(merge(params, adapter.with_trainable(trainable)))
        return {site.target.path: flat[site.target.path] for site in adapter.sites}

    changed, pull = jax.vjp(kernels, adapter.trainable)
    (grads,) = pull({path: slopes[path] for path in changed})
    direction, moments = ADAM.update(grads, moments)
    trained = jax.tree.map(lambda p, d: p - lr * d, adapter.trainable, direction)
    return adapter.with_trainable(trained), moments, kernels(trained)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, **_: Any) -> jax.Array:
    """What ``jax.nn.dot_product_attention(is_causal=True)`` computes, faster backwards on a CPU.

    The softmax is divided by its sum after the product with ``v``, not before.
    """
    (b, t, n, d), groups = q.shape, k.shape[2]

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(b, t, groups, -1, d).transpose(0, 2, 3, 1, 4).reshape(b * groups, -1, d)

    q, k, v = heads(q) * d**-0.5, heads(k), heads(v)
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    past = (jnp.arange(q.shape[1]) % t)[:, None] >= jnp.arange(t)
    scores = jnp.where(past, scores, -1e30)
    p = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bqk,bkd->bqd", p, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1))
    out = out[..., :-1] / out[..., -1:]
    return out.reshape(b, groups, -1, t, d).transpose(0, 3, 1, 2, 4).reshape(b, t, n, d)


def read(options: Options) -> tuple[Packed, Packed, Packed]:
    """Rows to train on, to tune on and to report: the last two share no meaning representation."""
    tokenizer = load_tokenizer(options.model)
    fields = Fields(prompt_field="meaning_representation", completion_field="reference")

    def rows(records: list, most: int) -> Packed:
        found = encode_records(records, tokenizer, fields, max_length=options.length).examples
        at = np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)
        return pack([found[i] for i in at], options.length, packing=False)

    valid = read_records(options.valid)
    half = set(sorted({record["meaning_representation"] for record in valid})[::2])
    first = [record for record in valid if record["meaning_representation"] in half]
    second = [record for record in valid if record["meaning_representation"] not in half]
    train = rows(read_records(options.data), options.lines)
    return train, rows(first, options.held_out), rows(second, options.held_out)


if __name__ == "__main__":
    main(tyro.cli(Options))
