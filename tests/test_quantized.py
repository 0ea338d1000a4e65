"""Quantised kernels are used, adapted, trained beside, merged and exported like dense ones."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_mini_jax import (
    Target,
    TrainState,
    UserError,
    init,
    linen,
    make_train_step,
    merge,
    peft,
    select,
    sharding,
)
from lora_mini_jax.adapters import adapter as adapter_module
from lora_mini_jax.commands.adapters import run_export, run_generate, run_merge
from lora_mini_jax.methods import DoRA, LoRA, LoRAMini, MiSS, SwitchLoRA
from lora_mini_jax.models import Llama, LlamaConfig, load, save
from lora_mini_jax.models.hub import load_module
from lora_mini_jax.options import Export, Generate, Merge
from lora_mini_jax.quantized import Quantized, _quantized, quantize, quantized
from lora_mini_jax.runs.finetune import finetune
from lora_mini_jax.saved import storage
from lora_mini_jax.tasks.devices import reading
from lora_mini_jax.tasks.sites import all_targets
from lora_mini_jax.tasks.trained import Trained
from lora_mini_jax.tree import dense, flatten, unflatten
from tests import runs
from tests.cases import cross_entropy, draws, random_params, randomised, setup
from tests.test_laws import close

pytest.importorskip("qwix")

LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
          -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
          0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
"""The sixteen levels of QLoRA's NormalFloat, appendix E of its paper."""


CHAIN, READER, RELATED = LoRAMini(rank=2, a=4, b=5), DoRA(rank=2), SwitchLoRA(rank=2)


def every(*methods: Any) -> Any:
    """Each method in a test of its own."""
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


@cache
def base(layout: str, bits: Any) -> tuple[Any, Any, Any]:
    """The small model, its parameters quantised, and the same parameters dense again."""
    at = setup(layout)
    small = quantize(at.params, select(at.targets, "all-linear"), bits)
    flat = {path: dense(leaf) for path, leaf in flatten(small).items()}
    return at, small, flat


@cache
def applied(layout: str) -> Any:
    """The small model's call of dense parameters, compiled once for all methods."""
    at = setup(layout)
    return jax.jit(lambda params: at.model.apply({"params": params}, at.tokens))


class Two(nn.Module):
    """Two layers: one has whole blocks of 64 rows, the other has none."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6)(jnp.tanh(nn.Dense(20)(x)))


def test_nf4_is_the_nearest_of_its_levels_in_blocks_of_64():
    kernel = np.asarray(draws(jnp.zeros((128, 3))))
    small: Any = quantize({"k": jnp.asarray(kernel)}, [Target("k", kernel.shape)], "nf4")["k"]
    blocks = kernel.reshape(2, 64, 3)
    scales = np.abs(blocks).max(1, keepdims=True)
    nearest = np.abs((blocks / scales)[..., None] - np.array(LEVELS)).argmin(-1)
    wanted = (np.array(LEVELS)[nearest] * scales).reshape(128, 3)
    np.testing.assert_allclose(small.unbox(), wanted, atol=1e-6)
    assert small.array.qvalue.dtype.itemsize == 1


def test_int8_is_within_half_a_step_of_each_column():
    kernel = np.asarray(draws(jnp.zeros((50, 3))))
    small: Any = quantize({"k": jnp.asarray(kernel)}, [Target("k", kernel.shape)], "int8")["k"]
    step = np.abs(kernel).max(0) / 127
    assert (np.abs(small.unbox() - kernel) <= 0.51 * step).all()


@every(CHAIN, LoRA(rank=2), READER, MiSS(rank=3))
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_outputs_and_gradients_are_those_on_the_dense_form(method: Any, bits: Any):
    model, x = Two(), draws(jnp.zeros((5, 128)))
    params = random_params(model, x)
    kernels = select(linen.targets(model, params, x), "all-linear")
    small = quantize(params, kernels, bits)
    adapter = randomised(init(small, method, kernels), 0.1)

    def loss(trainable: Any, params: Any) -> Any:
        y = linen.adapt(model)(params, adapter.with_trainable(trainable), x)
        return jnp.mean(y**2), y

    of = jax.jit(jax.grad(loss, has_aux=True))
    flat = unflatten({path: dense(leaf) for path, leaf in flatten(small).items()})
    found, wanted, before = (of(adapter.trainable, each) for each in (small, flat, params))
    close(found, wanted, 1e-5)
    with pytest.raises(AssertionError, match="off by"):
        close(found, before, 1e-4)


@every(CHAIN, LoRA(rank=2), READER, MiSS(rank=3), RELATED)
@pytest.mark.parametrize(("layout", "bits"), [("plain", "nf4"), ("scan+remat", "int8")])
def test_adapted_call_on_quantised_kernels_is_that_of_the_merged_ones(
    method: Any, layout: str, bits: str
):
    at, small, flat = base(layout, bits)
    chosen = select(at.targets, "all-linear")
    adapter = randomised(init(small, method, chosen), 0.1)
    y = jax.jit(linen.adapt(at.model))(small, adapter, at.tokens)
    merged = merge(small, adapter)
    assert not any(isinstance(leaf, Quantized) for leaf in flatten(merged).values())
    close(y, applied(layout)(merged), 2e-5)
    assert jnp.abs(applied(layout)(unflatten(flat)) - y).max() > 1e-3
    changed = {p for p, leaf in flatten(merged).items() if not np.array_equal(leaf, flat[p])}
    assert changed == {target.path for target in chosen}


@pytest.mark.parametrize(("layout", "bits"), [("plain", "nf4"), ("scan+remat", "int8")])
def test_a_model_without_an_adapter_opens_its_kernels(layout: str, bits: str):
    at, small, flat = base(layout, bits)
    y = jax.jit(at.model.apply)({"params": small}, at.tokens)
    close(y, applied(layout)(unflatten(flat)), 2e-5)


def test_training_on_a_quantised_base_lowers_the_loss_and_leaves_it_alone():
    at, small, _ = base("scan+remat", "nf4")
    adapter = init(small, LoRAMini(rank=2, a=4, b=5), select(at.targets, "all-linear"))
    before = jax.tree.map(np.array, small)
    apply, tx = linen.adapt(at.model), optax.adam(1e-2)
    step = make_train_step(lambda p, a, b, key: cross_entropy(apply(p, a, b), b), tx)
    state, losses = TrainState.create(adapter, tx), []
    for _ in range(30):
        state, metrics = step(state, small, at.tokens)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(small)))


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize(("shape", "stack"), [((512, 1024), 0), ((8, 256, 256), 1)])
def test_to_quantise_takes_little_more_than_a_kernel_in_float32_twice(bits, shape, stack):
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    program: Any = _quantized.lower(kernel, Target("k", shape, stack), bits).compile()
    one = 4 * math.prod(shape[stack:])
    assert program.memory_analysis().temp_size_in_bytes <= 2.5 * one


@pytest.mark.parametrize("method", [LoRA(rank=2), LoRAMini(rank=2, a=4, b=5, outer_init="svd")])
def test_no_two_quantised_kernels_are_dense_at_once_to_draw_or_to_load_an_adapter(tmp_path, method):
    targets = [Target(f"layer_{i}/kernel", (128, 256)) for i in range(6)]
    dense_bytes = 4 * 128 * 256
    params = {f"layer_{i}": {"kernel": draws(jnp.zeros((128, 256)), i)} for i in range(6)}
    small = quantize(params, targets, "nf4")
    del params

    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    most, fold = [held()], adapter_module.fold_path

    def watched(*args: Any) -> Any:
        most.append(held())
        return fold(*args)

    with mock.patch.object(adapter_module, "fold_path", watched):
        storage.save(tmp_path / "it", init(small, method, targets), small)
        loaded = storage.load(tmp_path / "it", small)
    assert len(most) == 13
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert max(most) - most[0] < 2 * own + 1.5 * dense_bytes


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_dora_starts_at_a_narrow_base_as_it_is_opened(bits: Any):
    model, x = nn.Dense(96, use_bias=False), draws(jnp.zeros((4, 64)))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(model, x))
    targets = linen.targets(model, params, x)
    small = quantize(params, targets, bits)
    norm = np.linalg.norm(np.float32(small["kernel"].unbox()), axis=0)
    adapter = init(small, DoRA(rank=2), targets)
    np.testing.assert_allclose(adapter.frozen["kernel"]["norm"], norm, rtol=1e-6)
    with pytest.raises(UserError, match="kernel is quantised already"):
        quantize(small, targets, bits)


def test_a_quantised_tree_goes_onto_a_mesh_as_training_reads_it(tmp_path: Any):
    options = replace(runs.options(tmp_path), quantize="nf4", mesh="fsdp=2,tensor=4")
    module = load_module(options.model)
    _, read = load(options.model, **reading(options, module))
    _, whole = load(options.model)
    kernels, _ = all_targets(module)
    small = quantize(whole, select(kernels, "all-linear"), "nf4")
    mesh = sharding.make_mesh("fsdp=2,tensor=4")
    put = jax.device_put(small, sharding.of_params(mesh, small, kernels))
    split = 0
    for a, b in zip(jax.tree.leaves(put), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        split += not a.sharding.is_fully_replicated
    assert split > 7


def test_unknown_bits_are_refused():
    with pytest.raises(UserError, match="choose one of int8, nf4"):
        quantize({"k": jnp.ones((4, 4))}, [Target("k", (4, 4))], "int3")  # ty: ignore


def test_a_folder_is_read_quantised_and_written_dense(tmp_path: Any):
    model = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
                              num_hidden_layers=1, num_attention_heads=2,
                              num_key_value_heads=1))  # fmt: skip
    tokens = jnp.ones((1, 2), int)
    params = random_params(model, tokens)
    save(tmp_path / "dense", model, params)
    kernels = {t.path: t for t in select(linen.targets(model, params, tokens), "mlp")}

    def convert(path: str, leaf: jax.Array) -> Any:
        return quantized(leaf, kernels[path], "int8") if path in kernels else leaf

    model, small = load(tmp_path / "dense", convert=convert)
    small_paths = {p for p, leaf in flatten(small).items() if isinstance(leaf, Quantized)}
    assert small_paths == set(kernels)
    assert all(map(np.array_equal, jax.tree.leaves(small),
                   jax.tree.leaves(quantize(params, kernels.values(), "int8"))))  # fmt: skip
    save(tmp_path / "again", model, small)
    again = flatten(load(tmp_path / "again")[1])
    assert all(np.array_equal(again[p], dense(leaf)) for p, leaf in flatten(small).items())


def quiet(line: str) -> None:
    """Instead of printing."""


def given(place: Path, bits: Any, name: str) -> Any:
    """The options of a run that goes far enough to tell its adapter from none."""
    return runs.options(place, samples=0, quantize=bits, learning_rate=0.1, save_every=2,
                        output_dir=str(place / name))  # fmt: skip


@pytest.fixture(scope="module", params=["nf4", "int8"])
def trained(request: Any, tmp_path_factory: Any) -> tuple[Path, str]:
    """A run on a quantised base, whose folder is beside the model's."""
    place = tmp_path_factory.mktemp(request.param)
    finetune(given(place, request.param, "run"), say=quiet)
    return place, request.param


@pytest.mark.parametrize("trained", ["nf4"], indirect=True)
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_been(trained: tuple[Path, str]):
    place, bits = trained
    with runs.stopped_at(3), pytest.raises(KeyboardInterrupt):
        finetune(given(place, bits, "stopped"), say=quiet)
    finetune(given(place, bits, "stopped"), say=quiet)
    for name in ("adapter.json", "adapter.safetensors"):
        again, whole = (place / run / "adapter" / name for run in ("stopped", "run"))
        assert again.read_bytes() == whole.read_bytes()


def test_the_share_that_is_trained_is_of_the_dense_model(trained: tuple[Path, str]):
    place, _ = trained
    summary = json.loads((place / "run" / "summary.json").read_text())
    _, params = load(place / "model")
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert summary["trainable_share"] == summary["trainable"] / size


def test_the_commands_take_the_base_as_it_was_trained_on(trained: tuple[Path, str]):
    place, bits = trained
    adapter = str(place / "run" / "adapter")
    model, params = Trained.read(str(adapter), str(place / "model")).load_base()
    assert {leaf.bits for leaf in flatten(params).values() if isinstance(leaf, Quantized)} == {bits}
    tokens = jnp.arange(24).reshape(2, 12) + 3
    y = linen.adapt(model)(params, storage.load(adapter, params), tokens)

    out = str(place / "merged")
    run_merge(Merge(model=str(place / "model"), adapter=adapter, output_dir=out), say=quiet)
    plain, merged = load(Path(out))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged))
    np.testing.assert_allclose(plain.apply({"params": merged}, tokens), y, rtol=0, atol=1e-5)
    _, dense_base = load(place / "model")
    unquantised = merge(dense_base, storage.load(adapter, dense_base, allow_different_base=True))
    assert jnp.abs(plain.apply({"params": unquantised}, tokens) - y).max() > 1e-3

    asked: Any = {"prompt": ("say red 0",), "max_new_tokens": 4}
    written = [run_generate(Generate(model=str(place / name), adapter=own, **asked), say=quiet)
               for name, own in (("model", adapter), ("merged", None))]  # fmt: skip
    assert written[0] == written[1]
    out = str(place / "peft")
    run_export(Export(model=str(place / "model"), adapter=adapter, output_dir=out), say=quiet)
    targets = linen.targets(plain, dense_base, tokens)
    again = peft.load(out, dense_base, targets, names=peft.names_of(plain))
    loaded = storage.load(adapter, params)
    update = merge(jax.tree.map(jnp.zeros_like, dense_base), loaded)
    close(merge(jax.tree.map(jnp.zeros_like, dense_base), again), update, 2e-5)


def test_another_base_or_a_dense_one_is_refused(trained: tuple[Path, str]):
    place, bits = trained
    adapter = str(place / "run" / "adapter")
    with pytest.raises(UserError, match=f"trained on a base in {bits}: quantise"):
        storage.load(adapter, load(place / "model")[1])
    if not (other := place / "other").exists():
        runs.write_model(other, seed=9)
    with pytest.raises(UserError, match="another base model"):
        Trained.read(str(adapter), str(other)).load()
