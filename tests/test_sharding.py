"""Many devices give what one gives, and tell each other no more than they must."""

import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from lora_mini_jax import (
    Target,
    TrainState,
    UserError,
    init,
    linen,
    make_train_step,
    select,
    sharding,
)
from lora_mini_jax.checkpoint import Checkpoints
from lora_mini_jax.forecast.collectives import Collective, collectives
from lora_mini_jax.methods import METHODS, AdaLoRA, DoRA, Full, LoRA, SwitchLoRA
from lora_mini_jax.tree import flatten, parameters, unflatten
from tests.cases import CASES, Case, cross_entropy, draws, random_params, randomised
from tests.test_laws import close

# One of every class, the form of one that reads the kernel where the others do not, and leaves
# that are keys, or have no entries.
CHOSEN = {next(c.name for c in CASES if type(c.method) is kind) for kind in METHODS.values()}
ALL = [c for c in CASES if c.name in CHOSEN | {"miss-bat", "lora-mini-recompute"}]
every_method = pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
# The update of MiSS's mode bat is a product of the kernel itself with blocks of its own.
thin_methods = pytest.mark.parametrize(
    "case", [c for c in ALL if c.name != "miss-bat"], ids=lambda case: case.name
)
VOCAB, WIDTH, HEADS, LAYERS, ROWS, LENGTH = 20, 16, 2, 2, 8, 5
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, VOCAB, (ROWS, LENGTH)))


class Block(nn.Module):
    """A kernel with its heads as axes of their own, and one that takes them back."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = jnp.tanh(nn.DenseGeneral((HEADS, 12), name="up")(x))
        return x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="o_proj")(h), None


class Plain(nn.Module):
    """The same with kernels that are matrices."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        h = jnp.tanh(nn.Dense(24, name="up")(x))
        return x + nn.Dense(WIDTH, name="o_proj")(h), None


class Model(nn.Module):
    """Embedding, stacked blocks or a row of them, and the embedding again."""

    stacked: bool = True
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = nn.Embed(VOCAB, WIDTH, name="embed")
        x = nn.RMSNorm(name="first")(table(tokens))
        if self.stacked:
            each: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(self.block, length=LAYERS, **each)(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = self.block(name=f"layers_{i}")(x)
        return table.attend(x)


@cache
def made(
    stacked: bool = True, block: type[nn.Module] = Block
) -> tuple[Any, Any, tuple[Target, ...]]:
    model = Model(stacked, block)
    params = random_params(model, TOKENS)
    return model, params, linen.targets(model, params, TOKENS)


def on_mesh(sizes: str, params: Any, adapter: Any, targets: Any) -> tuple[Any, Any, Any]:
    """Parameters, adapter and the tokens on the devices of a mesh."""
    mesh = sharding.make_mesh(sizes)
    return (
        jax.device_put(params, sharding.of_params(mesh, params, targets)),
        jax.device_put(adapter, sharding.of_adapter(mesh, adapter)),
        jax.device_put(TOKENS, sharding.of_batch(mesh)),
    )


def loss_of(model: nn.Module, params: Any) -> Any:
    """The loss, and the logits beside it."""
    apply = linen.adapt(model, rows=sharding.of_rows(params))

    def loss(params: Any, adapter: Any, batch: Any, key: Any) -> Any:
        logits = apply(params, adapter, batch)
        return cross_entropy(logits, batch), logits

    return loss


def program(
    sizes: str,
    method: Any,
    which: str = "all-linear",
    stacked: bool = False,
    block: type[nn.Module] = Block,
) -> tuple[list[Collective], Any]:
    """What the devices exchange in a training step, and the adapter that is trained."""
    model, params, targets = made(stacked, block)
    chosen = select(parameters(params, targets), which)
    params, adapter, batch = on_mesh(sizes, params, init(params, method, chosen), targets)
    tx = optax.adam(1e-2)
    state = sharding.put_on_mesh(batch.sharding.mesh, TrainState.create(adapter, tx))
    step: Any = make_train_step(loss_of(model, params), tx, has_aux=True, like=state)
    return collectives(step.lower(state, params, batch).compile()), adapter


@every_method
def test_ten_steps_on_eight_devices_are_those_on_one(case: Case):
    model, params, targets = made()
    # Leaves of the right shapes will do, and need no compiling.
    adapter = draws(jax.eval_shape(lambda p: init(p, case.method, targets), params), 0.05)
    tx = optax.adam(1e-2, eps=1e-3)  # with its usual eps it makes steps out of rounding errors

    def run(params: Any, state: TrainState, batch: Any, like: TrainState | None) -> Any:
        step: Any = make_train_step(loss_of(model, params), tx, has_aux=True, like=like)
        seen = []
        for i in range(10):
            state, metrics = step(state, params, batch)
            seen.append(jax.device_get(metrics))
            if i == 0:  # Adam's first moment is then a tenth of the gradient
                gradient = jax.device_get(jax.tree.map(lambda mu: 10 * mu, state.opt_state[0].mu))
        assert step._cache_size() == 1
        return seen, gradient, state.adapter

    alone = run(params, TrainState.create(adapter, tx), TOKENS, None)
    sharded, placed, batch = on_mesh("data=2,fsdp=2,tensor=2", params, adapter, targets)
    state = sharding.put_on_mesh(batch.sharding.mesh, TrainState.create(placed, tx))
    before = jax.tree.map(lambda leaf: leaf.sharding, placed)
    together = run(sharded, state, batch, state)
    for ours, theirs in zip(together[0], alone[0], strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.aux, theirs.aux, rtol=1e-5, atol=1e-5)
    close(together[1], alone[1], 1e-5)
    close(together[2].trainable, alone[2].trainable, 1e-5)
    assert jax.tree.map(lambda leaf: leaf.sharding, together[2]) == before


@thin_methods
def test_data_parallel_devices_exchange_trained_gradients_alone(case: Case):
    exchanged, adapter = program("data=8", case.method)
    assert {each.kind for each in exchanged} == {"all-reduce"}
    sizes = Counter(math.prod(shape) for each in exchanged for shape in each.shapes if shape)
    leaves = jax.tree.leaves(adapter.trainable)
    # Leaf by leaf; some are transposed, and those of `full` have the axes of the model's kernels.
    assert sizes == Counter(leaf.size for leaf in leaves if leaf.shape)
    trained = sum(leaf.nbytes for leaf in leaves)
    assert 0 <= sum(each.bytes for each in exchanged) - trained <= 16  # the loss and its like
    # A layer in a scan exchanges its own at every turn.
    exchanged, adapter = program("data=8", case.method, stacked=True)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.trainable))
    assert 0 <= sum(each.bytes * each.times for each in exchanged) - trained <= 16


def test_bat_exchanges_gradients_as_large_as_kernels_and_this_is_known():
    (bat,) = (case.method for case in ALL if case.name == "miss-bat")
    exchanged, _ = program("data=8", bat)
    kernels = [leaf for leaf in jax.tree.leaves(made(False)[1]) if leaf.ndim == 3]
    wanted = sum(leaf.nbytes for leaf in kernels)
    assert 0 <= sum(each.bytes for each in exchanged) - wanted <= 16


@thin_methods
def test_on_fsdp_too_nothing_else_is_added_up(case: Case):
    exchanged, adapter = program("fsdp=8", case.method, block=Plain)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.trainable))
    added = sum(each.bytes for each in exchanged if each.kind == "all-reduce")
    # Sums over rows that devices share: DoRA's norms; AdaLoRA's A^T A and sensitivities of A.
    method, factors = case.method, adapter.trainable.values()
    sums = sum(leaves["magnitude"].nbytes for leaves in factors) if case.name == "dora" else 0
    if isinstance(method, AdaLoRA):
        sums = len(factors) * 4 * method.rank * (method.rank + 1)
    assert 0 <= added - trained <= 24 + sums


@pytest.mark.parametrize(("sizes", "rows"), [("fsdp=8", 1), ("fsdp=4,tensor=2", 2)])
def test_every_device_works_on_its_own_rows_alone(sizes: str, rows: int):
    exchanged, adapter = program(sizes, LoRA(rank=2))
    added = [each for each in exchanged if each.kind == "all-reduce"]
    activations = [shape for each in added for shape in each.shapes if LENGTH in shape]
    assert all(shape[0] == rows for shape in activations)
    if "tensor" not in sizes:  # then nothing is added up but what a data-parallel mesh adds up
        trained = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter.trainable))
        assert 0 <= sum(each.bytes for each in added) - trained <= 24
        assert not activations


@pytest.mark.parametrize(("sizes", "stacked"), [("fsdp=8", False), ("fsdp=4,tensor=2", True)])
def test_nothing_is_gathered_that_the_bare_model_would_not_gather(sizes: str, stacked: bool):
    def gathered(
        method: Any, which: str = "all-linear", block: type[nn.Module] = Block
    ) -> tuple[int, Any]:
        exchanged, adapter = program(sizes, method, which, stacked, block)
        kind = (each for each in exchanged if each.kind == "all-gather")
        return sum(each.bytes * each.times for each in kind), adapter

    # Training the first norm alone takes the bare model's way, forward and all the way back.
    bare, _ = gathered(Full(), "first")
    assert bare > 0
    plain, _ = gathered(Full(), "first", Plain)

    def check(case: Case, bare: int, block: type[nn.Module]) -> None:
        adapted, adapter = gathered(case.method, block=block)
        # Forward and back it gathers leaves of its own, and nothing more.
        own = sum(leaf.nbytes for leaf in jax.tree.leaves((adapter.trainable, adapter.frozen)))
        assert adapted - bare <= 2 * own, case.name

    for case in ALL:
        if case.name == "dora":  # reads the kernel itself, as a matrix
            check(case, plain, Plain)
        elif case.name != "miss-bat":
            check(case, bare, Block)
    # Of kernels with heads as axes it gathers what it reads.
    kernels = sum(4 * math.prod(target.shape) for target in made(stacked)[2])
    assert gathered(DoRA(rank=2))[0] - bare <= 2 * kernels


def test_leaves_are_split_as_the_side_of_the_kernel_they_run_along():
    _, params, targets = made()
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    mini = next(case.method for case in CASES if case.name == "lora-mini-orthogonal")
    of: Any = sharding.of_adapter(mesh, init(params, mini, targets))
    up, down = of.frozen["layers/up/kernel"], of.frozen["layers/o_proj/kernel"]
    assert up["A_aux"].spec == P(None, "fsdp", None)
    assert up["B_aux"].spec == P(None, None, "tensor")
    assert down["A_aux"].spec == P(None, "tensor", None)
    assert {leaf.spec for leaf in of.trainable["layers/up/kernel"].values()} == {
        P(None, None, None)
    }
    kernels = sharding.of_params(mesh, params, targets)
    assert kernels["layers"]["up"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert kernels["first"]["scale"].spec == P()
    own = sharding.of_params(mesh, params, targets, {"up/kernel": (None, "data")})
    assert own["layers"]["up"]["kernel"].spec == P(None, None, "data", None)
    (builtin,) = (pattern for pattern in sharding.RULES if "o_proj" in pattern)
    own = sharding.of_params(mesh, params, targets, {builtin: ("fsdp", None)})
    assert own["layers"]["o_proj"]["kernel"].spec == P(None, "fsdp", None, None)


def test_what_ends_a_block_is_split_the_other_way_and_what_is_no_kernel_not_at_all():
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    ends = ("o_proj", "down_proj", "output/dense", "c_proj", "o", "wo", "out")
    paths = [f"{name}/kernel" for name in (*ends, "in_proj", "dense")] + ["embed/embedding"]
    params = unflatten({path: jnp.ones((8, 8)) for path in paths} | {"norm/bias": jnp.ones(8)})
    kernels = [Target(path, (8, 8)) for path in paths]
    specs = {p: of.spec for p, of in flatten(sharding.of_params(mesh, params, kernels)).items()}
    others = dict.fromkeys(("in_proj/kernel", "dense/kernel"), P("fsdp", "tensor"))
    assert specs == {**dict.fromkeys(paths, P("tensor", "fsdp")), **others, "norm/bias": P()}
    every = parameters(params, kernels)
    whole: Any = sharding.of_adapter(mesh, init(params, Full(), every)).trainable
    assert whole["norm/bias"]["dense"].spec == P(None, None)
    assert whole["dense/kernel"]["dense"].spec == P("fsdp", "tensor")


def test_a_side_that_the_mesh_does_not_divide_stays_whole():
    odd = Target("up/kernel", (7, 12))
    mesh = sharding.make_mesh("fsdp=2,tensor=4")
    params = {"up": {"kernel": jnp.ones((7, 12))}}
    assert sharding.of_params(mesh, params, [odd])["up"]["kernel"].spec == P(None, "tensor")


@pytest.mark.parametrize("sizes", ["data=3", "rows=8", "data", "data=0", "", "data=-1,fsdp=-1",
                                   "data=-2,fsdp=-4", "data=4,data=8", "data=8,rows",
                                   "data=-1,fsdp=0"])  # fmt: skip
def test_a_mesh_that_is_none_is_refused(sizes: str):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(sizes)


def test_what_is_left_of_the_devices_is_taken_and_rows_must_be_split():
    mesh = sharding.make_mesh("fsdp=2,data=-1")
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sharding.of_batch(mesh).spec == P(("data", "fsdp"))
    sharding.check_rows(mesh, 16)
    with pytest.raises(UserError, match="multiple of 8"):
        sharding.check_rows(mesh, 12)


def test_a_checkpoint_goes_on_on_another_mesh_and_on_none(tmp_path: Path):
    _, params, targets = made()
    method, tx = SwitchLoRA(rank=2, interval0=4.0), optax.adam(1e-2)
    adapter = randomised(init(params, method, targets), 0.05)

    def state_on(sizes: str) -> TrainState:
        _, placed, batch = on_mesh(sizes, params, adapter, targets)
        return sharding.put_on_mesh(batch.sharding.mesh, TrainState.create(placed, tx))

    saved = state_on("fsdp=4,tensor=2")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved)
        for fresh in (state_on("data=2,tensor=4"), TrainState.create(adapter, tx)):
            found: Any = checkpoints.restore(fresh)
            places = jax.tree.map(lambda leaf: leaf.sharding, (found, fresh))
            assert places[0] == places[1]
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(saved), strict=True):
                np.testing.assert_array_equal(a, b)
