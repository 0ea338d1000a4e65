"""Only the trained leaves are trained: the masked optimiser, and the step around it."""

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
    Target,
    TrainState,
    UserError,
    freeze,
    init,
    join,
    linen,
    make_train_step,
    merge,
    split,
    trainable_mask,
)
from lora_mini_jax.methods import ReLoRA, SwitchLoRA
from lora_mini_jax.training.optim import forget, scale_by_element_adam, scale_leaves
from tests.cases import by_name, draws, random_params, randomised

MODEL = nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(3)])
X, Y = draws(jnp.zeros((8, 5)), 1.0, 1), draws(jnp.zeros((8, 3)), 1.0, 2)
PARAMS = random_params(MODEL, X)
ADAPTER = randomised(init(PARAMS, LoRAMini(rank=2, a=3, b=3), linen.targets(MODEL, PARAMS, X)))
TREE = join(PARAMS, ADAPTER)
APPLY = linen.adapt(MODEL)


def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
    x, y = batch
    return ((APPLY(params, adapter, x) - y) ** 2).mean()


@jax.jit
def tree_grads(tree: Any) -> Any:
    """Gradients of the loss in every leaf of the joined tree."""
    return jax.grad(lambda tree: loss_fn(*split(tree, ADAPTER), (X, Y), None))(tree)


def train_tree(tx: Any, steps: int) -> tuple[Any, Any]:
    tree, state = TREE, tx.init(TREE)
    for _ in range(steps):
        updates, state = tx.update(tree_grads(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def changed(before: Any, after: Any) -> set[str]:
    new = by_name(after)
    return {n for n, x in by_name(before).items() if not np.array_equal(x, new[n])}


TRAINED = {name for name in by_name(TREE) if "'trainable'" in name}


def test_the_mask_is_true_on_the_trained_leaves_alone():
    mask = by_name(trainable_mask(TREE))
    assert {name for name, flag in mask.items() if flag} == TRAINED
    assert len(TRAINED) == 4


def test_a_tree_without_an_adapter_raises():
    with pytest.raises(UserError, match="join"):
        trainable_mask(PARAMS)
    with pytest.raises(UserError, match="join"):
        freeze(optax.sgd(0.1)).init(PARAMS)


def test_join_and_split_are_inverse_whatever_modules_are_called():
    for name in ("up", "image_adapter", "kernel_adapter"):
        params = {name: {"trainable": {"up": PARAMS["layers_0"]}}}
        target = Target(f"{name}/trainable/up/kernel", (5, 6))
        adapter = init(params, LoRAMini(rank=2, a=3, b=3), [target])
        back, again = split(join(params, adapter), adapter)
        mask = split(trainable_mask(join(params, adapter)), adapter)
        assert all(jax.tree.leaves(mask[1].trainable)), name
        assert not any(jax.tree.leaves((mask[0], mask[1].frozen))), name
        assert jax.tree.structure(back) == jax.tree.structure(params), name
        assert jax.tree.structure(again) == jax.tree.structure(adapter), name
        assert not changed((params, adapter), (back, again))


def test_frozen_leaves_stay_bit_identical_and_have_no_state():
    tree, state = train_tree(freeze(optax.adamw(0.1, weight_decay=0.1)), 3)
    assert changed(TREE, tree) == TRAINED
    moments = sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)
    trained = [x.shape for name, x in by_name(TREE).items() if name in TRAINED]
    assert moments == sorted(2 * trained)


def test_optax_masked_alone_would_have_changed_the_frozen_leaves():
    tree, _ = train_tree(optax.masked(optax.sgd(0.1), trainable_mask), 1)
    assert changed(TREE, tree) > TRAINED


def test_clipping_sees_the_trained_leaves_alone():
    grads = by_name(tree_grads(TREE))
    ours = float(optax.global_norm([grads[name] for name in TRAINED]))
    assert ours < 0.9 * float(optax.global_norm(list(grads.values())))
    limit = 0.5 * ours
    tree, _ = train_tree(freeze(optax.chain(optax.clip_by_global_norm(limit), optax.sgd(1.0))), 1)
    moved = [by_name(tree)[name] - by_name(TREE)[name] for name in TRAINED]
    np.testing.assert_allclose(optax.global_norm(moved), limit, rtol=1e-4)


def test_training_the_joined_tree_equals_training_the_state():
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01))
    tree, _ = train_tree(freeze(tx), 3)
    step, state = make_train_step(loss_fn, tx), TrainState.create(ADAPTER, tx)
    for _ in range(3):
        state, _ = step(state, PARAMS, (X, Y))
    params, adapter = split(tree, ADAPTER)
    assert not changed(PARAMS, params)
    for name, leaf in by_name(adapter.trainable).items():
        np.testing.assert_allclose(leaf, by_name(state.adapter.trainable)[name], atol=2e-6)


def test_a_mask_of_booleans_will_do():
    tree, _ = train_tree(freeze(optax.sgd(0.1), trainable_mask(TREE)), 1)
    assert changed(TREE, tree) == TRAINED


@pytest.fixture(scope="module")
def noisy() -> tuple[Any, Any]:
    """(step, tx) whose loss has noise of its own and reports it as ``aux``."""

    def noisy_loss(params, adapter, batch, key):
        noise = jax.random.normal(key, ())
        return loss_fn(params, adapter, batch, key) * (1 + 0.1 * noise), {"noise": noise}

    tx = optax.adam(0.01)
    return make_train_step(noisy_loss, tx, has_aux=True), tx


def run(noisy: Any, seed: Any, batches: list[Any]) -> tuple[Any, list[Any]]:
    step, tx = noisy
    state, seen = TrainState.create(ADAPTER, tx, seed), []
    for batch in batches:
        state, metrics = step(state, PARAMS, batch)
        seen.append(metrics)
    return state, seen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_changes_nothing_but_the_count(noisy, bad: float):
    before, _ = run(noisy, 0, [(X, Y)])
    after, metrics = run(noisy, 0, [(X, Y), (X, Y * bad)])
    assert not np.isfinite(metrics[-1].loss)
    assert not changed((before.adapter, before.opt_state), (after.adapter, after.opt_state))
    assert (int(before.step), int(after.step)) == (1, 2)
    healed, metrics = run(noisy, 0, [(X, Y), (X, Y * bad), (X, Y)])
    assert np.isfinite(metrics[-1].loss)
    assert changed(after.adapter, healed.adapter)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_alone_that_is_not_finite_changes_nothing(what: str):
    def bad(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        loss = loss_fn(params, adapter, batch, key)
        return loss + (jnp.nan if what == "loss" else jnp.sqrt(jnp.abs(0 * loss)))

    tx = optax.sgd(0.1)
    state, metrics = make_train_step(bad, tx)(TrainState.create(ADAPTER, tx), PARAMS, (X, Y))
    assert np.isfinite(metrics.loss) == (what == "gradient")
    assert np.isfinite(metrics.grad_norm) == (what == "loss")
    assert not changed(ADAPTER, state.adapter)


def test_metrics_are_the_loss_the_gradient_norm_and_what_the_loss_adds(noisy):
    _, (metrics,) = run(noisy, 0, [(X, Y)])
    factor = 1 + 0.1 * metrics.aux["noise"]
    grads = by_name(tree_grads(TREE))
    plain = jnp.mean((MODEL.apply({"params": merge(PARAMS, ADAPTER)}, X) - Y) ** 2)
    np.testing.assert_allclose(metrics.loss, factor * plain, rtol=1e-5)
    norm = optax.global_norm([grads[name] for name in TRAINED])
    np.testing.assert_allclose(metrics.grad_norm, abs(factor) * norm, rtol=1e-4)


def test_a_seed_gives_the_same_run_and_each_step_its_own_randomness(noisy):
    one, first = run(noisy, 4, [(X, Y)] * 3)
    two, again = run(noisy, jax.random.key(4), [(X, Y)] * 3)
    _, other = run(noisy, 5, [(X, Y)] * 3)
    assert not changed((one, first), (two, again))
    # A run that is taken up by a later version sees the noise that it would have seen.
    for step, metrics in enumerate(first):
        key, _ = jax.random.split(jax.random.fold_in(jax.random.key(4), step))
        np.testing.assert_allclose(metrics.aux["noise"], jax.random.normal(key, ()), rtol=1e-6)
    draws_seen = [float(m.aux["noise"]) for m in (*first, *other)]
    assert len(set(draws_seen)) == 6


def test_the_step_takes_no_array_of_the_callers(noisy):
    """The state is donated: what was given to make it must not be gone with it."""
    key = jax.random.key(1)
    step, tx = noisy
    state = TrainState.create(ADAPTER, tx, key)
    step(state, PARAMS, (X, Y))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.adapter.trainable))
    assert jax.random.normal(key, ()).shape == ()
    assert not any(x.is_deleted() for x in jax.tree.leaves((ADAPTER, PARAMS)))


def only_a(tree: Any) -> Any:
    return {path: {name: name == "A" for name in leaves} for path, leaves in tree.items()}


OPTIMISERS: dict[str, Any] = {
    "one for each leaf": optax.partition(
        {"A": optax.adam(1e-2), "B": optax.chain(scale_by_element_adam(), optax.scale(-1e-2))},
        lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, tree),
    ),
    "one for each kernel, named by hand": optax.partition(
        {"layers_0": optax.adam(1e-2), "layers_2": optax.adam(1e-3)},
        lambda tree: {path: path.partition("/")[0] for path in tree},
    ),
    "named beforehand": optax.partition(
        {"some": optax.adam(1e-2)}, {f"layers_{i}/kernel": "some" for i in (0, 2)}
    ),
    "decays some": optax.adamw(1e-2, mask=only_a),
    "keeps numbers by row and column": optax.sm3(1e-2),
    "keeps where it started": optax.contrib.prodigy(1e-2),
    "asks for the loss": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
}


def test_no_array_is_in_a_state_twice_for_each_is_given_away_once():
    def init(params: Any) -> Any:
        zeros = optax.tree.zeros_like(params)
        return zeros, zeros, params

    twice = optax.GradientTransformation(init, optax.identity().update)
    leaves = jax.tree.leaves(TrainState.create(ADAPTER, twice))
    assert len(set(map(id, leaves))) == len(leaves)


AFRESH = LoRA(rank=2), ReLoRA(rank=2, reset_every=2), SwitchLoRA(rank=2, interval0=1.0)


@pytest.mark.parametrize("tx", OPTIMISERS.values(), ids=list(OPTIMISERS))
@pytest.mark.parametrize("method", AFRESH, ids=lambda method: method.name)
def test_any_optimiser_goes_with_methods_that_start_afresh(method: Any, tx: Any):
    adapter = init(PARAMS, method, linen.targets(MODEL, PARAMS, X))
    step, state = make_train_step(loss_fn, tx), TrainState.create(adapter, tx)
    for _ in range(3):
        state, metrics = step(state, PARAMS, (X, Y))
    assert np.isfinite(metrics.loss)
    assert changed(adapter.trainable, state.adapter.trainable)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(adapter))


def test_a_partitioned_optimiser_forgets_as_an_undivided_one():
    label = lambda tree: {path: path.partition("/")[0] for path in tree}  # noqa: E731
    whole: Any = optax.adam(1e-2)
    apart: Any = optax.partition(dict.fromkeys(("layers_0", "layers_2"), whole), label)
    trained = []
    for tx in (whole, apart):
        step = make_train_step(loss_fn, tx)
        state = TrainState.create(init(PARAMS, AFRESH[1], linen.targets(MODEL, PARAMS, X)), tx)
        for _ in range(5):
            state, _ = step(state, PARAMS, (X, Y))
        trained.append(state.adapter.trainable)
    assert not changed(*trained)


@pytest.mark.parametrize("method", AFRESH, ids=lambda method: method.name)
def test_no_leaf_changes_its_dtype_with_64_bits(method: Any):
    with jax.enable_x64(True):
        wide, x, y = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, X, Y))
        tx = optax.adam(1e-2)
        state = TrainState.create(init(wide, method, linen.targets(MODEL, wide, x)), tx)
        before, step = jax.tree.map(lambda leaf: leaf.dtype, state), make_train_step(loss_fn, tx)
        for _ in range(2):
            state, _ = step(state, wide, (x, y))
        assert jax.tree.map(lambda leaf: leaf.dtype, state) == before


@pytest.mark.parametrize("parts", [1, 2])
def test_trained_leaves_may_be_in_bfloat16(parts: int):
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), ADAPTER.trainable)
    tx = optax.adam(1e-2)
    state = TrainState.create(ADAPTER.with_trainable(small), tx)
    before, step = (
        jax.tree.map(lambda leaf: leaf.dtype, state),
        make_train_step(loss_fn, tx, parts=parts),
    )
    state, _ = step(state, PARAMS, (X, Y))
    assert jax.tree.map(lambda leaf: leaf.dtype, state) == before
    assert changed(small, state.adapter.trainable)


@pytest.mark.parametrize(("has_aux", "gives", "said"), [
    (False, lambda loss: loss[None], r"an array \(1,\): return one number"),
    (False, lambda loss: (loss, 1.0), "several values: .* has_aux=True"),
    (True, lambda loss: loss, "no pair"),
])  # fmt: skip
def test_a_loss_that_is_no_number_is_one_line(has_aux: bool, gives: Any, said: str):
    tx = optax.sgd(0.1)
    step = make_train_step(lambda *args: gives(loss_fn(*args)), tx, has_aux=has_aux)
    with pytest.raises(UserError, match=said):
        step(TrainState.create(ADAPTER, tx), PARAMS, (X, Y))


def tree(**leaves: Any) -> Any:
    """Leaves of two kernels."""
    return {path: {"A": jnp.asarray(leaf, jnp.float32)} for path, leaf in leaves.items()}


def test_element_adam_is_adam_as_long_as_nothing_starts_afresh():
    rng = np.random.default_rng(0)
    params = tree(up=rng.normal(size=(3, 2)), down=rng.normal(size=(2,)))
    grads = [tree(up=rng.normal(size=(3, 2)), down=rng.normal(size=(2,))) for _ in range(5)]
    theirs = optax.scale_by_adam()
    for ours in (scale_by_element_adam(), scale_by_element_adam(kernels={"up"})):
        states: Any = (ours.init(params), theirs.init(params))
        for g in grads:
            (a, mine), (b, other) = ours.update(g, states[0]), theirs.update(g, states[1])
            states = mine, other
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)
    some: Any = scale_by_element_adam(kernels={"up"}).init(params)
    assert some.count["down"]["A"].shape == ()


def test_forgotten_entries_take_the_first_step_of_a_new_run_and_held_ones_wait():
    """By Adam's formula, entry by entry; one counter for all would give 1.35 times that."""
    tx: Any = optax.chain(scale_by_element_adam(kernels={"up"}), optax.scale(1.0))
    params = tree(up=np.zeros((2, 2)), down=np.zeros(3))
    state, g = tx.init(params), tree(up=np.full((2, 2), 0.5), down=np.full(3, 0.5))
    update = jax.jit(tx.update)
    updates, _ = tx.update(g, state, hold=jax.tree.map(lambda x: x > 0, g))
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates))  # held from the start
    for _ in range(200):
        _, state = update(g, state)
    afresh = {"up": {"A": jnp.array([[True, False], [False, False]])},
              "down": {"A": jnp.zeros(3, bool)}}  # fmt: skip
    state = forget(state, afresh)
    held = {"up": {"A": jnp.array([[True, False], [True, False]])},
            "down": {"A": jnp.zeros(3, bool)}}  # fmt: skip
    before = state
    _, state = tx.update(g, state, hold=held)
    np.testing.assert_array_equal(state[0].count["up"]["A"], [[0, 201], [200, 201]])
    assert state[0].count["down"]["A"] == 201
    for name in ("mu", "nu"):
        old, new = (getattr(s[0], name)["up"]["A"] for s in (before, state))
        np.testing.assert_array_equal(np.asarray(old)[:, 0], np.asarray(new)[:, 0])
    updates, _ = tx.update(g, state)
    np.testing.assert_allclose(updates["up"]["A"][0, 0], 1.0, rtol=1e-5)
    late: Any = scale_by_element_adam(count_held=True)
    waited = late.init(g)
    for _ in range(5):
        _, waited = late.update(g, waited, hold=jax.tree.map(lambda x: jnp.ones(x.shape, bool), g))
    updates, _ = late.update(g, waited)
    first = 0.1 / (1 - 0.9**6) / (0.001 / (1 - 0.999**6)) ** 0.5
    np.testing.assert_allclose(updates["up"]["A"], first, rtol=1e-4)
    assert 0.5 < first < 0.54


def test_scale_leaves_is_lora_plus_and_an_unknown_name_is_an_error():
    params = {"up": {"A": jnp.ones(2), "B": jnp.ones(2)}}
    tx: Any = optax.chain(optax.scale(-0.1), scale_leaves({"B": 16.0}))
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_allclose(updates["up"]["A"], -0.1)
    np.testing.assert_allclose(updates["up"]["B"], -1.6)
    wrong = scale_leaves({"C": 2.0})
    with pytest.raises(UserError, match="no trained leaf is called C: there are A, B"):
        wrong.update(params, wrong.init(params))
