"""ReLoRA against NumPy, from reset to reset; and what it promises of itself."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import TrainState, UserError, init, linen, make_train_step
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.methods import ReLoRA, from_dict
from lora_mini_jax.methods.relora import jagged
from lora_mini_jax.training.optim import scale_by_element_adam
from tests.cases import by_name, draws

LAYERS, N_IN, N_OUT, EVERY = 2, 12, 9, 7
METHOD = ReLoRA(rank=3, alpha=6.0, reset_every=EVERY)
MODEL = nn.Einsum((LAYERS, N_IN, N_OUT), "btn,bnk->btk", use_bias=False)
PARAMS = {"kernel": draws(jnp.zeros((LAYERS, N_IN, N_OUT)), 0.3, 1)}
RNG = np.random.default_rng(2)
X = RNG.normal(size=(LAYERS, 16, N_IN)).astype(np.float32)
Y = RNG.normal(size=(LAYERS, 16, N_OUT)).astype(np.float32)
RATE = optax.linear_schedule(1e-2, 5e-3, 40)
TX = optax.chain(scale_by_element_adam(), optax.scale_by_learning_rate(RATE))


def start() -> TrainState:
    adapter = init(PARAMS, METHOD, linen.targets(MODEL, PARAMS, X), 7)
    return TrainState.create(adapter, TX, 3)


def trainer(traces: list[int]) -> Any:
    apply = linen.adapt(MODEL)

    def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        traces.append(1)
        x, y = batch
        return ((apply(params, adapter, x) - y) ** 2).mean()

    return make_train_step(loss_fn, TX)


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """The kernel's leaves, copied, as the next step takes the buffers."""
    factors = {**state.adapter.frozen["kernel"], **state.adapter.trainable["kernel"]}
    return {name: np.array(leaf, float) for name, leaf in factors.items()}


def test_training_is_that_of_numpy_from_reset_to_reset():
    traces: list[int] = []
    step, state, scale, drawn = trainer(traces), start(), 6.0 / 3, []
    wanted = leaves(state)
    assert not wanted["dense"].any()
    moments = {name: np.zeros((2, *wanted[name].shape)) for name in "AB"}
    for t in range(4 * EVERY + 3):
        state, _ = step(state, PARAMS, (X, Y))
        a, b = wanted["A"], wanted["B"]
        error = X @ (np.asarray(PARAMS["kernel"]) + wanted["dense"] + scale * a @ b) - Y
        dense = 2 * X.swapaxes(1, 2) @ error / error.size
        grads = {"A": scale * dense @ b.swapaxes(1, 2), "B": scale * a.swapaxes(1, 2) @ dense}
        count = t % EVERY + 1
        for name, g in grads.items():
            moments[name][0] += 0.1 * (g - moments[name][0])
            moments[name][1] += 0.001 * (g**2 - moments[name][1])
            mean = moments[name][0] / (1 - 0.9**count)
            square = moments[name][1] / (1 - 0.999**count)
            wanted[name] = wanted[name] - RATE(t) * mean / (np.sqrt(square) + 1e-8)
        now = leaves(state)
        if count == EVERY:
            wanted["dense"] = wanted["dense"] + scale * wanted["A"] @ wanted["B"]
            wanted |= {"A": now["A"], "B": np.zeros_like(wanted["B"])}
            moments = {name: np.zeros_like(moment) for name, moment in moments.items()}
            drawn += list(now["A"])
        for name, leaf in wanted.items():
            np.testing.assert_allclose(now[name], leaf, atol=5e-5, err_msg=f"{name}, update {t}")
        adam = state.opt_state[0]
        for name, (mu, nu) in moments.items():
            assert (np.asarray(adam.count["kernel"][name]) == count % EVERY).all()
            np.testing.assert_allclose(adam.mu["kernel"][name], mu, atol=2e-6)
            np.testing.assert_allclose(adam.nu["kernel"][name], nu, atol=2e-8)
    assert len(traces) == step._cache_size() == 1
    # Drawn anew every time and for every layer, as at the start; and the rank has added up.
    assert np.abs(drawn).max() <= N_IN**-0.5
    assert np.abs(drawn).mean() == pytest.approx(N_IN**-0.5 / 2, rel=0.1)
    assert len({a.tobytes() for a in drawn}) == len(drawn) == 4 * LAYERS
    assert (np.linalg.matrix_rank(now["dense"], tol=1e-4) == N_OUT).all()


def test_a_reset_does_not_change_the_function_and_comes_when_due():
    kernel = draws(jnp.zeros((20, 10)))
    trainable, frozen = METHOD.init(jax.random.key(0), kernel)
    factors = {**frozen, **draws(trainable)}
    step, both = jax.jit(METHOD.step), {"up": factors, "down": factors}
    for t in range(3 * EVERY):
        stepped = step(jax.random.key(1), jnp.int32(t), both, {})
        after = stepped.trainable["up"] | stepped.frozen["up"]
        due = (t + 1) % EVERY == 0
        assert all(bool(flag) == due for flag in stepped.reset["up"].values())
        assert all(np.array_equal(after[name], factors[name]) != due for name in after)
        assert after["B"].any() != due
        others = stepped.trainable["down"]["A"]
        assert np.array_equal(after["A"], others) != due  # each kernel's own draw
        merged = METHOD.merge(kernel, after)
        np.testing.assert_allclose(merged, METHOD.merge(kernel, factors), rtol=0, atol=1e-6)


def test_a_run_goes_on_bit_for_bit_after_a_reset(tmp_path):
    step, state = trainer([]), start()
    for _ in range(EVERY + 3):
        state, _ = step(state, PARAMS, (X, Y))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored: Any = checkpoints.restore(start())
    assert leaves(restored)["dense"].any()
    for _ in range(EVERY):
        state, _ = step(state, PARAMS, (X, Y))
        restored, _ = step(restored, PARAMS, (X, Y))
    two = by_name(restored)
    assert all(np.array_equal(leaf, two[name]) for name, leaf in by_name(state).items())


def test_the_jagged_schedule_warms_up_after_every_reset_but_not_before():
    cosine = optax.cosine_decay_schedule(2.0, 40)
    rate = jax.jit(jagged(cosine, reset_every=10, warmup=4))
    rise = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]
    for t, share in enumerate([1] * 10 + 3 * rise):
        np.testing.assert_allclose(rate(t), cosine(t) * share, atol=1e-6)


def test_the_share_of_warming_up_is_of_the_steps_between_resets():
    schedule = optax.constant_schedule(2.0)
    for share, warmup in ((0.3, 2), (0.5, 4), (0.0, 1)):
        rates = METHOD.rate(schedule, share), jagged(schedule, EVERY, warmup)
        assert [float(rates[0](t)) for t in range(20)] == [float(rates[1](t)) for t in range(20)]


def test_a_run_in_which_it_never_restarts_is_told():
    assert METHOD.notes(EVERY + 1) == []
    (note,) = METHOD.notes(EVERY)
    assert note.startswith(f"no restart within {EVERY} steps")


@pytest.mark.parametrize("name", ["reset_every", "warmup"])
@pytest.mark.parametrize("bad", [0, 1.5, True])
def test_a_bad_jagged_schedule_is_refused(name: str, bad: Any):
    with pytest.raises(UserError, match=name):
        jagged(RATE, **{"reset_every": 10, "warmup": 2, name: bad})


@pytest.mark.parametrize(
    "bad",
    [{"rank": 0}, {"alpha": 0}, {"reset_every": 0}, {"reset_every": 2.5}, {"reset_every": "x"},
     {"rslora": True}],
    ids=str,
)  # fmt: skip
def test_a_bad_setting_is_refused_in_one_line_that_names_it(bad: dict[str, Any]):
    with pytest.raises(UserError, match=next(iter(bad))) as caught:
        from_dict({"method": "relora", **bad})
    assert "\n" not in str(caught.value)
