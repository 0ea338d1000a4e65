"""AdaLoRA: 60 updates are PEFT's, one by one; its schedule, its budget, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import TrainState, UserError, init, linen, load, make_train_step, save
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.methods import AdaLoRA, from_dict
from tests.cases import draws
from tests.pytorch import peft, torch

WIDTH, HIDDEN, OUT, STEPS = 8, 10, 6, 60
METHOD = AdaLoRA(
    6,
    alpha=5.0,
    target_rank=2,
    total_steps=STEPS,
    tinit=5,
    tfinal=14,
    delta_t=3,
    beta1=0.8,
    beta2=0.9,
    orth_reg_weight=0.4,
)
NAMES = ("up", "down")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(STEPS, 16, WIDTH)).astype(np.float32)
Y = RNG.normal(size=(STEPS, 16, OUT)).astype(np.float32)


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(OUT, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(x)))


class Torch(torch.nn.Module):
    """Returns its loss as transformers' models do: only then does PEFT add its penalty."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, HIDDEN)
        self.down = torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x, y):
        out = self.down(torch.tanh(self.up(x)))
        return SimpleNamespace(loss=((out - y) ** 2).mean())


def arrays(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy().copy()


def theirs(method: AdaLoRA = METHOD) -> Any:
    """PEFT's model with a method's settings."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        target_modules=list(NAMES),
        init_r=method.rank,
        lora_alpha=int(method.alpha),
        target_r=method.goal,
        total_step=method.total_steps,
        tinit=method.tinit,
        tfinal=method.tfinal,
        deltaT=method.delta_t,
        beta1=method.beta1,
        beta2=method.beta2,
        orth_reg_weight=method.orth_reg_weight,
    )
    return peft.get_peft_model(Torch(), config)


def leaves(model: Any, of: Any = arrays) -> dict[str, dict[str, Any]]:
    """PEFT's A ``(rank, in)``, E ``(rank, 1)`` and B ``(out, rank)`` as ours; of them, or of what
    is kept for each."""
    found = {}
    for name in NAMES:
        layer = getattr(model.base_model.model, name)
        factors = (getattr(layer, f"lora_{n}")["default"] for n in ("A", "E", "B"))
        a, e, b = (of(factor) for factor in factors)
        found[f"{name}/kernel"] = {"A": a.T, "E": e[:, 0], "B": b.T}
    return found


def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
    x, y = batch
    return ((linen.adapt(Flax())(params, adapter, x) - y) ** 2).mean()


def ours(model: Any) -> tuple[Any, Any]:
    """(params, adapter) with the weights of a PEFT model."""
    layers = {name: getattr(model.base_model.model, name).get_base_layer() for name in NAMES}
    params = {n: {"kernel": arrays(layer.weight).T, "bias": arrays(layer.bias)}
              for n, layer in layers.items()}  # fmt: skip
    adapter = init(params, METHOD, linen.targets(Flax(), params, X[0]))
    return params, adapter.with_trainable(jax.tree.map(jnp.asarray, leaves(model)))


def close(mine: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Each leaf to a tolerance relative to its largest entry."""

    def check(a: Any, b: Any) -> None:
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-9))

    jax.tree.map(check, mine, wanted)


@pytest.mark.parametrize(
    ("optimiser", "dtype", "tolerance"), [("sgd", np.float32, 1e-5), ("adam", np.float64, 1e-11)]
)
def test_every_update_is_peft_s(optimiser: str, dtype: Any, tolerance: float):
    """Adam in float64: it blows the rounding of gradients near zero up to whole steps."""
    with jax.enable_x64(dtype is np.float64):
        follow(optimiser, dtype, tolerance)


def follow(optimiser: str, dtype: Any, tolerance: float) -> None:
    """Sixty updates, each compared."""
    model, xs, ys = theirs().to(torch.tensor(dtype(0)).dtype), X.astype(dtype), Y.astype(dtype)
    allocator, config = model.base_model.rankallocator, model.peft_config["default"]
    names = {id(p): name for name, p in model.base_model.model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if optimiser == "sgd":
        tx, tool = optax.sgd(0.3), torch.optim.SGD(trained, 0.3)
    else:
        tx, tool = optax.adam(0.02), torch.optim.Adam(trained, 0.02)
    params, adapter = ours(model)
    zeros = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), adapter.frozen)
    state = TrainState.create(replace(adapter, frozen=zeros), tx)
    step, budgets, averages = make_train_step(loss_fn, tx), [], {}
    for t in range(STEPS):
        tool.zero_grad()
        # PeftModel's own call leaves the penalty out, but for its task types.
        model.base_model(torch.tensor(xs[t]), torch.tensor(ys[t])).loss.backward()
        tool.step()
        model.base_model.update_and_allocate(t)
        state, _ = step(state, params, (xs[t], ys[t]))

        mine, frozen, wanted = state.adapter.trainable, state.adapter.frozen, leaves(model)
        close(mine, wanted, tolerance)
        zeros = {path: own["E"] == 0 for path, own in wanted.items()}
        assert all(np.array_equal(mine[path]["E"] == 0, zero) for path, zero in zeros.items())
        budgets.append(int(sum((~zero).sum() for zero in zeros.values())))
        if t < 46:  # then PEFT drops them, and ours stand still
            kept = {"sensitivity": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
            averages = {ending: leaves(model, lambda p, of=of: arrays(of[names[id(p)]]))
                        for ending, of in kept.items()}  # fmt: skip
        for ending, wanted in averages.items():
            close({path: {n: own[f"{n}_{ending}"] for n in "AEB"} for path, own in frozen.items()},
                  wanted, tolerance)  # fmt: skip
    assert budgets[6] == 11 < budgets[7] == budgets[5] == 12  # pruned, grown back
    assert budgets[46:] == [4] * 14
    pattern = {name.split(".")[0]: kept for name, kept in config.rank_pattern.items()}
    assert pattern == {path.split("/")[0]: own["kept"].tolist() for path, own in frozen.items()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"tinit": 0, "tfinal": 0, "total_steps": 97},
     {"rank": 12, "target_rank": 5, "total_steps": 1003}],
    ids=str,
)  # fmt: skip
def test_the_budget_is_peft_s(settings: dict[str, Any]):
    method = replace(METHOD, **settings)
    schedule = theirs(method).base_model.rankallocator.budget_schedule
    steps = range(method.total_steps + 3)
    assert [method.budget(t, 2) for t in steps] == [schedule(t)[0] for t in steps]


def test_every_matrix_of_a_stack_is_a_kernel_of_its_own():
    def step(t: int, own: Any, grads: Any) -> Any:
        stepped = METHOD.step(jax.random.key(0), jnp.int32(t), own, grads)
        return {path: stepped.frozen[path] | stepped.trainable[path] for path in own}

    leaves = METHOD.init(jax.random.key(0), jnp.zeros((9, 8)))
    trainable, frozen = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), leaves)
    own, grads = frozen | draws(trainable), draws(trainable, seed=6)
    each = {str(i): jax.tree.map(lambda x, i=i: x[i], (own, grads)) for i in range(3)}
    for t in (18, 46):
        own |= step(t, {"x": own}, {"x": grads})["x"]
        looped = step(t, {i: o for i, (o, _) in each.items()}, {i: g for i, (_, g) in each.items()})
        each = {i: (each[i][0] | looped[i], each[i][1]) for i in each}
        close(own, jax.tree.map(lambda *x: jnp.stack(x), *(each[i][0] for i in each)), 1e-6)
        assert int(own["kept"].sum()) == METHOD.budget(t, 3) < 18


@pytest.mark.parametrize(("rank", "goal"), [(1, 1), (4, 3), (12, 8)])
def test_two_thirds_of_the_rank_are_left_where_nobody_says(rank: int, goal: int):
    assert AdaLoRA(rank=rank).goal == goal


@pytest.mark.parametrize("tfinal", [0, 1, 7])
def test_in_the_end_no_more_are_left_than_the_target(tfinal: int):
    method = replace(METHOD, tfinal=tfinal, delta_t=7, tinit=0)
    trainable, frozen = method.init(jax.random.key(0), jnp.zeros((9, 8)))
    own = {**frozen, **draws(trainable)}
    for t in range(STEPS):
        grads = draws(trainable, seed=t)
        own["E"] += 0.1  # pruned entries grow back
        stepped = method.step(jax.random.key(0), jnp.int32(t), {"x": own}, {"x": grads})
        own |= stepped.frozen["x"] | stepped.trainable["x"]
    assert int((own["E"] != 0).sum()) == int(own["kept"].sum()) == METHOD.goal


def test_with_the_target_at_the_rank_nothing_is_pruned():
    method = replace(METHOD, target_rank=6)
    trainable, frozen = method.init(jax.random.key(0), jnp.zeros((9, 8)))
    own = {**frozen, **draws(trainable)}
    stepped = method.step(jax.random.key(0), jnp.int32(46), {"x": own}, {"x": draws(trainable)})
    assert np.array_equal(stepped.trainable["x"]["E"], own["E"])


def test_the_penalty_of_orthonormal_factors_and_its_gradient_are_zero():
    eye = {"A": jnp.eye(9)[:, :6], "B": jnp.eye(6), "E": jnp.ones(6)}
    penalty, grads = jax.value_and_grad(METHOD.penalty)(eye)
    assert penalty == 0
    assert all(not grad.any() for grad in grads.values())


def test_a_run_goes_on_from_a_checkpoint_and_a_saved_adapter_is_small(tmp_path):
    params, adapter = ours(theirs())
    tx = optax.adam(0.02)
    step, state = make_train_step(loss_fn, tx), TrainState.create(adapter, tx)
    for t in range(40):
        if t == 20:
            with Checkpoints(tmp_path / "checkpoints") as checkpoints:
                checkpoints.save(state)
                restored = checkpoints.restore(TrainState.create(adapter, tx))
        state, _ = step(state, params, (X[t], Y[t]))
    for t in range(20, 40):
        restored, _ = step(restored, params, (X[t], Y[t]))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    save(tmp_path / "adapter", state.adapter, params)
    loaded = load(tmp_path / "adapter", params)
    jax.tree.map(np.testing.assert_array_equal, loaded.trainable, state.adapter.trainable)
    assert not any(own["A_sensitivity"].any() for own in loaded.frozen.values())


@pytest.mark.parametrize(
    "bad",
    [{"total_steps": 0}, {"total_steps": 19}, {"total_steps": 60.0}, {"target_rank": 7},
     {"target_rank": 0}, {"tinit": -1}, {"tinit": 46}, {"tfinal": 55}, {"tfinal": 1.5},
     {"delta_t": 0}, {"beta1": 0.0}, {"beta2": 1.0}, {"orth_reg_weight": -0.1}],
    ids=str,
)  # fmt: skip
def test_a_bad_setting_is_refused_in_one_line_that_names_it(bad: dict[str, Any]):
    with pytest.raises(UserError) as caught:
        from_dict({**METHOD.to_dict(), **bad})
    assert next(iter(bad)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_shorter_than_its_phases_is_refused():
    with pytest.raises(UserError, match="total_steps 30 is not above"):
        AdaLoRA(tinit=20, tfinal=10, total_steps=30)
