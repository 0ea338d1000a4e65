"""A chain of thin matrices: the same numbers in every order, and what each order costs."""

import math
import re
from collections.abc import Sequence
from functools import reduce
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, LoRAMini, init, linen
from lora_mini_jax.algebra import products
from lora_mini_jax.algebra.products import through
from lora_mini_jax.forecast.flops import dot_flops

T, IN, A, R, B, OUT = 48, 32, 16, 4, 12, 24
CHAINS = {
    "mini": [(IN, A), (A, R), (R, B), (B, OUT)],
    "lora": [(IN, R), (R, OUT)],
    "xs": [(IN, R), (R, R), (R, OUT)],
    "vera": [(IN, A), (A,), (A, OUT), (OUT,)],
    "one": [(IN, OUT)],
}


def drawn(shapes: Sequence[tuple[int, ...]], rows: int = T) -> tuple[Any, list[Any]]:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(rows, IN), *shapes]]
    return arrays[0], arrays[1:]


def in_turn(x: Any, chain: Sequence[Any]) -> Any:
    return reduce(lambda x, m: x * m if m.ndim == 1 else x @ m, chain, x)


def flops(function: Any, *args: Any) -> int:
    return dot_flops(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("shapes", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("rows", [1, T])
def test_values_and_derivatives_are_those_of_the_products_in_turn(shapes: Any, rows: int):
    x, chain = drawn(shapes, rows)

    def everything(function: Any) -> Any:
        def loss(x: Any, chain: Any) -> Any:
            return jnp.sin(function(x, chain) / 100).sum()

        along = jax.jvp(lambda x: function(x, chain), (x,), (jnp.cos(x),))
        curve = jax.grad(lambda s: jax.grad(lambda s: loss(s * x, chain))(s) ** 2)(1.0)
        return along, jax.grad(loss, (0, 1))(x, chain), curve

    got, want = (jax.jit(lambda f=f: everything(f))() for f in (through, in_turn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max())), got, want)  # fmt: skip


def test_many_rows_meet_the_matrices_already_multiplied_and_few_rows_do_not():
    x, chain = drawn(CHAINS["mini"])
    once = 2 * (IN * A * R + R * B * OUT + T * (IN * R + R * OUT))
    assert flops(through, x, chain) == once
    turn = 2 * (IN * A + A * R + R * B + B * OUT)
    for rows in (1, 4):
        assert flops(through, x[:rows], chain) == rows * turn


def test_a_trained_inner_pair_costs_less_than_autodiff_and_keeps_the_narrow_input():
    x, (a_aux, a, b, b_aux) = drawn(CHAINS["mini"])

    def gradient(function: Any) -> Any:
        return jax.grad(lambda x, a, b: function(x, [a_aux, a, b, b_aux]).sum(), (0, 1, 2))

    assert flops(gradient(through), x, a, b) < 0.8 * flops(gradient(in_turn), x, a, b)

    _, backward = jax.vjp(lambda t: through(x, [a_aux, *t, b_aux]), (a, b))
    kept = {leaf.shape for leaf in jax.tree.leaves(backward)}
    assert (T, A) in kept
    assert (T, IN) not in kept


@pytest.mark.parametrize("method", [LoRA(4), LoRAMini(4, a=16, b=16)], ids=lambda m: m.name)
def test_no_whole_activation_is_turned_round(method: Any):
    """XLA forms ``x^T g`` from a copy of ``x`` with its axes exchanged, unless asked otherwise."""
    model, x = nn.Dense(64, use_bias=False), jnp.ones((2, 96, 128))
    params = model.init(jax.random.key(0), x)["params"]
    adapter = init(params, method, linen.targets(model, params, x))
    apply = linen.adapt(model)

    def step(trained: Any, x: Any) -> Any:
        return jnp.sin(apply(params, adapter.with_trainable(trained), x)).sum()

    text = jax.jit(jax.grad(step, (0, 1))).lower(adapter.trainable, x).compile().as_text() or ""
    sizes = {math.prod(x.shape), math.prod(x.shape) // 2}
    for line in text.splitlines():
        if " transpose(" in line or " copy(" in line:
            shape = line.split("[")[1].split("]")[0]
            assert math.prod(int(n) for n in shape.split(",") if n) not in sizes, line
    # Nor within the product: a sum over rows is laid out with its longer side's entries together.
    over_rows = r"\[(\d+),(\d+)\]\{(\d),\d\} dot\(.*lhs_contracting_dims=\{0\}, rhs_con\w+=\{0\}"
    found = [[int(n) for n in each] for each in re.findall(over_rows, text)]
    assert len(found) == len(jax.tree.leaves(adapter.trainable))
    for *sides, together in found:
        assert sides[together] == max(sides), text


def test_only_cpus_need_a_product_turned_round(monkeypatch: pytest.MonkeyPatch):
    x, (narrow,) = drawn([(IN, R)])
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(products, "device", lambda p=platform: SimpleNamespace(platform=p))
        text = str(jax.make_jaxpr(lambda x, m: products.through(x, [m]))(x, narrow))
        assert ("optimization_barrier" in text) == (platform == "cpu")
