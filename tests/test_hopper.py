"""The kernel for Hopper GPUs, in Pallas' interpreter and as far as a machine without one compiles.

That it runs on the device, and how fast, is for `benchmarks.parts` to say.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax.algebra.hopper import COLUMNS, RANKS, ROWS, TILE, fits, product_plus_thin, wide

FORMS = pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])


def given(turned: bool, rank: int, rows: int, depth: int, columns: int) -> list[Any]:
    """``x``, ``w``, ``h`` and ``b``."""
    rng = np.random.default_rng(0)
    shapes = [(rows, depth), (depth, columns), (rows, rank), (rank, columns)]
    x, w, h, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return [x, w.T, h, b.T] if turned else [x, w, h, b]


@FORMS
@pytest.mark.parametrize("rank", [RANKS[0], RANKS[-1]])
def test_it_is_the_sum_of_two_products(turned: bool, rank: int):
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    if turned and jax.__version_info__ < (0, 11):
        pytest.skip("this interpreter knows no transposed operands")
    # Every thread of the GPU is one of the interpreter's, and waits for the others.
    interpret = params.InterpretGPUParams(num_tma_threads_per_device=8)
    args = given(turned, rank, 2 * ROWS, TILE, TILE)
    got = product_plus_thin(*args, turned=turned, blocks=2, interpret=interpret)
    x, w, h, b = (np.asarray(each, np.float64) for each in args)
    want = x @ w.T + h @ b.T if turned else x @ w + h @ b
    assert got.dtype == jnp.bfloat16
    # To the rounding of the result: both sums are taken before it.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-3)


@FORMS
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_it_lowers_for_a_gpu(turned: bool, rank: int, dtype: Any):
    shapes = [jax.ShapeDtypeStruct(each.shape, dtype) for each in given(
        turned, rank, 3 * ROWS, 4 * TILE, 5 * TILE)]  # fmt: skip
    call = jax.jit(partial(product_plus_thin, turned=turned, blocks=132))
    lowered = call.trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert lowered.out_info.shape == (3 * ROWS, 5 * TILE)


def test_what_fits():
    shape = {"rows": ROWS, "depth": TILE, "columns": 2 * TILE, "rank": 8, "dtype": jnp.bfloat16}
    assert fits(**shape)
    for name, value in {"rows": ROWS + 64, "depth": TILE + 64, "columns": COLUMNS, "rank": 65,
                        "dtype": jnp.float32}.items():  # fmt: skip
        assert not fits(**{**shape, name: value})
    assert [wide(rank) for rank in (1, 16, 17, 64)] == [16, 16, 32, 64]
