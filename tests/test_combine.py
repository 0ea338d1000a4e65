"""Adapters combined: PEFT's results where PEFT has them, and the same meaning for other methods."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import Adapter, LoRA, LoRAMini, Target, UserError, count, init, merge
from lora_mini_jax.adapters.combination import combine
from lora_mini_jax.methods import DiffoRA, DoRA, Full, LoRAXS, MiSS
from tests.cases import draws, randomised, setup

TARGET = Target("up/kernel", (12, 10))
PARAMS = {"up": {"kernel": draws(jnp.zeros((12, 10)))}}
WEIGHTS = (0.7, -0.4)


def update(adapter: Adapter) -> np.ndarray:
    """The dense update that an adapter is."""
    return np.asarray(merge(PARAMS, adapter)["up"]["kernel"] - PARAMS["up"]["kernel"])


@cache
def pair(alphas: tuple[float, float] = (6.0, 1.5)) -> list[Adapter]:
    """Two trained LoRAs of rank 3 with different scales."""
    return [randomised(init(PARAMS, LoRA(3, alpha=alpha), [TARGET], i), 0.4, i)
            for i, alpha in enumerate(alphas)]  # fmt: skip


@pytest.fixture(scope="module")
def oracle() -> Any:
    """``peft(how, **kwargs)``: the update that real PEFT combines the same two adapters to."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch.nn.Sequential()
    base.add_module("up", torch.nn.Linear(12, 10, bias=False))
    model: Any = None
    for name, adapter in zip("xy", pair(), strict=True):
        method: Any = adapter.sites[0].method
        config = peft.LoraConfig(r=3, lora_alpha=method.alpha, target_modules="up")
        if model is None:
            model = peft.PeftModel(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        leaves = adapter.trainable[TARGET.path]
        layer = model.base_model.model.up
        layer.lora_A[name].weight.data = torch.tensor(np.asarray(leaves["A"].T))
        layer.lora_B[name].weight.data = torch.tensor(np.asarray(leaves["B"].T))

    def combined(how: str, **kwargs: Any) -> np.ndarray:
        name = f"{how} {kwargs}".replace(".", "")
        model.add_weighted_adapter(["x", "y"], list(WEIGHTS), name, how, **kwargs)
        return model.base_model.model.up.get_delta_weight(name).detach().numpy().T

    return combined


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(
    "how", ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
)
def test_equal_to_peft(oracle: Any, how: Any, majority: Any) -> None:
    density: Any = {"density": 0.6} if "ties" in how or "prune" in how else {}
    if majority == "frequency" and "ties" not in how:
        pytest.skip("there is no vote")
    peft_names = {"majority_sign_method": majority} if "ties" in how else {}
    wanted = oracle(how, **density, **peft_names)
    found = combine(pair(), WEIGHTS, PARAMS, how, majority=majority, **density)
    np.testing.assert_allclose(update(found), wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted).max() > 0.05


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_keeps_a_share_and_the_mean(how: Any) -> None:
    two = pair()
    plain = how.removeprefix("dare_").replace("linear_svd", "svd")
    same = {seed: combine(two, WEIGHTS, PARAMS, how, density=1.0, seed=seed) for seed in (0, 1)}
    whole = combine(two, WEIGHTS, PARAMS, plain, density=1.0)
    for found in same.values():
        np.testing.assert_allclose(update(found), update(whole), atol=1e-5)
    if how == "dare_linear":
        alone = [combine(two[:1], [1.0], PARAMS, how, density=0.5, seed=i) for i in range(60)]
        lefts = np.stack([np.asarray(one.trainable[TARGET.path]["A"]) for one in alone])
        left = np.asarray(two[0].trainable[TARGET.path]["A"]) * 2**0.5  # the root of its scale
        assert abs((lefts == 0).mean() - 0.5) < 0.05
        np.testing.assert_allclose(lefts[lefts != 0], np.broadcast_to(2 * left, lefts.shape)[
            lefts != 0], rtol=1e-5)  # fmt: skip
    draws = [update(combine(two, WEIGHTS, PARAMS, how, seed=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 0.01


def test_dare_draws_anew_for_every_factor_layer_and_kernel() -> None:
    targets = Target("layers/up", (2, 6, 6), stack=1), Target("down", (6, 6)), Target("up", (6, 6))
    params = {"layers": {"up": jnp.ones((2, 6, 6))}, **dict.fromkeys(("down", "up"), jnp.eye(6))}
    one = init(params, LoRA(6), targets)
    one = one.with_trainable(jax.tree.map(jnp.ones_like, one.trainable))
    found = combine([one], [1.0], params, "dare_linear")
    kept = [np.asarray(leaf != 0).reshape(-1, 36) for leaf in jax.tree.leaves(found.trainable)]
    assert len(np.unique(np.concatenate(kept), axis=0)) == 8


def test_what_is_not_said_is_the_best_fit_of_the_highest_rank_at_half_the_density() -> None:
    two = [*pair()[:1], randomised(init(PARAMS, LoRA(2), [TARGET]))]
    plain = combine(two, WEIGHTS, PARAMS)
    assert plain.trainable[TARGET.path]["A"].shape == (12, 3)
    same = combine(two, WEIGHTS, PARAMS, "svd", rank=3)
    np.testing.assert_array_equal(update(plain), update(same))
    all_of_it = combine(two, WEIGHTS, PARAMS, rank=99)
    assert all_of_it.trainable[TARGET.path]["B"].shape == (10, 10)
    told = combine(pair(), WEIGHTS, PARAMS, "ties", density=0.5, majority="total")
    np.testing.assert_array_equal(update(combine(pair(), WEIGHTS, PARAMS, "ties")), update(told))


def test_any_methods_of_stacked_kernels_add_up() -> None:
    at = setup()
    targets = [t for t in at.targets if t.lead][:3]
    methods = (LoRAMini(rank=2, a=4, b=4), DoRA(rank=2), MiSS(rank=3), LoRAXS(rank=2))
    own = [randomised(init(at.params, m, targets, i), seed=i) for i, m in enumerate(methods)]
    weights = [0.5, -1.0, 2.0, 0.25]
    found = combine(own, weights, at.params, "svd", rank=8)
    thin = combine(own[::2], weights[::2], at.params, "cat")
    for adapter, part, parts, tolerance in ((found, own, weights, 0.35),
                                            (thin, own[::2], weights[::2], 1e-4)):  # fmt: skip
        got, base = merge(at.params, adapter), at.params
        merged = [merge(base, each) for each in part]

        def distance(got: Any, base: Any, *merged: Any, parts: Any = parts) -> float:
            wanted = sum(w * (m - base) for w, m in zip(parts, merged, strict=True))
            return float(jnp.linalg.norm(got - base - wanted) / (1e-9 + jnp.linalg.norm(wanted)))

        errors = jax.tree.leaves(jax.tree.map(distance, got, base, *merged))
        assert max(errors) < tolerance
    assert count(thin) > 0
    assert {site.method.name for site in found.sites} == {"lora"}


def test_a_kernel_that_one_adapter_lacks_is_combined_from_the_others() -> None:
    other = Target("down/kernel", (10, 12))
    params = {**PARAMS, "down": {"kernel": jnp.ones((10, 12))}}
    first = pair()[0]
    second = randomised(init(params, LoRA(2, alpha=2.0), [other]))
    found = combine([first, second], [1.0, 0.5], params, "cat")
    merged, alone = merge(params, found), merge(params, second)
    np.testing.assert_allclose(
        merged["up"]["kernel"], merge(PARAMS, first)["up"]["kernel"], atol=1e-5
    )
    np.testing.assert_allclose(
        merged["down"]["kernel"], 0.5 * (alone["down"]["kernel"] + 1), atol=1e-5
    )


def test_what_cannot_be_combined_says_why() -> None:
    two, whole = pair(), init(PARAMS, Full(), [TARGET])
    bat = randomised(init(PARAMS, MiSS(rank=2, mode="bat"), [TARGET]))
    wider, six = (init(PARAMS, LoRA(rank), [TARGET]) for rank in (4, 6))
    gated = init(PARAMS, DiffoRA(LoRA(2)), [TARGET])
    down = {"down": {"kernel": jnp.ones((10, 12))}}
    elsewhere = init(down, LoRA(2), [Target("down/kernel", (10, 12))])
    bare = init(PARAMS, LoRAMini(rank=2, a=4, b=4, outer_init="gradient"), [TARGET])
    refused: Any = combine
    cases: Any = (
        ((two, [1.0]), {}, r"2 adapters with weights \[1.0\]"),
        ((two, [1.0, np.nan]), {}, "one finite weight"),
        ((two, WEIGHTS), {"density": 1.5}, "density 1.5"),
        ((two, WEIGHTS), {"how": "sum"}, "how"),
        (([], []), {}, "at least one adapter"),
        (
            ([six, six], WEIGHTS),
            {"how": "cat"},
            r"up/kernel \(12 x 10\): rank 12 exceeds .*'cat' adds the adapters' ranks up: use svd",
        ),
        ((two, WEIGHTS), {"rank": 0}, "rank is 0"),
        (([gated], [1.0]), {}, "up/kernel: diffora has no rank: give rank"),
        (([elsewhere], [1.0]), {}, "down/kernel is missing"),
        (([bare], [1.0]), {}, "come from data: call lora_mini_jax.calibrate"),
        (([*two[:1], whole], WEIGHTS), {}, "up/kernel is trained whole"),
        (
            ([*two[:1], bat], WEIGHTS),
            {"how": "cat"},
            "up/.* mode='bat'.* is no product of thin matrices, which how='cat' needs: use svd",
        ),
        (([*two[:1], bat], WEIGHTS), {"how": "ties"}, "how='ties' needs: use ties_svd"),
        (([*two[:1], wider], WEIGHTS), {"how": "ties"}, r"needs equal ranks, not \[3, 4\]"),
    )
    for given, kwargs, words in cases:
        with pytest.raises(UserError, match=words):
            refused(*given, PARAMS, **kwargs)
