"""Parameters trained whole: all, biases, a head; and beside another method (modules_to_save)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    LoRA,
    LoRAMini,
    TrainState,
    UserError,
    count,
    init,
    join,
    linen,
    load,
    make_train_step,
    merge,
    save,
    select,
    unmerge,
)
from lora_mini_jax.methods import Full
from lora_mini_jax.tree import flatten, parameters
from tests.cases import CASES, Case, by_name, random_params, randomised, setup


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm")(nn.Dense(24, name="up")(x))
        return nn.Dense(3, name="classifier")(jnp.tanh(x))


MODEL, X = Small(), jnp.asarray(np.random.default_rng(0).normal(size=(16, 12)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3)), jnp.float32)
PARAMS = random_params(MODEL, X)
EVERY = parameters(PARAMS, linen.targets(MODEL, PARAMS, X))


def plain(params: Any) -> Any:
    return MODEL.apply({"params": params}, X)


def loss(params: Any, adapter: Any, batch: Any, key: Any = None) -> jax.Array:
    return ((linen.adapt(MODEL)(params, adapter, batch) - Y) ** 2).mean()


def test_full_fine_tuning_is_plain_training():
    adapter, tx = init(PARAMS, Full(), EVERY), optax.adam(1e-2)
    step, state = make_train_step(loss, tx), TrainState.create(adapter, tx)
    params, opt_state = PARAMS, tx.init(PARAMS)
    for _ in range(20):
        state, _ = step(state, PARAMS, X)
        grads = jax.grad(lambda p: ((plain(p) - Y) ** 2).mean())(params)
        updates, opt_state = tx.update(grads, opt_state)
        params: Any = optax.apply_updates(params, updates)
    assert count(adapter) == sum(x.size for x in jax.tree.leaves(PARAMS))
    merged = merge(PARAMS, state.adapter)
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(flatten(merged)[path], leaf, rtol=1e-4, atol=1e-5)
    back = unmerge(merged, state.adapter)
    for path, leaf in flatten(PARAMS).items():
        np.testing.assert_allclose(flatten(back)[path], leaf, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "paths"),
    [
        ("bias-only", {"up/bias", "norm/bias", "classifier/bias"}),
        ("head-only", {"classifier/bias", "classifier/kernel"}),
    ],
)
def test_presets_train_what_they_say(preset: str, paths: set[str]):
    adapter, tx = init(PARAMS, Full(), select(EVERY, preset)), optax.sgd(0.1)
    state, _ = make_train_step(loss, tx)(TrainState.create(adapter, tx), PARAMS, X)
    merged, plain = flatten(merge(PARAMS, state.adapter)), flatten(PARAMS)
    assert {p for p, x in merged.items() if not np.array_equal(x, plain[p])} == paths


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_modules_to_save_are_trained_saved_and_merged_beside_every_method(case: Case, tmp_path):
    beside = select(EVERY, "classifier|norm|up/bias")
    adapter = init(PARAMS, case.method, select(EVERY), 7, modules_to_save=beside)
    grads = jax.grad(lambda t: loss(PARAMS, adapter.with_trainable(t), X))(adapter.trainable)
    for target in beside:
        assert jnp.abs(grads[target.path]["dense"]).max() > 0, target.path
    trained = randomised(adapter)
    out = linen.adapt(MODEL)(PARAMS, trained, X)
    merged = plain(merge(PARAMS, trained))
    np.testing.assert_allclose(out, merged, rtol=1e-4, atol=1e-4)
    save(tmp_path / "one", trained, PARAMS)
    loaded = by_name(load(tmp_path / "one", PARAMS))
    assert all(np.array_equal(x, loaded[n]) for n, x in by_name(trained).items())


def test_arrays_of_scanned_layers_are_trained_whole():
    at = setup("scan")
    beside = select(parameters(at.params, at.targets), "up/bias|down/bias")
    assert {t.kind for t in beside} == {"array"}
    targets = select(at.targets, "down")
    trained = randomised(init(at.params, LoRA(rank=2), targets, 7, modules_to_save=beside))
    out = linen.adapt(at.model)(at.params, trained, at.tokens)
    merged: Any = at.model.apply({"params": merge(at.params, trained)}, at.tokens)
    np.testing.assert_allclose(out, merged, rtol=1e-4, atol=1e-4)
    assert jnp.abs(out - at.model.apply({"params": at.params}, at.tokens)).max() > 0.1


def test_what_cannot_be_adapted_is_refused_naming_the_kernels():
    with pytest.raises(UserError, match=r"norm/scale.*no kernel, so lora cannot adapt it"):
        init(PARAMS, LoRA(rank=2), select(EVERY, "norm"))
    up = select(EVERY, ["up/kernel"])
    with pytest.raises(UserError, match="up/kernel: more than once among targets and modules_to"):
        init(PARAMS, LoRA(rank=2), up, modules_to_save=up)
    with pytest.raises(UserError, match="no kernel to adapt"):
        init(PARAMS, LoRA(rank=2), [])
    counts = {**PARAMS, "up": {**PARAMS["up"], "kernel": jnp.zeros(up[0].shape, jnp.int32)}}
    with pytest.raises(UserError, match=r"only real floating numbers .*: up/kernel is int32"):
        init(counts, Full(), up)
    with pytest.raises(UserError, match=r"LoRA'> is no method: give one .* LoRA\(rank=8\)"):
        init(PARAMS, LoRA, up)  # ty: ignore[invalid-argument-type]
    names: Any = ["up"]
    with pytest.raises(UserError, match=r"'up' is no target: .* select\(targets, names\)"):
        init(PARAMS, LoRA(rank=2), names)
    with pytest.raises(UserError, match=r"'up' is no target: .* select\(parameters\("):
        init(PARAMS, LoRA(rank=2), up, modules_to_save=names)
    with pytest.raises(UserError, match=r"a random key is a seed .* not None"):
        init(PARAMS, LoRA(rank=2), up, None)  # ty: ignore[invalid-argument-type]
    with pytest.raises(UserError, match="'head-only' matches no kernel"):
        select([t for t in EVERY if "classifier" not in t.path], "head-only")


@pytest.mark.parametrize("overrides", [["up"], {"up": 3}, {"up": LoRA(rank=1)}])
def test_overrides_are_settings_by_pattern(overrides: Any):
    with pytest.raises(UserError, match=r"override.*rank': 4"):
        init(PARAMS, LoRA(rank=2), select(EVERY, ["up/kernel"]), overrides=overrides)


def test_something_else_in_an_adapters_place_is_one_line(tmp_path):
    adapter = init(PARAMS, LoRA(rank=2), select(EVERY, ["up/kernel"]))
    folder, state = tmp_path / "adapter", TrainState.create(adapter, optax.sgd(0.1))
    calls: list[Any] = [linen.adapt(MODEL), merge, unmerge, join]
    calls.append(lambda params, other: save(folder, other, params))
    for given in ((adapter, PARAMS), (PARAMS, state)):
        for call in calls:
            with pytest.raises(UserError, match=f"a {type(given[1]).__name__} is no adapter"):
                call(*given)
    assert not folder.exists()


SEEDS: tuple[Any, ...] = (3, np.int64(3))


def test_a_seed_of_numpy_is_a_seed_and_overrides_are_checked_together():
    up = select(EVERY, ["up/kernel"])
    one, other = (init(PARAMS, LoRA(rank=2), up, seed) for seed in SEEDS)
    jax.tree.map(np.testing.assert_array_equal, one.trainable, other.trainable)
    method = LoRAMini(rank=4, a=8, b=8)
    # A rank of 4 or 3 between sides of 2 would be refused; the last pattern makes it 1.
    overrides = {"up": {"a": 2, "rank": 3}, "up/kernel": {"rank": 1}}
    (site,) = init(PARAMS, method, up, overrides=overrides).sites
    assert site.method == LoRAMini(rank=1, a=2, b=8)
