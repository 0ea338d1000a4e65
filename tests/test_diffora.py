"""DiffoRA's update and gates, written out again in NumPy float64; and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_mini_jax import LoRA, LoRAMini, Target, UserError, init, merge, select
from lora_mini_jax.layers import place, softmax
from lora_mini_jax.methods import (
    AdaLoRA,
    DiffoRA,
    DoRA,
    Full,
    LoRAFA,
    LoRAXS,
    MiSS,
    PiSSA,
    ReLoRA,
    SwitchLoRA,
    VeRA,
    from_dict,
    from_spec,
)
from lora_mini_jax.options import Finetune
from lora_mini_jax.tree import flatten, unflatten
from tests.cases import draws, randomised

SHAPES = {
    "layers_0/q/kernel": (6, 5),
    "layers_0/v/kernel": (6, 4),
    "layers_1/q/kernel": (6, 5),
    "layers_1/v/kernel": (6, 4),
    "layers_1/up/kernel": (5, 7),
    "head/kernel": (4, 3),
}
TARGETS = tuple(Target(path, shape) for path, shape in SHAPES.items())
INNER = LoRA(rank=2, alpha=6.0)
ROWS = [list(SHAPES)[:2], list(SHAPES)[2:5], list(SHAPES)[5:]]


PARAMS: Any = unflatten(draws({path: jnp.zeros(shape) for path, shape in SHAPES.items()}))


def trained(method: DiffoRA) -> Any:
    """An adapter for all kernels with leaves and gates away from their start."""
    return randomised(init(PARAMS, method, TARGETS, 3), 0.8)


def expected_openings(adapter: Any, relaxation: str) -> dict[str, float]:
    gates = {path: float(leaves["gate"]) for path, leaves in adapter.trainable.items()}
    if relaxation == "sigmoid":
        return {path: 1 / (1 + np.exp(-gate)) for path, gate in gates.items()}
    total = {path: sum(np.exp(gates[p]) for p in row) for row in ROWS for path in row}
    size = {path: len(row) for row in ROWS for path in row}
    return {path: size[path] * np.exp(gate) / total[path] for path, gate in gates.items()}


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_the_update_is_the_gate_times_the_inner_update(relaxation: Any):
    adapter = trained(DiffoRA(INNER, relaxation=relaxation))
    opening = expected_openings(adapter, relaxation)
    merged, kernels = flatten(merge(PARAMS, adapter)), flatten(PARAMS)
    for path, leaves in adapter.trainable.items():
        a, b = (np.asarray(leaves[name], np.float64) for name in "AB")
        wanted = np.asarray(kernels[path], np.float64) + opening[path] * 3.0 * a @ b
        np.testing.assert_allclose(merged[path], wanted, rtol=1e-5, atol=1e-5)
    assert len({round(g, 4) for g in opening.values()}) > 3


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_the_gates_have_the_gradient_of_finite_differences(relaxation: Any):
    adapter = trained(DiffoRA(INNER, relaxation=relaxation))
    x = {path: draws(jnp.zeros((3, shape[0])), 1.0, 2) for path, shape in SHAPES.items()}

    @jax.jit
    def loss(gates):
        leaves = {p: {**f, "gate": gates[p]} for p, f in adapter.trainable.items()}
        kernels = flatten(merge(PARAMS, adapter.with_trainable(leaves)))
        return sum(jnp.sin(x[path] @ kernel).sum() for path, kernel in kernels.items())

    gates = {path: leaves["gate"] for path, leaves in adapter.trainable.items()}
    slopes, h = jax.grad(loss)(gates), 0.02
    for path, gate in gates.items():
        up, down = (float(loss({**gates, path: gate + s * h})) for s in (1, -1))
        np.testing.assert_allclose(slopes[path], (up - down) / (2 * h), rtol=2e-2, atol=2e-3)
    moving = [path for path in gates if abs(slopes[path]) > 1e-3]
    assert len(moving) == (6 if relaxation == "sigmoid" else 5), "alone in its row, g is 1"


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_gates_start_at_zero_one_for_each_matrix(relaxation: Any):
    stacked = Target("layers/q/kernel", (3, 6, 5), stack=1)
    tree = {"layers": {"q": {"kernel": jnp.ones((3, 6, 5))}}}
    adapter = init(tree, DiffoRA(INNER, relaxation=relaxation), [stacked])
    gate = adapter.trainable["layers/q/kernel"]["gate"]
    assert (gate.shape, gate.dtype) == ((3,), jnp.float32)
    assert not gate.any()
    method = adapter.sites[0].method
    wanted = 0.5 if relaxation == "sigmoid" else 1.0
    assert isinstance(method, DiffoRA)
    assert (method.opening(adapter.factors()["layers/q/kernel"]) == wanted).all()


def test_a_softmax_factor_seen_alone_is_a_layer_of_one():
    method = DiffoRA(INNER, relaxation="softmax")
    assert method.opening({"gate": jnp.float32(2.0)}) == 1


def test_the_layer_softmax_of_stacked_and_batched_scores():
    scores = draws({"layers/q/kernel": jnp.zeros(2), "layers/heads/kernel": jnp.zeros((2, 3)),
                    "head/kernel": jnp.zeros(()), "layers_7/x": jnp.zeros((3,)),
                    "layers_7/y": jnp.zeros(())}, 1.0)  # fmt: skip
    found = softmax(scores, ("layers/q/kernel", "layers/heads/kernel"))
    q, heads = scores["layers/q/kernel"], scores["layers/heads/kernel"]
    for i in range(2):
        row = np.exp(np.r_[float(q[i]), np.asarray(heads[i], np.float64)])
        wanted = 4 * row / row.sum()
        np.testing.assert_allclose(found["layers/q/kernel"][i], wanted[0], rtol=1e-5)
        np.testing.assert_allclose(found["layers/heads/kernel"][i], wanted[1:], rtol=1e-5)
    assert found["head/kernel"] == 1
    together = np.r_[np.asarray(found["layers_7/x"]), float(found["layers_7/y"])]
    np.testing.assert_allclose(together.mean(), 1, rtol=1e-6)
    assert found["layers_7/x"].shape == (3,)
    # Heads of a model without layers are no layers, whatever their first axis counts.
    alone = softmax({"heads/kernel": jnp.arange(3.0), "up/kernel": jnp.zeros(())}, ())
    shares = np.exp([0.0, 1.0, 2.0, 0.0]) / np.exp([0.0, 1.0, 2.0, 0.0]).mean()
    np.testing.assert_allclose([*alone["heads/kernel"], alone["up/kernel"]], shares, rtol=1e-6)


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("layers_3/self_attn/q_proj/kernel", ("layers_3", "self_attn/q_proj/kernel")),
        ("transformer/h/11/mlp/kernel", ("transformer/h/11", "transformer/h/mlp/kernel")),
        ("encoder/layer2/dense_1/kernel", ("encoder/layer2", "encoder/dense_1/kernel")),
        ("lm_head/kernel", ("", "lm_head/kernel")),
        ("layers/q_proj/kernel", ("", "layers/q_proj/kernel")),
    ],
)
def test_the_place_of_a_kernel_is_read_off_its_path(path: str, wanted: tuple[str, str]):
    assert place(path) == wanted


ADDITIVE = [INNER, LoRAFA(rank=2), LoRAMini(rank=2, a=3, b=3), MiSS(rank=3), VeRA(rank=4),
            MiSS(rank=3, mode="mini"), PiSSA(rank=2), LoRAXS(rank=2)]  # fmt: skip


@pytest.mark.parametrize("inner", ADDITIVE, ids=lambda m: m.name)
def test_every_additive_method_can_be_gated(inner: Any):
    method = DiffoRA(inner)
    kernel, x = draws(jnp.zeros((6, 5))), draws(jnp.zeros((2, 6)), seed=6)
    assert method.problems(6, 5) == []
    trainable, frozen = method.init(jax.random.key(1), kernel)
    factors = {**frozen, **draws(trainable, 1.0)}
    opening = 1 / (1 + np.exp(-float(factors["gate"])))
    update = np.asarray(inner.merge(kernel, factors) - kernel)
    merged = method.merge(kernel, factors)
    np.testing.assert_allclose(merged - kernel, opening * update, atol=2e-5)
    np.testing.assert_allclose(method.delta(x, kernel, factors), x @ (opening * update), atol=5e-5)
    np.testing.assert_allclose(method.unmerge(merged, factors), kernel, atol=1e-6)


@pytest.mark.parametrize("inner", [DoRA(rank=2), MiSS(rank=2, mode="bat")], ids=lambda m: m.name)
def test_a_method_whose_update_reads_the_kernel_is_refused(inner: Any):
    kernels = [Target("a/kernel", (6, 4))]
    with pytest.raises(UserError, match=f"update of {inner.name} depends on the kernel"):
        init({"a": {"kernel": jnp.ones((6, 4))}}, DiffoRA(inner), kernels)


@pytest.mark.parametrize(
    ("inner", "hook"),
    [
        (Full(), "shift"),
        (SwitchLoRA(), "shift, held, step"),
        (ReLoRA(), "shift, step"),
        (AdaLoRA(total_steps=1000), "penalty, step"),
        (DiffoRA(INNER), "relate"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_a_method_with_a_life_of_its_own_is_refused(inner: Any, hook: str):
    with pytest.raises(UserError, match=f"cannot gate {inner.name}, which has a {hook} of its own"):
        DiffoRA(inner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 0.0}, "rho is 0.0"),
        ({"rho": 1.01}, "rho is 1.01: give a number above 0, at most 1"),
        ({"rho": "half"}, "rho is 'half'"),
        ({"relaxation": "hard"}, "choose one of sigmoid, softmax"),
        ({"sharing": "all"}, "choose one of none, layer, column"),
        ({"search_steps": 0}, "search_steps is 0"),
        ({"gate_learning_rate": 0.0}, "gate_learning_rate is 0.0"),
        ({"dropout": 0.1}, r"dropout is the inner method's: --inner 'lora\(dropout"),
        ({"inner": "nothing"}, "unknown method 'nothing'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: Any, message: str):
    with pytest.raises(UserError, match=message):
        from_dict({"method": "diffora", "inner": "lora", **settings})


def test_a_missing_inner_method_says_what_to_write():
    with pytest.raises(UserError, match=r"needs an inner method.*--inner lora-mini"):
        from_dict({"method": "diffora"})
    with pytest.raises(UserError, match="needs an inner method"):
        Finetune(method="diffora")


def test_the_inner_method_may_be_a_spec_and_its_dropout_counts():
    method = from_spec("diffora:inner=lora(rank=4,dropout=0.25),rho=1,sharing=layer")
    inner = LoRA(rank=4, dropout=0.25)
    assert method == DiffoRA(inner, rho=1.0, sharing="layer")
    assert method.dropout == 0.25
    assert from_dict(method.to_dict()) == method


def test_how_it_draws_is_the_inner_method_s():
    assert DiffoRA(inner=PiSSA(rank=2)).redrawn_within == PiSSA.redrawn_within < 1e-3
    targets = [Target(f"{name}/kernel", (6, 4)) for name in "qv"]
    params = {name: {"kernel": jnp.ones((6, 4))} for name in "qv"}
    one, other = init(params, DiffoRA(inner=VeRA(rank=3)), targets).frozen.values()
    np.testing.assert_array_equal(one["A"], other["A"])


def test_overrides_reach_the_inner_method():
    method = DiffoRA(LoRA(rank=2, dropout=0.1), rho=0.25)
    changed = method.with_settings({"rank": 1, "dropout": 0.2, "rho": 1})
    assert changed == DiffoRA(LoRA(rank=1, dropout=0.2), rho=1.0)
    adapter = init(PARAMS, method, select(TARGETS, "layers_0"), overrides={"v": {"rank": 1}})
    assert adapter.trainable["layers_0/v/kernel"]["A"].shape == (6, 1)
    assert adapter.trainable["layers_0/q/kernel"]["A"].shape == (6, 2)
    with pytest.raises(UserError, match="lora has no option colour"):
        method.with_settings({"colour": 1})
