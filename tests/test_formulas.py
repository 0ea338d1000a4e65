"""Each method written out again in NumPy float64: its update, its gradients and how it starts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, LoRAMini, Target, UserError, init
from lora_mini_jax.methods import (
    METHODS,
    AdaLoRA,
    DiffoRA,
    DoRA,
    Full,
    LoRAFA,
    LoRAMiniDiag,
    LoRAXS,
    MiSS,
    OLoRA,
    PiSSA,
    ReLoRA,
    SwitchLoRA,
    VeRA,
    from_dict,
)
from lora_mini_jax.methods.pissa import _since
from tests.cases import draws

N_IN, N_OUT, ROWS = 12, 8, 5


def doubles(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def started(method: Any, n_in: int, n_out: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """(kernel, trainable, frozen), the latter as the method draws them."""
    kernel = draws(jnp.zeros((n_in, n_out)), 0.1, seed)
    return kernel, *method.init(jax.random.key(seed), kernel)


def rows_of(d: Any, shape: tuple[int, int]) -> Any:
    """``D[i mod r, o mod width]`` for every entry, entry by entry."""
    return np.array([[d[i % len(d), o % d.shape[1]] for o in range(shape[1])]
                     for i in range(shape[0])])  # fmt: skip


def bat(w: Any, d: Any) -> Any:
    """As the authors' code has it, block by block on the transposed kernel."""
    out, r = w.T.copy(), d.shape[-1]
    for o in range(len(out) // r):
        for i in range(out.shape[1] // r):
            block = np.s_[o * r : o * r + r, i * r : i * r + r]
            out[block] += w.T[block] @ d[o] + d[o]
    return out.T


def dora(w: Any, f: Any, at: Any) -> Any:
    constant = np.linalg.norm(w + 7 / 3 * at["A"] @ at["B"], axis=0)
    return f["magnitude"] * (w + 7 / 3 * f["A"] @ f["B"]) / constant


def difference(w: Any, f: Any, at: Any) -> Any:
    return w + 7 / 3 * (f["A"] @ f["B"] - f["A0"] @ f["B0"])


# Each method's merged kernel from the kernel ``w`` and the factors ``f``. ``at`` are the factors
# again: where the paper takes something as constant in the backward pass, it is computed of them.
EQUATIONS: list[tuple[Any, Callable]] = [
    (LoRA(rank=3, alpha=7.0), lambda w, f, at: w + 7 / 3 * f["A"] @ f["B"]),
    (LoRA(rank=3, alpha=7.0, rslora=True), lambda w, f, at: w + 7 / 3**0.5 * f["A"] @ f["B"]),
    (LoRAFA(rank=3, alpha=7.0), lambda w, f, at: w + 7 / 3 * f["A"] @ f["B"]),
    (LoRAMini(rank=3, alpha=7.0, a=4, b=6),
     lambda w, f, at: w + 7 / 3 * f["A_aux"] @ f["A"] @ f["B"] @ f["B_aux"]),
    (LoRAMiniDiag(rank=3, alpha=7.0, outer_init="svd"),
     lambda w, f, at: w + 7 * f["A_aux"] @ np.diag(f["d"]) @ f["B_aux"]),
    (LoRAXS(rank=3, alpha=7.0), lambda w, f, at: w + 7 / 3 * f["A"] @ f["R"] @ f["B"]),
    (VeRA(rank=5), lambda w, f, at: w + f["A"] @ np.diag(f["d"]) @ f["B"] @ np.diag(f["b"])),
    (DoRA(rank=3, alpha=7.0), dora),
    (PiSSA(rank=3, alpha=7.0), difference),
    (OLoRA(rank=3, alpha=7.0), difference),
    (AdaLoRA(rank=3, alpha=7.0, target_rank=2, total_steps=100),
     lambda w, f, at: w + 7 / (3 + 1e-5) * f["A"] @ np.diag(f["E"]) @ f["B"]),
    (MiSS(rank=5), lambda w, f, at: w + rows_of(f["D"], w.shape)),
    (MiSS(rank=5, mode="mini", mini_rank=4), lambda w, f, at: w + rows_of(f["D"], w.shape)),
    (MiSS(rank=4, mode="bat"), lambda w, f, at: bat(w, f["D"])),
    (Full(), lambda w, f, at: w + f["dense"]),
    (SwitchLoRA(rank=3), lambda w, f, at: w + f["dense"] + f["A"] @ f["B"] / 3),
    (ReLoRA(rank=3, alpha=7.0), lambda w, f, at: w + f["dense"] + 7 / 3 * f["A"] @ f["B"]),
    (DiffoRA(inner=LoRA(rank=3, alpha=7.0)),
     lambda w, f, at: w + 7 / 3 * f["A"] @ f["B"] / (1 + np.exp(-f["gate"]))),
]  # fmt: skip


def test_every_method_has_its_equation():
    assert {type(method) for method, _ in EQUATIONS} == set(METHODS.values())


@pytest.mark.parametrize(("method", "merged"), EQUATIONS, ids=lambda m: getattr(m, "name", ""))
def test_a_method_is_its_equation(method: Any, merged: Callable):
    """Merged kernel, loss and gradients, these by central differences in float64."""
    kernel, trainable, frozen = started(method, N_IN, N_OUT)
    trainable = draws(trainable, 0.5, 3)
    x, y = draws(jnp.zeros((ROWS, N_IN)), 1.0, 1), draws(jnp.zeros((ROWS, N_OUT)), 1.0, 2)

    def ours(trainable: Any) -> jax.Array:
        factors = {**frozen, **trainable}
        shift = method.shift(factors)
        used = kernel if shift is None else kernel + shift
        out = x @ used + method.delta(x, used, factors)
        return 0.5 * ((out - y) ** 2).sum()

    loss, grads = jax.value_and_grad(ours)(trainable)
    X, Y, W, leaves, fixed = doubles((x, y, kernel, trainable, frozen))
    at = {**fixed, **leaves}
    np.testing.assert_allclose(method.merge(kernel, {**frozen, **trainable}), merged(W, at, at),
                               rtol=1e-5, atol=1e-5)  # fmt: skip

    def theirs(name: str, leaf: Any) -> float:
        return 0.5 * ((X @ merged(W, {**at, name: leaf}, at) - Y) ** 2).sum()

    np.testing.assert_allclose(loss, 0.5 * ((X @ merged(W, at, at) - Y) ** 2).sum(), rtol=1e-5)
    for name, leaf in leaves.items():
        slopes = np.zeros_like(leaf)
        for i in np.ndindex(leaf.shape):
            step = np.zeros_like(leaf)
            step[i] = 1e-5
            slopes[i] = (theirs(name, leaf + step) - theirs(name, leaf - step)) / 2e-5
        np.testing.assert_allclose(grads[name], slopes, rtol=2e-4, atol=2e-4 * abs(slopes).max())


def test_pissa_starts_at_the_principal_part_and_olora_at_the_qr_decomposition():
    kernel, factors, start = started(PiSSA(rank=3, alpha=7.0), N_IN, N_OUT)
    u, s, vt = np.linalg.svd(doubles(kernel))
    wanted = u[:, :3] * s[:3] @ vt[:3]
    np.testing.assert_allclose(
        7 / 3 * doubles(start["A0"]) @ doubles(start["B0"]), wanted, atol=1e-6
    )
    assert all(np.array_equal(factors[n], start[n + "0"]) for n in "AB")
    kernel, factors, start = started(OLoRA(rank=3), N_IN, N_OUT)
    q, r = np.linalg.qr(doubles(kernel).T)
    wanted = (q[:, :3] @ r[:3]).T
    np.testing.assert_allclose(doubles(start["A0"]) @ doubles(start["B0"]), wanted, atol=1e-6)
    np.testing.assert_allclose(start["B0"] @ start["B0"].T, np.eye(3), atol=1e-5)


def test_a_difference_of_products_has_the_gradients_of_the_two_products():
    """Those of the start among them, for whoever asks for these too."""
    pair = jnp.zeros((N_IN, 3)), jnp.zeros((3, N_OUT))
    given = (jnp.zeros((ROWS, N_IN)), pair, pair)
    x, now, start = (draws(each, 0.5, seed) for seed, each in enumerate(given))

    def plain(x: Any, now: Any, start: Any) -> jax.Array:
        return x @ now[0] @ now[1] - x @ start[0] @ start[1]

    got, want = (jax.grad(lambda *given, f=f: jnp.sin(f(*given)).sum(), (0, 1, 2))(x, now, start)
                 for f in (_since, plain))  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_small_difference_of_large_products_survives_a_narrow_dtype():
    left = jnp.round(8 * draws(jnp.zeros((N_IN, 2)), 1.0)) / 8
    start = jnp.array([[96.0], [0.0]]) * jnp.ones(N_OUT)
    factors = {"A": left, "A0": left, "B": start.at[1].set(1), "B0": start}
    x = jnp.round(8 * draws(jnp.zeros((ROWS, N_IN)), 1.0, 1)) / 8
    found = PiSSA(rank=2, alpha=2).delta(x.astype(jnp.bfloat16), jnp.zeros(()), factors)
    wanted = (x @ left[:, 1:]) * jnp.ones(N_OUT)
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=0.01)


def test_dora_starts_at_the_columns_norms_and_vera_at_its_constants():
    kernel, trainable, _ = started(DoRA(rank=3), N_IN, N_OUT)
    norms = np.linalg.norm(doubles(kernel), axis=0)
    np.testing.assert_allclose(trainable["magnitude"], norms, rtol=1e-5)
    zeros = kernel.at[:, 0].set(0)  # a column without a direction stays where it is
    leaves, fixed = DoRA(rank=3).init(jax.random.key(0), zeros)
    np.testing.assert_allclose(DoRA(rank=3).merge(zeros, {**leaves, **fixed}), zeros, rtol=1e-5)
    _, trainable, frozen = started(VeRA(rank=64), 96, 80)
    assert (trainable["d"] == 0.1).all()
    assert not trainable["b"].any()
    uniform_within(frozen["A"], (6 / 96) ** 0.5)
    uniform_within(frozen["B"], (6 / 64) ** 0.5)


def test_vera_s_kernels_take_parts_of_the_same_factors():
    shapes = {"small": (6, 4), "large": (9, 7)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    targets = [Target(f"{name}/kernel", shape) for name, shape in shapes.items()]
    small, large = init(params, VeRA(rank=5), targets).frozen.values()
    np.testing.assert_allclose(small["A"] * 6**0.5, large["A"][:6] * 9**0.5, rtol=1e-5)
    np.testing.assert_array_equal(small["B"], large["B"][:, :4])
    left, right = large["A"][:7] * 9**0.5, large["B"].T * 5**0.5
    assert not np.isclose(left, right).any()  # the two are draws of their own


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


@pytest.mark.parametrize("outer_init", ["normal", "fan_in", "orthogonal"])
@pytest.mark.parametrize("outer", ["bfloat16", "recompute"])
def test_outer_factors_are_the_same_draw_however_they_are_kept(outer: Any, outer_init: Any):
    sizes: Any = {"rank": 2, "alpha": 7.0, "a": 6, "b": 5, "outer_init": outer_init}
    kernel, trainable, frozen = started(LoRAMini(**sizes), 40, 30)
    whole = {**draws(trainable, 0.5, 3), **frozen}
    method = LoRAMini(**sizes, outer=outer)
    _, _, kept = started(method, 40, 30)
    own = {**whole, **kept}
    taken = sum(leaf.nbytes for leaf in kept.values())
    if outer == "bfloat16":
        assert 2 * taken == sum(leaf.nbytes for leaf in frozen.values())
        whole |= {name: leaf.astype(jnp.bfloat16) for name, leaf in frozen.items()}
    else:
        assert taken == 16
    want = LoRAMini(**sizes).merge(kernel, whole)
    np.testing.assert_allclose(method.merge(kernel, own), want, rtol=1e-5, atol=1e-5)
    x = draws(jnp.zeros((ROWS, 40)), 1.0, 1)
    np.testing.assert_allclose(method.delta(x, kernel, own), x @ (want - kernel), atol=1e-4)


def test_factors_that_are_drawn_again_are_not_kept_for_the_backward_pass():
    """Neither is among what the backward pass is given."""
    kept = {}
    for outer in ("float32", "recompute"):
        method: Any = LoRAMini(rank=2, a=6, b=5, outer_init="fan_in", outer=outer)
        kernel, trainable, frozen = started(method, 40, 30)

        def out(trainable: Any, method: Any, kernel: Any, frozen: Any) -> jax.Array:
            return method.delta(jnp.ones((7, 40)), kernel, {**frozen, **trainable})

        _, back = jax.vjp(partial(out, method=method, kernel=kernel, frozen=frozen), trainable)
        kept[outer] = {tuple(leaf.shape) for leaf in jax.tree.leaves(back)}
    assert {(40, 6), (5, 30)} & kept["float32"]
    assert not {(40, 6), (5, 30)} & kept["recompute"]


@pytest.mark.parametrize("outer_init", ["svd", "gradient", "activation"])
def test_factors_that_no_key_draws_cannot_be_drawn_again(outer_init: Any):
    with pytest.raises(UserError, match=f"{outer_init} cannot be drawn .* normal, fan_in, orthog"):
        LoRAMini(outer_init=outer_init, outer="recompute")


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


# What a run is that says no more than its method: of the papers, of PEFT, or chosen by experiment.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora-mini": {"rank": 8, "alpha": 16, "a": 32, "b": 32, "outer_init": "orthogonal",
                  "outer": "float32"},
    "lora-mini-diag": {"rank": 64, "alpha": 16, "outer_init": "gradient"},
    **{name: {"rank": 8, "alpha": 16, "rslora": False} for name in ("lora", "lora-fa")},
    **{name: {"rank": 8, "alpha": 16} for name in ("dora", "pissa", "olora", "lora-xs")},
    "vera": {"rank": 256, "d_initial": 0.1},
    "miss": {"rank": 64, "mode": "miss", "mini_rank": 1},
    "switchlora": {"rank": 8, "interval0": 40, "ratio": 0.1, "total_steps": 1000,
                   "freeze_steps": 5},
    "relora": {"rank": 8, "alpha": 16, "reset_every": 200},
    "adalora": {"rank": 12, "alpha": 16, "total_steps": 1000, "target_rank": None, "tinit": 0,
                "tfinal": 0, "delta_t": 1, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5},
    "full": {},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"diffora"}))
def test_defaults_are_what_they_were(name: str):
    assert METHODS[name]().to_dict() == {"method": name, **DEFAULTS[name], "dropout": 0}


def test_the_defaults_of_a_search_are_what_they_were():
    inner, search = LoRA(), DiffoRA(LoRA()).to_dict()
    assert search.pop("inner") == inner.to_dict()
    assert search == {"method": "diffora", "rho": 0.5, "relaxation": "sigmoid", "sharing": "none",
                      "search_steps": None, "gate_learning_rate": 0.05, "dropout": 0}  # fmt: skip


BAD = [
    {"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"rank": "4"}, {"rank": True}, {"rank": None},
    {"alpha": 0}, {"alpha": -1.0}, {"alpha": "x"}, {"alpha": float("nan")},
    {"alpha": float("inf")},
]  # fmt: skip
BAD_MINI = [{"a": 0}, {"b": 0}, {"a": 2.0}, {"rank": 9, "a": 8}, {"rank": 9, "b": 8},
            {"outer_init": "xavier"}, {"outer": "float16"}]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [{"method": m, **bad} for m in ("lora", "lora-mini") for bad in BAD]
    + [{"method": "lora-mini", **bad} for bad in BAD_MINI]
    + [{"method": "miss", **bad} for bad in ({"rank": 0}, {"mini_rank": 0}, {"mode": "bone"})]
    + [{"method": "vera", **bad} for bad in ({"rank": 0}, {"d_initial": 0.0})]
    + [{"method": "lora", **bad} for bad in ({"rslora": 1}, {"dropout": 1.0}, {"dropout": -0.1})]
    + [{"method": "full", "dropout": 0.1}]
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
        (LoRAXS(rank=5), 4, 9, "rank 5"),
        (MiSS(rank=5), 4, 9, "rank 5"),
        (MiSS(rank=5, mode="mini", mini_rank=4), 20, 9, "mini_rank 4"),
        (MiSS(rank=5, mode="bat"), 20, 9, "rank 5"),
        (MiSS(rank=5, mode="bat"), 9, 20, "rank 5"),
    ],
)
def test_a_size_beyond_the_kernel_is_a_problem(method: Any, n_in: int, n_out: int, named: str):
    assert [p for p in method.problems(n_in, n_out) if named in p]
    assert not method.problems(20, 20)


def test_a_size_as_large_as_the_kernel_is_none():
    for method in (LoRA(rank=4), LoRAMini(rank=4, a=4, b=4), LoRAXS(rank=4), MiSS(rank=4)):
        assert not method.problems(4, 9)
        assert method.problems(3, 9)
