"""Each method written out again in NumPy float64: its update, its gradients and how it starts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, LoRAMini, UserError
from lora_mini_jax.methods import from_dict
from tests.cases import draws

N_IN, N_OUT, ROWS = 11, 7, 5
LORA = LoRA(rank=3, alpha=7.0)
MINI = LoRAMini(rank=3, alpha=7.0, a=4, b=6)


def doubles(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def started(method: Any, n_in: int, n_out: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """(kernel, trainable, frozen), the latter as the method draws them."""
    kernel = draws(jnp.zeros((n_in, n_out)), 0.1, seed)
    return kernel, *method.init(jax.random.key(seed), kernel)


@pytest.fixture(scope="module")
def data() -> tuple[Any, Any]:
    return draws(jnp.zeros((ROWS, N_IN)), 1.0, 1), draws(jnp.zeros((ROWS, N_OUT)), 1.0, 2)


def squared_loss(method: Any, kernel: Any, trainable: Any, frozen: Any, x: Any, y: Any) -> Any:
    out = x @ kernel + method.delta(x, kernel, {**frozen, **trainable})
    return 0.5 * ((out - y) ** 2).sum()


def test_lora_is_the_paper_s_formula(data):
    x, y = data
    kernel, trainable, frozen = started(LORA, N_IN, N_OUT)
    trainable = draws(trainable, 1.0, 3)
    loss, grads = jax.value_and_grad(squared_loss, 2)(LORA, kernel, trainable, frozen, x, y)

    X, Y, W, A, B = doubles((x, y, kernel, trainable["A"], trainable["B"]))
    scale = 7.0 / 3
    merged = W + scale * A @ B
    error = X @ merged - Y
    assert frozen == {}
    np.testing.assert_allclose(LORA.merge(kernel, trainable), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * (error**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(grads["A"], scale * X.T @ error @ B.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grads["B"], scale * (X @ A).T @ error, rtol=1e-4, atol=1e-3)


def test_lora_mini_is_the_paper_s_formula(data):
    x, y = data
    kernel, trainable, frozen = started(MINI, N_IN, N_OUT)
    trainable = draws(trainable, 1.0, 3)
    loss, grads = jax.value_and_grad(squared_loss, 2)(MINI, kernel, trainable, frozen, x, y)

    X, Y, W, A, B = doubles((x, y, kernel, trainable["A"], trainable["B"]))
    L, R = doubles((frozen["A_aux"], frozen["B_aux"]))
    scale = 7.0 / 3
    merged = W + scale * L @ A @ B @ R
    error = X @ merged - Y
    assert (L.shape, A.shape, B.shape, R.shape) == ((N_IN, 4), (4, 3), (3, 6), (6, N_OUT))
    factors = {**trainable, **frozen}
    np.testing.assert_allclose(MINI.merge(kernel, factors), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, 0.5 * (error**2).sum(), rtol=1e-5)
    wanted_a = scale * (X @ L).T @ error @ (B @ R).T
    wanted_b = scale * (X @ L @ A).T @ error @ R.T
    np.testing.assert_allclose(grads["A"], wanted_a, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grads["B"], wanted_b, rtol=1e-4, atol=1e-3)


def uniform_within(values: Any, bound: float) -> None:
    """The draws look like U(-bound, bound): mean 0, std bound/sqrt(3), and they fill the range."""
    values = doubles(values).reshape(-1)
    std = bound / 3**0.5
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.98 * bound
    assert abs(values.mean()) < 5 * std / values.size**0.5
    np.testing.assert_allclose(values.std(), std, rtol=3 / values.size**0.5)


def normal_with(values: Any, std: float) -> None:
    """The draws look like N(0, std): moments within five standard errors, tails as they should."""
    values = doubles(values).reshape(-1)
    n = values.size
    assert abs(values.mean()) < 5 * std / n**0.5
    np.testing.assert_allclose(values.std(), std, rtol=5 / (2 * n) ** 0.5)
    np.testing.assert_allclose((np.abs(values) > std).mean(), 0.3173, atol=5 * 0.47 / n**0.5)


def test_lora_starts_uniform_in_the_fan_in_and_zero():
    _, trainable, _ = started(LoRA(rank=16), 256, 40)
    uniform_within(trainable["A"], 256**-0.5)
    assert not trainable["B"].any()


@pytest.mark.parametrize("outer_init", ["normal", "fan_in", "orthogonal", "svd"])
def test_lora_mini_s_inner_factors_start_uniform_and_zero(outer_init: Any):
    method = LoRAMini(rank=24, a=32, b=28, outer_init=outer_init)
    _, trainable, _ = started(method, 48, 40)
    uniform_within(trainable["A"], 32**-0.5)
    assert not trainable["B"].any()


@pytest.mark.parametrize(("outer_init", "stds"), [("normal", (1, 1)), ("fan_in", (1 / 16, 1 / 6))])
def test_outer_factors_have_their_variances(outer_init: Any, stds: tuple[float, float]):
    _, _, frozen = started(LoRAMini(rank=2, a=24, b=36, outer_init=outer_init), 256, 100)
    normal_with(frozen["A_aux"], stds[0])
    normal_with(frozen["B_aux"], stds[1])
    both = np.concatenate([np.ravel(f)[:2000] for f in frozen.values()]).reshape(2, -1)
    assert abs(np.corrcoef(both)[0, 1]) < 0.1


def test_orthogonal_outer_factors_are_orthonormal_and_turned_at_random():
    method = LoRAMini(rank=2, a=6, b=5, outer_init="orthogonal")
    _, _, frozen = started(method, 40, 30)
    L, R = doubles((frozen["A_aux"], frozen["B_aux"]))
    np.testing.assert_allclose(L.T @ L, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(R @ R.T, np.eye(5), atol=1e-5)
    firsts = [started(method, 40, 30, seed)[2]["A_aux"][0, 0] for seed in range(12)]
    assert min(firsts) < 0 < max(firsts)


def test_svd_outer_factors_span_the_top_singular_vectors():
    kernel, _, frozen = started(LoRAMini(rank=2, a=6, b=5, outer_init="svd"), 40, 30)
    L, R = doubles((frozen["A_aux"], frozen["B_aux"]))
    u, _, vt = np.linalg.svd(doubles(kernel))
    np.testing.assert_allclose(L @ L.T, u[:, :6] @ u[:, :6].T, atol=1e-4)
    np.testing.assert_allclose(R.T @ R, vt[:5].T @ vt[:5], atol=1e-4)
    assert (L[np.abs(L).argmax(0), range(6)] > 0).all()


BAD = [
    {"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"rank": "4"}, {"rank": True}, {"rank": None},
    {"alpha": 0}, {"alpha": -1.0}, {"alpha": "x"}, {"alpha": float("nan")},
    {"alpha": float("inf")},
]  # fmt: skip
BAD_MINI = [{"a": 0}, {"b": 0}, {"a": 2.0}, {"rank": 9, "a": 8}, {"rank": 9, "b": 8},
            {"outer_init": "xavier"}]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [{"method": m, **bad} for m in ("lora", "lora-mini") for bad in BAD]
    + [{"method": "lora-mini", **bad} for bad in BAD_MINI]
    + [{"method": "lora", "a": 4}, {"method": "nope"}, {}],
    ids=str,
)
def test_a_bad_setting_is_refused_in_one_line_that_names_it(record: dict[str, Any]):
    with pytest.raises(UserError) as caught:
        from_dict(record)
    named = set(record) - {"method"} or {"method"}
    assert any(name in str(caught.value) for name in named)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "n_in", "n_out", "named"),
    [
        (LoRA(rank=5), 4, 9, "rank 5"),
        (LoRA(rank=5), 9, 4, "rank 5"),
        (LoRAMini(rank=2, a=10, b=3), 9, 9, "a = 10"),
        (LoRAMini(rank=2, a=3, b=10), 9, 9, "b = 10"),
        (LoRAMini(rank=2, a=8, b=3, outer_init="svd"), 9, 7, "a = 8"),
        (LoRAMini(rank=2, a=3, b=8, outer_init="svd"), 7, 9, "b = 8"),
    ],
)
def test_a_size_beyond_the_kernel_is_a_problem(method: Any, n_in: int, n_out: int, named: str):
    assert [p for p in method.problems(n_in, n_out) if named in p]
    assert not method.problems(20, 20)
