"""Sketches look at so many entries of an array, wherever it is, and fetch no others."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_mini_jax import processes
from lora_mini_jax.quantized import Quantized, quantized
from lora_mini_jax.saved import sketch
from lora_mini_jax.tree import Target, dense

SHAPE = (512, 1030)  # every eighth entry of a little more than 8 * MOST
ON = pytest.mark.parametrize("on", ["host", "device", "mesh", "explicit mesh", "columns"])


def plain(array: Any) -> list[float]:
    """What a sketch is, of an array that is here."""
    flat = np.asarray(array).reshape(-1)
    flat = flat[:: max(1, flat.size // sketch.MOST)].astype(np.float64)
    flat = np.where(np.isfinite(flat), flat, 0)
    waves = np.cos(np.outer([0.7548776662, 2 * 0.7548776662], np.arange(flat.size) + 1))
    values = [np.sqrt(np.mean(flat**2)), *(waves @ flat * (2 / flat.size) ** 0.5)]
    return [float(f"{value:.5g}") for value in values]


def placed(tree: Any, on: str) -> Any:
    """The tree's matrices as NumPy's arrays, on one device, or split over eight."""
    if on == "host":
        return jax.tree.map(np.asarray, tree)
    if on == "device":
        return tree
    kind = AxisType.Explicit if on.startswith("explicit") else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind, kind))
    spec = PartitionSpec(None, "b") if on == "columns" else PartitionSpec("a", "b")
    return jax.device_put(tree, NamedSharding(mesh, spec))


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """How many entries of an array were fetched."""
    found: list[int] = []

    def on_host(tree: Any) -> Any:
        found.extend(leaf.size for leaf in jax.tree.leaves(tree))
        return processes.on_host(tree)

    monkeypatch.setattr(sketch, "on_host", on_host)
    return found


def drawn(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> jax.Array:
    numbers = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    numbers.flat[::7777] = np.inf
    return jnp.asarray(numbers, dtype)


@ON
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_sketch_is_the_same_wherever_the_array_is(fetched, dtype, on):
    array = placed(drawn(dtype=dtype), on)
    assert sketch.sketch(array) == plain(drawn(dtype=dtype))
    if on not in ("host", "device"):  # there NumPy sees the array as it is
        assert sum(fetched) <= 2 * sketch.MOST < array.size


@pytest.mark.parametrize("on", ["device", "columns"])
@pytest.mark.parametrize(("bits", "dtype"), [("int8", "float32"), ("nf4", "bfloat16")])
def test_a_quantised_kernel_is_opened_where_it_is(fetched, bits, dtype, on):
    kernel = jnp.where(jnp.isfinite(drawn()), drawn(), 0).astype(dtype)
    box = quantized(kernel, Target("up/kernel", SHAPE), bits)
    sharded: Any = Quantized(placed(box.array, on), box.dtype, box.bits)
    if on == "columns":
        assert len(jax.tree.leaves(sharded)[0].sharding.device_set) == 8
    assert sketch.sketch(sharded) == plain(dense(box))
    if on == "columns":
        assert sum(fetched) <= 2 * sketch.MOST < kernel.size


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 2 * sketch.MOST // 3)])
def test_a_small_array_is_looked_at_whole(fetched, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = plain(array) if array.size else [0.0] * 3
    assert sketch.sketch(array) == sketch.sketch(jnp.asarray(array)) == expected
    assert fetched == [array.size] * 2


def test_no_shard_of_a_large_array_goes_to_another_device():
    array = placed(drawn(), "mesh")
    places = np.unravel_index(np.arange(0, array.size, 8), SHAPE)
    everywhere = NamedSharding(array.sharding.mesh, PartitionSpec())
    program = str(sketch._picked.lower(array, places, everywhere).compile().as_text())
    assert "all-reduce(" in program
    assert not any(word in program for word in ("all-gather(", "all-to-all(", "permute("))
