"""Many adapters on one base: switched without compiling again, and mixed within a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, LoRAMini, UserError, init, linen
from lora_mini_jax.adapters.banks import bank, mixed
from lora_mini_jax.methods import DoRA, MiSS, SwitchLoRA, VeRA
from tests.cases import randomised, setup

METHODS = (LoRAMini(rank=2, a=4, b=4), DoRA(rank=2), MiSS(rank=3), SwitchLoRA(rank=2), VeRA(rank=3))
NAMES = ("french", "german", "latin")


def adapters(method: Any, seeds: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Three trained adapters of all kernels."""
    at = setup()
    return {
        name: randomised(init(at.params, method, at.targets, seed), seed=i)
        for i, (name, seed) in enumerate(zip(NAMES, seeds, strict=True))
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_rows_with_adapters_of_their_own_equal_calls_one_by_one(method: Any) -> None:
    at, own = setup(), adapters(method)
    many, apply = bank(own), jax.jit(linen.adapt(at.model))
    ids = jnp.array([2, 0, 2])
    together = jax.jit(mixed(linen.adapt(at.model)))(at.params, many, ids, at.tokens)
    for i, which in enumerate(ids):
        alone = apply(at.params, own[NAMES[which]], at.tokens)[i]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)
    assert jnp.abs(together[0] - together[1]).max() > 0.1


def test_another_adapter_is_another_number_not_another_program() -> None:
    at, own, traced = setup(), adapters(LoRAMini(rank=2, a=4, b=4)), []
    many, apply = bank(own), linen.adapt(at.model)

    @jax.jit
    def call(many: Any, which: Any) -> jax.Array:
        traced.append(1)
        return apply(at.params, many[which], at.tokens)

    for i, name in enumerate(NAMES):
        jax.tree.map(np.testing.assert_array_equal, many[name], own[name])
        wanted = apply(at.params, own[name], at.tokens) if i == 1 else None
        y = call(many, i)
        if wanted is not None:
            np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    assert len(traced) == 1


def test_outer_factors_of_one_seed_are_kept_once() -> None:
    method = LoRAMini(rank=2, a=4, b=4)
    shared, apart = bank(adapters(method, (7, 7, 7))), bank(adapters(method))
    assert not jax.tree.leaves(shared.frozen)
    assert not jax.tree.leaves(apart.common)
    some = bank(own := adapters(method, (7, 8, 7)))  # the first and the last
    jax.tree.map(np.testing.assert_array_equal, some["german"], own["german"])
    one = sum(leaf.size for leaf in jax.tree.leaves(shared.common))
    assert sum(leaf.size for leaf in jax.tree.leaves(apart.frozen)) == 3 * one


def test_a_bank_lists_its_names_and_numbers_out_of_it_are_refused() -> None:
    at, own = setup(), adapters(LoRA(rank=2))
    many, call = bank(own), mixed(linen.adapt(at.model))
    assert (len(many), list(many), "latin" in many, "greek" in many) == (3, [*NAMES], True, False)
    numbers: tuple[Any, ...] = (3, -1, np.int64(7), jnp.asarray(3))
    for number in numbers:
        with pytest.raises(UserError, match=f"no adapter {int(number)}: this bank has 0 to 2"):
            many[number]
    with pytest.raises(UserError, match="no adapter 5"):
        call(at.params, many, jnp.array([0, 5]), at.tokens[:2])


def test_arrays_given_by_name_are_of_the_rows_too() -> None:
    def apply(params: Any, adapter: Any, x: jax.Array, *, add: jax.Array, **same: Any) -> jax.Array:
        assert x.shape == add.shape == (1, 4)
        return x + add + same["all_of_it"].sum() if same["flag"] else x

    many, x = bank(adapters(LoRA(rank=2))), jnp.arange(8.0).reshape(2, 4)
    y = mixed(apply)(None, many, jnp.array([1, 0]), x, add=10 * x, flag=True, all_of_it=jnp.ones(3))
    np.testing.assert_allclose(y, 11 * x + 3)


def test_what_does_not_go_together_is_refused() -> None:
    at, own = setup(), adapters(LoRA(rank=2))
    with pytest.raises(UserError, match="no adapter 'greek': choose from french, german, latin"):
        bank(own)["greek"]
    with pytest.raises(UserError, match="'latin' has other kernels or methods than 'french'"):
        bank({**own, "latin": init(at.params, LoRA(rank=3), at.targets)})
    with pytest.raises(UserError, match="at least one"):
        bank({})
    many, x = bank(own), at.tokens
    apply = mixed(linen.adapt(at.model))
    with pytest.raises(UserError, match=r"ids have the shape \(\)"):
        apply(at.params, many, 0, x)
    with pytest.raises(UserError, match="there are not 3 rows"):
        apply(at.params, many, [0, 1, 0], tokens=x[:2])
    for ids, inputs in ((jnp.array([0, 1]), x), (jnp.array([0]), jnp.float32(1))):
        with pytest.raises(UserError, match=f"{len(ids)} ids, and an input of"):
            mixed(linen.adapt(at.model))(at.params, many, ids, inputs)
