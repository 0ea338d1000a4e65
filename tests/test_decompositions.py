"""Decompositions are of one matrix at a time: many batched ones hang on CPUs of few cores."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from lora_mini_jax.algebra.decompositions import inverse, orthonormal, qr, top_singular
from tests.cases import CASES

LAPACK = {"geqrf", "householder_product", "qr", "svd", "eigh", "lu", "lu_pivots_to_permutation"}
MANY = """
import jax, jax.numpy as jnp
import lora_mini_jax as lmj
from lora_mini_jax.models import Llama, LlamaConfig

sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
model = Llama(LlamaConfig(**sizes, num_attention_heads=2), scan_layers=True)
tokens = jnp.ones((1, 8), jnp.int32)
params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
targets = lmj.select(lmj.linen.targets(model, params, tokens))
draw = jax.jit(jax.vmap(lambda key: lmj.init(params, lmj.LoRAMini(rank=2), targets, key=key)))
print(lmj.count(jax.block_until_ready(draw(jax.random.split(jax.random.key(1), 4)))))
"""


def decomposed(jaxpr: Any) -> list[tuple[str, int]]:
    """Every decomposition of a program, with the number of axes of what it takes apart."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in LAPACK:
            found.append((eqn.primitive.name, eqn.invars[0].aval.ndim))
        for inner in jax.tree.leaves(eqn.params, is_leaf=is_program):
            if is_program(inner):
                found += decomposed(getattr(inner, "jaxpr", inner))
    return found


def is_program(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_stacked_kernels_are_taken_apart_one_by_one(case: Any):
    keys, kernels = jax.random.split(jax.random.key(0), 3), jnp.ones((3, 32, 64))
    if case.method.problems(32, 64):
        pytest.skip("not a size of this method's")
    found = decomposed(jax.make_jaxpr(jax.vmap(case.method.init))(keys, kernels).jaxpr)
    assert not [name for name, axes in found if axes > 2]


def test_the_count_sees_a_batch_and_a_matrix_alone():
    batch = jnp.ones((3, 8, 4))
    assert {axes for _, axes in decomposed(jax.make_jaxpr(jnp.linalg.qr)(batch).jaxpr)} == {3}
    assert {axes for _, axes in decomposed(jax.make_jaxpr(jax.vmap(qr))(batch).jaxpr)} == {2}


def test_a_batch_gives_what_each_matrix_gives():
    rng = np.random.default_rng(0)
    many = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    for each in (qr, orthonormal, lambda matrix: top_singular(matrix, 2)):
        batched = jax.jit(jax.vmap(each))(many)
        for i, one in enumerate(many):
            close = jax.tree.map(lambda a, b, i=i: jnp.allclose(a[i], b, atol=1e-5), batched,
                                 each(one))  # fmt: skip
            assert all(jax.tree.leaves(close))
    q, r = jax.vmap(qr)(many)
    np.testing.assert_allclose(q @ r, many, atol=1e-5)
    assert (jnp.diagonal(r, axis1=1, axis2=2) >= 0).all()
    square = many[:, :4]
    np.testing.assert_allclose(jax.vmap(inverse)(square) @ square, jnp.tile(jnp.eye(4), (3, 1, 1)),
                               atol=1e-4)  # fmt: skip


def test_drawing_for_many_layers_and_seeds_ends():
    # In a process of its own, with as many threads as there are cores.
    own = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run([sys.executable, "-c", MANY], env=own, capture_output=True, text=True,
                         timeout=120, check=True)  # fmt: skip
    assert int(ran.stdout) == 4 * 4 * 7 * 2 * (32 + 32)
