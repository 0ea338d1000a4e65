"""Dropout on the adapter's path: its rate, its random streams, and that evaluation is without."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import LoRA, LoRAMini, TrainState, init, linen, make_train_step, merge
from lora_mini_jax.methods import MiSS, VeRA
from lora_mini_jax.tree import flatten
from tests.cases import CASES, Case, cross_entropy, draws, random_params, randomised, setup

KEY = jax.random.key(11)


def test_the_adapter_sees_scaled_inputs_and_the_frozen_kernel_all_of_them():
    """With B @ A the identity and W = 0 the output is the dropped input itself."""
    model, x = nn.Dense(64, use_bias=False), jnp.ones((200, 64))
    params = {"kernel": jnp.eye(64)}
    method = LoRA(rank=64, alpha=64.0, dropout=0.25)
    adapter = init(params, method, linen.targets(model, params, x))
    eye = jnp.eye(64)
    adapter = adapter.with_trainable({"kernel": {"A": eye, "B": eye}})
    apply = linen.adapt(model)
    np.testing.assert_allclose(apply(params, adapter, x), 2 * x)
    path = np.asarray(apply(params, adapter, x, dropout_key=KEY) - x)
    kept = path != 0
    np.testing.assert_allclose(path[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 5 * (0.25 * 0.75 / kept.size) ** 0.5
    np.testing.assert_array_equal(path, apply(params, adapter, x, dropout_key=KEY) - x)
    other = apply(params, adapter, x, dropout_key=jax.random.key(12)) - x
    assert 0.2 < np.mean((other != 0) != kept) < 0.55


# Their updates can be turned back: with squares for all leaves, at a start that is not zero.
SQUARE = (
    LoRA(rank=32, alpha=32.0, dropout=0.5),
    LoRAMini(rank=32, alpha=32.0, a=32, b=32, outer_init="orthogonal", dropout=0.5),
    MiSS(rank=32, dropout=0.5),
    VeRA(rank=32, dropout=0.5),  # whose kernels share what they draw, but not this
)


@pytest.mark.parametrize(
    ("method", "layout"),
    [(SQUARE[0], layout) for layout in ("plain", "scan+remat", "vmap")]
    + [(method, "scan+remat") for method in SQUARE[1:]],
    ids=lambda value: getattr(value, "name", value),
)
def test_layers_and_kernels_have_streams_of_their_own(method: Any, layout: str):
    """Two layers with the same inputs drop different entries."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            q = nn.Dense(32, use_bias=False, name="q")(x)
            k = nn.Dense(32, use_bias=False, name="k")(x)
            return x, (q, k)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            kw: Any = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            if layout == "plain":
                both = [Layer(name=f"layers_{i}")(x)[1] for i in range(2)]
                return jax.tree.map(lambda *y: jnp.stack(y), *both)
            if layout == "vmap":
                return nn.vmap(Layer, in_axes=None, axis_size=2, **kw)(name="layers")(x, None)[1]
            return nn.scan(nn.remat(Layer), length=2, **kw)(name="layers")(x, None)[1]

    model, x = Two(), jnp.ones((4, 32))
    params = jax.tree.map(jnp.zeros_like, random_params(model, x))
    drawn = init(params, method, linen.targets(model, params, x))
    eyes = jax.tree.map(
        lambda leaf: jnp.broadcast_to(
            jnp.eye(32) if leaf.shape[-2:] == (32, 32) else 1, leaf.shape
        ),
        drawn.trainable,
    )
    adapter = drawn.with_trainable(eyes)
    out = linen.adapt(model)(params, adapter, x, dropout_key=KEY)
    kernels = {
        path: np.reshape(w, (-1, 32, 32)) for path, w in flatten(merge(params, adapter)).items()
    }
    masks = []
    for name, both in zip("qk", out, strict=True):
        updates = np.concatenate([w for path, w in kernels.items() if f"/{name}/" in path])
        for y, update in zip(both, updates, strict=True):
            masks.append(np.linalg.solve(np.float64(update).T, np.float64(y).T).T > 0.5)
    for i, one in enumerate(masks):
        assert 0.3 < one.mean() < 0.7
        assert all(0.3 < np.mean(one != other) < 0.7 for other in masks[:i])


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "full"], ids=lambda c: c.name)
def test_every_additive_method_takes_it_and_evaluation_is_without(case: Case):
    model, x = nn.Dense(8, use_bias=False), draws(jnp.zeros((5, 12)), 1.0)
    params = random_params(model, x)
    method = case.method.with_settings({"dropout": 0.4})
    adapter = randomised(init(params, method, linen.targets(model, params, x), 7))
    same = replace(adapter, sites=tuple(replace(s, method=case.method) for s in adapter.sites))
    apply = linen.adapt(model)
    off = apply(params, adapter, x)
    np.testing.assert_array_equal(off, apply(params, same, x, dropout_key=KEY))
    assert jnp.abs(apply(params, adapter, x, dropout_key=KEY) - off).max() > 1e-3


def test_a_training_step_drops_anew_each_time():
    model, x = nn.Dense(16, use_bias=False), draws(jnp.zeros((8, 16)), 1.0)
    params = random_params(model, x)
    adapter = randomised(init(params, LoRA(rank=2, dropout=0.5), linen.targets(model, params, x)))
    apply, tx = linen.adapt(model), optax.sgd(0.0)

    def loss(params: Any, adapter: Any, batch: Any, key: jax.Array) -> jax.Array:
        return (apply(params, adapter, batch, dropout_key=key) ** 2).mean()

    step, state, losses = make_train_step(loss, tx), TrainState.create(adapter, tx), []
    for _ in range(3):
        state, metrics = step(state, params, x)
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3


def test_rows_that_are_looked_up_are_not_dropped():
    at = setup()
    tables = [t for t in at.targets if t.kind == "embed"]
    adapter = randomised(init(at.params, LoRA(rank=2, dropout=0.9), tables))

    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Embed(*at.params["embed"]["embedding"].shape, name="embed")(tokens)

    apply = linen.adapt(Lookup())
    params = {"embed": at.params["embed"]}
    off = apply(params, adapter, at.tokens)
    np.testing.assert_array_equal(off, apply(params, adapter, at.tokens, dropout_key=KEY))
    assert float(cross_entropy(off, at.tokens % off.shape[-1])) > 0
