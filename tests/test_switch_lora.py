"""SwitchLoRA against a simulation in NumPy, one slot at a time; and what it promises of itself."""

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import Target, TrainState, UserError, init, linen, make_train_step
from lora_mini_jax.adapters.sites import plan_sites
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.methods import SwitchLoRA, from_dict
from lora_mini_jax.training.optim import scale_by_element_adam
from lora_mini_jax.tree import over_lead
from tests.cases import by_name, draws

N_IN, N_OUT, LAYERS, RATE = 12, 9, 2, 1e-2
MODEL = nn.Einsum((LAYERS, N_IN, N_OUT), "btn,bnk->btk", use_bias=False)
PARAMS = {"kernel": draws(jnp.zeros((LAYERS, N_IN, N_OUT)), 0.3, 1)}
RNG = np.random.default_rng(2)
X, Y = RNG.normal(size=(LAYERS, 40, N_IN)), RNG.normal(size=(LAYERS, 40, N_OUT))
TARGETS = linen.targets(MODEL, PARAMS, X)
ADAM = optax.chain(scale_by_element_adam(), optax.scale_by_learning_rate(RATE))
OTHER = {"A": "B", "B": "A"}
BUSY = SwitchLoRA(rank=4, interval0=1.2, ratio=1.0)


def batch(t: int) -> tuple[np.ndarray, np.ndarray]:
    rows = (np.arange(16) + 5 * t) % X.shape[1]
    return X[:, rows].astype(np.float32), Y[:, rows].astype(np.float32)


def start(method: SwitchLoRA, tx: Any = ADAM) -> TrainState:
    return TrainState.create(init(PARAMS, method, TARGETS, 7), tx, 3)


def trainer(tx: Any = ADAM, traces: list[int] | None = None) -> Any:
    apply = linen.adapt(MODEL)

    def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        if traces is not None:
            traces.append(1)
        x, y = batch
        return ((apply(params, adapter, x) - y) ** 2).mean()

    return make_train_step(loss_fn, tx)


def leaves(state: TrainState) -> dict[str, np.ndarray]:
    """The kernel's leaves, copied, as the next step takes the buffers."""
    factors = {**state.adapter.frozen["kernel"], **state.adapter.trainable["kernel"]}
    return {name: np.array(leaf) for name, leaf in factors.items()}


class Simulation:
    """One matrix in float64. Slots, candidates and Adam's entries are rows of ``A.T`` and ``B``."""

    def __init__(self, method: SwitchLoRA, kernel: Any, first: dict[str, np.ndarray]):
        r = method.rank
        self.method, self.kernel = method, np.asarray(kernel, float) + first["dense"]
        self.slots = {"A": first["A"].T.astype(float), "B": first["B"].astype(float)}
        self.turn = {"A": 0, "B": r // 2}
        self.mu, self.nu, self.count = (
            {side: np.zeros_like(slots) for side, slots in self.slots.items()} for _ in range(3)
        )
        self.frozen = {side: np.zeros(r, int) for side in "AB"}
        self.candidates, self.place, self.next = {}, {}, {"A": r, "B": r}
        for side, slots in self.slots.items():
            order = [(self.turn[side] + j) % r for j in range(r)]
            self.candidates[side] = np.concatenate([slots[order], first[f"{side}_pool"]])
            self.place[side] = {slot: place for place, slot in enumerate(order)}

    def update(self, x: np.ndarray, y: np.ndarray) -> None:
        """Adam, in the entries of slots that are not frozen."""
        s, (a, b) = 1 / self.method.rank, self.slots.values()
        error = x @ (self.kernel + s * a.T @ b) - y
        dense = 2 * x.T @ error / (LAYERS * error.size)
        for side, grads in {"A": s * b @ dense.T, "B": s * a @ dense}.items():
            for slot in range(self.method.rank):
                if self.frozen[side][slot]:
                    continue
                g, t = grads[slot], self.count[side]
                t[slot] += 1
                self.mu[side][slot] = mu = 0.9 * self.mu[side][slot] + 0.1 * g
                self.nu[side][slot] = nu = 0.999 * self.nu[side][slot] + 0.001 * g**2
                mean, square = mu / (1 - 0.9 ** t[slot]), nu / (1 - 0.999 ** t[slot])
                self.slots[side][slot] -= RATE * mean / (np.sqrt(square) + 1e-8)

    def switch(self, t: int, draw: float) -> None:
        method, r = self.method, self.method.rank
        interval = method.interval0 / 0.3 ** ((t + 1) / (method.ratio * method.total_steps))
        whole, fraction = divmod(r / interval, 1)
        wanted = whole + (draw >= 1 - fraction)
        for frozen in self.frozen.values():
            frozen[frozen > 0] -= 1
        n, most = 0, min(wanted, r // 2, len(self.candidates["A"]) - r)
        while n < most and not any(self.frozen[s][(self.turn[s] + n) % r] for s in "AB"):
            n += 1
        for side in "AB":
            for _ in range(n):
                self.switch_one(side, OTHER[side])

    def switch_one(self, side: str, other: str) -> None:
        slot, new = self.turn[side], self.next[side]
        assert not self.frozen[side][slot]
        assert new not in self.place[side].values()  # no candidate is in two slots
        before, after = self.slots[side][slot].copy(), self.candidates[side][new].copy()
        pair = (before - after, self.slots[other][slot])
        self.kernel += np.outer(*(pair if side == "A" else pair[::-1])) / self.method.rank
        self.candidates[side][self.place[side][slot]] = before
        self.slots[side][slot], self.place[side][slot] = after, new
        self.next[side] = (new + 1) % len(self.candidates[side])
        self.turn[side] = (slot + 1) % self.method.rank
        self.frozen[other][slot] = self.method.freeze_steps
        for state in (self.mu, self.nu, self.count):
            state[other][slot] = 0

    def queue(self, side: str) -> np.ndarray:
        """The candidates that no slot holds, the next one first."""
        pool = self.candidates[side]
        return np.roll(pool, -self.next[side], axis=0)[: len(pool) - self.method.rank]


@pytest.mark.parametrize(
    "method",
    [
        SwitchLoRA(rank=4),
        BUSY,
        SwitchLoRA(rank=6, interval0=5.0, ratio=0.5, total_steps=300, freeze_steps=2),
        SwitchLoRA(rank=7, interval0=2.0, ratio=2.0, total_steps=200, freeze_steps=1),
        SwitchLoRA(rank=5, interval0=1.0, freeze_steps=2),
    ],
    ids=["defaults", "busy", "moderate", "odd with few candidates", "odd and busy"],
)
def test_200_steps_are_those_of_the_simulation(method: SwitchLoRA):
    traces: list[int] = []
    step, state = trainer(traces=traces), start(method)
    first = leaves(state)
    simulated = [
        Simulation(method, PARAMS["kernel"][i], {name: leaf[i] for name, leaf in first.items()})
        for i in range(LAYERS)
    ]
    for t in range(200):
        key = jax.random.split(jax.random.fold_in(jax.random.key(3), t))[1]
        own = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(b"kernel")), (LAYERS,))
        x, y = batch(t)
        state, _ = step(state, PARAMS, (x, y))
        now, adam = leaves(state), jax.tree.map(np.array, state.opt_state[0])
        for i, wanted in enumerate(simulated):
            wanted.update(x[i].astype(float), y[i].astype(float))
            wanted.switch(t, float(own[i]))
            agree(method, {name: leaf[i] for name, leaf in now.items()}, wanted, i)
            for side, axes in {"A": (1, 0), "B": (0, 1)}.items():
                got = [tree["kernel"][side][i].transpose(axes) for tree in adam]
                np.testing.assert_array_equal(got[0], wanted.count[side])
                np.testing.assert_allclose(got[1], wanted.mu[side], atol=2e-6)
                np.testing.assert_allclose(got[2], wanted.nu[side], atol=2e-8)
    assert (now["switched"] >= 4).all()
    assert len(traces) == step._cache_size() == 1


def agree(method: SwitchLoRA, now: dict[str, np.ndarray], wanted: Simulation, i: int) -> None:
    """One matrix is as simulated, slot for slot and queue for queue."""
    np.testing.assert_allclose(now["A"].T, wanted.slots["A"], atol=2e-4)
    np.testing.assert_allclose(now["B"], wanted.slots["B"], atol=2e-4)
    np.testing.assert_allclose(PARAMS["kernel"][i] + now["dense"], wanted.kernel, atol=2e-4)
    for side in "AB":
        np.testing.assert_array_equal(now[f"{side}_held"], wanted.frozen[side])
        queue = np.roll(now[f"{side}_pool"], -now["switched"], axis=0)
        np.testing.assert_allclose(queue, wanted.queue(side), atol=2e-4)
        first = method.rank // 2 if side == "B" else 0
        assert (first + now["switched"]) % method.rank == wanted.turn[side]


@pytest.mark.parametrize("shape", [(12, 9), (9, 30), (3, 20, 16)])
def test_a_switch_changes_slots_but_not_the_function(shape: tuple[int, ...]):
    method = SwitchLoRA(rank=6, interval0=2.0, ratio=1.0, freeze_steps=2)
    target = Target("up", shape, stack=len(shape) - 2)
    kernel = draws(jnp.zeros(shape))
    adapter = init({"up": kernel}, method, [target], 5)
    factors = {**adapter.frozen["up"], **draws(adapter.trainable["up"], 0.5)}
    step, merge = jax.jit(method.step), jax.jit(over_lead(method.merge, target.stack))
    before, total = merge(kernel, factors), 0
    for t in range(40):
        stepped = step(jax.random.key(t), jnp.int32(t), {"up": factors}, {})
        after = factors | stepped.trainable["up"] | stepped.frozen["up"]
        n = after["switched"] - factors["switched"]
        forgotten = stepped.reset["up"]
        for side, slot_axis in {"A": -1, "B": -2}.items():
            changed = (after[side] != factors[side]).any(axis=-3 - slot_axis)
            assert np.array_equal(changed.sum(-1), n)
            assert np.array_equal(changed, forgotten[OTHER[side]].reshape(changed.shape))
            assert ((after[f"{OTHER[side]}_held"] == method.freeze_steps) == changed).all()
        factors, total = after, total + n
        merged = merge(kernel, factors)
        np.testing.assert_allclose(merged, before, rtol=0, atol=1e-6)
        before = merged
    assert (total > 2 * method.rank).all()


def test_the_number_of_switches_is_as_scheduled():
    matrices, steps = 200, 300
    method = SwitchLoRA(rank=16, interval0=10.0, ratio=0.4, total_steps=steps, freeze_steps=1)
    kernels = {name: jnp.zeros((matrices // 2, 21, 20)) for name in ("up", "down")}
    adapter = init(kernels, method, [Target(name, k.shape, stack=1) for name, k in kernels.items()])
    first = {name: {**adapter.frozen[name], **adapter.trainable[name]} for name in kernels}

    @jax.jit
    def switched(kernels: Any) -> Any:
        def body(kernels: Any, t: jax.Array) -> Any:
            stepped = method.step(jax.random.fold_in(jax.random.key(2), t), t, kernels, {})
            trees = zip(kernels, *(tree.values() for tree in stepped[:2]), strict=True)
            kernels = {n: kernels[n] | trained | frozen for n, trained, frozen in trees}
            return kernels, [factors["switched"] for factors in kernels.values()]

        return jnp.concatenate(jax.lax.scan(body, kernels, jnp.arange(steps))[1], axis=1)

    counts = np.array(switched(first))
    rates = 16 / (10 / 0.3 ** ((np.arange(steps) + 1) / (0.4 * steps)))
    sigma = np.sqrt(np.cumsum((rates % 1) * (1 - rates % 1)) / matrices)
    assert (np.abs(counts.mean(1) - np.cumsum(rates)) < 4 * sigma + 1e-3).all()
    # Each matrix of each kernel rounds for itself: a shared draw would have a spread of nothing.
    assert (counts[:, : matrices // 2] != counts[:, matrices // 2 :]).any()
    assert abs(counts[-1].std() / (sigma[-1] * matrices**0.5) - 1) < 0.2


def test_a_run_goes_on_from_the_middle_of_a_freeze(tmp_path):
    step, state, t = trainer(), start(BUSY), 0
    while t < 12 or leaves(state)["A_held"].max() < 2:
        state, _ = step(state, PARAMS, batch(t))
        t += 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    with Checkpoints(tmp_path) as checkpoints:
        fresh = start(BUSY)
        restored: Any = checkpoints.restore(fresh)
    assert leaves(restored)["switched"].min() > 0
    for later in range(t, t + 10):
        state, _ = step(state, PARAMS, batch(later))
        restored, _ = step(restored, PARAMS, batch(later))
    one, two = by_name(state), by_name(restored)
    assert leaves(state)["switched"].min() > leaves(fresh)["switched"].max()
    assert all(np.array_equal(leaf, two[name]) for name, leaf in one.items())


def test_held_slots_stand_still_under_weight_decay():
    decay = optax.add_decayed_weights(0.3)
    tx = optax.chain(scale_by_element_adam(), decay, optax.scale_by_learning_rate(RATE))
    step, state, seen = trainer(tx), start(BUSY, tx), 0
    for t in range(60):
        before, adam = leaves(state), jax.tree.map(np.array, state.opt_state[0])
        state, _ = step(state, PARAMS, batch(t))
        after, adam_after = leaves(state), state.opt_state[0]
        for i in range(LAYERS):
            for side, first in {"A": 0, "B": 2}.items():
                turns = range(before["switched"][i], after["switched"][i])
                switched = [(first + turn) % 4 for turn in turns]
                for slot in set(range(4)) - set(switched):
                    place = (i, slice(None), slot) if side == "A" else (i, slot)
                    held = before[f"{side}_held"][i, slot] > 0
                    seen += held
                    moved = before[side][place] != after[side][place]
                    assert moved.any() != held
                    if held:
                        for old, new in zip(adam, adam_after, strict=True):
                            assert not (old["kernel"][side] != new["kernel"][side])[place].any()
    assert seen > 100


def test_candidates_start_uniform_with_the_paper_s_deviations():
    n_in, n_out, r = 160, 90, 16
    kernel = draws(jnp.zeros((n_in, n_out)))
    trainable, frozen = SwitchLoRA(rank=r).init(jax.random.key(0), kernel)
    a = np.concatenate([trainable["A"].T, frozen["A_pool"]])
    b = np.concatenate([trainable["B"], frozen["B_pool"]])
    assert (a.shape, b.shape) == ((90, n_in), (90, n_out))
    gain = 3**-0.5
    std_a = (n_out**0.5 * r / n_in**1.5) ** 0.25 * gain**0.5
    std_b = (r / (n_in * n_out) ** 0.5) ** 0.25 * gain**0.5
    for values, std in ((a, std_a), (b, std_b), (a[:r], std_a), (b[:r], std_b)):
        assert abs(values.mean()) < 5 * std / values.size**0.5
        np.testing.assert_allclose(values.std(), std, rtol=3 / values.size**0.5)
        assert 0.98 * 3**0.5 * std < np.abs(values).max() <= 3**0.5 * std * (1 + 1e-6)
    assert abs(np.corrcoef(a[:, :n_out].ravel(), b.ravel())[0, 1]) < 0.05
    np.testing.assert_allclose(frozen["dense"], -(a[:r].T @ b[:r]) / r, atol=1e-6)


def test_a_saved_adapter_keeps_what_its_function_needs():
    method = SwitchLoRA(rank=4)
    frozen = init(PARAMS, method, TARGETS).frozen["kernel"]
    assert method.stored == set(frozen)
    assert method.stored - method.scratch == {"dense"}


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_rank_that_leaves_nothing_to_switch_to_is_refused_with_the_kernel(shape: Any):
    target = Target("mlp/up/kernel", shape)
    assert plan_sites(SwitchLoRA(rank=7), [target])
    for rank in (8, 9):
        with pytest.raises(UserError, match=rf"mlp/up/kernel .*rank {rank} .*min\(in, out\) = 8"):
            plan_sites(SwitchLoRA(rank=rank), [target])


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 1}, {"rank": 2.0}, {"rank": True}, {"interval0": 0.9}, {"interval0": -1.0},
        {"interval0": float("inf")}, {"ratio": 0}, {"ratio": float("nan")}, {"ratio": "x"},
        {"total_steps": 0}, {"total_steps": 10.5}, {"freeze_steps": 0}, {"freeze_steps": 1.5},
        {"alpha": 16.0}, {"dropout": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_setting_is_refused_in_one_line_that_names_it(bad: dict[str, Any]):
    with pytest.raises(UserError, match=next(iter(bad))) as caught:
        from_dict({"method": "switchlora", **bad})
    assert "\n" not in str(caught.value)
