"""What the laws are checked on: the table of methods, and a small model with every kind of kernel.

A new method is one row of `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_mini_jax import Adapter, LoRA, LoRAMini, Method, Target, init, linen
from lora_mini_jax.methods import (
    AdaLoRA,
    DiffoRA,
    DoRA,
    Full,
    LoRAFA,
    LoRAMiniDiag,
    LoRAXS,
    MiSS,
    OLoRA,
    PiSSA,
    ReLoRA,
    SwitchLoRA,
    VeRA,
)


@dataclass(frozen=True)
class Case:
    """A method's instance, its documented count for one kernel, and what it promises."""

    name: str
    method: Method
    formula: Callable[[int, int], int]
    identity_at_start: bool = True
    random: bool = True


def _mini(outer_init: Any, outer: Any = "float32") -> Case:
    method = LoRAMini(rank=2, alpha=3.0, a=4, b=5, outer_init=outer_init, outer=outer)
    name = f"lora-mini-{outer_init if outer == 'float32' else outer}"
    return Case(name, method, lambda n_in, n_out: 2 * (4 + 5))


CASES = (
    Case("lora", LoRA(rank=2, alpha=3.0), lambda n_in, n_out: 2 * (n_in + n_out)),
    Case("rslora", LoRA(rank=2, alpha=3.0, rslora=True), lambda n_in, n_out: 2 * (n_in + n_out)),
    Case("lora-fa", LoRAFA(rank=2, alpha=3.0), lambda n_in, n_out: 2 * n_out),
    Case("dora", DoRA(rank=2, alpha=3.0), lambda n_in, n_out: 2 * (n_in + n_out) + n_out),
    Case("pissa", PiSSA(rank=2, alpha=3.0), lambda n_in, n_out: 2 * (n_in + n_out), random=False),
    Case("olora", OLoRA(rank=2, alpha=3.0), lambda n_in, n_out: 2 * (n_in + n_out), random=False),
    Case("lora-xs", LoRAXS(rank=3, alpha=3.0), lambda n_in, n_out: 9, identity_at_start=False),
    Case("lora-mini-diag", LoRAMiniDiag(rank=3, outer_init="orthogonal"), lambda n_in, n_out: 3),
    Case("vera", VeRA(rank=5), lambda n_in, n_out: 5 + n_out),
    Case("miss", MiSS(rank=3), lambda n_in, n_out: 3 * n_out, random=False),
    Case("miss-mini", MiSS(rank=3, mode="mini"), lambda n_in, n_out: 3, random=False),
    Case("miss-bat", MiSS(rank=4, mode="bat"), lambda n_in, n_out: 4 * n_out, random=False),
    Case("switchlora", SwitchLoRA(rank=2, interval0=4.0), lambda n_in, n_out: 2 * (n_in + n_out)),
    Case("relora", ReLoRA(rank=2, alpha=3, reset_every=8), lambda n_in, n_out: 2 * (n_in + n_out)),
    Case(
        "adalora",
        AdaLoRA(rank=4, target_rank=2, total_steps=40, delta_t=8),
        lambda n_in, n_out: 4 * (n_in + n_out + 1),
    ),
    Case("full", Full(), lambda n_in, n_out: n_in * n_out, random=False),
    Case(
        "diffora-sigmoid",
        DiffoRA(LoRA(rank=2, alpha=3.0)),
        lambda n_in, n_out: 2 * (n_in + n_out) + 1,
    ),
    Case(
        "diffora-softmax",
        DiffoRA(LoRAMini(rank=2, alpha=3.0, a=4, b=5), relaxation="softmax"),
        lambda n_in, n_out: 2 * (4 + 5) + 1,
    ),
    _mini("normal"),
    _mini("fan_in"),
    _mini("orthogonal"),
    _mini("svd"),
    _mini("orthogonal", outer="bfloat16"),
    _mini("fan_in", outer="recompute"),
)

LAYERS, WIDTH, HIDDEN, HEADS, VOCAB = 2, 16, 24, 2, 20
LAYOUTS = ("plain", "remat", "scan", "scan+remat", "vmap")


# How layers are laid out is the core's business, the same for all methods, so one of each sort (a
# chain, one that reads the kernel, a dense part, related kernels) goes through every layout.
THOROUGH = {"lora", "dora", "switchlora", "diffora-softmax"}
# Rows that differ from another one of their class in a formula or a draw alone, not in how they
# meet a model.
VARIANTS = {"rslora", "lora-mini-normal", "lora-mini-fan_in", "lora-mini-svd", "miss-mini",
            "diffora-sigmoid", "lora-mini-bfloat16"}  # fmt: skip
MAIN = tuple(case for case in CASES if case.name not in VARIANTS)
LAID_OUT = [
    (case, layout)
    for case in MAIN
    for layout in LAYOUTS
    if case.name in THOROUGH or layout == "scan"
]


class Block(nn.Module):
    """Attention and a feed-forward part: DenseGeneral, Dense and an Einsum with a batch axis."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attn")(x, x)
        h = jnp.tanh(nn.Dense(HIDDEN, name="up")(x))
        h = h.reshape(*h.shape[:-1], HEADS, -1)
        size = h.shape[-1]
        h = nn.Einsum((HEADS, size, size), "btnh,nhk->btnk", name="heads")(h)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="down")(h), None


class Model(nn.Module):
    """``(tokens, noise) -> logits``; the blocks are laid out as ``layout`` says, the table is tied.

    ``"vmap"`` runs the blocks side by side, each with parameters of its own, and adds them up.
    ``noise`` is added to the embedded tokens, so that a gradient in the inputs can be taken.
    """

    layout: str = "plain"

    @nn.compact
    def __call__(self, tokens: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
        table = nn.Embed(VOCAB, WIDTH, name="embed")
        x = table(tokens) + noise
        block = nn.remat(Block, prevent_cse=False) if "remat" in self.layout else Block
        split: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if "scan" in self.layout:
            x, _ = nn.scan(block, length=LAYERS, **split)(name="layers")(x, None)
        elif self.layout == "vmap":
            many = nn.vmap(block, in_axes=None, axis_size=LAYERS, **split)
            x = many(name="layers")(x)[0].sum(0)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layers_{i}")(x)
        return table.attend(nn.Dense(WIDTH, name="pool")(x))


class Setup(NamedTuple):
    """A model with parameters, tokens and every target there is."""

    model: Any
    params: Any
    tokens: jax.Array
    targets: tuple[Target, ...]


@cache
def setup(layout: str = "scan") -> Setup:
    """The small model, made once for each layout."""
    model = Model(layout)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (3, 5)))
    params = random_params(model, tokens)
    return Setup(model, params, tokens, linen.targets(model, params, tokens))


def random_params(model: nn.Module, *inputs: Any, scale: float = 0.3, **kwargs: Any) -> Any:
    """Parameters of the model's shapes, drawn in NumPy: compiling ``init`` would take longer."""
    shapes = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **kwargs), *inputs)
    return draws(shapes["params"], scale)


def draws(tree: Any, scale: float = 0.3, seed: int = 5) -> Any:
    """Normal draws in the shapes and dtypes of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


@cache
def drawn(case: Case, layout: str = "scan") -> Adapter:
    """The method's adapter for every kernel of the small model, as it starts."""
    at = setup(layout)
    return init(at.params, case.method, at.targets, 7)


@cache
def trained(case: Case, layout: str = "scan") -> Adapter:
    """The same with every trained leaf away from its start, as after training."""
    return randomised(drawn(case, layout))


def randomised(adapter: Adapter, scale: float = 0.2, seed: int = 5) -> Adapter:
    """The adapter with normal draws for trained leaves."""
    return adapter.with_trainable(draws(adapter.trainable, scale, seed))


def by_name(tree: Any) -> dict[str, Any]:
    """A tree's leaves by the names on their way, for messages and comparisons."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean loss of predicting the tokens themselves."""
    picked = jnp.take_along_axis(nn.log_softmax(logits), tokens[..., None], -1)
    return -picked.mean()
