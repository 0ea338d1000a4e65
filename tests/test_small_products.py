"""Products with short sides under vmap: XLA for CPUs ends the process at some of their forms."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

CASES = [*product((2, 3, 4), (2, 3, 9), (2, 3, 8), (2, 3)), (64, 3, 2, 33), (3, 3, 33, 4)]
"""Rows, inputs, rank, outputs."""
COMPILE = f"""
import jax, jax.numpy as jnp
from lora_mini_jax.algebra.products import through

def loss(A, B, x):
    return jax.vmap(lambda x, A, B: through(x, [A, B]))(x, A, B).sum()

for rows, n_in, rank, n_out in {CASES}:
    shapes = (2, n_in, rank), (2, rank, n_out), (2, rows, n_in)
    jax.jit(jax.grad(loss, (0, 1, 2))).lower(*map(jnp.ones, shapes)).compile()
print("compiled")
"""


def test_gradients_of_batches_of_small_products_compile() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert run.stdout == "compiled\n", run.stderr[-500:]
