"""Attention by a kernel for TPUs: in Pallas' interpreter, for the numbers of plain attention."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_mini_jax import hardware
from lora_mini_jax.models import Llama, LlamaConfig, splash_attention
from lora_mini_jax.models.attention import attend
from lora_mini_jax.models.masks import Seen, look_back
from tests.gpus import pretend_tpu

ROWS, TIME, HEADS, WIDTH = 2, 256, 4, 16
PLACES = np.arange(TIME)
SEGMENTS = jnp.asarray([1 + (PLACES > 99), PLACES < 201], jnp.int32)
LAYERS = ("sliding_attention", "full_attention")
Calls = list[int | None]


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """On a machine with one TPU: the windows of the kernels that were made."""
    seen: Calls = []
    made, kernel = splash.make_splash_mha, splash_attention._kernel

    def noted(time: int, heads: int, window: int | None, softcap: float | None) -> Any:
        seen.append(window)
        return kernel(time, heads, window, softcap)

    pretend_tpu(monkeypatch)
    monkeypatch.setattr(splash, "make_splash_mha", partial(made, interpret=True))
    monkeypatch.setattr(splash_attention, "_kernel", noted)
    monkeypatch.setattr(splash_attention, "SHORTEST", TIME)
    return seen


def drawn(dtype: Any = jnp.float32, time: int = TIME, kv_heads: int = HEADS // 2) -> Any:
    rng = np.random.default_rng(0)
    shapes = [(ROWS, time, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def both(*given: Any, **how: Any) -> Any:
    """The output, and gradients in queries, keys and values."""

    def run(*given: Any) -> Any:
        out, back = jax.vjp(lambda *given: attend(*given, **how), *given)
        return out, back(jnp.cos(out))

    return jax.jit(run)(*given)


HOW: dict[str, dict[str, Any]] = {
    "causal": {},
    "segments": {"seen": Seen(SEGMENTS, SEGMENTS)},
    "window, scaled, capped": {"seen": Seen(windows=(70,)), "scale": 0.7, "softcap": 2.0},
    "one of two": {"seen": Seen(SEGMENTS, SEGMENTS, None, (None, 40), jnp.asarray(1))},
}


def close(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", HOW.values(), ids=list(HOW))
def test_values_and_gradients_are_those_of_plain_attention(how: dict[str, Any], calls: Calls):
    got = both(*drawn(), **how)
    assert calls == list(how.get("seen", Seen()).windows)
    with hardware.without_kernels():
        want = both(*drawn(), **how)
    close(got, want)


def test_on_a_mesh_every_device_attends_to_its_own(calls: Calls):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    given, seen = drawn(), Seen(SEGMENTS, SEGMENTS, None, (None, 40), jnp.asarray(1))
    with hardware.on_mesh(NamedSharding(mesh, PartitionSpec(("data",)))):
        split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        placed = jax.device_put(given, split)
        got = both(*placed, seen=seen)
        compiled: Any = jax.jit(lambda *given: attend(*given, seen)).lower(*placed).compile()
    assert len(calls) == 4
    assert got[0].sharding.is_equivalent_to(split, 4)
    assert not re.findall("all-gather|all-reduce|all-to-all", compiled.as_text())
    with hardware.without_kernels():
        close(got, both(*given, seen=seen))


def test_what_the_kernel_cannot_do_is_done_without_it(calls: Calls, monkeypatch):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
    mask = Seen(SEGMENTS, SEGMENTS).mask(0, TIME, TIME)
    cache = {"length": jnp.zeros((), jnp.int32), "segment_ids": jnp.zeros((ROWS, TIME), jnp.int32)}
    cases: list[tuple[Any, dict[str, Any]]] = [
        (drawn(time=TIME // 2), {}),
        (drawn(time=TIME + 8), {}),
        (drawn(), {"bias": jnp.zeros((1, HEADS, TIME, TIME))}),
        (drawn(), {"seen": mask}),
        (drawn(), {"seen": look_back(SEGMENTS, SEGMENTS, cache)}),
    ]
    for given, how in cases:
        jax.eval_shape(lambda *given, how=how: attend(*given, **how), *given)
    for axes in (("tensor",), ("data",)):  # two rows for four devices, two heads for four
        with hardware.on_mesh(NamedSharding(mesh, PartitionSpec(axes))):
            jax.eval_shape(attend, *drawn())
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    jax.eval_shape(attend, *drawn())  # XLA could not split it
    assert not calls


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_models_train_by_it(kind: str, scan: bool, calls: Calls):
    local: dict[str, Any] = {"sliding_window": 70, "layer_types": LAYERS}
    local = local if kind.startswith("Gemma") else {}
    config = LlamaConfig(
        architecture=kind, vocab_size=32, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, head_dim=16, **local,
    )  # fmt: skip
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 32, (ROWS, TIME)), jnp.int32)
    model = Llama(config, scan_layers=scan, remat="dots")
    with hardware.without_kernels():
        params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def logits(params: Any) -> Any:
        return model.apply({"params": params}, tokens, None, SEGMENTS)

    def value(params: Any) -> Any:
        return jnp.var(logits(params))

    got = jax.value_and_grad(value)(params)
    assert set(calls) == {None, *filter(None, (local.get("sliding_window"),))}
    with hardware.without_kernels():
        close(got, jax.value_and_grad(value)(params))
