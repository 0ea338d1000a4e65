"""DiffoRA's search, the choice that follows, its controls, and the run that does it all."""

import dataclasses
import json
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_mini_jax.runs.finetune as finetune_module
import lora_mini_jax.runs.search as search_run
from experiments.controls import at_budget, by_gradient_norm, random_choice
from lora_mini_jax import (
    LoRA,
    Target,
    TrainState,
    UserError,
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
from lora_mini_jax.data import Batches, Packed
from lora_mini_jax.methods import DiffoRA, MiSS, VeRA, from_dict
from lora_mini_jax.models import load as load_model
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.runs.folder import RunFolder
from lora_mini_jax.runs.meter import Diverged
from lora_mini_jax.search.choice import common_method, discretise, openings
from lora_mini_jax.search.search import halves, make_search_step, search_state
from lora_mini_jax.sharding import make_mesh
from lora_mini_jax.tree import flatten, parameters, unflatten
from tests.cases import by_name, draws, randomised, setup
from tests.runs import options, write_model

INNER = LoRA(rank=2, alpha=4.0)
METHOD = DiffoRA(INNER)


def rows(n: int) -> Batches:
    """Rows that can be told apart by their tokens."""
    tokens = np.arange(3 * n, dtype=np.int32).reshape(n, 3) + 1
    ones = np.ones_like(tokens)
    return Batches(Packed(tokens, ones, ones, ones.astype(bool)), batch_size=2, seed=0)


def same_bits(a: Any, b: Any) -> bool:
    right = by_name(b)
    return all(np.array_equal(x, right[name]) for name, x in by_name(a).items())


@pytest.mark.parametrize("n", [2, 3, 11, 20])
def test_the_halves_share_no_row_and_lose_none(n: int):
    batches = rows(n)
    one, other = halves(batches, seed=4)
    seen = [set(half.packed.tokens[:, 0].tolist()) for half in (one, other)]
    assert seen[0] & seen[1] == set()
    assert seen[0] | seen[1] == set(batches.packed.tokens[:, 0].tolist())
    assert [len(s) for s in seen] == [n - n // 2, n // 2]
    for half, own in zip((one, other), seen, strict=True):
        drawn = np.concatenate([half.batch(i)["tokens"][:, 0] for i in range(3 * len(half))])
        assert set(drawn.tolist()) - {0} == own, "whatever the epoch"
        assert (np.diff(half.packed.tokens[:, 0]) > 0).all(), "read in the order of the data"
    again, another = halves(batches, seed=4)[0], halves(batches, seed=5)[0]
    assert np.array_equal(one.packed.tokens, again.packed.tokens)
    assert n < 5 or not np.array_equal(one.packed.tokens, another.packed.tokens)


def test_one_row_cannot_be_halved():
    with pytest.raises(UserError, match="two rows"):
        halves(rows(1))


# A regression on two kernels in two layers: everything a search needs, compiled in no time.
TARGETS = (Target("layers_0/kernel", (5, 4)), Target("layers_1/kernel", (4, 3)))
PARAMS = unflatten(draws({t.path: jnp.zeros(t.shape) for t in TARGETS}))


def loss_fn(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
    x, y = batch
    for kernel in flatten(merge(params, adapter)).values():
        x = jnp.tanh(x @ kernel)
    return ((x - y) ** 2).mean()


def batch(seed: int) -> Any:
    return draws((jnp.zeros((6, 5)), jnp.zeros((6, 3))), 1.0, seed)


def one_step(adapter: Any, train: Any, valid: Any, tx: Any, tx_gate: Any) -> Any:
    step: Any = make_search_step(loss_fn, tx, tx_gate)
    return step(search_state(adapter, tx, tx_gate), PARAMS, train, valid)


def parts(adapter: Any) -> tuple[Any, Any]:
    leaves = adapter.trainable.items()
    gates = {path: f["gate"] for path, f in leaves}
    return gates, {path: {n: x for n, x in f.items() if n != "gate"} for path, f in leaves}


def test_gates_see_the_validation_batch_alone_and_weights_the_training_batch():
    adapter = randomised(init(PARAMS, METHOD, TARGETS, 1), 0.5)
    tx, tx_gate, none = optax.sgd(0.1), optax.sgd(0.5), optax.set_to_zero()
    state, metrics = one_step(adapter, batch(1), batch(2), tx, tx_gate)
    gates, inner = parts(state.adapter)

    other, _ = one_step(adapter, batch(3), batch(2), tx, tx_gate)
    assert same_bits(parts(other.adapter)[0], gates), "another training batch, the same gates"
    assert not same_bits(parts(other.adapter)[1], inner)
    held, _ = one_step(adapter, batch(1), batch(2), tx, none)
    further, _ = one_step(adapter, batch(1), batch(4), tx, none)
    assert same_bits(held.adapter, further.adapter), "gates apart, no use is made of the other"

    # And both are the steps they should be, on the first-order gradients.
    def loss(trainable: Any, data: Any) -> jax.Array:
        return loss_fn(PARAMS, adapter.with_trainable(trainable), data, None)

    value, slopes = jax.value_and_grad(loss)(adapter.trainable, batch(2))
    np.testing.assert_allclose(metrics.gate_loss, value, rtol=1e-5)
    for path, leaves in adapter.trainable.items():
        wanted = leaves["gate"] - 0.5 * slopes[path]["gate"]
        np.testing.assert_allclose(gates[path], wanted, rtol=1e-5)
    opened = {path: {**f, "gate": gates[path]} for path, f in adapter.trainable.items()}
    value, slopes = jax.value_and_grad(loss)(opened, batch(1))
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    for path, leaves in inner.items():
        for name, leaf in leaves.items():
            wanted = adapter.trainable[path][name] - 0.1 * slopes[path][name]
            np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-6)


def test_every_loss_of_a_search_has_a_key_of_its_own_and_every_optimiser_its_loss():
    def noisy(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        return loss_fn(params, adapter, batch, key) + jax.random.normal(key)

    adapter, still = init(PARAMS, METHOD, TARGETS, 1), optax.set_to_zero()
    tx = optax.chain(still, optax.contrib.reduce_on_plateau())  # which asks for the loss
    step: Any = make_search_step(noisy, tx, tx)
    state, losses = search_state(adapter, tx, tx), set()
    for _ in range(2):
        state, metrics = step(state, PARAMS, batch(1), batch(1))
        losses |= {float(loss) for loss in metrics}
    assert len(losses) == 4


def test_a_search_takes_a_batch_in_parts_and_keeps_the_state_where_it_is():
    adapter, tx = init(PARAMS, METHOD, TARGETS, 1), optax.sgd(0.1)
    step: Any = make_search_step(loss_fn, tx, tx, parts=4)
    with pytest.raises(UserError, match="multiple of 4"):
        step(search_state(adapter, tx, tx), PARAMS, batch(1), batch(2))
    everywhere = NamedSharding(make_mesh(), PartitionSpec())
    like = jax.device_put(search_state(adapter, tx, tx), everywhere)
    step = make_search_step(loss_fn, tx, tx, like=like)
    state, _ = step(search_state(adapter, tx, tx), PARAMS, batch(1), batch(2))
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("spoilt", ["train", "valid"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_moves_nothing(spoilt: str, what: str):
    def steep(params: Any, adapter: Any, batch: Any, key: Any) -> jax.Array:
        x, y = batch
        loss = loss_fn(params, adapter, (x, y), key)
        return loss + jnp.sqrt(jnp.abs(loss * y[0, 0]))  # of no finite slope where that is 0

    adapter, tx = randomised(init(PARAMS, METHOD, TARGETS, 1), 0.5), optax.adam(0.1)
    batches = {"train": batch(1), "valid": batch(2)}
    (x, y), worse = batches[spoilt], np.nan if what == "loss" else 0
    batches[spoilt] = x, y * worse
    step: Any = make_search_step(steep, tx, tx)
    after, metrics = step(search_state(adapter, tx, tx), PARAMS, *batches.values())
    assert bool(jnp.isfinite(jnp.stack(metrics)).all()) == (what == "gradient")
    moved = [same_bits(a, b) for a, b in zip(parts(after.adapter), parts(adapter), strict=True)]
    assert moved == ([False, True] if spoilt == "train" else [True, False])
    finite = jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), after.opt_state)
    assert all(jax.tree.leaves(finite))


def test_a_choice_that_could_not_be_made_is_refused():
    adapter = randomised(init(PARAMS, METHOD, TARGETS, 1), 0.5)
    wrong: dict[str, dict[str, Any]] = {
        "rho is -1": {"rho": -1},
        "rho is at most 1": {"rho": 7.0},
        "sharing is 'colum'": {"sharing": "colum"},
        "every kernel with a gate has a score": {"scores": {TARGETS[0].path: 1.0}},
    }
    for said, given in wrong.items():
        with pytest.raises(UserError, match=said):
            discretise(adapter, given.pop("rho", 0.5), **given)
    with pytest.raises(UserError, match="no kernel has a gate"):
        discretise(init(PARAMS, METHOD.inner, TARGETS), 0.5)


def test_with_gates_held_the_search_is_ordinary_training():
    adapter, tx, none = init(PARAMS, METHOD, TARGETS, 1), optax.sgd(0.3), optax.set_to_zero()
    gates_held = optax.partition(
        {"A": tx, "B": tx, "gate": none},
        lambda tree: {p: {n: n for n in leaves} for p, leaves in tree.items()},
    )
    search: Any = make_search_step(loss_fn, tx, none)
    train: Any = make_train_step(loss_fn, gates_held)
    one, two = search_state(adapter, tx, none), TrainState.create(adapter, gates_held)
    for i in range(5):
        one, _ = search(one, PARAMS, batch(i), batch(i + 9))
        two, _ = train(two, PARAMS, batch(i))
    for name, leaf in by_name(one.adapter.trainable).items():
        np.testing.assert_allclose(leaf, by_name(two.adapter.trainable)[name], atol=1e-6)


def test_the_search_is_traced_once_learns_and_leaves_base_and_frozen_leaves_alone():
    traces = []

    def traced(*given: Any) -> tuple[Any, int]:
        traces.append(1)
        return loss_fn(*given), 3

    adapter = init(PARAMS, DiffoRA(INNER, relaxation="softmax"), TARGETS, 1)
    tx = optax.adam(3e-2)
    step: Any = make_search_step(traced, tx, tx, has_aux=True)
    state, losses = search_state(adapter, tx, tx), []
    for i in range(30):
        state, metrics = step(state, PARAMS, batch(i % 2), batch(5))
        losses.append(float(metrics.loss))
    assert len(traces) == 2, "once for the gates, once for the weights"
    assert step._cache_size() == 1
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert int(state.step) == 30
    assert same_bits(state.adapter.frozen, adapter.frozen)
    assert same_bits(PARAMS, unflatten(draws({t.path: jnp.zeros(t.shape) for t in TARGETS})))


# The choice, on the small model of the laws: embedding, attention, an einsum with a batch axis.


def searched_adapter(method: DiffoRA = METHOD) -> Any:
    at = setup("plain")
    return randomised(init(at.params, method, at.targets, 7), 0.2)


def row_of(path: str) -> str:
    return path.split("/")[0] if path.startswith("layers_") else ""


def brute_force(adapter: Any, rho: float, sharing: str) -> tuple[set, dict]:
    """Kept paths, and for every other adapted one the owner of its leaves."""
    gate = {p: 1 / (1 + np.exp(-np.asarray(f["gate"], np.float64)))
            for p, f in adapter.trainable.items()}  # fmt: skip
    score = {path: g.mean() for path, g in gate.items()}
    sites, kept, owners = {s.target.path: s.target for s in adapter.sites}, set(), {}
    for row in {row_of(path) for path in score}:
        paths = np.array(sorted(path for path in score if row_of(path) == row))
        order = np.argsort([-score[path] for path in paths])
        kept |= set(paths[order[: max(1, int(np.round(rho * len(paths))))]].tolist())

    def group(path: str) -> tuple:
        target, row = sites[path], row_of(path)
        where = row if sharing == "layer" else path.removeprefix(row)
        return where, target.lead, target.n_in, target.n_out

    for path in set(score) - kept if sharing != "none" else ():
        alike = [p for p in score if p not in kept and group(p) == group(path)]
        owners[path] = max(alike, key=lambda p: score[p])
    return kept, owners


@pytest.mark.parametrize("sharing", ["none", "layer", "column"])
@pytest.mark.parametrize("rho", [0.01, 0.3, 0.5, 0.8, 1.0])
def test_the_choice_is_that_of_a_brute_force_search(rho: float, sharing: Any):
    adapter = searched_adapter()
    kept, owners = brute_force(adapter, rho, sharing)
    matrix, chosen = discretise(adapter, rho, sharing)
    assert json.loads(json.dumps(matrix)) == matrix
    assert matrix["rows"] == sorted(matrix["rows"], key=matrix["rows"].index)
    sites = {site.target.path: site for site in chosen.sites}
    assert set(sites) == kept | set(owners)
    assert {p: s.owner or p for p, s in sites.items()} == {**{p: p for p in kept}, **owners}
    assert [s.target.path for s in chosen.sites] == [
        s.target.path for s in adapter.sites if s.target.path in sites
    ]
    assert all(site.method == INNER for site in chosen.sites)
    for path, leaves in chosen.trainable.items():
        assert set(leaves) == {"A", "B"}
        assert all(leaf is adapter.trainable[path][name] for name, leaf in leaves.items())
    scores, cells = openings(adapter), 0
    for row, gates, flags in zip(*(matrix[n] for n in ("rows", "gates", "chosen")), strict=True):
        for column, gate, flag in zip(matrix["columns"], gates, flags, strict=True):
            path = f"{row}/{column}" if row else column
            assert (path in scores) == (gate is not None) == (flag is not None)
            if path in scores:
                assert (gate, flag) == (scores[path], path in kept)
                cells += 1
    assert cells == len(scores)


@pytest.mark.parametrize("sharing", ["none", "layer", "column"])
def test_the_chosen_adapter_is_an_ordinary_one(sharing: Any, tmp_path):
    at = setup("plain")
    _, adapter = discretise(searched_adapter(), 0.4, sharing)
    assert any(site.owner for site in adapter.sites) == (sharing != "none")
    y = linen.adapt(at.model)(at.params, adapter, at.tokens)
    merged = merge(at.params, adapter)
    np.testing.assert_allclose(y, at.model.apply({"params": merged}, at.tokens), atol=2e-4)
    for path, kernel in flatten(unmerge(merged, adapter)).items():
        np.testing.assert_allclose(kernel, flatten(at.params)[path], atol=1e-5)
    own = [site.target for site in adapter.sites if not site.owner]
    each = [2 * (t.n_in + t.n_out) * int(np.prod(t.lead)) for t in own]
    assert count(adapter) == sum(each) == sum(site.n_trainable for site in adapter.sites)
    save(tmp_path / "one", adapter, at.params)
    loaded = load(tmp_path / "one", at.params)
    assert loaded.sites == adapter.sites
    assert same_bits(loaded, adapter)
    assert same_bits(linen.adapt(at.model)(at.params, loaded, at.tokens), y)


def test_shared_leaves_get_the_gradients_of_all_who_share_them():
    at = setup("plain")
    _, adapter = discretise(searched_adapter(), 0.4, "layer")
    owner = next(site.owner for site in adapter.sites if site.owner)
    users = [s.target.path for s in adapter.sites if owner in (s.owner, s.target.path)]

    def total(trainable: Any) -> Any:
        kernels = flatten(merge(at.params, adapter.with_trainable(trainable)))
        return sum(kernels[path].sum() for path in users)

    update = jax.grad(total)(adapter.trainable)[owner]["B"]
    a = np.asarray(adapter.trainable[owner]["A"], np.float64)
    wanted = len(users) * INNER.scale * a.sum(0)[:, None] * np.ones(update.shape)
    assert len(users) > 1
    np.testing.assert_allclose(update, wanted, rtol=1e-4)


def test_parameters_trained_whole_stay_beside_the_choice():
    at = setup("plain")
    whole = select(parameters(at.params, at.targets), "pool/bias")
    targets = select(at.targets, "layers_")
    adapter = init(at.params, METHOD, targets, 7, modules_to_save=whole)
    tx = optax.sgd(0.1)
    state = search_state(adapter, tx, tx)
    assert set(state.adapter.trainable["pool/bias"]) == {"dense"}
    matrix, chosen = discretise(adapter, 0.5)
    assert "pool/bias" in chosen.trainable
    assert "" not in matrix["rows"]


def test_stacked_kernels_are_refused():
    at = setup("scan")
    adapter = init(at.params, METHOD, at.targets, 7)
    with pytest.raises(UserError, match=r"layers/attn/\w+/kernel is a stack of layers"):
        discretise(adapter, 0.5)


def test_one_search_has_one_set_of_settings():
    mixed = plan_sites(METHOD, TARGETS, {"layers_1": {"rho": 0.9}})
    with pytest.raises(UserError, match="one rho"):
        common_method(mixed)
    soft = plan_sites(DiffoRA(INNER, relaxation="softmax"), TARGETS, {"layers_1": {"rank": 1}})
    with pytest.raises(UserError, match="softmax over a layer needs one inner method"):
        common_method(soft)
    fine = plan_sites(METHOD, TARGETS, {"layers_1": {"rank": 1, "dropout": 0.1}})
    assert common_method(fine) == METHOD
    assert common_method(plan_sites(INNER, TARGETS)) is None


def test_a_random_choice_follows_its_seed():
    adapter = searched_adapter()
    chosen = [
        {s.target.path for s in discretise(adapter, 0.5, scores=scores)[1].sites}
        for scores in (random_choice(adapter, seed) for seed in (0, 0, 1, 2))
    ]
    assert chosen[0] == chosen[1]
    assert len({frozenset(paths) for paths in chosen}) == 3
    assert len({len(paths) for paths in chosen}) == 1


def test_the_gradient_norms_are_those_of_the_sum_over_the_batches():
    adapter = randomised(init(PARAMS, METHOD, TARGETS, 1), 0.5)
    batches = [batch(1), batch(2)]
    scores = by_gradient_norm(loss_fn, PARAMS, adapter, batches)

    def loss(trainable: Any) -> Any:
        now = adapter.with_trainable(trainable)
        return sum(loss_fn(PARAMS, now, data, None) for data in batches)

    for path, leaves in jax.grad(loss)(adapter.trainable).items():
        wanted = np.sqrt(sum(float((leaf**2).sum()) for leaf in leaves.values()))
        np.testing.assert_allclose(scores[path], wanted, rtol=1e-5)


@pytest.mark.parametrize("budget", [16, 17, 25, 32, 39, 41, 48])
def test_ranks_at_a_budget_spend_it(budget: int):
    """Sizes 9 and 7: a rank of 1 on both is 16."""
    sites = plan_sites(LoRA(rank=3, alpha=6.0), TARGETS)
    found = at_budget(sites, budget)
    methods: list[Any] = [site.method for site in found]
    ranks = [method.rank for method in methods]
    spent = sum(rank * size for rank, size in zip(ranks, (9, 7), strict=True))
    assert sum(site.n_trainable for site in found) == spent <= budget
    assert budget - spent < 7, "nothing more would fit"
    assert max(ranks) - min(ranks) <= 1
    assert all(method.scale == 2.0 for method in methods)


def test_budgets_that_cannot_be_met_are_refused():
    with pytest.raises(UserError, match="rank 1 on these kernels has 16"):
        at_budget(plan_sites(INNER, TARGETS), 15)
    with pytest.raises(UserError, match="rank 4 exceeds"):
        at_budget(plan_sites(INNER, TARGETS), 64)
    miss = at_budget(plan_sites(MiSS(rank=1), TARGETS), 20)
    assert [site.n_trainable for site in miss] == [12, 6]
    wide = at_budget(plan_sites(VeRA(rank=2), TARGETS), 100)
    assert sum(site.n_trainable for site in wide) == 100


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_model(folder / "model", num_hidden_layers=2)
    return folder


def quiet(given: Any) -> Any:
    return finetune(given, say=lambda line: None)


@pytest.fixture(scope="module")
def finished(place):
    settings = ("inner=lora-mini(rank=2,a=8,b=8)", "rho=0.3", "sharing=column")
    given = dataclasses.replace(
        options(place, output_dir=str(place / "whole")),
        method="diffora", settings=settings, target_modules=("self_attn",),
    )  # fmt: skip
    return given, quiet(given)


def test_a_run_searches_and_ends_with_an_ordinary_adapter(finished, place):
    given, summary = finished
    matrix = json.loads((place / "whole" / "matrix.json").read_text())
    assert matrix["rows"] == ["layers_0", "layers_1"]
    assert [sum(row) for row in matrix["chosen"]] == [1, 1]
    assert matrix["steps"] == 20
    assert from_dict(matrix["method"]).name == "diffora"
    assert np.ptp([gate for row in matrix["gates"] for gate in row]) > 0.01, "the gates moved"
    _, params = load_model(given.model)
    adapter = load(place / "whole" / "adapter", params)
    inner = from_dict({"method": "lora-mini", "rank": 2, "a": 8, "b": 8}, with_data=True)
    assert {site.method for site in adapter.sites} == {inner}
    assert summary["settings"] == [inner.to_dict()]
    assert len(adapter.sites) == 8
    assert count(adapter) == summary["trainable"] == 32 * len(adapter.trainable)
    chosen = {f"{row}/{column}" for row, flags in zip(matrix["rows"], matrix["chosen"], strict=True)
              for column, flag in zip(matrix["columns"], flags, strict=True) if flag}  # fmt: skip
    assert chosen <= set(adapter.trainable)


@pytest.mark.parametrize(
    ("inner", "sharing"),
    [(MiSS(rank=4), "layer"), (LoRA(rank=2), "none")],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_other_sharing_rules_and_inner_methods_go_through_a_run(place, inner, sharing):
    folder = place / sharing
    given = dataclasses.replace(
        options(place, output_dir=str(folder), max_steps=2, samples=0), method="diffora",
        settings=(f"inner={inner.name}(rank={inner.rank})", "rho=0.3", f"sharing={sharing}",
                  "search_steps=3"), target_modules=("self_attn",),
    )  # fmt: skip
    summary = quiet(given)
    matrix = json.loads((folder / "matrix.json").read_text())
    assert np.ptp([gate for row in matrix["gates"] for gate in row]) > 0, "the gates moved"
    assert [sum(row) for row in matrix["chosen"]] == [1, 1]
    _, params = load_model(given.model)
    began, ended = (load(folder / name, params) for name in ("searched", "adapter"))
    assert {site.method for site in ended.sites} == {inner}
    each = inner.n_trainable(32, 32)
    assert count(ended) == summary["trainable"] == each * len(ended.trainable)
    others = {site.target.path: site.owner for site in ended.sites if site.owner}
    # One of four kernels is chosen in each of two layers; the others are alike.
    assert len(ended.trainable) == (4 if sharing == "layer" else 2)
    assert len(ended.sites) == (8 if sharing == "layer" else 2)
    assert all(path.split("/")[0] == owner.split("/")[0] for path, owner in others.items())
    for path, leaves in ended.trainable.items():
        assert all(x.any() for x in leaves.values())
        assert not same_bits(leaves, began.trainable[path]), "the search's leaves were trained on"


def test_the_metrics_and_the_report_show_the_search(finished, place):
    given, summary = finished
    rows = RunFolder(given).metrics.rows()
    steps = [row["step"] for row in rows]
    assert steps[0] == -20
    assert all(a <= b for a, b in pairwise(steps))
    assert rows[0]["valid_loss"] == summary["valid_loss_before"] > summary["valid_loss_after"]
    assert {"loss", "gate_loss"} < set(rows[1])
    page = (place / "whole" / "report.html").read_text()
    assert "<h2>Search</h2>" in page
    assert "layers_1" in page


def test_a_run_killed_in_the_search_or_after_it_ends_the_same(finished, place, monkeypatch):
    given = dataclasses.replace(finished[0], output_dir=str(place / "killed"))
    make, fit = search_run.make_search_step, finetune_module.fit

    def stopping(*args: Any, **kwargs: Any) -> Any:
        step, calls = make(*args, **kwargs), []

        def one(*inputs: Any) -> Any:
            calls.append(1)
            if len(calls) == 12:
                raise KeyboardInterrupt
            return step(*inputs)

        return one

    def stopped(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(search_run, "make_search_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        quiet(given)
    assert not (place / "killed" / "matrix.json").exists()
    monkeypatch.setattr(search_run, "make_search_step", make)
    monkeypatch.setattr(finetune_module, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        quiet(given)
    monkeypatch.setattr(finetune_module, "fit", fit)
    monkeypatch.setattr(search_run, "search", lambda *args: pytest.fail("it searched again"))
    quiet(given)
    for name in ("matrix.json", "adapter/adapter.json", "adapter/adapter.safetensors"):
        ours, whole = (place / run / name for run in ("killed", "whole"))
        assert ours.read_bytes() == whole.read_bytes(), name
    ours, whole = (
        [row["step"] for row in RunFolder(run).metrics.rows()] for run in (given, finished[0])
    )
    assert ours == whole, "the search's metrics are there once"


def test_a_search_whose_loss_is_not_finite_stops(place, monkeypatch):
    given = dataclasses.replace(
        options(place, output_dir=str(place / "diverged")), method="diffora",
        settings=("inner=lora(rank=1)", "search_steps=2"), target_modules=("q_proj",),
    )  # fmt: skip
    make = search_run.make_search_step

    def poisoned(loss: Any, *args: Any, **kwargs: Any) -> Any:
        return make(lambda *given: (loss(*given)[0] * jnp.nan, 1), *args, **kwargs)

    monkeypatch.setattr(search_run, "make_search_step", poisoned)
    with pytest.raises(Diverged, match="search's loss is not finite by its step 2") as raised:
        quiet(given)
    assert raised.value.step < 0, "as the search's steps in the metrics"
    assert not (place / "diverged" / "searched").exists()


def test_overrides_that_no_search_can_have_leave_nothing_behind(place):
    given = dataclasses.replace(
        options(place, output_dir=str(place / "mixed")), method="diffora",
        settings=("inner=lora(rank=1)",), overrides='{"q_proj": {"rho": 0.9}}',
    )  # fmt: skip
    with pytest.raises(UserError, match="one rho"):
        quiet(given)
    assert not (place / "mixed").exists()
