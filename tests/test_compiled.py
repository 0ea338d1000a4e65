"""What a training step is made of: thin products, parameters as arguments, a donated state; and
that there is one of it, whatever the data."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    Adapter,
    LoRA,
    LoRAMini,
    TrainState,
    init,
    linen,
    make_train_step,
    merge,
    select,
)
from lora_mini_jax.adapters.adapter import draw
from lora_mini_jax.data import Batches, Example, pack, token_loss
from lora_mini_jax.methods import METHODS
from lora_mini_jax.models import Llama, LlamaConfig
from lora_mini_jax.runs.loop import fit
from lora_mini_jax.runs.meter import Meter
from lora_mini_jax.runs.run import Run
from lora_mini_jax.runs.schedule import of_length, optimizer
from lora_mini_jax.tasks.kinds import prepare
from lora_mini_jax.tree import flatten
from tests.cases import CASES, VOCAB, drawn, draws, random_params, setup
from tests.runs import options

BATCH, TIME, N_IN, WIDTH, HIDDEN, N_OUT = 3, 7, 20, 24, 44, 9
METHOD = LoRAMini(rank=1, a=2, b=3)


class Block(nn.Module):
    """A feed-forward part of heads: Dense, an Einsum with a batch axis, DenseGeneral."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = jnp.tanh(nn.Dense(HIDDEN, name="up")(x)).reshape(*x.shape[:-1], 2, HIDDEN // 2)
        h = nn.Einsum((2, HIDDEN // 2, 15), "btnh,nhk->btnk", name="heads")(h)
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="down")(h), None


class Model(nn.Module):
    """Blocks between two Dense layers, in a loop (FLOPs can be counted) or under scan and remat."""

    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH, name="enter")(x)
        if self.scan:
            many = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0}, split_rngs={"params": True}, length=2,
            )  # fmt: skip
            x, _ = many(name="layers")(x, None)
        else:
            for i in range(2):
                x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(N_OUT, name="leave")(x)


@dataclass(frozen=True)
class Program:
    """A jaxpr with the sizes that a dense product for a weight would have."""

    jaxpr: Any
    dense: frozenset[int]

    def dots(self) -> list[tuple[int, int]]:
        """(size of the result, FLOPs) of every matrix product, scan bodies once per layer."""
        return list(_dots(self.jaxpr.jaxpr, 1))

    @property
    def flops(self) -> int:
        return sum(flops for _, flops in self.dots())

    @property
    def dense_products(self) -> int:
        return sum(size in self.dense for size, _ in self.dots())


def _dots(jaxpr: Any, times: int) -> Iterator[tuple[int, int]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            width = math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
            size = math.prod(eqn.outvars[0].aval.shape)
            yield from [(size, 2 * size * width)] * times
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                more = eqn.params["length"] if eqn.primitive.name == "scan" else 1
                yield from _dots(getattr(inner, "jaxpr", inner), times * more)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


class Programs:
    """The steps to compare, for one layout of the model."""

    def __init__(self, scan: bool):
        self.model: Any = Model(scan)
        self.tx = optax.adam(1e-3)
        self.x = draws(jnp.zeros((BATCH, TIME, N_IN)))
        self.params = random_params(self.model, self.x)
        targets = linen.targets(self.model, self.params, self.x)
        self.sizes = frozenset(
            size for t in targets for size in (t.n_in * t.n_out, math.prod(t.shape[t.stack :]))
        )
        self.adapter = init(self.params, METHOD, targets)
        apply = linen.adapt(self.model)

        def adapted(params, adapter, x, key):
            return (apply(params, adapter, x) ** 2).mean()

        def merged(params, adapter, x, key):
            return (self.model.apply({"params": merge(params, adapter)}, x) ** 2).mean()

        self.step: Any = make_train_step(adapted, self.tx)
        self.merged = make_train_step(merged, self.tx)

    def state(self) -> TrainState:
        return TrainState.create(self.adapter, self.tx)

    def program(self, step: Any) -> Program:
        return Program(jax.make_jaxpr(step)(self.state(), self.params, self.x), self.sizes)

    def full(self) -> Program:
        def loss(params: Any) -> jax.Array:
            return (self.model.apply({"params": params}, self.x) ** 2).mean()

        return Program(jax.make_jaxpr(jax.grad(loss))(self.params), self.sizes)

    def forward(self) -> Program:
        jaxpr = jax.make_jaxpr(self.model.apply)({"params": self.params}, self.x)
        return Program(jaxpr, self.sizes)


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan+remat"])
def programs(request) -> Programs:
    return Programs(request.param)


@pytest.fixture(scope="module")
def loop() -> Programs:
    return Programs(False)


def test_no_activation_is_as_large_as_a_kernel(programs: Programs):
    """The sizes are chosen so that a product of a kernel's size can only be a dense update."""
    assert programs.forward().dense_products == 0


def test_training_forms_no_dense_weight_gradient(programs: Programs):
    assert programs.program(programs.step).dense_products == 0


def test_full_fine_tuning_and_merged_weights_do_form_them(programs: Programs):
    kernels = 2 * 3 + 2
    assert programs.full().dense_products == kernels
    assert programs.program(programs.merged).dense_products >= kernels


def test_training_costs_fewer_flops_than_merged_weights_and_full_fine_tuning(programs: Programs):
    ours, forward = programs.program(programs.step), programs.forward()
    merged, full = programs.program(programs.merged), programs.full()
    assert len(ours.dots()) > len(forward.dots()) > 0
    assert ours.flops < min(full.flops, merged.flops)


def test_xla_counts_fewer_flops_too(loop: Programs):
    def flops(step: Any) -> float:
        return step.lower(loop.state(), loop.params, loop.x).compile().cost_analysis()["flops"]

    assert flops(loop.step) < flops(loop.merged)


def test_base_parameters_are_arguments_not_constants(programs: Programs):
    closed = programs.program(programs.step).jaxpr
    smallest = min(x.size for x in flatten(programs.params).values() if x.ndim > 1)
    assert all(np.size(const) < smallest for const in _constants(closed))

    held = jax.make_jaxpr(lambda x: programs.model.apply({"params": programs.params}, x))
    assert any(np.size(const) >= smallest for const in _constants(held(programs.x)))


def _constants(closed: Any) -> Iterator[Any]:
    yield from getattr(closed, "consts", ())
    for eqn in getattr(closed, "jaxpr", closed).eqns:
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _constants(inner)


def test_other_parameters_need_no_new_program(loop: Programs):
    first, _ = loop.step(loop.state(), loop.params, loop.x)
    _, one = loop.step(first, loop.params, loop.x)
    other = jax.tree.map(lambda x: 2 * x, loop.params)
    _, two = loop.step(loop.state(), other, loop.x)
    assert one.loss != two.loss
    assert loop.step._cache_size() == 1


def test_the_state_is_donated_and_the_base_is_not(loop: Programs):
    state = loop.state()
    lowered = loop.step.lower(state, loop.params, loop.x)
    (given, params, batch), _ = lowered.args_info
    assert all(leaf.donated for leaf in jax.tree.leaves(given))
    assert not any(leaf.donated for leaf in jax.tree.leaves((params, batch)))

    after, _ = loop.step(state, loop.params, loop.x)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.adapter.trainable))
    assert not any(x.is_deleted() for x in jax.tree.leaves((loop.adapter, loop.params, after)))


def test_only_trained_leaves_have_optimiser_state(loop: Programs):
    adam = loop.tx.init(loop.adapter.trainable)
    leaves = [x for x in jax.tree.leaves(loop.state().opt_state) if np.ndim(x)]
    trained = [x.shape for x in jax.tree.leaves(loop.adapter.trainable)]
    assert jax.tree.structure(adam) == jax.tree.structure(loop.state().opt_state)
    assert sorted(x.shape for x in leaves) == sorted(2 * trained)


def test_a_step_keeps_two_thirds_of_what_lora_by_two_plain_products_keeps():
    """The bytes of temporaries that XLA reckons with, of a Llama's step on a CPU."""
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256,
                         num_hidden_layers=2, num_attention_heads=1)  # fmt: skip
    model, tokens = Llama(config), jnp.zeros((2, 64), int)
    params = random_params(model, tokens)
    targets = select(linen.targets(model, params, tokens))
    apply = linen.adapt(model)

    def plain(params: Any, adapter: Adapter, tokens: jax.Array) -> Any:
        factors = adapter.factors()

        def added(call: Any, args: Any, kw: Any, context: Any) -> Any:
            own = factors.get("/".join((*context.module.path, "kernel")))
            y = call(*args, **kw)
            return y if own is None else y + args[0] @ own["A"] @ own["B"]

        with nn.intercept_methods(added):
            return model.apply({"params": params}, tokens)

    def temporaries(method: Any, apply: Any) -> int:
        def loss(params: Any, adapter: Adapter, tokens: jax.Array, key: jax.Array) -> jax.Array:
            return (apply(params, adapter, tokens) ** 2).mean()

        state = TrainState.create(init(params, method, targets), optax.adam(1e-3))
        step: Any = make_train_step(loss, optax.adam(1e-3))
        return step.lower(state, params, tokens).compile().memory_analysis().temp_size_in_bytes

    lora, mini = LoRA(rank=4), LoRAMini(rank=4, a=8, b=8)
    assert temporaries(mini, apply) < 0.66 * temporaries(lora, plain)
    assert temporaries(lora, apply) < 0.77 * temporaries(lora, plain)


COMPILING = "/jax/core/compile/backend_compile_duration"
LENGTH = 12
# A case for each method; of variants, the first.
OF_METHOD = {case.method.name: case for case in reversed(CASES)}


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of the programs that JAX compiles, or takes from its cache on the disk."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event == COMPILING:
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def ragged(packing: bool) -> Batches:
    """Examples of every length that fits; the last batch has fewer rows than the others."""
    rng = np.random.default_rng(0)
    lengths = [*range(1, LENGTH + 1), 2, 3, 5, 7]
    examples = [Example(rng.integers(0, VOCAB, n).astype(np.int32), np.arange(n) > 0)
                for n in lengths]  # fmt: skip
    batches = Batches(pack(examples, LENGTH, packing=packing), batch_size=3, seed=0)
    assert len(batches.packed.tokens) % 3
    return batches


def test_every_method_has_a_case():
    assert OF_METHOD.keys() == METHODS.keys()


@pytest.mark.parametrize("case", OF_METHOD.values(), ids=OF_METHOD)
def test_one_program_for_all_batches_of_ragged_data(case: Any, compiled: list[str]):
    at, tx = setup("scan"), optax.adamw(1e-3)
    apply = linen.adapt(at.model)

    def loss(params: Any, adapter: Any, batch: Any, key: jax.Array) -> jax.Array:
        total, number = token_loss(apply(params, adapter, batch["tokens"]), batch)
        return total / jnp.maximum(number, 1)

    step: Any = make_train_step(loss, tx)
    state = TrainState.create(drawn(case), tx)
    epochs = [data.batch(i) for data in map(ragged, (True, False)) for i in range(2 * len(data))]
    assert len(epochs) > 16  # so that the methods that change something in between have done it
    state, _ = step(state, at.params, epochs[0])
    assert "step" in " ".join(compiled)
    compiled.clear()
    for batch in epochs[1:]:
        state, metrics = step(state, at.params, batch)
    assert compiled == []
    assert np.isfinite(metrics.loss)


@pytest.mark.parametrize(("method", "packing"), [("lora", True), ("switchlora", False)])
def test_a_run_compiles_nothing_after_its_first_step(
    method: str, packing: bool, compiled: list[str], tmp_path: Path, monkeypatch: Any
):
    """Steps, evaluations, lines of the metrics and checkpoints, over two epochs of ragged data."""
    rows = [{"q": "say" + " again" * (i % 5), "a": "x" * (1 + i % 7)} for i in range(26)]
    data = tmp_path / "ragged.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = options(
        tmp_path, data=str(data), method=method, settings=("rank=2",), packing=packing, samples=0,
        log_every=1, eval_every=2, save_every=3, max_length=48, epochs=2.0,
        max_steps=None, batch_size=7,
    )  # fmt: skip
    task, run = prepare(given), Run(given, lambda line: None)
    run.folder.create()
    assert len(task.train.packed.tokens) % given.batch_size
    steps, add = 2 * len(task.train), Meter.add

    def noting(self: Meter, *args: Any) -> None:
        compiled.append("a step is done")
        add(self, *args)

    monkeypatch.setattr(Meter, "add", noting)
    sites = of_length(task.sites, steps, given.parsed_settings())
    adapter = draw(task.params, sites, given.seed)
    fit(run, task, adapter, optimizer(given, steps, sites), steps)
    assert compiled.count("a step is done") == steps > 3
    first = compiled.index("a step is done")
    # With the first line of the metrics comes the learning rate's own program, once.
    second = compiled.index("a step is done", first + 1)
    assert set(compiled[second:]) == {"a step is done"}
