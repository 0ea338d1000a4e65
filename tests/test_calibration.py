"""Outer factors from data: what `calibrate` computes, and that nothing trains without it."""

from dataclasses import replace
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
    init,
    linen,
    load,
    merge,
    save,
    select,
)
from lora_mini_jax.methods import LoRAMiniDiag
from lora_mini_jax.training.calibration import _nothing, calibrate
from lora_mini_jax.tree import flatten
from tests.cases import by_name, cross_entropy, draws, random_params, setup

N_IN, N_OUT = 9, 7
RNG = np.random.default_rng(3)
BATCHES = [tuple(RNG.normal(size=(5, n)).astype(np.float32) for n in (N_IN, N_OUT))
           for _ in range(3)]  # fmt: skip
MODEL = nn.Dense(N_OUT, use_bias=False)
PARAMS = random_params(MODEL, BATCHES[0][0])


def loss(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
    x, y = batch
    return 0.5 * ((linen.adapt(MODEL)(params, adapter, x) - y) ** 2).sum()


def factors(outer_init: Any) -> Any:
    targets = linen.targets(MODEL, PARAMS, BATCHES[0][0])
    method = LoRAMini(rank=2, a=3, b=4, outer_init=outer_init)
    adapter = calibrate(init(PARAMS, method, targets), PARAMS, loss, BATCHES)
    return tuple(np.asarray(adapter.frozen["kernel"][n], np.float64) for n in ("A_aux", "B_aux"))


def same_span(a: np.ndarray, b: np.ndarray) -> None:
    """The columns of both are orthonormal and span one space."""
    np.testing.assert_allclose(a.T @ a, np.eye(a.shape[1]), atol=1e-5)
    np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-4)


def test_gradient_factors_are_the_top_singular_vectors_of_the_summed_gradient():
    w = np.asarray(PARAMS["kernel"], np.float64)
    gradient = sum(x.T @ (x @ w - y) for x, y in BATCHES)
    u, _, vt = np.linalg.svd(gradient)
    left, right = factors("gradient")
    same_span(left, u[:, :3])
    same_span(right.T, vt[:4].T)


def test_probes_leave_the_gradients_of_the_layers_before_them_alone():
    x, y = BATCHES[0]
    model = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(N_OUT)])
    params = random_params(model, x)

    def loss(params: Any, adapter: Any, batch: Any, key: Any) -> Any:
        return ((linen.adapt(model)(params, adapter, x) - y) ** 2).sum(), "aux"

    targets = linen.targets(model, params, x)
    plain = jax.grad(lambda p: ((model.apply({"params": p}, x) - y) ** 2).sum())(params)
    method = LoRAMini(rank=2, a=3, b=3, outer_init="gradient")
    made = calibrate(init(params, method, targets), params, loss, [0], has_aux=True)
    for target in targets:
        u, _, vt = np.linalg.svd(flatten(plain)[target.path])
        same_span(np.asarray(made.frozen[target.path]["A_aux"]), u[:, :3])
        same_span(np.asarray(made.frozen[target.path]["B_aux"]).T, vt[:3].T)


def test_the_second_moment_of_narrow_inputs_is_added_in_float32():
    x = draws(jnp.zeros((64, 5)), 1.0).astype(jnp.bfloat16)
    moment = jax.grad(lambda m: _nothing(x, m).sum().astype(jnp.float32))(jnp.zeros((5, 5)))
    wanted = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    np.testing.assert_allclose(moment, wanted, rtol=1e-5, atol=1e-4)


def test_the_leading_part_of_a_larger_gradient_is_found_by_thin_products():
    rng, n_in, n_out, rank = np.random.default_rng(7), 96, 80, 6
    model = nn.Dense(n_out, use_bias=False)
    u, v = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (n_in, n_out))
    gradient = (u * 0.8 ** np.arange(40)) @ v.T  # with x = 1, the loss's own gradient
    params, x = {"kernel": jnp.zeros((n_in, n_out))}, np.eye(n_in, dtype=np.float32)
    method = LoRAMini(rank=2, a=rank, b=rank, outer_init="gradient")

    def along(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        return (linen.adapt(model)(params, adapter, batch) * gradient).sum()

    drawn = init(params, method, linen.targets(model, params, x))
    made = calibrate(drawn, params, along, [x]).frozen["kernel"]
    kept = np.asarray(made["A_aux"]).T @ gradient @ np.asarray(made["B_aux"]).T
    most = (0.8 ** (2 * np.arange(rank))).sum()
    assert (kept**2).sum() > 0.999 * most
    off = kept - np.diag(np.diag(kept))
    assert np.abs(off).max() < 0.02


def test_activation_factors_are_the_main_directions_of_inputs_and_outputs():
    w = np.asarray(PARAMS["kernel"], np.float64)
    x = np.concatenate([x for x, _ in BATCHES]).astype(np.float64)
    left, right = factors("activation")
    same_span(left, np.linalg.svd(x)[2][:3].T)
    same_span(right.T, np.linalg.svd(x @ w)[2][:4].T)


def test_the_first_step_of_the_diagonal_is_along_the_gradient():
    w = np.asarray(PARAMS["kernel"], np.float64)
    x, y = BATCHES[0]
    method = LoRAMiniDiag(rank=min(w.shape), alpha=2.0)
    adapter = init(PARAMS, method, linen.targets(MODEL, PARAMS, x))
    adapter = calibrate(adapter, PARAMS, loss, BATCHES[:1])
    grads = jax.grad(lambda t: loss(PARAMS, adapter.with_trainable(t), BATCHES[0], None))
    stepped = jax.tree.map(lambda g: -g, grads(adapter.trainable))
    update = merge(PARAMS, adapter.with_trainable(stepped))["kernel"] - PARAMS["kernel"]
    np.testing.assert_allclose(update, -(2.0**2) * x.T @ (x @ w - y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", ["plain", "scan+remat"])
@pytest.mark.parametrize(
    "method",
    [LoRAMini(rank=2, a=4, b=5, outer_init="gradient"), LoRAMiniDiag(rank=4),
     LoRAMini(rank=2, a=4, b=5, outer_init="activation"),
     LoRAMini(rank=2, a=4, b=5, outer_init="gradient", outer="bfloat16")],
    ids=["gradient", "diag", "activation", "bfloat16"],
)  # fmt: skip
def test_stacked_layers_get_their_own_factors_and_are_saved(method: Any, layout: str, tmp_path):
    at = setup(layout)
    apply = linen.adapt(at.model)

    def model_loss(params: Any, adapter: Any, tokens: Any, key: Any) -> jax.Array:
        return cross_entropy(apply(params, adapter, tokens), tokens)

    drawn = init(at.params, method, select(at.targets))
    with pytest.raises(UserError, match="calibrate"):
        TrainState.create(drawn, optax.adam(1e-2))
    jax.eval_shape(lambda adapter: TrainState.create(adapter, optax.adam(1e-2)), drawn)
    adapter = calibrate(drawn, at.params, model_loss, [at.tokens])
    TrainState.create(adapter, optax.adam(1e-2))
    halves = {path: own | {"B_aux": 0 * own["B_aux"]} for path, own in adapter.frozen.items()}
    with pytest.raises(UserError, match="calibrate"):
        TrainState.create(replace(adapter, frozen=halves), optax.adam(1e-2))
    for leaf in jax.tree.leaves(adapter.frozen):
        assert jnp.isfinite(leaf).all()
        assert (jnp.abs(leaf).max((-1, -2)) > 0.1).all()
    save(tmp_path / "one", adapter, at.params)
    loaded = by_name(load(tmp_path / "one", at.params))
    assert all(np.array_equal(x, loaded[n]) for n, x in by_name(adapter).items())


def test_a_method_that_needs_no_data_runs_nothing():
    targets = linen.targets(MODEL, PARAMS, BATCHES[0][0])
    adapter = init(PARAMS, LoRA(rank=2), targets)
    assert calibrate(adapter, PARAMS, loss, []) is adapter


def test_no_batch_and_tables_are_refused():
    at = setup()
    method = LoRAMini(rank=2, a=4, b=5, outer_init="gradient")
    with pytest.raises(UserError, match=r"embed.*are not made from data"):
        init(at.params, method, at.targets)
    adapter = init(at.params, method, select(at.targets))
    with pytest.raises(UserError, match="at least one batch"):
        calibrate(adapter, at.params, loss, [])
