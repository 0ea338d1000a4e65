"""The laws that every method obeys, on every row of `cases.CASES`."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    TrainState,
    count,
    init,
    linen,
    load,
    make_train_step,
    merge,
    save,
    select,
    unmerge,
)
from lora_mini_jax.adapters.sites import plan_sites
from lora_mini_jax.methods import METHODS, from_dict
from lora_mini_jax.tree import flatten, over_lead
from tests.cases import (
    CASES,
    LAID_OUT,
    LAYERS,
    LAYOUTS,
    MAIN,
    THOROUGH,
    WIDTH,
    Case,
    by_name,
    cross_entropy,
    drawn,
    draws,
    randomised,
    setup,
    trained,
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
main_case = pytest.mark.parametrize("case", MAIN, ids=lambda case: case.name)
every_layout = pytest.mark.parametrize(
    ("case", "layout"), LAID_OUT, ids=[f"{case.name}-{layout}" for case, layout in LAID_OUT]
)


def close(a: Any, b: Any, tolerance: float = 2e-5) -> None:
    """Both trees agree, each leaf to a tolerance relative to its largest entry."""
    wanted = by_name(b)
    for name, x in by_name(a).items():
        y = np.asarray(wanted.pop(name))
        error, size = np.abs(np.asarray(x) - y).max(), np.abs(y).max()
        assert error <= tolerance * max(size, 1e-2), f"{name}: off by {error}, entries to {size}"
    assert not wanted


def same_bits(a: Any, b: Any) -> bool:
    left, right = by_name(a), by_name(b)
    return left.keys() == right.keys() and all(
        x.dtype == right[n].dtype and np.array_equal(x, right[n]) for n, x in left.items()
    )


def differing(a: Any, b: Any) -> set[str]:
    right = by_name(b)
    return {n for n, x in by_name(a).items() if not np.array_equal(x, right[n])}


def shifted(case: Case, kernel: Any, factors: Any) -> Any:
    """The kernel as the layer itself uses it."""
    shift = case.method.shift(factors)
    return kernel if shift is None else kernel + shift


def thin(method: Any, kernel: Any, factors: Any) -> Any:
    return method.thin(factors, *kernel.shape)


def stepped(method: Any, kernel: Any, factors: Any) -> Any:
    """What the method does of its own, after some update."""
    return method.step(jax.random.key(0), jnp.int32(3), {"x": factors}, {"x": factors})


def unmoved(case: Case, frozen: Any) -> Any:
    """The frozen leaves that are the same at every step of training."""
    moved = case.method.stored
    return {
        path: {name: leaf for name, leaf in leaves.items() if name not in moved}
        for path, leaves in frozen.items()
    }


def test_every_method_has_a_row():
    for rows in (CASES, MAIN):  # and goes through every law
        assert {type(case.method) for case in rows} == set(METHODS.values())


def test_the_small_model_has_every_kind_of_kernel():
    targets = setup("scan").targets
    assert {t.kind for t in targets} == {"linear", "embed"}
    assert any(t.batch for t in targets)
    assert {len(t.ins) for t in targets} == {len(t.outs) for t in targets} == {1, 2}
    assert all(t.stack == ("layers/" in t.path) for t in targets)


@every_case
def test_starts_as_the_unchanged_model(case: Case):
    if not case.identity_at_start:
        pytest.skip("this method does not start at the identity")
    at = setup()
    y = jax.jit(linen.adapt(at.model))(at.params, drawn(case), at.tokens)
    close(y, jax.jit(at.model.apply)({"params": at.params}, at.tokens), 1e-6)


@every_case
def test_delta_is_the_merged_kernel_less_the_kernel(case: Case):
    # Sizes that nothing divides, for methods that can have it so.
    n_in, n_out = (12, 8) if case.method.problems(13, 9) else (13, 9)
    kernel, x = draws(jnp.zeros((n_in, n_out))), draws(jnp.zeros((4, n_in)), seed=6)
    trainable, frozen = case.method.init(jax.random.key(1), kernel)
    factors = {**frozen, **draws(trainable)}
    update = case.method.merge(kernel, factors) - shifted(case, kernel, factors)
    close(case.method.delta(x, kernel, factors), x @ update)
    ids = jnp.array([[n_in - 1, 0], [3, 3]])
    close(case.method.rows(ids, kernel, factors), update[ids])
    if pair := case.method.thin(factors, n_in, n_out):
        close(pair[0] @ pair[1], case.method.merge(kernel, factors) - kernel)
    half = case.method.delta(x.astype(jnp.bfloat16), kernel, factors)
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), x @ update, 0.05)
    # Accelerators round what they multiply, unless they are told not to.
    ways = (case.method.merge, case.method.unmerge, partial(thin, case.method),
            partial(stepped, case.method))  # fmt: skip
    for dense in ways:
        text = str(jax.make_jaxpr(dense)(kernel, factors))
        assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_small_update_survives_a_narrow_dtype(case: Case):
    kernel, x = draws(jnp.zeros((12, 8))), draws(jnp.zeros((64, 12)), 1.0)
    trainable, frozen = case.method.init(jax.random.key(1), kernel)
    moved = jax.tree.map(lambda leaf, by: leaf + by, trainable, draws(trainable, 1e-3))
    factors = {**frozen, **moved}
    with jax.default_matmul_precision("highest"):
        wanted = x @ (case.method.merge(kernel, factors) - shifted(case, kernel, factors))
    found = case.method.delta(x.astype(jnp.bfloat16), kernel, factors).astype(jnp.float32)
    assert jnp.linalg.norm(found - wanted) <= 0.03 * jnp.linalg.norm(wanted)


@every_layout
def test_adapted_call_equals_merged_weights(case: Case, layout: str):
    at, adapter, apply = setup(layout), trained(case, layout), linen.adapt(setup(layout).model)
    noise = draws(jax.ShapeDtypeStruct((*at.tokens.shape, WIDTH), jnp.float32), 0.1)

    @jax.jit
    def adapted(params, frozen, trainable, noise):
        def loss(trainable, noise):
            now = replace(adapter, frozen=frozen, trainable=trainable)
            logits = apply(params, now, at.tokens, noise)
            return cross_entropy(logits, at.tokens), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, noise)

    @jax.jit
    def merged(params, frozen, trainable, noise):
        def loss(trainable, noise):
            now = replace(adapter, frozen=frozen, trainable=trainable)
            logits = at.model.apply({"params": merge(params, now)}, at.tokens, noise)
            return cross_entropy(logits, at.tokens), logits

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, noise)

    args = at.params, adapter.frozen, adapter.trainable, noise
    (a, grads_a), (b, grads_b) = adapted(*args), merged(*args)
    close(a, b)
    close(grads_a, grads_b, 1e-4)
    plain = at.model.apply({"params": at.params}, at.tokens, noise)
    assert jnp.abs(a[1] - plain).max() > 0.1  # the adapter does something


@every_layout
def test_unmerging_returns_the_kernels(case: Case, layout: str):
    at, adapter = setup(layout), trained(case, layout)
    merged = jax.jit(merge)(at.params, adapter)
    adapted = {t.path for t in at.targets}
    changed = {path for path, x in flatten(merged).items()
               if not np.array_equal(x, flatten(at.params)[path])}  # fmt: skip
    assert changed == adapted
    close(jax.jit(unmerge)(merged, adapter), at.params, 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@every_case
def test_count_is_the_documented_formula(case: Case, layout: str):
    at, wanted = setup(layout), 0
    for target in at.targets:
        matrices = int(np.prod(target.shape)) // (target.n_in * target.n_out)
        wanted += matrices * case.formula(target.n_in, target.n_out)
    adapter = jax.eval_shape(lambda p: init(p, case.method, at.targets), at.params)
    assert count(adapter) == wanted == sum(site.n_trainable for site in adapter.sites)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapter.trainable))


@main_case
def test_training_moves_every_trained_leaf_and_nothing_else(case: Case):
    at, adapter, traces = setup(), drawn(case), []
    apply, tx = linen.adapt(at.model), optax.adam(1e-2)
    base, frozen = jax.tree.map(np.array, (at.params, adapter.frozen))

    def loss_fn(params, adapter, batch, key):
        traces.append(1)
        return cross_entropy(apply(params, adapter, batch), batch)

    step: Any = make_train_step(loss_fn, tx)
    state, losses = TrainState.create(adapter, tx, 0), []
    for i in range(30):
        state, metrics = step(state, at.params, jnp.roll(at.tokens, i // 10, 0))
        losses.append(float(metrics.loss))
        if i == 1:  # at the start itself a factor beside one that is zero has no gradient
            moments = jax.device_get(state.opt_state[0].mu)
    assert losses[-1] < 0.8 * losses[0]
    step(TrainState.create(adapter, tx, 123), at.params, at.tokens)
    assert len(traces) == 1
    assert step._cache_size() == 1

    assert same_bits(base, at.params)
    assert same_bits(unmoved(case, frozen), unmoved(case, state.adapter.frozen))
    assert moments.keys() == adapter.trainable.keys()
    for site in adapter.sites:
        path, layers = site.target.path, int(np.prod(site.target.lead))
        assert not moments[path].keys() & adapter.frozen.get(path, {}).keys()
        for name, leaf in state.adapter.trainable[path].items():
            moved = np.abs(leaf - adapter.trainable[path][name]).reshape(layers, -1)
            moment = moments[path][name].reshape(layers, -1)
            assert np.isfinite(leaf).all(), name
            assert np.isfinite(moment).all(), name
            # A leaf may move without one, by its method's own step.
            assert (moment != 0).any(1).all(), f"{path} {name}: some layer has no gradient"
            assert (moved > 0).any(1).all(), f"{path} {name}: some layer does not move"


@main_case
def test_a_method_that_starts_entries_afresh_says_so(case: Case):
    kernel = jnp.zeros((13, 9) if not case.method.problems(13, 9) else (12, 8))
    trainable, frozen = case.method.init(jax.random.key(1), kernel)
    given = {"up": {**trainable, **frozen}}, {"up": trainable}
    stepped = jax.eval_shape(case.method.step, jax.random.key(2), jnp.int32(0), *given)
    assert bool(stepped.reset) == case.method.restarts


@main_case
def test_stacked_kernels_equal_a_loop_over_layers(case: Case):
    scanned, loop = setup("scan"), setup("plain")

    def layer(tree, i):
        return jax.tree.map(lambda x: x[i], tree)

    adapter = trained(case)
    leaves: dict[str, dict] = {"trainable": {}, "frozen": {}}
    params = {k: v for k, v in scanned.params.items() if k != "layers"}
    params |= {f"layers_{i}": layer(scanned.params["layers"], i) for i in range(LAYERS)}
    for group, new in leaves.items():
        for path, factors in getattr(adapter, group).items():
            if not path.startswith("layers/"):
                new[path] = factors
                continue
            for i in range(LAYERS):
                new[path.replace("layers", f"layers_{i}", 1)] = layer(factors, i)
    unstacked = replace(adapter, **leaves, sites=plan_sites(case.method, loop.targets))
    y = jax.jit(linen.adapt(loop.model))(params, unstacked, loop.tokens)
    close(y, jax.jit(linen.adapt(scanned.model))(scanned.params, adapter, scanned.tokens))


@every_case
def test_adding_targets_changes_no_other_draw(case: Case):
    at, adapter = setup(), drawn(case)
    few = init(at.params, case.method, select(at.targets, "down|embed"), 7)
    assert 0 < len(few.sites) < len(adapter.sites)
    for path in few.trainable:
        assert same_bits(few.factors()[path], adapter.factors()[path])


@every_case
def test_a_key_gives_the_same_bits_and_another_key_others(case: Case):
    at, adapter = setup(), drawn(case)
    assert same_bits(adapter, init(at.params, case.method, at.targets, jax.random.key(7)))
    other = init(at.params, case.method, at.targets, 8)
    for path, factors in adapter.factors().items():
        drawn_anew = differing(factors, other.factors()[path])
        assert bool(drawn_anew) == case.random
        for name in drawn_anew if path.startswith("layers/") else ():
            leaf = by_name(factors)[name]
            assert np.array_equal(leaf[0], leaf[1]) == case.method.shares_draw, f"{path}{name}"


@every_case
def test_json_round_trip_is_exact(case: Case):
    assert from_dict(json.loads(json.dumps(case.method.to_dict()))) == case.method


@every_case
def test_saved_and_loaded_adapter_is_the_same_to_the_bit(case: Case, tmp_path):
    at, adapter = setup(), trained(case)
    save(tmp_path / "one", adapter, at.params)
    loaded = load(tmp_path / "one", at.params)
    assert loaded.sites == adapter.sites
    assert same_bits(loaded, adapter)


@pytest.mark.parametrize(
    "case", [case for case in MAIN if case.name in THOROUGH], ids=lambda case: case.name
)
def test_works_under_the_users_jit_grad_and_vmap(case: Case):
    at, apply = setup(), linen.adapt(setup().model)
    adapters = [randomised(drawn(case), seed=seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[a.trainable for a in adapters])

    def loss(trainable, tokens):
        logits = apply(at.params, adapters[0].with_trainable(trainable), tokens)
        return cross_entropy(logits, tokens)

    one = jax.jit(jax.value_and_grad(loss))(adapters[1].trainable, at.tokens)
    both = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(0, None)))(stacked, at.tokens)
    close(jax.tree.map(lambda x: x[1], both), one)
    rows = jax.jit(jax.vmap(loss, in_axes=(None, 0)))(adapters[1].trainable, at.tokens[:, None])
    close(rows.mean(), one[0])


@every_case
def test_a_call_is_exported_with_any_number_of_rows(case: Case):
    kernel = jax.random.normal(jax.random.key(1), (16, 16))
    method, lead = case.method, jax.random.key(0)
    factors = {name: leaf for group in method.init(lead, kernel) for name, leaf in group.items()}
    factors = method.relate({"up/kernel": factors}, ())["up/kernel"]
    call = jax.jit(lambda x: method.delta(x, kernel, factors))
    rows = jax.ShapeDtypeStruct(jax.export.symbolic_shape("rows, 16"), jnp.float32)
    exported = jax.export.export(call)(rows)
    assert call(jnp.ones((0, 16))).shape == (0, 16)
    for n in (1, 5):
        x = jnp.ones((n, 16))
        close(exported.call(x), call(x))


@every_case
def test_bfloat16_kernels_are_merged_in_float32_then_cast(case: Case):
    """Merged in bfloat16, about a quarter of the entries would be rounded another way."""
    at = setup()
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), at.params)
    adapter = randomised(init(small, case.method, at.targets, 7), scale=0.5)
    merged = flatten(jax.jit(merge)(small, adapter))

    @partial(jax.jit, static_argnums=0)
    def in_float32(target: Any, kernel: Any, factors: Any) -> Any:
        eye = jnp.broadcast_to(jnp.eye(target.n_in), (*target.lead, target.n_in, target.n_in))
        delta = over_lead(case.method.delta, len(target.lead))
        return shifted(case, kernel, factors) + delta(eye, kernel, factors)

    for site in adapter.sites:
        target, path = site.target, site.target.path
        kernel = target.matrix(flatten(small)[path]).astype(jnp.float32)
        exact = in_float32(target, kernel, adapter.factors()[path]).astype(jnp.bfloat16)
        assert merged[path].dtype == jnp.bfloat16
        assert np.mean(target.matrix(merged[path]) != exact) < 0.02, path
